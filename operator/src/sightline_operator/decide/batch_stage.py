"""Where a batch that has not ended stands, what holds it, and which Jobs that asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sightline_operator.decide.batch_ends import State
from sightline_operator.decide.batch_view import BatchView
from sightline_operator.decide.decision import Apply, Delete
from sightline_operator.decide.jobs import JobView
from sightline_operator.observe.world import Manifest
from sightline_operator.render import render_batch
from sightline_operator.settings import FIELD_MANAGER, RenderSettings

JOB_VERSION = "batch/v1"


@dataclass(frozen=True)
class Hold:
    """Why no work is done now: a reason of Progressing, and whether workers that run must stop."""

    reason: str
    message: str
    stops_workers: bool = True


def hold(view: BatchView) -> Hold | None:
    """What holds the batch, the user's own wish first."""
    name = view.spec.pipeline_ref.name
    if view.spec.desired_state == "Paused":
        return Hold("Paused", "spec.desiredState is Paused")
    if view.pipeline is None:
        return Hold("WaitingForPipeline", f"VisionPipeline {name} does not exist")
    if view.is_pipeline_suspended:
        return Hold("WaitingForPipeline", f"VisionPipeline {name} is suspended")
    if view.spec.input.retry_of is not None and view.again is None:
        return _no_earlier(view, view.spec.input.retry_of.batch_name)
    if view.is_pipeline_changed and not view.is_run_over:
        message = f"VisionPipeline {name} has revision {view.revision}; this batch holds to {view.held_revision}"
        return Hold("PipelineChanged", message)
    if view.plan is not None and not view.is_run_over and not _is_serving(view):
        ready = view.pipeline_ready
        said = ready.get("message") or ready.get("reason") or "not ready yet"
        reason = "BackendUnavailable" if "run" in view.jobs else "WaitingForPipeline"
        return Hold(reason, f"VisionPipeline {name}: {said}", stops_workers=False)
    return None


def _no_earlier(view: BatchView, name: str) -> Hold:
    """Of a batch whose items are those of an earlier one, which is not there, still goes on, or never had a plan."""
    earlier = view.world.others.get(("VisionBatch", name))
    if earlier is None:
        return Hold("InputNotFound", f"VisionBatch {name} does not exist", stops_workers=False)
    status = earlier.get("status") or {}
    if not status.get("completionTime"):
        return Hold("WaitingForBatch", f"VisionBatch {name} has not ended yet", stops_workers=False)
    return Hold("InputNotFound", f"VisionBatch {name} ended before it was planned", stops_workers=False)


def state(view: BatchView, held: Hold | None) -> State:
    """All in one word, for display."""
    if view.spec.desired_state == "Paused" or (held and held.reason == "PipelineChanged"):
        return "Paused"
    if view.plan is None:
        return "Planning" if "plan" in view.jobs else "Pending"
    if view.is_run_over:
        return "Finishing"
    if "run" not in view.jobs or (held and held.stops_workers) or is_queued(view):
        return "Pending"
    return "Running"


def is_queued(view: BatchView) -> bool:
    """Whether Kueue holds the run Job back."""
    run = view.jobs.get("run")
    return bool(view.spec.queue_name and run and not run.is_over and run.is_suspended)


def actions(view: BatchView, held: Hold | None, settings: RenderSettings) -> tuple[Apply | Delete, ...]:
    """What the batch needs now. Jobs are created once and never changed, but for the switch that pauses them."""
    return (*_creations(view, held, settings), *_switches(view, held))


def leftovers(view: BatchView) -> tuple[Delete, ...]:
    """Jobs of a batch that ended while they ran."""
    return tuple(deletion(job.manifest) for job in view.jobs.values() if not job.is_over)


def deletion(manifest: Manifest) -> Delete:
    metadata = manifest["metadata"]
    api_version = str(manifest.get("apiVersion") or JOB_VERSION)
    return Delete(api_version, str(manifest["kind"]), str(metadata["name"]), str(metadata.get("uid", "")))


def _is_serving(view: BatchView) -> bool:
    return view.pipeline_ready.get("status") == "True"


def _creations(view: BatchView, held: Hold | None, settings: RenderSettings) -> Iterator[Apply]:
    """What all Jobs need, kept as rendered, and the Job that is due and not there."""
    is_unknown = view.spec.input.retry_of is not None and view.again is None
    if view.pipeline is None or is_unknown or (held is not None and not view.jobs):
        return
    plan = view.plan.as_json() if view.plan else None
    rendered = render_batch(view.cr, view.pipeline, plan, settings, view.again)
    yield from (Apply(child) for child in rendered.values() if child["kind"] != "Job")
    missing = _missing_part(view)
    if held is None and missing is not None and missing in rendered:
        yield Apply(rendered[missing], is_create_only=True)


def _missing_part(view: BatchView) -> str | None:
    """The Job that is due and not there. A finished part that somebody deleted is not made again."""
    if view.plan is None:
        return None if "plan" in view.jobs else "plan"
    if view.is_run_over:
        return None if "finish" in view.jobs else "finish"
    return None if "run" in view.jobs else "run"


def _switches(view: BatchView, held: Hold | None) -> Iterator[Apply | Delete]:
    run = view.jobs.get("run")
    if run is None or "finish" in view.jobs:
        return
    if view.is_run_refused:
        yield deletion(run.manifest)  # its name is needed again when the old revision is back
    if run.is_over:
        return
    is_stopped = held is not None and held.stops_workers
    if view.spec.queue_name and "Workload" in view.world.kinds:
        yield from _workload_switch(view.workload, is_stopped)
    else:
        yield from _job_switch(run, is_stopped, view.spec.parallelism)


def _job_switch(run: JobView, is_stopped: bool, parallelism: int) -> Iterator[Apply]:
    wanted = min(parallelism, run.completions)
    spec = run.manifest["spec"]
    if run.is_suspended != is_stopped or (spec.get("parallelism") or 1) != wanted:
        yield Apply(_part_of(run.manifest, {"suspend": is_stopped, "parallelism": wanted}))


def _workload_switch(workload: Manifest | None, is_stopped: bool) -> Iterator[Apply]:
    """Pausing is Kueue's own switch: a `suspend` of ours would be undone by it (jobset #788).

    Switched on again only when it was us who switched off: an administrator's own stop stays.
    """
    if workload is None:
        return
    is_active = workload["spec"].get("active", True)
    if is_active and is_stopped:
        yield Apply(_part_of(workload, {"active": False}))
    elif not is_active and not is_stopped and _is_ours(workload):
        yield Apply(_part_of(workload, {"active": True}))


def _is_ours(workload: Manifest) -> bool:
    """Whether `spec.active` has been ours last, by the API server's own book."""
    return any(
        entry.get("manager") == FIELD_MANAGER and "f:active" in (entry.get("fieldsV1") or {}).get("f:spec", {})
        for entry in workload["metadata"].get("managedFields", ())
    )


def _part_of(manifest: Manifest, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Server-side apply of these fields of the spec and no other: the rest has been created, not applied."""
    metadata = {name: manifest["metadata"][name] for name in ("name", "namespace") if name in manifest["metadata"]}
    return {"apiVersion": manifest["apiVersion"], "kind": manifest["kind"], "metadata": metadata, "spec": dict(spec)}
