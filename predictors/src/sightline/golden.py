"""Fixed pictures that a model is tried with before it is ready, and the file that says what it made of one."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FILE_NAME = "sightline_golden.json"
"""Beside the weights, where it is looked for when no setting names another."""

PROMPT = "Describe this image in detail"
"""What is asked about the picture, where a model reads text."""


def picture(width: int = 160, height: int = 96) -> Image.Image:
    """Two flat colours and a gradient, so that place and order matter; the same for ever."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    half = width // 2
    pixels[:, :half] = (250, 250, 250)
    pixels[height // 5 : height * 5 // 8, width // 8 : width * 3 // 8] = (220, 40, 40)
    pixels[:, half:, 1] = np.linspace(0, 255, width - half).astype(np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True, slots=True)
class Golden:
    """What a model made of `picture()`.

    dtype    of the weights then; in another type other answers are right, so that nothing is compared
    tokens   the first that it said, greedy; empty for a model that embeds
    numbers  of the page's first and last vector, eight each; empty for a model that writes
    """

    dtype: str
    tokens: tuple[int, ...] = ()
    numbers: tuple[float, ...] = ()

    def differs(self, other: "Golden") -> bool:
        """Whether the answers are not those of one model in one type; numbers may be 0.02 apart."""
        if self.tokens != other.tokens or len(self.numbers) != len(other.numbers):
            return True
        return any(abs(mine - yours) > 0.02 for mine, yours in zip(self.numbers, other.numbers, strict=True))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Golden":
        """Raises ValueError or OSError for a file that is none."""
        said: Any = json.loads(path.read_text())
        if not isinstance(said, Mapping) or not {"dtype", "tokens", "numbers"} <= said.keys():
            raise ValueError(f"{path} is not a golden file")
        return cls(str(said["dtype"]), tuple(map(int, said["tokens"])), tuple(map(float, said["numbers"])))
