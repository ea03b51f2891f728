"""Kimi-VL's safetensors files, streamed into a model tensor by tensor, and written."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from sightline.models.kimi_vl.keys import Piece, from_published, to_published
from sightline.models.loading import LoadFailed


def checkpoint_files(name: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> list[Path]:
    """The safetensors files of a folder or hub id. Raises OSError when there are none."""
    where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **where)
    if index is None:
        return [Path(str(cached_file(name, SAFE_WEIGHTS_NAME, **where)))]
    shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(str(cached_file(name, shard, **where))) for shard in shards]


def tensors(files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Published names and tensors of all files, read one at a time."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)


def fill(
    model: Any,  # noqa: ANN401
    wanted: Mapping[str, torch.Tensor],
    files: Sequence[Path],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give a model whose weights are on the meta device those of the files, one tensor at a time.

    model   on `device` afterwards; modules that `quantize.prepare` put into it take their weights themselves
    wanted  the state dict of the model before that

    Raises LoadFailed when weights are missing, left over or of another shape, or not filled wholly.
    """
    filled: Counter[str] = Counter()
    faults: list[str] = []
    for name, tensor in tensors(files):
        for piece in from_published(name, tensor, vision_heads=model.config.vision_config.num_attention_heads):
            fault = _misfit(wanted.get(piece.name), piece)
            if fault is None:
                _store(model, piece, wanted[piece.name], dtype, device)
                filled[piece.name] += piece.tensor.numel()
            else:
                faults.append(f"{name} is {fault}")
    faults += [f"{name} is missing" for name, tensor in wanted.items() if filled[name] != tensor.numel()]
    if faults:
        raise LoadFailed(
            f"{files[0].parent}: {len(faults)} faults: {'; '.join(faults[:5])}",
            reason="weights_missing" if "is missing" in faults[0] else "weights_mismatched",
        )
    for module in model.modules():  # the tables that follow from the configuration
        for name, tensor in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                module._buffers[name] = tensor.to(device)


def _misfit(whole: torch.Tensor | None, piece: Piece) -> str | None:
    if whole is None:
        return "not a weight of this model"
    try:
        shape = piece.place(whole).shape
    except IndexError:
        return "one more than this model has"
    return None if shape == piece.tensor.shape else f"of shape {tuple(piece.tensor.shape)}, not {tuple(shape)}"


def _store(model: Any, piece: Piece, whole: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:  # noqa: ANN401
    path, _, attribute = piece.name.rpartition(".")
    owner = model.get_submodule(path)
    if hasattr(owner, "take"):
        owner.take(piece)
        return
    held: torch.Tensor = getattr(owner, attribute)
    if held.is_meta:
        is_buffer = attribute in owner._buffers  # the router's correction, which decides near-ties: never rounded
        empty = torch.empty(whole.shape, dtype=torch.float32 if is_buffer else dtype, device=device)
        held = empty if is_buffer else torch.nn.Parameter(empty)
        setattr(owner, attribute, held)
    piece.place(held.data).copy_(piece.tensor)


def save_published(model: Any, folder: str | Path, *, shard_bytes: int = 5 * 1000**3) -> None:  # noqa: ANN401
    """Write a model as the files of Kimi-VL: config.json, generation_config.json and safetensors by published name."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    heads = config.vision_config.num_attention_heads
    shards = _shards(to_published(model.state_dict(), vision_heads=heads), shard_bytes)
    if len(shards) == 1:
        save_file(shards[0], folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.values())},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _shards(state: dict[str, torch.Tensor], limit: int) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    return shards
