"""The main job as a person starts it: one command, six servers, readable answers, and nothing left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.conftest import free_port

PATIENCE_SECONDS = 180


def ports(port: int) -> list[int]:
    """Gateway, describe, enhance, generate, embed, blip; and their gRPC ports."""
    return [first + index for first in (port, port + 100) for index in range(6)]


def free_ports() -> int:
    while True:
        port = free_port()
        with contextlib.suppress(OSError, OverflowError), contextlib.ExitStack() as sockets:
            for number in ports(port):
                sockets.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return port


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def port() -> int:
    return free_ports()


@pytest.fixture
def serving(port: int, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A demonstration that has shown its samples and keeps serving."""
    log = tmp_path / "demo.log"
    with log.open("wb") as sink:
        process = subprocess.Popen([sys.executable, "-m", "sightline", "demo", "--port", str(port)], stdout=sink)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while b"until Ctrl-C" not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def test_shows_all_six_and_exits_0(port: int):
    done = subprocess.run(
        [sys.executable, "-m", "sightline", "demo"],
        env=os.environ | {"DEMO_EXIT": "1", "PORT": str(port), "MODEL": "/nowhere", "BLIP__MODEL": "/nowhere"},
        capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "authentication is OFF" in done.stdout
    assert done.stdout.count("enhanced") == 2
    assert "astronaut" in done.stdout
    for name, number in zip(
        ("pipeline", "describe", "enhance", "generate", "embed", "blip"), ports(port), strict=False
    ):
        assert f"{name:<9} http://127.0.0.1:{number}  ready" in done.stdout
    assert "image 2" in done.stdout, "generate says which image holds a star"
    assert "page 2:" in done.stdout
    assert "a large red circle on a white background" in done.stdout, "blip's caption"
    assert not any(is_open(number) for number in ports(port))


def test_every_server_answers_on_its_port_and_ctrl_c_stops_everything_with_0(
    port: int, serving: subprocess.Popen[bytes]
):
    assert all(is_open(number) for number in ports(port))
    names = ("pipeline", "describe", "enhance", "generate", "embed", "blip")
    for name, number in zip(names, ports(port), strict=False):
        response = httpx.get(f"http://127.0.0.1:{number}/v2/models/{name}", trust_env=False)
        assert response.json()["parameters"]["demo_model"] is True
    assert len({session_of(pid) for pid in children(serving.pid)}) == 6, "six processes, each with a session of its own"
    serving.send_signal(signal.SIGINT)
    assert serving.wait(60) == 0
    assert not any(is_open(number) for number in ports(port))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def session_of(pid: int) -> int:
    return os.getsid(pid)


def test_a_server_that_dies_ends_the_demonstration_with_its_log(port: int, tmp_path: Path):
    log = tmp_path / "demo.log"
    with log.open("wb") as sink:
        process = subprocess.Popen([sys.executable, "-m", "sightline", "demo", "--port", str(port)], stdout=sink)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while len(running := children(process.pid)) < 6:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(running[0], signal.SIGKILL)
        assert process.wait(60) == 1
        assert "describe ended with code -9. Its log:" in log.read_text().replace("\n", " ")
    finally:
        if process.poll() is None:
            process.kill()
    assert not any(is_open(number) for number in ports(port))


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_its_servers_do_not_outlive_a_killed_demonstration(port: int, serving: subprocess.Popen[bytes]):
    serving.kill()
    serving.wait(60)
    deadline = time.monotonic() + 60
    while any(is_open(number) for number in ports(port)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_says_when_a_port_is_taken():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, "-m", "sightline", "demo", "--port", str(port), "--exit"],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"port {port} cannot be used" in done.stdout
