"""Batches over an object store: every item decided once, whoever is killed; any replica knows. The clock is ours."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import obstore
import orjson
import pytest
from obstore.store import MemoryStore, ObjectStore

from sightline.errors import QueueFull
from sightline.jobs import objects
from sightline.jobs import runner as module
from sightline.jobs.batches import MAX_CHUNKS, Batches, BatchState
from sightline.jobs.leases import LEASE_SECONDS, MAX_HOLDERS
from sightline.jobs.objects import open_store
from sightline.jobs.runner import ORPHAN_SECONDS

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
    """What a server does with an item: says its own name, at once or when it is let."""

    def __init__(self, name: str = "server", *, free: int = 1_000_000, faults: Mapping[int, Exception] = {}) -> None:
        self.name = name
        self.calls: list[tuple[int, bytes | None]] = []
        self.began = asyncio.Semaphore(0)
        self.may_end = asyncio.Semaphore(free)
        self.running = self.most = 0
        self._faults = faults

    async def __call__(self, item: Mapping[str, Any], data: bytes | None) -> Mapping[str, Any]:
        self.calls.append((item["number"], data))
        self.running += 1
        self.most = max(self.most, self.running)
        self.began.release()
        try:
            await self.may_end.acquire()
        finally:
            self.running -= 1
        if item["number"] in self._faults:
            raise self._faults[item["number"]]
        if item.get("bad"):
            return {"error": "No image.", "code": "invalid_image"}
        return {"caption": f"{item['number']} by {self.name}"}

    async def begun(self, count: int) -> None:
        for _ in range(count):
            await soon(self.began.acquire())


async def soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await work


def items(count: int) -> list[dict[str, Any]]:
    return [{"number": number} for number in range(count)]


@pytest.fixture(params=["memory", "folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    if request.param == "memory":
        return MemoryStore()
    if request.param == "folder":
        return open_store(f"file://{tmp_path}/jobs", "blip", endpoint_url=None, region=None)
    s3 = request.getfixturevalue("s3_server")
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    bucket = s3.bucket("batches")
    return open_store(f"s3://{bucket}/{uuid.uuid4()}", "blip", endpoint_url=s3.endpoint_url, region=s3.region)


only_memory = pytest.mark.parametrize("store", ["memory"], indirect=True)


@pytest.fixture
def clock() -> Clock:
    return Clock()


Serve = Callable[..., Batches]


@pytest.fixture
async def serve(store: ObjectStore, clock: Clock) -> Any:
    """Starts servers that share the store."""
    servers: list[Batches] = []

    def make(worker: Worker, **options: Any) -> Batches:
        settled = {"ttl_seconds": TTL_SECONDS, "width": 4, "clock": clock} | options
        servers.append(Batches(store, worker, **settled))
        return servers[-1]

    yield make
    for server in servers:
        await soon(server.close())


def keys(store: ObjectStore) -> list[str]:
    return sorted(str(meta["path"]) for page in obstore.list(store, "") for meta in page)


def read(store: ObjectStore, key: str) -> Any:
    return orjson.loads(bytes(obstore.get(store, key).bytes()))


async def state_of(server: Batches, batch_id: str) -> BatchState:
    state = await server.get(batch_id, ME)
    assert state is not None
    return state


async def finished(server: Batches, batch_id: str) -> BatchState:
    await soon(server.wait(batch_id))
    state = await state_of(server, batch_id)
    assert state.status != "in_progress"
    return state


async def has_done(server: Batches, batch_id: str, count: int) -> BatchState:
    """The state as soon as so many results are in the store."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while len((state := await state_of(server, batch_id)).results) < count:
            await asyncio.sleep(0)
    return state


class TestOneServer:
    async def test_every_item_is_done_once_and_in_order(self, serve: Serve) -> None:
        server = serve(worker := Worker())

        batch_id = await server.submit(items(40), {}, ME)
        state = await finished(server, batch_id)

        assert state.status == "completed"
        assert (state.total, state.failed, state.error) == (40, 0, None)
        assert list(state.results) == list(range(40))
        assert [result["caption"] for result in state.results.values()] == [f"{n} by server" for n in range(40)]
        assert sorted(number for number, _ in worker.calls) == list(range(40))

    async def test_uploads_reach_their_items_and_are_gone_at_the_end(self, serve: Serve, store: ObjectStore) -> None:
        server = serve(worker := Worker())

        batch_id = await server.submit(items(3), {0: b"zero", 2: b"two"}, ME)
        await finished(server, batch_id)
        await soon(server.close())

        assert sorted(worker.calls) == [(0, b"zero"), (1, None), (2, b"two")]
        assert not [key for key in keys(store) if "/uploads/" in key]

    async def test_all_is_stored_before_the_id_is_given_away(self, serve: Serve, store: ObjectStore) -> None:
        server = serve(Worker(free=0))

        batch_id = await server.submit(items(2), {0: b"a", 1: b"b"}, ME)

        stored = {key.removeprefix(f"batches/{batch_id}/") for key in keys(store)}
        assert {"request.json", "uploads/0", "uploads/1"} <= stored
        assert any(key.endswith("plan/PLAN.json") for key in stored)

    async def test_no_items_are_done_at_once(self, serve: Serve) -> None:
        server = serve(Worker())

        state = await finished(server, await server.submit([], {}, ME))

        assert (state.status, state.total, dict(state.results)) == ("completed", 0, {})

    async def test_what_is_done_can_be_seen_while_the_rest_runs(self, serve: Serve) -> None:
        server = serve(worker := Worker(free=3))
        batch_id = await server.submit(items(10), {}, ME)

        state = await has_done(server, batch_id, 3)

        assert state.status == "in_progress"
        assert (len(state.results), state.total) == (3, 10)
        worker.may_end = asyncio.Semaphore(0)

    async def test_an_item_that_fails_fails_alone(self, serve: Serve) -> None:
        server = serve(Worker(faults={1: RuntimeError("CUDA error: hunter2")}))

        state = await finished(server, await server.submit([*items(3), {"number": 9, "bad": True}], {}, ME))

        assert state.status == "completed"
        assert state.failed == 2
        assert state.results[1]["code"] == "internal_error"
        assert state.results[3] == {"error": "No image.", "code": "invalid_image"}
        assert "hunter2" not in str(state)

    async def test_no_more_than_its_width_is_worked_on_at_a_time(self, serve: Serve) -> None:
        server = serve(worker := Worker(free=0), width=3)
        ids = [await server.submit(items(9), {}, ME) for _ in range(3)]

        for done in range(27):
            await worker.begun(1)
            assert worker.running <= 3
            if done >= 2:
                worker.may_end.release()
        for _ in range(2):
            worker.may_end.release()
        for batch_id in ids:
            await finished(server, batch_id)

        assert worker.most == 3

    async def test_results_are_written_many_at_a_time(self, serve: Serve, store: ObjectStore) -> None:
        server = serve(Worker())

        batch_id = await server.submit(items(3 * MAX_CHUNKS), {}, ME)
        await finished(server, batch_id)

        assert len([key for key in keys(store) if "/parts/" in key]) == MAX_CHUNKS

    async def test_ids_cannot_be_guessed(self, serve: Serve) -> None:
        server = serve(Worker())

        ids = {await server.submit(items(1), {}, ME) for _ in range(5)}

        assert len(ids) == 5
        assert all(uuid.UUID(batch_id).version == 4 for batch_id in ids)

    @only_memory
    async def test_more_than_it_can_hold_is_refused_but_never_the_first(self, serve: Serve) -> None:
        server = serve(Worker(free=0), max_open=10)
        await server.submit(items(15), {}, ME)

        with pytest.raises(QueueFull):
            await server.submit(items(1), {}, ME)


class TestWhoMayAsk:
    @only_memory
    async def test_somebody_else_s_batch_is_unknown(self, serve: Serve) -> None:
        server = serve(Worker())
        batch_id = await server.submit(items(1), {}, ME)
        await finished(server, batch_id)

        assert await server.get(batch_id, OTHER) is None
        assert await server.get(batch_id, "") is None

    @only_memory
    @pytest.mark.parametrize("batch_id", ["", "nope", "../x", str(uuid.uuid4()), str(uuid.uuid4()).upper(), "a" * 999])
    async def test_an_id_that_is_none_is_unknown(self, serve: Serve, batch_id: str) -> None:
        assert await serve(Worker()).get(batch_id, ME) is None


class TestManyServers:
    async def test_any_replica_answers_while_it_runs_and_after(self, serve: Serve) -> None:
        first, second = serve(worker := Worker("first", free=2)), serve(other := Worker("second"))
        batch_id = await first.submit(items(4), {}, ME)

        running = await has_done(second, batch_id, 2)
        for _ in range(2):
            worker.may_end.release()
        ended = await finished(first, batch_id)

        assert running.status == "in_progress"
        assert await state_of(second, batch_id) == ended
        assert other.calls == []

    async def test_a_held_batch_is_not_taken_up_by_others(self, serve: Serve, clock: Clock) -> None:
        first, second = serve(Worker(free=0)), serve(other := Worker("second"))
        await first.submit(items(4), {}, ME)
        clock.now += LEASE_SECONDS - 1

        await second.sweep()

        assert other.calls == []

    async def test_a_stopped_server_s_work_goes_on_elsewhere_at_once(self, serve: Serve) -> None:
        first = serve(worker := Worker("first", free=5), width=2)
        batch_id = await first.submit(items(8), {7: b"seven"}, ME)
        before = await has_done(first, batch_id, 5)
        await first.close()

        second = serve(heir := Worker("second"))
        await second.start()
        state = await finished(second, batch_id)

        assert state.status == "completed"
        assert {i: state.results[i] for i in before.results} == before.results
        assert sorted(number for number, _ in heir.calls) == sorted(set(range(8)) - set(before.results))
        assert (7, b"seven") in heir.calls
        assert worker.running == 0

    async def test_results_are_kept_by_a_clean_stop(self, serve: Serve) -> None:
        first = serve(worker := Worker("first", free=3), width=4)
        batch_id = await first.submit(items(4), {}, ME)
        await worker.begun(4)
        await has_done(first, batch_id, 3)

        await first.close()

        assert len((await state_of(first, batch_id)).results) == 3

    async def test_only_one_of_many_takes_up_an_abandoned_batch(self, serve: Serve, clock: Clock) -> None:
        victim = serve(Worker(free=0))
        batch_id = await victim.submit(items(6), {}, ME)
        await victim.close()
        clock.now += LEASE_ENDED
        heirs = [Worker(str(number)) for number in range(4)]
        servers = [serve(heir) for heir in heirs]

        await asyncio.gather(*(server.sweep() for server in servers))
        for server in servers:
            await soon(server.wait(batch_id))

        assert sum(len(heir.calls) for heir in heirs) == 6
        assert (await state_of(servers[0], batch_id)).status == "completed"

    async def test_a_server_that_was_away_for_too_long_changes_nothing(self, serve: Serve, clock: Clock) -> None:
        """Its lease has ended, another goes on; what it still has open must neither count twice nor overwrite."""
        slow = serve(sleeper := Worker("sleeper", free=0), width=2)
        batch_id = await slow.submit(items(6), {}, ME)
        await sleeper.begun(2)
        clock.now += LEASE_ENDED
        fast = serve(Worker("fast"))
        await fast.sweep()
        ended = await finished(fast, batch_id)

        for _ in range(6):
            sleeper.may_end.release()
        await soon(slow.wait(batch_id))

        assert await state_of(slow, batch_id) == ended
        assert {result["caption"] for result in ended.results.values()} == {f"{n} by fast" for n in range(6)}

    async def test_two_that_write_at_once_agree(self, serve: Serve, clock: Clock) -> None:
        """Two holders with the same items open: each item counts as the first of them wrote it, for everybody."""
        first, second = serve(one := Worker("one", free=0), width=3), serve(two := Worker("two", free=0), width=3)
        batch_id = await first.submit(items(3), {}, ME)
        await one.begun(3)
        clock.now += LEASE_ENDED
        await second.sweep()
        await two.begun(3)

        for _ in range(3):
            one.may_end.release()
            two.may_end.release()
        await soon(first.wait(batch_id))
        await soon(second.wait(batch_id))

        states = [await state_of(serve(Worker()), batch_id) for _ in range(2)]
        assert states[0] == states[1]
        assert (states[0].status, sorted(states[0].results)) == ("completed", [0, 1, 2])

    async def test_a_batch_that_ends_every_server_is_given_up_with_what_is_done(
        self, serve: Serve, clock: Clock
    ) -> None:
        """The first holder got further, so it does not count: a long batch outlives any number of updates."""
        first = serve(worker := Worker(free=1), width=1)
        batch_id = await first.submit(items(3), {}, ME)
        await has_done(first, batch_id, 1)
        await first.close()
        holders = 1
        while (state := await state_of(first, batch_id)).status == "in_progress":
            assert holders < 20
            clock.now += LEASE_ENDED
            server = serve(worker := Worker(free=0), width=1)
            await server.sweep()
            if worker.calls or f"batches-{batch_id}" in {task.get_name() for task in asyncio.all_tasks()}:
                await worker.begun(1)
                holders += 1
            await server.close()

        assert holders == 1 + MAX_HOLDERS
        assert state.status == "failed"
        assert state.error is not None
        assert state.error["code"] == "batch_abandoned"
        assert list(state.results) == [0]

    @only_memory
    async def test_an_upload_that_is_gone_fails_its_item(self, serve: Serve, store: ObjectStore, clock: Clock) -> None:
        victim = serve(Worker(free=0))
        batch_id = await victim.submit(items(2), {0: b"x", 1: b"y"}, ME)
        await victim.close()
        clock.now += LEASE_ENDED
        obstore.delete(store, f"batches/{batch_id}/uploads/0")

        server = serve(Worker())
        await server.sweep()
        state = await finished(server, batch_id)

        assert state.results[0]["code"] == "upload_lost"
        assert "caption" in state.results[1]


class TestStoreAway:
    @only_memory
    async def test_results_that_could_not_be_written_are_done_again(
        self, serve: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def put(store: ObjectStore, key: str, *args: Any, **options: Any) -> Any:
            if "/parts/" in key:
                raise OSError("the store is away")
            return obstore.put(store, key, *args, **options)

        server = serve(worker := Worker())
        with monkeypatch.context() as patched:
            patched.setattr(objects, "obstore", SimpleNamespace(**vars(obstore) | {"put": put}))
            batch_id = await server.submit(items(2), {}, ME)
            await soon(server.wait(batch_id))
        assert (await state_of(server, batch_id)).status == "in_progress"

        clock.now += LEASE_ENDED
        await server.sweep()

        assert (await finished(server, batch_id)).status == "completed"
        assert len(worker.calls) == 4

    @only_memory
    async def test_a_write_that_was_repeated_by_the_store_s_client_is_no_rival(
        self, serve: Serve, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first attempt was stored, its answer was lost, the second finds the object there."""

        def put(store: ObjectStore, key: str, *args: Any, **options: Any) -> Any:
            if "/parts/" in key:
                obstore.put(store, key, *args, **options)
            return obstore.put(store, key, *args, **options)

        server = serve(Worker())
        monkeypatch.setattr(objects, "obstore", SimpleNamespace(**vars(obstore) | {"put": put}))

        state = await finished(server, await server.submit(items(40), {}, ME))

        assert (state.status, len(state.results)) == ("completed", 40)

    @only_memory
    async def test_broken_batches_and_foreign_objects_stop_nobody(
        self, serve: Serve, store: ObjectStore, clock: Clock
    ) -> None:
        victim = serve(Worker(free=0))
        batch_id = await victim.submit(items(1), {}, ME)
        await victim.close()
        clock.now += LEASE_ENDED
        for key in ("batches/stray", "batches/a/b/c/d", "batches/x/lease-y", "other/thing"):
            obstore.put(store, key, b"?")
        for key in ("request.json", "result.json"):
            for number, data in enumerate([b"", b"{", b"[]", b"null", b"{}"], start=len(key)):
                obstore.put(store, f"batches/{uuid.UUID(int=number)}/{key}", data)

        server = serve(Worker("heir"))
        await server.start()

        assert (await finished(server, batch_id)).status == "completed"

    @only_memory
    async def test_sweeps_again_though_the_store_was_away(
        self, serve: Serve, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sleeps, waking = asyncio.Semaphore(0), asyncio.Semaphore(0)

        async def sleep(seconds: float) -> None:
            sleeps.release()
            await waking.acquire()

        server = serve(worker := Worker())
        await server.start()
        monkeypatch.setattr(module, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
        monkeypatch.setattr(objects, "obstore", None)
        await soon(sleeps.acquire())
        waking.release()
        await soon(sleeps.acquire())  # that sweep failed
        monkeypatch.setattr(objects, "obstore", obstore)
        victim = serve(Worker(free=0))
        await victim.submit(items(1), {}, ME)
        await victim.close()

        waking.release()

        await worker.begun(1)


class TestTimeToLive:
    async def test_a_finished_batch_is_forgotten_whole(self, serve: Serve, store: ObjectStore, clock: Clock) -> None:
        server = serve(Worker())
        batch_id = await server.submit(items(2), {0: b"x"}, ME)
        await finished(server, batch_id)
        clock.now += TTL_SECONDS - 1
        assert await server.get(batch_id, ME) is not None

        clock.now += 2

        assert await server.get(batch_id, ME) is None
        assert keys(store) == []

    @only_memory
    async def test_the_sweep_forgets_what_nobody_asks_for(self, serve: Serve, store: ObjectStore, clock: Clock) -> None:
        server = serve(Worker())
        await finished(server, await server.submit(items(2), {}, ME))
        await server.sweep()
        assert keys(store) != []

        clock.now += TTL_SECONDS + 1
        await server.sweep()

        assert keys(store) == []

    @only_memory
    async def test_uploads_that_the_end_of_a_batch_left_behind_go_with_the_next_sweep(
        self, serve: Serve, store: ObjectStore
    ) -> None:
        server = serve(Worker())
        batch_id = await server.submit(items(1), {0: b"x"}, ME)
        await finished(server, batch_id)
        await soon(server.close())
        obstore.put(store, f"batches/{batch_id}/uploads/0", b"x")

        await server.sweep()

        assert not [key for key in keys(store) if "/uploads/" in key]
        assert (await state_of(server, batch_id)).status == "completed"

    @only_memory
    async def test_uploads_of_a_client_that_left_half_way_go_after_an_hour(
        self, serve: Serve, store: ObjectStore, clock: Clock
    ) -> None:
        server = serve(Worker(free=0))
        kept = await server.submit(items(1), {0: b"x"}, ME)
        left = f"batches/{uuid.uuid4()}/uploads/0"
        obstore.put(store, left, b"x")
        written = max(meta["last_modified"].timestamp() for page in obstore.list(store, left[:-1]) for meta in page)
        clock.now = written + ORPHAN_SECONDS - 60
        await server.sweep()
        assert left in keys(store)

        clock.now += 120
        await server.sweep()

        assert [key for key in keys(store) if "/uploads/" in key] == [f"batches/{kept}/uploads/0"]
