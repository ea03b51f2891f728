"""Server-sent events of the services' own routes: named pieces of an answer as it is made, errors among them."""

import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import TypeVar

import orjson
from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from sightline.errors import InternalError, SightlineError
from sightline.services.base import Json, context_of, flag_of

log = logging.getLogger("sightline.services")

T = TypeVar("T")


def wants_events(request: Request, fields: Mapping[str, object]) -> bool:
    """Whether the client asked for a stream, by `Accept: text/event-stream` or by the field `stream`."""
    return "text/event-stream" in request.headers.get("accept", "") or flag_of(fields, "stream") is True


def event(name: str, data: Json) -> bytes:
    """One event: its name, and JSON on one line."""
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"


async def streaming(request: Request, parts: AsyncGenerator[T], render: Callable[[T], bytes]) -> Response:
    """Answer with the parts as they come.

    What goes wrong before the first part is raised, and so gets a status of its own. What goes wrong later is the last
    event: `error`, in the shape of an error's body.
    """
    first = await anext(parts)

    async def events() -> AsyncGenerator[bytes]:
        async with aclosing(parts):
            try:
                yield render(first)
                async for part in parts:
                    yield render(part)
            except Exception as error:
                yield event("error", _fault(error, context_of(request).request_id))

    return EventStream(events())


def _fault(error: Exception, request_id: str) -> Json:
    if isinstance(error, SightlineError):
        log.warning("%s in a stream request_id=%s: %s", error.code, request_id, error.message)
    else:
        log.exception("bug in a stream request_id=%s", request_id, exc_info=error)
        error = InternalError("Something went wrong on the server.")
    return {"detail": error.message, "code": error.code, "request_id": request_id}


class EventStream(Response):
    """A response that closes the source of its events, whichever way it ends.

    The guard cancels it when the client leaves; Starlette's StreamingResponse would leave the source to the collector.
    """

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in events:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
