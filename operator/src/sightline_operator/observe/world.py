"""Everything seen that concerns one object, as values: what `decide` decides from. No I/O here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sightline_operator.contract import GatewayState

Manifest = Mapping[str, Any]
"""A Kubernetes object as JSON: apiVersion, kind, metadata, spec, status."""
Key = tuple[str, str]
"""Kind and name, in the namespace of the object they concern."""


@dataclass(frozen=True)
class Answer:
    """What an endpoint outside the cluster's objects said to a probe."""

    is_ok: bool
    message: str = ""


@dataclass(frozen=True)
class World:
    """One look at the cluster. Objects are as the API server gave them; they may be some seconds old.

    now        aware, UTC; the only clock that decisions know
    owned      live objects whose ownerReference is the object's uid
    others     live objects that it names or would own by name, and does not own: referenced InferenceServices,
               ServingRuntimes, the VisionPipeline of a VisionBatch, an object of somebody else with a child's name
    pods       of the owned and referenced workloads
    warnings   core/v1 Events of type Warning about those pods, newest last
    kinds      of other projects that the cluster serves now: InferenceService, HTTPRoute, ServiceMonitor, Workload
    answers    of endpoints by URL: external steps
    gateways   of a VisionPipeline, by the name of each ready gateway pod that was asked: what it said of itself; None
               when it did not answer
    unheard    whether a ready gateway pod has not been asked yet
    progress   of a VisionBatch, as its gateway told it; None when it did not answer
    batches    of a VisionPipeline: the VisionBatches that name it
    """

    now: datetime
    owned: Mapping[Key, Manifest] = field(default_factory=dict)
    others: Mapping[Key, Manifest] = field(default_factory=dict)
    pods: tuple[Manifest, ...] = ()
    warnings: tuple[Manifest, ...] = ()
    kinds: frozenset[str] = frozenset({"InferenceService"})
    answers: Mapping[str, Answer] = field(default_factory=dict)
    gateways: Mapping[str, GatewayState | None] = field(default_factory=dict)
    unheard: bool = False
    progress: Manifest | None = None
    batches: tuple[Manifest, ...] = ()
