"""What the operator is told once, at start: images, defaults, where it may look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GROUP = "sightline.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
FIELD_MANAGER = "sightline-operator"
OWNED_LABEL = "app.kubernetes.io/managed-by"
OWNED_VALUE = "sightline-operator"
PART_OF = "sightline"
"""Children carry `app.kubernetes.io/{managed-by,part-of,name,component,instance}`; instance is the owner's name."""


@dataclass(frozen=True)
class RenderSettings:
    """What rendering needs beside the object.

    images            by predictor: describe, generate, embed, enhance, blip, pipeline (the gateway), and of the workers
                      of batches, which is the gateway's
    deployment_mode   what the cluster's KServe calls it: Standard, RawDeployment, Knative or Serverless
    worker_env        variables of the workers of batches, such as HTTPS_PROXY
    """

    images: Mapping[str, str] = field(
        default_factory=lambda: (
            {
                name: f"sightline-{name}:0.1.0"
                for name in ("describe", "generate", "embed", "enhance", "blip", "pipeline")
            }
            | {"worker": "sightline-pipeline:0.1.0"}
        )
    )
    deployment_mode: str = "Standard"
    cluster_domain: str = "svc.cluster.local"
    worker_env: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class OperatorSettings:
    """Of the process.

    namespaces    empty: all
    repair_seconds         how often every kind is listed again, so that a lost event is made good, ± 20 %
    resync_seconds         how often every object is looked at again when nothing happens, ± 20 %
    repair_window_seconds  a field of one child that somebody else keeps changing is put back once in so long
    gateway_url            where a pipeline's gateway is reached by the operator
    gateway_pod_url        where one pod of it is; empty: nowhere, as pods' addresses are the cluster's own
    """

    render: RenderSettings = field(default_factory=RenderSettings)
    namespaces: tuple[str, ...] = ()
    lease_namespace: str = "default"
    lease_name: str = "sightline-operator"
    identity: str = ""
    metrics_port: int = 9090
    workers: int = 8
    repair_seconds: float = 300.0
    resync_seconds: float = 1800.0
    repair_window_seconds: float = 60.0
    gateway_url: str = "http://{service}.{namespace}.{domain}:{port}"
    gateway_pod_url: str = "http://{ip}:8080"
    is_dry_run: bool = False
