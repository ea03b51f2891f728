"""A step behind an OpenAI-compatible URL: what is sent, what an answer or a fault means, streams, leaked reasoning."""

import asyncio
import base64
from collections.abc import AsyncIterator
from dataclasses import dataclass

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.chain import ChainOptions, ChainPolicy, ChainResult, run, stream
from sightline.engines.breaker import CircuitBreaker
from sightline.engines.dialect import StepMetadata, StepName
from sightline.engines.reasoning import Filter, final_of
from sightline.engines.remote import MAX_ANSWER_BYTES, RemoteStep, new_client
from sightline.engines.remote_openai import OpenAI, with_version
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InvalidParameter,
    OutOfMemory,
    PayloadTooLarge,
    QueueFull,
    SightlineError,
    Unavailable,
    UpstreamFailed,
)
from sightline.wire import ENHANCE_INSTRUCTIONS, Completion, ImageBytes, ModelInfo, Sampling, Turn, Usage
from tests.unit.test_remote import Answer, Behave, Call, Clock, answer, closed_port, context, serving

PNG = ImageBytes(b"\x89PNG\r\n\x1a\n and the rest")
USAGE = {"prompt_tokens": 30, "completion_tokens": 12, "completion_tokens_details": {"reasoning_tokens": 5}}


def body(call: Call) -> dict:
    return orjson.loads(call.body)


def said(content: object = "A red circle.", finish: object = "stop", **fields: object) -> bytes:
    message = {"role": "assistant", "content": content, "reasoning_content": "secret thoughts", "reasoning": "secret"}
    whole = {"model": "gpt-oss-120b", "choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    return answer(200, whole | {"usage": USAGE} | fields)


def fault(status: int, code: object = None, param: object = None, **headers: str) -> bytes:
    error = {"message": "A stranger's words.", "type": "x", "param": param, "code": code}
    return answer(status, {"error": error}, **headers)


def chunk(content: object = None, finish: object = None, **delta: object) -> dict:
    choice = {"index": 0, "delta": {"content": content} | delta, "finish_reason": finish}
    return {"model": "gpt-oss-120b", "choices": [choice]}


def events(*chunks: object, done: bool = True) -> bytes:
    data = b"".join(b"data: " + orjson.dumps(item) + b"\n\n" for item in chunks) + (
        b"data: [DONE]\n\n" if done else b""
    )
    return answer(200, data, content_type="text/event-stream")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with new_client(4) as client:
        yield client


@dataclass
class Steps:
    client: httpx.AsyncClient
    clock: Clock

    def __call__(self, url: str, step: StepName = "caption", api_key: str | None = None) -> RemoteStep:
        return RemoteStep(
            OpenAI(url, "gpt-oss-120b"), api_key, self.client,
            step=step, breaker=CircuitBreaker(self.clock), sleep=self.clock.sleep, jitter=lambda: 0.5,
        )  # fmt: skip


@pytest.fixture
def step_of(client: httpx.AsyncClient, clock: Clock) -> Steps:
    return Steps(client, clock)


async def describe(step: RemoteStep, sampling: Sampling | None = None, seconds: float = 60) -> Completion:
    return await step.describe(PNG, "Describe.", sampling or Sampling(), context(seconds))


async def enhanced(step: RemoteStep) -> list[str | Completion]:
    return [piece async for piece in step.enhance_stream("a circle", "low", Sampling(max_tokens=9), context())]


class TestBaseUrl:
    @pytest.mark.parametrize(
        ("given", "used"),
        [
            ("http://a", "http://a/v1"),
            ("http://a/", "http://a/v1"),
            ("http://a/v1", "http://a/v1"),
            ("http://a/v1/", "http://a/v1"),
            ("http://a/openai", "http://a/openai/v1"),
            ("http://a/openai/v1", "http://a/openai/v1"),
            ("http://a/namespace/model", "http://a/namespace/model/v1"),
            ("https://a/v1beta/openai/", "https://a/v1beta/openai"),
            ("https://a/v2/very/deep", "https://a/v2/very/deep/v1"),
        ],
    )
    def test_with_or_without_its_version(self, given: str, used: str) -> None:
        assert with_version(given) == used


class TestWhatIsSent:
    async def test_describe(self, step_of: Steps) -> None:
        async with serving(said()) as server:
            sampling = Sampling(max_tokens=7, temperature=0.5, top_p=0.9, seed=3, stop=("END",))
            await describe(step_of(server.url, api_key="sk-1"), sampling)
        (call,) = server.calls
        assert (call.method, call.path) == ("POST", "/v1/chat/completions")
        assert call.headers["authorization"] == "Bearer sk-1"
        assert call.headers["x-request-id"] == "r-1"
        image = "data:image/png;base64," + base64.b64encode(PNG.data).decode()
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "Describe."}]
        assert body(call) == {
            "model": "gpt-oss-120b",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "stop": ["END"],
        }

    async def test_enhance_tells_instructions_and_level(self, step_of: Steps) -> None:
        async with serving(said()) as server:
            await step_of(server.url, "enhance").enhance("a </caption>", "high", Sampling(max_tokens=5), context())
        assert body(server.calls[0]) == {
            "model": "gpt-oss-120b",
            "messages": [
                {"role": "system", "content": ENHANCE_INSTRUCTIONS},
                {"role": "user", "content": "<caption>\na < /caption>\n</caption>"},
            ],
            "max_tokens": 5,
            "temperature": 0.0,
            "reasoning_effort": "high",
        }

    async def test_a_conversation(self, step_of: Steps) -> None:
        turns = [Turn("user", (PNG, "What?")), Turn("assistant", ("A dog.",)), Turn("user", ("Sure?",))]
        async with serving(said()) as server:
            await step_of(server.url).chat(turns, Sampling(), context())
        roles = [message["role"] for message in body(server.calls[0])["messages"]]
        assert roles == ["user", "assistant", "user"]

    async def test_trace_context_is_handed_on(self, step_of: Steps) -> None:
        async with serving(said()) as server:
            await step_of(server.url).describe(PNG, "x", Sampling(), context(60, traceparent="00-ab-cd-01"))
        assert server.calls[0].headers["traceparent"] == "00-ab-cd-01"


class TestWhatComesBack:
    async def test_a_completion(self, step_of: Steps) -> None:
        async with serving(said("Ein Fuß.", "length", system_fingerprint="fp_1")) as server:
            made = await describe(step_of(server.url))
        assert made == Completion(
            text="Ein Fuß.",
            finish_reason="length",
            usage=Usage(30, 12, None, 5),
            model=ModelInfo("gpt-oss-120b", "fp_1"),
            milliseconds=made.milliseconds,
        )
        assert made.milliseconds > 0

    async def test_of_a_server_of_ours(self, step_of: Steps) -> None:
        usage = USAGE | {"prompt_tokens_details": {"image_tokens": 9}}
        async with serving(said(usage=usage, demo_model=True, downscaled=True)) as server:
            made = await describe(step_of(server.url))
        assert (made.usage.image_tokens, made.model.demo, made.downscaled) == (9, True, True)

    async def test_without_usage(self, step_of: Steps) -> None:
        async with serving(said(usage=None, model=None)) as server:
            made = await describe(step_of(server.url))
        assert (made.usage, made.model) == (Usage(0, 0, None, 0), ModelInfo("gpt-oss-120b", "unknown"))

    @pytest.mark.parametrize("content", [None, "", "  ", "<think>hm", "<|channel|>analysis<|message|>hm"])
    async def test_no_answer_is_no_final_answer(self, step_of: Steps, content: object) -> None:
        async with serving(said(content, "length")) as server:
            with pytest.raises(InvalidParameter, match="length") as raised:
                await describe(step_of(server.url))
        assert raised.value.code == "no_final_answer"
        assert len(server.calls) == 1

    async def test_a_content_filter(self, step_of: Steps) -> None:
        async with serving(said("A", "content_filter")) as server:
            with pytest.raises(InvalidParameter) as raised:
                await describe(step_of(server.url))
        assert raised.value.code == "content_refused"

    @pytest.mark.parametrize(
        "nonsense",
        [
            pytest.param(answer(200, b"<html>"), id="HTML"),
            pytest.param(answer(200, b"[]"), id="a list"),
            pytest.param(answer(200, {"choices": []}), id="no choice"),
            pytest.param(answer(200, {"choices": [{}]}), id="no message"),
            pytest.param(answer(200, {"choices": ["x"]}), id="odd choice"),
            pytest.param(said(finish="tired"), id="unknown finish reason"),
            pytest.param(said(usage={"prompt_tokens": -1}), id="negative tokens"),
            pytest.param(said(usage={"prompt_tokens": "many"}), id="tokens are text"),
            pytest.param(answer(200, b"x" * (MAX_ANSWER_BYTES + 1)), id="too large"),
            pytest.param(answer(200, b"[" * 1010), id="deep"),
        ],
    )
    async def test_nonsense_is_502(self, step_of: Steps, nonsense: bytes) -> None:
        async with serving(nonsense) as server:
            with pytest.raises(UpstreamFailed, match="makes no sense"):
                await describe(step_of(server.url))
        assert len(server.calls) == 1


class TestFaults:
    @pytest.mark.parametrize(
        ("reply", "kind", "code"),
        [
            pytest.param(fault(401, "invalid_api_key"), UpstreamFailed, "caption_step_misconfigured", id="bad key"),
            pytest.param(fault(403), UpstreamFailed, "caption_step_misconfigured", id="key of another"),
            pytest.param(fault(404, "model_not_found"), UpstreamFailed, "caption_step_misconfigured", id="no model"),
            pytest.param(fault(400, "image_parse_error"), BadRequest, "image_parse_error", id="a bad image"),
            pytest.param(fault(400, 400), UpstreamFailed, "caption_step_refused", id="400 of vLLM"),
            pytest.param(fault(400, "context_length_exceeded"), InvalidParameter, "prompt_too_long", id="too long"),
            pytest.param(fault(400, "content_policy_violation"), InvalidParameter, "content_refused", id="filtered"),
            pytest.param(fault(400, "no_final_answer"), InvalidParameter, "no_final_answer", id="no answer, ours"),
            pytest.param(fault(413), PayloadTooLarge, "payload_too_large", id="413"),
            pytest.param(fault(422), InvalidParameter, "invalid_parameter", id="422"),
            pytest.param(fault(507, "out_of_memory"), OutOfMemory, "out_of_memory", id="does not fit"),
            pytest.param(fault(500, "server_error"), UpstreamFailed, "upstream_failed", id="500"),
            pytest.param(answer(504, b""), UpstreamFailed, "upstream_failed", id="504"),
            pytest.param(fault(503), Unavailable, "caption_step_unavailable", id="503"),
        ],
    )
    async def test_status_and_code(self, step_of: Steps, reply: bytes, kind: type[SightlineError], code: str) -> None:
        async with serving(reply) as server:
            with pytest.raises(SightlineError) as raised:
                await describe(step_of(server.url))
        assert (type(raised.value), raised.value.code) == (kind, code)
        assert "stranger" not in raised.value.message

    async def test_too_many_requests_tells_when_to_come_back(self, step_of: Steps) -> None:
        async with serving(fault(429, "rate_limit_exceeded", retry_after="17.5")) as server:
            with pytest.raises(QueueFull) as raised:
                await describe(step_of(server.url))
        assert (raised.value.retry_after, raised.value.code) == (17.5, "rate_limit_exceeded")
        assert len(server.calls) == 1

    async def test_a_short_absence_is_waited_for(self, step_of: Steps, clock: Clock) -> None:
        async with serving(fault(503), answer(502, b"<html>"), said()) as server:
            assert (await describe(step_of(server.url))).text == "A red circle."
        assert clock.pauses == pytest.approx([0.1, 0.2])

    async def test_nobody_listens(self, step_of: Steps) -> None:
        with pytest.raises(Unavailable):
            await describe(step_of(await closed_port()))

    async def test_too_slow(self, step_of: Steps) -> None:
        async with serving(None) as server:
            with pytest.raises(DeadlineExceeded):
                await describe(step_of(server.url), seconds=0.3)

    @pytest.mark.parametrize(
        ("reply", "state"),
        [
            (fault(401), "closed"),
            (fault(400), "closed"),
            (fault(429, retry_after="9"), "closed"),
            (said(""), "closed"),
            (fault(500), "open"),
            (fault(503, retry_after="9"), "open"),
            (b"", "open"),
        ],
        ids=["bad key", "refused", "busy", "no answer", "500", "503", "killed"],
    )
    async def test_what_the_breaker_counts(self, step_of: Steps, reply: bytes, state: str) -> None:
        async with serving(reply) as server:
            step = step_of(server.url)
            for _ in range(5):
                with pytest.raises(SightlineError):
                    await describe(step)
        assert step.breaker.state == state


class TestLearning:
    """Servers refuse optional parameters by name; they are asked again without, and never with it again."""

    def picky(self, **names: str) -> Behave:
        """Refuses the named parameters with the code given for each."""

        def behave(call: Call) -> bytes:
            for name, code in names.items():
                if name in body(call):
                    return fault(400, code, name)
            return said()

        return behave

    async def test_max_tokens_has_a_newer_name(self, step_of: Steps) -> None:
        async with serving(self.picky(max_tokens="unsupported_parameter")) as server:
            step = step_of(server.url)
            await describe(step, Sampling(max_tokens=7))
            await describe(step, Sampling(max_tokens=8))
        assert [body(call).get("max_completion_tokens") for call in server.calls] == [None, 7, 8]

    async def test_several_lessons_in_one_call(self, step_of: Steps) -> None:
        picky = self.picky(
            max_tokens="unsupported_parameter", temperature="unsupported_value", seed="unknown_parameter"
        )
        async with serving(picky) as server:
            await describe(step_of(server.url), Sampling(temperature=0.5, seed=1))
        assert len(server.calls) == 4
        assert not {"max_tokens", "temperature", "seed"} & set(body(server.calls[-1]))

    @pytest.mark.parametrize("name", ["messages", "model", "max_completion_tokens", None])
    async def test_what_cannot_be_left_out_is_refused(self, step_of: Steps, name: str | None) -> None:
        async with serving(fault(400, "unsupported_parameter", name)) as server:
            with pytest.raises(UpstreamFailed) as raised:
                await describe(step_of(server.url))
        assert raised.value.code == "caption_step_refused"
        assert len(server.calls) == 1

    async def test_a_server_that_never_learns_is_left(self, step_of: Steps) -> None:
        async with serving(fault(400, "unsupported_parameter", "temperature")) as server:
            with pytest.raises(UpstreamFailed):
                await describe(step_of(server.url))
        assert len(server.calls) == 2

    async def test_the_words_of_a_refusal_are_logged(self, step_of: Steps, caplog: pytest.LogCaptureFixture) -> None:
        async with serving(fault(400, "weird")) as server:
            with pytest.raises(UpstreamFailed):
                await describe(step_of(server.url))
        assert "A stranger's words." in caplog.text


class TestStreams:
    async def test_pieces_then_the_whole(self, step_of: Steps) -> None:
        chunks = [chunk("", role="assistant"), chunk("A red "), chunk("circle."), chunk(None, "stop")]
        usage = {"choices": [], "usage": USAGE}
        async with serving(events(*chunks, usage)) as server:
            *pieces, whole = await enhanced(step_of(server.url, "enhance"))
        assert pieces == ["A red ", "circle."]
        assert isinstance(whole, Completion)
        assert (whole.text, whole.finish_reason) == ("A red circle.", "stop")
        assert whole.usage == Usage(30, 12, None, 5)
        sent = body(server.calls[0])
        assert (sent["stream"], sent["stream_options"]) == (True, {"include_usage": True})

    async def test_reasoning_is_never_shown(self, step_of: Steps) -> None:
        thoughts = [chunk(None, reasoning_content="secret"), chunk(None, reasoning="secret")]
        leak = [chunk("<|channel|>"), chunk("analysis<|message|>secret<|end|>"), chunk("<|start|>assistant")]
        final = [chunk("<|channel|>final<|message|>A "), chunk("circle.<|return|>"), chunk(None, "stop")]
        async with serving(events(*thoughts, *leak, *final)) as server:
            (whole,) = await enhanced(step_of(server.url, "enhance"))
        assert isinstance(whole, Completion)
        assert whole.text == "A circle."

    @pytest.mark.parametrize(
        "reply",
        [
            pytest.param(events(chunk("A red"), done=False), id="ends in the middle"),
            pytest.param(events(chunk("A red"), {"error": {"message": "secret"}}), id="an error in the stream"),
            pytest.param(events(chunk("A red"), "chunk"), id="not a chunk"),
            pytest.param(events(chunk("A red"), chunk(None, "tired")), id="unknown finish reason"),
            pytest.param(
                b"HTTP/1.1 200 OK\r\ncontent-length: 900\r\nconnection: close\r\n\r\n"
                + b"data: " + orjson.dumps(chunk("A red")) + b"\n\n",
                id="connection lost",
            ),
        ],
    )  # fmt: skip
    async def test_a_broken_stream_is_502_and_never_repeated(self, step_of: Steps, reply: bytes) -> None:
        async with serving(reply) as server:
            pieces = step_of(server.url, "enhance").enhance_stream("a", "low", Sampling(), context())
            assert await anext(pieces) == "A red"
            with pytest.raises(UpstreamFailed):
                await anext(pieces)
        assert len(server.calls) == 1

    async def test_what_goes_wrong_before_a_piece_is_like_a_call(self, step_of: Steps, clock: Clock) -> None:
        async with serving(fault(503), fault(400, "unsupported_parameter", "stream_options"), events(
            chunk("A."), chunk(None, "stop"))) as server:  # fmt: skip
            *_, whole = await enhanced(step_of(server.url, "enhance"))
        assert isinstance(whole, Completion)
        assert "stream_options" not in body(server.calls[2])
        assert clock.pauses == pytest.approx([0.1])

    async def test_a_full_queue(self, step_of: Steps) -> None:
        async with serving(fault(429, retry_after="3")) as server:
            with pytest.raises(QueueFull):
                await enhanced(step_of(server.url, "enhance"))

    async def test_too_slow_after_a_piece(self, step_of: Steps) -> None:
        part = b"data: " + orjson.dumps(chunk("A red")) + b"\n\n"
        begun = b"HTTP/1.1 200 OK\r\ncontent-length: 9000\r\n\r\n" + part
        async with serving(begun) as server:
            pieces = step_of(server.url, "enhance").enhance_stream("a", "low", Sampling(), context(0.5))
            assert await anext(pieces) == "A red"
            with pytest.raises(DeadlineExceeded):
                await anext(pieces)

    async def test_closing_it_closes_the_connection(self, step_of: Steps) -> None:
        async with serving(None) as server:
            step = step_of(server.url, "enhance")
            pieces = step.enhance_stream("a", "low", Sampling(), context())
            first = asyncio.ensure_future(anext(pieces))
            await server.has_call.wait()
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await pieces.aclose()
            await asyncio.wait_for(server.calls[0].has_left.wait(), 5)
        assert step.breaker.state == "closed"

    async def test_a_dead_server_opens_the_breaker(self, step_of: Steps) -> None:
        step = step_of(await closed_port(), "enhance")
        for _ in range(2):
            with pytest.raises(Unavailable):
                await enhanced(step)
        assert step.breaker.state == "open"
        with pytest.raises(Unavailable):
            await enhanced(step)

    async def test_too_much_is_refused(self, step_of: Steps) -> None:
        async with serving(answer(200, b"data: " + b"x" * (MAX_ANSWER_BYTES + 1))) as server:
            with pytest.raises(UpstreamFailed):
                await enhanced(step_of(server.url, "enhance"))


class TestReady:
    @pytest.mark.parametrize(
        ("reply", "is_ready"),
        [
            pytest.param(answer(200, {"data": [{"id": "other"}, {"id": "gpt-oss-120b"}]}), True, id="listed"),
            pytest.param(answer(200, {"data": [{"id": "other"}]}), False, id="not listed"),
            pytest.param(answer(200, {"data": "x"}), False, id="odd list"),
            pytest.param(answer(404, b""), True, id="a server without a list"),
            pytest.param(fault(401), False, id="bad key"),
            pytest.param(answer(503, b""), False, id="503"),
            pytest.param(answer(200, b"<html>"), False, id="somebody else"),
            pytest.param(b"", False, id="hangs up"),
        ],
    )
    async def test_ready(self, step_of: Steps, reply: Answer, is_ready: bool) -> None:
        async with serving(reply) as server:
            assert await step_of(server.url, api_key="k").is_ready(5) is is_ready
        assert (server.calls[0].method, server.calls[0].path) == ("GET", "/v1/models")
        assert server.calls[0].headers["authorization"] == "Bearer k"

    async def test_metadata_is_what_is_known(self, step_of: Steps) -> None:
        async with serving(answer(200, {"data": []})) as server:
            assert await step_of(server.url).metadata() == StepMetadata(model="gpt-oss-120b", backend="openai")


class TestChain:
    """The chain with both steps behind OpenAI's routes."""

    async def chain(self, step_of: Steps, enhancer: bytes, **options: object) -> ChainResult:
        async with serving(said("a red circle")) as describer, serving(enhancer) as enhancing:
            return await run(
                PNG, ChainOptions(**options), context(),  # type: ignore[arg-type]
                caption=step_of(describer.url).describe,
                enhance=step_of(enhancing.url, "enhance").enhance,
                policy=ChainPolicy(),
            )  # fmt: skip

    async def test_both_answer(self, step_of: Steps) -> None:
        result = await self.chain(step_of, said("A red circle rests."))
        assert (result.caption, result.original_caption) == ("A red circle rests.", "a red circle.")
        assert result.steps[0].image_tokens is None

    @pytest.mark.parametrize(
        ("reply", "code"),
        [
            (said("", "length"), "no_final_answer"),
            (fault(401), "enhancer_failed"),
            (fault(429, retry_after="3"), "enhancer_unavailable"),
            (b"", "enhancer_unavailable"),
        ],
        ids=["out of tokens", "bad key", "busy", "killed"],
    )
    async def test_a_bad_enhancer(self, step_of: Steps, reply: bytes, code: str) -> None:
        result = await self.chain(step_of, reply)
        assert result.enhancement_error is not None
        assert result.enhancement_error.code == code

    async def test_in_pieces(self, step_of: Steps) -> None:
        reply = events(chunk("A red circle "), chunk("rests."), chunk(None, "stop"))
        async with serving(said("a red circle")) as describer, serving(reply) as enhancing:
            parts = [
                part
                async for part in stream(
                    PNG, ChainOptions(), context(),
                    caption=step_of(describer.url).describe,
                    enhance=step_of(enhancing.url, "enhance").enhance_stream,
                    policy=ChainPolicy(),
                )
            ]  # fmt: skip
        assert parts[1:3] == ["A red circle ", "rests."]
        assert isinstance(parts[3], ChainResult)
        assert parts[3].caption == "A red circle rests."


LEAKS: list[tuple[str, str]] = [
    ("A dog runs.", "A dog runs."),
    ("  A dog.\n", "A dog."),
    ("<|channel|>analysis<|message|>We must<|end|><|start|>assistant<|channel|>final<|message|>A dog.", "A dog."),
    ("<|channel|>final<|message|>A dog.<|end|><|channel|>final<|message|>A cat.", "A dog."),
    ("<|channel|>final<|message|>A dog.", "A dog."),
    ("<|channel|>final <|constrain|>json<|message|>A dog.<|end|>", "A dog."),
    ("<|channel|>analysis<|message|>We must", ""),
    ("<|channel|>commentary<|message|>x<|end|>", ""),
    ("A dog.<|return|>", "A dog."),
    ("analysisWe must look.assistantfinalA dog.", "A dog."),
    ("assistantanalysisWe.assistantfinalA dog.", "A dog."),
    ("analysisWe must look.", ""),
    ("analysisWe.assistantcommentaryHm.assistantfinalA dog.", "A dog."),
    ("finalA dog.", "A dog."),
    ("<think>We must.</think>\nA dog.", "A dog."),
    ("We must.</think>A dog.", "A dog."),
    ("<think>We must", ""),
    ("analysis of a dog, drawn in ink.", "analysis of a dog, drawn in ink."),
    ("final race of the season", "final race of the season"),
    ("assistant: A dog.", "assistant: A dog."),
]  # fmt: skip

TOLD_APART = [(text, final) for text, final in LEAKS if not text.startswith("We must.</think>")]
"""Nothing tells the beginning of the other one from an answer."""


class TestLeakedReasoning:
    @pytest.mark.parametrize(("text", "final"), LEAKS, ids=[text[:30] for text, _ in LEAKS])
    def test_is_taken_out(self, text: str, final: str) -> None:
        assert final_of(text) == final

    @pytest.mark.parametrize(("text", "final"), TOLD_APART, ids=[text[:30] for text, _ in TOLD_APART])
    @pytest.mark.parametrize("size", [1, 3, 1000])
    def test_is_never_streamed(self, text: str, final: str, size: int) -> None:
        filter_ = Filter()
        shown = "".join(filter_.feed(text[at : at + size]) for at in range(0, len(text), size))
        assert final.startswith(shown.strip())

    @given(st.text(max_size=60), st.integers(1, 9))
    def test_pieces_are_the_text_or_its_beginning(self, text: str, size: int) -> None:
        filter_ = Filter()
        shown = "".join(filter_.feed(text[at : at + size]) for at in range(0, len(text), size))
        assert text.lstrip().startswith(shown)
        assert filter_.text == text

    def test_an_ordinary_answer_is_let_through_at_once(self) -> None:
        filter_ = Filter()
        assert [filter_.feed(piece) for piece in ("T", "he dog", " runs.")] == ["T", "he dog", " runs."]
