"""What tests/bench/operators.py compares with: the same children by Kopf's `on.create` and `on.update`."""

import os
from typing import Any

import kopf

from sightline_operator.act.client import Conflict, KubernetesClient
from sightline_operator.render import render_pipeline
from sightline_operator.settings import GROUP, VERSION, RenderSettings
from tests.bench.marks import mark

state: dict[str, KubernetesClient] = {}


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
    settings.peering.standalone = True
    settings.posting.enabled = False
    state["client"] = await KubernetesClient.connect(os.environ["KUBECONFIG"])


@kopf.on.create(GROUP, VERSION, "visionpipelines")
async def create(body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
    for child in render_pipeline(dict(body), RenderSettings(), frozenset()):
        try:
            await state["client"].create(child)
        except Conflict:
            continue
    patch.status["observedGeneration"] = body["metadata"]["generation"]


@kopf.on.update(GROUP, VERSION, "visionpipelines", field="spec")
async def update(body: kopf.Body, patch: kopf.Patch, **_: Any) -> None:
    mark(body["metadata"])
    for child in render_pipeline(dict(body), RenderSettings(), frozenset()):
        await state["client"].apply(child)
    patch.status["observedGeneration"] = body["metadata"]["generation"]
