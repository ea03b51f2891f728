"""What the operator asks of gateways' pods and external steps: who is asked, how often, and who is told what is new."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from sightline_operator.contract import GatewayState
from sightline_operator.observe import endpoints
from sightline_operator.observe.cache import Cache
from sightline_operator.observe.endpoints import Endpoints
from sightline_operator.observe.observe import Observer
from sightline_operator.process import progress_query
from sightline_operator.queue import Key
from tests.operator.harness import until
from tests.operator.objects import batch, pipeline

WELL = {"steps": {"caption": "closed", "enhance": "half-open"}, "storage": "ok"}
KEY = Key("VisionPipeline", "default", "docs")


class Gateways:
    """Some gateway pods, told apart by their path; each says what it is made to say, or nothing."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}
        self.asked: list[str] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.Response:
        name = request.match_info["pod"]
        self.asked.append(name)
        said = self.said.get(name)
        return web.json_response(said) if said is not None else web.Response(status=503)


@pytest.fixture
async def gateways() -> AsyncIterator[Gateways]:
    it = Gateways()
    application = web.Application()
    application.router.add_get("/{pod}", it.answer)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    it.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield it
    await runner.cleanup()


def pod(name: str, address: str, *, component: str = "gateway", is_ready: bool = True) -> dict[str, Any]:
    labels = {"app.kubernetes.io/instance": "docs", "app.kubernetes.io/component": component}
    ready = {"type": "Ready", "status": "True" if is_ready else "False"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "uid": name, "resourceVersion": "1", "labels": labels},
        "spec": {"containers": []},
        "status": {"podIP": address, "conditions": [ready]},
    }


@contextlib.asynccontextmanager
async def observing(
    gateways: Gateways, on_change: Callable[[Key], None] = lambda key: None
) -> AsyncIterator[tuple[Observer, Cache, dict[str, Any]]]:
    """An observer of one pipeline whose pods' addresses are paths of the gateways."""
    cache, asking = Cache(), Endpoints(on_change)
    observer = Observer(
        cache,
        lambda: frozenset({"InferenceService"}),
        asking,
        progress_url=lambda pipeline, batch: None,
        state_url=lambda address: f"{gateways.url}/{address}",
    )
    cr = pipeline()
    cr["metadata"] |= {"uid": "p-1", "resourceVersion": "1"}
    cache.put(cr)
    task = asyncio.create_task(asking.run())
    try:
        yield observer, cache, cr
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_each_ready_pod_of_the_gateway_is_asked_how_it_is_and_nobody_else(gateways: Gateways) -> None:
    gateways.said = {"a": WELL, "b": {"steps": {"caption": "open"}, "storage": "s3_timeout"}}
    async with observing(gateways) as (observer, cache, cr):
        for each in (
            pod("docs-1", "a"),
            pod("docs-2", "b"),
            pod("docs-3", "silent"),
            pod("docs-4", "loading", is_ready=False),
            pod("docs-5", "worker", component="worker"),
        ):
            cache.put(each)
        await observer.prepare(cr)
        assert observer.world(cr).unheard
        await until(lambda: not observer.world(cr).unheard, "all have been asked")
        assert observer.world(cr).gateways == {
            "docs-1": GatewayState(),
            "docs-2": GatewayState(frozenset({"caption"}), "s3_timeout"),
            "docs-3": None,
        }
        assert set(gateways.asked) == {"a", "b", "silent"}


async def test_who_asked_is_told_of_news_and_of_nothing_else(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "STATE_SECONDS", 0.02)
    told: list[Key] = []
    gateways.said = {"a": WELL}
    async with observing(gateways, told.append) as (observer, cache, cr):
        cache.put(pod("docs-1", "a"))
        await observer.prepare(cr)
        await until(lambda: len(gateways.asked) > 5, "asked again and again")
        assert told == [KEY]
        gateways.said["a"] = {"steps": {"caption": "open"}, "storage": "ok"}
        await until(lambda: len(told) > 1, "the news")
        assert observer.world(cr).gateways["docs-1"] == GatewayState(frozenset({"caption"}))


async def test_a_pod_that_went_and_a_pipeline_that_went_are_asked_no_more(
    gateways: Gateways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "STATE_SECONDS", 0.02)
    gateways.said = {"a": WELL, "b": WELL}
    async with observing(gateways) as (observer, cache, cr):
        first = pod("docs-1", "a")
        cache.put(first)
        await observer.prepare(cr)
        await until(lambda: "a" in gateways.asked, "the first pod")
        first["metadata"]["resourceVersion"] = "2"
        cache.remove(first)
        cache.put(pod("docs-2", "b"))
        await observer.prepare(cr)
        await until(lambda: gateways.asked.count("b") > 3, "the second pod")
        assert list(observer.world(cr).gateways) == ["docs-2"]
        assert "a" not in gateways.asked[-4:]
        observer.forget(KEY)
        assert observer.world(cr).gateways == {}


@pytest.mark.parametrize(
    ("said", "state"),
    [
        (WELL, GatewayState()),
        ({"steps": {"enhance": "open"}, "storage": None}, GatewayState(frozenset({"enhance"}))),
        ({"steps": {}, "storage": "unknown"}, GatewayState()),
        ({"steps": {}, "storage": "s3_not_found"}, GatewayState(storage="s3_not_found")),
        ({"steps": {"caption": 7}, "storage": 7, "more": 1}, GatewayState()),
        ({"steps": []}, None),
        ({"detail": "Not Found"}, None),
        (None, None),
    ],
)
def test_what_a_gateway_says_is_read(said: Any, state: GatewayState | None) -> None:
    assert GatewayState.read(said) == state


def test_how_far_a_batch_is_is_asked_where_the_gateway_has_the_bucket() -> None:
    owner = pipeline({"storage": {"s3": {"bucket": "captions", "prefix": "x/"}}})
    planned = {"status": {"fingerprint": "0123456789ab"}}
    asked = "fingerprint=0123456789ab&output=s3%3A%2F%2Fcaptions"
    assert progress_query(owner, batch() | planned) == asked
    there = {"output.s3": {"bucket": "captions", "prefix": "a b/c/"}}
    assert progress_query(owner, batch(there) | planned) == f"{asked}%2Fa+b%2Fc"
    kept = {"status": planned["status"] | {"output": {"bucket": "captions", "prefix": "x/batches/"}}}
    assert progress_query(owner, batch({"output": {}}) | kept) == f"{asked}%2Fx%2Fbatches"
    assert progress_query(owner, batch()) is None, "not planned"
    assert progress_query(pipeline(), batch() | planned) is None, "no storage"
    elsewhere = {"output.s3": {"bucket": "captions", "endpoint": "http://other:9000"}}
    assert progress_query(owner, batch(elsewhere) | planned) is None, "another store"
