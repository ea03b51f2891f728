"""The executor against a real API server: what is written, what is skipped, what is put back, what is left alone."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from sightline_operator.act.client import ApiError, Conflict
from sightline_operator.act.events import EventWriter
from sightline_operator.act.executor import Executor, Outdated
from sightline_operator.act.ownership import lost_fields
from sightline_operator.decide.decision import Apply, Decision, Delete, Note
from sightline_operator.observe.cache import Cache, Ref
from sightline_operator.queue import Key
from sightline_operator.render.v1.frame import sealed
from sightline_operator.resources import BY_KIND
from sightline_operator.settings import OWNED_LABEL, OWNED_VALUE
from tests.operator.conftest import ApiServer
from tests.operator.harness import Mortal, User, connected, pipeline


class Scene:
    """One VisionPipeline, an executor on a clock of the test's, and what it may do."""

    def __init__(self, client: Any, user: User, cr: dict[str, Any], **options: Any) -> None:
        self.client, self.user, self.cr, self.now = Mortal(client), user, cr, 1000.0
        self.cache = Cache()
        self.cache.put(cr)
        events = EventWriter(self.client, identity="test", monotonic=lambda: self.now)  # type: ignore[arg-type]
        self.executor = Executor(self.client, self.cache, events, monotonic=lambda: self.now, **options)  # type: ignore[arg-type]

    def child(self, kind: str = "ConfigMap", name: str = "child", **body: Any) -> dict[str, Any]:
        owner = {"apiVersion": self.cr["apiVersion"], "kind": self.cr["kind"], "controller": True}
        owner |= {"name": self.cr["metadata"]["name"], "uid": self.cr["metadata"]["uid"]}
        metadata = {"name": name, "namespace": self.user.namespace, "ownerReferences": [owner]}
        metadata["labels"] = {OWNED_LABEL: OWNED_VALUE}
        return sealed({"apiVersion": BY_KIND[kind].api_version, "kind": kind, "metadata": metadata, **body})

    async def act(self, *actions: Any) -> Any:
        cr = self.cache.get("VisionPipeline", self.user.namespace, self.cr["metadata"]["name"])
        assert cr is not None
        return await self.executor.act(cr, Decision(actions, {}))

    def see(self, kind: str, name: str) -> None:
        """What the watch would bring."""
        live = self.user.get(kind, name)
        ref = Ref(kind, self.user.namespace, name)
        self.cache.absent(ref) if live is None else self.cache.put({"kind": kind, **live})

    @property
    def children(self) -> list[str]:
        return [call for call in self.client.calls if not call.startswith("create_event")]


@pytest.fixture
def user(apiserver: ApiServer, namespace: str) -> Iterator[User]:
    with User(apiserver, namespace) as somebody:
        yield somebody


@pytest.fixture
async def scene(apiserver: ApiServer, user: User) -> AsyncIterator[Scene]:
    cr = user.apply(pipeline("p", user.namespace))
    async with connected(apiserver) as client:
        yield Scene(client, user, cr)


DEPLOYMENT = {
    "replicas": 2,
    "selector": {"matchLabels": {"a": "b"}},
    "template": {
        "metadata": {"labels": {"a": "b"}},
        "spec": {
            "containers": [
                {
                    "name": "c",
                    "image": "i:1",
                    "args": ["--x", "1"],
                    "env": [{"name": "E", "value": "1"}],
                    "ports": [{"containerPort": 8080}],
                    "resources": {"limits": {"cpu": "1000m", "memory": "1024Mi"}},
                    "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                }
            ],
            "volumes": [{"name": "v", "emptyDir": {}}],
        },
    },
}


async def test_what_was_applied_is_not_applied_again_nor_by_the_next_process(scene: Scene, user: User) -> None:
    """Quantities that the API server rewrites, defaults and list keys it adds make no difference."""
    child = scene.child("Deployment", spec=DEPLOYMENT)
    await scene.act(Apply(child))
    await scene.act(Apply(child))
    assert len(scene.children) == 1
    live = user.get("Deployment", "child")
    assert live is not None
    assert live["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] == {"cpu": "1", "memory": "1Gi"}
    assert lost_fields(child, live) == []
    fresh = Scene(scene.client._client, user, scene.cr)
    fresh.see("Deployment", "child")
    await fresh.act(Apply(child))
    assert fresh.children == []


@pytest.mark.parametrize("is_forgotten", [False, True])
async def test_the_children_of_a_successor_of_the_same_name_are_new_and_nobody_s_damage(
    scene: Scene, user: User, is_forgotten: bool
) -> None:
    await scene.act(Apply(scene.child(data={"a": "1"})))
    user.delete("ConfigMap", "child")
    user.delete("VisionPipeline", "p")
    if is_forgotten:
        scene.executor.forget(Key("VisionPipeline", user.namespace, "p"))
    scene.cr = user.apply(pipeline("p", user.namespace))
    scene.cache.put(scene.cr)
    scene.see("ConfigMap", "child")
    report = await scene.act(Apply(scene.child(data={"a": "1"})))
    assert report.created == ["ConfigMap child"]
    assert report.drift is None


MUTATIONS = {
    "a scalar": ({"spec": {"replicas": 7}}, "spec.replicas"),
    "an image": ("image", "spec.template.spec.containers[c].image"),
    "an atomic list": ("args", "spec.template.spec.containers[c].args"),
    "an item of a keyed list": ("env", "spec.template.spec.containers[c].env[E].value"),
    "a removed item": ("no env", "spec.template.spec.containers[c].env[E]"),
    "a quantity": ("memory", "spec.template.spec.containers[c].resources.limits.memory"),
    "a label": ({"metadata": {"labels": {OWNED_LABEL: None, "x": "y"}}}, f"metadata.labels.{OWNED_LABEL}"),
    "the mark": ({"metadata": {"annotations": {"sightline.dev/hash": "0"}}}, "metadata.annotations.sightline.dev/hash"),
    "the owner": ({"metadata": {"ownerReferences": None}}, None),
}


def mutated(container: dict[str, Any], what: str) -> dict[str, Any]:
    changed = json.loads(json.dumps(container))
    match what:
        case "image":
            changed["image"] = "evil:1"
        case "args":
            changed["args"] = ["--y"]
        case "env":
            changed["env"][0]["value"] = "2"
        case "no env":
            del changed["env"]
        case "memory":
            changed["resources"]["limits"]["memory"] = "2Gi"
    return changed


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m != "the owner"])
async def test_a_field_of_ours_that_somebody_changes_is_put_back_and_told(
    scene: Scene, user: User, mutation: str
) -> None:
    child = scene.child("Deployment", spec=DEPLOYMENT)
    await scene.act(Apply(child))
    before = user.get("Deployment", "child")
    assert before is not None
    patch, path = MUTATIONS[mutation]
    if isinstance(patch, str):
        container = mutated(before["spec"]["template"]["spec"]["containers"][0], patch)
        patch = {"spec": {"template": {"spec": {"containers": [container]}}}}
    user.merge("Deployment", "child", patch)
    scene.see("Deployment", "child")
    report = await scene.act(Apply(child))
    after = user.get("Deployment", "child")
    assert after is not None
    assert after["spec"] == before["spec"]
    assert OWNED_LABEL in after["metadata"]["labels"]
    assert report.drift["object"] == "Deployment/child"
    assert any(
        field == path or field.startswith(f"{path}.") or path.startswith(f"{field}") for field in report.drift["fields"]
    )
    assert [event["reason"] for event in user.events()].count("DriftRepaired") == 1


@pytest.mark.parametrize(
    "patch",
    [
        {"metadata": {"annotations": {"theirs": "x"}}},
        {"metadata": {"labels": {"theirs": "x"}}},
        {"spec": {"revisionHistoryLimit": 3}},
        {"spec": {"template": {"spec": {"nodeSelector": {"disk": "fast"}}}}},
    ],
    ids=["annotation", "label", "defaulted field", "foreign field"],
)
async def test_a_field_that_is_not_ours_stays(scene: Scene, user: User, patch: dict[str, Any]) -> None:
    child = scene.child("Deployment", spec=DEPLOYMENT)
    await scene.act(Apply(child))
    theirs = user.merge("Deployment", "child", patch)
    scene.see("Deployment", "child")
    await scene.act(Apply(child))
    assert len(scene.children) == 1
    now = user.get("Deployment", "child")
    assert now is not None
    assert now["spec"] == theirs["spec"]


async def test_a_fight_over_a_field_costs_one_apply_a_window(scene: Scene, user: User) -> None:
    child = scene.child(data={"k": "ours"})
    await scene.act(Apply(child))
    waits = []
    for second in range(150):
        scene.now = 1000.0 + second
        if second % 10 == 0:
            user.merge("ConfigMap", "child", {"data": {"k": f"theirs {second}"}})
            scene.see("ConfigMap", "child")
        waits.append((await scene.act(Apply(child))).requeue_seconds)
    assert len(scene.children) == 1 + 3  # the first at once, then one in sixty seconds
    assert [event["reason"] for event in user.events()].count("DriftRepaired") == 1
    assert 0 < min(wait for wait in waits if wait) <= 60


async def test_a_field_that_we_no_longer_want_goes(scene: Scene, user: User) -> None:
    await scene.act(Apply(scene.child(data={"a": "1", "b": "2"})))
    await scene.act(Apply(scene.child(data={"a": "1"})))
    assert (user.get("ConfigMap", "child") or {})["data"] == {"a": "1"}


async def test_a_deleted_child_is_made_again_and_told(scene: Scene, user: User) -> None:
    child = scene.child(data={"a": "1"})
    await scene.act(Apply(child))
    user.delete("ConfigMap", "child")
    scene.see("ConfigMap", "child")
    held = await scene.act(Apply(child))
    assert held.requeue_seconds == 5.0  # whoever deletes at once again is not fought at full speed
    scene.now += 6
    report = await scene.act(Apply(child))
    assert user.get("ConfigMap", "child") is not None
    assert report.drift == report.drift | {"object": "ConfigMap/child", "fields": []}


async def test_somebody_else_s_object_with_our_child_s_name_is_not_touched(scene: Scene, user: User) -> None:
    theirs = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "child", "namespace": user.namespace}}
    before = user.apply(theirs | {"data": {"a": "theirs"}})
    report = await scene.act(Apply(scene.child(data={"a": "ours"})))
    assert list(report.strangers) == [Ref("ConfigMap", user.namespace, "child")]
    assert user.get("ConfigMap", "child") == before
    assert scene.children == []


async def test_nothing_is_made_for_an_object_that_has_gone_or_changed(scene: Scene, user: User) -> None:
    """Our cache is old: the API server is asked before anything is created."""
    user.merge("VisionPipeline", "p", {"spec": {"suspend": True}})
    with pytest.raises(Outdated, match="changed"):
        await scene.act(Apply(scene.child()))
    user.delete("VisionPipeline", "p")
    with pytest.raises(Outdated, match="gone"):
        await scene.act(Apply(scene.child()))
    assert scene.children == []


async def test_a_job_is_created_once_and_never_changed(scene: Scene, user: User) -> None:
    pod = {"containers": [{"name": "c", "image": "i"}], "restartPolicy": "Never"}
    job = scene.child("Job", "job", spec={"template": {"spec": pod}})
    await scene.act(Apply(job, is_create_only=True))
    other = json.loads(json.dumps(job))
    other["spec"]["template"]["spec"]["containers"][0]["image"] = "new"
    await scene.act(Apply(other, is_create_only=True))
    fresh = Scene(scene.client._client, user, scene.cr)  # it has not heard of the Job yet
    await fresh.act(Apply(other, is_create_only=True))
    assert len(scene.children) == 1
    assert fresh.children == []
    live = user.get("Job", "job")
    assert live is not None
    assert live["spec"]["template"]["spec"]["containers"][0]["image"] == "i"


async def test_delete_means_this_object_and_no_other_of_its_name(scene: Scene, user: User) -> None:
    await scene.act(Apply(scene.child()))
    live = user.get("ConfigMap", "child")
    assert live is not None
    await scene.act(Delete("v1", "ConfigMap", "child", "00000000-0000-0000-0000-000000000000"))
    assert user.get("ConfigMap", "child") is not None
    await scene.act(Delete("v1", "ConfigMap", "child", live["metadata"]["uid"]))
    assert user.get("ConfigMap", "child") is None
    await scene.act(Delete("v1", "ConfigMap", "child", live["metadata"]["uid"]))


async def test_the_first_failure_stops_what_comes_after_it(scene: Scene, user: User) -> None:
    broken = scene.child("Service", "broken", spec={"ports": []})
    with pytest.raises(ApiError) as caught:
        await scene.act(Apply(scene.child(name="before")), Apply(broken), Apply(scene.child(name="after")))
    assert caught.value.status == 422
    assert user.get("ConfigMap", "before") is not None
    assert user.get("ConfigMap", "after") is None


async def test_a_status_is_written_once_and_only_when_it_differs(scene: Scene, user: User) -> None:
    status = {"observedGeneration": 1, "conditions": [], "revision": "r1"}
    assert await scene.executor.report(scene.cr, status, None)
    cr = scene.cache.get("VisionPipeline", user.namespace, "p")
    assert cr is not None
    assert not await scene.executor.report(cr, status, None)
    fresh = Scene(scene.client._client, user, cr)
    assert not await fresh.executor.report(cr, status, None)
    assert cr["metadata"]["generation"] == 1
    assert await scene.executor.report(cr, status | {"revision": "r2"}, None)


async def test_last_drift_outlives_later_statuses(scene: Scene, user: User) -> None:
    drift = {"time": "2026-01-01T00:00:00Z", "object": "ConfigMap/x", "fields": ["data.k"]}
    await scene.executor.report(scene.cr, {"observedGeneration": 1}, drift)
    cr = user.get("VisionPipeline", "p")
    assert cr is not None
    await scene.executor.report(cr, {"observedGeneration": 1, "revision": "r"}, None)
    assert (user.get("VisionPipeline", "p") or {})["status"]["lastDrift"] == drift


async def test_a_status_is_not_written_to_another_object_of_the_same_name(scene: Scene, user: User) -> None:
    user.delete("VisionPipeline", "p")
    user.apply(pipeline("p", user.namespace))
    with pytest.raises(Outdated):
        await scene.executor.report(scene.cr, {"observedGeneration": 1}, None)
    assert "status" not in (user.get("VisionPipeline", "p") or {})


async def test_events_are_at_most_one_a_reason_in_five_minutes(scene: Scene, user: User) -> None:
    notes = (Note("Normal", "Tested", "Test", "one"), Note("Warning", "Broken", "Test", "x" * 5000))
    for _ in range(3):
        await scene.executor.announce(scene.cr, notes)
    scene.now += 301
    await scene.executor.announce(scene.cr, notes[:1])
    events = user.events()
    assert sorted(event["reason"] for event in events) == ["Broken", "Tested", "Tested"]
    assert all(event["regarding"]["uid"] == scene.cr["metadata"]["uid"] for event in events)


async def test_a_dry_run_tells_the_difference_and_writes_nothing(
    apiserver: ApiServer, scene: Scene, user: User, caplog: pytest.LogCaptureFixture
) -> None:
    await scene.act(Apply(scene.child(data={"k": "old"})))
    before = user.get("ConfigMap", "child")
    dry = Scene(scene.client._client, user, scene.cr, is_dry_run=True)
    dry.see("ConfigMap", "child")
    with caplog.at_level(logging.INFO):
        await dry.act(Apply(dry.child(data={"k": "new"})), Apply(dry.child(name="more")))
        await dry.executor.report(scene.cr, {"observedGeneration": 9}, None)
        await dry.executor.announce(scene.cr, (Note("Normal", "Tested", "Test", "one"),))
    assert 'data.k: "old" -> "new"' in caplog.text
    assert "observedGeneration: null -> 9" in caplog.text
    assert user.get("ConfigMap", "child") == before
    assert user.get("ConfigMap", "more") is None
    assert "status" not in (user.get("VisionPipeline", "p") or {})
    assert [event["reason"] for event in user.events()] == ["Created"]


async def test_two_processes_that_create_the_same_job_make_one(apiserver: ApiServer, scene: Scene, user: User) -> None:
    pod = {"containers": [{"name": "c", "image": "i"}], "restartPolicy": "Never"}
    job = scene.child("Job", "job", spec={"template": {"spec": pod}})
    others = [Scene(scene.client._client, user, scene.cr) for _ in range(4)]
    await asyncio.gather(*(each.act(Apply(job, is_create_only=True)) for each in others))
    assert len(user.list("Job")) == 1


async def test_create_of_a_taken_name_is_a_conflict(scene: Scene) -> None:
    await scene.client.create(scene.child())
    with pytest.raises(Conflict):
        await scene.client.create(scene.child())
