"""Copies of our small checkpoints, damaged in ways that a server must notice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]


def copy_of(checkpoint: Path, folder: Path) -> Path:
    """A copy that a test may damage."""
    target = folder / "a copy"
    shutil.copytree(checkpoint, target)
    return target


def change_weights(checkpoint: Path, change: Callable[[Weights], None]) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def change_config(checkpoint: Path, change: Callable[[dict[str, Any]], None], name: str = "config.json") -> None:
    config = json.loads((checkpoint / name).read_text())
    change(config)
    (checkpoint / name).write_text(json.dumps(config))


def drop_one(weights: Weights) -> None:
    del weights[_a_matrix(weights)]


def add_one(weights: Weights) -> None:
    weights["model.layers.99.surplus.weight"] = torch.zeros(2, 2)


def reshape_one(weights: Weights) -> None:
    weights[_a_matrix(weights)] = torch.zeros(3, 5)


def _a_matrix(weights: Weights) -> str:
    return next(name for name in sorted(weights) if weights[name].ndim == 2 and "layers" in name)


DAMAGE = {"a missing tensor": drop_one, "a surplus tensor": add_one, "a tensor of another shape": reshape_one}
