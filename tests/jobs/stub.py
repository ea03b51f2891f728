"""A stand-in for the gateway, a predictor and an OpenAI server: its answers are a function of the picture's bytes.

    with running_stub() as stub:            in a thread of this process
        …                                   a batch whose target is stub.url
        stub.throttle_share = 0.2           and other bad days, at any time
        assert stub.answered[digest(picture)] == 1

    python -m tests.jobs.stub PORT_FILE     a process of its own, for the bench: GET /stub tells what it answered

Bare asyncio, so that in the bench it is not the stub that is measured.
"""

import asyncio
import base64
import contextlib
import json
import random
import sys
import time
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

import orjson

from tests.jobs import pictures
from tests.jobs.threads import Loop, looping

REVISION = "stub-revision-1"
CODES = {
    400: "invalid_image",
    404: "route_not_found",
    422: "invalid_parameter",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
}

Answer = tuple[int, Mapping[str, Any]]


@dataclass
class Stub:
    """What it does is to be set at any time, by any thread; what it did is to be read likewise.

    delay_seconds   every answer waits so long
    limit           asks beyond so many at a time are answered 429, as by a bounded queue
    throttle_share  of asks that are answered 429
    is_unavailable  asks and readiness are answered 503
    revision        in the header that the gateway sends
    on_ask          called with the number of each ask, from 1, before it is answered
    """

    delay_seconds: float = 0.0
    limit: int | None = None
    throttle_share: float = 0.0
    is_unavailable: bool = False
    revision: str = REVISION
    on_ask: Callable[[int], None] | None = None

    port: int = 0
    asks: int = 0
    given: int = 0
    """Captions, those given again too."""
    answered: Counter[str] = field(default_factory=Counter[str])
    """Captions given, by picture."""
    refused: Counter[int] = field(default_factory=Counter[int])
    """Other answers, by status."""
    priorities: Counter[str] = field(default_factory=Counter[str])
    new_at: "array[float]" = field(default_factory=lambda: array("d"))
    """When each picture was captioned first, seconds since 1970."""
    open: int = 0
    most_open: int = 0
    _flaky: set[str] = field(default_factory=set[str])
    _rng: random.Random = field(default_factory=lambda: random.Random(7))
    _connections: set["_Connection"] = field(default_factory=set["_Connection"])
    _server: asyncio.Server | None = None
    _loop: Loop | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def go_down(self) -> None:
        """The process is gone: nobody listens and every open connection is cut. For tests, from their thread."""
        assert self._loop is not None
        self._loop.run(self._unlisten())

    def come_up(self) -> None:
        """It listens again, at the same port."""
        assert self._loop is not None
        self._loop.run(self._listen())

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncGenerator[None]:
        await self._listen()
        try:
            yield
        finally:
            await self._unlisten()

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _unlisten(self) -> None:
        if self._server is not None:
            # asyncio drops, still open, what it has accepted and not yet handed on when the server is closed.
            for listener in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
            await _turns()
            self._server.close()
            self._server = None
        for connection in list(self._connections):
            connection.cut()
        await _turns()

    # --- answers -----------------------------------------------------------------------------------------------------

    def answer(self, address: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """What a request is answered, by its route."""
        path, _, query = address.partition("?")
        if path == "/caption":
            return self._caption(query, headers, body)
        if path.startswith("/v2/models/") and path.endswith("/infer"):
            return self._infer(headers, body)
        if path.endswith("/v1/chat/completions"):
            return self._chat(body)
        if path.startswith("/stub"):
            return 200, self._books(path)
        if path.startswith(("/health", "/v2/")):
            return (503 if self.is_unavailable else 200), {"ok": not self.is_unavailable, "ready": True}
        return 404, {"detail": "There is no such route.", "code": CODES[404]}

    def _books(self, path: str) -> Mapping[str, Any]:
        """/stub: what was answered · …/forget: the same, for the last time · …/new/N: when picture N + 1 came."""
        said = {"asks": self.asks, "given": self.given, "pictures": len(self.new_at)}
        if path == "/stub/forget":
            self.answered.clear()
            self.given = 0
            del self.new_at[:]
        if path.startswith("/stub/new/"):
            return {"at": self.new_at[int(path.rsplit("/", 1)[1])]}
        return said

    def _caption(self, query: str, headers: Mapping[str, str], body: bytes) -> Answer:
        fields = {name: value.encode() for name, value in parse_qsl(query)}
        fields |= _fields(headers.get("content-type", ""), body)
        data = fields.get("image") or fields.get("s3_uri") or b""
        status = self._verdict(data)
        if status != 200:
            return status, {"detail": "The stub says no.", "code": CODES[status]}
        text = pictures.caption_of(data, fields.get("prompt", b"").decode())
        if fields.get("use_gpt_oss", b"true").lower() == b"false":
            return 200, {"caption": text, "enhanced": False}
        if pictures.fault_of(data) == "unenhanced":
            error = {"code": "enhancer_unavailable", "message": "The enhancer is away."}
            return 200, {"caption": text, "enhanced": False, "enhancement_error": error}
        return 200, {"caption": pictures.enhanced(text), "original_caption": text, "enhanced": True}

    def _infer(self, headers: Mapping[str, str], body: bytes) -> Answer:
        data, prompt = _tensors(headers, body)
        status = self._verdict(data)
        if status != 200:
            return status, {"error": "The stub says no.", "code": CODES[status]}
        text = pictures.caption_of(data, prompt)
        output = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}
        said = {"model": "stub", "model_revision": "1", "image_tokens": 1}  # without these a gateway takes no answer
        return 200, {"model_name": "stub", "outputs": [output], "parameters": said}

    def _chat(self, body: bytes) -> Answer:
        data, prompt = b"", ""
        for message in orjson.loads(body)["messages"]:
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    prompt += part["text"]
                else:
                    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        status = self._verdict(data or prompt.encode())
        if status != 200:
            return status, {"error": {"message": "The stub says no.", "type": "stub", "code": CODES[status]}}
        message = {"role": "assistant", "content": pictures.caption_of(data or prompt.encode(), prompt)}
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return 200, {"id": "stub", "object": "chat.completion", "created": 0, "choices": [choice], "usage": usage}

    def _verdict(self, data: bytes) -> int:
        """Status of an ask for one picture, and the books."""
        self.asks += 1
        if self.on_ask is not None:
            self.on_ask(self.asks)
        name, status = pictures.digest(data), self._status(data)
        if status == 200:
            if name not in self.answered:
                self.new_at.append(time.time())
            self.answered[name] += 1
            self.given += 1
        else:
            self.refused[status] += 1
        return status

    def _status(self, data: bytes) -> int:
        if self.is_unavailable:
            return 503
        if self.limit is not None and self.open > self.limit:
            return 429
        if self.throttle_share and self._rng.random() < self.throttle_share:
            return 429
        fault = pictures.fault_of(data)
        if fault == "flaky" and (name := pictures.digest(data)) not in self._flaky:
            self._flaky.add(name)
            return 500
        if data == pictures.NO_PICTURE:
            return 400
        return 422 if fault == "422" else 200


class _Connection(asyncio.Protocol):
    """One client's connection: requests with a length, one after the other."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._buffer = b""
        self._transport: asyncio.Transport | None = None
        self._is_busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._stub._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._stub._connections.discard(self)

    def cut(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._is_busy:
            self._next()

    def _next(self) -> None:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        self._is_busy = True
        self._answer(first.split(" ")[1], headers, rest[:length])

    def _answer(self, address: str, headers: Mapping[str, str], body: bytes) -> None:
        stub = self._stub
        stub.open += 1
        stub.most_open = max(stub.most_open, stub.open)
        if "x-priority" in headers:
            stub.priorities[headers["x-priority"]] += 1
        answer = stub.answer(address, headers, body)
        is_ask = not address.startswith(("/stub", "/health"))
        if stub.delay_seconds and is_ask:
            asyncio.get_running_loop().call_later(stub.delay_seconds, self._send, answer)
        else:
            self._send(answer)

    def _send(self, answer: Answer) -> None:
        self._stub.open -= 1
        self._is_busy = False
        if self._transport is None:
            return
        status, said = answer
        body = orjson.dumps(said)
        wait = "retry-after: 0\r\n" if status == 429 else ""
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n{wait}"
            f"x-pipeline-revision: {self._stub.revision}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        if self._buffer:
            self._next()


def _fields(kind: str, body: bytes) -> dict[str, bytes]:
    """The fields of a form or of JSON; an image as its bytes. A body that is neither is the image."""
    if kind.startswith("multipart/form-data"):
        mark = b"--" + kind.partition("boundary=")[2].partition(";")[0].strip('"').encode()
        fields: dict[str, bytes] = {}
        for part in body.split(mark)[1:-1]:
            head, _, value = part.partition(b"\r\n\r\n")
            name = head.partition(b'name="')[2].partition(b'"')[0].decode()
            fields[name] = value[:-2]
        return fields
    if kind.startswith("application/json"):
        said = {name: str(value).encode() for name, value in orjson.loads(body).items() if value is not None}
        if "image" in said:
            text = said["image"]
            said["image"] = base64.b64decode(text.partition(b",")[2] if text.startswith(b"data:") else text)
        return said
    return {"image": body}


def _tensors(headers: Mapping[str, str], body: bytes) -> tuple[bytes, str]:
    """The first element of `image` and of `prompt` of a V2 body, binary or base64 in JSON."""
    length = int(headers.get("inference-header-content-length", len(body)))
    said, rest = orjson.loads(body[:length]), body[length:]
    found: dict[str, bytes] = {}
    for tensor in said["inputs"]:
        size = tensor.get("parameters", {}).get("binary_data_size")
        if size is not None:
            element, rest = rest[:size], rest[size:]
            found[tensor["name"]] = element[4:]
        elif tensor["name"] == "image":
            found["image"] = base64.b64decode(tensor["data"][0])
        else:
            found[tensor["name"]] = tensor["data"][0].encode()
    prompt = found.get("prompt") or str(said.get("parameters", {}).get("prompt") or "").encode()
    return found["image"], prompt.decode()


async def _turns() -> None:
    """As many turns of the loop as an accepted connection, or one that is cut, takes."""
    for _ in range(5):
        await asyncio.sleep(0)


@contextlib.contextmanager
def running_stub(**faults: Any) -> Generator[Stub]:
    """In a thread of this process, until the block ends."""
    stub = Stub(**faults)
    with looping(stub.serving) as loop:
        stub._loop = loop
        yield stub


def main() -> None:
    import uvloop

    port_file, delay = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 0.0

    async def serve() -> None:
        stub = Stub(delay_seconds=delay)
        async with stub.serving():
            draft = port_file.with_suffix(".draft")
            draft.write_text(json.dumps(stub.port))
            draft.rename(port_file)
            await asyncio.Event().wait()

    uvloop.run(serve())


if __name__ == "__main__":
    main()
