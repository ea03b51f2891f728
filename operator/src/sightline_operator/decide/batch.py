"""VisionBatch: plan, one Indexed Job, finish. Level by level from what is seen; what has ended stays ended."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from pydantic import ValidationError

from sightline_operator.api.types import seconds
from sightline_operator.decide.batch_conditions import conditions
from sightline_operator.decide.batch_ends import Ending, State, ending
from sightline_operator.decide.batch_progress import report
from sightline_operator.decide.batch_stage import Hold, actions, hold, leftovers, state
from sightline_operator.decide.batch_view import PARTS, BatchView
from sightline_operator.decide.decision import Decision, Delete, Note
from sightline_operator.observe.world import Manifest, World
from sightline_operator.render import RenderError, batch_output
from sightline_operator.settings import API_VERSION, RenderSettings
from sightline_operator.status.conditions import Condition, find, merged
from sightline_operator.status.times import moment, stamp

POLL_SECONDS = 15.0
"""How often the gateway is asked for progress."""
REPLAN_SECONDS = 60.0
"""After the planner's end, how long its last words may take to be seen."""


def decide_batch(cr: Manifest, world: World, settings: RenderSettings) -> Decision:
    """What the batch needs now, and how it is. The same for the same cr and world, whatever came before."""
    previous: Mapping[str, Any] = cr.get("status") or {}
    if cr["metadata"].get("deletionTimestamp"):
        return Decision((), previous)
    try:
        view = BatchView.of(cr, world)
        return _after_the_end(view) if view.is_ended else _go_on(view, settings)
    except ValidationError as error:
        first = error.errors()[0]
        return _invalid(cr, world, f"{error.title}.{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except RenderError as error:
        return _invalid(cr, world, str(error))


def _go_on(view: BatchView, settings: RenderSettings) -> Decision:
    end, held = ending(view), hold(view)
    stage = end.state if end else state(view, held)
    status = _status(view, stage, held, end)
    wanted = leftovers(view) if end else (*actions(view, held, settings), *_replan(view))
    notes = _notes(view.previous, status)
    return Decision(wanted, status, notes, _requeue(view, stage, end))


def _invalid(cr: Manifest, world: World, message: str) -> Decision:
    """It, or its pipeline, passed the API server and can't be rendered: nothing is touched, the condition says why."""
    previous: Mapping[str, Any] = cr.get("status") or {}
    generation = cr["metadata"].get("generation", 0)
    before = previous.get("conditions") or ()
    held = Condition("Progressing", "False", "InvalidSpec", message)
    rest = [dict(condition) for condition in before if condition["type"] != "Progressing"]
    now = merged(before, [held], generation=generation, now=world.now)
    status = {"state": "Pending", **previous, "observedGeneration": generation, "conditions": [*rest, *now]}
    return Decision((), status)


def _after_the_end(view: BatchView) -> Decision:
    """Nothing is created ever again (trainer #2981). Jobs that still run are stopped; after its time the batch goes."""
    generation = view.cr["metadata"].get("generation", 0)
    before = [dict(condition) for condition in view.previous["conditions"]]
    status = {
        **view.previous,
        "observedGeneration": generation,
        "conditions": [condition | {"observedGeneration": generation} for condition in before],
    }
    ended, ttl = moment(view.previous.get("completionTime")), view.spec.ttl_after_finished
    if ttl is None or ended is None:
        return Decision(leftovers(view), status)
    left = (ended + timedelta(seconds=seconds(ttl)) - view.now).total_seconds()
    if left > 0:
        return Decision(leftovers(view), status, requeue_seconds=left)
    metadata = view.cr["metadata"]
    return Decision((Delete(API_VERSION, "VisionBatch", metadata["name"], metadata["uid"]),), status)


def _replan(view: BatchView) -> tuple[Delete, ...]:
    """A planner that is done and whose last words nobody heard (its pod is gone) is asked once more.

    The next one finds PLAN.json, exits at once and says the same.
    """
    plan = view.jobs.get("plan")
    if view.plan is not None or plan is None or not plan.is_complete:
        return ()
    ended = moment(plan.status.get("completionTime"))
    if ended is None or (view.now - ended).total_seconds() < REPLAN_SECONDS:
        return ()
    metadata = plan.manifest["metadata"]
    return (Delete(plan.manifest["apiVersion"], "Job", metadata["name"], metadata["uid"]),)


def _status(view: BatchView, stage: State, held: Hold | None, end: Ending | None) -> dict[str, Any]:
    previous, now = view.previous, view.now
    found: list[Condition] = conditions(view, stage, held, end)
    generation = view.cr["metadata"].get("generation", 0)
    has_begun = "plan" in view.jobs or view.plan is not None or (held is None and view.pipeline is not None)
    run = view.jobs.get("run")
    fields: dict[str, Any] = {
        "observedGeneration": generation,
        "conditions": merged(previous.get("conditions") or (), found, generation=generation, now=now),
        "state": stage,
        "fingerprint": (view.plan.fingerprint if view.plan else "") or previous.get("fingerprint"),
        "pipelineRevision": view.held_revision or (view.revision if has_begun else None),
        "output": previous.get("output") or (_output(view) if has_begun else None),
        "retryOf": view.again if has_begun else previous.get("retryOf"),
        "plannedTime": previous.get("plannedTime") or (stamp(now) if view.plan else None),
        "startTime": previous.get("startTime") or (stamp(now) if run and (run.active or run.completed) else None),
        "completionTime": previous.get("completionTime") or (stamp(now) if end else None),
        "expiresTime": stamp(view.expires) if view.expires else None,
        **report(view, is_final=end is not None),
        "jobs": _job_names(view),
        "workload": view.workload["metadata"]["name"] if view.workload else previous.get("workload"),
    }
    return {name: value for name, value in fields.items() if value not in (None, "", {})}


def _output(view: BatchView) -> dict[str, Any] | None:
    """Kept from the beginning: a pipeline's storage may become another one while its batches run."""
    return batch_output(view.cr, view.pipeline) if view.pipeline is not None else None


def _job_names(view: BatchView) -> dict[str, str]:
    """Of the Jobs that are there, and of those that were."""
    before = view.previous.get("jobs") or {}
    names = {part: view.jobs[part].name if part in view.jobs else before.get(part) for part in PARTS}
    return {part: name for part, name in names.items() if name}


def _requeue(view: BatchView, stage: State, end: Ending | None) -> float | None:
    if end is not None:
        return seconds(view.spec.ttl_after_finished) if view.spec.ttl_after_finished else None
    waits = [POLL_SECONDS] if stage in ("Planning", "Running", "Finishing") else []
    if view.expires is not None:
        waits.append(max(0.0, (view.expires - view.now).total_seconds()))
    return min(waits, default=None)


def _notes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[Note, ...]:
    """Events about what changed between the two statuses. None per item; created Jobs the executor tells."""
    notes: list[Note] = []
    old, new = before.get("conditions") or (), after["conditions"]
    admitted, was_admitted = find(new, "Admitted"), find(old, "Admitted")
    if admitted["reason"] in ("Admitted", "Preempted") and admitted["reason"] != was_admitted.get("reason"):
        kind = "Normal" if admitted["reason"] == "Admitted" else "Warning"
        notes.append(Note(kind, admitted["reason"], "Queue", admitted["message"] or admitted["reason"]))
    stalled, was_stalled = find(new, "Stalled"), find(old, "Stalled")
    if stalled["status"] == "True" and stalled["reason"] != was_stalled.get("reason"):
        reason = "ShardFailed" if stalled["reason"] == "ShardFailing" else stalled["reason"]
        notes.append(Note("Warning", reason, "Run", stalled["message"]))
    notes.extend(_milestones(before.get("progress") or {}, after.get("progress") or {}))
    for end in (find(new, "Complete"), find(new, "Failed")):
        if end and not find(old, end["type"]):
            kind = "Normal" if end["type"] == "Complete" and end["reason"] == "Succeeded" else "Warning"
            reason = "Completed" if end["type"] == "Complete" else end["reason"]
            notes.append(Note(kind, reason, "Finish", end["message"] or reason))
    return tuple(notes)


def _milestones(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Note]:
    was, is_now = before.get("percent") or 0, after.get("percent") or 0
    passed = [mark for mark in (25, 50, 75) if was < mark <= is_now < 100]
    return [Note("Normal", "Progress", "Run", f"{passed[-1]} %: {after['done']} items")] if passed else []
