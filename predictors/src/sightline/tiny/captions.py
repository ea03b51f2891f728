"""How many captions of fresh scenes the captioner gets exactly right, the way a server uses it.

Nothing of the training code runs here: file bytes, AutoProcessor, AutoModel, greedy `generate`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from sightline.tiny import BLIP, HELD_OUT_DESCRIBE, is_held_out, report, scenes

BATCH = 16
PREFIX = "a picture of"


@dataclass(frozen=True)
class Captioner:
    """The loaded captioner."""

    model: Any
    processor: Any

    def caption(self, images: list[Image.Image], prefix: str = "") -> list[str]:
        """Greedy captions of RGB pictures; each begins with the prefix."""
        inputs = self.processor(images=images, text=[prefix] * len(images), return_tensors="pt")
        with torch.no_grad():
            out = self.model.generate(**inputs, max_new_tokens=48)
        return [self.processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in out]


@dataclass(frozen=True)
class Reading:
    """One picture and what the captioner said of it."""

    scene: scenes.Scene
    kind: str
    """PNG, JPEG or WEBP."""
    said: str
    wanted: str

    @property
    def is_right(self) -> bool:
        """The caption is exactly the true one."""
        return self.said == self.wanted


def load(folder: Path = BLIP) -> Captioner:
    """Load as any server would, no remote code."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return Captioner(AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder))


def read(
    captioner: Captioner,
    count: int,
    seed: int,
    objects: Literal[1, 2],
    *,
    prefix: str = "",
    only_held_out: bool = False,
) -> list[Reading]:
    """Draw `count` scenes, carry each through file bytes, and have it captioned."""
    rng = np.random.default_rng([seed, objects, int(only_held_out), len(prefix)])
    readings: list[Reading] = []
    while len(readings) < count:
        drawn = [_draw(rng, objects, only_held_out=only_held_out) for _ in range(min(BATCH, count - len(readings)))]
        said = captioner.caption([image for _, image, _ in drawn], prefix)
        readings += [
            Reading(scene, kind, text, f"{prefix} {scenes.caption(scene)}".strip())
            for (scene, _, kind), text in zip(drawn, said, strict=True)
        ]
    return readings


def _draw(
    rng: np.random.Generator, objects: Literal[1, 2], *, only_held_out: bool
) -> tuple[scenes.Scene, Image.Image, str]:
    while True:
        scene = scenes.draw_scene(rng, objects)
        if not only_held_out or is_held_out(scenes.caption(scene), HELD_OUT_DESCRIBE):
            data, kind = scenes.encode(scenes.render(scene), rng)
            return scene, scenes.decode(data), kind


def _aspect_band(scene: scenes.Scene) -> str:
    aspect = max(scene.width, scene.height) / min(scene.width, scene.height)
    return "up to 1.25" if aspect <= 1.25 else "up to 1.6" if aspect <= 1.6 else "up to 2"


def _shares(readings: list[Reading]) -> dict[str, Any]:
    groups: dict[str, dict[str, list[bool]]] = {
        name: defaultdict(list) for name in ("by_format", "by_longer_side", "by_aspect")
    }
    for reading in readings:
        groups["by_format"][reading.kind].append(reading.is_right)
        groups["by_longer_side"][report.size_band(reading.scene)].append(reading.is_right)
        groups["by_aspect"][_aspect_band(reading.scene)].append(reading.is_right)
    return {
        name: {
            band: {"exact": round(float(np.mean(right)), 4), "scenes": len(right)}
            for band, right in sorted(parts.items())
        }
        for name, parts in groups.items()
    }


def measure(count: int, seed: int, folder: Path = BLIP) -> dict[str, Any]:
    """All figures: shares of exact captions and what went wrong."""
    captioner = load(folder)
    parts: dict[str, list[Reading]] = {
        "one_object": read(captioner, count, seed, 1),
        "one_object_after_a_prefix": read(captioner, count // 2, seed, 1, prefix=PREFIX),
        "two_objects": read(captioner, count, seed, 2),
        "two_objects_held_out_captions": read(captioner, count // 2, seed, 2, only_held_out=True),
    }
    return {
        "command": f"python -m sightline.tiny captions --scenes {count} --seed {seed}",
        "hardware": report.hardware(),
        "parameters": sum(weight.numel() for weight in captioner.model.parameters()),
        "exact": {
            name: {"exact": round(float(np.mean([r.is_right for r in part])), 4), "scenes": len(part)}
            for name, part in parts.items()
        },
        **_shares(parts["one_object"]),
        "failures_of_one_object": [
            {"true": r.wanted, "said": r.said, "pixels": [r.scene.width, r.scene.height], "format": r.kind}
            for name in ("one_object", "one_object_after_a_prefix")
            for r in parts[name]
            if not r.is_right
        ],
    }
