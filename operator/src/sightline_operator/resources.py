"""The kinds the operator reads or writes: group, versions, plural, how it is watched, what is done. A table; no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sightline_operator.settings import FIELD_MANAGER, GROUP, OWNED_LABEL, OWNED_VALUE, VERSION

OWNED = f"{OWNED_LABEL}={OWNED_VALUE}"
ISVC_LABEL = "serving.kserve.io/inferenceservice"

WATCHED = ("list", "watch")
READ = ("get", *WATCHED)
KEPT = (*READ, "create", "patch", "delete")
"""What is made by server-side apply, which is a PATCH and, for a new object, needs `create` as well."""


@dataclass(frozen=True)
class Resource:
    """One kind.

    versions      that we can speak, best first; an optional kind is served in any of them
    verbs         what the operator does with it, and so what its role allows
    selector      labels that the watch asks for; empty: all
    fields        field selector of the watch
    is_optional   another project's: its absence is a fact, not an error
    """

    kind: str
    group: str
    versions: tuple[str, ...]
    plural: str
    verbs: tuple[str, ...] = KEPT
    selector: str = OWNED
    fields: str = ""
    is_optional: bool = False

    @property
    def api_version(self) -> str:
        """Of the best version."""
        return self.versions[0] if not self.group else f"{self.group}/{self.versions[0]}"

    def path(self, namespace: str | None, name: str = "", subresource: str = "", version: str = "") -> str:
        """The URL path of the collection, or of one object; namespace None means all namespaces."""
        root = f"/apis/{self.group}" if self.group else "/api"
        parts = [root, version or self.versions[0]]
        if namespace:
            parts += ["namespaces", namespace]
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/".join(parts)


PIPELINES = Resource("VisionPipeline", GROUP, (VERSION,), "visionpipelines", READ, selector="")
BATCHES = Resource("VisionBatch", GROUP, (VERSION,), "visionbatches", selector="")

CHILDREN = (
    Resource("ServiceAccount", "", ("v1",), "serviceaccounts"),
    Resource("ConfigMap", "", ("v1",), "configmaps"),
    Resource("Service", "", ("v1",), "services"),
    Resource("Deployment", "apps", ("v1",), "deployments"),
    Resource("PodDisruptionBudget", "policy", ("v1",), "poddisruptionbudgets"),
    Resource("NetworkPolicy", "networking.k8s.io", ("v1",), "networkpolicies"),
    Resource("HorizontalPodAutoscaler", "autoscaling", ("v2",), "horizontalpodautoscalers"),
    Resource("Job", "batch", ("v1",), "jobs"),
)
PODS = (
    Resource("Pod", "", ("v1",), "pods", WATCHED),
    Resource("Pod", "", ("v1",), "pods", WATCHED, selector=f"{ISVC_LABEL},{OWNED_LABEL}!={OWNED_VALUE}"),
)
WARNINGS = Resource("Event", "", ("v1",), "events", WATCHED, selector="", fields="type=Warning,involvedObject.kind=Pod")
OPTIONAL = (
    Resource("InferenceService", "serving.kserve.io", ("v1beta1",), "inferenceservices", selector="", is_optional=True),
    Resource(
        "ServingRuntime", "serving.kserve.io", ("v1alpha1",), "servingruntimes", WATCHED, selector="", is_optional=True
    ),
    Resource("HTTPRoute", "gateway.networking.k8s.io", ("v1", "v1beta1"), "httproutes", is_optional=True),
    Resource("ServiceMonitor", "monitoring.coreos.com", ("v1",), "servicemonitors", is_optional=True),
    Resource(
        *("Workload", "kueue.x-k8s.io", ("v1beta2", "v1beta1"), "workloads"),
        verbs=(*READ, "patch"),
        selector="",
        is_optional=True,
    ),
)
EVENTS = Resource("Event", "events.k8s.io", ("v1",), "events", ("create",))
LEASES = Resource("Lease", "coordination.k8s.io", ("v1",), "leases", ("get", "create", "update"))
CRDS = Resource(
    "CustomResourceDefinition",
    "apiextensions.k8s.io",
    ("v1",),
    "customresourcedefinitions",
    ("get", "patch"),
    selector="",
)
"""For `crds --apply` alone; the operator itself never touches them."""

OURS = (PIPELINES, BATCHES)
BY_KIND = {resource.kind: resource for resource in (*OURS, *CHILDREN, PODS[0], *OPTIONAL, LEASES, CRDS)}


def resource_of(manifest: Mapping[str, Any]) -> Resource:
    """The row of an object's kind, in the object's own version.

    Raises KeyError: a kind that is not in the table, which is our bug.
    """
    row = BY_KIND[manifest["kind"]]
    version = str(manifest["apiVersion"]).rpartition("/")[2]
    return row if version == row.versions[0] else replace(row, versions=(version,))


def is_owned_entry(entry: Mapping[str, Any]) -> bool:
    """Whether a managedFields entry is that of our server-side apply to the object itself."""
    return entry.get("manager") == FIELD_MANAGER and entry.get("operation") == "Apply" and not entry.get("subresource")
