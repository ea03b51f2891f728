"""One object, from its key to the cluster being as it says: observe, decide, act, report."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any

from sightline_operator import metrics
from sightline_operator.act.client import ApiError, Client
from sightline_operator.act.executor import Executor, Outdated, Report
from sightline_operator.decide.decision import Decision, Note
from sightline_operator.logs import OBJECT
from sightline_operator.observe.cache import Cache, Ref
from sightline_operator.observe.observe import Observer
from sightline_operator.observe.world import World
from sightline_operator.queue import Key, Queue
from sightline_operator.resources import BY_KIND

log = logging.getLogger(__name__)
Decide = Callable[[Mapping[str, Any], World], Decision]
ROUNDS = 3
"""Looks in one visit: what was just written is seen at once, so that the status tells of it."""
STRANGER_SECONDS = 30.0
OUTDATED_SECONDS = 0.1


class Reconciler:
    """Works through the queue."""

    def __init__(
        self,
        client: Client,
        cache: Cache,
        queue: Queue,
        observer: Observer,
        executor: Executor,
        decide: Mapping[str, Decide],
        *,
        resync_seconds: float = 1800.0,
        rng: random.Random | None = None,
    ) -> None:
        self._client, self._cache, self._queue = client, cache, queue
        self._observer, self._executor, self._decide = observer, executor, decide
        self._resync_seconds = resync_seconds
        self._rng = rng or random.Random()  # noqa: S311  jitter
        self._strangers: dict[Key, set[Ref]] = {}

    async def work(self) -> None:
        """One worker, until cancelled."""
        while True:
            key, waited = await self._queue.take()
            metrics.QUEUE_SECONDS.observe(waited)
            token = OBJECT.set(str(key))
            try:
                await self._visit(key)
            finally:
                OBJECT.reset(token)

    async def _visit(self, key: Key) -> None:
        """One visit: whatever goes wrong with this object is tried again, and stays with this object."""
        started = asyncio.get_running_loop().time()
        result, is_failed, at_least = "ok", False, 0.0
        try:
            await self.reconcile(key)
        except Outdated as reason:
            log.debug("looked at an old copy: %s", reason)
            result = "outdated"
            self._queue.add(key, OUTDATED_SECONDS)
        except ApiError as error:
            result, is_failed, at_least = "api_error", True, error.retry_after_seconds or 0.0
            metrics.API_ERRORS.labels(str(error.status)).inc()
            await self._complain(key, error)
        except asyncio.CancelledError:
            raise
        except Exception:
            result, is_failed = "error", True
            log.exception("cannot reconcile")
        wait = self._queue.done(key, is_failed=is_failed, at_least=at_least)
        if is_failed:
            log.info("tried again in %.1f s", wait)
        metrics.RECONCILES.labels(key.kind, result).inc()
        metrics.RECONCILE_SECONDS.labels(key.kind).observe(asyncio.get_running_loop().time() - started)

    async def reconcile(self, key: Key) -> None:
        """Make the cluster what one object says.

        Raises Outdated: look again. ApiError: something could not be done.
        """
        await self._ask_about_strangers(key)
        drift: dict[str, Any] | None = None
        notes: dict[Note, None] = {}
        for round_ in range(ROUNDS):
            cr = self._cache.get(*key)
            if cr is None:
                self._forget(key)
                return
            if cr["metadata"].get("deletionTimestamp"):
                return  # its children go with it
            await self._observer.prepare(cr)
            decision = self._decide[key.kind](cr, self._observer.world(cr))
            try:
                report = await self._executor.act(cr, decision)
            except ApiError:
                # What could be seen is told all the same.
                await self._executor.report(cr, decision.status, drift)
                raise
            drift = report.drift or drift
            notes |= dict.fromkeys(decision.notes)
            is_settled = not (self._note_strangers(key, report) or report.written or report.is_news)
            if is_settled or round_ == ROUNDS - 1:
                await self._executor.report(cr, decision.status, drift)
                await self._executor.announce(cr, tuple(notes))
                self._come_back(key, decision, report, is_settled=is_settled)
                return

    def _come_back(self, key: Key, decision: Decision, report: Report, *, is_settled: bool) -> None:
        """When to look again if nothing happens."""
        times = [self._resync_seconds * self._rng.uniform(0.8, 1.2)]
        times += [s for s in (decision.requeue_seconds, report.requeue_seconds) if s is not None]
        times += [] if is_settled else [1.0]
        times += [STRANGER_SECONDS] if self._strangers.get(key) else []
        self._queue.add(key, max(0.05, min(times)))

    async def _complain(self, key: Key, error: ApiError) -> None:
        """Say what the API server refused where its user looks; a passing failure is only logged."""
        log.warning("API server: %s", error)
        cr = self._cache.get(*key)
        if (
            cr is not None
            and error.status in (400, 403, 413, 422)
            and "because it is being terminated" not in str(error)
        ):
            await self._executor.announce(cr, (Note("Warning", "ApplyFailed", "Apply", error.message),))

    def _note_strangers(self, key: Key, report: Report) -> bool:
        """Remember objects that hold names of our children; returns whether that is news."""
        known = self._strangers.setdefault(key, set())
        news = set(report.strangers) - known
        known |= news
        for ref, obj in report.strangers.items():
            self._observer.note_stranger(ref, obj)
        if not known:
            del self._strangers[key]
        return bool(news)

    async def _ask_about_strangers(self, key: Key) -> None:
        """Whether they still hold our names: nothing tells us when they go."""
        for ref in list(self._strangers.get(key, ())):
            live = await self._client.get(BY_KIND[ref.kind], ref.namespace, ref.name)
            cr = self._cache.get(*key)
            uid = cr["metadata"]["uid"] if cr else ""
            is_ours = live is not None and any(
                owner.get("uid") == uid for owner in live["metadata"].get("ownerReferences") or []
            )
            self._observer.note_stranger(ref, None if is_ours else live)
            if live is None or is_ours:
                if live is None:
                    self._cache.absent(ref)
                self._strangers[key].discard(ref)

    def _forget(self, key: Key) -> None:
        self._queue.forget(key)
        self._executor.forget(key)
        self._observer.forget(key)
        for ref in self._strangers.pop(key, ()):
            self._observer.note_stranger(ref, None)
