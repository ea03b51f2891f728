"""How the two steps of a pipeline are: one condition and one row of the status each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sightline_operator.api.pipeline import CaptionStep, EnhanceStep, InferenceService
from sightline_operator.decide.pipeline_view import PipelineView, Workload
from sightline_operator.status.conditions import Condition, find
from sightline_operator.status.pods import REFERENCE_FAULTS, Fault, Trouble

CONDITIONS = {"caption": "CaptionReady", "enhance": "EnhanceReady"}
_REASONS = {
    Fault.IMAGE_PULL: "ImagePullFailed",
    Fault.CRASHING: "ModelLoadFailed",
    Fault.NO_GPU: "InsufficientGPU",
    Fault.UNSCHEDULABLE: "Deploying",
    Fault.EVICTED: "Deploying",
    **REFERENCE_FAULTS,
}
NO_KSERVE = "KServe is not installed in this cluster: it serves no InferenceService"


@dataclass(frozen=True)
class StepReport:
    """What is said about a step.

    workload   its InferenceService; None for an endpoint, or a step that isn't there
    wanted     ready pods that the spec asks for at least
    """

    condition: Condition
    row: dict[str, Any] | None
    workload: Workload | None = None
    wanted: int = 0

    @property
    def is_ready(self) -> bool:
        return self.condition.is_true

    @property
    def is_short(self) -> bool:
        """Whether it answers with fewer pods than asked for."""
        return self.workload is not None and self.is_ready and len(self.workload.ready_pods) < self.wanted


def step_report(view: PipelineView, name: str) -> StepReport:
    """Of the caption or enhance step, from what is seen of its InferenceService, pods or endpoint, and the gateway."""
    seen = _of_its_own(view, name)
    refused = circuit_open(view, name) if seen.is_ready else None
    if refused is None or seen.row is None:
        return seen
    return replace(seen, condition=refused, row={**seen.row, "ready": False})


def circuit_open(view: PipelineView, name: str) -> Condition | None:
    """The step's condition when no gateway pod that we heard calls it: it answers, and badly."""
    kind, asked = CONDITIONS[name], [state for state in view.world.gateways.values() if state is not None]
    before = find(view.previous.get("conditions"), kind)
    if view.world.unheard and before.get("reason") == "CircuitOpen":
        return Condition(kind, "False", "CircuitOpen", before.get("message", ""))  # until they have been asked
    if not asked or not all(name in state.open_steps for state in asked):
        return None
    message = f"the gateway does not call it for a while, after failures ({len(asked)} of {len(asked)} pods say so)"
    return Condition(kind, "False", "CircuitOpen", message)


def _of_its_own(view: PipelineView, name: str) -> StepReport:
    step = view.spec.steps.get(name)
    kind = CONDITIONS[name]
    if step is None:
        message = "the pipeline has no such step, or enhancePolicy.default is Never"
        return StepReport(Condition(kind, "False", "NotConfigured", message), None)
    if step.endpoint is not None:
        return _of_endpoint(view, name, step)
    owned = step.inference_service
    if owned is not None:
        desired = view.child("InferenceService", name)
        workload = view.model(desired) if desired else Workload(None, None, (), None)
        wanted = 0 if view.spec.suspend else owned.replicas.min
        condition = _suspended(kind) if view.spec.suspend else _of_model(kind, workload, owned.replicas.min)
        return StepReport(condition, _row(view, name, step, workload, condition), workload, wanted)
    assert step.inference_service_ref is not None  # noqa: S101 - the CRD's rule; rendering refused anything else
    workload = view.referenced(step.inference_service_ref.name)
    condition = _of_reference(kind, workload, step.inference_service_ref.name, "InferenceService" in view.world.kinds)
    return StepReport(condition, _row(view, name, step, workload, condition), workload)


def _suspended(kind: str) -> Condition:
    return Condition(kind, "False", "Suspended", "spec.suspend is true")


def _of_model(kind: str, workload: Workload, least: int) -> Condition:
    """An InferenceService of ours: ready when KServe says so and a pod of this revision answers."""
    if workload.desired is None:
        return Condition(kind, "False", "CRDMissing", NO_KSERVE)
    name = workload.desired["metadata"]["name"]
    if workload.found is None:
        return Condition(kind, "Unknown", "Deploying", f"InferenceService {name} is being made")
    if not workload.is_applied:
        return Condition(kind, "False", "StaleRevision", f"InferenceService {name} is being updated")
    if workload.says_ready and (workload.fresh_ready_pods or not (least or workload.ready_pods)):
        return Condition(kind, "True", "Ready", f"InferenceService {name} answers")
    return _why_not(kind, workload, name)


def _of_reference(kind: str, workload: Workload, name: str, has_kserve: bool) -> Condition:
    if not has_kserve:
        return Condition(kind, "False", "CRDMissing", NO_KSERVE)
    if workload.found is None:
        return Condition(kind, "False", "EndpointUnreachable", f"InferenceService {name} does not exist")
    if workload.says_ready:
        return Condition(kind, "True", "Ready", f"InferenceService {name} answers")
    return _why_not(kind, workload, name)


def _why_not(kind: str, workload: Workload, name: str) -> Condition:
    """The deepest cause. A passed progress deadline is none: KServe's ten minutes are short for loading weights."""
    trouble = workload.trouble
    if trouble is not None and trouble.fault in _REASONS:
        return Condition(kind, "False", _REASONS[trouble.fault], f"pod {trouble.pod}: {trouble.message}")
    model = workload.status.get("modelStatus") or {}
    if model.get("transitionStatus") in ("BlockedByFailedLoad", "InvalidSpec") and workload.message:
        return Condition(kind, "False", "ModelLoadFailed", workload.message)
    if workload.ready_pods and not workload.fresh_ready_pods:
        return Condition(
            kind, "False", "StaleRevision", f"InferenceService {name}: only pods of an older revision answer"
        )
    if trouble is not None and _is_loading(trouble):
        return Condition(kind, "False", "ModelLoading", f"pod {trouble.pod}: the model is being loaded")
    return Condition(kind, "False", "Deploying", _deploying(workload, name))


def _is_loading(trouble: Trouble) -> bool:
    return trouble.fault == Fault.STARTING and trouble.message.startswith("started")


def _deploying(workload: Workload, name: str) -> str:
    if workload.trouble is not None:
        return f"pod {workload.trouble.pod}: {workload.trouble.message}"
    return workload.message or f"InferenceService {name} is not ready yet"


def _of_endpoint(view: PipelineView, name: str, step: CaptionStep | EnhanceStep) -> StepReport:
    assert step.endpoint is not None  # noqa: S101 - asked before
    kind, url = CONDITIONS[name], step.endpoint.url
    answer = view.world.answers.get(url)
    if view.spec.suspend:
        condition = _suspended(kind)
    elif answer is None:
        condition = Condition(kind, "Unknown", "Deploying", f"{url} has not been asked yet")
    elif answer.is_ok:
        condition = Condition(kind, "True", "Ready", f"{url} answers")
    else:
        condition = Condition(kind, "False", "EndpointUnreachable", f"{url}: {answer.message or 'no answer'}")
    row = {"name": name, "source": "Endpoint", "url": url, "model": step.endpoint.model}
    return StepReport(condition, row | {"ready": condition.is_true})


def _row(
    view: PipelineView, name: str, step: CaptionStep | EnhanceStep, workload: Workload, condition: Condition
) -> dict[str, Any]:
    owned, reference = step.inference_service, step.inference_service_ref
    served = reference.name if reference else workload.desired["metadata"]["name"] if workload.desired else None
    row: dict[str, Any] = {
        "name": name,
        "source": "InferenceService" if owned else "InferenceServiceRef",
        "inferenceService": served,
        "url": view.addresses.get(served) if served else None,
        "model": _model(owned) if owned else reference.model or reference.name if reference else None,
        "modelRevision": owned.model.revision if owned else None,
        "ready": condition.is_true,
        "readyReplicas": len(workload.ready_pods),
        "revisionReady": condition.is_true and workload.is_applied,
    }
    return {field: value for field, value in row.items() if value is not None}


def _model(service: InferenceService) -> str:
    return service.model.name or service.model.uri or "demonstration"
