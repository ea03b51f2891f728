"""Times as Kubernetes writes them."""

from __future__ import annotations

from datetime import UTC, datetime


def stamp(moment: datetime) -> str:
    """Whole seconds in UTC with a Z, as metav1.Time is written."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(text: str | None) -> datetime | None:
    """The aware time that a timestamp says, with or without fractions; None for none."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")) if text else None
