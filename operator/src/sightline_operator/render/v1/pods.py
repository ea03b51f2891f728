"""What the pods of all kinds share: restricted security, probes on the truth, time to drain, volumes, variables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sightline_operator.api import Resources, S3Bucket
from sightline_operator.render.names import without_empty

HTTP_PORT = 8080
GRPC_PORT = 8081
USER = 1000
"""Of the images (Dockerfile)."""

DRAIN_SECONDS = 10
"""Between leaving the endpoints and SIGTERM: the servers stop accepting at once, while proxies still learn of it."""
MARGIN_SECONDS = 10
"""Left of the grace period when the last request has had all its time."""

TMP = ("tmp", "/tmp")  # noqa: S108 - a volume of the pod's own
STATE = ("state", "/var/lib/sightline")
CACHE = ("cache", "/var/cache/huggingface")
SHM = ("shm", "/dev/shm")  # noqa: S108

POD_SECURITY: Mapping[str, Any] = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "runAsGroup": USER,
    "fsGroup": USER,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}
CONTAINER_SECURITY: Mapping[str, Any] = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def variables(plain: Mapping[str, object | None], secret: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Environment variables in the order given; None is left out. Booleans are `true` and `false`."""
    return [
        *({"name": name, "value": text(value)} for name, value in plain.items() if value is not None),
        *(dict(item) for item in secret),
    ]


def text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def from_secret(variable: str, secret: str, key: str, *, is_optional: bool = False) -> dict[str, Any]:
    source: dict[str, Any] = {"name": secret, "key": key}
    if is_optional:
        source["optional"] = True
    return {"name": variable, "valueFrom": {"secretKeyRef": source}}


def s3_credentials(s3: S3Bucket | None) -> list[dict[str, Any]]:
    """Variables that name, never hold, who may use the store."""
    if s3 is None or s3.credentials_secret_ref is None:
        return []
    name = s3.credentials_secret_ref.name
    return [
        from_secret("AWS_ACCESS_KEY_ID", name, "AWS_ACCESS_KEY_ID"),
        from_secret("AWS_SECRET_ACCESS_KEY", name, "AWS_SECRET_ACCESS_KEY"),
        from_secret("AWS_SESSION_TOKEN", name, "AWS_SESSION_TOKEN", is_optional=True),
    ]


def scratch(name_and_path: tuple[str, str], *, in_memory: bool = False, limit: str | None = None) -> dict[str, Any]:
    """A volume that lives as long as its pod."""
    source = without_empty({"medium": "Memory" if in_memory else None, "sizeLimit": limit})
    return {"name": name_and_path[0], "emptyDir": source}


def mount(name_and_path: tuple[str, str], *, is_read_only: bool = False) -> dict[str, Any]:
    name, path = name_and_path
    return {"name": name, "mountPath": path} | ({"readOnly": True} if is_read_only else {})


def http_get(path: str) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": HTTP_PORT}}


def probes(model: str, startup_seconds: float) -> dict[str, Any]:
    """Ready only with its weights. Nobody kills it for `startup_seconds` while it loads; afterwards it must live.

    A failed load ends the process by itself, so the startup probe only bounds a load that hangs. While it asks, the
    liveness probe does not: reading tens of gigabytes can keep the process from answering in time.
    """
    ready = http_get(f"/v2/models/{model}/ready")
    return {
        "startupProbe": ready
        | {"periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": max(1, math.ceil(startup_seconds / 5))},
        "readinessProbe": ready | {"periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": http_get("/v2/health/live")
        | {"periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
    }


def drain(longest_seconds: float) -> tuple[dict[str, Any], int]:
    """The container's lifecycle and the pod's grace period: leave the endpoints, then finish what is running."""
    lifecycle = {"preStop": {"exec": {"command": ["sleep", str(DRAIN_SECONDS)]}}}
    return lifecycle, DRAIN_SECONDS + math.ceil(longest_seconds) + MARGIN_SECONDS


def resources_of(given: Resources, **default: str) -> dict[str, Any]:
    """What was asked for, or the default; memory always with a limit. Of CPU, one may use what nobody else does."""
    requests = {name: str(amount) for name, amount in given.requests.items()}
    limits = {name: str(amount) for name, amount in given.limits.items()}
    for name, amount in default.items():
        requests.setdefault(name, limits.get(name, amount))
    limits.setdefault("memory", requests["memory"])
    return {"requests": requests, "limits": limits}
