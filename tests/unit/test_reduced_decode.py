"""Decoding a large JPEG at the scale that the model wants costs the small checkpoints none of their answers."""

import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from sightline.images import decode_for
from sightline.models.blip import Blip
from sightline.models.colqwen import ColQwen
from sightline.models.pixels import Patches
from sightline.models.qwen_vl import QwenVL
from sightline.settings import BlipSettings, DescribeSettings, EmbedSettings
from sightline.wire import Sampling
from tests.scenes import encoded, random_scene
from tests.unit.images.pictures import LIMITS

GREEDY = Sampling(max_tokens=40)
SETTINGS: dict[str, Any] = {"_env_file": None, "auth": "off", "device": "cpu", "threads": 1}


@cache
def scenes() -> list[tuple[bytes, str]]:
    """Twelve scenes of 1,400 to 2,000 pixels as JPEGs of any quality, and their captions."""
    rng = random.Random(5)
    drawn = [random_scene(rng, side=1400, diagonal_margin=0.2) for _ in range(12)]
    return [
        (encoded(image, "JPEG", quality=rng.randint(60, 95), subsampling=rng.randint(0, 2)), caption)
        for image, caption in drawn
    ]


def seen(model: Any, data: bytes, detail: float, bound: int | None) -> Patches:
    bounds = {} if bound is None else {"max_width": bound, "max_height": 2 * bound}
    picture = decode_for(data, LIMITS, model.pixels.wanted, detail=detail, **bounds)
    assert (max(picture.image.size) < 1000) == bool(detail or bound), "the JPEG was not scaled as this test assumes"
    return model.pixels.patches(picture.image, picture.size)


def answers(model: Any, prompts: list[Any], text: Callable[[Any, Any], str]) -> list[str]:
    generated = model.generate(prompts, GREEDY, lambda index: False)
    return [text(prompt, made) for prompt, made in zip(prompts, generated, strict=True)]


def right(captions: list[str]) -> int:
    return sum(caption.strip(".") == truth for caption, (_, truth) in zip(captions, scenes(), strict=True))


def test_describe() -> None:
    model = QwenVL(DescribeSettings(**SETTINGS))
    told: list[list[str]] = []
    for detail in (0.0, 1.0):
        images = [seen(model, data, detail, 512) for data, _ in scenes()]
        prompts = [model.preprocess_chat([("user", [image, "Describe this image in detail"])]) for image in images]
        told.append(answers(model, prompts, lambda _, made: model.postprocess(made)))
    assert right(told[1]) >= right(told[0]) >= 10


def test_blip() -> None:
    model = Blip(BlipSettings(**SETTINGS))
    told: list[list[str]] = []
    for detail in (0.0, 1.0):
        prompts = [model.preprocess(seen(model, data, detail, None)) for data, _ in scenes()]
        told.append(answers(model, prompts, model.postprocess))
    assert right(told[1]) >= right(told[0]) >= 10


def test_embed() -> None:
    model = ColQwen(EmbedSettings(**SETTINGS))
    whole, small = (
        model.encode([model.preprocess_page(seen(model, data, detail, None)) for data, _ in scenes()])
        for detail in (0.0, 1.0)
    )
    queries = model.encode([model.preprocess_query(caption) for _, caption in scenes()])

    def best(pages: list[Any]) -> list[int]:
        return [int(np.argmax([(query @ page.T).max(axis=1).sum() for page in pages])) for query in queries]

    assert all(float((a * b).sum(axis=1).mean()) > 0.995 for a, b in zip(whole, small, strict=True))
    assert best(small) == best(whole)


def test_a_flat_picture_stays_flat() -> None:
    model = QwenVL(DescribeSettings(**SETTINGS))
    data = encoded(Image.new("RGB", (1600, 1200), (200, 60, 60)), "JPEG", quality=95)
    whole, small = (seen(model, data, detail, 512) for detail in (0.0, 1.0))
    assert float((whole.values - small.values).abs().max()) < 0.02
