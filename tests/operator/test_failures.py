"""The failure catalogue (reference/operator.md §6.2) against a real API server, as far as it needs no kubelet."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from sightline_operator.act import client as client_module
from sightline_operator.observe import endpoints, reflector
from sightline_operator.settings import OWNED_LABEL, OWNED_VALUE
from tests.operator.conftest import ApiServer
from tests.operator.harness import (
    Killed,
    Mortal,
    User,
    condition,
    connected,
    operating,
    pipeline,
    running,
    until,
)
from tests.operator.proxy import Event, Proxy, proxying

CHILDREN = ("ServiceAccount", "ConfigMap", "Service", "Deployment", "PodDisruptionBudget", "NetworkPolicy")


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in a cluster and does not matter here."""
    monkeypatch.setattr(endpoints, "FAILED_SECONDS", 0.3)
    monkeypatch.setattr(endpoints, "OK_SECONDS", 0.3)
    monkeypatch.setattr(reflector, "ABSENT_SECONDS", 0.5)


@pytest.fixture
def user(apiserver: ApiServer, namespace: str) -> Iterator[User]:
    with User(apiserver, namespace) as somebody:
        yield somebody


def owned(user: User) -> dict[str, dict[str, Any]]:
    """Children as Kind/name: what we asked for, without what each run has of its own."""
    found: dict[str, dict[str, Any]] = {}
    for kind in CHILDREN:
        for obj in user.list(kind):
            if (obj["metadata"].get("labels") or {}).get(OWNED_LABEL) == OWNED_VALUE:
                found[f"{kind}/{obj['metadata']['name']}"] = {"kind": kind, **obj}
    return found


def golden(user: User, name: str = "p") -> dict[str, Any]:
    """The state of a namespace: children and status, without uids, times, addresses and the namespace's name."""
    state: dict[str, Any] = dict(owned(user))
    # Without a Deployment controller no rollout ends, and so no ConfigMap of an earlier revision is let go.
    mounted = json.dumps([obj["spec"] for obj in user.list("Deployment")])
    state = {k: v for k, v in state.items() if v["kind"] != "ConfigMap" or v["metadata"]["name"] in mounted}
    state["status"] = (user.get("VisionPipeline", name) or {}).get("status")
    drop = {"uid", "resourceVersion", "creationTimestamp", "managedFields", "clusterIP", "clusterIPs", "time"}
    drop |= {"lastTransitionTime", "lastDrift", "sightline.dev/hash", "generation", "observedGeneration"}

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if k not in drop}
        return [clean(v) for v in value] if isinstance(value, list) else value

    return json.loads(json.dumps(clean(state)).replace(user.namespace, "NAMESPACE"))


def versions(user: User) -> dict[str, str]:
    """resourceVersions of children and pipeline: equal when nothing was written in between."""
    found = {name: obj["metadata"]["resourceVersion"] for name, obj in owned(user).items()}
    return found | {obj["metadata"]["name"]: obj["metadata"]["resourceVersion"] for obj in user.list("VisionPipeline")}


async def settled(user: User, name: str = "p") -> None:
    await until(lambda: user.is_settled(name), f"{name} settled")


async def quiet(operator: Any) -> None:
    """Nothing is due and nothing is being worked on, for a while."""
    calm = 0
    while calm < 6:
        calm = calm + 1 if operator.queue.work.is_idle else 0
        await asyncio.sleep(0.05)


# --- 1: a crash at every write ---------------------------------------------------------------------------------------


async def scenario(user: User, deaths: list[Mortal], connect: Any) -> int:
    """Create, update, delete a child, scale; the operator is started again whenever it dies. Returns status writes."""
    steps = [
        lambda: user.apply(pipeline("p", user.namespace)),
        lambda: user.merge(
            "VisionPipeline", "p", {"spec": {"gateway": {"replicas": 2}, "caption": {"timeout": "50s"}}}
        ),
        lambda: user.merge("VisionPipeline", "p", {"spec": {"networkPolicy": "Unmanaged"}}),
    ]
    clients: list[Mortal] = []
    for step in steps:
        step()
        for _ in range(3):
            client = deaths.pop(0) if deaths else Mortal(connect)
            clients.append(client)
            async with running(client, user.namespace) as (operator, task):
                await until(lambda: task.done() or (user.is_settled("p") and operator.queue.work.is_idle))
                if not task.done():
                    await quiet(operator)
                if not task.done():
                    break
                assert isinstance(task.exception(), Killed)
                deaths = []
    return sum(call.startswith("apply_status") for client in clients for call in client.calls)


async def _crashed(apiserver: ApiServer, client: Any, kill_at: int, *, is_after: bool) -> tuple[Any, int, bool]:
    with apiserver.namespace() as name, User(apiserver, name) as user:
        mortal = Mortal(client, kill_at=kill_at, is_after=is_after)
        statuses = await scenario(user, [mortal], client)
        return golden(user), statuses, mortal.is_dead


@pytest.mark.slow
async def test_a_crash_before_or_after_any_write_ends_in_the_same_state(apiserver: ApiServer) -> None:
    """kill -9 around the k-th write, for every k: same children, none twice, at most one status write more."""
    async with connected(apiserver) as client:
        expected, statuses, _ = await _crashed(apiserver, client, 0, is_after=False)
        assert expected["status"]["conditions"]
        assert len(expected) > 5
        kill_at, died = 0, True
        while died:
            batch = [(k, after) for k in range(kill_at + 1, kill_at + 5) for after in (False, True)]
            kill_at += 4
            results = await asyncio.gather(*(_crashed(apiserver, client, k, is_after=after) for k, after in batch))
            for (k, after), (state, writes, _) in zip(batch, results, strict=True):
                assert state == expected, f"killed {'after' if after else 'before'} write {k}"
                assert writes <= statuses + 1, f"{writes} status writes, killed at write {k}"
            died = all(is_dead for _, _, is_dead in results)
        assert kill_at >= 8


# --- 2, 3: lost, repeated and old news -------------------------------------------------------------------------------


@asynccontextmanager
async def behind(apiserver: ApiServer) -> AsyncIterator[tuple[Proxy, Any]]:
    async with proxying(apiserver) as proxy, connected(apiserver, proxy.url) as client:
        yield proxy, client


async def test_events_that_are_lost_are_made_good_within_a_repair_period(apiserver: ApiServer, user: User) -> None:
    brief = {"repair_seconds": 3.0, "repair_window_seconds": 0.1}
    async with behind(apiserver) as (proxy, client), operating(client, user.namespace, **brief):
        user.apply(pipeline("p", user.namespace))
        await settled(user)
        proxy.on_event = lambda path, event: []
        user.delete("Service", "p-gateway")
        user.merge("Deployment", "p-gateway", {"spec": {"replicas": 9}})
        user.merge("VisionPipeline", "p", {"spec": {"gateway": {"logLevel": "debug"}}})
        await until(lambda: user.get("Service", "p-gateway"), "the Service is back")
        await until(lambda: user.is_settled("p"), "the new spec is seen")
        await until(lambda: (user.get("Deployment", "p-gateway") or {})["spec"]["replicas"] == 1)


async def test_events_that_come_twice_late_or_in_disorder_change_nothing(apiserver: ApiServer, user: User) -> None:
    rng, held = random.Random(3), list[Event]()

    def disorder(path: str, event: Event) -> list[Event]:
        held.append(event) if event["type"] != "BOOKMARK" and path.endswith("s") else None
        rng.shuffle(held)
        out = [
            *([event] if rng.random() < 0.7 else []),
            *[e for e in held[:2] if e["object"].get("kind") == event["object"].get("kind")],
        ]
        return [*out, event]

    async with behind(apiserver) as (proxy, client):
        proxy.on_event = disorder
        async with operating(client, user.namespace) as operator:
            user.apply(pipeline("p", user.namespace))
            await settled(user)
            user.merge("VisionPipeline", "p", {"spec": {"gateway": {"replicas": 3}}})
            await settled(user)
            await quiet(operator)
            assert (user.get("Deployment", "p-gateway") or {})["spec"]["replicas"] == 3
            before = versions(user)
            user.merge("VisionPipeline", "p", {"metadata": {"annotations": {"x": "y"}}})
            await asyncio.sleep(1)
            await quiet(operator)
            assert {k: v for k, v in versions(user).items() if k != "p"} == {
                k: v for k, v in before.items() if k != "p"
            }


async def test_old_lists_lead_to_no_deletion_and_no_new_child(apiserver: ApiServer, user: User) -> None:
    """A second operator starts and gets the lists of before the update, and no events."""
    async with behind(apiserver) as (proxy, client):
        user.apply(pipeline("p", user.namespace))
        async with operating(client, user.namespace) as operator:  # what it lists now is remembered
            await settled(user)
            await quiet(operator)
        user.merge("VisionPipeline", "p", {"spec": {"gateway": {"logLevel": "debug"}}})
        async with connected(apiserver) as direct, operating(direct, user.namespace) as operator:
            await settled(user)
            await quiet(operator)
        before = {name: obj["metadata"]["uid"] for name, obj in owned(user).items()}
        status = (user.get("VisionPipeline", "p") or {})["status"]
        proxy.is_stale, proxy.on_event = True, lambda path, event: []
        proxy.calls.clear()
        async with operating(client, user.namespace) as operator:
            await until(lambda: ("GET", f"{user.url('VisionPipeline', 'p')}") in proxy.calls, "it asks before it acts")
            await asyncio.sleep(2)
        assert {name: obj["metadata"]["uid"] for name, obj in owned(user).items()} == before
        assert [call for call in proxy.writes() if call[0] in ("DELETE", "POST") and "events" not in call[1]] == []
        assert (user.get("VisionPipeline", "p") or {})["status"] == status


# --- 4, 5, 6: the API server has a bad day ---------------------------------------------------------------------------


async def test_410_in_all_streams_at_once_costs_no_write(apiserver: ApiServer, user: User) -> None:
    for number in range(10):
        user.apply(pipeline(f"p{number}", user.namespace))
    async with behind(apiserver) as (proxy, client), operating(client, user.namespace) as operator:
        for number in range(10):
            await settled(user, f"p{number}")
        await quiet(operator)
        before = versions(user)
        proxy.is_gone = True
        proxy.break_watches()
        await until(lambda: not proxy.watches)
        await asyncio.sleep(1)
        user.delete("Service", "p3-gateway")  # while nobody listens
        user.merge("VisionPipeline", "p4", {"spec": {"gateway": {"replicas": 2}}})
        proxy.is_gone = False
        await until(lambda: user.get("Service", "p3-gateway"))
        await settled(user, "p4")
        await quiet(operator)
        changed = {name for name, version in versions(user).items() if before.get(name) != version}
        assert changed <= {"Service/p3-gateway", "p3", "p4", "Deployment/p4-gateway", "ConfigMap/p4-gateway"} | {
            name for name in changed if "p4-gateway" in name
        }


@pytest.mark.slow
async def test_an_api_server_that_restarts_is_caught_up_with(new_apiserver: Any) -> None:
    from sightline_operator.api import crds

    server = new_apiserver()
    server.install(crds())
    with server.namespace() as namespace, User(server, namespace) as user:
        user.apply(pipeline("p", namespace))
        async with connected(server) as client, operating(client, namespace) as operator:
            await settled(user)
            await quiet(operator)
            before = versions(user)
            await asyncio.to_thread(server.stop_apiserver)
            await asyncio.sleep(3)
            await asyncio.to_thread(server.start_apiserver)
            user.merge("VisionPipeline", "p", {"spec": {"gateway": {"replicas": 2}}})
            await settled(user)
            await quiet(operator)
            after = versions(user)
            assert {name for name in after if after[name] != before.get(name)} <= {"p", "Deployment/p-gateway"}
            assert (user.get("Deployment", "p-gateway") or {})["spec"]["replicas"] == 2


async def test_a_half_open_watch_is_noticed(apiserver: ApiServer, user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WATCH_SILENCE_SECONDS", 1.5)
    async with behind(apiserver) as (proxy, client), operating(client, user.namespace):
        user.apply(pipeline("p", user.namespace))
        await settled(user)
        frozen = set(proxy.watches)
        proxy.is_frozen = True
        user.merge("VisionPipeline", "p", {"spec": {"gateway": {"replicas": 2}}})
        await until(lambda: len(proxy.watches - frozen) >= 3, "new streams beside the dead ones")
        proxy.is_frozen = False
        await settled(user)


@pytest.mark.slow
async def test_a_storm_of_429_is_weathered(apiserver: ApiServer, user: User) -> None:
    async with behind(apiserver) as (proxy, client):
        proxy.reject_share = 0.5
        async with running(client, user.namespace) as (_, task):
            for number in range(3):
                user.apply(pipeline(f"p{number}", user.namespace))
            for number in range(3):
                await until(lambda: user.is_settled(f"p{number}"), f"p{number}", seconds=180)  # noqa: B023
            # A status may tell of a pipeline whose last children are still to be tried again.
            await until(lambda: len(owned(user)) == 3 * 8, "all children", seconds=180)
            assert not task.done()
        assert proxy.rejected > 10


# --- 7: somebody else writes ----------------------------------------------------------------------------------------


async def test_a_fight_is_bounded_and_told(apiserver: ApiServer, user: User) -> None:
    """Another manager sets our field ten times a second: one apply a repair window, one event."""
    async with connected(apiserver) as client:
        mortal = Mortal(client)
        async with operating(mortal, user.namespace, repair_window_seconds=2.0):
            user.apply(pipeline("p", user.namespace))
            await settled(user)
            mortal.calls.clear()
            seconds = 7.0
            end = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < end:
                user.merge("Deployment", "p-gateway", {"spec": {"replicas": 7}})
                await asyncio.sleep(0.1)
            applies = [call for call in mortal.calls if call.startswith("apply Deployment")]
            assert 2 <= len(applies) <= seconds / 2.0 + 2
            await until(lambda: (user.get("Deployment", "p-gateway") or {})["spec"]["replicas"] == 1)
            status = (user.get("VisionPipeline", "p") or {})["status"]
            assert status["lastDrift"]["object"] == "Deployment/p-gateway"
            assert status["lastDrift"]["fields"] == ["spec.replicas"]
            assert [event["reason"] for event in user.events()].count("DriftRepaired") == 1


# --- 9: the operator is away ------------------------------------------------------------------------------------------


async def test_what_happened_while_the_operator_was_away_is_made_good(apiserver: ApiServer, user: User) -> None:
    async with connected(apiserver) as client:
        for name in ("edited", "robbed", "deleted"):
            user.apply(pipeline(name, user.namespace))
        async with operating(client, user.namespace):
            for name in ("edited", "robbed", "deleted"):
                await settled(user, name)
        user.merge("VisionPipeline", "edited", {"spec": {"gateway": {"replicas": 4}}})
        user.delete("Service", "robbed-gateway")
        user.delete("VisionPipeline", "deleted")
        user.apply(pipeline("new", user.namespace))
        mortal = Mortal(client)
        async with operating(mortal, user.namespace) as operator:
            await until(lambda: user.get("Service", "robbed-gateway"), "the Service is back", 30)
            await settled(user, "edited")
            await settled(user, "new")
            await quiet(operator)
        assert (user.get("Deployment", "edited-gateway") or {})["spec"]["replicas"] == 4
        assert [call for call in mortal.calls if "deleted" in call] == []


async def test_a_restart_with_nothing_to_do_writes_nothing(apiserver: ApiServer, user: User) -> None:
    async with connected(apiserver) as client:
        for number in range(5):
            user.apply(pipeline(f"p{number}", user.namespace))
        async with operating(client, user.namespace) as operator:
            for number in range(5):
                await settled(user, f"p{number}")
            await quiet(operator)
        mortal = Mortal(client)
        async with operating(mortal, user.namespace) as operator:
            await until(lambda: len(operator.cache.refs("VisionPipeline")) == 5)
            await asyncio.sleep(1)
            await quiet(operator)
        assert mortal.calls == []


# --- 10: misconfigure, then revert ------------------------------------------------------------------------------------

MISTAKES: Mapping[str, dict[str, Any]] = {
    "url that nobody serves": {"caption": {"endpoint": {"url": "http://127.0.0.1:1/v1"}}},
    "replicas": {"gateway": {"replicas": 0}},
    "suspended": {"suspend": True},
    "image": {"gateway": {"image": "no-such-image:9"}},
    "InferenceService that is not there": {"caption": {"endpoint": None, "inferenceServiceRef": {"name": "nowhere"}}},
    "log level": {"gateway": {"logLevel": "debug"}},
    "no network policy": {"networkPolicy": "Unmanaged"},
    "resources": {"gateway": {"resources": {"requests": {"cpu": "1000"}}}},
}


@pytest.mark.slow
async def test_every_mistake_can_be_taken_back(apiserver: ApiServer, user: User) -> None:
    async with connected(apiserver) as client, operating(client, user.namespace) as operator:
        original = pipeline("p", user.namespace)
        user.apply(original)
        await settled(user)
        await quiet(operator)
        before = golden(user)
        for what, patch in MISTAKES.items():
            user.merge("VisionPipeline", "p", {"spec": patch})
            await settled(user)
            user.http.put(
                user.url("VisionPipeline", "p"),
                json=original | {"metadata": (user.get("VisionPipeline", "p") or {})["metadata"]},
            ).raise_for_status()
            await settled(user)
            await quiet(operator)
            assert golden(user) == before, what


async def test_an_endpoint_that_cannot_be_reached_is_told_and_recovers_by_itself(
    apiserver: ApiServer, user: User, unused_tcp_port: int
) -> None:
    async with connected(apiserver) as client, operating(client, user.namespace):
        user.apply(pipeline("p", user.namespace, url=f"http://127.0.0.1:{unused_tcp_port}/v1"))
        await until(
            lambda: condition(user.get("VisionPipeline", "p"), "CaptionReady").get("reason") == "EndpointUnreachable"
        )
        runner = web.AppRunner(web.Application())  # it answers 404, as many do at their root
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", unused_tcp_port).start()
        try:
            await until(lambda: condition(user.get("VisionPipeline", "p"), "CaptionReady").get("status") == "True")
        finally:
            await runner.cleanup()
        await until(lambda: condition(user.get("VisionPipeline", "p"), "CaptionReady").get("status") == "False")


@pytest.fixture
def unused_tcp_port() -> int:
    from tests.operator.conftest import free_ports

    return free_ports(1)[0]


async def test_a_child_s_name_that_somebody_has_is_a_condition_until_it_is_free(
    apiserver: ApiServer, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sightline_operator import reconcile

    monkeypatch.setattr(reconcile, "STRANGER_SECONDS", 0.5)
    theirs = {"apiVersion": "v1", "kind": "Service", "spec": {"ports": [{"port": 1}]}}
    theirs |= {"metadata": {"name": "p-gateway", "namespace": user.namespace}}
    user.apply(theirs)
    async with connected(apiserver) as client, operating(client, user.namespace):
        user.apply(pipeline("p", user.namespace))
        await until(lambda: condition(user.get("VisionPipeline", "p"), "Accepted").get("reason") == "NameConflict")
        assert (user.get("Service", "p-gateway") or {})["spec"]["ports"][0]["port"] == 1
        user.delete("Service", "p-gateway")
        await until(lambda: condition(user.get("VisionPipeline", "p"), "Accepted").get("status") == "True")
        await until(lambda: user.get("Service", "p-gateway"))


# --- 11, 12: namespaces and KServe come and go ------------------------------------------------------------------------


async def test_a_namespace_that_ends_is_left_in_peace(apiserver: ApiServer, user: User) -> None:
    """No finalizer of ours holds it, and nothing is written into it again and again."""
    async with connected(apiserver) as client:
        mortal = Mortal(client)
        async with running(mortal, user.namespace) as (operator, task):
            user.apply(pipeline("p", user.namespace))
            await settled(user)
            await quiet(operator)
            user.http.delete(f"/api/v1/namespaces/{user.namespace}").raise_for_status()
            user.delete("Service", "p-gateway")
            cr = user.get("VisionPipeline", "p")
            assert cr is not None
            assert "finalizers" not in cr["metadata"]
            user.delete("VisionPipeline", "p")
            assert user.get("VisionPipeline", "p") is None
            mortal.calls.clear()
            await asyncio.sleep(1)
            await quiet(operator)
            assert len(mortal.calls) <= 2
            assert not task.done()


@pytest.mark.slow
async def test_kserve_absent_then_installed_then_gone_needs_no_restart(new_apiserver: Any) -> None:
    from sightline_operator.api import crds

    names = {"kind": "InferenceService", "plural": "inferenceservices", "singular": "inferenceservice"}
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    version = {"name": "v1beta1", "served": True, "storage": True, "schema": schema, "subresources": {"status": {}}}
    kserve = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "inferenceservices.serving.kserve.io"},
        "spec": {"group": "serving.kserve.io", "scope": "Namespaced", "names": names, "versions": [version]},
    }
    server = new_apiserver()
    server.install(crds())
    with server.namespace() as namespace, User(server, namespace) as user:
        user.apply(pipeline("p", namespace, caption={"endpoint": None, "inferenceService": {}}))
        async with connected(server) as client, running(client, namespace) as (_, task):
            await until(lambda: condition(user.get("VisionPipeline", "p"), "Accepted").get("reason") == "CRDMissing")
            await asyncio.to_thread(server.install, [kserve])
            await until(lambda: user.list("InferenceService"), "the InferenceService is made")
            await until(lambda: condition(user.get("VisionPipeline", "p"), "Accepted").get("status") == "True")
            path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{kserve['metadata']['name']}"
            user.http.delete(path).raise_for_status()
            await until(lambda: condition(user.get("VisionPipeline", "p"), "Accepted").get("reason") == "CRDMissing")
            await until(lambda: user.http.get(path).status_code == 404)
            await asyncio.to_thread(server.install, [kserve])
            await until(lambda: user.list("InferenceService"), "it is made again")
            assert not task.done()


# --- 15: idle ---------------------------------------------------------------------------------------------------------


async def test_idle_pipelines_cost_no_write(apiserver: ApiServer, user: User) -> None:
    async with connected(apiserver) as client:
        mortal = Mortal(client)
        settings = {"repair_seconds": 1.0, "resync_seconds": 1.0}  # as many looks in seconds as in an hour of a cluster
        async with operating(mortal, user.namespace, **settings) as operator:
            for number in range(10):
                user.apply(pipeline(f"p{number}", user.namespace))
            for number in range(10):
                await settled(user, f"p{number}")
            await asyncio.sleep(2)
            await quiet(operator)
            mortal.calls.clear()
            before = versions(user)
            await asyncio.sleep(6)
            assert mortal.calls == []
            assert versions(user) == before
