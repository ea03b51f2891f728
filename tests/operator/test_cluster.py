"""With kube-controller-manager: Jobs get real indexes, owners' ends are their children's, namespaces go."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from sightline_operator.api import crds
from sightline_operator.observe import endpoints
from sightline_operator.process import Operator
from tests.operator.conftest import ApiServer
from tests.operator.controllers import controller_manager
from tests.operator.harness import Killed, Mortal, condition, connected, operating, pipeline, running, until
from tests.operator.live import Live, is_true, living
from tests.operator.proxy import proxying

CHILDREN = ("ServiceAccount", "ConfigMap", "Service", "Deployment", "PodDisruptionBudget", "NetworkPolicy", "Job")


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in a cluster and does not matter here."""
    for name in ("FAILED_SECONDS", "OK_SECONDS", "PROGRESS_SECONDS"):
        monkeypatch.setattr(endpoints, name, 0.3)


@pytest.fixture
async def live(controlled: ApiServer, tmp_path: Path) -> AsyncIterator[Live]:
    with controlled.namespace() as name:
        async with living(controlled, name, tmp_path) as everything:
            yield everything


@contextlib.asynccontextmanager
async def operator_of(live: Live) -> AsyncIterator[Operator]:
    async with (
        connected(live.apiserver) as client,
        operating(client, live.user.namespace, gateway_url=live.gateway.url) as operator,
    ):
        yield operator


def left(live: Live) -> list[str]:
    """Children that are still there. The namespace's own ServiceAccount and ConfigMap are not ours."""
    found = [f"{kind}/{obj['metadata']['name']}" for kind in CHILDREN for obj in live.user.list(kind)]
    return [name for name in found if name not in ("ServiceAccount/default", "ConfigMap/kube-root-ca.crt")]


def pods(live: Live, component: str) -> list[dict[str, Any]]:
    label = f"app.kubernetes.io/component={component}"
    path = f"/api/v1/namespaces/{live.user.namespace}/pods"
    return live.user.http.get(path, params={"labelSelector": label}).json()["items"]


# --- Jobs with real indexes -------------------------------------------------------------------------------------------


async def test_a_batch_runs_to_its_end_as_jobs_with_real_indexes(live: Live) -> None:
    live.input(14, bad=1)
    async with operator_of(live):
        await live.serving()
        live.user.apply(live.batch())
        cr = await live.ended()
    status = cr["status"]
    assert condition(cr, "Complete")["reason"] == "SucceededWithErrors"
    assert (status["shards"]["total"], status["shards"]["completed"]) == (4, 4)
    assert (status["progress"]["succeeded"], status["progress"]["failed"]) == (13, 1)
    assert live.is_once(cr, 14)
    run = live.user.get("Job", status["jobs"]["run"]) or {}
    assert run["status"]["completedIndexes"] == "0-3"
    assert [name for name, _ in live.node.started].count(status["jobs"]["run"]) == 4


async def test_a_worker_that_is_killed_is_replaced_and_every_item_has_one_result(live: Live) -> None:
    live.input(8)
    async with operator_of(live):
        await live.serving()
        await live.running(captions=2, waiting=2)
        killed = [container for container in live.node.running.values() if hasattr(container, "kill")]
        assert len(killed) == 2
        for container in killed:
            container.kill()
        live.gateway.stops_after = float("inf")
        cr = await live.ended()
    assert condition(cr, "Complete")["reason"] == "Succeeded"
    assert live.is_once(cr, 8)
    run = live.user.get("Job", cr["status"]["jobs"]["run"]) or {}
    assert run["status"]["failed"] == 2
    assert run["status"]["completedIndexes"] == "0,1"


async def test_a_pause_ends_the_workers_with_143_and_costs_nothing_of_what_is_done(live: Live) -> None:
    live.input(8)
    async with operator_of(live):
        await live.serving()
        await live.running(captions=5)
        live.user.merge("VisionBatch", "b", {"spec": {"desiredState": "Paused"}})
        await until(lambda: not [pod for pod in pods(live, "worker") if pod["status"]["phase"] == "Running"])
        await until(lambda: (live.user.get("VisionBatch", "b") or {})["status"]["state"] == "Paused")
        live.gateway.stops_after = float("inf")
        live.user.merge("VisionBatch", "b", {"spec": {"desiredState": "Running"}})
        cr = await live.ended()
    assert condition(cr, "Complete")["reason"] == "Succeeded"
    assert live.is_once(cr, 8)
    run = live.user.get("Job", cr["status"]["jobs"]["run"]) or {}
    assert not run["status"].get("failedIndexes")


# --- an operator that dies, or is away --------------------------------------------------------------------------------


@pytest.mark.slow
async def test_an_operator_that_dies_after_each_of_its_writes_brings_a_batch_to_its_end(live: Live) -> None:
    """Every state between two writes is one that the next process finds: each Job is made once."""
    live.input(6)
    async with operator_of(live):
        await live.serving()
    live.user.apply(live.batch())
    lives, calls = 0, list[str]()
    async with connected(live.apiserver) as client:
        while not is_true(live.user.get("VisionBatch", "b"), "Complete"):
            mortal = Mortal(client, kill_at=1, is_after=True)
            async with running(mortal, live.user.namespace, gateway_url=live.gateway.url) as (_, task):
                await until(lambda: task.done() or is_true(live.user.get("VisionBatch", "b"), "Complete"))
                if task.done():
                    assert isinstance(task.exception(), Killed)
            lives, calls = lives + 1, calls + mortal.calls
            assert lives < 60, calls
        async with operator_of(live):
            cr = await live.ended()
    assert live.is_once(cr, 6)
    # How many writes one status takes is the clock's; that one died after each Job, and none was made twice, is not.
    jobs = [call.removeprefix("create Job b-") for call in calls if call.startswith("create Job")]
    made = sorted(name.partition("-")[0] for name in jobs)
    assert made == ["finish", "plan", "run"], calls


async def test_a_batch_whose_workers_end_while_the_operator_is_away_is_finished_when_it_is_back(live: Live) -> None:
    live.input(6)
    async with operator_of(live):
        await live.serving()
        await live.running(captions=2)
    live.gateway.stops_after = float("inf")
    run = (live.user.get("VisionBatch", "b") or {})["status"]["jobs"]["run"]
    await until(lambda: is_true(live.user.get("Job", run), "Complete"), "the workers are done")
    assert "finish" not in (live.user.get("VisionBatch", "b") or {})["status"]["jobs"]
    async with operator_of(live):
        cr = await live.ended(seconds=30)
    assert live.is_once(cr, 6)


async def test_what_has_ended_is_never_begun_again(live: Live) -> None:
    live.input(2)
    async with operator_of(live):
        await live.serving()
        live.user.apply(live.batch())
        cr = await live.ended()
        for name in cr["status"]["jobs"].values():
            live.user.delete("Job", name)
        await until(lambda: not live.user.list("Job"), "the Jobs are gone")
        live.user.merge("VisionBatch", "b", {"metadata": {"annotations": {"look": "again"}}})
        await asyncio.sleep(2)
        assert live.user.list("Job") == []
        assert is_true(live.user.get("VisionBatch", "b"), "Complete")


async def test_a_batch_whose_events_are_lost_ends_all_the_same(live: Live) -> None:
    live.input(6)
    async with operator_of(live):
        await live.serving()
    brief = {"repair_seconds": 2.0, "gateway_url": live.gateway.url}
    async with (
        proxying(live.apiserver) as proxy,
        connected(live.apiserver, proxy.url) as client,
        operating(client, live.user.namespace, **brief),
    ):
        proxy.on_event = lambda path, event: []
        live.user.apply(live.batch())
        cr = await live.ended()
    assert live.is_once(cr, 6)


@pytest.mark.slow
async def test_an_api_server_that_is_away_for_half_a_minute_costs_no_item(
    new_apiserver: Callable[..., ApiServer], tmp_path: Path
) -> None:
    """The workers end while nobody can be told; then everybody catches up."""
    server = new_apiserver()
    server.install(crds())
    with controller_manager(server), server.namespace() as name:
        async with living(server, name, tmp_path) as live, operator_of(live) as operator:
            live.input(8)
            await live.serving()
            await live.running(captions=2, waiting=2)
            await until(lambda: operator.queue.work.is_idle)
            await asyncio.to_thread(server.stop_apiserver)
            live.gateway.stops_after = float("inf")
            away = asyncio.get_running_loop().time()
            await until(lambda: len(set(live.gateway.asked)) == 8, "the workers go on")
            await asyncio.sleep(away + 30 - asyncio.get_running_loop().time())
            await asyncio.to_thread(server.start_apiserver)
            cr = await live.ended()
            assert live.is_once(cr, 8)
            back = pipeline("new", name, url=live.gateway.url)
            live.user.apply(back)
            await until(lambda: is_true(live.user.get("VisionPipeline", "new"), "Ready"), "all else goes on", 120)


# --- ends -------------------------------------------------------------------------------------------------------------


async def test_children_and_workers_go_with_their_owner_and_outputs_stay(live: Live) -> None:
    live.input(8)
    async with operator_of(live):
        await live.serving()
        await live.running(captions=3)
        cr = live.user.get("VisionBatch", "b") or {}
        live.user.delete("VisionBatch", "b")
        await until(lambda: not live.user.list("Job") and not pods(live, "worker"), "Jobs and workers are gone")
        live.user.delete("VisionPipeline", "p")
        await until(lambda: not left(live), "all children are gone")
        await asyncio.sleep(1)
        assert left(live) == []
    assert [row["custom_id"] for row in live.rows(cr)]


SWIFT = {"gateway": {"deadline": {"max": "3s", "default": "3s"}}, "caption": {"timeout": "2s"}}
"""A pipeline whose pods have little grace: the namespace controller comes back after half of it."""


@pytest.mark.slow
@pytest.mark.parametrize("is_watching", [True, False], ids=["with the operator", "without an operator"])
async def test_a_namespace_goes_with_everything_in_it(live: Live, *, is_watching: bool) -> None:
    """Nothing of ours holds it, and an operator that looks on makes nothing in it again."""
    live.input(2)
    path = f"/api/v1/namespaces/{live.user.namespace}"
    async with contextlib.AsyncExitStack() as stack:
        async with contextlib.AsyncExitStack() as brief:
            await (stack if is_watching else brief).enter_async_context(operator_of(live))
            await live.serving(**SWIFT)
            live.user.apply(live.batch())
            await live.ended()
        live.user.http.delete(path).raise_for_status()
        await until(lambda: live.user.http.get(path).status_code == 404, "the namespace is gone", 120)


@pytest.mark.slow
async def test_a_namespace_with_a_running_batch_goes_when_the_batch_is_deleted(live: Live) -> None:
    """A trap of Kubernetes itself, which the operator's page tells of.

    The Job controller keeps a failed pod of a Job with backoffLimitPerIndex until its replacement is there, which a
    namespace that ends refuses; and such a namespace deletes its Jobs only when its pods are gone.
    """
    live.input(8)
    path = f"/api/v1/namespaces/{live.user.namespace}"
    async with operator_of(live):
        await live.serving(**SWIFT)
        await live.running(captions=3)
        live.user.http.delete(path).raise_for_status()
        await until(lambda: not [pod for pod in pods(live, "worker") if pod["status"]["phase"] == "Running"])
        live.user.delete("VisionBatch", "b")
        await until(lambda: live.user.http.get(path).status_code == 404, "the namespace is gone", 120)
