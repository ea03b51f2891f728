"""Everything known about one VisionPipeline, read once: what it should have, what it has, what stands in its way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sightline_operator.api import Pipeline
from sightline_operator.observe.world import Key, Manifest, World
from sightline_operator.render import HASH, is_applied
from sightline_operator.render.names import label_value
from sightline_operator.settings import OWNED_LABEL, OWNED_VALUE
from sightline_operator.status.conditions import find, is_true
from sightline_operator.status.pods import Trouble, is_ready, labelled, live, worst

PIPELINE_LABEL = "sightline.dev/pipeline"
COMPONENT = "app.kubernetes.io/component"
ISVC_LABEL = "serving.kserve.io/inferenceservice"


def key_of(manifest: Manifest) -> Key:
    return str(manifest["kind"]), str(manifest["metadata"]["name"])


def hash_of(manifest: Manifest) -> str | None:
    return (manifest["metadata"].get("annotations") or {}).get(HASH)


@dataclass(frozen=True)
class PipelineView:
    """One look at a pipeline.

    children    as rendered, by kind and name, in the order to be applied
    mine        live objects that are ours: by owner, or a model that outlives its pipeline by our labels
    strangers   children's names that somebody else's objects have
    addresses   where InferenceServices answer, by name
    """

    cr: Manifest
    spec: Pipeline
    previous: Mapping[str, Any]
    world: World
    children: Mapping[Key, Manifest]
    mine: Mapping[Key, Manifest]
    strangers: Mapping[Key, Manifest]
    addresses: Mapping[str, str]

    @classmethod
    def of(
        cls,
        cr: Manifest,
        spec: Pipeline,
        world: World,
        children: tuple[Manifest, ...],
        addresses: Mapping[str, str],
    ) -> PipelineView:
        wanted = {key_of(child): child for child in children}
        orphans = {key: thing for key, thing in world.others.items() if key in wanted and is_orphan_of(cr, thing)}
        mine = {**world.owned, **orphans}
        strangers = {key: world.others[key] for key in wanted if key in world.others and key not in mine}
        return cls(cr, spec, cr.get("status") or {}, world, wanted, mine, strangers, addresses)

    @property
    def now(self) -> datetime:
        return self.world.now

    @property
    def generation(self) -> int:
        return self.cr["metadata"].get("generation", 0)

    def child(self, kind: str, component: str) -> Manifest | None:
        """What was rendered for a component: the gateway's Deployment, the caption step's InferenceService."""
        for (child_kind, _), child in self.children.items():
            if child_kind == kind and (child["metadata"].get("labels") or {}).get(COMPONENT) == component:
                return child
        return None

    @property
    def gateway(self) -> Workload:
        deployment = self.child("Deployment", "gateway")
        assert deployment is not None  # noqa: S101 - every pipeline has one
        labels = deployment["spec"]["selector"]["matchLabels"]
        return self._workload(deployment, self.mine.get(key_of(deployment)), labels)

    def model(self, desired: Manifest) -> Workload:
        """The InferenceService of a step that is ours."""
        name = desired["metadata"]["name"]
        return self._workload(desired, self.mine.get(key_of(desired)), {ISVC_LABEL: name})

    def referenced(self, name: str) -> Workload:
        """Somebody else's InferenceService."""
        found = self.world.others.get(("InferenceService", name)) or self.world.owned.get(("InferenceService", name))
        return self._workload(None, found, {ISVC_LABEL: name})

    def _workload(self, desired: Manifest | None, found: Manifest | None, labels: Mapping[str, str]) -> Workload:
        pods = labelled(self.world.pods, labels)
        return Workload(desired, found, pods, worst(pods, self.world.warnings))


@dataclass(frozen=True)
class Workload:
    """An InferenceService or a Deployment with its pods.

    desired   as rendered; None for somebody else's
    found     as it lives; None when it isn't there
    trouble   what keeps its pods from being ready
    """

    desired: Manifest | None
    found: Manifest | None
    pods: tuple[Manifest, ...]
    trouble: Trouble | None

    @property
    def status(self) -> Mapping[str, Any]:
        return (self.found or {}).get("status") or {}

    @property
    def says_ready(self) -> bool:
        return is_true(self.status.get("conditions"), "Ready")

    @property
    def is_applied(self) -> bool:
        """Whether what lives is what we last rendered; always, of somebody else's.

        KServe's own observedGeneration counts its children's generations (kserve #6081), so the hash must tell.
        """
        if self.found is None:
            return False
        return self.desired is None or is_applied(self.desired, self.found)

    @property
    def ready_pods(self) -> tuple[Manifest, ...]:
        return tuple(pod for pod in live(self.pods) if is_ready(pod))

    @property
    def fresh_ready_pods(self) -> tuple[Manifest, ...]:
        """Ready ones of the revision that we want. A pod without our hash (somebody else's) counts."""
        wanted = hash_of(self.desired) if self.desired else None
        return tuple(pod for pod in self.ready_pods if wanted is None or hash_of(pod) in (None, wanted))

    @property
    def is_rolled_out(self) -> bool:
        """Of a Deployment: no pod of an older template is left, and it is ours as rendered."""
        status, generation = self.status, (self.found or {}).get("metadata", {}).get("generation", 0)
        if not self.is_applied or status.get("observedGeneration", -1) < generation:
            return False
        return (status.get("updatedReplicas") or 0) == (status.get("replicas") or 0)

    @property
    def message(self) -> str:
        """What its own conditions say, the deepest first, when no pod does."""
        info = (self.status.get("modelStatus") or {}).get("lastFailureInfo") or {}
        if info.get("message"):
            return str(info["message"])
        conditions = self.status.get("conditions")
        for name in (
            "ReplicaFailure",
            "PredictorReady",
            "LatestDeploymentReady",
            "IngressReady",
            "Progressing",
            "Ready",
        ):
            condition = find(conditions, name)
            is_bad = condition.get("status") == ("True" if name == "ReplicaFailure" else "False")
            if is_bad and condition.get("message"):
                return str(condition["message"])
        return ""


def is_orphan_of(cr: Manifest, thing: Manifest) -> bool:
    """Whether it is a model that we made for this pipeline to outlive it (`deletionPolicy: OrphanModels`).

    It has no owner; our labels and our mark say whose it is, also when the policy is Delete again.
    """
    metadata = thing["metadata"]
    labels = metadata.get("labels") or {}
    is_free = not any(owner.get("controller") for owner in metadata.get("ownerReferences") or ())
    is_marked = labels.get(OWNED_LABEL) == OWNED_VALUE and hash_of(thing) is not None
    is_named = cr["kind"] == "VisionPipeline" and labels.get(PIPELINE_LABEL) == label_value(cr["metadata"]["name"])
    return thing["kind"] == "InferenceService" and is_free and is_marked and is_named
