"""What a decision may hold: objects to apply or delete, a status, events, and when to look again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Apply:
    """Server-side apply of exactly these fields; the executor skips it when nothing would change.

    is_create_only   for objects that are never changed after creation (Jobs): AlreadyExists with our owner uid is fine
    """

    manifest: Mapping[str, Any]
    is_create_only: bool = False


@dataclass(frozen=True)
class Delete:
    """Delete the object with this uid, and no other of that name; `Foreground`-less, absent is fine."""

    api_version: str
    kind: str
    name: str
    uid: str


@dataclass(frozen=True)
class Note:
    """An event about the object. The writer aggregates: at most one per reason in five minutes."""

    type: Literal["Normal", "Warning"]
    reason: str
    action: str
    note: str


@dataclass(frozen=True)
class Decision:
    """What is to be done now.

    actions          in this order; the executor stops at the first that fails and comes back
    status           the whole status that we own; the executor skips the write when it is the live one
    requeue_seconds  look again after so long even if nothing happens; None: when something happens, or at resync
    """

    actions: tuple[Apply | Delete, ...]
    status: Mapping[str, Any]
    notes: tuple[Note, ...] = ()
    requeue_seconds: float | None = None
