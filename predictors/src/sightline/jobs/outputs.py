"""What is made of a batch's lines: results and errors joined, Parquet, files beside the images; whole or not at all."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sightline.jobs.layout import ERRORS, PARQUET, RESULTS, Layout
from sightline.jobs.manifest import Made
from sightline.jobs.objects import Objects, in_thread
from sightline.jobs.page import Page
from sightline.jobs.parquet import ParquetFile
from sightline.jobs.sidecars import Sidecars

MERGED_BY_ITSELF = 100_000
"""Items up to which `merge: Auto` joins the parts."""
WAITING_PIECES = 4
"""Pieces that wait for the store; whoever makes them then waits, too."""
PIECE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a chunk: its JSON, and its bytes with the line feed."""

    said: Mapping[str, Any]
    line: bytes

    @property
    def is_error(self) -> bool:
        return bool(self.said.get("error"))


class Outlet:
    """An object that is written bit by bit, and is in the store only when `close` has returned."""

    def __init__(self, objects: Objects, key: str) -> None:
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(WAITING_PIECES)
        self._held = bytearray()
        self._size = 0
        self._hash = hashlib.sha256()
        self._upload = asyncio.create_task(objects.upload(key, self._drawn()), name=f"upload-{key}")

    async def put(self, data: bytes) -> None:
        """Write some more. Raises what the store raised meanwhile."""
        self._held += data
        if len(self._held) >= PIECE_BYTES:
            await self._hand_over()

    async def close(self) -> tuple[int, str]:
        """Commit. Returns its bytes and their SHA-256."""
        if self._held:
            await self._hand_over()
        await self._queue(None)
        await self._upload
        return self._size, self._hash.hexdigest()

    async def abort(self) -> None:
        """Leave nothing."""
        self._upload.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await self._upload

    async def _hand_over(self) -> None:
        piece = bytes(self._held)
        self._held.clear()
        self._size += len(piece)
        self._hash.update(piece)
        await self._queue(piece)

    async def _queue(self, piece: bytes | None) -> None:
        """Wait for a place, but not for one that will never come because the upload has failed."""
        waiting = asyncio.ensure_future(self._pieces.put(piece))
        await asyncio.wait([waiting, self._upload], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
        if self._upload.done():
            self._upload.result()

    async def _drawn(self) -> AsyncGenerator[bytes]:
        while (piece := await self._pieces.get()) is not None:
            yield piece


class Outputs:
    """Everything that is made of one batch, fed with its lines in order. `async with`: what is not closed is aborted.

    items     of the whole batch
    sidecars  the store of `page.outputs.sidecars`, rooted there; None: no sidecars
    Raises ParquetMissing.
    """

    def __init__(self, page: Page, objects: Objects, layout: Layout, items: int, sidecars: Objects | None) -> None:
        wanted = page.outputs
        is_merged = wanted.merge == "Always" or (wanted.merge == "Auto" and items <= MERGED_BY_ITSELF)
        self._root = layout.root
        self._objects = objects
        self._parquet = ParquetFile() if wanted.parquet else None
        names = ([RESULTS, ERRORS] if is_merged else []) + ([PARQUET] if wanted.parquet else [])
        self._outlets = {name: Outlet(objects, layout.root + name) for name in names}
        self._sidecars = (
            Sidecars(sidecars, wanted.sidecars, page.input.images or page.input.location, wanted.existing)
            if sidecars is not None and wanted.sidecars is not None
            else None
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(outlet.abort() for outlet in self._outlets.values()))

    @property
    def sidecars(self) -> int:
        """Captions that were handed to files beside images."""
        return self._sidecars.count if self._sidecars else 0

    async def take(self, rows: Sequence[Row]) -> None:
        """The next lines of the batch."""
        if (results := self._outlets.get(RESULTS)) is not None:
            await results.put(b"".join(row.line for row in rows if not row.is_error))
            await self._outlets[ERRORS].put(b"".join(row.line for row in rows if row.is_error))
        if self._parquet is not None:
            await self._outlets[PARQUET].put(await in_thread(self._parquet.add, [row.said for row in rows]))
        if self._sidecars is not None:
            await self._sidecars.write([row.said for row in rows if not row.is_error])

    async def close(self) -> dict[str, Made]:
        """Commit all of it: what was made, by name."""
        if self._parquet is not None:
            await self._outlets[PARQUET].put(await in_thread(self._parquet.close))
        made: dict[str, Made] = {}
        for key, outlet in self._outlets.items():
            size, sha256 = await outlet.close()
            made[_NAMES[key]] = Made(key, size, sha256)
        return made


_NAMES: Mapping[str, str] = {RESULTS: "results", ERRORS: "errors", PARQUET: "parquet"}
