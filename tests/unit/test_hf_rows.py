"""The engine that makes tokens: who joins and leaves the rows that run, and what becomes of those that fail.

The decoder is a fake that spells its prompts, one letter a token, and waits at a gate before each; no clock.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from sightline.engines import hf
from sightline.engines.base import Draft, Generated, Runtime
from sightline.engines.hf import HFEngine
from sightline.errors import DeadlineExceeded, OutOfMemory, Unavailable
from sightline.wire import Deadline, ModelInfo, Sampling

END = 0
PATIENCE_SECONDS = 10
"""How long a test waits for something that must happen; reached only when it does not."""


class Speller:
    """Spells prompts and ends each with END. Tells of each thing it does, then waits until it may."""

    info = ModelInfo("fake", "0")
    runtime = Runtime("fake", "cpu", "none")
    stops = frozenset({END})

    def __init__(self) -> None:
        self.did: queue.Queue[tuple[str, list[str]]] = queue.Queue()
        self.may_go_on = threading.Semaphore(0)
        self.fail: Callable[[str, list[str]], None] = lambda what, prompts: None

    def decoder(self) -> "SpellingRows":
        return SpellingRows(self)

    def most_tokens(self, prompt: str, sampling: Sampling) -> int:
        return sampling.max_tokens

    def result(self, prompt: str, draft: Draft) -> Generated:
        return Generated(tuple(draft.token_ids), draft.finish_reason, len(prompt))

    def do(self, what: str, prompts: list[str]) -> None:
        self.did.put((what, prompts))
        assert self.may_go_on.acquire(timeout=PATIENCE_SECONDS)
        self.fail(what, prompts)


class SpellingRows:
    def __init__(self, speller: Speller) -> None:
        self._speller = speller
        self._rows: list[tuple[str, int]] = []

    def join(self, prompts: Sequence[str], samplings: Sequence[Sampling]) -> list[tuple[int, int]]:
        self._speller.do("join", list(prompts))
        self._rows += [(prompt, 1) for prompt in prompts]
        return [(at, letter(prompt, 0)) for at, prompt in enumerate(prompts)]

    def step(self) -> list[int]:
        self._speller.do("step", [prompt for prompt, _ in self._rows])
        tokens = [letter(prompt, at) for prompt, at in self._rows]
        self._rows = [(prompt, at + 1) for prompt, at in self._rows]
        return tokens

    def leave(self, row: int) -> None:
        self._rows[row] = self._rows[-1]
        self._rows.pop()


def letter(prompt: str, at: int) -> int:
    return ord(prompt[at]) if at < len(prompt) else END


def text_of(result: Generated) -> str:
    return "".join(chr(token) for token in result.token_ids if token != END)


def later() -> Deadline:
    return Deadline.after(60)


class Bench:
    def __init__(self, max_batch: int) -> None:
        self.model = Speller()
        self.engine: HFEngine[Speller, str, Sampling, Generated] = HFEngine(
            lambda: self.model, max_batch=max_batch, cost=len
        )

    def submit(self, item: str, max_tokens: int = 99, **options: Any) -> "asyncio.Task[Generated]":
        deadline = options.pop("deadline", None) or later()
        return asyncio.create_task(self.engine.generate(item, Sampling(max_tokens=max_tokens), deadline, **options))

    async def queued(self, *items: str) -> "list[asyncio.Task[Generated]]":
        tasks = [self.submit(item) for item in items]
        await asyncio.sleep(0)
        return tasks

    async def next(self) -> tuple[str, list[str]]:
        """What the model is about to do."""
        return await asyncio.to_thread(self.model.did.get, timeout=PATIENCE_SECONDS)

    async def until(self, what: str, *prompts: str) -> None:
        """Let the model work until it is about to do this."""
        while await self.next() != (what, list(prompts)):
            self.model.may_go_on.release()

    def go_on(self, times: int = 1) -> None:
        self.model.may_go_on.release(times)


MakeBench = Callable[..., Coroutine[Any, Any, Bench]]


@pytest.fixture
async def make_bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeBench]:
    benches: list[Bench] = []

    async def make(max_batch: int = 8) -> Bench:
        bench = Bench(max_batch)
        await soon(bench.engine.start())
        benches.append(bench)
        return bench

    yield make
    for bench in benches:
        bench.go_on(1000)
        await soon(bench.engine.close())


@pytest.fixture
async def bench(make_bench: MakeBench) -> Bench:
    return await make_bench()


async def soon(work: Any) -> Any:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await work


class TestRows:
    async def test_an_idle_engine_waits_for_nobody(self, bench: Bench) -> None:
        task = bench.submit("ab")

        assert await bench.next() == ("join", ["ab"])
        bench.go_on(10)
        assert text_of(await soon(task)) == "ab"

    async def test_who_comes_joins_between_two_tokens(self, bench: Bench) -> None:
        await bench.queued("abcdef")
        await bench.until("step", "abcdef")
        await bench.queued("x", "y")
        bench.go_on()

        assert await bench.next() == ("join", ["x", "y"])
        bench.go_on()
        assert await bench.next() == ("step", ["abcdef", "x", "y"])

    async def test_who_is_answered_leaves_and_makes_room(self, make_bench: MakeBench) -> None:
        bench = await make_bench(max_batch=2)
        long, short, third = await bench.queued("abcdefgh", "x", "yz")
        await bench.until("join", "yz")

        assert text_of(await soon(short)) == "x"
        assert not long.done()
        bench.go_on(20)
        assert text_of(await soon(third)) == "yz"
        assert text_of(await soon(long)) == "abcdefgh"

    async def test_each_has_a_limit_of_its_own(self, bench: Bench) -> None:
        tasks = [bench.submit("abcdef", max_tokens=limit) for limit in (1, 2, 99, 3)]
        bench.go_on(20)

        results = await soon(asyncio.gather(*tasks))

        assert [text_of(result) for result in results] == ["a", "ab", "abcdef", "abc"]
        assert [result.finish_reason for result in results] == ["length", "length", "stop", "length"]

    async def test_every_request_gets_its_own_answer(self, make_bench: MakeBench) -> None:
        bench = await make_bench(max_batch=3)
        words = ["one", "eleven", "a", "seventeen", "to", "five", "hundred", "b"]
        tasks = await bench.queued(*words)
        bench.go_on(200)

        assert [text_of(result) for result in await soon(asyncio.gather(*tasks))] == words

    async def test_clients_take_turns(self, make_bench: MakeBench) -> None:
        bench = await make_bench(max_batch=2)
        for item in ("aaa", "bbb", "ccc"):
            bench.submit(item, client="heavy")
        await asyncio.sleep(0)
        await bench.until("join", "aaa", "bbb")
        bench.submit("ddd", client="heavy")
        bench.submit("x", client="light")
        await asyncio.sleep(0)
        bench.go_on(3)

        assert [await bench.next() for _ in range(3)] == [("step", ["aaa", "bbb"])] * 3
        bench.go_on()
        assert await bench.next() == ("join", ["ccc", "x"])

    async def test_reading_few_waits_while_it_would_cost_many_more(self, bench: Bench) -> None:
        """A stop that costs the running rows more than the newcomer has waited is put off."""
        bench.submit("abcdef", deadline=Deadline.after(10_000))
        await bench.until("step", "abcdef")
        for amount in range(20):
            bench.engine._learnt.prefill.add(amount, 1000.0 + amount)
        bench.submit("x", deadline=Deadline.after(10_000))
        await asyncio.sleep(0)
        bench.go_on(2)

        assert [await bench.next() for _ in range(2)] == [("step", ["abcdef"])] * 2
        bench.go_on(10)
        await bench.until("join", "x")


class TestTheDead:
    async def test_a_cancelled_request_leaves_at_the_next_token(self, bench: Bench) -> None:
        gone, stays = await bench.queued("abcdef", "uvwxyz")
        await bench.until("step", "abcdef", "uvwxyz")

        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        bench.go_on()

        assert await bench.next() == ("step", ["uvwxyz"])
        bench.go_on(10)
        assert text_of(await soon(stays)) == "uvwxyz"

    async def test_a_cancelled_request_never_joins(self, bench: Bench) -> None:
        await bench.queued("abcdef")
        await bench.until("step", "abcdef")
        gone, _ = await bench.queued("gone", "here")

        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        bench.go_on()

        assert await bench.next() == ("join", ["here"])

    async def test_what_cannot_be_answered_in_time_is_told_so_before_it_costs_anything(self, bench: Bench) -> None:
        for _ in range(20):
            bench.engine._learnt.prefill.add(1, 1000.0)

        with pytest.raises(DeadlineExceeded):
            await soon(bench.submit("abc", deadline=Deadline.after(100)))

        assert bench.model.did.empty()

    async def test_nobody_joins_who_would_make_another_late(self, bench: Bench) -> None:
        hurried = bench.submit("abcdef", deadline=Deadline.after(100))
        await bench.until("step", "abcdef")
        for _ in range(20):
            bench.engine._learnt.prefill.add(0, 0.0)
            bench.engine._learnt.prefill.add(1, 200.0)
        bench.submit("x", deadline=Deadline.after(10_000))
        await asyncio.sleep(0)
        bench.go_on(6)

        assert [await bench.next() for _ in range(5)] == [("step", ["abcdef"])] * 5
        assert text_of(await soon(hurried)) == "abcdef"
        assert await bench.next() == ("join", ["x"])


class TestFailures:
    async def test_of_reading_prompts_leave_the_rows_that_run_alone(self, bench: Bench) -> None:
        bench.model.fail = failing_with("bad", "join")
        (running,) = await bench.queued("abc")
        await bench.until("step", "abc")
        bad, good = await bench.queued("bad", "good")
        bench.go_on(100)

        assert text_of(await soon(good)) == "good"
        assert text_of(await soon(running)) == "abc"
        with pytest.raises(RuntimeError, match="generation failed"):
            await soon(bad)

    async def test_of_a_step_are_tried_again_one_by_one(self, bench: Bench) -> None:
        bench.model.fail = failing_with("bad", "step")
        one, bad, two = await bench.queued("one", "bad", "two")
        bench.go_on(100)

        assert text_of(await soon(one)) == "one"
        assert text_of(await soon(two)) == "two"
        with pytest.raises(RuntimeError, match="generation failed"):
            await soon(bad)

    async def test_too_little_memory_is_said_as_such(self, bench: Bench) -> None:
        def fail(what: str, prompts: list[str]) -> None:
            raise MemoryError

        bench.model.fail = fail
        bench.go_on()

        with pytest.raises(OutOfMemory):
            await soon(bench.submit("a"))

    async def test_the_engine_goes_on(self, bench: Bench) -> None:
        bench.model.fail = failing_with("bad", "step")
        bench.go_on(100)
        with pytest.raises(RuntimeError):
            await soon(bench.submit("bad"))

        assert text_of(await soon(bench.submit("good"))) == "good"


class Listener:
    """Somebody who reads a stream: what came, and how it ended."""

    def __init__(self, bench: Bench, item: str, **options: Any) -> None:
        self.text = ""
        self.result: Generated | None = None
        deadline = options.pop("deadline", None) or later()
        self._stream = bench.engine.stream(item, Sampling(max_tokens=99), deadline, **options)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async with aclosing(self._stream) as parts:
            async for part in parts:
                if isinstance(part, Generated):
                    self.result = part
                else:
                    self.text += "".join(chr(token) for token in part if token != END)

    async def has_heard(self, text: str) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while self.text != text:
                await asyncio.sleep(0)


class TestStreams:
    async def test_tell_tokens_as_they_are_made_and_then_the_result(self, bench: Bench) -> None:
        listener = Listener(bench, "abc")
        await bench.until("step", "abc")
        await listener.has_heard("a")
        bench.go_on()
        await listener.has_heard("ab")
        assert listener.result is None

        bench.go_on(5)
        await soon(listener.task)

        assert listener.text == "abc"
        assert listener.result == Generated((*map(ord, "abc"), END), "stop", 3)

    async def test_share_their_steps_with_requests_that_are_not_streamed(self, bench: Bench) -> None:
        (plain,) = await bench.queued("plain")
        listener = Listener(bench, "streamed")
        bench.go_on(100)
        await soon(listener.task)

        assert listener.text == "streamed"
        assert text_of(await soon(plain)) == "plain"

    async def test_a_listener_who_leaves_ends_its_row_at_the_next_token(self, bench: Bench) -> None:
        listener = Listener(bench, "abcdef")
        await bench.until("step", "abcdef")
        (stays,) = await bench.queued("uvwxyz")
        bench.go_on()
        await bench.until("step", "abcdef", "uvwxyz")

        listener.task.cancel()
        await asyncio.gather(listener.task, return_exceptions=True)
        bench.go_on()

        assert await bench.next() == ("step", ["uvwxyz"])
        bench.go_on(10)
        assert text_of(await soon(stays)) == "uvwxyz"

    async def test_a_listener_who_has_heard_enough_gets_the_result_of_what_it_heard(self, bench: Bench) -> None:
        is_enough = threading.Event()
        listener = Listener(bench, "abcdef", is_enough=is_enough.is_set)
        await bench.until("step", "abcdef")

        is_enough.set()
        bench.go_on()
        await soon(listener.task)

        assert listener.text == "ab"
        assert listener.result == Generated((ord("a"), ord("b")), "length", 6)

    async def test_a_row_that_is_tried_again_tells_no_token_twice(self, bench: Bench) -> None:
        bench.model.fail = failing_with("bad", "step", after=2)
        listener = Listener(bench, "abcdef")
        await asyncio.sleep(0)
        (bad,) = await bench.queued("bad")
        bench.go_on(100)
        await soon(listener.task)

        assert listener.text == "abcdef"
        with pytest.raises(RuntimeError):
            await soon(bad)

    async def test_a_failure_comes_behind_the_tokens_that_were_made(self, bench: Bench) -> None:
        bench.model.fail = failing_with("abc", "step", after=1)
        listener = Listener(bench, "abc")
        bench.go_on(100)

        with pytest.raises(RuntimeError):
            await soon(listener.task)
        assert listener.text == "ab"

    async def test_the_deadline_holds_between_tokens(self, bench: Bench) -> None:
        with pytest.raises(DeadlineExceeded):
            await soon(Listener(bench, "slow", deadline=Deadline.after(0.01)).task)

    async def test_closing_the_engine_turns_away_who_waits_and_ends_what_runs(self, make_bench: MakeBench) -> None:
        bench = await make_bench(max_batch=1)
        (running,) = await bench.queued("ab")
        await bench.until("step", "ab")
        listener = Listener(bench, "x")
        await asyncio.sleep(0)

        closing = asyncio.create_task(bench.engine.close())

        with pytest.raises(Unavailable):
            await soon(listener.task)
        bench.go_on(5)
        assert text_of(await soon(running)) == "ab"
        await soon(closing)


def failing_with(prompt: str, what: str, after: int = 0) -> Callable[[str, list[str]], None]:
    """Fail whenever this is done with that prompt, the first `after` times excepted."""
    times = 0

    def fail(done: str, prompts: list[str]) -> None:
        nonlocal times
        if done == what and prompt in prompts:
            times += 1
            if times > after:
                raise ValueError(hf.__name__)

    return fail
