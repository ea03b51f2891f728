"""The plan: every item in one shard, once; one commit, however many plan at once and wherever they die."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import MemoryStore

from sightline.jobs import plan as module
from sightline.jobs.inputs import plan_batch
from sightline.jobs.items import Item
from sightline.jobs.layout import slices
from sightline.jobs.objects import Objects, StoreUnavailable
from sightline.jobs.page import Input, Location, Outputs, Page, Target
from sightline.jobs.plan import (
    Plan,
    PlanCorrupt,
    ShardCorrupt,
    layout_of,
    make_plan,
    read_plan,
    read_shard,
)
from sightline.jobs.stores import open_location
from tests.jobs.store_proxy import proxying
from tests.s3 import S3Server

PAGE = Page(
    "photos",
    "uid",
    "0123456789ab",
    Input("prefix", Location("s3://pictures/in/", endpoint="http://s3", credentials=Path("/secret"))),
    Outputs(Location("memory://unused")),
    Target("http://127.0.0.1:9"),
    shard_size=10,
    chunk_size=4,
)
LAYOUT = layout_of(PAGE)


def items_of(count: int) -> list[Item]:
    return [Item(f"{n:05}", f"s3://pictures/in/{n:05}.jpg", f'"{n}"', 100 + n) for n in range(count)]


async def stream(items: Iterable[Item], drawn: list[str] | None = None) -> AsyncIterator[Item]:
    for item in items:
        if drawn is not None:
            drawn.append(item.custom_id)
        yield item
        await asyncio.sleep(0)


async def planned(objects: Objects, plan: Plan) -> list[list[Item]]:
    return [await read_shard(objects, LAYOUT, plan, n) for n in range(len(plan.shards))]


@pytest.fixture
def objects() -> Objects:
    return Objects(MemoryStore())


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 95])
async def test_every_item_is_in_one_shard_in_order(objects: Objects, count: int) -> None:
    items = items_of(count)
    plan = await make_plan(PAGE, objects, stream(items))
    shards = await planned(objects, plan)
    assert [item for shard in shards for item in shard] == items
    assert [len(shard) for shard in shards] == [len(part) for part in slices(items, 10)]
    assert [shard.items for shard in plan.shards] == [len(shard) for shard in shards]
    assert (plan.items, plan.size_bytes, plan.skipped) == (count, sum(100 + n for n in range(count)), 0)


async def test_the_table_has_the_hash_of_every_shards_file(objects: Objects) -> None:
    plan = await make_plan(PAGE, objects, stream(items_of(25)))
    for n, shard in enumerate(plan.shards):
        data = (await objects.fetch(LAYOUT.items(plan.attempt, n))).data
        assert shard.sha256 == hashlib.sha256(data).hexdigest()


async def test_a_plan_is_read_as_it_was_made(objects: Objects) -> None:
    assert await read_plan(objects, LAYOUT) is None
    plan = await make_plan(PAGE, objects, stream(items_of(25)))
    assert await read_plan(objects, LAYOUT) == plan
    assert plan.source == Location("s3://pictures/in/", endpoint="http://s3"), "and no credentials"
    assert b"secret" not in (await objects.fetch(LAYOUT.plan)).data


async def test_chunks_are_counted_as_they_are_cut(objects: Objects) -> None:
    plan = await make_plan(PAGE, objects, stream(items_of(25)))
    shards = await planned(objects, plan)
    assert [plan.chunks(n) for n in range(3)] == [len(slices(shard, plan.chunk_size)) for shard in shards] == [3, 3, 2]
    assert plan.total_chunks == 8


async def test_a_plan_worker_tells_the_operator_in_short(objects: Objects) -> None:
    plan = await make_plan(PAGE, objects, stream(items_of(25)))
    assert plan.in_short() == {"shards": 3, "items": 25, "fingerprint": "0123456789ab", "bytes": plan.size_bytes}


async def test_a_batch_that_was_planned_is_not_planned_again(objects: Objects) -> None:
    first = await make_plan(PAGE, objects, stream(items_of(25)))
    drawn: list[str] = []
    again = await make_plan(replace(PAGE, shard_size=3, chunk_size=1), objects, stream(items_of(7), drawn))
    assert (again, drawn) == (first, [])
    assert again.chunk_size == 4, "chunks are cut as they were, whatever the page says now"


async def test_of_many_that_plan_at_once_all_hold_the_same_plan(objects: Objects) -> None:
    plans = await asyncio.gather(*(make_plan(PAGE, objects, stream(items_of(30 + n))) for n in range(8)))
    assert set(plans) == {await read_plan(objects, LAYOUT)}
    shards = await planned(objects, plans[0])
    assert [item for shard in shards for item in shard] == items_of(plans[0].items)


async def test_a_planner_that_died_leaves_nothing_that_counts(objects: Objects) -> None:
    async def dying() -> AsyncIterator[Item]:
        async for item in stream(items_of(35)):
            yield item
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        await make_plan(PAGE, objects, dying())
    orphans = set(await objects.keys(LAYOUT.root))
    assert orphans
    assert await read_plan(objects, LAYOUT) is None
    plan = await make_plan(PAGE, objects, stream(items_of(12)))
    assert [item for shard in await planned(objects, plan) for item in shard] == items_of(12)
    assert not {key for key in orphans if plan.attempt in key}


async def test_items_that_are_done_are_counted_and_left_out(objects: Objects) -> None:
    plan = await make_plan(PAGE, objects, stream(items_of(25)), skip=lambda item: item.custom_id.endswith("3"))
    left = [item.custom_id for shard in await planned(objects, plan) for item in shard]
    assert left == [item.custom_id for item in items_of(25) if not item.custom_id.endswith("3")]
    assert (plan.items, plan.skipped) == (22, 3)


async def test_a_shard_ends_early_when_its_lines_are_large(objects: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 3000)
    items = [Item(str(n), url="/v1/chat/completions", body={"text": "x" * 1000}) for n in range(7)]
    items.append(Item("7", url="/v1/chat/completions", body={"text": "x" * 9000}))
    plan = await make_plan(PAGE, objects, stream(items))
    assert [shard.items for shard in plan.shards] == [2, 2, 2, 1, 1]
    assert [item for shard in await planned(objects, plan) for item in shard] == items


async def test_a_store_that_fails_while_shards_are_written_fails_the_plan(objects: Objects) -> None:
    class Full(Objects):
        async def create(self, key: str, data: bytes) -> bool:
            if key.endswith("shard-00003.jsonl"):
                raise StoreUnavailable("full")
            return await super().create(key, data)

    full = Full(MemoryStore())
    with pytest.raises(StoreUnavailable, match="full"):
        await make_plan(PAGE, full, stream(items_of(95)))
    assert await read_plan(full, LAYOUT) is None


# --- what is no longer as it was planned -----------------------------------------------------------------------------

Change = Callable[[bytes], bytes]
SHARD_FAULTS: dict[str, tuple[Change, str]] = {
    "another id": (lambda data: data.replace(b"00011", b"00012"), "not those that were planned"),
    "cut off": (lambda data: data[:-20], "not those that were planned"),
    "empty": (lambda _: b"", "not those that were planned"),
    "no text": (lambda _: b"\xff\xfe", "not those that were planned"),
}


@pytest.mark.parametrize(("change", "told"), SHARD_FAULTS.values(), ids=SHARD_FAULTS.keys())
async def test_a_shard_that_is_not_as_planned_is_corrupt_and_others_are_not(
    objects: Objects, change: Change, told: str
) -> None:
    plan = await make_plan(PAGE, objects, stream(items_of(25)))
    key = LAYOUT.items(plan.attempt, 1)
    await objects.write(key, change((await objects.fetch(key)).data))
    with pytest.raises(ShardCorrupt, match=told):
        await read_shard(objects, LAYOUT, plan, 1)
    assert len(await read_shard(objects, LAYOUT, plan, 0)) == 10


@pytest.mark.parametrize("line", [b'{"uri": "s3://a/b"}', b'{"custom_id": ""}', b"[]", b"{"])
async def test_a_shard_whose_lines_are_no_items_is_corrupt(objects: Objects, line: bytes) -> None:
    plan = await make_plan(PAGE, objects, stream(items_of(1)))
    await objects.write(LAYOUT.items(plan.attempt, 0), line + b"\n")
    forged = replace(plan, shards=(replace(plan.shards[0], sha256=hashlib.sha256(line + b"\n").hexdigest()),))
    with pytest.raises(ShardCorrupt, match="cannot be read"):
        await read_shard(objects, LAYOUT, forged, 0)


async def test_a_shard_that_is_gone_or_never_was_is_corrupt(objects: Objects) -> None:
    plan = await make_plan(PAGE, objects, stream(items_of(25)))
    await objects.remove(LAYOUT.items(plan.attempt, 1))
    for shard, told in ((1, "are missing"), (3, "there is no shard 3"), (-1, "there is no shard -1")):
        with pytest.raises(ShardCorrupt, match=told):
            await read_shard(objects, LAYOUT, plan, shard)


PLAN_FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no plan": lambda _: {},
    "a list": lambda _: [],
    "items missing": lambda said: {name: value for name, value in said.items() if name != "items"},
    "does not add up": lambda said: said | {"items": said["items"] + 1},
    "no chunk size": lambda said: said | {"chunk_size": 0},
    "shards no table": lambda said: said | {"shards": [1, 2]},
    "a source of nobody": lambda said: said | {"source": {"place": "x"}},
}


@pytest.mark.parametrize("change", PLAN_FAULTS.values(), ids=PLAN_FAULTS.keys())
async def test_a_plan_that_is_none_is_corrupt(objects: Objects, change: Callable[[dict[str, Any]], Any]) -> None:
    plan = await make_plan(PAGE, objects, stream(items_of(25)))
    await objects.write(LAYOUT.plan, orjson.dumps(change(plan.to_json())))
    for call in (read_plan(objects, LAYOUT), make_plan(PAGE, objects, stream(items_of(25)))):
        with pytest.raises(PlanCorrupt):
            await call


async def test_a_plan_that_is_not_json_is_corrupt(objects: Objects) -> None:
    await objects.write(LAYOUT.plan, b'{"attempt": ')
    with pytest.raises(PlanCorrupt, match="not JSON"):
        await read_plan(objects, LAYOUT)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ITEMS = st.builds(
    Item,
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20),
    TEXTS,
    st.none() | TEXTS.filter(bool),
    st.none() | st.integers(0, 2**53),
    TEXTS,
    st.dictionaries(TEXTS, st.integers(-(2**53), 2**53) | TEXTS | st.booleans(), max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ITEMS, max_size=30), st.integers(1, 12))
def test_any_items_come_back_as_they_were(items: list[Item], shard_size: int) -> None:
    async def there_and_back() -> None:
        objects = Objects(MemoryStore())
        plan = await make_plan(replace(PAGE, shard_size=shard_size), objects, stream(items))
        assert [item for shard in await planned(objects, plan) for item in shard] == items

    asyncio.run(there_and_back())


# --- on a real store, on a bad day -----------------------------------------------------------------------------------


async def test_planners_on_a_bad_day_make_one_plan(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors, lost answers and conflicts, three planners at once. (Planners that are killed: test_exactly_once.)"""
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = s3_server.bucket(f"plans-{uuid.uuid4().hex[:12]}")
    for n in range(25):
        s3_server.client.put_object(Bucket=bucket, Key=f"in/{n:02}.jpg", Body=b"x")
    with proxying(s3_server.endpoint_url, error_share=0.2, conflict_share=0.3) as proxy:
        page = replace(
            PAGE,
            input=Input("prefix", Location(f"s3://{bucket}/in/", proxy.url)),
            outputs=Outputs(Location(f"s3://{bucket}/out", proxy.url)),
        )
        stores = [open_location(page.outputs.location, patience_seconds=60) for _ in range(3)]
        (plan,) = set(await asyncio.gather(*(plan_batch(page, objects) for objects in stores)))
        shards = [await read_shard(stores[0], LAYOUT, plan, n) for n in range(3)]
        assert proxy.faults
    assert [item.custom_id for shard in shards for item in shard] == [f"in/{n:02}.jpg" for n in range(25)]
    assert set(proxy.written(r"PLAN\.json$").values()) == {1}
