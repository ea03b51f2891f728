"""Whether this process still does its work: a loop that ticks, watches that speak, a queue that moves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from sightline_operator import metrics

log = logging.getLogger(__name__)
TICK_SECONDS = 1.0
MAX_TICK_AGE_SECONDS = 10.0
MAX_SILENCE_SECONDS = 3 * 70.0
MAX_QUEUE_AGE_SECONDS = 300.0
MAX_MISSES = 2
"""Lists that knew something which Kopf's watch had not told, and no news from it in between."""


@dataclass
class Health:
    """What the probes look at.

    heard    loop time of each watch's last sign of life, by kind; None while the kind is absent
    misses   lists, by kind, that showed what the watch had missed, since it last told something new
    """

    clock: Callable[[], float]
    heard: Callable[[], Mapping[str, float | None]] = dict
    oldest_age: Callable[[], float] = lambda: 0.0
    depth: Callable[[], int] = lambda: 0
    misses: dict[str, int] = field(default_factory=dict[str, int])
    is_connected: bool = False
    """The API server has answered at least once."""
    ticked_at: float = 0.0

    def problems(self) -> list[str]:
        """What is wrong, in words; empty: all is well."""
        now = self.clock()
        found: list[str] = []
        if self.ticked_at and (age := now - self.ticked_at) > MAX_TICK_AGE_SECONDS:
            found.append(f"the event loop last ticked {age:.0f} s ago")
        for kind, at in self.heard().items():
            if at is not None and now - at > MAX_SILENCE_SECONDS:
                found.append(f"the watch of {kind} has been silent for {now - at:.0f} s")
        for kind, count in self.misses.items():
            if count >= MAX_MISSES:
                found.append(f"the watch of {kind} is deaf: {count} lists knew more, and it told nothing")
        if (age := self.oldest_age()) > MAX_QUEUE_AGE_SECONDS:
            found.append(f"an object has waited {age:.0f} s in the queue")
        return found

    async def tick(self) -> None:
        """Mark that the loop runs, and keep the gauges fresh, until cancelled."""
        while True:
            self.ticked_at = self.clock()
            self.measure()
            await asyncio.sleep(TICK_SECONDS)

    def measure(self) -> None:
        """Set the gauges that are a function of now."""
        now = self.clock()
        for kind, at in self.heard().items():
            metrics.WATCH_AGE.labels(kind).set(0.0 if at is None else now - at)
        metrics.QUEUE_DEPTH.set(self.depth())
        metrics.QUEUE_OLDEST.set(self.oldest_age())


def application(health: Health) -> web.Application:
    """/healthz (restart me), /readyz (I can be counted on to take over), /metrics."""

    async def healthz(request: web.Request) -> web.Response:
        problems = health.problems()
        if problems:
            log.error("unhealthy: %s", "; ".join(problems))
        return web.Response(status=503 if problems else 200, text="\n".join(problems) or "ok")

    async def readyz(request: web.Request) -> web.Response:
        # Not a matter of leadership: a rollout would wait for ever for the process that it is to replace.
        return web.Response(
            status=200 if health.is_connected else 503, text="ok" if health.is_connected else "starting"
        )

    async def show(request: web.Request) -> web.Response:
        health.measure()
        return web.Response(body=generate_latest(metrics.REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", show)
    return app


async def serve(health: Health, port: int, host: str = "0.0.0.0") -> web.AppRunner:  # noqa: S104  kubelet and Prometheus
    """Start answering; the caller cleans up."""
    runner = web.AppRunner(application(health), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner
