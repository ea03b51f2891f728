"""How a gateway calls its steps, as its settings say: attempts, their time, places, breakers; defaults of the chain."""

import asyncio
from collections.abc import Callable

import httpx
import pytest
from pydantic import ValidationError

from sightline import chain
from sightline.chain import ChainOptions, ChainPolicy
from sightline.engines.breaker import CircuitBreaker
from sightline.engines.remote import CallPolicy, RemoteStep, new_client
from sightline.engines.remote_openai import OpenAI
from sightline.errors import DeadlineExceeded, SightlineError, Unavailable
from sightline.server.caller import context_of
from sightline.server.keys import Keys
from sightline.services.pipeline_steps import Steps
from sightline.settings import PipelineSettings
from sightline.wire import Completion, Context, Deadline, ImageBytes, ModelInfo, Sampling, Usage

IMAGE = ImageBytes(b"not looked at")
ANSWER = {
    "model": "m",
    "choices": [{"message": {"content": "A red circle."}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 4},
}
Handler = Callable[[httpx.Request], object]


def context(seconds: float = 30) -> Context:
    return Context(request_id="r", deadline=Deadline.after(seconds))


async def no_pause(seconds: float) -> None: ...


def remote(handler: Handler, policy: CallPolicy, breaker: CircuitBreaker | None = None) -> RemoteStep:
    client = httpx.AsyncClient(transport=httpx.MockTransport(handler))  # type: ignore[arg-type]
    return RemoteStep(OpenAI("http://step", "m"), None, client, policy=policy, breaker=breaker, sleep=no_pause)


@pytest.mark.parametrize("attempts", [1, 2, 4])
async def test_a_step_that_is_away_is_called_so_often(attempts: int) -> None:
    calls: list[httpx.Request] = []

    def away(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        return httpx.Response(503)

    step = remote(away, CallPolicy(attempts=attempts))
    with pytest.raises(Unavailable):
        await step.enhance("a", "low", Sampling(), context())
    assert len(calls) == attempts


async def test_an_attempt_that_takes_too_long_is_given_up_and_made_again() -> None:
    calls: list[httpx.Request] = []

    async def slow_once(request: httpx.Request) -> httpx.Response:
        calls.append(request)
        if len(calls) == 1:
            await asyncio.Event().wait()
        return httpx.Response(200, json=ANSWER)

    step = remote(slow_once, CallPolicy(attempts=2, attempt_seconds=0.05))
    assert (await step.enhance("a", "low", Sampling(), context())).text == "A red circle."
    assert len(calls) == 2


async def test_the_deadline_stays_the_last_word() -> None:
    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    step = remote(never, CallPolicy(attempts=9, attempt_seconds=0.2))
    with pytest.raises(SightlineError) as caught:
        await step.enhance("a", "low", Sampling(), context(0.1))
    assert isinstance(caught.value, DeadlineExceeded)


async def test_no_more_calls_are_open_than_allowed() -> None:
    is_free, open_now, most = asyncio.Event(), 0, 0

    async def count(request: httpx.Request) -> httpx.Response:
        nonlocal open_now, most
        open_now += 1
        most = max(most, open_now)
        await is_free.wait()
        open_now -= 1
        return httpx.Response(200, json=ANSWER)

    step = remote(count, CallPolicy(max_in_flight=2))
    calls = [asyncio.ensure_future(step.enhance("a", "low", Sampling(), context())) for _ in range(6)]
    while open_now < 2:
        await asyncio.sleep(0)
    is_free.set()
    await asyncio.gather(*calls)
    assert most == 2


async def test_who_finds_no_place_in_time_is_told() -> None:
    async def never(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    step = remote(never, CallPolicy(max_in_flight=1))
    first = asyncio.ensure_future(step.enhance("a", "low", Sampling(), context()))
    await asyncio.sleep(0)
    with pytest.raises(DeadlineExceeded):
        await step.enhance("a", "low", Sampling(), context(0.05))
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


def test_a_breaker_by_percent_opens_when_its_window_is_full() -> None:
    now = 0.0
    breaker = CircuitBreaker(lambda: now, error_percent=50, window=4, open_seconds=10)

    def call(outcome: str) -> None:
        permit = breaker.admit()
        assert permit is not None
        breaker.record(permit, outcome)  # type: ignore[arg-type]

    for outcome in ("failed", "failed", "answered"):
        call(outcome)
    assert breaker.state == "closed", "three calls of four"
    call("failed")
    assert breaker.state == "open"
    now = 10.0
    call("answered")
    assert breaker.state == "closed"
    for outcome in ("answered", "answered", "answered", "failed", "answered"):
        call(outcome)
    assert breaker.state == "closed", "a quarter of the last four"


async def test_every_setting_reaches_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = PipelineSettings(
        auth="off",
        enhance_url="http://enhance",
        caption_attempts=7,
        caption_attempt_seconds=4,
        caption_max_in_flight=3,
        enhance_attempts=1,
        enhance_breaker_failures=2,
        enhance_breaker_open_seconds=60,
    )
    steps = Steps(settings)
    assert steps.caption._policy == CallPolicy(7, 4, 3)
    assert steps.enhance is not None
    assert steps.enhance._policy == CallPolicy(1, None, None)
    for _ in range(2):
        permit = steps.breakers["enhance"].admit()
        assert permit is not None
        steps.breakers["enhance"].record(permit, "failed")
    assert 50 < steps.breakers["enhance"].retry_after() <= 60
    await steps.close()


def test_an_authority_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(OSError, match="No such file"):
        new_client(1, authority=__file__ + ".pem")  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["caption_attempts", "enhance_attempts", "caption_breaker_failures"])
def test_bounds_of_settings(field: str) -> None:
    with pytest.raises(ValidationError):
        PipelineSettings(auth="off", **{field: 0})


# --- defaults of the chain -------------------------------------------------------------------------------------------


class Asked:
    """A caption step that remembers what it was asked."""

    def __init__(self) -> None:
        self.prompt = ""
        self.sampling = Sampling()
        self.seconds = 0.0

    async def __call__(self, image: ImageBytes, prompt: str, sampling: Sampling, context: Context) -> Completion:
        self.prompt, self.sampling, self.seconds = prompt, sampling, context.deadline.remaining()
        usage = Usage(prompt_tokens=9, completion_tokens=4, image_tokens=5, reasoning_tokens=0)
        return Completion("A red circle.", "stop", usage, ModelInfo(name="m", revision="r"), 1.0)


async def test_the_policys_prompt_is_for_requests_that_say_nothing() -> None:
    step, policy = Asked(), ChainPolicy(enhance_by_default=False, caption_prompt="What is it?")
    for options, expected in (
        (ChainOptions(), "What is it?"),
        (ChainOptions(detailed=False), "What is it?"),
        (ChainOptions(prompt="Where?"), "Where?"),
        (ChainOptions(preset="tags"), ChainOptions(preset="tags").words),
    ):
        await chain.run(IMAGE, options, context(), caption=step, enhance=None, policy=policy)
        assert step.prompt == expected


async def test_the_caption_step_gets_its_share_of_the_deadline() -> None:
    step = Asked()
    policy = ChainPolicy(enhance_by_default=False, caption_timeout_seconds=7)
    await chain.run(IMAGE, ChainOptions(), context(30), caption=step, enhance=None, policy=policy)
    assert 6 < step.seconds <= 7
    await chain.run(IMAGE, ChainOptions(), context(3), caption=step, enhance=None, policy=policy)
    assert 2 < step.seconds <= 3


@pytest.mark.parametrize(
    ("by_default", "asked", "is_error"),
    [(True, None, True), (True, False, False), (False, None, False), (False, True, True)],
)
async def test_strict_is_the_requests_else_the_policys(by_default: bool, asked: bool | None, is_error: bool) -> None:
    policy = ChainPolicy(strict_by_default=by_default)

    async def run() -> chain.ChainResult:
        options = ChainOptions(strict=asked)
        return await chain.run(IMAGE, options, context(), caption=Asked(), enhance=None, policy=policy)

    if is_error:
        with pytest.raises(Unavailable):
            await run()
    else:
        result = await run()
        assert result.enhancement_error is not None
        assert result.enhancement_error.code == "enhancer_not_configured"


async def test_with_too_little_time_left_nothing_is_enhanced() -> None:
    async def enhance(*_: object) -> Completion:
        raise AssertionError("asked all the same")

    policy = ChainPolicy(enhance_min_seconds=20)
    result = await chain.run(IMAGE, ChainOptions(), context(10), caption=Asked(), enhance=enhance, policy=policy)
    assert result.enhancement_error is not None
    assert result.enhancement_error.code == "enhancer_timeout"


@pytest.mark.parametrize(
    ("asked", "seconds"),
    [(None, 20), ("5000", 5), ("50000", 50), ("500000", 60)],
    ids=["nothing", "less", "more", "too much"],
)
def test_the_usual_deadline_is_for_requests_that_ask_for_none(asked: str | None, seconds: float) -> None:
    settings = PipelineSettings(auth="off", deadline_seconds=60, default_deadline_seconds=20)
    headers = {} if asked is None else {"x-request-timeout-ms": asked}
    made = context_of(headers, "r", Keys(settings), 60, is_open=True, usual_seconds=settings.usual_seconds)
    assert seconds - 1 < made.deadline.remaining() <= seconds
