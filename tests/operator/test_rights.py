"""The operator with exactly its role, as the API server's own audit log tells it: nothing refused, little unused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sightline_operator.api import crds
from sightline_operator.rbac import NAME, lease_rules, operator_roles, rules
from sightline_operator.render.cli import as_yaml
from tests.operator.conftest import ApiServer
from tests.operator.controllers import controller_manager
from tests.operator.harness import User, condition, pipeline, process, until
from tests.operator.live import living
from tests.operator.test_upgrade import INFERENCE_SERVICES

Right = tuple[str, str, str]
"""Verb, API group, resource with its subresource."""
POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}
UNUSED: list[Right] = [
    ("delete", "", "services"),  # these three are deleted when a rendering calls them otherwise
    ("delete", "apps", "deployments"),
    ("delete", "batch", "jobs"),  # a cancelled batch, a planner that nobody heard
    ("delete", "policy", "poddisruptionbudgets"),
    ("list", "serving.kserve.io", "servingruntimes"),  # not in this cluster
    ("patch", "batch", "jobs"),  # a pause
    ("patch", "sightline.dev", "visionbatches"),  # never: a batch is created and deleted, so this right could go
    ("watch", "serving.kserve.io", "servingruntimes"),
]
"""Rights that this day does not need; every other one is used."""
OTHERS = {"gateway.networking.k8s.io", "monitoring.coreos.com", "kueue.x-k8s.io"}
"""Projects that this cluster does not have."""


@pytest.fixture
def audited(new_apiserver: Callable[..., ApiServer], tmp_path: Path) -> Iterator[ApiServer]:
    """An API server that writes down who asks for what, with our CRDs, KServe's and the controllers."""
    policy = tmp_path / "audit.yaml"
    policy.write_text(yaml.safe_dump(POLICY))
    server = new_apiserver(f"--audit-policy-file={policy}", f"--audit-log-path={tmp_path / 'audit.log'}")
    if not (server.assets / "kube-controller-manager").exists():
        pytest.skip("KUBEBUILDER_ASSETS does not hold kube-controller-manager")
    server.install([*crds(), INFERENCE_SERVICES])
    with controller_manager(server):
        yield server
    server.stop()


def asked(log: Path, user: str) -> Iterator[tuple[Right, int]]:
    """What a user asked for, and the status of the answer."""
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        about = entry.get("objectRef")
        if entry["user"]["username"] == user and about is not None:
            parts = (about.get("resource", ""), about.get("subresource", ""))
            what = (about.get("apiGroup", ""), "/".join(part for part in parts if part))
            code = (entry.get("responseStatus") or {}).get("code", 0)
            yield (entry["verb"], *what), code
            if (entry["verb"], code) == ("patch", 201):  # an apply that creates needs both rights
                yield ("create", *what), code


def granted(own: list[dict[str, Any]]) -> set[Right]:
    return {
        (verb, group, resource)
        for rule in own
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def kubeconfig(server: ApiServer, user: User, path: Path) -> Path:
    """Of the operator's ServiceAccount."""
    account = f"/api/v1/namespaces/{user.namespace}/serviceaccounts/{NAME}/token"
    answer = user.http.post(
        account, json={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    )
    path.write_text(yaml.safe_dump(server.kubeconfig_of(answer.json()["status"]["token"])))
    return path


@pytest.mark.slow
async def test_with_exactly_its_role_everything_works_and_its_rights_are_used(
    audited: ApiServer, tmp_path: Path
) -> None:
    """A pipeline with models and an autoscaler, a repair, a batch to its end, what is no longer wanted deleted."""
    with audited.namespace() as namespace:
        async with living(audited, namespace, tmp_path) as live:
            user = live.user
            audited.kubectl("apply", "--server-side", "-f", "-", stdin=as_yaml(operator_roles([namespace], namespace)))
            flags = [f"--namespace={namespace}", f"--lease-namespace={namespace}", "--metrics-port=0"]
            flags.append(f"--gateway-url={live.gateway.url}")
            live.input(2)
            own = kubeconfig(audited, user, tmp_path / "own.yaml")
            with process(audited, *flags, kubeconfig=own) as running:
                once = {"name": "once", "template": {"spec": live.batch(ttlAfterFinished="1s")["spec"]}}
                del once["template"]["spec"]["pipelineRef"]
                await live.serving(batches=[once])
                await until(lambda: user.list("VisionBatch"), "its batch is made")
                await until(lambda: not user.list("VisionBatch"), "and goes when it has ended", 120)
                models = {"endpoint": None, "inferenceService": {}}
                scaled = {"autoscaling": {"maxReplicas": 3}}
                user.apply(pipeline("models", namespace, caption=models, gateway=scaled))
                await until(lambda: user.list("InferenceService") and user.list("HorizontalPodAutoscaler"))
                user.merge("Service", "models-gateway", {"spec": {"type": "NodePort"}})
                await until(lambda: (user.get("Service", "models-gateway") or {})["spec"]["type"] == "ClusterIP")
                plain = {"caption": {"endpoint": {"url": live.gateway.url, "model": "m"}, "inferenceService": None}}
                user.merge("VisionPipeline", "models", {"spec": plain | {"gateway": {"autoscaling": None}}})
                await until(lambda: not user.list("InferenceService") and not user.list("HorizontalPodAutoscaler"))
                user.merge("VisionPipeline", "models", {"spec": {"networkPolicy": "Unmanaged"}})
                await until(lambda: condition(user.get("VisionPipeline", "models"), "Ready").get("status") == "True")
                assert running.poll() is None
                running.terminate()
                assert await asyncio.to_thread(running.wait, 30) == 0
            assert "forbidden" not in running.log.read_text()
    used = dict[Right, set[int]]()
    for right, status in asked(tmp_path / "audit.log", f"system:serviceaccount:{namespace}:{NAME}"):
        used.setdefault(right, set()).add(status)
    assert [right for right, codes in used.items() if codes & {401, 403}] == []
    assert used.keys() <= granted([*rules(), *lease_rules()])
    unused = {right for right in granted([*rules(), *lease_rules()]) - used.keys() if right[1] not in OTHERS}
    assert sorted(unused) == UNUSED
