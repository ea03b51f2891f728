"""The process that draws ahead: in order, and gone when its trainer is gone, however that ended."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from sightline.tiny.training import drawing, returning

ROOT = Path(__file__).resolve().parents[3]


def block(index: int) -> bytes:
    """More than a pipe holds."""
    return bytes([index]) * 200_000


def test_blocks_come_in_order() -> None:
    with drawing(block, range(5), ahead=2) as drawn:
        assert [part[0] for part in islice(drawn, 5)] == [0, 1, 2, 3, 4]


def test_nothing_is_left_when_the_trainer_has_had_enough() -> None:
    with drawing(block, range(100), ahead=2) as drawn:
        next(drawn)
        (worker,) = multiprocessing.active_children()
    worker.join(30)
    assert worker.exitcode is not None


def test_every_part_returns_after_each_lag() -> None:
    seen = list(returning([["a"], ["b"], ["c"], ["d"]], (0, 2)))
    assert seen == [["a"], ["b"], ["c", "a"], ["d", "b"]]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_the_trainer_is_killed(number: signal.Signals) -> None:
    program = """if True:
        import multiprocessing, time
        from sightline.tiny.training import drawing, returning
        from tests.unit.tiny.test_training import block
        if __name__ == "__main__":
            with drawing(block, range(100), ahead=2) as drawn:
                next(drawn)
                print(multiprocessing.active_children()[0].pid, flush=True)
                time.sleep(600)
    """
    trainer = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": "."},
    )
    assert trainer.stdout
    worker = int(trainer.stdout.readline())
    trainer.send_signal(number)
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 60
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    ran_on = is_running(worker)
    if ran_on:
        os.kill(worker, signal.SIGKILL)
    assert not ran_on
