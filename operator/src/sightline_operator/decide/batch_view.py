"""Everything known about one VisionBatch, read once: its Jobs by part, its plan, its pipeline, its place in a queue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sightline_operator.api import Batch
from sightline_operator.api.types import seconds
from sightline_operator.contract import Exit, Plan, Progress
from sightline_operator.decide.jobs import JobView
from sightline_operator.observe.world import Manifest, World
from sightline_operator.render import retried, revision
from sightline_operator.render.names import child_name
from sightline_operator.status.conditions import find, is_true
from sightline_operator.status.times import moment

Part = Literal["plan", "run", "finish"]
PARTS: tuple[Part, ...] = ("plan", "run", "finish")
ENDS = ("Complete", "Failed")
"""Conditions of which one is true at the end, and for ever."""


@dataclass(frozen=True)
class BatchView:
    """One look at a batch. What a process outside said (plan, progress) is checked already.

    previous   the status as it is; the memory of what can't be seen any more
    pipeline   the VisionPipeline that it names; None when it isn't there, or is going
    again      where the items of the batch that it retries lie; None when it retries none, or that can't be told yet
    plan       from whoever still knows it: the status, the gateway, the planner's last words, the run Job
    """

    cr: Manifest
    spec: Batch
    previous: Mapping[str, Any]
    world: World
    pipeline: Manifest | None
    again: Mapping[str, Any] | None
    jobs: Mapping[Part, JobView]
    plan: Plan | None
    progress: Progress | None
    workload: Manifest | None

    @classmethod
    def of(cls, cr: Manifest, world: World) -> BatchView:
        spec, previous = Batch.model_validate(cr["spec"]), cr.get("status") or {}
        jobs = _jobs(cr, world)
        finish = jobs.get("finish")
        progress = (finish.words.progress if finish and finish.is_complete else None) or Progress.read(world.progress)
        return cls(
            cr=cr,
            spec=spec,
            previous=previous,
            world=world,
            pipeline=_pipeline(world, spec.pipeline_ref.name),
            again=_again(spec, previous, world),
            jobs=jobs,
            plan=_plan(previous, world, jobs),
            progress=progress,
            workload=_workload(world, jobs.get("run")),
        )

    @property
    def now(self) -> datetime:
        return self.world.now

    @property
    def is_ended(self) -> bool:
        """Terminal is terminal: whatever becomes of the Jobs, nothing starts again."""
        return _has_ended(self.cr)

    @property
    def created(self) -> datetime:
        return moment(self.cr["metadata"].get("creationTimestamp")) or self.now

    @property
    def expires(self) -> datetime | None:
        window = self.spec.completion_window
        return self.created + timedelta(seconds=seconds(window)) if window else None

    @property
    def revision(self) -> str | None:
        """Of the pipeline as it is now."""
        return revision(self.pipeline) if self.pipeline else None

    @property
    def held_revision(self) -> str | None:
        """Of the pipeline as it was when planning began; one batch never holds results of two."""
        return self.previous.get("pipelineRevision")

    @property
    def is_pipeline_changed(self) -> bool:
        return bool(self.revision and self.held_revision and self.revision != self.held_revision)

    @property
    def is_pipeline_suspended(self) -> bool:
        return bool(self.pipeline and self.pipeline["spec"].get("suspend"))

    @property
    def pipeline_ready(self) -> Mapping[str, Any]:
        """Its Ready condition; empty when it has none yet."""
        return find((self.pipeline or {}).get("status", {}).get("conditions"), "Ready")

    @property
    def is_run_over(self) -> bool:
        """Whether there is nothing more to run. A finish Job says so after its run Job is gone."""
        run = self.jobs.get("run")
        return "finish" in self.jobs or bool(run and run.is_over and not self.is_run_refused)

    @property
    def is_run_refused(self) -> bool:
        """Whether the run Job failed because the gateway answers with another revision than the plan's."""
        run = self.jobs.get("run")
        return bool(run and run.is_failed and run.fatal()[0] == Exit.REVISION_MISMATCH)


def _jobs(cr: Manifest, world: World) -> dict[Part, JobView]:
    """By part. Jobs on their way out do not count: there is nothing to hope from them.

    The name of the run Job holds a fingerprint that a changed pipeline would give another value, so it is known by
    being the Indexed one.
    """
    names: dict[str, Part] = {child_name(cr["metadata"]["name"], part): part for part in ("plan", "finish")}
    found: dict[Part, JobView] = {}
    for (kind, name), manifest in sorted(world.owned.items(), key=lambda item: item[0]):
        if kind != "Job" or manifest["metadata"].get("deletionTimestamp"):
            continue
        part = names.get(name) or ("run" if manifest["spec"].get("completionMode") == "Indexed" else None)
        if part is not None and part not in found:
            found[part] = JobView.of(manifest, world.pods)
    return found


def _pipeline(world: World, name: str) -> Manifest | None:
    pipeline = world.others.get(("VisionPipeline", name))
    return pipeline if pipeline and not pipeline["metadata"].get("deletionTimestamp") else None


def _again(spec: Batch, previous: Mapping[str, Any], world: World) -> Mapping[str, Any] | None:
    """As it was when planning began: the earlier batch may be gone since, or be another one of its name."""
    if spec.input.retry_of is None or previous.get("retryOf"):
        return previous.get("retryOf")
    earlier = world.others.get(("VisionBatch", spec.input.retry_of.batch_name))
    if earlier is None or not _has_ended(earlier):
        return None
    return retried(earlier)


def _has_ended(batch: Manifest) -> bool:
    return any(is_true((batch.get("status") or {}).get("conditions"), end) for end in ENDS)


def _plan(previous: Mapping[str, Any], world: World, jobs: Mapping[Part, JobView]) -> Plan | None:
    for candidate in _plans(previous, world, jobs):
        if candidate is not None:
            return candidate
    return None


def _plans(previous: Mapping[str, Any], world: World, jobs: Mapping[Part, JobView]) -> Iterator[Plan | None]:
    counts = {"shards": (previous.get("shards") or {}).get("total")} | {
        "items": (previous.get("progress") or {}).get("total"),
        "fingerprint": previous.get("fingerprint"),
    }
    yield Plan.read(counts)
    planner = jobs.get("plan")
    if planner is not None and planner.is_complete:
        yield planner.words.plan
    said = (world.progress or {}).get("plan")
    yield Plan.read(said) if isinstance(said, dict) else None


def _workload(world: World, run: JobView | None) -> Manifest | None:
    """Kueue's object for the run Job. Its owner is the Job, so it is never among ours by owner."""
    if run is None:
        return None
    uid = run.manifest["metadata"].get("uid")
    for (kind, _), manifest in sorted({**world.others, **world.owned}.items(), key=lambda item: item[0]):
        owners = manifest["metadata"].get("ownerReferences", ())
        if kind == "Workload" and any(owner.get("uid") == uid for owner in owners):
            return manifest
    return None
