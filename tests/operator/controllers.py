"""What makes objects move: kube-controller-manager as a process, a kubelet whose containers are what a test says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import httpx

from tests.operator.conftest import ApiServer

CONTROLLERS = ("deployment", "garbage-collector", "job", "namespace", "replicaset", "ttl-after-finished")
NODE = "node"
LOOK_SECONDS = 0.1


@contextlib.contextmanager
def controller_manager(apiserver: ApiServer, *flags: str):
    """kube-controller-manager with the controllers that our objects need, until the end of the block."""
    with (apiserver.folder / "kube-controller-manager.log").open("ab") as log:
        process = subprocess.Popen(
            [
                str(apiserver.assets / "kube-controller-manager"),
                f"--kubeconfig={apiserver.kubeconfig}",
                "--controllers=" + ",".join(f"{name}-controller" for name in CONTROLLERS),
                "--leader-elect=false",
                "--secure-port=0",
                "--kube-api-qps=500",
                "--kube-api-burst=1000",
                *flags,
            ],
            stdout=log,
            stderr=log,
            cwd=apiserver.folder,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


class Container(Protocol):
    """One run of a pod's only container."""

    def ended(self) -> tuple[int, str] | None:
        """Exit code and termination message, once it has ended."""

    def stop(self) -> None:
        """SIGTERM."""


@dataclass
class Server:
    """A container that is ready at once and runs until it is told to stop."""

    code: int | None = None

    def ended(self) -> tuple[int, str] | None:
        return None if self.code is None else (self.code, "")

    def stop(self) -> None:
        self.code = 0


@dataclass
class Said(Server):
    """A container that ends at once, as a test says."""

    words: str = ""

    def ended(self) -> tuple[int, str] | None:
        return None if self.code is None else (self.code, self.words)


class Program:
    """A container as a process of this machine, with a termination message and signals."""

    def __init__(self, command: list[str], environment: Mapping[str, str], folder: Path) -> None:
        self.words = folder / "last-words"
        own = {k: v for k, v in os.environ.items() if not k.startswith(("KUBE", "SIGHTLINE"))}
        own |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "LAST_WORDS": str(self.words)}
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(command, env=own | dict(environment), stdout=log, stderr=log)

    def ended(self) -> tuple[int, str] | None:
        code = self.process.poll()
        if code is None:
            return None
        said = self.words.read_text() if self.words.exists() else ""
        return (128 - code if code < 0 else code), said

    def stop(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


Pod = Mapping[str, Any]
Start = Callable[[Pod], Container]


@dataclass
class Kubelet:
    """Binds the pods of one namespace to a node, runs what `start` makes of each, and tells the API server.

    started   name and uid of the owner (ReplicaSet or Job) of each pod, in the order in which they were started
    """

    http: httpx.AsyncClient
    namespace: str
    start: Start
    running: dict[str, Container] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    started: list[tuple[str, str]] = field(default_factory=list)
    stopping: set[str] = field(default_factory=set)

    async def run(self) -> None:
        """Until cancelled. An API server that is away is waited for, as a kubelet does."""
        while True:
            with contextlib.suppress(httpx.HTTPError):
                pods = (await self.http.get(self._path())).json().get("items") or []
                for pod in pods:
                    await self._look_at(pod)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look_at(self, pod: Pod) -> None:
        uid, name = pod["metadata"]["uid"], pod["metadata"]["name"]
        container = self.running.get(uid)
        if container is None and uid not in self.told:
            if pod["metadata"].get("deletionTimestamp"):
                await self._gone(pod)
                return
            await self._bind(name)
            self.running[uid] = self.start(pod)
            owner = pod["metadata"]["ownerReferences"][0]
            self.started.append((owner["name"], owner["uid"]))
            await self._tell(name, running(pod))
        elif container is not None and (end := container.ended()) is not None:
            await self._tell(name, over(pod, *end))
            self.told.add(uid)
            del self.running[uid]
        elif container is not None and pod["metadata"].get("deletionTimestamp") and uid not in self.stopping:
            self.stopping.add(uid)
            container.stop()
        if uid in self.told and pod["metadata"].get("deletionTimestamp"):
            await self._gone(pod)

    async def _bind(self, name: str) -> None:
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}}
        binding |= {"target": {"apiVersion": "v1", "kind": "Node", "name": NODE}}
        await self.http.post(self._path(name, "binding"), json=binding)

    async def _tell(self, name: str, status: Mapping[str, Any]) -> None:
        await self.http.patch(
            self._path(name, "status"),
            content=json.dumps({"status": status}),
            headers={"Content-Type": "application/strategic-merge-patch+json"},
        )

    async def _gone(self, pod: Pod) -> None:
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        await self.http.request("DELETE", self._path(pod["metadata"]["name"]), json=options)

    def _path(self, *rest: str) -> str:
        return "/".join([f"/api/v1/namespaces/{self.namespace}/pods", *rest])


def running(pod: Pod) -> dict[str, Any]:
    """The status of a pod that has been started."""
    now = _now()
    ready = [{"type": each, "status": "True", "lastTransitionTime": now} for each in ("Ready", "ContainersReady")]
    state = {"running": {"startedAt": now}}
    return {"phase": "Running", "startTime": now, "conditions": ready, **_container(pod, state, is_ready=True)}


def over(pod: Pod, code: int, words: str) -> dict[str, Any]:
    """The status of a pod that has ended."""
    now = _now()
    state = {"terminated": {"exitCode": code, "message": words, "finishedAt": now, "startedAt": now}}
    unready = [{"type": each, "status": "False", "lastTransitionTime": now} for each in ("Ready", "ContainersReady")]
    phase = "Failed" if code else "Succeeded"
    return {"phase": phase, "conditions": unready, **_container(pod, state, is_ready=False)}


def _container(pod: Pod, state: Mapping[str, Any], *, is_ready: bool) -> dict[str, Any]:
    container = pod["spec"]["containers"][0]
    row = {"name": container["name"], "image": container["image"], "imageID": "", "restartCount": 0}
    return {"containerStatuses": [row | {"ready": is_ready, "state": state}]}


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def environment_of(pod: Pod) -> dict[str, str]:
    """Of its container; fields of the pod by annotation or label, as a Job's index is."""
    found: dict[str, str] = {}
    for variable in pod["spec"]["containers"][0].get("env") or []:
        path = (((variable.get("valueFrom") or {}).get("fieldRef")) or {}).get("fieldPath", "")
        if named := re.fullmatch(r"metadata\.(annotations|labels)\['(.+)'\]", path):
            found[variable["name"]] = (pod["metadata"].get(named[1]) or {}).get(named[2], "")
        elif "value" in variable:
            found[variable["name"]] = variable["value"]
    return found


@contextlib.asynccontextmanager
async def kubelet(apiserver: ApiServer, namespace: str, start: Start) -> AsyncIterator[Kubelet]:
    """A kubelet for one namespace; processes that it started end with it."""
    import ssl

    async with httpx.AsyncClient(
        base_url=apiserver.url,
        verify=ssl.create_default_context(cafile=str(apiserver.certificate)),
        headers={"Authorization": f"Bearer {apiserver.token}"},
        timeout=30,
        trust_env=False,
    ) as http:
        await http.post("/api/v1/nodes", json={"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        one = Kubelet(http, namespace, start)
        task = asyncio.create_task(one.run())
        try:
            yield one
        finally:
            if not task.done():
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            for container in one.running.values():
                if isinstance(container, Program):
                    container.kill()
