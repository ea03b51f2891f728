"""What a batch is to do, item by item, from wherever its page says: a prefix, a list, an upload, an earlier batch.

However many items there are, memory holds a page of them, and eight bytes an item where their names must be compared.
"""

import asyncio
import contextlib
import csv
import os
import re
from array import array
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from typing import Any, Literal, cast

import numpy
import orjson

from sightline.jobs.items import MAX_ID_CHARACTERS, Item, is_custom_id
from sightline.jobs.layout import Layout
from sightline.jobs.objects import AccessDenied, BucketMissing, Missing, Objects, TooLarge
from sightline.jobs.page import Input, Location, Page
from sightline.jobs.plan import Plan, PlanCorrupt, ShardCorrupt, make_plan, read_plan, read_shard
from sightline.jobs.sidecars import sidecar_key
from sightline.jobs.stores import Address, Stores, open_location

Reason = Literal["InputNotFound", "InputEmpty", "InputTooLarge", "InvalidManifest", "AccessDenied"]

MAX_ITEMS = 10_000_000
"""Of a list; the operator's bound of a batch."""
MAX_LINE_BYTES = 1024 * 1024
MAX_OPENAI_LINE_BYTES = 32 * 1024 * 1024
"""A line that holds a picture of 20 MiB in base64, and its words."""
PINNED_AT_ONCE = 256
MAX_REPEATED = 10_000
"""Names that are looked for again when some occur twice: the first of them is what the message names."""

_OPENAI_URL = re.compile(r"/v1/(?!files|batches)[a-z_]+(/[a-z_]+)*")
_OPTIONS = ("prompt", "enhance")
"""Of a list's line, beside its address: what is asked about this image alone."""


class InputFault(Exception):
    """The input cannot be planned, and will not be by trying again (exit code 42).

    reason   one of the operator's `contract.PLAN_FAULTS`
    message  one sentence for whoever made the batch
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason
        self.message = message


async def plan_batch(page: Page, objects: Objects) -> Plan:
    """Plan a batch from its page, or find that it was planned before.

    objects  the batch's store, rooted at its output location

    Raises InputFault, PlanCorrupt, and StoreUnavailable and the other faults of the batch's own store.
    """
    source = None
    if page.input.kind == "retry_of":
        with _as_input_faults():
            source = (await _earlier(open_location(page.input.location))).source
    stores = Stores.of(page, objects, source)
    skip = await has_caption(page) if page.outputs.existing == "skip" else None
    return await make_plan(page, objects, items_of(page.input, stores), skip=skip, source=source)


def items_of(said: Input, stores: Stores) -> AsyncIterator[Item]:
    """Every item of an input, each custom_id once; in the order of keys or lines.

    stores  that know the input's location

    Every item is pinned: a prefix's by the listing, a list's by its `etag` or by asking for it. Raises InputFault, if
    need be at its end, and StoreUnavailable.
    """
    if said.kind == "prefix":
        return _below(said, stores)
    if said.kind == "retry_of":
        return _again(said, stores)
    return _listed(said, stores)


# --- a prefix --------------------------------------------------------------------------------------------------------


async def _below(said: Input, stores: Stores) -> AsyncGenerator[Item]:
    endings = tuple(suffix.casefold() for suffix in said.suffixes)
    with _as_input_faults():
        address = Address.of(said.location.url)
        others = taken = 0
        above = f"{address.key.rstrip('/')}/" if address.scheme == "file" else ""
        async for entry in stores.entries(said.location):
            if endings and not entry.key.casefold().endswith(endings):
                others += 1
                continue
            taken += 1
            if taken > said.max_items:
                raise InputFault("InputTooLarge", f"{said.location.url} has more than {said.max_items:,} images")
            uri = address.uri(entry.key)
            _check_text(uri)
            yield Item(id_of_key(entry.key.removeprefix(above)), uri, entry.etag, entry.size)
    if not taken:
        found = f"none of the {others:,} objects below it ends in {' '.join(endings)}" if others else "it is empty"
        raise InputFault("InputEmpty", f"{said.location.url} has no images: {found}")


def id_of_key(key: str) -> str:
    """The name of an item that has none but its key: the key itself, if it can be one.

    Of a key that is too long or has control characters, what can be shown of it, and a digest.
    """
    if is_custom_id(key):
        return key
    digest = sha256(key.encode(errors="surrogateescape")).hexdigest()
    shown = re.sub(r"[\x00-\x1f\x7f]", "?", key)[: MAX_ID_CHARACTERS - len(digest) - 1]
    return f"{shown}#{digest}"


def _check_text(uri: str) -> None:
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        shown = uri.encode(errors="surrogateescape").decode(errors="replace")
        raise InputFault("InvalidManifest", f"the name of {shown} is not UTF-8: rename the file") from error


# --- a list ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Row:
    """One entry of a list. `number`: of its (first) line, from 1."""

    number: int
    item: Item


async def _listed(said: Input, stores: Stores) -> AsyncGenerator[Item]:
    names = _Names()
    waiting: list[Item] = []
    with _as_input_faults():
        async for row in _rows(said, stores):
            if len(names) >= MAX_ITEMS:
                raise InputFault("InputTooLarge", f"{said.location.url} lists more than {MAX_ITEMS:,} items")
            names.add(row.item.custom_id)
            waiting.append(row.item)
            if len(waiting) == PINNED_AT_ONCE:
                for item in await _pinned(waiting, stores):
                    yield item
                waiting.clear()
        for item in await _pinned(waiting, stores):
            yield item
        if not len(names):
            raise InputFault("InputEmpty", f"{said.location.url} lists no items")
        if repeated := names.repeated():
            await _name_the_repeated(said, stores, repeated)


class _Names:
    """Whether a name occurred twice, for eight bytes a name: suspects, who are then looked at by name.

    The hash is Python's own, seeded by chance in every process, so nobody can aim at it.
    """

    def __init__(self) -> None:
        self._hashes = array("q")

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, name: str) -> None:
        self._hashes.append(hash(name))

    def repeated(self) -> set[int]:
        """Hashes that occurred more than once; names that differ may share one."""
        ordered = numpy.frombuffer(self._hashes, dtype=numpy.int64).copy()
        ordered.sort()
        return set(ordered[1:][ordered[1:] == ordered[:-1]][:MAX_REPEATED].tolist())


async def _name_the_repeated(said: Input, stores: Stores, repeated: set[int]) -> None:
    """Read the list once more. Raises InputFault if two names are really the same."""
    first: dict[str, int] = {}
    async for row in _rows(said, stores):
        name = row.item.custom_id
        if hash(name) not in repeated:
            continue
        if name in first:
            raise _wrong(row.number, f"has the same custom_id as line {first[name]}: {_shown(name)}")
        first[name] = row.number


async def _pinned(items: list[Item], stores: Stores) -> list[Item]:
    """The same items with the ETags and sizes of now. One that is not there is left as it is: it fails by itself."""

    async def pin(item: Item) -> Item:
        if not item.uri or item.etag is not None:
            return item
        try:
            entry = await stores.stat(item.uri)
        except (Missing, AccessDenied, BucketMissing):
            return item
        return replace(item, etag=entry.etag, size=entry.size)

    return await asyncio.gather(*(pin(item) for item in items))


async def _rows(said: Input, stores: Stores) -> AsyncGenerator[_Row]:
    """The rows of a list, whatever its format. Raises InputFault (InvalidManifest) that names the line."""
    is_openai = said.format == "OpenAIBatch"
    lines = _lines(stores.stream(said.location.url), MAX_OPENAI_LINE_BYTES if is_openai else MAX_LINE_BYTES)
    if said.format == "CSV":
        async for number, fields in _records(lines):
            yield _Row(number, _item(number, fields, said))
        return
    async for number, line in lines:
        if not line.strip():
            continue
        try:
            fields = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise _wrong(number, "is not JSON") from error
        if not isinstance(fields, dict):
            raise _wrong(number, "is not a JSON object")
        fields = cast("dict[str, Any]", fields)
        yield _Row(number, _openai_item(number, fields) if is_openai else _item(number, fields, said))


async def _lines(pieces: AsyncIterator[bytes], max_bytes: int) -> AsyncGenerator[tuple[int, str]]:
    """Lines with their numbers, from 1, without line feeds and without the mark that some editors begin a file with."""
    rest, number = b"", 0
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            number += 1
            yield number, _text(number, line, max_bytes)
        if len(rest) > max_bytes:
            raise _wrong(number + 1, f"is longer than {max_bytes:,} bytes")
    if rest:
        yield number + 1, _text(number + 1, rest, max_bytes)


def _text(number: int, line: bytes, max_bytes: int) -> str:
    if len(line) > max_bytes:
        raise _wrong(number, f"is longer than {max_bytes:,} bytes")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise _wrong(number, "is not UTF-8") from error


async def _records(lines: AsyncIterator[tuple[int, str]]) -> AsyncGenerator[tuple[int, dict[str, Any]]]:
    """The records of a CSV file by the names of its first one. A quoted field may run over several lines."""
    names: list[str] = []
    dialect = ","
    async for number, text in _whole_records(lines):
        if not names:
            dialect = max(",;\t", key=text.count)
            names = [name.strip() for name in next(csv.reader([text], delimiter=dialect))]
            if "uri" not in names:
                raise _wrong(number, "is the head of a CSV file and names no column `uri`")
            continue
        values = next(csv.reader([text], delimiter=dialect))
        if len(values) != len(names):
            raise _wrong(number, f"has {len(values)} fields, and the first line names {len(names)}")
        yield number, {name: value for name, value in zip(names, values, strict=True) if value}


async def _whole_records(lines: AsyncIterator[tuple[int, str]]) -> AsyncGenerator[tuple[int, str]]:
    """Lines joined until their quotes are closed, each with the number of its first line."""
    begun, start = "", 0
    async for number, line in lines:
        if not begun and not line.strip():
            continue
        begun, start = (f"{begun}\n{line}", start) if begun else (line, number)
        if begun.count('"') % 2 == 0:
            yield start, begun
            begun = ""
        elif len(begun) > MAX_LINE_BYTES:
            raise _wrong(start, "opens a quote that is not closed")
    if begun:
        raise _wrong(start, "opens a quote that is not closed")


def _item(number: int, fields: Mapping[str, Any], said: Input) -> Item:
    """An item of a JSONL or CSV list: `uri`, and perhaps `custom_id`, `etag`, `size`, `prompt`, `enhance`, `body`.

    Other fields are the caller's own affair.
    """
    written = fields.get("uri")
    if not isinstance(written, str) or not written.strip():
        raise _wrong(number, "has no uri")
    uri = _absolute(number, written.strip(), said)
    custom_id = fields.get("custom_id")
    if custom_id is None:
        custom_id = id_of_key(written.strip())
    body = fields.get("body") or {}
    if not isinstance(body, dict):
        raise _wrong(number, "has a body that is no JSON object")
    options = {name: fields[name] for name in _OPTIONS if fields.get(name) is not None}
    return Item(
        custom_id=_checked_id(number, custom_id),
        uri=uri,
        etag=_etag(number, fields.get("etag")),
        size=_size(number, fields.get("size")),
        body={**body, **options},
    )


def _absolute(number: int, written: str, said: Input) -> str:
    """The whole address of an image, which may be given from where the list lies.

    Of the list's own kind of store only: who may write a list in a bucket may not read this machine.
    """
    base = Address.of(said.location.url)
    folder = base.key[: base.key.rfind("/") + 1]
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", written) is None:
        written = base.uri(written if written.startswith("/") and base.scheme == "file" else folder + written)
    try:
        address = Address.of(written)
    except ValueError as error:
        raise _wrong(number, f"has a uri that batches do not fetch: {_shown(written)}") from error
    if address.scheme != base.scheme or (said.kind == "upload" and base.scheme == "file"):
        raise _wrong(number, f"has a uri of another kind of store than the list's: {_shown(written)}")
    if address.scheme == "file":
        return address.uri(os.path.normpath(address.key))
    if not address.key or {".", ".."} & set(address.key.split("/")):
        raise _wrong(number, f"has a uri whose key cannot be fetched: {_shown(written)}")
    return written


def _openai_item(number: int, fields: Mapping[str, Any]) -> Item:
    """A line as OpenAI's batch API takes it: `custom_id`, `method`, `url`, `body`."""
    url, body = fields.get("url"), fields.get("body")
    if fields.get("method") != "POST":
        raise _wrong(number, "has a method that is not POST")
    if not isinstance(url, str) or _OPENAI_URL.fullmatch(url) is None:
        raise _wrong(number, "has a url that is no route of the API, such as /v1/chat/completions")
    if not isinstance(body, dict) or not body:
        raise _wrong(number, "has no body")
    return Item(custom_id=_checked_id(number, fields.get("custom_id")), url=url, body=cast("dict[str, Any]", body))


def _checked_id(number: int, custom_id: object) -> str:
    if not isinstance(custom_id, str) or not is_custom_id(custom_id):
        raise _wrong(number, f"has no custom_id of 1 to {MAX_ID_CHARACTERS} characters without control characters")
    try:
        custom_id.encode()
    except UnicodeEncodeError as error:
        raise _wrong(number, "has a custom_id that is not UTF-8") from error
    return custom_id


def _etag(number: int, said: object) -> str | None:
    """With its quotes, as If-Match wants it; lists are often written without."""
    if said is None or said == "":
        return None
    if not isinstance(said, str) or not said.isascii() or not said.isprintable():
        raise _wrong(number, "has an etag that is no text")
    return said if said.startswith(('"', "W/")) else f'"{said}"'


def _size(number: int, said: object) -> int | None:
    if said is None or said == "":
        return None
    if isinstance(said, bool) or not str(said).isdecimal():
        raise _wrong(number, "has a size that is no number of bytes")
    return int(str(said))


def _wrong(number: int, what: str) -> InputFault:
    return InputFault("InvalidManifest", f"line {number} {what}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}…")


# --- an earlier batch ------------------------------------------------------------------------------------------------


async def _again(said: Input, stores: Stores) -> AsyncGenerator[Item]:
    """The items of an earlier batch that have no caption, or, where that is asked, none that was enhanced."""
    found = 0
    with _as_input_faults():
        objects = open_location(said.location)
        plan, layout = await _earlier(objects), Layout("")
        for shard in range(len(plan.shards)):
            items = await read_shard(objects, layout, plan, shard)
            rows = await _rows_of(objects, layout, shard)
            left = [item for item in items if _is_left(rows.get(item.custom_id), said.only)]
            changed = [item for item in left if _code(rows.get(item.custom_id)) == "input_changed"]
            now = {item.custom_id: item for item in await _pinned([replace(one, etag=None) for one in changed], stores)}
            for item in left:
                found += 1
                yield now.get(item.custom_id, item)
    if not found:
        raise InputFault("InputEmpty", "the earlier batch left nothing to be done again")


async def _earlier(objects: Objects) -> Plan:
    plan = await read_plan(objects, Layout(""))
    if plan is None:
        raise InputFault("InputNotFound", f"{objects.where}: there is no plan of an earlier batch")
    return plan


async def _rows_of(objects: Objects, layout: Layout, shard: int) -> dict[str, Mapping[str, Any]]:
    """Every line of a shard that was written, by custom_id."""
    parts = await asyncio.gather(*(objects.read_bytes(key) for key in await objects.keys(layout.parts(shard))))
    rows = (orjson.loads(line) for data in parts if data for line in data.splitlines())
    return {row["custom_id"]: row for row in rows}


def _is_left(row: Mapping[str, Any] | None, only: str) -> bool:
    """Whether an item is to be done again. None: the batch was ended before it was done."""
    if row is None or "error" in row:
        return True
    return only == "Unenhanced" and bool(row.get("enhance_error"))


def _code(row: Mapping[str, Any] | None) -> str:
    return str((row or {}).get("error", {}).get("code", ""))


# --- captions that are there -----------------------------------------------------------------------------------------


async def has_caption(page: Page) -> Callable[[Item], bool]:
    """Tells of an item whether its image has a caption in a `.txt` that is not empty, as of now.

    They are looked for where the page writes them, else beside the images. Listed once; memory holds sixteen bytes for
    each. Raises InputFault and StoreUnavailable.
    """
    listed, name = _captions_at(page)
    found = bytearray()
    with _as_input_faults(), contextlib.suppress(BucketMissing):
        async for entry in Stores(listed).entries(listed):
            if entry.size and entry.key.endswith(".txt"):
                found += _digest(entry.key)
    digests = numpy.frombuffer(found, dtype="V16")
    digests.sort()

    def has(item: Item) -> bool:
        if "://" not in item.uri:
            return False
        wanted = numpy.frombuffer(_digest(name(item.uri)), dtype="V16")
        at = int(numpy.searchsorted(digests, wanted)[0])
        return at < len(digests) and bool(digests[at] == wanted[0])

    return has


def _captions_at(page: Page) -> tuple[Location, Callable[[str], str]]:
    """Where captions are listed, and the whole key that an image's has."""
    images = page.input.location if page.input.kind != "retry_of" else page.input.images or page.input.location
    sidecars = page.outputs.sidecars
    if sidecars is not None:
        address = Address.of(sidecars.url)
        folder = "" if address.key.strip("/") == "" else f"{address.key.rstrip('/')}/"
        below = replace(sidecars, url=address.uri(folder or address.key))
        return below, lambda uri: folder + sidecar_key(sidecars, images, uri)
    address = Address.of(images.url)
    listed = images
    if page.input.kind != "prefix":  # a list's images are looked for where the list lies
        listed = replace(images, url=images.url[: images.url.rfind("/") + 1])
    whole = replace(images, url=address.store)
    return listed, lambda uri: sidecar_key(whole, whole, uri)


def _digest(key: str) -> bytes:
    return blake2b(key.lstrip("/").encode(errors="surrogateescape"), digest_size=16).digest()


@contextlib.contextmanager
def _as_input_faults() -> Generator[None]:
    """What is wrong with a store of the input is wrong with the input. StoreUnavailable is not: it may pass."""
    try:
        yield
    except AccessDenied as error:
        raise InputFault("AccessDenied", str(error)) from error
    except (Missing, BucketMissing) as error:
        raise InputFault("InputNotFound", str(error)) from error
    except TooLarge as error:
        raise InputFault("InputTooLarge", str(error)) from error
    except (PlanCorrupt, ShardCorrupt, orjson.JSONDecodeError) as error:
        raise InputFault("InvalidManifest", f"the earlier batch is damaged: {error}") from error
    except ValueError as error:
        raise InputFault("InvalidManifest", str(error)) from error
