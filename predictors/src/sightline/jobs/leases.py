"""Who works on a job, until when: leases in the store, so that a killed server's work goes on elsewhere.

A lease is `<folder>/lease-<n>` of the n-th holder, created with If-None-Match and written over by its one holder.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass

import orjson

from sightline.jobs.objects import Objects

LEASE_SECONDS = 30.0
MAX_HOLDERS = 5
"""A job that so many in turn held without getting any further is what ends them; it must not end every server."""


class TooManyHolders(Exception):
    """A job has ended everybody who worked on it, and none of them got any further."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A job's holder. `mark`: how far the job was when it was taken."""

    folder: str
    number: int
    mark: str

    @property
    def key(self) -> str:
        return f"{self.folder}/lease-{self.number}"


class Leases:
    """The leases of one server. `clock` is in seconds, the same for all servers of the store."""

    def __init__(self, objects: Objects, clock: Callable[[], float]) -> None:
        self._objects = objects
        self._clock = clock
        self._holder = uuid.uuid4().hex

    async def exists(self, folder: str) -> bool:
        """Whether somebody has ever worked on the job."""
        return await self._newest(folder) >= 0

    async def take_new(self, folder: str) -> Lease | None:
        """Become the first holder of a job; None when there was one."""
        return await self._create(Lease(folder, 0, ""))

    async def take(self, folder: str, mark: Callable[[], Awaitable[str]]) -> Lease | None:
        """Become the holder of a job: the lease, or None when somebody else holds it.

        mark  tells how far the job is: another text, and its earlier holders did not die in vain

        Raises TooManyHolders.
        """
        number = await self._newest(folder)
        if number < 0:
            return await self.take_new(folder)
        newest = await self._objects.read(f"{folder}/lease-{number}")
        if newest is None or float(newest["expires"]) > self._clock():
            return None
        now = await mark()
        if number + 1 >= MAX_HOLDERS and await self._are_stuck(folder, number, now):
            raise TooManyHolders
        return await self._create(Lease(folder, number + 1, now))

    async def _are_stuck(self, folder: str, newest: int, now: str) -> bool:
        """Whether the last MAX_HOLDERS holders all found the job as it is now. A first one's mark is empty."""
        for number in range(newest, newest - MAX_HOLDERS, -1):
            lease = await self._objects.read(f"{folder}/lease-{number}")
            if lease is not None and lease.get("mark", "") != now:
                return False
        return True

    @contextlib.asynccontextmanager
    async def held(self, lease: Lease) -> AsyncGenerator[None]:
        """Renew a lease while something is done; when that is cancelled, release it, so that nobody need wait."""
        renewing = asyncio.create_task(self._renew(lease))
        try:
            yield
        except asyncio.CancelledError:
            renewing.cancel()
            with contextlib.suppress(Exception):
                await self._objects.write(lease.key, self._body(lease.mark, 0))
            raise
        finally:
            renewing.cancel()

    async def is_superseded(self, lease: Lease) -> bool:
        """Whether there is a later holder: this server was away for longer than its lease."""
        return await self._objects.read_bytes(f"{lease.folder}/lease-{lease.number + 1}") is not None

    async def _renew(self, lease: Lease) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            with contextlib.suppress(Exception):  # a missed renewal costs a repetition, not a result
                await self._objects.write(lease.key, self._body(lease.mark, self._clock() + LEASE_SECONDS))

    async def _create(self, lease: Lease) -> Lease | None:
        body = self._body(lease.mark, self._clock() + LEASE_SECONDS)
        return lease if await self._objects.create(lease.key, body) else None

    async def _newest(self, folder: str) -> int:
        """The number of the newest lease; -1 when there is none."""
        number = -1
        for path in await self._objects.keys(f"{folder}/"):
            key = path.rsplit("/", 1)[1]
            if key.startswith("lease-") and key.removeprefix("lease-").isdigit():
                number = max(number, int(key.removeprefix("lease-")))
        return number

    def _body(self, mark: str, expires: float) -> bytes:
        return orjson.dumps({"holder": self._holder, "expires": expires, "mark": mark})
