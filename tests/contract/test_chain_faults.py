"""The chain when its parts die, stall or fail: real processes, real signals."""

import asyncio
import os
import signal

import httpx
import pytest

from tests.conftest import Launcher, Server, free_port
from tests.scenes import RED_CIRCLE, red_circle


def gateway_for(launcher: Launcher, describe_url: str, enhance_url: str, *flags: str) -> Server:
    return launcher.start("pipeline", "--describe-url", describe_url, "--enhance-url", enhance_url, *flags)


def ask(server: Server, **options: str) -> httpx.Response:
    with server.client() as client:
        return client.post("/caption", files={"image": ("a.png", red_circle())}, data=options)


@pytest.fixture(scope="module")
def stoppable_enhancer(session_launcher: Launcher) -> Server:
    """One for the tests that stop and continue it."""
    return session_launcher.start("enhance").wait_ready()


def test_a_killed_enhancer_costs_the_enhancement_and_comes_back(launcher: Launcher, describe: Server):
    enhancer = launcher.start("enhance").wait_ready()
    gateway = gateway_for(launcher, describe.url, enhancer.url).wait_ready()
    assert ask(gateway).json()["enhanced"] is True

    enhancer.process.send_signal(signal.SIGKILL)
    enhancer.process.wait()
    degraded = ask(gateway)
    assert degraded.status_code == 200
    assert degraded.json()["caption"] == RED_CIRCLE
    assert degraded.json()["enhanced"] is False
    assert degraded.json()["enhancement_error"]["code"] == "enhancer_unavailable"
    assert ask(gateway, strict="true").status_code == 503
    with gateway.client() as client:
        assert client.get("/v2/models/pipeline/ready").status_code == 200

    launcher.start("enhance", port=enhancer.port).wait_ready()
    for _ in range(100):
        if ask(gateway).json()["enhanced"]:
            return
    pytest.fail("the enhancer came back, but the chain did not notice")


def test_a_stalled_enhancer_is_given_up_in_time(launcher: Launcher, describe: Server, stoppable_enhancer: Server):
    enhancer = stoppable_enhancer
    gateway = gateway_for(launcher, describe.url, enhancer.url, "--enhance-timeout-seconds", "1").wait_ready()
    os.kill(enhancer.process.pid, signal.SIGSTOP)
    try:
        body = ask(gateway).json()
    finally:
        os.kill(enhancer.process.pid, signal.SIGCONT)
    assert body["caption"] == RED_CIRCLE
    assert body["enhanced"] is False
    assert body["enhancement_error"]["code"] == "enhancer_timeout"


def test_one_deadline_bounds_the_whole_chain(launcher: Launcher, describe: Server, stoppable_enhancer: Server):
    enhancer = stoppable_enhancer
    gateway = gateway_for(launcher, describe.url, enhancer.url).wait_ready()
    os.kill(enhancer.process.pid, signal.SIGSTOP)
    try:
        with gateway.client() as client:
            response = client.post(
                "/caption",
                files={"image": ("a.png", red_circle())},
                headers={"X-Request-Timeout-Ms": "4000"},
            )
    finally:
        os.kill(enhancer.process.pid, signal.SIGCONT)
    assert response.status_code == 200
    assert response.json()["enhancement_error"]["code"] == "enhancer_timeout"
    assert response.elapsed.total_seconds() < 4


def test_no_final_answer_is_told_with_its_reason(launcher: Launcher, describe: Server, enhance: Server):
    gateway = gateway_for(launcher, describe.url, enhance.url, "--enhance-tokens", "3").wait_ready()
    error = ask(gateway).json()["enhancement_error"]
    assert error["code"] == "no_final_answer"
    assert "length" in error["message"]


def test_a_dead_caption_step_is_503_and_not_ready(launcher: Launcher, enhance: Server):
    gateway = gateway_for(launcher, f"http://127.0.0.1:{free_port()}", enhance.url).wait_live()
    with gateway.client() as client:
        assert client.get("/v2/models/pipeline/ready").status_code == 503
        assert client.get("/health").json()["ok"] is False
        response = client.post("/caption", files={"image": ("a.png", red_circle())})
    assert response.status_code == 503


def test_bad_images_keep_their_status_through_the_chain(pipeline: Server):
    with pipeline.client() as client:
        for data, status, code in [
            (b"", 400, "image_empty"),
            (b"GIF89a nonsense", 400, None),
            (red_circle()[:-500], 400, "image_truncated"),
            (b"\x89PNG\r\n\x1a\n" + b"x" * 21_000_000, 413, "image_too_many_bytes"),
        ]:
            response = client.post("/caption", files={"image": ("a.png", data)})
            assert response.status_code == status, response.text
            assert code is None or response.json()["code"] == code
        assert client.post("/caption", files={"image": ("a.png", red_circle())}).status_code == 200


async def test_a_client_that_leaves_cancels_the_work(launcher: Launcher, describe: Server, stoppable_enhancer: Server):
    enhancer = stoppable_enhancer
    gateway = gateway_for(launcher, describe.url, enhancer.url).wait_ready()
    captions_before = captions_of(describe)
    os.kill(enhancer.process.pid, signal.SIGSTOP)
    try:
        async with httpx.AsyncClient(base_url=gateway.url, trust_env=False) as client:
            asking = asyncio.create_task(client.post("/caption", files={"image": ("a.png", red_circle())}, timeout=60))
            while captions_of(describe) == captions_before:  # until the chain waits for the stopped enhancer
                await asyncio.sleep(0.05)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        while "status=499" not in gateway.log():
            await asyncio.sleep(0.05)
    finally:
        os.kill(enhancer.process.pid, signal.SIGCONT)
    assert ask(gateway).json()["enhanced"] is True


def captions_of(describe: Server) -> int:
    return describe.log().count("POST /v2/models/describe/infer status=200")
