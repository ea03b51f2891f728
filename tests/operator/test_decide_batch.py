"""What is decided about a VisionBatch: plan, run, finish; every state, reason and way to end; nothing after the end."""

from __future__ import annotations

import copy
import json
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline_operator.contract import Exit, LastWords, Plan, Progress
from sightline_operator.decide import decide_batch
from sightline_operator.decide.batch_progress import spoken
from sightline_operator.decide.decision import Apply, Decision, Delete
from sightline_operator.decide.jobs import count_indexes
from sightline_operator.settings import FIELD_MANAGER

from .simulation import SETTINGS, START, Cluster, Operator, batch, later, pipeline, settle, stamp

KEY = ("VisionBatch", "nightly")
PIPELINE = ("VisionPipeline", "scenes")


class Batch:
    """A batch in a cluster whose pipeline serves; Jobs move only when they are told to."""

    key = KEY

    def __init__(self, cluster: Cluster | None = None, **spec: Any) -> None:
        self.cluster = cluster or Cluster()
        self.operator = Operator(self.cluster)
        self.cluster.create(pipeline())
        settle(self.operator)
        self.cluster.create(batch(**spec))
        self.look()

    def look(self) -> Batch:
        """The operator sees everything, and does what it will, until it is content; Jobs stand still."""
        for _ in range(30):
            self.operator.relist()
            if not any([self.operator.reconcile(key) for key in self.operator.mine()]):
                return self
        raise AssertionError("it does not come to rest")

    def job(self, part: str) -> dict[str, Any] | None:
        for thing in self.cluster.of_kind("Job"):
            if thing["spec"]["template"]["spec"]["containers"][0]["args"] == [part]:
                return thing
        return None

    def work(self, steps: int) -> Batch:
        """Jobs make so many steps; the operator sees each."""
        for _ in range(steps):
            assert self.cluster.jobs()
            self.look()
        return self

    def planned(self) -> Batch:
        return self.work(3)

    def running(self, shards: int = 0) -> Batch:
        """Planned, and the first worker is there; then so many shards done."""
        return self.planned().work(1 + 2 * shards)

    def finished(self) -> Batch:
        self.cluster.settle_controllers()
        settle(self.operator)
        return self

    def edit(self, **spec: Any) -> Batch:
        self.cluster.edit(KEY, **spec)
        return self.look()

    def decide(self) -> Decision:
        self.operator.relist()
        decision = self.operator.decide(KEY)
        assert decision is not None
        return decision

    @property
    def status(self) -> dict[str, Any]:
        return self.cluster.objects[self.key]["status"]

    @property
    def state(self) -> str:
        return self.status["state"]

    def said(self, type: str) -> tuple[str, str] | None:
        for found in self.status["conditions"]:
            if found["type"] == type:
                return found["status"], found["reason"]
        return None

    def message(self, type: str) -> str:
        return next(c["message"] for c in self.status["conditions"] if c["type"] == type)

    @property
    def jobs(self) -> set[str]:
        return {thing["spec"]["template"]["spec"]["containers"][0]["args"][0] for thing in self.cluster.of_kind("Job")}


# --- plan, run, finish -----------------------------------------------------------------------------------------------


def test_a_batch_is_planned_run_and_finished() -> None:
    it = Batch()
    assert (it.state, it.jobs) == ("Planning", {"plan"})
    assert it.said("Planned") == ("False", "Listing")
    assert it.said("Progressing") == ("True", "Planning")
    it.planned()
    assert (it.state, it.jobs) == ("Running", {"plan", "run"})
    assert it.said("Planned") == ("True", "Planned")
    assert it.message("Planned") == "40 items in 4 shards"
    run = it.job("run")
    assert run is not None
    assert (run["spec"]["completionMode"], run["spec"]["completions"]) == ("Indexed", 4)
    it.work(3)
    assert it.said("Progressing") == ("True", "Running")
    assert it.status["shards"] == {"total": 4, "completed": 1, "active": 1, "failed": 0}
    assert it.status["progress"]["done"] == "10/40"
    it.work(6)
    assert (it.state, it.said("Progressing")) == ("Finishing", ("True", "Finishing"))
    assert it.jobs == {"plan", "run", "finish"}
    it.finished()
    assert (it.state, it.said("Complete")) == ("Complete", ("True", "Succeeded"))
    assert it.said("Failed") is None
    assert it.status["progress"]["percent"] == 100
    assert it.status["outputs"] == {"manifest": "s3://out/MANIFEST.json"}
    assert it.status["completionTime"] == stamp(START)
    assert it.status["jobs"] == {
        "plan": "nightly-plan",
        "run": f"nightly-run-{it.status['fingerprint'][:6]}",
        "finish": "nightly-finish",
    }


def test_each_job_is_made_once_however_often_it_is_decided() -> None:
    it = Batch().running(1)
    it.look().look()
    it.operator.relist()
    assert not any(isinstance(action, Apply) and action.is_create_only for action in it.decide().actions)
    it.finished().look()
    made = {name: count for (kind, name), count in it.cluster.created.items() if kind == "Job"}
    assert set(made.values()) == {1}
    assert len(made) == 3


def test_what_all_workers_read_is_kept_as_rendered() -> None:
    it = Batch()
    it.cluster.objects["ConfigMap", "nightly-batch"]["data"] = {"batch.json": "{}"}
    it.look()
    assert "fingerprint" in it.cluster.objects["ConfigMap", "nightly-batch"]["data"]["batch.json"]


def test_items_that_failed_make_it_succeed_with_errors() -> None:
    it = Batch(Cluster(failing=3)).finished()
    assert it.said("Complete") == ("True", "SucceededWithErrors")
    assert it.message("Complete") == "3 items failed"
    assert it.status["failureSummary"] == [{"step": "decode", "code": "decode_failed", "count": 3}]


def test_a_dry_run_plans_and_counts_only() -> None:
    it = Batch(dryRun=True).finished()
    assert it.said("Complete") == ("True", "Succeeded")
    assert it.message("Complete") == "planned only: 40 items in 4 shards"
    assert it.jobs == {"plan"}


def test_the_status_does_not_move_while_nothing_happens() -> None:
    it = Batch().running(1)
    before = it.cluster.writes
    later(it.cluster, minutes=5)
    it.look()
    assert it.cluster.writes == before


def test_a_decision_is_a_function_of_object_and_world_and_changes_neither() -> None:
    it = Batch().running(1)
    cr, world = it.operator.seen[KEY], it.operator.world(it.operator.seen[KEY])
    before = copy.deepcopy((cr, world))
    assert decide_batch(cr, world, SETTINGS) == decide_batch(cr, world, SETTINGS)
    assert (cr, world) == before


def test_a_batch_that_is_going_away_is_left_alone() -> None:
    it = Batch()
    it.operator.relist()
    cr = it.operator.seen[KEY]
    cr["metadata"]["deletionTimestamp"] = stamp(START)
    cr["spec"] = {"pipelineRef": {"name": "scenes"}}
    assert it.operator.decide(KEY) == Decision((), cr["status"])


# --- planning that fails ---------------------------------------------------------------------------------------------


def test_a_plan_that_cannot_be_made_ends_the_batch_with_the_planners_words() -> None:
    it = Batch(Cluster(worker_exit={"plan": Exit.UNUSABLE})).finished()
    assert it.state == "Failed"
    assert it.said("Failed") == ("True", "InputNotFound")
    assert it.said("Planned") == ("False", "InputNotFound")
    assert it.message("Failed") == "no such bucket"
    assert it.jobs == {"plan"}


def test_a_planner_that_crashes_to_its_limit_ends_the_batch() -> None:
    it = Batch(Cluster(worker_exit={"plan": 1}))
    it.cluster.jobs()
    for key, pod in it.cluster.objects.items():
        if key[0] == "Pod" and "JOB" in key[1]:
            pod["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = "Traceback: no"
    it.look()
    assert it.said("Failed") == ("True", "PlanFailed")
    assert it.message("Failed") == "Traceback: no"


def test_an_empty_input_ends_the_batch() -> None:
    it = Batch(Cluster(items=0, shards=1)).planned()
    assert it.said("Failed") == ("True", "InputEmpty")
    assert it.jobs == {"plan"}


def test_a_planner_whose_last_words_nobody_heard_is_asked_once_more() -> None:
    it = Batch()
    it.cluster.jobs(), it.cluster.jobs(), it.cluster.jobs()
    for key in [key for key in it.cluster.objects if key[0] == "Pod" and "JOB" in key[1]]:
        it.cluster.delete(key)
    it.look()
    assert it.state == "Planning"
    later(it.cluster, seconds=61)
    it.look()
    assert it.cluster.created["Job", "nightly-plan"] == 2
    it.finished()
    assert it.state == "Complete"


def test_the_gateway_knows_the_plan_as_well() -> None:
    it = Batch()
    it.operator.relist()
    world = it.operator.world(it.operator.seen[KEY])
    said = {"plan": {"shards": 2, "items": 9, "fingerprint": "f" * 12}}
    decision = decide_batch(it.operator.seen[KEY], _with(world, progress=said), SETTINGS)
    assert decision.status["shards"]["total"] == 2
    assert decision.status["progress"]["total"] == 9


def _with(world: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(world, **changes)


# --- a retry ---------------------------------------------------------------------------------------------------------


AGAIN = ("VisionBatch", "again")


def retry_of(it: Batch, name: str = "nightly") -> Batch:
    """Another batch in the same cluster, of the items that this one failed at; its operator looks at both."""
    other = copy.copy(it)
    other.key = AGAIN
    it.cluster.create(batch("again", input={"retryOf": {"batchName": name}}))
    return other.look()


def page(it: Batch, name: str) -> dict[str, Any]:
    return json.loads(it.cluster.objects["ConfigMap", f"{name}-batch"]["data"]["batch.json"])


def test_a_retry_waits_for_the_end_of_the_batch_that_it_retries() -> None:
    it = Batch().running(1)
    again = retry_of(it)
    assert (again.state, again.said("Progressing")) == ("Pending", ("False", "WaitingForBatch"))
    assert again.said("Planned") == ("Unknown", "Listing")
    assert ("Job", "again-plan") not in it.cluster.objects
    it.finished()
    root = f"out/{it.cluster.objects[KEY]['metadata']['uid']}/{it.status['fingerprint']}/"
    assert page(it, "again")["input"]["retryOf"]["s3"]["prefix"] == root
    assert page(it, "again")["input"]["retryOf"]["images"]["prefix"] == "in/"
    assert again.status["retryOf"]["output"]["prefix"] == root
    assert again.state == "Complete"


def test_a_retry_of_nothing_says_so_and_goes_on_when_it_is_there() -> None:
    it = Batch().finished()
    again = retry_of(it, "elsewhere")
    assert again.said("Planned") == again.said("Progressing") == ("False", "InputNotFound")
    assert again.message("Planned") == "VisionBatch elsewhere does not exist"
    it.cluster.create(batch("elsewhere"))
    settle(it.operator)
    assert again.state == "Complete"


def test_a_retry_goes_on_when_the_batch_that_it_retries_is_deleted() -> None:
    it = Batch().finished()
    again = retry_of(it)
    assert again.state == "Planning"
    before = page(it, "again")
    it.cluster.delete(KEY)
    again.look()
    assert page(it, "again") == before
    settle(it.operator)
    assert again.state == "Complete"
    assert page(it, "again") == before


def test_where_a_batch_writes_is_kept_though_its_pipelines_storage_moves() -> None:
    it = Batch.__new__(Batch)
    it.cluster, it.key = Cluster(), KEY
    it.operator = Operator(it.cluster)
    it.cluster.create(pipeline(storage={"s3": {"bucket": "before"}}))
    settle(it.operator)
    it.cluster.create(batch(output={}))
    it.look().planned()
    assert it.status["output"] == {"bucket": "before", "prefix": "sightline/batches/", "pathStyle": False}
    it.cluster.edit(PIPELINE, storage={"s3": {"bucket": "after"}})
    it.finished()
    assert page(it, "nightly")["output"]["s3"]["bucket"] == "before"
    assert it.state == "Complete"


# --- the pipeline ----------------------------------------------------------------------------------------------------


def alone(**spec: Any) -> Batch:
    """A batch whose pipeline does not exist."""
    it = Batch.__new__(Batch)
    it.cluster = Cluster()
    it.operator = Operator(it.cluster)
    it.cluster.create(batch(**spec))
    return it.look()


def test_a_batch_waits_for_its_pipeline_and_goes_on_when_it_comes() -> None:
    it = alone()
    assert (it.state, it.said("Progressing")) == ("Pending", ("False", "WaitingForPipeline"))
    assert it.jobs == set()
    it.cluster.create(pipeline())
    settle(it.operator)
    assert it.state == "Complete"


def test_planning_needs_no_serving_pipeline_and_running_does() -> None:
    it = alone()
    it.cluster.bad.add("sightline-describe:0.1.0")
    it.cluster.create(pipeline())
    settle(it.operator)
    assert (it.state, it.jobs) == ("Pending", {"plan"})
    assert it.said("Progressing") == ("False", "WaitingForPipeline")
    assert "Back-off pulling image" in it.message("Progressing")
    it.cluster.bad.clear()
    settle(it.operator)
    assert it.state == "Complete"


def test_a_pipeline_that_stops_serving_lets_the_workers_wait_and_is_told() -> None:
    it = Batch().running(1)
    it.cluster.objects[PIPELINE]["status"]["conditions"][-1] |= {"status": "False", "message": "CaptionNotReady"}
    it.operator.relist()
    it.operator.reconcile(KEY)
    assert it.said("Progressing") == ("False", "BackendUnavailable")
    run = it.job("run")
    assert run is not None
    assert run["spec"]["suspend"] is False


@pytest.mark.parametrize("gone", [True, False], ids=["deleted", "suspended"])
def test_workers_stop_while_the_pipeline_is_away_and_go_on_when_it_is_back(gone: bool) -> None:
    it = Batch().running(1)
    old = it.cluster.objects[PIPELINE]
    if gone:
        it.cluster.delete(PIPELINE)
    else:
        it.cluster.edit(PIPELINE, suspend=True)
    it.look()
    run = it.job("run")
    assert run is not None
    assert run["spec"]["suspend"] is True
    assert it.said("Progressing") == ("False", "WaitingForPipeline")
    if gone:
        it.cluster.create({k: old[k] for k in ("apiVersion", "kind", "spec")} | {"metadata": {"name": "scenes"}})
    else:
        it.cluster.edit(PIPELINE, suspend=False)
    settle(it.operator)
    assert it.state == "Complete"
    assert it.cluster.created["Job", run["metadata"]["name"]] == 1


OTHER = {"inferenceService": {"model": {"name": "another"}, "gpu": {"count": 1}}}


def test_a_changed_pipeline_ends_the_batch() -> None:
    it = Batch().running(1)
    it.cluster.edit(PIPELINE, caption=OTHER)
    it.look()
    assert (it.state, it.said("Failed")) == ("Failed", ("True", "PipelineChanged"))
    assert it.job("run") is None  # its workers are stopped


def test_a_changed_pipeline_pauses_the_batch_until_its_revision_is_back() -> None:
    it = Batch(onPipelineChange="Pause").running(1)
    it.cluster.edit(PIPELINE, caption=OTHER)
    it.look()
    assert (it.state, it.said("Progressing")) == ("Paused", ("False", "PipelineChanged"))
    run = it.job("run")
    assert run is not None
    assert run["spec"]["suspend"] is True
    it.cluster.edit(PIPELINE, caption=pipeline()["spec"]["caption"])
    settle(it.operator)
    assert it.state == "Complete"


def test_workers_that_notice_the_change_first_are_started_again_when_the_revision_is_back() -> None:
    it = Batch(onPipelineChange="Pause").running(1)
    it.cluster.worker_exit["run"] = Exit.REVISION_MISMATCH
    it.cluster.edit(PIPELINE, caption=OTHER)
    it.cluster.jobs()
    it.look()
    assert it.state == "Paused"
    assert it.job("run") is None
    it.cluster.worker_exit.clear()
    it.cluster.edit(PIPELINE, caption=pipeline()["spec"]["caption"])
    settle(it.operator)
    assert it.state == "Complete"


def test_a_change_of_the_pipeline_that_changes_no_answer_changes_no_batch() -> None:
    it = Batch().running(1)
    it.cluster.edit(PIPELINE, gateway={"auth": {"none": True}, "replicas": 3})
    settle(it.operator)
    assert it.state == "Complete"


# --- the user's wishes -----------------------------------------------------------------------------------------------


def test_pausing_suspends_the_job_and_resuming_goes_on() -> None:
    it = Batch().running(1).edit(desiredState="Paused")
    assert (it.state, it.said("Progressing")) == ("Paused", ("False", "Paused"))
    run = it.job("run")
    assert run is not None
    assert run["spec"]["suspend"] is True
    assert run["spec"]["completions"] == 4  # only the switch was applied
    it.edit(desiredState="Running")
    assert it.state == "Running"
    it.finished()
    assert it.state == "Complete"


def test_a_batch_that_is_paused_from_the_start_does_nothing() -> None:
    it = Batch(desiredState="Paused")
    assert (it.state, it.jobs) == ("Paused", set())
    it.edit(desiredState="Running").finished()
    assert it.state == "Complete"


def test_somebody_who_resumes_a_paused_job_by_hand_is_overruled() -> None:
    it = Batch().running(1).edit(desiredState="Paused")
    run = it.job("run")
    assert run is not None
    run["spec"]["suspend"] = False
    it.cluster.update(run)
    it.look()
    assert it.job("run")["spec"]["suspend"] is True  # type: ignore[index]


def test_parallelism_can_change_while_it_runs() -> None:
    it = Batch(parallelism=2).running(1).edit(parallelism=3)
    run = it.job("run")
    assert run is not None
    assert run["spec"]["parallelism"] == 3
    it.edit(parallelism=100)
    assert it.job("run")["spec"]["parallelism"] == 4  # type: ignore[index]  # no more than shards


@pytest.mark.parametrize("moment", ["before", "planning", "running", "finishing"])
def test_cancelling_ends_it_wherever_it_is(moment: str) -> None:
    it = {
        "before": alone,
        "planning": Batch,
        "running": lambda: Batch().running(1),
        "finishing": lambda: Batch().running(1).work(6),
    }[moment]()
    it.edit(desiredState="Cancelled")
    assert (it.state, it.said("Failed")) == ("Cancelled", ("True", "Cancelled"))
    unfinished = [j for j in it.cluster.of_kind("Job") if not j.get("status", {}).get("conditions")]
    assert unfinished == []
    before = it.cluster.writes
    settle(it.operator)
    assert it.cluster.writes == before


def test_work_that_is_done_is_complete_even_when_cancelled_in_the_same_moment() -> None:
    it = Batch().running(1).work(6)
    while it.cluster.jobs():
        pass
    it.edit(desiredState="Cancelled")
    assert it.state == "Complete"


# --- ways to fail ----------------------------------------------------------------------------------------------------


def test_a_batch_expires_after_its_window() -> None:
    it = Batch(completionWindow="1h").running(1)
    assert it.status["expiresTime"] == stamp(START + timedelta(hours=1))
    later(it.cluster, minutes=59)
    it.look()
    assert it.state == "Running"
    later(it.cluster, minutes=1)
    it.look()
    assert (it.state, it.said("Failed")) == ("Expired", ("True", "Expired"))
    assert it.job("run") is None


def test_the_expiry_is_looked_for_in_time() -> None:
    it = alone(completionWindow="1h")
    assert it.decide().requeue_seconds == 3600


@pytest.mark.parametrize(
    ("code", "words", "reason"),
    [
        (Exit.UNUSABLE, "", "PlanCorrupt"),
        (Exit.UNUSABLE, "AccessDenied", "AccessDenied"),
        (Exit.REVISION_MISMATCH, "", "PipelineChanged"),
    ],
)
def test_an_exit_code_that_fails_the_job_ends_the_batch(code: Exit, words: str, reason: str) -> None:
    it = Batch().running(0)
    it.cluster.worker_exit["run"] = code
    it.cluster.jobs()
    for key, pod in it.cluster.objects.items():
        if key[0] == "Pod" and "bad" in key[1]:
            state = pod["status"]["containerStatuses"][0]["state"]
            state["terminated"]["message"] = f'{{"reason": "{words}", "message": "it broke"}}'
    it.look()
    assert it.said("Failed") == ("True", reason)
    assert it.message("Failed") == "it broke"


def test_the_code_is_read_from_the_jobs_own_message_when_the_pod_is_gone() -> None:
    it = Batch().running(0)
    it.cluster.worker_exit["run"] = Exit.REVISION_MISMATCH
    it.cluster.jobs()
    for key in [key for key in it.cluster.objects if key[0] == "Pod" and "bad" in key[1]]:
        it.cluster.delete(key)
    it.look()
    assert it.said("Failed") == ("True", "PipelineChanged")


def test_shards_that_were_given_up_do_not_stop_the_finish() -> None:
    it = Batch().running(0)
    it.cluster.worker_exit["run"] = Exit.SHARD_CORRUPT
    it.cluster.jobs()
    it.look()
    assert it.state == "Finishing"
    assert it.status["shards"]["failed"] == 1
    it.cluster.worker_exit.clear()
    it.finished()
    assert it.said("Complete") == ("True", "SucceededWithErrors")
    assert "1 shards given up" in it.message("Complete")


def test_a_finish_that_finds_parts_missing_fails_the_batch() -> None:
    it = Batch(Cluster(worker_exit={"finish": 1})).finished()
    assert it.said("Failed") == ("True", "PlanCorrupt")
    assert it.message("Failed") == "it broke"


@pytest.mark.parametrize(
    ("limit", "ends"), [({"count": 3}, True), ({"count": 9}, False), ({"percent": 10}, True), ({"percent": 50}, False)]
)
def test_too_many_failed_items_stop_it_early(limit: dict[str, int], ends: bool) -> None:
    it = Batch(Cluster(failing=5), maxFailedItems=limit).running(0).work(1)
    assert (it.said("Failed") == ("True", "TooManyFailures")) is ends
    assert (it.job("run") is None) is ends


# --- after the end ---------------------------------------------------------------------------------------------------


def test_after_the_end_nothing_is_ever_made_again() -> None:
    it = Batch().finished()
    for thing in it.cluster.of_kind("Job"):
        it.cluster.delete(("Job", thing["metadata"]["name"]))
    it.cluster.delete(("ConfigMap", "nightly-batch"))
    later(it.cluster, days=30)
    settle(it.operator)
    assert it.jobs == set()
    assert it.state == "Complete"


def test_after_the_end_the_status_stays_and_only_its_generation_moves() -> None:
    it = Batch().finished()
    before = copy.deepcopy(it.status)
    it.edit(parallelism=9)
    generation = it.cluster.objects[KEY]["metadata"]["generation"]
    assert it.status["observedGeneration"] == generation
    assert all(c["observedGeneration"] == generation for c in it.status["conditions"])
    it.status["observedGeneration"] = before["observedGeneration"]
    for row in it.status["conditions"]:
        row["observedGeneration"] = before["conditions"][0]["observedGeneration"]
    assert it.status == before


def test_the_batch_is_deleted_when_its_time_after_the_end_is_over() -> None:
    it = Batch(ttlAfterFinished="1h").finished()
    later(it.cluster, minutes=20)
    decision = it.decide()
    assert decision.actions == ()
    assert decision.requeue_seconds == 2400
    later(it.cluster, minutes=40)
    (gone,) = it.decide().actions
    assert isinstance(gone, Delete)
    assert (gone.kind, gone.name, gone.uid) == (*KEY, it.cluster.objects[KEY]["metadata"]["uid"])
    it.look()
    assert it.jobs == set()
    assert KEY not in it.cluster.objects


_states = st.sampled_from(["Complete", "Failed"])


@settings(max_examples=60, deadline=None)
@given(
    _states,
    st.sampled_from(["Running", "Paused", "Cancelled"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_no_world_makes_a_terminal_batch_create_anything(
    end: str, wish: str, has_pipeline: bool, has_progress: bool, minutes: int
) -> None:
    it = _shared()
    cr = copy.deepcopy(it.operator.seen[KEY])
    row = {"type": end, "status": "True", "reason": "X", "message": "", "lastTransitionTime": stamp(START)}
    cr["status"] = {"conditions": [row], "completionTime": stamp(START), "state": end}
    cr["spec"]["desiredState"] = wish
    world = it.operator.world(cr)
    others = world.others if has_pipeline else {}
    progress = {"total": 1, "succeeded": 0} if has_progress else None
    world = _with(world, others=others, progress=progress, owned={}, now=START + timedelta(minutes=minutes))
    assert not any(isinstance(action, Apply) for action in decide_batch(cr, world, SETTINGS).actions)


_SHARED: list[Batch] = []


def _shared() -> Batch:
    if not _SHARED:
        _SHARED.append(Batch())
        _SHARED[0].operator.relist()
    return _SHARED[0]


# --- queues ----------------------------------------------------------------------------------------------------------


class Queued(Batch):
    """A batch in a queue of Kueue, whose Workload the test plays."""

    def __init__(self) -> None:
        super().__init__(Cluster(kinds=frozenset({"InferenceService", "Workload"})), queueName="gpus")
        self.planned()
        run = self.job("run")
        assert run is not None
        self.name = run["metadata"]["name"]
        owner = {"kind": "Job", "name": self.name, "uid": run["metadata"]["uid"]}
        metadata = {"name": "job-w", "ownerReferences": [owner]}
        body = {"apiVersion": "kueue.x-k8s.io/v1beta1", "kind": "Workload", "metadata": metadata}
        self.cluster.create(body | {"spec": {"active": True}, "status": {"conditions": []}})
        self.look()

    def tell(self, *conditions: dict[str, Any]) -> Queued:
        self.cluster.set_status(("Workload", "job-w"), {"conditions": list(conditions)})
        self.look()
        return self

    def switch(self, *, suspended: bool) -> Queued:
        run = self.job("run")
        assert run is not None
        run["spec"]["suspend"] = suspended
        self.cluster.update(run)
        self.look()
        return self


def kueue(type: str, status: str, reason: str = "X", message: str = "") -> dict[str, Any]:
    return {"type": type, "status": status, "reason": reason, "message": message}


def test_a_queued_batch_waits_for_quota_and_its_job_is_never_touched() -> None:
    it = Queued().tell(kueue("QuotaReserved", "False", "Pending", "insufficient quota for nvidia.com/gpu"))
    assert it.said("Admitted") == ("False", "WaitingForQuota")
    assert it.message("Progressing") == "insufficient quota for nvidia.com/gpu"
    assert it.state == "Pending"
    assert it.status["workload"] == "job-w"
    it.tell(kueue("QuotaReserved", "True"), kueue("Admitted", "True")).switch(suspended=False)
    assert it.said("Admitted") == ("True", "Admitted")
    assert it.state == "Running"
    wanted = it.edit(parallelism=2).decide().actions
    assert not any(isinstance(action, Apply) and action.manifest["kind"] == "Job" for action in wanted)
    assert "Admitted" in [note.reason for note in it.operator.notes]


def test_preemption_and_a_lost_queue_are_told() -> None:
    it = Queued()
    it.tell(kueue("Evicted", "True", "Preempted", "preempted by a workload of higher priority"))
    assert it.said("Admitted") == ("False", "Preempted")
    assert "Preempted" in [note.reason for note in it.operator.notes]
    it.tell(kueue("QuotaReserved", "False", "Inadmissible", "LocalQueue gpus doesn't exist"))
    assert it.said("Admitted") == ("False", "QueueNotFound")


def test_pausing_a_queued_batch_is_kueues_own_switch() -> None:
    it = Queued().switch(suspended=False).edit(desiredState="Paused")
    workload = it.cluster.objects["Workload", "job-w"]
    assert workload["spec"] == {"active": False}
    assert it.job("run")["spec"]["suspend"] is False  # type: ignore[index]  # that switch is Kueue's
    it.edit(desiredState="Running")
    assert it.cluster.objects["Workload", "job-w"]["spec"] == {"active": False}  # by the book, somebody else's stop
    mine = {"manager": FIELD_MANAGER, "operation": "Apply", "fieldsV1": {"f:spec": {"f:active": {}}}}
    it.cluster.objects["Workload", "job-w"]["metadata"]["managedFields"] = [mine]
    it.look()
    assert it.cluster.objects["Workload", "job-w"]["spec"] == {"active": True}


def test_a_queue_without_kueue_is_told() -> None:
    it = Batch(queueName="gpus")
    assert it.said("Admitted") == ("False", "QueueNotFound")
    assert "Kueue is not installed" in it.message("Admitted")


def test_without_a_queue_it_is_not_queued() -> None:
    assert Batch().said("Admitted") == ("True", "NotQueued")


# --- stalls ----------------------------------------------------------------------------------------------------------


def test_ten_minutes_without_an_item_are_a_stall_and_the_estimate_goes() -> None:
    it = Batch().running(0)
    later(it.cluster, minutes=3)
    it.look().work(2)
    assert it.status["eta"]
    later(it.cluster, minutes=9)
    it.look()
    assert it.said("Stalled") == ("False", "None")
    later(it.cluster, minutes=2)
    it.look()
    assert it.said("Stalled") == ("True", "NoProgress")
    assert "eta" not in it.status
    it.work(2)
    assert it.said("Stalled") == ("False", "None")
    assert it.status["eta"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            {
                "conditions": [
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no room"}
                ]
            },
            "PodsUnschedulable",
        ),
        (
            {"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull", "message": "no image"}}}]},
            "ImagePullFailed",
        ),
        (
            {
                "containerStatuses": [
                    {"state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "s" not found'}}}
                ]
            },
            "SecretNotFound",
        ),
    ],
    ids=["no room", "no image", "no secret"],
)
def test_pods_that_do_not_start_are_a_stall_with_their_message(fault: dict[str, Any], reason: str) -> None:
    it = Batch()
    plan = it.job("plan")
    assert plan is not None
    it.cluster._make_pod(plan, "nightly-plan-JOB-x", plan["spec"]["template"], {})
    it.cluster.set_status(("Pod", "nightly-plan-JOB-x"), {"phase": "Pending", **fault})
    it.look()
    assert it.said("Stalled") == ("True", reason)
    assert it.message("Stalled").startswith("pod nightly-plan-JOB-x: ")
    if reason == "SecretNotFound":
        assert it.said("Planned") == ("False", "AccessDenied")
    it.cluster.delete(("Pod", "nightly-plan-JOB-x"))
    it.look()
    assert it.said("Stalled") == ("False", "None")


def test_a_shard_that_was_given_up_is_a_stall_while_others_run() -> None:
    it = Batch().running(1)
    run = it.job("run")
    assert run is not None
    it.cluster.set_status(("Job", run["metadata"]["name"]), run["status"] | {"failedIndexes": "2"})
    it.look()
    assert it.said("Stalled") == ("True", "ShardFailing")
    assert "ShardFailed" in [note.reason for note in it.operator.notes]


# --- progress --------------------------------------------------------------------------------------------------------


def test_rate_and_time_left_follow_the_gateways_counts() -> None:
    it = Batch(Cluster(items=4000, shards=4)).running(0)
    assert "throughput" not in it.status
    later(it.cluster, seconds=100)
    it.work(2)
    assert it.status["throughput"] == {"itemsPerSecond": "10", "window": "5m"}
    assert it.status["eta"] == "5m"
    assert it.status["estimatedCompletionTime"] == stamp(it.cluster.now + timedelta(seconds=300))
    later(it.cluster, seconds=300)
    it.work(2)
    assert 5 < float(it.status["throughput"]["itemsPerSecond"]) < 6  # 3.3 now, 10 before, 63 % of it is new


def test_counts_are_written_at_each_per_cent_or_half_minute_and_no_oftener() -> None:
    it = Batch(Cluster(items=100_000, shards=2)).running(0)
    it.operator.relist()
    cr, world = it.operator.seen[KEY], it.operator.world(it.operator.seen[KEY])
    cr["status"]["lastProgressTime"] = stamp(START)

    def counted(succeeded: int, seconds: int) -> int:
        said = {"total": 100_000, "succeeded": succeeded}
        changed = _with(world, progress=said, now=START + timedelta(seconds=seconds))
        return decide_batch(cr, changed, SETTINGS).status["progress"]["succeeded"]

    assert counted(999, 29) == 0
    assert counted(1000, 1) == 1000
    assert counted(1, 30) == 1


def test_counts_never_go_back() -> None:
    it = Batch().running(2)
    assert it.status["progress"]["succeeded"] == 20
    it.operator.relist()
    cr, world = it.operator.seen[KEY], it.operator.world(it.operator.seen[KEY])
    stale = _with(world, progress={"total": 40, "succeeded": 10}, now=START + timedelta(minutes=2))
    assert decide_batch(cr, stale, SETTINGS).status["progress"]["succeeded"] == 20


def test_without_the_gateway_shards_tell_how_far_it_is() -> None:
    it = Batch(Cluster(gateway_answers=False)).running(2)
    assert it.status["shards"]["completed"] == 2
    assert it.status["progress"]["percent"] == 50
    assert it.status["progress"]["done"].startswith("~")
    assert it.status["progress"]["remaining"] == it.status["progress"]["total"] // 2
    it.finished()
    assert it.status["progress"]["succeeded"] == 40  # the finish Job's last words


def test_milestones_are_told_once() -> None:
    it = Batch().running(3).finished()
    told = [note.note for note in it.operator.notes if note.reason == "Progress"]
    assert told == ["25 %: 10/40 items", "50 %: 20/40 items", "75 %: 30/40 items"]
    assert [note.reason for note in it.operator.notes].count("Completed") == 1


def test_throttled_workers_progress_and_waiting_ones_do_not() -> None:
    it = Batch().running(1)
    it.operator.relist()
    cr, world = it.operator.seen[KEY], it.operator.world(it.operator.seen[KEY])
    for waiting, status in (("Throttled", "True"), ("BackendUnavailable", "False"), ("Nonsense", "True")):
        said = {"total": 40, "succeeded": 10, "waiting": waiting}
        found = decide_batch(cr, _with(world, progress=said), SETTINGS).status["conditions"]
        row = next(c for c in found if c["type"] == "Progressing")
        assert (row["status"], row["reason"]) == (status, waiting if waiting != "Nonsense" else "Running")


# --- what strangers say ----------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
_fields = st.dictionaries(
    st.sampled_from(
        ["total", "succeeded", "failed", "shards", "items", "plan", "failures", "usage", "outputs", "bytes"]
    ),
    _json,
)


@given(_fields)
def test_whatever_a_gateway_says_is_read_or_ignored(said: dict[str, Any]) -> None:
    for read in (Progress.read(said), Plan.read(said)):
        assert read is None or read == type(read).read(said)


@given(st.text(max_size=40) | st.builds(__import__("json").dumps, _fields))
def test_whatever_a_worker_says_last_is_read(text: str) -> None:
    assert isinstance(LastWords.read(text), LastWords)


@settings(max_examples=40, deadline=None)
@given(_fields)
def test_no_answer_of_a_gateway_stops_a_decision(said: dict[str, Any]) -> None:
    it = _shared()
    cr = it.operator.seen[KEY]
    decision = decide_batch(cr, _with(it.operator.world(cr), progress=said), SETTINGS)
    assert decision.status["state"]


@pytest.mark.parametrize(("ranges", "count"), [("", 0), ("3", 1), ("0,3-5,9", 5)])
def test_indexes_are_counted(ranges: str, count: int) -> None:
    assert count_indexes(ranges) == count


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0s"), (59.9, "59s"), (60, "1m"), (4320, "1h12m"), (90_000, "1d1h")]
)
def test_durations_are_spoken(seconds: float, words: str) -> None:
    assert spoken(seconds) == words


def test_a_batch_that_cannot_be_rendered_says_why_and_touches_nothing() -> None:
    it = Batch()
    it.cluster.objects[KEY]["spec"]["parallelism"] = "many"
    before = len(it.cluster.objects)
    it.look()
    assert it.said("Progressing") == ("False", "InvalidSpec")
    assert "parallelism" in it.message("Progressing")
    assert len(it.cluster.objects) == before
