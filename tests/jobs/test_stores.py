"""Stores by their address: opened where they say, with the keys they say, and nothing else of this machine."""

import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, Iterator
from dataclasses import replace
from pathlib import Path

import obstore
import orjson
import pytest
from obstore.store import LocalStore

from sightline.jobs.items import Item
from sightline.jobs.objects import (
    AccessDenied,
    BucketMissing,
    Changed,
    Entry,
    Missing,
    Objects,
    StoreUnavailable,
    TooLarge,
)
from sightline.jobs.page import Location
from sightline.jobs.stores import Address, Stores, files_below, open_location
from tests.jobs.clouds import Clouds, serving_clouds
from tests.jobs.store_proxy import proxying
from tests.s3 import S3Server, running_s3

ODD_NAMES = ("a b.jpg", "50%20.jpg", "ü#1?.jpg", "über/größe.jpg", "+&=.jpg")


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Below which the images of a test lie, in S3 or on this machine."""
    return tmp_path / "photos"


def bucket_of(s3: S3Server) -> str:
    return s3.bucket(f"stores-{uuid.uuid4().hex[:12]}")


def put_file(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


async def all_of(entries: AsyncIterable[Entry]) -> list[Entry]:
    return [entry async for entry in entries]


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("s3://bucket/a/b.jpg", ("s3", "bucket", "a/b.jpg")),
        ("s3://bucket", ("s3", "bucket", "")),
        ("s3://bucket/50%20#?.jpg", ("s3", "bucket", "50%20#?.jpg")),
        ("gs://bucket/a", ("gs", "bucket", "a")),
        ("az://container/a", ("az", "container", "a")),
        ("file:///a/b c.jpg", ("file", "", "/a/b c.jpg")),
        ("memory://name/a", ("memory", "name", "a")),
    ],
)
def test_an_address_has_a_kind_a_bucket_and_a_key(url: str, parts: tuple[str, str, str]) -> None:
    address = Address.of(url)
    assert (address.scheme, address.bucket, address.key) == parts
    assert address.uri(address.key) == (url if address.key or address.scheme == "file" else f"{url}/")


@pytest.mark.parametrize("url", ["", "photos", "s3:/a", "s3:///key", "file://host/a", "https://a/b", "ftp://a/b"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"address|kind|bucket"):
        open_location(Location(url))


# --- the batch's own store -------------------------------------------------------------------------------------------


async def test_a_location_is_the_root_of_its_keys(s3: S3Server) -> None:
    bucket = bucket_of(s3)
    objects = open_location(Location(f"s3://{bucket}/some/prefix/"))
    await objects.create("plan/a.json", b"x")
    assert s3.client.get_object(Bucket=bucket, Key="some/prefix/plan/a.json")["Body"].read() == b"x"
    assert await objects.keys("") == ["plan/a.json"]
    assert objects.where == f"s3://{bucket}/some/prefix"


async def test_two_that_open_the_same_memory_share_it() -> None:
    name = uuid.uuid4().hex
    await open_location(Location(f"memory://{name}/a")).create("b/c", b"x")
    assert await open_location(Location(f"memory://{name}")).keys("") == ["a/b/c"]
    assert await open_location(Location(f"memory://{name}/other")).keys("") == []


async def test_the_keys_of_a_mounted_secret_open_a_store(s3: S3Server, tmp_path: Path, keyless: None) -> None:
    location = Location(f"s3://{bucket_of(s3)}/out", s3.endpoint_url, s3.region, credentials=tmp_path)
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text(f"{s3.access_key}\n")
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(f"{s3.secret_key}\n")
    assert await open_location(location).create("a", b"x")
    found = await all_of(Stores(location).entries(location))
    assert [entry.key for entry in found] == ["out/a"]


async def test_a_credentials_file_as_aws_has_it_opens_a_store(s3: S3Server, tmp_path: Path, keyless: None) -> None:
    text = f"[default]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    (tmp_path / "credentials").write_text(text)
    location = Location(f"s3://{bucket_of(s3)}/out", s3.endpoint_url, s3.region, credentials=tmp_path)
    assert await open_location(location).create("a", b"x")
    assert len(await all_of(Stores(location).entries(location))) == 1


async def test_keys_that_change_under_a_running_worker_are_read_again(
    s3: S3Server, tmp_path: Path, keyless: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not s3.is_real:
        pytest.skip("moto checks no keys")
    from datetime import timedelta

    from sightline.jobs import stores

    monkeypatch.setattr(stores, "_REFRESH", timedelta(0))
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text("somebody-who-left")
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text("secret")
    objects = open_location(Location(f"s3://{bucket_of(s3)}/out", s3.endpoint_url, s3.region, credentials=tmp_path))
    with pytest.raises(AccessDenied):
        await objects.create("a", b"x")
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text(s3.access_key)
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(s3.secret_key)
    assert await objects.create("a", b"x")


@pytest.fixture
def keyless(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An environment without credentials of any kind."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    nowhere = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(nowhere / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(nowhere / "config"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.mark.usefixtures("keyless")
def test_a_store_without_credentials_says_so_at_once(tmp_path: Path) -> None:
    for credentials in (None, tmp_path):
        with pytest.raises(AccessDenied, match=r"credentials|AWS_ACCESS_KEY_ID"):
            open_location(Location("s3://bucket/out", credentials=credentials))
    for url, named in (("gs://bucket/out", r"\*\.json"), ("az://container/out", "AZURE_STORAGE_ACCOUNT_NAME")):
        with pytest.raises(AccessDenied, match=named):
            open_location(Location(url, credentials=tmp_path))


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    put_file(tmp_path / "file", b"")
    with pytest.raises(AccessDenied, match="cannot be made"):
        open_location(Location(f"file://{tmp_path}/file/out"))


# --- where items lie -------------------------------------------------------------------------------------------------


async def test_every_key_below_a_prefix_is_listed_in_order(s3: S3Server) -> None:
    bucket = bucket_of(s3)
    names = sorted([f"in/{n:04}.jpg" for n in range(1010)] + [f"in/{name}" for name in ODD_NAMES])
    location = Location(f"s3://{bucket}/in/", s3.endpoint_url)
    whole = open_location(replace(location, url=f"s3://{bucket}"))
    await asyncio.gather(*(whole.create(name, b"x") for name in [*names, "inside.jpg", "other/a.jpg"]))
    found = await all_of(Stores(location).entries(location))
    assert [entry.key for entry in found] == sorted(names, key=str.encode)
    assert {entry.size for entry in found} == {1}
    assert found[0].etag == s3.client.head_object(Bucket=bucket, Key=found[0].key)["ETag"]


@pytest.mark.parametrize("kind", ["s3", "memory"])
async def test_a_prefix_may_end_within_a_name(s3: S3Server, kind: str) -> None:
    url = f"s3://{bucket_of(s3)}" if kind == "s3" else f"memory://{uuid.uuid4().hex}"
    location = Location(f"{url}/photos/2024-", s3.endpoint_url)
    whole = open_location(replace(location, url=url))
    for key in ("photos/2023-12/a.jpg", "photos/2024-01/a.jpg", "photos/2024-02/b.jpg", "photos/2024.jpg"):
        await whole.create(key, b"x")
    found = await all_of(Stores(location).entries(location))
    assert [entry.key for entry in found] == ["photos/2024-01/a.jpg", "photos/2024-02/b.jpg"]


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_an_image_of_any_name_is_fetched(s3: S3Server, folder: Path, name: str) -> None:
    uris = [s3.put(bucket_of(s3), name, b"image"), f"file://{put_file(folder / name, b'image')}"]
    for uri in uris:
        stores = Stores(Location(uri, s3.endpoint_url))
        entry = await stores.stat(uri)
        assert await stores.fetch(Item("a", uri, entry.etag)) == b"image"
        with pytest.raises(Changed):
            await stores.fetch(Item("a", uri, '"another"'))
        with pytest.raises(Missing):
            await stores.fetch(Item("a", f"{uri}x"))
        assert b"".join([piece async for piece in stores.stream(uri)]) == b"image"


async def test_keys_that_obstore_cannot_say_are_listed_and_fetched(tmp_path: Path) -> None:
    """`a//b` and the like: people's buckets have them, and one must not hide all others. (A posix gateway has none.)"""
    with running_s3(tmp_path, "moto") as moto:
        for key in ("in//b.jpg", "in/a.jpg", "in/c/"):
            moto.put("bucket", key, b"image")
        location = Location("s3://bucket/in/", moto.endpoint_url, credentials=tmp_path)
        put_file(tmp_path / "AWS_ACCESS_KEY_ID", b"any")
        put_file(tmp_path / "AWS_SECRET_ACCESS_KEY", b"any")
        stores = Stores(location, max_bytes=5)
        found = await all_of(stores.entries(location))
        assert [entry.key for entry in found] == ["in//b.jpg", "in/a.jpg", "in/c/"]
        item = Item("b", "s3://bucket/in//b.jpg", found[0].etag)
        assert await stores.fetch(item) == b"image"
        assert await stores.stat(item.uri) == Entry("in//b.jpg", 5, found[0].etag)
        with pytest.raises(Missing):
            await stores.read("s3://bucket/in//c.jpg")
        moto.put("bucket", "in//b.jpg", b"others")
        with pytest.raises(Changed):
            await stores.fetch(item)
        with pytest.raises(TooLarge):
            await stores.read(item.uri)


async def test_a_listing_that_breaks_off_goes_on_where_it_was(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does at the first page with a key that obstore cannot say."""
    whole = Objects.entries

    async def broken(self: Objects, prefix: str, after: str | None = None) -> AsyncGenerator[Entry]:
        found = whole(self, prefix, after)
        for _ in range(4):
            yield await anext(found)
        raise StoreUnavailable("an odd key")

    bucket = bucket_of(s3)
    names = [f"in/{n:02}.jpg" for n in range(9)]
    for name in names:
        s3.client.put_object(Bucket=bucket, Key=name, Body=b"x")
    location = Location(f"s3://{bucket}/in/", s3.endpoint_url)
    whole_listing = await all_of(Stores(location).entries(location))
    monkeypatch.setattr(Objects, "entries", broken)
    assert await all_of(Stores(location).entries(location)) == whole_listing
    assert [entry.key for entry in whole_listing] == names


async def test_faults_of_a_listing_have_names(s3: S3Server, tmp_path: Path) -> None:
    gone = Location("s3://no-such-bucket/in/", s3.endpoint_url)
    with pytest.raises(BucketMissing, match="no-such-bucket"):
        await all_of(Stores(gone).entries(gone))
    with pytest.raises(BucketMissing, match="there is no such folder"):
        await all_of(Stores(local := Location(f"file://{tmp_path}/none")).entries(local))
    away = Location(f"s3://{bucket_of(s3)}/in/", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable):
        await all_of(Stores(away, patience_seconds=0.3).entries(away))


async def test_wrong_keys_are_access_denied(s3: S3Server, tmp_path: Path) -> None:
    if not s3.is_real:
        pytest.skip("moto checks no keys")
    put_file(tmp_path / "AWS_ACCESS_KEY_ID", b"nobody")
    put_file(tmp_path / "AWS_SECRET_ACCESS_KEY", b"secret")
    location = Location(f"s3://{bucket_of(s3)}/in/", s3.endpoint_url, credentials=tmp_path)
    with pytest.raises(AccessDenied):
        await all_of(Stores(location).entries(location))
    with pytest.raises(AccessDenied):
        await Stores(location).read(f"{location.url}a.jpg")


async def test_a_listing_outlives_errors_of_its_store(s3: S3Server) -> None:
    bucket = bucket_of(s3)
    for n in range(30):
        s3.client.put_object(Bucket=bucket, Key=f"in/{n:02}.jpg", Body=b"x")
    with proxying(s3.endpoint_url, error_share=0.5) as proxy:
        location = Location(f"s3://{bucket}/in/", proxy.url)
        found = await all_of(Stores(location).entries(location))
        assert len(found) == 30
        assert proxy.faults


async def test_uploads_lie_in_the_batchs_own_store() -> None:
    own = open_location(Location(f"memory://{uuid.uuid4().hex}"))
    await own.create("uploads/1", b"image")
    stores = Stores(uploads=own)
    entry = await stores.stat("upload:uploads/1")
    assert await stores.fetch(Item("1", "upload:uploads/1", entry.etag)) == b"image"
    with pytest.raises(ValueError, match="no store for uploads"):
        await Stores().read("upload:uploads/1")


async def test_kinds_of_stores_that_a_batch_does_not_name_are_not_opened(s3: S3Server, folder: Path) -> None:
    secret = f"file://{put_file(folder / 'secret.jpg', b'secret')}"
    stores = Stores(Location(f"s3://{bucket_of(s3)}/in/", s3.endpoint_url))
    for uri in (secret, "gs://bucket/a.jpg", "https://example.com/a.jpg", "secret.jpg", ""):
        for call in (stores.read(uri), stores.stat(uri)):
            with pytest.raises(ValueError, match=r"may not lie|no address|no kind"):
                await call


async def test_each_bucket_is_opened_as_its_own_location_says(s3: S3Server, tmp_path: Path) -> None:
    """Another bucket of the same kind is opened as the first location is."""
    one, two = bucket_of(s3), bucket_of(s3)
    uris = [s3.put(bucket, "a.jpg", bucket.encode()) for bucket in (one, two)]
    wrong = Location(f"s3://{one}/", "http://127.0.0.1:9")
    stores = Stores(Location(f"s3://{bucket_of(s3)}/", s3.endpoint_url), wrong, patience_seconds=0.3)
    assert await stores.read(uris[1]) == two.encode()
    with pytest.raises(StoreUnavailable):
        await stores.read(uris[0])


# --- this machine ----------------------------------------------------------------------------------------------------


def test_files_are_listed_in_order_without_hidden_ones(folder: Path) -> None:
    for name in ("b.jpg", "a/2.jpg", "a/10.jpg", "a.jpg", "a-b.jpg", ".hidden.jpg", ".cache/c.jpg", "._b.jpg"):
        put_file(folder / name, b"x")
    names = [entry.key.removeprefix(f"{folder}/") for entry in files_below(folder)]
    assert names == ["a-b.jpg", "a.jpg", "a/10.jpg", "a/2.jpg", "b.jpg"]


def test_the_etag_of_a_file_is_obstores(folder: Path) -> None:
    put_file(folder / "a.jpg", b"image")
    (found,) = files_below(folder)
    meta = obstore.head(LocalStore(folder), "a.jpg")
    assert (found.etag, found.size) == (meta["e_tag"], meta["size"])


def test_links_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    put_file(tmp_path / "elsewhere/c.jpg", b"x")
    put_file(folder / "a/b.jpg", b"x")
    (folder / "a/up").symlink_to(folder)
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "z.jpg").symlink_to(tmp_path / "elsewhere/c.jpg")
    (folder / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    names = [entry.key.removeprefix(f"{folder}/") for entry in files_below(folder)]
    assert names == ["a/b.jpg", "linked/c.jpg", "z.jpg"]


async def test_a_file_that_changed_is_not_read(folder: Path) -> None:
    path = put_file(folder / "a.jpg", b"one")
    stores = Stores(Location(f"file://{folder}"))
    item = Item("a", f"file://{path}", (await stores.stat(f"file://{path}")).etag)
    assert await stores.fetch(item) == b"one"
    path.write_bytes(b"four")
    with pytest.raises(Changed):
        await stores.fetch(item)
    path.unlink()
    with pytest.raises(Missing):
        await stores.fetch(item)


async def test_what_is_no_file_is_missing_and_holds_nobody(folder: Path) -> None:
    put_file(folder / "a/b.jpg", b"x")
    os.mkfifo(folder / "pipe.jpg")
    stores = Stores(Location(f"file://{folder}"))
    for name in ("pipe.jpg", "a", "a/b.jpg/c.jpg"):
        with pytest.raises(Missing):
            await stores.read(f"file://{folder}/{name}")
    assert [Path(entry.key).name for entry in files_below(folder)] == ["b.jpg"]


async def test_a_file_that_is_too_large_is_not_read(folder: Path) -> None:
    path = put_file(folder / "a.jpg", bytes(11))
    stores = Stores(Location(f"file://{folder}"), max_bytes=10)
    with pytest.raises(TooLarge, match="11 bytes, more than 10"):
        await stores.read(f"file://{path}")


# --- Google and Azure, against a server that answers obstore as theirs do ---------------------------------------------


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Location, Clouds]]:
    """A prefix of a bucket in either, with credentials from a mounted Secret."""
    account = {"client_email": "a@b", "private_key_id": "1", "private_key": "none", "disable_oauth": True}
    put_file(tmp_path / "keys/account.json", orjson.dumps(account))
    put_file(tmp_path / "keys/AZURE_STORAGE_ACCOUNT_NAME", b"sightline")
    put_file(tmp_path / "keys/AZURE_STORAGE_ACCOUNT_KEY", b"c2VjcmV0")
    with serving_clouds() as clouds:
        endpoint = clouds.google if request.param == "gs" else clouds.azure
        yield Location(f"{request.param}://bucket/out", endpoint, credentials=tmp_path / "keys"), clouds


async def test_a_batch_may_lie_in_another_cloud(cloud: tuple[Location, Clouds]) -> None:
    location, clouds = cloud
    objects = open_location(location, patience_seconds=5)
    await objects.probe()
    assert await objects.create("plan/a.json", b"first")
    assert not await objects.create("plan/a.json", b"second")
    assert len(clouds.conditions) == 4, "the probe's and ours"
    assert clouds.objects == {"bucket/out/plan/a.json": b"first"}
    await objects.write("progress", b"1")
    assert sorted(await objects.keys("")) == ["plan/a.json", "progress"]
    assert b"".join([piece async for piece in objects.stream("plan/a.json", part_bytes=2)]) == b"first"


async def test_images_may_lie_in_another_cloud(cloud: tuple[Location, Clouds]) -> None:
    location, clouds = cloud
    clouds.objects |= {f"bucket/in/2024-{n}/{name}": b"image" for n in range(3) for name in ODD_NAMES}
    clouds.objects |= {"bucket/in/2023.jpg": b"x", "bucket/out.jpg": b"x"}
    images = replace(location, url=location.url.replace("/out", "/in/2024-"))
    stores = Stores(images, patience_seconds=5)
    found = await all_of(stores.entries(images))
    assert [f"bucket/{entry.key}" for entry in found] == sorted(key for key in clouds.objects if "2024" in key)
    for entry in found:
        item = Item("a", f"{location.url.removesuffix('out')}{entry.key}", entry.etag, entry.size)
        assert await stores.fetch(item) == b"image"
        with pytest.raises(Changed):
            await stores.fetch(replace(item, etag='"another"'))
    with pytest.raises(Missing):
        await stores.read(f"{location.url}/gone.jpg")
