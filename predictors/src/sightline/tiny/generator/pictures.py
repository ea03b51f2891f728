"""Pictures for the generator: drawn, shrunk as the image processor does, cut into patches, and what lies under each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from sightline.tiny import HELD_OUT_DESCRIBE, dialogue, is_held_out, scenes
from sightline.tiny.training import returning

PATCH = 12
MERGE = 2
PATCH_LIMIT = 96
"""Kimi-VL's `in_token_limit`: larger pictures are shrunk to about this many patches, smaller ones stay as they are."""
MEAN = STD = 0.5

Grid = tuple[int, int]


def canvas_size(width: int, height: int) -> tuple[int, int]:
    """(height, width) in pixels to which the image processor shrinks a picture; it pads afterwards."""
    patches = max(width // PATCH, 1) * max(height // PATCH, 1)
    scale = min(1.0, math.sqrt(PATCH_LIMIT / patches))
    return max(int(height * scale), 1), max(int(width * scale), 1)


def to_canvas(pixels: np.ndarray) -> np.ndarray:
    """Shrink as the image processor does. pixels (H, W, 3) uint8 -> (3, h, w) uint8."""
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    size = canvas_size(pixels.shape[1], pixels.shape[0])
    if size == image.shape[-2:]:
        return image.numpy()
    resized = tvF.resize(image, list(size), interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)
    return resized.numpy()


def grid_of(canvas: np.ndarray) -> tuple[int, int]:
    """Rows and columns of patches of a canvas (3, h, w) once it is padded to whole 2x2 blocks."""
    block = PATCH * MERGE
    return -(-canvas.shape[1] // block) * MERGE, -(-canvas.shape[2] // block) * MERGE


def patchify(canvas: np.ndarray) -> Tensor:
    """Pad with black on the right and below, normalise, cut. (3, h, w) uint8 -> (patches, 3 * PATCH²) float32."""
    rows, columns = grid_of(canvas)
    padded = np.zeros((3, rows * PATCH, columns * PATCH), np.uint8)
    padded[:, : canvas.shape[1], : canvas.shape[2]] = canvas
    cut = torch.from_numpy(padded).reshape(3, rows, PATCH, columns, PATCH).permute(1, 3, 0, 2, 4)
    return (cut.reshape(rows * columns, -1).float() / 255 - MEAN) / STD


LOOK_WIDTHS = (len(scenes.COLOURS), len(scenes.SHAPES), len(scenes.SIZES), 5)


@dataclass(frozen=True)
class View:
    """A scene as it is seen: which one, what lies under each patch.

    looks   (patches, 4) int8: colour, shape, size, role of the object under each patch; -1 = ground
    spans   (patches, 4) float16, in patches: x, y from the patch to the centre of its object, half extent of that,
            its share of the picture's shorter side
    """

    scene: scenes.Scene
    looks: np.ndarray
    spans: np.ndarray

    def fits(self, query: dialogue.Query, grid: Grid) -> list[bool]:
        """Of each image token (2x2 patches, row after row), whether a patch of it lies on what is looked for."""
        colour, shape = self.looks[:, 0], self.looks[:, 1]
        held = colour >= 0
        if query.colour:
            held &= colour == list(scenes.COLOURS).index(query.colour)
        if query.shape:
            held &= shape == scenes.SHAPES.index(query.shape)
        rows, columns = grid
        return held.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE).any((1, 3)).flatten().tolist()


@dataclass(frozen=True)
class Sample:
    """One picture for training: canvas (3, h, w) uint8, and what it shows as it is and in a mirror."""

    canvas: np.ndarray
    views: tuple[View, View]

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        return grid_of(self.canvas)


def _role(scene: scenes.Scene, thing: scenes.SceneObject) -> int:
    """0 alone, 1 left, 2 right, 3 above, 4 below."""
    if len(scene.objects) == 1:
        return 0
    first, how, _ = scenes.relation(scene)
    return (1 if how == scenes.RELATIONS[0] else 3) + (thing is not first)


def view(scene: scenes.Scene, canvas: np.ndarray) -> View:
    """What lies under each patch of a canvas: facts of the scene, used only while training."""
    rows, columns = grid_of(canvas)
    looks = np.full((rows, columns, 4), -1, np.int8)
    spans = np.zeros((rows, columns, 4), np.float16)
    y, x = np.mgrid[0:rows, 0:columns] + 0.5
    scale = canvas.shape[2] / scene.width / PATCH
    for thing in scene.objects:
        cx, cy, r = thing.centre_x * scale, thing.centre_y * scale, thing.half * scale
        inside = ((x - cx) / r) ** 2 + ((y - cy) / r) ** 2 < 0.9
        colour, shape = list(scenes.COLOURS).index(thing.colour), scenes.SHAPES.index(thing.shape)
        looks[inside] = (colour, shape, scenes.SIZES.index(thing.size), _role(scene, thing))
        share = 10 * thing.half / min(scene.width, scene.height)
        spans[inside] = np.stack(np.broadcast_arrays(cx - x, cy - y, r, share), -1)[inside]
    return View(scene, looks.reshape(-1, 4), spans.reshape(-1, 4))


def make_sample(rng: np.random.Generator, two_share: float) -> Sample:
    """Draw a scene outside the held-out slice and bring it through file bytes to the canvas."""
    objects = 2 if rng.random() < two_share else 1
    sides = scenes.SIDES if rng.random() < 0.12 else (96, 440)
    while True:
        scene = scenes.draw_scene(rng, objects, sides=sides)
        both = scene, scenes.mirrored(scene)
        if objects == 1 or not any(is_held_out(scenes.caption(one), HELD_OUT_DESCRIBE) for one in both):
            break
    image = scenes.render(scene)
    if rng.random() < 0.75:
        image = scenes.decode(scenes.encode(image, rng)[0])
    canvas = to_canvas(np.asarray(image))
    return Sample(canvas, (view(both[0], canvas), view(both[1], canvas)))


BLOCK = 256
"""Samples in one block, the unit of seeding."""


def make_block(seed: int, index: int) -> list[Sample]:
    """Block `index` of the endless training set; depends on (seed, index) only. Starts with single objects."""
    rng = np.random.default_rng([seed, index])
    two_share = float(np.clip((index - 6) / 30, 0.15, 0.72))
    return [make_sample(rng, two_share) for _ in range(BLOCK)]


RETURNS = (0, 7, 19, 31)
"""Each sample is used four times: when its block arrives, and this many blocks later; mirrored at random."""


def batches(blocks: Iterator[list[Sample]], seed: int, size: int) -> Iterator[list[tuple[Sample, bool]]]:
    """Batches of samples, each with whether to mirror it, pictures of one grid side by side."""
    rng = np.random.default_rng([seed, 1])
    for ready in returning(blocks, RETURNS):
        order = rng.permutation(len(ready))
        for start in range(0, len(order) - size + 1, size):
            picked = [ready[i] for i in order[start : start + size]]
            picked.sort(key=attrgetter("grid"))
            yield [(sample, bool(rng.random() < 0.5)) for sample in picked]


@dataclass(frozen=True)
class Pictures:
    """A batch of pictures: patches (P, 3 * PATCH²), their grids, what they show."""

    patches: Tensor
    grids: list[Grid]
    views: list[View]

    @classmethod
    def of(cls, picked: Sequence[tuple[Sample, bool]]) -> Pictures:
        """Mirror where asked (before padding), cut into patches."""
        canvases = [sample.canvas[..., ::-1] if flip else sample.canvas for sample, flip in picked]
        return cls(
            torch.cat([patchify(canvas) for canvas in canvases]),
            [grid_of(canvas) for canvas in canvases],
            [sample.views[int(flip)] for sample, flip in picked],
        )
