"""What a person sees of a batch that runs in their terminal: a bar with rate and time left, or lines in a log."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from sightline.jobs.items import Counts, Line
from sightline.jobs.progress import Meter
from sightline.jobs.reports import Waiting

LINE_SECONDS = 30.0
_WAITS = {
    "BackendUnavailable": "waiting: the pipeline does not answer",
    "Throttled": "waiting: the pipeline has enough to do",
}


class Screen:
    """How far one batch is. `console` writes to stderr: what is piped on is not for people.

    total, done  items, and those that were done before this go
    failed       of those that were done before
    """

    def __init__(
        self,
        console: Console,
        total: int,
        *,
        done: int = 0,
        failed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._total = total
        self._clock = clock
        self.done = done
        self.failed = failed
        self._waiting: Waiting = ""
        self._meter = Meter().at(clock(), done)
        self._said_at = clock()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "Screen":
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                transient=False,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self.done)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._show()
            self._bar.stop()

    def line(self, line: Line) -> None:
        """One more item is done."""
        self.done = min(self._total, self.done + 1)
        self.failed += line.fault is not None
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)

    def tick(self, waiting: Waiting) -> None:
        """Some seconds have passed. `waiting`: why nothing moves."""
        self._waiting = waiting
        self._meter = self._meter.at(self._clock(), self.done)
        if self._bar is not None:
            self._show()
        elif self._clock() - self._said_at >= LINE_SECONDS:
            self._said_at = self._clock()
            self._console.print(f"{self.done:,} of {self._total:,}  {self.words()}".rstrip(), highlight=False)

    def say(self, text: str) -> None:
        """A sentence, above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def settled(self, counts: Counts) -> None:
        """What has been counted in the store, once all is there."""
        self.done, self.failed = counts.done, counts.failed

    def words(self) -> str:
        """Rate, time left, failures and why nothing moves, as far as they are known."""
        parts: list[str] = []
        if (rate := self._meter.rate) is not None:
            parts.append(f"{rate:.1f}/s")
        if self.done < self._total and (left := self._meter.eta_seconds(self._total)) is not None:
            parts.append(f"{duration(left)} left")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self._waiting:
            parts.append(_WAITS[self._waiting])
        return "  ".join(parts)

    def _show(self) -> None:
        assert self._bar is not None  # noqa: S101 - there is one while this is called
        self._bar.update(self._task, completed=self.done, description=self.words())


def duration(seconds: float) -> str:
    """Seconds in the two largest units that say something: `42 s`, `3 min 5 s`, `2 h 10 min`, `1 d 4 h`."""
    whole = round(seconds)
    for size, name, below, smaller in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size} {name}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def size(data: int) -> str:
    """Bytes as people say them: `4.1 MiB`."""
    amount = float(data)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:,.0f} {unit}" if unit == "bytes" else f"{amount:,.1f} {unit}"
        amount /= 1024
    return f"{amount:,.1f} TiB"
