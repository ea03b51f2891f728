"""The gateway: its variables, its pods, and what stands before and beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sightline_operator.api import Pipeline, seconds
from sightline_operator.api.types import SecretKeyRef
from sightline_operator.render.merge import overlaid
from sightline_operator.render.names import digest, without_empty
from sightline_operator.render.v1.frame import Frame, Manifest
from sightline_operator.render.v1.pods import (
    CONTAINER_SECURITY,
    GRPC_PORT,
    HTTP_PORT,
    POD_SECURITY,
    STATE,
    TMP,
    drain,
    from_secret,
    http_get,
    mount,
    probes,
    resources_of,
    s3_credentials,
    scratch,
    text,
)
from sightline_operator.render.v1.steps import Place

COMPONENT = "gateway"
MODEL = "pipeline"
KEYS = "/etc/sightline/keys"
AUTHORITIES = "/etc/sightline/authorities"
PREFIXES: Mapping[str, str] = {"caption": "DESCRIBE", "enhance": "ENHANCE"}
"""How the gateway's settings call the addresses of its steps."""


def configuration(frame: Frame, spec: Pipeline, steps: Sequence[Place], revision: str) -> Manifest:
    """The gateway's variables. The name holds a hash of them, so that another content is another ReplicaSet."""
    gateway, limits = spec.gateway, spec.gateway.limits
    longest = seconds(gateway.deadline.max)
    said: dict[str, object | None] = {
        "PORT": HTTP_PORT,
        "GRPC_PORT": GRPC_PORT,
        "LOG_LEVEL": gateway.log_level,
        "LOG_FORMAT": "json",
        "AUTH": "off" if gateway.auth.none else "api-key",
        "API_KEY_FILE": f"{KEYS}/api-keys" if gateway.auth.api_keys_secret_ref else None,
        "MAX_IMAGE_BYTES": limits.max_image_bytes,
        "MAX_PIXELS": limits.max_pixels,
        "MAX_REQUEST_BYTES": limits.max_body_bytes,
        "QUEUE_SIZE": limits.queue_size,
        "DEADLINE_SECONDS": longest,
        "DEFAULT_DEADLINE_SECONDS": seconds(gateway.deadline.default) if gateway.deadline.default else None,
        "GRACE_SECONDS": math.ceil(longest),
        "PIPELINE_REVISION": revision,
        **_policy(spec),
        **_store(frame, spec),
    }
    for place in steps:
        said |= _step(place)
    data = {name: text(value) for name, value in sorted(said.items()) if value is not None}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": frame.metadata(frame.child(f"gateway-{digest(data, 8)}"), frame.labels(COMPONENT)),
        "immutable": True,
        "data": data,
    }


def _policy(spec: Pipeline) -> dict[str, object | None]:
    enhance = spec.enhance
    return {
        "ENHANCE_BY_DEFAULT": spec.enhances == "Always",
        "STRICT_BY_DEFAULT": spec.enhance_policy.on_failure == "Fail",
        "ENHANCE_MIN_SECONDS": seconds(spec.enhance_policy.min_remaining),
        "REASONING_LEVEL": enhance.generation.reasoning_effort if enhance else None,
        "CAPTION_PROMPT": spec.caption.prompt,
    }


def _store(frame: Frame, spec: Pipeline) -> dict[str, object | None]:
    """Where images come from, and where uploads, runs and batches are kept. Without a bucket they go with the pod."""
    makes_objects = spec.gateway.batches == "VisionBatches"
    batches: dict[str, object | None] = {"BATCH_BACKEND": "kubernetes", "BATCH_PIPELINE": frame.name}
    s3 = spec.storage.s3 if spec.storage else None
    if s3 is None:
        return {"S3_BUCKETS": "none", "JOB_STORE": f"file://{STATE[1]}/jobs"}
    return (batches if makes_objects else {}) | {
        "JOB_STORE": f"s3://{s3.bucket}/{s3.prefix.strip('/')}".rstrip("/"),
        "S3_BUCKETS": s3.bucket,
        "S3_ENDPOINT_URL": s3.endpoint,
        "S3_PATH_STYLE": s3.path_style,
        "AWS_REGION": s3.region,
    }


def _step(place: Place) -> dict[str, object | None]:
    """Where a step is, and how it is called."""
    address, name = PREFIXES[place.step], place.step.upper()
    step, generation, breaker = place.spec, place.spec.generation, place.spec.circuit_breaker
    return {
        f"{address}_URL": place.url,
        f"{address}_MODEL": place.model,
        f"{address}_PROTOCOL": place.protocol,
        f"{address}_CA_FILE": f"{AUTHORITIES}/{place.step}/ca.crt" if place.authority else None,
        f"{name}_TOKENS": generation.max_tokens,
        f"{name}_TEMPERATURE": generation.temperature,
        f"{name}_TOP_P": generation.top_p,
        f"{name}_SEED": generation.seed,
        f"{name}_TIMEOUT_SECONDS": place.timeout_seconds,
        f"{name}_ATTEMPTS": step.retry.max_attempts,
        f"{name}_ATTEMPT_SECONDS": seconds(step.retry.per_try_timeout) if step.retry.per_try_timeout else None,
        f"{name}_MAX_IN_FLIGHT": step.max_in_flight,
        f"{name}_BREAKER_FAILURES": breaker.consecutive_errors if breaker else 5,
        f"{name}_BREAKER_ERROR_PERCENT": breaker.error_percent if breaker else None,
        f"{name}_BREAKER_MIN_REQUESTS": (breaker.min_requests or 20) if breaker and breaker.error_percent else None,
        f"{name}_BREAKER_OPEN_SECONDS": seconds(breaker.open_for) if breaker else 10,
    }


# --- pods ------------------------------------------------------------------------------------------------------------


def deployment(
    frame: Frame, spec: Pipeline, steps: Sequence[Place], config_map: str, *, load_seconds: float
) -> Manifest:
    """The gateway's pods. `replicas` is left out where an autoscaler owns it.

    load_seconds   how long the caption step may take to load: the gateway is not ready before it
    """
    gateway = spec.gateway
    base = {"metadata": {"labels": frame.labels(COMPONENT)}, "spec": _pod(frame, spec, steps, config_map)}
    template = overlaid(base, gateway.pod_template_overrides, "spec.gateway.podTemplateOverrides")
    template["metadata"]["labels"] |= frame.selector(COMPONENT)  # what selects the pods is not theirs to choose
    replicas = {"replicas": 0 if spec.suspend else gateway.replicas}
    is_scaled_by_others = gateway.autoscaling is not None and not spec.suspend
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": frame.metadata(frame.child(COMPONENT), frame.labels(COMPONENT)),
        "spec": {
            **({} if is_scaled_by_others else replicas),
            "revisionHistoryLimit": 2,
            "progressDeadlineSeconds": math.ceil(load_seconds) + 600,
            "selector": {"matchLabels": frame.selector(COMPONENT)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template,
        },
    }


def _pod(frame: Frame, spec: Pipeline, steps: Sequence[Place], config_map: str) -> Manifest:
    lifecycle, grace_seconds = drain(seconds(spec.gateway.deadline.max))
    volumes, mounts = _secret_files(spec, steps)
    s3 = spec.storage.s3 if spec.storage else None
    keys = [from_secret(f"{PREFIXES[p.step]}_API_KEY", p.key.name, p.key.key) for p in steps if p.key]
    container = {
        "name": COMPONENT,
        "image": spec.gateway.image or frame.settings.images["pipeline"],
        "args": ["pipeline"],
        "envFrom": [{"configMapRef": {"name": config_map}}],
        "env": [*keys, *s3_credentials(s3)],
        "ports": [{"name": "http", "containerPort": HTTP_PORT}, {"name": "grpc", "containerPort": GRPC_PORT}],
        "resources": resources_of(spec.gateway.resources, cpu="500m", memory="1Gi"),
        "securityContext": dict(CONTAINER_SECURITY),
        "lifecycle": lifecycle,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [mount(TMP), mount(STATE), *mounts],
        # It serves before the caption step has loaded, and is ready when that is: only readiness waits.
        **(
            probes(MODEL, 60)
            | {"startupProbe": http_get("/v2/health/live") | {"periodSeconds": 2, "failureThreshold": 30}}
        ),
    }
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    return {
        "serviceAccountName": service_account(frame, spec),
        "automountServiceAccountToken": spec.gateway.batches == "VisionBatches",
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_seconds,
        "securityContext": dict(POD_SECURITY),
        "topologySpreadConstraints": [spread | {"labelSelector": {"matchLabels": frame.selector(COMPONENT)}}],
        "containers": [without_empty(container)],
        "volumes": [scratch(TMP), scratch(STATE), *volumes],
    }


def service_account(frame: Frame, spec: Pipeline) -> str:
    """Ours, or the one to which the cloud gives rights to the bucket."""
    s3 = spec.storage.s3 if spec.storage else None
    return (s3.service_account_name if s3 else None) or frame.child(COMPONENT)


def secret_volume(name: str, secret: SecretKeyRef, file: str) -> dict[str, Any]:
    """One key of a Secret as a file. As a whole folder, not by subPath: the kubelet keeps it up to date."""
    items = [{"key": secret.key, "path": file}]
    return {"name": name, "secret": {"secretName": secret.name, "items": items, "defaultMode": 0o440}}


def _secret_files(spec: Pipeline, steps: Sequence[Place]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    files: list[tuple[str, SecretKeyRef, str, str]] = []
    if spec.gateway.auth.api_keys_secret_ref is not None:
        files.append(("api-keys", spec.gateway.auth.api_keys_secret_ref, KEYS, "api-keys"))
    for place in steps:
        if place.authority is not None:
            files.append((f"{place.step}-authority", place.authority, f"{AUTHORITIES}/{place.step}", "ca.crt"))
    volumes = [secret_volume(name, secret, file) for name, secret, _, file in files]
    return volumes, [mount((name, folder), is_read_only=True) for name, _, folder, _ in files]


# --- before and beside them ------------------------------------------------------------------------------------------


def service(frame: Frame, spec: Pipeline) -> Manifest:
    wanted = spec.gateway.service
    grpc = GRPC_PORT if wanted.port != GRPC_PORT else GRPC_PORT + 1
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": frame.metadata(frame.child(COMPONENT), frame.labels(COMPONENT), wanted.annotations),
        "spec": {
            "type": wanted.type,
            "selector": frame.selector(COMPONENT),
            "ports": [
                {"name": "http", "port": wanted.port, "targetPort": "http", "protocol": "TCP", "appProtocol": "http"},
                {"name": "grpc", "port": grpc, "targetPort": "grpc", "protocol": "TCP"},
            ],
        },
    }


def disruption_budget(frame: Frame) -> Manifest:
    """One pod at a time. Never `minAvailable`: with one replica that would keep nodes from being drained."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": frame.metadata(frame.child(COMPONENT), frame.labels(COMPONENT)),
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": frame.selector(COMPONENT)},
        },
    }


_INSIDE = {"matches": [{"path": {"type": "PathPrefix", "value": "/internal"}}]}
"""What the operator asks without a key is not for the world: without a backend such a request is refused."""


def http_route(frame: Frame, spec: Pipeline) -> Manifest | None:
    wanted = spec.gateway.http_route
    if wanted is None:
        return None
    parents = [parent.model_dump(by_alias=True, exclude_none=True) for parent in wanted.parent_refs]
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": "/"}}],
        "backendRefs": [{"name": frame.child(COMPONENT), "port": spec.gateway.service.port}],
        "timeouts": {"request": f"{math.ceil(seconds(spec.gateway.deadline.max)) + 10}s"},
    }
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": frame.metadata(frame.child(COMPONENT), frame.labels(COMPONENT)),
        "spec": without_empty({"parentRefs": parents, "hostnames": list(wanted.hostnames), "rules": [_INSIDE, rule]}),
    }


def autoscaler(frame: Frame, spec: Pipeline) -> Manifest | None:
    """None while suspended: the Deployment has no replicas then, and they are ours."""
    wanted = spec.gateway.autoscaling
    if wanted is None or spec.suspend:
        return None
    target = {"type": "Utilization", "averageUtilization": wanted.cpu_percent}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": frame.metadata(frame.child(COMPONENT), frame.labels(COMPONENT)),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": frame.child(COMPONENT)},
            "minReplicas": wanted.min_replicas,
            "maxReplicas": wanted.max_replicas,
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
        },
    }


def service_monitor(frame: Frame, spec: Pipeline) -> Manifest | None:
    wanted = spec.gateway.service_monitor
    if wanted is None:
        return None
    endpoint: dict[str, Any] = {
        "port": "http",
        "path": "/metrics",
        "interval": f"{max(1, math.ceil(seconds(wanted.interval)))}s",  # Prometheus knows no 1.5m
    }
    keys = spec.gateway.auth.api_keys_secret_ref
    if keys is not None:  # metrics want a key as everything else does
        endpoint["authorization"] = {"type": "Bearer", "credentials": {"name": keys.name, "key": keys.key}}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "ServiceMonitor",
        "metadata": frame.metadata(frame.child(COMPONENT), wanted.labels | frame.labels(COMPONENT)),
        "spec": {"selector": {"matchLabels": frame.selector(COMPONENT)}, "endpoints": [endpoint]},
    }
