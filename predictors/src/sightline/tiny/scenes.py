"""The small world the demonstration checkpoints know: coloured shapes on a plain background, and their captions.

Pure numpy and PIL, no torch: importing this file is free.

A scene is one object, or two that do not touch, on a white, gray or black background. Its caption says size, colour and
shape of each object, how the two lie to each other, and the background:

    a large red circle on a white background
    a small blue square to the left of a large green star on a gray background

Units: positions and extents are pixels of the original image, origin top left, y down. Colours are RGB 0-255.
What the words leave open (edges antialiased or not, width of a star's arms, how a triangle fills its box, exact shade,
place, size of the image, file format) is drawn at random, so that a model cannot lean on one way of drawing.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

SIZES = ("small", "large")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (240, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (130, 50, 170),
    "pink": (250, 150, 190),
    "brown": (120, 75, 40),
}
SHAPES = ("circle", "square", "triangle", "star")
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (150, 150, 150),
    "black": (15, 15, 15),
}
RELATIONS = ("to the left of", "above")

HALF_EXTENT = {"small": (0.10, 0.13), "large": (0.18, 0.23)}
"""Half extent of an object as a share of the image's shorter side."""
COLOUR_JITTER = 10
"""Largest departure of each colour channel from the table."""
SIDES = (96, 2000)
"""Smallest and largest side of an image, pixels."""
MAX_ASPECT = 2.0

Format = Literal["PNG", "JPEG", "WEBP"]
FORMATS: tuple[Format, ...] = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class SceneObject:
    """One coloured shape. `centre_x`, `centre_y` and `half` are pixels of the original image."""

    size: str
    colour: str
    shape: str
    centre_x: float
    centre_y: float
    half: float
    rgb: tuple[int, int, int]
    star_inner: float = 0.44
    """Inner radius of a star as a share of the outer one."""
    fills_box: bool = True
    """A triangle fills its box; otherwise it is equilateral in the circle of radius `half`."""

    @property
    def words(self) -> str:
        """`large red circle`."""
        return f"{self.size} {self.colour} {self.shape}"

    @property
    def reach(self) -> float:
        """Radius of the smallest circle around the centre that holds the whole shape, pixels."""
        boxed = self.shape == "square" or (self.shape == "triangle" and self.fills_box)
        return self.half * math.sqrt(2) if boxed else self.half

    def outline(self) -> list[tuple[float, float]]:
        """Corners of the polygon, pixels, clockwise from the top (left); empty for a circle."""
        x, y, r = self.centre_x, self.centre_y, self.half
        if self.shape == "square":
            return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
        if self.shape == "triangle":
            if self.fills_box:
                return [(x, y - r), (x + r, y + r), (x - r, y + r)]
            return [_on_circle(x, y, r, k / 3) for k in range(3)]
        if self.shape == "star":
            return [_on_circle(x, y, r * (self.star_inner if k % 2 else 1), k / 10) for k in range(10)]
        return []


@dataclass(frozen=True)
class Scene:
    """A picture to be drawn. `supersampling` 1 draws hard pixel edges, n > 1 averages n x n samples a pixel."""

    width: int
    height: int
    background: str
    background_rgb: tuple[int, int, int]
    objects: tuple[SceneObject, ...]
    supersampling: int = 4


@dataclass(frozen=True)
class CaptionFacts:
    """What a caption says: objects as (size, colour, shape) in the order named, relation, background."""

    objects: tuple[tuple[str, str, str], ...]
    relation: str | None
    background: str


def _on_circle(x: float, y: float, radius: float, turn: float) -> tuple[float, float]:
    angle = 2 * math.pi * turn
    return x + radius * math.sin(angle), y - radius * math.cos(angle)


def _jittered(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    moved = np.asarray(rgb) + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, size=3)
    r, g, b = (int(v) for v in np.clip(moved, 0, 255))
    return r, g, b


def draw_sides(rng: np.random.Generator, sides: tuple[int, int] = SIDES) -> tuple[int, int]:
    """Width and height in pixels, each within `sides`, aspect up to 2:1 either way."""
    low, high = sides
    kind = rng.random()
    if kind < 0.15:
        side = int(rng.integers(low, high + 1))
        return side, side
    if kind < 0.55:
        while True:
            width, height = (int(v) for v in rng.integers(low, high + 1, size=2))
            if max(width, height) <= MAX_ASPECT * min(width, height):
                return width, height
    longer = math.exp(rng.uniform(math.log(low * 1.05), math.log(high)))
    shorter = max(low, longer / math.exp(rng.uniform(0, math.log(MAX_ASPECT))))
    longer, shorter = round(longer), max(round(shorter), math.ceil(round(longer) / MAX_ASPECT))
    return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)


def apart(a: SceneObject, b: SceneObject, gap: float = 1.0, *, by_box: bool = True) -> bool:
    """True when the two objects do not touch: their boxes, or else their circles, lie `gap` pixels apart."""
    dx, dy = abs(a.centre_x - b.centre_x), abs(a.centre_y - b.centre_y)
    if by_box:
        return max(dx, dy) >= a.half + b.half + gap
    return math.hypot(dx, dy) >= a.reach + b.reach + gap


def draw_scene(
    rng: np.random.Generator,
    objects: Literal[1, 2] | None = None,
    *,
    sides: tuple[int, int] = SIDES,
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS),
) -> Scene:
    """Draw a scene at random; the same generator state gives the same scene.

    objects   1 or 2; None draws either
    sides     smallest and largest side of the image, pixels
    """
    count = objects if objects is not None else int(rng.integers(1, 3))
    background = str(rng.choice(backgrounds))
    width, height = draw_sides(rng, sides)
    shorter = min(width, height)
    by_box = bool(rng.random() < 0.6)
    fills_box = bool(rng.random() < 0.5)
    star_inner = float(rng.uniform(0.36, 0.52))
    edge = float(rng.choice([0.0, 1.0, 0.02 * shorter, 0.04 * shorter]))
    gap = float(rng.choice([1.0, 2.0, 0.02 * shorter, 0.05 * shorter]))

    words = [(str(rng.choice(SIZES)), str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))) for _ in range(count)]
    if count == 2 and rng.random() < 0.08:
        words[1] = words[0]
    while True:
        placed: list[SceneObject] = []
        for size, colour, shape in words:
            half = shorter * float(rng.uniform(*HALF_EXTENT[size]))
            margin = half + edge + 0.5
            placed.append(
                SceneObject(
                    size=size,
                    colour=colour,
                    shape=shape,
                    centre_x=float(rng.uniform(margin, max(margin + 0.01, width - margin))),
                    centre_y=float(rng.uniform(margin, max(margin + 0.01, height - margin))),
                    half=half,
                    rgb=_jittered(rng, COLOURS[colour]),
                    star_inner=star_inner,
                    fills_box=fills_box,
                )
            )
        if count == 1 or apart(*placed, gap=gap, by_box=by_box):
            break
        # A square picture with two large squares may hold no pair of circles: let the boxes decide.
        by_box = by_box or bool(rng.random() < 0.1)
    return Scene(
        width=width,
        height=height,
        background=background,
        background_rgb=_jittered(rng, BACKGROUNDS[background]) if rng.random() < 0.7 else BACKGROUNDS[background],
        objects=tuple(placed),
        supersampling=int(rng.choice([1, 1, 2, 4])),
    )


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, `scene.width` x `scene.height`."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background_rgb)
    n = scene.supersampling
    for thing in scene.objects:
        left, top = math.floor(thing.centre_x - thing.half) - 1, math.floor(thing.centre_y - thing.half) - 1
        side = math.ceil(2 * thing.half) + 3
        mask = Image.new("L", (side * n, side * n), 0)
        pen = ImageDraw.Draw(mask)
        if thing.shape == "circle":
            x, y, r = (thing.centre_x - left) * n, (thing.centre_y - top) * n, thing.half * n
            pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        else:
            pen.polygon([((x - left) * n, (y - top) * n) for x, y in thing.outline()], fill=255)
        image.paste(thing.rgb, (left, top), mask.reduce(n) if n > 1 else mask)
    return image


def relation(scene: Scene) -> tuple[SceneObject, str, SceneObject]:
    """The two objects in the order a caption names them, and the words between.

    The axis on which the centres are farther apart decides; the left or upper object comes first.
    """
    a, b = scene.objects
    if abs(a.centre_x - b.centre_x) >= abs(a.centre_y - b.centre_y):
        return (a, RELATIONS[0], b) if a.centre_x <= b.centre_x else (b, RELATIONS[0], a)
    return (a, RELATIONS[1], b) if a.centre_y <= b.centre_y else (b, RELATIONS[1], a)


def caption(scene: Scene) -> str:
    """The one true caption of a scene."""
    if len(scene.objects) == 1:
        return f"a {scene.objects[0].words} on a {scene.background} background"
    first, how, second = relation(scene)
    return f"a {first.words} {how} a {second.words} on a {scene.background} background"


def all_captions(objects: Literal[1, 2] | None = None) -> list[str]:
    """Every caption of this world in a fixed order: 192 of one object, 24,576 of two."""
    things = [" ".join(words) for words in itertools.product(SIZES, COLOURS, SHAPES)]
    found: list[str] = []
    if objects in (None, 1):
        found += [f"a {thing} on a {ground} background" for thing in things for ground in BACKGROUNDS]
    if objects in (None, 2):
        found += [
            f"a {first} {how} a {second} on a {ground} background"
            for first, how, second, ground in itertools.product(things, RELATIONS, things, BACKGROUNDS)
        ]
    return found


_THING = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"^{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})? on a ({'|'.join(BACKGROUNDS)}) background$")


def parse_caption(text: str) -> CaptionFacts | None:
    """What a caption says, or None when the text is not a caption of this world.

    A capital first letter and a full stop are forgiven.

    >>> parse_caption("A large red circle on a white background.").objects
    (('large', 'red', 'circle'),)
    """
    plain = text.strip().removesuffix(".")
    match = _CAPTION.match(plain[:1].lower() + plain[1:])
    if match is None:
        return None
    groups = match.groups()
    first = (groups[0], groups[1], groups[2])
    if groups[3] is None:
        return CaptionFacts((first,), None, groups[7])
    return CaptionFacts((first, (groups[4], groups[5], groups[6])), groups[3], groups[7])


def encode(image: Image.Image, rng: np.random.Generator) -> tuple[bytes, Format]:
    """The picture as the bytes of a file, format and quality (60-95) at random."""
    kind = FORMATS[int(rng.integers(0, len(FORMATS)))]
    sink = io.BytesIO()
    quality = int(rng.integers(60, 96))
    fine = bool(rng.random() < 0.3)
    if kind == "JPEG":
        image.save(sink, "JPEG", quality=quality, subsampling=0 if fine else 2)
    elif kind == "WEBP":
        image.save(sink, "WEBP", quality=quality, method=2)
    else:
        image.save(sink, "PNG", compress_level=1)
    return sink.getvalue(), kind


def decode(image_bytes: bytes, max_width: int = 512, max_height: int = 1024) -> Image.Image:
    """File bytes to RGB as a server sees it: shrunk by LANCZOS to at most 512 x 1024 pixels, aspect kept."""
    with Image.open(io.BytesIO(image_bytes)) as opened:
        image = opened.convert("RGB")
    scale = min(1.0, max_width / image.width, max_height / image.height)
    if scale == 1.0:
        return image
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def mirrored(scene: Scene) -> Scene:
    """The scene seen in a mirror, left and right exchanged."""
    moved = tuple(replace(thing, centre_x=scene.width - thing.centre_x) for thing in scene.objects)
    return replace(scene, objects=moved)
