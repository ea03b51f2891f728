"""Work begun ahead: in order, bounded, and nothing is left behind."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from sightline.jobs.ahead import ahead


class Work:
    """Items that end when they are told to; knows what is under way."""

    def __init__(self) -> None:
        self.ends: dict[int, asyncio.Future[int]] = {}
        self.begun: list[int] = []
        self.cancelled: list[int] = []

    async def __call__(self, number: int) -> int:
        self.begun.append(number)
        self.ends[number] = asyncio.get_running_loop().create_future()
        try:
            return await self.ends[number]
        except asyncio.CancelledError:
            self.cancelled.append(number)
            raise


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_results_come_in_the_order_of_the_inputs_whoever_ends_first() -> None:
    work = Work()
    found: list[int] = []

    async def take() -> None:
        async for result in ahead(work, range(4), 4):
            found.append(result)

    taking = asyncio.create_task(take())
    await settle()
    for number in (3, 1, 2):
        work.ends[number].set_result(number * 10)
    await settle()
    assert found == []
    work.ends[0].set_result(0)
    await taking
    assert found == [0, 10, 20, 30]


async def test_no_more_is_begun_than_may_wait_and_inputs_are_drawn_as_places_come_free() -> None:
    drawn: list[int] = []

    def inputs() -> Iterator[int]:
        for number in range(1_000_000):
            drawn.append(number)
            yield number

    async def work(number: int) -> int:
        return number

    async with aclosing(ahead(work, inputs(), 3)) as results:
        assert [await anext(results) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert len(drawn) <= 8


async def test_the_first_fault_in_order_is_raised_and_the_others_are_cancelled() -> None:
    work = Work()
    results = ahead(work, range(4), 4)
    taking = asyncio.ensure_future(anext(results))
    await settle()
    work.ends[2].set_exception(KeyError("later"))
    work.ends[0].set_exception(ValueError("first"))
    with pytest.raises(ValueError, match="first"):
        await taking
    assert work.cancelled == [1, 3]


async def test_leaving_half_way_cancels_what_was_begun() -> None:
    work = Work()
    async with aclosing(ahead(work, range(9), 3)) as results:
        taking = asyncio.ensure_future(anext(results))
        await settle()
        work.ends[0].set_result(0)
        assert await taking == 0
    assert work.begun == [0, 1, 2]
    assert work.cancelled == [1, 2]


async def test_of_nothing_comes_nothing() -> None:
    assert [result async for result in ahead(Work(), [], 3)] == []
