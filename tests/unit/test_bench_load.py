"""The benchmark's clients, its bound and its goals: a wrong measure is worse than none."""

import asyncio
import contextlib
import math
import random

import pytest

from tests.bench.load import arrivals, closed_loop, open_loop, percentile, post
from tests.bench.report import goals, table
from tests.bench.roofline import Shape, bound


class Server:
    """Answers each request with its own body; counts how many it has open at once. `Connection: close` when told."""

    def __init__(self, status: int = 200, *, closes: bool = False) -> None:
        self.status, self.closes = status, closes
        self.open = self.most = self.answered = 0

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self._server.sockets[0].getsockname()[1]

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()
        while self.open:  # Python 3.11 waits for no handler
            await asyncio.sleep(0.001)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.most = max(self.most, self.open)
        while head := await _head(reader):
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")
            )
            body = await reader.readexactly(length)
            more = "Connection: close\r\n" if self.closes else ""
            answer = f"HTTP/1.1 {self.status} X\r\nContent-Length: {length}\r\n{more}\r\n".encode() + body
            self.answered += 1
            writer.write(answer)
            if self.closes:
                break
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        self.open -= 1


async def _head(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return b""


def request(number: int) -> bytes:
    return post("/x", {}, str(number).encode())


@pytest.mark.parametrize("closes", [False, True])
async def test_a_closed_loop_has_that_many_clients_and_gives_each_input_once(closes):
    server = Server(closes=closes)
    async with server as port:
        run = await closed_loop(port, request, clients=4, seconds=0, at_least=50)
    assert sorted(int(item.answer.body) for item in run.good) == list(range(50))
    assert all(int(item.answer.body) == item.index for item in run.good)
    assert closes or server.most == 4
    assert run.rate == pytest.approx(50 / (run.ended - run.begun))


async def test_refusals_are_no_good_answers():
    async with Server(429) as port:
        run = await closed_loop(port, request, clients=2, seconds=0, at_least=6)
    assert (len(run.served), len(run.good), run.rate) == (6, 0, 0)


async def test_nobody_there_is_a_failed_request():
    async with Server() as port:
        pass
    run = await closed_loop(port, request, clients=1, seconds=0, at_least=3)
    assert (len(run.served), run.good) == (3, [])


async def test_an_open_loop_counts_from_when_a_request_was_due():
    async with Server() as port:
        run = await open_loop(port, request, rate=400, seconds=0.2, rng=random.Random(1))
    due = [run.begun + after for after in arrivals(400, 0.2, random.Random(1))]
    assert sorted(item.due for item in run.good) == pytest.approx(due)
    assert all(item.seconds >= 0 for item in run.good)


def test_arrivals_are_as_many_as_the_rate_says():
    many = list(arrivals(100, 100, random.Random(3)))
    assert len(many) == pytest.approx(10_000, rel=0.05)
    assert many == sorted(many)
    assert many[-1] < 100


def test_percentiles():
    assert [percentile([3, 1, 2, 4], share) for share in (0.25, 0.5, 0.95, 1)] == [1, 2, 4, 4]
    assert math.isnan(percentile([], 0.5))


def test_the_bound_of_decoding_alone_is_the_memory_and_of_many_the_products():
    shape = Shape(vision=0, text=1000, head=0, merge=1, dtype="float32", width=4, is_prefix=True)
    machine = {"float32": 1e6, "bytes": 4e5}  # a step reads 4,000 bytes: 10 ms; a token costs 2,000 FLOP: 2 ms
    assert bound(shape, machine, batch=1, prompt=0, image=0, new=1) == pytest.approx(100)
    assert bound(shape, machine, batch=10, prompt=0, image=0, new=1) == pytest.approx(500)
    assert bound(shape, machine, batch=1, prompt=10, image=0, new=0) == pytest.approx(50)


def part(**rates: float) -> dict:
    rows = [
        {"server": server.replace("_", "-"), "load": "32 clients", "rate": rate, "p50": 1}
        for server, rate in rates.items()
    ]
    return {"rows": rows, "load": 1, "cpus": 2, "wall": 60}


def test_a_missed_goal_is_said():
    told = {"captioner": part(naive=10, ours_hf=69)}
    ((what, value, goal, is_reached),) = goals(told)
    assert (value, goal, is_reached) == (6.9, "≥ 7", False)
    assert f"| {what} | 6.90 | ≥ 7 | **missed** |" in table(told)
    assert goals({"captioner": part(naive=10, ours_hf=70)})[0][3]
    assert goals({"captioner": part(ours_hf=70)}) == []  # nothing to compare with
