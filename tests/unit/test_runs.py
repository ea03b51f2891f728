"""Runs over an object store: answered by any replica, finished exactly once, whoever is killed. The clock is ours."""

import asyncio
import stat
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import obstore
import orjson
import pytest
from obstore.store import LocalStore, MemoryStore, ObjectStore

from sightline.jobs import leases, objects, runner
from sightline.jobs.leases import LEASE_SECONDS, MAX_HOLDERS
from sightline.jobs.objects import open_store
from sightline.jobs.runs import Execute, Runs, RunState, Status

T = TypeVar("T")

ME, OTHER = "principal-1", "principal-2"
TTL_SECONDS = 1800.0
REQUEST = {"prompt": "What is this?", "sampling": {"max_tokens": 5}}
IMAGE = b"\x89PNG\x00\xff"
LEASE_ENDED = LEASE_SECONDS + 1
PATIENCE_SECONDS = 10


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """What a server does with a run: answers with its name, at once or when it is let."""

    def __init__(self, name: str = "server", *, is_free: bool = True) -> None:
        self.name = name
        self.calls: list[tuple[Mapping[str, Any], bytes | None]] = []
        self.began = asyncio.Event()
        self.may_end = asyncio.Event()
        self.was_cancelled = False
        self.end: tuple[Status, Mapping[str, Any]] = ("COMPLETED", {"text": name})
        if is_free:
            self.may_end.set()

    async def __call__(self, request: Mapping[str, Any], data: bytes | None) -> tuple[Status, Mapping[str, Any]]:
        self.calls.append((request, data))
        self.began.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        return self.end


async def soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await work


@pytest.fixture(params=["memory", "folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    if request.param == "memory":
        return open_store("memory://", "describe", endpoint_url=None, region=None)
    if request.param == "folder":
        return open_store(f"file://{tmp_path}/runs of mine", "describe", endpoint_url=None, region=None)
    s3 = request.getfixturevalue("s3_server")
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    bucket = s3.bucket("runs")
    return open_store(f"s3://{bucket}/{uuid.uuid4()}/runs", "describe", endpoint_url=s3.endpoint_url, region=s3.region)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def serve(store: ObjectStore, clock: Clock) -> Any:
    """Starts servers that share the store."""
    servers: list[Runs] = []

    def make(execute: Execute, ttl_seconds: float = TTL_SECONDS) -> Runs:
        servers.append(Runs(store, execute, ttl_seconds=ttl_seconds, clock=clock))
        return servers[-1]

    yield make
    for server in servers:
        await soon(server.close())


Serve = Callable[..., Runs]


def keys(store: ObjectStore) -> list[str]:
    return sorted(str(meta["path"]) for page in obstore.list(store, "") for meta in page)


def read(store: ObjectStore, key: str) -> Any:
    return orjson.loads(bytes(obstore.get(store, key).bytes()))


async def finished(server: Runs, run_id: str) -> RunState:
    state = await soon(server.wait(run_id, ME, PATIENCE_SECONDS))
    assert state is not None
    assert state.is_finished
    return state


class TestOneServer:
    async def test_a_run_is_done_and_can_be_asked_for(self, serve: Serve) -> None:
        worker = Worker()
        server = serve(worker)

        run_id = await server.submit(REQUEST, None, ME)
        state = await finished(server, run_id)

        assert state == RunState(run_id, "COMPLETED", {"text": "server"})
        assert await server.get(run_id, ME) == state
        assert worker.calls == [(REQUEST, None)]

    async def test_the_uploaded_bytes_reach_the_worker(self, serve: Serve) -> None:
        worker = Worker()
        server = serve(worker)

        await finished(server, await server.submit(REQUEST, IMAGE, ME))

        assert worker.calls == [(REQUEST, IMAGE)]

    async def test_all_is_stored_before_the_id_is_given_away(self, serve: Serve, store: ObjectStore) -> None:
        server = serve(Worker(is_free=False))

        run_id = await server.submit(REQUEST, IMAGE, ME)

        stored = {key.removeprefix(f"runs/{run_id}/") for key in keys(store)}
        assert {"request.json", "uploads/input"} <= stored
        assert any(key.endswith("plan/PLAN.json") for key in stored)

    async def test_while_it_is_worked_on_it_is_in_progress(self, serve: Serve) -> None:
        worker = Worker(is_free=False)
        server = serve(worker)
        run_id = await server.submit(REQUEST, None, ME)
        await soon(worker.began.wait())

        state = await server.wait(run_id, ME, 0)

        assert state == RunState(run_id, "IN_PROGRESS")
        assert not state.is_finished
        worker.may_end.set()
        assert (await finished(server, run_id)).status == "COMPLETED"

    @pytest.mark.parametrize("status", ["FAILED", "TIMED_OUT"])
    async def test_a_run_that_fails_has_a_reason_and_no_output(self, serve: Serve, status: Status) -> None:
        worker = Worker()
        worker.end = (status, {"code": "invalid_image", "message": "This is no image."})
        server = serve(worker)

        state = await finished(server, await server.submit(REQUEST, None, ME))

        assert state.status == status
        assert state.output is None
        assert state.error == {"code": "invalid_image", "message": "This is no image."}

    async def test_a_worker_that_breaks_is_a_failed_run_without_its_text(self, serve: Serve) -> None:
        async def broken(request: Mapping[str, Any], data: bytes | None) -> tuple[Status, Mapping[str, Any]]:
            raise RuntimeError("CUDA error: hunter2")

        server = serve(broken)

        state = await finished(server, await server.submit(REQUEST, None, ME))

        assert state.status == "FAILED"
        assert state.error is not None
        assert state.error["code"] == "internal_error"
        assert "hunter2" not in str(state)

    async def test_ids_cannot_be_guessed(self, serve: Serve) -> None:
        server = serve(Worker())

        ids = {await server.submit(REQUEST, None, ME) for _ in range(5)}

        assert len(ids) == 5
        assert all(uuid.UUID(run_id).version == 4 for run_id in ids)


class TestWhoMayAsk:
    async def test_somebody_else_s_run_is_unknown(self, serve: Serve) -> None:
        server = serve(Worker())
        run_id = await server.submit(REQUEST, None, ME)
        await finished(server, run_id)

        assert await server.get(run_id, OTHER) is None
        assert await server.get(run_id, "") is None
        assert await server.wait(run_id, OTHER, 0) is None

    @pytest.mark.parametrize("store", ["memory"], indirect=True)
    @pytest.mark.parametrize(
        "change",
        [
            lambda run_id: str(uuid.UUID(int=0)),
            lambda run_id: "",
            lambda run_id: "x",
            lambda run_id: ".",
            lambda run_id: "..",
            lambda run_id: f"../runs/{run_id}",
            lambda run_id: f"{run_id}/",
            lambda run_id: f"{run_id}/request.json",
            lambda run_id: run_id.upper(),
            lambda run_id: f"{{{run_id}}}",
            lambda run_id: f"urn:uuid:{run_id}",
            lambda run_id: run_id.replace("-", ""),
            lambda run_id: f" {run_id}",
            lambda run_id: f"{run_id}\n",
            lambda run_id: "\0" * 36,
            lambda run_id: "١" * 32,
            lambda run_id: "a" * 100_000,
        ],
    )
    async def test_ids_that_are_none_are_unknown(self, serve: Serve, change: Callable[[str], str]) -> None:
        server = serve(Worker())
        run_id = await server.submit(REQUEST, None, ME)
        await finished(server, run_id)

        assert await server.get(change(run_id), ME) is None


class TestTimeToLive:
    async def test_a_finished_run_can_be_asked_for_until_its_time_is_over(self, serve: Serve, clock: Clock) -> None:
        server = serve(Worker())
        run_id = await server.submit(REQUEST, IMAGE, ME)
        await finished(server, run_id)

        clock.now += TTL_SECONDS
        assert await server.get(run_id, ME) is not None
        clock.now += 1
        assert await server.get(run_id, ME) is None

    async def test_asking_too_late_removes_all_of_it(self, serve: Serve, store: ObjectStore, clock: Clock) -> None:
        server = serve(Worker())
        run_id = await server.submit(REQUEST, IMAGE, ME)
        await finished(server, run_id)
        clock.now += TTL_SECONDS + 1

        await server.get(run_id, ME)

        assert keys(store) == []

    async def test_nobody_needs_to_ask(self, serve: Serve, store: ObjectStore, clock: Clock) -> None:
        server, sweeper = serve(Worker()), serve(Worker())
        old = await server.submit(REQUEST, IMAGE, ME)
        await finished(server, old)
        clock.now += TTL_SECONDS + 1
        young = await server.submit(REQUEST, None, ME)
        await finished(server, young)

        await sweeper.sweep()

        assert not [key for key in keys(store) if old in key]
        assert await sweeper.get(young, ME) is not None

    async def test_a_run_that_is_not_finished_does_not_expire(self, serve: Serve, clock: Clock) -> None:
        worker = Worker(is_free=False)
        server = serve(worker)
        run_id = await server.submit(REQUEST, None, ME)

        clock.now += 10 * TTL_SECONDS
        await server.sweep()

        assert (await server.get(run_id, ME)).status == "IN_PROGRESS"
        worker.may_end.set()
        assert (await finished(server, run_id)).status == "COMPLETED"
        assert len(worker.calls) == 1

    def test_a_folder_keeps_nothing_of_expired_runs(self, tmp_path: Path) -> None:
        async def scenario() -> None:
            clock = Clock()
            store = open_store(f"file://{tmp_path}", "describe", endpoint_url=None, region=None)
            server = Runs(store, Worker(), ttl_seconds=TTL_SECONDS, clock=clock)
            await finished(server, await server.submit(REQUEST, IMAGE, ME))
            clock.now += TTL_SECONDS + 1
            await server.sweep()

        asyncio.run(scenario())

        assert not [path for path in tmp_path.glob("runs/*") if path.exists()]


class TestSeveralServers:
    async def test_any_of_them_answers(self, serve: Serve) -> None:
        worker = Worker("first", is_free=False)
        first, second = serve(worker), serve(Worker("second"))
        run_id = await first.submit(REQUEST, None, ME)

        assert (await second.get(run_id, ME)).status == "IN_PROGRESS"
        worker.may_end.set()
        await finished(first, run_id)

        assert await second.get(run_id, ME) == RunState(run_id, "COMPLETED", {"text": "first"})
        assert await second.get(run_id, OTHER) is None

    async def test_a_stored_run_that_nobody_took_is_in_the_queue(self, serve: Serve, store: ObjectStore) -> None:
        """A server stored it and was killed before it took it."""
        victim = serve(Worker(is_free=False))
        run_id = await victim.submit(REQUEST, None, ME)
        await victim.close()
        obstore.delete(store, f"runs/{run_id}/holders/lease-0")
        server = serve(Worker())

        assert (await server.get(run_id, ME)).status == "IN_QUEUE"
        await server.sweep()

        assert (await finished(server, run_id)).status == "COMPLETED"

    async def test_a_held_run_is_left_alone(self, serve: Serve, clock: Clock) -> None:
        worker, other = Worker("first", is_free=False), Worker("second")
        first, second = serve(worker), serve(other)
        await first.submit(REQUEST, None, ME)

        clock.now += LEASE_SECONDS - 1
        await second.sweep()

        assert other.calls == []

    async def test_a_killed_server_s_run_is_taken_over_when_its_lease_has_run_out(
        self, serve: Serve, clock: Clock
    ) -> None:
        victim, heir = Worker("victim", is_free=False), Worker("heir")
        first, second = serve(victim), serve(heir)
        run_id = await first.submit(REQUEST, IMAGE, ME)
        await soon(victim.began.wait())  # and there it stays: a killed server says nothing more

        await second.sweep()
        assert heir.calls == []
        assert (await second.get(run_id, ME)).status == "IN_PROGRESS"
        clock.now += LEASE_ENDED
        await second.sweep()

        assert await finished(second, run_id) == RunState(run_id, "COMPLETED", {"text": "heir"})
        assert heir.calls == [(REQUEST, IMAGE)]
        await second.sweep()
        assert len(heir.calls) == 1

    async def test_when_the_slow_holder_was_not_dead_after_all_there_is_still_one_result(
        self, serve: Serve, store: ObjectStore, clock: Clock
    ) -> None:
        slow, fast = Worker("slow", is_free=False), Worker("fast")
        first, second = serve(slow), serve(fast)
        run_id = await first.submit(REQUEST, None, ME)
        clock.now += LEASE_ENDED
        await second.sweep()
        await finished(second, run_id)

        slow.may_end.set()
        state = await finished(first, run_id)

        assert state.output == {"text": "fast"}
        assert await second.get(run_id, ME) == state
        assert len([key for key in keys(store) if "/parts/" in key]) == 1

    async def test_only_one_of_many_takes_over(self, serve: Serve, clock: Clock) -> None:
        first = serve(Worker(is_free=False))
        heirs = [Worker(f"heir {number}") for number in range(5)]
        servers = [serve(heir) for heir in heirs]
        run_id = await first.submit(REQUEST, None, ME)
        await first.close()
        clock.now += LEASE_ENDED

        await asyncio.gather(*(server.sweep() for server in servers))
        for server in servers:
            await soon(server.wait(run_id, ME, PATIENCE_SECONDS))

        assert sum(len(heir.calls) for heir in heirs) == 1
        assert (await servers[0].get(run_id, ME)).status == "COMPLETED"

    async def test_a_working_holder_renews_its_lease(
        self, serve: Serve, store: ObjectStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sleeps, waking = asyncio.Semaphore(0), asyncio.Semaphore(0)

        async def sleep(seconds: float) -> None:
            assert seconds < LEASE_SECONDS / 2
            sleeps.release()
            await waking.acquire()

        worker, other = Worker("first", is_free=False), Worker("second")
        first, second = serve(worker), serve(other)
        monkeypatch.setattr(leases, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
        run_id = await first.submit(REQUEST, None, ME)
        await soon(sleeps.acquire())
        clock.now += LEASE_SECONDS - 1

        waking.release()
        await soon(sleeps.acquire())  # it sleeps again: the lease is renewed

        assert read(store, f"runs/{run_id}/holders/lease-0")["expires"] == clock.now + LEASE_SECONDS
        clock.now += LEASE_SECONDS - 1
        await second.sweep()
        assert other.calls == []

    async def test_a_restarted_server_goes_on_with_what_it_was_given(self, serve: Serve, clock: Clock) -> None:
        first = serve(Worker(is_free=False))
        run_id = await first.submit(REQUEST, IMAGE, ME)
        await first.close()
        clock.now += LEASE_ENDED

        worker = Worker("restarted")
        second = serve(worker)
        await second.start()

        assert (await finished(second, run_id)).output == {"text": "restarted"}
        assert worker.calls == [(REQUEST, IMAGE)]

    async def test_a_run_that_ends_every_server_is_given_up(self, serve: Serve, clock: Clock) -> None:
        workers = [Worker(is_free=False)]
        server = serve(workers[-1])
        run_id = await server.submit(REQUEST, None, ME)

        while not (await server.get(run_id, ME)).is_finished:
            assert len(workers) < 20
            await soon(workers[-1].began.wait())
            await server.close()
            clock.now += LEASE_ENDED
            workers.append(Worker(is_free=False))
            server = serve(workers[-1])
            await server.sweep()

        state = await server.get(run_id, ME)
        assert state.status == "FAILED"
        assert state.error["code"] == "run_abandoned"
        assert sum(len(worker.calls) for worker in workers) == MAX_HOLDERS

    async def test_a_run_whose_result_could_not_be_stored_is_repeated(
        self, serve: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def put(store: ObjectStore, key: str, *args: Any, **options: Any) -> Any:
            if "/parts/" in key:
                raise OSError("the store is away")
            return obstore.put(store, key, *args, **options)

        server = serve(worker := Worker())
        with monkeypatch.context() as patched:
            patched.setattr(objects, "obstore", SimpleNamespace(**vars(obstore) | {"put": put}))
            run_id = await server.submit(REQUEST, None, ME)
            state = await soon(server.wait(run_id, ME, PATIENCE_SECONDS))
        assert not state.is_finished

        clock.now += LEASE_ENDED
        await server.sweep()

        assert (await finished(server, run_id)).status == "COMPLETED"
        assert len(worker.calls) == 2

    async def test_foreign_objects_and_broken_runs_stop_nobody(
        self, serve: Serve, store: ObjectStore, clock: Clock
    ) -> None:
        victim = serve(Worker(is_free=False))
        run_id = await victim.submit(REQUEST, None, ME)
        await victim.close()
        clock.now += LEASE_ENDED
        for key in ("runs/stray", "runs/a/b/c/d", "runs/x/lease-y", "other/thing"):
            obstore.put(store, key, b"?")
        for key in ("request.json", "result.json"):
            for number, data in enumerate([b"", b"{", b"[]", b"null", b"{}"], start=len(key)):
                obstore.put(store, f"runs/{uuid.UUID(int=number)}/{key}", data)

        server = serve(Worker("heir"))
        await server.start()

        assert (await finished(server, run_id)).output == {"text": "heir"}


class TestCancelling:
    async def test_ends_the_work_and_says_so(self, serve: Serve) -> None:
        worker = Worker(is_free=False)
        server = serve(worker)
        run_id = await server.submit(REQUEST, None, ME)
        await soon(worker.began.wait())

        await soon(server.cancel(run_id))

        state = await server.get(run_id, ME)
        assert state.status == "CANCELLED"
        assert state.output is None
        assert worker.was_cancelled

    async def test_nobody_takes_a_cancelled_run_over(self, serve: Serve, clock: Clock) -> None:
        server, other = serve(Worker(is_free=False)), serve(worker := Worker())
        run_id = await server.submit(REQUEST, None, ME)
        await server.cancel(run_id)

        clock.now += LEASE_ENDED
        await other.sweep()

        assert worker.calls == []
        assert (await other.get(run_id, ME)).status == "CANCELLED"

    async def test_comes_too_late_for_a_finished_run(self, serve: Serve) -> None:
        server = serve(Worker())
        run_id = await server.submit(REQUEST, None, ME)
        state = await finished(server, run_id)

        await server.cancel(run_id)

        assert await server.get(run_id, ME) == state


class TestClosing:
    async def test_waits_for_what_ends_in_time(self, serve: Serve) -> None:
        worker = Worker(is_free=False)
        server = serve(worker)
        run_id = await server.submit(REQUEST, None, ME)
        await soon(worker.began.wait())

        closing = asyncio.create_task(server.close(PATIENCE_SECONDS))
        await asyncio.sleep(0)
        assert not closing.done()
        worker.may_end.set()
        await soon(closing)

        assert (await server.get(run_id, ME)).status == "COMPLETED"

    async def test_leaves_the_rest_to_others(self, serve: Serve) -> None:
        worker = Worker(is_free=False)
        server = serve(worker)
        run_id = await server.submit(REQUEST, None, ME)
        await soon(worker.began.wait())

        await soon(server.close())

        assert worker.was_cancelled
        assert (await server.get(run_id, ME)).status == "IN_PROGRESS"

    async def test_hands_its_runs_over_without_waiting_for_the_lease_to_end(self, serve: Serve) -> None:
        worker, heir = Worker(is_free=False), Worker("heir")
        first, second = serve(worker), serve(heir)
        run_id = await first.submit(REQUEST, IMAGE, ME)
        await soon(worker.began.wait())

        await soon(first.close())
        await second.sweep()

        assert await finished(second, run_id) == RunState(run_id, "COMPLETED", {"text": "heir"})

    async def test_an_idle_server_closes_at_once_and_twice(self, serve: Serve) -> None:
        server = serve(Worker())
        await server.start()

        await soon(server.close(3600))
        await soon(server.close(3600))


class TestStart:
    async def test_sweeps_again_and_again_though_the_store_is_away_for_a_while(
        self, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sleeps, waking = asyncio.Semaphore(0), asyncio.Semaphore(0)

        async def sleep(seconds: float) -> None:
            sleeps.release()
            await waking.acquire()

        store, worker = MemoryStore(), Worker()
        server = Runs(store, worker, ttl_seconds=TTL_SECONDS, clock=clock)
        await server.start()
        monkeypatch.setattr(runner, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
        monkeypatch.setattr(objects, "obstore", None)
        await soon(sleeps.acquire())
        waking.release()
        await soon(sleeps.acquire())  # that sweep failed
        monkeypatch.setattr(objects, "obstore", obstore)
        victim = Runs(store, Worker(is_free=False), ttl_seconds=TTL_SECONDS, clock=clock)
        await victim.submit(REQUEST, None, ME)
        await victim.close()

        waking.release()

        await soon(worker.began.wait())
        await server.close()


class TestOpening:
    def test_a_folder_of_this_user_by_default(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

        store = open_store(None, "describe", endpoint_url=None, region=None)

        assert isinstance(store, LocalStore)
        folder = tmp_path / "sightline" / "describe"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    def test_each_memory_store_is_its_own(self) -> None:
        first, second = (open_store("memory://", "x", endpoint_url=None, region=None) for _ in range(2))
        obstore.put(first, "a", b"")

        assert keys(second) == []

    @pytest.mark.parametrize("url", ["", "redis://x", "/var/runs", "s3:/bucket", "s3://", "gs://bucket"])
    def test_anything_else_is_refused(self, url: str) -> None:
        with pytest.raises(ValueError, match="job_store"):
            open_store(url, "describe", endpoint_url=None, region=None)

    def test_a_folder_that_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")

        with pytest.raises(OSError, match="file"):
            open_store(f"file://{tmp_path}/file/below", "describe", endpoint_url=None, region=None)


@pytest.fixture(autouse=True)
def no_lost_tasks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing may end in a task whose exception nobody looks at."""
    yield
    assert "never retrieved" not in caplog.text
