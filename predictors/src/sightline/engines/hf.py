"""One thread owns the device; requests that wait for it and agree on sampling share its next batch.

No request waits for company: an idle thread takes what is there. Requests whose client left or whose deadline passed
are dropped before they cost compute, and inside a running batch at the next token. transformers keeps per-call state
on the model object (Qwen's `rope_deltas`), so `generate` must never run twice at a time: hence one thread.
"""

import asyncio
import contextlib
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from sightline.engines.base import IsAbandoned, OnToken
from sightline.engines.health import MemoryHealth
from sightline.errors import DeadlineExceeded, NotSupported, OutOfMemory, SightlineError, Unavailable
from sightline.wire import Deadline, Sampling

MIN_TEMPERATURE = 1e-5
"""Below this sampling is greedy, as in vLLM (_SAMPLING_EPS): scores divided by 1e-38 are infinite."""

Model = TypeVar("Model")
Prepared = TypeVar("Prepared")
Options = TypeVar("Options")
Result = TypeVar("Result")


def _never() -> bool:
    return False


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Prepared, Options, Result]):
    """A request. `hear` takes its tokens on the event loop; `is_enough` is asked on the engine's thread."""

    prepared: Prepared
    options: Options
    deadline: Deadline
    future: "asyncio.Future[Result]"
    loop: asyncio.AbstractEventLoop
    hear: Callable[[int], None] | None = None
    is_enough: Callable[[], bool] = _never
    heard: int = 0

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


def may_share(left: Any, right: Any) -> bool:  # noqa: ANN401 - Sampling, unless an engine says otherwise
    """Whether two prompts may share a batch.

    Sampled ones run alone, since their seed must give the same text whoever else is there; of greedy ones only the
    length counts.
    """
    if left.temperature > 0 or right.temperature > 0:
        return False
    return left.max_tokens == right.max_tokens


class HFEngine(Generic[Model, Prepared, Options, Result]):
    """Batches requests onto one loaded transformers model.

    load       builds the model; called once, on the engine's thread
    max_batch  items of one `run`
    run        (model, prepared items, options of the first, is_abandoned) → results in order; default
               `model.generate`, which alone can stream
    may_share  whether two requests' options allow one batch
    cost       of a prepared item, in the unit of `max_cost` (tokens); the budget bounds a batch, never a single item
    """

    def __init__(
        self,
        load: Callable[[], Model],
        *,
        max_batch: int,
        run: Callable[[Model, Sequence[Prepared], Options, IsAbandoned], Sequence[Result]] | None = None,
        may_share: Callable[[Options, Options], bool] = may_share,
        cost: Callable[[Prepared], int] | None = None,
        max_cost: int | None = None,
    ) -> None:
        self.health = MemoryHealth()
        self._load = load
        self._max_batch = max_batch
        self._run_batch = run
        self._may_share = may_share
        self._cost: Callable[[Prepared], int] = cost or (lambda prepared: 0)
        self._max_cost = max_cost
        self._model: Model | None = None
        self._waiting: deque[_Waiting[Prepared, Options, Result]] = deque()
        self._wake = threading.Condition()
        self._is_closing = False
        self._thread: threading.Thread | None = None

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

    async def generate(self, prepared: Prepared, options: Options, deadline: Deadline) -> Result:
        """The answer to one prepared item.

        Cancelling the caller drops the item from the queue or ends it at the next token. Raises DeadlineExceeded
        (504), OutOfMemory (507), Unavailable (503).
        """
        waiting = self._submit(prepared, options, deadline)
        try:
            async with asyncio.timeout(deadline.remaining()):
                return await waiting.future
        except TimeoutError as error:
            raise _too_late() from error

    async def stream(
        self, prepared: Prepared, options: Options, deadline: Deadline, *, is_enough: Callable[[], bool] = _never
    ) -> AsyncGenerator[list[int] | Result]:
        """The new token ids as they are made, those that came together in one list, then the whole result.

        is_enough  True ends the item at the next token, with its result; asked on the engine's thread

        Closing the generator drops the item from the queue or ends it at the next token. It shares batches with items
        that are not streamed. Raises what `generate` raises; NotSupported (501) when the engine has a `run` of its own.
        """
        if self._run_batch is not None:
            raise NotSupported("This model does not stream.")
        arrived: asyncio.Queue[int | None] = asyncio.Queue()
        waiting = self._submit(prepared, options, deadline, arrived.put_nowait, is_enough)
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
        hear: Callable[[int], None] | None = None,
        is_enough: Callable[[], bool] = _never,
    ) -> _Waiting[Prepared, Options, Result]:
        deadline.check()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        waiting = _Waiting(prepared, options, deadline, future, loop, hear, is_enough)
        with self._wake:
            if self._model is None or self._is_closing:
                raise Unavailable("The model is not ready.", code="model_not_ready", retry_after=5)
            self._waiting.append(waiting)
            self._wake.notify()
        return waiting

    def _work(self, model: Model) -> None:
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            self._run(model, batch)

    def _next_batch(self) -> list[_Waiting[Prepared, Options, Result]] | None:
        with self._wake:
            while True:
                while self._waiting and self._waiting[0].is_dead():
                    self._waiting.popleft()
                if self._waiting:
                    return self._take()
                if self._is_closing:
                    return None
                self._wake.wait()

    def _take(self) -> list[_Waiting[Prepared, Options, Result]]:
        """The first request and those behind it that agree with its options and fit into its batch."""
        first = self._waiting.popleft()
        batch, kept = [first], list[_Waiting[Prepared, Options, Result]]()
        cost = self._cost(first.prepared)
        while self._waiting and len(batch) < self._max_batch:
            item = self._waiting.popleft()
            more = self._cost(item.prepared)
            fits = self._max_cost is None or cost + more <= self._max_cost
            if fits and not item.is_dead() and self._may_share(first.options, item.options):
                batch.append(item)
                cost += more
            elif not item.is_dead():
                kept.append(item)
        self._waiting.extendleft(reversed(kept))
        return batch

    def _run(self, model: Model, batch: list[_Waiting[Prepared, Options, Result]]) -> None:
        try:
            results = self._results(model, batch)
            settled = list(zip(batch, results, strict=True))
        except Exception as error:
            self._fail(model, batch, error)
            return
        self.health.succeeded()
        for item, result in settled:
            item.settle(result)

    def _results(self, model: Model, batch: list[_Waiting[Prepared, Options, Result]]) -> Sequence[Result]:
        prepared, options = [item.prepared for item in batch], batch[0].options
        is_abandoned: IsAbandoned = lambda index: batch[index].is_dead() or batch[index].is_enough()  # noqa: E731
        if self._run_batch is not None:
            return self._run_batch(model, prepared, options, is_abandoned)
        generate: Callable[..., Sequence[Result]] = cast("Any", model).generate
        if all(item.hear is None for item in batch):  # then no model is slowed down by reading its tokens one by one
            return generate(prepared, options, is_abandoned)
        counts = [0] * len(batch)

        def on_token(row: int, token_id: int) -> None:
            counts[row] += 1
            batch[row].tell(counts[row], token_id)

        return generate(prepared, options, is_abandoned, on_token)

    def _fail(self, model: Model, batch: list[_Waiting[Prepared, Options, Result]], error: Exception) -> None:
        is_out_of_memory = _is_out_of_memory(error)
        if is_out_of_memory:
            traceback.clear_frames(error.__traceback__)  # they hold the very tensors that did not fit
            _empty_cache()
        if len(batch) > 1:  # one bad item must not fail its company
            for item in batch:
                if not item.is_dead():
                    self._run(model, [item])
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


def generate_tokens(
    model: Any,  # noqa: ANN401 - a transformers GenerationMixin, which has no useful type
    inputs: dict[str, Any],
    sampling: Sampling,
    is_abandoned: IsAbandoned,
    on_token: OnToken | None = None,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
) -> list[tuple[tuple[int, ...], bool]]:
    """Run `generate` on a left-padded batch.

    inputs    what the model's processor made, `input_ids` (B, T) included, on the model's device
    on_token  told each new token of a row that has not ended, the stop token included
    returns   for each row its new token ids (stop token included, padding not) and whether it stopped by itself

    Every sampling field is pinned, so that a checkpoint's generation_config cannot change the answer behind our back
    (Qwen2.5-VL ships repetition_penalty 1.05: it is kept, because the model was tuned with it).
    """
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    begin = inputs["input_ids"].shape[1]
    stops = set(eos_token_ids)
    rows = _Rows(inputs["input_ids"].shape[0], stops, is_abandoned, on_token)

    class _BetweenTokens(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            newest = cast("list[int]", input_ids[:, -1].tolist()) if on_token is not None else None
            return torch.tensor(rows.after(newest, input_ids.shape[1] - begin), device=input_ids.device)

    options: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "eos_token_id": list(eos_token_ids),
        "pad_token_id": pad_token_id,
        "num_beams": 1,
        "stopping_criteria": StoppingCriteriaList([_BetweenTokens()]),
    }
    if sampling.temperature >= MIN_TEMPERATURE:
        options |= {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        else:
            torch.seed()
    else:
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    with torch.inference_mode():
        output = model.generate(**inputs, **options)
    return [rows.trimmed(row, ids) for row, ids in enumerate(cast("list[list[int]]", output[:, begin:].tolist()))]


class _Rows:
    """Which rows of a running batch go on, and what of each is its answer: a batch ends with its last row."""

    def __init__(self, count: int, stops: set[int], is_abandoned: IsAbandoned, on_token: OnToken | None) -> None:
        self._stops = stops
        self._is_abandoned = is_abandoned
        self._on_token = on_token
        self._has_stopped = [False] * count
        self._cut_at: list[int | None] = [None] * count

    def after(self, newest: Sequence[int] | None, length: int) -> list[bool]:
        """Between two tokens: hand on the newest of each row, and say which rows nobody waits for."""
        flags: list[bool] = []
        for row, cut_at in enumerate(self._cut_at):
            if newest is not None and self._on_token is not None and not (self._has_stopped[row] or cut_at):
                self._on_token(row, newest[row])
                self._has_stopped[row] = newest[row] in self._stops
            is_abandoned = cut_at is not None or self._is_abandoned(row)
            if is_abandoned and cut_at is None:
                self._cut_at[row] = length
            flags.append(is_abandoned)
        return flags

    def trimmed(self, row: int, ids: Sequence[int]) -> tuple[tuple[int, ...], bool]:
        """What the row generated before it stopped or was abandoned, and whether it stopped by itself."""
        ids = ids[: self._cut_at[row]]
        end = next((at for at, token in enumerate(ids) if token in self._stops), None)
        return tuple(ids if end is None else ids[: end + 1]), end is not None
