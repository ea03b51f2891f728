"""The Lease: one leader at a time, handed over at once on purpose and within fifteen seconds otherwise."""

import asyncio
from typing import Any

import pytest

from sightline_operator.act.client import ApiError
from sightline_operator.lead import Leader, LeaseLost
from sightline_operator.lead import lease as rules
from sightline_operator.resources import LEASES
from tests.operator.conftest import ApiServer
from tests.operator.harness import connected, until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "RETRY_SECONDS", 0.05)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def candidate(client: Any, namespace: str, who: str, clock: Clock | None = None) -> Leader:
    return Leader(client, namespace=namespace, name="lead", identity=who, monotonic=clock)


async def held_by(client: Any, namespace: str) -> str:
    lease = await client.get(LEASES, namespace, "lead")
    return str(lease["spec"]["holderIdentity"])


async def test_the_first_leads_and_the_second_waits(apiserver: ApiServer, namespace: str) -> None:
    async with connected(apiserver) as client:
        first, second = candidate(client, namespace, "a"), candidate(client, namespace, "b")
        await first.acquire()
        waiting = asyncio.create_task(second.acquire())
        await asyncio.sleep(0.5)
        assert not waiting.done()
        assert await held_by(client, namespace) == "a"
        waiting.cancel()


async def test_a_released_lease_is_taken_at_once_and_counted(apiserver: ApiServer, namespace: str) -> None:
    async with connected(apiserver) as client:
        first, second = candidate(client, namespace, "a"), candidate(client, namespace, "b")
        await first.acquire()
        await first.release()
        await asyncio.wait_for(second.acquire(), 10)
        lease = await client.get(LEASES, namespace, "lead")
        assert lease["spec"]["holderIdentity"] == "b"
        assert lease["spec"]["leaseTransitions"] == 1
        assert lease["spec"]["leaseDurationSeconds"] == 15


async def test_a_dead_leader_is_followed_after_fifteen_seconds_of_ours(apiserver: ApiServer, namespace: str) -> None:
    """The dead one's clock was five minutes ahead; only what we see on our own clock counts."""
    clock = Clock()
    async with connected(apiserver) as client:
        first, second = candidate(client, namespace, "a"), candidate(client, namespace, "b", clock)
        await first.acquire()
        lease = await client.get(LEASES, namespace, "lead")
        await client.replace(lease | {"spec": lease["spec"] | {"renewTime": "2099-01-01T00:00:00.000000Z"}})
        waiting = asyncio.create_task(second.acquire())
        await asyncio.sleep(0.3)
        clock.now = 14.9
        await asyncio.sleep(0.3)
        assert not waiting.done()
        clock.now = 15.1
        await asyncio.wait_for(waiting, 10)
        assert await held_by(client, namespace) == "b"


async def test_a_leader_whose_lease_was_taken_learns_it(apiserver: ApiServer, namespace: str) -> None:
    async with connected(apiserver) as client:
        leader = candidate(client, namespace, "a")
        await leader.acquire()
        holding = asyncio.create_task(leader.hold())
        lease = await until(lambda: client.get(LEASES, namespace, "lead"))

        async def stolen() -> bool:
            now = await client.get(LEASES, namespace, "lead")
            try:
                await client.replace(now | {"spec": lease["spec"] | {"holderIdentity": "thief"}})
            except ApiError:
                return False  # it renewed in between
            return True

        await until(stolen)
        with pytest.raises(LeaseLost, match="thief"):
            await asyncio.wait_for(holding, 10)
        assert not leader.is_leader
        await leader.release()
        assert await held_by(client, namespace) == "thief"


async def test_a_leader_that_cannot_renew_for_ten_seconds_gives_up(apiserver: ApiServer, namespace: str) -> None:
    class Cut:
        """The client until it is cut off."""

        def __init__(self, client: Any) -> None:
            self._client, self.is_cut = client, False

        def __getattr__(self, name: str) -> Any:
            async def call(*args: Any, **kwargs: Any) -> Any:
                if self.is_cut:
                    raise ApiError(0, "Unreachable", "cut off")
                return await getattr(self._client, name)(*args, **kwargs)

            return call

    clock = Clock()
    async with connected(apiserver) as client:
        cut = Cut(client)
        leader = candidate(cut, namespace, "a", clock)
        await leader.acquire()
        holding = asyncio.create_task(leader.hold())
        await asyncio.sleep(0)  # its ten seconds begin now
        cut.is_cut = True
        clock.now = 9.0
        await asyncio.sleep(0.3)
        assert not holding.done()
        clock.now = 10.5
        with pytest.raises(LeaseLost, match="could not be renewed for 10 s"):
            await asyncio.wait_for(holding, 10)


async def test_a_renewal_keeps_acquire_time(apiserver: ApiServer, namespace: str) -> None:
    async with connected(apiserver) as client:
        leader = candidate(client, namespace, "a")
        await leader.acquire()
        first = await client.get(LEASES, namespace, "lead")
        holding = asyncio.create_task(leader.hold())

        async def is_renewed() -> bool:
            now = await client.get(LEASES, namespace, "lead")
            return now["spec"]["renewTime"] != first["spec"]["renewTime"]

        await until(is_renewed)
        now = await client.get(LEASES, namespace, "lead")
        assert now["spec"]["acquireTime"] == first["spec"]["acquireTime"]
        assert now["spec"]["leaseTransitions"] == 0
        holding.cancel()
