"""The cache of image embeddings: what is seen once is not computed again, and answers are the same."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from sightline.engines.images import LOOKED_UP, ImageCache, content_hash
from sightline.models.kimi_vl.model import KimiVL
from sightline.models.qwen_vl import QwenVL
from sightline.settings import DescribeSettings, GenerateSettings
from sightline.wire import Sampling

ROW_BYTES = 4 * 4


class Encoder:
    """Makes a row of four numbers of each place and remembers which."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, places: Sequence[int]) -> list[torch.Tensor]:
        self.made += places
        return [torch.full((1, 4), float(at)) for at in places]


def test_what_was_seen_is_not_made_again() -> None:
    cache, encoder = ImageCache("test", 10 * ROW_BYTES), Encoder()

    first = cache.seen([b"a", b"b", b"a"], encoder)
    second = cache.seen([b"b", b"c", b"a"], encoder)

    assert encoder.made == [0, 1, 1]
    assert [row[0, 0].item() for row in first] == [0, 1, 0]
    assert [row[0, 0].item() for row in second] == [1, 1, 0]
    assert second[0] is not first[0]


def test_the_least_recently_used_goes_first() -> None:
    cache, encoder = ImageCache("test", 2 * ROW_BYTES), Encoder()
    cache.seen([b"a", b"b"], encoder)
    cache.seen([b"a"], encoder)
    cache.seen([b"c"], encoder)
    encoder.made.clear()

    cache.seen([b"a", b"c"], encoder)
    assert encoder.made == []
    cache.seen([b"b"], encoder)
    assert encoder.made == [0]


def test_what_is_larger_than_the_cache_is_not_kept() -> None:
    cache, encoder = ImageCache("test", ROW_BYTES - 1), Encoder()

    assert len(cache.seen([b"a"], encoder) + cache.seen([b"a"], encoder)) == 2
    assert encoder.made == [0, 0]


def test_what_has_no_key_is_always_made() -> None:
    cache, encoder = ImageCache("test", 10 * ROW_BYTES), Encoder()

    assert len(cache.seen([None, b"a", None], encoder)) == 3
    cache.seen([None, b"a"], encoder)
    assert encoder.made == [0, 1, 2, 0]


def test_the_hash_tells_pictures_and_sizes_apart() -> None:
    pixels, grid = torch.arange(12.0).view(4, 3), torch.tensor([[1, 2, 2]])

    assert content_hash(pixels, grid) == content_hash(pixels.clone(), grid.clone())
    assert len({
        content_hash(pixels, grid),
        content_hash(pixels + 1, grid),
        content_hash(pixels, torch.tensor([[1, 1, 4]])),
        content_hash(pixels.view(3, 4), grid),
    }) == 4  # fmt: skip


@pytest.mark.parametrize("name", ["describe", "generate"])
def test_answers_are_the_same_and_lookups_are_counted(name: str) -> None:
    def here(mib: int) -> dict[str, Any]:
        names = {0: f"plain-{name}", 8: f"cached-{name}"}
        own = {"model_name": names[mib], "image_cache_mib": mib}
        return {"_env_file": None, "auth": "off", "device": "cpu", "threads": 1, **own}

    if name == "describe":
        plain, cached = (QwenVL(DescribeSettings(**here(mib))) for mib in (0, 8))
        prompts = [cached.preprocess(Image.new("RGB", (90, 60), c), "What?") for c in ("red", "red", "blue")]
    else:
        plain, cached = (KimiVL(GenerateSettings(**here(mib))) for mib in (0, 8))
        prompts = [cached.preprocess([Image.new("RGB", (90, 60), c)], "What?") for c in ("red", "red", "blue")]
        prompts.append(cached.preprocess([], "What?"))
    sampling = Sampling(max_tokens=12)
    expected = plain.generate(prompts, sampling, lambda index: False)

    for _ in range(2):
        assert cached.generate(prompts, sampling, lambda index: False) == expected

    counts = {kind: LOOKED_UP.labels(f"cached-{name}", kind)._value.get() for kind in ("hit", "miss")}
    assert counts == {"hit": 4, "miss": 2}
