"""Clients of a benchmark: closed-loop and open-loop load over bare keep-alive connections, and what they waited.

A client here costs about as much as writing its bytes: on two cores every cycle of a client is one less for the server.
"""

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP response; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Served:
    """One request: when it was due and over (`time.monotonic()`), which input it had, what came back."""

    due: float
    over: float
    index: int
    answer: Answer | None

    @property
    def seconds(self) -> float:
        """From when it was due, so that a client that waits for its turn counts the wait (coordinated omission)."""
        return self.over - self.due

    @property
    def is_good(self) -> bool:
        return self.answer is not None and self.answer.status == 200


@dataclass
class Run:
    """All requests of one load, and from when to when it went."""

    begun: float
    ended: float
    served: list[Served] = field(default_factory=list)

    @property
    def good(self) -> list[Served]:
        return [item for item in self.served if item.is_good]

    @property
    def rate(self) -> float:
        """Good answers a second, the last ones' time included."""
        return len(self.good) / (self.ended - self.begun)


class Connection:
    """One keep-alive HTTP/1.1 connection; opened when first used, and again when the server closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> Answer:
        """Send a whole request, head and body; read the whole response. Raises OSError, EOFError, ValueError."""
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        reader, writer = self._reader, self._writer
        try:
            writer.write(request)
            answer = await _read(reader)
        except BaseException:
            await self.aclose()
            raise
        if answer.headers.get("connection") == "close":
            await self.aclose()
        return answer

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def aclose(self) -> None:
        """Close, and wait until it is."""
        writer = self._writer
        self.close()
        if writer is not None:
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _read(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    if "content-length" not in headers:
        raise ValueError("an answer without Content-Length")
    return Answer(int(first.split(" ", 2)[1]), headers, await reader.readexactly(int(headers["content-length"])))


def post(path: str, headers: dict[str, str], body: bytes) -> bytes:
    """A whole POST request."""
    told = {"host": "127.0.0.1", "content-length": str(len(body))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


Requests = Callable[[int], bytes]
"""The bytes of request number n of a run."""


async def closed_loop(port: int, requests: Requests, *, clients: int, seconds: float, at_least: int = 0) -> Run:
    """Each client asks again as soon as it is answered, until the time is over; what runs then is waited for.

    at_least   requests in all, where one takes longer than the time
    """
    run, numbers = Run(time.monotonic(), 0), iter(range(1 << 60))

    async def client() -> None:
        connection = Connection(port)
        for number in numbers:
            if time.monotonic() - run.begun >= seconds and number >= at_least:
                break
            run.served.append(await _served(connection, requests(number), number, time.monotonic()))
        await connection.aclose()

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    run.ended = time.monotonic()
    return run


async def open_loop(port: int, requests: Requests, *, rate: float, seconds: float, rng: random.Random) -> Run:
    """Requests come by a Poisson process whether or not the earlier ones are answered."""
    run, free = Run(time.monotonic(), 0), [Connection(port)]

    async def one(number: int, due: float) -> None:
        connection = free.pop() if free else Connection(port)
        run.served.append(await _served(connection, requests(number), number, due))
        free.append(connection)

    async with asyncio.TaskGroup() as group:
        for number, after in enumerate(arrivals(rate, seconds, rng)):
            due = run.begun + after
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            group.create_task(one(number, due))
    for connection in free:
        await connection.aclose()
    run.ended = time.monotonic()
    return run


def arrivals(rate: float, seconds: float, rng: random.Random) -> Iterator[float]:
    """Seconds after the start at which requests of a Poisson process come."""
    at = rng.expovariate(rate)
    while at < seconds:
        yield at
        at += rng.expovariate(rate)


async def _served(connection: Connection, request: bytes, number: int, due: float) -> Served:
    try:
        answer = await connection.ask(request)
    except (OSError, EOFError, ValueError):
        return Served(due, time.monotonic(), number, None)
    return Served(due, time.monotonic(), number, answer)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]
