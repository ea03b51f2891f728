"""`--reload`: a child process, started again when a file changes, stopped with its parent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import os, pathlib, signal, sys
source = pathlib.Path(sys.argv[1])
if "broken" in source.read_text():
    sys.exit(3)
if "over" in source.read_text():
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: (print("stopped", flush=True), os._exit(0)))
print("began", os.environ.get("RELOAD"), flush=True)
signal.pause()
"""

PARENT = """
import sys, pathlib
from sightline.reload import Reloader
child, folder = sys.argv[1:]
command = [sys.executable, child, folder + "/source.py"]
sys.exit(Reloader(command, pathlib.Path(folder), {"RELOAD": "false"}).run())
"""


class Parent:
    """A reloader in a process of its own; its child's lines come one by one."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "watched" / "source.py"
        self.source.parent.mkdir()
        self.source.write_text("first")
        (folder / "child.py").write_text(CHILD)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(folder / "child.py"), str(self.source.parent)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def change(self, text: str) -> None:
        newer = self.source.stat().st_mtime_ns + 1_000_000_000
        self.source.write_text(text)
        os.utime(self.source, ns=(newer, newer))


@pytest.fixture
def parent(tmp_path: Path):
    parent = Parent(tmp_path)
    yield parent
    parent.process.terminate()  # and with it the child
    parent.process.wait(60)
    parent.process.stdout.close()


def test_a_change_starts_it_again(parent: Parent) -> None:
    assert parent.line() == "began false"

    parent.change("second")

    assert [parent.line(), parent.line()] == ["stopped", "began false"]


def test_after_a_failure_it_waits_for_a_change(parent: Parent) -> None:
    assert parent.line() == "began false"
    parent.change("broken")
    assert parent.line() == "stopped"

    parent.change("good again")

    assert parent.line() == "began false"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_stopped_with_its_parent(parent: Parent, number: signal.Signals) -> None:
    assert parent.line() == "began false"

    parent.process.send_signal(number)

    assert parent.line() == "stopped"
    assert parent.process.wait(30) == 0


def test_when_it_ends_by_itself_all_is_over(parent: Parent) -> None:
    assert parent.line() == "began false"

    parent.change("over")

    assert parent.line() == "stopped"
    assert parent.process.wait(30) == 0
