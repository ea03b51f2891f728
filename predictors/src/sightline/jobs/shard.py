"""One shard of a batch, done: every chunk that is not there yet, each created once; then `done/`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from sightline.jobs.items import Counts, Item, Line
from sightline.jobs.objects import Objects
from sightline.jobs.page import Page

if TYPE_CHECKING:
    from sightline.jobs.plan import Plan
    from sightline.jobs.reports import Waiting

Do = Callable[[Item], Awaitable[Line]]
"""Does one item, for better or worse. What it raises is no item's fault and ends the shard: see `run_shard`."""

OPEN_CHUNKS = 2
"""So many chunks are begun and not yet in the store: what a kill costs is at most their items."""


class Stop:
    """How a shard is asked to end before it is done. For one event loop; may be shared by several shards."""

    def after_chunks(self) -> None:
        """Begin no other chunk; finish those that are open."""
        raise NotImplementedError

    def now(self, grace_seconds: float = 0.0) -> None:
        """Feed no other item; chunks whose items are all begun get `grace_seconds` to be written."""
        raise NotImplementedError


class Stopped(Exception):
    """The shard is not done, because it was stopped. `counts`: of what lies in the store."""

    def __init__(self, counts: Counts) -> None:
        super().__init__("stopped")
        self.counts = counts


class TooManyFailures(Exception):
    """More items of this shard alone failed than the whole batch may have."""


async def run_shard(
    page: Page,
    plan: Plan,
    shard: int,
    objects: Objects,
    do: Do,
    *,
    width: int,
    stop: Stop | None = None,
    on_line: Callable[[Line], None] | None = None,
    waiting: Callable[[], Waiting] | None = None,
) -> Counts:
    """Do what is missing of a shard, and say that it is done. Returns the counts of all of it.

    objects  rooted at the batch's output location; the keys are `Layout.of("", page.uid, page.fingerprint)`
    width    items that are worked on at once
    on_line  told every line of this process when its item is done (its chunk may still be open)
    waiting  why the worker stands still just now, for `progress/`

    Any number of processes may do the same shard at the same time. Raises ShardCorrupt, Stopped, TooManyFailures,
    what `do` raises, and the typed faults of the store when it is away for too long.
    """
    raise NotImplementedError
