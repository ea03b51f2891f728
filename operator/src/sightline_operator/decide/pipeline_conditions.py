"""Conditions of a VisionPipeline that look at more than one part: Accepted, GatewayReady, Degraded, Ready."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sightline_operator.decide.pipeline_steps import NO_KSERVE, StepReport
from sightline_operator.decide.pipeline_view import PipelineView, Workload
from sightline_operator.observe.world import Key, Manifest
from sightline_operator.settings import API_VERSION
from sightline_operator.status.conditions import Condition, find
from sightline_operator.status.pods import REFERENCE_FAULTS, Fault

_NO_RUNTIME = ("NoSupportingRuntime", "RuntimeNotRecognized", "RuntimeDisabled")
_STORAGE = {
    "s3_access_denied": "the store does not take the gateway's credentials",
    "s3_no_credentials": "the gateway has no credentials for the store",
    "s3_not_found": "the store has no such bucket",
    "s3_timeout": "the store does not answer in time",
    "s3_unavailable": "the store cannot be reached",
}
_GATEWAY_REASONS = {Fault.CRASHING: "CrashLooping", Fault.IMAGE_PULL: "ImagePullFailed", **REFERENCE_FAULTS}


def accepted(view: PipelineView, steps: Sequence[StepReport], bad_schedules: Mapping[str, str]) -> Condition:
    """Whether everything that the spec names is there, as far as anybody has told."""
    reason, message = (
        _name_conflict(view.cr, view.strangers)
        or _missing_kinds(view)
        or _bad_references(view, steps)
        or _pods_say(view, steps)
        or _bad_schedule(bad_schedules)
        or ("Valid", "")
    )
    return Condition("Accepted", "True" if reason == "Valid" else "False", reason, message)


def gateway_ready(view: PipelineView, gateway: Workload) -> Condition:
    """Of the Deployment of the gateway: every pod is of this revision, and one at least answers."""
    kind = "GatewayReady"
    if view.spec.suspend:
        return Condition(kind, "False", "Suspended", "spec.suspend is true")
    if gateway.found is None:
        return Condition(kind, "Unknown", "Deploying", "the Deployment is being made")
    ready = gateway.status.get("readyReplicas") or 0
    if gateway.is_rolled_out and ready and (gateway.status.get("updatedReplicas") or 0):
        return Condition(kind, "True", "Ready", f"{ready} of {_wanted(gateway)} pods answer")
    if gateway.found["spec"].get("replicas") == 0:
        return Condition(kind, "False", "Suspended", "the gateway is scaled to 0 replicas")
    trouble = gateway.trouble
    if trouble is not None:
        reason = _GATEWAY_REASONS.get(trouble.fault, "Deploying")
        return Condition(kind, "False", reason, f"pod {trouble.pod}: {trouble.message}")
    return Condition(kind, "False", "Deploying", gateway.message or "the gateway's pods are being replaced")


def degraded(view: PipelineView, gateway: Workload, front: Condition, steps: Mapping[str, StepReport]) -> Condition:
    """Whether it does less than the spec asks for while it serves. What does not serve is not ready instead."""
    caption, enhance = steps["caption"], steps["enhance"]
    if view.spec.suspend or not caption.is_ready or not front.is_true:
        return Condition("Degraded", "False", "None", "")
    if enhance.row is not None and not enhance.is_ready:
        message = f"captions are not enhanced: {enhance.condition.message}"
        return Condition("Degraded", "True", "EnhanceUnavailable", message)
    storage = _storage(view)
    if storage is not None:
        return storage
    ready, wanted = gateway.status.get("readyReplicas") or 0, _wanted(gateway)
    if gateway.found is not None and 0 < ready < wanted:
        return Condition("Degraded", "True", "PartialReplicas", f"gateway: {ready} of {wanted} pods answer")
    for name, step in steps.items():
        if step.is_short and step.workload is not None:
            message = f"{name}: {len(step.workload.ready_pods)} of {step.wanted} pods answer"
            return Condition("Degraded", "True", "PartialReplicas", message)
    return Condition("Degraded", "False", "None", "")


def _storage(view: PipelineView) -> Condition | None:
    """Degraded when a gateway pod cannot read the bucket: images of uploads and URLs are captioned all the same."""
    if view.spec.storage is None:
        return None
    before = find(view.previous.get("conditions"), "Degraded")
    if view.world.unheard and before.get("reason") == "StorageUnavailable":
        return Condition("Degraded", "True", "StorageUnavailable", before.get("message", ""))
    faults = sorted(state.storage for state in view.world.gateways.values() if state is not None and state.storage)
    if not faults:
        return None
    why = _STORAGE.get(faults[0], faults[0])
    return Condition("Degraded", "True", "StorageUnavailable", f"bucket {view.spec.storage.s3.bucket}: {why}")


def ready(
    view: PipelineView, found: Condition, gateway: Condition, less: Condition, steps: Mapping[str, StepReport]
) -> Condition:
    """The summary. What serves is ready, whatever else the spec has wrong; what does not says why, deepest cause first.

    found   Accepted
    less    Degraded
    """
    caption, enhance = steps["caption"].condition, steps["enhance"]
    if view.spec.suspend:
        return Condition("Ready", "False", "Suspended", "spec.suspend is true")
    needs_enhance = enhance.row is not None and view.spec.enhance_policy.on_failure == "Fail"
    parts = [(caption, "CaptionNotReady"), (gateway, "GatewayNotReady")]
    parts += [(enhance.condition, "EnhanceNotReady")] if needs_enhance else []
    missing = [(part, reason) for part, reason in parts if not part.is_true]
    if not missing:
        if less.is_true:
            return Condition("Ready", "True", "DegradedButServing", less.message)
        return Condition("Ready", "True", "AllReady", "")
    if not found.is_true:
        return Condition("Ready", "False", "Invalid", f"{found.reason}: {found.message}")
    certain = [(part, reason) for part, reason in missing if part.status == "False"]
    part, reason = (certain or missing)[0]
    return Condition("Ready", "False" if certain else "Unknown", reason, f"{part.reason}: {part.message}")


def _wanted(gateway: Workload) -> int:
    return ((gateway.found or {}).get("spec") or {}).get("replicas", 1)


def _name_conflict(cr: Manifest, strangers: Mapping[Key, Manifest]) -> tuple[str, str] | None:
    for (kind, name), thing in sorted(strangers.items()):
        if _is_of_predecessor(cr, thing):
            return "NameConflict", f"{kind} {name} of the deleted VisionPipeline of this name is still going away"
        return "NameConflict", f"{kind} {name} exists and is not this pipeline's; it is left alone"
    return None


def _is_of_predecessor(cr: Manifest, thing: Manifest) -> bool:
    return any(
        owner.get("apiVersion") == API_VERSION and owner.get("kind") == cr["kind"]
        and owner.get("name") == cr["metadata"]["name"]
        for owner in thing["metadata"].get("ownerReferences") or ()
    )  # fmt: skip


def _missing_kinds(view: PipelineView) -> tuple[str, str] | None:
    uses_kserve = any(step.endpoint is None for step in view.spec.steps.values())
    if uses_kserve and "InferenceService" not in view.world.kinds:
        return "CRDMissing", NO_KSERVE
    if view.spec.gateway.http_route is not None and "HTTPRoute" not in view.world.kinds:
        return "CRDMissing", "gateway.httpRoute needs the Gateway API, which this cluster does not serve"
    return None


def _bad_references(view: PipelineView, steps: Sequence[StepReport]) -> tuple[str, str] | None:
    for step in view.spec.steps.values():
        reference = step.inference_service_ref
        if reference is not None and view.referenced(reference.name).found is None:
            return "InvalidReference", f"InferenceService {reference.name} does not exist"
    for report in steps:
        info = (report.workload.status.get("modelStatus") or {}).get("lastFailureInfo") if report.workload else None
        if info and not report.is_ready and info.get("reason") in _NO_RUNTIME:
            return "RuntimeNotFound", str(info.get("message") or info["reason"])
    return None


def _pods_say(view: PipelineView, steps: Sequence[StepReport]) -> tuple[str, str] | None:
    """Secrets and ConfigMaps are never read by us; the kubelet says which are missing."""
    workloads = [view.gateway, *(report.workload for report in steps if report.workload is not None)]
    troubles = [workload.trouble for workload in workloads if workload.trouble is not None]
    for trouble in sorted(troubles):
        if trouble.fault in REFERENCE_FAULTS:
            return REFERENCE_FAULTS[trouble.fault], f"pod {trouble.pod}: {trouble.message}"
    return None


def _bad_schedule(bad: Mapping[str, str]) -> tuple[str, str] | None:
    for name, message in sorted(bad.items()):
        return "InvalidSchedule", f"batches[{name}].{message}"
    return None
