"""The generator's forward, packed: pictures of every size and conversations of every length as two long rows.

Dims   P patches of all pictures · T tokens of all conversations · A tokens of all answers · D width 128
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from sightline.models.kimi_vl import KimiVLForConditionalGeneration
from sightline.tiny.generator.checkpoint import PAD
from sightline.tiny.generator.conversations import Turn
from sightline.tiny.generator.pictures import MERGE, Grid


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key weight so that the two numbers a rotary angle turns lie side by side.

    Scores do not change, and the turn becomes one complex product instead of five passes over memory.
    """
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions where pairs lie side by side. x (T, H, d), angle (T, 1, d / 2) complex -> (T, H, d)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angle).flatten(-2)


def _angles(cos: Tensor, sin: Tensor) -> Tensor:
    """(T, d) cosines and sines in transformers' half-split layout -> (T, 1, d / 2) unit complex numbers."""
    half = cos.shape[-1] // 2
    return torch.complex(cos[..., :half].float(), sin[..., :half].float()).unsqueeze(-2)


def _layer_norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def _rms_norm(x: Tensor, layer: Any) -> Tensor:  # noqa: ANN401 - DeepseekV3RMSNorm
    return F.rms_norm(x.float(), (x.shape[-1],), layer.weight, layer.variance_epsilon)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
    """Attention in float32 whatever the products run in: the CPU kernel's bfloat16 backward is several times slower."""
    with torch.autocast("cpu", enabled=False):
        q, k, v = (part.float().transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)


@lru_cache(maxsize=512)
def _resampling(grid: Grid, side: int) -> Tensor:
    """(patches, side²): how the learned table of positions is resampled to a grid."""
    taps, weights = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, *grid]]), side, mode="bicubic", align_corners=False
    )
    return torch.zeros(len(taps), side * side).scatter_add_(1, taps, weights)


@lru_cache(maxsize=512)
def _spots(grid: Grid) -> Tensor:
    return get_vision_position_ids(torch.tensor([[1, *grid]]), 1)


def _groups(grids: Sequence[Grid]) -> list[tuple[Grid, int]]:
    """Neighbours of one grid: the grid and how many."""
    return [(grid, len(list(run))) for grid, run in groupby(grids)]


def see(model: KimiVLForConditionalGeneration, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The vision tower. patches (P, 3 * PATCH²) of pictures one after the other -> (P, D).

    Pictures of one grid should be neighbours: each run of them is one attention call.
    """
    tower: Any = model.model.vision_tower
    heads = tower.config.num_attention_heads
    groups = _groups(grids)
    sizes = [count * math.prod(grid) for grid, count in groups]
    places = tower.patch_embed.pos_emb.position_embeddings.flatten(0, 1)
    side = tower.config.pos_emb_height
    x = F.linear(patches, tower.patch_embed.proj.weight.flatten(1), tower.patch_embed.proj.bias)
    x = x + torch.cat([(_resampling(grid, side) @ places).repeat(count, 1) for grid, count in groups])
    angle = _angles(*tower.rotary_emb(x, torch.cat([_spots(grid).repeat(count, 1) for grid, count in groups])))
    for block in tower.layers:
        a, y = block.attn, _layer_norm(x, block.norm1)
        weight = torch.cat([_paired(a.q_proj.weight, heads), _paired(a.k_proj.weight, heads), a.v_proj.weight])
        bias = torch.cat([_paired(a.q_proj.bias, heads), _paired(a.k_proj.bias, heads), a.v_proj.bias])
        q, k, v = F.linear(y, weight, bias).view(len(x), 3, heads, -1).unbind(1)
        q, k = _turned(q, angle), _turned(k, angle)
        seen: list[Tensor] = []
        for (_, count), *run in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
            one_q, one_k, one_v = (part.unflatten(0, (count, -1)) for part in run)
            seen.append(_attend(one_q, one_k, one_v, is_causal=False).flatten(0, 1))
        x = x + a.proj(torch.cat(seen).flatten(1))
        y = _layer_norm(x, block.norm2)
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(y), approximate="tanh"))
    return _layer_norm(x, tower.final_layernorm)


def project(model: KimiVLForConditionalGeneration, seen: Tensor, grids: Sequence[Grid]) -> Tensor:
    """The projector: (P, D) from `see` -> (P / 4, D), a token for each 2x2 block, row after row."""
    bridge: Any = model.model.mm_projector
    y = _layer_norm(seen, bridge.pre_norm)
    merged: list[Tensor] = []
    groups = _groups(grids)
    parts = y.split([count * math.prod(grid) for grid, count in groups])
    for ((rows, columns), count), part in zip(groups, parts, strict=True):
        blocks = part.view(count * rows // MERGE, MERGE, columns // MERGE, MERGE, -1)
        merged.append(blocks.transpose(1, 2).reshape(count * rows * columns // MERGE**2, -1))
    return bridge.out_proj(F.gelu(bridge.in_proj(torch.cat(merged))))


@dataclass
class Kept:
    """What the training aid reads inside the text model.

    tokens  (image tokens, D): what the first layer makes of them
    middle  (T, D): what comes out of the second layer
    heads   of each layer's first head the queries and keys, (T, d) each, scaled so that their products are its scores
    """

    tokens: Tensor
    middle: Tensor
    heads: list[tuple[Tensor, Tensor]]

    @classmethod
    def nothing(cls) -> Kept:
        """To be filled."""
        return cls(torch.empty(0), torch.empty(0), [])


class Experts:
    """The routed experts of each layer as matrices of their own, sharing memory with the model's stacked weights.

    Muon takes matrices only. `load` counts the tokens each expert got, (layers, experts).
    """

    def __init__(self, model: KimiVLForConditionalGeneration) -> None:
        self.up: dict[int, list[nn.Parameter]] = {}
        self.down: dict[int, list[nn.Parameter]] = {}
        self.routers: dict[int, Any] = {}
        text: Any = model.model.language_model
        for number, layer in enumerate(text.layers):
            if hasattr(layer.mlp, "experts"):
                stack = layer.mlp.experts
                self.up[number] = [nn.Parameter(weight) for weight in stack.gate_up_proj.data]
                self.down[number] = [nn.Parameter(weight) for weight in stack.down_proj.data]
                self.routers[number] = layer.mlp.gate
        self.load = {number: torch.zeros(len(self.up[number])) for number in self.up}
        self._counting = threading.Lock()

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every matrix under a name that the optimiser knows as hidden."""
        for kind, layers in (("up", self.up), ("down", self.down)):
            for number, weights in layers.items():
                yield from ((f".layers.{number}.experts.{i}.{kind}", weight) for i, weight in enumerate(weights))

    def balance(self, speed: float) -> None:
        """DeepSeek-V3's own balancing: raise the choice bias of experts that got too little, lower the others'."""
        for number, load in self.load.items():
            self.routers[number].e_score_correction_bias += speed * torch.sign(load.mean() - load)
            load.zero_()

    def __call__(self, number: int, x: Tensor) -> Tensor:
        """Routed experts of layer `number` on tokens x (T, D)."""
        router = self.routers[number]
        scores = F.linear(x, router.weight).sigmoid()
        chosen = (scores + router.e_score_correction_bias).topk(router.top_k, dim=-1).indices
        shares = scores.gather(1, chosen)
        shares = shares / (shares.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor
        order = chosen.flatten().argsort()
        rows = order // router.top_k
        counts = torch.bincount(chosen.flatten(), minlength=router.num_experts)
        with self._counting:
            self.load[number] += counts
        done: list[Tensor] = []
        for part, up, down in zip(x[rows].split(counts.tolist()), self.up[number], self.down[number], strict=True):
            gate, value = F.linear(part, up).chunk(2, -1)
            done.append(F.linear(F.silu(gate) * value, down))
        weighted = torch.cat(done) * shares.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, rows, weighted.to(x.dtype))


def _sheets(lengths: Sequence[int], height: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Rows of a packed text as padded sheets of a few conversations: indices, mask, both (conversations, longest)."""
    found: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(lengths), height):
        part = torch.tensor(lengths[first : first + height])
        starts = F.pad(part.cumsum(0)[:-1], (1, 0))
        along = torch.arange(int(part.max()))
        held = along < part[:, None]
        found.append((torch.where(held, starts[:, None] + along, 0), held))
    return found


def tell(
    model: KimiVLForConditionalGeneration,
    seen: Tensor,
    grids: Sequence[Grid],
    turns: Sequence[Turn],
    experts: Experts,
    kept: Kept | None = None,
) -> tuple[Tensor, Tensor]:
    """The text model on many conversations.

    seen     (P / 4, D) from `project`
    kept     gets what the training aid reads
    returns  logits (A, vocabulary) and the tokens they should predict (A), conversation after conversation
    """
    text: Any = model.model.language_model
    config = text.config
    lengths = [len(turn.ids) - 1 for turn in turns]
    given = torch.tensor([token for turn in turns for token in turn.given[:-1]])
    ends = np.cumsum([rows * columns // MERGE**2 for rows, columns in grids]).tolist()
    spans = list(pairwise([0, *ends]))
    rows = [row for turn in turns for picture in turn.pictures for row in range(*spans[picture])]
    x = F.embedding(given, text.embed_tokens.weight)
    if rows:
        x = x.index_put(((given == PAD).nonzero()[:, 0],), seen[torch.tensor(rows)].to(x.dtype))

    starts = np.cumsum([0, *lengths]).tolist()
    sheets = _sheets(lengths)
    sizes = [int(held.sum()) for _, held in sheets]
    positions = torch.cat([torch.arange(length) for length in lengths])
    # Row i of the text predicts token i + 1.
    told = torch.cat(
        [torch.arange(start + turn.answer_at - 1, start + len(turn.ids) - 1) for start, turn in zip(starts, turns)]  # noqa: B905
    )
    wanted = torch.tensor([token for turn in turns for token in turn.ids[turn.answer_at :]])

    angle = _angles(*(part[0] for part in text.rotary_emb(x.float(), positions[None])))
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    for number, layer in enumerate(text.layers):
        a, y = layer.self_attn, _rms_norm(x, layer.input_layernorm)
        q_plain, q_turn = a.q_proj(y).unflatten(-1, (heads, -1)).split([nope, rope], -1)
        latent, k_turn = a.kv_a_proj_with_mqa(y).split([config.kv_lora_rank, rope], -1)
        k_plain, v = (
            a.kv_b_proj(_rms_norm(latent, a.kv_a_layernorm))
            .unflatten(-1, (heads, -1))
            .split([nope, config.v_head_dim], -1)
        )
        q = torch.cat([q_plain, _turned(q_turn, angle)], -1)
        k = torch.cat([k_plain, _turned(k_turn[:, None], angle).expand(-1, heads, -1)], -1)
        heard_parts: list[Tensor] = []
        for (padded, held), *run in zip(sheets, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
            one_q, one_k, one_v = (part[padded] for part in run)
            heard_parts.append(_attend(one_q, one_k, one_v, is_causal=True)[held])
        heard = torch.cat(heard_parts).flatten(1)
        if number == config.num_hidden_layers - 1:  # nothing reads the other rows any more
            x, heard = x[told], heard[told]
        x = x + a.o_proj(heard)
        y = _rms_norm(x, layer.post_attention_layernorm)
        x = x + (experts(number, y) + layer.mlp.shared_experts(y) if number in experts.up else layer.mlp(y))
        if kept is not None:
            kept.heads.append((q[:, 0].float() / math.sqrt(q.shape[-1]), k[:, 0].float()))
            if number == 0:
                kept.tokens = x[given == PAD].float()
            if number == 1:
                kept.middle = x.float()
    return model.lm_head(_rms_norm(x, text.norm)), wanted
