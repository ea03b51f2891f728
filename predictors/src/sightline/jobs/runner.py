"""Batches that a server, or a replica of it, works on behind its requests: stored first, taken by lease, ended once.

Keys of a job below the runner's own folder, beside those of its plan and parts (`layout`):

    <kind>/<id>/request.json           who asked for what                 created once: the commit of submitting
    <kind>/<id>/uploads/<name>         bytes that came with it            created before request.json, deleted at the end
    <kind>/<id>/holders/lease-<n>      who works on it, and until when    n-th holder; created with If-None-Match
    <kind>/<id>/CANCELLED              somebody wants it ended            created once, by any replica
    <kind>/<id>/end.json               how it ended, and until when it can be asked for; created once
    <kind>/<id>/<fingerprint>/…        plan, parts, done, output          see `layout`

Any replica that shares the store answers; what a killed one held goes on elsewhere when its lease ends.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sightline.jobs.items import Counts, Item, Line
from sightline.jobs.objects import LEASE_SECONDS, Objects

Status = Literal[
    "queued",  # stored; nobody works on it yet
    "planning",
    "running",
    "finishing",
    "cancelling",
    "completed",
    "failed",
    "cancelled",
    "expired",
]
ENDED = frozenset({"completed", "failed", "cancelled", "expired"})


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


@dataclass(frozen=True, slots=True)
class State:
    """What is known of a job.

    total    items; None until it is planned
    counts   of the items that are done, failed ones too
    error    {code, message} when it failed as a whole: its input was no good, or nobody could finish it
    times    seconds since 1970 of what has happened: created, planned, cancelling, finishing, ended
    expires  when an ended job is forgotten
    """

    job: Job
    status: Status
    total: int | None = None
    counts: Counts = Counts()
    error: Mapping[str, Any] | None = None
    times: Mapping[str, float] = field(default_factory=dict[str, float])
    expires: float | None = None

    @property
    def is_ended(self) -> bool:
        return self.status in ENDED


Do = Callable[[Job, Item], Awaitable[Line]]
"""Does one item of a job. May be cancelled; anything else that it raises becomes the error `internal`, and a log line."""

ItemsOf = Callable[[Job], AsyncIterator[Item]]
"""The items of a job that was submitted without. Raises `inputs.InputFault`: the job fails with its reason."""


class Runner:
    """The jobs of one kind on one server.

    objects      the store, shared by all replicas that answer for each other
    kind         folder of all its jobs, such as `batches`
    do           does one item
    items_of     items of jobs that were submitted without them
    ttl_seconds  how long an ended job can be asked for
    width        items that are worked on at a time, of all jobs together
    max_open     unfinished items that this server holds at most; more are refused with QueueFull
    clock        seconds since 1970, the same for all replicas
    """

    def __init__(
        self,
        objects: Objects,
        kind: str,
        do: Do,
        *,
        items_of: ItemsOf | None = None,
        ttl_seconds: float,
        width: int,
        max_open: int = 10_000,
        clock: Callable[[], float] = time.time,
    ) -> None: ...

    async def start(self, sweep_seconds: float = LEASE_SECONDS) -> None:
        """Take up what an earlier or another server left, now and every `sweep_seconds`."""
        ...

    async def close(self, grace_seconds: float = 0) -> None:
        """Wait so long for what runs here, then stop, keeping complete chunks; the rest goes on elsewhere."""
        ...

    async def submit(
        self,
        items: Sequence[Item] | None,
        *,
        principal: str,
        about: Mapping[str, Any] | None = None,
        uploads: Mapping[str, bytes] | None = None,
        window_seconds: float | None = None,
        shard_size: int = 1000,
        chunk_size: int = 50,
    ) -> Job:
        """Store a job and start it. An item's upload is `uploads[name]` where its `uri` is `upload:<name>`.

        items           None: `items_of` finds them behind the request
        window_seconds  from now until its deadline

        Raises QueueFull (429) when this server has enough to do.
        """
        ...

    async def get(self, job_id: str, principal: str, *, counted: bool = True) -> State | None:
        """The state of a job; None when there is none, it has expired, or it is somebody else's.

        counted  whether the counts are wanted (they cost reading what the workers have said)
        """
        ...

    async def list(self, principal: str, *, after: str | None = None, limit: int = 20) -> Sequence[State]:
        """The jobs of a principal, newest first, those older than the job `after`."""
        ...

    async def cancel(self, job_id: str, principal: str) -> State | None:
        """End a job early, whichever replica works on it; what is done is kept, the rest ends as `batch_cancelled`.

        Returns the state, already `cancelling` unless it had ended; None as `get` does.
        """
        ...

    async def wait(self, job_id: str, seconds: float | None = None) -> None:
        """Return when this server works on the job no longer, or `seconds` have passed."""
        ...

    def lines(self, job_id: str, which: Literal["all", "results", "errors"]) -> AsyncIterator[bytes]:
        """The lines (of JSON, each with its line feed) of the chunks that are committed, in the order of the items."""
        ...

    async def upload(self, job: Job, item: Item) -> bytes | None:
        """The bytes that came with an item; None when it has none or they are gone."""
        ...
