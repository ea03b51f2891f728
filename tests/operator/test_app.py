"""`python -m sightline_operator` as it is run by anybody: Kopf, Lease, probes, logs, signals."""

import asyncio
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from sightline_operator.api import crds
from tests.operator.conftest import ApiServer, free_ports
from tests.operator.harness import User, condition, pipeline, process, until
from tests.operator.proxy import proxying


@pytest.fixture
def user(apiserver: ApiServer, namespace: str) -> Iterator[User]:
    with User(apiserver, namespace) as somebody:
        yield somebody


def flags(user: User, port: int, *more: str) -> list[str]:
    own = [f"--namespace={user.namespace}", f"--lease-namespace={user.namespace}", f"--metrics-port={port}"]
    return [*own, *more]


def get(port: int, path: str) -> httpx.Response | None:
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=5, trust_env=False)
    except httpx.HTTPError:
        return None


def lines(running: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in running.log.read_text().splitlines()]


def holder(user: User) -> str:
    return ((user.get("Lease", "sightline-operator") or {}).get("spec") or {}).get("holderIdentity", "")


async def test_it_serves_a_pipeline_tells_how_it_is_and_leaves_tidily(apiserver: ApiServer, user: User) -> None:
    port = free_ports(1)[0]
    with process(apiserver, *flags(user, port, "--identity=me")) as running:
        user.apply(pipeline("p", user.namespace))
        await until(lambda: user.is_settled("p"), "settled", 120)
        await until(lambda: (answer := get(port, "/healthz")) and answer.status_code == 200)
        assert (get(port, "/readyz") or pytest.fail("no answer")).status_code == 200
        shown = (get(port, "/metrics") or pytest.fail("no answer")).text
        assert "sightline_operator_leader 1.0" in shown
        assert 'sightline_operator_apply_total{kind="Deployment",outcome="created"} 1.0' in shown
        assert 'sightline_operator_reconcile_total{kind="VisionPipeline",result="ok"}' in shown
        assert holder(user) == "me"
        cr = user.get("VisionPipeline", "p") or {}
        assert "finalizers" not in cr["metadata"]
        assert "annotations" not in cr["metadata"]
        writers = {entry["manager"] for entry in cr["metadata"]["managedFields"]}
        assert writers == {"user", "sightline-operator"}

        user.merge("VisionPipeline", "p", {"spec": {"gateway": {"replicas": 3}}})
        await until(lambda: (user.get("Deployment", "p-gateway") or {})["spec"]["replicas"] == 3)
        user.delete("VisionPipeline", "p")
        user.apply(pipeline("q", user.namespace))
        await until(lambda: user.is_settled("q"))

        running.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(running.wait, 20) == 0
    assert holder(user) == ""
    records = lines(running)
    assert all({"time", "level", "logger", "message"} <= set(record) for record in records)
    assert [r for r in records if r.get("object") == f"VisionPipeline/{user.namespace}/p" and "created" in r["message"]]
    assert [r for r in records if r["level"] == "error"] == []


@pytest.mark.slow
async def test_two_processes_take_turns(apiserver: ApiServer, user: User) -> None:
    """The second is ready while it waits; it leads at once after a SIGTERM."""
    one, two = free_ports(2)
    with process(apiserver, *flags(user, one, "--identity=one")) as first:
        await until(lambda: holder(user) == "one", "the first leads", 120)
        with process(apiserver, *flags(user, two, "--identity=two")):
            await until(lambda: (answer := get(two, "/readyz")) and answer.status_code == 200, "ready", 120)
            assert "sightline_operator_leader 0.0" in (get(two, "/metrics") or pytest.fail("no answer")).text
            user.apply(pipeline("p", user.namespace))
            await until(lambda: user.is_settled("p"))
            assert holder(user) == "one"
            first.send_signal(signal.SIGTERM)
            started = time.monotonic()
            await until(lambda: holder(user) == "two", "the second leads")
            assert time.monotonic() - started < 15
            user.merge("VisionPipeline", "p", {"spec": {"gateway": {"replicas": 2}}})
            await until(lambda: (user.get("Deployment", "p-gateway") or {})["spec"]["replicas"] == 2)


async def test_a_process_whose_lease_is_stolen_ends(apiserver: ApiServer, user: User) -> None:
    with process(apiserver, *flags(user, free_ports(1)[0])) as running:
        await until(lambda: holder(user), "it leads", 120)
        user.merge("Lease", "sightline-operator", {"spec": {"holderIdentity": "thief"}})
        assert await asyncio.to_thread(running.wait, 20) == 1
    assert holder(user) == "thief"
    assert "held by thief" in running.log.read_text()


async def test_dry_run_tells_everything_and_writes_nothing(apiserver: ApiServer, user: User) -> None:
    user.apply(pipeline("p", user.namespace))
    before = user.get("VisionPipeline", "p")
    async with proxying(apiserver) as proxy:
        kubeconfig = apiserver.folder / "through-proxy.yaml"
        kubeconfig.write_text(yaml.safe_dump(apiserver.kubeconfig_of(apiserver.token, url=proxy.url)))
        with process(apiserver, *flags(user, free_ports(1)[0], "--dry-run"), kubeconfig=kubeconfig) as running:
            await until(lambda: "dry run: status" in running.log.read_text(), "it told its status", 120)
        text = running.log.read_text()
        assert "dry run: Deployment" in text
        assert {query for method, query in proxy.queries if method != "GET"} <= {"All"}
    assert user.get("VisionPipeline", "p") == before
    assert user.get("Deployment", "p-gateway") is None
    assert holder(user) == ""
    assert user.events() == []


@pytest.mark.slow
async def test_a_kopf_watch_that_hears_nothing_is_noticed(apiserver: ApiServer, user: User) -> None:
    """Kopf's streams stay open and silent. Lists go on telling what is so, and the probe says that Kopf is deaf."""
    port = free_ports(1)[0]
    async with proxying(apiserver) as proxy:
        kubeconfig = apiserver.folder / "deaf.yaml"
        kubeconfig.write_text(yaml.safe_dump(apiserver.kubeconfig_of(apiserver.token, url=proxy.url)))
        own = flags(user, port, "--repair-seconds=1")
        with process(apiserver, *own, kubeconfig=kubeconfig):
            user.apply(pipeline("p", user.namespace))
            await until(lambda: user.is_settled("p"), "settled", 120)
            proxy.on_event = lambda path, event: [] if "/visionpipelines" in path else [event]
            for replicas in (2, 3):
                user.merge("VisionPipeline", "p", {"spec": {"gateway": {"replicas": replicas}}})
                await until(lambda: (user.get("Deployment", "p-gateway") or {})["spec"]["replicas"] == replicas)  # noqa: B023
                # Else its write of the status is refused for the next change, which it then has seen without any list.
                await until(lambda: user.is_settled("p"))
            await until(lambda: (answer := get(port, "/healthz")) and answer.status_code == 503)
            assert "VisionPipeline is deaf" in (get(port, "/healthz") or pytest.fail("no answer")).text


async def test_it_waits_for_its_own_definitions(new_apiserver: Any) -> None:
    server = new_apiserver()
    with server.namespace() as namespace, User(server, namespace) as user:
        port = free_ports(1)[0]
        with process(server, *flags(user, port)) as running:
            await until(lambda: "install the CRDs" in running.log.read_text(), "it says what is missing", 120)
            assert (get(port, "/healthz") or pytest.fail("no answer")).status_code == 200
            applied = await asyncio.to_thread(command, "crds", "--apply", "--kubeconfig", str(server.kubeconfig))
            assert applied.returncode == 0, applied.stderr
            user.apply(pipeline("p", namespace))
            await until(lambda: condition(user.get("VisionPipeline", "p"), "Ready"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sightline_operator", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_crds_prints_what_the_api_holds() -> None:
    printed = command("crds")
    assert printed.returncode == 0
    assert list(yaml.safe_load_all(printed.stdout)) == json.loads(json.dumps(crds()))


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["render", "--help"]])
def test_help_is_there(arguments: list[str]) -> None:
    shown = command(*arguments)
    assert shown.returncode == 0
    assert "usage: sightline-operator" in shown.stdout


def test_an_unknown_image_is_refused_before_anything_starts() -> None:
    refused = command("run", "--image", "nonsense=x:1")
    assert refused.returncode != 0
    assert "NAME=IMAGE" in refused.stderr
