"""The main job as a person starts it: one command, two captions, and nothing left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port

PATIENCE_SECONDS = 180


def three_free_ports() -> int:
    while True:
        port = free_port()
        with contextlib.suppress(OSError, OverflowError), contextlib.ExitStack() as sockets:
            for number in range(port, port + 3):
                sockets.enter_context(socket.socket()).bind(("127.0.0.1", number))
            return port


def is_open(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def port() -> int:
    return three_free_ports()


@pytest.fixture
def serving(port: int, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A demonstration that has captioned its samples and keeps serving."""
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


def test_captions_and_enhances_two_samples_and_exits_0(port: int):
    done = subprocess.run(
        [sys.executable, "-m", "sightline", "demo"],
        env=os.environ | {"DEMO_EXIT": "1", "PORT": str(port)},
        capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "authentication is OFF" in done.stdout
    assert done.stdout.count("enhanced") == 2
    assert "astronaut" in done.stdout
    assert not any(is_open(number) for number in range(port, port + 3))


def test_ctrl_c_stops_everything_with_0(port: int, serving: subprocess.Popen[bytes]):
    assert all(is_open(number) for number in range(port, port + 3))
    serving.send_signal(signal.SIGINT)
    assert serving.wait(60) == 0
    assert not any(is_open(number) for number in range(port, port + 3))


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_its_servers_do_not_outlive_a_killed_demonstration(port: int, serving: subprocess.Popen[bytes]):
    serving.kill()
    serving.wait(60)
    deadline = time.monotonic() + 60
    while any(is_open(number) for number in range(port, port + 3)):
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
