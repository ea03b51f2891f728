"""What happens around every request: id, key, deadline, body limit, a leaving client, errors, one log line.

The outermost layer of ours. Whatever goes wrong inside is answered here as a whole response, so that the connection
stays usable; nothing propagates to uvicorn, which would close it.
"""

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import orjson
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sightline.errors import InternalError, PayloadTooLarge, SightlineError
from sightline.server import metrics
from sightline.server.caller import context_of, trace_id
from sightline.server.caller import request_id as caller_id
from sightline.server.keys import Keys
from sightline.server.rendering import error_body, error_headers, error_status, translate
from sightline.settings import PipelineSettings, ServerSettings
from sightline.wire import REQUEST_ID_HEADER, REVISION_HEADER, Context

log = logging.getLogger("sightline.access")

# Probes and the operator cannot send keys. Everything else needs one, documentation and metrics too (contract B9).
_OPEN = re.compile(r"/health|/v2/health/(live|ready)|/v2/models/[^/]+/ready|/internal/(state|batches/[^/]+/progress)")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_MAX_LENGTH_DIGITS = 18
_QUIET = re.compile(r"/metrics|/health|.*/(live|ready)|/internal/(state|batches/[^/]+/progress)")

PRINCIPAL = "sightline.principal"
"""Key of the scope of a request that this process makes to itself: for whom. No network can say it."""


def is_open(path: str) -> bool:
    """Whether a path answers those without a key."""
    return _OPEN.fullmatch(path) is not None


class Guard:
    """ASGI middleware around the whole application.

    limits   bytes of a request to paths that take more, or less, than `max_request_bytes`
    """

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, keys: Keys, limits: Mapping[str, int] | None = None
    ) -> None:
        self._app = app
        self._settings = settings
        self._keys = keys
        self._limits = limits or {}
        revision = settings.pipeline_revision if isinstance(settings, PipelineSettings) else None
        self._always = {REVISION_HEADER: revision} if revision else {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are none; a key could not be asked for here
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = _headers(scope)
        request_id = caller_id(headers)
        response = _Response(send, {REQUEST_ID_HEADER: request_id, **self._always})
        limit = self._limits.get(scope["path"], self._settings.max_request_bytes)
        body = _Body(receive, limit)
        try:
            scope.setdefault("state", {})["context"] = self._context(scope, headers, request_id)
            _check_length(headers, limit)
            await _until_gone(self._app, scope, body, response)
        except Exception as error:
            await self._answer(scope, error, response, request_id)
        finally:
            trace = trace_id(headers.get("traceparent"))
            _record(scope, response, request_id, time.monotonic() - started, trace, is_gone=body.is_gone)

    def _context(self, scope: Scope, headers: Mapping[str, str], request_id: str) -> Context:
        told = self._settings
        return context_of(
            headers,
            request_id,
            _Inside(scope[PRINCIPAL]) if PRINCIPAL in scope else self._keys,
            told.deadline_seconds,
            is_open=is_open(scope["path"]),
            usual_seconds=told.usual_seconds,
            address=(scope.get("client") or ("",))[0],
        )

    async def _answer(self, scope: Scope, error: Exception, response: "_Response", request_id: str) -> None:
        known = translate(error)
        if known is None:
            log.exception("bug request_id=%s path=%s", request_id, _path(scope), exc_info=error)
            known = InternalError("Something went wrong on the server.")
        elif known.status >= 500:
            log.warning(
                "%s request_id=%s: %s",
                known.code,
                request_id,
                known.message,
                exc_info=error.__cause__,
            )
        if response.status is not None:  # too late to say it
            raise error
        path = scope["path"]
        await response.send_json(error_status(path, known), error_body(path, known, request_id), error_headers(known))


class _Inside:
    """The keys of a request of this process to itself."""

    def __init__(self, principal: str) -> None:
        self._principal = principal

    def principal(self, presented: str | None) -> str:
        return self._principal


class _Response:
    """`send` that adds what every answer has, such as the request id, and remembers the status."""

    def __init__(self, send: Send, always: Mapping[str, str]) -> None:
        self._send = send
        self._always = always
        self.status: int | None = None
        self.is_complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message).update(self._always)
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.is_complete = True

    async def send_json(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
        data = orjson.dumps(body)
        raw = {"content-type": "application/json", "content-length": str(len(data))} | headers
        encoded = [(name.lower().encode(), value.encode()) for name, value in raw.items()]
        await self({"type": "http.response.start", "status": status, "headers": encoded})
        await self({"type": "http.response.body", "body": data})


class _Body:
    """`receive` that counts, and that keeps listening for the client's leaving while the application works."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._taken = 0
        self._messages: asyncio.Queue[Message | SightlineError] = asyncio.Queue(maxsize=8)
        self.is_gone = False

    async def __call__(self) -> Message:
        message = await self._messages.get()
        if isinstance(message, SightlineError):
            raise message
        return message

    async def pump(self, on_gone: Callable[[], object]) -> None:
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.is_gone = True
                on_gone()
                return
            self._taken += len(message.get("body", b""))
            if self._taken > self._limit:
                await self._messages.put(_too_large(self._limit))
                return
            await self._messages.put(message)


async def _until_gone(app: ASGIApp, scope: Scope, body: _Body, response: _Response) -> None:
    """Run the application; when the client leaves before its answer is complete, cancel it."""
    work = asyncio.ensure_future(app(scope, body, response))
    pump = asyncio.create_task(body.pump(lambda: None if response.is_complete else work.cancel()))
    try:
        await work
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():  # the server itself is being stopped
            raise
        if not body.is_gone:  # something inside was cancelled that we did not cancel
            raise RuntimeError("the application cancelled itself") from error
    finally:
        pump.cancel()
        if not work.done():
            work.cancel()


def _path(scope: Scope) -> str:
    """The path as it may stand in a log: no line breaks, no control characters."""
    return quote(scope["path"], safe="/:@!$&'()*+,;=")


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The request has more than {limit} bytes.", code="request_too_large")


def _headers(scope: Scope) -> dict[str, str]:
    """Headers by their names in lower case, the first of each; all of `tracestate`, which may come in parts."""
    found: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        if name not in found:
            found[name] = value
        elif name == "tracestate":
            found[name] += f",{value}"
    return found


def _check_length(headers: Mapping[str, str], limit: int) -> None:
    length = headers.get("content-length")
    if length is None or not length.isascii() or not length.isdigit():
        return
    if len(length) > _MAX_LENGTH_DIGITS or int(length) > limit:
        raise _too_large(limit)


def _record(
    scope: Scope, response: _Response, request_id: str, seconds: float, trace: str | None, *, is_gone: bool
) -> None:
    status = response.status if response.status is not None else (499 if is_gone else 500)
    route = getattr(scope.get("route"), "path", None) or "unmatched"
    method = scope["method"] if scope["method"] in _METHODS else "other"  # clients must not invent time series
    metrics.REQUESTS.labels(method, route, str(status)).inc()
    metrics.REQUEST_SECONDS.labels(route).observe(seconds)
    level = logging.DEBUG if _QUIET.fullmatch(scope["path"]) else logging.INFO
    log.log(
        level,
        "%s %s status=%s ms=%.1f request_id=%s%s",
        method,
        _path(scope),
        status,
        seconds * 1000,
        request_id,
        f" trace_id={trace}" if trace else "",
    )
