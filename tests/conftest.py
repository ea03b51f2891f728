"""What all tests share: real processes of ours on free ports, one set for the whole run."""

import contextlib
import gc
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.nursery import Forked, Nursery

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 600


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """schemathesis imports a module at the end, and CPython 3.11 cannot compile one while garbage with tasks goes."""
    gc.collect()
    gc.disable()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Server:
    """One `sightline serve` process."""

    name: str
    port: int
    process: Forked
    log_path: Path
    headers: dict[str, str] = field(default_factory=dict)
    grpc_port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=180, trust_env=False, headers=self.headers, **options)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            response = httpx.get(f"{self.url}/v2/health/ready", timeout=5, trust_env=False)
            return response.status_code == 200
        return False

    def wait_ready(self) -> "Server":
        deadline = time.monotonic() + START_SECONDS
        while not self.is_ready():
            assert self.process.poll() is None, f"{self.name} ended:\n{self.log()[-3000:]}"
            assert time.monotonic() < deadline, f"{self.name} was not ready:\n{self.log()[-3000:]}"
            time.sleep(0.1)
        return self

    def wait_live(self) -> "Server":
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, f"{self.name} ended:\n{self.log()[-3000:]}"
            assert time.monotonic() < deadline
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/v2/health/live", timeout=5, trust_env=False).status_code == 200:
                    return self
            time.sleep(0.05)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


NURSERY = Nursery()


class Launcher:
    """Starts servers and stops them all at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.servers: list[Server] = []

    def start(
        self, name: str, *flags: str, env: dict[str, str] | None = None, auth: str = "off", port: int | None = None
    ) -> Server:
        port, grpc_port = port or free_port(), free_port()
        log_path = self._folder / f"{name}-{port}-{len(self.servers)}.log"
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "S3_", "API_"))}
        clean |= {
            "XDG_STATE_HOME": str(self._folder / "state"),
            "HF_HUB_OFFLINE": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        words = [*name.split(), "--host", "127.0.0.1", "--port", str(port), "--grpc-port", str(grpc_port),
                 "--auth", auth, *flags]  # fmt: skip
        process = NURSERY.start(words, log_path, clean | (env or {}), self._folder)
        server = Server(name, port, process, log_path, grpc_port=grpc_port)
        self.servers.append(server)
        return server

    def stop(self) -> None:
        for server in self.servers:
            if server.process.poll() is None:
                server.process.send_signal(signal.SIGTERM)
        for server in self.servers:
            server.stop()


def pytest_unconfigure() -> None:
    NURSERY.close()


@pytest.fixture(scope="session")
def session_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("servers"))
    yield launcher
    launcher.stop()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    """For tests that kill, starve or misconfigure servers of their own."""
    launcher = Launcher(tmp_path)
    yield launcher
    launcher.stop()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory):
    from tests.s3 import running_s3

    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def chain_servers(session_launcher: Launcher, s3_server) -> dict[str, Server]:
    """describe, enhance and pipeline, ready, with the S3 server of the run."""
    s3 = s3_server.environment()
    describe = session_launcher.start("describe", env=s3)
    enhance = session_launcher.start("enhance")
    pipeline = session_launcher.start("pipeline", "--describe-url", describe.url, "--enhance-url", enhance.url, env=s3)
    for server in (describe, enhance, pipeline):
        server.wait_ready()
    return {"describe": describe, "enhance": enhance, "pipeline": pipeline}


@pytest.fixture(scope="session")
def describe(chain_servers) -> Server:
    return chain_servers["describe"]


@pytest.fixture(scope="session")
def enhance(chain_servers) -> Server:
    return chain_servers["enhance"]


@pytest.fixture(scope="session")
def pipeline(chain_servers) -> Server:
    return chain_servers["pipeline"]


@pytest.fixture(scope="session")
def everything(session_launcher: Launcher, s3_server, tmp_path_factory: pytest.TempPathFactory) -> Server:
    """All six predictors in one process, ready; `circle.png` lies below the image root."""
    from tests.scenes import red_circle

    images = tmp_path_factory.mktemp("images")
    (images / "circle.png").write_bytes(red_circle())
    flags = os.environ.get("SIGHTLINE_TEST_FLAGS", "").split()
    return session_launcher.start("all", "--image-root", str(images), *flags, env=s3_server.environment()).wait_ready()


@pytest.fixture
def rng() -> random.Random:
    return random.Random(20_261_121)
