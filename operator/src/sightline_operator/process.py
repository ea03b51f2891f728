"""One operator process: connects, waits for leadership, watches, works, and ends as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
from collections.abc import Callable, Coroutine, Mapping
from typing import Any
from urllib.parse import urlencode

from aiohttp import web

from sightline_operator import app, metrics, probe
from sightline_operator.act.client import ApiError, Client, KubernetesClient
from sightline_operator.act.events import EventWriter
from sightline_operator.act.executor import Executor
from sightline_operator.decide.batch import decide_batch
from sightline_operator.decide.pipeline import decide_pipeline
from sightline_operator.lead import Leader, LeaseLost
from sightline_operator.observe.cache import Cache, ref_of
from sightline_operator.observe.endpoints import Endpoints
from sightline_operator.observe.observe import Observer
from sightline_operator.observe.reflector import Reflector
from sightline_operator.queue import Queue
from sightline_operator.reconcile import Decide, Reconciler
from sightline_operator.render.names import child_name
from sightline_operator.resources import CHILDREN, OPTIONAL, OURS, PODS, WARNINGS, Resource
from sightline_operator.settings import OperatorSettings

log = logging.getLogger(__name__)
OnEvent = Callable[[str | None, Mapping[str, Any]], None]
MEASURE_SECONDS = 10.0
WATCH_GRACE_SECONDS = 10.0
"""What a list shows may reach the watch so much later."""


class Operator:
    """Everything of one process that must live and end together."""

    def __init__(
        self,
        client: Client,
        settings: OperatorSettings,
        health: probe.Health,
        decide: Mapping[str, Decide] | None = None,
    ) -> None:
        self._client, self._settings, self._health = client, settings, health
        loop = asyncio.get_running_loop()
        self.queue = Queue()
        self.cache = Cache(
            self.queue.add,
            on_news=lambda key, news: self.queue.add(key, why=news),
            on_known=self.queue.retract,
        )
        self.endpoints = Endpoints(self.queue.add)
        self._served: set[str] = set()
        observer = Observer(
            self.cache,
            lambda: frozenset(self._served),
            self.endpoints,
            progress_url=self._progress_url,
            state_url=self._state_url,
        )
        events = EventWriter(client, identity=settings.identity, monotonic=loop.time)
        executor = Executor(
            client,
            self.cache,
            events,
            monotonic=loop.time,
            repair_window_seconds=settings.repair_window_seconds,
            is_dry_run=settings.is_dry_run,
        )
        decide = decide or {
            "VisionPipeline": functools.partial(decide_pipeline, settings=settings.render),
            "VisionBatch": functools.partial(decide_batch, settings=settings.render),
        }
        self.reconciler = Reconciler(
            client, self.cache, self.queue, observer, executor, decide, resync_seconds=settings.resync_seconds
        )
        self._scopes: tuple[str | None, ...] = settings.namespaces or (None,)
        self._reflectors = [
            Reflector(client, self.cache, r, scope, relist_seconds=settings.repair_seconds, on_kind=self._on_kind)
            for r in (*CHILDREN, *PODS, WARNINGS, *OPTIONAL)
            for scope in self._scopes
        ]
        health.heard = self._heard
        health.oldest_age = self.queue.oldest_age
        health.depth = lambda: len(self.queue.work)

    async def run(self, watch_ours: Callable[[OnEvent], Coroutine[Any, Any, None]]) -> None:
        """Watch and work until cancelled, or raise the first fault that concerns the whole process.

        watch_ours   tells of every change to an object of our two kinds, for ever: Kopf
        """
        parts: list[Coroutine[Any, Any, None]] = [reflector.run() for reflector in self._reflectors]
        parts += [self._relist(resource, scope) for resource in OURS for scope in self._scopes]
        parts += [self.endpoints.run(), self._measure(), self._work()]
        parts += [watch_ours(self._on_event)]
        await _all(parts)

    async def _work(self) -> None:
        """Start working when everything has been listed once: half a picture leads to wrong decisions."""
        await asyncio.gather(*(reflector.listed.wait() for reflector in self._reflectors))
        for resource in OURS:
            for scope in self._scopes:
                await self._list(resource, scope)
        log.info("caught up", extra={"objects": len(self.cache), "kinds": sorted(self._served)})
        await _all([self.reconciler.work() for _ in range(self._settings.workers)])

    async def _list(self, resource: Resource, scope: str | None) -> None:
        while True:
            try:
                objs, _ = await self._client.list(resource, scope)
            except ApiError as error:
                log.warning("list of %s: %s", resource.plural, error)
                await asyncio.sleep(1)
                continue
            for obj in objs:
                self.cache.put(obj)
            return

    def _on_event(self, type_: str | None, obj: Mapping[str, Any]) -> None:
        is_news = self.cache.remove(obj) if type_ == "DELETED" else self.cache.put(obj)
        if is_news:
            self._health.misses.pop(str(obj["kind"]), None)  # it hears

    def _on_kind(self, resource: Resource, is_served: bool) -> None:
        """A kind of another project came or went: everybody may be concerned."""
        if not resource.is_optional:
            return
        log.info("%s is %s", resource.kind, "served" if is_served else "not served")
        (self._served.add if is_served else self._served.discard)(resource.kind)
        for key in self.cache.our_keys():
            self.queue.add(key)

    async def _relist(self, resource: Resource, scope: str | None) -> None:
        """List our own kinds now and then: Kopf tells neither what went while it was away, nor that it is deaf."""
        while True:
            await asyncio.sleep(self._settings.repair_seconds)
            try:
                objs, since = await self._client.list(resource, scope)
            except ApiError as error:
                log.warning("list of %s: %s", resource.plural, error)
                continue
            news = [obj for obj in objs if int(obj["metadata"]["resourceVersion"]) > self.cache.version(ref_of(obj))]
            if news:
                await asyncio.sleep(WATCH_GRACE_SECONDS)
            missed = sum(self.cache.put(obj) for obj in news)
            if missed:
                metrics.WATCH_MISSED.labels(resource.kind).inc(missed)
                self._health.misses[resource.kind] = self._health.misses.get(resource.kind, 0) + 1
            here = scope
            self.cache.replace(
                resource.kind, lambda obj, here=here: here in (None, obj["metadata"]["namespace"]), objs, since
            )

    def _heard(self) -> dict[str, float | None]:
        """The oldest sign of life of each kind's watches."""
        heard: dict[str, float | None] = {}
        for reflector in self._reflectors:
            at = reflector.heard_at
            old = heard.setdefault(reflector.resource.kind, at)
            if at is not None and old is not None:
                heard[reflector.resource.kind] = min(at, old)
        return heard

    async def _measure(self) -> None:
        """Gauges that walk the cache."""
        while True:
            states: dict[str, int] = {}
            items: dict[str, int] = {}
            for resource in OURS:
                metrics.OBJECTS.labels(resource.kind).set(len(self.cache.refs(resource.kind)))
            for ref in self.cache.refs("VisionBatch"):
                status = (self.cache.get(*ref) or {}).get("status") or {}
                states[status.get("state", "Unknown")] = states.get(status.get("state", "Unknown"), 0) + 1
                if not status.get("completionTime"):
                    for name in ("succeeded", "failed", "remaining"):
                        items[name] = items.get(name, 0) + int((status.get("progress") or {}).get(name) or 0)
            metrics.BATCHES.clear()
            for state, count in states.items():
                metrics.BATCHES.labels(state).set(count)
            for name, count in items.items():
                metrics.BATCH_ITEMS.labels(name).set(count)
            await asyncio.sleep(MEASURE_SECONDS)

    def _progress_url(self, pipeline: Mapping[str, Any], batch: Mapping[str, Any]) -> str | None:
        asked = progress_query(pipeline, batch)
        return (
            f"{self._gateway(pipeline)}/internal/batches/{batch['metadata']['uid']}/progress?{asked}" if asked else None
        )

    def _state_url(self, address: str) -> str | None:
        host = f"[{address}]" if ":" in address else address
        base = self._settings.gateway_pod_url.format(ip=host)
        return f"{base}/internal/state" if base else None

    def _gateway(self, pipeline: Mapping[str, Any]) -> str:
        metadata, spec = pipeline["metadata"], pipeline["spec"]
        return self._settings.gateway_url.format(
            service=child_name(metadata["name"], "gateway"),
            namespace=metadata["namespace"],
            name=metadata["name"],
            domain=self._settings.render.cluster_domain,
            port=((spec.get("gateway") or {}).get("service") or {}).get("port", 80),
        )


def progress_query(pipeline: Mapping[str, Any], batch: Mapping[str, Any]) -> str | None:
    """What a gateway is told of the batch whose progress it shall count: fingerprint and place.

    None before there is a plan, and when the batch writes elsewhere than into the gateway's own bucket: it counts
    nothing there, as it has no right to.
    """
    status, storage = batch.get("status") or {}, (pipeline["spec"].get("storage") or {}).get("s3") or {}
    output = status.get("output") or (batch["spec"].get("output") or {}).get("s3") or {}
    same = all(storage.get(name) == output.get(name) for name in ("bucket", "endpoint"))
    if not storage or not same or not status.get("fingerprint"):
        return None
    place = f"s3://{output['bucket']}/{(output.get('prefix') or '').strip('/')}".rstrip("/")
    return urlencode({"fingerprint": status["fingerprint"], "output": place})


async def run(settings: OperatorSettings, kubeconfig: str | None, context: str | None) -> int:
    """Run until SIGTERM or SIGINT (0), or until leadership or a part of the process is lost (1)."""
    loop = asyncio.get_running_loop()
    client = await KubernetesClient.connect(kubeconfig, context)
    health = probe.Health(clock=loop.time)
    stopped = asyncio.Event()
    runner: web.AppRunner | None = None
    try:
        if settings.metrics_port:
            runner = await probe.serve(health, settings.metrics_port)
        work = asyncio.create_task(_lead_and_work(client, settings, health, stopped))
        ticking = asyncio.create_task(health.tick())
        watching = asyncio.create_task(_own_signals(stopped))
        ending = asyncio.create_task(stopped.wait())
        done, _ = await asyncio.wait({work, ending}, return_when=asyncio.FIRST_COMPLETED)
        for task in (work, ticking, watching, ending):
            task.cancel()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(work, return_exceptions=True), 10)
        return _verdict(work) if work in done else 0
    finally:
        if runner is not None:
            await runner.cleanup()
        await client.close()


async def _own_signals(stopped: asyncio.Event) -> None:
    """SIGTERM and SIGINT are ours; Kopf takes them over when it starts, so they are taken back every second.

    One that comes in between ends Kopf, and by that the process, in the same way.
    """
    loop = asyncio.get_running_loop()
    while True:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopped.set)
        await asyncio.sleep(1)


def _verdict(work: asyncio.Task[None]) -> int:
    error = None if work.cancelled() else work.exception()
    if isinstance(error, LeaseLost):
        log.error("leadership lost: %s", error)
    elif error is not None:
        log.error("cannot go on", exc_info=error)
    return 1


async def _lead_and_work(
    client: KubernetesClient, settings: OperatorSettings, health: probe.Health, stopped: asyncio.Event
) -> None:
    """Wait for the Lease, work while it is held, give it back."""
    await _connected(client, health)
    operator = Operator(client, settings, health)

    async def watch_ours(on_event: OnEvent) -> None:
        await app.watch(on_event, client.credentials, settings.namespaces)
        stopped.set()  # the signal was caught by Kopf, which had just started
        await asyncio.Event().wait()

    if settings.is_dry_run:
        log.info("dry run: nothing is written, not even the Lease")
        await operator.run(watch_ours)
        return
    leader = Leader(client, namespace=settings.lease_namespace, name=settings.lease_name, identity=settings.identity)
    log.info("waiting for lease %s/%s as %s", settings.lease_namespace, settings.lease_name, settings.identity)
    await leader.acquire()
    log.info("leading")
    metrics.LEADER.set(1)
    try:
        await _all([leader.hold(), operator.run(watch_ours)])
    finally:
        metrics.LEADER.set(0)
        await leader.release()


async def _connected(client: Client, health: probe.Health) -> None:
    """Wait until the API server answers, and serves our own kinds."""
    while True:
        try:
            missing = [resource.plural for resource in OURS if await client.served(resource) is None]
            health.is_connected = True
            if not missing:
                return
            log.warning("the cluster has no %s: install the CRDs", " and no ".join(missing))
        except ApiError as error:
            log.warning("API server: %s", error)
        await asyncio.sleep(2)


async def _all(parts: list[Coroutine[Any, Any, None]]) -> None:
    """Run until one ends or fails, then cancel the others; raises what the first failure was."""
    tasks = [asyncio.create_task(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=5)
