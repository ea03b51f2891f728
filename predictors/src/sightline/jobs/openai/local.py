"""Batches that this process does, and every other that shares its store."""

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence

from sightline.jobs.inputs import InputFault
from sightline.jobs.items import Item
from sightline.jobs.objects import Missing, Objects
from sightline.jobs.openai.batch import Batch, Order, Status, Which
from sightline.jobs.openai.files import Files
from sightline.jobs.openai.requests import LineFault, item
from sightline.jobs.runner import Do, Job, Runner, State
from sightline.jobs.runner import Status as JobStatus

KIND = "openai/batches"
MAX_OPEN = 200_000
"""Requests that one server holds unfinished; four files of the largest size."""
CHUNKS = 100
"""A batch is written in so many pieces or more: a restart costs a hundredth of a small one."""
LARGEST_CHUNK = 50
SHARD_CHUNKS = 20

_STATUSES: Mapping[JobStatus, Status] = {
    "queued": "validating",
    "planning": "validating",
    "running": "in_progress",
    "finishing": "finalizing",
    "cancelling": "cancelling",
    "completed": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
    "expired": "expired",
}


class LocalBackend:
    """A `Backend` on the runner that does all work behind requests.

    do      does one request of a batch
    width   requests that this process works on at once
    """

    def __init__(
        self,
        objects: Objects,
        files: Files,
        do: Do,
        *,
        width: int,
        ttl_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._files = files
        self._runner = Runner(
            objects,
            KIND,
            do,
            items_of=self._items,
            ttl_seconds=ttl_seconds,
            width=width,
            max_open=MAX_OPEN,
            clock=clock,
        )

    async def start(self) -> None:
        await self._runner.start()

    async def close(self) -> None:
        await self._runner.close()

    async def create(self, order: Order) -> Batch:
        """Raises QueueFull (429) when this server has enough to do."""
        chunk = chunk_size(order.file.checked.requests if order.file.checked else 0)
        job = await self._runner.submit(
            None,
            principal=order.principal,
            about=order.about(),
            window_seconds=order.window_seconds,
            chunk_size=chunk,
            shard_size=SHARD_CHUNKS * chunk,
        )
        return _batch(State(job, "queued", times={"created": job.created}))

    async def get(self, key: str, principal: str) -> Batch | None:
        state = await self._runner.get(str(uuid.UUID(key)), principal)
        return None if state is None else _batch(state)

    async def list(self, principal: str, *, after: str | None, limit: int) -> Sequence[Batch]:
        older = None if after is None else str(uuid.UUID(after))
        return [_batch(state) for state in await self._runner.list(principal, after=older, limit=limit)]

    async def cancel(self, key: str, principal: str) -> Batch | None:
        state = await self._runner.cancel(str(uuid.UUID(key)), principal)
        return None if state is None else _batch(state)

    def lines(self, batch: Batch, which: Which) -> AsyncIterator[bytes]:
        return self._runner.lines(str(uuid.UUID(batch.key)), which)

    async def _items(self, job: Job) -> AsyncGenerator[Item]:
        """The requests of a job's file. It was found good when it was uploaded, or the job ends here."""
        if job.about["faults"]:
            raise InputFault("InvalidManifest", "The file has lines that are no requests.")
        file = await self._files.get(job.about["file"], job.principal)
        if file is None:
            raise InputFault("InputNotFound", "The file was deleted before its batch began.")
        try:
            async for line in self._files.lines(file):
                yield item(line)
        except Missing as error:
            raise InputFault("InputNotFound", "The file was deleted while its batch began.") from error


def chunk_size(requests: int) -> int:
    """Requests of one object of the results."""
    return max(1, min(LARGEST_CHUNK, requests // CHUNKS))


def _batch(state: State) -> Batch:
    job, about = state.job, state.job.about
    faults = tuple(LineFault.from_json(fault) for fault in about["faults"])
    if state.error is not None and not faults:
        faults = (LineFault(str(state.error["code"]), str(state.error["message"])),)
    times: dict[str, float] = {"created": job.created}
    if job.deadline is not None:
        times["expires"] = job.deadline
    theirs = {"planned": "in_progress", "finishing": "finalizing", "cancelling": "cancelling", "ended": "ended"}
    times |= {ours: state.times[name] for name, ours in theirs.items() if name in state.times}
    return Batch(
        key=uuid.UUID(job.id).hex,
        status=_STATUSES[state.status],
        about=about,
        total=state.total if state.total is not None else int(about["requests"]),
        counts=state.counts,
        times=times,
        faults=faults if state.status == "failed" else (),
    )
