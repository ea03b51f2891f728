"""Operators for tests: in this process with a client that can be killed, or as a process of their own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from sightline_operator import probe
from sightline_operator.act.client import KubernetesClient
from sightline_operator.observe.reflector import Reflector
from sightline_operator.process import OnEvent, Operator
from sightline_operator.resources import BY_KIND, OURS
from sightline_operator.settings import API_VERSION, OperatorSettings
from tests.operator.conftest import ApiServer

DEADLINE_SECONDS = 60.0
MUTATING = ("apply", "apply_status", "create", "replace", "delete", "create_event")


class Killed(BaseException):
    """What a kill -9 is to a process: nothing after it is done."""


class Mortal:
    """A client that dies before or after its k-th mutating call; counts them all."""

    def __init__(self, client: KubernetesClient, *, kill_at: int = 0, is_after: bool = False) -> None:
        self._client, self.kill_at, self.is_after = client, kill_at, is_after
        self.calls: list[str] = []
        self.is_dead = False

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        return call if name not in MUTATING else self._counted(name, call)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        async def counted(*args: Any, **kwargs: Any) -> Any:
            if self.is_dead:
                raise Killed
            what = args[0] if args and isinstance(args[0], Mapping) else {"kind": name, "metadata": {}}
            self.calls.append(f"{name} {what.get('kind')} {what['metadata'].get('name')}")
            is_last = len(self.calls) == self.kill_at
            if is_last and not self.is_after:
                self.is_dead = True
                raise Killed
            answer = await call(*args, **kwargs)
            if is_last:
                self.is_dead = True
                raise Killed
            return answer

        return counted


@contextlib.asynccontextmanager
async def connected(apiserver: ApiServer, url: str | None = None, token: str | None = None) -> AsyncIterator[Any]:
    """A client of the operator's own kind; through a proxy at another URL."""
    path = apiserver.folder / f"kubeconfig-{abs(hash((url, token)))}.yaml"
    path.write_text(yaml.safe_dump(apiserver.kubeconfig_of(token or apiserver.token, url=url)))
    client = await KubernetesClient.connect(str(path))
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def operating(client: Any, namespace: str, **settings: Any) -> AsyncIterator[Operator]:
    """An operator in this process, for one namespace, without Lease and Kopf: what it does is the same."""
    async with running(client, namespace, **settings) as (operator, _):
        yield operator


@contextlib.asynccontextmanager
async def running(client: Any, namespace: str, **settings: Any) -> AsyncIterator[tuple[Operator, asyncio.Task[None]]]:
    """As `operating`, with the task, which ends when the operator dies."""
    own = OperatorSettings(namespaces=(namespace,), identity="test", **settings)
    operator = Operator(client, own, probe.Health(clock=asyncio.get_running_loop().time))

    async def watch_ours(on_event: OnEvent) -> None:
        await asyncio.gather(
            *(
                Reflector(client, operator.cache, resource, namespace, relist_seconds=own.repair_seconds).run()
                for resource in OURS
            )
        )

    task = asyncio.create_task(operator.run(watch_ours))
    try:
        yield operator, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], Any], what: str = "", seconds: float = DEADLINE_SECONDS) -> Any:
    """Poll until the condition (a function or coroutine function) holds; returns what it said."""
    deadline = time.monotonic() + seconds
    while True:
        answer = condition()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {seconds} s: {what or condition}"
        await asyncio.sleep(0.05)


def pipeline(name: str, namespace: str, *, url: str = "http://127.0.0.1:9/v1", **spec: Any) -> dict[str, Any]:
    """A VisionPipeline whose caption step is an external URL; `spec` is merged in, one level deep; None takes away."""
    body: dict[str, Any] = {
        "caption": {"endpoint": {"url": url, "model": "m"}},
        "gateway": {"auth": {"none": True}},
    }
    for key, value in spec.items():
        merged = {**body.get(key, {}), **value} if isinstance(value, dict) else value
        body[key] = {k: v for k, v in merged.items() if v is not None} if isinstance(merged, dict) else merged
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": API_VERSION, "kind": "VisionPipeline", "metadata": metadata, "spec": body}


def condition(cr: Mapping[str, Any] | None, type_: str) -> Mapping[str, Any]:
    """One condition of a status, empty when it is not there."""
    conditions = ((cr or {}).get("status") or {}).get("conditions") or []
    return next((each for each in conditions if each["type"] == type_), {})


class User:
    """Somebody with a client who is not the operator."""

    def __init__(self, apiserver: ApiServer, namespace: str) -> None:
        self.http, self.namespace = apiserver.client(), namespace

    def __enter__(self) -> User:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def url(self, kind: str, name: str = "", sub: str = "") -> str:
        return BY_KIND[kind].path(self.namespace, name, sub)

    def apply(self, manifest: Mapping[str, Any], manager: str = "user") -> dict[str, Any]:
        import json

        answer = self.http.patch(
            self.url(manifest["kind"], manifest["metadata"]["name"]),
            params={"fieldManager": manager, "force": "true"},
            headers={"Content-Type": "application/apply-patch+yaml"},
            content=json.dumps(manifest),
        )
        assert answer.is_success, answer.text
        return answer.json()

    def merge(self, kind: str, name: str, patch: Mapping[str, Any], sub: str = "") -> dict[str, Any]:
        import json

        answer = self.http.patch(
            self.url(kind, name, sub),
            headers={"Content-Type": "application/merge-patch+json"},
            content=json.dumps(patch),
            params={"fieldManager": "somebody"},
        )
        assert answer.is_success, answer.text
        return answer.json()

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        answer = self.http.get(self.url(kind, name))
        return answer.json() if answer.is_success else None

    def list(self, kind: str) -> list[dict[str, Any]]:
        return self.http.get(self.url(kind)).json()["items"]

    def delete(self, kind: str, name: str) -> None:
        answer = self.http.delete(self.url(kind, name), params={"propagationPolicy": "Background"})
        assert answer.is_success, answer.text

    def events(self) -> list[dict[str, Any]]:
        return self.http.get(f"/apis/events.k8s.io/v1/namespaces/{self.namespace}/events").json()["items"]

    def is_settled(self, name: str) -> bool:
        """The status tells of the latest spec."""
        cr = self.get("VisionPipeline", name)
        status = (cr or {}).get("status") or {}
        return cr is not None and status.get("observedGeneration") == cr["metadata"]["generation"]


@contextlib.contextmanager
def process(
    apiserver: ApiServer,
    *flags: str,
    kubeconfig: Path | None = None,
    module: str = "sightline_operator",
    **variables: str,
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m sightline_operator run` as it is run by anybody; its log is in the API server's folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("KUBE", "SIGHTLINE"))} | variables
    log = apiserver.folder / f"operator-{time.monotonic_ns()}.log"
    with log.open("wb") as stream:
        running = subprocess.Popen(
            [
                *(sys.executable, "-m", module, "run"),
                *("--kubeconfig", str(kubeconfig or apiserver.kubeconfig), *flags),
            ],
            stderr=stream,
            stdout=stream,
            env=environment,
        )
        running.log = log  # type: ignore[attr-defined]
        try:
            yield running
        finally:
            if running.poll() is None:
                running.send_signal(signal.SIGKILL)
            running.wait()
