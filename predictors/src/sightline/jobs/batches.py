"""Batches of items that are worked on behind a request, over an object store: what is done of one can always be asked.

Keys of a batch, each written once (a lease is written over by its one holder):

    uploads/<id>/<index>         the uploaded bytes of an item     created before request.json, deleted at the end
    batches/<id>/request.json    the items and who asked           created before the id is given away
    batches/<id>/lease-<n>       who works on it, and until when   n-th holder; created with If-None-Match
    batches/<id>/part-<n>        results of some items             the log; created with If-None-Match
    batches/<id>/result.json     all results, the end of it        created with If-None-Match

Whoever writes part n has read all parts before it, and of two who try, one fails and reads on. So an item's result is
decided by the first part that holds it, once, whoever works on the batch; a killed server loses what it had open and
what it did in the last half second, and another goes on when its lease ends.
"""

import asyncio
import contextlib
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import orjson
from obstore.store import ObjectStore

from sightline.errors import QueueFull
from sightline.jobs.objects import LEASE_SECONDS, Leases, Objects, TooManyHolders, is_id

log = logging.getLogger("sightline.jobs")

Status = Literal["in_progress", "completed", "failed"]
"""Contract E5. An item that failed does not fail its batch."""

Result = Mapping[str, Any]
"""What became of an item, as JSON; `error` in it means that it failed."""

Execute = Callable[[Mapping[str, Any], bytes | None], Awaitable[Result]]
"""Does one item: its request and upload in, its result out. Must not raise but for cancellation."""

PART_ITEMS = 16
PART_SECONDS = 0.5
"""A part is written when it holds so many results, or when its first has waited for so long."""
UPLOADS_AT_ONCE = 8
ORPHAN_SECONDS = 3600.0
"""Uploads without a request are those of a client or server that left half-way."""
KNOWN_BATCHES = 32


@dataclass(frozen=True, slots=True)
class BatchState:
    """What is known of a batch.

    results  of the items that are done, by index
    error    {code, message} when the batch as a whole failed
    """

    id: str
    status: Status
    total: int
    results: Mapping[int, Result]
    error: Mapping[str, Any] | None = None

    @property
    def failed(self) -> int:
        """How many items failed."""
        return sum("error" in result for result in self.results.values())


@dataclass(slots=True)
class _Log:
    """The parts of a batch that this server has read. Parts never change, so it only grows."""

    results: dict[int, Result] = field(default_factory=dict[int, Result])
    parts: int = 0
    writer: str = ""

    def add(self, number: int, part: Mapping[str, Any]) -> None:
        if number != self.parts:  # another task of ours has read it meanwhile
            return
        for index, result in part["results"]:
            self.results.setdefault(int(index), result)
        self.parts += 1
        self.writer = part["lease"]


class _Superseded(Exception):
    """Somebody else holds the batch now: this server was away for longer than its lease."""


class Batches:
    """The batches of one server.

    store        shared by all replicas that answer for each other
    execute      does one item
    ttl_seconds  how long a finished batch can be asked for
    width        items that are worked on at a time, of all batches together
    max_open     unfinished items that this server holds at most; more are refused with 429
    """

    def __init__(
        self,
        store: ObjectStore,
        execute: Execute,
        *,
        ttl_seconds: float,
        width: int,
        max_open: int = 10_000,
        part_seconds: float = PART_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._objects = Objects(store)
        self._leases = Leases(self._objects, clock)
        self._execute = execute
        self._ttl = ttl_seconds
        self._width = width
        self._permits = asyncio.Semaphore(width)
        self._max_open = max_open
        self._part_seconds = part_seconds
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._open: dict[str, int] = {}
        self._logs: OrderedDict[str, _Log] = OrderedDict()
        self._ends: dict[str, float] = {}
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, sweep_seconds: float = LEASE_SECONDS) -> None:
        """Take up what an earlier or another server left, now and every `sweep_seconds`."""
        await self.sweep()

        async def sweep_on() -> None:
            while True:
                await asyncio.sleep(sweep_seconds)
                try:
                    await self.sweep()
                except Exception:  # the store may be away for a while
                    log.warning("cannot look for abandoned batches", exc_info=True)

        self._sweeper = asyncio.create_task(sweep_on())

    async def close(self) -> None:
        """Stop at once, keeping what is done; the rest goes on elsewhere, or here after a restart."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, items: Sequence[Mapping[str, Any]], uploads: Mapping[int, bytes], principal: str) -> str:
        """Store a batch and start it. Its id cannot be guessed and is answered to the same principal only.

        uploads  bytes of the items that have some, by index

        Raises QueueFull (429) when this server has enough to do.
        """
        waiting = sum(self._open.values())
        if waiting and waiting + len(items) > self._max_open:
            raise QueueFull("Too many images are waiting; try again later.", retry_after=30)
        batch_id = str(uuid.uuid4())
        permits = asyncio.Semaphore(UPLOADS_AT_ONCE)

        async def keep(index: int, data: bytes) -> None:
            async with permits:
                await self._objects.create(f"uploads/{batch_id}/{index}", data)

        async with asyncio.TaskGroup() as group:
            for index, data in uploads.items():
                group.create_task(keep(index, data))
        body = {"items": items, "uploads": sorted(uploads), "principal": principal, "created": self._clock()}
        await self._objects.create(f"batches/{batch_id}/request.json", orjson.dumps(body))
        await self._take(batch_id, body)
        return batch_id

    async def get(self, batch_id: str, principal: str) -> BatchState | None:
        """The state of a batch; None when there is none, it has expired, or it is somebody else's."""
        if not is_id(batch_id):
            return None
        body = await self._objects.read(f"batches/{batch_id}/request.json")
        if body is None or body["principal"] != principal:
            return None
        total = len(body["items"])
        end = await self._objects.read(f"batches/{batch_id}/result.json")
        if end is None:
            known = await self._read_log(batch_id)
            return BatchState(batch_id, "in_progress", total, dict(sorted(known.results.items())))
        if self._clock() > end["expires"]:
            await self._delete(batch_id)
            return None
        error = end.get("error")
        status: Status = "completed" if error is None else "failed"
        return BatchState(batch_id, status, total, {int(index): result for index, result in end["results"]}, error)

    async def wait(self, batch_id: str) -> None:
        """Return when this server works on the batch no longer."""
        if (task := self._tasks.get(batch_id)) is not None:
            await asyncio.wait([task])

    async def sweep(self) -> None:
        """Delete what has expired and take up what was abandoned."""
        batches: dict[str, set[str]] = {}
        for path in await self._objects.keys("batches/"):
            if path.count("/") == 2:
                _, batch_id, key = path.split("/")
                batches.setdefault(batch_id, set()).add(key)
        for batch_id, keys in batches.items():
            try:
                await self._sweep_one(batch_id, keys)
            except Exception:  # one broken batch must not stop the others
                log.warning("cannot read batch %s", batch_id, exc_info=True)
        for batch_id in await self._objects.folders("uploads/"):
            if await self._are_useless(batch_id, batches.get(batch_id, set())):
                await self._objects.delete(f"uploads/{batch_id}/")

    async def _are_useless(self, batch_id: str, keys: set[str]) -> bool:
        """Whether nobody will read the uploads of a batch any more."""
        if "request.json" in keys:
            return (
                "result.json" in keys and batch_id not in self._tasks
            )  # whoever ended it deletes them now, or did not
        return self._clock() > await self._objects.newest(f"uploads/{batch_id}/") + ORPHAN_SECONDS

    async def _sweep_one(self, batch_id: str, keys: set[str]) -> None:
        if "result.json" in keys:
            if batch_id not in self._ends:
                end = await self._objects.read(f"batches/{batch_id}/result.json")
                self._ends[batch_id] = self._clock() if end is None else float(end["expires"])
            if self._clock() > self._ends[batch_id]:
                await self._delete(batch_id)
        elif "request.json" in keys and batch_id not in self._tasks:
            body = await self._objects.read(f"batches/{batch_id}/request.json")
            if body is not None:
                await self._take(batch_id, body)

    async def _take(self, batch_id: str, body: Mapping[str, Any]) -> None:
        """Become the holder of a batch that has none, and work on it."""
        try:
            lease = await self._leases.take(f"batches/{batch_id}")
        except TooManyHolders:
            log.error("batch %s is given up: it has outlived everybody who worked on it", batch_id)
            fault = {"code": "batch_abandoned", "message": "This batch could not be finished."}
            await self._end(batch_id, await self._read_log(batch_id), fault)
            return
        if lease is None:
            return  # somebody works on it
        self._open[batch_id] = len(body["items"])
        task = asyncio.create_task(self._work(batch_id, body, lease), name=f"batch-{batch_id}")
        self._tasks[batch_id] = task
        task.add_done_callback(lambda task: self._forget(batch_id, task))

    async def _work(self, batch_id: str, body: Mapping[str, Any], lease: str) -> None:
        async with self._leases.held(lease):
            known = await self._read_log(batch_id)
            try:
                await self._do_rest(batch_id, body, known, lease)
            except _Superseded:
                log.warning("batch %s is worked on by another server", batch_id)
                return
            await self._end(batch_id, known)

    async def _do_rest(self, batch_id: str, body: Mapping[str, Any], known: _Log, lease: str) -> None:
        """Do the items that are not in the log, `width` at a time, and add their results to it."""
        loop = asyncio.get_running_loop()
        waiting = iter([index for index in range(len(body["items"])) if index not in known.results])
        running: dict[asyncio.Task[Result], int] = {}
        fresh: dict[int, Result] = {}
        due = 0.0
        try:
            while True:
                for index in islice(waiting, self._width - len(running)):
                    running[asyncio.create_task(self._do_one(batch_id, body, index))] = index
                # The next items have begun before results are written, so that the model need not wait for the store.
                if fresh and (not running or len(fresh) >= PART_ITEMS or loop.time() >= due):
                    await self._append(batch_id, known, fresh, lease)
                    self._open[batch_id] = len(body["items"]) - len(known.results)
                    fresh = {}
                if not running:
                    return
                patience = max(0.0, due - loop.time()) if fresh else None
                done, _ = await asyncio.wait(running, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                if done and not fresh:
                    due = loop.time() + self._part_seconds
                fresh |= {running.pop(task): task.result() for task in done}
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            ended = [task for task in running if not task.cancelled() and task.exception() is None]
            fresh |= {running[task]: task.result() for task in ended}
            if fresh:  # stopped: what is done need not be done again
                with contextlib.suppress(Exception):
                    await self._append(batch_id, known, fresh, lease)

    async def _do_one(self, batch_id: str, body: Mapping[str, Any], index: int) -> Result:
        async with self._permits:
            data: bytes | None = None
            if index in body["uploads"]:
                data = await self._objects.read_bytes(f"uploads/{batch_id}/{index}")
                if data is None:
                    return {"error": "The uploaded image is gone.", "code": "upload_lost"}
            try:
                return await self._execute(body["items"][index], data)
            except Exception:
                log.exception("bug batch=%s item=%d", batch_id, index)
                return {"error": "Something went wrong on the server.", "code": "internal_error"}

    async def _append(self, batch_id: str, known: _Log, fresh: Mapping[int, Result], lease: str) -> None:
        """Add results to the log, unless they are there. Raises _Superseded when another holder writes it now."""
        while rest := [(index, result) for index, result in fresh.items() if index not in known.results]:
            number = known.parts
            part = {"lease": lease, "results": rest}
            if await self._objects.create(f"batches/{batch_id}/part-{number}", orjson.dumps(part)):
                known.add(number, part)
                return
            await self._catch_up(batch_id, known)
            if known.writer != lease:
                raise _Superseded

    async def _read_log(self, batch_id: str) -> _Log:
        known = self._logs.setdefault(batch_id, _Log())
        self._logs.move_to_end(batch_id)
        while len(self._logs) > KNOWN_BATCHES:
            self._logs.popitem(last=False)
        await self._catch_up(batch_id, known)
        return known

    async def _catch_up(self, batch_id: str, known: _Log) -> None:
        """Read the parts that were written since."""
        while True:
            number = known.parts
            part = await self._objects.read(f"batches/{batch_id}/part-{number}")
            if part is None:
                return
            known.add(number, part)

    async def _end(self, batch_id: str, known: _Log, error: Mapping[str, Any] | None = None) -> None:
        end = {"results": sorted(known.results.items()), "error": error, "expires": self._clock() + self._ttl}
        await self._objects.create(f"batches/{batch_id}/result.json", orjson.dumps(end))
        with contextlib.suppress(Exception):  # they go with the batch if not now
            await self._objects.delete(f"uploads/{batch_id}/")

    async def _delete(self, batch_id: str) -> None:
        await self._objects.delete(f"batches/{batch_id}/", first=f"batches/{batch_id}/request.json")
        await self._objects.delete(f"uploads/{batch_id}/")
        self._ends.pop(batch_id, None)
        self._logs.pop(batch_id, None)

    def _forget(self, batch_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(batch_id, None)
        self._open.pop(batch_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("batch %s could not be ended; the rest is done when its lease ends", batch_id, exc_info=error)
