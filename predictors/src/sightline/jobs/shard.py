"""One shard of a batch, done: every chunk that is not there yet, each created once; then `done/`.

    items ──do, `width` at a time──▶ lines ──a chunk's last one──▶ create chunk-n ──the last chunk──▶ done/shard-n

A chunk is open from its first item until it lies in the store, and two are open at most: what a kill costs. Who creates
a chunk first has done it; of whoever comes second the lines are dropped, and what lies there is counted.

Of two workers on a shard (a pod that its node has forgotten, and its successor) each sees every few seconds what the
other has stored, and does not do that again.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

import orjson

from sightline.jobs import metrics
from sightline.jobs.ahead import ahead
from sightline.jobs.finish import PartCorrupt, verified
from sightline.jobs.items import Counts, Item, Line
from sightline.jobs.layout import chunk_number, slices
from sightline.jobs.objects import Missing, Objects, StoreFault, StoreUnavailable
from sightline.jobs.page import Page
from sightline.jobs.plan import Plan, layout_of, read_shard
from sightline.jobs.reports import Part, ShardReport, Waiting

log = logging.getLogger("sightline.jobs")

T = TypeVar("T")

Do = Callable[[Item], Awaitable[Line]]
"""Does one item, for better or worse. What it raises is no item's fault and ends the shard: see `run_shard`."""

OPEN_CHUNKS = 2
"""So many chunks are begun and not yet in the store: what a kill costs is at most their items."""
CHUNKS_AHEAD = 4
"""Chunks of an earlier process that are read at once, beside the work."""
PROGRESS_SECONDS = 5.0
STORE_PATIENCE_SECONDS = 600.0
STORE_PAUSE_SECONDS = 2.0
STORE_SAID_SECONDS = 60.0
"""As long as it stays the same, a fault of the store is said so often."""
LAST_REPORT_SECONDS = 2.0


class Stop:
    """How a shard is asked to end before it is done. For one event loop; may be shared by several shards."""

    def __init__(self) -> None:
        self.is_closing = False
        self.is_ending = False
        self.grace_seconds = 0.0
        self._ending = asyncio.Event()
        self._at_once = asyncio.Event()

    def after_chunks(self) -> None:
        """Begin no other chunk; finish those that are open."""
        self.is_closing = True

    def now(self, grace_seconds: float = 0.0) -> None:
        """Feed no other item; chunks whose items are all begun get `grace_seconds` to be written. 0: none of them."""
        self.is_closing = self.is_ending = True
        self.grace_seconds = grace_seconds
        self._ending.set()
        if grace_seconds <= 0:
            self._at_once.set()

    async def ending(self) -> None:
        """Return when `now` has been called."""
        await self._ending.wait()

    async def at_once(self) -> None:
        """Return when `now` has been called without grace."""
        await self._at_once.wait()


class Stopped(Exception):
    """The shard is not done, because it was stopped. `counts`: of what lies in the store."""

    def __init__(self, counts: Counts) -> None:
        super().__init__("stopped")
        self.counts = counts


class TooManyFailures(Exception):
    """More items of this shard alone failed than the whole batch may have."""


async def run_shard(
    page: Page,
    plan: Plan,
    shard: int,
    objects: Objects,
    do: Do,
    *,
    width: int,
    stop: Stop | None = None,
    on_line: Callable[[Line], None] | None = None,
    waiting: Callable[[], Waiting] | None = None,
    store_patience_seconds: float = STORE_PATIENCE_SECONDS,
    open_chunks: int = OPEN_CHUNKS,
) -> Counts:
    """Do what is missing of a shard, and say that it is done. Returns the counts of all of it.

    objects  rooted at the batch's output location; the keys are those of `layout_of(page)`
    width    items that are worked on at once
    on_line  told every line of this process when its item is done (its chunk may still be open)
    waiting  why the worker stands still just now, for `progress/`
    store_patience_seconds  beyond the store's own, for which finished chunks wait for a store that is away or full
    open_chunks  begun and not in the store, at most; more than two where a chunk has fewer items than are done at once

    Any number of processes may do the same shard at the same time. Raises ShardCorrupt, PartCorrupt (a chunk that lies
    there is none of this shard), Stopped, TooManyFailures, what `do` raises, and the faults of the store.
    """
    layout = layout_of(page)
    if (said := await objects.read(layout.done(shard))) is not None:
        return ShardReport.from_json(said).counts
    items, keys = await asyncio.gather(read_shard(objects, layout, plan, shard), objects.keys(layout.parts(shard)))
    there = {chunk_number(key) for key in keys}
    work = _Work(page, plan, shard, objects, items, there, do)
    work.gate, work.stop, work.patience = asyncio.Semaphore(width), stop or Stop(), store_patience_seconds
    work.on_line, work.waiting = on_line or _unheard, waiting or _not_waiting
    work.most_open = open_chunks
    return await work.run()


def _unheard(_: Line) -> None:
    """For nobody who listens."""


def _not_waiting() -> Waiting:
    return ""


class _Work:
    """A shard under way. Its chunks are `there`, or open, or waiting; `parts` holds those of which all is known."""

    def __init__(
        self, page: Page, plan: Plan, shard: int, objects: Objects, items: Sequence[Item], there: set[int], do: Do
    ) -> None:
        self.shard = shard
        self.objects = objects
        self.layout = layout_of(page)
        self.chunks = slices(items, plan.chunk_size)
        self.there = there
        self.parts: dict[int, tuple[Counts, Part]] = {}
        self.open: dict[int, Counts] = {}
        self.unbegun: dict[int, int] = {}
        self.do = do
        self.gate = asyncio.Semaphore(1)
        self.stop = Stop()
        self.patience = STORE_PATIENCE_SECONDS
        self.most_open = OPEN_CHUNKS
        self.on_line: Callable[[Line], None] = _unheard
        self.waiting: Callable[[], Waiting] = _not_waiting
        self.most_failures = _most_failures(page, plan)

    @property
    def counts(self) -> Counts:
        """Of the chunks that lie in the store, as far as they have been read; in their order, so always the same."""
        return sum((self.parts[chunk][0] for chunk in sorted(self.parts)), Counts())

    async def run(self) -> Counts:
        reporting = asyncio.create_task(self._report_on())
        reading = asyncio.create_task(self._read_there(sorted(self.there)))
        try:
            await self._do_missing()
            await reading
            await self._read_there(sorted(self.there - self.parts.keys()))
            if len(self.parts) < len(self.chunks):
                raise Stopped(self.counts)
            return await self._say_done()
        except BaseException:
            reporting.cancel()
            with contextlib.suppress(StoreFault, TimeoutError):
                async with asyncio.timeout(LAST_REPORT_SECONDS):
                    await self._report(self.counts)
            raise
        finally:
            for task in (reporting, reading):
                task.cancel()
            await asyncio.gather(reporting, reading, return_exceptions=True)

    # --- chunks ------------------------------------------------------------------------------------------------------

    async def _do_missing(self) -> None:
        tasks: dict[asyncio.Task[None], int] = {}
        ending = asyncio.create_task(self.stop.ending())
        begun = 0
        try:
            while True:
                while len(tasks) < self.most_open and begun < len(self.chunks) and not self.stop.is_closing:
                    if begun not in self.there:
                        tasks[asyncio.create_task(self._do_chunk(begun))] = begun
                    begun += 1
                if not tasks:
                    return
                done, _ = await asyncio.wait({*tasks, ending}, return_when=asyncio.FIRST_COMPLETED)
                if self.stop.is_ending:
                    await self._flush(tasks)
                    return
                for task in done - {ending}:
                    del tasks[task]
                    task.result()
        finally:
            ending.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(ending, *tasks, return_exceptions=True)

    async def _flush(self, tasks: dict[asyncio.Task[None], int]) -> None:
        """Wait for the chunks whose items are all begun, as long as the grace lasts."""
        at_once = asyncio.create_task(self.stop.at_once())
        rest = {task for task, chunk in tasks.items() if not self.unbegun[chunk]}
        deadline = time.monotonic() + self.stop.grace_seconds
        while rest and not at_once.done() and (left := deadline - time.monotonic()) > 0:
            done, _ = await asyncio.wait({*rest, at_once}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            rest -= done
        at_once.cancel()

    async def _do_chunk(self, chunk: int) -> None:
        items = self.chunks[chunk]
        self.open[chunk], self.unbegun[chunk] = Counts(), len(items)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._do_item(chunk, item)) for item in items]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        await self._commit(chunk, b"".join([task.result() for task in tasks]))
        del self.open[chunk]

    async def _do_item(self, chunk: int, item: Item) -> bytes:
        async with self.gate:
            if self.stop.is_ending:
                raise asyncio.CancelledError
            self.unbegun[chunk] -= 1
            line = await self.do(item)
        self.open[chunk] += Counts.of(line)
        self.on_line(line)
        if line.fault is not None and self.most_failures is not None:
            self._check_failures(self.most_failures)
        return line.encoded()

    def _check_failures(self, most: float) -> None:
        failed = self.counts.failed + sum(counts.failed for counts in self.open.values())
        if failed > most:
            raise TooManyFailures(f"{failed} items failed in shard {self.shard}, and {most:.0f} of the batch may")

    async def _commit(self, chunk: int, data: bytes) -> None:
        """Create a chunk. If somebody else has: theirs counts, and so may other chunks of theirs."""
        key = self.layout.chunk(self.shard, chunk)
        if await self._patiently(lambda: self.objects.create(key, data)):
            metrics.CHUNKS.labels("written").inc()
            self._learn(chunk, data)
            return
        metrics.CHUNKS.labels("lost").inc()
        log.info("shard %d: chunk %d was done by another worker", self.shard, chunk)
        await self._read_there([chunk])
        await self._look_around()

    async def _look_around(self) -> None:
        """Learn what somebody else has done meanwhile: of two workers on a shard, each should do half."""
        keys = await self._patiently(lambda: self.objects.keys(self.layout.parts(self.shard)))
        news = {chunk_number(key) for key in keys} - self.there - self.parts.keys() - self.open.keys()
        self.there |= news
        await self._read_there(sorted(news))

    async def _read_there(self, chunks: Sequence[int]) -> None:
        """Count what lies there of chunks that this process did not write."""

        async def read(chunk: int) -> bytes:
            found = await self._patiently(lambda: self.objects.fetch(self.layout.chunk(self.shard, chunk)))
            return found.data

        number = iter(chunks)
        async with aclosing(ahead(read, chunks, CHUNKS_AHEAD)) as found:
            async for data in found:
                self._learn(next(number), data)

    def _learn(self, chunk: int, data: bytes) -> None:
        """Counts are always taken from the lines as they lie there, so that they are the same whoever counts."""
        items = self.chunks[chunk]
        rows = verified(data, items, self.layout.chunk(self.shard, chunk))
        counts = (Counts.of_row(row.said, item.size or 0) for row, item in zip(rows, items, strict=True))
        self.parts[chunk] = (sum(counts, Counts()), Part.of(data))

    # --- reports -----------------------------------------------------------------------------------------------------

    async def _say_done(self) -> Counts:
        counts = self.counts
        parts = tuple(self.parts[chunk][1] for chunk in range(len(self.chunks)))
        report = ShardReport(self.shard, counts, parts=parts)
        key, data = self.layout.done(self.shard), orjson.dumps(report.to_json())
        await self._patiently(lambda: self.objects.create(key, data))
        return counts

    async def _report_on(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_SECONDS)
            try:
                await self._look_around()
                await self._report(sum(self.open.values(), self.counts))
            except (StoreFault, PartCorrupt) as error:  # what is really wrong shows at the end
                log.warning("shard %d: %s", self.shard, error)

    async def _report(self, counts: Counts) -> None:
        report = ShardReport(self.shard, counts, at=time.time(), waiting=self.waiting())
        await self.objects.write(self.layout.progress(self.shard), orjson.dumps(report.to_json()))

    async def _patiently(self, call: Callable[[], Awaitable[T]]) -> T:
        """What is done is kept while the store is away or full. Missing, of a key that was listed, is the same."""
        begun = time.monotonic()
        said, said_at = "", begun
        while True:
            try:
                return await call()
            except (StoreUnavailable, Missing) as error:
                now = time.monotonic()
                if now + STORE_PAUSE_SECONDS > begun + self.patience:
                    raise
                if str(error) != said or now > said_at + STORE_SAID_SECONDS:
                    said, said_at = str(error), now
                    left = begun + self.patience - now
                    log.warning("shard %d waits, for %.0f s at most: %s", self.shard, left, error)
                await asyncio.sleep(STORE_PAUSE_SECONDS)


def _most_failures(page: Page, plan: Plan) -> float | None:
    """Items of the batch that may fail; None: all."""
    if page.max_failed_items is not None:
        return page.max_failed_items
    return None if page.max_failed_percent is None else plan.items * page.max_failed_percent / 100
