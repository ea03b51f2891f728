"""An object store as jobs use it: each object written once, and leases that say who works on a job until when.

A lease is `<folder>/lease-<n>`, n-th holder, created with If-None-Match and written over by its one holder.
"""

import asyncio
import contextlib
import os
import uuid
from collections.abc import AsyncGenerator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import obstore
import orjson
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, MemoryStore, ObjectStore

LEASE_SECONDS = 30.0
MAX_HOLDERS = 5
"""A job that outlived so many holders is what ends them; it must not end every server of the store in turn."""


class Objects:
    """The few things that jobs do with a store, in threads.

    Not obstore's own coroutines: those abort the interpreter (exit code 134) when it ends just after one of them has
    (pyo3 takes the GIL of a finalising interpreter; obstore 0.12.1).
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    async def create(self, key: str, data: bytes) -> bool:
        """Write an object unless it exists. Returns whether it was written."""
        try:
            await asyncio.to_thread(obstore.put, self._store, key, data, mode="create")
        except AlreadyExistsError:
            return False
        return True

    async def write(self, key: str, data: bytes) -> None:
        """Write an object, over an older one if need be."""
        await asyncio.to_thread(obstore.put, self._store, key, data)

    async def read(self, key: str) -> dict[str, Any] | None:
        """A JSON object; None when there is none."""
        data = await self.read_bytes(key)
        return None if data is None else cast("dict[str, Any]", orjson.loads(data))

    async def read_bytes(self, key: str) -> bytes | None:
        """The bytes of an object; None when there is none."""
        try:
            return await asyncio.to_thread(lambda: bytes(obstore.get(self._store, key).bytes()))
        except FileNotFoundError:
            return None

    async def keys(self, prefix: str) -> list[str]:
        """The keys below a prefix that ends with `/`."""

        def paths() -> list[str]:
            return [str(meta["path"]) for page in obstore.list(self._store, prefix) for meta in page]

        return await asyncio.to_thread(paths)

    async def folders(self, prefix: str) -> list[str]:
        """The names one level below a prefix that ends with `/`."""

        def names() -> list[str]:
            found = obstore.list_with_delimiter(self._store, prefix)["common_prefixes"]
            return [str(path).rstrip("/").rsplit("/", 1)[-1] for path in found]

        return await asyncio.to_thread(names)

    async def newest(self, prefix: str) -> float:
        """When the youngest object below a prefix was written, seconds since 1970; 0 when there is none."""

        def latest() -> float:
            pages = obstore.list(self._store, prefix)
            return max((meta["last_modified"].timestamp() for page in pages for meta in page), default=0.0)

        return await asyncio.to_thread(latest)

    async def delete(self, prefix: str, *, first: str | None = None) -> None:
        """Delete everything below a prefix; before all else the key without which it is gone for everybody."""
        paths = await self.keys(prefix)
        paths.sort(key=lambda path: path != first)
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(obstore.delete, self._store, path)


class TooManyHolders(Exception):
    """A job has ended everybody who worked on it."""


class Leases:
    """Who works on a job, for the jobs of one server. `clock` is in seconds, the same for all servers of the store."""

    def __init__(self, objects: Objects, clock: Callable[[], float]) -> None:
        self._objects = objects
        self._clock = clock
        self._holder = uuid.uuid4().hex

    async def exists(self, folder: str) -> bool:
        """Whether somebody has ever worked on the job."""
        return await self._newest(folder) is not None

    async def take(self, folder: str) -> str | None:
        """Become the holder of a job: the lease's key, or None when somebody else holds it. Raises TooManyHolders."""
        newest = await self._newest(folder)
        if newest is not None and newest[1] > self._clock():
            return None
        number = newest[0] + 1 if newest is not None else 0
        if number >= MAX_HOLDERS:
            raise TooManyHolders
        key = f"{folder}/lease-{number}"
        return key if await self._objects.create(key, self._body()) else None

    @contextlib.asynccontextmanager
    async def held(self, key: str) -> AsyncGenerator[None]:
        """Renew a lease while something is done; when that is cancelled, release it, so that nobody need wait."""
        renewing = asyncio.create_task(self._renew(key))
        try:
            yield
        except asyncio.CancelledError:
            renewing.cancel()
            released = orjson.dumps({"holder": self._holder, "expires": 0})
            with contextlib.suppress(Exception):
                await self._objects.write(key, released)
            raise
        finally:
            renewing.cancel()

    async def _renew(self, key: str) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            with contextlib.suppress(Exception):  # a missed renewal costs a repetition, not a result
                await self._objects.write(key, self._body())

    async def _newest(self, folder: str) -> tuple[int, float] | None:
        """Number and end of the newest lease."""
        number = -1
        for path in await self._objects.keys(f"{folder}/"):
            key = path.rsplit("/", 1)[1]
            if key.startswith("lease-"):
                number = max(number, int(key.removeprefix("lease-")))
        if number < 0:
            return None
        body = await self._objects.read(f"{folder}/lease-{number}")
        return None if body is None else (number, float(body["expires"]))

    def _body(self) -> bytes:
        return orjson.dumps({"holder": self._holder, "expires": self._clock() + LEASE_SECONDS})


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
            options |= {"endpoint": endpoint_url, "virtual_hosted_style_request": False}
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
