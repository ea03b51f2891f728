"""URLs against real servers on the loopback, which answer whatever a test wants, over HTTP and TLS."""

import asyncio
import contextlib
import datetime
import gzip
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import anyio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sightline.errors import PayloadTooLarge, SightlineError, SourceRefused, Unavailable
from sightline.settings import ImageSettings
from sightline.sources import Sources
from sightline.wire import ImageBytes, ImageUrl

IMAGE = b"these bytes are judged by the decoder, not here"

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Served:
    """A server on the loopback and the heads of the requests it got."""

    port: int
    requests: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def serving(
    answer: Answer | bytes, *, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Served]:
    served = Served(0)

    connections: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.current_task())
        gone = (OSError, asyncio.IncompleteReadError, asyncio.CancelledError)  # the client, or the test, has left
        with contextlib.suppress(*gone):
            served.requests.append((await reader.readuntil(b"\r\n\r\n")).decode("latin-1"))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(reader, writer)
        writer.close()
        with contextlib.suppress(*gone):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, host, port, ssl=tls)
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        server.close()
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections)


def http(body: bytes = IMAGE, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(location: str) -> bytes:
    return http(b"", "302 Found", f"Location: {location}")


def policy(*hosts: str, **more: object) -> ImageSettings:
    options = {"url_allow_http": True, "url_allow_private": True, "url_total_seconds": 5} | more
    return ImageSettings(_env_file=None, url_hosts=hosts, **options)


async def to_loopback(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


async def fetch(url: str, settings: ImageSettings, **more: object) -> bytes:
    sources = Sources(settings, **({"resolve": to_loopback} | more))
    try:
        return await sources.fetch(ImageUrl(url))
    finally:
        await sources.aclose()


async def refused(url: str, settings: ImageSettings, **more: object) -> SightlineError:
    with pytest.raises((SourceRefused, PayloadTooLarge)) as caught:
        await fetch(url, settings, **more)
    return caught.value


class TestPlain:
    async def test_brings_the_body_and_says_little(self):
        async with serving(http()) as server:
            url = f"http://cdn.example:{server.port}/a/b.png?size=1&x=%20#fragment"
            assert await fetch(url, policy(f"*.example:{server.port}")) == IMAGE
        (request,) = server.requests
        line, *headers = request.strip().split("\r\n")
        assert line == "GET /a/b.png?size=1&x=%20 HTTP/1.1"
        assert {header.split(":")[0].lower() for header in headers} == {
            "host", "user-agent", "accept", "accept-encoding", "connection"
        }  # fmt: skip
        assert f"Host: cdn.example:{server.port}" in headers
        assert "Accept-Encoding: identity" in headers

    async def test_the_content_type_is_not_believed(self):
        async with serving(http(IMAGE, "200 OK", "Content-Type: text/html")) as server:
            assert await fetch(f"http://a.example:{server.port}/", policy(f"*:{server.port}")) == IMAGE

    async def test_chunked_and_until_close(self):
        for answer in (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
            b"HTTP/1.0 200 OK\r\n\r\nabcde",
        ):
            async with serving(answer) as server:
                assert await fetch(f"http://a.example:{server.port}/", policy(f"*:{server.port}")) == b"abcde"

    async def test_the_environments_proxy_is_ignored(self, monkeypatch):
        async with serving(http(b"from the proxy")) as proxy, serving(http()) as server:
            for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            assert await fetch(f"http://a.example:{server.port}/", policy(f"*:{server.port}")) == IMAGE
        assert not proxy.requests

    async def test_no_cookie_travels(self):
        async with serving(http(IMAGE, "200 OK", "Set-Cookie: a=b; Path=/")) as server:
            sources = Sources(policy(f"*:{server.port}"), resolve=to_loopback)
            for _ in range(2):
                await sources.fetch(ImageUrl(f"http://a.example:{server.port}/"))
            await sources.aclose()
        assert all("cookie" not in request.lower() for request in server.requests)

    @pytest.mark.parametrize(
        "status", ["201 Created", "204 No Content", "206 Partial", "304 Not Modified", "403 F", "404 N", "500 E"]
    )
    async def test_only_200_is_an_image(self, status):
        async with serving(http(b"", status)) as server:
            error = await refused(f"http://a.example:{server.port}/", policy(f"*:{server.port}"))
        assert (error.status, error.code) == (400, "url_fetch_failed")

    @pytest.mark.parametrize(
        "answer",
        [
            pytest.param(b"", id="nothing"),
            pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", id="another protocol"),
            pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nabc", id="short body"),
            pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc", id="negative length"),
            pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef", id="two lengths"),
            pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 200_000, id="endless header"),
            pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", id="bad chunk"),
            pytest.param(http(gzip.compress(b"a" * 100), "200 OK", "Content-Encoding: gzip"), id="unasked gzip"),
        ],
    )
    async def test_nonsense_is_a_failed_fetch(self, answer):
        async with serving(answer) as server:
            error = await refused(f"http://a.example:{server.port}/", policy(f"*:{server.port}"))
        assert (error.status, error.code) == (400, "url_fetch_failed")

    async def test_nobody_listens(self):
        async with serving(http()) as server:
            port = server.port
        error = await refused(f"http://a.example:{port}/", policy(f"*:{port}"))
        assert error.code == "url_fetch_failed"

    async def test_private_is_refused_unless_a_test_allows_it(self):
        async with serving(http()) as server:
            settings = policy(f"*:{server.port}", url_allow_private=False)
            error = await refused(f"http://a.example:{server.port}/", settings)
        assert error.code == "url_address_not_allowed"
        assert not server.requests


class TestSize:
    async def test_an_announced_excess_is_refused_unread(self):
        async def answer(reader, writer):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
            await writer.drain()
            await reader.read()  # until the client leaves

        async with serving(answer) as server:
            error = await refused(f"http://a.example:{server.port}/", policy(f"*:{server.port}"))
        assert (error.status, error.code) == (413, "image_too_many_bytes")

    @pytest.mark.parametrize("head", [b"", b"Transfer-Encoding: chunked\r\n"])
    async def test_an_endless_body_is_cut_while_streaming(self, head):
        sent = 0

        async def answer(reader, writer):
            nonlocal sent
            writer.write(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
            while not writer.is_closing():
                writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n" if head else b"x" * 4096)
                await writer.drain()
                sent += 4096

        async with serving(answer) as server:
            settings = policy(f"*:{server.port}", max_image_bytes=100_000)
            error = await refused(f"http://a.example:{server.port}/", settings)
        assert (error.status, error.code) == (413, "image_too_many_bytes")
        assert sent < 20_000_000  # what fits the sockets' buffers

    async def test_exactly_the_limit_is_taken(self):
        async with serving(http(b"x" * 100)) as server:
            url = f"http://a.example:{server.port}/"
            assert len(await fetch(url, policy(f"*:{server.port}", max_image_bytes=100))) == 100
            assert (await refused(url, policy(f"*:{server.port}", max_image_bytes=99))).status == 413


class TestTime:
    async def test_a_server_that_stalls(self):
        async def answer(reader, writer):
            await reader.read()

        async with serving(answer) as server:
            settings = policy(f"*:{server.port}", url_total_seconds=0.2)
            error = await refused(f"http://a.example:{server.port}/", settings)
        assert (error.status, error.code) == (400, "url_timeout")

    async def test_a_server_that_drips(self):
        async def answer(reader, writer):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not writer.is_closing():
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.01)

        async with serving(answer) as server:
            settings = policy(f"*:{server.port}", url_total_seconds=0.3)
            error = await refused(f"http://a.example:{server.port}/", settings)
        assert error.code == "url_timeout"

    async def test_a_resolver_that_stalls(self):
        async def stalls(host, port):
            await asyncio.Event().wait()

        error = await refused("https://a.example/", policy("*", url_total_seconds=0.1), resolve=stalls)
        assert error.code == "url_timeout"

    async def test_a_caller_that_leaves_closes_the_connection(self):
        arrived, left = asyncio.Event(), asyncio.Event()

        async def answer(reader, writer):
            arrived.set()
            await reader.read()
            left.set()

        async with serving(answer) as server:
            task = asyncio.create_task(fetch(f"http://a.example:{server.port}/", policy(f"*:{server.port}")))
            await arrived.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(left.wait(), 5)


class TestRedirects:
    async def test_none_are_followed_by_default(self):
        async with serving(http()) as target, serving(redirect(f"http://a.example:{target.port}/")) as server:
            settings = policy("*", f"*:{server.port}", f"*:{target.port}")
            error = await refused(f"http://a.example:{server.port}/", settings)
        assert error.code == "url_fetch_failed"
        assert not target.requests

    async def test_are_followed_when_opted_in(self):
        async with serving(http()) as target, serving(redirect(f"http://b.example:{target.port}/x")) as server:
            settings = policy(f"*:{server.port}", f"*:{target.port}", url_max_redirects=1)
            assert await fetch(f"http://a.example:{server.port}/", settings) == IMAGE
        assert target.requests[0].startswith("GET /x ")
        assert f"b.example:{target.port}" in target.requests[0]

    async def test_a_relative_one(self):
        async def answer(reader, writer):
            writer.write(http() if "GET /deep/b.png" in server.requests[-1] else redirect("b.png"))

        async with serving(answer) as server:
            settings = policy(f"*:{server.port}", url_max_redirects=1)
            assert await fetch(f"http://a.example:{server.port}/deep/a.png", settings) == IMAGE

    async def test_a_circle_ends(self):
        async with serving(b"") as server:
            pass
        async with serving(redirect("/"), port=server.port) as server:
            error = await refused(f"http://a.example:{server.port}/", policy(f"*:{server.port}", url_max_redirects=3))
        assert error.code == "url_fetch_failed"
        assert len(server.requests) == 4

    @pytest.mark.parametrize(
        ("location", "code"),
        [
            ("http://169.254.169.254/latest/meta-data/", "url_address_not_allowed"),
            ("http://[fe80::1]/", "url_address_not_allowed"),
            ("http://evil.test/", "url_not_allowed"),
            ("http://a.example:22/", "url_not_allowed"),
            ("file:///etc/passwd", "url_invalid"),
            ("http://user@a.example/", "url_invalid"),
            ("http://2130706433/", "url_invalid"),
            ("//evil.test/", "url_not_allowed"),
            ("http://a.example\\@evil.test/", "url_invalid"),
        ],
    )
    async def test_every_hop_is_checked_like_the_first(self, location, code):
        async with serving(redirect(location)) as server:
            settings = policy("*.example", "169.254.*", "[fe80*", f"*:{server.port}", url_max_redirects=3)
            error = await refused(f"http://a.example:{server.port}/", settings)
        assert error.code == code
        assert len(server.requests) == 1

    async def test_to_a_private_address_behind_a_name(self):
        answers = {"a.example": ["127.0.0.1"], "inner.example": ["169.254.1.1"]}

        async def resolve(host, port):
            return answers[host]

        async with serving(redirect("http://inner.example/")) as server:
            settings = policy("*.example", f"*:{server.port}", url_max_redirects=1)
            error = await refused(f"http://a.example:{server.port}/", settings, resolve=resolve)
        assert error.code == "url_address_not_allowed"

    async def test_down_to_http_needs_leave(self, authority):
        async with serving(redirect("http://a.example/"), tls=authority.server("a.example")) as server:
            settings = policy("a.example", f"*:{server.port}", url_max_redirects=1, url_allow_http=False)
            error = await refused(f"https://a.example:{server.port}/", settings, tls=authority.client())
        assert error.code == "url_not_allowed"


class TestPinning:
    async def test_the_checked_address_is_the_one_dialled(self):
        """DNS rebinding: the second answer would lead elsewhere, so there must be no second question."""
        answers = iter([["127.0.0.1"], ["127.0.0.2"]])

        async def rebinds(host, port):
            return next(answers)

        async with serving(http(b"first")) as first, serving(http(b"second"), host="127.0.0.2", port=first.port):
            assert (
                await fetch(f"http://a.example:{first.port}/", policy(f"*:{first.port}"), resolve=rebinds) == b"first"
            )
        assert next(answers) == ["127.0.0.2"]

    async def test_a_global_address_is_dialled_as_checked(self, monkeypatch):
        dialled: list[tuple[str, int]] = []

        async def connect_tcp(remote_host, remote_port, **_):
            dialled.append((remote_host, remote_port))
            raise OSError

        monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
        answers = iter([["93.184.216.34", "2606:2800::1"], ["127.0.0.1"]])

        async def rebinds(host, port):
            return next(answers)

        error = await refused("https://a.example/", policy("*", url_allow_private=False), resolve=rebinds)
        assert error.code == "url_fetch_failed"
        assert dialled == [("93.184.216.34", 443), ("2606:2800::1", 443)]

    async def test_a_dead_address_is_followed_by_the_next(self):
        async def resolve(host, port):
            return ["127.0.0.3", "127.0.0.1"]

        async with serving(http()) as server:
            url = f"http://a.example:{server.port}/"
            assert await fetch(url, policy(f"*:{server.port}"), resolve=resolve) == IMAGE


class Authority:
    """A certificate authority for one test run."""

    def __init__(self, folder) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Sightline test authority")])
        self._certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    def server(self, name: str) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            other: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            other = x509.DNSName(name)
        certificate = (
            self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key)
            .add_extension(x509.SubjectAlternativeName([other]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        path = self._folder / f"{name}.pem"
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def client(self) -> ssl.SSLContext:
        pem = self._certificate.public_bytes(serialization.Encoding.PEM).decode()
        return ssl.create_default_context(cadata=pem)


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


class TestTls:
    async def test_the_certificate_is_for_the_name_though_the_address_is_dialled(self, authority):
        names: list[str] = []
        context = authority.server("a.example")
        context.sni_callback = lambda connection, name, _: names.append(name)
        async with serving(http(), tls=context) as server:
            settings = policy(f"a.example:{server.port}", url_allow_http=False)
            assert await fetch(f"https://a.example:{server.port}/", settings, tls=authority.client()) == IMAGE
        assert names == ["a.example"]
        assert f"Host: a.example:{server.port}" in server.requests[0]

    async def test_a_certificate_for_an_address(self, authority):
        async with serving(http(), tls=authority.server("127.0.0.1")) as server:
            settings = policy(f"127.0.0.1:{server.port}")
            assert await fetch(f"https://127.0.0.1:{server.port}/", settings, tls=authority.client()) == IMAGE

    @pytest.mark.parametrize("name", ["b.example", "127.0.0.1", "example", "*.a.example"])
    async def test_a_certificate_for_another_name_is_refused(self, authority, name):
        async with serving(http(), tls=authority.server(name.replace("*", "w"))) as server:
            url = f"https://a.example:{server.port}/"
            error = await refused(url, policy(f"*:{server.port}"), tls=authority.client())
        assert error.code == "url_fetch_failed"
        assert not server.requests

    async def test_an_unknown_authority_is_refused(self, authority):
        async with serving(http(), tls=authority.server("a.example")) as server:
            error = await refused(f"https://a.example:{server.port}/", policy(f"*:{server.port}"))
        assert error.code == "url_fetch_failed"

    async def test_two_names_of_one_address_do_not_share_a_connection(self, authority):
        async with serving(http(), tls=authority.server("a.example")) as server:
            sources = Sources(policy(f"*:{server.port}"), resolve=to_loopback, tls=authority.client())
            assert await sources.fetch(ImageUrl(f"https://a.example:{server.port}/")) == IMAGE
            with pytest.raises(SourceRefused):
                await sources.fetch(ImageUrl(f"https://b.example:{server.port}/"))
            await sources.aclose()
        assert len(server.requests) == 1


async def test_bytes_are_only_counted():
    sources = Sources(policy(max_image_bytes=3))
    assert await sources.fetch(ImageBytes(b"abc")) == b"abc"
    with pytest.raises(PayloadTooLarge):
        await sources.fetch(ImageBytes(b"abcd"))
    await sources.aclose()


async def test_after_closing_it_is_503():
    sources = Sources(policy("*"))
    await sources.aclose()
    await sources.aclose()
    with pytest.raises(Unavailable):
        await sources.fetch(ImageUrl("http://a.example/"))
