"""The shape of a model, from its configuration alone: it is built on the meta device, where weights take no memory."""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from sightline.memory import Anatomy, Decoder, Matrices, Scheme, Tower
from sightline.models.loading import LoadFailed
from sightline.models.published import PUBLISHED

PROJECTION = 128
"""Width of ColQwen2.5's vectors."""

_KIMI_LINEAR = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj")
_SCHEMES: Mapping[str, tuple[Scheme, ...]] = {
    "qwen2_vl": ("bfloat16", "8bit", "float32"),
    "qwen2_5_vl": ("bfloat16", "8bit", "float32"),
    "colqwen": ("bfloat16", "float32"),
    "kimi_vl": ("8bit", "4bit", "bfloat16", "float32"),
    "gpt_oss": ("mxfp4", "bfloat16", "float32"),
    "blip": ("float32", "bfloat16", "float16"),
}
"""In which schemes a predictor can hold a model of a kind, its default with published weights first."""

DEFAULT_PIXELS: Mapping[str, int] = {"qwen2_vl": 12_845_056, "qwen2_5_vl": 12_845_056, "kimi_vl": 4096 * 14 * 14}
"""Where a folder has no preprocessor file."""


def anatomy_of(model: str, *, cache_dir: str | Path | None = None, revision: str | None = None) -> Anatomy:
    """Of a published model by its hub id, or of a folder with a config.json; no weights are read, nothing is fetched.

    Raises LoadFailed for what is neither, and for a kind that no predictor serves.
    """
    published = PUBLISHED.get(model)
    if published is not None:
        return _anatomy(model, json.dumps(published.config), published.max_pixels)
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise LoadFailed(f"{model}: neither a folder with a config.json nor one of {', '.join(PUBLISHED)}")
    config = json.loads((folder / "config.json").read_text())
    return _anatomy(folder.name, json.dumps(config), _max_pixels(folder, config))


@lru_cache(maxsize=32)
def _anatomy(name: str, text: str, max_pixels: int | None) -> Anatomy:
    raw: dict[str, Any] = json.loads(text)
    kind = str(raw.get("model_type"))
    if "ColQwen2_5" in raw.get("architectures", ()):
        kind = "colqwen"
    if kind not in _SCHEMES:
        raise LoadFailed(f"{name}: no predictor serves a model of type {kind}")
    model = empty(raw)
    linears, experts, rest, exact = _counted(model, kind)
    return Anatomy(
        name=name,
        kind=kind,
        parameters=linears.values + experts.values + rest,
        linears=linears,
        experts=experts,
        rest=rest,
        exact=exact,
        decoder=_decoder(model.config, kind),
        tower=_tower(model.config, kind),
        schemes=_SCHEMES[kind],
        max_pixels=max_pixels,
        stored_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"),
        stored_scheme=raw.get("quantization_config", {}).get("quant_method"),
        is_demo=bool(raw.get("sightline_demo_model")),
    )


def empty(raw: Mapping[str, Any]) -> Any:  # noqa: ANN401 - a PreTrainedModel
    """The model of a configuration, on the meta device."""
    fields = {name: value for name, value in raw.items() if name not in {"model_type", "quantization_config"}}
    kind = raw["model_type"]
    if kind == "kimi_vl":
        from sightline.models.kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration

        return KimiVLForConditionalGeneration.empty(KimiVLConfig(**fields))
    config: Any = AutoConfig.for_model(kind, **fields)
    config._attn_implementation = "eager"
    with torch.device("meta"), no_init_weights():
        if "ColQwen2_5" in raw.get("architectures", ()):
            model: Any = transformers.Qwen2_5_VLModel(config)  # what colpali_engine's class is, with a head of
            model.custom_text_proj = torch.nn.Linear(config.get_text_config().hidden_size, PROJECTION)
        else:
            model = getattr(transformers, raw["architectures"][0])(config)
    model.tie_weights()
    return model


def _counted(model: Any, kind: str) -> tuple[Matrices, Matrices, int, int]:  # noqa: ANN401
    """Parameters that quantisation takes, routed experts, all others, and numbers that stay float32. Tied ones once."""
    linears, experts, rest, exact = Matrices(), Matrices(), 0, 0
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if path.endswith("experts") and tensor.ndim == 3:
                experts += Matrices(tensor.numel(), tensor.numel() // tensor.shape[-1])
            elif name == "weight" and _is_quantised(path, module, kind):
                linears += Matrices(tensor.numel(), tensor.shape[0])
            else:
                rest += tensor.numel()
        derived = module._non_persistent_buffers_set
        exact += sum(b.numel() for n, b in module.named_buffers(recurse=False) if n not in derived)
    return linears, experts, rest, exact


def _is_quantised(path: str, module: Any, kind: str) -> bool:  # noqa: ANN401
    if type(module) is not torch.nn.Linear or path.endswith("lm_head"):
        return False
    if kind == "kimi_vl":  # see models/kimi_vl/quantize.py
        return "language_model.layers" in path and path.rpartition(".")[2] in _KIMI_LINEAR
    return True


def _decoder(config: Any, kind: str) -> Decoder | None:  # noqa: ANN401
    text = config.get_text_config() if kind != "blip" else config.text_config
    heads = int(text.num_attention_heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    layers = int(text.num_hidden_layers)
    shape: dict[str, Any] = {
        "layers": layers,
        "hidden": int(text.hidden_size),
        "heads": heads,
        "queries": heads * width,
        "wide": 3 * int(text.intermediate_size),
        "vocabulary": int(text.vocab_size),
        "max_length": int(text.max_position_embeddings),
    }
    if kind == "blip":
        both = 2 * layers * int(text.hidden_size)
        side = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
        shape["wide"] = 2 * int(text.intermediate_size)
        return Decoder(**shape, cache=both, cross_cache=both, cross_tokens=side**2 + 1, is_eager=True)
    if kind == "kimi_vl":  # the latent, once for all heads
        shape["queries"] = heads * max(int(text.qk_nope_head_dim + text.qk_rope_head_dim), int(text.v_head_dim))
        routed = int(text.num_experts_per_tok) * 3 * int(text.moe_intermediate_size)
        shape["wide"] = max(shape["wide"], routed + int(text.num_experts_per_tok) * int(text.hidden_size))
        return Decoder(**shape, copies=8, cache=layers * int(text.kv_lora_rank + text.qk_rope_head_dim))
    each = 2 * int(text.num_key_value_heads) * width
    if kind == "colqwen":
        shape["vocabulary"] = 0
        return Decoder(**shape, cache=0)
    if kind == "gpt_oss":
        windowed = sum(kind == "sliding_attention" for kind in text.layer_types)
        chosen = int(text.num_experts_per_tok)
        shape["wide"] = chosen * (10 * int(text.intermediate_size) + 4 * int(text.hidden_size))
        return Decoder(
            **shape,
            cache=(layers - windowed) * each,
            window_cache=windowed * each,
            window=int(text.sliding_window),
            is_eager=True,
        )
    return Decoder(**shape, cache=layers * each)


def _tower(config: Any, kind: str) -> Tower | None:  # noqa: ANN401
    if kind == "gpt_oss":
        return None
    vision = config.vision_config
    side = int(vision.patch_size)
    is_qwen = kind in {"qwen2_vl", "qwen2_5_vl", "colqwen"}
    hidden = int(vision.hidden_size if kind != "qwen2_vl" else vision.embed_dim)
    wide = int(vision.intermediate_size) if hasattr(vision, "intermediate_size") else int(vision.mlp_ratio * hidden)
    merges = {"kimi_vl": "merge_kernel_size", "blip": ""}
    merge = getattr(vision, merges.get(kind, "spatial_merge_size"), 1)
    return Tower(
        hidden=hidden,
        intermediate=wide,
        heads=int(vision.num_heads if is_qwen else vision.num_attention_heads),
        wide=3 if kind in {"qwen2_5_vl", "colqwen"} else 2,
        patch_values=3 * side * side * (int(vision.temporal_patch_size) if is_qwen else 1),
        patch_side=side,
        merge=int(merge[0] if isinstance(merge, (list, tuple)) else merge),
        copies=16 if is_qwen else 11,
        is_eager=kind == "blip",
    )


def _max_pixels(folder: Path, config: Mapping[str, Any]) -> int | None:
    kind = config.get("model_type")
    if kind == "gpt_oss":
        return None
    path = folder / "preprocessor_config.json"
    said: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if kind == "kimi_vl":
        side = int(said.get("patch_size", 14))
        return int(said.get("in_token_limit", 4096)) * side * side
    if kind == "blip":
        return int(config["vision_config"].get("image_size", 384)) ** 2
    size: dict[str, Any] = said.get("size", {})
    longest = size.get("longest_edge") or said.get("max_pixels")
    return int(longest) if longest else DEFAULT_PIXELS["qwen2_5_vl"]
