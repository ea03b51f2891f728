"""The generator: a Kimi-VL of 2.0 million weights that reads coloured shapes, one or several pictures to a prompt.

Dims   P patches of all pictures · T tokens of all conversations · A tokens of all answers · D width 128

The checkpoint is an ordinary Kimi-VL: MoonViT, the 2x2 projector, a DeepSeek-V3 text model with routed experts, in the
published file layout. Training runs the same weights through a forward written out below, which packs pictures of every
size and conversations of every length into two long rows (`tests/unit/tiny/test_generator.py` holds it to the forward
of `models/kimi_vl`). What it is asked and what it answers is in `dialogue.py`.

Why patches of 12 and about 96 of them: Kimi-VL's processor keeps the aspect and pads, so that no left-of / above
decision is bent; a small shape is then 17 to 30 pixels across, and a picture costs the text model 25 to 40 tokens.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvF
from transformers import GenerationConfig
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from sightline.models.kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration, TikTokenTokenizer, save_published
from sightline.tiny import HELD_OUT_DESCRIBE, bpe, dialogue, is_held_out, scenes

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

MODEL_NAME = "sightline-tiny-kimi-vl"
PATCH = 12
MERGE = 2
PATCH_LIMIT = 96
"""Kimi-VL's `in_token_limit`: larger pictures are shrunk to about this many patches, smaller ones stay as they are."""
MEAN = STD = 0.5

SPECIAL_TOKENS = [
    "[BOS]",
    "[EOS]",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "[EOT]",
    "<|im_system|>",
    "<|im_middle|>",
    "<|media_start|>",
    "<|media_content|>",
    "<|media_end|>",
    "<|media_pad|>",
    "[UNK]",
    "[PAD]",
]
"""Kimi-VL's own special tokens in their order; here from id 0."""
END = SPECIAL_TOKENS.index("<|im_end|>")
PAD = SPECIAL_TOKENS.index("<|media_pad|>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- set role = message['role'] -%}
    {{- '<|im_' + (role if role in ('user', 'assistant') else 'system') + '|>' + role + '<|im_middle|>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|media_start|>image<|media_content|><|media_pad|><|media_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_assistant|>assistant<|im_middle|>' -}}
{%- endif -%}
"""


# ---- tokenizer, configuration, files ---------------------------------------------------------------------------------


def make_tokenizer() -> TikTokenTokenizer:
    """A byte-level BPE with Kimi-VL's special tokens, its merges trained on this world's sentences."""
    raw = bpe.trained(dialogue.corpus(), SPECIAL_TOKENS, vocabulary=704)
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = TikTokenTokenizer(
        tokenizer_object=raw,
        bos_token="[BOS]",  # noqa: S106 - a token of text
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        additional_special_tokens=[
            token for token in SPECIAL_TOKENS if token not in ("[BOS]", "<|im_end|>", "[PAD]", "[UNK]")
        ],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(vocabulary: int) -> KimiVLConfig:
    """The shape of the model: Kimi-VL-A3B's own, made small. Dims are multiples of 64, so that 4-bit blocks fit."""
    config = KimiVLConfig(
        vision_config={
            "patch_size": PATCH,
            "merge_kernel_size": [MERGE, MERGE],
            "init_pos_emb_height": 16,
            "init_pos_emb_width": 16,
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "intermediate_size": 384,
        },
        text_config={
            "model_type": "deepseek_v3",
            "vocab_size": vocabulary,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.446,
            "num_nextn_predict_layers": 0,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": SPECIAL_TOKENS.index("[BOS]"),
            "eos_token_id": END,
            # A padding id here would freeze and zero that token's embedding (nn.Embedding(padding_idx)).
            "pad_token_id": None,
            "tie_word_embeddings": False,
        },
        media_placeholder_token_id=PAD,
        vision_start_token_id=SPECIAL_TOKENS.index("<|media_start|>"),
        vision_end_token_id=SPECIAL_TOKENS.index("<|media_end|>"),
        tie_word_embeddings=False,
    )
    config.update({"sightline_demo_model": True, "sightline_model_name": MODEL_NAME})
    return config


def make_model(vocabulary: int, seed: int) -> KimiVLForConditionalGeneration:
    """Fresh weights."""
    torch.manual_seed(seed)
    model = KimiVLForConditionalGeneration(make_config(vocabulary))
    for name, weight in model.named_parameters():
        if "position_embeddings" in name or "embed_tokens" in name:
            nn.init.normal_(weight, std=0.02)
        elif weight.ndim == 3:  # experts, (experts, out, in)
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        elif weight.ndim >= 2:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        bos_token_id=SPECIAL_TOKENS.index("[BOS]"),
        eos_token_id=[SPECIAL_TOKENS.index(token) for token in ("<|im_end|>", "[EOS]", "[EOT]")],
        pad_token_id=SPECIAL_TOKENS.index("[PAD]"),
    )
    return model


def save(model: KimiVLForConditionalGeneration, tokenizer: TikTokenTokenizer, folder: Path) -> None:
    """Write the checkpoint in the published file layout, float32."""
    save_published(model, folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    preprocessor = {
        "image_processor_type": "KimiVLImageProcessor",
        "processor_class": "KimiVLProcessor",
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "in_token_limit": PATCH_LIMIT,
        "merge_kernel_size": [MERGE, MERGE],
        "num_pooled_tokens": 1024,
        "pad_input": True,
        "patch_size": PATCH,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


# ---- from picture to patches -----------------------------------------------------------------------------------------


def canvas_size(width: int, height: int) -> tuple[int, int]:
    """(height, width) in pixels to which the image processor shrinks a picture; it pads afterwards."""
    patches = max(width // PATCH, 1) * max(height // PATCH, 1)
    scale = min(1.0, math.sqrt(PATCH_LIMIT / patches))
    return max(int(height * scale), 1), max(int(width * scale), 1)


def to_canvas(pixels: np.ndarray) -> np.ndarray:
    """Shrink as the image processor does. pixels (H, W, 3) uint8 -> (3, h, w) uint8."""
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    size = canvas_size(pixels.shape[1], pixels.shape[0])
    if size == image.shape[-2:]:
        return image.numpy()
    resized = tvF.resize(image, list(size), interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)
    return resized.numpy()


def grid_of(canvas: np.ndarray) -> tuple[int, int]:
    """Rows and columns of patches of a canvas (3, h, w) once it is padded to whole 2x2 blocks."""
    block = PATCH * MERGE
    return -(-canvas.shape[1] // block) * MERGE, -(-canvas.shape[2] // block) * MERGE


def patchify(canvas: np.ndarray) -> Tensor:
    """Pad with black on the right and below, normalise, cut. (3, h, w) uint8 -> (patches, 3 * PATCH²) float32."""
    rows, columns = grid_of(canvas)
    padded = np.zeros((3, rows * PATCH, columns * PATCH), np.uint8)
    padded[:, : canvas.shape[1], : canvas.shape[2]] = canvas
    cut = torch.from_numpy(padded).reshape(3, rows, PATCH, columns, PATCH).permute(1, 3, 0, 2, 4)
    return (cut.reshape(rows * columns, -1).float() / 255 - MEAN) / STD


# ---- the forward, packed ---------------------------------------------------------------------------------------------

Grid = tuple[int, int]


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


@dataclass(frozen=True)
class Turn:
    """A conversation: prompt with an id for each image token, then the answer.

    ids        prompt and answer, ended by <|im_end|>
    given      the same as the model reads it; training hides some of the answer's words
    answer_at  index of the answer's first token
    pictures   which pictures it holds, in order
    kind       caption, which, list or text
    """

    ids: list[int]
    given: list[int]
    answer_at: int
    pictures: tuple[int, ...]
    kind: str = "caption"


KIND_WEIGHTS = {"caption": 1.0, "which": 4.0, "list": 0.6, "text": 1.0}
"""Of each answer token in the loss: a which-answer is short, a list of captions long."""


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
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The text model on many conversations.

    seen     (P / 4, D) from `project`
    kept     gets what the first layer makes of the image tokens, in order
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
        if number == 0 and kept is not None:
            kept.append(x[given == PAD])
    return model.lm_head(_rms_norm(x, text.norm)), wanted


# ---- training data ---------------------------------------------------------------------------------------------------

LOOK_WIDTHS = (len(scenes.COLOURS), len(scenes.SHAPES), len(scenes.SIZES), 5)


@dataclass(frozen=True)
class View:
    """A scene as it is seen: which one, what lies under each patch.

    looks   (patches, 4) int8: colour, shape, size, role of the object under each patch; -1 = ground
    spans   (patches, 4) float16, in patches: x, y from the patch to the centre of its object, half extent of that,
            its share of the picture's shorter side
    """

    scene: scenes.Scene
    looks: np.ndarray
    spans: np.ndarray


@dataclass(frozen=True)
class Sample:
    """One picture for training: canvas (3, h, w) uint8, and what it shows as it is and in a mirror."""

    canvas: np.ndarray
    views: tuple[View, View]


def _role(scene: scenes.Scene, thing: scenes.SceneObject) -> int:
    """0 alone, 1 left, 2 right, 3 above, 4 below."""
    if len(scene.objects) == 1:
        return 0
    first, how, _ = scenes.relation(scene)
    return (1 if how == scenes.RELATIONS[0] else 3) + (thing is not first)


def view(scene: scenes.Scene, canvas: np.ndarray) -> View:
    """What lies under each patch of a canvas: facts of the scene, used only while training."""
    rows, columns = grid_of(canvas)
    looks = np.full((rows, columns, 4), -1, np.int8)
    spans = np.zeros((rows, columns, 4), np.float16)
    y, x = np.mgrid[0:rows, 0:columns] + 0.5
    scale = canvas.shape[2] / scene.width / PATCH
    for thing in scene.objects:
        cx, cy, r = thing.centre_x * scale, thing.centre_y * scale, thing.half * scale
        inside = ((x - cx) / r) ** 2 + ((y - cy) / r) ** 2 < 0.9
        colour, shape = list(scenes.COLOURS).index(thing.colour), scenes.SHAPES.index(thing.shape)
        looks[inside] = (colour, shape, scenes.SIZES.index(thing.size), _role(scene, thing))
        share = 10 * thing.half / min(scene.width, scene.height)
        spans[inside] = np.stack(np.broadcast_arrays(cx - x, cy - y, r, share), -1)[inside]
    return View(scene, looks.reshape(-1, 4), spans.reshape(-1, 4))


def make_sample(rng: np.random.Generator, two_share: float) -> Sample:
    """Draw a scene outside the held-out slice and bring it through file bytes to the canvas."""
    objects = 2 if rng.random() < two_share else 1
    sides = scenes.SIDES if rng.random() < 0.12 else (96, 440)
    while True:
        scene = scenes.draw_scene(rng, objects, sides=sides)
        both = scene, scenes.mirrored(scene)
        if objects == 1 or not any(is_held_out(scenes.caption(one), HELD_OUT_DESCRIBE) for one in both):
            break
    image = scenes.render(scene)
    if rng.random() < 0.75:
        image = scenes.decode(scenes.encode(image, rng)[0])
    canvas = to_canvas(np.asarray(image))
    return Sample(canvas, (view(both[0], canvas), view(both[1], canvas)))


BLOCK = 256
"""Samples in one block, the unit of seeding."""


def make_block(seed: int, index: int) -> list[Sample]:
    """Block `index` of the endless training set; depends on (seed, index) only. Starts with single objects."""
    rng = np.random.default_rng([seed, index])
    two_share = float(np.clip((index - 6) / 30, 0.15, 0.72))
    return [make_sample(rng, two_share) for _ in range(BLOCK)]


def _work(blocks_out: Queue[list[Sample]], seed: int, blocks: range) -> None:
    """The drawing process: one block after the other until the parent has had enough or is gone."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    for index in blocks:
        block = make_block(seed, index)
        while True:
            if parent is None or not parent.is_alive():
                return
            try:
                blocks_out.put(block, timeout=5)
                break
            except queue.Full:
                continue


RETURNS = (0, 7, 19, 31)
"""Each sample is used four times: when its block arrives, and this many blocks later; mirrored at random."""


def _grid_of_sample(sample: Sample) -> Grid:
    return grid_of(sample.canvas)


def batches(blocks: Iterator[list[Sample]], seed: int, size: int) -> Iterator[list[tuple[Sample, bool]]]:
    """Batches of samples, each with whether to mirror it, pictures of one grid side by side."""
    rng = np.random.default_rng([seed, 1])
    kept: list[list[Sample]] = []
    for block in blocks:
        kept.append(block)
        ready = [sample for back in RETURNS if back < len(kept) for sample in kept[-1 - back]]
        if len(kept) > max(RETURNS):
            kept.pop(0)
        order = rng.permutation(len(ready))
        for start in range(0, len(order) - size + 1, size):
            picked = [ready[i] for i in order[start : start + size]]
            picked.sort(key=_grid_of_sample)
            yield [(sample, bool(rng.random() < 0.5)) for sample in picked]


@dataclass(frozen=True)
class Pictures:
    """A batch of pictures: patches (P, 3 * PATCH²), their grids, what they show."""

    patches: Tensor
    grids: list[Grid]
    views: list[View]

    @classmethod
    def of(cls, picked: Sequence[tuple[Sample, bool]]) -> Pictures:
        """Mirror where asked (before padding), cut into patches."""
        canvases = [sample.canvas[..., ::-1] if flip else sample.canvas for sample, flip in picked]
        return cls(
            torch.cat([patchify(canvas) for canvas in canvases]),
            [grid_of(canvas) for canvas in canvases],
            [sample.views[int(flip)] for sample, flip in picked],
        )


class Conversations:
    """Writes conversations about a batch of pictures as the chat template does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def turn(
        self,
        prompt: str,
        answer: str,
        grids: Sequence[Grid],
        pictures: tuple[int, ...] = (),
        *,
        system: str = "",
        kind: str = "caption",
    ) -> Turn:
        """Images first, then the prompt, then the answer. `grids` are of all pictures of the batch."""
        head = f"<|im_system|>system<|im_middle|>{system}<|im_end|>" if system else ""
        shown = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>" * len(pictures)
        asked = f"{head}<|im_user|>user<|im_middle|>{shown}{prompt}<|im_end|><|im_assistant|>assistant<|im_middle|>"
        ids: list[int] = []
        left = iter(pictures)
        for token in self._tokenizer.encode(asked).ids:
            repeats = math.prod(grids[next(left)]) // MERGE**2 if token == PAD else 1
            ids += [token] * repeats
        whole = [*ids, *self._tokenizer.encode(answer).ids, END]
        return Turn(whole, whole, len(ids), pictures, kind)

    def draw(self, rng: np.random.Generator, pictures: Pictures, asked: Asked) -> list[Turn]:
        """As many conversations of each kind as `asked`.

        The short ones come first, so that neighbours are of about one length.
        """
        shown = [one.scene for one in pictures.views]
        turns: list[Turn] = []

        def add(kind: str, prompt: str, answer: str, which: tuple[int, ...] = ()) -> None:
            system = ""
            if rng.random() < 0.15:
                system = str(rng.choice(dialogue.SYSTEMS)) if rng.random() < 0.7 else dialogue.draw_noise(rng)
            turns.append(self.turn(prompt, answer, pictures.grids, which, system=system, kind=kind))

        for number in rng.permutation(len(shown))[: asked.captions].tolist():
            add("caption", dialogue.draw_describe_prompt(rng), scenes.caption(shown[number]), (number,))
        for _ in range(asked.which):
            which = _draw_some(rng, len(shown), (0.1, 0.52, 0.33, 0.05))
            add("which", *dialogue.draw_which(rng, [shown[i] for i in which]), which)
        for _ in range(asked.lists):
            which = _draw_some(rng, len(shown), (0.0, 0.7, 0.3))
            answer = dialogue.describe_answer([shown[i] for i in which])
            add("list", dialogue.draw_describe_prompt(rng), answer, which)
        for _ in range(asked.texts):
            add("text", *dialogue.draw_text(rng))
        return sorted(turns, key=lambda turn: len(turn.ids))


def _draw_some(rng: np.random.Generator, pictures: int, chances: tuple[float, ...]) -> tuple[int, ...]:
    """Some pictures in any order; how many is 1, 2, … with these chances."""
    count = 1 + int(rng.choice(len(chances), p=chances))
    return tuple(int(i) for i in rng.choice(pictures, size=count, replace=False))


@dataclass(frozen=True)
class Asked:
    """How many conversations of each kind are held about a batch of pictures."""

    captions: int
    which: int
    lists: int
    texts: int


# ---- training --------------------------------------------------------------------------------------------------------


class Looks(nn.Module):
    """Training aid, thrown away afterwards: what is under each patch, where that object lies, how far it spans.

    And, of each image token in the text, which picture of its conversation it belongs to: without being asked, the text
    model learned to list several pictures and not to count them (43 % of which-questions after 45 minutes).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.facts = nn.Linear(width, sum(LOOK_WIDTHS))
        self.spans = nn.Linear(width, 4)
        self.number = nn.Linear(width, 8)

    def count_loss(self, kept: Tensor, grids: Sequence[Grid], turns: Sequence[Turn]) -> Tensor:
        """Cross entropy of the number of the picture that each image token belongs to. kept (image tokens, D)."""
        numbers = [(n, math.prod(grids[picture])) for turn in turns for n, picture in enumerate(turn.pictures)]
        wanted = [n for n, patches in numbers for _ in range(patches // MERGE**2)]
        return F.cross_entropy(self.number(F.layer_norm(kept, kept.shape[-1:])), torch.tensor(wanted))

    def loss(self, seen: Tensor, views: Sequence[View]) -> Tensor:
        """Cross entropy of the four facts plus the absolute error of the spans, over patches that hold an object."""
        looks = torch.from_numpy(np.concatenate([one.looks for one in views])).long()
        spans = torch.from_numpy(np.concatenate([one.spans for one in views])).float()
        held = looks[:, 0] >= 0
        patches = seen[held]
        total = (self.spans(patches) - spans[held]).abs().mean() * 2
        for part, target in zip(self.facts(patches).split(LOOK_WIDTHS, dim=-1), looks[held].unbind(1), strict=True):
            total = total + F.cross_entropy(part, target)
        return total


def exact(
    model: KimiVLForConditionalGeneration, pictures: Pictures, turns: Sequence[Turn], experts: Experts
) -> list[bool]:
    """Of each conversation, whether greedy decoding would get the answer wholly right.

    One pass suffices: greedy is right exactly when every token of the true answer is the most likely one.
    """
    with torch.no_grad():
        seen = project(model, see(model, pictures.patches, pictures.grids), pictures.grids)
        logits, wanted = tell(model, seen, pictures.grids, turns, experts)
    fine = (logits.argmax(-1) == wanted).split([len(turn.ids) - turn.answer_at for turn in turns])
    return [bool(part.all()) for part in fine]


@dataclass(frozen=True)
class Exam:
    """Pictures and conversations that no step trains on."""

    parts: list[tuple[Pictures, list[Turn]]]

    @classmethod
    def draw(cls, talk: Conversations, seed: int) -> Exam:
        """256 pictures of one caption each, and as many other questions."""
        rng = np.random.default_rng([seed, 3])
        samples = make_block(seed + 1_000_003, 10_000)
        parts: list[tuple[Pictures, list[Turn]]] = []
        for start in range(0, BLOCK, 64):
            picked = sorted(samples[start : start + 64], key=_grid_of_sample)
            pictures = Pictures.of([(sample, False) for sample in picked])
            parts.append((pictures, talk.draw(rng, pictures, Asked(64, 32, 12, 24))))
        return cls(parts)

    def marks(self, model: KimiVLForConditionalGeneration, experts: Experts) -> dict[str, float]:
        """Share of exact answers of each kind."""
        right: dict[str, list[bool]] = {}
        for pictures, turns in self.parts:
            for turn, fine in zip(turns, exact(model, pictures, turns, experts), strict=True):
                kind = turn.kind
                if kind == "caption":
                    kind = ("one", "two")[len(pictures.views[turn.pictures[0]].scene.objects) - 1]
                right.setdefault(kind, []).append(fine)
        for load in experts.load.values():
            load.zero_()
        return {kind: round(float(np.mean(found)), 4) for kind, found in right.items()}


LEGS = (3000, 700)
"""Optimiser steps of each leg, which has fresh pictures and a learning-rate schedule of its own. The first trains all,
the second goes on with the tower as it is."""
BATCH = 16
PARTS = (Asked(12, 8, 2, 5), Asked(12, 8, 2, 5))
"""What the two batches of a step ask. Each has a thread of its own: on shared cores one join a step costs less than one
in every matrix product (1.1 s a step, not 1.2 to 1.8, at a load of 8 on two cores)."""
FIRST_PARTS = (Asked(4, 0, 0, 2), Asked(4, 0, 0, 2))
"""The same while the tower still learns to see, helped by `Looks`."""
SETTLED = 60
"""First block of a resumed training: past the curriculum's single objects."""


@contextmanager
def _drawing(seed: int, blocks: range) -> Generator[Iterator[list[Sample]]]:
    """Blocks of samples as a second process draws them."""
    context = multiprocessing.get_context("spawn")
    drawn: Queue[list[Sample]] = context.Queue(maxsize=40)
    worker = context.Process(target=_work, args=(drawn, seed, blocks), daemon=True)
    worker.start()
    try:
        yield iter(drawn.get, None)
    finally:
        worker.terminate()


@contextmanager
def _one_thread_each(threads: int) -> Generator[ThreadPoolExecutor]:
    """A pool whose threads do their matrix products alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _hide(rng: np.random.Generator, turn: Turn) -> Turn:
    """Hide one answer word in ten from the model's own input: the picture must tell, not the sentence."""
    hidden = rng.random(len(turn.ids)) < 0.1
    if not turn.pictures:
        return turn
    given = [0 if hide and at >= turn.answer_at else turn.ids[at] for at, hide in enumerate(hidden)]
    return replace(turn, given=given)


def _losses(
    model: KimiVLForConditionalGeneration, looks: Looks, pictures: Pictures, turns: Sequence[Turn], experts: Experts
) -> tuple[Tensor, Tensor]:
    """Weighted cross entropy of the answers, loss of the training aid. A frozen tower is not asked."""
    kept: list[Tensor] = []
    is_frozen = not next(model.model.vision_tower.parameters()).requires_grad
    # 0.7 s of processor time a step instead of 0.9 (two cores with avx512_bf16); the weights stay float32.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        seen = see(model, pictures.patches, pictures.grids)
        logits, wanted = tell(model, project(model, seen, pictures.grids), pictures.grids, turns, experts, kept)
    weights = torch.tensor([KIND_WEIGHTS[turn.kind] for turn in turns]).repeat_interleave(
        torch.tensor([len(turn.ids) - turn.answer_at for turn in turns])
    )
    loss = (F.cross_entropy(logits.float(), wanted, reduction="none") * weights).sum() / weights.sum()
    aid = looks.count_loss(kept[0].float(), pictures.grids, turns)
    return loss, aid if is_frozen else aid + looks.loss(seen.float(), pictures.views)


@dataclass(frozen=True)
class Gradients:
    """Of every weight, None where a batch did not touch it; the loss of the answers and of the training aid."""

    weights: tuple[Tensor | None, ...]
    loss: float
    aid: float


class Trainer:
    """Model, training aid and optimiser, and one step of them."""

    def __init__(self, model: KimiVLForConditionalGeneration) -> None:
        from sightline.tiny.training import Optimiser

        self.model = model
        self.experts = Experts(model)
        self.looks = Looks(model.config.vision_config.hidden_size)
        own = [(n, w) for n, w in model.named_parameters() if ".mlp.experts." not in n and ".mlp.gate." not in n]
        routers = [(f"router{n}", router.weight) for n, router in self.experts.routers.items()]
        named = [*own, *routers, *self.experts.named(), *self.looks.named_parameters()]
        named = [(name, weight) for name, weight in named if weight.requires_grad]
        self._weights = [weight for _, weight in named]
        self._optimiser = Optimiser(named, (".layers.", ".mm_projector."))

    def gradients(self, pictures: Pictures, turns: Sequence[Turn], aid_weight: float) -> Gradients:
        """Of one batch; leaves the weights as they are."""
        loss, aid = _losses(self.model, self.looks, pictures, turns, self.experts)
        found = torch.autograd.grad(loss + aid_weight * aid, self._weights, allow_unused=True)
        return Gradients(found, loss.item(), aid.item())

    def step(self, parts: Sequence[Gradients], share: float, *, is_settled: bool) -> None:
        """One update with the mean of the parts, at `share` of the peak rate; the routing bias moves until settled."""
        for weight, *grads in zip(self._weights, *(part.weights for part in parts), strict=True):
            known = [grad for grad in grads if grad is not None]
            weight.grad = sum(known[1:], known[0]) / len(parts) if known else None
        self._optimiser.step(share)
        self.experts.balance(0.0 if is_settled else 1e-3)


def train(
    out: Path, *, seed: int = 0, steps: int, minutes: float | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train and write the checkpoint; the data depend on the seed alone.

    resume   go on from the weights in `out`, with a fresh learning-rate schedule; take another seed for fresh pictures.
             The vision tower stays as it is: such a leg is for conversations
    returns  what the report needs: steps, minutes, images, seed
    """
    from sightline.tiny.training import Bar, Budget, rate

    tokenizer = make_tokenizer()
    talk = Conversations(tokenizer.backend_tokenizer)
    model = make_model(len(tokenizer), seed)
    if resume:
        model.load_state_dict(KimiVLForConditionalGeneration.from_pretrained(out).state_dict())
        model.model.vision_tower.requires_grad_(False)
    model.train()
    save(model, tokenizer, out)
    trainer = Trainer(model)
    exam = Exam.draw(talk, seed)
    first = SETTLED if resume else 0
    blocks = range(first, first + steps * BATCH * len(PARTS) // (BLOCK * len(RETURNS)) + 400)
    budget = Budget(steps, minutes)
    rng = np.random.default_rng([seed, 2])
    step, last = 0, 0.0
    marks: dict[str, float] = {}
    with (
        _drawing(seed, blocks) as drawn,
        _one_thread_each(min(torch.get_num_threads(), len(PARTS))) as pool,
        Bar("generate", steps) as bar,
    ):
        source = batches(drawn, seed, BATCH)
        while (done := budget.progress(step)) < 1.0:
            jobs: list[tuple[Pictures, list[Turn]]] = []
            for asked in FIRST_PARTS if done < 0.1 and not resume else PARTS:
                pictures = Pictures.of(next(source))
                turns = talk.draw(rng, pictures, asked)
                jobs.append((pictures, [_hide(rng, turn) if done < 0.7 else turn for turn in turns]))
            aid_weight = 0.25 if done < 0.6 else 0.1
            futures = [pool.submit(trainer.gradients, *job, aid_weight) for job in jobs]
            parts = [future.result() for future in futures]
            trainer.step(parts, rate(done), is_settled=done >= 0.9)
            step += 1
            if budget.elapsed_minutes() - last > 2.5:
                last = budget.elapsed_minutes()
                marks = exam.marks(model, trainer.experts)
                save(model, tokenizer, out)
            bar.step(loss=parts[0].loss, aid=parts[0].aid, **marks)
    model.eval()
    save(model, tokenizer, out)
    return {
        "steps": step,
        "images": step * BATCH * len(PARTS),
        "seed": seed,
        "minutes": round(budget.elapsed_minutes(), 1),
        "exam": exam.marks(model, trainer.experts),
    }
