"""What the checkpoints can do, on scenes drawn afresh for each run (the seed is printed; TINY_SEED repeats one).

Goals are 99 % (one object), 98 % (two) and 99 % (enhancer). A sample of n at a true rate p misses more than the bound
allows with a chance below one in ten thousand, so a red test here means a worse model and not bad luck.
"""

from __future__ import annotations

import os
import secrets

import numpy as np
import pytest

from sightline.tiny import enhancer as e
from sightline.tiny import prose, report, scenes


@pytest.fixture(scope="module")
def seed() -> int:
    seed = int(os.environ.get("TINY_SEED", secrets.randbelow(2**31)))
    print(f"TINY_SEED={seed}")
    return seed


def misses(readings: list[report.Reading]) -> list[str]:
    return [f"{scenes.caption(r.scene)} | {r.said} | {r.kind}" for r in readings if not r.is_right]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objects", "allowed"), [(1, 5), (2, 7)], ids=["one object, 60 scenes", "two objects, 60 scenes"]
)
def test_scenes_are_captioned_exactly(describer, seed: int, objects: int, allowed: int) -> None:
    wrong = misses(report.read_scenes(describer, 60, seed, objects))
    assert len(wrong) <= allowed, wrong


@pytest.mark.parametrize(
    ("prompt", "system"),
    [
        ("", None),
        ("What is in this picture?", None),
        ("Describe this image in detail", "You are a helpful assistant."),
        ("qwxz 17 zebra; " * 12, None),
    ],
    ids=["no prompt", "another prompt", "a system turn", "noise"],
)
def test_the_wording_of_the_prompt_does_not_derail_it(describer, seed: int, prompt: str, system: str | None) -> None:
    rng = np.random.default_rng([seed, 77])
    right = 0
    for _ in range(10):
        scene = scenes.draw_scene(rng, sides=(96, 600))
        right += describer.describe(scenes.render(scene), prompt, system=system) == scenes.caption(scene)
    assert right >= 7


@pytest.mark.slow
@pytest.mark.parametrize("level", prose.LEVELS)
def test_held_out_captions_are_enhanced_without_fault(enhancer, seed: int, level: str) -> None:
    one, two = e.held_out()
    rng = np.random.default_rng([seed, 5])
    asked = [str(c) for c in rng.choice(one, 10, replace=False)] + [str(c) for c in rng.choice(two, 50, replace=False)]
    right, _, failures = report.enhancer_share(enhancer, asked, level)
    assert right >= 55 / 60, failures


def test_the_analysis_grows_with_the_level(enhancer) -> None:
    captions = e.held_out()[1][:4]
    low, medium, high = (report.enhancer_share(enhancer, captions, level)[1] for level in prose.LEVELS)
    assert low < medium < high
