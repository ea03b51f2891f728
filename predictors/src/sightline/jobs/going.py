"""One go at a batch from a terminal: begin or find it, plan, work, finish; signals, sentences and the exit code."""

import asyncio
import contextlib
import importlib.util
import signal
from collections.abc import Callable, Coroutine, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console

from sightline.jobs.asking import RevisionMismatch, TargetRefuses
from sightline.jobs.finish import PartCorrupt
from sightline.jobs.inputs import InputFault
from sightline.jobs.laptop import (
    Batch,
    InUse,
    Laptop,
    NotFound,
    Order,
    PipelineChanged,
    Unreachable,
    ask_pipeline,
    check_pipeline,
    retry_of,
)
from sightline.jobs.manifest import Ended, Manifest
from sightline.jobs.objects import StoreFault, StoreUnavailable
from sightline.jobs.pace import TargetGone
from sightline.jobs.page import Page
from sightline.jobs.parquet import ParquetMissing
from sightline.jobs.plan import Plan, PlanCorrupt, ShardCorrupt
from sightline.jobs.screen import Screen
from sightline.jobs.shard import Stop, Stopped

T = TypeVar("T")

DONE, SOME_FAILED, WRONG = 0, 1, 2
UNUSABLE, CORRUPT, CHANGED, AWAY = 42, 43, 44, 75
INTERRUPTED, TERMINATED = 130, 143
FLUSH_SECONDS = 5.0
SHOWN_FAILURES = 5


class Refused(Exception):
    """The command asks for something that would do harm; the message says what to do instead."""


class Going:
    """What `run`, `resume`, `retry` and `cancel` have in common.

    width, attempts, timeout_seconds  of asking; they may differ from one go to the next
    """

    def __init__(
        self,
        laptop: Laptop,
        console: Console,
        *,
        api_key: str | None = None,
        width: int = 8,
        attempts: int = 3,
        timeout_seconds: float = 120.0,
    ) -> None:
        self._laptop = laptop
        self._console = console
        self._api_key = api_key
        self._width = width
        self._attempts = attempts
        self._timeout = timeout_seconds

    async def ordered(self, order: Order, *, is_anew: bool, may_overwrite: bool) -> int:
        """Begin a batch, or go on with it. Returns the exit code."""
        if is_anew:
            while await self._laptop.known(order) is not None:
                order = replace(order, number=order.number + 1)
        if order.parquet and importlib.util.find_spec("pyarrow") is None:
            raise ParquetMissing
        batch = await self._laptop.known(order)
        if batch is not None:
            return await self._on(batch, order.url)
        if Path(order.out).exists() and not may_overwrite:
            raise Refused(f"{order.out} is there and is not of this batch: choose another --out, or say --overwrite")
        pipeline = await ask_pipeline(order.url, order.kind, order.model, self._api_key)
        await self._laptop.objects.probe()
        return await self._on(await self._laptop.begin(order, pipeline), None)

    async def resumed(self, batch_id: str, url: str | None) -> int:
        """Go on with a batch. Raises NotFound."""
        batch = await self._laptop.find(batch_id)
        return await self._on(batch, url or batch.order.url)

    async def retried(
        self,
        batch_id: str,
        out: str,
        only: Literal["Failed", "Unenhanced"],
        url: str | None,
        *,
        is_anew: bool,
        may_overwrite: bool,
    ) -> int:
        """Do what a batch left once more. Raises NotFound."""
        earlier = await self._laptop.find(batch_id)
        order = retry_of(earlier, self._laptop.location, out, only)
        order = replace(order, url=url) if url else order
        return await self.ordered(order, is_anew=is_anew, may_overwrite=may_overwrite)

    async def cancelled(self, batch_id: str) -> int:
        """End a batch, also one that another process works on. Raises NotFound."""
        batch = await self._laptop.find(batch_id)
        if (manifest := await self._laptop.finished(batch)) is not None:
            self._say(f"{batch.id} was over before: {manifest.items:,} items")
            return DONE
        standing = await self._laptop.standing(batch)
        await self._laptop.cancel(batch)
        if standing.progress is None:
            self._say(f"{batch.id}: cancelled before it was planned")
            return DONE
        try:
            with self._laptop.held(batch.id):
                manifest = await self._laptop.finish(self._page(batch, None), batch, ended="batch_cancelled")
        except InUse:
            self._say(f"{batch.id}: the process that works on it will end it within seconds")
            return DONE
        self._sum_up(batch, manifest)
        return DONE

    # --- one go ------------------------------------------------------------------------------------------------------

    async def _on(self, batch: Batch, url: str | None) -> int:
        """Plan, do what is missing, finish. `url`: ask there whether the pipeline is still the same."""
        if (manifest := await self._laptop.finished(batch)) is not None:
            await self._laptop.write(batch, manifest)
            self._say(f"{batch.id} is complete; --again begins anew.")
            if news := await self._laptop.news(batch):
                more = "more" if news > 0 else "fewer"
                self._say(f"The folder has {abs(news):,} images {more} now than when it was planned.")
            return self._sum_up(batch, manifest)
        if await self._laptop.is_cancelled(batch):
            raise Refused(f"{batch.id} was cancelled: --again begins anew")
        with self._laptop.held(batch.id):
            if url is not None:
                order = batch.order
                check_pipeline(batch, await ask_pipeline(url, order.kind, order.model, self._api_key))
            page = self._page(batch, url)
            with _stoppable(self._say) as halt:
                try:
                    plan = await self._planned(page, halt)
                    self._say(f"{batch.id}: {plan.items:,} items" + _skipped(plan) + f"  →  {batch.order.out}")
                    return await self._worked(batch, page, plan, halt)
                except _Left:
                    self._say(f"Stopped. Nothing is lost: {_again(batch, self._laptop)}")
                    return halt.code or INTERRUPTED

    def _page(self, batch: Batch, url: str | None) -> Page:
        return self._laptop.page(
            batch, url=url, width=self._width, attempts=self._attempts, timeout_seconds=self._timeout
        )

    async def _planned(self, page: Page, halt: "_Halt") -> Plan:
        if not self._console.is_terminal:
            return await halt.unless(halt.asked, self._laptop.plan(page))
        with self._console.status("Looking what there is"):
            return await halt.unless(halt.asked, self._laptop.plan(page))

    async def _worked(self, batch: Batch, page: Page, plan: Plan, halt: "_Halt") -> int:
        begun = await self._laptop.begun(page, plan)
        ended: Ended | None = None
        try:
            with Screen(self._console, plan.items, done=begun.done, failed=begun.failed) as screen:
                counts = await self._laptop.run(
                    page,
                    plan,
                    stop=halt.stop,
                    api_key=self._api_key,
                    on_line=screen.line,
                    on_waiting=screen.tick,
                )
                screen.settled(counts)
        except Stopped:
            if halt.code is not None:
                kept = await self._laptop.begun(page, plan)
                self._say(f"Stopped: {kept.done:,} of {plan.items:,} are done and kept.")
                self._say(f"The same command goes on, or: {_again(batch, self._laptop)}")
                return halt.code
            ended = "batch_cancelled"
        return self._sum_up(batch, await halt.unless(halt.insisted, self._laptop.finish(page, batch, ended=ended)))

    # --- sentences ---------------------------------------------------------------------------------------------------

    def _sum_up(self, batch: Batch, manifest: Manifest) -> int:
        counts, order = manifest.counts, batch.order
        self._say(f"{counts.succeeded:,} of {manifest.items:,} done  →  {order.out}")
        if counts.unenhanced:
            self._say(f"{counts.unenhanced:,} of them could not be enhanced (enhance_error says why)")
        if manifest.sidecars:
            self._say(f"{manifest.sidecars:,} captions beside their images")
        if order.parquet:
            self._say(f"a table  →  {order.table}")
        if not counts.failed:
            return DONE
        rows = sorted(counts.failures.items(), key=lambda row: -row[1][0])[:SHOWN_FAILURES]
        kinds = ", ".join(f"{count:,} {code} (such as {sample})" for (_, code), (count, sample) in rows)
        self._say(f"{counts.failed:,} failed: {kinds}  →  {order.errors}")
        if manifest.ended is None:
            self._say(f"Once more, only these: sightline batch retry {batch.id} --out …")
        return SOME_FAILED

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def _skipped(plan: Plan) -> str:
    return f" ({plan.skipped:,} have a caption)" if plan.skipped else ""


def _again(batch: Batch, laptop: Laptop) -> str:
    store = "" if laptop.is_default else f" --store {laptop.location.url}"
    return f"sightline batch resume {batch.id}{store}"


# --- signals ---------------------------------------------------------------------------------------------------------


class _Left(Exception):
    """What was going on was left, because somebody wanted that."""


class _Halt:
    """What a person at the terminal wants.

    code      the exit code of a go that was stopped; None: nobody has
    asked     once, politely
    insisted  twice, or by SIGTERM
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.stop = Stop()
        self.code: int | None = None
        self.asked, self.insisted = asyncio.Event(), asyncio.Event()
        self._say = say

    def interrupt(self) -> None:
        """Ctrl-C: once, what is open is finished; twice, it is left."""
        if self.code is None:
            self.code = INTERRUPTED
            self.asked.set()
            self.stop.after_chunks()
            self._say("Finishing what is open; Ctrl-C again leaves it.")
        else:
            self.insisted.set()
            self.stop.now()

    def terminate(self) -> None:
        """SIGTERM: what can be kept in seconds is kept."""
        self.code = TERMINATED
        self.asked.set()
        self.insisted.set()
        self.stop.now(FLUSH_SECONDS)

    async def unless(self, event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
        """The result of some work that may be left at any time. Raises _Left when the event comes first."""
        task, waiting = asyncio.create_task(work), asyncio.create_task(event.wait())
        try:
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Left
            return task.result()
        finally:
            for one in (task, waiting):
                one.cancel()
            await asyncio.gather(task, waiting, return_exceptions=True)


@contextlib.contextmanager
def _stoppable(say: Callable[[str], None]) -> Generator[_Halt]:
    """Signals end a go in good order while the block lasts."""
    loop, halt = asyncio.get_running_loop(), _Halt(say)
    loop.add_signal_handler(signal.SIGINT, halt.interrupt)
    loop.add_signal_handler(signal.SIGTERM, halt.terminate)
    try:
        yield halt
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        loop.remove_signal_handler(signal.SIGTERM)


# --- exit codes ------------------------------------------------------------------------------------------------------

_CODES: tuple[tuple[type[Exception], int], ...] = (
    (InputFault, UNUSABLE),
    (PlanCorrupt, UNUSABLE),
    (TargetRefuses, UNUSABLE),
    (ShardCorrupt, CORRUPT),
    (PartCorrupt, CORRUPT),
    (RevisionMismatch, CHANGED),
    (PipelineChanged, CHANGED),
    (TargetGone, AWAY),
    (Unreachable, AWAY),
    (StoreUnavailable, AWAY),
    (StoreFault, UNUSABLE),
    (InUse, WRONG),
    (NotFound, WRONG),
    (Refused, WRONG),
    (ParquetMissing, WRONG),
    (ValueError, WRONG),
)


async def code_of(work: Coroutine[Any, Any, int], console: Console) -> int:
    """The exit code of some work; its faults become a sentence."""
    try:
        return await work
    except tuple(kind for kind, _ in _CODES) as error:
        console.print(f"sightline: {error}", highlight=False, soft_wrap=True, markup=False)
        return next(code for kind, code in _CODES if isinstance(error, kind))
