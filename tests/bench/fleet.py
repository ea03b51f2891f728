"""`make bench-fleet`: 1,000 VisionPipelines and 200 VisionBatches, to Ready and Complete, on a real control plane.

etcd, kube-apiserver, kube-controller-manager and kube-scheduler are the real programs, our operator is a process of its
own. Nodes are fake: objects that the scheduler binds pods to, with a kubelet's stand-in in this process that tells of
each pod what a kubelet would. Gateways are ready at once; a batch's workers end at once and say what workers say. So
what is measured is the control plane's and the operator's work, and nothing of a model. Nodes have no heartbeats.

Progress on stderr, the table (Markdown) on stdout; with --write also in docs/scale.md.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import yaml
from aiohttp import web

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "operator/src"), str(ROOT / "predictors/src")]

from sightline_operator.api import crds  # noqa: E402
from sightline_operator.settings import API_VERSION  # noqa: E402
from tests.operator.conftest import HOW_TO_GET_THEM, ApiServer, assets  # noqa: E402
from tests.operator.controllers import controller_manager, over, running  # noqa: E402
from tests.operator.harness import pipeline  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
GROUP = f"/apis/{API_VERSION}"
NAMESPACES = 10
NODES = 100
ITEMS_OF_A_SHARD = 1000
KUBELETS = 16
"""Requests that the stand-in has open at once."""


def tell(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


@dataclass
class Api:
    """JSON to the API server, as administrator."""

    session: aiohttp.ClientSession
    server: ApiServer

    async def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> dict[str, Any]:
        """Raises aiohttp.ClientResponseError from 400 on."""
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": kind}
        async with self.session.request(method, self.server.url + path, data=data, headers=headers) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def events(self, path: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Every object of a collection, and then what happens to them, until cancelled."""
        listed = await self.call("GET", path)
        for item in listed["items"]:
            yield "ADDED", item
        since = listed["metadata"]["resourceVersion"]
        while True:
            query = {"watch": "1", "resourceVersion": since, "timeoutSeconds": "600"}
            async with self.session.get(self.server.url + path, params=query) as answer:
                answer.raise_for_status()
                async for line in answer.content:
                    event = json.loads(line)
                    since = event["object"]["metadata"]["resourceVersion"]
                    yield event["type"], event["object"]

    async def writes(self) -> Counter[tuple[str, str]]:
        """Mutating requests served so far, by resource and verb; of APPLY, only our operator makes any."""
        async with self.session.get(self.server.url + "/metrics") as answer:
            text = await answer.text()
        found: Counter[tuple[str, str]] = Counter()
        for labels, value in re.findall(r"^apiserver_request_total\{(.*)\} (\S+)$", text, re.MULTILINE):
            said = dict(re.findall(r'(\w+)="([^"]*)"', labels))
            if said["verb"] in ("POST", "PUT", "PATCH", "APPLY", "DELETE") and said["code"].startswith("2"):
                resource = "/".join(part for part in (said["resource"], said["subresource"]) if part)
                found[resource, said["verb"]] += int(float(value))
        return found


@dataclass
class Nodes:
    """The kubelets' stand-in: a pod that has been bound runs; a worker's then ends with its words."""

    api: Api
    shards: int
    pods: int = 0
    known: set[str] = field(default_factory=set)
    ended: set[str] = field(default_factory=set)
    waiting: asyncio.Queue[dict[str, Any]] = field(default_factory=asyncio.Queue)

    async def make(self) -> None:
        room = {"cpu": "64", "memory": "512Gi", "pods": "250", "ephemeral-storage": "1Ti"}
        ready = {"type": "Ready", "status": "True", "reason": "Fake"}
        for number in range(NODES):
            path = f"/api/v1/nodes/node-{number}"
            metadata = {"name": f"node-{number}"}
            await self.api.call("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": metadata})
            status = {"status": {"capacity": room, "allocatable": room, "conditions": [ready]}}
            await self.api.call("PATCH", f"{path}/status", status, "application/merge-patch+json")
            # A new node is tainted; what would take the taint away, when it is ready, is not among our controllers.
            await self.api.call("PATCH", path, {"spec": {"taints": None}}, "application/merge-patch+json")

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(KUBELETS):
                group.create_task(self._work())
            async for type_, pod in self.api.events("/api/v1/pods"):
                uid = pod["metadata"]["uid"]
                is_new = pod["spec"].get("nodeName") and uid not in self.known
                is_leaving = pod["metadata"].get("deletionTimestamp") and uid in self.known
                if type_ != "DELETED" and (is_new or is_leaving):
                    self.known.add(uid)
                    self.waiting.put_nowait(pod)

    async def _work(self) -> None:
        while True:
            pod = await self.waiting.get()
            with contextlib.suppress(aiohttp.ClientResponseError):  # it went meanwhile
                await self._serve(pod)

    async def _serve(self, pod: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"
        if metadata.get("deletionTimestamp"):
            await self.api.call("DELETE", path, {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}})
            return
        self.pods += 1
        await self._status(path, running(pod))
        if pod["spec"]["containers"][0]["name"] == "worker":
            await self._status(path, over(pod, 0, await self._words(pod)))

    async def _status(self, path: str, status: dict[str, Any]) -> None:
        await self.api.call("PATCH", f"{path}/status", {"status": status}, "application/strategic-merge-patch+json")

    async def _words(self, pod: dict[str, Any]) -> str:
        """What `python -m sightline.jobs plan|run|finish` says last (sightline_operator/contract.py)."""
        (verb,) = pod["spec"]["containers"][0]["args"][:1]
        items = self.shards * ITEMS_OF_A_SHARD
        if verb == "plan":
            (page,) = [each["configMap"]["name"] for each in pod["spec"]["volumes"] if "configMap" in each]
            path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/configmaps/{page}"
            fingerprint = json.loads((await self.api.call("GET", path))["data"]["batch.json"])["fingerprint"]
            return json.dumps({"plan": {"shards": self.shards, "items": items, "fingerprint": fingerprint, "bytes": 0}})
        if verb == "finish":
            done = {"total": items, "succeeded": items, "failed": 0, "failures": []}
            shards = {"total": self.shards, "completed": self.shards}
            return json.dumps(
                {"progress": done | {"shards": shards, "outputs": {"manifest": "s3://captions/MANIFEST.json"}}}
            )
        return ""


@dataclass
class Watched:
    """How many objects of a kind have a condition."""

    api: Api
    plural: str
    condition: str
    true: set[str] = field(default_factory=set)
    wrong: dict[str, str] = field(default_factory=dict)
    ignored: str = ""

    async def run(self) -> None:
        async for _, cr in self.api.events(f"{GROUP}/{self.plural}"):
            for each in (cr.get("status") or {}).get("conditions") or ():
                uid = cr["metadata"]["uid"]
                if each["type"] == self.condition and each["status"] == "True" and uid != self.ignored:
                    self.true.add(uid)
                elif each["type"] == "Failed" and each["status"] == "True":
                    self.wrong[cr["metadata"]["name"]] = str(each)


@dataclass
class Fleet:
    """One run: what was asked for, and the figures."""

    api: Api
    options: argparse.Namespace
    url: str
    operator: psutil.Process
    figures: dict[str, float] = field(default_factory=dict)
    rss: float = 0

    async def run(self) -> None:
        nodes = Nodes(self.api, self.options.shards)
        await nodes.make()
        pipelines = Watched(self.api, "visionpipelines", "Ready")
        batches = Watched(self.api, "visionbatches", "Complete")
        background = [
            asyncio.create_task(each) for each in (nodes.run(), pipelines.run(), batches.run(), self._sample())
        ]
        await self._warm(pipelines)
        before, cpu, start = await self.api.writes(), self.cpu(), time.monotonic()
        pods = nodes.pods
        await self._create()
        self.figures["created"] = time.monotonic() - start
        for watched, count in ((pipelines, self.options.pipelines), (batches, self.options.batches)):
            while len(watched.true) < count:
                assert not watched.wrong, watched.wrong
                for task in background:
                    assert not task.done(), task.exception()
                assert self.operator.is_running()
                assert time.monotonic() - start < self.options.limit, f"{len(watched.true)} of {count} {watched.plural}"
                tell(f"{len(pipelines.true)} pipelines Ready, {len(batches.true)} batches Complete, {nodes.pods} pods")
                await asyncio.sleep(2)
            self.figures[watched.plural] = time.monotonic() - start
        self.figures["cpu"], self.figures["pods"] = self.cpu() - cpu, nodes.pods - pods
        await self._settle()
        self.writes = await self.api.writes() - before
        await self._idle()
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)

    async def _warm(self, pipelines: Watched) -> None:
        """Every process is up when one pipeline is Ready; it is none of those that are measured."""
        warm = pipeline("warm", "fleet-0", url=self.url)
        made = await self.api.call("POST", f"{GROUP}/namespaces/fleet-0/visionpipelines", warm)
        while made["metadata"]["uid"] not in pipelines.true:
            assert self.operator.is_running()
            await asyncio.sleep(0.2)
        pipelines.true.clear()
        pipelines.ignored = made["metadata"]["uid"]
        await self._settle()

    async def _create(self) -> None:
        """As eight users do: pipelines first, the batches right behind them."""
        todo: list[tuple[str, dict[str, Any]]] = []
        for number in range(self.options.pipelines):
            namespace = f"fleet-{number % NAMESPACES}"
            todo.append(("visionpipelines", pipeline(f"p{number}", namespace, url=self.url)))
        for number in range(self.options.batches):
            todo.append(("visionbatches", batch(number % self.options.pipelines, number)))
        waiting = iter(todo)

        async def user() -> None:
            for plural, cr in waiting:
                await self.api.call("POST", f"{GROUP}/namespaces/{cr['metadata']['namespace']}/{plural}", cr)

        await asyncio.gather(*(user() for _ in range(8)))

    async def _settle(self) -> None:
        """Until nobody has written for five seconds, but for Leases."""
        old: Counter[tuple[str, str]] = Counter()
        while (new := without_leases(await self.api.writes())) != old:
            old = new
            await asyncio.sleep(5)

    async def _idle(self) -> None:
        before, cpu = without_leases(await self.api.writes()), self.cpu()
        await asyncio.sleep(self.options.idle)
        self.figures["idle_writes"] = (without_leases(await self.api.writes()) - before).total()
        self.figures["idle_cpu"] = (self.cpu() - cpu) / self.options.idle * 100

    async def _sample(self) -> None:
        while True:
            self.rss = max(self.rss, self.operator.memory_info().rss / 2**20)
            await asyncio.sleep(0.5)

    def cpu(self) -> float:
        return sum(self.operator.cpu_times()[:2])


def batch(of: int, number: int) -> dict[str, Any]:
    """One of the pipeline `p<of>`, over a prefix that only its workers would read."""
    spec = {
        "pipelineRef": {"name": f"p{of}"},
        "input": {"s3Prefix": {"bucket": "images", "prefix": "inbox/"}},
        "output": {"s3": {"bucket": "captions"}},
        "shardSize": ITEMS_OF_A_SHARD,
        "parallelism": 4,
    }
    metadata = {"name": f"b{number}", "namespace": f"fleet-{of % NAMESPACES}"}
    return {"apiVersion": API_VERSION, "kind": "VisionBatch", "metadata": metadata, "spec": spec}


def without_leases(writes: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    return Counter({key: count for key, count in writes.items() if not key[0].startswith("leases")})


def table(fleet: Fleet) -> str:
    figures, options = fleet.figures, fleet.options
    writes = without_leases(fleet.writes)
    lines = [
        f"| {options.pipelines:,} VisionPipelines, {options.batches} VisionBatches of {options.shards} shards | |",
        "|---|---:|",
        f"| all of them created, s | {figures['created']:,.0f} |",
        f"| all pipelines Ready, s after the first was created | {figures['visionpipelines']:,.0f} |",
        f"| all batches Complete, too, s | {figures['visionbatches']:,.0f} |",
        f"| pods that ran | {figures['pods']:,.0f} |",
        f"| the operator's CPU, s | {figures['cpu']:,.1f} |",
        f"| the operator's memory (RSS) at most, MiB | {fleet.rss:,.0f} |",
        f"| idle for {options.idle} s afterwards: writes, but for Leases | {figures['idle_writes']:,.0f} |",
        f"| idle: the operator's CPU, % of a core | {figures['idle_cpu']:,.1f} |",
        "",
        "Writes that the API server took, by what was written; server-side applies are the operator's, all of them:",
        "",
        "| resource | writes | of these applied |",
        "|---|---:|---:|",
    ]
    by_resource: Counter[str] = Counter()
    for (resource, _), count in writes.items():
        by_resource[resource] += count
    lines += [
        f"| {resource} | {count:,} | {writes[resource, 'APPLY']:,} |" for resource, count in by_resource.most_common(20)
    ]
    lines.append(f"| **all** | {writes.total():,} | {sum(n for (_, verb), n in writes.items() if verb == 'APPLY'):,} |")
    cores, load = os.cpu_count(), os.getloadavg()[0]
    words = " ".join(sys.argv[1:])
    lines.append(
        f"\nMade by `python tests/bench/fleet.py {words}` on {cores} CPUs, load average {load:.0f} at the end."
    )
    return "\n".join(lines)


@contextlib.contextmanager
def process(command: list[str], log: Path, **environment: str):
    """A program until the end of the block."""
    with log.open("ab") as output:
        child = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | environment)
    try:
        yield child
        assert child.poll() is None, f"{command[0]} ended:\n{log.read_text()[-3000:]}"
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def scheduler(server: ApiServer):
    settings = {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "clientConnection": {"kubeconfig": str(server.kubeconfig), "qps": 500, "burst": 1000},
        "leaderElection": {"leaderElect": False},
    }
    file = server.folder / "scheduler.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [str(server.assets / "kube-scheduler"), f"--config={file}", "--secure-port=0"]
    with process(command, server.folder / "kube-scheduler.log") as child:
        yield child


@contextlib.contextmanager
def operator(server: ApiServer):
    """Ours, cluster-wide; the gateways' pods have no addresses, so it is not to ask them."""
    command = [sys.executable, "-m", "sightline_operator", "run", "--metrics-port=0", "--log-level=warning"]
    paths = os.pathsep.join(sys.path[:3])
    words = [*command, "--gateway-pod-url=", "--lease-namespace=default"]
    log = server.folder / "operator.log"
    with process(words, log, KUBECONFIG=str(server.kubeconfig), PYTHONPATH=paths) as child:
        yield child


@contextlib.asynccontextmanager
async def endpoint() -> AsyncIterator[str]:
    """What the pipelines' caption step is said to be: somebody who answers."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "m"}]})

    application = web.Application()
    application.router.add_get("/{rest:.*}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def measure(server: ApiServer, options: argparse.Namespace) -> Fleet:
    server.install(crds())
    for number in range(NAMESPACES):
        server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"fleet-{number}"}})
    context = ssl.create_default_context(cafile=str(server.certificate))
    connector = aiohttp.TCPConnector(ssl=context, limit=0)
    session = aiohttp.ClientSession(
        connector=connector,
        headers={"Authorization": f"Bearer {server.token}"},
        timeout=aiohttp.ClientTimeout(total=None),
        read_bufsize=2**22,  # a line of a watch is an object
    )
    with controller_manager(server), scheduler(server), operator(server) as child:
        async with session, endpoint() as url:
            fleet = Fleet(Api(session, server), options, url, psutil.Process(child.pid))
            await fleet.run()
            return fleet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--shards", type=int, default=5, help="of each batch: pods of its run Job")
    parser.add_argument("--idle", type=int, default=30, help="seconds in the end")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that it may take")
    parser.add_argument("--write", action="store_true", help="the table into docs/scale.md")
    options = parser.parse_args()
    folder = assets()
    missing = (
        []
        if folder is None
        else [n for n in ("controller-manager", "scheduler") if not (folder / f"kube-{n}").exists()]
    )
    if folder is None or missing:
        raise SystemExit(HOW_TO_GET_THEM + "; here also kube-controller-manager and kube-scheduler")
    with tempfile.TemporaryDirectory() as place:
        server = ApiServer(Path(place) / "api", folder).start()
        try:
            fleet = asyncio.run(measure(server, options))
        except BaseException:
            for name in ("operator", "kube-scheduler", "kube-controller-manager"):
                log = server.folder / f"{name}.log"
                tell(f"--- {name}\n{log.read_text(errors='replace')[-2000:] if log.exists() else ''}")
            raise
        finally:
            server.stop()
    made = table(fleet)
    print(made)
    if options.write:
        text = PAGE.read_text()
        PAGE.write_text(
            re.sub(r"(<!-- fleet -->\n).*?(<!-- /fleet -->)", rf"\g<1>{made}\n\g<2>", text, flags=re.DOTALL)
        )


if __name__ == "__main__":
    main()
