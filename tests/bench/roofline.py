"""What this machine could do at best: matrix products and memory bandwidth as measured, and a model's share of both.

    python tests/bench/roofline.py      → JSON: float32 and bfloat16 FLOP/s, bytes a second

Dims   W weights of a part · T tokens or patches that pass it. A pass of T through W costs 2·W·T FLOP, attention apart.
"""

import json
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPEATS = 5


def measure() -> dict[str, float]:
    """FLOP/s of a square matrix product by type, and bytes a second of a copy, read and write both counted."""
    import torch

    found: dict[str, float] = {}
    side = 2048
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(side, side).to(dtype) for _ in range(2))
        found[str(dtype).removeprefix("torch.")] = 2 * side**3 / _best(lambda a=left, b=right: a @ b)
    source = torch.ones(1 << 27, dtype=torch.uint8)
    target = torch.empty_like(source)
    found["bytes"] = 2 * source.numel() / _best(lambda: target.copy_(source))
    return found


def _best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest run: on a shared machine what it can do is its best, not its mean."""
    work()
    times: list[float] = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


@dataclass(frozen=True)
class Shape:
    """A checkpoint's weights by part. width: bytes of a number. is_prefix: image tokens pass the text model too."""

    vision: int
    text: int
    head: int
    merge: int
    dtype: str
    width: int
    is_prefix: bool


def shape_of(folder: Path, dtype: str | None = None) -> Shape:
    """Count a checkpoint's weights from the heads of its safetensors files. dtype: that it is computed in."""
    config = json.loads((folder / "config.json").read_text())
    vision = text = head = 0
    saved = "F32"
    for file in folder.glob("*.safetensors"):
        for name, entry in _header(file).items():
            count = 1
            for dim in entry["shape"]:
                count *= dim
            if "visual" in name or "vision_model" in name:
                vision += count
            elif any(word in name for word in ("embed_tokens", "lm_head", "word_embeddings", "predictions.decoder")):
                head = max(head, count)
            else:
                text += count
                saved = entry["dtype"]
    merge = config["vision_config"].get("spatial_merge_size", 1) ** 2
    dtype = dtype or {"F32": "float32", "BF16": "bfloat16"}[saved]
    prefix = config["model_type"] != "blip"
    return Shape(vision, text, head, merge, dtype, {"float32": 4, "bfloat16": 2}[dtype], prefix)


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as data:
        (length,) = struct.unpack("<Q", data.read(8))
        told = json.loads(data.read(length))
    told.pop("__metadata__", None)
    return told


def bound(shape: Shape, machine: Mapping[str, float], *, batch: int, prompt: float, image: float, new: float) -> float:
    """Inputs a second at best, if `batch` of them share every step.

    prompt, image  tokens of one input, images' among the prompt's; new: tokens made, 0 for an embedding

    Prefill at the matrix products' speed; each decoding step at theirs or at the speed of reading all weights,
    whichever is slower. Attention, caches and everything that is no matrix product count as free.
    """
    speed = machine[shape.dtype]
    read = prompt if shape.is_prefix else prompt - image
    prefill = 2 * (shape.vision * image * shape.merge + shape.text * read) / speed
    weights = shape.text + shape.head
    step = max(2 * weights * batch / speed, weights * shape.width / machine["bytes"])
    return batch / (batch * prefill + new * step)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure()) + "\n")
