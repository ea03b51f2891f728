"""How fast a worker asks: calls in flight by AIMD, a gate that waits out an outage, and a budget of repeats.

In flight   begins at 4; one more for each answer until the target first says that it has enough (429, 503, too slow),
            from then on one more for each round of answers; each time that it has enough: half as many
Outage      after three refusals in a row without an answer nobody asks: the target's readiness is asked instead, with
            growing, scattered pauses, for as long as patience lasts. Then calls begin at one and grow as at the start
Budget      what was answered with an error is asked again at most half as often as there are answers, plus a reserve

For one event loop; it takes no locks.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

from sightline.jobs.reports import Waiting

START = 4
OUTAGE_REFUSALS = 3
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 15.0
PATIENCE_SECONDS = 1800.0
"""Longer than a node takes to be replaced and a model to load."""

REPEATS_PER_ANSWER = 0.5
RESERVE_REPEATS = 32.0
REPEATS_PER_SECOND = 1.0

Sleep = Callable[[float], Awaitable[object]]


class TargetGone(Exception):
    """No answer for as long as patience lasts (exit code 75). The message says for how long."""


class Pace:
    """Turns for the calls of one worker to one target.

    most              calls in flight at most
    is_ready          asks the target whether it could answer now; never raises
    patience_seconds  without any answer, after which every turn raises TargetGone
    """

    def __init__(
        self,
        most: int,
        is_ready: Callable[[], Awaitable[bool]],
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._most = most
        self._is_ready = is_ready
        self.patience_seconds = patience_seconds
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._limit = float(min(START, most))
        self._is_starting = True
        self._round = 0
        self._open = 0
        self._queue: deque[asyncio.Future[None]] = deque()
        self._signs = 0
        self._refusals = 0
        self._outages = 0
        self._is_throttled = False
        self._silent_since: float | None = None
        self._probing: asyncio.Task[None] | None = None
        self._gone: TargetGone | None = None
        self._repeats = RESERVE_REPEATS
        self._refilled = clock()

    @property
    def limit(self) -> int:
        """Calls that may be in flight now."""
        return 0 if self._probing is not None else int(self._limit)

    @property
    def in_flight(self) -> int:
        return self._open

    @property
    def signs(self) -> int:
        """How often the target has shown that it works: an answer to anybody, or its readiness after an outage."""
        return self._signs

    @property
    def waiting(self) -> Waiting:
        """Why calls stand still just now."""
        if self._probing is not None or self._gone is not None:
            return "BackendUnavailable"
        return "Throttled" if self._is_throttled and self._limit < 2 else ""

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[int]:
        """A place among the calls in flight, and the number of its round. Raises TargetGone.

        Whoever has it says `answered`, `throttled` or `refused` before it ends; nothing said is nothing learnt.
        """
        await self._enter()
        try:
            yield self._round
        finally:
            self._open -= 1
            self._admit()

    async def pause(self, tried: int, retry_after: float | None = None) -> None:
        """Wait before the same item is asked again, outside its turn.

        tried        how often it was refused or failed, from 1: pauses double
        retry_after  seconds that the target asked for; kept, and scattered upwards only
        """
        if retry_after is not None:
            await self._sleep(min(retry_after, LONGEST_PAUSE_SECONDS * 4) * (1 + self._jitter() / 4))
            return
        await self._sleep(self._scattered(FIRST_PAUSE_SECONDS * 2 ** min(tried, 16)))

    async def repeat(self) -> None:
        """Wait until one more repeat of a failed call is within the budget."""
        while True:
            now = self._clock()
            self._fill((now - self._refilled) * REPEATS_PER_SECOND)
            self._refilled = now
            if self._repeats >= 1:
                self._repeats -= 1
                return
            await self._sleep((1 - self._repeats) / REPEATS_PER_SECOND)

    async def aclose(self) -> None:
        """Stop asking for readiness."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)

    # --- turns -------------------------------------------------------------------------------------------------------

    async def _enter(self) -> None:
        if self._gone is not None:
            raise self._gone
        if not self._queue and self._open < self.limit:
            self._open += 1
            return
        place = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled() and place.exception() is None:  # a turn that nobody takes
                self._open -= 1
                self._admit()
            raise

    def _admit(self) -> None:
        while self._queue and self._open < self.limit:
            place = self._queue.popleft()
            if not place.done():
                self._open += 1
                place.set_result(None)

    # --- what calls have learnt --------------------------------------------------------------------------------------

    def answered(self) -> None:
        """The target worked on a call, whatever it said of the item."""
        self._works()
        self._outages = 0
        self._silent_since = None
        self._is_throttled = False
        self._fill(REPEATS_PER_ANSWER)
        self._limit = min(float(self._most), self._limit + (1 if self._is_starting else 1 / self._limit))

    def throttled(self, round_number: int) -> None:
        """The target has enough to do: 429, or too late."""
        self._slow_down(round_number)

    def refused(self, round_number: int) -> None:
        """There is no target: no connection, a broken one, no answer, 503 or a proxy's 502."""
        self._slow_down(round_number)
        self._refusals += 1
        if self._refusals >= OUTAGE_REFUSALS and self._probing is None and self._gone is None:
            self._probing = asyncio.create_task(self._wait_out())

    def _works(self) -> None:
        self._signs += 1
        self._refusals = 0

    def _slow_down(self, round_number: int) -> None:
        """Calls that began together are told once: they say the same thing."""
        self._is_throttled = True
        self._note_silence()
        if round_number == self._round:
            self._round += 1
            self._is_starting = False
            self._limit = max(1.0, self._limit / 2)

    def _note_silence(self) -> None:
        if self._silent_since is None:
            self._silent_since = self._clock()
        elif self._clock() - self._silent_since > self.patience_seconds:
            self._give_up()

    async def _wait_out(self) -> None:
        """Ask for readiness until there is some. Of outages without an answer between them each begins more slowly."""
        pause = FIRST_PAUSE_SECONDS * 2 ** min(self._outages, 16)
        self._outages += 1
        while True:
            await self._sleep(self._scattered(pause))
            if await self._is_ready():
                break
            self._note_silence()
            if self._gone is not None:
                return
            pause *= 2
        self._works()
        self._limit, self._is_starting = 1.0, True
        self._probing = None
        self._admit()

    def _give_up(self) -> None:
        self._gone = TargetGone(f"no answer for {self.patience_seconds:.0f} seconds")
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_exception(self._gone)

    def _fill(self, repeats: float) -> None:
        self._repeats = min(RESERVE_REPEATS, self._repeats + repeats)

    def _scattered(self, seconds: float) -> float:
        return min(seconds, LONGEST_PAUSE_SECONDS) * (0.5 + self._jitter())
