"""`make bench-operator`: our operator and a plain Kopf `on.create` one, doing the same against a real API server.

Each is measured in the same way, from outside: objects by counting them in the API server, writes by the API server's
own counters, CPU and memory of the process by /proc; but when each begins to look at an object it writes down itself
(tests/bench/marks.py). A change counts from before its request is sent.

Progress on stderr, the table (Markdown) on stdout.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "operator/src"), str(ROOT / "predictors/src")]

from sightline_operator.act.client import KubernetesClient  # noqa: E402
from sightline_operator.api import crds  # noqa: E402
from sightline_operator.render import render_pipeline  # noqa: E402
from sightline_operator.resources import BY_KIND, PIPELINES  # noqa: E402
from sightline_operator.settings import RenderSettings  # noqa: E402
from tests.bench import marks  # noqa: E402
from tests.operator.conftest import HOW_TO_GET_THEM, ApiServer, assets  # noqa: E402
from tests.operator.harness import pipeline  # noqa: E402

ROWS = {
    "applies": "children made, per second",
    "fill_cpu": "CPU for 1,000 children, s",
    "rss": "memory (RSS) with all of them, MiB",
    "restart_seconds": "restart with all present: caught up, s",
    "restart_writes": "restart: writes",
    "start_p50": "change of a spec to the start of its reconcile, p50, ms",
    "start_p99": "the same, p99, ms",
    "change_p50": "change of a spec to changed child, p50, ms",
    "change_p99": "the same, p99, ms",
    "idle_writes": "idle: writes",
    "idle_cpu": "idle: CPU, % of a core",
}


def tell(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


@dataclass
class Bench:
    """One operator, one namespace, all the measures."""

    server: ApiServer
    client: KubernetesClient
    namespace: str
    command: list[str]
    options: argparse.Namespace
    process: psutil.Process | None = None
    figures: dict[str, float] = field(default_factory=dict)

    async def run(self) -> dict[str, float]:
        async with self.running():
            await self.warm()
            await self.fill()
            self.figures["rss"] = self.memory()
        async with self.running():
            await self.restart()
            await self.change()
            await self.idle()
        return self.figures

    @property
    def marks(self) -> Path:
        return self.server.folder / f"{self.namespace}.marks"

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        environment = os.environ | {"KUBECONFIG": str(self.server.kubeconfig)}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path[:3])
        environment[marks.VARIABLE] = str(self.marks)
        log = (self.server.folder / f"{self.namespace}.log").open("ab")
        child = subprocess.Popen(self.command, stdout=log, stderr=log, env=environment)
        self.process = psutil.Process(child.pid)
        try:
            yield
            assert child.poll() is None, f"the operator ended: {self.server.folder / self.namespace}.log"
        finally:
            child.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(child.wait, 30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            log.close()

    async def warm(self) -> None:
        """The process is up when it has served one object."""
        await self.client.create(pipeline("warm", self.namespace))
        while await self.count() < len(children("p")):
            await asyncio.sleep(0.5)
        await self.settle(0)

    async def fill(self) -> None:
        wanted = len(children("p")) * (self.options.objects + 1)
        start, cpu = time.monotonic(), self.cpu()
        names = iter(range(self.options.objects))

        async def create() -> None:
            for number in names:
                await self.client.create(pipeline(f"p{number}", self.namespace))

        creating = [asyncio.create_task(create()) for _ in range(8)]
        while (made := await self.count()) < wanted:
            tell(f"{self.namespace}: {made} of {wanted} children")
            await asyncio.sleep(1)
        seconds = time.monotonic() - start
        await asyncio.gather(*creating)
        new = wanted - len(children("p"))
        self.figures["applies"] = new / seconds
        await self.settle(10)
        self.figures["fill_cpu"] = (self.cpu() - cpu) / new * 1000

    async def restart(self) -> None:
        """From the start of the process to its last call but one: then it knows everything."""
        before, start = await self.writes(), time.time()
        assert self.process is not None
        last = self.process.create_time()
        calm = 0
        while calm < 5:
            cpu = self.cpu()
            await asyncio.sleep(1)
            busy = self.cpu() - cpu
            calm = calm + 1 if busy < 0.1 else 0
            last = time.time() if busy >= 0.1 else last
            assert time.time() - start < 600
        self.figures["restart_seconds"] = last - self.process.create_time()
        self.figures["restart_writes"] = await self.writes() - before
        tell(f"{self.namespace}: restarted")

    async def change(self) -> None:
        """So many specs a second get another number of replicas: until each is looked at, and its Deployment has it."""
        count = min(self.options.objects, self.options.changes)
        sent: dict[str, float] = {}
        watching = asyncio.create_task(self.changed(count, sent))
        await asyncio.sleep(1)
        start = time.monotonic()
        pending: list[asyncio.Task[Any]] = []
        for number in range(count):
            await asyncio.sleep(max(0.0, start + number / self.options.rate - time.monotonic()))
            sent[f"p{number}"] = time.monotonic()
            spec = {"gateway": {"replicas": 2, "auth": {"none": True}}}
            pending.append(asyncio.create_task(self.client.apply(pipeline(f"p{number}", self.namespace, **spec))))
        answers = await asyncio.gather(*pending)
        arrived = await asyncio.wait_for(watching, 120)
        started = marks.read(self.marks)
        keys = {each["metadata"]["name"]: each["metadata"]["generation"] for each in answers}
        self.quantiles("start", [started[name, generation] - sent[name] for name, generation in keys.items()])
        self.quantiles("change", [arrived[name] - sent[name] for name in keys])
        tell(f"{self.namespace}: {count} changes")
        await self.settle(10)

    async def changed(self, count: int, sent: dict[str, float]) -> dict[str, float]:
        """When so many Deployments of those that were sent have their second replica."""
        arrived: dict[str, float] = {}
        _, since = await self.client.list(BY_KIND["Deployment"], self.namespace)
        while True:
            async for type_, obj in self.client.watch(BY_KIND["Deployment"], self.namespace, since):
                since = obj["metadata"]["resourceVersion"]
                name = obj["metadata"].get("name", "").removesuffix("-gateway")
                if type_ == "MODIFIED" and name in sent and obj["spec"]["replicas"] == 2:
                    arrived.setdefault(name, time.monotonic())
                    if len(arrived) == count:
                        return arrived

    def quantiles(self, name: str, seconds: list[float]) -> None:
        values = sorted(seconds)
        self.figures[f"{name}_p50"] = statistics.median(values) * 1000
        self.figures[f"{name}_p99"] = values[max(0, math.ceil(len(values) * 0.99) - 1)] * 1000

    async def idle(self) -> None:
        before, cpu = await self.writes(), self.cpu()
        tell(f"{self.namespace}: idle for {self.options.idle} s")
        await asyncio.sleep(self.options.idle)
        self.figures["idle_writes"] = await self.writes() - before
        self.figures["idle_cpu"] = (self.cpu() - cpu) / self.options.idle * 100

    # --- measures ---

    def cpu(self) -> float:
        """Seconds of the process so far."""
        assert self.process is not None
        return sum(self.process.cpu_times()[:2])

    def memory(self) -> float:
        assert self.process is not None
        return self.process.memory_info().rss / 2**20

    async def count(self) -> int:
        total = 0
        for kind in {child["kind"] for child in children("p")}:
            page = await self.client._call("GET", BY_KIND[kind].path(self.namespace), query={"limit": "1"})
            assert page is not None
            total += len(page["items"]) + int(page["metadata"].get("remainingItemCount", 0))
        return total

    async def writes(self) -> int:
        """Mutating requests that the API server has served for kinds of ours, children and events.

        What it writes itself (flow schemas, its own endpoints) is none of these; Leases are not counted.
        """
        ours = {resource.plural for resource in BY_KIND.values()} | {"events"}
        connector = aiohttp.TCPConnector(ssl=False)
        headers = {"Authorization": f"Bearer {self.server.token}"}
        url = f"{self.server.url}/metrics"
        async with aiohttp.ClientSession(connector=connector) as session, session.get(url, headers=headers) as answer:
            text = await answer.text()
        total = 0.0
        for line in re.findall(r"^apiserver_request_total\{.*$", text, re.MULTILINE):
            verb = re.search(r'verb="(\w+)"', line)
            kind = re.search(r'resource="(\w+)"', line)
            is_write = verb and verb[1] in ("POST", "PUT", "PATCH", "APPLY", "DELETE")
            if is_write and kind and kind[1] in ours - {"leases"}:
                total += float(line.rsplit(" ", 1)[1])
        return int(total)

    async def settle(self, seconds: float) -> None:
        """Until nothing has been written for two seconds, and so long at least."""
        await asyncio.sleep(seconds)
        before = -1
        while (now := await self.writes()) != before:
            before = now
            await asyncio.sleep(2)


def children(name: str) -> tuple[dict[str, Any], ...]:
    cr = pipeline(name, "x")
    cr["metadata"]["uid"] = "x"
    return render_pipeline(cr, RenderSettings(), frozenset())


def table(results: dict[str, dict[str, float]], options: argparse.Namespace) -> str:
    names = list(results)
    lines = [f"| {options.objects} VisionPipelines of {len(children('p'))} children | {' | '.join(names)} |"]
    lines.append(f"|---|{'---:|' * len(names)}")
    for row, text in ROWS.items():
        values = [results[name].get(row) for name in names]
        cells = ["–" if value is None else f"{value:,.1f}" if value % 1 else f"{value:,.0f}" for value in values]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    cores, load = os.cpu_count(), os.getloadavg()[0]
    changes = f"{options.changes} changes at {options.rate:g}/s"
    lines.append(f"\nIdle for {options.idle} s; {changes}; {cores} cores, load {load:.1f} at the end.")
    return "\n".join(lines)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--objects", type=int, default=1000)
    parser.add_argument("--changes", type=int, default=500)
    parser.add_argument("--rate", type=float, default=50, help="changes a second")
    parser.add_argument("--idle", type=int, default=300)
    parser.add_argument("--only", choices=["sightline", "kopf"])
    parser.add_argument("--json", type=Path, help="figures also there")
    options = parser.parse_args()
    folder = assets()
    if folder is None:
        raise SystemExit(HOW_TO_GET_THEM)
    python = sys.executable
    commands = {
        "sightline": [
            python,
            str(ROOT / "tests/bench/marked_operator.py"),
            "run",
            "--metrics-port=0",
            "--log-level=warning",
            "--namespace",
        ],
        "kopf": [python, "-m", "kopf", "run", "--quiet", str(ROOT / "tests/bench/kopf_on_create.py"), "--namespace"],
    }
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        server = ApiServer(Path(place) / "api", folder).start()
        try:
            server.install(crds())
            client = await KubernetesClient.connect(str(server.kubeconfig))
            for name, command in commands.items():
                if options.only in (None, name):
                    server.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
                    tell(f"{name}: {options.objects} {PIPELINES.plural}")
                    results[name] = await Bench(server, client, name, [*command, name], options).run()
                    tell(f"{name}: {results[name]}")
            await client.close()
        finally:
            server.stop()
    titles = {"sightline": "sightline-operator", "kopf": "plain Kopf `on.create`"}
    print(table({titles[name]: figures for name, figures in results.items()}, options))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
