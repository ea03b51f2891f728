"""From an object to its children: pure, versioned, the same for the operator and for `sightline render`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, cast

from sightline_operator.api import Batch, Pipeline
from sightline_operator.render import v1
from sightline_operator.render.errors import RenderError
from sightline_operator.render.names import digest
from sightline_operator.render.retry import retried
from sightline_operator.render.v1.frame import HASH, RENDERED_BY, is_applied
from sightline_operator.render.v1.stores import output_of
from sightline_operator.settings import RenderSettings

__all__ = [
    "HASH",
    "OPTIONAL_KINDS",
    "RENDERED_BY",
    "RENDER_VERSION",
    "Pinned",
    "RenderError",
    "batch_output",
    "is_applied",
    "pinned",
    "render_batch",
    "render_pipeline",
    "retried",
    "revision",
]

RENDER_VERSION = 1
"""How objects are rendered that nothing holds to an earlier version."""

VERSIONS: Mapping[int, ModuleType] = {1: v1}

OPTIONAL_KINDS = frozenset({"InferenceService", "HTTPRoute", "ServiceMonitor"})
"""Kinds of other projects: rendered where the cluster serves them."""


@dataclass(frozen=True)
class Pinned:
    """What an object is rendered by. Status keeps it, so that an upgrade of the operator changes no pod.

    images   those of the settings, or those that it was rendered with last
    """

    version: int
    settings: RenderSettings

    @property
    def images(self) -> Mapping[str, str]:
        return self.settings.images


def pinned(cr: Mapping[str, Any], settings: RenderSettings) -> Pinned:
    """The version and the images that this VisionPipeline is rendered by.

    Those of its status while its spec is the one that the status is about, unless its updatePolicy is WithOperator;
    else the newest. A version that this operator doesn't know (it was downgraded) counts as none.
    """
    status = cast("Mapping[str, Any]", cr.get("status") or {})
    version = status.get("renderVersion") or 0
    is_held = (
        (cr["spec"].get("updatePolicy") or "OnSpecChange") == "OnSpecChange"
        and status.get("observedGeneration") is not None
        and status.get("observedGeneration") == cr["metadata"].get("generation")
        and version in VERSIONS
    )
    if not is_held:
        return Pinned(RENDER_VERSION, settings)
    return Pinned(int(version), replace(settings, images={**settings.images, **(status.get("images") or {})}))


def render_pipeline(
    cr: Mapping[str, Any],
    settings: RenderSettings,
    kinds: frozenset[str] = OPTIONAL_KINDS,
    addresses: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], ...]:
    """All children of a VisionPipeline, in the order to be applied.

    kinds       kinds of other projects that the cluster serves; children of others are left out
    addresses   `status.address.url` of InferenceServices by name, where it is known; else KServe's usual one
    Raises RenderError when the spec cannot be what it asks for; pydantic's ValidationError when it is not one.
    """
    by = pinned(cr, settings)
    return VERSIONS[by.version].render_pipeline(cr, by.settings, kinds, addresses or {}, revision(cr))


def render_batch(
    cr: Mapping[str, Any],
    pipeline_cr: Mapping[str, Any],
    plan: Mapping[str, Any] | None,
    settings: RenderSettings,
    again: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The children of a VisionBatch in the order to be applied: `configuration`, `policy`, `plan`, `run`, `finish`.

    plan   what the plan Job found, with at least `shards`; None: not known yet, so neither `run` nor `finish`.
           `run` is missing without shards, and both with dryRun.
    again  of a batch with spec.input.retryOf: what `retried` says of the earlier one, unless the status has it
    The batch holds to the revision and the place of its outputs that its status has, if it has them.
    Raises RenderError when the spec cannot be what it asks for; pydantic's ValidationError when it is not one.
    """
    by = pinned(pipeline_cr, settings)
    status = cast("Mapping[str, Any]", cr.get("status") or {})
    held = status.get("pipelineRevision") or revision(pipeline_cr)
    again = status.get("retryOf") or again
    return VERSIONS[by.version].render_batch(cr, pipeline_cr, plan, by.settings, held, status.get("output"), again)


def batch_output(cr: Mapping[str, Any], pipeline_cr: Mapping[str, Any]) -> dict[str, Any]:
    """Where a batch writes, as its status keeps it. Raises RenderError when neither it nor its pipeline says."""
    spec, pipeline = Batch.model_validate(cr["spec"]), Pipeline.model_validate(pipeline_cr["spec"])
    return output_of(spec, pipeline).model_dump(by_alias=True, exclude_none=True)


_DECIDES = ("model", "quantization", "runtime", "args")


def revision(cr: Mapping[str, Any]) -> str:
    """Hash of everything in a VisionPipeline's spec that decides what it answers; batches hold to it.

    Fields are named one by one: a field that a later version adds must not change the revision of running batches.
    """
    spec = Pipeline.model_validate(cr["spec"])
    decides: dict[str, Any] = {"policy": [spec.enhances, spec.enhance_policy.on_failure]}
    for name, step in spec.steps.items():
        said = step.model_dump(by_alias=True, exclude_none=True, include={"generation", "prompt"})
        if (owned := step.inference_service) is not None:
            said["served"] = owned.model_dump(by_alias=True, exclude_none=True, include=set(_DECIDES))
            said["served"].get("model", {}).pop("tokenSecretRef", None)
        elif step.inference_service_ref is not None:
            said["served"] = step.inference_service_ref.model_dump(by_alias=True, exclude_none=True)
        elif step.endpoint is not None:
            said["served"] = step.endpoint.model_dump(by_alias=True, exclude_none=True, include={"url", "model"})
        decides[name] = said
    return digest(decides, 12)
