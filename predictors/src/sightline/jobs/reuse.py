"""Results by content: the same bytes, asked the same, of the same revision, are asked once a batch.

Between the workers of a batch the store decides (`cache/<sha256>.json`, created once), within a process a future does.
Only whole successes are kept: a fault, or a caption whose enhancement failed, may come out better next time.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from sightline.jobs import metrics
from sightline.jobs.items import Fault
from sightline.jobs.layout import Layout
from sightline.jobs.objects import Objects, StoreFault
from sightline.jobs.target import Success

REMEMBERED = 10_000


class Reuse:
    """The results of one batch by content."""

    def __init__(self, objects: Objects, layout: Layout) -> None:
        self._objects = objects
        self._layout = layout
        self._known: OrderedDict[str, Success] = OrderedDict()
        self._asking: dict[str, asyncio.Future[None]] = {}

    async def result(self, key: str, ask: Callable[[], Awaitable[Success | Fault]]) -> Success | Fault:
        """What `ask` would answer, or answered before to the same key. Raises what `ask` raises."""
        while (other := self._asking.get(key)) is not None:
            await asyncio.shield(other)  # then it is known, or this item asks itself
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            metrics.REUSED.inc()
            return known
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asking[key] = done
        try:
            return await self._first(key, ask)
        finally:
            del self._asking[key]
            done.set_result(None)

    async def _first(self, key: str, ask: Callable[[], Awaitable[Success | Fault]]) -> Success | Fault:
        stored = await self._stored(key)
        if stored is not None:
            metrics.REUSED.inc()
            return self._remember(key, stored)
        answer = await ask()
        if isinstance(answer, Fault) or answer.is_unenhanced:
            return answer
        return self._remember(key, await self._keep(key, answer))

    async def _stored(self, key: str) -> Success | None:
        try:
            data = await self._objects.read_bytes(self._layout.cached(key))
        except StoreFault:
            return None
        return None if data is None else _read(data)

    async def _keep(self, key: str, answer: Success) -> Success:
        """The result that counts: another worker's, if that was first. A store that is away costs a repetition."""
        told = {
            "result": answer.result,
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }
        try:
            if await self._objects.create(self._layout.cached(key), orjson.dumps(told)):
                return answer
        except StoreFault:
            return answer
        return await self._stored(key) or answer

    def _remember(self, key: str, result: Success) -> Success:
        self._known[key] = result
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return result


def _read(data: bytes) -> Success | None:
    """None when it is no result, as half of one."""
    try:
        said: dict[str, Any] = orjson.loads(data)
        return Success(said["result"], False, int(said["prompt_tokens"]), int(said["completion_tokens"]))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
