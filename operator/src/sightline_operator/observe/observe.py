"""Builds the World of one object from what is cached. Reads; never calls the API server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sightline_operator.contract import GatewayState
from sightline_operator.observe.cache import INSTANCE_LABEL, Cache, Ref, named_by
from sightline_operator.observe.endpoints import Endpoints, Kind
from sightline_operator.observe.world import Key, World
from sightline_operator.queue import Key as QueueKey
from sightline_operator.render.names import label_value
from sightline_operator.resources import ISVC_LABEL
from sightline_operator.status.pods import is_ready

Manifest = Mapping[str, Any]
MAX_WARNINGS = 50
MAX_GATEWAYS = 5
COMPONENT = "app.kubernetes.io/component"
PREPARE_SECONDS = 5.0


def external_urls(cr: Manifest) -> frozenset[str]:
    """URLs of steps that are neither ours nor a named InferenceService."""
    spec = cr.get("spec") or {}
    steps = (spec.get("caption") or {}, spec.get("enhance") or {})
    return frozenset(url for step in steps if (url := (step.get("endpoint") or {}).get("url")))


class Observer:
    """What is known about an object now.

    progress_url   where the gateway of a batch tells its progress: of the pipeline's object and the batch's
    state_url      where a gateway pod tells how it is, by its address; None: nowhere that we reach
    """

    def __init__(
        self,
        cache: Cache,
        kinds: Callable[[], frozenset[str]],
        endpoints: Endpoints,
        *,
        progress_url: Callable[[Manifest, Manifest], str | None],
        state_url: Callable[[str], str | None] = lambda address: None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._cache, self._kinds, self._endpoints = cache, kinds, endpoints
        self._progress_url, self._state_url, self._now = progress_url, state_url, now
        self._strangers: dict[Ref, dict[str, Any]] = {}
        """Objects with a child's name that the watch does not show, as found when that child was to be made."""

    def note_stranger(self, ref: Ref, obj: dict[str, Any] | None) -> None:
        """An object that is not ours holds (or, None, no longer holds) a name that we want."""
        if obj is None:
            self._strangers.pop(ref, None)
        else:
            self._strangers[ref] = obj

    async def prepare(self, cr: Manifest) -> None:
        """Have asked once what the object wants to know of the world outside the API server; seconds at most."""
        urls, progress = external_urls(cr), self._progress_urls(cr)
        wanted: dict[str, Kind] = dict.fromkeys(self._state_urls(cr).values(), "state")
        wanted |= dict.fromkeys(progress, "progress")
        wanted |= dict.fromkeys(urls, "probe")
        self._endpoints.want(_key(cr), wanted)
        with contextlib.suppress(TimeoutError):  # of states what was said last holds until they are asked
            await asyncio.wait_for(self._endpoints.asked(urls | progress), PREPARE_SECONDS)

    def world(self, cr: Manifest) -> World:
        """One look."""
        metadata, key = cr["metadata"], _key(cr)
        owned: dict[Key, Manifest] = {
            (str(obj["kind"]), str(obj["metadata"]["name"])): obj for obj in self._cache.owned(str(metadata["uid"]))
        }
        others = self._others(cr, key, owned)
        pods = self._pods(key, [*owned, *others])
        states = self._state_urls(cr)
        is_batch = cr["kind"] == "VisionBatch"
        return World(
            now=self._now(),
            owned=owned,
            others=others,
            pods=tuple(pods),
            warnings=self._warnings(pods),
            kinds=self._kinds(),
            answers=self._endpoints.answers(external_urls(cr)),
            gateways={
                name: GatewayState.read(self._endpoints.document(url))
                for name, url in states.items()
                if self._endpoints.was_asked(url)
            },
            unheard=not all(self._endpoints.was_asked(url) for url in states.values()),
            progress=self._progress(cr),
            batches=() if is_batch else self._batches(key),
        )

    def forget(self, key: QueueKey) -> None:
        """The object is gone: nobody asks for it any more."""
        self._endpoints.want(key, {})

    def _others(self, cr: Manifest, key: QueueKey, owned: Mapping[Key, Manifest]) -> dict[Key, Manifest]:
        others: dict[Key, Manifest] = {}
        for kind, name in sorted(named_by(cr)):
            if (obj := self._cache.get(kind, key.namespace, name)) is not None and (kind, name) not in owned:
                others[kind, name] = obj
        for kind, name in owned:
            for workload in self._workloads(kind, name, owned):
                others["Workload", str(workload["metadata"]["name"])] = workload
        for ref, obj in self._strangers.items():
            if ref.namespace == key.namespace and (ref.kind, ref.name) not in owned:
                others[ref.kind, ref.name] = obj
        return others

    def _workloads(self, kind: str, name: str, owned: Mapping[Key, Manifest]) -> list[dict[str, Any]]:
        if kind != "Job":
            return []
        uid = str(owned[kind, name]["metadata"]["uid"])
        return [obj for obj in self._cache.owned(uid) if obj["kind"] == "Workload"]

    def _pods(self, key: QueueKey, workloads: list[Key]) -> list[dict[str, Any]]:
        found = self._cache.pods(INSTANCE_LABEL, key.namespace, label_value(key.name))
        for kind, name in workloads:
            if kind == "InferenceService":
                found += self._cache.pods(ISVC_LABEL, key.namespace, name)
        return list({str(pod["metadata"]["uid"]): pod for pod in found}.values())

    def _warnings(self, pods: list[dict[str, Any]]) -> tuple[Manifest, ...]:
        events = [event for pod in pods for event in self._cache.warnings(str(pod["metadata"]["uid"]))]
        events.sort(key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
        return tuple(events[-MAX_WARNINGS:])

    def _progress_urls(self, cr: Manifest) -> frozenset[str]:
        if cr["kind"] != "VisionBatch" or not is_running(cr):
            return frozenset()
        metadata = cr["metadata"]
        pipeline = self._cache.get("VisionPipeline", metadata["namespace"], cr["spec"]["pipelineRef"]["name"])
        url = self._progress_url(pipeline, cr) if pipeline is not None else None
        return frozenset({url} if url else ())

    def _state_urls(self, cr: Manifest) -> dict[str, str]:
        """By the names of the gateway's ready pods: some of them, always the same ones."""
        if cr["kind"] != "VisionPipeline":
            return {}
        key = _key(cr)
        found: dict[str, str] = {}
        for pod in self._cache.pods(INSTANCE_LABEL, key.namespace, label_value(key.name)):
            is_gateway = (pod["metadata"].get("labels") or {}).get(COMPONENT) == "gateway"
            address = (pod.get("status") or {}).get("podIP")
            if is_gateway and address and is_ready(pod) and (url := self._state_url(str(address))):
                found[str(pod["metadata"]["name"])] = url
        return dict(sorted(found.items())[:MAX_GATEWAYS])

    def _progress(self, cr: Manifest) -> Manifest | None:
        return next((self._endpoints.document(url) for url in self._progress_urls(cr)), None)

    def _batches(self, key: QueueKey) -> tuple[Manifest, ...]:
        return tuple(obj for obj in self._cache.naming(Ref(*key)) if obj["kind"] == "VisionBatch")


def _key(cr: Manifest) -> QueueKey:
    return QueueKey(str(cr["kind"]), str(cr["metadata"]["namespace"]), str(cr["metadata"]["name"]))


def is_running(batch: Manifest) -> bool:
    """Planned and not at its end: there is progress to ask for."""
    conditions = (batch.get("status") or {}).get("conditions") or []
    true = {condition["type"] for condition in conditions if condition["status"] == "True"}
    return "Planned" in true and not true & {"Complete", "Failed"}
