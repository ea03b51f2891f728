"""Kubernetes events about our objects: at most one per reason in five minutes for each object."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sightline_operator import metrics
from sightline_operator.act.client import ApiError, Client
from sightline_operator.decide.decision import Note

log = logging.getLogger(__name__)
QUIET_SECONDS = 300.0
MAX_REMEMBERED = 10_000
MAX_NOTE = 1024
CONTROLLER = "sightline.dev/operator"


class EventWriter:
    """Writes notes as events.k8s.io/v1 Events. An event that cannot be written is logged and forgotten."""

    def __init__(
        self,
        client: Client,
        *,
        identity: str,
        monotonic: Callable[[], float],
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client, self._identity = client, identity
        self._monotonic, self._wall = monotonic, wall
        self._last: OrderedDict[tuple[str, str], float] = OrderedDict()

    async def write(self, cr: Mapping[str, Any], note: Note) -> bool:
        """Write it unless the same reason was written lately for this object."""
        uid, now = str(cr["metadata"]["uid"]), self._monotonic()
        if now - self._last.get((uid, note.reason), -QUIET_SECONDS) < QUIET_SECONDS:
            metrics.EVENTS.labels("held_back").inc()
            return False
        self._last.pop((uid, note.reason), None)
        self._last[uid, note.reason] = now
        while len(self._last) > MAX_REMEMBERED:
            self._last.popitem(last=False)
        try:
            await self._client.create_event(self._event(cr, note))
        except ApiError as error:
            log.warning("event %s not written: %s", note.reason, error)
            return False
        metrics.EVENTS.labels("written").inc()
        return True

    def _event(self, cr: Mapping[str, Any], note: Note) -> dict[str, Any]:
        metadata = cr["metadata"]
        time = self._wall().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mark = hashlib.sha256(f"{metadata['uid']}{note.reason}{time}".encode()).hexdigest()[:16]
        about = {"apiVersion": cr["apiVersion"], "kind": cr["kind"]}
        about |= {name: metadata[name] for name in ("name", "namespace", "uid")}
        return {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name'][:230]}.{mark}", "namespace": metadata["namespace"]},
            "eventTime": time,
            "reportingController": CONTROLLER,
            "reportingInstance": self._identity[:128],
            "type": note.type,
            "reason": note.reason,
            "action": note.action,
            "note": note.note if len(note.note) <= MAX_NOTE else note.note[: MAX_NOTE - 3] + "...",
            "regarding": about,
        }
