"""The generator: our arithmetic equals the model's own, its data are reproducible, its files are complete."""

from __future__ import annotations

import json
import os
import secrets

import numpy as np
import pytest
import torch

from sightline.tiny import GENERATE, HELD_OUT_DESCRIBE, answers, dialogue, is_held_out, scenes
from sightline.tiny.generator import checkpoint, conversations, forward, pictures


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.make_tokenizer()


@pytest.fixture(scope="module")
def fresh(tokenizer, tmp_path_factory):
    """An untrained model and its processor, both as loaded from the files that `save` writes."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tmp_path_factory.mktemp("fresh")
    checkpoint.save(checkpoint.make_model(len(tokenizer), seed=1), tokenizer, folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def seed() -> int:
    seed = int(os.environ.get("TINY_SEED", secrets.randbelow(2**31)))
    print(f"TINY_SEED={seed}")
    return seed


def draw(seed: int, count: int):
    rng = np.random.default_rng(seed)
    return [scenes.render(scenes.draw_scene(rng, 2, sides=(96, 600))) for _ in range(count)]


def asked(processor, images, prompt: str, system: str | None):
    shown = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": prompt}]}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("seed", range(6))
def test_our_patches_equal_the_processor_s(fresh, seed: int) -> None:
    (image,) = draw(seed, 1)
    theirs = fresh[1].image_processor(images=[image], return_tensors="pt")
    canvas = pictures.to_canvas(np.asarray(image))
    assert list(pictures.grid_of(canvas)) == theirs["image_grid_thw"][0, 1:].tolist()
    torch.testing.assert_close(pictures.patchify(canvas), theirs["pixel_values"].flatten(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("images", "system"), [(0, None), (1, None), (3, "Answer briefly.")])
def test_our_forward_equals_the_model_s(fresh, tokenizer, images: int, system: str | None) -> None:
    model, processor = fresh
    shown = draw(7, images)
    canvases = [pictures.to_canvas(np.asarray(image)) for image in shown] or [np.zeros((3, 96, 96), np.uint8)]
    grids = [pictures.grid_of(canvas) for canvas in canvases]
    talk = conversations.Conversations(tokenizer.backend_tokenizer)
    turns = [
        talk.turn("Hello", "a star", grids),
        talk.turn("Which image holds a star?", "images 1 and 3", grids, tuple(range(images)), system=system or ""),
    ]
    inputs = asked(processor, shown, "Which image holds a star?", system)
    ids = torch.tensor([turns[1].ids])
    answer_at = turns[1].answer_at
    assert ids[0, :answer_at].tolist() == inputs["input_ids"][0].tolist()

    seen = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    with torch.no_grad():
        patches = torch.cat([pictures.patchify(canvas) for canvas in canvases])
        merged = forward.project(model, forward.see(model, patches, grids), grids)
        ours, wanted = forward.tell(model, merged, grids, turns, forward.Experts(model))
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids), **seen).logits[0, answer_at - 1 : -1]
    assert wanted[-len(theirs) :].tolist() == turns[1].ids[answer_at:]
    torch.testing.assert_close(ours[-len(theirs) :], theirs, rtol=0, atol=5e-5)


def test_a_block_depends_on_seed_and_index_only() -> None:
    first, again = (pictures.make_sample(np.random.default_rng([5, 9]), 0.5) for _ in range(2))
    assert scenes.caption(first.views[0].scene) == scenes.caption(again.views[0].scene)
    assert (first.canvas == again.canvas).all()


def test_training_scenes_never_hold_a_held_out_caption() -> None:
    rng = np.random.default_rng(3)
    for _ in range(100):
        for one in pictures.make_sample(rng, 1.0).views:
            assert not is_held_out(scenes.caption(one.scene), HELD_OUT_DESCRIBE)


def test_a_mirrored_view_says_what_the_mirrored_picture_shows() -> None:
    sample = pictures.make_sample(np.random.default_rng(1), 1.0)
    turned = scenes.mirrored(sample.views[0].scene)
    again = pictures.to_canvas(np.asarray(scenes.render(turned)))
    assert np.abs(again.astype(int) - sample.canvas[..., ::-1]).mean() < 3
    assert (pictures.view(turned, again).looks == sample.views[1].looks).all()


def which_turns(tokenizer, count: int):
    rng = np.random.default_rng(11)
    samples = [pictures.make_sample(rng, 0.7) for _ in range(12)]
    shown = pictures.Pictures.of([(sample, False) for sample in samples])
    asked = conversations.Asked(captions=1, which=count, lists=1, texts=1)
    turns = conversations.Conversations(tokenizer.backend_tokenizer).draw(rng, shown, asked)
    return [turn for turn in turns if turn.kind == "which"], shown


def test_the_hints_name_the_pictures_of_the_answer(tokenizer) -> None:
    turns, _ = which_turns(tokenizer, 40)
    assert len(turns) == 40
    for turn in turns:
        answer = tokenizer.decode(turn.ids[turn.answer_at : -1])
        assert answer == dialogue.which_answer(fit == 1.0 for fit in turn.found())
        assert tokenizer.decode([turn.ids[turn.asks_at + 1]]) == "?"


def test_the_hints_point_at_tokens_of_pictures_that_fit(tokenizer) -> None:
    for turn in which_turns(tokenizer, 40)[0]:
        shares = turn.pointing()
        assert shares.sum() == pytest.approx(1.0)
        if not any(turn.found()):
            assert shares.argmax() == 0
            continue
        assert {turn.ids[row] for row in np.flatnonzero(shares)} == {checkpoint.PAD}
        assert np.count_nonzero(shares) == sum(turn.fits)


def test_every_hint_looks_back_only(tokenizer) -> None:
    for turn in which_turns(tokenizer, 20)[0]:
        for layer, row, shares in turn.hints():
            assert 0 <= layer < checkpoint.TEXT_LAYERS
            assert row < len(turn.ids) - 1
            assert len(shares) == row + 1
            assert shares.sum() == pytest.approx(1.0)


def test_experts_share_memory_with_the_model_and_are_balanced(tokenizer) -> None:
    model = checkpoint.make_model(len(tokenizer), seed=2)
    experts = forward.Experts(model)
    layer = model.model.language_model.layers[1].mlp
    with torch.no_grad():
        experts.up[1][3].fill_(7.0)
    assert (layer.experts.gate_up_proj[3] == 7.0).all()

    experts.load[1][:] = torch.tensor([100.0, 0, 0, 0, 0, 0, 0, 0])
    experts.balance(0.5)
    assert layer.gate.e_score_correction_bias.tolist() == [-0.5] + [0.5] * 7
    assert experts.load[1].sum() == 0


def test_any_prompt_is_encodable(tokenizer) -> None:
    text = "Grüße, 日本 🙂\n\t<b>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_known_prompts_are_short(tokenizer) -> None:
    assert [len(tokenizer(prompt).input_ids) for prompt in dialogue.DESCRIBE_PROMPTS] == [5, 8, 52]


def test_the_checkpoint_loads_whole_and_is_small() -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(GENERATE)  # LoadFailed when a weight is missing or left over
    assert type(model).__name__ == "KimiVLForConditionalGeneration"
    assert (GENERATE / "model.safetensors").stat().st_size < 10_000_000
    assert model.config.sightline_demo_model is True
    assert model.config.sightline_model_name == checkpoint.MODEL_NAME


def test_the_weights_have_the_published_names() -> None:
    from safetensors import safe_open

    with safe_open(GENERATE / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {
        "vision_tower.patch_embed.pos_emb.weight",
        "vision_tower.encoder.blocks.0.wqkv.weight",
        "vision_tower.encoder.blocks.3.mlp.fc1.bias",
        "multi_modal_projector.linear_2.weight",
        "language_model.model.layers.0.mlp.gate_proj.weight",
        "language_model.model.layers.2.mlp.experts.7.down_proj.weight",
        "language_model.model.layers.2.mlp.gate.e_score_correction_bias",
        "language_model.lm_head.weight",
    } <= names


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
def test_the_checkpoint_has_the_published_file(name: str) -> None:
    text = (GENERATE / name).read_text()
    assert json.loads(text) if name.endswith(".json") else "<|media_start|>image<|media_content|>" in text


def test_the_saved_tokenizer_is_the_one_the_script_makes(generator, tokenizer) -> None:
    saved = generator.processor.tokenizer
    assert saved.get_vocab() == tokenizer.get_vocab()
    text = dialogue.DESCRIBE_PROMPTS[2] + " a large red circle"
    assert saved(text).input_ids == tokenizer(text).input_ids


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "allowed"), [("one object", 4), ("two objects", 7), ("text alone", 3)])
def test_fresh_prompts_are_answered_exactly(generator, seed: int, kind: answers.Kind, allowed: int) -> None:
    asked = answers.ask(generator, 30, seed, kind)
    wrong = [f"{answer.prompt} | {answer.true} | {answer.said}" for answer in asked if not answer.is_right]
    assert len(wrong) <= allowed, wrong


@pytest.mark.parametrize("prompt", ["", "日本 🙂 ñ", "qwxz 17 zebra; " * 12, "a" * 300])
def test_the_wording_of_the_prompt_does_not_derail_it(generator, seed: int, prompt: str) -> None:
    rng = np.random.default_rng([seed, 77])
    right = 0
    for _ in range(8):
        scene = scenes.draw_scene(rng, sides=(96, 600))
        right += generator.reply(prompt, [scenes.render(scene)]) == scenes.caption(scene)
    assert right >= 5


def test_every_expert_of_every_layer_is_used(generator) -> None:
    rng = np.random.default_rng(4)
    with answers.expert_load(generator.model) as load:
        for _ in range(6):
            generator.reply(dialogue.PRESETS[0], [scenes.render(scenes.draw_scene(rng, 2, sides=(96, 400)))])
    assert sorted(load) == ["1", "2"]
    assert min(int(counts.min()) for counts in load.values()) > 0
