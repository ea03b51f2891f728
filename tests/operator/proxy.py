"""A reverse proxy before the API server that does what networks and API servers do on bad days."""

import asyncio
import contextlib
import json
import random
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

from tests.operator.conftest import ApiServer

Event = dict[str, Any]
TOO_MANY = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "TooManyRequests", "code": 429}
GONE = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410, "message": "old"}


@dataclass
class Proxy:
    """Faults to be switched on and off; everything else passes unchanged.

    reject_share    of requests that are answered 429 instead
    on_event        what becomes of one watch event: none, itself, twice
    is_frozen       open watches get nothing more, and are not closed: a half-open connection
    is_gone         watches are answered 410
    stale           collection paths that go on answering lists with what they answered first
    """

    url: str = ""
    reject_share: float = 0.0
    on_event: Callable[[str, Event], list[Event]] = lambda path, event: [event]
    is_frozen: bool = False
    is_gone: bool = False
    stale: dict[str, bytes] = field(default_factory=dict)
    is_stale: bool = False
    rejected: int = 0
    calls: list[tuple[str, str]] = field(default_factory=list)
    queries: list[tuple[str, str]] = field(default_factory=list)
    """Method and dryRun of each call."""
    watches: set[asyncio.Task[Any]] = field(default_factory=set)
    rng: random.Random = field(default_factory=lambda: random.Random(7))

    def writes(self) -> list[tuple[str, str]]:
        """Mutating calls so far, without the Lease's."""
        return [(method, path) for method, path in self.calls if method != "GET" and "/leases" not in path]

    def break_watches(self) -> None:
        """Close every open watch."""
        for task in list(self.watches):
            task.cancel()


@contextlib.asynccontextmanager
async def proxying(apiserver: ApiServer) -> AsyncIterator[Proxy]:
    proxy = Proxy()
    tls = ssl.create_default_context(cafile=str(apiserver.certificate))
    connector = aiohttp.TCPConnector(ssl=tls, limit=0)
    async with aiohttp.ClientSession(
        apiserver.url, connector=connector, read_bufsize=2**22, timeout=aiohttp.ClientTimeout(total=None)
    ) as session:
        app = web.Application(client_max_size=2**26)

        async def handle(request: web.Request) -> web.StreamResponse:
            return await _handle(proxy, session, request)

        app.router.add_route("*", "/{tail:.*}", handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        proxy.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield proxy
        finally:
            proxy.break_watches()
            await runner.cleanup()


async def _handle(proxy: Proxy, session: aiohttp.ClientSession, request: web.Request) -> web.StreamResponse:
    is_watch = request.query.get("watch") in ("1", "true")
    proxy.calls.append((request.method, request.path))
    proxy.queries.append((request.method, request.query.get("dryRun", "")))
    if proxy.rng.random() < proxy.reject_share and "/leases" not in request.path:
        proxy.rejected += 1
        return web.json_response(TOO_MANY, status=429, headers={"Retry-After": "1"})
    if is_watch and proxy.is_gone:
        return web.json_response(GONE, status=410)
    headers = {k: v for k, v in request.headers.items() if k.lower() not in ("host", "content-length")}
    upstream = session.request(request.method, request.rel_url, headers=headers, data=await request.read() or None)
    async with upstream as response:
        if is_watch and response.status == 200:
            return await _stream(proxy, request, response)
        body = await response.read()
        if request.method == "GET" and '"items":' in body[:2_000_000].decode(errors="replace"):
            remembered = proxy.stale.setdefault(request.path_qs, body)
            body = remembered if proxy.is_stale else body
        kept = {k: v for k, v in response.headers.items() if k in ("Content-Type", "Retry-After")}
        return web.Response(status=response.status, body=body, headers=kept)


async def _stream(proxy: Proxy, request: web.Request, response: aiohttp.ClientResponse) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Type": "application/json"})
    await answer.prepare(request)
    task = asyncio.ensure_future(_copy(proxy, request, response, answer))
    proxy.watches.add(task)
    try:
        await task
    except (asyncio.CancelledError, aiohttp.ClientError, ConnectionError):
        if request.transport is not None:
            request.transport.abort()
    finally:
        task.cancel()
        proxy.watches.discard(task)
    return answer


async def _copy(
    proxy: Proxy, request: web.Request, response: aiohttp.ClientResponse, answer: web.StreamResponse
) -> None:
    async for line in response.content:
        while proxy.is_frozen:
            await asyncio.sleep(0.05)
        if not line.strip():
            continue
        for event in proxy.on_event(request.path, json.loads(line)):
            await answer.write(json.dumps(event).encode() + b"\n")
    await answer.write_eof()
