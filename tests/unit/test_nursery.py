"""Forked servers: what a child is given, how it ends, and that it never outlives its parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks the kernel for a signal")


def run(folder: Path, program: str) -> str:
    """What a fresh process that has no threads, as a parent must, prints."""
    head = """
        import os, signal, sys, time
        from pathlib import Path
        from sightline.nursery import Child, StillRunning, fork, settle
        folder = Path(sys.argv[1])
        log = (folder / "log").open("w+b")
    """
    code = textwrap.dedent(head) + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_child_has_its_own_environment_folder_session_and_log(tmp_path: Path):
    said = run(
        tmp_path,
        """
        def work():
            print(dict(os.environ), os.getcwd(), os.getsid(0) == os.getpid())
            print("a fault", file=sys.stderr)
            return 7
        print(fork(work, log=log, environment={"ONLY": "this"}, folder=folder).wait(10))
        """,
    )
    assert said == "7\n"
    log = (tmp_path / "log").read_text()
    assert f"{{'ONLY': 'this'}} {tmp_path} True" in log
    assert "a fault" in log


def test_what_goes_wrong_is_in_the_log_and_the_code(tmp_path: Path):
    said = run(
        tmp_path,
        """
        def breaks():
            raise ValueError("no such model")
        def leaves():
            raise SystemExit(3)
        def never():
            time.sleep(60)
        for work in (breaks, leaves):
            print(fork(work, log=log, environment={}, folder=folder).wait(10))
        child = fork(never, log=log, environment={}, folder=folder)
        try:
            child.wait(0)
        except StillRunning:
            print("still running", child.poll())
        child.send_signal(signal.SIGTERM)
        print(child.wait(10), child.poll())
        child.send_signal(signal.SIGTERM)
        """,
    )
    assert said == "1\n3\nstill running None\n-15 -15\n"
    assert "ValueError: no such model" in (tmp_path / "log").read_text()


def test_the_parent_s_exit_handlers_run_once(tmp_path: Path):
    said = run(
        tmp_path,
        """
        import atexit
        atexit.register(print, "the end")
        settle()
        print(fork(lambda: 0, log=log, environment={}, folder=folder).wait(10))
        """,
    )
    assert said == "0\nthe end\n"
    assert (tmp_path / "log").read_text() == ""


def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path):
    program = """
        import os, sys, time
        from pathlib import Path
        from sightline.nursery import fork
        folder = Path(sys.argv[1])
        child = fork(lambda: time.sleep(60), log=(folder / "log").open("wb"), environment={}, folder=folder)
        (folder / "pid.part").write_text(str(child.pid))
        (folder / "pid.part").rename(folder / "pid")
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)])
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
