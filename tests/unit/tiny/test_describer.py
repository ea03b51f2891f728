"""The describer: our arithmetic equals transformers' own, its data are reproducible, its files are complete."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sightline.tiny import DESCRIBE, HELD_OUT_DESCRIBE, is_held_out, scenes
from sightline.tiny import describer as d


@pytest.fixture(scope="module")
def processor():
    return d.make_processor()


def picture(seed: int, objects: int = 2):
    rng = np.random.default_rng(seed)
    scene = scenes.draw_scene(rng, objects, sides=(96, 500))
    return scene, scenes.decode(scenes.encode(scenes.render(scene), rng)[0])


@pytest.mark.parametrize("seed", range(6))
def test_our_patches_equal_the_processor_s(processor, seed: int) -> None:
    _, image = picture(seed)
    theirs = processor.image_processor(images=[image], return_tensors="pt")
    canvas = d.to_canvas(np.asarray(image))
    ours = d.patchify(canvas[None])[0].view(-1, 3, 1, d.PATCH**2).expand(-1, -1, 2, -1).flatten(1)
    assert [canvas.shape[1] // d.PATCH, canvas.shape[2] // d.PATCH] == theirs["image_grid_thw"][0, 1:].tolist()
    torch.testing.assert_close(ours, theirs["pixel_values"], rtol=0, atol=1e-6)


def asked(processor, image, prompt: str, system: str | None = None):
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def turns(tokenizer, prompt: str, system: str | None = None) -> tuple[list[int], list[int]]:
    head = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return (
        tokenizer.encode(f"{head}<|im_start|>user\n<|vision_start|>").ids,
        tokenizer.encode(f"<|vision_end|>{prompt}<|im_end|>\n<|im_start|>assistant\n").ids,
    )


@pytest.mark.parametrize("system", [None, d.SYSTEM], ids=["no system turn", "system turn"])
def test_our_forward_equals_transformers(processor, system: str | None) -> None:
    model = d.make_model(processor.tokenizer, seed=1).eval()
    tokenizer = processor.tokenizer.backend_tokenizer
    scene, image = picture(7)
    inputs = asked(processor, image, d.PROMPT_PRESET, system)
    before, after = turns(tokenizer, d.PROMPT_PRESET, system)
    grid = tuple(inputs["image_grid_thw"][0, 1:].tolist())
    pads = [model.config.image_token_id] * (grid[0] * grid[1] // d.MERGE**2)
    assert before + pads + after == inputs["input_ids"][0].tolist()

    answer = torch.tensor([[*tokenizer.encode(scenes.caption(scene)).ids, 2]])
    ids = torch.cat([inputs["input_ids"], answer], 1)
    kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer, dtype=torch.int32)], 1)
    with torch.no_grad():
        ours = d.tell(
            model, d.see(model, d.patchify(d.to_canvas(np.asarray(image))[None]), grid), before, after, answer, grid
        )
        theirs = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
            mm_token_type_ids=kinds,
        ).logits[:, -answer.shape[1] - 1 : -1]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_block_depends_on_seed_and_index_only(processor) -> None:
    tokenizer = processor.tokenizer.backend_tokenizer
    first, again = (d.make_sample(np.random.default_rng([5, 9]), tokenizer, 0.5) for _ in range(2))
    assert first.answers == again.answers
    assert (first.canvas == again.canvas).all()


def test_training_scenes_never_hold_a_held_out_caption(processor) -> None:
    tokenizer = processor.tokenizer.backend_tokenizer
    rng = np.random.default_rng(3)
    for _ in range(150):
        for answer in d.make_sample(rng, tokenizer, 1.0).answers:
            assert not is_held_out(tokenizer.decode(answer), HELD_OUT_DESCRIBE)


def test_labels_of_a_mirrored_picture_are_mirrored(processor) -> None:
    tokenizer = processor.tokenizer.backend_tokenizer
    sample = d.make_sample(np.random.default_rng(1), tokenizer, 1.0)
    plain, turned = (d.collate([sample], np.array([flip])) for flip in (False, True))
    rows, columns = sample.looks.shape[1:]
    there = plain[2].view(4, rows, columns)
    back = turned[2].view(4, rows, columns).flip(-1)
    assert torch.equal(there[:3], back[:3])
    assert torch.equal(plain[3].view(4, rows, columns)[0], -turned[3].view(4, rows, columns).flip(-1)[0])


def test_any_prompt_is_encodable(processor) -> None:
    text = "Grüße, 日本 🙂\n\t<b>"
    ids = processor.tokenizer(text).input_ids
    assert processor.tokenizer.decode(ids) == text


def test_known_prompts_are_short(processor) -> None:
    assert [len(processor.tokenizer(prompt).input_ids) for prompt in d.PROMPTS] == [5, 8, 52]


def test_the_checkpoint_loads_whole_and_is_small() -> None:
    from transformers import AutoModelForImageTextToText

    model, found = AutoModelForImageTextToText.from_pretrained(DESCRIBE, output_loading_info=True)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert (DESCRIBE / "model.safetensors").stat().st_size < 10_000_000
    assert model.config.sightline_demo_model is True
    assert model.config.sightline_model_name == d.MODEL_NAME


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ],
)
def test_the_checkpoint_has_the_true_file(name: str) -> None:
    text = (DESCRIBE / name).read_text()
    assert json.loads(text) if name.endswith(".json") else "<|vision_start|><|image_pad|><|vision_end|>" in text


def test_the_saved_tokenizer_is_the_one_the_script_makes(describer, processor) -> None:
    saved = describer.processor.tokenizer
    assert saved.get_vocab() == processor.tokenizer.get_vocab()
    text = d.PROMPT_PRESET + " a large red circle"
    assert saved(text).input_ids == processor.tokenizer(text).input_ids
