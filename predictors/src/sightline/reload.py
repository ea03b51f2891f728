"""`--reload`, for development: the server as a child process that is started again when a source file changes."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import sightline

log = logging.getLogger("sightline.server")

POLL_SECONDS = 0.5
STOP_SECONDS = 40
WATCHED = (".py", ".html", ".jinja")


def serve_reloading(argv: Sequence[str]) -> int:
    """Serve what `sightline serve` was asked for, in a child process. Returns the exit code."""
    flags = [word for word in argv if word.rpartition(".")[2].lstrip("-") != "reload"]
    command = [sys.executable, "-m", "sightline", "serve", *flags]
    return Reloader(command, Path(sightline.__file__).parent, os.environ | {"RELOAD": "false"}).run()


class Reloader:
    """Runs a command, and runs it again whenever a source file below a folder is another than before.

    A command that fails is run again at the next change; one that ends by itself ends the reloader.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._command = command
        self._folder = folder
        self._environment = environment
        self._is_stopping = False

    def run(self) -> int:
        """Run until SIGTERM or SIGINT, or until the command ends by itself. Returns its exit code."""
        before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        while True:
            seen = self._snapshot()
            child = subprocess.Popen(self._command, env=dict(self._environment))
            code = self._until_change(child, seen)
            if code is not None:
                return code
            log.info("a source file has changed: starting again")
            self._end(child)

    def _until_change(self, child: "subprocess.Popen[bytes]", seen: Mapping[Path, int]) -> int | None:
        """The exit code when all is over, None when a file has changed."""
        has_failed = False
        while True:
            try:
                code = child.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            if self._is_stopping:
                return self._end(child)
            if code == 0:
                return 0
            if code is not None and not has_failed:
                has_failed = True
                log.error("the server ended with code %d; waiting for a change", code)
            if self._snapshot() != seen:
                return None
            if has_failed:
                time.sleep(POLL_SECONDS)

    def _end(self, child: "subprocess.Popen[bytes]") -> int:
        child.terminate()
        try:
            return child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def _snapshot(self) -> dict[Path, int]:
        files = (path for path in self._folder.rglob("*") if path.suffix in WATCHED)
        found: dict[Path, int] = {}
        for path in files:
            try:
                found[path] = path.stat().st_mtime_ns
            except FileNotFoundError:  # an editor that writes a file anew
                continue
        return found

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._is_stopping = True
