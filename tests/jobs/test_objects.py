"""A store as batches use it: the same of memory, of a folder and of a real S3 server, and faults with names."""

import asyncio
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError
from obstore.store import MemoryStore

from sightline.jobs import objects as module
from sightline.jobs.objects import (
    AccessDenied,
    BucketMissing,
    Changed,
    Missing,
    NoConditionalWrites,
    Objects,
    StoreUnavailable,
    TooLarge,
    open_store,
)
from sightline.jobs.page import Location
from sightline.jobs.stores import open_location
from tests.jobs.store_proxy import proxying
from tests.s3 import S3Server


@pytest.fixture(autouse=True)
def _keys(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)


def s3_location(s3: S3Server, **changes: Any) -> Location:
    prefix = f"s3://{s3.bucket('objects')}/{uuid.uuid4().hex}"
    return Location(**{"url": prefix, "endpoint": s3.endpoint_url, "region": s3.region, **changes})


@pytest.fixture(params=["memory", "folder", "s3"])
def objects(request: pytest.FixtureRequest, tmp_path: Path, s3_server: S3Server) -> Objects:
    locations = {
        "memory": Location(f"memory://{uuid.uuid4().hex}/some/prefix"),
        "folder": Location(f"file://{tmp_path}/some/prefix"),
        "s3": s3_location(s3_server),
    }
    return open_location(locations[request.param], patience_seconds=2)


async def pieces(*texts: bytes) -> AsyncIterator[bytes]:
    for text in texts:
        yield text


async def test_an_object_is_created_once(objects: Objects) -> None:
    assert await objects.create("a/b.json", b"first")
    assert not await objects.create("a/b.json", b"second")
    assert await objects.read_bytes("a/b.json") == b"first"


async def test_of_many_that_create_the_same_object_one_does(objects: Objects) -> None:
    created = await asyncio.gather(*(objects.create("race", str(n).encode()) for n in range(20)))
    assert created.count(True) == 1
    assert await objects.read_bytes("race") == str(created.index(True)).encode()


async def test_what_is_written_over_is_the_new(objects: Objects) -> None:
    await objects.write("progress", b"1")
    await objects.write("progress", b"2")
    assert await objects.read_bytes("progress") == b"2"


async def test_an_object_is_fetched_as_it_was(objects: Objects) -> None:
    await objects.write("image", b"old")
    entry = await objects.stat("image")
    assert entry.size == 3
    assert (await objects.fetch("image", entry.etag)).data == b"old"
    await objects.write("image", b"other")
    with pytest.raises(Changed):
        await objects.fetch("image", entry.etag)
    found = await objects.fetch("image")
    assert (found.data, found.etag) == (b"other", (await objects.stat("image")).etag)


async def test_what_is_not_there_is_missing(objects: Objects) -> None:
    with pytest.raises(Missing, match="nothing here"):
        await objects.fetch("nothing here")
    with pytest.raises(Missing):
        await objects.stat("nothing here")
    with pytest.raises(Missing):
        _ = [piece async for piece in objects.stream("nothing here")]
    assert await objects.read_bytes("nothing here") is None
    assert not await objects.exists("nothing here")
    await objects.remove("nothing here")


async def test_what_is_too_large_is_not_read(objects: Objects) -> None:
    await objects.write("large", bytes(1000))
    with pytest.raises(TooLarge, match="1000 bytes, more than 999"):
        await objects.fetch("large", max_bytes=999)
    assert len((await objects.fetch("large", max_bytes=1000)).data) == 1000


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 3500])
async def test_a_stream_is_the_object_in_pieces(objects: Objects, size: int) -> None:
    data = os.urandom(size)
    await objects.write("stream", data)
    found = [piece async for piece in objects.stream("stream", part_bytes=1000)]
    assert b"".join(found) == data
    assert all(len(piece) == 1000 for piece in found[:-1])


async def test_a_stream_never_mixes_two_objects(objects: Objects) -> None:
    await objects.write("stream", b"a" * 3000)
    stream = objects.stream("stream", part_bytes=1000)
    assert await anext(stream) == b"a" * 1000
    await objects.write("stream", b"b" * 3001)
    with pytest.raises(Changed):
        await anext(stream)


@pytest.mark.parametrize("count", [0, 1, 7], ids="{} pieces".format)
async def test_an_upload_is_what_was_handed_over(objects: Objects, count: int) -> None:
    texts = [os.urandom(1_000_000) for _ in range(count)]
    size = await objects.upload("out/results.jsonl", pieces(*texts), part_bytes=5 * 1024 * 1024)
    assert size == count * 1_000_000
    assert (await objects.fetch("out/results.jsonl")).data == b"".join(texts)


async def test_an_upload_that_breaks_off_is_not_seen(objects: Objects) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield b"half"
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        await objects.upload("out/half", broken())
    assert not await objects.exists("out/half")


async def test_a_listing_has_every_object_below_its_prefix(objects: Objects) -> None:
    names = [f"in/{n:04}.jpg" for n in range(1100)]
    await asyncio.gather(*(objects.create(name, b"x") for name in [*names, "inside.jpg", "other/a.jpg"]))
    entries = [entry async for entry in objects.entries("in/")]
    assert sorted(entry.key for entry in entries) == names == sorted(await objects.keys("in/"))
    assert {entry.size for entry in entries} == {1}
    assert entries[0].etag == (await objects.stat(entries[0].key)).etag
    later = [entry.key async for entry in objects.entries("in/", after=names[1050])]
    assert sorted(later) == names[1051:]


async def test_a_prefix_hides_what_is_not_below_it(objects: Objects) -> None:
    await objects.create("mine/a", b"")
    assert [entry.key async for entry in objects.entries("")] == ["mine/a"]
    assert await objects.folders("") == ["mine"]
    assert [key async for key in objects.entries("nobody/")] == []


async def test_a_deleted_folder_is_gone_with_its_first_key_first(objects: Objects) -> None:
    for key in ("job/a", "job/b/c", "job/request.json", "jobs/d"):
        await objects.create(key, b"")
    await objects.delete("job/", first="job/request.json")
    assert await objects.keys("job/") == []
    assert await objects.exists("jobs/d")


async def test_a_store_that_writes_once_is_probed_and_left_as_it_was(objects: Objects) -> None:
    await objects.probe()
    assert await objects.keys("") == []


async def test_a_store_that_ignores_the_condition_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(store: MemoryStore, key: str, data: bytes, mode: str = "overwrite") -> Any:
        return obstore.put(store, key, data)

    monkeypatch.setattr(module, "obstore", SimpleNamespace(**vars(obstore) | {"put": put}))
    with pytest.raises(NoConditionalWrites, match="ignores If-None-Match"):
        await Objects(MemoryStore()).probe()


async def test_two_writers_that_were_both_turned_away_do_not_lose_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3's 409 (ConditionalRequestConflict) reads like 412, and yet nobody may have written."""
    refused: list[str] = []

    def put(store: MemoryStore, key: str, data: bytes, mode: str = "overwrite") -> Any:
        if len(refused) < 3:
            refused.append(key)
            raise AlreadyExistsError(f"Object at location {key} already exists: 409 Conflict")
        return obstore.put(store, key, data, mode=mode)

    monkeypatch.setattr(module, "obstore", SimpleNamespace(**vars(obstore) | {"put": put}))
    objects = Objects(MemoryStore())
    assert await objects.create("chunk", b"ours")
    assert refused == ["chunk"] * 3
    assert await objects.read_bytes("chunk") == b"ours"


# --- faults of a real server -----------------------------------------------------------------------------------------


async def test_a_bucket_that_is_not_there_says_so(s3_server: S3Server) -> None:
    objects = open_location(s3_location(s3_server, url="s3://no-such-bucket/prefix"), patience_seconds=1)
    for call in (objects.create("a", b""), objects.fetch("a"), objects.keys("a/"), objects.probe()):
        with pytest.raises(BucketMissing, match="no-such-bucket"):
            await call


@pytest.mark.parametrize(
    ("access_key", "secret_key"),
    [("nobody", "secret"), (None, "wrong")],
    ids=["of nobody", "with a wrong secret"],
)
async def test_wrong_keys_are_access_denied(
    s3_server: S3Server, tmp_path: Path, access_key: str | None, secret_key: str
) -> None:
    if not s3_server.is_real:
        pytest.skip("moto checks no keys")
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text(access_key or s3_server.access_key)
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(secret_key)
    objects = open_location(s3_location(s3_server, credentials=tmp_path), patience_seconds=1)
    for call in (objects.create("a", b""), objects.fetch("a"), objects.keys("a/"), objects.probe()):
        with pytest.raises(AccessDenied):
            await call


async def test_a_store_that_is_away_is_unavailable_after_its_patience(s3_server: S3Server) -> None:
    location = s3_location(s3_server, endpoint="http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable) as caught:
        await open_location(location, patience_seconds=0.3).fetch("a")
    assert "127.0.0.1" not in str(caught.value), "text of the library"
    assert caught.value.__cause__ is not None


async def test_errors_within_its_patience_go_unnoticed(s3_server: S3Server) -> None:
    with proxying(s3_server.endpoint_url, error_share=0.3, conflict_share=0.3) as proxy:
        objects = open_location(s3_location(s3_server, endpoint=proxy.url), patience_seconds=60)
        for n in range(12):
            assert await objects.create(f"chunk-{n}", str(n).encode())
        for n in range(12):
            assert (await objects.fetch(f"chunk-{n}")).data == str(n).encode()
        assert set(proxy.faults) == {"SlowDown", "InternalError", "ConditionalRequestConflict", "lost"}
        assert set(proxy.written(r"/chunk-").values()) == {1}


async def test_a_blackout_within_its_patience_goes_unnoticed(s3_server: S3Server) -> None:
    with proxying(s3_server.endpoint_url) as proxy:
        objects = open_location(s3_location(s3_server, endpoint=proxy.url), patience_seconds=30)
        with proxy.blackout():
            writing = asyncio.create_task(objects.create("chunk", b"1"))
            while proxy.faults["black"] < 3:
                await asyncio.sleep(0.01)
        assert await writing


async def test_faults_name_the_place_and_keep_the_cause(objects: Objects) -> None:
    with pytest.raises(Missing) as caught:
        await objects.fetch("a/b")
    assert str(caught.value) == f"{objects.where}/a/b: there is no such object"
    assert isinstance(caught.value.__cause__, FileNotFoundError)


async def test_an_endpoint_that_is_told_is_stronger_than_the_environment(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    location = s3_location(s3_server)
    assert await open_location(location, patience_seconds=5).create("a", b"here")
    store = open_store(location.url, "jobs", endpoint_url=s3_server.endpoint_url, region=s3_server.region)
    assert await Objects(store).read_bytes("a") == b"here"


def test_a_disk_that_is_full_is_said_so():
    """As obstore says it of a file system, and as S3 does; nobody may be able to mount a full one here."""
    from obstore.exceptions import GenericError

    for text in (
        "Generic LocalFileSystem error: Unable to copy data to file: No space left on device (os error 28)",
        "Generic S3 error: Server returned error response: <Code>InsufficientStorage</Code>",
    ):
        fault = module.fault_of(GenericError(text), "file:///data", "parts/a")
        assert isinstance(fault, StoreUnavailable)
        assert "no space left" in str(fault)
