"""Contract E's batches behind a request, on the runner: each item asked for as the server's own route says it."""

import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson
from obstore.store import ObjectStore

from sightline.jobs.items import Code, Fault, Item, Line
from sightline.jobs.leases import LEASE_SECONDS
from sightline.jobs.objects import Objects
from sightline.jobs.runner import Job, Runner

Status = Literal["in_progress", "completed", "failed"]
"""Contract E5. An item that failed does not fail its batch."""

Result = Mapping[str, Any]
"""What became of an item, as JSON; `error` in it means that it failed."""

Execute = Callable[[Mapping[str, Any], bytes | None], Awaitable[Result]]
"""Does one item: its request and upload in, its result out. Must not raise but for cancellation."""

MAX_CHUNKS = 64
"""Of one batch: results can be seen, and survive a kill, a 64th of the batch at a time."""
KNOWN_BATCHES = 32


@dataclass(frozen=True, slots=True)
class BatchState:
    """What is known of a batch.

    results  of the items that are done, by index
    error    {code, message} when the batch as a whole failed
    """

    id: str
    status: Status
    total: int
    results: Mapping[int, Result]
    error: Mapping[str, Any] | None = None

    @property
    def failed(self) -> int:
        """How many items failed."""
        return sum("error" in result for result in self.results.values())


class Batches:
    """The batches of one server.

    store        shared by all replicas that answer for each other
    execute      does one item
    ttl_seconds  how long a finished batch can be asked for
    width        items that are worked on at a time, of all batches together
    max_open     unfinished items that this server holds at most; more are refused with 429
    """

    def __init__(
        self,
        store: ObjectStore,
        execute: Execute,
        *,
        ttl_seconds: float,
        width: int,
        max_open: int = 10_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._execute = execute
        self._clock = clock
        self._runner = Runner(
            Objects(store),
            "batches",
            self._do,
            ttl_seconds=ttl_seconds,
            width=width,
            max_open=max_open,
            clock=clock,
        )
        self._known: OrderedDict[str, dict[str, Mapping[int, Result]]] = OrderedDict()

    async def start(self, sweep_seconds: float = LEASE_SECONDS) -> None:
        """Take up what an earlier or another server left, now and every `sweep_seconds`."""
        await self._runner.start(sweep_seconds)

    async def close(self) -> None:
        """Stop at once, keeping complete chunks; the rest goes on elsewhere, or here after a restart."""
        await self._runner.close()

    async def sweep(self) -> None:
        """Delete what has expired and take up what was abandoned."""
        await self._runner.sweep()

    async def submit(self, items: Sequence[Mapping[str, Any]], uploads: Mapping[int, bytes], principal: str) -> str:
        """Store a batch and start it. Its id cannot be guessed and is answered to the same principal only.

        uploads  bytes of the items that have some, by index

        Raises QueueFull (429) when this server has enough to do.
        """
        job = await self._runner.submit(
            [
                Item(str(index), uri=f"upload:{index}" if index in uploads else "", body=item)
                for index, item in enumerate(items)
            ],
            principal=principal,
            about={"total": len(items)},
            uploads={str(index): data for index, data in uploads.items()},
            chunk_size=-(-max(len(items), 1) // MAX_CHUNKS),
        )
        return job.id

    async def get(self, batch_id: str, principal: str) -> BatchState | None:
        """The state of a batch; None when there is none, it has expired, or it is somebody else's."""
        state = await self._runner.get(batch_id, principal, counted=False)
        if state is None:
            self._known.pop(batch_id, None)
            return None
        total = int(state.job.about["total"])
        results = await self._results(batch_id)
        if not state.is_ended:
            return BatchState(batch_id, "in_progress", total, results)
        if state.error is None:
            return BatchState(batch_id, "completed", total, results)
        return BatchState(batch_id, "failed", total, results, {**state.error, "code": f"batch_{state.error['code']}"})

    async def wait(self, batch_id: str) -> None:
        """Return when this server works on the batch no longer."""
        await self._runner.wait(batch_id)

    async def _results(self, batch_id: str) -> Mapping[int, Result]:
        """Of the items that are done, by index. A chunk never changes, so each is read once."""
        known = self._known.setdefault(batch_id, {})
        self._known.move_to_end(batch_id)
        while len(self._known) > KNOWN_BATCHES:
            self._known.popitem(last=False)
        for key, data in await self._runner.chunks(batch_id, set(known)):
            known[key] = {int(row["custom_id"]): _result(row) for row in map(orjson.loads, data.splitlines())}
        return {index: result for key in sorted(known) for index, result in known[key].items()}

    async def _do(self, job: Job, item: Item) -> Line:
        began = self._clock()
        data = await self._runner.upload(job, item)
        if item.uri and data is None:
            result: Result = {"error": "The uploaded image is gone.", "code": "upload_lost"}
        else:
            result = await self._execute(item.body, data)
        if "error" not in result:
            return Line(item, {"answer": dict(result)}, size=len(data or b""))
        code = _CODES.get(str(result.get("code")), "caption_rejected")
        fault = Fault("caption", code, str(result["error"]), first_at=began, last_at=self._clock(), detail=dict(result))
        return Line(item, fault=fault, size=len(data or b""))


def _result(row: Mapping[str, Any]) -> Result:
    """A line, as the route answers it."""
    if "error" not in row:
        return row["answer"]
    return row["error"].get("detail") or {"error": row["error"]["message"], "code": "internal_error"}


_CODES: Mapping[str, Code] = {
    "upload_lost": "input_not_found",
    "image_not_found": "input_not_found",
    "path_not_allowed": "input_not_found",
    "invalid_image": "decode_failed",
    "image_undecodable": "decode_failed",
    "image_format_unsupported": "unsupported_media",
    "image_too_many_bytes": "input_too_large",
    "image_too_many_pixels": "input_too_large",
    "payload_too_large": "input_too_large",
    "deadline_exceeded": "caption_timeout",
    "queue_full": "caption_unavailable",
    "unavailable": "caption_unavailable",
    "internal_error": "internal",
}
"""Of this server's codes, those that are not caption_rejected in a line; its own code is beside it."""
