"""A namespace in which everything moves for real but the images: a pipeline that serves, batches whose workers run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from sightline_operator.settings import API_VERSION
from tests.operator import worker
from tests.operator.conftest import ApiServer
from tests.operator.controllers import Container, Kubelet, Pod, Program, Server, environment_of, kubelet
from tests.operator.harness import User, pipeline, until

WORKER = Path(worker.__file__)
REVISION = "x-pipeline-revision"


@dataclass
class Gateway:
    """Stands for the pipeline's gateway: captions, tells progress from the store, answers as the model's URL.

    stops_after   so many captions, until it is set higher: those who ask are kept waiting
    """

    store: Path
    user: User
    url: str = ""
    asked: list[str] = field(default_factory=list)
    stops_after: float = math.inf
    waiting: int = 0
    revision: str = ""

    async def caption(self, request: web.Request) -> web.Response:
        uri = request.query["uri"]
        self.waiting += 1
        try:
            while len(self.asked) >= self.stops_after:
                await asyncio.sleep(0.02)
        finally:
            self.waiting -= 1
        self.asked.append(uri)
        status = 422 if "bad" in uri else 200
        return web.json_response({"caption": f"of {uri}"}, status=status, headers={REVISION: self.revision})

    async def progress(self, request: web.Request) -> web.Response:
        root = next((self.store / request.match_info["uid"]).glob("*"), None)
        if root is None or not (root / "PLAN.json").exists():
            return web.json_response({}, status=404)
        return web.json_response(worker.counts(worker.Folder(self.store, root.parent.name, root.name)))

    async def anything(self, request: web.Request) -> web.Response:
        return web.json_response({}, status=404)


@dataclass
class Live:
    """What a test of the whole has in its hands."""

    apiserver: ApiServer
    user: User
    gateway: Gateway
    node: Kubelet
    store: Path

    def input(self, items: int, *, bad: int = 0) -> None:
        """So many images in the store, of which so many can't be captioned."""
        names = [f"{'bad' if number < bad else 'good'}-{number}" for number in range(items)]
        lines = [json.dumps({"custom_id": f"i{number}", "uri": name}) for number, name in enumerate(names)]
        (self.store / "inbox").mkdir(exist_ok=True)
        (self.store / "inbox" / "items.jsonl").write_text("\n".join(lines))

    async def serving(self, name: str = "p", **spec: Any) -> None:
        """A pipeline of this name, when it is Ready."""
        self.user.apply(pipeline(name, self.user.namespace, url=self.gateway.url, **spec))
        await until(lambda: is_true(self.user.get("VisionPipeline", name), "Ready"), f"{name} is Ready")
        self.gateway.revision = (self.user.get("VisionPipeline", name) or {})["status"]["revision"]

    def batch(self, name: str = "b", **spec: Any) -> dict[str, Any]:
        body: dict[str, Any] = {
            "pipelineRef": {"name": "p"},
            "input": {"s3Prefix": {"bucket": "images", "prefix": "inbox/"}},
            "output": {"s3": {"bucket": "captions"}},
            "shardSize": 4,
            "chunkSize": 2,
            "parallelism": 2,
        }
        metadata = {"name": name, "namespace": self.user.namespace}
        return {"apiVersion": API_VERSION, "kind": "VisionBatch", "metadata": metadata, "spec": body | spec}

    async def ended(self, name: str = "b", seconds: float = 120) -> dict[str, Any]:
        """The batch, when it has come to its end, well or not."""

        def over() -> dict[str, Any] | None:
            cr = self.user.get("VisionBatch", name) or {}
            return cr if is_true(cr, "Complete") or is_true(cr, "Failed") else None

        return await until(over, f"the end of {name}", seconds)

    def rows(self, cr: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What lies in the store for a batch, in order."""
        folder = worker.Folder(self.store, cr["metadata"]["uid"], cr["status"]["fingerprint"])
        return [row for shard in range(cr["status"]["shards"]["total"]) for row in folder.rows(shard)]

    async def running(self, name: str = "b", *, captions: int, waiting: int = 1) -> None:
        """A batch, when so many of its workers wait for the gateway after so many captions."""
        self.gateway.stops_after = captions
        self.user.apply(self.batch(name))
        gateway = self.gateway
        await until(lambda: len(gateway.asked) >= captions and gateway.waiting >= waiting, "workers wait", 120)

    def jobs(self, name: str = "b") -> dict[str, set[str]]:
        """The Jobs of a batch that ever started a pod: uids by name."""
        found: dict[str, set[str]] = {}
        for owner, uid in self.node.started:
            if owner.startswith(f"{name}-"):
                found.setdefault(owner, set()).add(uid)
        return found

    def is_once(self, cr: Mapping[str, Any], items: int) -> bool:
        """Each of its Jobs was made once, and each item has one result, in order."""
        made = self.jobs(cr["metadata"]["name"])
        ids = [row["custom_id"] for row in self.rows(cr)]
        return (
            ids == [f"i{number}" for number in range(items)]
            and sorted(made) == sorted(cr["status"]["jobs"].values())
            and all(len(uids) == 1 for uids in made.values())
        )


def is_true(cr: Mapping[str, Any] | None, type_: str) -> bool:
    conditions = ((cr or {}).get("status") or {}).get("conditions") or ()
    return any(each["type"] == type_ and each["status"] == "True" for each in conditions)


@contextlib.asynccontextmanager
async def living(apiserver: ApiServer, namespace: str, store: Path) -> AsyncIterator[Live]:
    """A namespace with a kubelet and a gateway; the operator is the test's to start, at `gateway.url`."""
    with User(apiserver, namespace) as user:
        gateway = Gateway(store, user)
        application = web.Application()
        application.router.add_get("/caption", gateway.caption)
        application.router.add_get("/internal/batches/{uid}/progress", gateway.progress)
        application.router.add_get("/{rest:.*}", gateway.anything)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            async with kubelet(apiserver, namespace, lambda pod: start(pod, gateway, user, store)) as node:
                yield Live(apiserver, user, gateway, node, store)
        finally:
            await runner.cleanup()


def start(pod: Pod, gateway: Gateway, user: User, store: Path) -> Container:
    """A batch's worker as a process, with its page; anything else is a server that is ready at once."""
    container = pod["spec"]["containers"][0]
    if container["name"] != "worker":
        return Server()
    folder = store / "pods" / pod["metadata"]["uid"]
    folder.mkdir(parents=True)
    volumes = [each["configMap"]["name"] for each in pod["spec"]["volumes"] if "configMap" in each]
    page = json.loads(user.http.get(user.url("ConfigMap", volumes[0])).json()["data"]["batch.json"])
    page["pipeline"]["url"] = gateway.url  # what DNS does in a cluster
    (folder / "batch.json").write_text(json.dumps(page))
    environment = environment_of(pod) | {
        "BATCH_FILE": str(folder / "batch.json"),
        "STORE": str(store),
        "PATIENCE": "60",
    }
    return Program([sys.executable, str(WORKER), *container["args"]], environment, folder)
