"""Servers as processes of their own, forked from one that has imported the libraries: six for the price of one import.

Nothing here may run once this process has threads: a child would inherit locks that nobody opens.
"""

import ctypes
import gc
import importlib
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.05


class StillRunning(Exception):
    """The child has not ended in the time it was given."""


class Child:
    """A forked process. Its parent must ask `poll` or `wait`, else it stays a zombie."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative when a signal ended it, None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def send_signal(self, number: int) -> None:
        """Does nothing to a child that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises StillRunning."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise StillRunning
            time.sleep(_POLL_SECONDS)
        return code


def import_models() -> None:
    """Import what the models need, whichever models there are; a missing extra is its server's to report."""
    from sightline import models

    for module in pkgutil.walk_packages(models.__path__, f"{models.__name__}."):
        try:
            importlib.import_module(module.name)
        except ImportError:
            continue


def settle() -> None:
    """To be called once before the first fork: the collector leaves alone what exists now, so its pages stay shared."""
    gc.collect()
    gc.freeze()


def fork(work: Callable[[], int], *, log: IO[bytes], environment: Mapping[str, str], folder: Path) -> Child:
    """Start a child that does `work` and exits with the code it returns.

    log          takes its standard output and error
    environment  replaces that of this process
    folder       it works there

    The child is the leader of a session, so that Ctrl-C is its parent's to hand on, and gets a SIGTERM when its parent
    dies, however that happens.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    if pid := os.fork():
        return Child(pid)
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        _end_with(parent)
        for target in (1, 2):
            os.dup2(log.fileno(), target)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not the parent's `finally` blocks and exit handlers


def _end_with(parent: int) -> None:
    """Ask the kernel for a SIGTERM when the parent ends, even when it is killed and cannot stop its children."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before we could ask
        raise SystemExit(1)
