"""A similarity map laid over the picture it belongs to, as a PNG."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_COLOURS = (
    (0.0, (18, 22, 66)),
    (0.35, (32, 94, 138)),
    (0.65, (60, 168, 118)),
    (0.85, (200, 206, 60)),
    (1.0, (255, 248, 180)),
)
"""From low to high: dark blue, teal, green, yellow; brightness rises all the way, so that it also reads in grey."""

OPACITY = 0.6


def overlay(picture: Image.Image, grid: NDArray[np.float32], low: float, high: float) -> bytes:
    """Colour a picture by a grid of similarities.

    picture  RGB · grid (rows, columns), stretched over the whole picture
    low      similarity that is drawn darkest, `high` brightest; beyond them it is cut
    returns  PNG of the picture's size
    """
    share = np.clip((grid - low) / max(high - low, 1e-6), 0, 1)
    levels = Image.fromarray((share * 255).round().astype(np.uint8))
    spread = np.asarray(levels.resize(picture.size, Image.Resampling.BICUBIC))
    heat = Image.fromarray(_table()[spread])
    sink = io.BytesIO()
    Image.blend(picture, heat, OPACITY).save(sink, "PNG", compress_level=3)
    return sink.getvalue()


def _table() -> NDArray[np.uint8]:
    """256 colours, (256, 3)."""
    places = [place for place, _ in _COLOURS]
    at = np.linspace(0, 1, 256)
    channels = [np.interp(at, places, [colour[channel] for _, colour in _COLOURS]) for channel in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)
