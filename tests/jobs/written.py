"""A batch as its workers leave it: planned and written straight into a store, without a target or a process."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
from obstore.store import MemoryStore

from sightline.jobs.items import Counts, Fault, Item, Line
from sightline.jobs.layout import Layout, slices
from sightline.jobs.objects import Objects
from sightline.jobs.page import Input, Location, Outputs, Page, Target
from sightline.jobs.plan import Plan, layout_of, make_plan, read_shard
from sightline.jobs.reports import Part, ShardReport, Waiting

FINGERPRINT = "0123456789ab"
UID = "6f1c1d3a-6b1c-4b57-a7a5-3b3c29f04c11"

Captioned = Callable[[Item], Line]


def page_of(**changes: Any) -> Page:
    """12 items a shard, 5 a chunk: the last chunk of a shard has 2."""
    page = Page(
        name="photos",
        uid=UID,
        fingerprint=FINGERPRINT,
        input=Input("prefix", Location("s3://pictures/photos/")),
        outputs=Outputs(Location("s3://pictures/out/")),
        target=Target("http://127.0.0.1:9"),
        shard_size=12,
        chunk_size=5,
    )
    outputs = {name: changes.pop(name) for name in ("merge", "sidecars", "parquet", "existing") if name in changes}
    return replace(page, outputs=replace(page.outputs, **outputs), **changes)


def items_of(count: int) -> list[Item]:
    return [
        Item(f"{n:06}", f"s3://pictures/photos/{n % 7}/{n:06}.jpg", etag=f'"{n}"', size=100 + n) for n in range(count)
    ]


def captioned(item: Item) -> Line:
    """Every tenth fails, every tenth's neighbour is not enhanced."""
    number = int(item.custom_id)
    if number % 10 == 3:
        fault = Fault("decode", "decode_failed", "This is no picture.", 400, 1, 1.0, 2.0)
        return Line(item, fault=fault, size=item.size or 0)
    is_enhanced = number % 10 != 4
    result: dict[str, Any] = {"caption": f"Picture {number}, é", "enhanced": is_enhanced}
    if not is_enhanced:
        result["enhance_error"] = {"code": "enhance_timeout"}
    tokens = {"prompt_tokens": 10, "completion_tokens": number % 5}
    return Line(item, result | {"usage": tokens}, size=item.size or 0, is_unenhanced=not is_enhanced, **tokens)


class Written:
    """One batch in one store.

    do   what became of each item
    """

    def __init__(self, objects: Objects, page: Page, plan: Plan, do: Captioned) -> None:
        self.objects, self.page, self.plan, self.do = objects, page, plan, do
        self.layout: Layout = layout_of(page)

    @classmethod
    async def planned(
        cls, count: int, *, objects: Objects | None = None, do: Captioned = captioned, **changes: Any
    ) -> "Written":
        async def items():
            for item in items_of(count):
                yield item

        objects, page = objects or Objects(MemoryStore()), page_of(**changes)
        return cls(objects, page, await make_plan(page, objects, items()), do)

    @classmethod
    async def whole(cls, count: int, **options: Any) -> "Written":
        batch = await cls.planned(count, **options)
        await batch.write()
        return batch

    async def chunks(self, shard: int) -> list[Sequence[Item]]:
        return slices(await read_shard(self.objects, self.layout, self.plan, shard), self.plan.chunk_size)

    async def write(self, shards: Iterable[int] | None = None) -> None:
        """Do some shards, all by default, with their `done/`."""
        for shard in range(len(self.plan.shards)) if shards is None else shards:
            parts: list[Part] = []
            counts = Counts()
            for number, items in enumerate(await self.chunks(shard)):
                lines = [self.do(item) for item in items]
                data = b"".join(line.encoded() for line in lines)
                assert await self.objects.create(self.layout.chunk(shard, number), data)
                parts.append(Part.of(data))
                counts = sum((Counts.of(line) for line in lines), counts)
            report = ShardReport(shard, counts, parts=tuple(parts))
            await self.objects.create(self.layout.done(shard), orjson.dumps(report.to_json()))

    async def say(self, shard: int, done: int, *, at: float, waiting: Waiting = "") -> None:
        """A worker's `progress/`."""
        report = ShardReport(shard, Counts(succeeded=done), at, waiting)
        await self.objects.write(self.layout.progress(shard), orjson.dumps(report.to_json()))

    async def lines(self, name: str) -> list[dict[str, Any]]:
        data = await self.objects.read_bytes(self.layout.root + name)
        assert data is not None
        return [orjson.loads(line) for line in data.splitlines()]


def captions_in(folder: Path) -> dict[str, str]:
    """Every sidecar below a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.txt"))}
