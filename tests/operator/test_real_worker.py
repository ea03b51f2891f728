"""VisionBatches on an API server with the workers that users run: `python -m sightline.jobs`, over a real S3.

The Job controller is Kubernetes' own, the kubelet starts processes, progress is counted by the gateway's own code; only
what captions is a stub. So everything that the operator and the workers tell each other is what they really say.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from sightline.services.batch_progress import Watches
from sightline.settings import PipelineSettings
from sightline_operator.observe import endpoints
from sightline_operator.settings import API_VERSION
from tests.jobs.pictures import picture
from tests.jobs.stub import Stub, running_stub
from tests.operator.conftest import ApiServer
from tests.operator.controllers import Container, Kubelet, Pod, Program, Server, environment_of, kubelet
from tests.operator.harness import User, condition, connected, operating, pipeline, until
from tests.s3 import S3Server, running_s3

BUCKET = "pictures"
ITEMS, BAD = 22, (3, 17)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        for number in range(ITEMS):
            server.put(BUCKET, f"in/{number:03}.png", picture(number, "422" if number in BAD else ""))
        yield server


@pytest.fixture(autouse=True)
def brisk(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in a cluster and does not matter here; and the store's keys, which Secrets hold there."""
    for name in ("FAILED_SECONDS", "OK_SECONDS", "PROGRESS_SECONDS"):
        monkeypatch.setattr(endpoints, name, 0.3)
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)


@dataclass
class Place:
    """A namespace with everything but the operator.

    url       of what tells progress, and answers as the caption step's endpoint
    workers   that were started, by verb
    """

    user: User
    s3: S3Server
    stub: Stub
    folder: Path
    url: str = ""
    node: Kubelet | None = None
    workers: list[tuple[str, Program]] = field(default_factory=list)

    def start(self, pod: Pod) -> Container:
        container = pod["spec"]["containers"][0]
        if container["name"] != "worker":
            return Server()
        assert container["command"] == ["python", "-m", "sightline.jobs"]
        folder = self.folder / pod["metadata"]["uid"]
        folder.mkdir(parents=True)
        name = next(each["configMap"]["name"] for each in pod["spec"]["volumes"] if "configMap" in each)
        page = json.loads(self.user.http.get(self.user.url("ConfigMap", name)).json()["data"]["batch.json"])
        page["pipeline"]["url"] = self.stub.url  # what DNS does in a cluster
        (folder / "batch.json").write_text(json.dumps(page))
        environment = environment_of(pod) | {"BATCH_FILE": str(folder / "batch.json")} | self.s3.environment()
        program = Program([sys.executable, *container["command"][1:], *container["args"]], environment, folder)
        self.workers.append((container["args"][0], program))
        return program

    def store(self, **more: Any) -> dict[str, Any]:
        return {"bucket": BUCKET, "endpoint": self.s3.endpoint_url, "region": self.s3.region, "pathStyle": True, **more}

    async def serving(self) -> None:
        storage = {"s3": self.store(prefix="own/")}
        self.user.apply(pipeline("p", self.user.namespace, url=self.url, storage=storage))
        await until(lambda: condition(self.user.get("VisionPipeline", "p"), "Ready").get("status") == "True", "Ready")
        self.stub.revision = (self.user.get("VisionPipeline", "p") or {})["status"]["revision"]

    def apply(self, name: str, **spec: Any) -> None:
        body = {"pipelineRef": {"name": "p"}, "shardSize": 8, "chunkSize": 3, "parallelism": 2} | spec
        metadata = {"name": name, "namespace": self.user.namespace}
        self.user.apply({"apiVersion": API_VERSION, "kind": "VisionBatch", "metadata": metadata, "spec": body})

    async def ended(self, name: str) -> dict[str, Any]:
        def over() -> dict[str, Any] | None:
            cr = self.user.get("VisionBatch", name) or {}
            return cr if any(condition(cr, end).get("status") == "True" for end in ("Complete", "Failed")) else None

        return await until(over, f"the end of {name}", 240)

    def lines(self, uri: str) -> list[dict[str, Any]]:
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        body = self.s3.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return [json.loads(line) for line in body.splitlines()]


@contextlib.asynccontextmanager
async def telling(s3: S3Server) -> AsyncIterator[str]:
    """The gateway's progress route, in its own code, and 404 for all else; at this URL."""
    settings = PipelineSettings(
        _env_file=None,  # type: ignore[call-arg]
        auth="off",
        s3_buckets=(BUCKET,),
        s3_endpoint_url=s3.endpoint_url,
        aws_region=s3.region,
    )
    watches = Watches(settings)

    async def progress(request: web.Request) -> web.Response:
        query = request.query
        found = await watches.progress(request.match_info["uid"], query["fingerprint"], query["output"])
        return web.json_response(found.to_json() if found else {}, status=200 if found else 404)

    async def anything(request: web.Request) -> web.Response:
        return web.json_response({}, status=404)

    application = web.Application()
    application.router.add_get("/internal/batches/{uid}/progress", progress)
    application.router.add_get("/{rest:.*}", anything)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def place(controlled: ApiServer, s3: S3Server, tmp_path: Path) -> AsyncIterator[Place]:
    """With an operator that works in it."""
    async with contextlib.AsyncExitStack() as stack:
        name = stack.enter_context(controlled.namespace())
        it = Place(stack.enter_context(User(controlled, name)), s3, stack.enter_context(running_stub()), tmp_path)
        it.url = await stack.enter_async_context(telling(s3))
        it.node = await stack.enter_async_context(kubelet(controlled, name, it.start))
        client = await stack.enter_async_context(connected(controlled))
        await stack.enter_async_context(operating(client, name, gateway_url=it.url))
        await it.serving()
        yield it


async def test_a_batch_and_then_its_failed_items_once_more(place: Place) -> None:
    place.apply("first", input={"s3Prefix": place.store(prefix="in/")})
    first = (await place.ended("first"))["status"]
    assert first["state"] == "Complete", first
    assert condition({"status": first}, "Complete")["reason"] == "SucceededWithErrors"
    assert (first["progress"]["done"], first["progress"]["failed"]) == ("22/22", 2)
    assert first["shards"]["completed"] == 3
    assert first["failureSummary"][0]["count"] == 2
    assert first["output"]["prefix"] == "own/batches/"
    done, failed = place.lines(first["outputs"]["results"]), place.lines(first["outputs"]["errors"])
    ids = [line["custom_id"] for line in [*done, *failed]]
    assert (len(done), len(failed), len(set(ids))) == (20, 2, 22)

    place.apply("again", input={"retryOf": {"batchName": "first"}})
    again = (await place.ended("again"))["status"]
    assert again["progress"]["done"] == "2/2", again
    tried = {line["custom_id"] for line in place.lines(again["outputs"]["errors"])}
    assert tried == {line["custom_id"] for line in failed}


async def test_a_killed_worker_costs_a_pod_and_no_item(place: Place) -> None:
    place.stub.delay_seconds = 0.2
    place.apply("killed", input={"s3Prefix": place.store(prefix="in/")}, maxInFlightPerWorker=1)

    def working() -> list[Program]:
        return [program for verb, program in place.workers if verb == "run" and program.ended() is None]

    await until(lambda: place.stub.given > 4 and working(), "the first captions", 120)
    working()[0].kill()
    place.stub.delay_seconds = 0.0
    status = (await place.ended("killed"))["status"]
    assert status["state"] == "Complete", status
    lines = [*place.lines(status["outputs"]["results"]), *place.lines(status["outputs"]["errors"])]
    assert sorted(line["uri"] for line in lines) == [f"s3://{BUCKET}/in/{number:03}.png" for number in range(ITEMS)]
    assert sum(verb == "run" for verb, _ in place.workers) == 4, "three shards, and one of them once more"


async def test_an_empty_prefix_and_a_dry_run_say_so(place: Place) -> None:
    place.apply("nothing", input={"s3Prefix": place.store(prefix="nowhere/")})
    place.apply("counted", input={"s3Prefix": place.store(prefix="in/")}, dryRun=True)
    nothing, counted = await place.ended("nothing"), await place.ended("counted")
    assert condition(nothing, "Failed")["reason"] == "InputEmpty", nothing["status"]
    assert condition(counted, "Complete")["message"] == "planned only: 22 items in 3 shards"
    assert place.stub.asks == 0
