"""Threads beside the event loop and the engine's, and what they tell Prometheus.

Threads and not processes: PIL's codecs and resize, torchvision's and NumPy's loops all run without the interpreter's
lock; processes would copy every file in and every tensor out, hold a second torch each, and could be killed alone
(docs/preprocessing.md; `make bench-decode` runs both beside an engine).
"""

import asyncio
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from prometheus_client import Counter, Histogram

from sightline.errors import Unavailable

T = TypeVar("T")

STAGE_SECONDS = Histogram(
    "sightline_preprocess_seconds",
    "Preparing one image, by stage: wait (for a thread), decode (file to pixels), model (pixels to patches).",
    ["stage"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30),
)
DECODED = Counter(
    "sightline_images_decoded_total", "Decoded images: their format, and 1, 2, 4, 8 times smaller.", ["format", "scale"]
)


@contextmanager
def stage(name: str) -> Generator[None]:
    """Count the seconds of a stage that ended well."""
    began = time.perf_counter()
    yield
    STAGE_SECONDS.labels(name).observe(time.perf_counter() - began)


class Pool:
    """A few threads. Work whose caller left before its turn is not done; what is left at `close` is."""

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    async def run(self, work: Callable[[], T]) -> T:
        """Wait for a thread, then for the work. Raises what it raises, and Unavailable (503) after `close`."""
        submitted = time.perf_counter()

        def timed() -> T:
            STAGE_SECONDS.labels("wait").observe(time.perf_counter() - submitted)
            return work()

        try:
            pending = asyncio.get_running_loop().run_in_executor(self._threads, timed)
        except RuntimeError as error:  # the pool is shut down
            raise Unavailable("The server is shutting down.", code="shutting_down") from error
        return await pending

    def close(self) -> None:
        """Take no more work; what is there is done. Does not block, a second call changes nothing."""
        self._threads.shutdown(wait=False)
