"""Bad requests among good ones, hostile, huge, aborted and expired: what the good ones notice of them."""

import asyncio
import itertools
import math
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

from PIL import Image

from tests.bench.contenders import Contender
from tests.bench.load import Answer, Connection, closed_loop, percentile
from tests.hostile import REFUSED_IMAGES, images
from tests.scenes import encoded

EVERY = 4
"""Good requests for each bad one."""
CLIENTS = 8
MEBIBYTE = 1 << 20
Bad = Callable[[int], Awaitable[int | None]]
"""A bad request, sent to a port; returns the status that it was answered with, if it waited for one."""


def bad_requests(request: Callable[[bytes], bytes], picture: bytes, rng: random.Random) -> Iterator[tuple[str, Bad]]:
    """Endless, every kind once in each turn.

    request   renders a picture's bytes as a whole request
    picture   a good one, for those who leave and those who come too late
    """
    whole = request(picture)
    head, _, body = whole.partition(b"\r\n\r\n")
    expired = head + b"\r\nx-request-timeout-ms: 1\r\n\r\n" + body
    kinds: list[tuple[str, Bad]] = [
        *((name, partial(_asked, request(images()[name]))) for name in REFUSED_IMAGES),
        ("56 megapixels", partial(_asked, request(many_pixels()))),
        ("21 MiB", partial(_asked, request(picture + bytes(21 * MEBIBYTE)))),
        *[("expired", partial(_asked, expired))] * 4,
        *[("left in the middle of the body", partial(_left, whole[: len(whole) - len(body) // 2]))] * 4,
        *[("left before the answer", partial(_left, whole))] * 4,
    ]
    while True:
        yield from rng.sample(kinds, len(kinds))


@cache
def many_pixels() -> bytes:
    """A flawless JPEG of more pixels than a server takes."""
    return encoded(Image.new("RGB", (8000, 7000), "teal"), "JPEG")


async def _asked(request: bytes, port: int) -> int | None:
    connection = Connection(port)
    try:
        return (await connection.ask(request)).status
    except (OSError, EOFError):  # a body that is refused by its length is not read to its end
        return None
    finally:
        await connection.aclose()


async def _left(part: bytes, port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(part)
    await writer.drain()
    await asyncio.sleep(0.005)
    writer.transport.abort()


@dataclass
class Company:
    """Good requests alone and among bad ones, round by round."""

    alone: list[float] = field(default_factory=list)
    among: list[float] = field(default_factory=list)
    bad: int = 0
    taken: int = 0
    """Bad requests that were answered as if they were good."""
    differing: int = 0
    compared: int = 0
    failed: int = 0

    async def round(self, contender: Contender, pictures: Sequence[bytes], seconds: float, seed: int) -> None:
        """Both loads with the same pictures, in turns of a third each, so that both meet the same machine."""
        said: dict[int, str] = {}
        for turn in range(6):
            is_mixed = turn % 2 == seed % 2
            answers = await self._load(contender, pictures, seconds / 3, seed, is_mixed=is_mixed)
            for index, answer in answers:
                text = contender.read(answer).text
                self.compared += index in said
                self.differing += said.setdefault(index, text) != text

    async def _load(
        self, contender: Contender, pictures: Sequence[bytes], seconds: float, seed: int, *, is_mixed: bool
    ) -> list[tuple[int, Answer]]:
        rng = random.Random(seed)
        worse = bad_requests(contender.request, pictures[0], rng)
        async with asyncio.TaskGroup() as group:

            def request(number: int) -> bytes:
                if is_mixed and number % EVERY == 0:
                    self.bad += 1
                    group.create_task(self._send(next(worse), contender.port))
                return contender.request(pictures[number % len(pictures)])

            run = await closed_loop(contender.port, request, clients=CLIENTS, seconds=seconds)
        (self.among if is_mixed else self.alone).extend(item.seconds for item in run.good)
        self.failed += len(run.served) - len(run.good)
        return [(item.index % len(pictures), item.answer) for item in run.good if item.answer is not None]

    async def _send(self, one: tuple[str, Bad], port: int) -> None:
        self.taken += await one[1](port) == 200

    def figures(self) -> dict[str, float]:
        p95 = [1000 * percentile(times, 0.95) for times in (self.alone, self.among)]
        return {
            "good_alone": len(self.alone),
            "good_among": len(self.among),
            "bad": self.bad,
            "bad_taken": self.taken,
            "p50_alone": 1000 * percentile(self.alone, 0.5),
            "p50_among": 1000 * percentile(self.among, 0.5),
            "p95_alone": p95[0],
            "p95_among": p95[1],
            "p95_ratio": p95[1] / p95[0] if p95[0] else math.nan,
            "answers_compared": self.compared,
            "answers_changed": self.differing,
            "good_failed": self.failed,
        }


def some(request: Callable[[bytes], bytes], picture: bytes, count: int) -> list[tuple[str, Bad]]:
    """So many bad requests, all kinds among them when there are enough."""
    return list(itertools.islice(bad_requests(request, picture, random.Random(0)), count))
