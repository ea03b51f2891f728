"""The picture of a similarity map."""

import io

import numpy as np
from PIL import Image

from sightline.heatmap import overlay


def brightness(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"), dtype=float)


def test_is_as_large_as_the_picture_and_bright_where_the_map_is_high():
    grid = np.array([[0, 0, 0], [0, 0, 1]], np.float32)

    seen = brightness(overlay(Image.new("RGB", (90, 60), "gray"), grid, 0, 1))

    assert seen.shape == (60, 90)
    row, column = np.unravel_index(seen.argmax(), seen.shape)
    assert row >= 30
    assert column >= 60
    assert seen[:20, :40].max() < seen[row, column] - 50


def test_gets_brighter_all_the_way_from_low_to_high():
    grid = np.linspace(0, 1, 64, dtype=np.float32)[None]

    seen = brightness(overlay(Image.new("RGB", (64, 1), "gray"), grid, 0, 1))[0]

    assert (np.diff(seen) >= -1).all()
    assert seen[-1] > seen[0] + 80


def test_a_flat_map_and_numbers_beyond_the_range_are_drawn_too():
    picture = Image.new("RGB", (8, 8), "gray")
    flat = overlay(picture, np.full((2, 2), 0.5, np.float32), 0.5, 0.5)
    beyond = brightness(overlay(picture, np.array([[-9, 9]], np.float32), 0, 1))
    assert brightness(flat).std() < 1
    assert beyond[:, 0].mean() < beyond[:, -1].mean()
