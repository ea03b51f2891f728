"""Connections in small pools: as many as are needed, used again, shared out evenly, and faults as httpx says them."""

import asyncio

import httpx
import pytest

from sightline.jobs.pools import POOLED, Pools
from tests.jobs.pictures import picture
from tests.jobs.stub import running_stub


async def test_connections_are_few_and_used_again() -> None:
    with running_stub() as stub:
        async with httpx.AsyncClient(transport=Pools(8)) as client:
            for _ in range(20):
                answers = await asyncio.gather(
                    *(client.post(f"{stub.url}/caption", content=picture(number)) for number in range(8))
                )
                assert {answer.status_code for answer in answers} == {200}
            assert stub.given == 160
            assert len(stub._connections) <= 8


async def test_calls_go_to_the_pool_with_the_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    go, seen = asyncio.Event(), list[int]()

    async def handle(self: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        seen.append(id(self))
        await go.wait()
        return httpx.Response(200)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handle)
    async with httpx.AsyncClient(transport=Pools(3 * POOLED)) as client:
        calls = [asyncio.create_task(client.get("http://x")) for _ in range(3 * POOLED)]
        while len(seen) < len(calls):
            await asyncio.sleep(0)
        assert sorted(seen.count(pool) for pool in set(seen)) == [POOLED] * 3
        go.set()
        await asyncio.gather(*calls)


async def test_nobody_there_is_a_transport_error_and_the_pool_lives_on() -> None:
    with running_stub() as stub:
        async with httpx.AsyncClient(transport=Pools(1)) as client:
            stub.go_down()
            with pytest.raises(httpx.ConnectError):
                await client.get(f"{stub.url}/health")
            stub.come_up()
            assert (await client.get(f"{stub.url}/health")).status_code == 200
