"""Batches that a server, or a replica of it, works on behind its requests: stored first, taken by lease, ended once.

Keys of a job, beside those of its plan and parts:

    <kind>/<id>/request.json         who asked for what               created once: the commit of submitting
    <kind>/<id>/uploads/<name>       bytes that came with it          created before request.json, deleted at the end
    <kind>/<id>/holders/lease-<n>    who works on it, until when      n-th holder; created with If-None-Match
    <kind>/<id>/CANCELLED            somebody wants it ended          created once, by any replica
    <kind>/<id>/end.json             how it ended, when it expires    created once: the commit of its end
    <kind>/<id>/<fingerprint>/…      plan, parts, done, output        see `layout`

Any replica that shares the store answers; what a killed one held goes on elsewhere when its lease ends.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sightline.errors import QueueFull
from sightline.jobs.ahead import ahead
from sightline.jobs.finish import Which, ended_of, finish, lines_of
from sightline.jobs.inputs import InputFault
from sightline.jobs.items import Counts, Fault, Item, Line
from sightline.jobs.layout import PARTS
from sightline.jobs.leases import LEASE_SECONDS, Lease, Leases, TooManyHolders
from sightline.jobs.manifest import Ended
from sightline.jobs.objects import Objects, is_id
from sightline.jobs.plan import Plan, make_plan, read_plan
from sightline.jobs.progress import Watch
from sightline.jobs.records import End, EndStatus, Job, Records
from sightline.jobs.shard import OPEN_CHUNKS, Stop, Stopped, run_shard

__all__ = ["ENDED", "Do", "ItemsOf", "Job", "Runner", "State", "Status"]

log = logging.getLogger("sightline.jobs")

Status = Literal[
    "queued",  # stored; nobody works on it yet
    "planning",
    "running",
    "finishing",
    "cancelling",
    "completed",
    "failed",
    "cancelled",
    "expired",
]
ENDED = frozenset({"completed", "failed", "cancelled", "expired"})

WATCH_SECONDS = 5.0
"""How often a holder looks whether its job was cancelled elsewhere, or taken from it."""
ORPHAN_SECONDS = 3600.0
"""What lies beside no request.json is of a client or server that left half-way."""
ASKED_AT_ONCE = 16
MAX_WATCHES = 64
"""Jobs whose counts are kept for those who ask again and again."""
UPLOAD = "upload:"


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a job.

    total    items; None until it is planned
    counts   of the items that are done, failed ones too
    error    {code, message} when it failed as a whole: its input was no good, or nobody could finish it
    times    seconds since 1970 of what has happened: created, planned, cancelling, finishing, ended
    expires  when an ended job is forgotten
    """

    job: Job
    status: Status
    total: int | None = None
    counts: Counts = field(default_factory=Counts)
    error: Mapping[str, Any] | None = None
    times: Mapping[str, float] = field(default_factory=dict[str, float])
    expires: float | None = None

    @property
    def is_ended(self) -> bool:
        return self.status in ENDED


Do = Callable[[Job, Item], Awaitable[Line]]
"""Does one item of a job. What it raises, but for cancellation, becomes the error `internal` and a line of the log."""

ItemsOf = Callable[[Job], AsyncIterator[Item]]
"""The items of a job that was submitted without. Raises `inputs.InputFault`: the job fails with its reason."""


@dataclass(slots=True)
class _Live:
    """A job that this server works on.

    cut    why it ends early: what is not done becomes this error
    items  of it that are being done
    """

    stop: Stop
    times: dict[str, float]
    status: Status = "planning"
    total: int | None = None
    done: int = 0
    cut: Ended | None = None
    items: set[asyncio.Task[Line]] = field(default_factory=set[asyncio.Task[Line]])

    def end_early(self, why: Ended) -> None:
        """What is done is kept; nothing else is begun, and what runs is cut off."""
        if self.cut is None:
            self.cut = why
            self.stop.after_chunks()
            for task in self.items:
                task.cancel()


class Runner:
    """The jobs of one kind on one server.

    objects      the store, shared by all replicas that answer for each other
    kind         folder of all its jobs, such as `batches`
    do           does one item
    items_of     items of jobs that were submitted without them
    ttl_seconds  how long an ended job can be asked for
    width        items that are worked on at a time, of all jobs together
    max_open     unfinished items that this server holds at most; more are refused with QueueFull
    clock        seconds since 1970, the same for all replicas
    """

    def __init__(
        self,
        objects: Objects,
        kind: str,
        do: Do,
        *,
        items_of: ItemsOf | None = None,
        ttl_seconds: float,
        width: int,
        max_open: int = 10_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._records = Records(objects, kind)
        self._objects = objects
        self._leases = Leases(objects, clock)
        self._kind = kind
        self._do = do
        self._items_of = items_of
        self._ttl = ttl_seconds
        self._width = width
        self._permits = asyncio.Semaphore(width)
        self._max_open = max_open
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._live: dict[str, _Live] = {}
        self._watches: dict[str, Watch] = {}
        self._expiries: dict[str, float] = {}
        self._cleaning: set[asyncio.Task[None]] = set()
        self._sweeper: asyncio.Task[None] | None = None

    # --- for those who ask -------------------------------------------------------------------------------------------

    async def submit(
        self,
        items: Sequence[Item] | None,
        *,
        principal: str,
        about: Mapping[str, Any] | None = None,
        uploads: Mapping[str, bytes] | None = None,
        window_seconds: float | None = None,
        shard_size: int = 1000,
        chunk_size: int = 50,
    ) -> Job:
        """Store a job and start it. An item's upload is `uploads[name]` where its `uri` is `upload:<name>`.

        items           None: `items_of` finds them behind the request
        window_seconds  from now until its deadline

        Raises QueueFull (429) when this server has enough to do.
        """
        waiting = sum((live.total or 0) - live.done for live in self._live.values())
        if waiting and waiting + len(items or ()) > self._max_open:
            raise QueueFull("Too many images are waiting; try again later.", retry_after=30)
        now = self._clock()
        deadline = None if window_seconds is None else now + window_seconds
        job = Job(str(uuid.uuid4()), principal, now, deadline, about or {}, shard_size, chunk_size, bool(uploads))
        async with asyncio.TaskGroup() as group:
            group.create_task(self._records.put_uploads(job.id, uploads or {}))
            planning = group.create_task(self._make_plan(job, _each(items))) if items else None
        plan = planning.result() if planning else None
        await self._records.keep(job)
        if items is not None and plan is None:  # there is nothing to do
            await self._end(job, "completed", 0, Counts(), {"planned": now})
        else:
            await self._take(job, plan)
        return job

    async def get(self, job_id: str, principal: str, *, counted: bool = True) -> State | None:
        """The state of a job; None when there is none, it has expired, or it is somebody else's.

        counted  whether the counts are wanted (they cost reading what the workers have said)
        """
        job = await self._job_of(job_id, principal)
        return None if job is None else await self._state(job, counted=counted)

    async def list(self, principal: str, *, after: str | None = None, limit: int = 20) -> Sequence[State]:
        """The jobs of a principal, newest first, those older than the job `after`."""
        found: list[Job] = []
        async for job in ahead(self._readable, await self._records.ids(), ASKED_AT_ONCE):
            if job is not None and job.principal == principal:
                found.append(job)
        found.sort(key=lambda job: (job.created, job.id), reverse=True)
        if after is not None:
            ids = [job.id for job in found]
            found = found[ids.index(after) + 1 :] if after in ids else []
        states: list[State] = []
        async for state in ahead(lambda job: self._state(job, counted=True), found, ASKED_AT_ONCE):
            if state is not None:
                states.append(state)
            if len(states) == limit:
                break
        return states

    async def cancel(self, job_id: str, principal: str | None) -> State | None:
        """End a job early, whichever replica works on it; what is done is kept, the rest ends as `batch_cancelled`.

        principal  whose it must be; None: the server itself wants it

        Returns the state, already `cancelling` unless it had ended; None as `get` does.
        """
        job = await self._job_of(job_id, principal)
        if job is None:
            return None
        state = await self._state(job, counted=True)
        if state is None or state.is_ended:
            return state
        await self._records.cancel(job_id, self._clock())
        if (live := self._live.get(job_id)) is not None:
            live.times.setdefault("cancelling", self._clock())
            live.end_early("batch_cancelled")
        elif state.status == "queued":
            await self._take(job)
        return await self._state(job, counted=True)

    async def wait(self, job_id: str, seconds: float | None = None) -> None:
        """Return when this server works on the job no longer, or `seconds` have passed."""
        if (task := self._tasks.get(job_id)) is not None:
            await asyncio.wait([task], timeout=seconds)

    async def lines(self, job_id: str, which: Which) -> AsyncGenerator[bytes]:
        """The lines (of JSON, each with its line feed) of the chunks that are committed, in the order of the items.

        Some lines at a time. Whose job it is, `get` has told before.
        """
        layout = self._records.layout(job_id)
        if (plan := await read_plan(self._objects, layout)) is not None:
            async for lines in lines_of(self._objects, layout, plan, which):
                yield lines

    async def upload(self, job: Job, item: Item) -> bytes | None:
        """The bytes that came with an item; None when it has none or they are gone."""
        if not item.uri.startswith(UPLOAD):
            return None
        return await self._records.upload(job.id, item.uri.removeprefix(UPLOAD))

    async def chunks(self, job_id: str, known: Collection[str] = ()) -> Sequence[tuple[str, bytes]]:
        """Key and bytes of the chunks that are committed and not `known` yet, in order."""
        keys = sorted(set(await self._objects.keys(self._records.layout(job_id).root + PARTS)) - set(known))
        return [chunk async for chunk in ahead(self._chunk, keys, ASKED_AT_ONCE)]

    async def _chunk(self, key: str) -> tuple[str, bytes]:
        return key, (await self._objects.fetch(key)).data

    async def _job_of(self, job_id: str, principal: str | None) -> Job | None:
        job = await self._records.job(job_id) if is_id(job_id) else None
        return job if job is not None and principal in (None, job.principal) else None

    async def _readable(self, job_id: str) -> Job | None:
        try:
            return await self._records.job(job_id)
        except (KeyError, TypeError, ValueError):
            log.warning("cannot read job %s/%s", self._kind, job_id)
            return None

    async def _state(self, job: Job, *, counted: bool) -> State | None:
        end = await self._records.end(job.id)
        times = {"created": job.created}
        if end is not None:
            if self._clock() > end.expires:
                await self._delete(job.id)
                return None
            return State(job, end.status, end.total, end.counts, end.error, times | dict(end.times), end.expires)
        if (live := self._live.get(job.id)) is not None:
            status, total, times = live.status, live.total, times | live.times
        else:
            status, total = "running" if await self._leases.exists(self._records.holders(job.id)) else "queued", None
        if status in {"queued", "running"} and (at := await self._records.cancelled_at(job.id)) is not None:
            status, times = "cancelling", times | {"cancelling": at}
        progress = await self._watch_of(job.id).look() if counted else None
        if progress is not None:
            return State(job, status, progress.total, progress.counts, None, times)
        return State(job, "planning" if counted and status == "running" else status, total, Counts(), None, times)

    def _watch_of(self, job_id: str) -> Watch:
        if job_id not in self._watches:
            while len(self._watches) >= MAX_WATCHES:
                self._watches.pop(next(iter(self._watches)))
            self._watches[job_id] = Watch(self._objects, self._records.layout(job_id))
        return self._watches[job_id]

    # --- a server's life ---------------------------------------------------------------------------------------------

    async def start(self, sweep_seconds: float = LEASE_SECONDS) -> None:
        """Take up what an earlier or another server left, now and every `sweep_seconds`."""
        await self.sweep()

        async def sweep_on() -> None:
            while True:
                await asyncio.sleep(sweep_seconds)
                try:
                    await self.sweep()
                except Exception:  # the store may be away for a while
                    log.warning("cannot look for abandoned jobs in %s", self._kind, exc_info=True)

        self._sweeper = asyncio.create_task(sweep_on())

    async def close(self, grace_seconds: float = 0) -> None:
        """Wait so long for what runs here, then stop, keeping complete chunks; the rest goes on elsewhere."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = list(self._tasks.values())
        if tasks:
            await asyncio.wait(tasks, timeout=grace_seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, *self._cleaning, return_exceptions=True)

    async def sweep(self) -> None:
        """Delete what has expired and take up what was abandoned."""
        for job_id in await self._records.ids():
            if job_id in self._tasks:
                continue
            try:
                await self._sweep_one(job_id)
            except Exception:  # one broken job must not stop the others
                log.warning("cannot read job %s/%s", self._kind, job_id, exc_info=True)

    async def _sweep_one(self, job_id: str) -> None:
        if job_id not in self._expiries and (end := await self._records.end(job_id)) is not None:
            await self._records.delete_uploads(job_id)  # whoever ended it did, or was killed before
            self._expiries[job_id] = end.expires
        if job_id in self._expiries:
            if self._clock() > self._expiries[job_id]:
                await self._delete(job_id)
        elif (job := await self._records.job(job_id)) is not None:
            await self._take(job)
        elif self._clock() > await self._records.newest(job_id) + ORPHAN_SECONDS:
            await self._records.delete(job_id)

    async def _delete(self, job_id: str) -> None:
        self._expiries.pop(job_id, None)
        self._watches.pop(job_id, None)
        await self._records.delete(job_id)

    # --- working on a job --------------------------------------------------------------------------------------------

    async def _take(self, job: Job, plan: Plan | None = None) -> None:
        """Become the holder of a job that has none, and work on it. `plan`: the job is new and this is its plan."""
        holders = self._records.holders(job.id)
        try:
            if plan is not None:
                lease = await self._leases.take_new(holders)
            else:
                lease = await self._leases.take(holders, lambda: self._records.done(job.id))
        except TooManyHolders:
            log.error("job %s/%s is given up: it has outlived everybody who worked on it", self._kind, job.id)
            await self._give_up(job)
            return
        if lease is None or job.id in self._tasks:
            return  # somebody works on it
        self._live[job.id] = _Live(Stop(), {}, total=None if plan is None else plan.items)
        task = asyncio.create_task(self._work(job, lease, plan), name=f"{self._kind}-{job.id}")
        self._tasks[job.id] = task
        task.add_done_callback(lambda task: self._forget(job.id, task))

    async def _work(self, job: Job, lease: Lease, plan: Plan | None) -> None:
        live = self._live[job.id]
        async with self._leases.held(lease):
            watching = asyncio.create_task(self._watch(job, lease, live, is_new=plan is not None))
            try:
                plan = plan or await self._planned(job)
                live.status, live.total = "running", plan.items
                live.times["planned"] = self._clock()
                counts = await self._counts_of(job, plan, live)
            except InputFault as fault:
                error = {"code": fault.reason, "message": fault.message}
                await self._end(job, "failed", None, Counts(), live.times, error)
            else:
                await self._end(job, _STATUS[ended_of(counts)], plan.items, counts, live.times)
            finally:
                watching.cancel()

    async def _watch(self, job: Job, lease: Lease, live: _Live, *, is_new: bool) -> None:
        """End a job early when its time is over or somebody wants it; leave it when somebody else holds it.

        is_new  nobody can have wanted anything yet
        """
        if is_new:
            await asyncio.sleep(self._pause(job))
        while True:
            if job.deadline is not None and self._clock() >= job.deadline:
                live.end_early("batch_expired")
            try:
                if (at := await self._records.cancelled_at(job.id)) is not None:
                    live.times.setdefault("cancelling", at)
                    live.status = "cancelling"
                    live.end_early("batch_cancelled")
                    return
                if await self._leases.is_superseded(lease):
                    log.warning("job %s/%s is worked on by another server", self._kind, job.id)
                    self._tasks[job.id].cancel()
                    return
            except Exception:  # the store may be away for a while
                log.warning("cannot look after job %s/%s", self._kind, job.id, exc_info=True)
            await asyncio.sleep(self._pause(job))

    def _pause(self, job: Job) -> float:
        """Seconds until the next look at a job."""
        left = WATCH_SECONDS if job.deadline is None else job.deadline - self._clock()
        return min(WATCH_SECONDS, left) if left > 0 else WATCH_SECONDS

    async def _planned(self, job: Job) -> Plan:
        """The plan of a job, made when there is none. Raises InputFault."""
        plan = await read_plan(self._objects, self._records.layout(job.id))
        if plan is not None:
            return plan
        if self._items_of is None:
            raise InputFault("InputNotFound", "The items of this batch are gone.")
        return await self._make_plan(job, self._items_of(job))

    async def _make_plan(self, job: Job, items: AsyncIterator[Item]) -> Plan:
        return await make_plan(self._records.page(job, self._width), self._objects, items)

    async def _counts_of(self, job: Job, plan: Plan, live: _Live) -> Counts:
        """Do all shards; of a job that ends early, list the rest as errors."""
        counts = Counts()
        for shard in range(len(plan.shards)):
            try:
                counts += await self._do_shard(job, plan, shard, live)
            except Stopped:
                break
        live.times["finishing"] = self._clock()
        if live.cut is None:
            live.status = "finishing"
            return counts
        return (await finish(self._records.page(job, self._width), self._objects, ended=live.cut)).counts

    async def _do_shard(self, job: Job, plan: Plan, shard: int, live: _Live) -> Counts:
        def count(_: Line) -> None:
            live.done += 1

        return await run_shard(
            self._records.page(job, self._width),
            plan,
            shard,
            self._objects,
            lambda item: self._do_one(job, live, item),
            width=min(self._width, plan.items),
            stop=live.stop,
            on_line=count,
            open_chunks=max(OPEN_CHUNKS, -(-self._width // job.chunk_size)),
        )

    async def _do_one(self, job: Job, live: _Live, item: Item) -> Line:
        async with self._permits:
            if live.cut is not None:
                return self._cut_off(item, live.cut)
            task = asyncio.create_task(self._done(job, item))
            live.items.add(task)
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                raise
            finally:
                live.items.discard(task)
            if task.cancelled() and live.cut is not None:
                return self._cut_off(item, live.cut)
            return task.result()

    async def _done(self, job: Job, item: Item) -> Line:
        began = self._clock()
        try:
            return await self._do(job, item)
        except Exception:
            log.exception("bug job=%s/%s item=%s", self._kind, job.id, item.custom_id)
            message = "Something went wrong on the server."
            return Line(item, fault=Fault("caption", "internal", message, first_at=began, last_at=self._clock()))

    def _cut_off(self, item: Item, why: Ended) -> Line:
        now = self._clock()
        return Line(item, fault=Fault("caption", why, _CUT_OFF[why], attempts=0, first_at=now, last_at=now))

    async def _give_up(self, job: Job) -> None:
        """End a job that nobody can finish, with what is done of it."""
        progress = await self._watch_of(job.id).look()
        error = {"code": "abandoned", "message": "This batch could not be finished."}
        total, counts = (None, Counts()) if progress is None else (progress.total, progress.counts)
        await self._end(job, "failed", total, counts, {}, error)

    async def _end(
        self,
        job: Job,
        status: EndStatus,
        total: int | None,
        counts: Counts,
        times: Mapping[str, float],
        error: Mapping[str, Any] | None = None,
    ) -> None:
        now = self._clock()
        await self._records.put_end(
            job.id, End(status, total, counts, error, dict(times) | {"ended": now}, now + self._ttl)
        )
        if job.has_uploads:
            cleaning = asyncio.create_task(self._clean_up(job))
            self._cleaning.add(cleaning)
            cleaning.add_done_callback(self._cleaning.discard)

    async def _clean_up(self, job: Job) -> None:
        """Behind the answer: nobody waits for it, and the sweep does it if not now."""
        with contextlib.suppress(Exception):
            await self._records.delete_uploads(job.id)

    def _forget(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(job_id, None)
        self._live.pop(job_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("job %s/%s could not be ended; the rest is done later", self._kind, job_id, exc_info=error)


_STATUS: Mapping[Ended | None, EndStatus] = {
    None: "completed",
    "batch_cancelled": "cancelled",
    "batch_expired": "expired",
}
_CUT_OFF: Mapping[Ended, str] = {
    "batch_cancelled": "The batch was cancelled before this item was done.",
    "batch_expired": "The time of the batch was over before this item was done.",
}


async def _each(items: Sequence[Item]) -> AsyncGenerator[Item]:
    for item in items:
        yield item
