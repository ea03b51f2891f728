"""Contract D6 against S3 servers: versitygw or minio when on PATH, and moto always."""

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from sightline.errors import PayloadTooLarge, SightlineError, SourceRefused
from sightline.settings import ImageSettings
from sightline.sources import Sources
from sightline.wire import ImageS3
from tests.s3 import S3Server, available, running_s3

IMAGE = b"\x89PNG these bytes are judged by the decoder, not here"

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module", params=["real", "moto"])
def s3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    kind = available() if request.param == "real" else "moto"
    if request.param == "real" and kind == "moto":
        pytest.skip("neither versitygw nor minio is on PATH")
    with running_s3(tmp_path_factory.mktemp("s3"), kind) as server:
        yield server


@pytest.fixture(autouse=True)
def environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)


async def fetch(uri: str, **options: object) -> bytes:
    sources = Sources(ImageSettings(_env_file=None, **options))
    try:
        return await sources.fetch(ImageS3(uri))
    finally:
        await sources.aclose()


async def refused(uri: str, **options: object) -> SightlineError:
    with pytest.raises((SourceRefused, PayloadTooLarge)) as caught:
        await fetch(uri, **options)
    return caught.value


@pytest.mark.parametrize(
    "key",
    ["a.png", "deep/er/a.png", "a b.png", " a ", "ü/€ 漢字 🙂.png", "a+b.png", "a%20b.png", "a%2Fb%.png", "a#b.png",
     "a?versionId=1&b=c.png", "a&b=c;d,e.png", "a:b@c.png", "x~!*'()$.png", 'q"<>|^`{}[].png', "...png", "a" * 200],
)  # fmt: skip
async def test_a_key_is_taken_as_it_is_written(s3: S3Server, key: str):
    data = IMAGE + key.encode()
    assert await fetch(s3.put("keys", key, data)) == data


async def test_keys_that_differ_only_in_encoding_are_different(s3: S3Server):
    one, other = s3.put("keys", "x y", b"blank"), s3.put("keys", "x+y", b"plus")
    third = s3.put("keys", "x%20y", b"escaped")
    assert [await fetch(uri) for uri in (one, other, third)] == [b"blank", b"plus", b"escaped"]


async def test_one_client_serves_many_fetches(s3: S3Server):
    uris = [s3.put("many", f"{n}.bin", bytes([n]) * 1000) for n in range(20)]
    sources = Sources(ImageSettings(_env_file=None))
    fetched = await asyncio.gather(*(sources.fetch(ImageS3(uri)) for uri in uris))
    await sources.aclose()
    assert fetched == [bytes([n]) * 1000 for n in range(20)]


async def test_larger_than_a_chunk(s3: S3Server):
    data = bytes(range(256)) * 4096
    assert await fetch(s3.put("many", "1MiB.bin", data)) == data


class TestRefusals:
    @pytest.mark.parametrize("uri", ["s3://absent-bucket-x/a.png", "s3://keys/absent.png", "s3://keys/a.png/x"])
    async def test_absent(self, s3: S3Server, uri):
        s3.put("keys", "a.png", IMAGE)
        error = await refused(uri)
        assert (error.status, error.code) == (400, "s3_not_found")

    async def test_no_uri(self):
        error = await refused("https://bucket/key")
        assert (error.status, error.code, error.message) == (400, "s3_uri_invalid", "s3_uri must start with s3://")

    @pytest.mark.parametrize("globs", [(), ("other",), ("key",), ("*s",), ("KEYS",), ("[k]eys?",)])
    async def test_a_bucket_that_no_glob_names(self, s3: S3Server, globs):
        uri = s3.put("keys-private", "a.png", IMAGE)
        assert (await refused(uri, s3_buckets=globs)).code == "s3_bucket_not_allowed"

    async def test_a_bucket_that_a_glob_names(self, s3: S3Server):
        uri = s3.put("keys-private", "a.png", IMAGE)
        assert await fetch(uri, s3_buckets=("other", "keys-*")) == IMAGE

    async def test_a_path_out_of_the_bucket(self, s3: S3Server):
        s3.put("keys-private", "a.png", IMAGE)
        error = await refused("s3://keys/../keys-private/a.png", s3_buckets=("keys",))
        assert error.code == "s3_uri_invalid"

    async def test_too_large_is_413(self, s3: S3Server):
        uri = s3.put("many", "100.bin", bytes(100))
        assert len(await fetch(uri, max_image_bytes=100)) == 100
        error = await refused(uri, max_image_bytes=99)
        assert (error.status, error.code) == (413, "image_too_many_bytes")

    @pytest.mark.parametrize("key", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
    async def test_wrong_credentials(self, s3: S3Server, monkeypatch, key):
        if not s3.is_real:
            pytest.skip("moto does not check keys")
        uri = s3.put("keys", "a.png", IMAGE)
        monkeypatch.setenv(key, "wrong")
        error = await refused(uri)
        assert (error.status, error.code) == (400, "s3_access_denied")

    async def test_no_credentials(self, s3: S3Server, monkeypatch):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        error = await refused("s3://keys/a.png")
        assert (error.status, error.code) == (400, "s3_no_credentials")

    async def test_nobody_listens(self):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"  # bound, but not listening
            error = await refused("s3://keys/a.png", s3_endpoint_url=endpoint)
        assert (error.status, error.code) == (400, "s3_unavailable")

    async def test_an_endpoint_that_is_none(self):
        assert (await refused("s3://keys/a.png", s3_endpoint_url="not a url")).code == "s3_unavailable"

    @pytest.mark.parametrize("options", [{"s3_endpoint_url": "http://127.0.0.1:1"}, {"max_image_bytes": 1}])
    async def test_the_client_never_sees_the_librarys_text(self, s3: S3Server, options):
        error = await refused(s3.put("keys", "a.png", IMAGE), **options)
        assert not {"boto", "Endpoint", "127.0.0.1", "GetObject"} & set(error.message.replace(":", " ").split())
        assert isinstance(error, PayloadTooLarge) or error.__cause__ is not None


@contextlib.asynccontextmanager
async def store(answer: Serve) -> AsyncIterator[str]:
    """A server that is no object store, or a bad one."""
    connections: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.current_task())
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            await answer(reader, writer)
        writer.close()
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections)


class TestBadStores:
    async def test_an_announced_excess_is_not_downloaded(self):
        async def answer(reader, writer):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            await writer.drain()
            await reader.read()  # until the client leaves

        async with store(answer) as endpoint:
            assert (await refused("s3://keys/a", s3_endpoint_url=endpoint)).code == "image_too_many_bytes"

    async def test_a_body_longer_than_announced_is_counted(self):
        async def answer(reader, writer):
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while not writer.is_closing():
                writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
                await writer.drain()

        async with store(answer) as endpoint:
            error = await refused("s3://keys/a", s3_endpoint_url=endpoint, max_image_bytes=100_000)
        assert error.code == "image_too_many_bytes"

    async def test_a_cut_body_is_no_image(self):
        async def answer(reader, writer):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc")

        async with store(answer) as endpoint:
            assert (await refused("s3://keys/a", s3_endpoint_url=endpoint)).code == "s3_unavailable"

    async def test_a_store_that_fails_is_asked_twice(self):
        asked = 0

        async def answer(reader, writer):
            nonlocal asked
            asked += 1
            writer.write(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        async with store(answer) as endpoint:
            error = await refused("s3://keys/a", s3_endpoint_url=endpoint)
        assert (error.status, error.code, asked) == (400, "s3_unavailable", 2)

    async def test_a_store_that_stalls(self):
        async def answer(reader, writer):
            await reader.read()

        async with store(answer) as endpoint:
            error = await refused("s3://keys/a", s3_endpoint_url=endpoint, s3_total_seconds=0.3)
        assert (error.status, error.code) == (400, "s3_timeout")

    async def test_a_page_instead_of_a_store(self):
        async def answer(reader, writer):
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 13\r\nConnection: close\r\n\r\n<html></html>")

        async with store(answer) as endpoint:
            assert (await refused("s3://keys/a", s3_endpoint_url=endpoint)).code == "s3_not_found"


def test_a_real_server_is_preferred(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name if name == "minio" else None)
    assert available() == "minio"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert available() == "moto"
