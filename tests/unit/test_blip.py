"""BLIP with our small checkpoint: mechanics only. What it says is measured elsewhere (`make accuracy`)."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers import BlipConfig, BlipForConditionalGeneration

from sightline.engines.base import Generated
from sightline.errors import InvalidParameter
from sightline.models.blip import Blip, Prompt
from sightline.models.loading import LoadFailed
from sightline.settings import TINY, BlipSettings
from sightline.wire import Sampling
from tests.unit.checkpoints import DAMAGE, Weights, change_config, change_weights, copy_of

CHECKPOINT = TINY / "blip"
GREEDY = Sampling(max_tokens=24)


def load(model: Path = CHECKPOINT, **options: object) -> Blip:
    return Blip(BlipSettings(_env_file=None, auth="off", model=str(model), device="cpu", threads=1, **options))


@pytest.fixture(scope="module")
def model() -> Blip:
    return load()


def picture(color: str = "red", size: tuple[int, int] = (320, 200)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=color)
    return image


def nobody_left(index: int) -> bool:
    return False


def answer(model: Blip, *prompts: Prompt, sampling: Sampling = GREEDY) -> list[Generated]:
    return model.generate(prompts, sampling, nobody_left)


def said(model: Blip, image: Image.Image, prefix: str = "") -> str:
    prompt = model.preprocess(image, prefix)
    return model.postprocess(prompt, answer(model, prompt)[0])


class TestPrompts:
    @pytest.mark.parametrize("size", [(3, 3), (144, 144), (600, 3), (3, 600), (1000, 1000)])
    def test_images_of_any_shape_become_a_square(self, model: Blip, size: tuple[int, int]) -> None:
        prompt = model.preprocess(picture(size=size))

        assert prompt.pixel_values.shape == (3, model.image_side, model.image_side)
        assert prompt.pixel_values.dtype == torch.float32

    def test_without_a_prefix_there_is_only_the_begin_token(self, model: Blip) -> None:
        assert model.preprocess(picture()).input_ids.tolist() == [model._begin]

    def test_a_prefix_is_read_in_lower_case(self, model: Blip) -> None:
        upper, lower = (model.preprocess(picture(), text) for text in ("A Picture OF", "a picture of"))

        assert torch.equal(upper.input_ids, lower.input_ids)

    @pytest.mark.parametrize("token", ["[SEP]", "[PAD]", "[DEC]", "[ENC]", "[CLS]", "[MASK]", "[UNK]", "[SEP][SEP]"])
    def test_control_tokens_in_a_text_are_only_text(self, model: Blip, token: str) -> None:
        prompt = model.preprocess(picture(), f"a {token} b")

        special = set(model._tokenizer.all_special_ids)
        assert [token_id for token_id in prompt.input_ids[1:].tolist() if token_id in special] == []

    def test_longer_than_half_the_context_is_refused(self, model: Blip) -> None:
        with pytest.raises(InvalidParameter) as caught:
            model.preprocess(picture(), "a " * 4096)

        assert caught.value.code == "prompt_too_long"

    @pytest.mark.parametrize("prefix", ["é" * 8192, "x" * 8192, "日本 🙂", "\x00\x01", "\u202e"])
    def test_text_that_the_vocabulary_does_not_know_is_taken(self, model: Blip, prefix: str) -> None:
        assert len(model.preprocess(picture(), prefix).input_ids) <= model._half_context

    def test_the_longest_prefix_still_leaves_room_for_a_caption(self, model: Blip) -> None:
        prompt = model.preprocess(picture(), "a " * (model._half_context - 1))

        (generated,) = answer(model, prompt, sampling=Sampling(max_tokens=4096))

        assert 1 <= len(generated.token_ids) <= model._half_context
        with pytest.raises(InvalidParameter):
            model.preprocess(picture(), "a " * model._half_context)


class TestBatches:
    def prompts(self, model: Blip) -> list[Prompt]:
        return [
            model.preprocess(picture("red")),
            model.preprocess(picture("blue", (90, 400)), "a picture of"),
            model.preprocess(picture("green", (400, 90)), "what nobody ever said of any picture in this small world"),
            model.preprocess(picture("black", (64, 64)), "there is"),
        ]

    def test_give_the_same_tokens_as_each_prompt_alone(self, model: Blip) -> None:
        prompts = self.prompts(model)
        assert len({len(prompt.input_ids) for prompt in prompts}) == 4, "nothing is padded"

        assert answer(model, *prompts) == [answer(model, prompt)[0] for prompt in prompts]

    def test_give_the_same_logits_as_each_prompt_alone(self, model: Blip) -> None:
        """Padding of a batch is masked and takes no place: what greedy decoding looks at is the same to rounding."""
        prompts = self.prompts(model)
        together = logits(model, prompts)
        for row, prompt in enumerate(prompts):
            assert torch.allclose(together[row], logits(model, [prompt])[0], rtol=0, atol=1e-4)

    def test_the_order_is_kept(self, model: Blip) -> None:
        prompts = self.prompts(model)

        assert answer(model, *reversed(prompts)) == answer(model, *prompts)[::-1]

    def test_equals_transformers_own_generate(self, model: Blip) -> None:
        for prefix in ("", "a picture of"):
            image = picture("blue")
            inputs = model._processor(images=[image], text=[prefix], return_tensors="pt")
            theirs = model._model.generate(**inputs, max_new_tokens=24, do_sample=False)
            text = model._tokenizer.decode(theirs[0], skip_special_tokens=True).strip()

            assert said(model, image, prefix) == text

    def test_counts_are_those_of_the_prompt_without_padding(self, model: Blip) -> None:
        prompts = self.prompts(model)
        cells = (model.image_side // model._model.config.vision_config.patch_size) ** 2 + 1

        results = answer(model, *prompts)

        assert [result.image_tokens for result in results] == [cells] * 4
        assert [result.prompt_tokens for result in results] == [cells + len(prompt.input_ids) for prompt in prompts]

    def test_abandoned_rows_end_at_the_next_token_and_disturb_nobody(self, model: Blip) -> None:
        prompts = self.prompts(model)[:2]

        results = model.generate(prompts, GREEDY, lambda index: index == 0)

        assert len(results[0].token_ids) <= 1
        assert results[1] == answer(model, prompts[1])[0]

    def test_tokens_are_told_as_they_are_made(self, model: Blip) -> None:
        told: dict[int, list[int]] = {0: [], 1: []}

        results = model.generate(
            self.prompts(model)[:2], GREEDY, nobody_left, lambda row, token_id: told[row].append(token_id)
        )

        assert [tuple(told[row]) for row in (0, 1)] == [result.token_ids for result in results]


def logits(model: Blip, prompts: Sequence[Prompt]) -> torch.Tensor:
    """What the decoder says after each prompt, (B, vocabulary)."""
    with torch.inference_mode():
        return model.prefill(prompts, model.see(prompts)).logits


class TestAnswers:
    def test_a_prefix_begins_the_caption(self, model: Blip) -> None:
        caption = said(model, picture(), "A picture of")

        assert caption.startswith("a picture of ")
        assert len(caption) > len("a picture of ")

    def test_the_image_decides_what_is_said(self, model: Blip) -> None:
        assert len({said(model, picture(color)) for color in ("red", "blue", "green")}) == 3

    def test_max_tokens_cuts_and_says_so(self, model: Blip) -> None:
        prompt = model.preprocess(picture())

        (generated,) = answer(model, prompt, sampling=Sampling(max_tokens=3))

        assert (len(generated.token_ids), generated.finish_reason) == (3, "length")
        assert answer(model, prompt)[0].finish_reason == "stop"

    def test_a_seed_repeats(self, model: Blip) -> None:
        sampling = Sampling(max_tokens=12, temperature=2.0, seed=3)
        prompt = model.preprocess(picture())

        assert answer(model, prompt, sampling=sampling) == answer(model, prompt, sampling=sampling)

    def test_hold_no_control_tokens(self, model: Blip) -> None:
        prompt = model.preprocess(picture(), "[SEP] a")
        generated = Generated((model._begin, *answer(model, prompt)[0].token_ids, model._end, 0), "stop", 1)

        caption = model.postprocess(prompt, generated)

        assert caption == caption.strip()
        assert "[DEC]" not in caption
        assert "[PAD]" not in caption

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.integers(min_value=0, max_value=180), max_size=20))
    def test_a_reader_tells_the_same_text_piece_by_piece(self, model: Blip, ids: list[int]) -> None:
        prompt = model.preprocess(picture())
        reader = model.reader()

        pieces = "".join(reader.push(token_id) for token_id in ids)

        whole = model.postprocess(prompt, Generated(tuple(ids), "stop", 1))
        assert pieces.replace(" ", "") == whole.replace(" ", "")


class TestLoading:
    def test_a_small_model_says_what_it_is(self, model: Blip) -> None:
        digest = hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()

        assert (model.info.demo, model.info.name) == (True, "sightline-tiny-blip")
        assert model.info.revision == digest[:12]
        assert (model.runtime.backend, model.runtime.device, model.runtime.dtype) == ("hf", "cpu", "torch.float32")

    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
    def test_damaged_weights_are_never_served(self, damage: Callable[[Weights], None], tmp_path: Path) -> None:
        checkpoint = copy_of(CHECKPOINT, tmp_path)
        change_weights(checkpoint, damage)

        with pytest.raises(LoadFailed):
            load(checkpoint)

    def test_the_published_file_layout_loads(self, tmp_path: Path) -> None:
        """Older files hold the positions and the tied output once more, and a tokenizer without BLIP's own tokens."""

        def as_published(weights: Weights) -> None:
            words = "text_decoder.bert.embeddings.word_embeddings.weight"
            weights["text_decoder.bert.embeddings.position_ids"] = torch.arange(128)[None]
            weights["text_decoder.cls.predictions.decoder.weight"] = weights[words].clone()
            weights["text_decoder.cls.predictions.decoder.bias"] = weights["text_decoder.cls.predictions.bias"].clone()

        checkpoint = copy_of(CHECKPOINT, tmp_path)
        change_weights(checkpoint, as_published)
        change_config(checkpoint, forget_own_tokens, "tokenizer.json")
        change_config(checkpoint, lambda told: told.pop("bos_token", None), "tokenizer_config.json")
        change_config(checkpoint, lambda told: told.pop("extra_special_tokens", None), "tokenizer_config.json")

        published = load(checkpoint)

        assert len(published._tokenizer) == published._begin
        assert said(published, picture()) == said(load(), picture())

    def test_another_kind_of_model_is_refused(self) -> None:
        with pytest.raises(LoadFailed):
            load(TINY / "describe")

    def test_another_dtype_can_be_had(self) -> None:
        model = load(dtype="bfloat16")

        assert model.runtime.dtype == "torch.bfloat16"
        assert said(model, picture())


def forget_own_tokens(told: dict[str, Any]) -> None:
    told["added_tokens"] = [token for token in told["added_tokens"] if token["content"] not in ("[DEC]", "[ENC]")]
    told["model"]["vocab"] = {
        word: number for word, number in told["model"]["vocab"].items() if word not in ("[DEC]", "[ENC]")
    }


@pytest.mark.parametrize(
    ("vision", "millions"),
    [
        ({}, 224.0),
        (
            {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
            446.3,
        ),
    ],
    ids=["base", "large"],
)
def test_the_published_sizes_have_the_published_number_of_weights(vision: dict[str, Any], millions: float) -> None:
    """Tied weights counted once (reference/models.md §1.5)."""
    text = {"num_attention_heads": 12, "encoder_hidden_size": vision.get("hidden_size", 768)}
    with torch.device("meta"):
        model = BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text))
    model.tie_weights()
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6, 1) == millions
