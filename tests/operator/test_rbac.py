"""The operator's roles: what it does is allowed, what it must never do is not; made of the same table as its calls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sightline_operator.__main__ import main
from sightline_operator.rbac import NAME, operator_roles, rules, user_roles
from sightline_operator.render.cli import as_yaml
from sightline_operator.resources import CHILDREN, EVENTS, KEPT, LEASES, OPTIONAL, OURS, PODS, WARNINGS
from tests.operator.conftest import ApiServer
from tests.operator.rendering import cases

FILES = Path(__file__).parents[2] / "manifests" / "rbac"


def allowed(group: str, plural: str) -> set[str]:
    return {v for rule in rules() if group in rule["apiGroups"] and plural in rule["resources"] for v in rule["verbs"]}


def test_the_role_holds_no_secret_no_wildcard_and_no_way_to_more_rights() -> None:
    everything = [value for rule in rules() for part in rule.values() for value in part]
    assert not {"*", "secrets", "escalate", "bind", "impersonate", "roles", "clusterroles"} & set(everything)
    assert not any("finalizers" in value for value in everything)


def test_whatever_is_rendered_may_be_made_kept_and_deleted() -> None:
    by_kind = {resource.kind: resource for resource in (*CHILDREN, *OPTIONAL, *OURS)}
    kinds = {child["kind"] for case in cases().values() for child in case.rendered()}
    assert len(kinds) > 8
    for kind in kinds | {"VisionBatch"}:
        assert allowed(by_kind[kind].group, by_kind[kind].plural) >= set(KEPT), kind


def test_the_command_prints_what_the_files_hold(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, name in (
        (["rbac"], "cluster.yaml"),
        (["rbac", "--namespace", "sightline-system"], "namespaced.yaml"),
        (["rbac", "--users"], "users.yaml"),
    ):
        assert main(arguments) == 0
        assert (FILES / name).read_text().partition("\n")[2] == capsys.readouterr().out


def calls() -> Iterator[tuple[str, str, str, str]]:
    """Every verb, group, resource and subresource that the operator uses, but for its Lease."""
    for resource in (*OURS, *CHILDREN, *PODS, WARNINGS, *OPTIONAL, EVENTS):
        for verb in resource.verbs:
            yield verb, resource.group, resource.plural, ""
    for resource in OURS:
        yield "patch", resource.group, resource.plural, "status"


def may(apiserver: ApiServer, own: str, namespace: str | None, call: tuple[str, str, str, str], name: str = "") -> bool:
    verb, group, plural, subresource = call
    asked: dict[str, Any] = {"verb": verb, "group": group, "resource": plural, "subresource": subresource, "name": name}
    asked |= {"namespace": namespace} if namespace else {}
    body = {"spec": {"user": f"system:serviceaccount:{own}:{NAME}", "resourceAttributes": asked}}
    with apiserver.client() as client:
        answer = client.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", json=body)
    assert answer.status_code == 201, answer.text
    return answer.json()["status"]["allowed"]


def test_in_some_namespaces_it_may_do_its_work_there_and_nothing_elsewhere(apiserver: ApiServer) -> None:
    with apiserver.namespace() as own, apiserver.namespace() as served, apiserver.namespace() as other:
        apiserver.kubectl("apply", "--server-side", "-f", "-", stdin=as_yaml(operator_roles([served], own)))
        for call in calls():
            assert may(apiserver, own, served, call), call
            assert not may(apiserver, own, other, call), call
            assert not may(apiserver, own, None, call), call
        lease = (LEASES.group, LEASES.plural, "")
        assert may(apiserver, own, own, ("create", *lease))
        assert may(apiserver, own, own, ("update", *lease), "sightline-operator")
        assert not may(apiserver, own, own, ("update", *lease), "another")
        assert not may(apiserver, own, served, ("get", *lease), "sightline-operator")
        assert not any(may(apiserver, own, served, (verb, "", "secrets", "")) for verb in ("get", "list", "watch"))


def test_in_a_whole_cluster_and_people_who_edit_a_namespace(apiserver: ApiServer) -> None:
    with apiserver.namespace() as own, apiserver.namespace() as served:
        apiserver.kubectl("apply", "--server-side", "-f", "-", stdin=as_yaml([*operator_roles((), own), *user_roles()]))
        for call in calls():
            assert may(apiserver, own, None, call), call
            assert may(apiserver, own, served, call), call
        assert not may(apiserver, own, served, ("get", "", "secrets", ""))
        assert not may(apiserver, own, served, ("create", "", "pods", ""))
        for name in ("sightline-edit", "sightline-view"):
            apiserver.kubectl("get", "clusterrole", name)
        apiserver.kubectl("delete", "clusterrolebinding", NAME)
