"""Published weight names of Kimi-VL and the ones of this model, both ways.

Three things differ beyond names: the tower's q, k and v are one published tensor, whose q and k hold the two numbers
that a rotation mixes side by side (here they are half a head apart), and the text model's experts are one published
tensor each (here all experts of a layer are one).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

_PREFIXES = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.encoder.final_layernorm.", "model.vision_tower.final_layernorm."),
    ("vision_tower.patch_embed.proj.", "model.vision_tower.patch_embed.proj."),
    ("vision_tower.patch_embed.pos_emb.weight", "model.vision_tower.patch_embed.pos_emb.position_embeddings"),
    ("multi_modal_projector.pre_norm.", "model.mm_projector.pre_norm."),
    ("multi_modal_projector.linear_1.", "model.mm_projector.in_proj."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.out_proj."),
)
_IN_BLOCK = {"norm0": "norm1", "norm1": "norm2", "mlp.fc0": "mlp.fc1", "mlp.fc1": "mlp.fc2", "wo": "attn.proj"}
_IN_OUR_BLOCK = {ours: published for published, ours in _IN_BLOCK.items()}

_BLOCK = re.compile(r"vision_tower\.encoder\.blocks\.(\d+)\.(.+)\.(weight|bias)")
_OUR_BLOCK = re.compile(r"model\.vision_tower\.layers\.(\d+)\.(.+)\.(weight|bias)")
_EXPERT = re.compile(r"language_model\.model\.(layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_OUR_EXPERTS = re.compile(r"model\.language_model\.(layers\.\d+\.mlp\.experts)\.(gate_up|down)_proj")
_DERIVED = re.compile(r"\.rotary_emb\.|\.rope_2d\.")
"""Tables that follow from the configuration and that some checkpoints carry."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one expert's matrix in a stack of them."""

    expert: int
    rows: slice


@dataclass(frozen=True, slots=True)
class Piece:
    """One of our tensors, or the part of it that one published tensor holds."""

    name: str
    tensor: torch.Tensor
    part: Part | None = None

    def place(self, whole: torch.Tensor) -> torch.Tensor:
        """Where in our tensor it goes. Raises IndexError when the tensor has no such expert."""
        return whole if self.part is None else whole[self.part.expert][self.part.rows]


def from_published(name: str, tensor: torch.Tensor, *, vision_heads: int) -> Iterator[Piece]:
    """The pieces that one published tensor makes; none for a table that is derived anyway.

    A name that is not Kimi-VL's comes back as it is, for the caller to refuse.
    """
    if _DERIVED.search(name):
        return
    if match := _EXPERT.fullmatch(name):
        layer, expert, matrix = match.groups()
        width = len(tensor)
        rows = {"gate": slice(0, width), "up": slice(width, 2 * width), "down": slice(None)}[matrix]
        stack = "down_proj" if matrix == "down" else "gate_up_proj"
        yield Piece(f"model.language_model.{layer}.{stack}", tensor, Part(int(expert), rows))
    elif match := _BLOCK.fullmatch(name):
        block, part, kind = match.groups()
        ours = f"model.vision_tower.layers.{block}"
        if part == "wqkv":
            for which, third in zip("qkv", tensor.chunk(3), strict=True):
                turned = third if which == "v" else _apart(third, vision_heads)
                yield Piece(f"{ours}.attn.{which}_proj.{kind}", turned)
        else:
            yield Piece(f"{ours}.{_IN_BLOCK.get(part, part)}.{kind}", tensor)
    else:
        yield Piece(_replaced(name, _PREFIXES), tensor)


def to_published(state: Mapping[str, torch.Tensor], *, vision_heads: int) -> dict[str, torch.Tensor]:
    """Our state dict under the published names and layout."""
    published: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if match := _OUR_EXPERTS.fullmatch(name):
            published |= dict(_experts(f"language_model.model.{match[1]}", match[2], tensor))
        elif match := _OUR_BLOCK.fullmatch(name):
            block, part, kind = match.groups()
            theirs = f"vision_tower.encoder.blocks.{block}"
            if part == "attn.q_proj":
                q, k, v = (state[name.replace("q_proj", f"{which}_proj")] for which in "qkv")
                thirds = [_together(q, vision_heads), _together(k, vision_heads), v]
                published[f"{theirs}.wqkv.{kind}"] = torch.cat(thirds)
            elif part not in ("attn.k_proj", "attn.v_proj"):
                published[f"{theirs}.{_IN_OUR_BLOCK[part]}.{kind}"] = tensor
        else:
            published[_replaced(name, ((ours, theirs) for theirs, ours in _PREFIXES))] = tensor
    return published


def _experts(name: str, stack: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for expert, weight in enumerate(tensor):
        if stack == "down":
            yield f"{name}.{expert}.down_proj.weight", weight
        else:
            gate, up = weight.chunk(2)
            yield f"{name}.{expert}.gate_proj.weight", gate
            yield f"{name}.{expert}.up_proj.weight", up


def _replaced(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _apart(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows 2i, 2i+1 of each head to i, i + half: tensor (heads·head_dim, …)."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _together(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_apart`."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
