"""Work begun ahead and taken in order: as many waits at once as memory allows, results as if done one by one."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


async def ahead(work: Callable[[T], Awaitable[R]], inputs: Iterable[T], width: int) -> AsyncGenerator[R]:
    """`work(input)` of each input, in order; up to `width` are under way or done and not yet taken.

    The first that raises, in the order of the inputs, ends it: that is raised and the others are cancelled. They are
    too when the generator is closed. `inputs` is drawn from as places come free, so it may be long.
    """
    waiting = iter(inputs)
    begun: deque[asyncio.Future[R]] = deque()
    try:
        while True:
            begun.extend(asyncio.ensure_future(work(one)) for one in islice(waiting, width - len(begun)))
            if not begun:
                return
            result = await begun[0]
            begun.popleft()
            yield result
    finally:
        for task in begun:
            task.cancel()
        await asyncio.gather(*begun, return_exceptions=True)
