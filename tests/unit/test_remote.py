"""The client of a step against real servers on loopback: what is sent, what a fault means, retries, breaker, cancel."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import httpx
import orjson
import pytest

from sightline import v2
from sightline.chain import ChainOptions, ChainPolicy, ChainResult, run
from sightline.engines.breaker import CircuitBreaker, Outcome
from sightline.engines.dialect import StepMetadata, StepName
from sightline.engines.remote import MAX_ANSWER_BYTES, RemoteStep, new_client
from sightline.engines.remote_v2 import V2
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InternalError,
    InvalidParameter,
    OutOfMemory,
    PayloadTooLarge,
    QueueFull,
    SightlineError,
    Unavailable,
    UpstreamFailed,
)
from sightline.wire import Completion, Context, Deadline, ImageBytes, ModelInfo, Sampling, Usage

IMAGE = ImageBytes(b"\x89PNG\x00\xff")
SAID: dict[str, v2.Scalar] = {
    "model": "sightline-tiny-describe",
    "model_revision": "0123456789ab",
    "demo_model": True,
    "finish_reason": "stop",
    "prompt_tokens": 19,
    "completion_tokens": 9,
    "image_tokens": 9,
    "reasoning_tokens": 0,
    "milliseconds": 12.5,
}


@dataclass
class Call:
    """One HTTP request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    has_left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the client closes the connection before the answer."""

    @property
    def v2(self) -> v2.InferRequest:
        return v2.parse_request(self.body, self.headers.get(v2.HEADER_LENGTH))


Answer = bytes | None
"""Raw bytes of an HTTP answer; b"" closes the connection without one; None never answers."""
Behave = Callable[[Call], Answer]


def answer(status: int, body: object = b"", **headers: str) -> bytes:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = [f"HTTP/1.1 {status} X", f"content-length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + content


def said(text: str = "a red circle", **changes: object) -> bytes:
    parameters = {name: value for name, value in (SAID | changes).items() if value is not None}
    output = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}
    return answer(200, {"model_name": "describe", "outputs": [output], "parameters": parameters})


def fault(status: int, code: str = "some_code", error: str = "A sentence.", **headers: str) -> bytes:
    return answer(status, {"error": error, "code": code}, **headers)


class Server:
    """A model server on loopback that does as it is told, request by request; the last word is repeated."""

    def __init__(self, *behaviours: Behave | Answer) -> None:
        self.behaviours = list(behaviours)
        self.calls: list[Call] = []
        self.has_call = asyncio.Event()
        self.url = ""
        self._connections: list[asyncio.Task[None]] = []

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.append(asyncio.create_task(self._connection(reader, writer)))

    async def close(self) -> None:
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while True:
                    await self._one(await reader.readuntil(b"\r\n\r\n"), reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _one(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        call = Call(method, path, headers, body)
        self.calls.append(call)
        behaviour = self.behaviours.pop(0) if len(self.behaviours) > 1 else self.behaviours[0]
        self.has_call.set()
        answered = behaviour(call) if callable(behaviour) else behaviour
        if answered is None:
            await reader.read()
            call.has_left.set()
        if not answered:
            raise ConnectionError
        writer.write(answered)
        await writer.drain()
        if b"connection: close" in answered:
            raise ConnectionError


@asynccontextmanager
async def serving(*behaviours: Behave | Answer) -> AsyncIterator[Server]:
    server = Server(*behaviours)
    listening = await asyncio.start_server(server.accept, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listening.close()
        await server.close()
        await listening.wait_closed()


class Clock:
    """Seconds that pass only when somebody sleeps or says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with new_client(4) as client:
        yield client


@pytest.fixture
def step_of(client: httpx.AsyncClient, clock: Clock) -> Callable[..., RemoteStep]:
    def build(url: str, step: StepName = "caption", api_key: str | None = None) -> RemoteStep:
        return RemoteStep(
            V2(url, "describe"),
            api_key,
            client,
            step=step,
            breaker=CircuitBreaker(clock),
            sleep=clock.sleep,
            jitter=lambda: 0.5,
        )

    return build


StepOf = Callable[..., RemoteStep]


def context(seconds: float = 60, traceparent: str | None = None) -> Context:
    return Context("r-1", Deadline.after(seconds), traceparent=traceparent)


def describe(step: RemoteStep, seconds: float = 60) -> Awaitable[Completion]:
    return step.describe(IMAGE, "Describe.", Sampling(), context(seconds))


async def closed_port() -> str:
    """An address where nobody listens."""
    async with serving(b"") as server:
        return server.url


class TestWhatIsSent:
    async def test_describe(self, step_of: StepOf) -> None:
        async with serving(said()) as server:
            sampling = Sampling(max_tokens=7, temperature=0.5, top_p=0.9, seed=3)
            await step_of(server.url + "/").describe(IMAGE, "Describe.", sampling, context())
        (call,) = server.calls
        assert (call.method, call.path) == ("POST", "/v2/models/describe/infer")
        image, prompt = call.v2.inputs
        assert (image.name, image.datatype, image.shape, image.data) == ("image", "BYTES", (1,), (IMAGE.data,))
        assert (prompt.name, prompt.shape, prompt.data) == ("prompt", (1,), (b"Describe.",))
        assert call.v2.parameters == {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3}
        assert call.v2.id == "r-1"

    async def test_describe_without_a_prompt_sends_none(self, step_of: StepOf) -> None:
        async with serving(said()) as server:
            await step_of(server.url).describe(IMAGE, None, Sampling(), context())
        assert [tensor.name for tensor in server.calls[0].v2.inputs] == ["image"]

    async def test_enhance(self, step_of: StepOf) -> None:
        async with serving(said()) as server:
            await step_of(server.url, "enhance").enhance("ein Fuß", "high", Sampling(max_tokens=5), context())
        request = server.calls[0].v2
        assert [(tensor.name, tensor.data) for tensor in request.inputs] == [("text", ("ein Fuß".encode(),))]
        assert request.parameters == {"max_tokens": 5, "temperature": 0.0, "top_p": 1.0, "reasoning_level": "high"}

    async def test_headers(self, step_of: StepOf) -> None:
        async with serving(said()) as server:
            step = step_of(server.url, api_key="k3y")
            await step.describe(IMAGE, None, Sampling(), context(60, traceparent="00-ab-cd-01"))
        headers = server.calls[0].headers
        assert headers["x-request-id"] == "r-1"
        assert 50_000 < int(headers["x-request-timeout-ms"]) <= 60_000
        assert headers["traceparent"] == "00-ab-cd-01"
        assert headers["x-api-key"] == "k3y"
        assert headers["accept-encoding"] == "identity"

    async def test_a_batch_is_one_for_the_steps_too(self, step_of: StepOf) -> None:
        async with serving(said()) as server:
            step = step_of(server.url)
            await step.describe(IMAGE, None, Sampling(), replace(context(), is_batch=True))
            await step.describe(IMAGE, None, Sampling(), context())
        assert [call.headers.get("x-priority") for call in server.calls] == ["batch", None]

    async def test_headers_that_there_is_nothing_for_are_left_out(self, step_of: StepOf) -> None:
        async with serving(said()) as server:
            await describe(step_of(server.url))
        assert not {"traceparent", "x-api-key"} & set(server.calls[0].headers)

    async def test_an_odd_request_id_does_not_fail_the_call(self, step_of: StepOf) -> None:
        async with serving(said()) as server:
            odd = Context("é\r\nx: y", Deadline.after(60))
            await step_of(server.url).describe(IMAGE, None, Sampling(), odd)
        assert server.calls[0].headers["x-request-id"] == "???x:?y"

    async def test_proxies_of_the_environment_are_ignored(
        self, step_of: StepOf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", await closed_port())
        async with serving(said()) as server, new_client(1) as client:
            await RemoteStep(V2(server.url, "m"), None, client).describe(IMAGE, None, Sampling(), context())
        assert len(server.calls) == 1


class TestWhatComesBack:
    async def test_a_completion(self, step_of: StepOf) -> None:
        async with serving(said("ein Fuß", reasoning_tokens=4, finish_reason="length")) as server:
            assert await describe(step_of(server.url)) == Completion(
                text="ein Fuß",
                finish_reason="length",
                usage=Usage(19, 9, 9, 4),
                model=ModelInfo("sightline-tiny-describe", "0123456789ab", demo=True),
                milliseconds=12.5,
            )

    async def test_a_real_model_says_nothing_of_demo(self, step_of: StepOf) -> None:
        async with serving(said(demo_model=None, image_tokens=None)) as server:
            completion = await describe(step_of(server.url))
        assert not completion.model.demo
        assert completion.usage.image_tokens == 0

    @pytest.mark.parametrize(
        "nonsense",
        [
            pytest.param(answer(200, b"<html>hello</html>"), id="HTML"),
            pytest.param(answer(200, {"predictions": ["x"]}), id="another protocol"),
            pytest.param(answer(200, b"[" * 1010), id="deep"),
            pytest.param(said(model=None), id="no model"),
            pytest.param(said(model_revision=None), id="no revision"),
            pytest.param(said(finish_reason="tired"), id="unknown finish reason"),
            pytest.param(said(image_tokens=-1), id="negative tokens"),
            pytest.param(said(image_tokens=True), id="tokens are true"),
            pytest.param(said(milliseconds="soon"), id="milliseconds are text"),
            pytest.param(answer(200, {"outputs": [{"name": "t", "datatype": [], "shape": []}]}), id="odd tensor"),
            pytest.param(
                answer(200, {"outputs": [{"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}]}),
                id="two texts",
            ),
            pytest.param(
                answer(200, {"outputs": [{"name": "other", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}),
                id="another output",
            ),
            pytest.param(answer(200, b"{}", inference_header_content_length="9"), id="header beyond the body"),
            pytest.param(answer(200, b"x" * (MAX_ANSWER_BYTES + 1)), id="too large"),
            pytest.param(
                b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 9\r\n\r\nhalf", id="ends in the middle"
            ),
            pytest.param(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\nno", id="gzip"),
            pytest.param(answer(301, b"", location="http://127.0.0.1/"), id="redirect"),
            pytest.param(answer(418, b"teapot"), id="unknown status"),
        ],
    )
    async def test_nonsense_is_502_and_never_repeated(self, step_of: StepOf, nonsense: bytes) -> None:
        def once(_: Call) -> bytes:
            return nonsense

        async with serving(once) as server:
            task = asyncio.ensure_future(describe(step_of(server.url)))
            await server.has_call.wait()
            with pytest.raises(UpstreamFailed, match="makes no sense"):
                await asyncio.wait_for(task, 5)
        assert len(server.calls) == 1


class TestFaults:
    @pytest.mark.parametrize(
        ("reply", "kind", "code", "message"),
        [
            pytest.param(fault(400, "truncated_image"), BadRequest, "truncated_image", "A sentence.", id="400"),
            pytest.param(fault(413), PayloadTooLarge, "some_code", "A sentence.", id="413"),
            pytest.param(fault(422), InvalidParameter, "some_code", "A sentence.", id="422"),
            pytest.param(fault(500), InternalError, "some_code", "A sentence.", id="500"),
            pytest.param(fault(502), UpstreamFailed, "some_code", "A sentence.", id="502 of ours"),
            pytest.param(fault(503, "model_not_ready"), Unavailable, "model_not_ready", "A sentence.", id="503"),
            pytest.param(fault(504), DeadlineExceeded, "some_code", "A sentence.", id="504"),
            pytest.param(fault(507), OutOfMemory, "some_code", "A sentence.", id="507"),
            pytest.param(
                answer(413, b"<html>"), PayloadTooLarge, "payload_too_large",
                "The caption step refused the request.", id="413 of a proxy",
            ),
            pytest.param(
                answer(400, {"error": "secret"}), BadRequest, "invalid_request",
                "The caption step refused the request.", id="no code, no words",
            ),
            pytest.param(
                fault(400, "Not A Code", "secret"), BadRequest, "invalid_request",
                "The caption step refused the request.", id="a code that is none of ours",
            ),
            pytest.param(
                answer(500, b"Traceback"), UpstreamFailed, "upstream_failed",
                "The caption step gave an answer that makes no sense.", id="500 of a stranger",
            ),
            pytest.param(
                answer(503, b"no healthy upstream"), Unavailable, "caption_step_unavailable",
                "The caption step cannot be reached now.", id="503 of a proxy",
            ),
            pytest.param(
                fault(403, "invalid_api_key", "Invalid API key"), UpstreamFailed, "caption_step_misconfigured",
                "The caption step refuses this gateway's key.", id="our key is not the client's fault",
            ),
            pytest.param(
                fault(404, "not_found"), UpstreamFailed, "caption_step_misconfigured",
                "The caption step does not know this gateway's model name.", id="nor is the model name",
            ),
        ],
    )  # fmt: skip
    async def test_status_code_and_sentence(
        self, step_of: StepOf, reply: bytes, kind: type[SightlineError], code: str, message: str
    ) -> None:
        async with serving(reply) as server:
            with pytest.raises(SightlineError) as raised:
                await describe(step_of(server.url))
        assert (type(raised.value), raised.value.code, raised.value.message) == (kind, code, message)

    @pytest.mark.parametrize(
        ("header", "seconds"),
        [("7", 7.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 1.0), (None, 1.0)],
        ids=["seconds", "a date", "absent"],
    )
    async def test_a_full_queue_is_passed_on(self, step_of: StepOf, header: str | None, seconds: float) -> None:
        headers = {"retry_after": header} if header else {}
        async with serving(fault(429, "queue_full", **headers)) as server:
            with pytest.raises(QueueFull) as raised:
                await describe(step_of(server.url))
        assert raised.value.retry_after == seconds
        assert len(server.calls) == 1

    async def test_nobody_listens(self, step_of: StepOf, clock: Clock) -> None:
        with pytest.raises(Unavailable) as raised:
            await describe(step_of(await closed_port()))
        assert raised.value.code == "caption_step_unavailable"
        assert clock.pauses == pytest.approx([0.1, 0.2])

    async def test_killed_while_it_thinks(self, step_of: StepOf) -> None:
        async with serving(b"") as server:
            with pytest.raises(Unavailable):
                await describe(step_of(server.url))
        assert len(server.calls) == 1

    async def test_too_slow(self, step_of: StepOf) -> None:
        async with serving(None) as server:
            with pytest.raises(DeadlineExceeded):
                await describe(step_of(server.url), seconds=0.5)
            await asyncio.wait_for(server.calls[0].has_left.wait(), 5)

    async def test_a_deadline_already_past_sends_nothing(self, step_of: StepOf) -> None:
        async with serving(said()) as server:
            with pytest.raises(DeadlineExceeded):
                await describe(step_of(server.url), seconds=-1)
        assert not server.calls


class TestRetries:
    @pytest.mark.parametrize(
        "first",
        [
            pytest.param(fault(503, "model_not_ready"), id="503"),
            pytest.param(answer(502, b"<html>bad gateway"), id="502 of a proxy"),
            pytest.param(fault(503, retry_after="1"), id="503 with a short Retry-After"),
        ],
    )
    async def test_turned_away_then_answered(self, step_of: StepOf, first: bytes) -> None:
        async with serving(first, said("a star")) as server:
            assert (await describe(step_of(server.url))).text == "a star"
        assert len(server.calls) == 2

    async def test_at_most_twice(self, step_of: StepOf, clock: Clock) -> None:
        async with serving(fault(503)) as server:
            with pytest.raises(Unavailable):
                await describe(step_of(server.url))
        assert len(server.calls) == 3
        assert clock.pauses == pytest.approx([0.1, 0.2])

    @pytest.mark.parametrize("status", [400, 422, 429, 500, 502, 504, 507])
    async def test_an_answer_of_ours_is_never_repeated(self, step_of: StepOf, status: int) -> None:
        async with serving(fault(status)) as server:
            with pytest.raises(SightlineError):
                await describe(step_of(server.url))
        assert len(server.calls) == 1

    async def test_a_long_retry_after_is_the_callers_to_wait(self, step_of: StepOf) -> None:
        async with serving(fault(503, retry_after="30")) as server:
            with pytest.raises(Unavailable) as raised:
                await describe(step_of(server.url))
        assert raised.value.retry_after == 30
        assert len(server.calls) == 1

    async def test_no_time_for_the_pause(self, step_of: StepOf, clock: Clock) -> None:
        async with serving(fault(503, retry_after="1")) as server:
            with pytest.raises(Unavailable):
                await describe(step_of(server.url), seconds=0.9)
        assert clock.pauses == []
        assert len(server.calls) == 1


class TestBreaker:
    def end(self, breaker: CircuitBreaker, outcome: Outcome) -> None:
        permit = breaker.admit()
        assert permit is not None
        breaker.record(permit, outcome)

    def opened(self, clock: Clock) -> CircuitBreaker:
        breaker = CircuitBreaker(clock)
        for _ in range(5):
            self.end(breaker, "failed")
        return breaker

    def test_opens_after_five_in_a_row(self, clock: Clock) -> None:
        breaker = CircuitBreaker(clock)
        for _ in range(5):
            assert breaker.state == "closed"
            self.end(breaker, "failed")
        assert (breaker.state, breaker.admit(), breaker.retry_after()) == ("open", None, 5.0)

    @pytest.mark.parametrize(("between", "state"), [("answered", "closed"), ("abandoned", "open")])
    def test_only_an_answer_breaks_the_row(self, clock: Clock, between: Outcome, state: str) -> None:
        breaker = CircuitBreaker(clock)
        for outcome in ("failed", "failed", "failed", "failed", between, "failed"):
            self.end(breaker, outcome)
        assert breaker.state == state

    def test_half_open_lets_one_through(self, clock: Clock) -> None:
        breaker = self.opened(clock)
        clock.now += 5
        assert breaker.state == "half-open"
        assert breaker.admit() is not None
        assert breaker.admit() is None

    def test_a_good_probe_closes(self, clock: Clock) -> None:
        breaker = self.opened(clock)
        clock.now += 5
        self.end(breaker, "answered")
        assert (breaker.state, breaker.retry_after()) == ("closed", 0.0)
        for _ in range(4):
            self.end(breaker, "failed")
        assert breaker.state == "closed"

    def test_a_bad_probe_opens_again(self, clock: Clock) -> None:
        breaker = self.opened(clock)
        clock.now += 5
        self.end(breaker, "failed")
        assert (breaker.state, breaker.retry_after()) == ("open", 5.0)

    def test_an_abandoned_probe_frees_its_place(self, clock: Clock) -> None:
        breaker = self.opened(clock)
        clock.now += 5
        self.end(breaker, "abandoned")
        assert breaker.admit() is not None

    @pytest.mark.parametrize("outcome", ["answered", "failed", "abandoned"])
    def test_stragglers_from_before_say_nothing(self, clock: Clock, outcome: Outcome) -> None:
        breaker = CircuitBreaker(clock)
        straggler = breaker.admit()
        assert straggler is not None
        for _ in range(5):
            self.end(breaker, "failed")
        clock.now += 5
        assert breaker.admit() is not None
        breaker.record(straggler, outcome)
        assert (breaker.state, breaker.admit()) == ("half-open", None)

    async def test_a_dead_step_is_left_alone(self, step_of: StepOf, clock: Clock) -> None:
        step = step_of(await closed_port())
        for _ in range(2):
            with pytest.raises(Unavailable):
                await describe(step)
        assert step.breaker.state == "open"
        assert len(clock.pauses) == 3  # the fifth failure ends the second call early
        with pytest.raises(Unavailable) as raised:
            await describe(step)
        assert len(clock.pauses) == 3
        assert raised.value.retry_after == pytest.approx(5)

    async def test_it_comes_back(self, step_of: StepOf, clock: Clock) -> None:
        async with serving(*[answer(500, b"")] * 5, said()) as server:
            step = step_of(server.url)
            for _ in range(5):
                with pytest.raises(UpstreamFailed):
                    await describe(step)
            with pytest.raises(Unavailable):
                await describe(step)
            assert len(server.calls) == 5
            clock.now += 5
            await describe(step)
        assert step.breaker.state == "closed"

    @pytest.mark.parametrize(
        ("reply", "state"),
        [
            pytest.param(fault(400), "closed", id="400"),
            pytest.param(fault(403), "closed", id="403"),
            pytest.param(fault(429, retry_after="9"), "closed", id="429"),
            pytest.param(fault(422, "no_final_answer"), "closed", id="no final answer"),
            pytest.param(fault(507), "closed", id="this image does not fit"),
            pytest.param(fault(500), "open", id="500"),
            pytest.param(fault(503, retry_after="9"), "open", id="not ready"),
            pytest.param(answer(504, b""), "open", id="504 of a proxy"),
            pytest.param(answer(200, b"hello"), "open", id="nonsense"),
            pytest.param(b"", "open", id="killed"),
        ],
    )
    async def test_what_counts(self, step_of: StepOf, reply: bytes, state: str) -> None:
        async with serving(reply) as server:
            step = step_of(server.url)
            for _ in range(5):
                with pytest.raises(SightlineError):
                    await describe(step)
        assert step.breaker.state == state

    async def test_a_callers_short_deadline_does_not_count(self, step_of: StepOf) -> None:
        async with serving(None) as server:
            step = step_of(server.url)
            for _ in range(5):
                with pytest.raises(DeadlineExceeded):
                    await describe(step, seconds=0.02)
        assert step.breaker.state == "closed"

    async def test_a_frozen_step_counts_when_it_had_time(
        self, step_of: StepOf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("sightline.engines.remote.PATIENCE_SECONDS", 0.01)
        async with serving(None) as server:
            step = step_of(server.url)
            while step.breaker.state == "closed":
                with pytest.raises(DeadlineExceeded):
                    await describe(step, seconds=0.05)
        assert len(server.calls) <= 5


async def test_cancelling_the_caller_closes_the_connection(step_of: StepOf) -> None:
    async with serving(None) as server:
        step = step_of(server.url)
        task = asyncio.ensure_future(describe(step))
        await server.has_call.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(server.calls[0].has_left.wait(), 5)
    assert step.breaker.state == "closed"


class TestReadyAndMetadata:
    @pytest.mark.parametrize(
        ("reply", "is_ready"),
        [
            pytest.param(answer(200, {"name": "describe", "ready": True}), True, id="ready"),
            pytest.param(answer(200), True, id="ready without a body"),
            pytest.param(answer(200, {"name": "describe", "ready": False}), False, id="says no"),
            pytest.param(answer(503, {"error": "x"}), False, id="503"),
            pytest.param(answer(200, b"<html>"), False, id="somebody else"),
            pytest.param(b"", False, id="hangs up"),
            pytest.param(None, False, id="hangs"),
        ],
    )
    async def test_ready(self, step_of: StepOf, reply: Answer, is_ready: bool) -> None:
        async with serving(reply) as server:
            seconds = 0.3 if reply is None else 5
            assert await step_of(server.url, api_key="k").is_ready(seconds) is is_ready
        assert (server.calls[0].method, server.calls[0].path) == ("GET", "/v2/models/describe/ready")
        assert server.calls[0].headers["x-api-key"] == "k"

    async def test_not_there(self, step_of: StepOf) -> None:
        step = step_of(await closed_port())
        assert not await step.is_ready()
        assert await step.metadata() is None

    async def test_metadata(self, step_of: StepOf) -> None:
        parameters = {
            "model": "m", "model_revision": "r", "demo_model": True, "device": "cpu", "backend": "hf",
            "dtype": "torch.float32", "reasoning_level": "low",
        }  # fmt: skip
        async with serving(answer(200, {"name": "describe", "parameters": parameters})) as server:
            assert await step_of(server.url).metadata() == StepMetadata(
                "m", "r", True, "cpu", "hf", "torch.float32", "low"
            )
        assert server.calls[0].path == "/v2/models/describe"

    @pytest.mark.parametrize("body", [{}, {"parameters": None}, {"parameters": [1]}, {"parameters": {"model": 1}}])
    async def test_a_stranger_says_nothing(self, step_of: StepOf, body: object) -> None:
        async with serving(answer(200, body)) as server:
            assert await step_of(server.url).metadata() == StepMetadata()


class TestChainOverHttp:
    """The chain with both steps behind real sockets."""

    async def chain(self, step_of: StepOf, enhancer: str, *, strict: bool = False, **policy: float) -> ChainResult:
        async with serving(said("a red circle")) as server:
            return await run(
                IMAGE,
                ChainOptions(strict=strict),
                context(),
                caption=step_of(server.url).describe,
                enhance=step_of(enhancer, "enhance").enhance,
                policy=ChainPolicy(**policy),  # type: ignore[arg-type]
            )

    async def test_both_answer(self, step_of: StepOf) -> None:
        async with serving(said("A red circle rests.", image_tokens=0)) as enhancer:
            result = await self.chain(step_of, enhancer.url)
        assert (result.caption, result.original_caption) == ("A red circle rests.", "a red circle")

    @pytest.mark.parametrize(
        ("reply", "code"),
        [
            pytest.param(b"", "enhancer_unavailable", id="killed"),
            pytest.param(None, "enhancer_timeout", id="slow"),
            pytest.param(answer(500, b"x"), "enhancer_failed", id="failing"),
            pytest.param(fault(503, "model_not_ready"), "enhancer_unavailable", id="loading"),
            pytest.param(answer(200, b"x"), "enhancer_failed", id="nonsense"),
            pytest.param(said(" "), "no_final_answer", id="blank"),
            pytest.param(fault(422, "no_final_answer"), "no_final_answer", id="no final answer"),
        ],
    )
    async def test_a_bad_enhancer(self, step_of: StepOf, reply: Answer, code: str) -> None:
        seconds = 0.1 if reply is None else 30
        async with serving(reply) as enhancer:
            result = await self.chain(step_of, enhancer.url, enhance_timeout_seconds=seconds)
            assert (result.caption, result.enhanced) == ("a red circle", False)
            assert result.enhancement_error is not None
            assert result.enhancement_error.code == code
            with pytest.raises(Unavailable) as raised:
                await self.chain(step_of, enhancer.url, strict=True, enhance_timeout_seconds=seconds)
        assert raised.value.code == code

    async def test_an_absent_enhancer(self, step_of: StepOf) -> None:
        result = await self.chain(step_of, await closed_port())
        assert result.enhancement_error is not None
        assert result.enhancement_error.code == "enhancer_unavailable"
