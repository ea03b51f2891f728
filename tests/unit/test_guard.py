"""What happens around every request: id, key, deadline, limits, errors, a leaving client; also in a real uvicorn."""

import asyncio
import contextlib
import logging
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx
import orjson
import pytest
import uvicorn
from fastapi import FastAPI
from kserve import errors as kserve_errors
from prometheus_client import REGISTRY
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sightline.errors import (
    DeadlineExceeded,
    InvalidImage,
    InvalidParameter,
    NotFound,
    OutOfMemory,
    QueueFull,
    SightlineError,
    Unavailable,
)
from sightline.server.guard import Guard
from sightline.server.keys import Keys
from sightline.settings import ServerSettings
from sightline.wire import Context

T = TypeVar("T")
PATIENCE_SECONDS = 10
LIMIT = 1000
"""Bytes of a request body that the guard of these tests lets through."""


async def soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await work


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("API_KEY", "API_KEYS", "API_KEY_FILE", "AUTH", "MAX_REQUEST_BYTES", "DEADLINE_SECONDS"):
        monkeypatch.delenv(name, raising=False)


def guarded(app: ASGIApp, *, api_keys: str | None = None) -> Guard:
    settings = ServerSettings(
        _env_file=None,
        auth="api-key" if api_keys else "off",
        api_keys=api_keys,
        max_request_bytes=LIMIT,
        deadline_seconds=100,
    )
    return Guard(app, settings, Keys(settings))


@dataclass
class Answer:
    """What the client saw."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_complete: bool = False

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


class Visitor:
    """One client of an ASGI application: sends its body in pieces, may leave, keeps what it got."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.answer = Answer()
        self.left = asyncio.Event()
        self.got_all = asyncio.Event()

    async def request(
        self,
        path: str = "/thing",
        *,
        method: str = "POST",
        headers: Iterable[tuple[str, str]] = (),
        body: Iterable[bytes] = (b"",),
    ) -> Answer:
        pieces = list(body)
        scope: Scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"",
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        }

        async def receive() -> Message:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}
            _, pending = await asyncio.wait(
                [asyncio.create_task(self.left.wait()), asyncio.create_task(self.got_all.wait())],
                return_when=asyncio.FIRST_COMPLETED,
            )
            for task in pending:
                task.cancel()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                assert self.answer.status is None, "a second answer"
                self.answer.status = message["status"]
                names = [name for name, _ in message["headers"]]
                assert len(names) == len(set(names)), "a header twice"
                self.answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
                return
            assert not self.answer.is_complete, "bytes behind the answer"
            self.answer.body += message.get("body", b"")
            if not message.get("more_body"):
                self.answer.is_complete = True
                self.got_all.set()

        await soon(self._app(scope, receive, send))
        return self.answer


async def ask(app: ASGIApp, path: str = "/thing", **options: Any) -> Answer:
    return await Visitor(app).request(path, **options)


async def read_all(receive: Receive) -> bytes:
    data = b""
    while True:
        message = await receive()
        data += message.get("body", b"")
        if not message.get("more_body"):
            return data


async def reply(send: Send, data: bytes = b"fine", status: int = 200, headers: Iterable[Any] = ()) -> None:
    length = (b"content-length", str(len(data)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": data})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await reply(send, await read_all(receive))


def raising(error: BaseException) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    return app


class Keeper:
    """Answers, and keeps the context that it was given."""

    context: Context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.context = scope["state"]["context"]
        await reply(send)


class Waiting:
    """Reads the body, then works until it is let or cancelled."""

    def __init__(self) -> None:
        self.began, self.may_end, self.was_cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await read_all(receive)
        self.began.set()
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise
        await reply(send)


class TestRequestId:
    async def test_is_made_where_the_client_has_none(self) -> None:
        keeper = Keeper()

        answer = await ask(guarded(keeper))

        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
        assert keeper.context.request_id == answer.headers["x-request-id"]
        assert (await ask(guarded(keeper))).headers["x-request-id"] != answer.headers["x-request-id"]

    @pytest.mark.parametrize("given", ["a", "run-42:step.1_x", "x" * 128])
    async def test_of_the_client_is_kept(self, given: str) -> None:
        keeper = Keeper()

        answer = await ask(guarded(keeper), headers=[("X-Request-Id", given)])

        assert answer.headers["x-request-id"] == keeper.context.request_id == given

    @pytest.mark.parametrize("given", ["", " ", "a b", "a\tb", 'a"b', "a/b", "<a>", "é", "x" * 129], ids=ascii)
    async def test_that_is_none_is_replaced(self, given: str) -> None:
        answer = await ask(guarded(Keeper()), headers=[("X-Request-Id", given)])

        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])

    async def test_is_in_errors_too(self) -> None:
        answer = await ask(guarded(raising(ValueError())), headers=[("X-Request-Id", "mine")])

        assert answer.headers["x-request-id"] == answer.json["request_id"] == "mine"

    async def test_of_the_application_does_not_add_a_second(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await reply(send, headers=[(b"x-request-id", b"another")])

        answer = await ask(guarded(app), headers=[("X-Request-Id", "mine")])

        assert answer.headers["x-request-id"] == "mine"


class TestKeys:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ([], 403),
            ([("X-API-Key", "one")], 200),
            ([("X-API-Key", "two")], 200),
            ([("x-api-key", "one")], 200),
            ([("X-API-Key", "three")], 403),
            ([("X-API-Key", "")], 403),
            ([("X-API-Key", "one,two")], 403),
            ([("X-API-Key", "ön")], 403),
            ([("Authorization", "Bearer one")], 200),
            ([("Authorization", "bearer  one")], 200),
            ([("Authorization", "Bearer three")], 403),
            ([("Authorization", "Bearer")], 403),
            ([("Authorization", "Basic one")], 403),
            ([("Authorization", "one")], 403),
            ([("X-API-Key", "three"), ("Authorization", "Bearer one")], 403),
        ],
        ids=str,
    )
    async def test_open_the_door(self, headers: list[tuple[str, str]], status: int) -> None:
        answer = await ask(guarded(echo, api_keys="one,two"), headers=headers)

        assert answer.status == status

    async def test_the_refusal_is_the_older_service_s(self) -> None:
        answer = await ask(guarded(echo, api_keys="one"), "/generate/text")

        assert answer.json["detail"] == "Invalid API key"
        assert answer.json["code"] == "invalid_api_key"

    @pytest.mark.parametrize("path", ["/health", "/v2/health/live", "/v2/health/ready", "/v2/models/describe/ready"])
    async def test_are_not_asked_of_probes(self, path: str) -> None:
        app = guarded(echo, api_keys="one")

        assert (await ask(app, path)).status == 200
        assert (await ask(app, path, headers=[("X-API-Key", "wrong")])).status == 200

    @pytest.mark.parametrize(
        "path",
        [
            "/",
            "/docs",
            "/openapi.json",
            "/metrics",
            "/v2",
            "/v1/models",
            "/v1/models/describe",
            "/v1/chat/completions",
            "/openai/v1/models",
            "/v2/models",
            "/v2/models/describe",
            "/v2/models/describe/infer",
            "/v2/models/a/b/ready",
            "/v2/models//ready",
            "/v2/models/describe/infer/../ready/",
            "/v2/models/describe/versions/1/ready",
            "/health/",
            "/health/x",
            "/Health",
            "//health",
            "/x/health",
            "/v2/health/ready/x",
        ],
    )
    async def test_are_asked_of_everybody_else(self, path: str) -> None:
        assert (await ask(guarded(echo, api_keys="one"), path)).status == 403

    async def test_become_the_principal(self) -> None:
        first, second, off = Keeper(), Keeper(), Keeper()

        await ask(guarded(first, api_keys="one,two"), headers=[("X-API-Key", "one")])
        await ask(guarded(second, api_keys="one,two"), headers=[("X-API-Key", "two")])
        await ask(guarded(off))

        assert first.context.principal
        assert second.context.principal
        assert first.context.principal != second.context.principal
        assert "one" not in first.context.principal
        assert off.context.principal == ""

    async def test_come_before_any_work(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            pytest.fail("the application was asked")

        await ask(guarded(app, api_keys="one"), body=[b"x" * 100])


class TestDeadline:
    @pytest.mark.parametrize(
        ("header", "seconds"),
        [(None, 100), ("5000", 5), ("1", 0.001), ("2500.5", 2.5005), ("100000", 100), ("9e99", 100), ("inf", 100)],
    )
    async def test_is_what_the_client_wants_but_no_longer_than_ours(self, header: str | None, seconds: float) -> None:
        keeper = Keeper()

        await ask(guarded(keeper), headers=[] if header is None else [("X-Request-Timeout-Ms", header)])

        assert seconds - 5 < keeper.context.deadline.remaining() <= seconds

    @pytest.mark.parametrize(
        ("header", "status"), [("soon", 400), ("", 400), ("5s", 400), ("0", 422), ("-1", 422), ("nan", 422)]
    )
    async def test_that_is_none_is_refused(self, header: str, status: int) -> None:
        answer = await ask(guarded(echo), headers=[("X-Request-Timeout-Ms", header)])

        assert answer.status == status
        assert "X-Request-Timeout-Ms" in answer.json["detail"]


class TestTraces:
    VALID = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            (VALID, VALID),
            (None, None),
            ("", None),
            ("00-xyz", None),
            (VALID.upper(), None),
            ("00-" + "0" * 32 + "-b7ad6b7169203331-01", None),
            ("00-0af7651916cd43dd8448eb211c80319c-" + "0" * 16 + "-01", None),
            ("ff" + VALID[2:], None),
            (VALID + "-more", None),
            ("01" + VALID[2:] + "-more", "01" + VALID[2:] + "-more"),
        ],
    )
    async def test_are_handed_on_as_they_came(self, given: str | None, kept: str | None) -> None:
        keeper = Keeper()

        await ask(guarded(keeper), headers=[] if given is None else [("traceparent", given)])

        assert keeper.context.traceparent == kept

    @pytest.mark.parametrize(
        ("given", "kept"),
        [
            ([], None),
            (["a=1"], "a=1"),
            (["a=1", "b=2,c=3"], "a=1,b=2,c=3"),
            (["a=" + "x" * 511], None),
            (["a=é"], None),
        ],
        ids=lambda value: str(value)[:20],
    )
    async def test_come_with_what_tracing_systems_add(self, given: list[str], kept: str | None) -> None:
        keeper = Keeper()
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

        await ask(guarded(keeper), headers=[("traceparent", trace), *(("tracestate", value) for value in given)])

        assert keeper.context.tracestate == kept

    async def test_that_are_none_take_their_additions_with_them(self) -> None:
        keeper = Keeper()

        await ask(guarded(keeper), headers=[("traceparent", "00-0-0-00"), ("tracestate", "a=1")])

        assert keeper.context.tracestate is None

    async def test_are_in_the_log_by_their_id(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "sightline.access")

        await ask(
            guarded(Keeper()), headers=[("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
        )

        assert "trace_id=0af7651916cd43dd8448eb211c80319c" in caplog.text


class TestBodies:
    @pytest.mark.parametrize("pieces", [1, 2, 7, 8, 9, 100])
    async def test_arrive_whole_in_any_number_of_pieces(self, pieces: int) -> None:
        body = [bytes([number]) for number in range(pieces)]

        assert (await ask(guarded(echo), body=body)).body == b"".join(body)

    async def test_of_just_the_limit_are_taken(self) -> None:
        answer = await ask(guarded(echo), body=[b"x" * LIMIT], headers=[("Content-Length", str(LIMIT))])

        assert (answer.status, len(answer.body)) == (200, LIMIT)

    async def test_announced_too_large_are_not_read(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            pytest.fail("the application was asked")

        answer = await ask(guarded(app), headers=[("Content-Length", str(LIMIT + 1))])

        assert answer.status == 413
        assert answer.json["code"] == "request_too_large"
        assert str(LIMIT) in answer.json["detail"]

    @pytest.mark.parametrize("headers", [[], [("Content-Length", "5")]], ids=["chunked", "lying"])
    async def test_that_turn_out_too_large_are_cut_off(self, headers: list[tuple[str, str]]) -> None:
        answer = await ask(guarded(echo), body=[b"x" * 300] * 4, headers=headers)

        assert answer.status == 413
        assert answer.json["code"] == "request_too_large"

    @pytest.mark.parametrize("length", ["²", "9" * 5000, "-1", "x"], ids=lambda text: text[:2])
    async def test_with_a_strange_length_are_counted(self, length: str) -> None:
        answer = await ask(guarded(echo), body=[b"x"], headers=[("Content-Length", length)])

        assert answer.status in {200, 413}

    async def test_an_application_need_not_read_them(self) -> None:
        assert (await ask(guarded(Keeper()), body=[b"x"] * 100)).status == 200


SECRET = "hunter2: CUDA error at /home/me/model.py"


class TestErrors:
    @pytest.mark.parametrize(
        ("path", "key"),
        [
            ("/v1/models/describe:predict", "error"),
            ("/v2", "error"),
            ("/v2/models/describe/infer", "error"),
            ("/api/v1/run", "detail"),
            ("/caption", "detail"),
            ("/", "detail"),
            ("/v1x", "detail"),
            ("/v20/models", "detail"),
        ],
    )
    async def test_are_said_as_the_protocol_of_the_path_says_them(self, path: str, key: str) -> None:
        answer = await ask(guarded(raising(InvalidImage("This is no image."))), path, headers=[("X-Request-Id", "r")])

        assert answer.status == 400
        assert answer.headers["content-type"] == "application/json"
        assert answer.json == {key: "This is no image.", "code": "invalid_image", "request_id": "r"}

    @pytest.mark.parametrize(
        "path",
        ["/v1/chat/completions", "/v1/embeddings", "/v1/models", "/v1/models/describe", "/openai/v1/models", "/v1"],
    )
    async def test_are_openai_s_where_its_routes_are(self, path: str) -> None:
        answer = await ask(guarded(raising(InvalidParameter("No."))), path, headers=[("X-Request-Id", "r")])

        assert answer.status == 400, "OpenAI has no 422"
        assert answer.json == {
            "error": {"message": "No.", "type": "invalid_request_error", "param": None, "code": "invalid_parameter"},
            "request_id": "r",
        }

    @pytest.mark.parametrize(
        ("error", "kind"),
        [
            (QueueFull("Later."), "rate_limit_error"),
            (Unavailable("Later."), "server_error"),
            (ValueError(), "server_error"),
            (NotFound("No."), "invalid_request_error"),
        ],
        ids=lambda value: type(value).__name__,
    )
    async def test_have_openai_s_type_there(self, error: Exception, kind: str) -> None:
        assert (await ask(guarded(raising(error)), "/v1/models")).json["error"]["type"] == kind

    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (InvalidParameter("x", code="mine"), 422, "mine"),
            (NotFound("x"), 404, "not_found"),
            (QueueFull("x", retry_after=1), 429, "queue_full"),
            (Unavailable("x"), 503, "unavailable"),
            (DeadlineExceeded("x"), 504, "deadline_exceeded"),
            (OutOfMemory("x"), 507, "out_of_memory"),
            (HTTPException(404, SECRET), 404, "route_not_found"),
            (HTTPException(405, SECRET), 405, "method_not_allowed"),
            (HTTPException(422, SECRET), 422, "invalid_parameter"),
            (HTTPException(418, SECRET), 400, "invalid_request"),
            (HTTPException(500, SECRET), 500, "internal_error"),
            (kserve_errors.ModelNotFound(SECRET), 404, "model_not_found"),
            (kserve_errors.ModelNotReady(SECRET), 503, "model_not_ready"),
            (kserve_errors.InvalidInput(SECRET), 400, "invalid_request"),
            (kserve_errors.UnsupportedProtocol(SECRET), 501, "not_supported"),
            (kserve_errors.InferenceError(SECRET), 500, "internal_error"),
            (NotImplementedError(SECRET), 501, "not_supported"),
            (RuntimeError(SECRET), 500, "internal_error"),
            (OSError(SECRET), 500, "internal_error"),
            (TimeoutError(SECRET), 500, "internal_error"),
            (ExceptionGroup(SECRET, [ValueError(SECRET)]), 500, "internal_error"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
    )
    async def test_of_any_kind_become_ours_without_a_library_s_text(
        self, error: Exception, status: int, code: str
    ) -> None:
        answer = await ask(guarded(raising(error)))

        assert (answer.status, answer.json["code"]) == (status, code)
        assert answer.is_complete
        assert "hunter2" not in answer.body.decode()

    async def test_that_are_bugs_are_in_the_log_with_their_cause(self, caplog: pytest.LogCaptureFixture) -> None:
        await ask(guarded(raising(RuntimeError(SECRET))), headers=[("X-Request-Id", "r-7")])

        assert SECRET in caplog.text
        assert "request_id=r-7" in caplog.text

    async def test_of_ours_that_hide_a_cause_show_it_in_the_log(self, caplog: pytest.LogCaptureFixture) -> None:
        error = Unavailable("The store is away.")
        error.__cause__ = OSError(SECRET)

        await ask(guarded(raising(error)))

        assert SECRET in caplog.text

    @pytest.mark.parametrize(("seconds", "header"), [(None, None), (0.2, "1"), (1, "1"), (2.6, "3"), (60.0, "60")])
    async def test_say_when_to_come_back_in_whole_seconds(self, seconds: float | None, header: str | None) -> None:
        answer = await ask(guarded(raising(QueueFull("x", retry_after=seconds))))

        assert answer.headers.get("retry-after") == header

    async def test_after_the_first_byte_can_only_break_the_connection(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise ValueError(SECRET)

        visitor = Visitor(guarded(app))

        with pytest.raises(ValueError, match="hunter2"):
            await visitor.request()

        assert visitor.answer == Answer(200, visitor.answer.headers, b"half", is_complete=False)

    async def test_a_cancellation_from_inside_is_a_bug_like_any_other(self) -> None:
        """For example a pool that was shut down under a request."""
        answer = await ask(guarded(raising(asyncio.CancelledError())))

        assert answer.status == 500
        assert answer.json["code"] == "internal_error"


class TestALeavingClient:
    async def test_cancels_the_work(self) -> None:
        app = Waiting()
        visitor = Visitor(guarded(app))
        asking = asyncio.create_task(visitor.request(body=[b"x"]))
        await soon(app.began.wait())

        visitor.left.set()
        answer = await soon(asking)

        assert app.was_cancelled.is_set()
        assert answer.status is None

    async def test_cancels_nothing_once_it_has_its_answer(self) -> None:
        done = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await reply(send)
            for _ in range(10):  # a background task
                await asyncio.sleep(0)
            done.set()

        await ask(guarded(app))

        assert done.is_set()

    async def test_counts_as_499(self) -> None:
        before = requests_counted("POST", "unmatched", "499")
        app = Waiting()
        visitor = Visitor(guarded(app))
        asking = asyncio.create_task(visitor.request())
        await soon(app.began.wait())

        visitor.left.set()
        await soon(asking)

        assert requests_counted("POST", "unmatched", "499") == before + 1

    async def test_is_no_trouble_for_an_application_that_answers_all_the_same(self) -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            visitor.left.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise SightlineError("too late") from None

        visitor = Visitor(guarded(app))
        await visitor.request()

    async def test_a_server_that_is_stopped_is_told(self) -> None:
        app = Waiting()
        asking = asyncio.create_task(Visitor(guarded(app)).request())
        await soon(app.began.wait())

        asking.cancel()

        with pytest.raises(asyncio.CancelledError):
            await soon(asking)
        await soon(app.was_cancelled.wait())


def requests_counted(method: str, route: str, status: str) -> float:
    labels = {"method": method, "route": route, "status": status}
    return REGISTRY.get_sample_value("sightline_requests_total", labels) or 0


class TestRecords:
    async def test_one_line_per_request(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "sightline.access")

        await ask(guarded(echo), "/caption", headers=[("X-Request-Id", "r-1")])

        (line,) = [record.getMessage() for record in caplog.records if record.name == "sightline.access"]
        assert re.fullmatch(r"POST /caption status=200 ms=\d+\.\d request_id=r-1", line)

    @pytest.mark.parametrize("path", ["/health", "/metrics", "/v2/health/live", "/v2/models/m/ready"])
    async def test_probes_and_scrapes_are_only_in_the_debug_log(
        self, path: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, "sightline.access")

        await ask(guarded(echo), path)

        assert [record.levelname for record in caplog.records if record.name == "sightline.access"] == ["DEBUG"]

    @pytest.mark.parametrize("app", [echo, raising(ValueError())], ids=["answered", "failed"])
    async def test_a_path_cannot_forge_a_line(self, app: ASGIApp, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)

        await ask(guarded(app), "/x\n2026-01-01 INFO forged\x1b[0m")

        messages = [record.getMessage() for record in caplog.records if record.name.startswith("sightline")]
        assert messages
        assert not [message for message in messages if re.search(r"[\x00-\x1f]", message)]

    async def test_routes_are_counted_by_their_pattern(self) -> None:
        api = FastAPI()
        api.add_api_route("/status/{run_id}", lambda run_id: {"id": run_id}, methods=["GET"])
        before = requests_counted("GET", "/status/{run_id}", "200")

        for run_id in ("a", "b"):
            assert (await ask(guarded(api), f"/status/{run_id}", method="GET")).status == 200

        assert requests_counted("GET", "/status/{run_id}", "200") == before + 2

    async def test_what_the_client_invents_makes_no_new_time_series(self) -> None:
        api = FastAPI()

        for number in range(3):
            await ask(guarded(api), f"/invented-{number}", method=f"INVENTED{number}")

        samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
        assert not [sample for sample in samples if "nvented" in str(sample.labels).lower()]


async def test_other_kinds_of_connection_pass() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    await guarded(app, api_keys="one")({"type": "lifespan"}, None, None)  # type: ignore[arg-type]

    assert seen == ["lifespan"]


@contextlib.asynccontextmanager
async def served(app: ASGIApp) -> AsyncIterator[int]:
    """A real uvicorn with our application on a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_keep_alive=60)
        config.load()
        server = uvicorn.Server(config)
        server.lifespan = config.lifespan_class(config)
        await server.startup(sockets=[listener])
        try:
            yield listener.getsockname()[1]
        finally:
            await soon(server.shutdown(sockets=[listener]))


class Connection:
    """One TCP connection over which requests go one after the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await soon(self._writer.drain())

    async def answer(self) -> tuple[int, Any]:
        head = await soon(self._reader.readuntil(b"\r\n\r\n"))
        assert b"connection: close" not in head.lower()
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        assert length is not None
        body = await soon(self._reader.readexactly(int(length[1])))
        return int(head.split()[1]), orjson.loads(body) if body.startswith(b"{") else body

    async def ask(self, path: str = "/echo", body: bytes = b"hello", *headers: str) -> tuple[int, Any]:
        lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
        await self.send("\r\n".join(lines).encode() + body)
        return await self.answer()


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Connection(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def various(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that fails in the way that its path names."""
    failures: dict[str, Callable[[], Exception]] = {
        "/bug": lambda: RuntimeError(SECRET),
        "/full": lambda: QueueFull("Later.", retry_after=1),
        "/cancelled": asyncio.CancelledError,  # type: ignore[dict-item]
    }
    if (failure := failures.get(scope["path"])) is not None:
        raise failure()
    await echo(scope, receive, send)


class TestBehindUvicorn:
    @pytest.mark.parametrize(
        ("path", "headers", "status"),
        [
            ("/bug", [], 500),
            ("/full", [], 429),
            ("/cancelled", [], 500),
            ("/echo", ["X-Request-Timeout-Ms: soon"], 400),
        ],
    )
    @pytest.mark.parametrize("body", [b"", b"x" * LIMIT], ids=["no body", "a body that nobody read"])
    async def test_the_connection_outlives_an_error(
        self, path: str, headers: list[str], status: int, body: bytes
    ) -> None:
        async with served(guarded(various)) as port, connected(port) as connection:
            assert (await connection.ask(path, body, *headers))[0] == status

            assert await connection.ask() == (200, b"hello")

    async def test_the_connection_outlives_a_missing_key(self) -> None:
        async with served(guarded(various, api_keys="one")) as port, connected(port) as connection:
            assert (await connection.ask("/echo", b"x" * 500))[0] == 403

            assert await connection.ask("/echo", b"hello", "X-API-Key: one") == (200, b"hello")

    @pytest.mark.parametrize("size", [LIMIT + 1, 5_000_000])
    async def test_the_connection_outlives_a_body_announced_too_large(self, size: int) -> None:
        async with served(guarded(various)) as port, connected(port) as connection:
            status, body = await connection.ask("/echo", b"x" * size)
            assert (status, body["code"]) == (413, "request_too_large")

            assert await connection.ask() == (200, b"hello")

    @pytest.mark.parametrize("chunks", [2, 100])
    async def test_the_connection_outlives_a_chunked_body_that_turns_out_too_large(self, chunks: int) -> None:
        async with served(guarded(various)) as port, connected(port) as connection:
            await connection.send(b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            for _ in range(chunks):
                await connection.send(b"258\r\n" + b"x" * 600 + b"\r\n")
            await connection.send(b"0\r\n\r\n")
            status, body = await connection.answer()
            assert (status, body["code"]) == (413, "request_too_large")

            assert await connection.ask() == (200, b"hello")

    async def test_a_client_that_leaves_cancels_its_work(self) -> None:
        app = Waiting()
        async with served(guarded(app)) as port:
            async with connected(port) as connection:
                await connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx")
                await soon(app.began.wait())

            await soon(app.was_cancelled.wait())

    async def test_a_client_that_leaves_while_it_sends_cancels_its_work(self) -> None:
        cancelled = asyncio.Event()
        began = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            began.set()
            try:
                await read_all(receive)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        async with served(guarded(app)) as port:
            async with connected(port) as connection:
                await connection.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nonly this")
                await soon(began.wait())

            await soon(cancelled.wait())

    async def test_ordinary_clients_see_whole_answers(self) -> None:
        async with (
            served(guarded(various)) as port,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client,
        ):
            answers = [await client.post(path, content=b"hi") for path in ("/echo", "/bug", "/full")]

        assert [answer.status_code for answer in answers] == [200, 500, 429]
        assert answers[2].headers["retry-after"] == "1"
        assert all(answer.headers["x-request-id"] for answer in answers)


@pytest.fixture(autouse=True)
def _no_lost_tasks(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert "never retrieved" not in caplog.text
    assert "was destroyed" not in caplog.text
