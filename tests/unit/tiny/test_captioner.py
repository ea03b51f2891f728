"""The captioner: our arithmetic equals transformers' own, its data are reproducible, its files are complete."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sightline.tiny import BLIP, HELD_OUT_DESCRIBE, is_held_out, scenes
from sightline.tiny import captioner as c


@pytest.fixture(scope="module")
def processor():
    return c.make_processor()


def picture(seed: int, objects: int = 2):
    rng = np.random.default_rng(seed)
    scene = scenes.draw_scene(rng, objects, sides=(96, 500))
    return scene, scenes.decode(scenes.encode(scenes.render(scene), rng)[0])


@pytest.mark.parametrize("seed", range(6))
def test_our_pixels_equal_the_processor_s(processor, seed: int) -> None:
    _, image = picture(seed)
    theirs = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    ours = c.normalised(c.to_canvas(np.asarray(image))[None])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "a picture of"])
def test_our_forward_equals_transformers(processor, prefix: str) -> None:
    model = c.make_model(processor.tokenizer, seed=1).eval()
    scene, image = picture(7)
    pixels = c.normalised(c.to_canvas(np.asarray(image))[None])
    given, wanted = c.texts(processor.tokenizer.backend_tokenizer, [scenes.caption(scene)], [prefix])
    with torch.no_grad():
        ours = c.tell(model, c.see(model, pixels), given)
        theirs = model(pixel_values=pixels, input_ids=given, attention_mask=torch.ones_like(given)).logits
    assert wanted.shape == given.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_padding_on_the_right_changes_no_logits(processor) -> None:
    model = c.make_model(processor.tokenizer, seed=1).eval()
    tokenizer = processor.tokenizer.backend_tokenizer
    captions = [scenes.caption(picture(seed, objects)[0]) for seed, objects in ((1, 1), (2, 2))]
    pixels = torch.cat([c.normalised(c.to_canvas(np.asarray(picture(s)[1]))[None]) for s in (1, 2)])
    given, _ = c.texts(tokenizer, captions, ["", ""])
    alone, _ = c.texts(tokenizer, captions[:1], [""])
    with torch.no_grad():
        seen = c.see(model, pixels)
        together = c.tell(model, seen, given)[:1, : alone.shape[1]]
        torch.testing.assert_close(together, c.tell(model, seen[:1], alone), rtol=0, atol=1e-5)


def test_only_the_caption_is_to_be_learned(processor) -> None:
    tokenizer = processor.tokenizer
    caption = "a large red circle on a white background"
    given, wanted = c.texts(tokenizer.backend_tokenizer, [caption, caption], ["A photo of", ""])
    assert tokenizer.decode(given[0], skip_special_tokens=True) == f"a photo of {caption}"
    for row in wanted:
        said = [token for token in row.tolist() if token != c.IGNORED]
        assert tokenizer.decode(said) == f"{caption} [SEP]"
    assert given[0, 0] == given[1, 0] == tokenizer.bos_token_id


def test_a_fresh_tower_sees() -> None:
    """The class default of the vision tower's initial spread, 1e-10, would make it blind."""
    model = c.make_model(c.make_tokenizer(), seed=1).eval()
    assert model.config.vision_config.initializer_range == 0.02
    with torch.no_grad():
        one, other = (c.see(model, torch.full((1, 3, c.SIDE, c.SIDE), value)) for value in (-1.0, 1.0))
    assert (one - other).abs().max() > 0.1


def test_a_sample_depends_on_seed_and_index_only() -> None:
    first, again = (c.make_sample(np.random.default_rng([5, 9]), 0.5) for _ in range(2))
    assert first.captions == again.captions
    assert (first.canvas == again.canvas).all()


def test_training_scenes_never_hold_a_held_out_caption() -> None:
    rng = np.random.default_rng(3)
    for _ in range(150):
        for caption in c.make_sample(rng, 1.0).captions:
            assert not is_held_out(caption, HELD_OUT_DESCRIBE)


def test_every_object_is_known_to_some_patch() -> None:
    """Also one that a 2:1 picture squeezes to less than a patch."""
    rng = np.random.default_rng(4)
    for _ in range(200):
        scene = scenes.draw_scene(rng, 1, sides=(96, 500))
        looks, _ = c.labels(scene)
        assert (looks[0] >= 0).any()


def test_labels_of_a_mirrored_picture_are_mirrored() -> None:
    sample = c.make_sample(np.random.default_rng(1), 1.0)
    plain, turned = (c.collate([sample], np.array([flip])) for flip in (False, True))
    there = plain[2].view(4, c.CELLS, c.CELLS)
    back = turned[2].view(4, c.CELLS, c.CELLS).flip(-1)
    assert torch.equal(there[:3], back[:3])
    spans, flipped = plain[3].view(5, c.CELLS, c.CELLS), turned[3].view(5, c.CELLS, c.CELLS).flip(-1)
    assert torch.equal(spans[0], -flipped[0])
    assert torch.equal(spans[1:], flipped[1:])
    assert plain[1] == [sample.captions[0]]
    assert turned[1] == [sample.captions[1]]


def test_every_caption_and_prefix_is_made_of_whole_words(processor) -> None:
    tokenizer = processor.tokenizer
    for text in [*scenes.all_captions(1), *scenes.all_captions(2)[::97], *c.PREFIXES]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text


def test_any_ascii_text_can_be_written(processor) -> None:
    tokenizer = processor.tokenizer
    ids = tokenizer("".join(chr(code) for code in range(33, 127)), add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids


def test_the_special_tokens_stand_where_blip_has_them(processor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[DEC]", "[ENC]"]) == [0, len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer("a").input_ids == [tokenizer.cls_token_id, *tokenizer("a", add_special_tokens=False).input_ids, 3]


def test_the_checkpoint_loads_whole_and_is_small() -> None:
    from transformers import AutoModelForImageTextToText

    model, found = AutoModelForImageTextToText.from_pretrained(BLIP, output_loading_info=True)
    assert type(model).__name__ == "BlipForConditionalGeneration"
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert (BLIP / "model.safetensors").stat().st_size < 10_000_000
    assert model.config.sightline_demo_model is True
    assert model.config.sightline_model_name == c.MODEL_NAME


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"],
)
def test_the_checkpoint_has_the_true_file(name: str) -> None:
    assert json.loads((BLIP / name).read_text())


def test_the_saved_tokenizer_is_the_one_the_script_makes(processor) -> None:
    from transformers import AutoProcessor

    saved = AutoProcessor.from_pretrained(BLIP).tokenizer
    assert saved.get_vocab() == processor.tokenizer.get_vocab()
    assert (BLIP / "vocab.txt").read_text().splitlines() == c.vocabulary()
    assert saved("A Picture of zebras [SEP]").input_ids == processor.tokenizer("A Picture of zebras [SEP]").input_ids
