"""Scenes drawn by hand for tests, apart from the training's own generator."""

import io
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

BACKGROUNDS = {"white": (250, 250, 250), "gray": (150, 150, 150), "black": (15, 15, 15)}
COLORS = {
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
SIZES = {"small": (0.10, 0.13), "large": (0.18, 0.23)}


@dataclass(frozen=True)
class Thing:
    size: str
    color: str
    shape: str
    x: float
    y: float
    extent: float

    @property
    def words(self) -> str:
        return f"a {self.size} {self.color} {self.shape}"


def star_points(x: float, y: float, extent: float) -> list[tuple[float, float]]:
    import math

    points = []
    for index in range(10):
        radius = extent if index % 2 == 0 else extent * 0.42
        angle = -math.pi / 2 + index * math.pi / 5
        points.append((x + radius * math.cos(angle), y + radius * math.sin(angle)))
    return points


def draw(
    things: list[Thing], background: tuple[int, int, int], width: int, height: int, rng: random.Random
) -> Image.Image:
    scale = 2 if max(width, height) <= 1000 else 1  # drawn twice as large and shrunk: smooth edges
    image = Image.new("RGB", (width * scale, height * scale), background)
    pen = ImageDraw.Draw(image)
    for thing in things:
        x, y, e = (value * scale for value in (thing.x, thing.y, thing.extent))
        fill = tuple(max(0, min(255, channel + rng.randint(-10, 10))) for channel in COLORS[thing.color])
        if thing.shape == "circle":
            pen.ellipse((x - e, y - e, x + e, y + e), fill=fill)
        elif thing.shape == "square":
            pen.rectangle((x - e, y - e, x + e, y + e), fill=fill)
        elif thing.shape == "triangle":
            pen.polygon([(x, y - e), (x - e, y + e), (x + e, y + e)], fill=fill)
        else:
            pen.polygon(star_points(x, y, e), fill=fill)
    return image.resize((width, height), Image.Resampling.LANCZOS) if scale > 1 else image


def random_scene(
    rng: random.Random, objects: int | None = None, side: int | None = None, diagonal_margin: float = 0.0
) -> tuple[Image.Image, str]:
    """An image and its caption in the world of the small checkpoints.

    diagonal_margin  how far from equal the two distances between centres must be, as a share of the larger; where
                     they are nearly equal, the last pixel decides between `above` and `to the left of`
    """
    short = side or round(2 ** rng.uniform(6.585, 9.97))  # 96 to 1,000
    long = min(2000, round(short * rng.uniform(1, 2)))
    width, height = (long, short) if rng.random() < 0.5 else (short, long)
    background = rng.choice(list(BACKGROUNDS))
    shade = tuple(max(0, min(255, channel + rng.randint(-3, 3))) for channel in BACKGROUNDS[background])
    count = objects or rng.choice((1, 2))
    while True:
        things = []
        for _ in range(count):
            size = rng.choice(list(SIZES))
            extent = rng.uniform(*SIZES[size]) * short
            things.append(
                Thing(
                    size,
                    rng.choice(list(COLORS)),
                    rng.choice(SHAPES),
                    rng.uniform(extent + 1, width - extent - 1),
                    rng.uniform(extent + 1, height - extent - 1),
                    extent,
                )
            )
        if count == 1:
            break
        first, second = things
        reach = first.extent + second.extent + 0.02 * short
        dx, dy = abs(first.x - second.x), abs(first.y - second.y)
        if max(dx, dy) > reach and abs(dx - dy) > diagonal_margin * max(dx, dy):
            break
    image = draw(things, shade, width, height, rng)
    if count == 1:
        return image, f"{things[0].words} on a {background} background"
    horizontal = abs(things[0].x - things[1].x) > abs(things[0].y - things[1].y)
    first, second = sorted(things, key=lambda thing: thing.x if horizontal else thing.y)
    relation = "to the left of" if horizontal else "above"
    return image, f"{first.words} {relation} {second.words} on a {background} background"


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def random_encoding(image: Image.Image, rng: random.Random) -> tuple[bytes, str]:
    kind = rng.choice(("PNG", "JPEG", "WEBP"))
    options = {} if kind == "PNG" else {"quality": rng.randint(60, 95)}
    return encoded(image, kind, **options), kind


def red_circle(side: int = 256) -> bytes:
    """`a large red circle on a white background`, as PNG."""
    thing = Thing("large", "red", "circle", side / 2, side / 2, 0.2 * side)
    return encoded(draw([thing], BACKGROUNDS["white"], side, side, random.Random(0)))


RED_CIRCLE = "a large red circle on a white background"
