"""Stores by their address: a batch's own, opened at its prefix, and any that its items lie in.

    s3://bucket/key     AWS and whatever speaks S3 · credentials: the location's folder, else boto3's chain
    gs://bucket/key     Google · the location's folder holds a service account's `*.json`, else Google's own chain
    az://container/key  Azure · the location's folder holds AZURE_STORAGE_ACCOUNT_NAME and …_KEY, else the environment
    file:///path        this machine
    memory://name/key   this process; for tests and trials
    upload:key          the batch's own store

Keys and paths stand in an address as they are: `%20` is three characters.
"""

import contextlib
import functools
import os
import stat
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

from sightline.jobs.items import Item
from sightline.jobs.objects import (
    LISTED,
    AccessDenied,
    BucketMissing,
    Changed,
    Entry,
    Missing,
    Objects,
    StoreFault,
    StoreUnavailable,
    TooLarge,
    in_thread,
)
from sightline.jobs.page import Location, Page

if TYPE_CHECKING:
    import boto3.session
    from botocore.client import BaseClient
    from botocore.credentials import ReadOnlyCredentials
    from obstore.store import ClientConfig, RetryConfig, S3Credential

T = TypeVar("T")

PATIENCE_SECONDS = 120.0
"""A store may be away so long before a call to it fails."""
MAX_STORES = 64
"""Buckets that one batch's items may lie in; a manifest names them."""
_REFRESH = timedelta(minutes=5)
"""After that, credentials are read again: files of a Secret change under a running pod."""
_KEY_FILES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_AZURE_FILES = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY")
_DEFAULT_REGION = "us-east-1"
_TIMEOUTS: "ClientConfig" = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=30),
    "timeout": timedelta(minutes=5),
}
"""Of one request: 20 MiB may come slowly, silence may not last."""


@dataclass(frozen=True, slots=True)
class Address:
    """An address in its parts. `bucket` is empty for `file`, whose key is the absolute path."""

    scheme: str
    bucket: str
    key: str

    @classmethod
    def of(cls, url: str) -> "Address":
        """Raises ValueError when it is none."""
        scheme, mark, rest = url.partition("://")
        if not mark:
            raise ValueError(f"{url!r} is no address of a store")
        if scheme == "file":
            if not rest.startswith("/"):
                raise ValueError("a file:// address holds an absolute path: file:///folder/name")
            return cls("file", "", rest)
        if scheme not in ("s3", "gs", "az", "memory"):
            raise ValueError(f"{scheme}:// is no kind of store that batches know")
        bucket, _, key = rest.partition("/")
        if not bucket and scheme != "memory":
            raise ValueError(f"{url!r} names no bucket")
        return cls(scheme, bucket, key)

    @property
    def store(self) -> str:
        """Of its bucket."""
        return f"{self.scheme}://{self.bucket}"

    def uri(self, key: str) -> str:
        """The address of another key in the same store."""
        return f"file://{key}" if self.scheme == "file" else f"{self.store}/{key}"


def open_location(location: Location, *, patience_seconds: float = PATIENCE_SECONDS) -> Objects:
    """A store rooted at the location's prefix, which is taken as a folder.

    patience_seconds  how long a call is repeated while the store is away, before it is StoreUnavailable

    Makes a folder that does not exist; asks no remote store anything. Raises ValueError (an address that is none) and
    AccessDenied (no credentials, or a folder that may not be made).
    """
    address = Address.of(location.url)
    prefix = address.key.strip("/")
    where = address.uri(prefix) if address.scheme != "file" else address.key
    retrying: RetryConfig = {
        "max_retries": 100,
        "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=4), "base": 2},
        "retry_timeout": timedelta(seconds=patience_seconds),
    }
    if address.scheme == "memory":
        return Objects(_memory(address.bucket), root=f"{prefix}/" if prefix else "", where=where)
    if address.scheme == "file":
        return Objects(_folder(Path(address.key)), where=where)
    if address.scheme == "gs":
        return Objects(_google(address.bucket, prefix, location, retrying), where=where)
    if address.scheme == "az":
        return Objects(_azure(address.bucket, prefix, location, retrying), where=where)
    return Objects(_s3(address.bucket, prefix, location, retrying), where=where)


class Stores:
    """Whatever the items of a batch lie in: one store a bucket, opened when it is first needed.

    locations  whose endpoints and credentials open it: that of the same bucket, else the first of the same kind. A
               kind of store that none of them is, is not opened: an item of a bucket's list is no file of this machine.
    uploads    the batch's own store, for `upload:`
    max_bytes  of one image
    patience_seconds  how long a call is repeated while a store is away
    """

    def __init__(
        self,
        *locations: Location,
        uploads: Objects | None = None,
        max_bytes: int | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self._locations = locations
        self._uploads = uploads
        self._max_bytes = max_bytes
        self._patience_seconds = patience_seconds
        self._objects: dict[str, Objects] = {}
        self._clients: dict[str, Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(
        cls, page: Page, objects: Objects, source: Location | None = None, *, max_bytes: int | None = None
    ) -> "Stores":
        """Of a batch. `source`: of its plan, which knows where the items of an earlier batch came from."""
        said = page.input
        known = [said.location] if said.kind != "retry_of" else []
        if said.images is not None:
            known.append(said.images)
        elif source is not None:
            known.append(replace(source, credentials=said.location.credentials))
        return cls(*known, uploads=objects, max_bytes=max_bytes)

    async def fetch(self, item: Item) -> bytes:
        """The bytes of an item's image, as it was when it was planned.

        Raises Missing, Changed, TooLarge, BucketMissing, AccessDenied, StoreUnavailable; ValueError when its address is
        none.
        """
        return await self.read(item.uri, item.etag)

    async def read(self, uri: str, etag: str | None = None) -> bytes:
        """The bytes at an address. Raises as `fetch` does."""
        if uri.startswith("upload:"):
            return await self._read_objects(self._own(), uri.removeprefix("upload:"), etag)
        address = Address.of(uri)
        if address.scheme == "file":
            self._location(address)
            return await in_thread(read_file, Path(address.key), etag, self._max_bytes)
        if address.scheme == "s3" and not _is_plain(address.key):
            return await in_thread(self._read_odd, address, etag)
        return await self._read_objects(self._at(address), address.key, etag)

    async def stat(self, uri: str) -> Entry:
        """Size and ETag of what is at an address. Raises as `fetch` does."""
        if uri.startswith("upload:"):
            return await self._own().stat(uri.removeprefix("upload:"))
        address = Address.of(uri)
        if address.scheme == "file":
            self._location(address)
            return await in_thread(stat_file, Path(address.key))
        if address.scheme == "s3" and not _is_plain(address.key):
            return await in_thread(self._stat_odd, address)
        return await self._at(address).stat(address.key)

    def stream(self, uri: str) -> AsyncGenerator[bytes]:
        """What is at an address, piece by piece. Raises as `fetch` does."""
        if uri.startswith("upload:"):
            return self._own().stream(uri.removeprefix("upload:"))
        address = Address.of(uri)
        if address.scheme == "file":
            self._location(address)
            folder, name = os.path.split(address.key)
            return Objects(_readable(Path(folder)), where=folder).stream(name)
        return self._at(address).stream(address.key)

    async def entries(self, location: Location) -> AsyncGenerator[Entry]:
        """Every object whose key begins with the location's, a page in memory at a time, ordered by key.

        Keys are whole, and a folder's are absolute paths. Raises BucketMissing, AccessDenied, StoreUnavailable.
        """
        address = Address.of(location.url)
        if address.scheme == "file":
            walk = files_below(Path(address.key))
            while page := await in_thread(lambda: list(islice(walk, LISTED))):
                for entry in page:
                    yield entry
        elif address.scheme == "s3":
            async for entry in self._listed(address):
                yield entry
        else:
            folder = address.key[: address.key.rfind("/") + 1]
            async for entry in self._at(address).entries(folder):
                if entry.key.startswith(address.key):
                    yield entry

    # --- S3 as boto3 knows it: prefixes that end within a name, keys that obstore cannot say --------------------------

    async def _listed(self, address: Address) -> AsyncGenerator[Entry]:
        """By obstore, which takes far less time; and on by boto3 from the first key that obstore cannot say."""
        after = ""
        if not address.key or address.key.endswith("/"):
            with contextlib.suppress(StoreUnavailable):
                async for entry in self._at(address).entries(address.key):
                    yield entry
                    after = entry.key
                return
        while page := await in_thread(self._page, address, after):
            for found in page:
                yield Entry(found["Key"], found["Size"], found.get("ETag") or None)
            after = page[-1]["Key"]

    def _page(self, address: Address, after: str) -> list[dict[str, Any]]:
        """The next thousand keys. Asked by the last key and not by a token, so that it can be asked again."""
        client = self._client(address)

        def ask() -> dict[str, Any]:
            return client.list_objects_v2(Bucket=address.bucket, Prefix=address.key, StartAfter=after, MaxKeys=LISTED)

        return self._patiently(ask, address).get("Contents", [])

    def _stat_odd(self, address: Address) -> Entry:
        client = self._client(address)

        def ask() -> dict[str, Any]:
            return client.head_object(Bucket=address.bucket, Key=address.key)

        said = self._patiently(ask, address)
        return Entry(address.key, said["ContentLength"], said["ETag"])

    def _read_odd(self, address: Address, etag: str | None) -> bytes:
        client = self._client(address)
        matched = {"IfMatch": etag} if etag else {}

        def read() -> bytes:
            said = client.get_object(Bucket=address.bucket, Key=address.key, **matched)
            with contextlib.closing(said["Body"]) as body:
                self._check(said["ContentLength"], address.uri(address.key))
                return cast("bytes", body.read())

        return self._patiently(read, address)

    def _patiently(self, call: Callable[[], T], address: Address) -> T:
        """Call boto3, again while the store is away; its faults become ours."""
        until, pause = time.monotonic() + self._patience_seconds, 0.2
        while True:
            try:
                return call()
            except StoreFault:
                raise
            except Exception as error:
                fault = _boto_fault(error, address.store, address.key)
                if not isinstance(fault, StoreUnavailable) or time.monotonic() + pause > until:
                    raise fault from error
                time.sleep(pause)
                pause = min(pause * 2, 4.0)

    def _client(self, address: Address) -> "BaseClient":
        with self._lock:
            if address.store not in self._clients:
                self._clients[address.store] = _client(self._location(address))
            return self._clients[address.store]

    # --- which store -------------------------------------------------------------------------------------------------

    async def _read_objects(self, objects: Objects, key: str, etag: str | None) -> bytes:
        return (await objects.fetch(key, etag, max_bytes=self._max_bytes)).data

    def _check(self, size: int, place: str) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            raise TooLarge(f"{place} has {size} bytes, more than {self._max_bytes}")

    def _own(self) -> Objects:
        if self._uploads is None:
            raise ValueError("this batch has no store for uploads")
        return self._uploads

    def _at(self, address: Address) -> Objects:
        with self._lock:
            if address.store not in self._objects:
                if len(self._objects) >= MAX_STORES:
                    raise ValueError(f"the items of a batch may lie in at most {MAX_STORES} buckets")
                location = replace(self._location(address), url=address.store)
                self._objects[address.store] = open_location(location, patience_seconds=self._patience_seconds)
            return self._objects[address.store]

    def _location(self, address: Address) -> Location:
        alike = [known for known in self._locations if Address.of(known.url).scheme == address.scheme]
        same = [known for known in alike if Address.of(known.url).bucket == address.bucket]
        if not alike:
            raise ValueError(f"items of this batch may not lie in {address.scheme}:// stores")
        return (same or alike)[0]


# --- this machine ----------------------------------------------------------------------------------------------------


def read_file(path: Path, etag: str | None, max_bytes: int | None) -> bytes:
    """A file as it was when it was planned. Raises Missing, Changed, TooLarge, AccessDenied, StoreUnavailable."""
    with _file_faults(path), open(path, "rb", opener=_opened) as file:
        entry = _entry(path, os.fstat(file.fileno()))
        if etag is not None and entry.etag != etag:
            raise Changed(f"{path}: the file has changed")
        if max_bytes is not None and entry.size > max_bytes:
            raise TooLarge(f"{path} has {entry.size} bytes, more than {max_bytes}")
        data = file.read()
        if _entry(path, os.fstat(file.fileno())).etag != entry.etag or len(data) != entry.size:
            raise Changed(f"{path}: the file changed while it was read")
        return data


def stat_file(path: Path) -> Entry:
    """Size and ETag of a file. Raises Missing, AccessDenied, StoreUnavailable."""
    with _file_faults(path):
        return _entry(path, path.stat())


def files_below(folder: Path) -> Iterator[Entry]:
    """Every file below a folder, ordered by path; hidden ones and those in hidden folders are left out.

    Links are followed, but into no folder that the way there came through. Raises BucketMissing (no such folder),
    AccessDenied, StoreUnavailable.
    """
    if not folder.is_dir():
        raise BucketMissing(f"{folder}: there is no such folder")
    with _file_faults(folder):
        yield from _files(str(folder).rstrip("/"), frozenset())


def _files(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[Entry]:
    about = os.stat(folder or "/")
    here = (about.st_dev, about.st_ino)
    if here in above:
        return
    with os.scandir(folder or "/") as found:
        # A folder sorts as its keys do, with the slash that follows its name.
        inside = sorted((f"{entry.name}/" if entry.is_dir() else entry.name) for entry in found if entry.name[0] != ".")
    for name in inside:
        path = f"{folder}/{name}"
        if name.endswith("/"):
            yield from _files(path[:-1], above | {here})
            continue
        try:
            about = os.stat(path)
        except FileNotFoundError:  # deleted just now, or a link to nowhere
            continue
        if stat.S_ISREG(about.st_mode):
            yield _entry(Path(path), about)


def _entry(path: Path, about: os.stat_result) -> Entry:
    """Its ETag is that of obstore, so that either may pin what the other reads."""
    if not stat.S_ISREG(about.st_mode):
        raise Missing(f"{path}: there is no such file")
    etag = f'"{about.st_ino:x}-{about.st_mtime_ns // 1000:x}-{about.st_size:x}"'
    return Entry(str(path), about.st_size, etag)


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes to must not hold a worker


class _file_faults:
    """What the system says about a file, in a store's words."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise Missing(f"{self._path}: there is no such file") from error
        if isinstance(error, PermissionError):
            raise AccessDenied(f"{self._path}: access denied") from error
        if isinstance(error, OSError):
            raise StoreUnavailable(f"{self._path} cannot be read") from error


# --- opening ---------------------------------------------------------------------------------------------------------


@functools.cache
def _memory(name: str) -> MemoryStore:
    return MemoryStore()


def _folder(folder: Path) -> LocalStore:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AccessDenied(f"{folder}: the folder cannot be made") from error
    return LocalStore(folder, automatic_cleanup=True)


def _readable(folder: Path) -> LocalStore:
    if not folder.is_dir():
        raise Missing(f"{folder}: there is no such folder")
    return LocalStore(folder)


def _s3(bucket: str, prefix: str, location: Location, retrying: "RetryConfig") -> S3Store:
    session = _session(location)
    endpoint = _endpoint(location)
    options: dict[str, Any] = {"virtual_hosted_style_request": not _is_path_style(location, bucket)}
    if endpoint:
        # Both, as obstore prefers AWS_ENDPOINT_URL_S3 of the environment to an `endpoint` that it is told.
        options |= {"endpoint": endpoint, "aws_endpoint_url_s3": endpoint}
    return S3Store(
        bucket,
        prefix=prefix or None,
        region=location.region or session.region_name or _DEFAULT_REGION,
        credential_provider=_Credentials(location, session),
        retry_config=retrying,
        client_options=_client_options(endpoint),
        **options,
    )


def _client(location: Location) -> "BaseClient":
    from botocore.config import Config

    session = _session(location)
    is_path_style = _is_path_style(location, Address.of(location.url).bucket)
    return session.client(
        "s3",
        endpoint_url=_endpoint(location),
        region_name=location.region or session.region_name or _DEFAULT_REGION,
        config=Config(
            s3={"addressing_style": "path" if is_path_style else "virtual"},
            retries={"mode": "standard", "total_max_attempts": 3},
            connect_timeout=5,
            read_timeout=60,
            max_pool_connections=16,
            # Stores other than AWS do not know the newer checksum headers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


class _Credentials:
    """Credentials for obstore: read again every few minutes."""

    def __init__(self, location: Location, session: "boto3.session.Session") -> None:
        self.config: dict[str, Any] = {}
        self._location = location
        self._session = session
        if self._frozen() is None:
            raise AccessDenied(f"{location.url}: there are no credentials for this store")

    def __call__(self) -> "S3Credential":
        if self._location.credentials is not None:
            self._session = _session(self._location)
        frozen = self._frozen()
        if frozen is None:
            raise AccessDenied(f"{self._location.url}: there are no credentials for this store")
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _REFRESH,
        }

    def _frozen(self) -> "ReadOnlyCredentials | None":
        found = self._session.get_credentials()
        return None if found is None else found.get_frozen_credentials()


def _session(location: Location) -> "boto3.session.Session":
    """boto3's chain, or the files of the location's folder: a name each, or one as boto3 reads it."""
    import boto3.session
    import botocore.session

    folder = location.credentials
    if folder is None:
        return boto3.session.Session()
    named = _read_keys(folder, (*_KEY_FILES, "AWS_SESSION_TOKEN"))
    if all(name in named for name in _KEY_FILES):
        return boto3.session.Session(
            aws_access_key_id=named["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=named["AWS_SECRET_ACCESS_KEY"],
            aws_session_token=named.get("AWS_SESSION_TOKEN"),
        )
    if (folder / "credentials").is_file():
        session = botocore.session.get_session()
        session.set_config_variable("credentials_file", str(folder / "credentials"))
        # Only this file: what the environment holds is somebody else's.
        session.get_component("credential_provider").providers[:] = [
            session.get_component("credential_provider").get_provider("shared-credentials-file")
        ]
        return boto3.session.Session(botocore_session=session)
    raise AccessDenied(f"{location.url}: {folder} holds no AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")


def _read_keys(folder: Path, names: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = (folder / name).read_text().strip()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise AccessDenied(f"{folder / name} cannot be read") from error
    return {name: value for name, value in found.items() if value}


def _google(bucket: str, prefix: str, location: Location, retrying: "RetryConfig") -> GCSStore:
    options: dict[str, Any] = {"base_url": location.endpoint} if location.endpoint else {}
    if location.credentials is not None:
        found = sorted(location.credentials.glob("*.json"))
        if not found:
            raise AccessDenied(f"{location.url}: {location.credentials} holds no service account (*.json)")
        options["service_account"] = str(found[0])
    client = _client_options(location.endpoint)
    return GCSStore(bucket, prefix=prefix or None, retry_config=retrying, client_options=client, **options)


def _azure(container: str, prefix: str, location: Location, retrying: "RetryConfig") -> AzureStore:
    options: dict[str, Any] = {"endpoint": location.endpoint} if location.endpoint else {}
    if location.credentials is not None:
        named = _read_keys(location.credentials, _AZURE_FILES)
        if len(named) < len(_AZURE_FILES):
            raise AccessDenied(f"{location.url}: {location.credentials} holds no {' and '.join(_AZURE_FILES)}")
        options |= {"account_name": named[_AZURE_FILES[0]], "account_key": named[_AZURE_FILES[1]]}
    client = _client_options(location.endpoint)
    return AzureStore(container, prefix=prefix or None, retry_config=retrying, client_options=client, **options)


def _client_options(endpoint: str | None) -> "ClientConfig":
    return {**_TIMEOUTS, "allow_http": (endpoint or "").startswith("http://")}


def _endpoint(location: Location) -> str | None:
    """Of the location, else as AWS's own tools are told."""
    said = location.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return said.rstrip("/") if said else None


def _is_path_style(location: Location, bucket: str) -> bool:
    """Whether the bucket goes into the path: a host's name cannot hold it, or the store is not AWS."""
    return location.path_style or _endpoint(location) is not None or "." in bucket


def _is_plain(key: str) -> bool:
    """Whether obstore can say a key: it takes no empty segments and no `.` or `..`."""
    return all(part not in ("", ".", "..") for part in key.split("/"))


def _boto_fault(error: Exception, where: str, key: str) -> StoreFault:
    from botocore.exceptions import ClientError, NoCredentialsError, PartialCredentialsError

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return AccessDenied(f"{where}: there are no credentials for this store")
    if not isinstance(error, ClientError):
        return StoreUnavailable(f"{where}: the store does not answer")
    said = cast("dict[str, Any]", error.response)
    code, status = str(said["Error"].get("Code", "")), said["ResponseMetadata"].get("HTTPStatusCode", 0)
    if code == "NoSuchBucket":
        return BucketMissing(f"{where}: there is no such bucket")
    if code == "XAdminUserNotFound" or status in (401, 403):
        return AccessDenied(f"{where}: access denied")
    if status == 404:
        return Missing(f"{where}/{key}: there is no such object")
    if status == 412:
        return Changed(f"{where}/{key}: the object has changed")
    return StoreUnavailable(f"{where}: the store answers {status}")
