"""Conditions of a VisionBatch, each from what is seen now."""

from __future__ import annotations

from sightline_operator.decide.batch_ends import Ending, State
from sightline_operator.decide.batch_progress import is_stalled
from sightline_operator.decide.batch_stage import Hold, is_queued
from sightline_operator.decide.batch_view import BatchView
from sightline_operator.decide.jobs import pods_of
from sightline_operator.status.conditions import Condition, find
from sightline_operator.status.pods import REFERENCE_FAULTS, Fault, Trouble, live, worst

_POD_REASONS = REFERENCE_FAULTS | {
    Fault.IMAGE_PULL: "ImagePullFailed",
    Fault.NO_GPU: "PodsUnschedulable",
    Fault.UNSCHEDULABLE: "PodsUnschedulable",
}
_NO_QUEUE = ("doesn't exist", "does not exist", "not found", "is inactive")


def conditions(view: BatchView, stage: State, held: Hold | None, end: Ending | None) -> list[Condition]:
    """All of them, in the order of a batch's life. Complete and Failed are there only once they are true."""
    found = [
        _planned(view, held, end),
        _admitted(view),
        _progressing(view, stage, held, end),
        _stalled(view, held, end),
    ]
    return [*found, Condition(end.type, "True", end.reason, end.message)] if end else found


def trouble(view: BatchView) -> Trouble | None:
    """Of the pods of the Job that is at work."""
    for part in ("finish", "run", "plan"):
        job = view.jobs.get(part)
        if job is not None and not job.is_over:
            found = worst(live(pods_of(job.manifest, view.world.pods)), view.world.warnings)
            return found if found and found.fault in _POD_REASONS else None
    return None


def _planned(view: BatchView, held: Hold | None, end: Ending | None) -> Condition:
    if view.plan is not None:
        return Condition("Planned", "True", "Planned", f"{view.plan.items} items in {view.plan.shards} shards")
    if end is not None and (plan := view.jobs.get("plan")) is not None and plan.is_failed:
        return Condition("Planned", "False", end.reason, end.message)
    if held is not None and held.reason == "InputNotFound":
        return Condition("Planned", "False", held.reason, held.message)
    if "plan" not in view.jobs:
        return Condition("Planned", "Unknown", "Listing", "the input has not been listed yet")
    found = trouble(view)
    if found is not None and found.fault in REFERENCE_FAULTS:
        return Condition("Planned", "False", "AccessDenied", found.message)
    return Condition("Planned", "False", "Listing", found.message if found else "the input is being listed")


def _admitted(view: BatchView) -> Condition:
    queue = view.spec.queue_name
    if queue is None:
        return Condition("Admitted", "True", "NotQueued", "spec.queueName is not set")
    if "Workload" not in view.world.kinds:
        return Condition("Admitted", "False", "QueueNotFound", f"queue {queue}: Kueue is not installed in this cluster")
    if view.workload is None:
        return Condition("Admitted", "Unknown", "WaitingForQuota", f"queue {queue} has not seen the work yet")
    return _of_workload(view.workload.get("status", {}).get("conditions") or [], queue)


def _of_workload(found: list[dict[str, str]], queue: str) -> Condition:
    evicted, reserved = find(found, "Evicted"), find(found, "QuotaReserved")
    if find(found, "Admitted").get("status") == "True":
        return Condition("Admitted", "True", "Admitted", f"admitted by queue {queue}")
    if evicted.get("status") == "True" and evicted.get("reason") == "Preempted":
        return Condition("Admitted", "False", "Preempted", evicted.get("message", ""))
    message = reserved.get("message") or evicted.get("message") or f"waiting in queue {queue}"
    is_lost = "queue" in message.lower() and any(words in message for words in _NO_QUEUE)
    return Condition("Admitted", "False", "QueueNotFound" if is_lost else "WaitingForQuota", message)


def _progressing(view: BatchView, stage: State, held: Hold | None, end: Ending | None) -> Condition:
    if end is not None:
        return Condition("Progressing", "False", end.reason, end.message)
    if held is not None:
        return Condition("Progressing", "False", held.reason, held.message)
    if stage == "Planning":
        return Condition("Progressing", "True", "Planning", "the input is being listed")
    if stage == "Finishing":
        return Condition("Progressing", "True", "Finishing", "the outputs are being checked")
    if is_queued(view):
        return Condition("Progressing", "False", "WaitingForQuota", _admitted(view).message)
    if "run" not in view.jobs:
        return Condition("Progressing", "Unknown", "Pending", "its first Job is about to be made")
    waiting = view.progress.waiting if view.progress else ""
    if waiting == "BackendUnavailable":
        return Condition("Progressing", "False", waiting, "the workers wait for the gateway")
    if waiting == "Throttled":
        return Condition("Progressing", "True", waiting, "the gateway asks the workers to slow down")
    return Condition("Progressing", "True", "Running", "workers are running")


def _stalled(view: BatchView, held: Hold | None, end: Ending | None) -> Condition:
    calm = Condition("Stalled", "False", "None", "")
    if end is not None:
        return calm
    found = trouble(view)
    if found is not None:
        return Condition("Stalled", "True", _POD_REASONS[found.fault], f"pod {found.pod}: {found.message}")
    run = view.jobs.get("run")
    if run is not None and not run.is_over and run.failed_indexes:
        words = next((words.message for code, words in reversed(run.exits) if code and words.message), "")
        said = f": {words}" if words else ""
        return Condition("Stalled", "True", "ShardFailing", f"{run.failed_indexes} shards were given up{said}")
    if held is None and not view.is_run_over and is_stalled(view):
        return Condition("Stalled", "True", "NoProgress", "no item was finished for ten minutes")
    return calm
