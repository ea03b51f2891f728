"""How far a batch is: counters, rate and time left, written no oftener than they are worth reading."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from sightline_operator.contract import Plan, Progress
from sightline_operator.decide.batch_view import BatchView
from sightline_operator.status.conditions import find
from sightline_operator.status.times import moment, stamp

SAMPLE_SECONDS = 30.0
"""Counters are written at most so often, or at each whole per cent."""
WINDOW_SECONDS = 300.0
"""Of the moving average: five minutes weigh 63 %."""
WARM_UP_SECONDS = 120.0
STALL_SECONDS = 600.0

FIELDS = (
    "progress", "shards", "throughput", "estimatedCompletionTime", "eta", "lastProgressTime", "usage", "outputs",
    "failureSummary",
)  # fmt: skip


def report(view: BatchView, *, is_final: bool) -> dict[str, Any]:
    """The fields of the status that tell of progress: the previous ones until a sample is due."""
    kept = {name: view.previous[name] for name in FIELDS if name in view.previous}
    if view.plan is None:
        return kept
    fresh = _counters(view, view.plan)
    if fresh == {name: kept.get(name) for name in fresh}:
        return _forget_estimate(kept) if is_final or is_stalled(view) else kept
    if not (is_final or _is_due(view, fresh)):
        return kept
    return fresh | _rate(view, fresh, kept, is_final=is_final)


def is_stalled(view: BatchView) -> bool:
    """Whether nothing was finished for ten minutes although it may run."""
    since = _since(view)
    return since is not None and (view.now - since).total_seconds() > STALL_SECONDS


def _since(view: BatchView) -> datetime | None:
    """Since when progress could have been made: the last one, or since it runs, whichever is later."""
    progressing = find(view.previous.get("conditions"), "Progressing")
    if progressing.get("status") != "True" or not view.previous.get("startTime"):
        return None
    known = [moment(view.previous.get("lastProgressTime")), moment(progressing.get("lastTransitionTime"))]
    return max((each for each in known if each is not None), default=None)


def _counters(view: BatchView, plan: Plan) -> dict[str, Any]:
    """Counts as they are now. They only grow: a gateway that answers from an older listing changes nothing."""
    before, shards_before = view.previous.get("progress") or {}, view.previous.get("shards") or {}
    seen = view.progress
    if seen is None or seen.completed < (before.get("succeeded") or 0) + (before.get("failed") or 0):
        seen = _previous_progress(view)
    total = plan.items
    run = view.jobs.get("run")
    shards_completed = max(seen.shards_completed, run.completed if run else 0, shards_before.get("completed") or 0)
    done = min(seen.completed, total)
    by_items = done * 100 // total if total else 100
    by_shards = shards_completed * 100 // plan.shards if plan.shards and view.progress is None else 0
    # Nobody counts items (the pipeline has no storage, or the gateway is away): finished shards tell about how many.
    about = total * shards_completed // plan.shards if by_shards > by_items else None
    counts: dict[str, Any] = {
        "total": total,
        "succeeded": seen.succeeded,
        "failed": seen.failed,
        "unenhanced": seen.unenhanced,
        "remaining": total - (done if about is None else about),
        "percent": min(100, max(by_items, by_shards)),
        "bytes": seen.size_bytes,
        "done": f"{done}/{total}" if about is None else f"~{about}/{total}",
    }
    fresh: dict[str, Any] = {
        "progress": counts,
        "shards": {
            "total": plan.shards,
            "completed": min(shards_completed, plan.shards),
            "active": run.active if run else 0,
            "failed": max(run.failed_indexes if run else 0, shards_before.get("failed") or 0),
        },
    }
    if seen.usage:
        fresh["usage"] = dict(seen.usage)
    if seen.outputs:
        fresh["outputs"] = dict(seen.outputs)
    if seen.failures:
        fresh["failureSummary"] = [dict(row) for row in seen.failures]
    return fresh


def _previous_progress(view: BatchView) -> Progress:
    """What the status says already, as if the gateway had said it once more."""
    before, shards = view.previous.get("progress") or {}, view.previous.get("shards") or {}
    return Progress(
        total=before.get("total") or 0,
        succeeded=before.get("succeeded") or 0,
        failed=before.get("failed") or 0,
        unenhanced=before.get("unenhanced") or 0,
        size_bytes=before.get("bytes") or 0,
        shards_completed=shards.get("completed") or 0,
        usage=view.previous.get("usage"),
        failures=tuple(view.previous.get("failureSummary") or ()),
        outputs=view.previous.get("outputs"),
    )


def _is_due(view: BatchView, fresh: Mapping[str, Any]) -> bool:
    before = view.previous.get("progress")
    if before is None:
        return True
    if fresh["progress"]["percent"] - (before.get("percent") or 0) >= 1:
        return True
    if bool(fresh["shards"]["active"]) != bool((view.previous.get("shards") or {}).get("active")):
        return True
    last = moment(view.previous.get("lastProgressTime")) or moment(view.previous.get("startTime"))
    return last is None or (view.now - last).total_seconds() >= SAMPLE_SECONDS


def _rate(view: BatchView, fresh: Mapping[str, Any], kept: Mapping[str, Any], *, is_final: bool) -> dict[str, Any]:
    """Rate and time left after this sample. Without new items, what was known stays."""
    before = view.previous.get("progress") or {}
    done = fresh["progress"]["succeeded"] + fresh["progress"]["failed"]
    added = done - (before.get("succeeded") or 0) - (before.get("failed") or 0)
    if added <= 0:
        fields = {name: kept[name] for name in FIELDS[2:6] if name in kept}
        return _forget_estimate(fields) if is_final else fields
    answer: dict[str, Any] = {"lastProgressTime": stamp(view.now)}
    known = [_since(view), moment(view.previous.get("lastProgressTime")), moment(view.previous.get("startTime"))]
    start = max((each for each in known if each is not None), default=None)
    elapsed = (view.now - start).total_seconds() if start else 0.0
    rate = _average(kept, added, elapsed)
    if rate is None:
        return answer | ({"throughput": kept["throughput"]} if "throughput" in kept else {})
    answer["throughput"] = {"itemsPerSecond": f"{rate:.4g}", "window": f"{WINDOW_SECONDS / 60:.0f}m"}
    running = view.now - (moment(view.previous.get("startTime")) or view.now)
    is_warm = running.total_seconds() >= WARM_UP_SECONDS or fresh["progress"]["percent"] >= 1
    if is_final or not is_warm or not rate:
        return answer
    left = timedelta(seconds=math.ceil(fresh["progress"]["remaining"] / rate))
    return answer | {"estimatedCompletionTime": stamp(view.now + left), "eta": spoken(left.total_seconds())}


def _average(kept: Mapping[str, Any], added: int, elapsed: float) -> float | None:
    """Exponentially weighted by time, so that the rhythm of samples does not matter."""
    if elapsed < 1:
        return None
    now = added / elapsed
    before = (kept.get("throughput") or {}).get("itemsPerSecond")
    if before is None:
        return now
    weight = 1 - math.exp(-elapsed / WINDOW_SECONDS)
    return weight * now + (1 - weight) * float(before)


def _forget_estimate(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in ("estimatedCompletionTime", "eta")}


def spoken(duration_seconds: float) -> str:
    """`1h12m`, `12m`, `40s`: two units at most."""
    total = int(duration_seconds)
    days, hours, minutes = total // 86400, total % 86400 // 3600, total % 3600 // 60
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes}m"
    return f"{minutes}m" if minutes else f"{total}s"
