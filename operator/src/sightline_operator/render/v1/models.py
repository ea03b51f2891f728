"""The InferenceServices of the steps that a pipeline owns, for KServe's Standard and Knative modes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sightline_operator.api import seconds
from sightline_operator.api.pipeline import CaptionService, InferenceService, Limits
from sightline_operator.render.errors import RenderError
from sightline_operator.render.merge import overlaid
from sightline_operator.render.names import without_empty
from sightline_operator.render.v1.frame import Frame, Manifest
from sightline_operator.render.v1.pods import (
    CACHE,
    CONTAINER_SECURITY,
    HTTP_PORT,
    POD_SECURITY,
    SHM,
    STATE,
    TMP,
    drain,
    from_secret,
    mount,
    probes,
    resources_of,
    scratch,
    variables,
)
from sightline_operator.render.v1.steps import PREDICTORS, Place

CONTAINER = "kserve-container"
WEIGHTS = "/mnt/models"
"""Where KServe puts what STORAGE_URI names."""

STOP = "serving.kserve.io/stop"
KNATIVE_METRICS: Mapping[str, str] = {"Concurrency": "concurrency", "RPS": "rps", "CPU": "cpu", "Memory": "memory"}
STANDARD_METRICS = ("CPU", "Memory")


def inference_service(
    frame: Frame, place: Place, service: InferenceService, limits: Limits, *, is_suspended: bool, is_orphan: bool
) -> Manifest:
    """One step's model.

    is_orphan   it outlives the pipeline: then nobody's deletion may take it along
    """
    path = f"spec.{place.step}.inferenceService"
    labels = frame.labels(place.step, f"sightline-{PREDICTORS[place.step]}")
    annotations = {"serving.kserve.io/deploymentMode": frame.settings.deployment_mode}
    scale, scale_annotations = _scale(frame, service, path)
    annotations |= scale_annotations
    if frame.is_knative:
        annotations["serving.knative.dev/progress-deadline"] = f"{math.ceil(seconds(service.load_timeout))}s"
    if is_suspended:
        annotations[STOP] = "true"
    body = _runtime(service) if service.runtime.name else _predictor(frame, place, service, limits)
    overrides = service.pod_template_overrides
    template = overlaid({"metadata": {}, "spec": body}, overrides, f"{path}.podTemplateOverrides")
    pod = without_empty({name: template["metadata"].get(name) for name in ("labels", "annotations")})
    assert place.served is not None  # noqa: S101 - an owned step is served
    metadata = frame.metadata(place.served, labels | {"networking.kserve.io/visibility": "cluster-local"}, annotations)
    if is_orphan:
        metadata.pop("ownerReferences", None)
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata,
        "spec": {"predictor": {**template["spec"], **pod, **scale, "timeout": _request_seconds(place)}},
    }


def _request_seconds(place: Place) -> int:
    """What a route before the predictor gives a request: more than the gateway waits, so that the gateway decides."""
    return math.ceil(place.timeout_seconds) + 10


def _scale(frame: Frame, service: InferenceService, path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of the predictor, and annotations: how many pods, what decides it, and how a new one replaces an old."""
    low, high, scaling = service.replicas.min, service.replicas.max, service.scaling
    fields: dict[str, Any] = {}
    if not frame.is_knative:
        low = max(1, low)  # KServe takes 0 for 1 there, but only after its defaulting
        if service.is_resource_aware:
            rolling = {"maxSurge": 0, "maxUnavailable": 1}
        else:
            rolling = {"maxSurge": 1, "maxUnavailable": 0}
        fields["deploymentStrategy"] = {"type": "RollingUpdate", "rollingUpdate": rolling}
        if low >= high:
            # Any other class would make an autoscaler that resets the replicas at every update (kserve #3768).
            return fields | {"minReplicas": low, "maxReplicas": low}, {"serving.kserve.io/autoscalerClass": "none"}
        if scaling is not None and scaling.metric not in STANDARD_METRICS:
            raise RenderError(f"{path}.scaling.metric", f"{scaling.metric} needs KServe's Knative mode")
    fields |= {"minReplicas": low, "maxReplicas": high}
    if scaling is not None:
        fields |= {"scaleMetric": KNATIVE_METRICS[scaling.metric], "scaleTarget": scaling.target}
    return fields, {} if frame.is_knative else {"serving.kserve.io/autoscalerClass": "hpa"}


# --- a predictor of ours ---------------------------------------------------------------------------------------------


def _predictor(frame: Frame, place: Place, service: InferenceService, limits: Limits) -> Manifest:
    """The pod of one of our predictors. Its settings are variables, so that flags in `args` win over them."""
    predictor = PREDICTORS[place.step]
    lifecycle, grace_seconds = drain(place.timeout_seconds)
    checks = probes(place.model, seconds(service.load_timeout))
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": service.runtime.image or frame.settings.images[predictor],
        "args": [predictor, *service.args],
        "env": _environment(place, service, limits),
        "ports": [{"name": "http1", "containerPort": HTTP_PORT, "protocol": "TCP"}],
        "resources": _resources(service),
        "securityContext": dict(CONTAINER_SECURITY) | {"runAsUser": POD_SECURITY["runAsUser"]},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [mount(TMP), mount(STATE), mount(CACHE), mount(SHM)],
    }
    pod: dict[str, Any] = {
        "serviceAccountName": frame.child("models"),
        "enableServiceLinks": False,  # a Service called `grpc` would set GRPC_PORT
        "containers": [container],
        "volumes": [scratch(TMP), scratch(STATE), scratch(CACHE), scratch(SHM, in_memory=True, limit="1Gi")],
    }
    if frame.is_knative:  # whose Service takes neither lifecycle nor a security context of the pod
        del checks["startupProbe"]
    else:
        container["lifecycle"] = lifecycle
        pod |= {
            "automountServiceAccountToken": False,
            "securityContext": dict(POD_SECURITY),
            "terminationGracePeriodSeconds": grace_seconds,
        }
    container |= checks
    return pod | _placement(service)


def _environment(place: Place, service: InferenceService, limits: Limits) -> list[dict[str, Any]]:
    model = service.model
    plain: dict[str, object | None] = {
        "PROTOCOL": "v2",  # KServe's: which protocol it believes the predictor to speak
        "STORAGE_URI": model.uri,
        "MODEL": WEIGHTS if model.uri else model.name,
        "REVISION": model.revision,
        "DEVICE": "cuda" if service.gpu.count else "cpu",
        "LOAD_8BIT": True if isinstance(service, CaptionService) and service.quantization == "8bit" else None,
        "AUTH": "off",  # only the gateway reaches it: NetworkPolicy, and no route from outside
        "PORT": HTTP_PORT,
        "LOG_FORMAT": "json",
        "DEADLINE_SECONDS": place.timeout_seconds,
        "GRACE_SECONDS": math.ceil(place.timeout_seconds),
        "MAX_IMAGE_BYTES": limits.max_image_bytes,
        "MAX_PIXELS": limits.max_pixels,
        "MAX_REQUEST_BYTES": limits.max_body_bytes,
        "S3_BUCKETS": "none",  # the gateway fetches; a predictor is sent bytes
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    token = model.token_secret_ref
    secret = [from_secret("HF_TOKEN", token.name, token.key)] if token else []
    if place.served and service.runtime.served_model:
        plain["MODEL_NAME"] = service.runtime.served_model
    return variables(plain, secret)


def _resources(service: InferenceService) -> dict[str, Any]:
    """With a limit of CPU too: KServe fills in a missing one with 1, and a request of 4 would be refused."""
    is_demo = service.model.name is None and service.model.uri is None
    resources = resources_of(service.resources, cpu="1" if is_demo else "4", memory="2Gi" if is_demo else "16Gi")
    resources["limits"].setdefault("cpu", resources["requests"]["cpu"])
    if service.gpu.count:
        for kind in ("requests", "limits"):
            resources[kind][service.gpu.resource_name] = str(service.gpu.count)
    return resources


def _placement(service: InferenceService) -> dict[str, Any]:
    tolerations = [item.model_dump(by_alias=True, exclude_none=True) for item in service.tolerations]
    return without_empty({"nodeSelector": service.node_selector, "tolerations": tolerations})


# --- somebody else's runtime -----------------------------------------------------------------------------------------


def _runtime(service: InferenceService) -> Manifest:
    """A model for a ServingRuntime, which says by itself what runs, on which port and how it is probed."""
    model = service.model
    uri = model.uri
    if model.name is not None:
        uri = f"hf://{model.name}" + (f":{model.revision}" if model.revision else "")
    token = model.token_secret_ref
    return {
        "model": without_empty(
            {
                "modelFormat": {"name": service.runtime.model_format},
                "runtime": service.runtime.name,
                "protocolVersion": "v2" if service.runtime.protocol == "V2" else None,
                "storageUri": uri,
                "args": list(service.args),
                "env": [from_secret("HF_TOKEN", token.name, token.key)] if token else [],
                "resources": _resources(service),
            }
        )
    } | _placement(service)
