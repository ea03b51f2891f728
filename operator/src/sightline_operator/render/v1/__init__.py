"""Render version 1. What it makes of a spec never changes any more: golden files hold it to that.

Another output is another version, beside this one, so that an upgrade of the operator restarts no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sightline_operator.api import Batch, Pipeline, S3Location, seconds
from sightline_operator.api.batch import Retried
from sightline_operator.render.v1 import batch, gateway, models, network
from sightline_operator.render.v1.frame import Frame, Manifest, frame_of, sealed
from sightline_operator.render.v1.steps import Place, places
from sightline_operator.settings import RenderSettings


def render_pipeline(
    cr: Mapping[str, Any],
    settings: RenderSettings,
    kinds: frozenset[str],
    addresses: Mapping[str, str],
    revision: str,
) -> tuple[Manifest, ...]:
    """See `sightline_operator.render`."""
    frame, spec = frame_of(cr, settings), Pipeline.model_validate(cr["spec"])
    steps = places(frame, spec, addresses)
    configuration = gateway.configuration(frame, spec, steps, revision)
    children: list[Manifest | None] = [
        *_service_accounts(frame, spec, steps),
        configuration,
        *(_models(frame, spec, steps) if "InferenceService" in kinds else ()),
        gateway.deployment(frame, spec, steps, configuration["metadata"]["name"], load_seconds=_load_seconds(spec)),
        gateway.service(frame, spec),
        gateway.disruption_budget(frame),
        *(network.policies(frame, spec, steps) if spec.network_policy == "Managed" else ()),
        gateway.http_route(frame, spec) if "HTTPRoute" in kinds else None,
        gateway.autoscaler(frame, spec),
        gateway.service_monitor(frame, spec) if "ServiceMonitor" in kinds else None,
    ]
    return tuple(sealed(child) for child in children if child is not None)


def render_batch(
    cr: Mapping[str, Any],
    pipeline_cr: Mapping[str, Any],
    plan: Mapping[str, Any] | None,
    settings: RenderSettings,
    revision: str,
    output: Mapping[str, Any] | None,
    retried: Mapping[str, Any] | None,
) -> dict[str, Manifest]:
    """See `sightline_operator.render`."""
    spec, pipeline = Batch.model_validate(cr["spec"]), Pipeline.model_validate(pipeline_cr["spec"])
    work = batch.Work.of(
        spec,
        pipeline,
        S3Location.model_validate(output) if output else None,
        Retried.model_validate(retried) if retried else None,
    )
    frame = frame_of(cr, settings, str(pipeline_cr["metadata"]["name"]))
    mark = str((plan or {}).get("fingerprint") or batch.fingerprint(spec, revision))
    children = {"configuration": batch.configuration(frame, work, revision, mark)}
    if pipeline.network_policy == "Managed":
        children["policy"] = batch.policy(frame, work)
    children["plan"] = batch.single(frame, work, "plan")
    if plan is not None and not spec.dry_run:
        if (shards := int(plan["shards"])) > 0:
            children["run"] = batch.run(frame, work, shards=shards, mark=mark)
        children["finish"] = batch.single(frame, work, "finish")
    return {name: sealed(child) for name, child in children.items()}


def _service_accounts(frame: Frame, spec: Pipeline, steps: tuple[Place, ...]) -> list[Manifest]:
    """One for each kind of pod, so that what the cloud grants to one is not granted to all; none has a token."""
    has_models = any(place.is_owned for place in steps)
    is_ours = gateway.service_account(frame, spec) == frame.child(gateway.COMPONENT)
    wanted = [
        *([gateway.COMPONENT] if is_ours else []),
        *(["models"] if has_models else []),
        network.WORKER,
    ]
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": frame.metadata(frame.child(name), frame.labels(name)),
            "automountServiceAccountToken": False,
        }
        for name in wanted
    ]


def _models(frame: Frame, spec: Pipeline, steps: tuple[Place, ...]) -> list[Manifest]:
    return [
        models.inference_service(
            frame,
            place,
            service,
            spec.gateway.limits,
            is_suspended=spec.suspend,
            is_orphan=spec.deletion_policy == "OrphanModels",
        )
        for place in steps
        if (service := place.spec.inference_service) is not None
    ]


def _load_seconds(spec: Pipeline) -> float:
    service = spec.caption.inference_service
    return seconds(service.load_timeout) if service is not None else 0.0
