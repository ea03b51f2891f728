"""What the trainings share: the optimiser, its schedule, the process that draws ahead and the progress bar."""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import nn
from tqdm import tqdm

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

Block = TypeVar("Block")
Part = TypeVar("Part")


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, cut short after `minutes` of wall time if that comes first."""

    steps: int
    minutes: float | None = None
    started: float = field(default_factory=time.monotonic)

    def elapsed_minutes(self) -> float:
        """Wall time since the training began."""
        return (time.monotonic() - self.started) / 60

    def progress(self, step: int) -> float:
        """Share of the budget used, 0-1. With `minutes` unset it depends on the step alone."""
        by_time = self.elapsed_minutes() / self.minutes if self.minutes else 0.0
        return min(1.0, max(step / self.steps, by_time))


def rate(progress: float, warm: float = 0.01, flat: float = 0.45) -> float:
    """Learning rate as a share of its peak: linear warm-up, constant, linear down to nothing."""
    if progress < warm:
        return max(progress / warm, 0.02)
    return 1.0 if progress < flat else max(1 - (progress - flat) / (1 - flat), 0.0)


class Optimiser:
    """Muon on the hidden matrices, AdamW on everything else, gradients clipped to norm 1.

    Muon with `match_rms_adamw` at 3e-3 and weight decay 0.05 is what worked for these sizes
    (shared/reference/engines.md, section 1b).
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        hidden: tuple[str, ...],
        muon_rate: float = 3e-3,
        adam_rate: float = 1e-3,
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, weight in named:
            (matrices if weight.ndim == 2 and any(part in name for part in hidden) else others).append(weight)
        self.weights = matrices + others
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        ]
        if matrices:
            self.parts.append(
                torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
            )
        self.peaks = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, share: float) -> None:
        """One update with the gradients at hand, at `share` of the peak learning rate."""
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for part, peak in zip(self.parts, self.peaks, strict=True):
            part.param_groups[0]["lr"] = peak * share
            part.step()
            part.zero_grad(set_to_none=True)


@contextmanager
def drawing(
    make_block: Callable[[int], Block], indices: Iterable[int], *, ahead: int = 24
) -> Generator[Iterator[Block]]:
    """Blocks of training data as a second process draws them, so many ahead of their use.

    make_block  draws block `index`; the other process imports it by name, bound arguments are pickled
    """
    context = multiprocessing.get_context("spawn")
    drawn: Queue[Block] = context.Queue(maxsize=ahead)
    worker = context.Process(target=_draw, args=(make_block, indices, drawn), daemon=True)
    worker.start()
    try:
        yield iter(drawn.get, None)
    finally:
        worker.terminate()


def returning(blocks: Iterable[list[Part]], lags: Sequence[int]) -> Iterator[list[Part]]:
    """For each block that arrives, the parts of those that arrived `lags` blocks before it; lag 0 is its own.

    So each part is used several times: drawing costs more than learning.
    """
    kept: list[list[Part]] = []
    for block in blocks:
        kept.append(block)
        yield [part for lag in lags if lag < len(kept) for part in kept[-1 - lag]]
        if len(kept) > max(lags):
            kept.pop(0)


def _draw(make_block: Callable[[int], Block], indices: Iterable[int], drawn: Queue[Block]) -> None:
    """The drawing process: one block after the other until the parent has had enough or is gone."""
    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(5)
    parent = multiprocessing.parent_process()
    for index in indices:
        block = make_block(index)
        while parent is not None and parent.is_alive():
            try:
                drawn.put(block, timeout=5)
                break
            except queue.Full:
                continue
        else:
            drawn.cancel_join_thread()  # nobody will read what is left, and this process holds a reading end itself
            return


class Bar:
    """A progress bar with rate and time left; without a terminal it writes a line every half minute."""

    def __init__(self, title: str, steps: int) -> None:
        import sys

        quiet = not sys.stderr.isatty()
        self._bar = tqdm(
            total=steps, desc=title, mininterval=30 if quiet else 0.5, dynamic_ncols=not quiet, unit="step"
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, **figures: float) -> None:
        """One step done; `figures` are shown beside the bar."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()}, refresh=False)
        self._bar.update(1)
