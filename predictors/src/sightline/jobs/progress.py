"""How far a batch is, from what lies in its store; how fast it goes and when it will end."""

import asyncio
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson

from sightline.jobs.ahead import ahead
from sightline.jobs.items import Counts
from sightline.jobs.layout import DONE, MANIFEST, PROGRESS, Layout, shard_number
from sightline.jobs.manifest import Manifest
from sightline.jobs.objects import Objects
from sightline.jobs.plan import Plan, read_plan
from sightline.jobs.reports import MAX_FAILURES, ShardReport, Waiting

log = logging.getLogger("sightline.jobs")

REPORTS_AHEAD = 16
FRESH_SECONDS = 60.0
"""A report this much older than the newest is of a worker that is gone: why it waited says nothing any more."""

SMOOTHED_SECONDS = 300.0
STALLED_SECONDS = 600.0
WARM_SECONDS, WARM_SHARE = 120.0, 0.01
"""There is an estimate after so long, or when so much is done: before, it would be a guess."""


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

    @property
    def done(self) -> int:
        return self.counts.done

    def to_json(self) -> dict[str, Any]:
        """`{done, total, succeeded, failed, unenhanced, bytes, usage, failures, shards, plan, waiting, outputs}`."""
        counts = self.counts.to_json()
        said: dict[str, Any] = {
            "done": self.done,
            "total": self.total,
            **counts,
            "failures": counts["failures"][:MAX_FAILURES],
            "shards": {"total": self.shards, "completed": self.shards_completed},
            "plan": {
                "shards": self.shards,
                "items": self.total,
                "fingerprint": self.fingerprint,
                "bytes": self.size_bytes,
            },
            "waiting": self.waiting,
        }
        return said | ({"outputs": dict(self.outputs)} if self.outputs else {})


def final(manifest: Manifest, plan: Plan, root_url: str) -> Progress:
    """Of a finished batch.

    root_url   what the keys of its outputs stand behind: `s3://bucket/prefix/<uid>/<fingerprint>/`
    """
    made = {name: root_url + output.key for name, output in manifest.outputs.items()}
    return Progress(
        manifest.items,
        manifest.counts,
        len(manifest.parts),
        len(manifest.parts),
        manifest.fingerprint,
        plan.size_bytes,
        outputs={"manifest": root_url + MANIFEST, **made},
    )


# --- looking ---------------------------------------------------------------------------------------------------------


class Watch:
    """Reads one batch again and again; what never changes is read once.

    root_url   of the batch, for telling where its outputs are; empty: their keys are told
    """

    def __init__(self, objects: Objects, layout: Layout, root_url: str = "") -> None:
        self._objects = objects
        self._layout = layout
        self._root_url = root_url or layout.root
        self._plan: Plan | None = None
        self._final: Progress | None = None
        self._finished: set[int] = set()
        self._counts = Counts()
        self._reading = asyncio.Lock()

    async def look(self) -> Progress | None:
        """Where it stands now; None while it has no plan. Raises the faults of the store."""
        async with self._reading:  # two at once would count a shard twice
            if self._final is None:
                self._plan = self._plan or await read_plan(self._objects, self._layout)
                if self._plan is None:
                    return None
                said = await self._objects.read(self._layout.manifest)
                if said is None:
                    return await self._unfinished(self._plan)
                self._final = final(Manifest.from_json(said), self._plan, self._root_url)
            return self._final

    async def _unfinished(self, plan: Plan) -> Progress:
        # In this order, a shard that is finished meanwhile is counted by one of the two.
        going = await self._numbers(PROGRESS)
        finished = await self._numbers(DONE)
        for report in await self._reports([self._layout.done(n) for n in sorted(finished - self._finished)]):
            self._finished.add(report.shard)
            self._counts += report.counts
        reports = await self._reports([self._layout.progress(n) for n in sorted(going - self._finished)])
        counts = sum((report.counts for report in reports), self._counts)
        return Progress(
            plan.items,
            counts,
            len(plan.shards),
            len(self._finished),
            plan.fingerprint,
            plan.size_bytes,
            waiting_of(reports),
        )

    async def _numbers(self, folder: str) -> set[int]:
        return set(_numbers(await self._objects.keys(self._layout.root + folder)))

    async def _reports(self, keys: Sequence[str]) -> list[ShardReport]:
        """What workers said. What cannot be read says nothing: it is advice, and nobody depends on it."""
        found: list[ShardReport] = []
        async with aclosing(ahead(self._objects.read_bytes, keys, REPORTS_AHEAD)) as reports:
            async for data in reports:
                try:
                    found.append(ShardReport.from_json(orjson.loads(data or b"")))
                except (ValueError, KeyError, TypeError):
                    log.warning("a report cannot be read below %s", self._layout.root)
        return found


async def progress_of(objects: Objects, layout: Layout, root_url: str = "") -> Progress | None:
    """Where a batch stands now, read once; None while it has no plan."""
    return await Watch(objects, layout, root_url).look()


def waiting_of(reports: Sequence[ShardReport]) -> Waiting:
    """Why all workers stand still; nothing when one of them does not, or none is there."""
    newest = max((report.at for report in reports), default=0.0)
    reasons = {report.waiting for report in reports if report.at >= newest - FRESH_SECONDS}
    if "" in reasons or not reasons:
        return ""
    return "BackendUnavailable" if "BackendUnavailable" in reasons else "Throttled"


def _numbers(keys: Iterable[str]) -> Iterable[int]:
    for key in keys:
        try:
            yield shard_number(key)
        except ValueError:  # a stranger's
            continue


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Meter:
    """Items per second and what is left, from times at which somebody counted. Pure: `meter = meter.at(seconds, done)`.

    The rate is a mean over the last five minutes or so, recent ones weighing more; items that were done before the
    first count do not count. A count that goes back (a worker was killed with chunks open) is taken for no progress
    until it has caught up.

    began, seconds   of the first and the last count, on any clock that does not go back
    first, done      what was counted then
    moved            when there was last more than before
    smoothed, weight sum of rates, each times its weight, and sum of the weights
    """

    began: float = math.nan
    seconds: float = math.nan
    first: int = 0
    done: int = 0
    moved: float = math.nan
    smoothed: float = 0.0
    weight: float = 0.0

    def at(self, seconds: float, done: int) -> "Meter":
        if math.isnan(self.began):
            return Meter(seconds, seconds, done, done, seconds)
        passed = seconds - self.seconds
        if passed <= 0:
            return self
        more = max(0, done - self.done)
        fresh = 1 - math.exp(-passed / SMOOTHED_SECONDS)
        return replace(
            self,
            seconds=seconds,
            done=self.done + more,
            moved=seconds if more else self.moved,
            smoothed=self.smoothed * (1 - fresh) + more / passed * fresh,
            weight=self.weight * (1 - fresh) + fresh,
        )

    @property
    def is_stalled(self) -> bool:
        """Whether nothing has moved for ten minutes."""
        return self.seconds - self.moved > STALLED_SECONDS

    @property
    def rate(self) -> float | None:
        """Items per second; None when there is nothing to tell it from, and when nothing moved for ten minutes."""
        return None if self.weight == 0 or self.is_stalled else self.smoothed / self.weight

    def eta_seconds(self, total: int) -> float | None:
        """Seconds until `total` items are done, at this rate; None when there is none, or it is too early to say."""
        left = total - self.done
        if left <= 0:
            return 0.0
        is_warm = self.seconds - self.began >= WARM_SECONDS or self.done - self.first >= WARM_SHARE * total
        return left / self.rate if is_warm and self.rate else None
