"""A batch as OpenAI's clients know it, and what whoever does it must be able to. Pure."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from sightline.jobs.items import Counts
from sightline.jobs.openai.files import File
from sightline.jobs.openai.requests import LineFault

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
Which = Literal["results", "errors"]

FINAL: frozenset[Status] = frozenset({"failed", "completed", "expired", "cancelled"})

OUTPUT_SUFFIXES: Mapping[Which, str] = {"results": "-output", "errors": "-errors"}
_BATCH, _FILE = "batch_", "file-"


@dataclass(frozen=True, slots=True)
class Order:
    """What a client asks for.

    faults          of its file: the batch fails at once, and says so
    window          as the client wrote it, and in
    window_seconds  seconds from now until the batch expires
    output_seconds  how long its output is kept after its end; None: as long as any
    """

    file: File
    endpoint: str
    principal: str
    window: str
    window_seconds: float
    metadata: Mapping[str, str] | None = None
    output_seconds: float | None = None
    faults: tuple[LineFault, ...] = ()

    def about(self) -> dict[str, Any]:
        """All of it that a batch tells later, as JSON."""
        return {
            "file": self.file.id,
            "endpoint": self.endpoint,
            "window": self.window,
            "window_seconds": self.window_seconds,
            "metadata": None if self.metadata is None else dict(self.metadata),
            "requests": self.file.checked.requests if self.file.checked else 0,
            "output_seconds": self.output_seconds,
            "faults": [fault.to_json() for fault in self.faults],
        }


@dataclass(frozen=True, slots=True)
class Batch:
    """What is known of a batch.

    key      its id without `batch_`: 32 hexadecimal digits
    about    what its order said (`Order.about`)
    total    requests; `counts` of those that are done
    times    seconds since 1970: created, expires (of its window), and of what has happened: in_progress, finalizing,
             cancelling, ended
    """

    key: str
    status: Status
    about: Mapping[str, Any]
    total: int
    counts: Counts = field(default_factory=Counts)
    times: Mapping[str, float] = field(default_factory=dict[str, float])
    faults: tuple[LineFault, ...] = ()

    @property
    def id(self) -> str:
        return _BATCH + self.key

    def output_id(self, which: Which) -> str | None:
        """The id of its output or error file; None while it is not over, and when there are no such lines."""
        lines = self.counts.succeeded if which == "results" else self.counts.failed
        return f"{_FILE}{self.key}{OUTPUT_SUFFIXES[which]}" if self.status in FINAL and lines else None

    def output_expires(self, usual_seconds: float) -> float:
        """When its files are forgotten, seconds since 1970."""
        return self.times.get("ended", self.times["created"]) + (self.about.get("output_seconds") or usual_seconds)

    def to_json(self) -> dict[str, Any]:
        """OpenAI's `batch` object."""
        ended: dict[str, float | None] = {}
        if self.status in FINAL:
            ended = {f"{self.status}_at": self.times.get("ended")}
        at = {
            "created_at": self.times["created"],
            "expires_at": self.times.get("expires"),
            "in_progress_at": self.times.get("in_progress"),
            "finalizing_at": self.times.get("finalizing"),
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": self.times.get("cancelling"),
            "cancelled_at": None,
        } | ended
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.about["endpoint"],
            "errors": {"object": "list", "data": [fault.to_json() for fault in self.faults]} if self.faults else None,
            "input_file_id": self.about["file"],
            "completion_window": self.about["window"],
            "status": self.status,
            "output_file_id": self.output_id("results"),
            "error_file_id": self.output_id("errors"),
            **{name: None if moment is None else int(moment) for name, moment in at.items()},
            "request_counts": {
                "total": self.total,
                "completed": self.counts.succeeded,
                "failed": self.counts.failed,
            },
            "usage": _usage(self.counts),
            "metadata": self.about.get("metadata"),
        }


class Backend(Protocol):
    """Who does batches. Every call may raise a StoreFault or a SightlineError.

    A batch is answered to the principal who made it, and to nobody else.
    """

    async def start(self) -> None:
        """Take up what was left undone."""
        ...

    async def close(self) -> None: ...

    async def create(self, order: Order) -> Batch: ...

    async def get(self, key: str, principal: str) -> Batch | None: ...

    async def list(self, principal: str, *, after: str | None, limit: int) -> Sequence[Batch]:
        """At most `limit` batches, newest first, those older than the one whose key is `after`."""
        ...

    async def cancel(self, key: str, principal: str) -> Batch | None:
        """End a batch early, unless it has ended. None as for `get`."""
        ...

    def lines(self, batch: Batch, which: Which) -> AsyncIterator[bytes]:
        """What became of its requests: pieces of whole lines, as the store has them. Of a batch that is over, all."""
        ...


def batch_key(batch_id: str) -> str:
    """The key in a batch's id; empty when it is no such id."""
    return _key(batch_id, _BATCH)


def output_of(file_id: str) -> tuple[str, Which] | None:
    """Key of the batch that a file is the output of, and of what; None when it is none."""
    for which, suffix in OUTPUT_SUFFIXES.items():
        if file_id.endswith(suffix) and (key := _key(file_id.removesuffix(suffix), _FILE)):
            return key, which
    return None


def _key(text: str, prefix: str) -> str:
    key = text.removeprefix(prefix)
    is_key = text.startswith(prefix) and len(key) == 32 and all(digit in "0123456789abcdef" for digit in key)
    return key if is_key else ""


def _usage(counts: Counts) -> dict[str, Any]:
    """Without OpenAI's breakdown into cached and reasoning tokens: nobody counts those."""
    return {
        "input_tokens": counts.prompt_tokens,
        "output_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }
