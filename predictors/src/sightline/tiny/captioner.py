"""The captioner: a BLIP of 1.2 million weights that learns to caption coloured shapes, alone or after a text prefix.

Dims   B images · N patches and the class token · D width 128 · L text length

The checkpoint is an ordinary `BlipForConditionalGeneration`. Training runs the same weights through a forward written
out below (one matrix product instead of a convolution, fused attention); `tests/unit/tiny/test_captioner.py` holds it
to the transformers forward.

BLIP squeezes every picture into a square, so that in a 2:1 picture a circle arrives as an ellipse. What keeps its
meaning is the larger of the two extents: it is a share of the picture's shorter side, as the size words are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as tvF
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    GenerationConfig,
)

from sightline.tiny import HELD_OUT_DESCRIBE, is_held_out, scenes
from sightline.tiny.training import returning

MODEL_NAME = "sightline-tiny-blip"
SIDE = 144
"""Every picture becomes a square of this many pixels."""
PATCH = 12
CELLS = SIDE // PATCH
WIDTH = 128
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

PREFIXES = (
    "a picture of",
    "a photo of",
    "a photography of",
    "an image of",
    "a drawing of",
    "this is",
    "there is",
    "i see",
    "the picture shows",
    "this image shows",
)
"""What people ask BLIP to continue; the model continues each with the caption."""
_NOISE = (  # noqa: SIM905 - prose reads better than a list
    "the of and to in it is that was for on with as are this be at by from or an have not but what all were when we "
    "there can your which their said if do will each about how up out them then she many some so these would other"
).split()

# ---- tokenizer, configuration, files ---------------------------------------------------------------------------------


def vocabulary() -> list[str]:
    """BERT's special tokens, every ASCII character alone and inside a word, our words, and BLIP's two own tokens last.

    So any ASCII text can be written, and [DEC] (begin of text) and [ENC] stand where BLIP has them: at the end.
    """
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    words = {word for text in [*scenes.all_captions(1), *scenes.RELATIONS, *PREFIXES] for word in text.split()}
    words |= {word for word in _NOISE if len(word) > 1}
    return [
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        *characters,
        *(f"##{character}" for character in characters if character.isalnum()),
        *sorted(word for word in words if len(word) > 1),
        *("[DEC]", "[ENC]"),
    ]


def make_tokenizer() -> BertTokenizer:
    """BERT's lower-casing WordPiece over the small vocabulary."""
    return BertTokenizer(
        vocab={token: at for at, token in enumerate(vocabulary())},
        bos_token="[DEC]",  # noqa: S106 - a token of text
        additional_special_tokens=["[ENC]"],
        model_max_length=512,
    )


def make_processor() -> BlipProcessor:
    """Tokenizer and image processor, as `AutoProcessor` will load them."""
    return BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), make_tokenizer())


def make_config(tokenizer: BertTokenizer) -> BlipConfig:
    """The shape of the model."""
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in ("[DEC]", "[SEP]", "[PAD]")}
    config = BlipConfig(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": SIDE,
            "patch_size": PATCH,
            # The class default, 1e-10, makes a fresh tower blind.
            "initializer_range": 0.02,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "encoder_hidden_size": WIDTH,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": ids["[DEC]"],
            "eos_token_id": ids["[SEP]"],
            "sep_token_id": ids["[SEP]"],
            "pad_token_id": ids["[PAD]"],
        },
    )
    config.update({"sightline_demo_model": True, "sightline_model_name": MODEL_NAME})
    config.architectures = ["BlipForConditionalGeneration"]
    return config


def make_model(tokenizer: BertTokenizer, seed: int) -> BlipForConditionalGeneration:
    """Fresh weights; places begin as sines and cosines, so that neighbours are known as such from the first step."""
    torch.manual_seed(seed)
    model = BlipForConditionalGeneration(make_config(tokenizer))
    for name, weight in model.named_parameters():
        if weight.ndim in (2, 4) and "embeddings.weight" not in name and "word_embeddings" not in name:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    with torch.no_grad():
        places: Tensor = model.vision_model.embeddings.position_embedding
        places[0, 1:] = 0.3 * _waves()
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=48,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def _waves() -> Tensor:
    """(N - 1, D) sines and cosines of row and column at a quarter of D frequencies each."""
    spot = torch.arange(CELLS, dtype=torch.float32)
    turn = spot[:, None] * torch.exp(-torch.arange(WIDTH // 4) / (WIDTH // 4) * np.log(100.0)) * np.pi / 2
    line = torch.cat([turn.sin(), turn.cos()], 1)
    rows, columns = line[:, None].expand(-1, CELLS, -1), line[None].expand(CELLS, -1, -1)
    return torch.cat([rows, columns], -1).reshape(CELLS**2, WIDTH)


def save(model: BlipForConditionalGeneration, processor: BlipProcessor, folder: Path) -> None:
    """Write the checkpoint in the true file layout, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # transformers 5 keeps it in processor_config.json and tokenizer.json; older readers look for these two.
    told = processor.image_processor.to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(told, indent=2, sort_keys=True, default=str) + "\n")
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
    (folder / "model.safetensors").chmod(0o644)


# ---- the forward -----------------------------------------------------------------------------------------------------


def to_canvas(pixels: np.ndarray) -> Tensor:
    """Resize as the image processor does. pixels (H, W, 3) uint8 -> (3, SIDE, SIDE) uint8."""
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return tvF.resize(image, [SIDE, SIDE], interpolation=tvF.InterpolationMode.BICUBIC, antialias=True)


def normalised(canvases: Tensor) -> Tensor:
    """(B, 3, SIDE, SIDE) uint8 -> float32 as the image processor makes it."""
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    std = torch.tensor(STD).view(1, 3, 1, 1)
    return (canvases.float() / 255 - mean) / std


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *, is_causal: bool = False) -> Tensor:
    """Queries (B, Q, D), keys and values (B, K, D) -> (B, Q, D), in float32 also under autocast.

    The CPU flash kernel is four times slower backwards in bfloat16 (torch 2.13).
    """
    q, k, v = (x.float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2)


def see(model: BlipForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The vision tower. pixels (B, 3, SIDE, SIDE) -> (B, N, D), the class token first."""
    tower: Any = model.vision_model
    e, count = tower.embeddings, tower.config.num_attention_heads
    b = len(pixels)
    cut = pixels.reshape(b, 3, CELLS, PATCH, CELLS, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(b, CELLS**2, -1)
    patches = F.linear(cut, e.patch_embedding.weight.flatten(1), e.patch_embedding.bias)
    x = torch.cat([e.class_embedding.expand(b, -1, -1), patches], 1) + e.position_embedding
    for layer in tower.encoder.layers:
        q, k, v = layer.self_attn.qkv(layer.layer_norm1(x)).chunk(3, -1)
        x = x + layer.self_attn.projection(_attend(q, k, v, count))
        x = x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.layer_norm2(x))))
    return tower.post_layernorm(x)


def tell(model: BlipForConditionalGeneration, seen: Tensor, text: Tensor) -> Tensor:
    """The text decoder. seen (B, N, D) · text (B, L) ids, padding on the right -> (B, L, vocabulary) logits."""
    decoder: Any = model.text_decoder
    bert, head = decoder.bert, decoder.cls.predictions
    count = decoder.config.num_attention_heads
    e = bert.embeddings
    x = F.embedding(text, e.word_embeddings.weight) + e.position_embeddings.weight[: text.shape[1]]
    x = e.LayerNorm(x)
    for layer in bert.encoder.layer:
        for part, source in ((layer.attention, None), (layer.crossattention, seen)):
            a, y = part.self, x if source is None else source
            heard = _attend(a.query(x), a.key(y), a.value(y), count, is_causal=source is None)
            x = part.output.LayerNorm(part.output.dense(heard) + x)
        x = layer.output.LayerNorm(layer.output.dense(F.gelu(layer.intermediate.dense(x))) + x)
    x = head.transform.LayerNorm(F.gelu(head.transform.dense(x)))
    return F.linear(x, e.word_embeddings.weight, head.bias)


# ---- training data ---------------------------------------------------------------------------------------------------

LOOK_WIDTHS = (len(scenes.COLOURS), len(scenes.SHAPES), len(scenes.SIZES), 5)
ROLES = ("alone", "left", "right", "above", "below")
MIRRORED_ROLE = np.array([0, 2, 1, 3, 4])


@dataclass(frozen=True)
class Sample:
    """One picture for training.

    canvas     (3, SIDE, SIDE) uint8, as the image processor resizes it
    captions   of the picture and of its mirror image
    looks      (4, CELLS, CELLS) int8: colour, shape, size, role of the object under each patch; -1 = ground
    spans      (5, CELLS, CELLS) float16, in patches: x, y from the patch to the centre of its object, half width,
               half height, and the larger of the two, which decides between small and large
    """

    canvas: np.ndarray
    captions: tuple[str, str]
    looks: np.ndarray
    spans: np.ndarray


def _roles(scene: scenes.Scene) -> list[int]:
    if len(scene.objects) == 1:
        return [0]
    first, how, _ = scenes.relation(scene)
    base = 1 if how == scenes.RELATIONS[0] else 3
    return [base if thing is first else base + 1 for thing in scene.objects]


def labels(scene: scenes.Scene) -> tuple[np.ndarray, np.ndarray]:
    """What lies under each patch: facts of the scene, used only while training (see `Sample`).

    An object squeezed so thin that it holds no patch's centre is still known to the patch of its own centre.
    """
    looks = np.full((4, CELLS, CELLS), -1, np.int8)
    spans = np.zeros((5, CELLS, CELLS), np.float16)
    y, x = np.mgrid[0:CELLS, 0:CELLS] + 0.5
    for thing, role in zip(scene.objects, _roles(scene), strict=True):
        cx, cy = thing.centre_x / scene.width * CELLS, thing.centre_y / scene.height * CELLS
        rx, ry = thing.half / scene.width * CELLS, thing.half / scene.height * CELLS
        inside = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 0.9
        inside |= (np.floor(x) == np.floor(cx)) & (np.floor(y) == np.floor(cy))
        facts = (
            list(scenes.COLOURS).index(thing.colour),
            scenes.SHAPES.index(thing.shape),
            scenes.SIZES.index(thing.size),
            role,
        )
        for plane, fact in zip(looks, facts, strict=True):
            plane[inside] = fact
        spans[0][inside], spans[1][inside] = (cx - x)[inside], (cy - y)[inside]
        spans[2][inside], spans[3][inside], spans[4][inside] = rx, ry, max(rx, ry)
    return looks, spans


def make_sample(rng: np.random.Generator, two_share: float) -> Sample:
    """Draw a scene outside the held-out slice and bring it through file bytes to the canvas."""
    objects = 2 if rng.random() < two_share else 1
    sides = scenes.SIDES if rng.random() < 0.08 else (96, 420)  # large ones cost more to draw and look the same
    while True:
        scene = scenes.draw_scene(rng, objects, sides=sides)
        captions = scenes.caption(scene), scenes.caption(scenes.mirrored(scene))
        if objects == 1 or not any(is_held_out(text, HELD_OUT_DESCRIBE) for text in captions):
            break
    image = scenes.render(scene)
    if rng.random() < 0.75:
        image = scenes.decode(scenes.encode(image, rng)[0])
    looks, spans = labels(scene)
    return Sample(to_canvas(np.asarray(image)).numpy(), captions, looks, spans)


BLOCK = 256
"""Samples in one block, the unit of seeding."""
TWO_SHARE = 0.3
"""Share of two-object pictures after the first blocks."""


def make_block(seed: int, index: int) -> list[Sample]:
    """Block `index` of the endless training set; depends on (seed, index) only. Starts with single objects."""
    rng = np.random.default_rng([seed, index])
    two_share = float(np.clip((index - 16) / 32, 0, TWO_SHARE))
    return [make_sample(rng, two_share) for _ in range(BLOCK)]


RETURNS = (0, 7, 19)
"""Each sample is used three times: in the step its block arrives, and this many blocks later; mirrored at random."""


def batches(blocks: Iterator[list[Sample]], seed: int, batch: int) -> Iterator[tuple[list[Sample], np.ndarray]]:
    """Batches with a flag for each sample whether it is mirrored. Order depends on the seed only."""
    rng = np.random.default_rng([seed, 1])
    for due in returning(blocks, RETURNS):
        order = rng.permutation(len(due))
        for start in range(0, len(due) - batch + 1, batch):
            yield [due[i] for i in order[start : start + batch]], rng.random(batch) < 0.5


def draw_prefix(rng: np.random.Generator) -> str:
    """A text to continue: mostly none, else a common one, some letters capital, or words that mean nothing here."""
    kind = rng.random()
    if kind < 0.65:
        return ""
    if kind < 0.92:
        return str(rng.choice(PREFIXES))
    return " ".join(str(word) for word in rng.choice(_NOISE, int(rng.integers(1, 12))))


# ---- training --------------------------------------------------------------------------------------------------------

IGNORED = -100


class Looks(nn.Module):
    """Training aid, thrown away afterwards: what is under each patch, where that object lies, how far it spans."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = nn.Linear(WIDTH, sum(LOOK_WIDTHS))
        self.spans = nn.Linear(WIDTH, 5)

    def loss(self, seen: Tensor, looks: Tensor, spans: Tensor) -> Tensor:
        """Cross entropy of the four facts plus the absolute error of the spans, over patches that hold an object.

        seen (B, N - 1, D), without the class token · looks (B, 4, N - 1) int · spans (B, 5, N - 1)
        """
        held = looks[:, 0] >= 0
        tokens = seen[held]
        total = (self.spans(tokens).float() - spans.transpose(1, 2)[held]).abs().mean() * 2
        for part, target in zip(self.facts(tokens).split(LOOK_WIDTHS, dim=-1), looks.unbind(1), strict=True):
            total = total + F.cross_entropy(part.float(), target[held].long())
        return total


def collate(samples: list[Sample], flips: np.ndarray) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Stack samples, mirrored where asked.

    returns canvases (B, 3, SIDE, SIDE) uint8 · captions · looks (B, 4, N - 1) · spans (B, 5, N - 1)
    """
    canvases, captions, looks, spans = [], list[str](), [], []
    for sample, flip in zip(samples, flips, strict=True):
        canvas, look, span = sample.canvas, sample.looks, sample.spans
        if flip:
            canvas, look, span = canvas[..., ::-1], look[..., ::-1].copy(), span[..., ::-1].copy()
            look[3] = np.where(look[3] >= 0, MIRRORED_ROLE[look[3]], -1)
            span[0] *= -1
        canvases.append(canvas)
        captions.append(sample.captions[int(flip)])
        looks.append(look.reshape(len(look), -1))
        spans.append(span.reshape(len(span), -1))
    return (
        torch.from_numpy(np.stack(canvases)),
        captions,
        torch.from_numpy(np.stack(looks)),
        torch.from_numpy(np.stack(spans)).float(),
    )


def texts(tokenizer: Tokenizer, captions: list[str], prefixes: list[str]) -> tuple[Tensor, Tensor]:
    """[DEC] prefix caption [SEP], padded on the right.

    returns what the decoder reads (B, L) · what it should say next (B, L), IGNORED on prefix and padding
    """
    begin, end = (tokenizer.token_to_id(token) for token in ("[DEC]", "[SEP]"))
    given: list[Tensor] = []
    wanted: list[Tensor] = []
    for caption, prefix in zip(captions, prefixes, strict=True):
        before = [begin, *tokenizer.encode(prefix, add_special_tokens=False).ids]
        said = [*tokenizer.encode(caption, add_special_tokens=False).ids, end]
        given.append(torch.tensor(before + said[:-1]))
        wanted.append(torch.tensor([IGNORED] * (len(before) - 1) + said))
    return (
        nn.utils.rnn.pad_sequence(given, batch_first=True, padding_value=0),
        nn.utils.rnn.pad_sequence(wanted, batch_first=True, padding_value=IGNORED),
    )


def exact(model: BlipForConditionalGeneration, tokenizer: Tokenizer, samples: list[Sample]) -> tuple[float, float]:
    """Share of captions that greedy decoding would get wholly right, of one object and of two.

    One pass suffices: greedy is right exactly when every token of the true caption is the most likely one.
    """
    right: tuple[list[bool], list[bool]] = ([], [])
    with torch.no_grad():
        for start in range(0, len(samples), 64):
            part = samples[start : start + 64]
            canvases, captions, looks, _ = collate(part, np.zeros(len(part), bool))
            given, wanted = texts(tokenizer, captions, [""] * len(part))
            logits = tell(model, see(model, normalised(canvases)), given)
            fine = ((logits.argmax(-1) == wanted) | (wanted == IGNORED)).all(1)
            for ok, look in zip(fine.tolist(), looks, strict=True):
                right[int((look[3] > 0).any())].append(ok)
    one, two = (float(np.mean(part)) if part else 0.0 for part in right)
    return one, two


LEGS = (1058, 1105, 872, 2600)
"""Optimiser steps of each leg. Every leg has fresh pictures and a learning-rate schedule of its own, and goes on from
the weights of the one before."""
BATCH = 32
SETTLED = 60
"""First block of a resumed training: past the curriculum's single objects."""


def _gradients(
    model: BlipForConditionalGeneration,
    looks: Looks,
    tokenizer: Tokenizer,
    picked: tuple[list[Sample], np.ndarray],
    rng: np.random.Generator,
    *,
    hides_words: bool,
    aid_weight: float,
    is_rough: bool,
) -> tuple[float, float]:
    """Add one batch's gradients.

    hides_words   masks one word in ten of the model's own input: the picture must tell, not the sentence
    is_rough      multiplies in bfloat16
    returns       loss of the caption, loss of the training aid
    """
    canvases, captions, look, spans = collate(*picked)
    given, wanted = texts(tokenizer, captions, [draw_prefix(rng) for _ in captions])
    if hides_words:
        hidden = torch.from_numpy(rng.random(given.shape) < 0.1)
        hidden[:, 0] = False
        given = given.masked_fill(hidden, tokenizer.token_to_id("[MASK]") or 0)
    # bfloat16: a step takes two thirds of the time (0.33 s of one core, not 0.50 s; EPYC with avx512_bf16).
    with torch.autocast("cpu", torch.bfloat16, enabled=is_rough):
        seen = see(model, normalised(canvases))
        logits = tell(model, seen, given).float()
        aid = looks.loss(seen[:, 1:], look, spans)
    loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
    (loss + aid_weight * aid).backward()
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
        model.load_state_dict(BlipForConditionalGeneration.from_pretrained(out).state_dict())
    model.train()
    save(model, processor, out)
    looks = Looks()
    optimiser = Optimiser(
        [*model.named_parameters(), *looks.named_parameters()],
        (".layers.", ".layer."),
        muon_rate=2e-3 if resume else 3e-3,
        adam_rate=7e-4 if resume else 1e-3,
    )
    exam = [s for index in range(2) for s in make_block(seed + 1_000_003, 10_000 + index)]

    first = SETTLED if resume else 0
    blocks = range(first, first + steps * BATCH // (BLOCK * len(RETURNS)) + 400)
    budget = Budget(steps, minutes)
    rng = np.random.default_rng([seed, 2])
    step, last = 0, 0.0
    one = two = 0.0
    with drawing(partial(make_block, seed), blocks) as drawn, Bar("blip", steps) as bar:
        source = batches(drawn, seed, BATCH)
        while (done := budget.progress(step)) < 1.0:
            loss, aid = _gradients(
                model,
                looks,
                tokenizer,
                next(source),
                rng,
                hides_words=done < 0.75,
                aid_weight=0.25 if done < 0.6 else 0.1,
                is_rough=done < 0.7,
            )
            optimiser.step(rate(done))
            step += 1
            if budget.elapsed_minutes() - last > 2.5:
                last = budget.elapsed_minutes()
                one, two = exact(model, tokenizer, exam)
                save(model, processor, out)
            bar.step(loss=loss, aid=aid, one=one, two=two)
    model.eval()
    save(model, processor, out)
    return {"steps": step, "images": step * BATCH, "seed": seed, "minutes": round(budget.elapsed_minutes(), 1)}
