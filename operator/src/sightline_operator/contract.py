"""What a batch's worker and a gateway promise the operator: exit codes, last words, progress, the gateway's state.

Both are of another distribution; this page is all that they share with it. Everything read here was written by a
process of the user's namespace: unknown fields are ignored, wrong ones count as absent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

MAX_FAILURES = 16
MAX_SAMPLE = 253


class Exit(IntEnum):
    """Exit codes of every mode (plan, run, finish). Order of podFailurePolicy: reference/operator.md §3.5.

    A worker that got SIGTERM says INTERRUPTED, never DONE: a Job takes 0 for a finished shard (kueue #10487).
    """

    DONE = 0
    UNUSABLE = 42
    """Credentials, bucket or plan are wrong: trying again is useless, the whole Job fails."""
    SHARD_CORRUPT = 43
    """This shard can't be done, others can: its index fails."""
    REVISION_MISMATCH = 44
    """The gateway answers with another pipeline revision than the plan's: the whole Job fails."""
    BACKEND_UNAVAILABLE = 75
    """The gateway was away too long: not counted, tried again."""
    INTERRUPTED = 143
    """SIGTERM; complete chunks are flushed: not counted, tried again."""


PLAN_FAULTS = frozenset({"InputNotFound", "InputEmpty", "InputTooLarge", "InvalidManifest", "AccessDenied"})
"""Reasons that a plan worker may give in its last words together with exit code 42."""
RUN_FAULTS = frozenset({"AccessDenied", "PlanCorrupt", "PipelineChanged", "TooManyFailures"})


@dataclass(frozen=True)
class Plan:
    """What planning found: PLAN.json in short.

    shards        indexes of the run Job; 0 only when there was nothing to do
    items         of all shards
    fingerprint   12 hexadecimal digits over pipeline revision, prompts and parameters: the outputs' prefix
    """

    shards: int
    items: int
    fingerprint: str = ""
    size_bytes: int = 0

    @classmethod
    def read(cls, said: Mapping[str, Any] | None) -> Plan | None:
        """From JSON; None when it isn't a plan."""
        if not said or (shards := _count(said, "shards")) is None or (items := _count(said, "items")) is None:
            return None
        fingerprint = said.get("fingerprint")
        return cls(shards, items, fingerprint if isinstance(fingerprint, str) else "", _count(said, "bytes") or 0)

    def as_json(self) -> dict[str, Any]:
        return {"shards": self.shards, "items": self.items, "fingerprint": self.fingerprint, "bytes": self.size_bytes}


@dataclass(frozen=True)
class Progress:
    """What is done, as the gateway counted it in the object store: `GET /internal/batches/<uid>/progress`.

    waiting    why workers stand still: BackendUnavailable, Throttled, or empty
    """

    total: int
    succeeded: int
    failed: int = 0
    unenhanced: int = 0
    size_bytes: int = 0
    shards_completed: int = 0
    usage: Mapping[str, int] | None = None
    failures: tuple[Mapping[str, Any], ...] = ()
    outputs: Mapping[str, str] | None = None
    waiting: str = ""

    @property
    def completed(self) -> int:
        return self.succeeded + self.failed

    @classmethod
    def read(cls, said: Mapping[str, Any] | None) -> Progress | None:
        """From JSON; None when it does not hold counts."""
        if not said or (total := _count(said, "total")) is None or (succeeded := _count(said, "succeeded")) is None:
            return None
        shards, usage = _mapping(said, "shards"), _mapping(said, "usage")
        outputs = {key: value for key, value in _mapping(said, "outputs").items() if isinstance(value, str)}
        waiting = said.get("waiting")
        return cls(
            total=total,
            succeeded=succeeded,
            failed=_count(said, "failed") or 0,
            unenhanced=_count(said, "unenhanced") or 0,
            size_bytes=_count(said, "bytes") or 0,
            shards_completed=_count(shards, "completed") or 0,
            usage={key: _count(usage, key) or 0 for key in ("promptTokens", "completionTokens")} if usage else None,
            failures=_failures(said.get("failures")),
            outputs={key: outputs[key] for key in ("manifest", "results", "errors") if key in outputs} or None,
            waiting=waiting if waiting in {"BackendUnavailable", "Throttled"} else "",
        )


@dataclass(frozen=True)
class GatewayState:
    """What one gateway pod says of what is behind it: `GET /internal/state`.

    open_steps   that it does not call for a while, after failures
    storage      why its bucket cannot be read: a code; empty when it can, when there is none, when that is not known
    """

    open_steps: frozenset[str] = frozenset()
    storage: str = ""

    @property
    def is_well(self) -> bool:
        return not self.open_steps and not self.storage

    @classmethod
    def read(cls, said: Mapping[str, Any] | None) -> GatewayState | None:
        """From JSON; None when it is no such thing.

        A half-open breaker counts as closed: it lets the next call through, and without one it would stay half open.
        """
        if not said or not isinstance(said.get("steps"), dict):
            return None
        storage = said.get("storage")
        is_bad = isinstance(storage, str) and storage not in ("ok", "unknown")
        return cls(
            frozenset(str(name) for name, state in said["steps"].items() if state == "open"),
            str(storage) if is_bad else "",
        )


@dataclass(frozen=True)
class LastWords:
    """A worker's termination message: at most 4 KiB of JSON.

    reason, message   of a failure
    plan              of a finished plan
    progress          of a finished finish: the final counts and where the outputs are
    """

    reason: str = ""
    message: str = ""
    plan: Plan | None = None
    progress: Progress | None = None

    @classmethod
    def read(cls, text: str) -> LastWords:
        """Never raises: what isn't JSON is a message."""
        try:
            said = json.loads(text) if text else {}
        except ValueError:
            return cls(message=text.strip())
        if not isinstance(said, dict):
            return cls(message=text.strip())
        reason, message = said.get("reason"), said.get("message")
        return cls(
            reason=reason if isinstance(reason, str) else "",
            message=message if isinstance(message, str) else "",
            plan=Plan.read(_mapping(said, "plan")),
            progress=Progress.read(_mapping(said, "progress")),
        )


def _failures(said: object) -> tuple[Mapping[str, Any], ...]:
    """The commonest kinds of failure, most first, ties by name: the same counts always read the same."""
    if not isinstance(said, list):
        return ()
    rows: list[dict[str, Any]] = []
    for row in said:
        if isinstance(row, dict) and isinstance(row.get("code"), str) and (count := _count(row, "count")):
            sample = {"sampleCustomId": str(row["sampleCustomId"])[:MAX_SAMPLE]} if row.get("sampleCustomId") else {}
            rows.append({"step": str(row.get("step", "")), "code": row["code"], "count": count, **sample})
    rows.sort(key=lambda row: (-row["count"], row["step"], row["code"]))
    return tuple(rows[:MAX_FAILURES])


def _mapping(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = said.get(name)
    return value if isinstance(value, dict) else {}


def _count(said: Mapping[str, Any], name: str) -> int | None:
    value = said.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
