"""Jobs behind requests: every item once, whoever is killed, cancelled or late; any replica knows. The clock is ours."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import obstore
import orjson
import pytest
from obstore.store import MemoryStore, ObjectStore

from sightline.errors import QueueFull
from sightline.jobs import runner as module
from sightline.jobs.inputs import InputFault
from sightline.jobs.items import Fault, Item, Line
from sightline.jobs.leases import LEASE_SECONDS, MAX_HOLDERS
from sightline.jobs.objects import Objects, open_store
from sightline.jobs.runner import Job, Runner, State

T = TypeVar("T")

ME, OTHER = "principal-1", "principal-2"
TTL_SECONDS = 1800.0
LEASE_ENDED = LEASE_SECONDS + 1
PATIENCE_SECONDS = 10


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """Does items: says their id and its own name, at once or as many as are let. `refused`: ids that fail."""

    def __init__(self, name: str = "server", *, free: int = 1_000_000, refused: Sequence[str] = ()) -> None:
        self.name = name
        self.calls: list[str] = []
        self.jobs: list[Job] = []
        self.began = asyncio.Semaphore(0)
        self.may_end = asyncio.Semaphore(free)
        self.cancelled: list[str] = []
        self._refused = refused

    async def __call__(self, job: Job, item: Item) -> Line:
        self.calls.append(item.custom_id)
        self.jobs.append(job)
        self.began.release()
        try:
            await self.may_end.acquire()
        except asyncio.CancelledError:
            self.cancelled.append(item.custom_id)
            raise
        if item.custom_id in self._refused:
            return Line(item, fault=Fault("decode", "decode_failed", "This is no image."))
        return Line(item, {"caption": f"{item.custom_id} by {self.name}"})

    async def begun(self, count: int) -> None:
        for _ in range(count):
            await soon(self.began.acquire())


async def soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await work


async def until(is_so: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not await is_so():
            await asyncio.sleep(0.005)


def items(count: int) -> list[Item]:
    return [Item(f"item-{number:03}") for number in range(count)]


def ids(count: int) -> list[str]:
    return [item.custom_id for item in items(count)]


@pytest.fixture(params=["memory", "folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "folder":
        return open_store(f"file://{tmp_path}/jobs", "x", endpoint_url=None, region=None)
    s3 = request.getfixturevalue("s3_server")
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    bucket = s3.bucket("runner")
    return open_store(f"s3://{bucket}/{uuid.uuid4()}", "x", endpoint_url=s3.endpoint_url, region=s3.region)


only_memory = pytest.mark.parametrize("store", ["memory"], indirect=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


Serve = Callable[..., Runner]


@pytest.fixture
async def serve(store: ObjectStore, clock: Clock) -> AsyncGenerator[Serve]:
    """Starts servers that share the store."""
    servers: list[Runner] = []

    def make(worker: Callable[[Job, Item], Awaitable[Line]], **options: Any) -> Runner:
        settled = {"ttl_seconds": TTL_SECONDS, "width": 4, "clock": clock} | options
        servers.append(Runner(Objects(store), "jobs", worker, **settled))
        return servers[-1]

    yield make
    for server in servers:
        await soon(server.close())


def keys(store: ObjectStore) -> list[str]:
    return sorted(str(meta["path"]) for page in obstore.list(store, "") for meta in page)


async def state_of(server: Runner, job: Job) -> State:
    state = await server.get(job.id, ME)
    assert state is not None
    return state


async def ended(server: Runner, job: Job) -> State:
    await soon(server.wait(job.id))
    state = await state_of(server, job)
    assert state.is_ended
    return state


async def rows(server: Runner, job: Job, which: Any = "all") -> list[dict[str, Any]]:
    return [orjson.loads(line) async for lines in server.lines(job.id, which) for line in lines.splitlines()]


class TestOneServer:
    async def test_every_item_has_one_line_in_order_and_the_failed_are_listed_apart(self, serve: Serve) -> None:
        server = serve(worker := Worker(refused=["item-003", "item-017"]))

        job = await server.submit(items(25), principal=ME, about={"what": 1}, shard_size=10, chunk_size=3)
        state = await ended(server, job)

        assert (state.status, state.total, state.error) == ("completed", 25, None)
        assert (state.counts.succeeded, state.counts.failed) == (23, 2)
        assert sorted(worker.calls) == ids(25)
        assert [row["custom_id"] for row in await rows(server, job)] == ids(25)
        assert [row["custom_id"] for row in await rows(server, job, "errors")] == ["item-003", "item-017"]
        assert len(await rows(server, job, "results")) == 23
        assert all(known == job for known in worker.jobs)
        assert job.about == {"what": 1}

    async def test_uploads_reach_their_items_and_are_gone_in_the_end(self, serve: Serve, store: ObjectStore) -> None:
        found: dict[str, bytes | None] = {}

        async def look(job: Job, item: Item) -> Line:
            found[item.custom_id] = await server.upload(job, item)
            return Line(item, {})

        server = serve(look)
        asked = [Item("a", uri="upload:one"), Item("b"), Item("c", uri="upload:lost")]
        await ended(server, await server.submit(asked, principal=ME, uploads={"one": b"\x00\xff"}))
        await soon(server.close())

        assert found == {"a": b"\x00\xff", "b": None, "c": None}
        assert not [key for key in keys(store) if "/uploads/" in key]

    @only_memory
    async def test_what_breaks_is_an_internal_error_without_its_text(self, serve: Serve) -> None:
        async def broken(job: Job, item: Item) -> Line:
            raise RuntimeError("CUDA error: hunter2")

        server = serve(broken)
        job = await server.submit(items(2), principal=ME)
        state = await ended(server, job)

        assert (state.status, state.counts.failed) == ("completed", 2)
        said = await rows(server, job)
        assert {row["error"]["code"] for row in said} == {"internal"}
        assert "hunter2" not in str(said)

    @only_memory
    async def test_times_tell_what_happened(self, serve: Serve, clock: Clock) -> None:
        server = serve(worker := Worker(free=0))
        job = await server.submit(items(1), principal=ME)
        await worker.begun(1)
        assert (await state_of(server, job)).times == {"created": clock.now, "planned": clock.now}

        clock.now += 10
        worker.may_end.release()
        state = await ended(server, job)

        assert (state.times["planned"], state.times["ended"]) == (job.created, job.created + 10)
        assert state.expires == job.created + 10 + TTL_SECONDS

    @only_memory
    async def test_more_than_it_can_hold_is_refused(self, serve: Serve) -> None:
        server = serve(Worker(free=0), max_open=10)
        await server.submit(items(9), principal=ME)

        with pytest.raises(QueueFull):
            await server.submit(items(2), principal=ME)

    @only_memory
    async def test_closing_waits_as_long_as_it_was_told(self, serve: Serve) -> None:
        server = serve(worker := Worker(free=0))
        job = await server.submit(items(1), principal=ME)
        await worker.begun(1)

        closing = asyncio.create_task(server.close(PATIENCE_SECONDS))
        await asyncio.sleep(0)
        worker.may_end.release()
        await soon(closing)

        assert (await state_of(server, job)).status == "completed"


class TestItemsBehindTheRequest:
    async def test_are_planned_after_the_answer(self, serve: Serve) -> None:
        may_list = asyncio.Event()

        async def listed(job: Job) -> AsyncGenerator[Item]:
            await may_list.wait()
            for item in items(7):
                yield item

        server = serve(Worker(), items_of=listed)
        job = await server.submit(None, principal=ME, chunk_size=2)
        before = await state_of(server, job)
        assert (before.status, before.total) == ("planning", None)

        may_list.set()
        state = await ended(server, job)

        assert (state.status, state.total) == ("completed", 7)

    async def test_that_are_no_good_fail_the_job_with_their_reason(self, serve: Serve) -> None:
        async def wrong(job: Job) -> AsyncGenerator[Item]:
            yield Item("first")
            raise InputFault("InvalidManifest", "line 2 is not JSON")

        server = serve(worker := Worker(), items_of=wrong)
        job = await server.submit(None, principal=ME)
        state = await ended(server, job)

        assert state.status == "failed"
        assert state.error == {"code": "InvalidManifest", "message": "line 2 is not JSON"}
        assert worker.calls == []
        assert await rows(server, job) == []

    @only_memory
    async def test_are_listed_once_though_the_server_was_killed(self, serve: Serve, clock: Clock) -> None:
        listings: list[str] = []

        async def listed(job: Job) -> AsyncGenerator[Item]:
            listings.append(job.id)
            for item in items(4):
                yield item

        victim = serve(killed := Worker(free=0), items_of=listed)
        job = await victim.submit(None, principal=ME, chunk_size=1)
        await killed.begun(1)
        clock.now += LEASE_ENDED

        heir = serve(Worker("heir"), items_of=listed)
        await heir.sweep()

        assert (await ended(heir, job)).counts.succeeded == 4
        assert listings == [job.id]


class TestEndingEarly:
    async def test_cancelling_keeps_what_is_done_and_lists_the_rest(self, serve: Serve) -> None:
        server = serve(worker := Worker(free=5), width=2)
        job = await server.submit(items(20), principal=ME, chunk_size=2, shard_size=8)
        await worker.begun(7)

        said = await server.cancel(job.id, ME)
        state = await ended(server, job)

        assert said is not None
        assert said.status == "cancelling"
        assert (state.status, state.counts.succeeded, state.counts.failed) == ("cancelled", 5, 15)
        assert [row["custom_id"] for row in await rows(server, job)] == ids(20)
        assert {row["error"]["code"] for row in await rows(server, job, "errors")} == {"batch_cancelled"}
        assert len(worker.calls) == 7
        assert sorted(worker.cancelled) == ["item-005", "item-006"]
        assert state.times["cancelling"] == job.created

    async def test_any_replica_may_cancel(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "WATCH_SECONDS", 0.01)
        first, second = serve(worker := Worker(free=0)), serve(Worker())
        job = await first.submit(items(6), principal=ME, chunk_size=1)
        await worker.begun(4)

        said = await second.cancel(job.id, ME)
        assert said is not None
        assert said.status == "cancelling"

        assert (await ended(first, job)).status == "cancelled"
        assert (await state_of(second, job)).counts.failed == 6

    @only_memory
    async def test_somebody_else_may_not(self, serve: Serve) -> None:
        server = serve(worker := Worker(free=0))
        job = await server.submit(items(1), principal=ME)

        assert await server.cancel(job.id, OTHER) is None

        worker.may_end.release()
        assert (await ended(server, job)).status == "completed"

    @only_memory
    async def test_comes_too_late_for_an_ended_job(self, serve: Serve) -> None:
        server = serve(Worker())
        job = await server.submit(items(3), principal=ME)
        before = await ended(server, job)

        assert await server.cancel(job.id, ME) == before
        assert await state_of(server, job) == before

    @only_memory
    async def test_a_job_that_nobody_holds_is_cancelled_too(self, serve: Serve, store: ObjectStore) -> None:
        victim = serve(Worker(free=0))
        job = await victim.submit(items(3), principal=ME)
        await victim.close()
        obstore.delete(store, f"jobs/{job.id}/holders/lease-0")
        server = serve(worker := Worker(free=0))

        await server.cancel(job.id, ME)

        assert (await ended(server, job)).status == "cancelled"
        assert set(worker.cancelled) == set(worker.calls)

    async def test_what_is_not_done_in_time_has_expired(
        self, serve: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "WATCH_SECONDS", 0.01)
        server = serve(worker := Worker(free=3), width=1)
        job = await server.submit(items(9), principal=ME, chunk_size=2, window_seconds=3600)
        await worker.begun(4)
        clock.now += 3599
        await asyncio.sleep(0.05)
        assert (await state_of(server, job)).status == "running"

        clock.now += 2
        state = await ended(server, job)

        assert (state.status, state.counts.succeeded, state.counts.failed) == ("expired", 3, 6)
        assert {row["error"]["code"] for row in await rows(server, job, "errors")} == {"batch_expired"}
        assert [row["custom_id"] for row in await rows(server, job)] == ids(9)


class TestManyServers:
    async def test_a_killed_server_s_job_goes_on_where_its_chunks_end(self, serve: Serve, clock: Clock) -> None:
        victim = serve(killed := Worker("victim", free=7), width=2)
        job = await victim.submit(items(12), principal=ME, chunk_size=2, shard_size=6)
        await killed.begun(9)

        async def has_three_chunks() -> bool:
            return len(await victim.chunks(job.id)) == 3

        await until(has_three_chunks)
        clock.now += LEASE_ENDED
        heir = serve(worker := Worker("heir"))
        await heir.sweep()
        state = await ended(heir, job)

        assert (state.status, state.counts.succeeded) == ("completed", 12)
        said = {row["custom_id"]: row["caption"] for row in await rows(heir, job)}
        assert list(said) == ids(12)
        assert {name for name, caption in said.items() if "victim" in caption} == set(ids(6))
        assert sorted(worker.calls) == ids(12)[6:]

    async def test_counts_are_known_everywhere(self, serve: Serve) -> None:
        first, second = serve(worker := Worker(free=4), width=2), serve(Worker())
        job = await first.submit(items(8), principal=ME, chunk_size=2, shard_size=4)
        await worker.begun(6)

        async def knows() -> bool:
            return (await state_of(second, job)).counts.succeeded == 4

        await until(knows)
        assert (await state_of(second, job)).total == 8
        for _ in range(4):
            worker.may_end.release()
        await ended(first, job)
        assert (await state_of(second, job)).counts.succeeded == 8

    async def test_who_was_away_for_too_long_leaves_its_job_to_its_heir(
        self, serve: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "WATCH_SECONDS", 0.01)
        slow = serve(sleeper := Worker("slow", free=0))
        job = await slow.submit(items(6), principal=ME, chunk_size=1)
        await sleeper.begun(4)
        clock.now += LEASE_ENDED
        heir = serve(worker := Worker("heir", free=0))
        await heir.sweep()
        await worker.begun(4)

        await soon(slow.wait(job.id))

        assert sorted(sleeper.cancelled) == ids(6)[:4]
        for _ in range(6):
            worker.may_end.release()
        state = await ended(heir, job)
        assert state.counts.succeeded == 6
        assert all("heir" in row["caption"] for row in await rows(heir, job))

    @only_memory
    async def test_a_job_that_gets_further_each_time_is_never_given_up(self, serve: Serve, clock: Clock) -> None:
        count = 3 * MAX_HOLDERS
        server = serve(Worker(free=1), width=1)
        job = await server.submit(items(count), principal=ME, chunk_size=1)
        for done in range(1, count + 1):

            async def is_further(done: int = done, server: Runner = server) -> bool:
                return len(await server.chunks(job.id)) == done

            await until(is_further)
            if done < count:
                await server.close()
                clock.now += LEASE_ENDED
                server = serve(Worker(free=1), width=1)
                await server.sweep()

        assert (await ended(server, job)).counts.succeeded == count

    @only_memory
    async def test_one_that_ends_all_who_try_is_given_up(self, serve: Serve, clock: Clock) -> None:
        server = serve(worker := Worker(free=0))
        job = await server.submit(items(2), principal=ME)
        tried = 0
        while not (await state_of(server, job)).is_ended:
            assert tried < 3 * MAX_HOLDERS
            await worker.begun(1)
            tried += 1
            await server.close()
            clock.now += LEASE_ENDED
            server = serve(worker := Worker(free=0))
            await server.sweep()

        state = await state_of(server, job)
        assert tried == MAX_HOLDERS
        assert (state.status, state.error and state.error["code"]) == ("failed", "abandoned")


class TestListing:
    async def test_is_newest_first_in_pages_and_of_one_principal(self, serve: Serve, clock: Clock) -> None:
        server = serve(Worker())
        mine: list[str] = []
        for number in range(5):
            clock.now += 1
            mine.insert(0, (await server.submit(items(1), principal=ME, about={"n": number})).id)
            await server.submit(items(1), principal=OTHER)

        first = await server.list(ME, limit=2)
        rest = await server.list(ME, after=first[-1].job.id, limit=10)

        assert [state.job.id for state in [*first, *rest]] == mine
        assert len(first) == 2
        assert first[0].job.about == {"n": 4}
        assert await server.list("nobody") == []
        assert await server.list(ME, after=str(uuid.uuid4())) == []

    @only_memory
    async def test_leaves_out_what_has_expired(self, serve: Serve, clock: Clock, store: ObjectStore) -> None:
        server = serve(Worker())
        await ended(server, await server.submit(items(1), principal=ME))
        clock.now += TTL_SECONDS + 1

        assert await server.list(ME) == []
        assert keys(store) == []
