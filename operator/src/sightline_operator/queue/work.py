"""A queue of object keys: each once, never worked on twice at the same time, with backoff and later visits.

`WorkQueue` is the bookkeeping, on a clock that is handed in; `Queue` lets asyncio workers wait on it.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

BASE_SECONDS = 0.5
CAP_SECONDS = 300.0


class Key(NamedTuple):
    """An object of ours."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.namespace}/{self.name}"


def backoff_seconds(failures: int, jitter: float) -> float:
    """Seconds to wait after so many failures in a row: doubling from 0.5 s to 5 minutes, less up to half of it.

    jitter   in 0…1, the caller's random number
    """
    return min(CAP_SECONDS, BASE_SECONDS * 2.0 ** min(failures - 1, 32)) * (1 - jitter / 2)


@dataclass
class WorkQueue:
    """Keys that are due, in the order they became so; keys due later; keys being worked on."""

    rng: random.Random
    _due: dict[Key, float] = field(default_factory=dict)
    """Key → since when it waits; a dict keeps the order."""
    _later: dict[Key, float] = field(default_factory=dict)
    _heap: list[tuple[float, Key]] = field(default_factory=list)
    _active: set[Key] = field(default_factory=set)
    _dirty: dict[Key, float] = field(default_factory=dict)
    """Keys that became due while they were being worked on."""
    _why: dict[Key, set[object]] = field(default_factory=dict)
    """What made them so."""
    _failures: dict[Key, int] = field(default_factory=dict)

    def add(self, key: Key, now: float, delay: float = 0.0, why: object = None) -> None:
        """Make a key due now or later; of several times the earliest counts.

        why   the news, if it is one that may be taken back
        """
        if delay > 0:
            if key not in self._due and now + delay < self._later.get(key, float("inf")):
                self._later[key] = now + delay
                heapq.heappush(self._heap, (now + delay, key))
            return
        self._later.pop(key, None)
        if key in self._active:
            self._dirty.setdefault(key, now)
            self._why.setdefault(key, set()).add(why)
        else:
            self._due.setdefault(key, now)

    def retract(self, key: Key, why: object) -> None:
        """This news was no news to whoever works on the key: it is due again only if there was other news."""
        reasons = self._why.get(key, set())
        reasons.discard(why)
        if not reasons:
            self._why.pop(key, None)
            self._dirty.pop(key, None)

    def take(self, now: float) -> tuple[Key, float] | None:
        """The key that waited longest and how many seconds it did, or None. It is then being worked on until `done`."""
        self._ripen(now)
        if not self._due:
            return None
        key = next(iter(self._due))
        since = self._due.pop(key)
        self._active.add(key)
        return key, max(0.0, now - since)

    def done(self, key: Key, now: float, *, is_failed: bool = False, at_least: float = 0.0) -> float:
        """The work on a key has ended; returns the seconds until it is tried again (0: it worked).

        at_least   seconds the API server asked us to wait
        """
        self._active.discard(key)
        wait = 0.0
        if is_failed:
            self._failures[key] = self._failures.get(key, 0) + 1
            wait = max(at_least, backoff_seconds(self._failures[key], self.rng.random()))
            self.add(key, now, wait)
        else:
            self._failures.pop(key, None)
        self._why.pop(key, None)
        if key in self._dirty:
            self.add(key, self._dirty.pop(key))
        return wait

    def forget(self, key: Key) -> None:
        """No later visit to a key whose object is gone."""
        self._later.pop(key, None)
        self._failures.pop(key, None)

    def next_due(self) -> float | None:
        """When the next later key becomes due."""
        while self._heap and self._later.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)  # superseded
        return self._heap[0][0] if self._heap else None

    def oldest_age(self, now: float) -> float:
        """Seconds the longest-waiting due key has waited."""
        waiting = (min(since.values()) for since in (self._due, self._dirty) if since)
        return max(0.0, now - min(waiting, default=now))

    def __len__(self) -> int:
        return len(self._due) + len(self._dirty)

    @property
    def active(self) -> int:
        """Keys being worked on."""
        return len(self._active)

    @property
    def is_idle(self) -> bool:
        """Nothing due, nothing being worked on; later visits do not count."""
        return not (self._due or self._dirty or self._active)

    def _ripen(self, now: float) -> None:
        while (due := self.next_due()) is not None and due <= now:
            _, key = heapq.heappop(self._heap)
            del self._later[key]
            self.add(key, due)


class Queue:
    """`WorkQueue` for asyncio workers, on the event loop's clock or one handed in."""

    def __init__(self, rng: random.Random | None = None, clock: Callable[[], float] | None = None) -> None:
        self.work = WorkQueue(rng or random.Random())  # noqa: S311  jitter, not a secret
        self._clock = clock or asyncio.get_running_loop().time
        self._changed = asyncio.Event()

    def add(self, key: Key, delay: float = 0.0, why: object = None) -> None:
        """Make a key due now or later."""
        self.work.add(key, self._clock(), delay, why)
        self._changed.set()

    def retract(self, key: Key, why: object) -> None:
        """See `WorkQueue.retract`."""
        self.work.retract(key, why)

    async def take(self) -> tuple[Key, float]:
        """Wait for a key; returns it and the seconds it waited."""
        while True:
            taken = self.work.take(now := self._clock())
            if taken is not None:
                return taken
            self._changed.clear()
            due = self.work.next_due()
            try:
                await asyncio.wait_for(self._changed.wait(), None if due is None else max(0.0, due - now))
            except TimeoutError:
                continue

    def done(self, key: Key, *, is_failed: bool = False, at_least: float = 0.0) -> float:
        """See `WorkQueue.done`."""
        wait = self.work.done(key, self._clock(), is_failed=is_failed, at_least=at_least)
        self._changed.set()
        return wait

    def forget(self, key: Key) -> None:
        """See `WorkQueue.forget`."""
        self.work.forget(key)

    def oldest_age(self) -> float:
        """Seconds the longest-waiting due key has waited."""
        return self.work.oldest_age(self._clock())
