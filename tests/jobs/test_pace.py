"""How fast a worker asks: calls in flight, outages, patience and the budget of repeats, on a clock of our own."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from sightline.jobs.pace import LONGEST_PAUSE_SECONDS, RESERVE_REPEATS, START, Pace, TargetGone


class Time:
    """A clock that goes on when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class Target:
    """Says whether it is ready; counts how often it was asked."""

    def __init__(self) -> None:
        self.is_up = True
        self.probes = 0
        self.up_after: int | None = None

    async def is_ready(self) -> bool:
        self.probes += 1
        return self.is_up or (self.up_after is not None and self.probes > self.up_after)


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture
async def pace(time: Time, target: Target) -> AsyncIterator[Pace]:
    made = paced(time, target)
    yield made
    await made.aclose()


def paced(time: Time, target: Target, most: int = 16, patience: float = 600) -> Pace:
    return Pace(
        most, target.is_ready, patience_seconds=patience, clock=time.clock, sleep=time.sleep, jitter=lambda: 0.5
    )


async def answer(pace: Pace, times: int = 1) -> None:
    for _ in range(times):
        async with pace.turn():
            pace.answered()


async def refuse(pace: Pace, times: int = 1) -> None:
    for _ in range(times):
        async with pace.turn() as number:
            pace.refused(number)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class TestInFlight:
    async def test_begins_at_four_and_no_more_get_a_turn(self, pace: Pace) -> None:
        async with AsyncExitStack() as turns:
            for _ in range(START):
                await turns.enter_async_context(pace.turn())
            late = asyncio.create_task(answer(pace))
            await settle()
            assert (pace.in_flight, late.done()) == (START, False)
        await late
        assert pace.in_flight == 0

    async def test_a_worker_that_may_have_fewer_begins_with_fewer(self, time: Time, target: Target) -> None:
        assert paced(time, target, most=2).limit == 2

    async def test_answers_raise_it_to_the_most_and_not_beyond(self, pace: Pace) -> None:
        await answer(pace, 5)
        assert pace.limit == START + 5
        await answer(pace, 50)
        assert pace.limit == 16

    async def test_enough_halves_it_once_for_calls_that_began_together(self, pace: Pace) -> None:
        await answer(pace, 12)
        async with AsyncExitStack() as turns:
            rounds = [await turns.enter_async_context(pace.turn()) for _ in range(10)]
            for number in rounds:
                pace.throttled(number)
        assert pace.limit == 8

    async def test_it_never_falls_below_one(self, pace: Pace) -> None:
        for _ in range(10):
            async with pace.turn() as number:
                pace.throttled(number)
        assert pace.limit == 1
        assert pace.waiting == "Throttled"

    async def test_after_the_first_enough_a_round_of_answers_adds_one(self, pace: Pace) -> None:
        await answer(pace, 4)
        async with pace.turn() as number:
            pace.throttled(number)
        assert pace.limit == 4
        await answer(pace, 4)
        assert pace.limit == 4
        await answer(pace, 1)
        assert (pace.limit, pace.waiting) == (5, "")

    async def test_who_waits_and_is_cancelled_takes_no_place_along(self, pace: Pace) -> None:
        async with AsyncExitStack() as turns:
            for _ in range(START):
                await turns.enter_async_context(pace.turn())
            waiting = [asyncio.create_task(answer(pace)) for _ in range(3)]
            await settle()
            waiting[0].cancel()
        waiting[1].cancel()  # its turn has just come
        await asyncio.gather(*waiting, return_exceptions=True)
        assert waiting[2].exception() is None
        assert pace.in_flight == 0
        await asyncio.wait_for(answer(pace), 5)


class TestOutage:
    async def test_two_refusals_are_no_outage(self, pace: Pace, target: Target) -> None:
        await refuse(pace, 2)
        await answer(pace)
        await refuse(pace, 2)
        assert (pace.waiting, target.probes) == ("Throttled", 0)

    async def test_three_in_a_row_close_the_gate_until_the_target_is_ready(self, pace: Pace, target: Target) -> None:
        target.is_up, target.up_after = False, 5
        await refuse(pace, 3)
        assert (pace.waiting, pace.limit) == ("BackendUnavailable", 0)
        before = pace.signs
        await asyncio.wait_for(answer(pace), 5)
        assert target.probes == 6
        assert pace.signs == before + 2, "its readiness and the answer"
        assert pace.waiting == ""

    async def test_then_it_begins_with_one_call_and_grows_fast(self, pace: Pace) -> None:
        await answer(pace, 12)
        await refuse(pace, 3)
        await settle()
        assert pace.limit == 1
        await answer(pace, 5)
        assert pace.limit == 6

    async def test_pauses_between_probes_grow_and_are_scattered(self, time: Time, target: Target) -> None:
        target.is_up, target.up_after = False, 9
        pace = paced(time, target)
        await refuse(pace, 3)
        await asyncio.wait_for(answer(pace), 5)
        assert time.slept[:4] == [0.25, 0.5, 1.0, 2.0]
        assert max(time.slept) == LONGEST_PAUSE_SECONDS

    async def test_a_target_that_says_ready_and_refuses_is_asked_less_and_less(
        self, time: Time, target: Target
    ) -> None:
        pace = paced(time, target)
        for _ in range(4):
            await refuse(pace, 3)
            await settle()
        assert time.slept == [0.25, 0.5, 1.0, 2.0]

    async def test_patience_ends(self, time: Time, target: Target) -> None:
        target.is_up = False
        pace = paced(time, target, patience=60)
        await refuse(pace, 3)
        with pytest.raises(TargetGone, match="60 seconds"):
            await asyncio.wait_for(answer(pace), 5)
        with pytest.raises(TargetGone):
            await answer(pace)
        assert 60 < time.now < 60 + 2 * LONGEST_PAUSE_SECONDS

    async def test_patience_begins_anew_with_every_answer(self, time: Time, target: Target) -> None:
        pace = paced(time, target, patience=60)
        for _ in range(5):
            async with pace.turn() as number:
                pace.throttled(number)
            time.now += 50
            await answer(pace)

    async def test_a_target_that_is_only_ever_busy_is_given_up_too(self, time: Time, target: Target) -> None:
        pace = paced(time, target, patience=60)

        async def ask_on() -> None:
            while True:
                async with pace.turn() as number:
                    pace.throttled(number)
                await pace.pause(1, retry_after=5)

        with pytest.raises(TargetGone):
            await ask_on()
        assert time.now < 80


class TestPausesAndRepeats:
    async def test_what_the_target_asks_for_is_kept(self, pace: Pace, time: Time) -> None:
        await pace.pause(1, retry_after=7)
        assert 7 <= time.slept[0] <= 7 * 1.25

    async def test_else_pauses_double(self, pace: Pace, time: Time) -> None:
        for tried in (1, 2, 3, 30):
            await pace.pause(tried)
        assert time.slept == [0.5, 1.0, 2.0, LONGEST_PAUSE_SECONDS]

    async def test_repeats_are_free_within_the_reserve_then_as_often_as_answers_allow(
        self, pace: Pace, time: Time
    ) -> None:
        for _ in range(int(RESERVE_REPEATS)):
            await pace.repeat()
        assert time.slept == []
        await answer(pace, 2)
        await pace.repeat()
        assert time.slept == []
        await pace.repeat()
        assert time.slept == [1.0], "one a second when nothing is answered"
