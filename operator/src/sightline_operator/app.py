"""Kopf, as far as it is used: it logs in, finds our two kinds, watches them, and hands every event to the core.

Level-triggered: `on.event` only, which writes nothing to the objects. No peering, timers, daemons, indexes, finalizers
or annotations; leadership, retries, status and everything that is not one of our two kinds are ours.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import kopf

from sightline_operator.act.client import Credentials
from sightline_operator.settings import GROUP, VERSION

OnEvent = Callable[[str | None, Mapping[str, Any]], None]
"""Type (None while listing, ADDED, MODIFIED, DELETED) and object."""
PLURALS = ("visionpipelines", "visionbatches")


class NoDiffs(kopf.DiffBaseStorage):
    """Kopf copies every object deeply at every event to compare it with what it was; `on.event` has no use for that."""

    def build(self, **_: object) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: object) -> None:
        return None

    def store(self, **_: object) -> None:
        """Nothing is kept."""


class NoProgress(kopf.ProgressStorage):
    """`on.event` handlers are tried once, so that there is no progress to keep on the object."""

    def fetch(self, **_: object) -> None:
        return None

    def store(self, **_: object) -> None:
        """Nothing is kept."""

    def purge(self, **_: object) -> None:
        """Nothing was kept."""

    def touch(self, **_: object) -> None:
        """Nothing to touch."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence


class Backoffs:
    """Seconds between attempts of one call, for ever: replicas must not all come back at the same moment."""

    def __iter__(self) -> Iterator[float]:
        seconds = 1.0
        while True:
            yield seconds * random.uniform(0.5, 1.5)  # noqa: S311  jitter
            seconds = min(21.0, seconds * 1.6)


def configure(settings: kopf.OperatorSettings) -> None:
    """What each value is for: reference/operator.md §1.2."""
    settings.peering.standalone = True
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.execution.max_workers = 2
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.networking.error_backoffs = Backoffs()
    settings.watching.server_timeout = random.randint(260, 300)  # noqa: S311  jitter
    settings.watching.inactivity_timeout = 70
    settings.watching.reconnect_backoff = random.uniform(0.5, 1.0)  # noqa: S311  jitter
    settings.queueing.idle_timeout = 1.0
    settings.process.ultimate_exiting_timeout = 25
    settings.persistence.finalizer = f"{GROUP}/unused"
    settings.persistence.consistency_timeout = 0
    settings.persistence.diffbase_storage = NoDiffs()
    settings.persistence.progress_storage = NoProgress()


def registry_of(on_event: OnEvent, credentials: Callable[[], Awaitable[Credentials]]) -> kopf.OperatorRegistry:
    """Kopf's handlers: a login with our own credentials, and two that pass events on."""
    registry = kopf.OperatorRegistry()

    async def login(**_: object) -> kopf.ConnectionInfo:
        known = await credentials()
        return kopf.ConnectionInfo(
            server=known.host,
            ca_path=known.ca_path,
            ca_data=None if known.ca_path else known.ca_data,
            insecure=not known.is_verified,
            scheme="Bearer" if known.token else None,
            token=known.token,
            certificate_path=known.certificate_path,
            private_key_path=known.key_path,
        )

    async def passed_on(event: kopf.RawEvent, **_: object) -> None:
        on_event(event["type"], event["object"])

    kopf.on.login(registry=registry)(login)
    for plural in PLURALS:
        kopf.on.event(GROUP, VERSION, plural, registry=registry)(passed_on)
    return registry


async def watch(
    on_event: OnEvent,
    credentials: Callable[[], Awaitable[Credentials]],
    namespaces: tuple[str, ...],
) -> None:
    """Run Kopf until cancelled. Returns when it took a signal that was ours: it takes over SIGTERM when it starts."""
    settings = kopf.OperatorSettings()
    configure(settings)
    try:
        await kopf.operator(
            registry=registry_of(on_event, credentials),
            settings=settings,
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
        )
    except asyncio.CancelledError:  # after a signal it cancels itself
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
