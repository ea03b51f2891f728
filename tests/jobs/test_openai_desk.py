"""A server's desk for files and batches: opened behind its start, and said to be closed until then."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from obstore.store import MemoryStore

from sightline.errors import Unavailable
from sightline.jobs.objects import NoConditionalWrites, Objects, StoreUnavailable
from sightline.jobs.openai.desk import Desk
from sightline.jobs.openai.files import Files


class Backend:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.starts = self.closes = 0
        self.is_away = False

    async def start(self) -> None:
        self.starts += 1
        if self.is_away:
            raise StoreUnavailable("away")

    async def close(self) -> None:
        self.closes += 1


class Store:
    """A store that is away for its first `failures` openings."""

    def __init__(self, failures: list[Exception]) -> None:
        self.failures = failures
        self.pauses: list[float] = []
        self.backend = Backend()
        self.may_go_on = asyncio.Event()
        self.desk = Desk(self.open, lambda objects: Files(objects, ttl_seconds=60), self.backend_of, sleep=self.sleep)

    def open(self) -> Objects:
        if self.failures:
            raise self.failures.pop(0)
        return Objects(MemoryStore())

    def backend_of(self, objects: Objects, files: Files) -> Any:
        return self.backend

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await self.may_go_on.wait()


@pytest.fixture
async def away() -> AsyncIterator[Store]:
    store = Store([StoreUnavailable("away"), PermissionError("no"), NoConditionalWrites("overwrites")])
    yield store
    await store.desk.close()


async def test_until_the_store_is_there_it_is_closed(away: Store) -> None:
    away.desk.start()
    await away.desk.wait()
    with pytest.raises(Unavailable) as caught:
        assert away.desk.files
    assert (caught.value.code, caught.value.retry_after) == ("store_unavailable", 5)
    away.may_go_on.set()
    async with asyncio.timeout(30):
        while away.backend.starts == 0:
            await asyncio.sleep(0.01)
    assert away.pauses[:3] == [1.0, 2.0, 4.0]
    assert away.desk.backend is away.backend
    await away.desk.close()
    assert away.backend.closes == 1


async def test_whoever_asks_at_the_start_waits_for_it() -> None:
    store = Store([])
    store.desk.start()
    await store.desk.wait()
    assert store.desk.files is store.desk.files
    await store.desk.close()


async def test_unfinished_batches_are_taken_up_when_the_store_is_back() -> None:
    store = Store([])
    store.backend.is_away = True
    store.desk.start()
    async with asyncio.timeout(30):
        while not store.pauses:
            await asyncio.sleep(0.01)
    store.backend.is_away = False
    store.may_go_on.set()
    async with asyncio.timeout(30):
        while store.backend.starts < 2:
            await asyncio.sleep(0.01)
    await store.desk.close()


async def test_a_desk_that_was_never_started_closes() -> None:
    await Store([]).desk.close()
