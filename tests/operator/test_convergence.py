"""Whatever is lost, doubled, late or cut short on the way, the same wishes end in the same cluster."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .simulation import (
    Cluster,
    Crash,
    Operator,
    batch,
    is_true,
    key_of,
    later,
    pipeline,
    settle,
    summary,
    work,
)

PIPELINE = ("VisionPipeline", "scenes")
BATCH = ("VisionBatch", "nightly")
THEIRS = {
    "apiVersion": "serving.kserve.io/v1beta1",
    "kind": "InferenceService",
    "metadata": {"name": "theirs"},
    "spec": {"predictor": {"containers": [{"name": "c", "image": "theirs:1"}]}},
}
MODEL = {"inferenceService": {"gpu": {"count": 1}}}
EDITS: list[dict[str, Any]] = [
    {"caption": {"inferenceService": {"model": {"name": "other"}, "gpu": {"count": 1}}}},
    {"caption": {"inferenceServiceRef": {"name": "theirs"}}},
    {"caption": MODEL},
    {"enhance": None},
    {"enhance": MODEL},
    {"suspend": True},
    {"suspend": False},
    {"gateway": {"auth": {"none": True}, "logLevel": "debug"}},
    {"gateway": {"auth": {"none": True}, "autoscaling": {"maxReplicas": 3}}},
    {"gateway": {"auth": {"none": True}, "replicas": 2}},
    {"networkPolicy": "Unmanaged"},
]


def cluster_of(*things: dict[str, Any]) -> Cluster:
    cluster = Cluster()
    for thing in (THEIRS, *things):
        cluster.create(thing)
    return cluster


_CALM: dict[str, dict[str, Any]] = {}


def calm(*things: dict[str, Any], edits: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """What comes of the same wishes when nothing goes wrong."""
    wishes = json.dumps([things, edits], sort_keys=True)
    if wishes not in _CALM:
        _CALM[wishes] = undisturbed(*things, edits=edits)
    return _CALM[wishes]


def undisturbed(*things: dict[str, Any], edits: list[dict[str, Any]] | None) -> dict[str, Any]:
    cluster = cluster_of(*things)
    operator = Operator(cluster)
    for edit in edits or []:
        cluster.edit(PIPELINE, **edit)
    settle(operator)
    return summary(cluster)


# --- events in any order, lost, doubled; the operator dying at any write ---------------------------------------------

MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("deliver"), st.integers(0, 30)),
        st.tuples(st.just("again"), st.integers(0, 60)),
        st.tuples(st.just("lose"), st.integers(0, 30)),
        st.tuples(st.just("relist"), st.just(0)),
        st.tuples(st.just("reconcile"), st.integers(0, 3)),
        st.tuples(st.just("step"), st.integers(0, 3)),
        st.tuples(st.just("die"), st.integers(0, 6)),
        st.tuples(st.just("wait"), st.integers(1, 90)),
        st.tuples(st.just("edit"), st.integers(0, len(EDITS) - 1)),
    ),
    min_size=10,
    max_size=60,
)
CONTROLLERS = ("deployment", "kserve", "kubelet", "job")
ROUGH = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Rough:
    """A watch that a test may disturb as it likes, and an operator that it may kill."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.operator = cluster, Operator(cluster)
        self.waiting: list[Any] = []
        self.read = 0
        self.edits: list[dict[str, Any]] = []

    def move(self, what: str, n: int) -> None:
        self.waiting += self.cluster.log[self.read :]
        self.read = len(self.cluster.log)
        if what == "deliver" and self.waiting:
            self.operator.deliver(self.waiting.pop(n % len(self.waiting)))
        elif what == "again" and self.cluster.log:
            self.operator.deliver(self.cluster.log[-1 - n % len(self.cluster.log)])
        elif what == "lose" and self.waiting:
            self.waiting.pop(n % len(self.waiting))
        elif what == "relist":
            self.waiting.clear()
            self.operator.relist()
        elif what == "reconcile":
            self.reconcile(n)
        elif what == "step":
            self.cluster.step(CONTROLLERS[n])
        elif what == "die":
            self.operator.dies_after = self.operator.writes + n
            self.reconcile(n)
            self.operator = Operator(self.cluster)
            self.operator.relist()
        elif what == "wait":
            later(self.cluster, seconds=n)
        elif what == "edit":
            self.edits.append(EDITS[n])
            self.cluster.edit(PIPELINE, **EDITS[n])

    def reconcile(self, n: int) -> None:
        keys = self.operator.mine()
        if keys:
            try:
                self.operator.reconcile(keys[n % len(keys)])
            except Crash:
                self.operator = Operator(self.cluster)


@ROUGH
@given(MOVES, st.booleans())
def test_a_pipeline_ends_the_same_whatever_happened_on_the_way(moves: list[tuple[str, int]], was_ready: bool) -> None:
    rough = Rough(cluster_of(pipeline()))
    if was_ready:
        settle(rough.operator)
    for what, n in moves:
        rough.move(what, n)
    settle(rough.operator)
    assert summary(rough.cluster) == calm(pipeline(), edits=rough.edits)
    before = rough.cluster.writes
    later(rough.cluster, days=1)
    settle(rough.operator)
    assert rough.cluster.writes == before


@ROUGH
@given(MOVES.map(lambda moves: [move for move in moves if move[0] != "edit"]))
def test_a_batch_ends_the_same_and_no_job_is_made_twice(moves: list[tuple[str, int]]) -> None:
    rough = Rough(cluster_of(pipeline(), batch()))
    made_at_the_end: dict[Any, int] | None = None
    for what, n in moves:
        rough.move(what, n)
        if made_at_the_end is None and is_true(rough.cluster.objects[BATCH], "Complete"):
            made_at_the_end = jobs_made(rough.cluster)
    if made_at_the_end is not None:
        assert jobs_made(rough.cluster) == made_at_the_end
    settle(rough.operator)
    assert list(jobs_made(rough.cluster).values()) == [1, 1, 1]
    assert summary(rough.cluster) == calm(pipeline(), batch())


def jobs_made(cluster: Cluster) -> dict[Any, int]:
    return {key: count for key, count in cluster.created.items() if key[0] == "Job"}


def test_one_event_lost_at_a_time() -> None:
    """Every single event of the way to ready, dropped once."""
    quiet = cluster_of(pipeline(enhance=None))
    operator = Operator(quiet)
    settle(operator)
    golden, events = summary(quiet), len(quiet.log)
    assert events > 20
    for lost in range(events):
        cluster = cluster_of(pipeline(enhance=None))
        operator, told = Operator(cluster), 0
        for _ in range(40):
            cluster.settle_controllers()
            for number in range(told, len(cluster.log)):
                if number != lost:
                    operator.deliver(cluster.log[number])
            told = len(cluster.log)
            if not any([operator.reconcile(key) for key in operator.mine()]) and told == len(cluster.log):
                break
        settle(operator)  # the repair period's relist
        assert summary(cluster) == golden, lost


# --- a crash at every write ------------------------------------------------------------------------------------------


def scenario(operator: Operator, done: int) -> int:
    """Create, become ready, change, run a batch, reduce. Returns how many of its five acts are done when it dies."""
    cluster = operator.cluster
    acts = [
        lambda: cluster.create(pipeline()),
        lambda: cluster.create(batch()),
        lambda: cluster.edit(PIPELINE, gateway={"auth": {"none": True}, "logLevel": "debug"}),
        lambda: cluster.edit(PIPELINE, enhance=None),
        lambda: cluster.edit(PIPELINE, batches=[{"name": "import", "template": {"spec": work()}}]),
    ]
    for act in acts[done:]:
        act()
        done += 1
        try:
            settle(operator)
        except Crash:
            return done
    return done


def test_a_crash_at_every_write_changes_nothing_in_the_end() -> None:
    quiet = Operator(cluster_of())
    assert scenario(quiet, 0) == 5
    golden, writes = summary(quiet.cluster), quiet.writes
    assert writes > 40
    for k in range(writes):
        cluster = cluster_of()
        first = Operator(cluster, dies_after=k)
        done = scenario(first, 0)
        second = Operator(cluster)
        settle(second)
        scenario(second, done)
        assert summary(cluster) == golden, k
        twice = [key for key, count in cluster.created.items() if count > 1 and key[0] in ("Job", "VisionBatch")]
        assert twice == [], k
        assert first.writes + second.writes <= writes + 2, k


# --- misconfigure, then revert ---------------------------------------------------------------------------------------

GOOD = pipeline()["spec"]
URL = "https://nowhere.internal/v1"
MISTAKES: dict[str, dict[str, Any]] = {
    "image of the runtime": {"caption": {"inferenceService": {"runtime": {"image": "typo:1"}, "gpu": {"count": 1}}}},
    "runtime by name": {"caption": {"inferenceService": {"runtime": {"name": "none"}, "model": {"name": "m"}}}},
    "model": {"caption": {"inferenceService": {"model": {"name": "broken"}, "runtime": {"image": "broken:1"}}}},
    "more GPUs than there are": {"caption": {"inferenceService": {"gpu": {"count": 64}}}},
    "replicas": {"caption": {"inferenceService": {"gpu": {"count": 1}, "replicas": {"min": 50, "max": 50}}}},
    "reference": {"caption": {"inferenceServiceRef": {"name": "nobody"}}},
    "endpoint": {"caption": {"endpoint": {"url": URL, "model": "m"}}},
    "secret of the model": {
        "caption": {"inferenceService": {"model": {"name": "m", "tokenSecretRef": {"name": "no", "key": "t"}}}}
    },
    "secret of the gateway": {"gateway": {"auth": {"apiKeysSecretRef": {"name": "no", "key": "keys"}}}},
    "secret of the store": {
        "storage": {"s3": {"bucket": "images", "credentialsSecretRef": {"name": "no"}}},
    },
    "image of the gateway": {"gateway": {"auth": {"none": True}, "image": "typo:1"}},
    "no replica of the gateway": {"gateway": {"auth": {"none": True}, "replicas": 0}},
    "overrides of the pods": {
        "gateway": {
            "auth": {"none": True},
            "podTemplateOverrides": {"spec": {"volumes": [{"name": "x", "secret": {"secretName": "no"}}]}},
        }
    },
    "metric of the other mode": {
        "caption": {"inferenceService": {"scaling": {"metric": "RPS"}, "replicas": {"min": 1, "max": 2}}}
    },
    "no source at all": {"caption": {}},
    "suspend": {"suspend": True},
    "enhance step must work": {
        "enhance": {"endpoint": {"url": URL, "model": "m"}},
        "enhancePolicy": {"onFailure": "Fail"},
    },
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_and_its_reversal_end_where_it_began(mistake: dict[str, Any]) -> None:
    cluster = cluster_of(pipeline())
    cluster.bad, cluster.broken = {"typo:1"}, {"broken:1"}
    cluster.endpoints = {URL: False}
    operator = Operator(cluster)
    settle(operator)
    golden = summary(cluster)
    assert is_true(cluster.objects[PIPELINE], "Ready")
    cluster.edit(PIPELINE, **mistake)
    settle(operator)
    assert not is_true(cluster.objects[PIPELINE], "Ready")
    ready = next(c for c in cluster.objects[PIPELINE]["status"]["conditions"] if c["type"] == "Ready")
    assert ready["message"]
    cluster.edit(PIPELINE, **{name: GOOD.get(name) for name in mistake})
    settle(operator)
    assert is_true(cluster.objects[PIPELINE], "Ready")
    assert summary(cluster) == golden


# --- what others do to the children ----------------------------------------------------------------------------------


def test_every_deleted_child_is_made_again() -> None:
    cluster = cluster_of(pipeline(gateway={"auth": {"none": True}, "autoscaling": {"maxReplicas": 3}}))
    operator = Operator(cluster)
    settle(operator)
    golden = summary(cluster)
    uid = cluster.objects[PIPELINE]["metadata"]["uid"]
    children = [key for key, thing in cluster.objects.items() if uid in str(thing["metadata"].get("ownerReferences"))]
    assert len(children) > 10
    for child in children:
        cluster.delete(child)
        settle(operator)
        assert summary(cluster) == golden, child


def test_every_field_of_every_child_is_put_back_and_foreign_fields_stay() -> None:
    cluster = cluster_of(pipeline())
    operator = Operator(cluster)
    settle(operator)
    golden = summary(cluster)
    uid = cluster.objects[PIPELINE]["metadata"]["uid"]
    children = [thing for thing in cluster.objects.values() if uid in str(thing["metadata"].get("ownerReferences"))]
    for child in copy.deepcopy(children):
        for part in [name for name in child if name not in ("apiVersion", "kind", "metadata", "status")]:
            edited = copy.deepcopy(cluster.objects[key_of(child)])
            was_mapping = isinstance(edited[part], dict)
            edited[part] = {"somebody": "else"} if was_mapping else not edited[part]
            cluster.update(edited)
            operator.relist()
            operator.reconcile(PIPELINE)
            settle(operator)
            if was_mapping:
                assert cluster.objects[key_of(child)][part].pop("somebody") == "else"
            assert summary(cluster) == golden, (key_of(child), part)
