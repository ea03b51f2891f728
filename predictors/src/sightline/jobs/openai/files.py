"""Files that clients upload, in an object store: any replica that shares it lists them, hands them out, forgets them.

    uploads/<id>                          the bytes                  where a VisionBatch's workers look for them, too
    openai/files/<owner>/<id>.json        name, size, what is in it  created after them: the commit of an upload

An id begins with the time, so that the order of the keys is that of the uploads; the rest of it cannot be guessed.
"""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import orjson

from sightline.jobs.objects import Objects, in_thread
from sightline.jobs.openai.requests import Checked, LineFault

PIECE_BYTES = 4 * 1024 * 1024
ORPHAN_SECONDS = 86_400.0
"""Bytes without a description are those of a server that died between the two."""
READS_AT_ONCE = 16

_ID = re.compile(r"file-(?P<milliseconds>[0-9a-f]{12})[0-9a-f]{20}")


@dataclass(frozen=True, slots=True)
class File:
    """One uploaded file.

    size_bytes        of its content
    created, expires  seconds since 1970
    checked           what is in it, where it is for a batch
    """

    id: str
    filename: str
    purpose: str
    size_bytes: int
    created: float
    expires: float
    checked: Checked | None = None

    def to_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "id": self.id,
            "filename": self.filename,
            "purpose": self.purpose,
            "bytes": self.size_bytes,
            "created": self.created,
            "expires": self.expires,
        }
        if self.checked is not None:
            faults = [fault.to_json() for fault in self.checked.faults]
            said |= {
                "requests": self.checked.requests,
                "endpoints": list(self.checked.endpoints),
                "models": list(self.checked.models),
                "faults": faults,
            }
        return said

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "File":
        checked = None
        if "requests" in said:
            faults = tuple(LineFault.from_json(fault) for fault in said["faults"])
            checked = Checked(int(said["requests"]), tuple(said["endpoints"]), tuple(said["models"]), faults)
        return cls(
            id=said["id"],
            filename=said["filename"],
            purpose=said["purpose"],
            size_bytes=int(said["bytes"]),
            created=float(said["created"]),
            expires=float(said["expires"]),
            checked=checked,
        )


class Files:
    """The files of one store. Every call may raise a StoreFault.

    ttl_seconds  how long a file is kept that was uploaded without a wish
    clock        seconds since 1970
    """

    def __init__(self, objects: Objects, *, ttl_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self._objects = objects
        self._ttl = ttl_seconds
        self._clock = clock

    def now(self) -> float:
        """Seconds since 1970 by the clock that files expire by."""
        return self._clock()

    async def add(
        self,
        content: IO[bytes],
        *,
        size_bytes: int,
        filename: str,
        purpose: str,
        principal: str,
        checked: Checked | None = None,
        seconds: float | None = None,
    ) -> File:
        """Store a file, piece by piece. `content` is at its beginning; `seconds` until it expires."""
        now = self._clock()
        file = File(
            id=f"file-{int(now * 1000):012x}{secrets.token_hex(10)}",
            filename=filename,
            purpose=purpose,
            size_bytes=size_bytes,
            created=now,
            expires=now + (seconds or self._ttl),
            checked=checked,
        )
        await self._objects.upload(content_key(file.id), _pieces(content))
        await self._objects.create(_key(principal, file.id), orjson.dumps(file.to_json()))
        return file

    async def get(self, file_id: str, principal: str) -> File | None:
        """None when there is none, it has expired, or it is somebody else's."""
        if not is_file_id(file_id):
            return None
        said = await self._objects.read(_key(principal, file_id))
        if said is None or (file := File.from_json(said)).expires <= self._clock():
            return None
        return file

    async def list(
        self, principal: str, *, purpose: str | None, after: str | None, limit: int, newest_first: bool = True
    ) -> Sequence[File]:
        """At most `limit` files of a principal, those that follow the file `after`."""
        ids = sorted(
            (key.rsplit("/", 1)[-1].removesuffix(".json") for key in await self._objects.keys(_folder(principal))),
            reverse=newest_first,
        )
        if after is not None:
            ids = [file_id for file_id in ids if (file_id < after if newest_first else file_id > after)]
        found: list[File] = []
        for start in range(0, len(ids), READS_AT_ONCE):
            read = await asyncio.gather(*(self.get(each, principal) for each in ids[start : start + READS_AT_ONCE]))
            found += [file for file in read if file is not None and purpose in (None, file.purpose)]
            if len(found) >= limit:
                break
        return found[:limit]

    def content(self, file: File) -> AsyncGenerator[bytes]:
        """The bytes of a file in pieces. Raises Missing when it is deleted meanwhile."""
        return self._objects.stream(content_key(file.id), part_bytes=PIECE_BYTES)

    async def lines(self, file: File) -> AsyncGenerator[bytes]:
        """The lines of a file that are not blank, without their line feeds."""
        rest = b""
        async for piece in self.content(file):
            *whole, rest = (rest + piece).split(b"\n")
            for line in whole:
                if line.strip():
                    yield line
        if rest.strip():
            yield rest

    async def delete(self, file_id: str, principal: str) -> bool:
        """Forget a file. Returns whether there was one."""
        if await self.get(file_id, principal) is None:
            return False
        await self._forget(_key(principal, file_id), file_id)
        return True

    async def sweep(self) -> None:
        """Delete what has expired, and bytes that were never described."""
        described: set[str] = set()
        for key in await self._objects.keys("openai/files/"):
            file_id = key.rsplit("/", 1)[-1].removesuffix(".json")
            described.add(file_id)
            said = await self._objects.read(key)
            if said is not None and File.from_json(said).expires <= self._clock():
                await self._forget(key, file_id)
        for key in await self._objects.keys("uploads/"):
            # The bucket may be somebody's own: only what is named exactly as we name things is ours.
            match = _ID.fullmatch(key.removeprefix("uploads/"))
            if match is None or match.string in described:
                continue
            if self._clock() - int(match["milliseconds"], 16) / 1000 > ORPHAN_SECONDS:
                await self._objects.remove(key)

    async def _forget(self, key: str, file_id: str) -> None:
        await self._objects.remove(key)  # first, as without it the file is gone for everybody
        await self._objects.remove(content_key(file_id))


async def _pieces(content: IO[bytes]) -> AsyncGenerator[bytes]:
    while piece := await in_thread(content.read, PIECE_BYTES):
        yield piece


def is_file_id(text: str) -> bool:
    """Whether a text is an id as `Files` gives them away."""
    return _ID.fullmatch(text) is not None


def content_key(file_id: str) -> str:
    """Where the bytes of an upload lie: a VisionBatch with `upload.fileId` reads them there."""
    return f"uploads/{file_id}"


def owner(principal: str) -> str:
    """Whose a file or a batch is, as part of a key or a label. Without keys there is but one."""
    return principal or "anyone"


def _folder(principal: str) -> str:
    return f"openai/files/{owner(principal)}/"


def _key(principal: str, file_id: str) -> str:
    return f"{_folder(principal)}{file_id}.json"
