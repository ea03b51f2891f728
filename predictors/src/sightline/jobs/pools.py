"""Connections to a batch's target in small pools, because a large one costs by its size at every call.

httpcore looks at each connection of its pool, and asks the kernel about each idle one, when a call begins and when it
ends: with 16 connections that is a third of what a call costs. Four pools of four cost a quarter of it.
"""

import httpx

POOLED = 4
KEEPALIVE_SECONDS = 2.0
"""Less than uvicorn keeps an idle connection (5 s), so that no request meets a closing one."""


class Pools(httpx.AsyncBaseTransport):
    """Hands every call to the pool with the fewest open ones.

    most  calls that are open at once at most
    """

    def __init__(self, most: int) -> None:
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=POOLED, keepalive_expiry=KEEPALIVE_SECONDS
        )
        trusted = httpx.create_ssl_context(trust_env=False)
        self._pools = [
            httpx.AsyncHTTPTransport(verify=trusted, limits=limits, trust_env=False)
            for _ in range(max(1, -(-most // POOLED)))
        ]
        self._open = [0] * len(self._pools)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Raises httpx.TransportError."""
        number = self._open.index(min(self._open))
        self._open[number] += 1
        try:
            return await self._pools[number].handle_async_request(request)
        finally:
            self._open[number] -= 1

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()
