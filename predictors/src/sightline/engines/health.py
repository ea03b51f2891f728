"""Whether an engine's device still has the memory for what it is asked: not after several failures in a row."""

import logging
import threading
import time

log = logging.getLogger("sightline.engines")

TRIAL_SECONDS = 5.0
"""Between two trials of an engine that ran out of memory: about as often as Kubernetes asks whether it is ready."""


class MemoryHealth:
    """Counts items that the device had no memory for, even alone, since one last succeeded. Thread-safe.

    limit   of them in a row; from then on `is_exhausted`, until one succeeds
    """

    def __init__(self, limit: int = 3) -> None:
        self.limit = limit
        self._in_a_row = 0
        self._tried_at = float("-inf")
        self._lock = threading.Lock()

    @property
    def is_exhausted(self) -> bool:
        return self._in_a_row >= self.limit

    def succeeded(self) -> None:
        """An item was answered."""
        with self._lock:
            was_exhausted, self._in_a_row = self.is_exhausted, 0
        if was_exhausted:
            log.warning("ready again: an item was answered after the device had run out of memory")

    def ran_out(self) -> None:
        """An item that was alone in its batch did not fit."""
        with self._lock:
            self._in_a_row += 1
            is_last = self._in_a_row == self.limit
        if is_last:
            log.error("not ready reason=out_of_memory: %d items in a row did not fit the device", self.limit)

    def wants_trial(self, now: float | None = None) -> bool:
        """Whether to try a small item now: nothing else may come to an engine that is not ready, and free it of that.

        True at most once in TRIAL_SECONDS. `now` is `time.monotonic()`.
        """
        now = time.monotonic() if now is None else now
        with self._lock:
            if not self.is_exhausted or now - self._tried_at < TRIAL_SECONDS:
                return False
            self._tried_at = now
            return True
