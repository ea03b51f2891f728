"""`GET /internal/batches/{uid}/progress`: how far a batch is, for the operator, which has no right to read the store.

Open without a key: the operator may read no Secret, so it has none. What is told are counts, of a batch that the caller
names by its unguessable uid, its fingerprint and its place; no id, key, caption or message of an item.
"""

import asyncio
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query
from prometheus_client import Gauge, Histogram
from pydantic import BaseModel

from sightline.errors import BadRequest, InternalError, NotFound, SightlineError, Unavailable
from sightline.jobs.layout import Layout
from sightline.jobs.objects import Objects, StoreFault, in_thread, is_id
from sightline.jobs.page import FINGERPRINT_DIGITS, Location
from sightline.jobs.plan import PlanCorrupt
from sightline.jobs.progress import Progress, Watch
from sightline.jobs.stores import open_location
from sightline.services.base import Json
from sightline.settings import PipelineSettings

log = logging.getLogger("sightline.jobs")

FRESH_SECONDS = 10.0
PATIENCE_SECONDS = 2.0
"""The operator gives up after three; counting goes on, and the next one who asks is told."""
STORE_SECONDS = 10.0
WATCHED = 64
COUNTING_AT_ONCE = 4

ITEMS = Gauge("sightline_batch_watched_items", "Items of the batches that are asked for, by state.", ["batch", "state"])
COUNT_SECONDS = Histogram(
    "sightline_batch_count_seconds",
    "Reading from the store how far a batch is.",
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
_STATES = ("succeeded", "failed", "remaining")

Key = tuple[str, str, str]
"""uid, fingerprint, output."""


class FailureAnswer(BaseModel):
    step: str
    code: str
    count: int


class ShardsAnswer(BaseModel):
    total: int
    completed: int


class UsageAnswer(BaseModel):
    promptTokens: int
    completionTokens: int


class PlanAnswer(BaseModel):
    shards: int
    items: int
    fingerprint: str
    bytes: int


class ProgressAnswer(BaseModel):
    """Counts of one batch; `outputs` once it is finished."""

    done: int
    total: int
    succeeded: int
    failed: int
    unenhanced: int
    bytes: int
    usage: UsageAnswer
    failures: list[FailureAnswer]
    shards: ShardsAnswer
    plan: PlanAnswer
    waiting: Literal["", "BackendUnavailable", "Throttled"]
    outputs: dict[str, str] | None = None


def add_progress(router: APIRouter, settings: PipelineSettings) -> None:
    """Add the route to a gateway's own."""
    watches = Watches(settings)

    @router.get(
        "/internal/batches/{uid}/progress",
        summary="How far a batch is",
        response_model=ProgressAnswer,
        response_model_exclude_none=True,
    )
    async def progress(  # pyright: ignore[reportUnusedFunction]
        uid: Annotated[str, Path(description="Of the VisionBatch, or of the batch as it was made.")],
        fingerprint: Annotated[str, Query(description="Of the batch: 12 hexadecimal digits.")],
        output: Annotated[str, Query(description="Where it writes: s3://bucket/prefix of the gateway's own bucket.")],
    ) -> Json:
        found = await watches.progress(uid, fingerprint, output)
        if found is None:
            raise NotFound("There is no such batch, or it is not planned yet.", code="batch_not_found")
        return found.to_json()


@dataclass(slots=True)
class _Watched:
    """One batch that somebody asks for."""

    watch: Watch | None = None
    known: Progress | None = None
    fault: SightlineError | None = None
    at: float = float("-inf")
    counting: asyncio.Task[None] | None = None


class Watches:
    """The batches that are asked for, each read from the store at most every ten seconds, whoever asks how often.

    settings  whose buckets, named without wildcards, are the gateway's own
    """

    def __init__(self, settings: PipelineSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._watched: OrderedDict[Key, _Watched] = OrderedDict()
        self._turns = asyncio.Semaphore(COUNTING_AT_ONCE)

    async def progress(self, uid: str, fingerprint: str, output: str) -> Progress | None:
        """What was last counted, at most ten seconds ago, or older when the store is slow; None without a plan.

        Raises BadRequest (400) and Unavailable (503).
        """
        self._check(uid, fingerprint, output)
        one = self._of((uid, fingerprint, output))
        if self._clock() - one.at >= FRESH_SECONDS:
            if one.counting is None:
                one.counting = asyncio.create_task(self._count((uid, fingerprint, output), one))
            await asyncio.wait([one.counting], timeout=PATIENCE_SECONDS)
        if one.known is None and one.fault is not None:
            raise one.fault
        if one.known is None and one.counting is not None:
            raise Unavailable("The batch is still being counted.", code="batch_counting", retry_after=5)
        return one.known

    def _check(self, uid: str, fingerprint: str, output: str) -> None:
        if not (is_id(uid) and _FINGERPRINT.fullmatch(fingerprint) and (place := _OUTPUT.fullmatch(output))):
            raise BadRequest("uid, fingerprint or output is not that of a batch.", code="batch_invalid")
        if place["bucket"] not in self._settings.s3_buckets:
            raise BadRequest("This gateway has no such bucket.", code="s3_bucket_not_allowed")

    def _of(self, key: Key) -> _Watched:
        one = self._watched.setdefault(key, _Watched())
        self._watched.move_to_end(key)
        while len(self._watched) > WATCHED:
            (uid, _, _), old = self._watched.popitem(last=False)
            if old.known is not None and all(uid != other for other, _, _ in self._watched):
                for state in _STATES:
                    ITEMS.remove(uid, state)
        return one

    async def _count(self, key: Key, one: _Watched) -> None:
        uid, fingerprint, output = key
        try:
            async with self._turns:
                with COUNT_SECONDS.time():
                    one.watch = one.watch or await self._opened(uid, fingerprint, output)
                    one.known, one.fault = await one.watch.look(), None
        except (StoreFault, PlanCorrupt, ValueError) as error:
            # What was counted before stays: a store that is away for a while takes back nothing.
            log.warning("cannot count batch=%s", uid, exc_info=error)
            one.fault = Unavailable("The batch's store cannot be read.", code="storage_unavailable", retry_after=10)
        except Exception:
            log.exception("bug batch=%s", uid)
            one.fault = InternalError("Something went wrong on the server.")
        finally:
            one.at, one.counting = self._clock(), None
        if one.known is not None and key in self._watched:
            _tell(uid, one.known)

    async def _opened(self, uid: str, fingerprint: str, output: str) -> Watch:
        settings = self._settings
        place = Location(output, settings.s3_endpoint_url, settings.aws_region, settings.s3_path_style)
        objects: Objects = await in_thread(open_location, place, patience_seconds=STORE_SECONDS)
        layout = Layout.of("", uid, fingerprint)
        return Watch(objects, layout, f"{output.rstrip('/')}/{layout.root}")


_FINGERPRINT = re.compile(rf"[0-9a-f]{{{FINGERPRINT_DIGITS}}}")
_OUTPUT = re.compile(r"s3://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9])(/[^\x00-\x1f\x7f]{0,512})?")


def _tell(uid: str, progress: Progress) -> None:
    counts = progress.counts
    for state, items in zip(_STATES, (counts.succeeded, counts.failed, progress.total - counts.done), strict=True):
        ITEMS.labels(uid, state).set(items)
