"""Whether a model behind somebody else's HTTP may be called now: a circuit breaker for one event loop."""

import time
from collections import deque
from collections.abc import Callable
from typing import Literal

Outcome = Literal["answered", "failed", "abandoned"]
State = Literal["closed", "half-open", "open"]


class CircuitBreaker:
    """Whether a step may be called: closed, open after failures in a row, then half open for one probe.

        closed ──too many failures──▶ open ──open_seconds──▶ half open ──one probe──▶ closed or open

    clock          monotonic seconds
    max_failures   consecutive failures that open it
    error_percent  instead: failures among the last `window` calls that open it, in per cent
    open_seconds   how long nobody is let through, then one

    Each change of state starts a new generation; outcomes of calls that were admitted in an older
    one are ignored. For one event loop; it takes no locks.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_failures: int = 5,
        open_seconds: float = 5.0,
        error_percent: int | None = None,
        window: int = 20,
    ) -> None:
        self._clock = clock
        self._max_failures = max_failures
        self._open_seconds = open_seconds
        self._generation = 0
        self._failures = 0
        self._error_percent = error_percent
        self._last: deque[bool] = deque(maxlen=window)
        """Whether each of the last calls failed."""
        self._opened_at: float | None = None
        self._is_probing = False

    def admit(self) -> int | None:
        """A permit for one call, to be handed back to `record`; None while the step is left alone."""
        if self._opened_at is not None:
            if self._is_probing or self.retry_after() > 0:
                return None
            self._is_probing = True
        return self._generation

    def record(self, permit: int, outcome: Outcome) -> None:
        """Say how a call ended. `abandoned` (cancelled, out of time) tells nothing, but frees the probe."""
        if permit != self._generation:
            return
        if outcome == "abandoned":
            self._is_probing = False
        elif outcome == "answered":
            self._failures = 0
            self._last.append(False)
            if self._opened_at is not None:
                self._turn(opened_at=None)
        else:
            self._failures += 1
            self._last.append(True)
            if self._opened_at is not None or self._is_too_much():
                self._turn(opened_at=self._clock())

    def retry_after(self) -> float:
        """Seconds until a call may be let through; 0 when closed."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self._open_seconds - self._clock())

    @property
    def state(self) -> State:
        """For people and metrics."""
        if self._opened_at is None:
            return "closed"
        return "open" if self.retry_after() > 0 else "half-open"

    def _is_too_much(self) -> bool:
        if self._error_percent is None:
            return self._failures >= self._max_failures
        return len(self._last) == self._last.maxlen and 100 * sum(self._last) >= self._error_percent * len(self._last)

    def _turn(self, *, opened_at: float | None) -> None:
        self._generation += 1
        self._last.clear()
        self._opened_at = opened_at
        self._is_probing = False
