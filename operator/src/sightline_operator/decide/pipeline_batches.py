"""VisionBatches that a pipeline makes: once, or by a schedule; which are due, and which are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from sightline_operator.api.pipeline import BATCH_NAME_LENGTH, PipelineBatch
from sightline_operator.api.types import seconds
from sightline_operator.decide.cron import BadSchedule, Cron
from sightline_operator.decide.decision import Apply, Delete
from sightline_operator.decide.pipeline_view import PIPELINE_LABEL, PipelineView
from sightline_operator.observe.world import Manifest
from sightline_operator.render.names import child_name, label_value
from sightline_operator.settings import API_VERSION, OWNED_LABEL, OWNED_VALUE
from sightline_operator.status.conditions import is_true
from sightline_operator.status.times import moment, stamp

ENTRY_LABEL = "sightline.dev/batch-entry"
"""Name in `spec.batches` of the entry that a VisionBatch was made by."""


@dataclass(frozen=True)
class BatchesReport:
    """What follows from `spec.batches`.

    rows      of status.schedules: the memory of what was made, so that nothing is made twice
    faults    by entry: why its schedule can't be read
    next_at   when the next one is due
    """

    actions: tuple[Apply | Delete, ...] = ()
    rows: tuple[dict[str, Any], ...] = ()
    faults: Mapping[str, str] = field(default_factory=dict)
    next_at: datetime | None = None


def batches_report(view: PipelineView) -> BatchesReport:
    """The level of each entry by itself: due → made; finished beyond the limits → deleted."""
    actions: list[Apply | Delete] = []
    rows: list[dict[str, Any]] = []
    faults: dict[str, str] = {}
    for index, entry in enumerate(view.spec.batches):
        mine = _made_by(view, entry)
        before = next((row for row in view.previous.get("schedules") or () if row["name"] == entry.name), {})
        try:
            made, row = _due(view, entry, index, mine, before)
        except BadSchedule as error:
            faults[entry.name] = str(error)
            made, row = (), dict(before)
        actions.extend(made)
        actions.extend(_superfluous(entry, mine) if entry.schedule else ())
        if row:
            rows.append({"name": entry.name} | row)
    ahead = [at for row in rows if (at := moment(row.get("nextScheduleTime"))) is not None]
    return BatchesReport(tuple(actions), tuple(rows), faults, min(ahead, default=None))


def is_finished(batch: Manifest) -> bool:
    conditions = (batch.get("status") or {}).get("conditions")
    return is_true(conditions, "Complete") or is_true(conditions, "Failed")


def _due(
    view: PipelineView, entry: PipelineBatch, index: int, mine: Sequence[Manifest], before: Mapping[str, Any]
) -> tuple[tuple[Apply, ...], dict[str, Any]]:
    """What is to be made now, and the row that remembers it.

    A VisionBatch is remembered once it has been seen, so that neither a crash nor a refused call loses a run.
    """
    held = entry.suspend or view.spec.suspend
    if entry.schedule is None:
        return _once(view, entry, index, before, is_held=held)
    cron, zone = Cron.parse(entry.schedule), _zone(entry.time_zone)
    kept = {name: before[name] for name in ("lastScheduleTime", "lastBatch") if name in before}
    if held:
        return (), kept
    planned = moment(before.get("nextScheduleTime"))
    following = cron.next(view.now if planned is None or view.now < planned else planned - timedelta(seconds=1), zone)
    if planned is None or following != planned:
        return (), kept | _ahead(cron, zone, view.now)  # seen for the first time, or its schedule was edited
    if view.now < planned:
        return (), dict(before)
    due = cron.latest(after=planned - timedelta(seconds=1), until=view.now, zone=zone) or planned
    name = _name(view, f"{entry.name}-{int(due.timestamp()) // 60}")
    if any(batch["metadata"]["name"] == name for batch in mine):
        return (), {"lastScheduleTime": stamp(due), "lastBatch": name} | _ahead(cron, zone, view.now)
    if _is_skipped(view, entry, mine, due):
        return (), kept | _ahead(cron, zone, view.now)
    return (Apply(_batch(view, index, name), is_create_only=True),), dict(before)


def _is_skipped(view: PipelineView, entry: PipelineBatch, mine: Sequence[Manifest], due: datetime) -> bool:
    late = (view.now - due).total_seconds()
    if entry.starting_deadline is not None and late > seconds(entry.starting_deadline):
        return True
    return entry.concurrency_policy == "Forbid" and any(not is_finished(batch) for batch in mine)


def _once(
    view: PipelineView, entry: PipelineBatch, index: int, before: Mapping[str, Any], *, is_held: bool
) -> tuple[tuple[Apply, ...], dict[str, Any]]:
    """Made once: the row remembers it even when the VisionBatch is deleted afterwards (trainer #2981)."""
    if before.get("lastBatch"):
        return (), dict(before)
    name = _name(view, entry.name)
    there = next((batch for batch in view.world.batches if batch["metadata"]["name"] == name), None)
    if there is not None:
        made = there["metadata"].get("creationTimestamp") or stamp(view.now)
        return (), {"lastScheduleTime": made, "lastBatch": name}
    return (() if is_held else (Apply(_batch(view, index, name), is_create_only=True),)), dict(before)


def _ahead(cron: Cron, zone: ZoneInfo | None, now: datetime) -> dict[str, Any]:
    following = cron.next(now, zone)
    return {"nextScheduleTime": stamp(following)} if following else {}


def _superfluous(entry: PipelineBatch, mine: Sequence[Manifest]) -> list[Delete]:
    """Finished ones beyond the history limits, the oldest first."""
    done = sorted((batch for batch in mine if is_finished(batch)), key=_age, reverse=True)
    good = [batch for batch in done if is_true(batch["status"]["conditions"], "Complete")]
    bad = [batch for batch in done if batch not in good]
    spare = [*good[entry.successful_history_limit :], *bad[entry.failed_history_limit :]]
    return [
        Delete(API_VERSION, "VisionBatch", batch["metadata"]["name"], batch["metadata"]["uid"])
        for batch in sorted(spare, key=_age)
        if not batch["metadata"].get("deletionTimestamp")
    ]


def _age(batch: Manifest) -> tuple[str, str]:
    return batch["metadata"].get("creationTimestamp") or "", batch["metadata"]["name"]


def _made_by(view: PipelineView, entry: PipelineBatch) -> list[Manifest]:
    uid = view.cr["metadata"].get("uid")
    return [
        batch
        for batch in view.world.batches
        if (batch["metadata"].get("labels") or {}).get(ENTRY_LABEL) == entry.name
        and any(owner.get("uid") == uid for owner in batch["metadata"].get("ownerReferences") or ())
    ]


def _batch(view: PipelineView, index: int, name: str) -> dict[str, Any]:
    """The VisionBatch, its template's words as the user wrote them. Created once and never changed by us."""
    owner, entry = view.cr["metadata"], view.cr["spec"]["batches"][index]
    template = entry["template"]
    said = template.get("metadata") or {}
    labels = {OWNED_LABEL: OWNED_VALUE, PIPELINE_LABEL: label_value(owner["name"]), ENTRY_LABEL: entry["name"]}
    reference = {"apiVersion": API_VERSION, "kind": "VisionPipeline", "name": owner["name"], "uid": owner["uid"]}
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": owner.get("namespace"),
        "labels": {**(said.get("labels") or {}), **labels},
        "ownerReferences": [reference | {"controller": True, "blockOwnerDeletion": False}],
    }
    if said.get("annotations"):
        metadata["annotations"] = dict(said["annotations"])
    spec = {**template["spec"], "pipelineRef": {"name": owner["name"]}}
    return {"apiVersion": API_VERSION, "kind": "VisionBatch", "metadata": metadata, "spec": spec}


def _name(view: PipelineView, suffix: str) -> str:
    return child_name(view.cr["metadata"]["name"], suffix, BATCH_NAME_LENGTH)


def _zone(name: str | None) -> ZoneInfo | None:
    if name is None:
        return None
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, KeyError) as error:
        raise BadSchedule(f"timeZone: {name!r} is not known here") from error
