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
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from obstore.store import ObjectStore

from sightline.jobs.objects import LEASE_SECONDS, Leases, Objects, TooManyHolders, is_id

log = logging.getLogger("sightline.jobs")

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
"""Contract A6."""


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
        self._objects = Objects(store)
        self._leases = Leases(self._objects, clock)
        self._execute = execute
        self._ttl = ttl_seconds
        self._clock = clock
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
            await self._objects.create(f"runs/{run_id}/input", data)
        body = {
            "request": request,
            "has_input": data is not None,
            "principal": principal,
            "created": self._clock(),
        }
        await self._objects.create(f"runs/{run_id}/request.json", orjson.dumps(body))
        await self._take(run_id, body)
        return run_id

    async def get(self, run_id: str, principal: str) -> RunState | None:
        """The state of a run; None when there is none, it has expired, or it is somebody else's."""
        if not is_id(run_id):
            return None
        request = await self._objects.read(f"runs/{run_id}/request.json")
        if request is None or request["principal"] != principal:
            return None
        result = await self._objects.read(f"runs/{run_id}/result.json")
        if result is not None:
            if self._clock() > result["expires"]:
                await self._delete(run_id)
                return None
            return RunState(run_id, result["status"], result.get("output"), result.get("error"))
        is_begun = await self._leases.exists(f"runs/{run_id}")
        return RunState(run_id, "IN_PROGRESS" if is_begun else "IN_QUEUE")

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
        for path in await self._objects.keys("runs/"):
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
            result = await self._objects.read(f"runs/{run_id}/result.json")
            if result is not None and self._clock() > result["expires"]:
                await self._delete(run_id)
        elif "request.json" in keys and run_id not in self._tasks:
            body = await self._objects.read(f"runs/{run_id}/request.json")
            if body is not None:
                await self._take(run_id, body)

    async def _take(self, run_id: str, body: Mapping[str, Any]) -> None:
        """Become the holder of a run that has none, and work on it."""
        try:
            key = await self._leases.take(f"runs/{run_id}")
        except TooManyHolders:
            log.error("run %s is given up: it has outlived everybody who worked on it", run_id)
            fault = {"code": "run_abandoned", "message": "This run could not be finished."}
            await self._finish(run_id, "FAILED", fault)
            return
        if key is None:
            return  # somebody works on it
        task = asyncio.create_task(self._work(run_id, body, key), name=f"run-{run_id}")
        self._tasks[run_id] = task
        task.add_done_callback(lambda task: self._forget(run_id, task))

    async def _work(self, run_id: str, body: Mapping[str, Any], lease_key: str) -> None:
        async with self._leases.held(lease_key):
            try:
                data = await self._objects.read_bytes(f"runs/{run_id}/input") if body["has_input"] else None
                status, value = await self._execute(body["request"], data)
            except Exception:
                log.exception("bug run=%s", run_id)
                status, value = "FAILED", {"code": "internal_error", "message": "Something went wrong on the server."}
            await self._finish(run_id, status, value)

    def _forget(self, run_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.pop(run_id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("run %s could not be ended; it is repeated when its lease has run out", run_id, exc_info=error)

    async def _finish(self, run_id: str, status: Status, value: Mapping[str, Any]) -> None:
        result = {
            "status": status,
            ("output" if status == "COMPLETED" else "error"): value,
            "expires": self._clock() + self._ttl,
        }
        await self._objects.create(f"runs/{run_id}/result.json", orjson.dumps(result))

    async def _delete(self, run_id: str) -> None:
        await self._objects.delete(f"runs/{run_id}/", first=f"runs/{run_id}/request.json")
