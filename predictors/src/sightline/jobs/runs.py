"""Contract A's asynchronous runs, on the runner: a run is a job of one item."""

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from obstore.store import ObjectStore

from sightline.jobs.items import Code, Fault, Item, Line
from sightline.jobs.leases import LEASE_SECONDS
from sightline.jobs.objects import Objects
from sightline.jobs.runner import Job, Runner, State

Status = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
"""Contract A6."""

MAX_OPEN = 10_000
"""Runs that a server works on at a time: the model's own queue says 429 long before."""


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
        self._execute = execute
        self._clock = clock
        self._runner = Runner(
            Objects(store),
            "runs",
            self._do,
            ttl_seconds=ttl_seconds,
            width=MAX_OPEN,
            max_open=MAX_OPEN,
            clock=clock,
        )

    async def start(self, sweep_seconds: float = LEASE_SECONDS) -> None:
        """Take up what an earlier or another server left, now and every `sweep_seconds`."""
        await self._runner.start(sweep_seconds)

    async def close(self, grace_seconds: float = 0) -> None:
        """Wait for what is running here; what is not done by then goes on elsewhere."""
        await self._runner.close(grace_seconds)

    async def sweep(self) -> None:
        """Delete expired runs and take up abandoned ones."""
        await self._runner.sweep()

    async def submit(self, request: Mapping[str, Any], data: bytes | None, principal: str) -> str:
        """Store a run and start it. Its id cannot be guessed and is answered to the same principal only."""
        uploads = {} if data is None else {"input": data}
        item = Item("run", uri="" if data is None else "upload:input", body=request)
        return (await self._runner.submit([item], principal=principal, uploads=uploads, chunk_size=1)).id

    async def get(self, run_id: str, principal: str) -> RunState | None:
        """The state of a run; None when there is none, it has expired, or it is somebody else's."""
        state = await self._runner.get(run_id, principal, counted=False)
        if state is None:
            return None
        if not state.is_ended:
            return RunState(run_id, "IN_QUEUE" if state.status == "queued" else "IN_PROGRESS")
        return await self._ended(state)

    async def wait(self, run_id: str, principal: str, seconds: float) -> RunState | None:
        """The state when the run has finished or `seconds` have passed; for runs that this server works on."""
        await self._runner.wait(run_id, seconds)
        return await self.get(run_id, principal)

    async def cancel(self, run_id: str) -> None:
        """End a run that this server works on as CANCELLED, unless it has just finished."""
        await self._runner.cancel(run_id, None)
        await self._runner.wait(run_id)

    async def _ended(self, state: State) -> RunState:
        run_id = state.job.id
        if state.status == "cancelled":
            return RunState(run_id, "CANCELLED", error={"code": "client_gone", "message": "The client left."})
        if state.error is not None:
            return RunState(run_id, "FAILED", error={**state.error, "code": f"run_{state.error['code']}"})
        ((_, line),) = await self._runner.chunks(run_id)
        row = orjson.loads(line)
        if "error" not in row:
            return RunState(run_id, "COMPLETED", row["output"])
        said = row["error"].get("detail")
        if said is None:
            return RunState(run_id, "FAILED", error={"code": "internal_error", "message": row["error"]["message"]})
        return RunState(run_id, said["status"], error=said["error"])

    async def _do(self, job: Job, item: Item) -> Line:
        began = self._clock()
        data = await self._runner.upload(job, item)
        status, value = await self._execute(item.body, data)
        if status == "COMPLETED":
            return Line(item, {"output": dict(value)}, size=len(data or b""))
        code: Code = "caption_timeout" if status == "TIMED_OUT" else "caption_rejected"
        said = {"status": status, "error": dict(value)}
        message = str(value.get("message", ""))
        return Line(item, fault=Fault("caption", code, message, None, 1, began, self._clock(), said))
