"""A server's jobs as they lie in the store: who asked for what, the bytes that came with it, how it ended."""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import orjson

from sightline.jobs.items import Counts
from sightline.jobs.layout import CANCELLED, PARTS, Layout
from sightline.jobs.objects import Objects, is_id
from sightline.jobs.page import Input, Location, Options, Outputs, Page, Target, fingerprint

EndStatus = Literal["completed", "failed", "cancelled", "expired"]

UPLOADS_AT_ONCE = 8
KNOWN_JOBS = 1024
FINGERPRINT = fingerprint(None, Options())
"""Of every job of a server: what decides its results lies in `about`, and its id is in the keys."""


@dataclass(frozen=True, slots=True)
class Job:
    """A batch as it was asked for; never changes.

    id          a UUID that cannot be guessed
    principal   who asked, as `Context.principal` says it; nobody else is answered
    created     seconds since 1970
    deadline    seconds since 1970: items that are not done by then end as the error `batch_expired`; None: no end
    about       JSON of whoever submitted it, given back with every state and to `do`: what to do, metadata, …
    """

    id: str
    principal: str
    created: float
    deadline: float | None = None
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    shard_size: int = 1000
    chunk_size: int = 50
    has_uploads: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "principal": self.principal,
            "created": self.created,
            "deadline": self.deadline,
            "about": dict(self.about),
            "shard_size": self.shard_size,
            "chunk_size": self.chunk_size,
            "has_uploads": self.has_uploads,
        }

    @classmethod
    def from_json(cls, job_id: str, said: Mapping[str, Any]) -> "Job":
        """Raises KeyError, TypeError or ValueError when it is none."""
        return cls(
            job_id,
            str(said["principal"]),
            float(said["created"]),
            None if said["deadline"] is None else float(said["deadline"]),
            cast("Mapping[str, Any]", said["about"]),
            int(said["shard_size"]),
            int(said["chunk_size"]),
            bool(said["has_uploads"]),
        )


@dataclass(frozen=True, slots=True)
class End:
    """How a job ended.

    total    items; None when it was never planned
    error    {code, message} when it failed as a whole
    times    seconds since 1970 of what happened to it
    expires  when it is forgotten, seconds since 1970
    """

    status: EndStatus
    total: int | None
    counts: Counts
    error: Mapping[str, Any] | None
    times: Mapping[str, float]
    expires: float

    def to_json(self) -> dict[str, Any]:
        return {
            "status": self.status,
            "total": self.total,
            "counts": self.counts.to_json(),
            "error": self.error,
            "times": dict(self.times),
            "expires": self.expires,
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "End":
        """Raises KeyError, TypeError or ValueError when it is none."""
        return cls(
            said["status"],
            said["total"],
            Counts.from_json(said["counts"]),
            said["error"],
            {name: float(at) for name, at in said["times"].items()},
            float(said["expires"]),
        )


class Records:
    """The jobs of one kind in a store. `kind`: the folder of all of them."""

    def __init__(self, objects: Objects, kind: str) -> None:
        self.objects = objects
        self._kind = kind
        self._jobs: OrderedDict[str, Job] = OrderedDict()

    def page(self, job: Job, width: int) -> Page:
        """The page of a job's shards; nobody but this process reads it."""
        return Page(
            name=job.id,
            uid=f"{self._kind}/{job.id}",
            fingerprint=FINGERPRINT,
            input=Input("manifest", Location("memory://")),
            outputs=Outputs(Location("memory://"), merge="Never"),
            target=Target(""),
            shard_size=job.shard_size,
            chunk_size=job.chunk_size,
            max_in_flight=width,
        )

    def layout(self, job_id: str) -> Layout:
        return Layout.of("", f"{self._kind}/{job_id}", FINGERPRINT)

    def holders(self, job_id: str) -> str:
        """The folder of a job's leases."""
        return self._key(job_id, "holders")

    async def ids(self) -> list[str]:
        """Of all jobs of this kind, also those that are half stored or ended."""
        return [name for name in await self.objects.folders(f"{self._kind}/") if is_id(name)]

    async def keep(self, job: Job) -> None:
        """Commit a job."""
        await self.objects.create(self._key(job.id, "request.json"), orjson.dumps(job.to_json()))
        self._remember(job)

    async def job(self, job_id: str) -> Job | None:
        """A job; None when there is none. A known one costs no call."""
        known = self._jobs.get(job_id)
        if known is None and (said := await self.objects.read(self._key(job_id, "request.json"))) is not None:
            known = Job.from_json(job_id, said)
        if known is not None:
            self._remember(known)
        return known

    async def end(self, job_id: str) -> End | None:
        said = await self.objects.read(self._key(job_id, "end.json"))
        return None if said is None else End.from_json(said)

    async def put_end(self, job_id: str, end: End) -> bool:
        """Commit the end of a job. Returns whether it had none."""
        return await self.objects.create(self._key(job_id, "end.json"), orjson.dumps(end.to_json()))

    async def cancel(self, job_id: str, at: float) -> None:
        """Ask whoever works on a job to end it."""
        await self.objects.create(self._key(job_id, CANCELLED), orjson.dumps({"at": at}))

    async def cancelled_at(self, job_id: str) -> float | None:
        """When somebody asked for its end, seconds since 1970; None: nobody has."""
        said = await self.objects.read(self._key(job_id, CANCELLED))
        return None if said is None else float(said["at"])

    async def put_uploads(self, job_id: str, uploads: Mapping[str, bytes]) -> None:
        permits = asyncio.Semaphore(UPLOADS_AT_ONCE)

        async def put(name: str, data: bytes) -> None:
            async with permits:
                await self.objects.create(self._key(job_id, f"uploads/{name}"), data)

        async with asyncio.TaskGroup() as group:
            for name, data in uploads.items():
                group.create_task(put(name, data))

    async def upload(self, job_id: str, name: str) -> bytes | None:
        return await self.objects.read_bytes(self._key(job_id, f"uploads/{name}"))

    async def delete_uploads(self, job_id: str) -> None:
        await self.objects.delete(self._key(job_id, "uploads/"))

    async def newest(self, job_id: str) -> float:
        """When something of a job was last written, seconds since 1970."""
        return await self.objects.newest(self._key(job_id, ""))

    async def done(self, job_id: str) -> str:
        """How far a job is, as a text that changes when it gets further; empty at its start."""
        chunks = await self.objects.keys(self.layout(job_id).root + PARTS)
        return str(len(chunks)) if chunks else ""

    async def delete(self, job_id: str) -> None:
        """Forget a job and everything of it."""
        self._jobs.pop(job_id, None)
        await self.objects.delete(self._key(job_id, ""), first=self._key(job_id, "request.json"))

    def _key(self, job_id: str, name: str) -> str:
        return f"{self._kind}/{job_id}/{name}"

    def _remember(self, job: Job) -> None:
        self._jobs[job.id] = job
        self._jobs.move_to_end(job.id)
        while len(self._jobs) > KNOWN_JOBS:
            self._jobs.popitem(last=False)
