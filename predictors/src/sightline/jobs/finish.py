"""The end of a batch: every chunk is there once and holds its items, outputs are made, MANIFEST.json is created."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sightline.jobs.items import Counts
from sightline.jobs.layout import Layout
from sightline.jobs.objects import Objects
from sightline.jobs.page import Page
from sightline.jobs.reports import Part

if TYPE_CHECKING:
    from sightline.jobs.plan import Plan

Which = Literal["all", "results", "errors"]
Ended = Literal["batch_expired", "batch_cancelled"]


class Unfinished(Exception):
    """Chunks are missing: the batch is not done. `chunks`, `items`: how many."""

    def __init__(self, chunks: int, items: int) -> None:
        super().__init__(f"{items} items have no result yet ({chunks} chunks are missing)")
        self.chunks, self.items = chunks, items


class PartCorrupt(Exception):
    """A chunk does not hold exactly the lines of its items, in their order. The message names it, and what is wrong."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a batch has come to: `output/MANIFEST.json`.

    parts     of every shard, its chunks in order
    outputs   keys of what was made of them, below the batch's root: results, errors, parquet
    sidecars  captions that were handed to files beside images
    ended     why it was ended early, if it was: the items that were not done by then are lines with that error
    """

    name: str
    uid: str
    fingerprint: str
    items: int
    counts: Counts
    parts: tuple[tuple[Part, ...], ...]
    outputs: Mapping[str, str]
    sidecars: int = 0
    ended: Ended | None = None

    def to_json(self) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Manifest:
        """Raises KeyError, TypeError or ValueError when it is none."""
        raise NotImplementedError


async def finish(
    page: Page,
    objects: Objects,
    *,
    sidecars: Objects | None = None,
    ended: Ended | None = None,
    on_items: Callable[[int], None] | None = None,
) -> Manifest:
    """Verify a batch, make its outputs and commit them. Does nothing when that was done already.

    objects   rooted at the batch's output location; the keys are `Layout.of("", page.uid, page.fingerprint)`
    sidecars  the store of `page.outputs.sidecars`, rooted there
    ended     the batch was ended early: chunks that are missing are created, with this error for each of their items
    on_items  told how many items of a shard have been verified

    May be killed anywhere and done again, also by two at once: every output is a function of plan and parts.
    Raises PlanMissing, ShardCorrupt, Unfinished, PartCorrupt, ParquetMissing, and the typed faults of the store.
    """
    raise NotImplementedError


def lines_of(objects: Objects, layout: Layout, plan: Plan, which: Which = "all") -> AsyncIterator[bytes]:
    """The lines (JSON, each with its line feed) of the chunks that are there, in the order of the items, some at a time.

    Chunks that are missing are left out. Memory: some chunks, whatever the batch.
    """
    raise NotImplementedError
