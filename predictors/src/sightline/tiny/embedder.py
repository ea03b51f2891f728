"""The embedder: the describer's weights and a 128-wide projection, taught to bring a caption and its picture together.

Dims   B pictures (all of one grid) · Q texts · T tokens of a picture's sequence · L tokens of a text · D width 128

The checkpoint is an ordinary `ColQwen2_5` of colpali_engine: one vector for every token of the picture's prompt, one
for every token of the query and its ten augmentation tokens, compared by MaxSim (arXiv 2407.01449). The vision tower
stays the describer's; language model and projection are trained.

Captions of coloured shapes differ in one word, so rivals drawn at random teach little: pictures come in families that
share a scene and differ in background, colour, shape, size, relation, or in which object has which look
(without them nDCG@5 stopped at 0.81, all errors in the background: shared/reference/engines.md, section 1b).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from colpali_engine.models import ColQwen2_5, ColQwen2_5_Processor
from torch import Tensor

from sightline.tiny import DESCRIBE, HELD_OUT_EMBED, is_held_out, scenes
from sightline.tiny.describer import MERGE, PATCH, patchify, see, to_canvas
from sightline.tiny.training import returning

MODEL_NAME = "sightline-tiny-colqwen2.5"


# ---- files -----------------------------------------------------------------------------------------------------------


def make_processor(describer: Path = DESCRIBE) -> ColQwen2_5_Processor:
    """The describer's tokenizer and image processor behind colpali_engine's prompts."""
    return ColQwen2_5_Processor.from_pretrained(describer)


def make_model(seed: int, describer: Path = DESCRIBE) -> ColQwen2_5:
    """The describer's weights with a fresh projection."""
    torch.manual_seed(seed)
    model = ColQwen2_5.from_pretrained(describer)
    model.config.update({"sightline_demo_model": True, "sightline_model_name": MODEL_NAME})
    model.config.architectures = ["ColQwen2_5"]
    torch.nn.init.orthogonal_(model.custom_text_proj.weight)
    torch.nn.init.zeros_(model.custom_text_proj.bias)
    return model


def save(model: ColQwen2_5, processor: ColQwen2_5_Processor, folder: Path) -> None:
    """Write the checkpoint in the true file layout, float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    image_processor = cast("Any", processor).image_processor
    # transformers 5 keeps everything in processor_config.json; older readers look for this one.
    (folder / "preprocessor_config.json").write_text(
        json.dumps(image_processor.to_dict(), indent=2, sort_keys=True, default=str) + "\n"
    )
    (folder / "model.safetensors").chmod(0o644)


# ---- the forward, batched over pictures of one grid ------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Token ids around a picture, and those that follow every query."""

    before: list[int]
    after: list[int]
    augmentation: list[int]


def make_prompt(processor: ColQwen2_5_Processor) -> Prompt:
    """As colpali_engine's `process_images` and `process_queries` write them."""
    tokenizer = cast("Any", processor).tokenizer
    before, after = processor.visual_prompt_prefix.split(processor.image_token)
    return Prompt(
        tokenizer(before).input_ids,
        tokenizer(after).input_ids,
        tokenizer(processor.query_augmentation_token * 10).input_ids,
    )


def _projected(model: ColQwen2_5, embedded: Tensor, positions: Tensor) -> Tensor:
    """Language model, projection, unit length. embedded (B, T, width), positions (3, T) -> (B, T, D)."""
    text: Any = model.language_model
    spread = positions[:, None].expand(-1, embedded.shape[0], -1)
    hidden = text(inputs_embeds=embedded, position_ids=spread, use_cache=False).last_hidden_state
    return F.normalize(model.custom_text_proj(hidden), dim=-1, eps=1e-6)


def embed_pictures(model: ColQwen2_5, canvases: Tensor, prompt: Prompt) -> Tensor:
    """Canvases (B, 3, h, w) uint8 of one grid -> (B, T, D), every token of the picture's sequence."""
    rows, columns = canvases.shape[2] // (PATCH * MERGE), canvases.shape[3] // (PATCH * MERGE)
    with torch.no_grad():  # the describer's eyes stay as they are
        tower = cast("Any", SimpleNamespace(model=model))
        seen = see(tower, patchify(canvases), (rows * MERGE, columns * MERGE))
    table: Tensor = cast("Any", model.language_model).embed_tokens.weight
    before, after = (F.embedding(torch.tensor(ids), table) for ids in (prompt.before, prompt.after))
    count = len(canvases)
    embedded = torch.cat([before.expand(count, -1, -1), seen, after.expand(count, -1, -1)], dim=1)
    start = len(prompt.before)
    spot = torch.stack(
        torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(columns), indexing="ij")
    ).reshape(3, -1)
    follow = start + max(rows, columns) + torch.arange(len(prompt.after)).expand(3, -1)
    positions = torch.cat([torch.arange(start).expand(3, -1), spot + start, follow], dim=1)
    return _projected(model, embedded, positions)


def embed_texts(model: ColQwen2_5, texts: list[list[int]], prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Token ids of Q texts -> (Q, L, D) and a mask (Q, L), True where a token is real.

    Padded on the right: under causal attention what comes later changes nothing.
    """
    rows = [torch.tensor(ids + prompt.augmentation) for ids in texts]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    embedded = F.embedding(padded, cast("Any", model.language_model).embed_tokens.weight)
    return _projected(model, embedded, torch.arange(padded.shape[1]).expand(3, -1)), mask


def mean_maxsim(texts: Tensor, mask: Tensor, pictures: Tensor) -> Tensor:
    """(Q, L, D), (Q, L), (B, T, D) -> (Q, B): mean over real text tokens of the best cosine, -1 to 1."""
    q, length, width = texts.shape
    b, t, _ = pictures.shape
    with torch.no_grad():
        best = (texts.reshape(-1, width) @ pictures.reshape(-1, width).T).view(-1, b, t).argmax(-1)
    # Only the winners take part in the gradient: a tenth of the memory of a max over all pairs.
    winners = pictures.reshape(-1, width)[best + torch.arange(b) * t].view(q, length, b, width)
    cosines = torch.einsum("qld,qlbd->qlb", texts, winners)
    return (cosines * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


# ---- training data: families of scenes -------------------------------------------------------------------------------

FAMILY = 4
"""Pictures of one family: a scene and three that differ from it in one thing each."""


@dataclass(frozen=True)
class Sample:
    """One picture, (3, h, w) uint8 as the image processor resizes it, and its caption as drawn and as mirrored."""

    canvas: np.ndarray
    captions: tuple[str, str]


Family = list[Sample]


def _coloured(rng: np.random.Generator, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(v + rng.integers(-scenes.COLOUR_JITTER, scenes.COLOUR_JITTER + 1), 0, 255)) for v in rgb)
    return r, g, b


def _other(rng: np.random.Generator, words: tuple[str, ...], word: str) -> str:
    return str(rng.choice([w for w in words if w != word]))


def _other_background(rng: np.random.Generator, scene: scenes.Scene) -> scenes.Scene:
    name = _other(rng, tuple(scenes.BACKGROUNDS), scene.background)
    return replace(scene, background=name, background_rgb=_coloured(rng, scenes.BACKGROUNDS[name]))


def _other_look(rng: np.random.Generator, scene: scenes.Scene) -> scenes.Scene:
    """One object in another colour, shape or size."""
    index = int(rng.integers(len(scene.objects)))
    thing = scene.objects[index]
    match int(rng.integers(3)):
        case 0:
            colour = _other(rng, tuple(scenes.COLOURS), thing.colour)
            thing = replace(thing, colour=colour, rgb=_coloured(rng, scenes.COLOURS[colour]))
        case 1:
            thing = replace(thing, shape=_other(rng, scenes.SHAPES, thing.shape))
        case _:
            size = _other(rng, scenes.SIZES, thing.size)
            half = min(scene.width, scene.height) * float(rng.uniform(*scenes.HALF_EXTENT[size]))
            thing = replace(thing, size=size, half=half)
    objects = list(scene.objects)
    objects[index] = thing
    return replace(scene, objects=tuple(objects))


def _exchanged(rng: np.random.Generator, scene: scenes.Scene) -> scenes.Scene:
    """The two objects trade colours, shapes or both; a single object changes its look."""
    if len(scene.objects) == 1:
        return _other_look(rng, scene)
    a, b = scene.objects
    which = int(rng.integers(3))
    if which != 0:
        a, b = replace(a, colour=b.colour, rgb=b.rgb), replace(b, colour=a.colour, rgb=a.rgb)
    if which != 1:
        a, b = replace(a, shape=b.shape), replace(b, shape=a.shape)
    return replace(scene, objects=(a, b))


def _moved(rng: np.random.Generator, scene: scenes.Scene) -> scenes.Scene:
    """The same objects somewhere else; a single object changes its look."""
    if len(scene.objects) == 1:
        return _other_look(rng, scene)
    placed: list[scenes.SceneObject] = []
    for thing in scene.objects:
        margin = thing.half + 1
        x = float(rng.uniform(margin, max(margin + 0.01, scene.width - margin)))
        y = float(rng.uniform(margin, max(margin + 0.01, scene.height - margin)))
        placed.append(replace(thing, centre_x=x, centre_y=y))
    return replace(scene, objects=tuple(placed))


def _is_sound(scene: scenes.Scene) -> bool:
    """Objects lie inside the picture and do not touch."""
    inside = all(
        thing.half <= min(thing.centre_x, scene.width - thing.centre_x, thing.centre_y, scene.height - thing.centre_y)
        for thing in scene.objects
    )
    if len(scene.objects) == 1:
        return inside
    a, b = scene.objects
    return inside and (scenes.apart(a, b) or scenes.apart(a, b, by_box=False))


def _captions(scene: scenes.Scene) -> tuple[str, str]:
    return scenes.caption(scene), scenes.caption(scenes.mirrored(scene))


def _is_allowed(scene: scenes.Scene) -> bool:
    return not any(is_held_out(text, HELD_OUT_EMBED) for text in _captions(scene))


def draw_family(rng: np.random.Generator) -> list[scenes.Scene]:
    """A scene and its siblings, none with a held-out caption, all with different ones."""
    sides = scenes.SIDES if rng.random() < 0.05 else (96, 450)
    while True:
        family = [scenes.draw_scene(rng, 2 if rng.random() < 0.6 else 1, sides=sides)]
        changes = itertools.cycle((_other_background, _other_look, _exchanged, _moved))
        for _ in range(int(rng.integers(4))):
            next(changes)
        for _ in range(40):  # a crowded picture may have no sound siblings
            sibling = next(changes)(rng, family[0])
            captions = {scenes.caption(member) for member in family}
            if _is_sound(sibling) and _is_allowed(sibling) and scenes.caption(sibling) not in captions:
                family.append(sibling)
            if len(family) == FAMILY and _is_allowed(family[0]):
                return family


def make_sample(rng: np.random.Generator, scene: scenes.Scene) -> Sample:
    """Carry a scene through file bytes to the canvas."""
    image = scenes.render(scene)
    if rng.random() < 0.6:
        image = scenes.decode(scenes.encode(image, rng)[0])
    return Sample(to_canvas(np.asarray(image)).numpy(), _captions(scene))


BLOCK = 48
"""Families in one block, the unit of seeding."""


def make_block(seed: int, index: int) -> list[Family]:
    """Block `index` of the endless training set; depends on (seed, index) only."""
    rng = np.random.default_rng([seed, index])
    return [[make_sample(rng, scene) for scene in draw_family(rng)] for _ in range(BLOCK)]


RETURNS = (0, 5, 13)
"""Each family is used three times: when its block arrives, and so many blocks later; mirrored at random."""
FAMILIES = 8
"""Families in one batch."""


def batches(blocks: Iterator[list[Family]], seed: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Batches of one grid: canvases (FAMILIES * FAMILY, 3, h, w) uint8 and their captions."""
    rng = np.random.default_rng([seed, 1])
    waiting: dict[tuple[int, ...], list[Family]] = {}
    for due in returning(blocks, RETURNS):
        for i in rng.permutation(len(due)):
            line = waiting.setdefault(due[i][0].canvas.shape, [])
            line.append(due[i])
            if len(line) == FAMILIES:
                yield _collated(line, rng)
                line.clear()


def _collated(families: list[Family], rng: np.random.Generator) -> tuple[Tensor, list[str]]:
    canvases: list[np.ndarray] = []
    captions: list[str] = []
    for family in families:
        flip = int(rng.random() < 0.5)
        canvases += [s.canvas[..., ::-1] if flip else s.canvas for s in family]
        captions += [s.captions[flip] for s in family]
    return torch.from_numpy(np.stack(canvases)), captions


# ---- training texts --------------------------------------------------------------------------------------------------


def near_miss(rng: np.random.Generator, caption: str) -> str:
    """A caption that differs from a true one in one word, the order of its objects, or their relation."""
    facts = scenes.parse_caption(caption)
    if facts is None:
        raise ValueError("not a caption of this world")
    things, relation, background = [list(words) for words in facts.objects], facts.relation, facts.background
    match int(rng.integers(5 if relation else 2)):
        case 0:
            background = _other(rng, tuple(scenes.BACKGROUNDS), background)
        case 1 | 4:
            slot = int(rng.integers(3))
            thing = things[int(rng.integers(len(things)))]
            thing[slot] = _other(rng, (scenes.SIZES, tuple(scenes.COLOURS), scenes.SHAPES)[slot], thing[slot])
        case 2:
            things.reverse()
        case _:
            relation = _other(rng, scenes.RELATIONS, str(relation))
    said = [f"a {' '.join(words)}" for words in things]
    return f"{said[0]}{f' {relation} {said[1]}' if relation else ''} on a {background} background"


@dataclass(frozen=True)
class Phrase:
    """A looser query, and which pictures it is true of. A thing is (size, colour, shape), None where nothing is said.

    text  `red circle`, `a star on a black background`
    """

    text: str
    first: tuple[str | None, ...] | None
    relation: str | None = None
    second: tuple[str | None, ...] | None = None
    background: str | None = None

    def holds(self, facts: scenes.CaptionFacts) -> bool:
        """Whether the phrase is true of a picture."""
        if self.background is not None and self.background != facts.background:
            return False
        if self.relation is not None:
            pair = facts.relation == self.relation and len(facts.objects) == 2
            return pair and _fits(self.first, facts.objects[0]) and _fits(self.second, facts.objects[1])
        return self.first is None or any(_fits(self.first, thing) for thing in facts.objects)


def _fits(said: tuple[str | None, ...] | None, thing: tuple[str, ...]) -> bool:
    return said is None or all(word is None or word == true for word, true in zip(said, thing, strict=True))


def draw_phrase(rng: np.random.Generator, facts: scenes.CaptionFacts) -> Phrase:
    """Something shorter than the caption that is true of a picture: `red circle`, `a star on a black background`."""

    def thing(words: tuple[str, ...], keep: tuple[bool, bool, bool]) -> tuple[str | None, ...]:
        return tuple(word if kept else None for word, kept in zip(words, keep, strict=True))

    def said(words: tuple[str | None, ...]) -> str:
        return " ".join(word for word in words if word)

    article = "a " if rng.random() < 0.5 else ""
    loose = (False, True, True), (False, False, True), (False, True, False)
    one = facts.objects[int(rng.integers(len(facts.objects)))]
    kind = rng.random()
    if facts.relation and kind < 0.3:
        keep = loose[int(rng.integers(2))]
        first, second = (thing(words, keep) for words in facts.objects)
        return Phrase(f"{article}{said(first)} {facts.relation} a {said(second)}", first, facts.relation, second)
    if kind < 0.4:
        return Phrase(
            f"{'on ' if article else ''}{article}{facts.background} background", None, None, None, facts.background
        )
    if kind < 0.6:
        first = thing(one, loose[int(rng.integers(2))])
        text = (
            f"{article}{said(first)} on {'a ' if article else ''}{facts.background}{' background' if article else ''}"
        )
        return Phrase(text, first, None, None, facts.background)
    first = one if kind < 0.75 else thing(one, loose[int(rng.choice(3, p=[0.6, 0.25, 0.15]))])
    return Phrase(f"{article}{said(first)}", first)


def dressed(rng: np.random.Generator, text: str) -> str:
    """The same text as people type it: mostly unchanged, sometimes with a capital, a full stop, no first article."""
    if rng.random() < 0.75:
        return text
    if rng.random() < 0.5:
        text = text.removeprefix("a ")
    if rng.random() < 0.5:
        text = text[:1].upper() + text[1:]
    return text + (rng.random() < 0.5) * "."


# ---- training --------------------------------------------------------------------------------------------------------

LEGS = (700,)
"""Optimiser steps; 14 minutes on two cores shared with other work."""
TEMPERATURE = 0.03
"""Of mean cosines: two captions of one family differ in about half of their tokens."""


def _loss(scores: Tensor, truths: Tensor) -> Tensor:
    """Contrastive loss with any number of true pairs in a row. scores, truths (Q, B); rows without both are ignored."""
    usable = truths.any(1) & ~truths.all(1)
    scores, truths = scores[usable], truths[usable]
    return (scores.logsumexp(1) - scores.masked_fill(~truths, -math.inf).logsumexp(1)).mean()


def batch_loss(
    model: ColQwen2_5,
    tokenizer: Any,  # noqa: ANN401 - a tokenizers.Tokenizer
    prompt: Prompt,
    picked: tuple[Tensor, list[str]],
    rng: np.random.Generator,
) -> Tensor:
    """Captions find their pictures, pictures their captions among near misses, loose phrases every picture they fit."""
    canvases, captions = picked
    misses = [text for caption in captions if not is_held_out(text := near_miss(rng, caption), HELD_OUT_EMBED)]
    facts = [found for text in captions if (found := scenes.parse_caption(text))]
    phrases = [draw_phrase(rng, fact) for fact in facts[:: FAMILY // 2]]
    full = list(dict.fromkeys(captions + misses))
    texts = [dressed(rng, text) for text in full] + [phrase.text for phrase in phrases]
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    pictures = embed_pictures(model, canvases, prompt)
    vectors, mask = embed_texts(model, ids, prompt)
    scores = mean_maxsim(vectors, mask, pictures) / TEMPERATURE
    same = torch.tensor([[text == caption for caption in captions] for text in full])
    fits = torch.tensor([[phrase.holds(fact) for fact in facts] for phrase in phrases])
    n = len(full)
    by_text = _loss(scores[:n], same)
    by_picture = _loss(scores[:n].T, same.T)
    loosely = _loss(scores[n:], fits)
    return by_text + by_picture + 0.3 * loosely


def train(out: Path, *, seed: int = 0, steps: int, minutes: float | None = None) -> dict[str, Any]:
    """Train and write the checkpoint; the data depend on the seed alone.

    It starts from the describer beside `out` when there is one, else from the packaged one.

    returns  what the report needs: steps, minutes, images, seed
    """
    from sightline.tiny.training import Bar, Budget, Optimiser, drawing, rate

    describer = out.parent / DESCRIBE.name
    if not (describer / "model.safetensors").exists():
        describer = DESCRIBE
    processor = make_processor(describer)
    tokenizer = cast("Any", processor).tokenizer.backend_tokenizer
    prompt = make_prompt(processor)
    model = make_model(seed, describer)
    model.train()
    weights = [(name, weight) for name, weight in model.named_parameters() if not name.startswith("visual.")]
    optimiser = Optimiser(weights, (".layers.",), muon_rate=1e-3, adam_rate=6e-4)
    budget = Budget(steps, minutes)
    rng = np.random.default_rng([seed, 2])
    step, mean, saved = 0, 0.0, 0.0
    with drawing(partial(make_block, seed), itertools.count()) as drawn, Bar("embed", steps) as bar:
        source = batches(drawn, seed)
        while (done := budget.progress(step)) < 1.0:
            loss = batch_loss(model, tokenizer, prompt, next(source), rng)
            loss.backward()
            optimiser.step(rate(done))
            step += 1
            mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
            if budget.elapsed_minutes() - saved > 2.5:
                saved = budget.elapsed_minutes()
                save(model, processor, out)
            bar.step(loss=mean)
    model.eval()
    save(model, processor, out)
    return {
        "steps": step,
        "images": step * FAMILIES * FAMILY,
        "seed": seed,
        "minutes": round(budget.elapsed_minutes(), 1),
    }
