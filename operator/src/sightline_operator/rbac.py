"""What the operator is allowed: roles made of the table of kinds, for a whole cluster or for some namespaces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from sightline_operator.resources import BY_KIND, CHILDREN, EVENTS, LEASES, OPTIONAL, OURS, PODS, WARNINGS, Resource
from sightline_operator.settings import GROUP, PART_OF, OperatorSettings

Manifest = dict[str, Any]
API = "rbac.authorization.k8s.io"
NAME = "sightline-operator"
NAMESPACE = "sightline-system"
LABELS = {"app.kubernetes.io/name": NAME, "app.kubernetes.io/part-of": PART_OF}


def rules() -> list[Manifest]:
    """Of everything but the Lease. No `secrets`, no wildcard, nothing that gives rights to others."""
    found = _grouped([*OURS, *CHILDREN, *PODS, WARNINGS, *OPTIONAL, EVENTS])
    return [*found, _rule([GROUP], [f"{resource.plural}/status" for resource in OURS], ["patch"])]


def lease_rules(lease_name: str = OperatorSettings.lease_name) -> list[Manifest]:
    """Of the Lease. A name cannot be asked for in `create`, as the API server does not know it yet."""
    free = [verb for verb in LEASES.verbs if verb == "create"]
    named = [verb for verb in LEASES.verbs if verb != "create"]
    return [
        _rule([LEASES.group], [LEASES.plural], free),
        _rule([LEASES.group], [LEASES.plural], named) | {"resourceNames": [lease_name]},
    ]


def operator_roles(namespaces: Sequence[str] = (), own: str = NAMESPACE) -> list[Manifest]:
    """ServiceAccount, roles and bindings, in the order to be applied.

    namespaces  that the operator looks at (its `--namespace`); none: all of the cluster
    own         namespace of the operator's pods and of its Lease
    """
    answer = [_object("v1", "ServiceAccount", NAME, own)]
    if namespaces:
        for namespace in namespaces:
            answer += [_role("Role", NAME, rules(), namespace), _binding("Role", NAME, own, namespace)]
    else:
        answer += [_role("ClusterRole", NAME, rules()), _binding("ClusterRole", NAME, own)]
    lease = f"{NAME}-lease"
    return [*answer, _role("Role", lease, lease_rules(), own), _binding("Role", lease, own, own)]


def user_roles() -> list[Manifest]:
    """Who may edit or view in a namespace may do so with our two kinds: aggregated into the cluster's own roles."""
    plurals = [resource.plural for resource in OURS]
    read = ["get", "list", "watch"]
    write = ["create", "delete", "deletecollection", "patch", "update"]
    scale = f"{BY_KIND['VisionPipeline'].plural}/scale"
    edit = [_rule([GROUP], plurals, [*read, *write]), _rule([GROUP], [scale], ["get", "patch", "update"])]
    view = [_rule([GROUP], plurals, read)]
    return [
        _aggregated("sightline-edit", edit, ("admin", "edit")),
        _aggregated("sightline-view", view, ("view",)),
    ]


def _grouped(resources: Iterable[Resource]) -> list[Manifest]:
    """One rule for all kinds of a group with which the same is done."""
    plurals: defaultdict[tuple[str, tuple[str, ...]], set[str]] = defaultdict(set)
    for resource in resources:
        plurals[resource.group, resource.verbs].add(resource.plural)
    return [_rule([group], sorted(names), list(verbs)) for (group, verbs), names in plurals.items()]


def _rule(groups: Sequence[str], plurals: Sequence[str], verbs: Sequence[str]) -> Manifest:
    return {"apiGroups": list(groups), "resources": list(plurals), "verbs": list(verbs)}


def _role(kind: str, name: str, allowed: list[Manifest], namespace: str | None = None) -> Manifest:
    return _object(f"{API}/v1", kind, name, namespace) | {"rules": allowed}


def _binding(kind: str, name: str, own: str, namespace: str | None = None) -> Manifest:
    return _object(f"{API}/v1", f"{kind}Binding", name, namespace) | {
        "roleRef": {"apiGroup": API, "kind": kind, "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": own}],
    }


def _aggregated(name: str, allowed: list[Manifest], into: Sequence[str]) -> Manifest:
    role = _role("ClusterRole", name, allowed)
    role["metadata"]["labels"] |= {f"{API}/aggregate-to-{other}": "true" for other in into}
    return role


def _object(api_version: str, kind: str, name: str, namespace: str | None = None) -> Manifest:
    place = {"namespace": namespace} if namespace else {}
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, **place, "labels": dict(LABELS)}}
