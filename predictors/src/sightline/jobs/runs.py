"""Asynchronous runs of one predictor over an object store: any replica answers, restarts lose nothing.

Keys of a run, each written once (a lease is written over by its one holder):

    runs/<id>/request.json      what to do and who asked        created before the id is given away
    runs/<id>/input             the uploaded bytes, if any      created before request.json
    runs/<id>/lease-<n>         who works on it, and until when n-th holder; created with If-None-Match
    runs/<id>/result.json       the end of it                   created with If-None-Match: the only commit

So a run is done at least once and answered exactly once; a killed server's runs go on elsewhere, or here after a
restart, when its lease has run out.
"""

import asyncio
import contextlib
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import obstore
import orjson
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, MemoryStore, ObjectStore

log = logging.getLogger("sightline.jobs")

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
"""Contract A6."""

LEASE_SECONDS = 30.0
MAX_HOLDERS = 5
"""A run that outlived so many holders is what ends them; it must not end every server of the store in turn."""


@dataclass(frozen=True, slots=True)
class RunState:
    """What is known of a run. `output` when COMPLETED; `error` ({code, message}) when it ended otherwise."""

    id: str
    status: Status
    output: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None

    @property
    def is_finished(self) -> bool:
        return self.status not in {"IN_QUEUE", "IN_PROGRESS"}


Execute = Callable[[Mapping[str, Any], bytes | None], Awaitable[tuple[Status, Mapping[str, Any]]]]
"""Does one run: request and input in, final status and output or error out. Must not raise but for cancellation."""


class Runs:
    """The runs of one server.

    store        shared by all replicas that answer for each other
    execute      does one run
    ttl_seconds  how long a finished run can be asked for
    """

    def __init__(
        self,
        store: ObjectStore,
        execute: Execute,
        *,
        ttl_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._execute = execute
        self._ttl = ttl_seconds
        self._clock = clock
        self._holder = uuid.uuid4().hex
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, sweep_seconds: float = LEASE_SECONDS) -> None:
        """Take up what an earlier or another server left, now and every `sweep_seconds`."""
        await self.sweep()

        async def sweep_on() -> None:
            while True:
                await asyncio.sleep(sweep_seconds)
                with contextlib.suppress(Exception):  # the store may be away for a while
                    await self.sweep()

        self._sweeper = asyncio.create_task(sweep_on())

    async def close(self, grace_seconds: float = 0) -> None:
        """Wait for what is running here; what is not done by then goes on elsewhere."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = list(self._tasks.values())
        if tasks:
            await asyncio.wait(tasks, timeout=grace_seconds)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def submit(self, request: Mapping[str, Any], data: bytes | None, principal: str) -> str:
        """Store a run and start it. Its id cannot be guessed and is answered to the same principal only."""
        run_id = str(uuid.uuid4())
        if data is not None:
            await self._create(f"runs/{run_id}/input", data)
        body = {
            "request": request,
            "has_input": data is not None,
            "principal": principal,
            "created": self._clock(),
        }
        await self._create(f"runs/{run_id}/request.json", orjson.dumps(body))
        await self._take(run_id, body)
        return run_id

    async def get(self, run_id: str, principal: str) -> RunState | None:
        """The state of a run; None when there is none, it has expired, or it is somebody else's."""
        if not _is_uuid(run_id):
            return None
        request = await self._read(f"runs/{run_id}/request.json")
        if request is None or request["principal"] != principal:
            return None
        result = await self._read(f"runs/{run_id}/result.json")
        if result is not None:
            if self._clock() > result["expires"]:
                await self._delete(run_id)
                return None
            return RunState(run_id, result["status"], result.get("output"), result.get("error"))
        lease = await self._lease(run_id)
        return RunState(run_id, "IN_PROGRESS" if lease is not None else "IN_QUEUE")

    async def wait(self, run_id: str, principal: str, seconds: float) -> RunState | None:
        """The state when the run has finished or `seconds` have passed; for runs that this server works on."""
        task = self._tasks.get(run_id)
        if task is not None:
            await asyncio.wait([task], timeout=seconds)
        return await self.get(run_id, principal)

    async def cancel(self, run_id: str) -> None:
        """End a run that this server works on as CANCELLED, unless it has just finished."""
        # The result first: with its lease released, a run without one would be taken up again.
        await self._finish(run_id, "CANCELLED", {"code": "client_gone", "message": "The client left."})
        task = self._tasks.get(run_id)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def sweep(self) -> None:
        """Delete expired runs and take up abandoned ones."""
        runs: dict[str, set[str]] = {}
        for path in await self._list("runs/"):
            if path.count("/") == 2:
                _, run_id, key = path.split("/")
                runs.setdefault(run_id, set()).add(key)
        for run_id, keys in runs.items():
            try:
                await self._sweep_one(run_id, keys)
            except Exception:  # one broken run must not stop the others
                log.warning("cannot read run %s", run_id, exc_info=True)

    async def _sweep_one(self, run_id: str, keys: set[str]) -> None:
        if "result.json" in keys:
            result = await self._read(f"runs/{run_id}/result.json")
            if result is not None and self._clock() > result["expires"]:
                await self._delete(run_id)
        elif "request.json" in keys and run_id not in self._tasks:
            body = await self._read(f"runs/{run_id}/request.json")
            if body is not None:
                await self._take(run_id, body)

    async def _take(self, run_id: str, body: Mapping[str, Any]) -> None:
        """Become the holder of a run that has none, and work on it."""
        current = await self._lease(run_id)
        if current is not None and current[1]["expires"] > self._clock():
            return
        number = current[0] + 1 if current is not None else 0
        if number >= MAX_HOLDERS:
            log.error("run %s is given up after %d holders", run_id, number)
            fault = {"code": "run_abandoned", "message": "This run could not be finished."}
            await self._finish(run_id, "FAILED", fault)
            return
        key = f"runs/{run_id}/lease-{number}"
        if not await self._create(key, self._lease_body()):
            return  # another server was faster
        task = asyncio.create_task(self._work(run_id, body, key), name=f"run-{run_id}")
        self._tasks[run_id] = task
        task.add_done_callback(lambda task: self._forget(run_id, task))

    async def _work(self, run_id: str, body: Mapping[str, Any], lease_key: str) -> None:
        renewing = asyncio.create_task(self._renew(lease_key))
        try:
            try:
                data = await self._read_bytes(f"runs/{run_id}/input") if body["has_input"] else None
                status, value = await self._execute(body["request"], data)
            except Exception:
                log.exception("bug run=%s", run_id)
                status, value = "FAILED", {"code": "internal_error", "message": "Something went wrong on the server."}
            await self._finish(run_id, status, value)
        except asyncio.CancelledError:  # this server is stopping: another one need not wait for the lease to end
            renewing.cancel()
            released = orjson.dumps({"holder": self._holder, "expires": 0})
            with contextlib.suppress(Exception):
                await asyncio.to_thread(obstore.put, self._store, lease_key, released)
            raise
        finally:
            renewing.cancel()

    def _forget(self, run_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(run_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("run %s could not be ended; it is repeated when its lease has run out", run_id, exc_info=error)

    async def _renew(self, key: str) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            with contextlib.suppress(Exception):  # a missed renewal costs a repetition, not a result
                await asyncio.to_thread(obstore.put, self._store, key, self._lease_body())

    def _lease_body(self) -> bytes:
        return orjson.dumps({"holder": self._holder, "expires": self._clock() + LEASE_SECONDS})

    async def _finish(self, run_id: str, status: Status, value: Mapping[str, Any]) -> None:
        result = {
            "status": status,
            ("output" if status == "COMPLETED" else "error"): value,
            "expires": self._clock() + self._ttl,
        }
        await self._create(f"runs/{run_id}/result.json", orjson.dumps(result))

    async def _lease(self, run_id: str) -> tuple[int, Mapping[str, Any]] | None:
        """The newest lease and its number."""
        number = -1
        for path in await self._list(f"runs/{run_id}/"):
            key = path.rsplit("/", 1)[1]
            if key.startswith("lease-"):
                number = max(number, int(key.removeprefix("lease-")))
        if number < 0:
            return None
        body = await self._read(f"runs/{run_id}/lease-{number}")
        return None if body is None else (number, body)

    async def _create(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists. Returns whether it was written."""
        try:
            await asyncio.to_thread(obstore.put, self._store, key, data, mode="create")
        except AlreadyExistsError:
            return False
        return True

    async def _read(self, key: str) -> dict[str, Any] | None:
        data = await self._read_bytes(key)
        return None if data is None else cast("dict[str, Any]", orjson.loads(data))

    async def _read_bytes(self, key: str) -> bytes | None:
        try:
            return await asyncio.to_thread(lambda: bytes(obstore.get(self._store, key).bytes()))
        except FileNotFoundError:
            return None

    async def _list(self, prefix: str) -> list[str]:
        # Threads, not obstore's own coroutines: those abort the interpreter (exit code 134) when it ends
        # just after one of them has (pyo3 takes the GIL of a finalising interpreter; obstore 0.12.1).
        def paths() -> list[str]:
            return [str(meta["path"]) for page in obstore.list(self._store, prefix) for meta in page]

        return await asyncio.to_thread(paths)

    async def _delete(self, run_id: str) -> None:
        paths = await self._list(f"runs/{run_id}/")
        # request.json first: without it the run is gone for everybody.
        paths.sort(key=lambda path: not path.endswith("request.json"))
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(obstore.delete, self._store, path)


def open_store(url: str | None, name: str, *, endpoint_url: str | None, region: str | None) -> ObjectStore:
    """Open memory://, file:///folder or s3://bucket/prefix; None is this user's state folder for `name`.

    S3 credentials come from boto3's chain. Raises OSError or ValueError when it cannot be written or understood.
    """
    if url is None:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        return _local(state / "sightline" / name)
    if url.startswith("memory://"):
        return MemoryStore()
    if url.startswith("file://"):
        return _local(Path(url.removeprefix("file://")))
    if url.startswith("s3://"):
        from obstore.auth.boto3 import Boto3CredentialProvider
        from obstore.store import S3Store

        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise ValueError("job_store names no bucket")
        options: dict[str, Any] = {"credential_provider": Boto3CredentialProvider()}
        if endpoint_url:
            options |= {"endpoint": endpoint_url, "virtual_hosted_style_request": False}
            options["client_options"] = {"allow_http": endpoint_url.startswith("http://")}
        return S3Store(
            bucket,
            prefix=prefix or None,
            region=region or "us-east-1",
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=20)},
            **options,
        )
    raise ValueError("job_store must be memory://, file:///folder or s3://bucket/prefix")


def _local(folder: Path) -> LocalStore:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return LocalStore(folder, automatic_cleanup=True)


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
