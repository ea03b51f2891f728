"""The arithmetic of memory: against published counts, against checkpoint files, and against measured peaks."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig
from transformers.initialization import no_init_weights

from sightline.memory import (
    GIB,
    Anatomy,
    Load,
    Profile,
    activation_bytes,
    bytes_of,
    cache_bytes,
    estimate,
    load_of,
)
from sightline.models.anatomy import anatomy_of
from sightline.models.kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration
from sightline.models.loading import LoadFailed
from sightline.settings import TINY

LEAST, MOST = 1.0, 1.7
"""What is predicted, over what was measured: never less, and at most so much more."""

HALF: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "image_token_id": 151_655,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151_936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "qwen2_5_vl_vision",
        "depth": 4,
        "hidden_size": 640,
        "num_heads": 10,
        "intermediate_size": 1712,
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [3],
        "out_hidden_size": 896,
    },
}
"""A Qwen2.5-VL whose text model is that of Qwen2.5-0.5B."""


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that torch's allocator held at most, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    live = most = 0
    results: Any = profiled.profiler
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def random_model(raw: dict[str, Any], dtype: torch.dtype) -> Any:
    """A model of a configuration, its weights constant where they are many: only their room counts here."""
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            if raw["model_type"] == "kimi_vl":
                model: Any = KimiVLForConditionalGeneration(KimiVLConfig(**fields))
            else:
                kind = getattr(transformers, raw["architectures"][0])
                model = kind(AutoConfig.for_model(raw["model_type"], **fields))
    finally:
        torch.set_default_dtype(torch.float32)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.numel() < 1e6 else parameter.data.fill_(0.01)
    return model.eval()


def generate(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None, pad_token_id=0)


def text_of(rows: int, length: int, image_token: int = 0, image_tokens: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.full((rows, length), 20)
    ids[:, 4 : 4 + image_tokens] = image_token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run_qwen(model: Any, rows: int, side: int, text: int) -> int:
    vision = model.config.vision_config
    across = side // vision.patch_size
    tokens = across**2 // vision.spatial_merge_size**2
    inputs = text_of(rows, tokens + text, model.config.image_token_id, tokens)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.config.image_token_id).long()
    inputs["pixel_values"] = torch.randn(rows * across**2, 3 * 2 * vision.patch_size**2)
    inputs["image_grid_thw"] = torch.tensor([[1, across, across]] * rows)
    generate(model, inputs)
    return tokens + text


def run_kimi(model: Any, rows: int, side: int, text: int) -> int:
    patch = model.config.vision_config.patch_size
    across = side // patch
    inputs = text_of(rows, across**2 // 4 + text, model.config.image_token_id, across**2 // 4)
    inputs["pixel_values"] = torch.randn(rows * across**2, 3, patch, patch)
    inputs["image_grid_thw"] = torch.tensor([[1, across, across]] * rows)
    generate(model, inputs)
    return inputs["input_ids"].shape[1]


def run_oss(model: Any, rows: int, side: int, text: int) -> int:
    generate(model, text_of(rows, text))
    return text


def run_blip(model: Any, rows: int, side: int, text: int) -> int:
    with torch.inference_mode():
        seen = model.vision_model(pixel_values=torch.randn(rows, 3, side, side)).last_hidden_state
    generate(model.text_decoder, {**text_of(rows, text), "encoder_hidden_states": seen})
    return text


RUNS = {"describe": run_qwen, "generate": run_kimi, "enhance": run_oss, "blip": run_blip}


def check(anatomy: Anatomy, model: Any, run: Any, rows: int, side: int, text: int, size: int) -> None:
    length = 0

    def work() -> None:
        nonlocal length
        length = run(model, rows, side, text)

    measured = peak_of(work)
    load = Load(rows, length + 2, length, side * side if anatomy.tower else 0)
    assert anatomy.decoder is not None
    predicted = activation_bytes(anatomy, load, size) + rows * cache_bytes(anatomy.decoder, length + 2, size)
    assert LEAST <= predicted / measured <= MOST, f"{predicted} predicted, {measured} measured"


@pytest.mark.parametrize(
    ("name", "rows", "side", "text"),
    [
        ("describe", 8, 144, 20),
        ("describe", 1, 480, 20),
        ("describe", 4, 144, 1000),
        ("generate", 2, 384, 200),
        ("generate", 4, 96, 1000),
        ("enhance", 8, 0, 200),
        ("enhance", 1, 0, 1000),
        ("blip", 16, 144, 1),
        ("blip", 16, 144, 50),
    ],
)
def test_the_measured_peak_of_a_small_model_is_what_was_predicted(name: str, rows: int, side: int, text: int):
    raw = json.loads((TINY / name / "config.json").read_text())
    model = random_model(raw, torch.float32)
    check(anatomy_of(str(TINY / name)), model, RUNS[name], rows, side, text, 4)


def test_the_measured_peak_of_half_a_billion_parameters_is_what_was_predicted(tmp_path: Any):
    (tmp_path / "config.json").write_text(json.dumps(HALF))
    anatomy = anatomy_of(str(tmp_path))
    model = random_model(HALF, torch.bfloat16)
    assert sum(parameter.nbytes for parameter in model.parameters()) == anatomy.weights("bfloat16")
    check(anatomy, model, run_qwen, 2, 336, 20, 2)


@pytest.mark.parametrize("name", ["describe", "generate", "embed", "enhance", "blip"])
def test_the_weights_of_a_small_checkpoint_are_as_large_as_its_file(name: str):
    with (TINY / name / "model.safetensors").open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    stored = sum(
        end - begin for key, item in header.items() if key != "__metadata__" for begin, end in [item["data_offsets"]]
    )
    assert anatomy_of(str(TINY / name)).weights("float32") == stored


@pytest.mark.parametrize(
    ("model", "parameters", "cache"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", 8_292_166_656, 57_344),
        ("moonshotai/Kimi-VL-A3B-Instruct", 16_407_654_384, 31_104),
        ("vidore/colqwen2.5-v0.2", 3_754_622_976 + 2048 * 128 + 128, 0),
        ("openai/gpt-oss-120b", 116_829_156_672, 36_864),
        ("Salesforce/blip-image-captioning-base", 223_971_644, 36_864),
    ],
)
def test_published_models_have_their_published_sizes(model: str, parameters: int, cache: int):
    anatomy = anatomy_of(model)
    assert anatomy.parameters == parameters
    assert anatomy.decoder is not None
    assert 2 * anatomy.decoder.cache == cache


def test_gpt_oss_in_mxfp4_is_as_large_as_its_card_says_and_dequantised_four_times_that():
    anatomy = anatomy_of("openai/gpt-oss-120b")
    assert round(anatomy.weights("mxfp4") / GIB, 1) == 60.8
    assert round(anatomy.weights("bfloat16") / 1e9, 1) == 233.7


def test_kimi_in_8_bits_is_what_our_own_quantisation_holds():
    """The same count as the start of a server makes, module by module."""
    from sightline.models.kimi_vl.quantize import Room, bytes_per_dtype, prepare

    raw = json.loads((TINY / "generate" / "config.json").read_text())
    model = KimiVLForConditionalGeneration.empty(KimiVLConfig(**{k: v for k, v in raw.items() if k != "model_type"}))
    prepare(model, "8bit", torch.bfloat16, [Room(torch.device("meta"))])
    held = bytes_per_dtype(model)
    anatomy = anatomy_of(str(TINY / "generate"))
    assert held["int8"] == anatomy.linears.values + anatomy.experts.values
    in_float32 = 4 * (anatomy.linears.rows + anatomy.experts.rows + anatomy.exact)
    assert anatomy.weights("8bit") == held["int8"] + in_float32 + 2 * anatomy.rest


class TestEstimate:
    ANATOMY = "Qwen/Qwen2.5-VL-7B-Instruct"

    def made(self, gib: float, concurrency: int = 8):
        anatomy = anatomy_of(self.ANATOMY)
        load = load_of(anatomy, concurrency=concurrency, new_tokens=256, width=512)
        return estimate(anatomy, "bfloat16", load, Profile(int(gib * GIB), "cuda"))

    def test_more_at_once_take_more_until_they_do_not_fit(self):
        largest = self.made(24).largest
        assert self.made(24, largest).fits
        assert not self.made(24, largest + 1).fits

    def test_weights_that_do_not_fit_fit_at_no_concurrency(self):
        made = self.made(15)
        assert not made.fits
        assert made.largest == 0

    def test_the_total_is_the_sum_of_what_is_shown(self):
        made = self.made(24)
        assert made.total == made.weights + made.cache + made.activations + made.overhead

    def test_a_load_is_what_the_settings_allow(self):
        anatomy = anatomy_of(self.ANATOMY)
        load = load_of(anatomy, concurrency=8, new_tokens=256, width=512)
        assert load.prompt == 512 * 1024 // 28**2 + 512
        assert load.largest_pixels == 12_845_056
        assert load.context == load.prompt + 256


@pytest.mark.parametrize(
    ("text", "amount"), [("24GiB", 24 * GIB), ("500 MB", 500_000_000), ("1000", 1000), ("1.5g", 1_500_000_000)]
)
def test_amounts_of_memory_are_read(text: str, amount: int):
    assert bytes_of(text) == amount


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "GiB"])
def test_other_amounts_are_refused(text: str):
    with pytest.raises(ValueError, match="amount of memory"):
        bytes_of(text)


def test_a_model_that_no_predictor_serves_is_refused(tmp_path: Any):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(LoadFailed, match="bert"):
        anatomy_of(str(tmp_path))
    with pytest.raises(LoadFailed, match="neither"):
        anatomy_of(str(tmp_path / "nothing"))
