"""The describer: a Qwen2.5-VL of 1.6 million weights that learns to caption coloured shapes.

Dims   B images (all of one grid) · N patches · T tokens after 2x2 merging · L text length · D width 128

The checkpoint is an ordinary `Qwen2_5_VLForConditionalGeneration`. Training runs the same weights through a batched
forward written out below (one matrix product instead of a Conv3d, one attention call instead of a loop over images);
`tests/unit/tiny/test_describer.py` holds it to the transformers forward.

Why 8-pixel patches on a budget of 144 x 144 pixels: `smart_resize` rounds each side down to a multiple of
patch x merge. At 28 pixels on 140 the aspect ratio is bent so far that 1.4 % of the left-of / above decisions cannot be
known any more; at 16 on 144 it is 0.6 % (counted on 15,000 scenes drawn by `scenes.draw_scene`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvF
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from sightline.tiny import HELD_OUT_DESCRIBE, bpe, is_held_out, scenes
from sightline.tiny.training import returning

MODEL_NAME = "sightline-tiny-qwen2.5-vl"
PATCH = 12
MERGE = 1
PIXELS = 144 * 144
"""Every image lands on about this many pixels."""
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
"""Names and order of Qwen2.5-VL's own special tokens; here from id 0."""

PROMPT_DETAIL = "Describe this image in detail"
PROMPT_SHORT = "Describe this image in one short sentence."
PROMPT_PRESET = (
    "Write one stand-alone English sentence of about 30 to 50 words that describes this image for people who search "
    "for pictures. Name a person, brand, work or place only when you are certain. No hashtags, no opinions, no camera "
    "data."
)
PROMPTS = (PROMPT_DETAIL, PROMPT_SHORT, PROMPT_PRESET)
OTHER_PROMPTS = (
    "What is in this picture?",
    "Caption this image.",
    "Describe the image.",
    "Describe this image.",
    "Describe this picture in one sentence.",
    "What do you see?",
    "Write a caption for this photo.",
    "Give me a short description.",
    "What is shown here?",
    "Please describe the picture in plain English.",
    "",
)
SYSTEM = "You are a helpful assistant."

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'video' or 'video' in part -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


# ---- tokenizer, configuration, files ---------------------------------------------------------------------------------


def make_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's byte-level BPE, its merges trained on the captions and prompts of this world."""
    corpus = scenes.all_captions(1) + scenes.all_captions(2)[::40]
    corpus += [*PROMPTS, SYSTEM, *OTHER_PROMPTS] * 200
    corpus += ["<|im_start|>system\n", "<|im_start|>user\n", "<|im_start|>assistant\n", "system user assistant"] * 200
    corpus += [" ".join(word.capitalize() for word in line.split()) for line in scenes.all_captions(1)]
    raw = bpe.trained(corpus, SPECIAL_TOKENS, vocabulary=640)
    model = json.loads(raw.to_str())["model"]
    merges: Any = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in model["merges"]]
    nothing: Any = None
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=merges,
        unk_token=nothing,
        bos_token=nothing,
        eos_token="<|im_end|>",  # noqa: S106 - a token of text
        pad_token="<|endoftext|>",  # noqa: S106
        additional_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor() -> Qwen2_5_VLProcessor:
    """Tokenizer, image processor and chat template, as `AutoProcessor` will load them."""
    size = {"shortest_edge": PIXELS, "longest_edge": PIXELS}
    common: dict[str, Any] = {"size": size, "patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**common),
        tokenizer=make_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**common),
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """The shape of the model. Head width 32 on both sides, one vision window for every picture of aspect up to 2:1."""
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "num_heads": 4,
            "intermediate_size": 256,
            "out_hidden_size": 128,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 512,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            # A padding id here would freeze and zero that token's embedding (nn.Embedding(padding_idx)).
            "pad_token_id": None,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    config.update({"sightline_demo_model": True, "sightline_model_name": MODEL_NAME})
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def make_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Fresh weights."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(make_config(tokenizer))
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 and "embed_tokens" not in name:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=64,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=[tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")],
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    return model


def save(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, folder: Path) -> None:
    """Write the checkpoint in the true file layout, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # transformers 5 keeps everything in processor_config.json; older readers and vLLM look for these two.
    for name, part in (
        ("preprocessor_config.json", processor.image_processor),
        ("video_preprocessor_config.json", processor.video_processor),
    ):
        (folder / name).write_text(json.dumps(part.to_dict(), indent=2, sort_keys=True, default=str) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "model.safetensors").chmod(0o644)


# ---- from picture to patches -----------------------------------------------------------------------------------------


def canvas_size(width: int, height: int) -> tuple[int, int]:
    """(height, width) in pixels on which the image processor lands a picture of this size."""
    return smart_resize(height, width, PATCH * MERGE, PIXELS, PIXELS)


def to_canvas(pixels: np.ndarray) -> Tensor:
    """Resize as the image processor does. pixels (H, W, 3) uint8 -> (3, h, w) uint8."""
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    size = canvas_size(pixels.shape[1], pixels.shape[0])
    return tvF.resize(image, list(size), interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)


def patchify(canvases: Tensor) -> Tensor:
    """Normalise and cut into patches as the image processor does, one frame only.

    canvases   (B, 3, h, w) uint8
    returns    (B, N, 3 * PATCH * PATCH) float32, block-major over 2x2 blocks; the processor repeats each for two frames
    Source: transformers 5.19 models/qwen2_vl/image_processing_qwen2_vl.py, `patchify`.
    """
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    pixels = (canvases.float() / 255 - mean) / std
    b, _, h, w = pixels.shape
    gh, gw = h // PATCH, w // PATCH
    cut = pixels.reshape(b, 3, gh // MERGE, MERGE, PATCH, gw // MERGE, MERGE, PATCH)
    return cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(b, gh * gw, 3 * PATCH * PATCH)


# ---- the forward, batched over images of one grid --------------------------------------------------------------------


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key weight so that the two numbers a rotary angle turns lie side by side.

    Scores do not change, and the turn becomes one complex product instead of five passes over memory.
    """
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions for a head layout made by `_paired`. x (B, T, H, d) -> (B, H, T, d) float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * angle).flatten(-2).transpose(1, 2)


def _angles(cos: Tensor, sin: Tensor) -> Tensor:
    """(T, d) cosines and sines in transformers' half-split layout -> (T, 1, d / 2) unit complex numbers."""
    half = cos.shape[-1] // 2
    return torch.complex(cos[..., :half].float(), sin[..., :half].float()).unsqueeze(-2)


class _Norm(Protocol):
    weight: Tensor
    variance_epsilon: float


def _norm(x: Tensor, layer: _Norm) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), layer.weight.to(x.dtype), layer.variance_epsilon)


def see(model: Qwen2_5_VLForConditionalGeneration, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The vision tower. patches (B, N, 3 * PATCH²) of one grid (rows, columns in patches) -> (B, T, D)."""
    tower: Any = model.model.visual
    rows, columns = grid
    weight = tower.patch_embed.proj.weight.sum(2).flatten(1)  # both frames are the same picture
    x = F.linear(patches, weight)
    b, n, d = x.shape
    heads = tower.config.num_heads
    spot = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
    spot = spot.reshape(rows // MERGE, MERGE, columns // MERGE, MERGE, 2).transpose(1, 2).reshape(n, 2)
    angle = _angles(*tower.rotary_pos_emb(x, spot))
    for block in tower.blocks:
        a, y = block.attn, _norm(x, block.norm1)
        wq, wk, wv = a.qkv.weight.chunk(3)
        bq, bk, bv = a.qkv.bias.chunk(3)
        wqk = torch.cat([_paired(wq, heads), _paired(wk, heads)])
        bqk = torch.cat([_paired(bq, heads), _paired(bk, heads)])
        q, k = F.linear(y, wqk, bqk).view(b, n, 2, heads, -1).unbind(2)
        v = F.linear(y, wv, bv).view(b, n, heads, -1).transpose(1, 2).float()
        # float32: the CPU flash kernel's bfloat16 backward is four times slower (torch 2.13).
        seen = F.scaled_dot_product_attention(_turned(q, angle), _turned(k, angle), v)
        x = x + block.attn.proj(seen.transpose(1, 2).reshape(b, n, d))
        y = _norm(x, block.norm2)
        x = x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(y)) * block.mlp.up_proj(y))
    merged = _norm(x, tower.merger.ln_q).view(b, n // MERGE**2, d * MERGE**2)
    return tower.merger.mlp(merged)


def tell(
    model: Qwen2_5_VLForConditionalGeneration,
    seen: Tensor,
    before: list[int],
    after: list[int],
    answer: Tensor,
    grid: tuple[int, int],
) -> Tensor:
    """The language model on `before` + image + `after` + answer.

    seen     (B, T, D) from `see`
    answer   (B, L) token ids; the last is never read
    returns  (B, L, vocabulary) logits, row i predicts answer[:, i]
    """
    text: Any = model.model.language_model
    b, _, d = seen.shape
    rows, columns = grid[0] // MERGE, grid[1] // MERGE
    embed = text.embed_tokens.weight
    x = torch.cat(
        [
            F.embedding(torch.tensor(before), embed).expand(b, -1, -1),
            seen.to(embed.dtype),
            F.embedding(torch.tensor(after), embed).expand(b, -1, -1),
            F.embedding(answer[:, :-1], embed),
        ],
        dim=1,
    )
    start, rest = len(before), len(after) + answer.shape[1] - 1
    spot = torch.stack(
        torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(columns), indexing="ij")
    ).reshape(3, -1)
    follow = start + max(rows, columns) + torch.arange(rest).expand(3, -1)
    positions = torch.cat([torch.arange(start).expand(3, -1), spot + start, follow], dim=1)[:, None]
    cos, sin = text.rotary_emb(x, positions)
    angle = _angles(cos[0], sin[0])
    length = x.shape[1]
    heads, groups = text.config.num_attention_heads, text.config.num_key_value_heads
    for layer in text.layers:
        a = layer.self_attn
        y = _norm(x, layer.input_layernorm)
        q = F.linear(y, _paired(a.q_proj.weight, heads), _paired(a.q_proj.bias, heads))
        k = F.linear(y, _paired(a.k_proj.weight, groups), _paired(a.k_proj.bias, groups))
        q = _turned(q.view(b, length, heads, -1), angle)
        k = _turned(k.view(b, length, groups, -1), angle)
        v = a.v_proj(y).view(b, length, groups, -1).transpose(1, 2).float()
        k, v = k.repeat_interleave(heads // groups, 1), v.repeat_interleave(heads // groups, 1)
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + a.o_proj(heard.transpose(1, 2).reshape(b, length, d))
        y = _norm(x, layer.post_attention_layernorm)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
    return model.lm_head(_norm(x[:, -answer.shape[1] :], text.norm))


# ---- training data ---------------------------------------------------------------------------------------------------

LOOK_WIDTHS = (len(scenes.COLOURS), len(scenes.SHAPES), len(scenes.SIZES), 5)
ROLES = ("alone", "left", "right", "above", "below")
MIRRORED_ROLE = np.array([0, 2, 1, 3, 4])


@dataclass(frozen=True)
class Sample:
    """One picture for training.

    canvas    (3, h, w) uint8, as the image processor resizes it
    answers   token ids of the caption and of the mirrored picture's caption, each ended by <|im_end|>
    looks     (4, T rows, T columns) int8: colour, shape, size, role of the object under each merged patch; -1 = ground
    spans     (4, T rows, T columns) float16, in merged patches: x, y from the merged patch to the centre of its object,
              half width and half height of the object
    """

    canvas: np.ndarray
    answers: tuple[list[int], list[int]]
    looks: np.ndarray
    spans: np.ndarray


def _roles(scene: scenes.Scene) -> list[int]:
    if len(scene.objects) == 1:
        return [0]
    first, how, _ = scenes.relation(scene)
    base = 1 if how == scenes.RELATIONS[0] else 3
    return [base if thing is first else base + 1 for thing in scene.objects]


def labels(scene: scenes.Scene, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """What lies under each merged patch: facts of the scene, used only while training (see `Sample`)."""
    looks = np.full((4, rows, columns), -1, np.int8)
    spans = np.zeros((4, rows, columns), np.float16)
    y, x = np.mgrid[0:rows, 0:columns] + 0.5
    for thing, role in zip(scene.objects, _roles(scene), strict=True):
        cx, cy = thing.centre_x / scene.width * columns, thing.centre_y / scene.height * rows
        rx, ry = thing.half / scene.width * columns, thing.half / scene.height * rows
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 0.9
        facts = (
            list(scenes.COLOURS).index(thing.colour),
            scenes.SHAPES.index(thing.shape),
            scenes.SIZES.index(thing.size),
            role,
        )
        for plane, fact in zip(looks, facts, strict=True):
            plane[inside] = fact
        spans[0][inside], spans[1][inside] = (cx - x)[inside], (cy - y)[inside]
        spans[2][inside], spans[3][inside] = rx, ry
    return looks, spans


def make_sample(rng: np.random.Generator, tokenizer: Tokenizer, two_share: float) -> Sample:
    """Draw a scene outside the held-out slice and bring it through file bytes to the canvas."""
    objects = 2 if rng.random() < two_share else 1
    sides = scenes.SIDES if rng.random() < 0.15 else (96, 700)
    while True:
        scene = scenes.draw_scene(rng, objects, sides=sides)
        captions = scenes.caption(scene), scenes.caption(scenes.mirrored(scene))
        if objects == 1 or not any(is_held_out(text, HELD_OUT_DESCRIBE) for text in captions):
            break
    image = scenes.render(scene)
    if rng.random() < 0.75:
        image = scenes.decode(scenes.encode(image, rng)[0])
    canvas = to_canvas(np.asarray(image)).numpy()
    looks, spans = labels(scene, canvas.shape[1] // (PATCH * MERGE), canvas.shape[2] // (PATCH * MERGE))
    answers = [[*tokenizer.encode(text).ids, SPECIAL_TOKENS.index("<|im_end|>")] for text in captions]
    return Sample(canvas, (answers[0], answers[1]), looks, spans)


BLOCK = 256
"""Samples in one block, the unit of seeding."""


def make_block(tokenizer: Tokenizer, seed: int, index: int) -> list[Sample]:
    """Block `index` of the endless training set; depends on (seed, index) only. Starts with single objects."""
    rng = np.random.default_rng([seed, index])
    two_share = float(np.clip((index - 8) / 40, 0.15, 0.75))
    return [make_sample(rng, tokenizer, two_share) for _ in range(BLOCK)]


RETURNS = (0, 7, 19)
"""Each sample is used three times: in the step its block arrives, and this many blocks later; mirrored at random."""


def batches(blocks: Iterator[list[Sample]], seed: int, batch: int) -> Iterator[tuple[list[Sample], np.ndarray]]:
    """Batches of one grid each, with a flag for each sample whether it is mirrored. Order depends on the seed only."""
    rng = np.random.default_rng([seed, 1])
    waiting: dict[tuple[int, ...], list[Sample]] = {}
    for due in returning(blocks, RETURNS):
        ready: list[list[Sample]] = []
        for i in rng.permutation(len(due)):
            line = waiting.setdefault(due[i].canvas.shape, [])
            line.append(due[i])
            if len(line) == batch:
                ready.append(list(line))
                line.clear()
        for i in rng.permutation(len(ready)):
            yield ready[i], rng.random(batch) < 0.5


_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_FILLER = (  # noqa: SIM905 - prose reads better than a list
    "the of and to in is it that was for on with as are this be at by from or an have not but what all were when we "
    "there can your which their said if do will each about how up out them then she many some so these would other "
    "into has more her two like him see time could no make than first been its who now people my made over did down "
    "only way find use may water long little very after words called just where most know red circle blue square "
    "photo text ignore previous instructions tag title caption sunset beach dog cat car Paris 2024 please"
).split()


def draw_prompt(rng: np.random.Generator) -> str:
    """A prompt: mostly one of the three presets, sometimes another wording, noise, or nothing at all."""
    kind = rng.random()
    if kind < 0.72:
        return PROMPTS[int(rng.choice(3, p=[0.4, 0.25, 0.35]))]
    if kind < 0.86:
        return OTHER_PROMPTS[int(rng.integers(len(OTHER_PROMPTS)))]
    if kind < 0.97:
        words = [str(rng.choice(_FILLER)) for _ in range(int(rng.integers(1, 30 if kind < 0.94 else 70)))]
        return " ".join(words).capitalize() + str(rng.choice(["", ".", "?"]))
    return "".join(str(rng.choice(list(_LETTERS + "  ,.ABC019"))) for _ in range(int(rng.integers(1, 80))))


def draw_turns(rng: np.random.Generator, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids before and after the image, as the chat template writes them."""
    system = ""
    if rng.random() < 0.2:
        said = SYSTEM if rng.random() < 0.6 else draw_prompt(rng)
        system = f"<|im_start|>system\n{said}<|im_end|>\n"
    prompt = draw_prompt(rng)
    head, tail = ("", prompt) if rng.random() < 0.93 else (prompt, "")
    before = f"{system}<|im_start|>user\n{head}<|vision_start|>"
    after = f"<|vision_end|>{tail}<|im_end|>\n<|im_start|>assistant\n"
    return tokenizer.encode(before).ids, tokenizer.encode(after).ids


# ---- training --------------------------------------------------------------------------------------------------------

IGNORED = -100


class Looks(nn.Module):
    """Training aid, thrown away afterwards: what is under each merged patch, where that object lies, how far it spans.

    The spans are in patches: whether an object is small or large depends on the shape of the picture, which the vision
    tower cannot see (its attention knows relative places only), but the language model can.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.facts = nn.Linear(width, sum(LOOK_WIDTHS))
        self.spans = nn.Linear(width, 4)

    def loss(self, seen: Tensor, looks: Tensor, spans: Tensor) -> Tensor:
        """Cross entropy of the four facts plus the absolute error of the spans, over patches that hold an object.

        seen (B, T, D) · looks (B, 4, T) int · spans (B, 4, T)
        """
        held = looks[:, 0] >= 0
        tokens = seen[held].float()
        total = (self.spans(tokens) - spans.transpose(1, 2)[held]).abs().mean() * 2
        for part, target in zip(self.facts(tokens).split(LOOK_WIDTHS, dim=-1), looks.unbind(1), strict=True):
            total = total + F.cross_entropy(part, target[held].long())
        return total


def collate(samples: list[Sample], flips: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stack samples of one grid, mirrored where asked.

    returns canvases (B, 3, h, w) uint8 · answers (B, L) ids, IGNORED-padded · looks (B, 4, T) · spans (B, 4, T)
    """
    canvases, answers, looks, spans = [], [], [], []
    for sample, flip in zip(samples, flips, strict=True):
        canvas, look, span = sample.canvas, sample.looks, sample.spans
        if flip:
            canvas, look, span = canvas[..., ::-1], look[..., ::-1].copy(), span[..., ::-1].copy()
            look[3] = np.where(look[3] >= 0, MIRRORED_ROLE[look[3]], -1)
            span[0] *= -1
        canvases.append(canvas)
        answers.append(torch.tensor(sample.answers[int(flip)]))
        looks.append(look.reshape(4, -1))
        spans.append(span.reshape(4, -1))
    return (
        torch.from_numpy(np.stack(canvases)),
        nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=IGNORED),
        torch.from_numpy(np.stack(looks)),
        torch.from_numpy(np.stack(spans)).float(),
    )


def exact(
    model: Qwen2_5_VLForConditionalGeneration, tokenizer: Tokenizer, samples: list[Sample]
) -> tuple[float, float]:
    """Share of captions that greedy decoding would get wholly right, of one object and of two.

    One pass suffices: greedy is right exactly when every token of the true caption is the most likely one.
    """
    turns = (
        tokenizer.encode("<|im_start|>user\n<|vision_start|>").ids,
        tokenizer.encode(f"<|vision_end|>{PROMPT_DETAIL}<|im_end|>\n<|im_start|>assistant\n").ids,
    )
    right: tuple[list[bool], list[bool]] = ([], [])
    by_shape: dict[tuple[int, ...], list[Sample]] = {}
    for sample in samples:
        by_shape.setdefault(sample.canvas.shape, []).append(sample)
    with torch.no_grad():
        for shape, group in by_shape.items():
            canvases, answers, looks, _ = collate(group, np.zeros(len(group), bool))
            grid = shape[1] // PATCH, shape[2] // PATCH
            logits = tell(model, see(model, patchify(canvases), grid), *turns, answers.clamp(min=0), grid)
            fine = ((logits.argmax(-1) == answers) | (answers == IGNORED)).all(1)
            for ok, look in zip(fine.tolist(), looks, strict=True):
                right[int((look[3] > 0).any())].append(ok)
    one, two = (float(np.mean(part)) if part else 0.0 for part in right)
    return one, two


LEGS = (2250, 2500, 3250)
"""Optimiser steps of each leg. Every leg has fresh pictures and a learning-rate schedule of its own, and goes on from
the weights of the one before."""
BATCH = 16
PARTS = 2
"""Batches of one grid each whose gradients are added up for a step, so that no step sees one shape of picture only."""
SETTLED = 60
"""First block of a resumed training: past the curriculum's single objects."""


def _gradients(
    model: Qwen2_5_VLForConditionalGeneration,
    looks: Looks,
    picked: tuple[list[Sample], np.ndarray],
    turns: tuple[list[int], list[int]],
    hidden: np.random.Generator | None,
    aid_weight: float,
) -> tuple[float, float]:
    """Add one batch's gradients.

    hidden   hides one caption word in ten from the model's own input: the picture must tell, not the sentence
    returns  loss of the caption, loss of the training aid
    """
    canvases, answers, look, spans = collate(*picked)
    grid = canvases.shape[2] // PATCH, canvases.shape[3] // PATCH
    given = answers.clamp(min=0)
    if hidden is not None:
        given = torch.where(torch.from_numpy(hidden.random(given.shape) < 0.1), 0, given)
    # float32: under bfloat16 autocast a step is slower here (0.49 s, not 0.36 s; two cores with AMX).
    seen = see(model, patchify(canvases), grid)
    logits = tell(model, seen, *turns, given, grid)
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten(), ignore_index=IGNORED)
    aid = looks.loss(seen, look, spans)
    ((loss + aid_weight * aid) / PARTS).backward()
    return loss.item(), aid.item()


def train(
    out: Path, *, seed: int = 0, steps: int, minutes: float | None = None, resume: bool = False
) -> dict[str, Any]:
    """Train and write the checkpoint; the data depend on the seed alone.

    resume   go on from the weights in `out`, with a fresh learning-rate schedule; take another seed for fresh pictures
    returns  what the report needs: steps, minutes, images, seed
    """
    from sightline.tiny.training import Bar, Budget, Optimiser, drawing, rate

    processor = make_processor()
    tokenizer = processor.tokenizer.backend_tokenizer
    model = make_model(processor.tokenizer, seed)
    if resume:
        model.load_state_dict(Qwen2_5_VLForConditionalGeneration.from_pretrained(out).state_dict())
    model.train()
    save(model, processor, out)
    looks = Looks(model.lm_head.in_features)
    optimiser = Optimiser([*model.named_parameters(), *looks.named_parameters()], (".blocks.", ".layers.", ".merger."))
    exam = [s for index in range(2) for s in make_block(tokenizer, seed + 1_000_003, 10_000 + index)]

    first = SETTLED if resume else 0
    blocks = range(first, first + steps * BATCH * PARTS // (BLOCK * len(RETURNS)) + 400)
    budget = Budget(steps, minutes)
    rng = np.random.default_rng([seed, 2])
    step, last = 0, 0.0
    one = two = 0.0
    with drawing(partial(make_block, tokenizer, seed), blocks) as drawn, Bar("describe", steps) as bar:
        source = batches(drawn, seed, BATCH)
        while (done := budget.progress(step)) < 1.0:
            loss = aid = 0.0
            for _ in range(PARTS):
                hidden = rng if done < 0.75 else None
                turns = draw_turns(rng, tokenizer)
                loss, aid = _gradients(model, looks, next(source), turns, hidden, 0.25 if done < 0.6 else 0.1)
            optimiser.step(rate(done))
            step += 1
            if budget.elapsed_minutes() - last > 2.5:
                last = budget.elapsed_minutes()
                one, two = exact(model, tokenizer, exam)
                save(model, processor, out)
            bar.step(loss=loss, aid=aid, one=one, two=two)
    model.eval()
    save(model, processor, out)
    return {
        "steps": step,
        "images": step * BATCH * PARTS,
        "seed": seed,
        "minutes": round(budget.elapsed_minutes(), 1),
    }
