"""What every child has: a name of its own, labels, its owner, and the fingerprint of what we apply."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import orjson

from sightline_operator.render.names import child_name, digest, label_value, without_empty
from sightline_operator.settings import API_VERSION, OWNED_LABEL, OWNED_VALUE, PART_OF, RenderSettings

VERSION = 1

Manifest = dict[str, Any]

HASH = "sightline.dev/hash"
RENDERED_BY = "sightline.dev/render-version"
PIPELINE_LABEL = "sightline.dev/pipeline"
BATCH_LABEL = "sightline.dev/batch"

UNHASHED = frozenset(
    {"minReplicas", "maxReplicas", "scaleMetric", "scaleMetricType", "scaleTarget", "timeout", "deploymentStrategy"}
)
"""Of an InferenceService's predictor: what may change without new pods."""


@dataclass(frozen=True)
class Frame:
    """The owner of what is rendered, and how its children are called.

    pipeline   name of the VisionPipeline that the children belong to; of a batch: the one that it names
    """

    kind: str
    name: str
    namespace: str | None
    uid: str | None
    pipeline: str
    settings: RenderSettings

    @property
    def is_knative(self) -> bool:
        return self.settings.deployment_mode in ("Knative", "Serverless")

    def child(self, suffix: str, limit: int = 63) -> str:
        return child_name(self.name, suffix, limit)

    def selector(self, component: str) -> dict[str, str]:
        """Labels that tell this owner's pods of one component from all others. They never change."""
        label = BATCH_LABEL if self.kind == "VisionBatch" else PIPELINE_LABEL
        return {label: label_value(self.name), "app.kubernetes.io/component": component}

    def labels(self, component: str, name: str = "") -> dict[str, str]:
        """All labels of a child. `name` is what runs there, such as `sightline-describe`."""
        return {
            OWNED_LABEL: OWNED_VALUE,
            "app.kubernetes.io/part-of": PART_OF,
            "app.kubernetes.io/name": name or f"{PART_OF}-{component}",
            "app.kubernetes.io/instance": label_value(self.name),
            PIPELINE_LABEL: label_value(self.pipeline),
            **self.selector(component),
        }

    def metadata(self, name: str, labels: Mapping[str, str], annotations: Mapping[str, str] | None = None) -> Manifest:
        return without_empty(
            {
                "name": name,
                "namespace": self.namespace,
                "labels": dict(labels),
                "annotations": dict(annotations or {}),
                "ownerReferences": self._owner(),
            }
        )

    def _owner(self) -> list[Manifest]:
        """Without `blockOwnerDeletion`: setting it needs a right on the owner's finalizers (OpenShift asks for it)."""
        if self.uid is None:
            return []
        owner = {"apiVersion": API_VERSION, "kind": self.kind, "name": self.name, "uid": self.uid}
        return [owner | {"controller": True, "blockOwnerDeletion": False}]


def frame_of(cr: Mapping[str, Any], settings: RenderSettings, pipeline: str | None = None) -> Frame:
    metadata = cast("Mapping[str, Any]", cr["metadata"])
    return Frame(
        kind=str(cr["kind"]),
        name=str(metadata["name"]),
        namespace=metadata.get("namespace"),
        uid=metadata.get("uid"),
        pipeline=pipeline or str(metadata["name"]),
        settings=settings,
    )


def sealed(manifest: Mapping[str, Any]) -> Manifest:
    """The manifest with the fingerprint of what we apply, and the version that rendered it, in its annotations.

    KServe copies an InferenceService's annotations into its pods. So theirs must not change unless new pods are
    wanted: no render version there, and the fingerprint leaves out owner and scale. `is_applied` looks at those.
    """
    answer: Manifest = orjson.loads(orjson.dumps(manifest))  # plain JSON, no part of it shared
    annotations = cast("dict[str, str]", answer["metadata"].setdefault("annotations", {}))
    if answer["kind"] != "InferenceService":
        annotations[RENDERED_BY] = str(VERSION)
    annotations[HASH] = digest(_without_unhashed(answer), 16)
    return answer


def is_applied(manifest: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    """Whether the live object is what applying this manifest made, as far as fingerprints tell.

    Fields that somebody changed afterwards do not show here; the live object's managedFields tell those.
    """
    told = (live["metadata"].get("annotations") or {}).get(HASH)
    if told != manifest["metadata"]["annotations"][HASH]:
        return False
    return manifest["kind"] != "InferenceService" or _unhashed(manifest) == _unhashed(live)


def _without_unhashed(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    if manifest["kind"] != "InferenceService":
        return manifest
    metadata = {name: value for name, value in manifest["metadata"].items() if name != "ownerReferences"}
    predictor = {name: v for name, v in manifest["spec"]["predictor"].items() if name not in UNHASHED}
    return {**manifest, "metadata": metadata, "spec": {**manifest["spec"], "predictor": predictor}}


def _unhashed(manifest: Mapping[str, Any]) -> tuple[object, object]:
    predictor = (manifest.get("spec") or {}).get("predictor") or {}  # minimal CRDs check nothing
    return manifest["metadata"].get("ownerReferences", []), {n: v for n, v in predictor.items() if n in UNHASHED}
