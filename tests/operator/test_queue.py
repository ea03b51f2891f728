"""The work queue: each key once, one at a time, earliest first, with backoff."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline_operator.queue import Key, Queue, WorkQueue
from sightline_operator.queue.work import CAP_SECONDS, backoff_seconds

A, B = Key("VisionPipeline", "ns", "a"), Key("VisionPipeline", "ns", "b")


def queue() -> WorkQueue:
    return WorkQueue(random.Random(1))


def test_a_key_added_twice_is_taken_once() -> None:
    work = queue()
    work.add(A, 0.0)
    work.add(A, 1.0)
    assert work.take(2.0) == (A, 2.0)
    assert work.take(2.0) is None


def test_a_key_is_not_worked_on_twice_at_once_and_comes_back_when_it_changed_meanwhile() -> None:
    work = queue()
    work.add(A, 0.0)
    work.take(0.0)
    work.add(A, 1.0)
    assert work.take(1.0) is None
    work.done(A, 2.0)
    assert work.take(3.0) == (A, 2.0)


def test_news_that_was_none_is_taken_back_and_other_news_stays() -> None:
    work = queue()
    work.add(A, 0.0)
    work.take(0.0)
    work.add(A, 1.0, why="own write")
    work.retract(A, "own write")
    work.done(A, 2.0)
    assert work.take(3.0) is None
    for other in ("somebody's write", None):
        work.add(A, 4.0)
        work.take(4.0)
        work.add(A, 5.0, why="own write")
        work.add(A, 6.0, why=other)
        work.retract(A, "own write")
        work.done(A, 7.0)
        assert work.take(8.0) == (A, 3.0)
        work.done(A, 8.0)


def test_what_was_taken_back_is_news_the_next_time() -> None:
    work = queue()
    work.add(A, 0.0)
    work.take(0.0)
    work.retract(A, "never told")
    work.add(A, 1.0, why="news")
    work.done(A, 2.0)
    work.retract(A, "news")  # too late: it is due, and nobody works on it
    assert work.take(3.0) == (A, 2.0)


def test_keys_come_in_the_order_in_which_they_became_due() -> None:
    work = queue()
    work.add(B, 0.0, delay=2.0)
    work.add(A, 1.0)
    assert [work.take(5.0), work.take(5.0)] == [(A, 4.0), (B, 3.0)]


def test_of_several_later_visits_the_earliest_counts() -> None:
    work = queue()
    for delay in (30.0, 10.0, 20.0):
        work.add(A, 0.0, delay)
    assert work.next_due() == 10.0
    assert work.take(9.9) is None
    assert work.take(10.0) == (A, 0.0)
    work.done(A, 10.0)
    assert work.take(100.0) is None


def test_an_event_does_not_wait_for_a_later_visit() -> None:
    work = queue()
    work.add(A, 0.0, delay=300.0)
    work.add(A, 1.0)
    assert work.take(1.0) == (A, 0.0)
    work.done(A, 1.0)
    assert work.take(400.0) is None


@pytest.mark.parametrize(
    ("failures", "longest"), [(1, 0.5), (2, 1.0), (5, 8.0), (10, 256.0), (11, 300.0), (1000, 300.0)]
)
def test_backoff_doubles_to_five_minutes_and_jitter_takes_up_to_half(failures: int, longest: float) -> None:
    assert backoff_seconds(failures, 0.0) == longest
    assert backoff_seconds(failures, 1.0) == longest / 2


def test_a_failure_is_tried_again_later_and_success_forgets_it() -> None:
    work, now, waits = queue(), 0.0, []
    work.add(A, now)
    for _ in range(14):
        assert work.take(now) is not None
        waits.append(work.done(A, now, is_failed=True))
        assert work.take(now) is None
        now += waits[-1]
    assert waits == sorted(waits[:10]) + waits[10:]
    assert CAP_SECONDS / 2 <= waits[-1] <= CAP_SECONDS
    work.take(now)
    assert work.done(A, now) == 0.0
    work.add(A, now)
    work.take(now)
    assert work.done(A, now, is_failed=True) <= 0.5


def test_the_api_server_s_wish_to_wait_is_obeyed() -> None:
    work = queue()
    work.add(A, 0.0)
    work.take(0.0)
    assert work.done(A, 0.0, is_failed=True, at_least=7.0) == 7.0
    assert work.take(6.9) is None


def test_oldest_age_is_that_of_the_key_that_waits_longest() -> None:
    work = queue()
    assert work.oldest_age(5.0) == 0.0
    work.add(A, 1.0)
    work.add(B, 4.0)
    assert work.oldest_age(5.0) == 4.0
    assert len(work) == 2


def test_a_forgotten_key_is_not_visited_later() -> None:
    work = queue()
    work.add(A, 0.0, delay=5.0)
    work.forget(A)
    assert work.take(10.0) is None
    assert work.next_due() is None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "later", "take", "done", "fail"]), st.integers(0, 3)), max_size=80))
def test_whatever_happens_no_key_is_lost_and_none_is_worked_on_twice(steps: list[tuple[str, int]]) -> None:
    work, now = queue(), 0.0
    active: set[Key] = set()
    wanted: set[Key] = set()
    for step, number in steps:
        now += 0.25
        key = Key("k", "ns", str(number))
        if step in ("add", "later"):
            work.add(key, now, 3.0 if step == "later" else 0.0)
            wanted.add(key)
        elif step == "take" and (taken := work.take(now)) is not None:
            assert taken[0] not in active
            active.add(taken[0])
            wanted.discard(taken[0])
        elif step in ("done", "fail") and key in active:
            active.remove(key)
            if step == "fail":
                wanted.add(key)
            work.done(key, now, is_failed=step == "fail")
    for key in list(active):
        work.done(key, now)
    seen = set()
    while (taken := work.take(now + 1e6)) is not None:
        seen.add(taken[0])
        work.done(taken[0], now + 1e6)
    assert wanted <= seen


async def test_a_worker_sleeps_until_something_is_due() -> None:
    work = Queue()
    taking = asyncio.create_task(work.take())
    await asyncio.sleep(0)
    assert not taking.done()
    work.add(A, delay=0.01)
    assert (await asyncio.wait_for(taking, 10))[0] == A
    work.done(A)
    second = asyncio.create_task(work.take())
    await asyncio.sleep(0)
    work.add(B)
    assert (await asyncio.wait_for(second, 10))[0] == B
