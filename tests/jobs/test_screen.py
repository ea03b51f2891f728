"""What a person sees of a batch: never more than is true, in a terminal and in a log."""

import io

import pytest
from rich.console import Console

from sightline.jobs.items import Counts, Fault, Item, Line
from sightline.jobs.screen import LINE_SECONDS, Screen, duration, size

DONE = Line(Item("a"), {"caption": "A."})
FAILED = Line(Item("b"), fault=Fault("decode", "decode_failed", "No image."))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


def screen(log: io.StringIO, clock: Clock, total: int = 100, **before: int) -> Screen:
    return Screen(Console(file=log, width=100), total, clock=clock, **before)


def test_rate_time_left_and_failures(log: io.StringIO, clock: Clock) -> None:
    with screen(log, clock) as shown:
        assert shown.words() == ""
        for _ in range(9):
            shown.line(DONE)
        shown.line(FAILED)
        clock.now += 5
        shown.tick("")

        assert shown.words() == "2.0/s  45 s left  1 failed"


def test_what_was_done_before_is_no_speed_of_today(log: io.StringIO, clock: Clock) -> None:
    with screen(log, clock, done=50, failed=2) as shown:
        clock.now += 10
        for _ in range(10):
            shown.line(DONE)
        shown.tick("")

        assert (shown.done, shown.failed) == (60, 2)
        assert shown.words() == "1.0/s  40 s left  2 failed"


def test_why_nothing_moves(log: io.StringIO, clock: Clock) -> None:
    with screen(log, clock) as shown:
        clock.now += 5
        shown.tick("BackendUnavailable")
        assert "the pipeline does not answer" in shown.words()
        clock.now += 5
        shown.tick("")
        assert "waiting" not in shown.words()


def test_never_more_than_all(log: io.StringIO, clock: Clock) -> None:
    """A worker that was killed may have said more than it kept; the counts of the store have the last word."""
    with screen(log, clock, total=3, done=2) as shown:
        for _ in range(4):
            shown.line(DONE)
        assert shown.done == 3
        shown.settled(Counts(succeeded=2, failed=1))
        assert (shown.done, shown.failed) == (3, 1)


def test_a_log_gets_a_line_now_and_then(log: io.StringIO, clock: Clock) -> None:
    with screen(log, clock, total=2000, done=1000) as shown:
        clock.now += LINE_SECONDS - 1
        shown.tick("")
        assert log.getvalue() == ""
        for _ in range(30):
            shown.line(DONE)
        clock.now += 1
        shown.tick("")
        shown.tick("")

    assert log.getvalue().startswith("1,030 of 2,000  1.0/s")
    assert log.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (59, "59 s"),
        (60, "1 min"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (3600, "1 h"),
        (100_800, "1 d 4 h"),
    ],
)
def test_seconds_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("data", "words"),
    [(0, "0 bytes"), (1023, "1,023 bytes"), (1024, "1.0 KiB"), (4_299_162, "4.1 MiB"), (5 * 2**40, "5.0 TiB")],
)
def test_bytes_as_people_say_them(data: int, words: str) -> None:
    assert size(data) == words
