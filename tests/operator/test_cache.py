"""The cache: nothing old replaces anything new, nothing gone comes back, and whoever is concerned is told."""

import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sightline_operator.observe.cache import Cache, Ref, named_by, trimmed
from sightline_operator.observe.reflector import selects
from sightline_operator.queue import Key
from sightline_operator.resources import PODS
from sightline_operator.settings import API_VERSION, FIELD_MANAGER, OWNED_LABEL, OWNED_VALUE
from tests.operator.harness import pipeline

P = Key("VisionPipeline", "ns", "p")


def cr(version: int = 1, name: str = "p", **spec: Any) -> dict[str, Any]:
    obj = pipeline(name, "ns", **spec)
    obj["metadata"] |= {"uid": f"uid-{name}", "resourceVersion": str(version)}
    return obj


def child(version: int, kind: str = "ConfigMap", name: str = "c", uid: str = "", **more: Any) -> dict[str, Any]:
    owner = {"apiVersion": API_VERSION, "kind": "VisionPipeline", "name": "p", "uid": "uid-p"}
    metadata = {"name": name, "namespace": "ns", "uid": uid or f"uid-{name}", "resourceVersion": str(version)}
    metadata |= {"labels": {OWNED_LABEL: OWNED_VALUE}, "ownerReferences": [owner]}
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, **more}


def told() -> tuple[Cache, list[Key]]:
    keys: list[Key] = []
    return Cache(keys.append), keys


def test_an_older_version_changes_nothing() -> None:
    cache, keys = told()
    assert cache.put(child(5, data={"v": "new"}))
    keys.clear()
    assert not cache.put(child(4, data={"v": "old"}))
    assert not cache.put(child(5, data={"v": "same"}))
    assert (cache.get("ConfigMap", "ns", "c") or {})["data"] == {"v": "new"}
    assert keys == []


def test_an_answer_that_comes_after_its_own_event_takes_that_news_back() -> None:
    news: list[tuple[Key, tuple[Ref, int]]] = []
    known: list[tuple[Key, tuple[Ref, int]]] = []
    cache = Cache(
        on_news=lambda key, what: news.append((key, what)), on_known=lambda key, what: known.append((key, what))
    )
    cache.put(cr())
    news.clear()
    cache.put(child(5))  # the watch was first
    assert news == [(P, (Ref("ConfigMap", "ns", "c"), 5))]
    cache.put(child(5), by=P)
    assert known == news
    cache.put(child(4), by=P)  # an older answer says nothing about it
    assert known == news


def test_an_object_that_changed_is_read_anew() -> None:
    cache, _ = told()
    for version in (5, 6, 7):
        cache.put(child(version, data={"v": str(version)}))
        for _ in range(2):
            assert (cache.get("ConfigMap", "ns", "c") or {})["data"] == {"v": str(version)}
    cache.remove(child(8))
    assert cache.get("ConfigMap", "ns", "c") is None


def test_what_is_gone_does_not_come_back_by_a_late_answer() -> None:
    cache, _ = told()
    cache.put(child(5))
    cache.remove(child(6))
    assert not cache.put(child(5))
    assert cache.get("ConfigMap", "ns", "c") is None
    assert cache.put(child(7, uid="another"))


def test_the_end_of_a_predecessor_does_not_take_its_successor_along() -> None:
    cache, _ = told()
    cache.put(child(7, uid="second"))
    assert not cache.remove(child(6, uid="first"))
    assert cache.get("ConfigMap", "ns", "c") is not None


def test_a_child_tells_its_owner_and_our_own_write_does_not() -> None:
    cache, keys = told()
    cache.put(child(1))
    assert keys == [P]
    cache.put(child(2), by=P)
    assert keys == [P]
    cache.remove(child(3))
    assert keys == [P, P]


def test_a_child_that_changes_owners_tells_both() -> None:
    cache, keys = told()
    cache.put(child(1))
    keys.clear()
    other = child(2)
    other["metadata"]["ownerReferences"][0] |= {"name": "q", "uid": "uid-q"}
    cache.put(other)
    assert set(keys) == {P, Key("VisionPipeline", "ns", "q")}
    assert cache.owned("uid-p") == []


def test_a_referenced_inference_service_and_its_pods_tell_the_pipelines_that_name_it() -> None:
    cache, keys = told()
    ours = cr(caption={"inferenceServiceRef": {"name": "vlm"}})
    cache.put(ours)
    keys.clear()
    isvc = child(2, "InferenceService", "vlm")
    del isvc["metadata"]["ownerReferences"]
    cache.put(isvc)
    pod = child(3, "Pod", "vlm-1")
    pod["metadata"] |= {"labels": {"serving.kserve.io/inferenceservice": "vlm"}, "ownerReferences": []}
    cache.put(pod)
    about = {"kind": "Pod", "name": "vlm-1", "namespace": "ns", "uid": "uid-vlm-1"}
    event = {"kind": "Event", "metadata": {"name": "e", "namespace": "ns"}, "reason": "FailedMount"}
    assert cache.put(event | {"involvedObject": about})
    assert not cache.put(event | {"involvedObject": about})
    assert keys == [P, P, P]
    assert [e["reason"] for e in cache.warnings("uid-vlm-1")] == ["FailedMount"]
    cache.put(cr(4))
    keys.clear()
    cache.put(isvc | {"metadata": isvc["metadata"] | {"resourceVersion": "9"}})
    assert keys == []


def test_a_pipeline_tells_its_batches_and_a_batch_its_pipeline() -> None:
    cache, keys = told()
    batch = cr(1, "b") | {"kind": "VisionBatch", "spec": {"pipelineRef": {"name": "p"}}}
    cache.put(batch)
    assert set(keys) == {Key("VisionBatch", "ns", "b"), P}
    keys.clear()
    cache.put(cr(2))
    assert set(keys) == {Key("VisionBatch", "ns", "b"), P}


def test_a_workload_tells_the_batch_of_its_job() -> None:
    cache, keys = told()
    cache.put(child(1, "Job", "j"))
    keys.clear()
    workload = child(2, "Workload", "w")
    workload["metadata"]["ownerReferences"] = [{"apiVersion": "batch/v1", "kind": "Job", "name": "j", "uid": "uid-j"}]
    cache.put(workload)
    assert keys == [P]


def test_a_list_takes_away_what_it_does_not_hold_and_only_that() -> None:
    cache, keys = told()
    cache.put(child(1, name="stays"))
    cache.put(child(2, name="goes"))
    cache.put(child(9, name="newer"))
    elsewhere = child(3, name="elsewhere")
    elsewhere["metadata"]["namespace"] = "other"
    cache.put(elsewhere)
    keys.clear()
    cache.replace("ConfigMap", lambda obj: obj["metadata"]["namespace"] == "ns", [child(1, name="stays")], "5")
    assert [ref.name for ref in cache.refs("ConfigMap")] == ["stays", "newer", "elsewhere"]
    assert keys == [P]


def test_only_our_own_managed_fields_are_kept() -> None:
    obj = child(1)
    ours = {"manager": FIELD_MANAGER, "operation": "Apply", "fieldsV1": {"f:data": {}}}
    status = ours | {"subresource": "status"}
    obj["metadata"]["managedFields"] = [ours, status, {"manager": "kubectl", "operation": "Update"}]
    assert trimmed(obj)["metadata"]["managedFields"] == [ours]


def test_what_an_object_names() -> None:
    spec = {
        "caption": {"inferenceService": {"runtime": {"name": "rt"}}},
        "enhance": {"inferenceServiceRef": {"name": "llm"}},
        "pipelineRef": {"name": "p"},
        "input": {"retryOf": {"batchName": "b"}},
    }
    wanted = {("ServingRuntime", "rt"), ("InferenceService", "llm"), ("VisionPipeline", "p"), ("VisionBatch", "b")}
    metadata = {"name": "x", "namespace": "ns"}
    assert named_by({"kind": "VisionBatch", "metadata": metadata, "spec": spec}) == wanted


def test_the_two_pod_watches_share_nothing() -> None:
    ours, kserve = (selects(resource) for resource in PODS)
    isvc = "serving.kserve.io/inferenceservice"
    for labels, expected in (
        ({OWNED_LABEL: OWNED_VALUE}, (True, False)),
        ({OWNED_LABEL: OWNED_VALUE, isvc: "x"}, (True, False)),
        ({isvc: "x"}, (False, True)),
        ({}, (False, False)),
    ):
        obj = {"metadata": {"labels": labels}}
        assert (ours(obj), kserve(obj)) == expected


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.9))
def test_any_order_repetition_or_loss_of_events_ends_in_the_same_cache_after_a_list(seed: int, loss: float) -> None:
    """The history of five objects is told in any order, some of it twice, some not at all; then they are listed."""
    rng = random.Random(seed)
    version, live, events = 0, dict[str, dict[str, Any]](), list[tuple[str, dict[str, Any]]]()
    for _ in range(40):
        version += 1
        name = f"c{rng.randrange(5)}"
        uid = live[name]["metadata"]["uid"] if name in live else f"{name}-{version}"
        obj = child(version, name=name, uid=uid, data={"v": str(version)})
        if name in live and rng.random() < 0.3:
            del live[name]
            events.append(("DELETED", obj))
        else:
            live[name] = obj
            events.append(("MODIFIED", obj))
    told_ = [event for event in events for _ in range(rng.choice([1, 1, 2])) if rng.random() >= loss]
    rng.shuffle(told_)
    cache = Cache()
    for type_, obj in told_:
        cache.remove(obj) if type_ == "DELETED" else cache.put(obj)
    cache.replace("ConfigMap", lambda obj: True, list(live.values()), str(version))
    assert {ref.name: cache.get(*ref) for ref in cache.refs("ConfigMap")} == live
    assert {obj["metadata"]["name"] for obj in cache.owned("uid-p")} == set(live)
    assert cache.version(Ref("ConfigMap", "ns", "c9")) == 0
