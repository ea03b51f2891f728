"""How a predictor lives: live at once, ready when loaded, busy without going deaf, drained at the end."""

import asyncio
import base64
import shutil
import signal
from pathlib import Path

import httpx
import pytest

import sightline
from tests.conftest import Launcher, Server
from tests.scenes import RED_CIRCLE, red_circle

TINY = Path(sightline.__path__[0]) / "tiny"


def infer_body() -> dict:
    text = base64.b64encode(red_circle()).decode()
    return {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}]}


def test_is_live_before_it_is_ready_and_says_503_until_then(launcher: Launcher):
    server = launcher.start("describe").wait_live()
    with server.client() as client:
        ready = client.get("/v2/models/describe/ready")
        if ready.status_code == 503:  # a very fast load would be no fault
            assert ready.json()["ready"] is False
            assert client.get("/v2/health/ready").status_code == 503
            early = client.post("/v2/models/describe/infer", json=infer_body())
            assert early.status_code == 503
            assert early.json()["code"] == "model_not_ready"
            assert early.headers["Retry-After"]
            assert client.get("/health").status_code == 200
    server.wait_ready()
    with server.client() as client:
        assert client.get("/v2/health/ready").status_code == 200


@pytest.mark.parametrize("fault", ["absent", "no weights", "not a Qwen"])
def test_a_failed_load_exits_non_zero(launcher: Launcher, tmp_path: Path, fault: str):
    model = tmp_path / "model"
    if fault == "no weights":
        shutil.copytree(TINY / "describe", model)
        (model / "model.safetensors").unlink()
    elif fault == "not a Qwen":
        shutil.copytree(TINY / "enhance", model)
    server = launcher.start("describe", "--model", str(model))
    assert server.process.wait(500) == 1
    assert "stopped:" in server.log()


def test_keys_are_needed_unless_switched_off_by_name(launcher: Launcher):
    server = launcher.start("enhance", auth="api-key")
    assert server.process.wait(60) != 0
    assert "no API key configured" in server.log()


def test_a_wrong_key_is_403_everywhere_but_at_the_probes(launcher: Launcher):
    server = launcher.start("enhance", auth="api-key", env={"API_KEY": "first,second"}).wait_ready()
    with server.client() as client:
        for path in ("/docs", "/openapi.json", "/metrics", "/", "/v2", "/v1/models", "/openai/v1/models", "/nowhere"):
            response = client.get(path, headers={"X-API-Key": "wrong"})
            assert response.status_code == 403, path
            body = response.json()
            assert (body.get("code") or body["error"]["code"]) == "invalid_api_key"
        for path in ("/health", "/v2/health/live", "/v2/health/ready", "/v2/models/enhance/ready"):
            assert client.get(path).status_code == 200, path
        for headers in ({"X-API-Key": "second"}, {"Authorization": "Bearer first"}):
            assert client.get("/v2", headers=headers).status_code == 200
    assert "first" not in server.log()


def test_a_full_queue_is_429_with_retry_after(launcher: Launcher):
    server = launcher.start("describe", "--queue-size", "1").wait_ready()

    async def flood() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
            return await asyncio.gather(
                *(client.post("/v2/models/describe/infer", json=infer_body()) for _ in range(12))
            )

    responses = asyncio.run(flood())
    assert {response.status_code for response in responses} == {200, 429}
    refused = next(response for response in responses if response.status_code == 429)
    assert refused.json()["code"] == "queue_full"
    assert int(refused.headers["Retry-After"]) >= 1


async def test_health_is_answered_while_the_model_is_busy(describe: Server):
    async with httpx.AsyncClient(base_url=describe.url, timeout=60, trust_env=False) as client:
        busy = [asyncio.create_task(client.post("/v2/models/describe/infer", json=infer_body())) for _ in range(16)]
        answered_while_busy = 0
        while not all(task.done() for task in busy):
            assert (await client.get("/v2/health/live")).status_code == 200
            answered_while_busy += sum(not task.done() for task in busy) > 0
        assert answered_while_busy > 0
        assert {response.status_code for response in await asyncio.gather(*busy)} == {200}


async def test_sigterm_finishes_what_is_running_and_exits_0(launcher: Launcher):
    server = launcher.start("describe").wait_ready()
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        tensor = infer_body()["inputs"][0]
        many = {"inputs": [tensor | {"shape": [32], "data": tensor["data"] * 32}]}
        running = asyncio.create_task(client.post("/v2/models/describe/infer", json=many))
        in_flight = b'sightline_items_in_flight{model_name="describe"} 32.0'
        while in_flight not in (await client.get("/metrics")).content and not running.done():
            pass
        assert not running.done(), "the request ended before the signal could be sent"
        server.process.send_signal(signal.SIGTERM)
        response = await running
    assert response.status_code == 200
    assert response.json()["outputs"][0]["data"] == [RED_CIRCLE] * 32
    assert await asyncio.to_thread(server.process.wait, 30) == 0


def test_sigterm_while_loading_exits_0(launcher: Launcher):
    server = launcher.start("describe").wait_live()
    assert server.stop() == 0


def test_help_lists_the_settings():
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "sightline", "serve", "describe", "--help"], capture_output=True, text=True, check=True
    )
    assert "--max-pixels" in done.stdout
    assert "--predictor_host" not in done.stdout  # what KServe would have answered


def test_request_ids_are_echoed_or_made(describe: Server):
    with describe.client() as client:
        assert client.get("/health", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
        assert len(client.get("/health").headers["X-Request-Id"]) == 32
        assert client.get("/health", headers={"X-Request-Id": "bad id\u00e9".encode("latin-1")}).status_code == 200
