"""What the servers of a benchmark are asked: pictures that no cache has seen, queries, large photographs."""

import io
import os
import random
from collections.abc import Iterator

from PIL import Image

from tests.scenes import encoded, random_scene

SIDE = 336
FLOOR_BYTES = 100_000
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
MEGAPIXELS = (4000, 3000)


def scenes(seed: int) -> Iterator[bytes]:
    """Scenes as JPEG, 336 px on the shorter side, no two alike."""
    rng = random.Random(seed)
    while True:
        image, _ = random_scene(rng, rng.choice((1, 2)), side=112)  # drawn small: drawing must not take the machine
        size = (SIDE, round(SIDE * image.height / image.width))
        if image.height < image.width:
            size = (round(SIDE * image.width / image.height), SIDE)
        yield encoded(image.resize(size, Image.Resampling.BILINEAR), "JPEG", quality=90)


def queries(seed: int) -> Iterator[bytes]:
    """Captions of such scenes, as text."""
    rng = random.Random(seed)
    while True:
        yield random_scene(rng, 2, side=24)[1].encode()


def blobs(seed: int) -> Iterator[bytes]:
    """100 KB that nobody looks into."""
    while True:
        yield os.urandom(FLOOR_BYTES)


def photographs(seed: int) -> Iterator[bytes]:
    """scikit-image's photographs at 12 megapixels as JPEG, each flipped, cropped and compressed in its own way."""
    import skimage.data

    rng = random.Random(seed)
    sources = [Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in PHOTOGRAPHS[:3]]
    while True:
        source = rng.choice(sources)
        left, top = rng.randrange(source.width // 4), rng.randrange(source.height // 4)
        box = (left, top, left + source.width * 3 // 4, top + source.height * 9 // 16)
        image = source.resize(MEGAPIXELS, Image.Resampling.BICUBIC, box=tuple(min(*pair) for pair in zip(
            box, (source.width, source.height) * 2, strict=True)))  # fmt: skip
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=rng.randint(85, 92))
        yield buffer.getvalue()


KINDS = {"scenes": scenes, "queries": queries, "blobs": blobs, "photographs": photographs}
