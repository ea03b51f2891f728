"""`GET /internal/state`: whether the gateway calls its steps and reaches its bucket, for the operator.

Open without a key, as the operator has none. It tells as much as refused requests would: no address, key or message.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from sightline.engines.breaker import CircuitBreaker, State
from sightline.engines.dialect import StepName
from sightline.services.base import Json

FRESH_SECONDS = 15.0
PATIENCE_SECONDS = 2.0
"""The operator gives up after three; asking goes on, and the next one who asks is told."""
Storage = Literal[
    "unknown", "ok", "s3_access_denied", "s3_no_credentials", "s3_not_found", "s3_timeout", "s3_unavailable"
]
Ask = Callable[[str], Awaitable[str | None]]
"""Of a bucket: why nothing can be read from it, None when it answers (`Sources.bucket_fault`)."""


class StateAnswer(BaseModel):
    """What the gateway knows, now."""

    steps: dict[str, State] = Field(description="Circuit breaker of each step that is another process.")
    storage: Storage | None = Field(description="Of the buckets that are named without wildcards; null: there is none.")


class Storages:
    """Whether the gateway's buckets can be read; asked at most every fifteen seconds, whoever wants to know."""

    def __init__(self, buckets: Sequence[str], ask: Ask, clock: Callable[[], float] = time.monotonic) -> None:
        self._buckets = [name for name in buckets if "*" not in name]
        self._ask = ask
        self._clock = clock
        self._known = "unknown"
        self._at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def now(self) -> str | None:
        """`ok`, or the code of the first bucket that cannot be read; None without buckets. Within two seconds."""
        if not self._buckets:
            return None
        if self._clock() - self._at >= FRESH_SECONDS and self._asking is None:
            self._asking = asyncio.create_task(self._look())
        if self._asking is not None:
            await asyncio.wait([self._asking], timeout=PATIENCE_SECONDS)
        return self._known

    async def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])

    async def _look(self) -> None:
        try:
            faults = [await self._ask(bucket) for bucket in self._buckets]
            self._known = next((fault for fault in faults if fault), "ok")
        finally:
            self._at, self._asking = self._clock(), None


def add_state(router: APIRouter, breakers: Mapping[StepName, CircuitBreaker], storages: Storages) -> None:
    """Add the route to a gateway's own."""

    @router.get(
        "/internal/state", summary="Whether steps are called and the bucket is reached", response_model=StateAnswer
    )
    async def state() -> Json:  # pyright: ignore[reportUnusedFunction]
        steps = {str(name): breaker.state for name, breaker in breakers.items()}
        return {"steps": steps, "storage": await storages.now()}
