"""Servers whose engine is vLLM, and what the `hf` models say to the same questions."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import Server, free_port

START_SECONDS = 900
"""vLLM's three processes import it one after the other; on a busy machine that is minutes."""


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def wait_gone(processes: list[psutil.Process]) -> None:
    """Fail when one of them outlives its server."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive, [process.cmdline() for process in alive]


def wait_until(condition: Callable[[], bool], server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, server.log()[-3000:]
        time.sleep(0.05)


class Servers:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.open: list[Server] = []

    def __call__(self, *words: str) -> Server:
        port = free_port()
        log = self._folder / f"{words[0]}-{port}.log"
        flags = ["--host", "127.0.0.1", "--port", str(port), "--auth", "off"]
        environment = os.environ | {
            "XDG_STATE_HOME": str(self._folder / "state"),
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process for the model: a third less to import
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "sightline", "serve", *words, *flags],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self._folder,
            )
        server = Server(" ".join(words), port, process, log)  # type: ignore[arg-type]
        self.open.append(server)
        return server

    def close(self) -> None:
        for server in self.open:
            processes = children(server.process.pid) if server.process.poll() is None else []
            server.stop()
            for process in processes:
                if process.is_running():
                    process.kill()


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("vllm"))
    yield servers
    servers.close()


def wait_ready(server: Server) -> Server:
    def is_ready() -> bool:
        assert server.process.poll() is None, server.log()[-3000:]
        return server.is_ready()

    wait_until(is_ready, server)
    return server
