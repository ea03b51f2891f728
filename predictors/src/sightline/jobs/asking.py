"""One item of a batch asked of its target over HTTP: fetched, sent, repeated where that is safe, and one line."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from sightline.jobs.items import Item, Line
from sightline.jobs.page import Page

if TYPE_CHECKING:
    import httpx

    from sightline.jobs.pace import Pace

Fetch = Callable[[Item], Awaitable[bytes]]
"""The bytes of an item's image as it was planned (If-Match). Raises Missing, Changed, AccessDenied, StoreUnavailable."""


class RevisionMismatch(Exception):
    """The target answers with another revision than the batch's (exit code 44)."""


class TargetRefuses(Exception):
    """The target takes none of our keys (exit code 42, AccessDenied)."""


class Asker:
    """Asks one target for a whole batch; a `shard.Do`.

    page     its target, options and attempts
    fetch    the bytes of an item with a `uri`
    pace     how many calls are open at once, and when all of them wait
    """

    def __init__(self, page: Page, fetch: Fetch, pace: Pace, *, client: httpx.AsyncClient | None = None) -> None:
        raise NotImplementedError

    async def __call__(self, item: Item) -> Line:
        """Raises RevisionMismatch, TargetRefuses, and pace.TargetGone (exit code 75) after too long an outage."""
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.aclose()
