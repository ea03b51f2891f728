"""The files and batches of one server: opened behind its start, swept while it runs, closed with it."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from sightline.errors import Unavailable
from sightline.jobs.objects import NoConditionalWrites, Objects, StoreFault
from sightline.jobs.openai.batch import Backend
from sightline.jobs.openai.files import Files

log = logging.getLogger("sightline.jobs")

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
SWEEP_SECONDS = 900.0
PATIENCE_SECONDS = 15.0
"""Whoever asks while the server starts waits so long for the store's first answer."""


class Desk:
    """What the routes ask. A store that is away keeps no server from starting: until it is there they answer 503.

    open_store   opens the store; raises OSError or StoreFault while it cannot be had
    files_of     the files of that store
    backend_of   who does the batches of that store
    """

    def __init__(
        self,
        open_store: Callable[[], Objects],
        files_of: Callable[[Objects], Files],
        backend_of: Callable[[Objects, Files], Backend],
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._open_store = open_store
        self._files_of = files_of
        self._backend_of = backend_of
        self._sleep = sleep
        self._open: tuple[Files, Backend] | None = None
        self._task: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()

    def start(self) -> None:
        """Open the store, however long that takes, then take up what was left undone."""
        self._task = asyncio.create_task(self._live(), name="openai-batches")

    async def close(self) -> None:
        """Stop at once; what is undone goes on elsewhere, or here after a restart."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._open is not None:
            await self._open[1].close()

    async def wait(self) -> None:
        """Return when the store is open, or was found to be away, or after a while."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._tried.wait(), PATIENCE_SECONDS)

    @property
    def files(self) -> Files:
        """Raises Unavailable (503) while the store is not open."""
        return self._opened()[0]

    @property
    def backend(self) -> Backend:
        """Raises Unavailable (503) while the store is not open."""
        return self._opened()[1]

    def _opened(self) -> tuple[Files, Backend]:
        if self._open is None:
            message = "The store of files and batches is not open yet."
            raise Unavailable(message, code="store_unavailable", retry_after=5)
        return self._open

    async def _live(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while self._open is None:
            try:
                self._open = await self._opening()
            except (OSError, StoreFault) as error:
                self._tried.set()
                kind = "no conditional writes" if isinstance(error, NoConditionalWrites) else type(error).__name__
                log.error("files and batches are not served: %s: %s", kind, error)
                await self._sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        self._tried.set()
        files, backend = self._open
        await self._taking_up(backend)
        while True:
            with contextlib.suppress(StoreFault):  # it may be away for a while
                await files.sweep()
            await self._sleep(SWEEP_SECONDS)

    async def _opening(self) -> tuple[Files, Backend]:
        objects = await asyncio.to_thread(self._open_store)
        await objects.probe()
        files = self._files_of(objects)
        return files, self._backend_of(objects, files)

    async def _taking_up(self, backend: Backend) -> None:
        while True:
            try:
                await backend.start()
            except StoreFault as error:
                log.error("unfinished batches are not taken up yet: %s", error)
                await self._sleep(LONGEST_PAUSE_SECONDS)
            else:
                return
