"""Keeps the cache's picture of one kind true: list, watch from there, list again now and then.

The events of our own kinds come through Kopf. For everything else we watch ourselves, because Kopf does not tell of
what was deleted while its watch was away, keeps several KiB for each object it sees, and looks for absent kinds only
at its start unless it may watch all CRDs of the cluster.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

from sightline_operator.act.client import ApiError, Client, Gone, Silent
from sightline_operator.observe.cache import Cache
from sightline_operator.resources import Resource

log = logging.getLogger(__name__)
ABSENT_SECONDS = 10.0
"""How often it is asked whether an absent kind has come."""
BACKOFF_CAP_SECONDS = 30.0


def selects(resource: Resource) -> Callable[[Mapping[str, Any]], bool]:
    """Whether an object with these labels is in the list of this selector; `a=b`, `a!=b` and `a`, joined by commas."""
    wanted = [part for part in resource.selector.split(",") if part]

    def is_selected(obj: Mapping[str, Any]) -> bool:
        labels = obj["metadata"].get("labels") or {}
        for part in wanted:
            name, is_unequal, value = part.partition("!=")
            if is_unequal:
                if labels.get(name) == value:
                    return False
                continue
            name, is_equal, value = part.partition("=")
            if name not in labels or (is_equal and labels[name] != value):
                return False
        return True

    return is_selected


class Reflector:
    """One kind, in one namespace or all."""

    def __init__(
        self,
        client: Client,
        cache: Cache,
        resource: Resource,
        namespace: str | None,
        *,
        relist_seconds: float = 300.0,
        on_kind: Callable[[Resource, bool], None] = lambda resource, is_served: None,
        rng: random.Random | None = None,
    ) -> None:
        self._client, self._cache = client, cache
        self.resource, self.namespace = resource, namespace
        self._relist_seconds = relist_seconds
        self._on_kind = on_kind
        self._rng = rng or random.Random()  # noqa: S311  jitter
        self._selects = selects(resource)
        self._version = ""
        self.is_served: bool | None = None
        """None: not known yet."""
        self.listed = asyncio.Event()
        """Set when the kind was listed once, or is known to be absent."""
        self.heard_at: float | None = None
        """Loop time of the last sign of life of the watch; None while the kind is absent."""

    async def run(self) -> None:
        """Until cancelled. Whatever fails is tried again."""
        failures = 0
        while True:
            try:
                await self._round()
                failures = 0
            except ApiError as error:
                if error.status == 404 and self.resource.is_optional:
                    self._note_served(False)
                    await asyncio.sleep(self._jittered(ABSENT_SECONDS))
                    continue
                failures += 1
                if not isinstance(error, Gone):
                    log.warning("watch of %s: %s", self.resource.plural, error)
                    await asyncio.sleep(self._jittered(min(BACKOFF_CAP_SECONDS, 0.5 * 2 ** min(failures, 8))))

    async def _round(self) -> None:
        """One list and the watches that follow it, until it is time to list again."""
        if self.resource.is_optional:
            version = await self._client.served(self.resource)
            if version is None:
                raise ApiError(404, "NotServed", self.resource.plural)
            self._version = version
        objs, since = await self._client.list(self.resource, self.namespace, self._version)
        self._cache.replace(self.resource.kind, self._belongs, objs, since)
        del objs
        self._note_served(True)
        loop = asyncio.get_running_loop()
        until = loop.time() + self._jittered(self._relist_seconds)
        while (left := until - loop.time()) > 0:
            since = await self._watch(since, max(1, int(min(left, 290))))

    async def _watch(self, since: str, seconds: int) -> str:
        """One stream; returns the version to go on from."""
        loop = asyncio.get_running_loop()
        stream = self._client.watch(self.resource, self.namespace, since, version=self._version, seconds=seconds)
        try:
            async for type_, obj in stream:
                self.heard_at = loop.time()
                since = str(obj["metadata"]["resourceVersion"])
                if type_ in ("ADDED", "MODIFIED"):
                    self._cache.put(obj)
                elif type_ == "DELETED":
                    self._cache.remove(obj)
        except Silent as error:
            # A half-open connection; or events, which the API server sends no bookmarks for.
            log.debug("watch of %s was silent: %s", self.resource.plural, error)
        return since

    def _belongs(self, obj: Mapping[str, Any]) -> bool:
        is_here = self.namespace in (None, obj["metadata"].get("namespace"))
        return is_here and self._selects(obj)

    def _note_served(self, is_served: bool) -> None:
        if not is_served:
            self.heard_at = None
            if self.is_served:
                self._cache.replace(self.resource.kind, self._belongs, [], str(2**63))
        if self.is_served != is_served:
            self.is_served = is_served
            self._on_kind(self.resource, is_served)
        self.listed.set()

    def _jittered(self, seconds: float) -> float:
        return seconds * self._rng.uniform(0.8, 1.2)
