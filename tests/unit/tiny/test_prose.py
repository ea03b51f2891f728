"""The enhancer's target language and its checker: every target is right, every kind of fault is found."""

from __future__ import annotations

import pytest

from sightline.tiny import prose, scenes

TWO = "a small blue square to the left of a large green star on a gray background"
ONE = "a large red circle on a white background"
HIGH = (
    "The image shows a small blue square and a large green star on a gray background. The small blue square is to the "
    "left of the large green star. The square is blue and small, while the star is green and large."
)


def test_every_caption_level_and_variant_is_without_fault() -> None:
    for caption in [*scenes.all_captions(1), *scenes.all_captions(2)[::7]]:
        for level in prose.LEVELS:
            for variant in range(prose.VARIANTS):
                text = prose.enhanced(caption, level, variant)
                assert prose.faults(caption, level, text) == [], (caption, level, text)


def test_other_faithful_prose_passes_too() -> None:
    assert prose.faults(TWO, "high", HIGH) == []


@pytest.mark.parametrize(("level", "count"), [("low", 1), ("medium", 2), ("high", 3)])
def test_the_level_sets_the_number_of_sentences(level: str, count: int) -> None:
    found = len(prose.sentences(prose.enhanced(TWO, level, 0)))
    assert found == count if level != "high" else found >= count


def test_the_analysis_grows_with_the_level() -> None:
    for caption in (ONE, TWO):
        low, medium, high = (len(prose.analysis(caption, level).split()) for level in prose.LEVELS)
        assert low < medium < high
        assert low <= 3


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("large green star", "star", "object"),
        ("on a gray background", "and a small red circle on a gray background", "colour"),
        ("The square is blue", "The square is red", "colour"),
        ("small blue square", "large blue square", "object"),
        ("The square is blue and small", "The square is blue and large", "object"),
        ("green star", "green circle", "shape"),
        ("to the left of", "to the right of", "relation"),
        ("to the left of", "above", "relation"),
        ("to the left of", "near", "relation"),
        (" on a gray background", "", "background"),
        ("gray background", "white background", "background"),
        ("The image shows", "The image shows two objects:", "word"),
        ("The image shows", "The beautiful image shows", "word"),
        ("The image", "the image", "form"),
        ("and large.", "and large", "form"),
        (" The square is blue and small, while the star is green and large.", "", "sentences"),
    ],
)
def test_a_changed_text_is_found_out(old: str, new: str, fault: str) -> None:
    changed = HIGH.replace(old, new)
    assert changed != HIGH
    assert any(found.startswith(f"{fault}:") for found in prose.faults(TWO, "high", changed))


def test_a_relation_turned_round_is_found_out() -> None:
    turned = "The image shows a large green star to the left of a small blue square on a gray background."
    assert any(found.startswith("relation:") for found in prose.faults(TWO, "low", turned))


def test_a_relation_between_nothing_is_found_out_for_one_object() -> None:
    text = "The image shows a large red circle above a white background."
    assert any(found.startswith("relation:") for found in prose.faults(ONE, "low", text))


def test_one_of_two_equal_objects_missing_is_found_out() -> None:
    twins = "a small red circle above a small red circle on a black background"
    text = "The image shows a small red circle on a black background."
    assert any(found.startswith("object:") for found in prose.faults(twins, "low", text))


def test_a_stranger_s_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="not a caption"):
        prose.enhanced("a cat on a mat", "low", 0)
