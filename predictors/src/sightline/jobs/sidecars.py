"""Captions as `.txt` files beside images: which file belongs to which image, and what happens to one that is there."""

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

from sightline.jobs.objects import Objects
from sightline.jobs.page import Location

log = logging.getLogger("sightline.jobs")

AT_ONCE = 16


def sidecar_key(sidecars: Location, images: Location, uri: str) -> str:
    """The key of an image's sidecar, below the location of all sidecars: the image's, ending in `.txt`.

    sidecars  where they go; the images' own location, or one above it: beside them
    images    the batch's input; what an image's URI has after it is kept, its folders too
    """
    key = _below(sidecars.url, uri) or _below(images.url, uri) or _below(_folder(images.url), uri) or _path(uri)
    folder, slash, name = key.rpartition("/")
    stem, dot, _ = name.rpartition(".")
    return f"{folder}{slash}{stem if dot and stem else name}.txt"


def caption_of(row: Mapping[str, Any]) -> str | None:
    """The text of a result, also of an OpenAI batch line's response; None when it has none."""
    caption: object = row.get("caption")
    if caption is None:
        choices = ((row.get("response") or {}).get("body") or {}).get("choices") or ({},)
        caption = (choices[0].get("message") or {}).get("content")
    return caption if isinstance(caption, str) and caption.strip() else None


class Sidecars:
    """Writes the captions of one batch beside its images. Doing all of it again changes nothing.

    objects   rooted at `location`
    location  of the sidecars
    images    of the batch's input
    existing  skip: a file that is not empty stays · overwrite · append: the caption becomes another line of it, once

    Of two images that would share a file (`a.jpg`, `a.png`), the second gets `a.png.txt`; appending, they share it.
    Memory: about 100 bytes an image.
    """

    def __init__(
        self,
        objects: Objects,
        location: Location,
        images: Location,
        existing: Literal["skip", "overwrite", "append"],
    ) -> None:
        self._objects = objects
        self._location = location
        self._images = images
        self._existing = existing
        self._taken: set[int] = set()
        self.count = 0
        """Captions that were handed over so far."""

    async def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the captions of some results; rows without an image or a caption have none to write."""
        found = [(self._key(row["uri"]), text) for row in rows if row.get("uri") and (text := caption_of(row))]
        captions = [(key, text) for key, text in found if _is_plain(key)]
        if len(captions) < len(found):
            log.warning("captions without a sidecar, as no store takes its key: %d", len(found) - len(captions))
        permits = asyncio.Semaphore(AT_ONCE)
        ordered = sorted(captions, key=lambda pair: pair[0])  # stable: lines of one file stay in the order of the rows
        async with asyncio.TaskGroup() as group:
            for key, pairs in groupby(ordered, key=lambda pair: pair[0]):
                group.create_task(self._put(key, [text for _, text in pairs], permits))
        self.count += len(captions)

    def _key(self, uri: str) -> str:
        key = sidecar_key(self._location, self._images, uri)
        if self._existing == "append":
            return key
        mark = _mark(key)
        if mark in self._taken:
            key = key.removesuffix(".txt") + f".{uri.rpartition('.')[2]}.txt"
            mark = _mark(key)
        self._taken.add(mark)
        return key

    async def _put(self, key: str, captions: Sequence[str], permits: asyncio.Semaphore) -> None:
        async with permits:
            lines = [caption.encode() + b"\n" for caption in captions]
            if self._existing == "skip":
                is_new = await self._objects.create(key, lines[0])
                if not is_new and not await self._objects.read_bytes(key):  # an empty file is no caption
                    await self._objects.write(key, lines[0])
            elif self._existing == "overwrite":
                await self._objects.write(key, lines[-1])
            else:
                before = await self._objects.read_bytes(key) or b""
                after = before
                for line in lines:
                    after = appended(after, line)
                if after != before:
                    await self._objects.write(key, after)


def appended(text: bytes, line: bytes) -> bytes:
    """A text with one more line, unless it has that line already: a finish that is repeated must not add it twice."""
    if text and not text.endswith(b"\n"):
        text += b"\n"
    return text if b"\n" + line in b"\n" + text else text + line


def _below(url: str, uri: str) -> str:
    base = url.rstrip("/") + "/"
    return uri.removeprefix(base) if uri.startswith(base) else ""


def _folder(url: str) -> str:
    """Of a prefix that is no whole folder (`photos/2024-`), the folder that it is in."""
    return url.rpartition("/")[0]


def _path(uri: str) -> str:
    """What a URI has after its scheme and bucket."""
    rest = uri.partition("://")[2] or uri
    return rest.partition("/")[2] or rest


def _is_plain(key: str) -> bool:
    """Whether a store can be asked for a key: obstore takes no empty parts, no `.` and no `..`."""
    return all(part not in ("", ".", "..") for part in key.split("/"))


def _mark(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
