"""How far a batch is, from what lies in its store; how fast it goes and when it will end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sightline.jobs.items import Counts
from sightline.jobs.layout import Layout
from sightline.jobs.objects import Objects
from sightline.jobs.reports import Waiting


@dataclass(frozen=True, slots=True)
class Progress:
    """What is done, in the operator's words (its `contract.Progress`).

    total     items of the plan
    counts    of finished shards, and of others as their workers last said
    outputs   where the manifest and the joined lines are, once the batch is finished
    """

    total: int
    counts: Counts
    shards: int
    shards_completed: int
    fingerprint: str = ""
    size_bytes: int = 0
    waiting: Waiting = ""
    outputs: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """`{done, total, succeeded, failed, unenhanced, bytes, usage, failures, shards, plan, waiting, outputs}`."""
        raise NotImplementedError


class Watch:
    """Reads one batch again and again; what never changes is read once."""

    def __init__(self, objects: Objects, layout: Layout) -> None:
        raise NotImplementedError

    async def look(self) -> Progress | None:
        """Where it stands now; None while it has no plan."""
        raise NotImplementedError


async def progress_of(objects: Objects, layout: Layout) -> Progress | None:
    """Where a batch stands now, read once; None while it has no plan."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Meter:
    """Items per second and what is left, from times at which somebody counted. Pure: `meter = meter.at(seconds, done)`.

    The rate is a mean over the last five minutes or so, recent ones weighing more; items that were done before the
    first count do not count.
    """

    def at(self, seconds: float, done: int) -> Meter:
        raise NotImplementedError

    @property
    def rate(self) -> float | None:
        """Items per second; None when there is nothing to tell it from, and when nothing moved for ten minutes."""
        raise NotImplementedError

    def eta_seconds(self, total: int) -> float | None:
        """Seconds until `total` items are done, at this rate; None when there is none."""
        raise NotImplementedError
