"""NetworkPolicies: who may talk to whom among a pipeline's pods; everything else is refused."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from sightline_operator.api import Pipeline
from sightline_operator.render.names import label_value, without_empty
from sightline_operator.render.v1.frame import Frame, Manifest
from sightline_operator.render.v1.gateway import COMPONENT as GATEWAY
from sightline_operator.render.v1.pods import GRPC_PORT, HTTP_PORT
from sightline_operator.render.v1.steps import Place

WORKER = "worker"
SERVED = "serving.kserve.io/inferenceservice"
"""KServe's label on the pods of an InferenceService, in both of its modes."""

DNS: dict[str, Any] = {"ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]}
EVERYWHERE: list[dict[str, Any]] = [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]


def policies(frame: Frame, spec: Pipeline, steps: Sequence[Place]) -> list[Manifest]:
    """Of the gateway, of each model that is ours, and of the workers of batches."""
    answer = [
        _policy(frame, GATEWAY, [{"ports": _tcp(HTTP_PORT, GRPC_PORT)}], _gateway_egress(frame, spec, steps)),
        *(
            _policy(frame, place.step, [_from(frame, GATEWAY)], _model_egress(place))
            for place in steps
            # In Knative mode calls come through its activator and proxies, wherever the cluster has them.
            if place.is_owned and not frame.is_knative
        ),
        _policy(frame, WORKER, [], [DNS, _to_gateway(frame), *_to_store(spec)]),
    ]
    return answer


def _policy(frame: Frame, component: str, ingress: list[dict[str, Any]], egress: list[dict[str, Any]]) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": frame.metadata(frame.child(component), frame.labels(component)),
        # No list at all refuses everything. An empty one does too, but is dropped and would look changed for ever.
        "spec": without_empty(
            {
                "podSelector": {"matchLabels": frame.selector(component)},
                "policyTypes": ["Ingress", "Egress"],
                "ingress": ingress,
                "egress": egress,
            }
        ),
    }


def _from(frame: Frame, component: str) -> dict[str, Any]:
    return {"from": [{"podSelector": {"matchLabels": frame.selector(component)}}], "ports": _tcp(HTTP_PORT)}


def _to_gateway(frame: Frame) -> dict[str, Any]:
    return {"to": [{"podSelector": {"matchLabels": frame.selector(GATEWAY)}}], "ports": _tcp(HTTP_PORT)}


def _gateway_egress(frame: Frame, spec: Pipeline, steps: Sequence[Place]) -> list[dict[str, Any]]:
    answer = [DNS]
    for place in steps:
        if place.served is None:
            answer.append(to_url(place.url))
        elif frame.is_knative:
            answer.append({"to": [{"namespaceSelector": {}}]})
        else:  # which port a runtime of somebody else's listens on is not ours to know
            ports = {"ports": _tcp(HTTP_PORT)} if place.is_owned else {}
            answer.append({"to": [{"podSelector": {"matchLabels": {SERVED: label_value(place.served)}}}], **ports})
    if spec.gateway.batches == "VisionBatches":  # the API server: an address outside the pod network, not ours to know
        answer.append({"to": EVERYWHERE, "ports": _tcp(443, 6443)})
    return [*answer, *_to_store(spec)]


def _model_egress(place: Place) -> list[dict[str, Any]]:
    """Nothing, once the weights are there; so only a model that comes from outside may look outside."""
    service = place.spec.inference_service
    assert service is not None  # noqa: S101 - it is owned
    if service.model.uri is not None and service.model.uri.startswith(("pvc://", "oci://")):
        return [DNS]
    if service.model.uri is not None:  # a store of any address and port
        return [DNS, {"to": [{"namespaceSelector": {}}, *EVERYWHERE]}]
    if service.model.name is not None and not service.model.name.startswith("/"):
        return [DNS, {"to": EVERYWHERE, "ports": _tcp(443)}]
    return [DNS]


def _to_store(spec: Pipeline) -> list[dict[str, Any]]:
    if spec.storage is None:
        return []
    s3 = spec.storage.s3
    return [to_url(s3.endpoint)] if s3.endpoint else [{"to": EVERYWHERE, "ports": _tcp(443)}]


def to_url(url: str) -> dict[str, Any]:
    """As near as a policy of addresses can name a URL: an address by itself, a name by its port alone.

    A Service's port is not that of its pods, which policies see: names inside the cluster are let to any port.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        is_inside = "." not in host or ".svc" in host or host.endswith(".local")
        return {"to": [{"namespaceSelector": {}}]} if is_inside else {"to": EVERYWHERE, "ports": _tcp(port)}
    return {"to": [{"ipBlock": {"cidr": f"{address}/{address.max_prefixlen}"}}], "ports": _tcp(port)}


def _tcp(*ports: int) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": port} for port in ports]
