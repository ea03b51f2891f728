"""Everything that is rendered is taken by a real API server, field by field, and its pods by the restricted standard.

Kinds of other projects are checked where their definitions are at hand: KServe's in KSERVE_CRDS.
"""

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from sightline_operator.act.ownership import lost_fields
from sightline_operator.render import OPTIONAL_KINDS, RenderSettings, render_batch, render_pipeline
from sightline_operator.resources import resource_of
from sightline_operator.settings import FIELD_MANAGER
from tests.operator.conftest import ApiServer
from tests.operator.objects import batch, pipeline
from tests.operator.rendering import PLAN, cases, owned
from tests.operator.specs import BATCHES, EARLIER, PIPELINES, STORED

CASES = cases()
STRICTLY = {"force": "true", "fieldValidation": "Strict"}
FEW = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


class Server:
    """Server-side apply without effect, told every field that it does not know and every risk of a pod."""

    def __init__(self, apiserver: ApiServer, namespace: str) -> None:
        self._http = apiserver.client()
        self._namespace = namespace
        apiserver.apply(
            {
                "apiVersion": "v1",
                "kind": "Namespace",
                "metadata": {"name": namespace, "labels": {"pod-security.kubernetes.io/warn": "restricted"}},
            }
        )

    def serves(self, manifest: dict[str, Any]) -> bool:
        return manifest["kind"] not in OPTIONAL_KINDS or (
            manifest["kind"] == "InferenceService" and bool(os.environ.get("KSERVE_CRDS"))
        )

    def apply(self, manifest: dict[str, Any], *, is_real: bool = False, manager: str = FIELD_MANAGER) -> httpx.Response:
        placed = {**manifest, "metadata": {**manifest["metadata"], "namespace": self._namespace}}
        row = resource_of(manifest)
        path = "api/v1" if "/" not in manifest["apiVersion"] else f"apis/{manifest['apiVersion']}"
        return self._http.patch(
            f"/{path}/namespaces/{self._namespace}/{row.plural}/{manifest['metadata']['name']}",
            params=STRICTLY | {"fieldManager": manager} | ({} if is_real else {"dryRun": "All"}),
            content=json.dumps(placed),
            headers={"Content-Type": "application/apply-patch+yaml"},
        )

    def check(self, manifest: dict[str, Any]) -> None:
        """It is taken, nothing of it is dropped, and its pods would run where only restricted ones may."""
        response = self.apply(manifest)
        told = f"{manifest['kind']} {manifest['metadata']['name']}: {response.text}"
        assert response.status_code in (200, 201), told
        assert response.headers.get("warning") is None, f"{told}\n{response.headers.get('warning')}"
        assert lost_fields(manifest, response.json()) == [], told


@pytest.fixture
def server(apiserver: ApiServer, namespace: str) -> Iterator[Server]:
    server = Server(apiserver, namespace)
    yield server
    server._http.close()


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_taken(name: str, server: Server) -> None:
    for child in CASES[name].rendered():
        if server.serves(child):
            server.check(child)


@FEW
@given(cr=PIPELINES)
def test_whatever_a_pipeline_says_is_taken(cr: dict[str, Any], server: Server) -> None:
    for child in render_pipeline(owned(cr), RenderSettings()):
        if server.serves(child):
            server.check(child)


@FEW
@given(cr=BATCHES)
def test_whatever_a_batch_says_is_taken(cr: dict[str, Any], server: Server) -> None:
    for child in render_batch(owned(cr), owned(STORED), PLAN, RenderSettings(), EARLIER).values():
        server.check(child)


@pytest.mark.parametrize("changes", [{}, {"caption.inferenceService": {"gpu": {"count": 1}}}], ids=["CPU", "GPU"])
def test_the_pods_of_a_model_may_run_where_only_restricted_ones_may(changes: dict[str, Any], server: Server) -> None:
    """KServe makes them, from what the InferenceService says; here as a Deployment with the same pod."""
    children = render_pipeline(owned(pipeline(changes)), RenderSettings())
    model = next(c for c in children if c["kind"] == "InferenceService")
    template = next(c for c in children if c["kind"] == "Deployment")
    extensions = {"minReplicas", "maxReplicas", "timeout", "deploymentStrategy", "labels", "annotations"}
    pod = {name: value for name, value in model["spec"]["predictor"].items() if name not in extensions}
    labels = template["spec"]["selector"]["matchLabels"]
    spec = {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": pod}}
    server.check({**template, "spec": spec})


@pytest.mark.parametrize("name", ["everything", "minimal", "overrides"])
def test_applying_twice_changes_nothing(name: str, server: Server) -> None:
    """By the resourceVersion: what the API server defaults or rewrites must not look like a change of ours."""
    for child in CASES[name].rendered():
        if server.serves(child):
            once = server.apply(child, is_real=True).json()
            again = server.apply(child, is_real=True).json()
            assert once["metadata"]["resourceVersion"] == again["metadata"]["resourceVersion"], child["kind"]


def test_what_an_autoscaler_set_stays(server: Server) -> None:
    """And what we set before there was one is no longer ours."""
    fixed = owned(pipeline({"gateway.replicas": 2}))
    scaled = owned(pipeline({"gateway.replicas": 2, "gateway.autoscaling": {"maxReplicas": 9}}))

    def gateway(cr: dict[str, Any]) -> dict[str, Any]:
        return next(c for c in render_pipeline(cr, RenderSettings()) if c["kind"] == "Deployment")

    assert server.apply(gateway(fixed), is_real=True).json()["spec"]["replicas"] == 2
    by_autoscaler = {**gateway(fixed), "spec": {"replicas": 7}}
    by_autoscaler["metadata"] = {"name": "docs-gateway"}
    server.apply(gateway(scaled), is_real=True)
    assert server.apply(by_autoscaler, is_real=True, manager="autoscaler").status_code == 200
    assert server.apply(gateway(scaled), is_real=True).json()["spec"]["replicas"] == 7


def test_a_run_can_be_paused_and_narrowed_and_nothing_else(server: Server) -> None:
    def run(changes: dict[str, Any]) -> dict[str, Any]:
        return render_batch(owned(batch(changes)), owned(pipeline()), PLAN, RenderSettings())["run"]

    assert server.apply(run({}), is_real=True).status_code == 201
    paused = server.apply(run({"desiredState": "Paused", "parallelism": 2}), is_real=True)
    assert paused.status_code == 200, paused.text
    assert paused.json()["spec"]["suspend"] is True
    assert paused.json()["spec"]["parallelism"] == 2
    assert server.apply(run({"resources": {"requests": {"cpu": "7"}}}), is_real=True).status_code == 422
