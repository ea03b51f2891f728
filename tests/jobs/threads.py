"""A server on an event loop in a thread of its own, so that tests may be as blocking as they like."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Loop:
    """The loop that a server runs on."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()

    def run(self, work: Coroutine[Any, Any, T], timeout: float = 30) -> T:
        """Do something there, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout)


@contextmanager
def looping(serve: Callable[[], AbstractAsyncContextManager[None]]) -> Iterator[Loop]:
    """Serve until the block ends. An error of the start is raised here."""
    loop = Loop()
    thread = threading.Thread(target=loop.loop.run_forever, name="server", daemon=True)
    thread.start()
    server = serve()
    try:
        loop.run(server.__aenter__())
        try:
            yield loop
        finally:
            loop.run(server.__aexit__(None, None, None))
    finally:
        loop.run(_cancel_rest())
        loop.loop.call_soon_threadsafe(loop.loop.stop)
        thread.join(30)
        loop.loop.close()


async def _cancel_rest() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
