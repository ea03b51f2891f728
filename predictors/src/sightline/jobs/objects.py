"""An object store as jobs use it: what is written once is created with If-None-Match.

What can be wrong with a store, whichever it is:

    StoreFault
    ├── Missing ............... there is no such object
    ├── Changed ............... the object is another one than was asked for (If-Match)
    ├── TooLarge .............. the object has more bytes than the caller takes
    ├── BucketMissing ......... there is no such bucket, container or folder
    ├── AccessDenied .......... no credentials, wrong ones, or without the right
    ├── NoConditionalWrites ... the store writes over what must be written once; only `probe` says so
    └── StoreUnavailable ...... away, overloaded or full; the same call may work later

Their texts name the place and the fault in words of ours; the library's are in the cause, for the log.
"""

import asyncio
import contextlib
import functools
import os
import random
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import obstore
import orjson
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import LocalStore, MemoryStore, ObjectStore

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 64
"""Calls to stores at once; the loop's own pool has as few as five threads on a small machine."""
LISTED = 1000
"""Keys of one page, as S3 gives them."""
PART_BYTES = 8 * 1024 * 1024
CREATE_ATTEMPTS = 8

_ABSENT_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_FULL = ("No space left on device", "Disk quota exceeded", "InsufficientStorage", "QuotaExceeded")
_REFUSED = (
    "XAdminUserNotFound",  # versitygw: no such access key, with status 404
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AccessDenied",
    "ExpiredToken",
    "InvalidToken",
)


class StoreFault(Exception):
    """Base of what can be wrong with a store."""


class Missing(StoreFault):
    """There is no such object."""


class Changed(StoreFault):
    """The object is not the one that was asked for."""


class TooLarge(StoreFault):
    """An object has more bytes than the caller takes."""


class BucketMissing(StoreFault):
    """There is no such bucket, container or folder."""


class AccessDenied(StoreFault):
    """No credentials, wrong ones, or without the right."""


class NoConditionalWrites(StoreFault):
    """The store cannot write an object once only."""


class StoreUnavailable(StoreFault):
    """The store is away, overloaded or full."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One object of a listing. `etag` is as the store says it, quotes included; None where it has none."""

    key: str
    size: int
    etag: str | None


@dataclass(frozen=True, slots=True)
class Found:
    """An object's bytes, and its ETag where the store has one."""

    data: bytes
    etag: str | None


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="store")


async def in_thread(call: Callable[P, T], /, *args: P.args, **options: P.kwargs) -> T:
    """Run what blocks on a store in a thread of its own."""
    return await asyncio.get_running_loop().run_in_executor(_pool(), functools.partial(call, *args, **options))


class Objects:
    """The few things that jobs do with a store, in threads.

    Not obstore's own coroutines: those abort the interpreter (exit code 134) when it ends just after one of them has
    (pyo3 takes the GIL of a finalising interpreter; obstore 0.12.1).

    root   what every key begins with, unseen by the caller; for stores that have no prefix of their own
    where  the place in words, for messages: `s3://bucket/prefix`

    Every call may raise AccessDenied, BucketMissing or StoreUnavailable.
    """

    def __init__(self, store: ObjectStore, *, root: str = "", where: str = "the store") -> None:
        self._store = store
        self._root = root
        self.where = where

    def below(self, folder: str) -> "Objects":
        """The same store, rooted at a folder of it, which ends with `/`."""
        return Objects(self._store, root=self._root + folder, where=f"{self.where.rstrip('/')}/{folder}")

    async def create(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists. Returns whether what is there now is this.

        The store's word alone would not do. Its 409 to two writers at once, which obstore reports like 412, says not
        who won; and a 412 may be for our own first attempt, whose answer was lost. So what is there is read.
        """
        for attempt in range(CREATE_ATTEMPTS):
            if await self._create_once(key, data):
                return True
            if (there := await self.read_bytes(key)) is not None:
                return there == data
            await asyncio.sleep(random.uniform(0, 0.1 * 2**attempt))  # noqa: S311 - spreads writers, hides nothing
        raise StoreUnavailable(f"{self.where}: {key} could neither be written nor read")

    async def write(self, key: str, data: bytes) -> None:
        """Write an object, over an older one if need be."""
        await self._call(key, lambda path: obstore.put(self._store, path, data))

    async def read(self, key: str) -> dict[str, Any] | None:
        """A JSON object; None when there is none."""
        data = await self.read_bytes(key)
        return None if data is None else cast("dict[str, Any]", orjson.loads(data))

    async def read_bytes(self, key: str) -> bytes | None:
        """The bytes of an object; None when there is none."""
        try:
            return (await self.fetch(key)).data
        except Missing:
            return None

    async def fetch(self, key: str, etag: str | None = None, *, max_bytes: int | None = None) -> Found:
        """An object, whole. Raises Missing, Changed (it no longer has that ETag) and TooLarge, having read nothing."""

        def get(path: str) -> Found:
            result = obstore.get(self._store, path, options={"if_match": etag} if etag else None)
            if max_bytes is not None and result.meta["size"] > max_bytes:
                raise TooLarge(f"{self.where}: {key} has {result.meta['size']} bytes, more than {max_bytes}")
            return Found(bytes(result.bytes()), result.meta["e_tag"])

        return await self._call(key, get)

    async def stat(self, key: str) -> Entry:
        """Size and ETag of an object. Raises Missing."""
        try:
            meta = await self._call(key, lambda path: obstore.head(self._store, path))
        except Missing:
            # An answer to HEAD has no body. Whether object, bucket or right are missing, GET says.
            with contextlib.suppress(TooLarge):
                await self.fetch(key, max_bytes=0)
            meta = await self._call(key, lambda path: obstore.head(self._store, path))  # it has come just now
        return Entry(key, meta["size"], meta["e_tag"])

    async def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            await self.stat(key)
        except Missing:
            return False
        return True

    async def stream(self, key: str, *, part_bytes: int = PART_BYTES) -> AsyncGenerator[bytes]:
        """An object in pieces, however large; each piece is a request of its own. Raises Missing and Changed."""
        entry = await self.stat(key)

        def get(path: str, start: int) -> bytes:
            options: dict[str, Any] = {"range": (start, min(start + part_bytes, entry.size))}
            if entry.etag:
                options["if_match"] = entry.etag
            return bytes(obstore.get(self._store, path, options=cast("Any", options)).bytes())

        for start in range(0, entry.size, part_bytes):
            yield await self._call(key, functools.partial(get, start=start))

    async def upload(self, key: str, pieces: AsyncIterator[bytes], *, part_bytes: int = PART_BYTES) -> int:
        """Write an object piece by piece, over an older one if need be; nobody sees it before its end.

        Holds two parts in memory. Returns its bytes. When it fails, a multipart upload may be left to the bucket's
        lifecycle rule.
        """
        size = 0
        writer = await self._call(
            key,
            lambda path: obstore.open_writer(self._store, path, buffer_size=part_bytes, max_concurrency=1),
        )
        async for piece in pieces:
            size += len(piece)
            await self._call(key, lambda _, piece=piece: writer.write(piece))
        await self._call(key, lambda _: writer.close())
        return size

    async def entries(self, prefix: str, after: str | None = None) -> AsyncGenerator[Entry]:
        """Every object below a prefix that ends with `/` (or is empty), a page in memory at a time.

        after  only keys behind this one; ordered by key on S3, GCS, Azure and in memory, not in a local folder
        """
        offset = None if after is None else self._root + after
        pages = await self._call(
            prefix, lambda path: iter(obstore.list(self._store, path or None, offset=offset, chunk_size=LISTED))
        )
        while page := await self._call(prefix, lambda _: next(pages, None)):
            for meta in page:
                yield Entry(str(meta["path"])[len(self._root) :], meta["size"], meta["e_tag"] or None)

    async def keys(self, prefix: str) -> list[str]:
        """The keys below a prefix that ends with `/`."""

        def paths(path: str) -> list[str]:
            pages = obstore.list(self._store, path, chunk_size=LISTED)
            return [str(meta["path"])[len(self._root) :] for page in pages for meta in page]

        return await self._call(prefix, paths)

    async def folders(self, prefix: str) -> list[str]:
        """The names one level below a prefix that ends with `/`."""

        def names(path: str) -> list[str]:
            found = obstore.list_with_delimiter(self._store, path)["common_prefixes"]
            return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in found]

        return await self._call(prefix, names)

    async def newest(self, prefix: str) -> float:
        """When the youngest object below a prefix was written, seconds since 1970; 0 when there is none."""

        def latest(path: str) -> float:
            pages = obstore.list(self._store, path, chunk_size=LISTED)
            return max((meta["last_modified"].timestamp() for page in pages for meta in page), default=0.0)

        return await self._call(prefix, latest)

    async def remove(self, key: str) -> None:
        """Delete one object, if it is there."""
        with contextlib.suppress(Missing):
            await self._call(key, lambda path: obstore.delete(self._store, path))

    async def delete(self, prefix: str, *, first: str | None = None) -> None:
        """Delete everything below a prefix; before all else the key without which it is gone for everybody."""
        paths = await self.keys(prefix)
        paths.sort(key=lambda path: path != first)
        for path in paths:
            await self.remove(path)

    async def probe(self) -> None:
        """Make sure that the store can be written, and writes an object once when it is asked to.

        Creates an object of its own twice; the second must be refused. Raises NoConditionalWrites.
        """
        key = f".sightline-probe/{uuid.uuid4().hex}"
        try:
            await self.create(key, b"first")  # is there then, whatever a 409 or a lost answer said
            is_overwritten = await self._create_once(key, b"second")
        finally:
            with contextlib.suppress(Exception):  # a right to delete is not needed otherwise
                await self.remove(key)
        if is_overwritten:
            raise NoConditionalWrites(f"{self.where} ignores If-None-Match and would write over results")

    async def _create_once(self, key: str, data: bytes) -> bool:
        """Whether it was written. False: the store says that it was there, or is being written by somebody else."""

        def put(path: str) -> bool:
            try:
                obstore.put(self._store, path, data, mode="create")
            except AlreadyExistsError:
                return False
            return True

        return await self._call(key, put)

    async def _call(self, key: str, call: Callable[[str], T]) -> T:
        """Call the store with the whole key in a thread; its faults become ours."""
        try:
            return await in_thread(call, self._root + key)
        except (BaseError, FileNotFoundError, PermissionError) as error:
            raise fault_of(error, self.where, key) from error


def fault_of(error: Exception, where: str, key: str) -> StoreFault:
    """What an error of obstore means. Its text is read only where its class says too little."""
    text = str(error)
    place = f"{where.rstrip('/')}/{key}" if key else where
    if _holds(text, _ABSENT_BUCKET):
        return BucketMissing(f"{where}: there is no such bucket")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError) or _holds(text, _REFUSED):
        return AccessDenied(f"{where}: access denied")
    if isinstance(error, NotSupportedError):
        return NoConditionalWrites(f"{where} has no conditional writes")
    if isinstance(error, FileNotFoundError):
        return Missing(f"{place}: there is no such object")
    if isinstance(error, PreconditionError):
        return Changed(f"{place}: the object has changed")
    if _holds(text, _FULL):
        return StoreUnavailable(f"{where}: there is no space left")
    return StoreUnavailable(f"{where}: the store does not answer as it should")


def _holds(text: str, marks: Iterable[str]) -> bool:
    return any(mark in text for mark in marks)


def open_store(url: str | None, name: str, *, endpoint_url: str | None, region: str | None) -> ObjectStore:
    """Open memory://, file:///folder or s3://bucket/prefix; None is this user's state folder for `name`.

    S3 credentials come from boto3's chain. Raises OSError or ValueError when it cannot be written or understood.
    """
    if url is None:
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        return _local(state / "sightline" / name)
    if url.startswith("memory://"):
        return MemoryStore()
    if url.startswith("file://"):
        return _local(Path(url.removeprefix("file://")))
    if url.startswith("s3://"):
        from obstore.auth.boto3 import Boto3CredentialProvider
        from obstore.store import S3Store

        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise ValueError("job_store names no bucket")
        options: dict[str, Any] = {"credential_provider": Boto3CredentialProvider()}
        if endpoint_url:
            # Both, as obstore prefers AWS_ENDPOINT_URL_S3 of the environment to an `endpoint` that it is told.
            options |= {"endpoint": endpoint_url, "aws_endpoint_url_s3": endpoint_url}
            options["virtual_hosted_style_request"] = False
            options["client_options"] = {"allow_http": endpoint_url.startswith("http://")}
        return S3Store(
            bucket,
            prefix=prefix or None,
            region=region or "us-east-1",
            retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=20)},
            **options,
        )
    raise ValueError("job_store must be memory://, file:///folder or s3://bucket/prefix")


def is_id(text: str) -> bool:
    """Whether a text is an id as jobs give them away: a UUID as Python writes it."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False


def _local(folder: Path) -> LocalStore:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return LocalStore(folder, automatic_cleanup=True)
