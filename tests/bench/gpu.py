"""`make bench-gpu`: full-size models of random weights on an NVIDIA GPU, beside what the machine can do at most.

On transformers' classes directly, as the `hf` engine calls them, without its queue. Needs no network. Without CUDA, or
with --dry, the same steps run with tiny versions of the configurations on the CPU: that shows that the bench works, and
says nothing about a GPU.
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig
from transformers.initialization import no_init_weights

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "predictors" / "src")]

from sightline.memory import GIB, Anatomy  # noqa: E402
from sightline.models.anatomy import anatomy_of  # noqa: E402
from sightline.models.published import BLIP_LARGE, COLQWEN2_5, GPT_OSS_20B, GPT_OSS_120B, QWEN2_5_VL_7B  # noqa: E402

STREAMS = (1, 16, 64)
PROMPT_TEXT = 32
GOALS = {"prefill": 50, "pages": 50, "decode x64": 40}
"""In per cent of the roofline, on a GPU."""

SMALL_TEXT = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 512,
}
SMALL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL_QWEN = {
    "text_config": {
        **SMALL_TEXT,
        **SMALL_HEADS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    },
    "image_token_id": 500,
    "video_token_id": 501,
    "vision_start_token_id": 502,
    "vision_end_token_id": 503,
}
SMALL_OSS = {**SMALL_TEXT, **SMALL_HEADS, "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 2}
SMALL_BLIP = {
    "text_config": {
        **SMALL_TEXT,
        "num_attention_heads": 4,
        "encoder_hidden_size": 64,
        "bos_token_id": 500,
        "sep_token_id": 102,
    },
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 96,
    },
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a device does at most, measured: floating-point operations and bytes a second."""

    name: str
    device: torch.device
    dtype: torch.dtype
    flops: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One line: so many units a second, of which the roofline allows `bound`."""

    model: str
    what: str
    unit: str
    rate: float
    bound: float
    goal: int | None = None

    @property
    def percent(self) -> float:
        return 100 * self.rate / self.bound


def timed(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of one call, after two that are not counted; the mean of as many as `seconds` allow, three at least."""
    for _ in range(2):
        work()
    _sync(device)
    begun, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - begun < seconds:
        work()
        _sync(device)
        calls += 1
    return (time.perf_counter() - begun) / calls


def measured_machine(device: torch.device, dtype: torch.dtype, *, is_dry: bool, seconds: float) -> Machine:
    """One large matrix product, and one large copy (read and written: twice its bytes)."""
    side, numbers = (256, 1 << 20) if is_dry else (8192, 1 << 30)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    flops = 2 * side**3 / timed(lambda: left @ right, device, seconds)
    source = torch.empty(numbers, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * numbers / timed(lambda: target.copy_(source), device, seconds)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU (dry: the figures mean nothing)"
    return Machine(name, device, dtype, flops, bandwidth)


def random_model(raw: Mapping[str, Any], machine: Machine, attention: str) -> Any:
    """A model of a configuration, made on the device, with small random weights."""
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    config: Any = AutoConfig.for_model(str(raw["model_type"]), **copy.deepcopy(fields))
    is_page = "ColQwen2_5" in raw["architectures"]
    kind = transformers.Qwen2_5_VLModel if is_page else getattr(transformers, raw["architectures"][0])
    config._attn_implementation = attention if raw["model_type"] not in ("gpt_oss", "blip") else "eager"
    torch.set_default_dtype(machine.dtype)
    try:
        with torch.device(machine.device), no_init_weights():
            model: Any = kind(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model.eval()


def merged(raw: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some of its values replaced, nested ones too."""
    result = dict(raw)
    for name, value in small.items():
        result[name] = merged(result.get(name, {}), value) if isinstance(value, Mapping) else value
    return result


def matrix_parameters(model: Any, *, active: float = 1.0) -> tuple[float, float]:
    """Parameters that multiply each token of the text model, and each patch of the tower.

    active  of routed experts, the share that a token uses
    """
    text = tower = 0.0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "embed_tokens" in name or "embeddings" in name:
            continue
        size = parameter.numel() * (active if "experts" in name else 1)
        if "visual" in name or "vision_model" in name:
            tower += size
        else:
            text += size
    return text, tower


# --- the models ------------------------------------------------------------------------------------------------------


def qwen_inputs(model: Any, rows: int, side: int, machine: Machine) -> tuple[dict[str, torch.Tensor], int, int]:
    """Inputs of `rows` prompts with one image each, their tokens, and the patches of one image."""
    vision = model.config.vision_config
    across = side // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
    tokens = across**2 // vision.spatial_merge_size**2
    ids = torch.full((rows, tokens + PROMPT_TEXT), 20)
    ids[:, 4 : 4 + tokens] = model.config.image_token_id
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).long(),
        "pixel_values": torch.randn(rows * across**2, 3 * vision.temporal_patch_size * vision.patch_size**2),
        "image_grid_thw": torch.tensor([[1, across, across]] * rows),
    }
    return {name: tensor.to(machine.device) for name, tensor in inputs.items()}, ids.shape[1], across**2


def bench_qwen(machine: Machine, options: argparse.Namespace) -> list[Figure]:
    raw = merged(QWEN2_5_VL_7B, SMALL_QWEN) if options.dry else QWEN2_5_VL_7B
    model = random_model(raw, machine, options.attention)
    rows = 2 if options.dry else 8
    side = 112 if options.dry else 672
    inputs, length, patches = qwen_inputs(model, rows, side, machine)
    text, tower = matrix_parameters(model)

    def prefill() -> None:
        with torch.inference_mode():
            model(**inputs, use_cache=True, logits_to_keep=1)

    rate = rows / timed(prefill, machine.device, options.seconds)
    bound = machine.flops / (2 * (text * length + tower * patches))
    figures = [Figure("Qwen2.5-VL-7B", "prefill", "images/s", rate, bound, GOALS["prefill"])]
    return figures + decoding("Qwen2.5-VL-7B", model, machine, options)


def bench_pages(machine: Machine, options: argparse.Namespace) -> list[Figure]:
    raw = merged(COLQWEN2_5, SMALL_QWEN) if options.dry else COLQWEN2_5
    model = random_model(raw, machine, options.attention)
    head = torch.nn.Linear(model.config.get_text_config().hidden_size, 128, device=machine.device, dtype=machine.dtype)
    rows = 2 if options.dry else 16
    inputs, length, patches = qwen_inputs(model, rows, 112 if options.dry else 28 * 27, machine)
    text, tower = matrix_parameters(model)

    def embed() -> None:
        with torch.inference_mode():
            vectors = head(model(**inputs, use_cache=False).last_hidden_state).float()
            torch.nn.functional.normalize(vectors, dim=-1)

    rate = rows / timed(embed, machine.device, options.seconds)
    bound = machine.flops / (2 * (text * length + tower * patches))
    return [Figure("ColQwen2.5", "pages", "pages/s", rate, bound, GOALS["pages"])]


def bench_blip(machine: Machine, options: argparse.Namespace) -> list[Figure]:
    raw = merged(BLIP_LARGE, SMALL_BLIP) if options.dry else BLIP_LARGE
    model = random_model(raw, machine, options.attention)
    side, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    rows = 2 if options.dry else 64
    pixels = torch.randn(rows, 3, side, side, device=machine.device, dtype=machine.dtype)
    _, tower = matrix_parameters(model)

    def encode() -> None:
        with torch.inference_mode():
            model.vision_model(pixel_values=pixels)

    rate = rows / timed(encode, machine.device, options.seconds)
    return [Figure("BLIP-large", "encode", "images/s", rate, machine.flops / (2 * tower * ((side // patch) ** 2 + 1)))]


def bench_oss(machine: Machine, options: argparse.Namespace) -> list[Figure]:
    raw, name = oss_that_fits(machine)
    if options.dry:
        raw, name = merged(raw, SMALL_OSS), "gpt-oss-shaped"
    return decoding(name, random_model(raw, machine, "eager"), machine, options)


def oss_that_fits(machine: Machine) -> tuple[Mapping[str, Any], str]:
    """In bf16, as there are no MXFP4 kernels without a network: the 120B, the 20B, or as many of its layers as fit."""
    if machine.device.type != "cuda":
        return GPT_OSS_20B, "gpt-oss-20b shape"
    room = 0.8 * torch.cuda.mem_get_info(machine.device)[0]
    for raw, model in ((GPT_OSS_120B, "openai/gpt-oss-120b"), (GPT_OSS_20B, "openai/gpt-oss-20b")):
        anatomy: Anatomy = anatomy_of(model)
        if anatomy.weights("bfloat16") < room:
            return raw, f"{model.rpartition('/')[2]} shape, bf16"
    layers = int(GPT_OSS_20B["num_hidden_layers"] * room / anatomy_of("openai/gpt-oss-20b").weights("bfloat16"))
    return {**GPT_OSS_20B, "num_hidden_layers": layers}, f"gpt-oss-20b shape, {layers} layers, bf16"


def decoding(name: str, model: Any, machine: Machine, options: argparse.Namespace) -> list[Figure]:
    """Tokens a second of 1, 16 and 64 greedy streams of text, all weights that a step uses read once."""
    config = model.config.get_text_config()
    steps = 4 if options.dry else 64
    prompt = 16 if options.dry else 512
    experts, chosen = getattr(config, "num_local_experts", 0), getattr(config, "num_experts_per_tok", 0)
    figures: list[Figure] = []
    for streams in STREAMS:
        share = 1 - (1 - chosen / experts) ** streams if experts else 1.0  # of the experts, if tokens choose at random
        text, _ = matrix_parameters(model, active=share)
        work, _ = matrix_parameters(model, active=chosen / experts if experts else 1.0)
        size = machine.dtype.itemsize
        bound = streams / max(text * size / machine.bandwidth, 2 * work * streams / machine.flops)
        step = _decoder(model, streams, prompt, steps, machine, is_graphed=options.graphs)
        rate = streams / timed(step, machine.device, options.seconds)
        goal = GOALS.get(f"decode x{streams}") if name.startswith("Qwen") else None
        how = ", graph" if options.graphs and machine.device.type == "cuda" else ""
        figures.append(Figure(name, f"decode x{streams}{how}", "tokens/s", rate, bound, goal))
    return figures


def _decoder(
    model: Any, streams: int, prompt: int, steps: int, machine: Machine, *, is_graphed: bool
) -> Callable[[], None]:
    """One decode step over a static cache that holds the prompt; as a CUDA graph where asked."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=prompt + steps)
    ids = torch.full((streams, prompt), 20, device=machine.device)
    position = torch.tensor([prompt], device=machine.device)
    token = torch.full((streams, 1), 20, device=machine.device)

    def step() -> None:
        with torch.inference_mode():
            for layer in cast("list[Any]", cache.layers):  # the same step again, not one behind it
                layer.cumulative_length.fill_(prompt)
                if hasattr(layer, "cumulative_length_int"):  # of a layer with a window
                    layer.cumulative_length_int = prompt
            model(
                input_ids=token,
                past_key_values=cache,
                position_ids=position.expand(streams, 1),
                use_cache=True,
            )

    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if not (is_graphed and machine.device.type == "cuda"):
        return step
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


BENCHES = {"qwen": bench_qwen, "pages": bench_pages, "blip": bench_blip, "oss": bench_oss}


# --- the report ------------------------------------------------------------------------------------------------------


def table(machine: Machine, figures: Sequence[Figure], *, is_dry: bool) -> str:
    """Markdown."""
    dtype = str(machine.dtype).removeprefix("torch.")
    lines = [
        f"{machine.name}, torch {torch.__version__}, transformers {transformers.__version__}; measured: matrix product "
        f"{machine.flops / 1e12:.2f} TFLOP/s in {dtype}, memory {machine.bandwidth / 1e9:.1f} GB/s",
        "",
        "| model, random weights | what | measured | roofline | % | goal |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for figure in figures:
        goal = "" if figure.goal is None else f"≥ {figure.goal} %"
        lines.append(
            f"| {figure.model} | {figure.what} | {figure.rate:.3g} {figure.unit} | {figure.bound:.3g} | "
            f"{figure.percent:.1f} | {goal} |"
        )
    if is_dry:
        lines += ["", "DRY: tiny models on a CPU. This shows that the bench runs, nothing else."]
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny models; the default without CUDA")
    parser.add_argument("--only", action="append", choices=[*BENCHES], help="repeatable")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--attention", choices=["sdpa", "flash_attention_2", "eager"], default="sdpa")
    parser.add_argument("--graphs", action="store_true", help="decode steps as CUDA graphs")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    options.dry = options.dry or not torch.cuda.is_available()
    if options.dry:
        options.seconds = min(options.seconds, 0.05)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.dry else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    machine = measured_machine(device, dtype, is_dry=options.dry, seconds=options.seconds)
    figures: list[Figure] = []
    for name in options.only or BENCHES:
        figures += BENCHES[name](machine, options)
        if device.type == "cuda":
            print(f"{name}: peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB", file=sys.stderr)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    if options.json:
        said = [
            {"model": f.model, "what": f.what, "unit": f.unit, "rate": f.rate, "bound": f.bound, "goal": f.goal}
            for f in figures
        ]
        print(json.dumps({"dry": options.dry, "machine": machine.name, "figures": said}))
    else:
        print(table(machine, figures, is_dry=options.dry))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
