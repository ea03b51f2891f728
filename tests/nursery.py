"""Servers for tests, forked from one process that has imported the libraries: one second each instead of ten.

Run as a program it is that process: a line of JSON in, a line of JSON out. What a server does is what
`sightline serve` does; the command itself is run by the tests of the demonstration and of `--help`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # pandas imports pyarrow where there is one
}


class Forked:
    """A server, used like a `subprocess.Popen`."""

    def __init__(self, nursery: "Nursery", pid: int, args: Sequence[str]) -> None:
        self._nursery = nursery
        self.pid = pid
        self.args = args
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.ask({"poll": self.pid})["code"]
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            time.sleep(0.02)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The process that forks, started when it is first needed. For any thread.

    module  what it runs: reads questions, answers them
    command what a log calls the forked processes
    """

    def __init__(self, module: str = "tests.nursery", command: Sequence[str] = ("sightline", "serve")) -> None:
        self._module = module
        self._command = command
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def start(self, words: Sequence[str], log: Path, environment: Mapping[str, str], folder: Path) -> Forked:
        """The command with these words in a folder, its output in a log."""
        wanted = {"words": list(words), "log": str(log), "environment": dict(environment), "folder": str(folder)}
        return Forked(self, self.ask(wanted)["pid"], [*self._command, *words])

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", self._module],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT,
                    cwd=Path(__file__).resolve().parent.parent,
                )  # fmt: skip
            assert self._process.stdin
            assert self._process.stdout
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, "the nursery has ended; see above"
        return json.loads(answer)

    def close(self) -> None:
        """End it, and with it, by the kernel's hand, every server that still runs."""
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.communicate(timeout=60)


def main() -> None:
    from sightline import nursery
    from sightline.server.serve import main as serve

    nursery.import_models()
    answer_questions(serve)


def answer_questions(work: Callable[[Sequence[str]], int]) -> None:
    """Fork a process for every start that is asked for, until the input ends. All imports are done by now."""
    from sightline import nursery

    threads = len(list(Path("/proc/self/task").iterdir()))
    assert threads == 1, f"{threads} threads: a fork would inherit their locks"
    nursery.settle()
    children: dict[int, nursery.Child] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if "poll" in asked:
            answer = {"code": children[asked["poll"]].poll()}
        else:
            with Path(asked["log"]).open("wb") as log:
                child = nursery.fork(
                    partial(work, asked["words"]),
                    log=log,
                    environment=asked["environment"],
                    folder=Path(asked["folder"]),
                )
            children[child.pid] = child
            answer = {"pid": child.pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
