"""The engine with a computation of its own: one thread, shared batches, nothing computed for nobody.

The computation is a fake behind gates; no clock. Engines that make tokens are in `test_hf_rows.py`.
"""

import asyncio
import queue
import threading
import time
import types
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import pytest

from sightline.engines.base import Generated, IsAbandoned, Runtime
from sightline.engines.hf import HFEngine
from sightline.errors import (
    DeadlineExceeded,
    InvalidImage,
    NotSupported,
    OutOfMemory,
    SightlineError,
    Unavailable,
)
from sightline.wire import Deadline, ModelInfo, Sampling

T = TypeVar("T")

GREEDY = Sampling(max_tokens=8)
SAMPLED = Sampling(max_tokens=8, temperature=0.7, seed=1)
PATIENCE_SECONDS = 10
"""How long a test waits for something that must happen; reached only when it does not."""


class GatedModel:
    """Reports each batch, then waits until the test lets it answer with its own items."""

    info = ModelInfo("fake", "0")
    runtime = Runtime("fake", "cpu", "none")

    def __init__(self) -> None:
        self.batches: queue.Queue[list[str]] = queue.Queue()
        self.may_answer = threading.Semaphore(0)
        self.is_abandoned: IsAbandoned = lambda index: False
        self.answer: Callable[[list[str]], Sequence[Generated]] = lambda batch: [generated(item) for item in batch]
        self.threads: set[str] = set()

    def run(self, batch: Sequence[str], sampling: Sampling, is_abandoned: IsAbandoned) -> Sequence[Generated]:
        self.threads.add(threading.current_thread().name)
        self.is_abandoned = is_abandoned
        self.batches.put(list(batch))
        assert self.may_answer.acquire(timeout=PATIENCE_SECONDS)
        return self.answer(list(batch))

    async def next_batch(self) -> list[str]:
        """Wait until the model was given a batch."""
        return await asyncio.to_thread(self.batches.get, timeout=PATIENCE_SECONDS)

    def go_on(self, times: int = 1) -> None:
        self.may_answer.release(times)


def generated(item: str) -> Generated:
    return Generated(tuple(item.encode()), "stop", len(item))


def text_of(result: Generated) -> str:
    return bytes(result.token_ids).decode()


def later() -> Deadline:
    return Deadline.after(60)


async def soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await work


class Bench:
    """A started engine and its gated model."""

    def __init__(self, max_batch: int = 8, max_cost: int | None = None) -> None:
        self.model = GatedModel()
        self.engine: HFEngine[GatedModel, str, Sampling, Generated] = HFEngine(
            lambda: self.model, max_batch=max_batch, run=GatedModel.run, cost=len, max_cost=max_cost
        )

    def submit(
        self, item: str, sampling: Sampling = GREEDY, deadline: Deadline | None = None, client: str = ""
    ) -> "asyncio.Task[Generated]":
        return asyncio.create_task(self.engine.generate(item, sampling, deadline or later(), client=client))

    async def busy(self) -> "asyncio.Task[Generated]":
        """A request that the model is working on, so that what comes now has to wait."""
        task = self.submit("busy")
        assert await self.model.next_batch() == ["busy"]
        return task

    async def queued(self, *items: "str | tuple[str, Sampling]") -> "list[asyncio.Task[Generated]]":
        """Requests that wait, in this order."""
        tasks = [self.submit(item) if isinstance(item, str) else self.submit(*item) for item in items]
        await asyncio.sleep(0)  # let each of them reach the queue
        return tasks


MakeBench = Callable[..., Coroutine[Any, Any, Bench]]


@pytest.fixture
async def make_bench() -> AsyncIterator[MakeBench]:
    benches: list[Bench] = []

    async def make(max_batch: int = 8, max_cost: int | None = None) -> Bench:
        bench = Bench(max_batch, max_cost)
        await soon(bench.engine.start())
        benches.append(bench)
        return bench

    yield make
    for bench in benches:
        bench.model.go_on(1000)
        await soon(bench.engine.close())


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    return await make_bench()


class TestBatching:
    async def test_an_idle_engine_waits_for_nobody(self, bench: Bench) -> None:
        task = bench.submit("alone")

        assert await bench.model.next_batch() == ["alone"]
        bench.model.go_on()
        assert text_of(await soon(task)) == "alone"

    async def test_what_waits_shares_the_next_batch(self, bench: Bench) -> None:
        await bench.busy()
        await bench.queued("a", "b", "c")

        bench.model.go_on()

        assert await bench.model.next_batch() == ["a", "b", "c"]

    async def test_a_batch_has_at_most_max_batch_items(self, make_bench: MakeBench) -> None:
        bench = await make_bench(max_batch=2)
        await bench.busy()
        await bench.queued("a", "b", "c", "d", "e")

        bench.model.go_on(4)

        assert [await bench.model.next_batch() for _ in range(3)] == [["a", "b"], ["c", "d"], ["e"]]

    async def test_a_batch_keeps_to_its_budget_but_takes_any_single_item(self, make_bench: MakeBench) -> None:
        bench = await make_bench(max_cost=5)
        await bench.busy()
        await bench.queued("a long one", "aaa", "bbb", "cc", "d")

        bench.model.go_on(5)

        assert [await bench.model.next_batch() for _ in range(3)] == [["a long one"], ["aaa", "cc"], ["bbb", "d"]]

    async def test_clients_take_turns(self, make_bench: MakeBench) -> None:
        bench = await make_bench(max_batch=2)
        await bench.busy()
        for item in "abcdef":
            bench.submit(item, client="heavy")
        await asyncio.sleep(0)
        bench.submit("x", client="light")
        await asyncio.sleep(0)
        bench.submit("y", client="other")
        await asyncio.sleep(0)

        bench.model.go_on(10)

        assert [await bench.model.next_batch() for _ in range(3)] == [["a", "x"], ["y", "b"], ["c", "d"]]

    async def test_what_is_passed_over_comes_first_in_the_next_batch(self, make_bench: MakeBench) -> None:
        bench = await make_bench(max_cost=5)
        await bench.busy()
        await bench.queued("aaa", "too long", "b")

        bench.model.go_on()
        assert await bench.model.next_batch() == ["aaa", "b"]
        await bench.queued("c", "d")  # they keep coming
        bench.model.go_on()

        assert await bench.model.next_batch() == ["too long"]

    async def test_every_request_gets_its_own_answer(self, bench: Bench) -> None:
        busy = await bench.busy()
        tasks = await bench.queued("a", ("s", SAMPLED), "b", ("t", Sampling(max_tokens=5)), "c")

        bench.model.go_on(10)

        results = await soon(asyncio.gather(busy, *tasks))
        assert [text_of(result) for result in results] == ["busy", "a", "s", "b", "t", "c"]

    async def test_the_model_only_ever_runs_on_the_engine_s_thread(self, bench: Bench) -> None:
        bench.model.go_on(10)

        await soon(asyncio.gather(*(bench.submit(str(number), SAMPLED) for number in range(5))))

        assert bench.model.threads == {"engine"}

    async def test_the_event_loop_goes_on_while_the_model_works(self, bench: Bench) -> None:
        task = await bench.busy()

        for _ in range(100):
            await asyncio.sleep(0)

        assert not task.done()
        bench.model.go_on()
        await soon(task)


class TestTheDead:
    async def test_a_cancelled_request_leaves_the_queue(self, bench: Bench) -> None:
        await bench.busy()
        first, second, _ = await bench.queued("a", "b", "c")

        first.cancel()
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        bench.model.go_on()

        assert await bench.model.next_batch() == ["c"]

    async def test_a_cancelled_request_does_not_join_the_batch_of_another(self, bench: Bench) -> None:
        await bench.busy()
        _, second, _ = await bench.queued("a", "b", "c")

        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        bench.model.go_on()

        assert await bench.model.next_batch() == ["a", "c"]

    async def test_an_expired_request_leaves_the_queue(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = types.SimpleNamespace(now=1000.0)
        monkeypatch.setattr("sightline.wire.time", types.SimpleNamespace(monotonic=lambda: clock.now))
        await bench.busy()
        hurried = bench.submit("a", deadline=Deadline.after(10))
        await bench.queued("b")

        clock.now += 11
        bench.model.go_on()

        assert await bench.model.next_batch() == ["b"]
        hurried.cancel()

    async def test_a_past_deadline_never_reaches_the_queue(self, bench: Bench) -> None:
        with pytest.raises(DeadlineExceeded):
            await bench.engine.generate("late", GREEDY, Deadline.after(-1))

        assert bench.model.batches.empty()

    async def test_a_deadline_ends_the_wait_for_a_running_model(self, bench: Bench) -> None:
        with pytest.raises(DeadlineExceeded):
            await bench.engine.generate("slow", GREEDY, Deadline.after(0.01))

    async def test_the_model_is_told_between_tokens_whom_nobody_waits_for(self, bench: Bench) -> None:
        await bench.busy()
        tasks = await bench.queued("a", "b", "c")
        bench.model.go_on()
        await bench.model.next_batch()

        assert [bench.model.is_abandoned(index) for index in range(3)] == [False, False, False]
        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)

        assert [bench.model.is_abandoned(index) for index in range(3)] == [False, True, False]
        bench.model.go_on()
        assert [text_of(await soon(task)) for task in (tasks[0], tasks[2])] == ["a", "c"]

    async def test_a_deadline_that_passes_inside_a_batch_counts_as_abandoned(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = types.SimpleNamespace(now=1000.0)
        monkeypatch.setattr("sightline.wire.time", types.SimpleNamespace(monotonic=lambda: clock.now))
        task = bench.submit("a", deadline=Deadline.after(10))
        await bench.model.next_batch()

        assert not bench.model.is_abandoned(0)
        clock.now += 11

        assert bench.model.is_abandoned(0)
        task.cancel()


class TestFailures:
    @pytest.mark.parametrize("fault", [ValueError("of torch"), RuntimeError("CUDA"), AssertionError()], ids=repr)
    async def test_a_foreign_error_becomes_one_without_its_text(self, bench: Bench, fault: Exception) -> None:
        bench.model.answer = raising(fault)
        bench.model.go_on()

        with pytest.raises(RuntimeError, match=r"^generation failed$") as caught:
            await soon(bench.submit("a"))

        assert caught.value.__cause__ is fault

    async def test_an_error_of_ours_stays_itself(self, bench: Bench) -> None:
        fault = InvalidImage("This image is none.")
        bench.model.answer = raising(fault)
        bench.model.go_on()

        with pytest.raises(InvalidImage) as caught:
            await soon(bench.submit("a"))

        assert caught.value is fault

    @pytest.mark.parametrize("kind", ["host", "device"])
    async def test_too_little_memory_is_said_as_such(self, bench: Bench, kind: str) -> None:
        import torch

        fault = MemoryError() if kind == "host" else torch.OutOfMemoryError("CUDA out of memory. Tried to …")
        bench.model.answer = raising(fault)
        bench.model.go_on()

        with pytest.raises(OutOfMemory) as caught:
            await soon(bench.submit("a"))

        assert caught.value.status == 507
        assert caught.value.__cause__ is fault

    async def test_one_bad_item_does_not_fail_its_company(self, bench: Bench) -> None:
        bench.model.answer = failing_with("bad", ValueError())
        await bench.busy()
        good, bad, too = await bench.queued("good", "bad", "good too")

        bench.model.go_on(10)

        assert text_of(await soon(good)) == "good"
        assert text_of(await soon(too)) == "good too"
        with pytest.raises(RuntimeError):
            await soon(bad)

    async def test_the_dead_of_a_failed_batch_are_not_tried_again(self, bench: Bench) -> None:
        bench.model.answer = failing_with("bad", ValueError())
        await bench.busy()
        tasks = await bench.queued("bad", "gone", "good")
        bench.model.go_on()
        assert await bench.model.next_batch() == ["bad", "gone", "good"]

        tasks[1].cancel()
        await asyncio.gather(tasks[1], return_exceptions=True)
        bench.model.go_on(10)

        assert [await bench.model.next_batch() for _ in range(2)] == [["bad"], ["good"]]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def test_a_batch_without_memory_lets_go_of_it_before_its_items_are_tried_alone(self, bench: Bench) -> None:
        class Activations:
            pass

        alive: list[weakref.ref[Activations]] = []
        seen: list[bool] = []

        def answer(batch: list[str]) -> Sequence[Generated]:
            activations = Activations()
            if len(batch) > 1:
                alive.append(weakref.ref(activations))
                raise MemoryError
            if alive:
                seen.append(alive[0]() is None)
            return [generated(item) for item in batch]

        bench.model.answer = answer
        await bench.busy()
        tasks = await bench.queued("a", "b")
        bench.model.go_on(10)

        await soon(asyncio.gather(*tasks))
        assert seen == [True, True]

    @pytest.mark.parametrize("results", [[], [generated("x")] * 3], ids=["too few", "too many"])
    async def test_a_model_that_miscounts_does_not_stop_the_engine(
        self, bench: Bench, results: list[Generated]
    ) -> None:
        bench.model.answer = lambda batch: results
        bench.model.go_on()
        with pytest.raises(RuntimeError):
            await soon(bench.submit("a"))

        bench.model.answer = lambda batch: [generated(item) for item in batch]
        bench.model.go_on()

        assert text_of(await soon(bench.submit("b"))) == "b"

    async def test_the_engine_goes_on_after_a_failure(self, bench: Bench) -> None:
        bench.model.answer = raising(ValueError())
        bench.model.go_on(2)
        with pytest.raises(RuntimeError):
            await soon(bench.submit("a"))

        bench.model.answer = lambda batch: [generated(item) for item in batch]

        assert text_of(await soon(bench.submit("b"))) == "b"


class TestStreams:
    async def test_an_engine_with_a_computation_of_its_own_has_no_tokens(self, bench: Bench) -> None:
        with pytest.raises(NotSupported):
            await anext(bench.engine.stream("a", GREEDY, later()))


class TestStartAndClose:
    async def test_what_loading_raised_start_raises(self) -> None:
        fault = OSError("no such checkpoint")
        engine: HFEngine[GatedModel, str, Sampling, Generated] = HFEngine(raising_load(fault), max_batch=1)

        with pytest.raises(OSError, match="no such checkpoint"):
            await soon(engine.start())

        await assert_not_ready(engine)
        await soon(engine.close())

    async def test_before_it_is_loaded_there_is_no_model(self) -> None:
        await assert_not_ready(HFEngine(GatedModel, max_batch=1))

    async def test_while_it_loads_the_event_loop_is_free_and_requests_are_told_to_wait(self) -> None:
        gate, model = threading.Event(), GatedModel()
        engine: HFEngine[GatedModel, str, Sampling, Generated] = HFEngine(lambda: waiting_for(gate, model), max_batch=1)
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0)

        await assert_not_ready(engine)
        assert not starting.done()

        gate.set()
        await soon(starting)
        assert engine.model is model
        await soon(engine.close())

    async def test_close_while_loading_does_not_wait_for_the_load(self) -> None:
        gate = threading.Event()
        engine: HFEngine[GatedModel, str, Sampling, Generated] = HFEngine(
            lambda: waiting_for(gate, GatedModel()), max_batch=1
        )
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(0)

        await soon(engine.close())

        starting.cancel()
        gate.set()
        await asyncio.to_thread(join_engine_threads)

    def test_a_load_that_ends_after_the_event_loop_is_harmless(self) -> None:
        """A process that is told to stop while it loads must not end with a traceback of a thread."""
        gate = threading.Event()

        async def stopped_early() -> None:
            engine: HFEngine[GatedModel, str, Sampling, Generated] = HFEngine(
                lambda: waiting_for(gate, GatedModel()), max_batch=1
            )
            starting = asyncio.create_task(engine.start())
            await asyncio.sleep(0)
            await engine.close()
            starting.cancel()

        asyncio.run(stopped_early())
        gate.set()
        join_engine_threads()  # an exception of the thread would be a warning, hence a failure

    async def test_close_turns_away_what_waits_and_ends_what_runs(self, bench: Bench) -> None:
        running = await bench.busy()
        waiting = await bench.queued("a", ("s", SAMPLED))

        closing = asyncio.create_task(bench.engine.close())
        for task in waiting:
            with pytest.raises(Unavailable) as caught:
                await soon(task)
            assert caught.value.code == "draining"
        assert not running.done()
        bench.model.go_on()

        assert text_of(await soon(running)) == "busy"
        await soon(closing)
        assert bench.model.batches.empty()

    async def test_a_closed_engine_takes_nothing(self, bench: Bench) -> None:
        await soon(bench.engine.close())
        await soon(bench.engine.close())

        with pytest.raises(Unavailable):
            await bench.engine.generate("a", GREEDY, later())

    async def test_closing_ends_the_thread(self, bench: Bench) -> None:
        await soon(bench.engine.close())

        assert not engine_threads()


def raising(fault: BaseException) -> Callable[[list[str]], Sequence[Generated]]:
    def answer(batch: list[str]) -> Sequence[Generated]:
        raise fault

    return answer


def raising_load(fault: BaseException) -> Callable[[], GatedModel]:
    def load() -> GatedModel:
        raise fault

    return load


def failing_with(item: str, fault: Exception) -> Callable[[list[str]], Sequence[Generated]]:
    def answer(batch: list[str]) -> Sequence[Generated]:
        if item in batch:
            raise fault
        return [generated(each) for each in batch]

    return answer


def waiting_for(gate: threading.Event, model: GatedModel) -> GatedModel:
    assert gate.wait(PATIENCE_SECONDS)
    return model


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "engine"]


def join_engine_threads() -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    for thread in engine_threads():
        thread.join(until - time.monotonic())
    assert not engine_threads()


async def assert_not_ready(engine: HFEngine[GatedModel, str, Sampling, Generated]) -> None:
    with pytest.raises(Unavailable) as of_model:
        _ = engine.model
    with pytest.raises(SightlineError) as of_generate:
        await engine.generate("a", GREEDY, later())
    assert {of_model.value.code, of_generate.value.code} == {"model_not_ready"}
    assert of_generate.value.status == 503
    assert of_generate.value.retry_after
