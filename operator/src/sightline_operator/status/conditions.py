"""Conditions as the API conventions want them: one per type, transition times that change only with status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sightline_operator.status.times import stamp

Truth = Literal["True", "False", "Unknown"]
MAX_MESSAGE = 1024
"""Characters. metav1.Condition allows 32,768; nobody reads them, and each is stored in etcd."""


@dataclass(frozen=True)
class Condition:
    """One finding. `type` is the name under which it is kept; `reason` is API: tools match on it."""

    type: str
    status: Truth
    reason: str
    message: str = ""

    @property
    def is_true(self) -> bool:
        return self.status == "True"


def merged(
    previous: Iterable[Mapping[str, Any]], wanted: Sequence[Condition], *, generation: int, now: datetime
) -> list[dict[str, Any]]:
    """The conditions to write, in the order wanted.

    A transition time is kept while the status of its condition stays, whatever reason and message do. Times of
    conditions that are not wanted any more are forgotten with them.
    """
    before = {condition["type"]: condition for condition in previous}
    return [_rendered(condition, before.get(condition.type), generation, now) for condition in wanted]


def find(conditions: Iterable[Mapping[str, Any]] | None, type: str) -> Mapping[str, Any]:
    """The condition of that type, of any object; empty when it has none."""
    return next((condition for condition in conditions or () if condition.get("type") == type), {})


def is_true(conditions: Iterable[Mapping[str, Any]] | None, type: str) -> bool:
    return find(conditions, type).get("status") == "True"


def shortened(message: str) -> str:
    """One line of at most MAX_MESSAGE characters; the end of an error is cut, not its beginning."""
    line = " ".join(message.split())
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 1] + "…"


def _rendered(condition: Condition, before: Mapping[str, Any] | None, generation: int, now: datetime) -> dict[str, Any]:
    is_same = before is not None and before.get("status") == condition.status
    since = before.get("lastTransitionTime") if is_same and before else None
    return {
        "type": condition.type,
        "status": condition.status,
        "reason": condition.reason,
        "message": shortened(condition.message),
        "observedGeneration": generation,
        "lastTransitionTime": since or stamp(now),
    }
