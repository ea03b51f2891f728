"""The enhancer: harmony format, held-out captions stay held out, complete files."""

from __future__ import annotations

import random

import pytest

from sightline.tiny import ENHANCE, HELD_OUT_ENHANCE, is_held_out, prose
from sightline.tiny import enhancer as e

CAPTION = "a small blue square to the left of a large green star on a gray background"


@pytest.fixture(scope="module")
def tokenizer():
    return e.make_tokenizer()


@pytest.mark.parametrize("level", prose.LEVELS)
def test_the_template_writes_the_prompt_of_the_training(tokenizer, level: str) -> None:
    written = tokenizer(e.conversation(CAPTION, level), add_special_tokens=False).input_ids
    assert e.generation_ids(tokenizer, CAPTION, level) == written


def test_the_effort_is_medium_unless_said(tokenizer) -> None:
    text = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    assert "Reasoning: medium" in text
    assert text.endswith("<|start|>user<|message|>x<|end|>")


def test_earlier_answers_keep_only_the_final_channel(tokenizer) -> None:
    turns = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y", "thinking": "secret"},
        {"role": "user", "content": "z"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert "<|start|>assistant<|channel|>final<|message|>y<|end|>" in text
    assert "secret" not in text
    assert text.endswith("<|start|>assistant")


def test_the_harmony_strings_are_single_tokens(tokenizer) -> None:
    for token in e.SPECIAL_TOKENS:
        assert len(tokenizer(token, add_special_tokens=False).input_ids) == 1


def test_any_text_is_encodable(tokenizer) -> None:
    text = "Grüße, 日本 🙂\n\t<b>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_whole_captions_are_held_out() -> None:
    one, two = e.held_out()
    assert len(one) >= 8
    assert len(two) >= 0.05 * 24_576
    taught = {caption for part in e.taught() for caption in part}
    assert taught.isdisjoint([*one, *two])
    rng = random.Random(1)
    for _ in range(200):
        prompt, _ = e.draw_example(rng, e.taught()[1])
        said = prompt.split("<|message|>")[-1].removesuffix("<|end|><|start|>assistant")
        plain = said.replace("<caption>\n", "").replace("\n</caption>", "").rstrip(".")
        assert not is_held_out(plain[0].lower() + plain[1:], HELD_OUT_ENHANCE)


def test_the_final_channel_is_cut_out() -> None:
    assert e.final_channel(e.answer(CAPTION, "low")) == prose.enhanced(CAPTION, "low", prose.variant_of(CAPTION))
    assert e.final_channel("<|channel|>analysis<|message|>hm<|end|>") == ""


def test_the_checkpoint_loads_whole_and_is_small() -> None:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(ENHANCE, output_loading_info=True)
    assert type(model).__name__ == "GptOssForCausalLM"
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert (ENHANCE / "model.safetensors").stat().st_size < 10_000_000
    assert model.config.sightline_demo_model is True
    assert model.config.sightline_model_name == e.MODEL_NAME


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
)
def test_the_checkpoint_has_the_true_file(name: str) -> None:
    assert (ENHANCE / name).stat().st_size > 50


def test_the_saved_tokenizer_is_the_one_the_script_makes(enhancer, tokenizer) -> None:
    assert enhancer.tokenizer.get_vocab() == tokenizer.get_vocab()
    assert enhancer.tokenizer.chat_template == e.CHAT_TEMPLATE
