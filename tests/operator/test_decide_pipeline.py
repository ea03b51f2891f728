"""What is decided about a VisionPipeline: children, leftovers, conditions and their reasons, schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest

from sightline_operator.contract import GatewayState
from sightline_operator.decide import decide_pipeline
from sightline_operator.decide.decision import Apply, Decision, Delete
from sightline_operator.observe.world import World
from sightline_operator.settings import RenderSettings

from .simulation import (
    NAMESPACE,
    SETTINGS,
    START,
    Cluster,
    Operator,
    is_true,
    key_of,
    later,
    pipeline,
    settle,
    stamp,
    work,
)

KEY = ("VisionPipeline", "scenes")


def start(cluster: Cluster | None = None, **spec: Any) -> Operator:
    """A pipeline in a cluster, everything at rest."""
    operator = Operator(cluster or Cluster())
    operator.cluster.create(pipeline(**spec))
    settle(operator)
    return operator


def condition(operator: Operator, type: str) -> dict[str, Any]:
    status = operator.cluster.objects[KEY]["status"]
    return next(c for c in status["conditions"] if c["type"] == type)


def said(operator: Operator, type: str) -> tuple[str, str]:
    found = condition(operator, type)
    return found["status"], found["reason"]


def kinds(cluster: Cluster, kind: str) -> list[str]:
    return [name for k, name in sorted(cluster.objects) if k == kind]


def owned(name: str, **more: Any) -> dict[str, Any]:
    return {"inferenceService": {"model": {"name": name}, **more}}


# --- from nothing to ready -------------------------------------------------------------------------------------------


def test_a_pipeline_becomes_ready_and_then_nothing_is_written() -> None:
    operator = start()
    assert said(operator, "Ready") == ("True", "AllReady")
    assert said(operator, "Accepted") == ("True", "Valid")
    assert said(operator, "CaptionReady") == ("True", "Ready")
    assert said(operator, "EnhanceReady") == ("True", "Ready")
    assert said(operator, "GatewayReady") == ("True", "Ready")
    assert said(operator, "Degraded") == ("False", "None")
    before = operator.cluster.writes
    later(operator.cluster, hours=3)
    settle(operator)
    assert operator.cluster.writes == before


def test_at_first_sight_nothing_is_known_and_all_children_are_applied() -> None:
    cluster = Cluster()
    operator = Operator(cluster)
    cluster.create(pipeline())
    operator.relist()
    decision = operator.decide(KEY)
    assert decision is not None
    found = {c["type"]: (c["status"], c["reason"]) for c in decision.status["conditions"]}
    assert found["CaptionReady"] == ("Unknown", "Deploying")
    assert found["GatewayReady"] == ("Unknown", "Deploying")
    assert found["Ready"] == ("Unknown", "CaptionNotReady")
    applied = {action.manifest["kind"] for action in decision.actions if isinstance(action, Apply)}
    assert applied >= {"InferenceService", "Deployment", "Service", "ConfigMap", "ServiceAccount", "NetworkPolicy"}
    assert not any(isinstance(action, Delete) for action in decision.actions)


def test_a_decision_is_a_function_of_object_and_world() -> None:
    operator = start()
    one, other = operator.decide(KEY), operator.decide(KEY)
    assert one == other
    assert one is not None


def test_the_inputs_are_left_as_they_were() -> None:
    operator = start()
    cr, world = operator.seen[KEY], operator.world(operator.seen[KEY])
    before = copy.deepcopy((cr, world))
    decide_pipeline(cr, world, SETTINGS)
    assert (cr, world) == before


def test_the_status_tells_where_everything_is() -> None:
    status = start(enhance=None).cluster.objects[KEY]["status"]
    assert status["observedGeneration"] == 1
    assert status["url"] == f"http://scenes-gateway.{NAMESPACE}.svc"
    assert status["steps"] == [
        {
            "name": "caption",
            "source": "InferenceService",
            "inferenceService": "scenes-caption",
            "url": "http://scenes-caption-predictor.vision.svc.cluster.local",
            "model": "demonstration",
            "ready": True,
            "readyReplicas": 1,
            "revisionReady": True,
        }
    ]
    gateway = status["gateway"]
    assert (gateway["replicas"], gateway["readyReplicas"], gateway["ready"]) == (1, 1, "1/1")
    assert "sightline.dev/pipeline=scenes" in gateway["selector"]
    assert gateway["image"] == "sightline-pipeline:0.1.0"
    assert status["batches"] == {"active": 0}


def test_an_object_that_is_going_away_is_left_alone() -> None:
    operator = start()
    cr = operator.seen[KEY]
    cr["metadata"]["deletionTimestamp"] = stamp(START)
    decision = operator.decide(KEY)
    assert decision == Decision((), cr["status"])
    cr["spec"] = {"nonsense": True}  # not even read: a look-up that fails must not hold up a deletion
    assert operator.decide(KEY) == Decision((), cr["status"])


# --- what stands in its way ------------------------------------------------------------------------------------------


def _bad_image(cluster: Cluster) -> None:
    cluster.bad.add("sightline-describe:0.1.0")


def _broken(cluster: Cluster) -> None:
    cluster.broken.add("sightline-describe:0.1.0")


def _no_gpu(cluster: Cluster) -> None:
    cluster.gpus = 0


def _slow(cluster: Cluster) -> None:
    cluster.slow = True


def _bad_gateway(cluster: Cluster) -> None:
    cluster.bad.add("sightline-pipeline:0.1.0")


def _crashing_gateway(cluster: Cluster) -> None:
    cluster.broken.add("sightline-pipeline:0.1.0")


FAULTS: list[tuple[Callable[[Cluster], None], str, str, str]] = [
    (_bad_image, "CaptionReady", "ImagePullFailed", "Back-off pulling image"),
    (_broken, "CaptionReady", "ModelLoadFailed", "weights are missing (Error, exit code 1)"),
    (_no_gpu, "CaptionReady", "InsufficientGPU", "3 Insufficient nvidia.com/gpu"),
    (_slow, "CaptionReady", "ModelLoading", "is being loaded"),
    (_bad_gateway, "GatewayReady", "ImagePullFailed", "Back-off pulling image"),
    (_crashing_gateway, "GatewayReady", "CrashLooping", "weights are missing (Error, exit code 1)"),
]


@pytest.mark.parametrize(("breaks", "type", "reason", "words"), FAULTS, ids=[f"{r[1]} {r[2]}" for r in FAULTS])
def test_the_deepest_cause_is_copied_up_and_recovers_by_itself(
    breaks: Callable[[Cluster], None], type: str, reason: str, words: str
) -> None:
    cluster = Cluster()
    breaks(cluster)
    operator = start(cluster)
    assert said(operator, type) == ("False", reason)
    assert words in condition(operator, type)["message"]
    summary = condition(operator, "Ready")
    assert (summary["status"], summary["reason"]) == (
        "False",
        "CaptionNotReady" if type == "CaptionReady" else "GatewayNotReady",
    )
    assert words in summary["message"]
    cluster.bad.clear()
    cluster.broken.clear()
    cluster.slow = False
    cluster.gpus = 8
    settle(operator)
    assert said(operator, "Ready") == ("True", "AllReady")


def test_a_missing_secret_is_told_by_the_pods_and_heals_when_it_is_there() -> None:
    operator = start(gateway={"auth": {"apiKeysSecretRef": {"name": "vision-keys", "key": "keys"}}})
    assert said(operator, "Accepted") == ("False", "SecretNotFound")
    assert "vision-keys" in condition(operator, "Accepted")["message"]
    assert said(operator, "Ready") == ("False", "Invalid")
    operator.cluster.secrets.add("vision-keys")
    settle(operator)
    assert said(operator, "Accepted") == ("True", "Valid")
    assert said(operator, "Ready") == ("True", "AllReady")


def test_without_kserve_everything_else_is_made_and_it_recovers_when_it_comes() -> None:
    cluster = Cluster(kinds=frozenset())
    operator = start(cluster)
    assert said(operator, "Accepted") == ("False", "CRDMissing")
    assert said(operator, "Ready") == ("False", "Invalid")
    assert kinds(cluster, "InferenceService") == []
    assert kinds(cluster, "Deployment") == ["scenes-gateway"]
    cluster.kinds = frozenset({"InferenceService"})
    settle(operator)
    assert said(operator, "Ready") == ("True", "AllReady")
    cluster.kinds = frozenset()  # discovery fails for a moment: nothing is known of the kind, nothing is deleted
    settle(operator)
    assert kinds(cluster, "InferenceService") == ["scenes-caption", "scenes-enhance"]


def test_a_route_without_the_gateway_api_is_told_and_the_rest_serves() -> None:
    operator = start(gateway={"auth": {"none": True}, "httpRoute": {"parentRefs": [{"name": "public"}]}})
    assert said(operator, "Accepted") == ("False", "CRDMissing")
    assert "Gateway API" in condition(operator, "Accepted")["message"]
    assert said(operator, "Ready") == ("True", "AllReady")


def test_somebody_elses_object_with_a_childs_name_is_left_alone() -> None:
    cluster = Cluster()
    foreign = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "scenes-gateway"}, "spec": {"mine": True}}
    cluster.create(foreign)
    operator = start(cluster)
    assert said(operator, "Accepted") == ("False", "NameConflict")
    assert "Service scenes-gateway" in condition(operator, "Accepted")["message"]
    assert cluster.objects["Service", "scenes-gateway"]["spec"] == {"mine": True}
    decision = operator.decide(KEY)
    assert decision is not None
    assert ("Service", "scenes-gateway") not in {
        key_of(action.manifest) for action in decision.actions if isinstance(action, Apply)
    }
    cluster.delete(("Service", "scenes-gateway"))
    settle(operator)
    assert said(operator, "Accepted") == ("True", "Valid")


def test_a_referenced_service_that_does_not_exist_is_an_invalid_reference() -> None:
    operator = start(caption={"inferenceServiceRef": {"name": "theirs"}}, enhance=None)
    assert said(operator, "Accepted") == ("False", "InvalidReference")
    assert said(operator, "CaptionReady") == ("False", "EndpointUnreachable")
    theirs = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": "theirs"}}
    operator.cluster.create(theirs | {"spec": {"predictor": {"containers": [{"name": "c", "image": "theirs:1"}]}}})
    settle(operator)
    assert said(operator, "Ready") == ("True", "AllReady")
    assert kinds(operator.cluster, "InferenceService") == ["theirs"]


def test_a_runtime_that_kserve_does_not_find_is_told_and_heals_when_it_comes() -> None:
    operator = start(caption={"inferenceService": {"runtime": {"name": "vllm"}, "model": {"name": "x"}}}, enhance=None)
    words = "Waiting for runtime vllm to become available"
    assert said(operator, "Accepted") == ("False", "RuntimeNotFound")
    assert said(operator, "CaptionReady") == ("False", "ModelLoadFailed")
    assert condition(operator, "CaptionReady")["message"] == words
    operator.cluster.runtimes.add("vllm")
    settle(operator)
    assert said(operator, "Accepted") == ("True", "Valid")
    assert said(operator, "Ready") == ("True", "AllReady")


def test_an_external_step_is_as_ready_as_its_url() -> None:
    url = "https://models.internal/v1"
    endpoint = {"endpoint": {"url": url, "model": "gpt-oss-20b"}}
    cluster = Cluster(endpoints={url: False})
    operator = start(cluster, enhance=endpoint)
    assert said(operator, "EnhanceReady") == ("False", "EndpointUnreachable")
    assert said(operator, "Degraded") == ("True", "EnhanceUnavailable")
    assert said(operator, "Ready") == ("True", "DegradedButServing")
    cluster.endpoints[url] = True
    settle(operator)
    assert said(operator, "Ready") == ("True", "AllReady")
    cluster.endpoints.clear()
    settle(operator)
    assert said(operator, "EnhanceReady") == ("Unknown", "Deploying")


# --- what the gateway's pods say -------------------------------------------------------------------------------------


def seen(operator: Operator, *states: GatewayState | None, unheard: bool = False) -> Operator:
    """The operator decides once, and writes, having heard this of the gateway's pods."""
    world = operator.world(operator.seen[KEY])
    gateways = {f"pod-{number}": state for number, state in enumerate(states)}
    decision = decide_pipeline(operator.seen[KEY], replace(world, gateways=gateways, unheard=unheard), SETTINGS)
    operator.cluster.objects[KEY]["status"] = copy.deepcopy(dict(decision.status))
    operator.relist()
    return operator


WELL, NO_ENHANCER, NO_CAPTIONER = (GatewayState(frozenset(steps)) for steps in ((), ("enhance",), ("caption",)))


def test_a_step_that_the_gateway_does_not_call_is_not_ready_and_recovers() -> None:
    operator = seen(start(), NO_ENHANCER)
    assert said(operator, "EnhanceReady") == ("False", "CircuitOpen")
    assert said(operator, "Degraded") == ("True", "EnhanceUnavailable")
    assert "does not call it for a while" in condition(operator, "Degraded")["message"]
    assert said(operator, "Ready") == ("True", "DegradedButServing")
    row = operator.cluster.objects[KEY]["status"]["steps"][1]
    assert (row["name"], row["ready"]) == ("enhance", False)
    seen(operator, WELL)
    assert said(operator, "EnhanceReady") == ("True", "Ready")
    assert said(operator, "Ready") == ("True", "AllReady")


def test_without_the_caption_step_it_does_not_serve() -> None:
    operator = seen(start(), NO_CAPTIONER)
    assert said(operator, "CaptionReady") == ("False", "CircuitOpen")
    assert said(operator, "Ready") == ("False", "CaptionNotReady")
    assert condition(operator, "Ready")["message"].startswith("CircuitOpen: ")


def test_one_pod_that_still_calls_it_is_enough_and_a_silent_one_says_nothing() -> None:
    assert said(seen(start(), NO_ENHANCER, WELL), "EnhanceReady") == ("True", "Ready")
    assert said(seen(start(), NO_ENHANCER, None), "EnhanceReady") == ("False", "CircuitOpen")
    assert said(seen(start(), None, None), "EnhanceReady") == ("True", "Ready")


def test_until_all_pods_have_been_asked_what_they_said_last_holds() -> None:
    away = GatewayState(storage="s3_unavailable")
    operator = seen(start(storage={"s3": {"bucket": "images"}}), NO_CAPTIONER)
    assert said(seen(operator, unheard=True), "CaptionReady") == ("False", "CircuitOpen")
    assert said(seen(operator, WELL), "CaptionReady") == ("True", "Ready")
    assert said(seen(operator, away), "Degraded") == ("True", "StorageUnavailable")
    assert said(seen(operator, unheard=True), "Degraded") == ("True", "StorageUnavailable")
    assert said(seen(operator, WELL), "Degraded") == ("False", "None")
    assert said(seen(operator, unheard=True), "Degraded") == ("False", "None")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("s3_access_denied", "bucket images: the store does not take the gateway's credentials"),
        ("s3_not_found", "bucket images: the store has no such bucket"),
        ("s3_unavailable", "bucket images: the store cannot be reached"),
        ("s3_anything", "bucket images: s3_anything"),
    ],
)
def test_a_bucket_that_cannot_be_read_degrades_it(code: str, words: str) -> None:
    operator = seen(start(storage={"s3": {"bucket": "images"}}), WELL, GatewayState(storage=code))
    assert said(operator, "Degraded") == ("True", "StorageUnavailable")
    assert condition(operator, "Degraded")["message"] == words
    assert said(operator, "Ready") == ("True", "DegradedButServing")


def test_with_on_failure_fail_a_missing_enhancer_is_not_ready() -> None:
    cluster = Cluster(endpoints={"https://e/v1": False})
    step = {"endpoint": {"url": "https://e/v1", "model": "m"}}
    operator = start(cluster, enhance=step, enhancePolicy={"onFailure": "Fail"})
    assert said(operator, "Ready") == ("False", "EnhanceNotReady")


def test_without_an_enhance_step_it_is_not_configured_and_nothing_is_missing() -> None:
    operator = start(enhance=None)
    assert said(operator, "EnhanceReady") == ("False", "NotConfigured")
    assert said(operator, "Ready") == ("True", "AllReady")


def test_a_passed_progress_deadline_is_no_cause() -> None:
    """KServe says so after ten minutes of loading, and takes it back."""
    operator = start(Cluster(slow=True))
    isvc = operator.seen["InferenceService", "scenes-caption"]
    late = {"type": "PredictorReady", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "timed out"}
    isvc["status"]["conditions"] = [late, {"type": "Ready", "status": "False"}]
    decision = operator.decide(KEY)
    assert decision is not None
    found = {c["type"]: c["reason"] for c in decision.status["conditions"]}
    assert found["CaptionReady"] == "ModelLoading"


def test_fewer_pods_than_asked_for_is_degraded() -> None:
    cluster = Cluster(gpus=1)
    operator = start(cluster, caption=owned("m", gpu={"count": 1}, replicas={"min": 2, "max": 2}), enhance=None)
    assert said(operator, "CaptionReady") == ("False", "InsufficientGPU")  # KServe wants all of them
    isvc = operator.seen["InferenceService", "scenes-caption"]
    isvc["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    decision = operator.decide(KEY)
    assert decision is not None
    found = {c["type"]: (c["status"], c["reason"]) for c in decision.status["conditions"]}
    assert found["Degraded"] == ("True", "PartialReplicas")
    assert found["Ready"] == ("True", "DegradedButServing")


def test_suspending_stops_all_pods_and_resuming_brings_them_back() -> None:
    operator = start()
    operator.cluster.edit(KEY, suspend=True)
    settle(operator)
    assert {said(operator, type) for type in ("CaptionReady", "EnhanceReady", "GatewayReady", "Ready")} == {
        ("False", "Suspended")
    }
    assert kinds(operator.cluster, "Pod") == []
    assert len(kinds(operator.cluster, "InferenceService")) == 2
    operator.cluster.edit(KEY, suspend=False)
    settle(operator)
    assert said(operator, "Ready") == ("True", "AllReady")


# --- the revision that answers ---------------------------------------------------------------------------------------


def test_old_pods_that_answer_do_not_make_the_new_revision_ready() -> None:
    operator = start(caption=owned("a"), enhance=None)
    operator.cluster.edit(KEY, caption=owned("b"))
    operator.relist()
    operator.reconcile(KEY)
    operator.relist()  # the InferenceService is the new one; KServe has not moved and still says Ready
    operator.reconcile(KEY)
    assert is_true(operator.cluster.objects["InferenceService", "scenes-caption"], "Ready")
    assert said(operator, "CaptionReady") == ("False", "StaleRevision")
    assert operator.cluster.objects[KEY]["status"]["steps"][0]["revisionReady"] is False
    settle(operator)
    assert said(operator, "CaptionReady") == ("True", "Ready")


def test_another_number_of_replicas_is_no_other_revision() -> None:
    operator = start(enhance=None)
    pods = kinds(operator.cluster, "Pod")
    operator.cluster.edit(KEY, caption__inferenceService__replicas={"min": 2, "max": 2})
    settle(operator)
    assert set(pods) < set(kinds(operator.cluster, "Pod"))
    assert said(operator, "Ready") == ("True", "AllReady")


def test_an_operator_with_other_images_restarts_nothing_until_the_spec_changes() -> None:
    operator = start()
    newer = RenderSettings(images={name: image.replace("0.1.0", "0.2.0") for name, image in SETTINGS.images.items()})
    cr, world = operator.seen[KEY], operator.world(operator.seen[KEY])
    assert decide_pipeline(cr, world, newer) == decide_pipeline(cr, world, SETTINGS)
    edited = copy.deepcopy(cr)
    edited["metadata"]["generation"] += 1
    decision = decide_pipeline(edited, world, newer)
    assert "sightline-pipeline:0.2.0" in str(decision.actions)
    assert decision.status["images"] == dict(newer.images)
    willing = copy.deepcopy(cr)
    willing["spec"]["updatePolicy"] = "WithOperator"
    assert "sightline-pipeline:0.2.0" in str(decide_pipeline(willing, world, newer).actions)


def test_an_address_that_is_unknown_for_a_moment_does_not_roll_the_gateway() -> None:
    theirs = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": "theirs"}}
    cluster = Cluster()
    cluster.create(theirs | {"spec": {"predictor": {"containers": [{"name": "c", "image": "theirs:1"}]}}})
    operator = start(cluster, caption={"inferenceServiceRef": {"name": "theirs"}}, enhance=None)
    url = "http://theirs.elsewhere:8080"
    live = operator.seen["InferenceService", "theirs"]
    live["status"]["address"] = {"url": f"{url}/v1/models/theirs"}
    decision = operator.decide(KEY)
    assert decision is not None
    (page,) = [a.manifest for a in decision.actions if isinstance(a, Apply) and a.manifest["kind"] == "ConfigMap"]
    assert url in str(page["data"])
    assert f"{url}/v1" not in str(page["data"])
    operator.seen[KEY]["status"] = decision.status
    del live["status"]["address"]
    again = operator.decide(KEY)
    assert again is not None
    assert page in [a.manifest for a in again.actions if isinstance(a, Apply)]


# --- leftovers -------------------------------------------------------------------------------------------------------


def test_a_step_that_became_a_reference_gives_up_its_service() -> None:
    cluster = Cluster()
    operator = start(cluster)
    theirs = {"apiVersion": "serving.kserve.io/v1beta1", "kind": "InferenceService", "metadata": {"name": "theirs"}}
    cluster.create(theirs | {"spec": {"predictor": {"containers": [{"name": "c", "image": "theirs:1"}]}}})
    cluster.edit(KEY, enhance={"inferenceServiceRef": {"name": "theirs"}})
    operator.relist()
    operator.reconcile(KEY)
    assert "scenes-enhance" in kinds(cluster, "InferenceService")  # the old gateway's pods still call it
    settle(operator)
    assert kinds(cluster, "InferenceService") == ["scenes-caption", "theirs"]
    assert said(operator, "Ready") == ("True", "AllReady")


def test_an_autoscaler_that_was_switched_off_goes_and_replicas_are_ours_again() -> None:
    gateway = {"auth": {"none": True}, "autoscaling": {"maxReplicas": 4}, "replicas": 2}
    operator = start(gateway=gateway)
    assert kinds(operator.cluster, "HorizontalPodAutoscaler") == ["scenes-gateway"]
    assert "replicas" not in operator.cluster.objects["Deployment", "scenes-gateway"]["spec"]
    operator.cluster.edit(KEY, gateway={"auth": {"none": True}, "replicas": 2})
    settle(operator)
    assert kinds(operator.cluster, "HorizontalPodAutoscaler") == []
    assert operator.cluster.objects["Deployment", "scenes-gateway"]["spec"]["replicas"] == 2


def test_an_old_configuration_goes_when_no_pod_needs_it_any_more() -> None:
    operator = start()
    (old,) = kinds(operator.cluster, "ConfigMap")
    operator.cluster.edit(KEY, gateway={"auth": {"none": True}, "logLevel": "debug"})
    operator.relist()
    operator.reconcile(KEY)
    operator.relist()
    operator.reconcile(KEY)
    assert old in kinds(operator.cluster, "ConfigMap")
    assert len(kinds(operator.cluster, "ConfigMap")) == 2
    settle(operator)
    (new,) = kinds(operator.cluster, "ConfigMap")
    assert new != old


def test_a_model_that_outlives_its_pipeline_has_no_owner_and_stays_ours() -> None:
    operator = start(deletionPolicy="OrphanModels")
    isvc = operator.cluster.objects["InferenceService", "scenes-caption"]
    assert "ownerReferences" not in isvc["metadata"]
    assert said(operator, "Accepted") == ("True", "Valid")
    assert said(operator, "Ready") == ("True", "AllReady")
    operator.cluster.delete(KEY)
    assert kinds(operator.cluster, "InferenceService") == ["scenes-caption", "scenes-enhance"]
    assert kinds(operator.cluster, "Deployment") == []


# --- specs that cannot be rendered -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"caption": {}}, "exactly one of"),
        ({"caption": {"timeout": 7}}, "caption.timeout"),
        (
            {"caption": owned("m", scaling={"metric": "RPS"}, replicas={"min": 1, "max": 2})},
            "needs KServe's Knative mode",
        ),
    ],
    ids=["no source", "not the schema", "no such metric here"],
)
def test_a_spec_that_cannot_work_touches_nothing_and_says_why(spec: dict[str, Any], words: str) -> None:
    operator = start()
    operator.cluster.edit(KEY, **spec)
    before = {key: thing for key, thing in operator.cluster.objects.items() if key != KEY}
    settle(operator)
    assert said(operator, "Accepted") == ("False", "InvalidSpec")
    assert words in condition(operator, "Accepted")["message"]
    assert said(operator, "Ready") == ("False", "Invalid")
    assert condition(operator, "Accepted")["observedGeneration"] == 2
    assert {key: thing for key, thing in operator.cluster.objects.items() if key != KEY} == before
    operator.cluster.edit(KEY, **pipeline()["spec"])
    settle(operator)
    assert said(operator, "Ready") == ("True", "AllReady")


# --- events ----------------------------------------------------------------------------------------------------------


def test_events_tell_turns_and_not_levels() -> None:
    cluster = Cluster(endpoints={"https://e/v1": True})
    operator = start(cluster, enhance={"endpoint": {"url": "https://e/v1", "model": "m"}})
    assert [note.reason for note in operator.notes] == ["Ready"]
    cluster.endpoints["https://e/v1"] = False
    settle(operator)
    cluster.endpoints["https://e/v1"] = True
    settle(operator)
    assert [note.reason for note in operator.notes] == ["Ready", "Degraded", "Recovered"]
    cluster.edit(KEY, gateway={"auth": {"none": True}, "logLevel": "debug"})
    settle(operator)
    assert {"Updated", "NotReady"} <= {note.reason for note in operator.notes[3:]}


# --- batches ---------------------------------------------------------------------------------------------------------


def entry(name: str = "nightly", schedule: str | None = "0 3 * * *", **more: Any) -> dict[str, Any]:
    timing = {"schedule": schedule} if schedule else {}
    return {"name": name, "template": {"spec": work()}, **timing, **more}


def end(cluster: Cluster, name: str, type: str = "Complete") -> None:
    cluster.set_status(("VisionBatch", name), {"conditions": [{"type": type, "status": "True"}]})


class Scheduled:
    """A pipeline with batches, seen alone: the VisionBatches themselves stand still."""

    def __init__(self, *entries: dict[str, Any], **spec: Any) -> None:
        self.cluster = Cluster()
        self.operator = Operator(self.cluster)
        self.cluster.create(pipeline(batches=list(entries), **spec))
        self.look()

    def look(self) -> None:
        for _ in range(50):
            self.cluster.settle_controllers()
            self.operator.relist()
            if not self.operator.reconcile(KEY):
                return
        raise AssertionError("it does not come to rest")

    def until(self, text: str) -> list[str]:
        self.cluster.now = datetime.fromisoformat(text + "+00:00")
        self.look()
        return self.names

    @property
    def names(self) -> list[str]:
        return kinds(self.cluster, "VisionBatch")

    @property
    def row(self) -> dict[str, Any]:
        return self.cluster.objects[KEY]["status"]["schedules"][0]


def test_a_batch_without_a_schedule_is_made_once_and_never_again() -> None:
    it = Scheduled(entry("import", schedule=None))
    assert it.names == ["scenes-import"]
    made = it.cluster.objects["VisionBatch", "scenes-import"]
    assert made["spec"] == {"pipelineRef": {"name": "scenes"}} | work()
    assert made["metadata"]["ownerReferences"][0]["name"] == "scenes"
    assert it.row["lastBatch"] == "scenes-import"
    end(it.cluster, "scenes-import")
    it.cluster.delete(("VisionBatch", "scenes-import"))
    assert it.until("2026-01-09T12:00") == []


def test_labels_and_annotations_of_the_template_are_kept_and_ours_win() -> None:
    metadata = {"labels": {"team": "maps", "sightline.dev/pipeline": "x"}, "annotations": {"note": "y"}}
    it = Scheduled({"name": "import", "template": {"metadata": metadata, "spec": work()}})
    made = it.cluster.objects["VisionBatch", "scenes-import"]["metadata"]
    assert made["labels"]["team"] == "maps"
    assert made["labels"]["sightline.dev/pipeline"] == "scenes"
    assert made["annotations"] == {"note": "y"}


def test_a_scheduled_batch_is_made_when_it_is_due_and_not_before() -> None:
    it = Scheduled(entry())
    assert it.names == []
    assert it.row == {"name": "nightly", "nextScheduleTime": "2026-01-06T03:00:00Z"}
    assert it.operator.decide(KEY).requeue_seconds == 15 * 3600  # type: ignore[union-attr]
    assert it.until("2026-01-06T02:59") == []
    (name,) = it.until("2026-01-06T03:00")
    assert name == f"scenes-nightly-{int(datetime.fromisoformat('2026-01-06T03:00+00:00').timestamp()) // 60}"
    assert it.row == {
        "name": "nightly",
        "lastScheduleTime": "2026-01-06T03:00:00Z",
        "nextScheduleTime": "2026-01-07T03:00:00Z",
        "lastBatch": name,
    }
    assert it.until("2026-01-06T23:00") == [name]


def test_of_missed_runs_the_latest_is_made_once() -> None:
    it = Scheduled(entry())
    (name,) = it.until("2026-01-20T11:00")
    assert it.row["lastScheduleTime"] == "2026-01-20T03:00:00Z"
    assert it.row["lastBatch"] == name


def test_a_missed_run_past_its_starting_deadline_is_skipped() -> None:
    it = Scheduled(entry(startingDeadline="2h"))
    assert it.until("2026-01-06T11:00") == []
    assert it.row["nextScheduleTime"] == "2026-01-07T03:00:00Z"
    assert len(it.until("2026-01-07T04:00")) == 1


def test_forbid_skips_a_run_while_the_one_before_goes_on_and_allow_does_not() -> None:
    it = Scheduled(entry())
    (first,) = it.until("2026-01-06T03:00")
    assert it.until("2026-01-07T03:00") == [first]
    assert it.row["nextScheduleTime"] == "2026-01-08T03:00:00Z"
    end(it.cluster, first)
    assert it.until("2026-01-07T23:00") == [first]
    assert len(it.until("2026-01-08T03:00")) == 2
    wide = Scheduled(entry(concurrencyPolicy="Allow"))
    wide.until("2026-01-06T03:00")
    assert len(wide.until("2026-01-07T03:00")) == 2


def test_finished_batches_beyond_the_limits_go_the_oldest_first() -> None:
    it = Scheduled(entry(successfulHistoryLimit=2, failedHistoryLimit=1))
    names: list[str] = []
    for day in range(6, 12):
        (new,) = set(it.until(f"2026-01-{day:02}T03:00")) - set(names)
        names.append(new)
        end(it.cluster, new, "Failed" if day in (7, 9) else "Complete")
        it.look()
    assert it.names == [names[3], names[4], names[5]]


def test_a_suspended_entry_or_pipeline_makes_none_and_does_not_catch_up() -> None:
    it = Scheduled(entry(suspend=True))
    assert it.until("2026-01-07T12:00") == []
    it.cluster.edit(KEY, batches=[entry()])
    assert it.until("2026-01-07T12:01") == []
    assert it.row["nextScheduleTime"] == "2026-01-08T03:00:00Z"
    it.cluster.edit(KEY, suspend=True)
    assert it.until("2026-01-09T12:00") == []


def test_an_edited_schedule_counts_from_now() -> None:
    it = Scheduled(entry())
    it.cluster.edit(KEY, batches=[entry(schedule="0 11 * * *")])
    assert it.until("2026-01-06T10:00") == []
    assert it.row["nextScheduleTime"] == "2026-01-06T11:00:00Z"


def test_a_schedule_that_is_edited_to_a_denser_one_waits_for_none_of_the_old_times() -> None:
    """Three o'clock is on the new schedule, too; found on a cluster, where nothing was made until then."""
    it = Scheduled(entry(schedule="0 3 * * *"))
    before = it.row["nextScheduleTime"]
    it.cluster.edit(KEY, batches=[entry(schedule="* * * * *")])
    it.look()
    assert it.row["nextScheduleTime"] < before


def test_a_time_zone_moves_the_schedule() -> None:
    it = Scheduled(entry(timeZone="Asia/Tokyo"))
    assert it.row["nextScheduleTime"] == "2026-01-05T18:00:00Z"


@pytest.mark.parametrize(
    ("bad", "words"),
    [(entry(schedule="99 * * * *"), "minute"), (entry(timeZone="Mars/Olympus"), "Mars/Olympus")],
    ids=["schedule", "time zone"],
)
def test_a_schedule_that_cannot_be_read_is_told_and_the_rest_works(bad: dict[str, Any], words: str) -> None:
    it = Scheduled(bad, entry("other", schedule=None))
    assert it.names == ["scenes-other"]
    assert said(it.operator, "Accepted") == ("False", "InvalidSchedule")
    assert words in condition(it.operator, "Accepted")["message"]
    assert said(it.operator, "Ready") == ("True", "AllReady")


def test_a_crash_between_making_a_batch_and_remembering_it_makes_no_second_one() -> None:
    it = Scheduled(entry())
    it.cluster.now = datetime.fromisoformat("2026-01-06T03:00+00:00")
    it.operator.relist()
    decision = it.operator.decide(KEY)
    assert decision is not None
    (made,) = [a for a in decision.actions if isinstance(a, Apply) and a.is_create_only]
    it.cluster.create(made.manifest)
    assert it.until("2026-01-06T03:10") == [made.manifest["metadata"]["name"]]
    assert it.row["lastBatch"] == made.manifest["metadata"]["name"]


def test_names_of_long_pipelines_stay_within_the_limit_and_apart() -> None:
    long = "a" * 40
    names: set[str] = set()
    for suffix in ("x", "y"):
        cluster = Cluster()
        operator = Operator(cluster)
        cluster.create(pipeline(long + suffix, batches=[entry("b" * 28, schedule=None)]))
        operator.relist()
        operator.reconcile(("VisionPipeline", long + suffix))
        names.update(kinds(cluster, "VisionBatch"))
    assert len(names) == 2
    assert all(len(name) <= 52 for name in names)


def test_active_batches_are_counted() -> None:
    it = Scheduled(entry("one", schedule=None), entry("two", schedule=None))
    assert it.cluster.objects[KEY]["status"]["batches"] == {"active": 2}
    end(it.cluster, "scenes-one")
    it.look()
    assert it.cluster.objects[KEY]["status"]["batches"] == {"active": 1}


def test_the_world_may_be_empty() -> None:
    cr = pipeline()
    cr["metadata"] |= {"namespace": NAMESPACE, "uid": "u", "generation": 1}
    assert decide_pipeline(cr, World(START), SETTINGS).actions
    assert decide_pipeline(cr, replace(World(START), kinds=frozenset()), SETTINGS).actions
