"""Whether a batch has ended, and how: the only page that may say Complete or Failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sightline_operator.contract import PLAN_FAULTS, RUN_FAULTS, Exit
from sightline_operator.decide.batch_view import BatchView
from sightline_operator.decide.jobs import JobView

State = Literal["Pending", "Planning", "Running", "Paused", "Finishing", "Complete", "Failed", "Cancelled", "Expired"]
_GAVE_UP = {"MaxFailedIndexesExceeded", "BackoffLimitExceeded"}


@dataclass(frozen=True)
class Ending:
    """The end of a batch. `type` is the condition that becomes true for ever."""

    type: Literal["Complete", "Failed"]
    state: State
    reason: str
    message: str


def ending(view: BatchView) -> Ending | None:
    """How it ends now; None while it goes on. Work that is all done outranks whatever would have stopped it."""
    return (
        _of_finish(view.jobs.get("finish"), view)
        or _of_wish(view)
        or _of_time(view)
        or _of_plan(view)
        or _of_pipeline(view)
        or _of_run(view.jobs.get("run"), view)
        or _of_failures(view)
    )


def _failed(reason: str, message: str) -> Ending:
    return Ending("Failed", "Failed", reason, message)


def _of_finish(finish: JobView | None, view: BatchView) -> Ending | None:
    if finish is None or not finish.is_over:
        return None
    failed_shards = _failed_shards(view)
    if finish.is_complete:
        failed = view.progress.failed if view.progress else (view.previous.get("progress") or {}).get("failed") or 0
        if not failed and not failed_shards:
            return Ending("Complete", "Complete", "Succeeded", "every item has its result")
        shards = f", {failed_shards} shards given up" if failed_shards else ""
        return Ending("Complete", "Complete", "SucceededWithErrors", f"{failed} items failed{shards}")
    _, words = finish.fatal()
    reason = words.reason if words.reason in RUN_FAULTS else "TooManyFailures" if failed_shards else "PlanCorrupt"
    return _failed(reason, words.message or finish.failure_message or "the finish Job failed")


def _of_wish(view: BatchView) -> Ending | None:
    if view.spec.desired_state != "Cancelled":
        return None
    return Ending("Failed", "Cancelled", "Cancelled", "spec.desiredState is Cancelled; what is finished is kept")


def _of_time(view: BatchView) -> Ending | None:
    late = view.expires is not None and view.now >= view.expires
    if late or any(job.why_failed == "DeadlineExceeded" for job in view.jobs.values()):
        window = view.spec.completion_window
        return Ending("Failed", "Expired", "Expired", f"not finished within {window}; what is finished is kept")
    return None


def _of_plan(view: BatchView) -> Ending | None:
    plan = view.jobs.get("plan")
    if view.plan is not None:
        if view.spec.dry_run:
            message = f"planned only: {view.plan.items} items in {view.plan.shards} shards"
            return Ending("Complete", "Complete", "Succeeded", message)
        return None if view.plan.items else _failed("InputEmpty", "the input has no items")
    if plan is None or not plan.is_failed:
        return None
    code, words = plan.fatal()
    reason = words.reason if words.reason in PLAN_FAULTS else "AccessDenied" if code == Exit.UNUSABLE else "PlanFailed"
    return _failed(reason, words.message or plan.failure_message or "the plan Job failed")


def _of_pipeline(view: BatchView) -> Ending | None:
    if not view.is_pipeline_changed or view.is_run_over or view.spec.on_pipeline_change == "Pause":
        return None
    return _failed(
        "PipelineChanged",
        f"VisionPipeline {view.spec.pipeline_ref.name} went from revision {view.held_revision} to {view.revision}",
    )


def _of_run(run: JobView | None, view: BatchView) -> Ending | None:
    """Failed indexes alone do not end a batch: the finish Job counts what is missing."""
    if run is None or not run.is_failed or "finish" in view.jobs:
        return None
    words = run.fatal()[1]
    message = words.message or run.failure_message
    if view.is_run_refused:
        waits = view.is_pipeline_changed and view.spec.on_pipeline_change == "Pause"
        return None if waits else _failed("PipelineChanged", message)
    if run.why_failed == "PodFailurePolicy":
        return _failed(words.reason if words.reason in RUN_FAULTS else "PlanCorrupt", message)
    return _failed("TooManyFailures", message) if run.why_failed in _GAVE_UP else None


def _of_failures(view: BatchView) -> Ending | None:
    limit, seen = view.spec.max_failed_items, view.progress
    if limit is None or seen is None or view.plan is None or view.is_run_over:
        return None
    most = limit.count if limit.count is not None else view.plan.items * (limit.percent or 0) / 100
    if seen.failed <= most:
        return None
    said = f"{limit.count}" if limit.count is not None else f"{limit.percent} %"
    return _failed("TooManyFailures", f"{seen.failed} of {view.plan.items} items failed; maxFailedItems is {said}")


def _failed_shards(view: BatchView) -> int:
    run = view.jobs.get("run")
    return max(run.failed_indexes if run else 0, (view.previous.get("shards") or {}).get("failed") or 0)
