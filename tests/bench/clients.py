"""What a call costs by Kubernetes client, against an API server of its own: CPU of the client, memory, imports.

    python tests/bench/clients.py             all that are installed, each in a process of its own
    python tests/bench/clients.py --only httpx

An operator does four things: it gets an object, applies one (server-side), lists many, and watches. Time on the wall
is the API server's; what a client can be blamed for is its CPU, so that is what is told.
"""

import argparse
import asyncio
import importlib
import importlib.util
import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "operator/src"), str(ROOT / "predictors/src")]

NAMESPACE = "clients"
LISTED = 1000
MANAGER = "bench"
APPLY = "application/apply-patch+yaml"
DEPLOYMENTS = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments"
CONFIG_MAPS = f"/api/v1/namespaces/{NAMESPACE}/configmaps"
Manifest = dict[str, Any]
ROWS = {
    "import_seconds": "import, s",
    "import_mib": "memory (RSS) after import and connection, MiB",
    "get_ms": "get a Deployment, ms of CPU",
    "apply_ms": "server-side apply of a Deployment, ms of CPU",
    "list_ms": f"list {LISTED} ConfigMaps of 2 KiB, ms of CPU",
    "watch_ms": "a watch event of a ConfigMap, ms of CPU",
}


class Client(Protocol):
    async def get(self, name: str) -> object: ...

    async def apply(self, manifest: Manifest) -> object: ...

    async def list(self) -> int: ...

    def watch(self) -> AsyncIterator[str]: ...

    async def close(self) -> None: ...


class Ours:
    """The operator's adapter: the official client's configuration and connection, plain objects."""

    def __init__(self, *, is_as_it_comes: bool = False) -> None:
        self.is_as_it_comes = is_as_it_comes

    async def connect(self, kubeconfig: Path) -> Client:
        from sightline_operator.act.client import KubernetesClient
        from sightline_operator.resources import BY_KIND, Resource

        self.deployments = BY_KIND["Deployment"]
        self.config_maps = Resource("ConfigMap", "", ("v1",), "configmaps", selector="")
        self.client = await KubernetesClient.connect(str(kubeconfig))
        if self.is_as_it_comes:
            self.client._configuration.client_session_kwargs = None
        return self

    async def get(self, name: str) -> object:
        return await self.client.get(self.deployments, NAMESPACE, name)

    async def apply(self, manifest: Manifest) -> object:
        return await self.client.apply(manifest)

    async def list(self) -> int:
        objects, self.since = await self.client.list(self.config_maps, NAMESPACE)
        return len(objects)

    async def watch(self) -> AsyncIterator[str]:
        async for type_, obj in self.client.watch(self.config_maps, NAMESPACE, self.since):
            if type_ == "MODIFIED":
                yield obj["metadata"]["name"]

    async def close(self) -> None:
        await self.client.close()


class Aiohttp:
    """Nothing but aiohttp and JSON."""

    async def connect(self, kubeconfig: Path) -> Client:
        import aiohttp
        import yaml

        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        tls = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self.http = aiohttp.ClientSession(
            cluster["server"],
            connector=aiohttp.TCPConnector(ssl=tls, limit=0),
            headers={"Authorization": f"Bearer {user['token']}", "Accept": "application/json"},
            read_bufsize=2**21,
        )
        return self

    async def _call(self, method: str, path: str, **more: Any) -> Any:
        async with self.http.request(method, path, raise_for_status=True, **more) as answer:
            return json.loads(await answer.read())

    async def get(self, name: str) -> object:
        return await self._call("GET", f"{DEPLOYMENTS}/{name}")

    async def apply(self, manifest: Manifest) -> object:
        return await self._call(
            "PATCH",
            f"{DEPLOYMENTS}/{manifest['metadata']['name']}",
            params={"fieldManager": MANAGER, "force": "true"},
            data=json.dumps(manifest),
            headers={"Content-Type": APPLY},
        )

    async def list(self) -> int:
        answer = await self._call("GET", CONFIG_MAPS)
        self.since = answer["metadata"]["resourceVersion"]
        return len(answer["items"])

    async def watch(self) -> AsyncIterator[str]:
        query = {"watch": "1", "resourceVersion": self.since}
        async with self.http.get(CONFIG_MAPS, params=query) as stream:
            async for line in stream.content:
                event = json.loads(line)
                if event["type"] == "MODIFIED":
                    yield event["object"]["metadata"]["name"]

    async def close(self) -> None:
        await self.http.close()


class Typed:
    """The official client as its documentation shows it: typed models."""

    async def connect(self, kubeconfig: Path) -> Client:
        from kubernetes.aio import client, config, watch

        await config.load_kube_config(str(kubeconfig))
        self.watching = watch.Watch
        self.api = client.ApiClient()
        self.apps, self.core = client.AppsV1Api(self.api), client.CoreV1Api(self.api)
        return self

    async def get(self, name: str) -> object:
        return await self.apps.read_namespaced_deployment(name, NAMESPACE)

    async def apply(self, manifest: Manifest) -> object:
        name = manifest["metadata"]["name"]
        return await self.apps.patch_namespaced_deployment(
            name, NAMESPACE, manifest, field_manager=MANAGER, force=True, _content_type=APPLY
        )

    async def list(self) -> int:
        answer = await self.core.list_namespaced_config_map(NAMESPACE)
        self.since = answer.metadata.resource_version
        return len(answer.items)

    async def watch(self) -> AsyncIterator[str]:
        stream = self.watching().stream(
            self.core.list_namespaced_config_map, NAMESPACE, resource_version=self.since, timeout_seconds=300
        )
        async for event in stream:
            if event["type"] == "MODIFIED":
                yield event["object"].metadata.name

    async def close(self) -> None:
        await self.api.close()


class Httpx:
    """Nothing but httpx and JSON."""

    async def connect(self, kubeconfig: Path) -> Client:
        import httpx
        import yaml

        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.http = httpx.AsyncClient(
            base_url=cluster["server"],
            verify=ssl.create_default_context(cafile=cluster["certificate-authority"]),
            headers={"Authorization": f"Bearer {user['token']}"},
            timeout=httpx.Timeout(30, read=300),
            trust_env=False,
        )
        return self

    async def get(self, name: str) -> object:
        return (await self.http.get(f"{DEPLOYMENTS}/{name}")).raise_for_status().json()

    async def apply(self, manifest: Manifest) -> object:
        answer = await self.http.patch(
            f"{DEPLOYMENTS}/{manifest['metadata']['name']}",
            params={"fieldManager": MANAGER, "force": "true"},
            content=json.dumps(manifest),
            headers={"Content-Type": APPLY},
        )
        return answer.raise_for_status().json()

    async def list(self) -> int:
        answer = (await self.http.get(CONFIG_MAPS)).raise_for_status().json()
        self.since = answer["metadata"]["resourceVersion"]
        return len(answer["items"])

    async def watch(self) -> AsyncIterator[str]:
        query = {"watch": "1", "resourceVersion": self.since}
        async with self.http.stream("GET", CONFIG_MAPS, params=query) as stream:
            async for line in stream.aiter_lines():
                event = json.loads(line)
                if event["type"] == "MODIFIED":
                    yield event["object"]["metadata"]["name"]

    async def close(self) -> None:
        await self.http.aclose()


class Lightkube:
    """lightkube's AsyncClient with its typed resources."""

    async def connect(self, kubeconfig: Path) -> Client:
        from lightkube import AsyncClient, KubeConfig, codecs
        from lightkube.resources.apps_v1 import Deployment
        from lightkube.resources.core_v1 import ConfigMap

        self.deployment, self.config_map, self.codecs = Deployment, ConfigMap, codecs
        config = KubeConfig.from_file(str(kubeconfig))
        self.client = AsyncClient(config=config, namespace=NAMESPACE, field_manager=MANAGER, trust_env=False)
        return self

    async def get(self, name: str) -> object:
        return await self.client.get(self.deployment, name)

    async def apply(self, manifest: Manifest) -> object:
        return await self.client.apply(self.codecs.from_dict(manifest), force=True)

    async def list(self) -> int:
        listed = self.client.list(self.config_map, chunk_size=500)
        found = [one async for one in listed]
        self.since = listed.resourceVersion
        return len(found)

    async def watch(self) -> AsyncIterator[str]:
        async for type_, obj in self.client.watch(self.config_map, resource_version=self.since):
            if type_ == "MODIFIED":
                yield obj.metadata.name

    async def close(self) -> None:
        await self.client.close()


CLIENTS: Mapping[str, tuple[str, str, Callable[[], Any]]] = {
    "ours": ("kubernetes.aio, as the operator uses it", "kubernetes", Ours),
    "as-it-comes": ("the same with its own session settings", "kubernetes", lambda: Ours(is_as_it_comes=True)),
    "typed": ("kubernetes.aio, typed models", "kubernetes", Typed),
    "aiohttp": ("aiohttp and JSON", "aiohttp", Aiohttp),
    "httpx": ("httpx and JSON", "httpx", Httpx),
    "lightkube": ("lightkube", "lightkube", Lightkube),
}


async def cost(times: int, call: Callable[[int], Coroutine[Any, Any, Any]]) -> float:
    """Milliseconds of our CPU for one call; the first ones, which connect, are not counted."""
    for number in range(3):
        await call(number)
    start = time.process_time()
    for number in range(times):
        await call(number)
    return (time.process_time() - start) / times * 1000


async def measure(name: str, kubeconfig: Path, times: int) -> dict[str, float]:
    """All figures of one client, in this process."""
    start = time.process_time()
    client: Client = await CLIENTS[name][2]().connect(kubeconfig)
    figures = {"import_seconds": time.process_time() - start}
    assert await client.get("d0")
    figures["import_mib"] = psutil.Process().memory_info().rss / 2**20
    figures["get_ms"] = await cost(times, lambda _: client.get("d0"))
    figures["apply_ms"] = await cost(times, lambda number: client.apply(deployment("d0", f"{name}-{number}")))
    assert await client.list() == LISTED
    figures["list_ms"] = await cost(5, lambda _: client.list())
    figures["watch_ms"] = await watched(client)
    await client.close()
    return figures


async def watched(client: Client) -> float:
    """CPU of an event: the parent changes each ConfigMap once when it is told to."""
    print("watching", flush=True)
    seen, start = 0, 0.0
    async for _ in client.watch():
        seen += 1
        start = start or time.process_time()  # the first event comes with the connection
        if seen == LISTED:
            break
    return (time.process_time() - start) / (seen - 1) * 1000


def deployment(name: str, mark: str) -> Manifest:
    """A gateway as the operator renders it."""
    from sightline_operator.render import render_pipeline
    from sightline_operator.settings import RenderSettings
    from tests.operator.harness import pipeline

    cr = pipeline(name, NAMESPACE)
    child = next(each for each in render_pipeline(cr, RenderSettings(), frozenset()) if each["kind"] == "Deployment")
    metadata = {**child["metadata"], "name": name, "annotations": {"mark": mark}}
    return child | {"metadata": {k: v for k, v in metadata.items() if k != "ownerReferences"}}


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    lines = [f"| | {' | '.join(CLIENTS[name][0] for name in results)} |", "|---|" + "---:|" * len(results)]
    for row, text in ROWS.items():
        lines.append(f"| {text} | {' | '.join(f'{results[name][row]:,.2f}' for name in results)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(CLIENTS))
    parser.add_argument("--times", type=int, default=200)
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "KUBECONFIG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        figures = asyncio.run(measure(options.measure[0], Path(options.measure[1]), options.times))
        print(json.dumps(figures))
        return
    from tests.operator.conftest import HOW_TO_GET_THEM, ApiServer, assets

    folder = assets()
    if folder is None:
        raise SystemExit(HOW_TO_GET_THEM)
    with tempfile.TemporaryDirectory() as place:
        server = ApiServer(Path(place) / "api", folder).start()
        try:
            print(table(compared(server, options)))
        finally:
            server.stop()


def compared(server: Any, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    data = {"text": "x" * 2048}
    with server.client() as http:
        http.post("/api/v1/namespaces", json={"metadata": {"name": NAMESPACE}}).raise_for_status()
        http.post(DEPLOYMENTS, json=deployment("d0", "first")).raise_for_status()
        for number in range(LISTED):
            http.post(CONFIG_MAPS, json={"metadata": {"name": f"c{number}"}, "data": data}).raise_for_status()
        results: dict[str, dict[str, float]] = {}
        for name, (_, module, _) in CLIENTS.items():
            if options.only in (None, name) and importlib.util.find_spec(module):
                results[name] = one(server, http, name, options.times)
                print(name, results[name], file=sys.stderr, flush=True)
    return results


def one(server: Any, http: Any, name: str, times: int) -> dict[str, float]:
    """A client in a process of its own. While it watches, every ConfigMap is changed."""
    command = [sys.executable, __file__, "--times", str(times), "--measure", name, str(server.kubeconfig)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "watching\n"
        time.sleep(1)
        for number in range(LISTED):
            http.patch(
                f"{CONFIG_MAPS}/c{number}",
                content=json.dumps({"metadata": {"annotations": {"seen-by": name}}}),
                headers={"Content-Type": "application/merge-patch+json"},
            ).raise_for_status()
        return json.loads(child.stdout.read())


if __name__ == "__main__":
    main()
