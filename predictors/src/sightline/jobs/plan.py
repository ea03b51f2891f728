"""The plan of a batch: its items cut into shards, written once; PLAN.json is the commit.

Shard files lie below an attempt's own folder and count for nothing until PLAN.json names that attempt: a planner that
died leaves files that nobody reads, and of two planners at once, one wins.
"""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from sightline.jobs.items import Item
from sightline.jobs.layout import Layout
from sightline.jobs.objects import Objects
from sightline.jobs.page import Location, Page

MAX_SHARD_BYTES = 32 * 1024 * 1024
"""A shard ends early at this size of its file: lines with pictures inside are megabytes."""
OPEN_WRITES = 4
"""Shard files that are being written while the next ones are filled."""


class PlanCorrupt(Exception):
    """PLAN.json cannot be understood, or is missing where it must be."""


class ShardCorrupt(Exception):
    """A shard's file is missing or is not what was planned: this shard cannot be done, others can (exit code 43)."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of the table. `sha256`: of its file, 64 hexadecimal digits."""

    items: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a batch consists of: PLAN.json.

    attempt      whose shard files count
    fingerprint  of the page it was made of
    items        of all shards
    size_bytes   of all images, as far as their sizes were known
    skipped      items that had a caption already, and are in no shard
    chunk_size   items of a chunk; the last of a shard may have fewer
    shards       the table; shard n is the file `Layout.items(attempt, n)`
    source       where the items lie, without credentials, for a batch that does some of them again
    """

    attempt: str
    fingerprint: str
    items: int
    size_bytes: int
    skipped: int
    chunk_size: int
    shards: tuple[Shard, ...]
    source: Location | None = None

    def chunks(self, shard: int) -> int:
        """How many chunks a shard has."""
        return -(-self.shards[shard].items // self.chunk_size)

    @property
    def total_chunks(self) -> int:
        return sum(self.chunks(shard) for shard in range(len(self.shards)))

    def in_short(self) -> dict[str, Any]:
        """As a plan worker's last words say it (the operator's `contract.Plan`)."""
        return {
            "shards": len(self.shards),
            "items": self.items,
            "fingerprint": self.fingerprint,
            "bytes": self.size_bytes,
        }

    def to_json(self) -> dict[str, Any]:
        source = self.source and {
            "url": self.source.url,
            "endpoint": self.source.endpoint,
            "region": self.source.region,
            "path_style": self.source.path_style,
        }
        return {
            "attempt": self.attempt,
            "fingerprint": self.fingerprint,
            "items": self.items,
            "bytes": self.size_bytes,
            "skipped": self.skipped,
            "chunk_size": self.chunk_size,
            "source": source,
            "shards": [{"items": shard.items, "sha256": shard.sha256} for shard in self.shards],
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Plan":
        """Raises PlanCorrupt when it is none, or does not add up."""
        try:
            plan = cls(
                attempt=str(said["attempt"]),
                fingerprint=str(said["fingerprint"]),
                items=int(said["items"]),
                size_bytes=int(said["bytes"]),
                skipped=int(said["skipped"]),
                chunk_size=int(said["chunk_size"]),
                shards=tuple(Shard(int(row["items"]), str(row["sha256"])) for row in said["shards"]),
                source=Location(**said["source"]) if said.get("source") else None,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanCorrupt("PLAN.json is not a plan") from error
        if plan.items != sum(shard.items for shard in plan.shards) or plan.chunk_size < 1:
            raise PlanCorrupt("the shards of PLAN.json do not add up")
        return plan


def layout_of(page: Page) -> Layout:
    """The keys of a batch in `open_location(page.outputs.location)`."""
    return Layout.of("", page.uid, page.fingerprint)


async def read_plan(objects: Objects, layout: Layout) -> Plan | None:
    """The plan of a batch; None while there is none. Raises PlanCorrupt."""
    data = await objects.read_bytes(layout.plan)
    if data is None:
        return None
    try:
        said = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise PlanCorrupt("PLAN.json is not JSON") from error
    if not isinstance(said, dict):
        raise PlanCorrupt("PLAN.json is not a plan")
    return Plan.from_json(said)


async def read_shard(objects: Objects, layout: Layout, plan: Plan, shard: int) -> list[Item]:
    """The items of a shard, in order. Raises ShardCorrupt."""
    if not 0 <= shard < len(plan.shards):
        raise ShardCorrupt(f"there is no shard {shard}")
    data = await objects.read_bytes(layout.items(plan.attempt, shard))
    if data is None:
        raise ShardCorrupt(f"the items of shard {shard} are missing")
    if hashlib.sha256(data).hexdigest() != plan.shards[shard].sha256:
        raise ShardCorrupt(f"the items of shard {shard} are not those that were planned")
    try:
        items = [Item.from_json(orjson.loads(line)) for line in data.splitlines()]
    except (KeyError, TypeError, ValueError) as error:
        raise ShardCorrupt(f"the items of shard {shard} cannot be read") from error
    if len(items) != plan.shards[shard].items:
        raise ShardCorrupt(f"shard {shard} has {len(items)} items, and {plan.shards[shard].items} were planned")
    return items


async def make_plan(
    page: Page,
    objects: Objects,
    items: AsyncIterable[Item],
    *,
    skip: Callable[[Item], bool] | None = None,
    source: Location | None = None,
) -> Plan:
    """Plan a batch, or find that it was planned before, in which case nothing of `items` is drawn.

    objects  rooted at the batch's output location
    items    each custom_id once; memory holds a few shards of them, however many there are
    skip     items that are left out, because they are done
    source   where the items lie, if that is not the page's input

    Raises PlanCorrupt, what `items` raises (`inputs.InputFault`), and the faults of the store.
    """
    layout = layout_of(page)
    if (plan := await read_plan(objects, layout)) is not None:
        return plan
    draft = _Draft(page, objects, layout)
    async for item in items:
        if skip is not None and skip(item):
            draft.skipped += 1
        else:
            await draft.add(item)
    plan = await draft.done(source or page.input.location)
    if await objects.create(layout.plan, orjson.dumps(plan.to_json(), option=orjson.OPT_APPEND_NEWLINE)):
        return plan
    theirs = await read_plan(objects, layout)
    if theirs is None:
        raise PlanCorrupt("PLAN.json vanished while it was read")
    return theirs


class _Draft:
    """An attempt at a plan: shards are filled and written as items come."""

    def __init__(self, page: Page, objects: Objects, layout: Layout) -> None:
        self._page, self._objects, self._layout = page, objects, layout
        self._attempt = uuid.uuid4().hex[:12]
        self._lines: list[bytes] = []
        self._line_bytes = 0
        self._shards: list[Shard] = []
        self._writes: set[asyncio.Task[bool]] = set()
        self._items = self._size = 0
        self.skipped = 0

    async def add(self, item: Item) -> None:
        line = orjson.dumps(item.to_json(), option=orjson.OPT_APPEND_NEWLINE)
        if self._lines and self._line_bytes + len(line) > MAX_SHARD_BYTES:
            await self._write()
        self._lines.append(line)
        self._line_bytes += len(line)
        self._items += 1
        self._size += item.size or 0
        if len(self._lines) >= self._page.shard_size:
            await self._write()

    async def done(self, source: Location) -> Plan:
        if self._lines:
            await self._write()
        await self._settle(0)
        return Plan(
            attempt=self._attempt,
            fingerprint=self._page.fingerprint,
            items=self._items,
            size_bytes=self._size,
            skipped=self.skipped,
            chunk_size=self._page.chunk_size,
            shards=tuple(self._shards),
            source=Location(source.url, source.endpoint, source.region, source.path_style),
        )

    async def _write(self) -> None:
        data = b"".join(self._lines)
        key = self._layout.items(self._attempt, len(self._shards))
        self._shards.append(Shard(len(self._lines), hashlib.sha256(data).hexdigest()))
        self._lines, self._line_bytes = [], 0
        await self._settle(OPEN_WRITES - 1)
        self._writes.add(asyncio.create_task(self._objects.create(key, data)))

    async def _settle(self, open_writes: int) -> None:
        """Wait until so few writes are open. Raises what one of them raises."""
        while len(self._writes) > open_writes:
            done, self._writes = await asyncio.wait(self._writes, return_when=asyncio.FIRST_COMPLETED)
            for write in done:
                write.result()
