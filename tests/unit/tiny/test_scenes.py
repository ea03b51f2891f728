"""The world of scenes: grammar, the relation rule, objects inside and apart, and an import that costs nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from sightline.tiny import scenes


def drawn(count: int, objects: int | None = None, seed: int = 11) -> list[scenes.Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.draw_scene(rng, objects) for _ in range(count)]


def placed(dx: float, dy: float) -> scenes.Scene:
    thing = scenes.SceneObject("small", "red", "circle", 200, 200, 20, (220, 40, 40))
    other = replace(thing, size="large", colour="blue", centre_x=200 + dx, centre_y=200 + dy)
    return scenes.Scene(400, 400, "white", (250, 250, 250), (thing, other))


def test_every_caption_is_listed_once() -> None:
    assert len(scenes.all_captions(1)) == 192
    assert len(scenes.all_captions(2)) == 24_576
    assert len(set(scenes.all_captions())) == 24_768


def test_every_caption_is_parsed_back() -> None:
    for text in scenes.all_captions():
        facts = scenes.parse_caption(text)
        assert facts is not None
        things = f" {facts.relation} ".join(f"a {' '.join(words)}" for words in facts.objects)
        assert f"{things} on a {facts.background} background" == text


@pytest.mark.parametrize(
    "text",
    ["", "a red circle on a white background", "a large red circle", "a large red circle on a red background"],
    ids=["nothing", "no size", "no background", "no such background"],
)
def test_other_text_is_no_caption(text: str) -> None:
    assert scenes.parse_caption(text) is None


def test_a_drawn_caption_belongs_to_the_list() -> None:
    known = set(scenes.all_captions())
    assert {scenes.caption(scene) for scene in drawn(300)} <= known


@pytest.mark.parametrize(
    ("dx", "dy", "said"),
    [
        (100, 99, "a small red circle to the left of a large blue circle"),
        (-100, 99, "a large blue circle to the left of a small red circle"),
        (99, 100, "a small red circle above a large blue circle"),
        (99, -100, "a large blue circle above a small red circle"),
    ],
    ids=["right", "left", "below", "over"],
)
def test_the_longer_axis_decides_and_the_left_or_upper_comes_first(dx: float, dy: float, said: str) -> None:
    assert scenes.caption(placed(dx, dy)) == f"{said} on a white background"


def test_a_mirror_swaps_left_and_keeps_above() -> None:
    assert scenes.caption(scenes.mirrored(placed(100, 0))).startswith("a large blue circle to the left")
    assert scenes.caption(scenes.mirrored(placed(0, 100))) == scenes.caption(placed(0, 100))


def test_objects_lie_inside_the_picture() -> None:
    for scene in drawn(400):
        for thing in scene.objects:
            assert thing.half <= thing.centre_x <= scene.width - thing.half
            assert thing.half <= thing.centre_y <= scene.height - thing.half


def test_half_extents_follow_the_size_word() -> None:
    for scene in drawn(400):
        for thing in scene.objects:
            low, high = scenes.HALF_EXTENT[thing.size]
            assert low <= thing.half / min(scene.width, scene.height) <= high


def test_pictures_keep_to_the_sides_and_the_aspect() -> None:
    for scene in drawn(500):
        shorter, longer = sorted((scene.width, scene.height))
        assert scenes.SIDES[0] <= shorter
        assert longer <= scenes.SIDES[1]
        assert longer <= scenes.MAX_ASPECT * shorter


def test_no_pixel_belongs_to_two_objects() -> None:
    for scene in drawn(120, objects=2):
        if max(scene.width, scene.height) > 600:
            continue
        masks = []
        for thing in scene.objects:
            lone = replace(scene, background_rgb=(0, 0, 0), objects=(replace(thing, rgb=(255, 255, 255)),))
            masks.append(np.asarray(scenes.render(lone))[..., 0] > 127)
        assert not (masks[0] & masks[1]).any()


def test_the_object_is_painted_in_its_colour_at_its_centre() -> None:
    for scene in drawn(60):
        pixels = np.asarray(scenes.render(scene))
        for thing in scene.objects:
            pixel = pixels[math.floor(thing.centre_y), math.floor(thing.centre_x)]
            assert tuple(int(value) for value in pixel) == thing.rgb
            assert all(abs(a - b) <= 10 for a, b in zip(thing.rgb, scenes.COLOURS[thing.colour], strict=True))


def test_the_same_seed_draws_the_same_scene() -> None:
    assert drawn(5, seed=3) == drawn(5, seed=3)
    assert drawn(5, seed=3) != drawn(5, seed=4)


def test_a_file_comes_back_as_rgb_of_bounded_size() -> None:
    rng = np.random.default_rng(5)
    kinds = set()
    for scene in drawn(12):
        image_bytes, kind = scenes.encode(scenes.render(scene), rng)
        kinds.add(kind)
        image = scenes.decode(image_bytes)
        assert image.mode == "RGB"
        assert image.width <= 512
        assert image.height <= 1024
        assert abs(math.log((image.width / image.height) / (scene.width / scene.height))) < 0.02
    assert kinds == set(scenes.FORMATS)


def test_importing_scenes_and_prose_brings_no_torch() -> None:
    code = "import sys, sightline.tiny.scenes, sightline.tiny.prose; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
