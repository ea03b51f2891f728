"""Measures the embedder on never-seen scenes: does a caption find its picture among hundreds?

Nothing of the training's forward runs here: file bytes, colpali_engine's processor and model, one item at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from sightline.maxsim import Vectors, maxsim, ndcg
from sightline.tiny import EMBED, HELD_OUT_EMBED, is_held_out, scenes

Pair = tuple[Image.Image, str]


@dataclass(frozen=True)
class Figures:
    """How captions find their pictures (and pictures their captions) among `pairs`, 0-1."""

    pairs: int
    ndcg_at_5: float
    recall_at_1: float
    recall_at_5: float
    ndcg_at_5_by_picture: float


def distinct_pairs(
    count: int, seed: int, objects: Literal[1, 2] | None = None, *, only_held_out: bool = True
) -> Iterator[Pair]:
    """Pictures with captions of their own, as a server decodes them.

    only_held_out   only captions that this checkpoint's training never saw
    """
    rng = np.random.default_rng([seed, objects or 0, int(only_held_out)])
    seen: set[str] = set()
    while len(seen) < count:
        scene = scenes.draw_scene(rng, objects)
        caption = scenes.caption(scene)
        if caption in seen or (only_held_out and not is_held_out(caption, HELD_OUT_EMBED)):
            continue
        seen.add(caption)
        yield scenes.decode(scenes.encode(scenes.render(scene), rng)[0]), caption


@dataclass(frozen=True)
class Embedder:
    """The loaded checkpoint."""

    model: Any
    processor: Any

    def picture(self, image: Image.Image) -> Vectors:
        """Vectors of an RGB picture."""
        return self._vectors(self.processor.process_images([image]))

    def text(self, text: str) -> Vectors:
        """Vectors of a query."""
        return self._vectors(self.processor.process_queries([text]))

    def _vectors(self, inputs: Any) -> Vectors:  # noqa: ANN401 - a BatchFeature
        with torch.no_grad():
            return self.model(**inputs)[0].float().numpy()


def load(folder: Path = EMBED) -> Embedder:
    """Load through colpali_engine, no remote code."""
    from colpali_engine.models import ColQwen2_5, ColQwen2_5_Processor

    return Embedder(ColQwen2_5.from_pretrained(folder).eval(), ColQwen2_5_Processor.from_pretrained(folder))


def measure(embedder: Embedder, pairs: Iterable[Pair]) -> Figures:
    """Rank every picture for every caption, and the other way round."""
    images, captions = zip(*pairs, strict=True)
    scores = maxsim([embedder.text(text) for text in captions], [embedder.picture(image) for image in images])
    own = range(len(captions))
    rank = (scores >= np.diagonal(scores)[:, None]).sum(axis=1)
    return Figures(
        pairs=len(captions),
        ndcg_at_5=round(ndcg(scores, own), 4),
        recall_at_1=round(float((rank <= 1).mean()), 4),
        recall_at_5=round(float((rank <= 5).mean()), 4),
        ndcg_at_5_by_picture=round(ndcg(np.ascontiguousarray(scores.T), own), 4),
    )


def report(count: int, seed: int, folder: Path = EMBED) -> dict[str, Any]:
    """The figures of a checkpoint: held-out captions, and all that one object can have."""
    embedder = load(folder)
    return {
        "command": f"python -m sightline.tiny retrieval --scenes {count} --seed {seed}",
        "cpus": os.cpu_count(),
        "held_out_captions": asdict(measure(embedder, distinct_pairs(count, seed))),
        "one_object": asdict(measure(embedder, distinct_pairs(192, seed, 1, only_held_out=False))),
    }
