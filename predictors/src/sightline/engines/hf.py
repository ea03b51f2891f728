"""One thread owns the device; requests join the rows that run between two tokens, and leave when they are answered.

No request waits for company: an idle thread takes what is there. While rows run, those that wait are read together once
their waiting weighs as much as the stop that reading them costs the others. Clients take turns. Requests whose client
left, or which cannot be answered by their deadline, are dropped before they cost compute, and inside at the next token.
transformers keeps per-call state on model objects, so that two threads must never run one at a time: hence one thread.
"""

import asyncio
import contextlib
import sys
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from sightline.engines.base import Decoder, Draft, GenerativeModel, IsAbandoned
from sightline.engines.cost import Cost
from sightline.engines.fair import FairQueue
from sightline.engines.health import MemoryHealth
from sightline.errors import DeadlineExceeded, NotSupported, OutOfMemory, SightlineError, Unavailable
from sightline.wire import Deadline

PATIENCE = 8
"""Stops for reading prompts that a request waits at most before it joins rows that run."""

Model = TypeVar("Model")
Prepared = TypeVar("Prepared")
Options = TypeVar("Options")
Result = TypeVar("Result")


def _never() -> bool:
    return False


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Prepared, Options, Result]):
    """A request. `hear` takes its tokens on the event loop; `is_enough` is asked on the engine's thread.

    cost   of its prepared item, in the unit of the engine's budget
    since  `time.monotonic()` at its arrival
    """

    prepared: Prepared
    options: Options
    deadline: Deadline
    future: "asyncio.Future[Result]"
    loop: asyncio.AbstractEventLoop
    cost: int
    hear: Callable[[int], None] | None = None
    is_enough: Callable[[], bool] = _never
    heard: int = 0
    since: float = field(default_factory=time.monotonic)

    def is_dead(self) -> bool:
        return self.future.cancelled() or self.deadline.remaining() <= 0

    def tell(self, number: int, token_id: int) -> None:
        """Hand on the token of that number, counted from 1, unless an earlier attempt has told it already."""
        if self.hear is not None and number > self.heard:
            hear, self.heard = self.hear, number
            _tell(self.loop, lambda: hear(token_id))

    def settle(self, result: Result | BaseException) -> None:
        def set_it() -> None:
            if self.future.done():
                return
            if isinstance(result, BaseException):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)

        _tell(self.loop, set_it)


@dataclass(slots=True, eq=False)
class _Row(Generic[Prepared, Options, Result]):
    """A request that is being answered."""

    waiting: _Waiting[Prepared, Options, Result]
    draft: Draft


class HFEngine(Generic[Model, Prepared, Options, Result]):
    """Answers requests with one loaded transformers model.

    load       builds the model; called once, on the engine's thread: a `GenerativeModel`, or anything with a `run`
    max_batch  rows that run at a time, or items of one `run`
    run        (model, prepared items, options of the first, is_abandoned) → results in order; default: the model's
               decoder, which alone can stream
    cost       of a prepared item, in the unit of `max_cost` (tokens, patches)
    max_cost   of what is read, or computed, in one go; bounds never a single item
    """

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        max_batch: int,
        run: Callable[[Model, Sequence[Prepared], Options, IsAbandoned], Sequence[Result]] | None = None,
        cost: Callable[[Prepared], int] | None = None,
        max_cost: int | None = None,
    ) -> None:
        self.health = MemoryHealth()
        self._load = load
        self._max_batch = max_batch
        self._run_batch = run
        self._cost: Callable[[Prepared], int] = cost or (lambda prepared: 0)
        self._max_cost = max_cost
        self._model: Model | None = None
        self._waiting: FairQueue[_Waiting[Prepared, Options, Result]] = FairQueue()
        self._learnt = Cost()
        self._wake = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    @property
    def fault(self) -> str | None:
        """Why no request can be answered any more: None, as the engine ends with its process."""
        return None

    @property
    def model(self) -> Model:
        """The loaded model. Raises Unavailable (503) before it is there."""
        if self._model is None:
            raise Unavailable("The model is still loading.", code="model_not_ready", retry_after=5)
        return self._model

    async def start(self) -> None:
        """Load the model on the engine's thread; returns when it is loaded, raises what loading raised."""
        loop = asyncio.get_running_loop()
        loaded: asyncio.Future[None] = loop.create_future()

        def report(fault: BaseException | None) -> None:
            if loaded.done():
                return
            if fault is None:
                loaded.set_result(None)
            else:
                loaded.set_exception(fault)

        def run() -> None:
            try:
                self._model = self._load()
            except BaseException as fault:
                _tell(loop, lambda fault=fault: report(fault))
                return
            _tell(loop, lambda: report(None))
            self._work(self._model)

        # A daemon: a process told to stop while it loads must not wait for the load.
        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()
        await loaded

    async def close(self) -> None:
        """Stop after the batch that is running; what still waits gets Unavailable (503)."""
        with self._wake:
            self._is_closing = True
            abandoned = list(self._waiting)
            self._waiting.clear()
            self._wake.notify()
        for waiting in abandoned:
            waiting.settle(Unavailable("The server is stopping.", code="draining"))
        if self._thread is not None and self._model is not None:
            await asyncio.to_thread(self._thread.join)

    async def generate(self, prepared: Prepared, options: Options, deadline: Deadline, *, client: str = "") -> Result:
        """The answer to one prepared item.

        client  who takes turns with the others

        Cancelling the caller drops the item from the queue or ends it at the next token. Raises DeadlineExceeded
        (504), OutOfMemory (507), Unavailable (503).
        """
        waiting = self._submit(prepared, options, deadline, client)
        try:
            async with asyncio.timeout(deadline.remaining()):
                return await waiting.future
        except TimeoutError as error:
            raise _too_late() from error

    async def stream(
        self,
        prepared: Prepared,
        options: Options,
        deadline: Deadline,
        *,
        is_enough: Callable[[], bool] = _never,
        client: str = "",
    ) -> AsyncGenerator[list[int] | Result]:
        """The new token ids as they are made, those that came together in one list, then the whole result.

        is_enough  True ends the item at the next token, with its result; asked on the engine's thread

        Closing the generator drops the item from the queue or ends it at the next token. It shares batches with items
        that are not streamed. Raises what `generate` raises; NotSupported (501) when the engine has a `run` of its own.
        """
        if self._run_batch is not None:
            raise NotSupported("This model does not stream.")
        arrived: asyncio.Queue[int | None] = asyncio.Queue()
        waiting = self._submit(prepared, options, deadline, client, arrived.put_nowait, is_enough)
        waiting.future.add_done_callback(lambda _: arrived.put_nowait(None))
        try:
            while True:
                tokens: list[int] = []
                token = await _before(deadline, arrived)
                while token is not None:
                    tokens.append(token)
                    if arrived.empty():
                        break
                    token = arrived.get_nowait()
                if tokens:
                    yield tokens
                if token is None:
                    yield waiting.future.result()
                    return
        finally:
            if not waiting.future.cancel() and not waiting.future.cancelled():
                waiting.future.exception()  # asked for, so that asyncio does not complain that nobody did

    def _submit(
        self,
        prepared: Prepared,
        options: Options,
        deadline: Deadline,
        client: str,
        hear: Callable[[int], None] | None = None,
        is_enough: Callable[[], bool] = _never,
    ) -> _Waiting[Prepared, Options, Result]:
        deadline.check()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        waiting = _Waiting(prepared, options, deadline, future, loop, self._cost(prepared), hear, is_enough)
        with self._wake:
            if self._model is None or self._is_closing:
                raise Unavailable("The model is not ready.", code="model_not_ready", retry_after=5)
            self._waiting.push(client, waiting)
            self._wake.notify()
        return waiting

    def _work(self, model: Model) -> None:
        while True:
            batch = self._next_batch(model)
            if batch is None:
                return
            self._run(model, batch)

    def _next_batch(self, model: Model) -> list[_Waiting[Prepared, Options, Result]] | None:
        """Wait for requests; None when there will be no more."""
        with self._wake:
            while True:
                if batch := self._taken(model, self._max_batch, ()):
                    return batch
                if self._is_closing:
                    return None
                self._wake.wait()

    def _joiners(self, model: Model, rows: Sequence[_Row[Prepared, Options, Result]]) -> list[Any]:
        """Who joins the rows that run; called between two tokens.

        Reading prompts stops every row for a while, of which a part is the same however many are read. So those who
        wait do so until their waiting comes to as much as all rows together would lose: at most twice the least loss,
        whoever comes next (it is the ski-rental problem); but nobody for longer than PATIENCE such stops.
        """
        with self._wake:
            room = self._max_batch - len(rows)
            if room <= 0 or not len(self._waiting):
                return []
            now = time.monotonic()
            waited = [now - waiting.since for waiting in self._waiting]
            if sum(waited) < len(rows) * self._learnt.stop and max(waited) < PATIENCE * self._learnt.stop:
                return []
            return self._taken(model, room, rows)

    def _taken(
        self, model: Model, most: int, rows: Sequence[_Row[Prepared, Options, Result]]
    ) -> list[_Waiting[Prepared, Options, Result]]:
        """Requests in turn that fit into one go, without those that nobody waits for or that cannot be answered."""
        self._waiting.discard(lambda waiting: self._is_hopeless(model, waiting))
        taken, cost, limit = 0, 0, self._slack(rows)

        def accept(waiting: _Waiting[Prepared, Options, Result]) -> bool | None:
            nonlocal taken, cost, limit
            if taken == most:
                return None
            if taken or rows:
                more = cost + waiting.cost
                is_within = self._max_cost is None or not taken or more <= self._max_cost
                most_seconds = min(limit, waiting.deadline.remaining()) if taken else limit
                if not is_within or self._seconds(more) > most_seconds:
                    return False
            taken, cost = taken + 1, cost + waiting.cost
            limit = min(limit, waiting.deadline.remaining())
            return True

        return self._waiting.take(accept)

    def _seconds(self, cost: float) -> float:
        """What one go of that cost takes, as far as is known."""
        line = self._learnt.prefill if self._run_batch is None else self._learnt.batch
        return line.of(cost)

    def _is_hopeless(self, model: Model, waiting: _Waiting[Prepared, Options, Result]) -> bool:
        """Whether a request is dropped; one that nobody could answer in time any more is told so."""
        if waiting.is_dead():
            return True
        seconds = waiting.deadline.remaining()
        if self._run_batch is not None:
            is_possible = self._learnt.can_compute(waiting.cost, seconds)
        else:
            most = cast("Any", model).most_tokens(waiting.prepared, waiting.options)
            is_possible = self._learnt.can_answer(waiting.cost, most, seconds)
        if not is_possible:
            waiting.settle(_too_late())
        return not is_possible

    def _slack(self, rows: Sequence[_Row[Prepared, Options, Result]]) -> float:
        """Seconds by which the rows that run may be stopped so that none of them misses its deadline for it."""
        step, slack = self._learnt.step.of(len(rows)), float("inf")
        for row in rows:
            left = max(0, self._learnt.tokens(row.draft.most) - len(row.draft.token_ids))
            spare = row.waiting.deadline.remaining() - left * step
            if spare > 0:  # a row that is late already holds nobody up
                slack = min(slack, spare)
        return slack

    def _run(self, model: Model, batch: list[_Waiting[Prepared, Options, Result]], *, is_alone: bool = False) -> None:
        """Answer a batch. Others join it, unless it is alone."""
        if self._run_batch is None:
            failed = self._decode(cast("Any", model), batch, is_alone=is_alone)
            if failed is not None:
                self._fail(model, *failed)
            return
        started = time.monotonic()
        try:
            results = self._run_batch(
                model,
                [item.prepared for item in batch],
                batch[0].options,
                lambda index: batch[index].is_dead() or batch[index].is_enough(),
            )
            settled = list(zip(batch, results, strict=True))
        except Exception as error:
            self._fail(model, batch, error)
            return
        self._learnt.batch.add(sum(item.cost for item in batch), time.monotonic() - started)
        self.health.succeeded()
        for item, result in settled:
            item.settle(result)

    def _decode(
        self, model: GenerativeModel[Prepared], batch: list[_Waiting[Prepared, Options, Result]], *, is_alone: bool
    ) -> tuple[list[_Waiting[Prepared, Options, Result]], Exception] | None:
        """Make tokens until no row is left. Returns whom an error ended: the memory of their rows is free by then."""
        decoder: Decoder[Prepared] = model.decoder()
        rows: list[_Row[Prepared, Options, Result]] = []
        while True:
            if batch:
                self._join(model, decoder, rows, batch)
            if not rows:
                return None
            started = time.monotonic()
            try:
                tokens = decoder.step()
                self._hear(model, decoder, rows, tokens)
            except Exception as error:
                return [row.waiting for row in rows], error
            self._learnt.step.add(len(tokens), time.monotonic() - started)
            batch = [] if is_alone else self._joiners(cast("Any", model), rows)

    def _join(
        self,
        model: GenerativeModel[Prepared],
        decoder: Decoder[Prepared],
        rows: list[_Row[Prepared, Options, Result]],
        batch: list[_Waiting[Prepared, Options, Result]],
    ) -> None:
        """Read prompts and add their rows. When that fails, it is their failure alone."""
        started = time.monotonic()
        try:
            joined = decoder.join([item.prepared for item in batch], [cast("Any", item.options) for item in batch])
        except Exception as error:
            self._fail(cast("Any", model), batch, error)
            return
        self._learnt.prefill.add(sum(item.cost for item in batch), time.monotonic() - started)
        first = len(rows)
        for at, _ in joined:
            most = model.most_tokens(batch[at].prepared, cast("Any", batch[at].options))
            rows.append(_Row(batch[at], Draft(most, model.stops)))
        self._hear(model, decoder, rows, [token for _, token in joined], first)

    def _hear(
        self,
        model: GenerativeModel[Prepared],
        decoder: Decoder[Prepared],
        rows: list[_Row[Prepared, Options, Result]],
        tokens: Sequence[int],
        first: int = 0,
    ) -> None:
        """Take the newest token of each row from the first on; rows that end with it leave."""
        over: list[int] = []
        for at, token in enumerate(tokens, first):
            draft, waiting = rows[at].draft, rows[at].waiting
            is_over = draft.add(token)
            waiting.tell(len(draft.token_ids), token)
            if is_over or waiting.is_enough():
                self._learnt.answered(len(draft.token_ids))
                self.health.succeeded()
                waiting.settle(cast("Any", model.result(waiting.prepared, draft)))
                over.append(at)
            elif waiting.is_dead():
                over.append(at)
        for at in reversed(over):
            decoder.leave(at)
            rows[at] = rows[-1]
            rows.pop()

    def _fail(self, model: Model, batch: list[_Waiting[Prepared, Options, Result]], error: Exception) -> None:
        is_out_of_memory = _is_out_of_memory(error)
        if is_out_of_memory:
            traceback.clear_frames(error.__traceback__)  # they hold the very tensors that did not fit
            _empty_cache()
        if len(batch) > 1:  # one bad item must not fail its company
            for item in batch:
                if not item.is_dead():
                    self._run(model, [item], is_alone=True)
            return
        fault: BaseException = error
        if is_out_of_memory:
            self.health.ran_out()
            fault = OutOfMemory("This request needs more memory than the device has.")
            fault.__cause__ = error
        elif not isinstance(error, SightlineError):
            fault = RuntimeError("generation failed")
            fault.__cause__ = error
        batch[0].settle(fault)


def _too_late() -> DeadlineExceeded:
    return DeadlineExceeded("The model did not answer within the deadline.")


async def _before(deadline: Deadline, arrived: "asyncio.Queue[int | None]") -> int | None:
    try:
        async with asyncio.timeout(deadline.remaining()):
            return await arrived.get()
    except TimeoutError as error:
        raise _too_late() from error


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Call back on the event loop, unless it is closed: then the process is ending and nobody listens."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback)


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # not imported here: an error of torch's has imported it
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def _empty_cache() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
