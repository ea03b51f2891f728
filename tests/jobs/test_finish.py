"""Finishing: every item once and in order, outputs whole or not at all, and a second finish changes nothing."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from obstore.store import MemoryStore

from sightline.jobs.finish import PartCorrupt, Unfinished, finish, lines_of, read_manifest
from sightline.jobs.items import Counts, Line
from sightline.jobs.layout import ERRORS, MANIFEST, PARQUET, RESULTS
from sightline.jobs.objects import Objects, StoreUnavailable
from sightline.jobs.parquet import ParquetMissing
from sightline.jobs.plan import PlanCorrupt, ShardCorrupt
from tests.jobs.written import Written, captioned, items_of
from tests.s3 import S3Server, running_s3


async def outputs_of(batch: Written) -> dict[str, bytes]:
    root = batch.layout.root + "output/"
    return {key: (await batch.objects.fetch(key)).data for key in await batch.objects.keys(root)}


async def test_results_and_errors_are_joined_apart_each_in_the_order_of_the_items() -> None:
    batch = await Written.whole(101)
    await finish(batch.page, batch.objects)
    results, errors = await batch.lines(RESULTS), await batch.lines(ERRORS)
    ids = [item.custom_id for item in items_of(101)]
    assert [row["custom_id"] for row in results] == [i for i in ids if not i.endswith("3")]
    assert [row["custom_id"] for row in errors] == [i for i in ids if i.endswith("3")]
    assert {row["error"]["code"] for row in errors} == {"decode_failed"}


async def test_the_manifest_counts_what_the_lines_say() -> None:
    batch = await Written.whole(101)
    manifest = await finish(batch.page, batch.objects)
    told = sum((Counts.of(captioned(item)) for item in items_of(101)), Counts())
    assert (manifest.items, manifest.counts.done) == (101, 101)
    assert (manifest.counts.succeeded, manifest.counts.failed, manifest.counts.unenhanced) == (91, 10, 10)
    assert manifest.counts.size_bytes == told.size_bytes == sum(100 + n for n in range(101))
    assert manifest.counts.prompt_tokens == 910
    assert manifest.counts.failures == {("decode", "decode_failed"): (10, "000003")}


async def test_the_manifest_names_every_chunk_and_output_by_its_hash() -> None:
    batch = await Written.whole(30)
    manifest = await finish(batch.page, batch.objects)
    for shard, parts in enumerate(manifest.parts):
        for chunk, part in enumerate(parts):
            data = (await batch.objects.fetch(batch.layout.chunk(shard, chunk))).data
            assert (part.size, part.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [len(parts) for parts in manifest.parts] == [3, 3, 2]
    for made in manifest.outputs.values():
        data = (await batch.objects.fetch(batch.layout.root + made.key)).data
        assert (made.size, made.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert await read_manifest(batch.objects, batch.layout) == manifest


async def test_two_batches_that_did_the_same_have_the_same_bytes() -> None:
    one, two = await Written.whole(50, parquet=True), await Written.whole(50, parquet=True)
    await asyncio.gather(finish(one.page, one.objects), finish(two.page, two.objects))
    assert await outputs_of(one) == await outputs_of(two)


async def test_a_finished_batch_is_not_touched_again() -> None:
    batch = await Written.whole(20)
    first = await finish(batch.page, batch.objects)
    await batch.objects.write(batch.layout.chunk(0, 0), b"somebody's\n")
    await batch.objects.remove(batch.layout.root + RESULTS)
    assert await finish(batch.page, batch.objects) == first
    assert not await batch.objects.exists(batch.layout.root + RESULTS)


async def test_of_two_that_finish_at_once_both_say_what_the_first_wrote() -> None:
    batch = await Written.whole(60)
    one, two = await asyncio.gather(finish(batch.page, batch.objects), finish(batch.page, batch.objects))
    assert one == two == await read_manifest(batch.objects, batch.layout)


# --- what is wrong ---------------------------------------------------------------------------------------------------


async def test_a_batch_with_missing_chunks_is_unfinished_and_says_how_much() -> None:
    batch = await Written.whole(30)
    await batch.objects.remove(batch.layout.chunk(0, 2))  # 2 items
    await batch.objects.remove(batch.layout.chunk(1, 0))  # 5 items
    with pytest.raises(Unfinished) as caught:
        await finish(batch.page, batch.objects)
    assert (caught.value.chunks, caught.value.items) == (2, 7)
    assert await outputs_of(batch) == {}


def lost(lines: list[bytes]) -> list[bytes]:
    return lines[:-1]


def doubled(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[0]]


def swapped(lines: list[bytes]) -> list[bytes]:
    return [lines[1], lines[0], *lines[2:]]


def cut(lines: list[bytes]) -> list[bytes]:
    return [*lines[:-1], lines[-1][:-9]]


def strange(lines: list[bytes]) -> list[bytes]:
    return [b"[]\n", *lines[1:]]


@pytest.mark.parametrize("harm", [lost, doubled, swapped, cut, strange], ids=lambda harm: harm.__name__)
async def test_a_chunk_that_is_not_its_items_lines_is_named_and_nothing_is_made(harm: Any) -> None:
    batch = await Written.whole(40, parquet=True)
    key = batch.layout.chunk(2, 1)
    lines = (await batch.objects.fetch(key)).data.splitlines(keepends=True)
    await batch.objects.write(key, b"".join(harm(lines)))
    with pytest.raises(PartCorrupt, match="shard-00002/chunk-0001"):
        await finish(batch.page, batch.objects)
    assert await outputs_of(batch) == {}


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b'{"version": 2}', b'{"version": 1, "batch": []}'])
async def test_a_manifest_that_is_none_is_said(text: bytes) -> None:
    batch = await Written.whole(5)
    await batch.objects.write(batch.layout.manifest, text)
    with pytest.raises(PartCorrupt, match=r"MANIFEST\.json"):
        await finish(batch.page, batch.objects)


async def test_items_that_are_not_those_that_were_planned_are_no_basis() -> None:
    batch = await Written.whole(20)
    await batch.objects.write(batch.layout.items(batch.plan.attempt, 1), b'{"custom_id":"else"}\n')
    with pytest.raises(ShardCorrupt):
        await finish(batch.page, batch.objects)
    assert await outputs_of(batch) == {}


async def test_without_a_plan_there_is_nothing_to_finish() -> None:
    batch = await Written.planned(5)
    await batch.objects.remove(batch.layout.plan)
    with pytest.raises(PlanCorrupt):
        await finish(batch.page, batch.objects)


class Broken(Objects):
    """A store that fails at the n-th write of outputs."""

    def __init__(self, store: MemoryStore, *, at: int) -> None:
        super().__init__(store)
        self.left = at

    async def upload(self, key: str, pieces: AsyncIterator[bytes], **options: Any) -> int:
        self._count()
        return await super().upload(key, pieces, **options)

    async def create(self, key: str, data: bytes) -> bool:
        if key.endswith(MANIFEST):
            self._count()
        return await super().create(key, data)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoreUnavailable("the disk is full")


@pytest.mark.parametrize("at", range(4))
async def test_a_store_that_fails_half_way_leaves_no_manifest_and_the_next_try_makes_the_same(at: int) -> None:
    whole = await Written.whole(60, parquet=True)
    await finish(whole.page, whole.objects)
    store = MemoryStore()
    batch = await Written.whole(60, objects=Objects(store), parquet=True)
    with pytest.raises(StoreUnavailable):
        await finish(batch.page, Broken(store, at=at))
    assert not await batch.objects.exists(batch.layout.manifest)
    await finish(batch.page, batch.objects)
    assert await outputs_of(batch) == await outputs_of(whole)


# --- ended early -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["batch_expired", "batch_cancelled"])
async def test_of_a_batch_ended_early_what_was_not_done_is_an_error_each(why: Any) -> None:
    batch = await Written.planned(30)
    await batch.write([1])
    manifest = await finish(batch.page, batch.objects, ended=why)
    errors = await batch.lines(ERRORS)
    assert manifest.ended == why
    assert (manifest.counts.done, len(await batch.lines(RESULTS)) + len(errors)) == (30, 30)
    open_ids = [item.custom_id for item in items_of(30) if not 12 <= int(item.custom_id) < 24]
    assert [row["custom_id"] for row in errors if row["error"]["code"] == why] == open_ids
    assert errors[0]["error"]["attempts"] == 0


async def test_items_of_a_shard_that_was_given_up_are_errors_each() -> None:
    batch = await Written.whole(30)
    await batch.objects.remove(batch.layout.done(1))
    await batch.objects.remove(batch.layout.chunk(1, 1))
    manifest = await finish(batch.page, batch.objects, ended="given_up")
    assert (manifest.ended, manifest.counts.done) == (None, 30)
    left = [row for row in await batch.lines(ERRORS) if row["error"]["code"] == "internal"]
    assert [int(row["custom_id"]) for row in left] == [17, 18, 19, 20, 21]


async def test_a_chunk_that_was_there_once_is_not_given_up() -> None:
    batch = await Written.whole(30)
    await batch.objects.remove(batch.layout.chunk(1, 1))
    with pytest.raises(Unfinished):
        await finish(batch.page, batch.objects, ended="given_up")
    assert not await batch.objects.exists(batch.layout.chunk(1, 1))


async def test_a_batch_that_was_all_done_when_it_was_ended_was_not_ended_early() -> None:
    batch = await Written.whole(30)
    assert (await finish(batch.page, batch.objects, ended="batch_cancelled")).ended is None


async def test_a_worker_that_commits_while_the_batch_is_ended_keeps_its_results() -> None:
    class Late(Objects):
        async def create(self, key: str, data: bytes) -> bool:
            if key == batch.layout.chunk(2, 0):
                lines = [captioned(item).encoded() for item in (await batch.chunks(2))[0]]
                await super().create(key, b"".join(lines))
            return await super().create(key, data)

    store = MemoryStore()
    batch = await Written.planned(30, objects=Objects(store))
    manifest = await finish(batch.page, Late(store), ended="batch_expired")
    assert [row["custom_id"] for row in await batch.lines(RESULTS)] == [
        "000024",
        "000025",
        "000026",
        "000027",
        "000028",
    ]
    assert manifest.counts.done == 30


# --- how the outputs are chosen --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("merge", "limit", "is_merged"),
    [("Auto", 20, True), ("Auto", 19, False), ("Always", 19, True), ("Never", 20, False)],
)
async def test_parts_are_joined_when_it_is_said_or_when_they_are_few(
    merge: Any, limit: int, is_merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sightline.jobs.outputs.MERGED_BY_ITSELF", limit)
    batch = await Written.whole(20, merge=merge)
    manifest = await finish(batch.page, batch.objects)
    names = {"results", "errors"} if is_merged else set()
    assert set(manifest.outputs) == names
    made = {RESULTS, ERRORS, MANIFEST} if is_merged else {MANIFEST}
    assert set(await outputs_of(batch)) == {batch.layout.root + key for key in made}


async def test_an_empty_batch_has_empty_outputs() -> None:
    batch = await Written.whole(0, parquet=True)
    manifest = await finish(batch.page, batch.objects)
    assert (manifest.items, manifest.parts) == (0, ())
    assert (await batch.lines(RESULTS), await batch.lines(ERRORS)) == ([], [])


async def test_those_who_watch_are_told_of_every_shard() -> None:
    batch = await Written.whole(30)
    told: list[int] = []
    await finish(batch.page, batch.objects, on_items=told.append)
    assert told == [12, 12, 6]


async def test_parquet_holds_every_line_in_order_results_and_errors(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    batch = await Written.whole(101, parquet=True, merge="Never")
    manifest = await finish(batch.page, batch.objects)
    file = tmp_path / "results.parquet"
    file.write_bytes((await batch.objects.fetch(batch.layout.root + PARQUET)).data)
    rows = pq.read_table(file).to_pylist()
    assert set(manifest.outputs) == {"parquet"}
    assert [row["custom_id"] for row in rows] == [item.custom_id for item in items_of(101)]
    assert rows[5]["caption"] == "Picture 5, é"
    assert (rows[4]["enhanced"], rows[5]["enhanced"]) == (False, True)
    assert orjson.loads(rows[4]["result"])["enhance_error"] == {"code": "enhance_timeout"}
    assert (rows[3]["caption"], rows[3]["error_code"], rows[3]["error_status"]) == (None, "decode_failed", 400)


async def test_parquet_is_written_in_groups_so_that_memory_holds_one(tmp_path: Path, monkeypatch: Any) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr("sightline.jobs.parquet.GROUP_ROWS", 20)
    batch = await Written.whole(101, parquet=True)
    await finish(batch.page, batch.objects)
    file = tmp_path / "results.parquet"
    file.write_bytes((await batch.objects.fetch(batch.layout.root + PARQUET)).data)
    read = pq.ParquetFile(file)
    assert read.metadata.num_rows == 101
    assert max(read.metadata.row_group(n).num_rows for n in range(read.num_row_groups)) == 20
    assert read.num_row_groups > 4


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["all", "results", "errors"])
async def test_lines_are_read_in_the_order_of_the_items(which: Any) -> None:
    batch = await Written.whole(60)
    pieces = [piece async for piece in lines_of(batch.objects, batch.layout, batch.plan, which)]
    rows = [orjson.loads(line) for line in b"".join(pieces).splitlines()]
    wanted = [i.custom_id for i in items_of(60) if which == "all" or i.custom_id.endswith("3") == (which == "errors")]
    assert [row["custom_id"] for row in rows] == wanted
    assert all(piece.endswith(b"\n") for piece in pieces)


async def test_lines_of_a_batch_that_runs_are_those_of_the_chunks_that_are_there() -> None:
    batch = await Written.planned(60)
    await batch.write([0, 3])
    await batch.objects.remove(batch.layout.chunk(0, 1))
    rows = [orjson.loads(line) async for piece in lines_of(batch.objects, batch.layout, batch.plan)
            for line in piece.splitlines()]  # fmt: skip
    assert [int(row["custom_id"]) for row in rows] == [*range(5), 10, 11, *range(36, 48)]


async def test_lines_may_be_left_half_way() -> None:
    batch = await Written.whole(60)
    lines = lines_of(batch.objects, batch.layout, batch.plan)
    assert orjson.loads((await anext(lines)).splitlines()[0])["custom_id"] == "000000"
    await lines.aclose()
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


# --- a real store ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory):
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("pictures")
        yield server


def objects_of(s3: S3Server, prefix: str, monkeypatch: pytest.MonkeyPatch) -> Objects:
    from sightline.jobs.page import Location
    from sightline.jobs.stores import open_location

    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return open_location(
        Location(f"s3://pictures/{prefix}", endpoint=s3.endpoint_url, region=s3.region, path_style=True)
    )


async def test_on_real_s3_outputs_larger_than_a_part_arrive_whole(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def long(item: Any) -> Line:
        line = captioned(item)
        return line if line.fault else replace(line, result={"caption": f"{item.custom_id} " + "long " * 20_000})

    objects = objects_of(s3, "multipart/", monkeypatch)
    batch = await Written.whole(200, objects=objects, do=long, parquet=True)
    manifest = await finish(batch.page, objects)
    results = manifest.outputs["results"]
    assert results.size > 16 * 2**20  # two parts and a rest
    data = s3.client.get_object(Bucket="pictures", Key=f"multipart/{batch.layout.root}{RESULTS}")["Body"].read()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (results.size, results.sha256)
    assert [orjson.loads(line)["custom_id"] for line in data.splitlines()] == [
        item.custom_id for item in items_of(200) if not item.custom_id.endswith("3")
    ]


async def test_on_real_s3_a_failed_finish_shows_no_half_output(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def long(item: Any) -> Line:
        return Line(item, {"caption": "long " * 40_000})

    objects = objects_of(s3, "half/", monkeypatch)
    batch = await Written.whole(120, objects=objects, do=long)
    key = batch.layout.chunk(9, 2)
    await objects.write(key, (await objects.fetch(key)).data[:-2])
    with pytest.raises(PartCorrupt):
        await finish(batch.page, objects)
    assert await outputs_of(batch) == {}


async def test_parquet_without_pyarrow_is_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sightline.jobs.parquet.find_spec", lambda _: None)
    batch = await Written.whole(20, parquet=True)
    with pytest.raises(ParquetMissing, match=r"install sightline\[parquet\]"):
        await finish(batch.page, batch.objects)
    assert await outputs_of(batch) == {}
