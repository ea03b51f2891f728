"""Where the bytes of an image come from: the request itself, a URL, an object store, a mounted folder.

    text or bytes ──parse_source──▶ ImageSource ──Sources.fetch──▶ encoded bytes        (images.py goes on)

Nothing here looks inside an image, and no other module opens a client's URL, URI or path. The three rules behind the
URL policy, each from somebody's CVE (reference/peers.md §4.1):

* one parser: an address is split once, checked in parts, and what is fetched is built from the checked parts
* one look-up: every resolved address is checked, and the connection is made to a checked address, not to the name
* no surprise: off by default, https only, no redirects, no proxies of the environment, bounded in bytes and time

Refusals are SourceRefused (400) unless said otherwise; a retry helps only for those marked *:

    parsing  image_base64_invalid, image_empty (InvalidImage), data_uri_invalid, source_scheme_unsupported
    URL      url_not_allowed, url_invalid, url_address_not_allowed, url_fetch_failed*, url_timeout*
    S3       s3_uri_invalid, s3_bucket_not_allowed, s3_not_found, s3_access_denied, s3_no_credentials, s3_unavailable*,
             s3_timeout*
    path     path_not_allowed, image_not_found (NotFound, 404)
    size     image_too_many_bytes (PayloadTooLarge, 413)
"""

import asyncio
import binascii
import os
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, unquote_to_bytes, urljoin, urlsplit

import httpx

from sightline.errors import InvalidImage, NotFound, PayloadTooLarge, SightlineError, SourceRefused, Unavailable
from sightline.images import check_bytes, is_image
from sightline.settings import ImageSettings
from sightline.wire import ImageBytes, ImagePath, ImageS3, ImageSource, ImageUrl

if TYPE_CHECKING:
    from botocore.client import BaseClient

T = TypeVar("T")

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host name and port → IP addresses as text. Raises OSError when there are none."""

MAX_URL_CHARACTERS = 8_192
MAX_ADDRESSES = 4
"""Addresses of one name that are tried, in the resolver's order, before giving up."""

S3_THREADS = 8
S3_ATTEMPTS = 2
S3_READ_SECONDS = 10.0
CHUNK_BYTES = 64 * 1024
ABSENT_KEY = ".sightline/is-there-anybody"
"""That no image is stored under."""

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.\-]{0,31}):")


def parse_source(value: str | bytes) -> ImageSource:
    """Tell what a text argument, or an element of a V2 BYTES tensor, stands for. Does no I/O and checks no policy.

    bytes that begin like an image, or are no text   the encoded image itself
    `data:image/…`, `data:application/octet-stream`  the image inside, base64 or percent-encoded
    `https://…`, `http://…`                          ImageUrl
    `s3://…`                                         ImageS3
    anything else without a scheme                   base64; white space, missing padding and `-_` are tolerated

    A text never becomes an ImagePath: one argument for URL and path is how local files leak (FastChat #3873).

    Raises InvalidImage (400; image_base64_invalid, image_empty) and SourceRefused (400; data_uri_invalid,
    source_scheme_unsupported).
    """
    if isinstance(value, bytes):
        if is_image(value):
            return ImageBytes(value)
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return ImageBytes(value)
    text = value.strip()
    match = _SCHEME.match(text)
    scheme = match[1].lower() if match else ""
    if scheme == "data":
        return ImageBytes(_from_data_uri(text))
    if scheme in ("http", "https"):
        return ImageUrl(text)
    if scheme == "s3":
        return ImageS3(text)
    if scheme:
        raise SourceRefused(
            "Images are taken as base64, data URI, https:// URL or s3:// URI.", code="source_scheme_unsupported"
        )
    return ImageBytes(_from_base64(text))


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/key` into bucket and key (contract D6). The key is taken literally: `%20` stays `%20`.

    Raises SourceRefused (400, s3_uri_invalid). Segments `.` and `..` are refused although S3 allows them, as clients
    on the way may resolve them and leave the bucket.
    """
    if not uri.startswith("s3://"):
        raise SourceRefused("s3_uri must start with s3://", code="s3_uri_invalid")
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not (_BUCKET.fullmatch(bucket) and ".." not in bucket and key):
        raise SourceRefused("s3_uri must start with s3:// and name a bucket and a key", code="s3_uri_invalid")
    is_key = not (_CONTROL.search(key) or {".", ".."} & set(key.split("/")) or _utf8_length(key) > 1024)
    if not is_key:
        raise SourceRefused("The key of s3_uri is not one that can be fetched.", code="s3_uri_invalid")
    return bucket, key


_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,61}[A-Za-z0-9]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _utf8_length(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_WHITE = b" \t\r\n\f\v"


def _from_base64(text: str | bytes) -> bytes:
    try:
        packed = (text.encode("ascii") if isinstance(text, str) else text).translate(_URL_SAFE, _WHITE)
        body = packed.rstrip(b"=")
        if len(body) % 4 == 1 or len(packed) - len(body) > 2:
            raise ValueError("padding")
        data = binascii.a2b_base64(body + b"=" * (-len(body) % 4), strict_mode=True)
    except ValueError as error:  # not ASCII, or binascii.Error
        raise InvalidImage("The image is not valid base64.", code="image_base64_invalid") from error
    if not data:
        raise InvalidImage("The image is empty.", code="image_empty")
    return data


_DATA_URI = re.compile(r"data:([^,;]{0,100})((?:;[^,;]{0,100}){0,8}),", re.IGNORECASE)
_DATA_TYPE = re.compile(r"image/[a-z0-9.+\-]+|(?:application|binary)/octet-stream|", re.IGNORECASE)
_BAD_ESCAPE = re.compile(r"%(?![0-9a-fA-F]{2})")


def _from_data_uri(uri: str) -> bytes:
    head = _DATA_URI.match(uri)
    if head is None or not _DATA_TYPE.fullmatch(head[1].strip()):
        raise SourceRefused("A data URI must be data:image/…;base64,… .", code="data_uri_invalid")
    body = uri[head.end() :]
    parameters = {parameter.strip().lower() for parameter in head[2].split(";")}
    if "%" in body and _BAD_ESCAPE.search(body):
        raise SourceRefused("The data URI is not percent-encoded correctly.", code="data_uri_invalid")
    if "base64" in parameters:
        return _from_base64(unquote_to_bytes(body) if "%" in body else body)
    try:
        data = unquote_to_bytes(body)
    except ValueError as error:  # lone surrogates
        raise SourceRefused("The data URI is not percent-encoded correctly.", code="data_uri_invalid") from error
    if not data:
        raise InvalidImage("The image is empty.", code="image_empty")
    return data


class Sources:
    """Fetches encoded images under one policy. Safe for many tasks of one event loop.

    resolve  how names become addresses; the system's resolver unless a test says otherwise
    tls      how servers are verified; `SSL_CERT_FILE` or certifi's authorities unless a test says otherwise
    """

    def __init__(
        self, settings: ImageSettings, *, resolve: Resolve | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._settings = settings
        self._resolve = resolve or _resolve
        self._tls = tls
        self._s3: BaseClient | None = None
        self._s3_lock = threading.Lock()
        self._pool = ThreadPoolExecutor(S3_THREADS, thread_name_prefix="source")

    async def fetch(self, source: ImageSource) -> bytes:
        """Bring the bytes of an image, at most `max_image_bytes` of them.

        Raises SourceRefused (400), NotFound (404, path only), PayloadTooLarge (413); Unavailable (503) after `aclose`.
        """
        match source:
            case ImageBytes(data):
                check_bytes(len(data), self._settings.max_image_bytes)
                return data
            case ImageUrl(url):
                return await self._fetch_url(url)
            case ImageS3(uri):
                return await self._fetch_s3(uri)
            case ImagePath(path):
                return await self._in_pool(partial(read_below, self._settings, path))

    async def bucket_fault(self, bucket: str) -> str | None:
        """Why nothing can be read from a bucket: the code that a fetch would end with; None: it answers.

        It is asked for a key that is not there. "Access denied" is such an answer where one may not list the bucket.
        """
        try:
            async with asyncio.timeout(self._settings.s3_total_seconds):
                return await self._in_pool(partial(self._ask_s3, bucket))
        except TimeoutError:
            return "s3_timeout"
        except Unavailable as error:
            return error.code

    async def aclose(self) -> None:
        """Let go of connections and threads. A second call changes nothing."""
        self._pool.shutdown(wait=False)
        if self._s3 is not None:
            self._s3.close()

    async def _in_pool(self, work: Callable[[], T]) -> T:
        try:
            pending = asyncio.get_running_loop().run_in_executor(self._pool, work)
        except RuntimeError as error:  # the pool is shut down
            raise Unavailable("The server is shutting down.", code="shutting_down") from error
        return await pending

    async def _fetch_url(self, url: str) -> bytes:
        settings = self._settings
        try:
            async with asyncio.timeout(settings.url_total_seconds):
                for _ in range(settings.url_max_redirects + 1):
                    target = check_url(url, settings)
                    answer = await self._get(target)
                    if isinstance(answer, bytes):
                        return answer
                    url = urljoin(target.text, answer.location)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise SourceRefused("The image's server did not answer in time.", code="url_timeout") from error
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            raise SourceRefused("The image URL could not be fetched.", code="url_fetch_failed") from error
        raise SourceRefused(
            f"The image's server redirects; at most {settings.url_max_redirects} redirects are followed.",
            code="url_fetch_failed",
        )

    async def _get(self, target: "Target") -> "bytes | _Redirect":
        if self._tls is None:
            self._tls = await self._in_pool(httpx.create_ssl_context)
        addresses = await self._addresses(target)
        for address in addresses[:-1]:
            try:
                return await self._get_from(target, address)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._get_from(target, addresses[-1])

    async def _addresses(self, target: "Target") -> list[Address]:
        """All addresses of the host, each of them checked: one bad apple refuses the name."""
        found = [target.host] if target.is_address else await self._resolve(target.host, target.port)
        addresses = list(dict.fromkeys(ip_address(text) for text in found))
        if not addresses:
            raise OSError("the name has no address")
        if not all(is_fetchable(address, allow_private=self._settings.url_allow_private) for address in addresses):
            raise SourceRefused(
                "The image URL leads to an address that is not allowed.", code="url_address_not_allowed"
            )
        return addresses[:MAX_ADDRESSES]

    async def _get_from(self, target: "Target", address: Address) -> "bytes | _Redirect":
        """GET from the checked address. The name stays in the Host header, in SNI and in the check of the certificate.

        A client of its own for every call: a pooled connection would be found again by address, and so could serve
        one name with another's certificate; cookies would travel as well.
        """
        settings, limit = self._settings, self._settings.max_image_bytes
        assert self._tls is not None  # noqa: S101 - for the type checker
        async with (
            httpx.AsyncClient(
                verify=self._tls,
                trust_env=False,
                timeout=httpx.Timeout(settings.url_total_seconds, connect=settings.url_connect_seconds),
            ) as client,
            client.stream(
                "GET",
                httpx.URL(scheme=target.scheme, host=str(address), port=target.port, raw_path=target.raw_path),
                headers={
                    "Host": target.authority,
                    "User-Agent": "sightline",
                    "Accept": "image/*, */*;q=0.1",
                    "Accept-Encoding": "identity",
                    "Connection": "close",
                },
                extensions={"sni_hostname": target.host},
                follow_redirects=False,
            ) as response,
        ):
            if response.is_redirect and "location" in response.headers:
                return _Redirect(response.headers["location"])
            if response.status_code != 200:
                raise SourceRefused(
                    f"The image's server answered with status {response.status_code}.", code="url_fetch_failed"
                )
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise SourceRefused("The image's server compressed its answer, unasked.", code="url_fetch_failed")
            announced = response.headers.get("content-length", "")
            check_bytes(int(announced) if announced.isdecimal() else 0, limit)
            received = bytearray()
            async for chunk in response.aiter_raw():
                check_bytes(len(received) + len(chunk), limit)
                received += chunk
            return bytes(received)

    async def _fetch_s3(self, uri: str) -> bytes:
        bucket, key = parse_s3_uri(uri)
        if not _matches(bucket, self._settings.s3_buckets):
            raise SourceRefused("Images may not be fetched from this bucket.", code="s3_bucket_not_allowed")
        deadline = time.monotonic() + self._settings.s3_total_seconds
        try:
            async with asyncio.timeout(self._settings.s3_total_seconds):
                return await self._in_pool(partial(self._read_s3, bucket, key, deadline))
        except TimeoutError as error:
            raise SourceRefused("The object store did not answer in time.", code="s3_timeout") from error

    def _read_s3(self, bucket: str, key: str, deadline: float) -> bytes:
        """Blocks. The size is in the header of the answer, so an object that is too large is not downloaded."""
        limit = self._settings.max_image_bytes
        try:
            answer = self._s3_client().get_object(Bucket=bucket, Key=key)
            body, received = answer["Body"], bytearray()
            try:
                check_bytes(answer.get("ContentLength", 0), limit)
                while chunk := body.read(CHUNK_BYTES):
                    check_bytes(len(received) + len(chunk), limit)
                    received += chunk
                    if time.monotonic() > deadline:
                        raise TimeoutError
            finally:
                body.close()
            return bytes(received)
        except (SightlineError, TimeoutError):
            raise
        except Exception as error:  # boto3, botocore and urllib3 share no base class
            raise _s3_refusal(error) from error

    def _ask_s3(self, bucket: str) -> str | None:
        """Blocks."""
        from botocore import exceptions as boto

        try:
            self._s3_client().get_object(Bucket=bucket, Key=ABSENT_KEY)["Body"].close()
        except boto.ClientError as error:
            if error.response.get("Error", {}).get("Code", "") in ("NoSuchKey", "AccessDenied"):
                return None
            return _s3_refusal(error).code
        except Exception as error:  # boto3, botocore and urllib3 share no base class
            return _s3_refusal(error).code
        return None

    def _s3_client(self) -> "BaseClient":
        with self._s3_lock:  # boto3 sessions are not safe in threads, their clients are
            if self._s3 is None:
                import boto3.session
                from botocore.config import Config

                settings = self._settings
                is_path_style = settings.s3_path_style or settings.s3_endpoint_url is not None
                self._s3 = boto3.session.Session().client(
                    "s3",
                    endpoint_url=settings.s3_endpoint_url,
                    region_name=settings.aws_region,
                    config=Config(
                        connect_timeout=settings.s3_connect_seconds,
                        read_timeout=min(S3_READ_SECONDS, settings.s3_total_seconds),
                        retries={"mode": "standard", "total_max_attempts": S3_ATTEMPTS},
                        max_pool_connections=S3_THREADS,
                        s3={"addressing_style": "path" if is_path_style else "auto"},
                        # Stores other than AWS do not know the newer checksum headers.
                        request_checksum_calculation="when_required",
                        response_checksum_validation="when_required",
                    ),
                )
            return self._s3


_S3_DENIED = {
    *("AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
    *("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed", "InvalidObjectState"),
    "XAdminUserNotFound",  # versitygw, with status 404, for an unknown access key
}
_S3_ABSENT = {"NoSuchKey", "NoSuchBucket", "NoSuchVersion", "InvalidBucketName"}


def _s3_refusal(error: Exception) -> SourceRefused:
    """Contract D6: whatever the fault, the status is 400; the code tells which."""
    from botocore import exceptions as boto

    if isinstance(error, boto.ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in _S3_DENIED or status in (401, 403):
            return SourceRefused("The object store denies access to this object.", code="s3_access_denied")
        if code in _S3_ABSENT or status == 404:
            return SourceRefused("The object store has no such object.", code="s3_not_found")
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return SourceRefused("This server has no credentials for the object store.", code="s3_no_credentials")
    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError):
        return SourceRefused("The object store did not answer in time.", code="s3_timeout")
    return SourceRefused("The object store could not be reached.", code="s3_unavailable")


@dataclass(frozen=True, slots=True)
class Target:
    """One URL after all checks but that of its addresses; what is fetched is made of these parts.

    scheme      `https` or `http`
    host        lower-case ASCII name without a trailing dot, or an IP address without brackets
    is_address  whether `host` is an IP address
    raw_path    path and query as sent, percent-encoded; begins with `/`
    """

    scheme: str
    host: str
    port: int
    is_address: bool
    raw_path: bytes

    @property
    def authority(self) -> str:
        """Host and, unless it is the scheme's own, port: what the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def text(self) -> str:
        return f"{self.scheme}://{self.authority}{self.raw_path.decode('ascii')}"


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str


_PORTS = {"https": 443, "http": 80}
_UNSAFE = re.compile(r"[\s\\\x00-\x20\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2064\ufeff]")
_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<name>[^\[\]@:%]+))(?::(?P<port>[0-9]{1,5}))?")
_NAME = re.compile(
    r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
)
_NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")
"""A last label that is a number makes the whole host an IPv4 address in browsers' and libc's eyes (WHATWG URL)."""


def check_url(url: str, settings: ImageSettings) -> Target:
    """Hold a URL against the policy; the addresses behind its name are checked later, by `is_fetchable`.

    Raises SourceRefused (400): url_not_allowed for scheme, host or port; url_invalid for what is no plain URL: with
    user info, backslash, white space, control characters, an odd IPv4 form such as 2130706433 or 0x7f.1, …
    """
    if not settings.url_hosts:
        raise SourceRefused("Image URLs are not accepted here.", code="url_not_allowed")
    try:
        target = _parse_url(url)
    except ValueError as error:
        raise SourceRefused("The image URL is not a plain https:// URL.", code="url_invalid") from error
    if target.scheme == "http" and not settings.url_allow_http:
        raise SourceRefused("Image URLs must be https.", code="url_not_allowed")
    if not _matches_authority(target, settings.url_hosts):
        raise SourceRefused("Images may not be fetched from this host and port.", code="url_not_allowed")
    return target


def _parse_url(url: str) -> Target:
    if len(url) > MAX_URL_CHARACTERS or _UNSAFE.search(url):
        raise ValueError("length or characters")
    parts = urlsplit(url)
    if parts.scheme not in _PORTS:
        raise ValueError("scheme")
    authority = _AUTHORITY.fullmatch(parts.netloc)
    if authority is None:
        raise ValueError("authority")
    if authority["ipv6"]:
        host, is_address = str(IPv6Address(authority["ipv6"])), True
    else:
        host = _normal_name(authority["name"])
        is_address = _NUMERIC.fullmatch(host) is not None
        if is_address:
            IPv4Address(host)  # raises ValueError on fewer than four parts, octal and hexadecimal
    port = int(authority["port"] or _PORTS[parts.scheme])
    if not 1 <= port <= 65_535:
        raise ValueError("port")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    query = f"?{quote(parts.query, safe=_QUERY_SAFE)}" if parts.query else ""
    return Target(parts.scheme, host, port, is_address, f"{path}{query}".encode("ascii"))


_QUERY_SAFE = "/%:@!$&'()*+,;=~?[]"


def _normal_name(name: str) -> str:
    """Lower case, IDNA (so that other scripts' dots and digits become ours), no trailing dot."""
    if not name.isascii():
        import idna

        name = idna.encode(name, uts46=True).decode("ascii")
    name = name.lower().removesuffix(".")
    if not _NAME.fullmatch(name):
        raise ValueError("host")
    return name


def _matches_authority(target: Target, globs: Sequence[str]) -> bool:
    """A glob without a port means the scheme's own port."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    if _matches(f"{host}:{target.port}", [glob.lower() for glob in globs if _has_port(glob)]):
        return True
    return target.port == _PORTS[target.scheme] and _matches(
        host, [glob.lower() for glob in globs if not _has_port(glob)]
    )


def _has_port(glob: str) -> bool:
    return re.search(r":[0-9]+$", glob) is not None and not glob.endswith("]")


def _matches(text: str, globs: Sequence[str]) -> bool:
    """`*` is any run of characters, dots included; all else stands for itself. The whole text must match."""
    return any(re.fullmatch(re.escape(glob).replace(r"\*", ".*"), text, re.DOTALL) for glob in globs)


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def _networks(*texts: str) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple(IPv6Network(text) if ":" in text else IPv4Network(text) for text in texts)


# Written out, because `ipaddress.is_global` differs between patch releases of Python 3.11 to 3.13.
# Source: IANA special-purpose address registries for IPv4 and IPv6.
_NEVER = _networks(
    *("0.0.0.0/32", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"),
    *("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32"),  # metadata of Alibaba, Azure, Oracle
    *("::/128", "fe80::/10", "ff00::/8", "fd00:ec2::/32", "fd20:ce::254/128"),  # the last: metadata of AWS and Google
)
"""No image is ever served from here, whatever is allowed: link-local (metadata of all clouds), multicast, nowhere."""

_NOT_GLOBAL = _networks(
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24"),
    *("192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4"),
    *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # 2001::/32 is Teredo, 2002::/16 is 6to4: both retired
)
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_ISATAP = re.compile(rb".{8}[\x00\x02]\x00\x5e\xfe", re.DOTALL)


def is_fetchable(address: Address, *, allow_private: bool = False) -> bool:
    """Whether an image may be fetched from this address: it, and any IPv4 address within it, must be global.

    allow_private  also private and loopback addresses; link-local, metadata and multicast stay refused
    """
    for inner in _with_embedded(address):
        if any(inner in network for network in _NEVER):
            return False
        if allow_private:
            continue
        if any(inner in network for network in _NOT_GLOBAL):
            return False
        if isinstance(inner, IPv6Address) and inner not in _GLOBAL_UNICAST and inner not in _NAT64:
            return False
    return True


def _with_embedded(address: Address) -> Iterator[Address]:
    if isinstance(address, IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:  # ::ffff:a.b.c.d is that IPv4 address and nothing else
        yield address.ipv4_mapped
        return
    yield address
    if address in _NAT64 or _ISATAP.match(address.packed) or int(address) < 2**32:
        yield IPv4Address(address.packed[-4:])
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo


def read_below(settings: ImageSettings, path: str) -> bytes:
    """Read a regular file below `image_root` (contract E7). Blocks.

    path  relative to the root, or absolute and below it; symbolic links may be used as long as they stay below it

    Raises SourceRefused (400, path_not_allowed) without a root; NotFound (404, image_not_found) for a path that is
    absent, outside, no regular file or not readable – all the same, so that nobody can feel around; PayloadTooLarge.
    """
    if settings.image_root is None:
        raise SourceRefused("Paths on the server are not accepted here.", code="path_not_allowed")
    limit = settings.max_image_bytes
    try:
        root = settings.image_root.resolve(strict=True)
        real = (root / path).resolve(strict=True)
        descriptor = _open_below(root, real.relative_to(root).parts)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("not a regular file")
            check_bytes(status.st_size, limit)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                data = file.read(limit + 1)
        finally:
            os.close(descriptor)
    except PayloadTooLarge:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise NotFound("There is no such image.", code="image_not_found") from error
    check_bytes(len(data), limit)
    return data


def _open_below(root: Path, parts: Sequence[str]) -> int:
    """Open a resolved path again from the root, following no link: one that was put there since cannot lead out."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # NONBLOCK: a FIFO has no writer to wait for
    descriptor = os.open(root, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
    for index, part in enumerate(parts):
        above = descriptor
        try:
            is_last = index == len(parts) - 1
            descriptor = os.open(part, flags if is_last else flags | os.O_DIRECTORY, dir_fd=above)
        finally:
            os.close(above)
    return descriptor
