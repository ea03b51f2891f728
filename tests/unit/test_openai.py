"""OpenAI's routes around a fake model: what a body may hold, what a stream looks like, and how either fails."""

import asyncio
import base64
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import httpx
import orjson
import pytest
import uvicorn
from fastapi import APIRouter
from hypothesis import given
from hypothesis import strategies as st

from sightline.errors import BadRequest, DeadlineExceeded, InvalidParameter, QueueFull, SightlineError
from sightline.server.model import PredictorModel
from sightline.server.openai import MAX_CHAT_CHARACTERS, MAX_MESSAGES, parse_chat
from sightline.server.serve import build_app
from sightline.services.base import sampling_of
from sightline.settings import ServerSettings
from sightline.wire import Completion, Context, ImageBytes, ImageS3, ImageUrl, ModelInfo, Sampling, Turn, Usage

T = TypeVar("T")
PATIENCE_SECONDS = 10
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n and so on").decode()
USER = {"role": "user", "content": "Hello"}


def body(**fields: Any) -> bytes:
    return orjson.dumps({"model": "parrot", "messages": [USER]} | fields)


def said(*content: Any, role: str = "user") -> bytes:
    return body(messages=[{"role": role, "content": list(content)}])


def image(url: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | fields}


class TestMessages:
    def test_text_may_be_a_string_or_a_part(self) -> None:
        for content in ("Hello", [{"type": "text", "text": "Hello"}]):
            assert parse_chat(body(messages=[{"role": "user", "content": content}])).turns == (
                Turn("user", ("Hello",)),
            )

    def test_parts_keep_their_order(self) -> None:
        chat = parse_chat(
            said({"type": "text", "text": "a"}, image("https://x.example/i.png"), {"type": "text", "text": "b"})
        )

        assert chat.turns[0].parts == ("a", ImageUrl("https://x.example/i.png"), "b")

    @pytest.mark.parametrize(
        ("url", "source"),
        [
            (f"data:image/png;base64,{PNG}", ImageBytes(base64.b64decode(PNG))),
            ("https://x.example/i.png", ImageUrl("https://x.example/i.png")),
            ("s3://bucket/key", ImageS3("s3://bucket/key")),
        ],
        ids=["data URI", "https", "s3"],
    )
    @pytest.mark.parametrize("detail", [None, "auto", "low", "high"])
    def test_an_image_comes_from_everywhere(self, url: str, source: object, detail: str | None) -> None:
        assert parse_chat(said(image(url, detail=detail))).turns[0].images == (source,)

    def test_a_developer_speaks_as_the_system(self) -> None:
        messages = [{"role": role, "content": role} for role in ("system", "developer", "user", "assistant")]

        assert [turn.role for turn in parse_chat(body(messages=[*messages, USER])).turns] == [
            "system", "system", "user", "assistant", "user",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("messages", "param"),
        [
            (None, "messages"),
            ([], "messages"),
            ("Hello", "messages"),
            ([USER] * (MAX_MESSAGES + 1), "messages"),
            ([None], "messages[0]"),
            ([USER, "x"], "messages[1]"),
            ([{"content": "x"}], "messages[0].role"),
            ([{"role": "tool", "content": "x"}], "messages[0].role"),
            ([{"role": "user"}], "messages[0].content"),
            ([{"role": "user", "content": None}], "messages[0].content"),
            ([{"role": "user", "content": []}], "messages[0].content"),
            ([{"role": "user", "content": {"type": "text"}}], "messages[0].content"),
            ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
            ([{"role": "user", "content": [{"text": "x"}]}], "messages[0].content[0].type"),
            ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text"),
            ([{"role": "user", "content": [{"type": "input_audio"}]}], "messages[0].content[0].type"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].image_url"),
            ([{"role": "user", "content": [image("")]}], "messages[0].content[0].image_url.url"),
            ([{"role": "user", "content": [image(5)]}], "messages[0].content[0].image_url.url"),
            ([{"role": "user", "content": [image("file:///etc/passwd")]}], "messages[0].content[0].image_url.url"),
            ([{"role": "user", "content": [image("data:text/html,x")]}], "messages[0].content[0].image_url.url"),
            ([{"role": "user", "content": [image("x", detail="huge")]}], "messages[0].content[0].image_url.detail"),
            ([{"role": "system", "content": [image("s3://b/k")]}], "messages[0].content"),
            ([{"role": "user", "content": [image("s3://b/k")] * 9}], "messages"),
            ([{"role": "user", "content": "x" * 8193}], "messages[0].content"),
            ([{"role": "assistant", "content": "x" * (MAX_CHAT_CHARACTERS + 1)}], "messages"),
            ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls"),
        ],
        ids=lambda value: json.dumps(value)[:60],
    )  # fmt: skip
    def test_what_is_wrong_is_named_by_its_place(self, messages: Any, param: str) -> None:
        with pytest.raises(BadRequest) as caught:
            parse_chat(body(messages=messages))

        assert getattr(caught.value, "param", None) == param
        assert "passwd" not in caught.value.message

    def test_what_the_assistant_said_may_be_long(self) -> None:
        parse_chat(body(messages=[USER, {"role": "assistant", "content": "x" * 20_000}, USER]))


class TestOptions:
    def test_reach_the_service_under_our_names(self) -> None:
        chat = parse_chat(
            body(max_tokens=5, max_completion_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=["x"],
                 reasoning_effort="high", preset="tags")
        )  # fmt: skip

        assert sampling_of(chat.options, Sampling()) == Sampling(7, 0.5, 0.9, 3, ("x",))
        assert chat.options["reasoning_level"] == "high"
        assert chat.options["preset"] == "tags"

    @pytest.mark.parametrize(
        "field",
        [
            {"n": 2}, {"n": 0}, {"tools": [{"type": "function"}]}, {"tool_choice": "required"}, {"functions": [{}]},
            {"response_format": {"type": "json_schema"}}, {"response_format": {"type": "json_object"}},
            {"logprobs": True}, {"top_logprobs": 3}, {"logit_bias": {"5": 1}}, {"frequency_penalty": 0.5},
            {"presence_penalty": -1}, {"modalities": ["text", "audio"]}, {"audio": {}}, {"prediction": {}},
            {"web_search_options": {}},
        ],
        ids=json.dumps,
    )  # fmt: skip
    def test_that_no_model_here_can_honour_are_refused_by_name(self, field: dict[str, Any]) -> None:
        with pytest.raises(BadRequest) as caught:
            parse_chat(body(**field))

        (name,) = field
        assert caught.value.code == "unsupported_parameter"
        assert getattr(caught.value, "param", None) == name
        assert name in caught.value.message

    @pytest.mark.parametrize(
        "field",
        [
            {"n": 1}, {"n": None}, {"tools": []}, {"tools": None}, {"tool_choice": "none"}, {"functions": None},
            {"response_format": {"type": "text"}}, {"logprobs": False}, {"top_logprobs": None}, {"logit_bias": {}},
            {"frequency_penalty": 0}, {"presence_penalty": 0.0}, {"modalities": ["text"]}, {"user": "me"},
            {"metadata": {"a": "b"}}, {"store": True}, {"service_tier": "auto"}, {"safety_identifier": "x"},
            {"parallel_tool_calls": True}, {"prompt_cache_key": "x"},
        ],
        ids=json.dumps,
    )  # fmt: skip
    def test_that_change_nothing_are_taken(self, field: dict[str, Any]) -> None:
        assert parse_chat(body(**field)).turns

    @pytest.mark.parametrize(
        "stop", ["", [""], ["a"] * 5, 5, [5], {"a": 1}, "x" * 257], ids=lambda value: repr(value)[:20]
    )
    def test_stop_sequences_are_checked(self, stop: Any) -> None:
        with pytest.raises(InvalidParameter):
            sampling_of(parse_chat(body(stop=stop)).options, Sampling())

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"model": None}, "model"),
            ({"model": ""}, "model"),
            ({"model": 5}, "model"),
            ({"stream": "yes"}, "stream"),
            ({"stream": 1}, "stream"),
            ({"stream_options": {"include_usage": True}}, "stream_options"),
            ({"stream": True, "stream_options": []}, "stream_options"),
            ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ],
        ids=json.dumps,
    )
    def test_of_the_request_itself_are_checked(self, fields: dict[str, Any], param: str) -> None:
        with pytest.raises(BadRequest) as caught:
            parse_chat(body(**fields))

        assert getattr(caught.value, "param", None) == param

    @pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
    def test_a_body_that_is_no_object_is_refused(self, raw: bytes) -> None:
        with pytest.raises(BadRequest):
            parse_chat(raw)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            "role",
                            "content",
                            "type",
                            "text",
                            "image_url",
                            "url",
                            "detail",
                            "stream",
                            "messages",
                            "model",
                            "n",
                        ]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        )
    )
    def test_any_json_at_all_is_read_or_refused(self, value: Any) -> None:
        for raw in (orjson.dumps(value), body(messages=value), body(messages=[value])):
            with contextlib.suppress(BadRequest):
                assert parse_chat(raw).turns


# --- a model that repeats what it is told, word by word --------------------------------------------------------------


class Parrot:
    """A chat service. Each word waits for the test's leave; `fault` is raised after the words."""

    name = "parrot"
    inputs = outputs = ()

    def __init__(self) -> None:
        self.leave = asyncio.Semaphore(1000)
        self.fault: Exception | None = None
        self.began = asyncio.Event()
        self.ended = asyncio.Event()
        self.contexts: list[Context] = []

    async def load(self) -> None: ...
    async def close(self) -> None: ...

    def router(self, run: object) -> APIRouter:
        return APIRouter()

    def metadata(self) -> dict[str, Any]:
        return {"model": "parrot-9b", "model_revision": "abc", "demo_model": True}

    def from_chat(self, turns: Sequence[Turn], options: Mapping[str, object]) -> str:
        if turns[-1].images:
            raise BadRequest("This model reads text only.", code="image_unsupported")
        sampling_of(options, Sampling())
        return turns[-1].text

    async def preprocess(self, requests: Sequence[str], context: Context) -> Sequence[str]:
        self.contexts.append(context)
        return requests

    async def predict(self, prepared: Sequence[str], context: Context) -> list[Completion]:
        return [completed(text) for text in prepared]

    async def stream(self, request: str, context: Context) -> AsyncGenerator[str | Completion]:
        self.began.set()
        try:
            for number, word in enumerate(request.split()):
                await self.leave.acquire()
                yield f" {word}" if number else word
            if self.fault is not None:
                raise self.fault
            yield completed(" ".join(request.split()))
        finally:
            self.ended.set()


def completed(text: str) -> Completion:
    return Completion(text, "stop", Usage(7, 2, 4, 1), ModelInfo("parrot-9b", "abc", demo=True), 5.0)


class Embedder(Parrot):
    """A service that does not chat."""

    name = "embedder"
    from_chat = property()  # type: ignore[assignment]  # hasattr says no


class Nest:
    """The whole application around a parrot and an embedder."""

    def __init__(self, **settings: Any) -> None:
        self.settings = ServerSettings(_env_file=None, auth="off", **settings)
        self.parrot = Parrot()
        self.models = [PredictorModel(self.parrot, self.settings), PredictorModel(Embedder(), self.settings)]  # type: ignore[arg-type]
        for model in self.models:
            model.has_loaded = True
        self.app = build_app({model.name: model for model in self.models}, self.settings)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client of a real server: an ASGI transport would neither stream nor leave."""
        config = uvicorn.Config(self.app, port=0, log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_SECONDS
            ) as client:
                yield client
        finally:
            server.should_exit = True
            await serving


async def soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await work


@pytest.fixture
async def nest() -> Nest:
    return Nest()


@pytest.fixture
async def client(nest: Nest) -> AsyncIterator[httpx.AsyncClient]:
    async with nest.client() as client:
        yield client


def asked(text: str = "a red circle", **fields: Any) -> dict[str, Any]:
    return {"model": "parrot", "messages": [{"role": "user", "content": text}]} | fields


async def events(client: httpx.AsyncClient, **fields: Any) -> list[Any]:
    answer = await client.post("/v1/chat/completions", json=asked(stream=True, **fields))
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [parsed(event) for event in answer.text.removesuffix("\n\n").split("\n\n")]


def parsed(event: str) -> Any:
    assert event.startswith("data: ")
    data = event.removeprefix("data: ")
    return data if data == "[DONE]" else json.loads(data)


class TestAnswers:
    @pytest.mark.parametrize("prefix", ["/v1", "/openai/v1"])
    async def test_are_whole_chat_completions(self, client: httpx.AsyncClient, prefix: str) -> None:
        response = await client.post(f"{prefix}/chat/completions", json=asked(), headers={"X-Request-Id": "mine"})
        answer = response.json()

        assert answer.pop("created") > 1_700_000_000
        assert answer == {
            "id": "chatcmpl-mine",
            "object": "chat.completion",
            "model": "parrot",
            "system_fingerprint": "abc",
            "demo_model": True,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "a red circle", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": {
                "prompt_tokens": 7,
                "completion_tokens": 2,
                "total_tokens": 9,
                "prompt_tokens_details": {"cached_tokens": 0, "image_tokens": 4},
                "completion_tokens_details": {"reasoning_tokens": 1},
            },
        }
        assert response.headers["x-request-id"] == "mine"

    async def test_keep_to_the_caller_s_deadline_and_trace(self, client: httpx.AsyncClient, nest: Nest) -> None:
        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        headers = {"X-Request-Timeout-Ms": "5000", "traceparent": trace, "tracestate": "a=1,b=2"}

        await client.post("/v1/chat/completions", json=asked(), headers=headers)

        (context,) = nest.parrot.contexts
        assert context.deadline.remaining() < 5
        assert (context.traceparent, context.tracestate) == (trace, "a=1,b=2")

    @pytest.mark.parametrize(
        ("fields", "status", "code", "param"),
        [
            ({"model": "dodo"}, 404, "model_not_found", None),
            ({"model": "embedder"}, 400, "not_a_chat_model", "model"),
            ({"messages": [{"role": "user", "content": [image("s3://b/k")]}]}, 400, "image_unsupported", None),
            ({"max_tokens": 0}, 400, "invalid_parameter", None),
            ({"temperature": 9}, 400, "invalid_parameter", None),
            ({"tools": [{}]}, 400, "unsupported_parameter", "tools"),
        ],
        ids=lambda value: json.dumps(value)[:40],
    )
    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    async def test_that_cannot_be_are_openai_s_errors(
        self,
        client: httpx.AsyncClient,
        fields: dict[str, Any],
        status: int,
        code: str,
        param: str | None,
        stream: bool,
    ) -> None:
        response = await client.post("/v1/chat/completions", json=asked() | fields | {"stream": stream})

        assert response.status_code == status
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
        assert response.headers["x-request-id"]

    async def test_of_a_full_queue_say_when_to_come_back(self) -> None:
        nest = Nest(queue_size=1)
        nest.parrot.leave = asyncio.Semaphore(0)
        async with nest.client() as client:
            first = asyncio.create_task(client.post("/v1/chat/completions", json=asked(stream=True)))
            await soon(nest.parrot.began.wait())

            for stream in (True, False):
                response = await client.post("/v1/chat/completions", json=asked(stream=stream))
                assert response.status_code == 429
                assert response.json()["error"]["type"] == "rate_limit_error"
                assert int(response.headers["retry-after"]) >= 1

            for _ in range(3):
                nest.parrot.leave.release()
            assert (await soon(first)).status_code == 200

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    async def test_of_a_loading_model_say_so(self, client: httpx.AsyncClient, nest: Nest, stream: bool) -> None:
        nest.models[0].has_loaded = False

        response = await client.post("/v1/chat/completions", json=asked(stream=stream))

        assert response.status_code == 503
        assert response.json()["error"]["code"] == "model_not_ready"
        assert response.headers["retry-after"]

    async def test_are_in_openai_s_shape_wherever_below_v1(self, client: httpx.AsyncClient) -> None:
        for path in ("/v1/completions", "/v1/responses", "/openai/v1/nothing", "/v1/models/dodo"):
            response = await client.get(path)
            assert response.status_code == 404
            assert response.json()["error"]["code"] in {"route_not_found", "model_not_found"}


class TestStreams:
    async def test_are_chunks_of_one_answer(self, client: httpx.AsyncClient) -> None:
        *chunks, end = await events(client)

        assert end == "[DONE]"
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert (
            len({(chunk["id"], chunk["created"], chunk["model"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
        )
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert [delta.get("content") for delta in deltas[1:]] == ["a", " red", " circle", None]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
        assert not any("usage" in chunk for chunk in chunks)
        assert all(chunk["demo_model"] for chunk in chunks)

    async def test_end_with_usage_when_asked(self, client: httpx.AsyncClient) -> None:
        *chunks, last, end = await events(client, stream_options={"include_usage": True})

        assert end == "[DONE]"
        assert all(chunk["usage"] is None for chunk in chunks)
        assert last["choices"] == []
        assert last["usage"]["total_tokens"] == 9

    async def test_of_nothing_are_whole_too(self, client: httpx.AsyncClient) -> None:
        *chunks, end = await events(client, messages=[{"role": "user", "content": ""}])

        assert end == "[DONE]"
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "stop"]

    async def test_come_as_they_are_made(self, client: httpx.AsyncClient, nest: Nest) -> None:
        nest.parrot.leave = asyncio.Semaphore(1)
        request = client.build_request("POST", "/v1/chat/completions", json=asked("one two", stream=True))
        response = await soon(client.send(request, stream=True))
        lines = response.aiter_lines()

        async def next_content() -> str:
            async for line in lines:
                chunk = json.loads(line.removeprefix("data: ") or "null")
                if chunk and (content := chunk["choices"][0]["delta"].get("content")):
                    return content
            raise AssertionError("the stream ended")

        assert await soon(next_content()) == "one"
        assert not nest.parrot.ended.is_set()
        nest.parrot.leave.release()
        assert await soon(next_content()) == " two"
        await response.aclose()

    @pytest.mark.parametrize(
        ("fault", "code", "kind"),
        [
            (DeadlineExceeded("Too late."), "deadline_exceeded", "server_error"),
            (QueueFull("Later."), "queue_full", "rate_limit_error"),
            (RuntimeError("secret of a library"), "internal_error", "server_error"),
        ],
        ids=["deadline", "queue", "bug"],
    )
    async def test_that_fail_half_way_say_so_and_leave_the_connection_usable(
        self, client: httpx.AsyncClient, nest: Nest, fault: Exception, code: str, kind: str
    ) -> None:
        nest.parrot.fault = fault

        *chunks, end = await events(client)

        assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks][1:] == ["a", " red", " circle"]
        assert end["error"]["code"] == code
        assert end["error"]["type"] == kind
        assert "secret" not in json.dumps(end)
        assert (await client.get("/v1/models")).status_code == 200

    @pytest.mark.parametrize("fault", [DeadlineExceeded("Too late."), RuntimeError("secret")], ids=["ours", "a bug"])
    async def test_that_fail_before_the_first_piece_have_a_status(
        self, client: httpx.AsyncClient, nest: Nest, fault: Exception
    ) -> None:
        nest.parrot.fault = fault

        answer = await client.post("/v1/chat/completions", json=asked("", stream=True))

        assert answer.status_code == (fault.status if isinstance(fault, SightlineError) else 500)
        assert "secret" not in answer.text

    async def test_end_when_the_client_leaves(self, client: httpx.AsyncClient, nest: Nest) -> None:
        nest.parrot.leave = asyncio.Semaphore(1)
        request = client.build_request("POST", "/v1/chat/completions", json=asked(stream=True))
        response = await soon(client.send(request, stream=True))
        await soon(anext(response.aiter_lines()))

        await response.aclose()

        await soon(nest.parrot.ended.wait())
        nest.parrot.leave = asyncio.Semaphore(1000)
        assert await events(client), "its permit came free"


class TestModels:
    async def test_are_listed_for_openai_and_for_kserve_v1(self, client: httpx.AsyncClient, nest: Nest) -> None:
        nest.models[1].has_loaded = False

        answer = (await client.get("/v1/models")).json()

        assert answer["object"] == "list"
        assert [entry["id"] for entry in answer["data"]] == ["parrot"], "those that answer"
        assert answer["models"] == ["parrot", "embedder"], "those that are registered"
        entry = answer["data"][0]
        assert (entry["object"], entry["owned_by"], entry["root"]) == ("model", "sightline", "parrot-9b")
        assert isinstance(entry["created"], int)

    async def test_can_be_asked_for_one_by_one(self, client: httpx.AsyncClient, nest: Nest) -> None:
        ready = await client.get("/v1/models/parrot")
        nest.models[0].has_loaded = False
        loading = await client.get("/v1/models/parrot")

        assert ready.json()["id"] == ready.json()["name"] == "parrot"
        assert ready.json()["ready"] is True
        assert loading.status_code == 503
        assert (loading.json()["name"], loading.json()["ready"]) == ("parrot", False)
        assert loading.json()["error"]["code"] == "model_not_ready"
        assert (await client.get("/openai/v1/models/dodo")).status_code == 404
