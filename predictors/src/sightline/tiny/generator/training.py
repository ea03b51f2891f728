"""How the generator is trained: what is asked, the aids that are thrown away afterwards, the exam on the way."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.models.kimi_vl import KimiVLForConditionalGeneration
from sightline.tiny.generator.checkpoint import make_model, make_tokenizer, save
from sightline.tiny.generator.conversations import Asked, Conversations, Turn
from sightline.tiny.generator.forward import Experts, Kept, project, see, tell
from sightline.tiny.generator.pictures import (
    BLOCK,
    LOOK_WIDTHS,
    MERGE,
    RETURNS,
    Grid,
    Pictures,
    View,
    batches,
    make_block,
)

KIND_WEIGHTS = {"caption": 1.0, "which": 4.0, "list": 0.6, "text": 1.0}
"""Of each answer token in the loss: a which-answer is short, a list of captions long."""


class Looks(nn.Module):
    """Training aid, thrown away afterwards: what is under each patch, where that object lies, how far it spans.

    And hints for which-questions: the number of the picture that each image token belongs to, and where one head of
    each layer should look. Without them the text model learned to list several pictures and not to find one among them
    (43 % of which-questions after 45 minutes, 51 % after an hour with the first hint alone).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.facts = nn.Linear(width, sum(LOOK_WIDTHS))
        self.spans = nn.Linear(width, 4)
        self.number = nn.Linear(width, 8)
        self.found = nn.Linear(width, 8)

    def count_loss(self, kept: Tensor, grids: Sequence[Grid], turns: Sequence[Turn]) -> Tensor:
        """Cross entropy of the number of the picture that each image token belongs to. kept (image tokens, D)."""
        numbers = [(n, math.prod(grids[picture])) for turn in turns for n, picture in enumerate(turn.pictures)]
        wanted = [n for n, patches in numbers for _ in range(patches // MERGE**2)]
        return F.cross_entropy(self.number(F.layer_norm(kept, kept.shape[-1:])), torch.tensor(wanted))

    @staticmethod
    def hint_loss(kept: Kept, turns: Sequence[Turn]) -> Tensor:
        """Cross entropy between where which-questions look and where they should, the mean of each layer's added up."""
        losses: dict[int, list[Tensor]] = {}
        start = 0
        for turn in turns:
            for layer, row, shares in turn.hints() if turn.kind == "which" else ():
                queries, keys = kept.heads[layer]
                scores = keys[start : start + row + 1] @ queries[start + row]
                losses.setdefault(layer, []).append(-(scores.log_softmax(0) * torch.from_numpy(shares)).sum())
            start += len(turn.ids) - 1
        return sum((torch.stack(part).mean() for part in losses.values()), torch.zeros(()))

    def found_loss(self, middle: Tensor, turns: Sequence[Turn]) -> Tensor:
        """Binary cross entropy of the numbers of the pictures that fit, as the question's last word knows them."""
        rows: list[int] = []
        wanted: list[Tensor] = []
        start = 0
        for turn in turns:
            if turn.kind == "which":
                rows.append(start + turn.asks_at)
                wanted.append(F.pad(torch.tensor(turn.found()), (0, 8 - len(turn.pictures))))
            start += len(turn.ids) - 1
        if not rows:
            return torch.zeros(())
        said = self.found(F.layer_norm(middle[torch.tensor(rows)], middle.shape[-1:]))
        return 4 * F.binary_cross_entropy_with_logits(said, torch.stack(wanted))

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
            picked = sorted(samples[start : start + 64], key=attrgetter("grid"))
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


LEGS = (3000, 4800)
"""Optimiser steps of each leg, which has fresh pictures and a learning-rate schedule of its own. The first trains all,
the second goes on with the tower as it is."""
BATCH = 16
PARTS = (Asked(12, 8, 2, 5), Asked(12, 8, 2, 5))
"""What the two batches of a step ask. Each has a thread of its own: on shared cores one join a step costs less than one
in every matrix product (1.1 s a step, not 1.2 to 1.8, at a load of 8 on two cores)."""
FIRST_PARTS = (Asked(4, 0, 0, 2), Asked(4, 0, 0, 2))
"""The same while the tower still learns to see, helped by `Looks`."""
LAST_PARTS = (Asked(8, 16, 2, 4), Asked(8, 16, 2, 4))
"""The same in a leg that goes on with the tower as it is: mostly what is left to learn, the rest so as not to be
forgotten."""
SETTLED = 60
"""First block of a resumed training: past the curriculum's single objects."""


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
    kept = Kept.nothing()
    is_frozen = not next(model.model.vision_tower.parameters()).requires_grad
    # 0.7 s of processor time a step instead of 0.9 (two cores with avx512_bf16); the weights stay float32.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        seen = see(model, pictures.patches, pictures.grids)
        logits, wanted = tell(model, project(model, seen, pictures.grids), pictures.grids, turns, experts, kept)
    weights = torch.tensor([KIND_WEIGHTS[turn.kind] for turn in turns]).repeat_interleave(
        torch.tensor([len(turn.ids) - turn.answer_at for turn in turns])
    )
    loss = (F.cross_entropy(logits.float(), wanted, reduction="none") * weights).sum() / weights.sum()
    aid = looks.count_loss(kept.tokens, pictures.grids, turns) + looks.hint_loss(kept, turns)
    aid = aid + looks.found_loss(kept.middle, turns)
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
    from sightline.tiny.training import Bar, Budget, drawing, rate

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
        drawing(partial(make_block, seed), blocks) as drawn,
        _one_thread_each(min(torch.get_num_threads(), len(PARTS))) as pool,
        Bar("generate", steps) as bar,
    ):
        source = batches(drawn, seed, BATCH)
        while (done := budget.progress(step)) < 1.0:
            jobs: list[tuple[Pictures, list[Turn]]] = []
            for asked in LAST_PARTS if resume else FIRST_PARTS if done < 0.1 else PARTS:
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
