"""What a worker leaves behind of a shard beside its chunks: `done/` when it is finished, `progress/` until then. Pure.

Both are the same JSON: counts, and whose. Only `done/` lists parts, and nothing is decided by either: what is done is
what lies below `parts/`. So a lost or stale report costs a late number and never a result.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sightline.jobs.items import Counts

Waiting = Literal["", "BackendUnavailable", "Throttled"]
"""Why a worker stands still, in the operator's words."""

MAX_FAILURES = 16
"""Kinds of failure that a report tells, the commonest."""


@dataclass(frozen=True, slots=True)
class Part:
    """One chunk as it lies in the store.

    size     bytes
    sha256   64 hexadecimal digits
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> "Part":
        return cls(len(data), hashlib.sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class ShardReport:
    """How far a shard is, or, with its parts, that it is done.

    counts   of every chunk that lies in the store, whoever wrote it; in progress/, of open chunks too
    at       when this was said, seconds since 1970; 0 in `done/`, which says the same however often it is written
    waiting  why its worker stands still
    parts    of a finished shard: all its chunks, in order
    """

    shard: int
    counts: Counts
    at: float = 0.0
    waiting: Waiting = ""
    parts: tuple[Part, ...] = ()

    def to_json(self) -> dict[str, Any]:
        counts = self.counts.to_json()
        said: dict[str, Any] = {"shard": self.shard, **counts, "failures": counts["failures"][:MAX_FAILURES]}
        if self.at:
            said["at"] = round(self.at, 3)
        if self.waiting:
            said["waiting"] = self.waiting
        if self.parts:
            said["parts"] = [{"bytes": part.size, "sha256": part.sha256} for part in self.parts]
        return said

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "ShardReport":
        """Raises KeyError, TypeError or ValueError when it is none."""
        waiting = said.get("waiting")
        return cls(
            int(said["shard"]),
            Counts.from_json(said),
            float(said.get("at", 0.0)),
            waiting if waiting in ("BackendUnavailable", "Throttled") else "",
            tuple(Part(int(part["bytes"]), str(part["sha256"])) for part in said.get("parts", ())),
        )
