"""What the generator is asked: answers follow from the scenes, and the draws cover what they promise."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from sightline.tiny import dialogue, scenes


def scene(colour: str, shape: str) -> scenes.Scene:
    drawn = scenes.draw_scene(np.random.default_rng(1), 1)
    return replace(drawn, objects=(replace(drawn.objects[0], colour=colour, shape=shape),))


@pytest.mark.parametrize(
    ("fits", "answer"),
    [
        ([False, False], "none of the images"),
        ([True], "image 1"),
        ([False, True, False], "image 2"),
        ([True, False, True], "images 1 and 3"),
        ([True, True, True], "images 1, 2 and 3"),
    ],
)
def test_a_which_answer_names_every_image_that_fits(fits: list[bool], answer: str) -> None:
    assert dialogue.which_answer(fits) == answer


@pytest.mark.parametrize(
    ("query", "words", "fits"),
    [
        (dialogue.Query("", "star"), "a star", True),
        (dialogue.Query("orange", ""), "an orange shape", True),
        (dialogue.Query("orange", "star"), "an orange star", True),
        (dialogue.Query("red", "star"), "a red star", False),
    ],
)
def test_a_query_reads_as_english_and_finds_its_object(query: dialogue.Query, words: str, fits: bool) -> None:
    assert query.words == words
    assert query.fits(scene("orange", "star")) is fits


def test_several_images_are_numbered() -> None:
    shown = [scene("red", "star"), scene("blue", "circle")]
    first, second = (scenes.caption(one) for one in shown)
    assert dialogue.describe_answer(shown) == f"image 1: {first}; image 2: {second}"
    assert dialogue.describe_answer(shown[:1]) == first


def test_which_questions_have_all_kinds_of_answers() -> None:
    rng = np.random.default_rng(2)
    answers = Counter(
        dialogue.draw_which(rng, [scenes.draw_scene(rng) for _ in range(3)])[1].split()[0] for _ in range(400)
    )
    assert min(answers[word] for word in ("image", "images", "none")) >= 20


def test_a_comparison_is_answered_from_its_own_words() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        asked, answer = dialogue.draw_comparison(rng)
        sizes = [word for word in asked.rstrip("?").split() if word in scenes.SIZES]
        wanted = "small" if "smaller" in asked else "large"
        if answer == dialogue.SAME_SIZE:
            assert sizes[0] == sizes[1]
        else:
            assert answer in asked
            assert answer.startswith(f"a {wanted} ")
            assert sizes.count(wanted) == 1
