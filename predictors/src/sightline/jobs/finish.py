"""The end of a batch: every chunk is there once and holds its items, outputs are made, MANIFEST.json is created."""

import functools
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal, cast, get_args

import orjson

from sightline.jobs.ahead import ahead
from sightline.jobs.items import Code, Counts, Fault, Item, Line
from sightline.jobs.layout import DONE, PARTS, Layout, chunk_number, slices
from sightline.jobs.manifest import Ended, Manifest
from sightline.jobs.objects import Missing, Objects
from sightline.jobs.outputs import Outputs, Row
from sightline.jobs.page import Page
from sightline.jobs.plan import Plan, PlanCorrupt, layout_of, read_plan, read_shard
from sightline.jobs.reports import Part

log = logging.getLogger("sightline.jobs")

Which = Literal["all", "results", "errors"]

CHUNKS_AHEAD = 16
"""Chunks that are read at once: what is in memory."""
SHARDS_AHEAD = 2

GivenUp = Literal["given_up"]

_LEFT: Mapping[Ended | GivenUp, tuple[Code, str]] = {
    "batch_expired": ("batch_expired", "The batch's time was over before this item was done."),
    "batch_cancelled": ("batch_cancelled", "The batch was cancelled before this item was done."),
    "given_up": ("internal", "The shard of this item was given up before it was done."),
}


class Unfinished(Exception):
    """Chunks are missing: the batch is not done. `chunks`, `items`: how many."""

    def __init__(self, chunks: int, items: int) -> None:
        super().__init__(f"{items} items have no result yet ({chunks} chunks are missing)")
        self.chunks, self.items = chunks, items


class PartCorrupt(Exception):
    """A chunk does not hold exactly the lines of its items, in their order; or the manifest is none. Says which."""


async def finish(
    page: Page,
    objects: Objects,
    *,
    sidecars: Objects | None = None,
    ended: Ended | GivenUp | None = None,
    on_items: Callable[[int], None] | None = None,
) -> Manifest:
    """Verify a batch, make its outputs and commit them. Does nothing when that was done already.

    objects   rooted at the batch's output location; the keys are `Layout.of("", page.uid, page.fingerprint)`
    sidecars  the store of `page.outputs.sidecars`, rooted there
    ended     nobody works on the batch any more: chunks that are missing are created, with an error for each of their
              items. given_up: those of shards that some worker could not do; a shard that was done has none to miss
    on_items  told how many items of a shard have been verified

    May be killed anywhere and done again, also by two at once: every output is a function of plan and parts.
    Raises PlanCorrupt, ShardCorrupt, Unfinished, PartCorrupt, ParquetMissing, and the typed faults of the store.
    """
    layout = layout_of(page)
    if (known := await read_manifest(objects, layout)) is not None:
        return known
    if (plan := await read_plan(objects, layout)) is None:
        raise PlanCorrupt("PLAN.json is missing")
    await _see_to_missing(objects, layout, plan, ended)
    async with Outputs(page, objects, layout, plan.items, sidecars) as outputs:
        counts, parts = Counts(), list[tuple[Part, ...]]()
        read = functools.partial(read_shard, objects, layout, plan)
        async with aclosing(ahead(read, range(len(plan.shards)), SHARDS_AHEAD)) as shards:
            async for items in shards:
                more, chunks = await _shard(objects, layout, plan, len(parts), items, outputs)
                counts += more
                parts.append(chunks)
                if on_items is not None:
                    on_items(len(items))
        made = await outputs.close()
    end = ended_of(counts)
    manifest = Manifest(
        page.name, page.uid, page.fingerprint, plan.items, counts, tuple(parts), made, outputs.sidecars, end
    )
    return await _commit(objects, layout, manifest)


def ended_of(counts: Counts) -> Ended | None:
    """Whether a batch was ended early, told by its lines: one that was all done by then was not."""
    codes = {code for _, code in counts.failures}
    return next((code for code in get_args(Ended) if code in codes), None)


async def read_manifest(objects: Objects, layout: Layout) -> Manifest | None:
    """The manifest of a finished batch; None while it is not finished. Raises PartCorrupt."""
    data = await objects.read_bytes(layout.manifest)
    try:
        return None if data is None else Manifest.from_json(orjson.loads(data))
    except ValueError as error:
        raise PartCorrupt("MANIFEST.json is no manifest of this version") from error


async def _commit(objects: Objects, layout: Layout, manifest: Manifest) -> Manifest:
    """Create the manifest; of two that finish at once, both return what the first wrote."""
    if await objects.create(layout.manifest, orjson.dumps(manifest.to_json())):
        log.info("finished batch=%s items=%d failed=%d", manifest.uid, manifest.items, manifest.counts.failed)
        return manifest
    return cast("Manifest", await read_manifest(objects, layout))


# --- what is missing -------------------------------------------------------------------------------------------------


async def _see_to_missing(objects: Objects, layout: Layout, plan: Plan, ended: Ended | GivenUp | None) -> None:
    """Raises Unfinished; or, of a batch that was ended, creates what is missing."""
    there = set(await objects.keys(layout.root + PARTS))
    missing = {
        shard: [chunk for chunk in range(plan.chunks(shard)) if layout.chunk(shard, chunk) not in there]
        for shard in range(len(plan.shards))
    }
    missing = {shard: chunks for shard, chunks in missing.items() if chunks}
    if not missing:
        return
    if ended is None or (ended == "given_up" and await _has_done(objects, layout, missing)):
        lost = sum(
            min(plan.chunk_size, plan.shards[shard].items - chunk * plan.chunk_size)
            for shard, chunks in missing.items()
            for chunk in chunks
        )
        raise Unfinished(sum(map(len, missing.values())), lost)
    for shard, chunks in missing.items():
        cut = slices(await read_shard(objects, layout, plan, shard), plan.chunk_size)
        end = functools.partial(_end, objects, layout, shard, cut, ended)
        async with aclosing(ahead(end, chunks, CHUNKS_AHEAD)) as created:
            async for _ in created:
                pass


async def _has_done(objects: Objects, layout: Layout, shards: Iterable[int]) -> bool:
    """Whether one of these shards was done: then what is missing of it has been there, and may come back."""
    done = set(await objects.keys(layout.root + DONE))
    return any(layout.done(shard) in done for shard in shards)


async def _end(
    objects: Objects, layout: Layout, shard: int, cut: Sequence[Sequence[Item]], ended: Ended | GivenUp, chunk: int
) -> None:
    """Create a chunk of faults, unless a worker that is still there has just created it: then its results stay."""
    code, message = _LEFT[ended]
    fault = Fault("fetch", code, message, attempts=0)
    lines = b"".join(Line(item, fault=fault).encoded() for item in cut[chunk])
    await objects.create(layout.chunk(shard, chunk), lines)


# --- what is there ---------------------------------------------------------------------------------------------------


async def _shard(
    objects: Objects, layout: Layout, plan: Plan, shard: int, items: Sequence[Item], outputs: Outputs
) -> tuple[Counts, tuple[Part, ...]]:
    """Verify one shard and hand its lines to the outputs."""
    cut = slices(items, plan.chunk_size)
    counts, parts = Counts(), list[Part]()

    async def read(chunk: int) -> bytes:
        return (await objects.fetch(layout.chunk(shard, chunk))).data

    async with aclosing(ahead(read, range(len(cut)), CHUNKS_AHEAD)) as chunks:
        async for data in chunks:
            wanted = cut[len(parts)]
            rows = verified(data, wanted, layout.chunk(shard, len(parts)))
            counts = sum(
                (Counts.of_row(row.said, item.size or 0) for row, item in zip(rows, wanted, strict=True)), counts
            )
            parts.append(Part.of(data))
            await outputs.take(rows)
    return counts, tuple(parts)


def verified(data: bytes, items: Sequence[Item], key: str) -> list[Row]:
    """The lines of a chunk, when they are those of its items, each once and in order. Raises PartCorrupt."""
    lines = data.splitlines(keepends=True)
    if len(lines) != len(items) or not data.endswith(b"\n"):
        raise PartCorrupt(f"{key} has {len(lines)} lines for {len(items)} items")
    rows: list[Row] = []
    for number, (line, item) in enumerate(zip(lines, items, strict=True), 1):
        try:
            said = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise PartCorrupt(f"{key}:{number} is no JSON") from error
        if not isinstance(said, dict) or cast("dict[str, Any]", said).get("custom_id") != item.custom_id:
            raise PartCorrupt(f"{key}:{number} is not the line of {item.custom_id}")
        rows.append(Row(cast("dict[str, Any]", said), line))
    return rows


async def lines_of(objects: Objects, layout: Layout, plan: Plan, which: Which = "all") -> AsyncGenerator[bytes]:
    """The lines (JSON, each with its line feed) of the chunks that are there, in the order of the items.

    Chunks that are missing are left out. Memory: some chunks, whatever the batch.
    """

    async def read(key: str) -> bytes:
        try:
            return (await objects.fetch(key)).data
        except Missing:  # deleted behind our back, with its batch
            return b""

    for shard in range(len(plan.shards)):
        keys = sorted(await objects.keys(layout.parts(shard)), key=chunk_number)
        async with aclosing(ahead(read, keys, CHUNKS_AHEAD)) as chunks:
            async for data in chunks:
                if lines := data if which == "all" else _only(data, which):
                    yield lines


def _only(data: bytes, which: Which) -> bytes:
    wants_errors = which == "errors"
    return b"".join(
        line for line in data.splitlines(keepends=True) if bool(orjson.loads(line).get("error")) is wants_errors
    )
