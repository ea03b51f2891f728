"""A proxy before an S3 server that does what stores and networks do on bad days, and stops whoever writes where told.

with proxying(s3.endpoint_url) as proxy:
    …                                              workers whose endpoint is proxy.url
    proxy.error_share = 0.05
    proxy.at("PUT", r"plan/PLAN\\.json$", BEFORE, lambda call: os.kill(pid, signal.SIGKILL))
    assert proxy.created(r"/parts/") == Counter({key: 1, …})
"""

import asyncio
import contextlib
import random
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import yarl
from aiohttp import web

from tests.jobs.threads import looping

When = Literal["before", "after"]
BEFORE: When = "before"
AFTER: When = "after"

HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "content-length"})
FAULT = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'


@dataclass(frozen=True)
class Call:
    """A request as it came.

    key             of the object, or the query of a listing
    is_conditional  it has `If-None-Match: *`
    """

    method: str
    key: str
    is_conditional: bool


Action = Callable[[Call], bool | None]
"""True, before the store has the call: the store never gets it."""


@dataclass
class Hook:
    """What happens at the n-th call of a kind, before the store has it or after it has answered. In a thread."""

    method: str
    pattern: re.Pattern[str]
    when: When
    action: Action
    after_calls: int = 0
    times: int = 1
    seen: int = 0
    reached: threading.Event = field(default_factory=threading.Event)

    def wants(self, call: Call, when: When) -> bool:
        """Whether this is the call. Counts."""
        if when != self.when or call.method != self.method or not self.pattern.search(call.key):
            return False
        self.seen += 1
        return self.after_calls < self.seen <= self.after_calls + self.times


@dataclass
class StoreProxy:
    """Faults to be switched on and off at any time; everything else passes unchanged.

    error_share     of calls fail: a third 503 SlowDown, a third 500, and a third is done but its answer is lost
    conflict_share  of conditional writes are answered 409 ConditionalRequestConflict, and not done
    conflicts_once  the first conditional write of every key is
    is_black        every call is cut off: the network is gone
    is_full         every write is answered 507
    """

    upstream: str
    url: str = ""
    error_share: float = 0.0
    conflict_share: float = 0.0
    conflicts_once: bool = False
    is_black: bool = False
    is_full: bool = False
    calls: list[tuple[Call, int]] = field(default_factory=list[tuple[Call, int]])
    """Every call and the store's own answer to it; 0: it never got there."""
    faults: Counter[str] = field(default_factory=Counter[str])
    hooks: list[Hook] = field(default_factory=list[Hook])
    rng: random.Random = field(default_factory=lambda: random.Random(11))
    _conflicted: set[str] = field(default_factory=set[str])

    def at(self, method: str, pattern: str, when: When, action: Action, *, after_calls: int = 0) -> Hook:
        """Do something at the next such call, `after_calls` later ones still to pass. `hook.reached` is set then."""
        hook = Hook(method, re.compile(pattern), when, action, after_calls)
        self.hooks.append(hook)
        return hook

    def written(self, pattern: str) -> Counter[str]:
        """How often the store took a write of a key."""
        wanted = re.compile(pattern)
        return Counter(
            call.key
            for call, status in self.calls
            if call.method == "PUT" and status == 200 and wanted.search(call.key)
        )

    def unconditional(self, pattern: str) -> set[str]:
        """Keys that were written without If-None-Match."""
        wanted = re.compile(pattern)
        writes = (call for call, _ in self.calls if call.method == "PUT" and wanted.search(call.key))
        return {call.key for call in writes if not call.is_conditional}

    @contextlib.contextmanager
    def blackout(self) -> Generator[None]:
        self.is_black = True
        try:
            yield
        finally:
            self.is_black = False

    # --- passing on --------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncGenerator[None]:
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), auto_decompress=False, timeout=aiohttp.ClientTimeout(total=120)
        )
        async with session:
            app = web.Application(client_max_size=2**30)

            async def handle(request: web.Request) -> web.StreamResponse:
                return await self._handle(session, request)

            app.router.add_route("*", "/{tail:.*}", handle)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=False)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0, backlog=512)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            try:
                yield
            finally:
                await runner.cleanup()

    async def _handle(self, session: aiohttp.ClientSession, request: web.Request) -> web.StreamResponse:
        key = request.path.lstrip("/").partition("/")[2]
        call = Call(request.method, key or request.query_string, request.headers.get("If-None-Match") == "*")
        body = await request.read()
        if await self._run_hooks(call, BEFORE):
            return self._cut(request, call)
        fault = self._fault(call)
        if fault == "black":
            return self._cut(request, call)
        if fault in ("SlowDown", "InternalError", "ConditionalRequestConflict", "InsufficientStorage"):
            return self._refuse(call, fault)
        answer = await self._pass_on(session, request, call, body)
        await self._run_hooks(call, AFTER)
        if fault == "lost":
            self._abort(request)
        return answer

    async def _pass_on(
        self, session: aiohttp.ClientSession, request: web.Request, call: Call, body: bytes
    ) -> web.Response:
        headers = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
        url = yarl.URL(self.upstream + request.raw_path, encoded=True)
        asked = session.request(
            request.method, url, headers=headers, data=body, skip_auto_headers=("Content-Type", "User-Agent", "Accept")
        )
        async with asked as response:
            data = await response.read()
            self.calls.append((call, response.status))
            kept = {name: value for name, value in response.headers.items() if name.lower() not in HOP_BY_HOP}
            if request.method == "HEAD":
                kept["Content-Length"] = response.headers.get("Content-Length", "0")
            return web.Response(status=response.status, body=data, headers=kept)

    def _fault(self, call: Call) -> str | None:
        fault = self._choose(call)
        if fault is not None:
            self.faults[fault] += 1
        return fault

    def _choose(self, call: Call) -> str | None:
        if self.is_black:
            return "black"
        if self.is_full and call.method in ("PUT", "POST"):
            return "InsufficientStorage"
        if call.is_conditional and self._conflicts(call.key):
            return "ConditionalRequestConflict"
        if self.rng.random() < self.error_share:
            return self.rng.choice(["SlowDown", "InternalError", "lost"])
        return None

    def _conflicts(self, key: str) -> bool:
        if self.conflicts_once and key not in self._conflicted:
            self._conflicted.add(key)
            return True
        return self.rng.random() < self.conflict_share

    def _refuse(self, call: Call, code: str) -> web.Response:
        status = {"SlowDown": 503, "InternalError": 500, "ConditionalRequestConflict": 409, "InsufficientStorage": 507}
        self.calls.append((call, 0))
        return web.Response(status=status[code], text=FAULT.format(code=code), content_type="application/xml")

    def _cut(self, request: web.Request, call: Call) -> web.Response:
        self.calls.append((call, 0))
        self._abort(request)
        return web.Response(status=500)

    @staticmethod
    def _abort(request: web.Request) -> None:
        if request.transport is not None:
            request.transport.abort()

    async def _run_hooks(self, call: Call, when: When) -> bool:
        """Whether the call ends here."""
        is_dropped = False
        for hook in [hook for hook in self.hooks if hook.wants(call, when)]:
            is_dropped = bool(await asyncio.to_thread(hook.action, call)) or is_dropped
            hook.reached.set()
        return is_dropped


@contextlib.contextmanager
def proxying(upstream: str, **faults: Any) -> Generator[StoreProxy]:
    """In a thread of this process, until the block ends."""
    proxy = StoreProxy(upstream, **faults)
    with looping(proxy.serving):
        yield proxy


def hold(until: threading.Event, seconds: float = 60) -> Action:
    """An action that keeps a call waiting until somebody lets it go."""

    def wait(call: Call) -> None:
        deadline = time.monotonic() + seconds
        assert until.wait(max(0.0, deadline - time.monotonic())), f"nobody let {call.key} go"

    return wait
