"""An upgrade of the operator under load: no pod restarts, a running batch ends, and what changes afterwards is new."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sightline_operator import render
from sightline_operator.observe import endpoints
from sightline_operator.process import Operator
from sightline_operator.render import v1
from sightline_operator.render.v1.frame import sealed
from sightline_operator.settings import RenderSettings
from tests.operator.conftest import ApiServer
from tests.operator.harness import connected, operating, pipeline, until
from tests.operator.live import Live, is_true, living

NEWER = RenderSettings(images={name: f"{image}-newer" for name, image in RenderSettings().images.items()})
MARK = {"name": "RENDERED_BY_THE_NEXT_RELEASE", "value": "yes"}
INFERENCE_SERVICES = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "inferenceservices.serving.kserve.io"},
    "spec": {
        "group": "serving.kserve.io",
        "scope": "Namespaced",
        "names": {"kind": "InferenceService", "plural": "inferenceservices", "singular": "inferenceservice"},
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
                "subresources": {"status": {}},
            }
        ],
    },
}


def changed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What the next release makes of a child: another variable in every pod, as a new feature might bring."""
    child = {**manifest, "metadata": {**manifest["metadata"], "annotations": {}}}
    if child["kind"] in ("Deployment", "Job"):
        template = child["spec"]["template"]
        first, *rest = template["spec"]["containers"]
        pod = {**template["spec"], "containers": [{**first, "env": [*first.get("env", []), MARK]}, *rest]}
        child["spec"] = {**child["spec"], "template": {**template, "spec": pod}}
    return sealed(child)


NEXT = SimpleNamespace(
    render_pipeline=lambda *given: tuple(changed(child) for child in v1.render_pipeline(*given)),
    render_batch=lambda *given: {name: changed(child) for name, child in v1.render_batch(*given).items()},
)


@pytest.fixture
async def live(controlled: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Live]:
    for name in ("FAILED_SECONDS", "OK_SECONDS", "PROGRESS_SECONDS"):
        monkeypatch.setattr(endpoints, name, 0.3)
    await asyncio.to_thread(controlled.install, [INFERENCE_SERVICES])
    with controlled.namespace() as namespace:
        async with living(controlled, namespace, tmp_path) as everything:
            yield everything


@contextlib.asynccontextmanager
async def release(live: Live, settings: RenderSettings) -> AsyncIterator[Operator]:
    own = {"gateway_url": live.gateway.url, "render": settings}
    async with connected(live.apiserver) as client, operating(client, live.user.namespace, **own) as operator:
        yield operator


def gateway(live: Live, name: str = "p") -> dict[str, Any]:
    return (live.user.get("Deployment", f"{name}-gateway") or {})["spec"]["template"]["spec"]["containers"][0]


def is_new(live: Live, name: str = "p") -> bool:
    """Whether the next release rendered the gateway."""
    return MARK in gateway(live, name).get("env", [])


async def quiet(operator: Operator) -> None:
    """It has looked at everything, and nothing is due."""
    await until(lambda: len(operator.cache.our_keys()) >= 3)
    calm = 0
    while calm < 20:
        calm = calm + 1 if operator.queue.work.is_idle else 0
        await asyncio.sleep(0.05)


async def test_an_upgrade_restarts_no_pod_and_a_running_batch_ends(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    live.input(6)
    async with release(live, RenderSettings()):
        models = {"endpoint": None, "inferenceService": {}}
        live.user.apply(pipeline("models", live.user.namespace, caption=models))
        await live.serving()
        await live.running(captions=2)
        await until(lambda: live.user.list("InferenceService"))
    pods, served = list(live.node.started), live.user.list("InferenceService")

    monkeypatch.setattr(render, "VERSIONS", {**render.VERSIONS, 2: NEXT})
    monkeypatch.setattr(render, "RENDER_VERSION", 2)
    async with release(live, NEWER) as operator:
        await quiet(operator)
        assert live.node.started == pods
        assert live.user.list("InferenceService") == served
        assert not is_new(live)
        live.gateway.stops_after = float("inf")
        cr = await live.ended()
        assert is_true(cr, "Complete")
        assert live.is_once(cr, 6)
        finish = (live.user.get("Job", cr["status"]["jobs"]["finish"]) or {})["spec"]["template"]["spec"]
        assert finish["containers"][0]["image"] == RenderSettings().images["worker"]
        assert [name for name, _ in live.node.started if "gateway" in name] == [n for n, _ in pods if "gateway" in n]

        live.user.merge("VisionPipeline", "p", {"spec": {"gateway": {"logLevel": "debug"}}})
        await until(lambda: is_new(live), "a new spec is rendered by the new release")
        assert gateway(live)["image"] == NEWER.images["pipeline"]
        live.user.merge("VisionPipeline", "models", {"spec": {"updatePolicy": "WithOperator"}})
        await until(lambda: is_new(live, "models"), "as is what goes with the operator")


async def test_a_downgrade_renders_what_it_does_not_know_anew(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as upgraded:
        upgraded.setattr(render, "VERSIONS", {**render.VERSIONS, 2: NEXT})
        upgraded.setattr(render, "RENDER_VERSION", 2)
        async with release(live, NEWER):
            await live.serving()
            assert is_new(live)
            assert (live.user.get("VisionPipeline", "p") or {})["status"]["renderVersion"] == 2
    async with release(live, replace(NEWER, images=RenderSettings().images)):
        await until(lambda: not is_new(live), "it is as the older release makes it")
        await until(lambda: (live.user.get("VisionPipeline", "p") or {})["status"]["renderVersion"] == 1)
