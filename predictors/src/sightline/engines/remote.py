"""A model behind somebody else's HTTP: one V2 call, bounded in time, size and repetition.

    caption or image ──render_request──▶ POST /v2/models/<m>/infer ──parse_response──▶ Completion

A call that cannot have started (no connection) or was turned away (502 of a proxy, 503) is repeated
at most twice while the deadline allows; after the first byte of any other answer it never is. A
step that keeps failing is left alone for a while by its circuit breaker, so that nobody waits for a
model that is known to be down. Every failure is one of `sightline.errors`; no text of httpx reaches
a client.
"""

import asyncio
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, cast
from urllib.parse import quote

import httpx
import orjson

from sightline import v2
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InternalError,
    InvalidParameter,
    NotSupported,
    OutOfMemory,
    PayloadTooLarge,
    QueueFull,
    SightlineError,
    Unavailable,
    UpstreamFailed,
)
from sightline.wire import (
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    Completion,
    Context,
    ImageBytes,
    ModelInfo,
    ReasoningLevel,
    Sampling,
    Usage,
)

logger = logging.getLogger(__name__)

StepName = Literal["caption", "enhance"]
Outcome = Literal["answered", "failed", "abandoned"]
Sleep = Callable[[float], Awaitable[object]]

CONNECT_SECONDS = 3.0
KEEPALIVE_SECONDS = 2.0
"""Less than uvicorn keeps an idle connection (5 s), so that no request meets a closing one."""

SPARE_CONNECTIONS = 2
"""For readiness probes, which must not wait behind the calls."""

MAX_RETRIES = 2
BACKOFF_SECONDS = 0.1
"""The first pause; it doubles, and each is spread over 50-150 %."""
MAX_PAUSE_SECONDS = 1.0
"""A step that asks for a longer pause (Retry-After) is reported to the caller instead of waited for."""

PATIENCE_SECONDS = 30.0
"""A call that got less time than this and ran out of it says nothing about the health of the step."""

MAX_ANSWER_BYTES = 4 * 1024 * 1024
MAX_MESSAGE_CHARACTERS = 500


class CircuitBreaker:
    """Whether a step may be called: closed, open after failures in a row, then half open for one probe.

        closed ──max_failures in a row──▶ open ──open_seconds──▶ half open ──one probe──▶ closed or open

    clock         monotonic seconds
    max_failures  consecutive failures that open it
    open_seconds  how long nobody is let through, then one

    Each change of state starts a new generation; outcomes of calls that were admitted in an older
    one are ignored. For one event loop; it takes no locks.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_failures: int = 5,
        open_seconds: float = 5.0,
    ) -> None:
        self._clock = clock
        self._max_failures = max_failures
        self._open_seconds = open_seconds
        self._generation = 0
        self._failures = 0
        self._opened_at: float | None = None
        self._is_probing = False

    def admit(self) -> int | None:
        """A permit for one call, to be handed back to `record`; None while the step is left alone."""
        if self._opened_at is not None:
            if self._is_probing or self.retry_after() > 0:
                return None
            self._is_probing = True
        return self._generation

    def record(self, permit: int, outcome: Outcome) -> None:
        """Say how a call ended. `abandoned` (cancelled, out of time) tells nothing, but frees the probe."""
        if permit != self._generation:
            return
        if outcome == "abandoned":
            self._is_probing = False
        elif outcome == "answered":
            self._failures = 0
            if self._opened_at is not None:
                self._turn(opened_at=None)
        else:
            self._failures += 1
            if self._failures >= self._max_failures:
                self._turn(opened_at=self._clock())

    def retry_after(self) -> float:
        """Seconds until a call may be let through; 0 when closed."""
        if self._opened_at is None:
            return 0.0
        return max(0.0, self._opened_at + self._open_seconds - self._clock())

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """For people and metrics."""
        if self._opened_at is None:
            return "closed"
        return "open" if self.retry_after() > 0 else "half-open"

    def _turn(self, *, opened_at: float | None) -> None:
        self._generation += 1
        self._opened_at = opened_at
        self._is_probing = False


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """What a step says about itself; None where it does not."""

    model: str | None = None
    revision: str | None = None
    demo: bool = False
    device: str | None = None
    backend: str | None = None
    dtype: str | None = None
    reasoning_level: str | None = None


def new_client(max_concurrency: int) -> httpx.AsyncClient:
    """A connection pool for one step. It ignores the proxies of the environment and follows no redirects."""
    return httpx.AsyncClient(
        trust_env=False,
        follow_redirects=False,
        limits=httpx.Limits(
            max_connections=max_concurrency + SPARE_CONNECTIONS,
            max_keepalive_connections=max_concurrency,
            keepalive_expiry=KEEPALIVE_SECONDS,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Fault:
    """A failed attempt. `is_down` counts for the breaker; `may_retry` says that repeating is safe."""

    error: SightlineError
    is_down: bool
    may_retry: bool = False
    cause: BaseException | None = None


class RemoteStep:
    """One model of another process, called by V2. The client stays the caller's to close.

    step    its place in the chain; names the codes `caption_step_unavailable`,
            `enhance_step_unavailable`
    sleep   takes the pauses between attempts, in seconds
    jitter  a number from 0 to 1 for each pause
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None,
        client: httpx.AsyncClient,
        *,
        step: StepName = "caption",
        breaker: CircuitBreaker | None = None,
        sleep: Sleep = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._url = f"{base_url.rstrip('/')}/v2/models/{quote(model, safe='')}"
        self._api_key = api_key
        self._client = client
        self._step = step
        self.breaker = breaker or CircuitBreaker()
        self._sleep = sleep
        self._jitter = jitter

    async def describe(self, image: ImageBytes, prompt: str | None, sampling: Sampling, context: Context) -> Completion:
        """Describe an encoded image.

        Raises the predictor's own error where it speaks our language (4xx, 429, 5xx with a code);
        UpstreamFailed (502) on nonsense; Unavailable (503) when it cannot be reached, is not ready
        or is left alone by the breaker; DeadlineExceeded (504).
        """
        inputs = [v2.Tensor.of_bytes("image", [image.data])]
        if prompt is not None:
            inputs.append(v2.Tensor.of_texts("prompt", [prompt]))
        return await self._infer(inputs, _parameters(sampling), context)

    async def enhance(self, caption: str, level: ReasoningLevel, sampling: Sampling, context: Context) -> Completion:
        """Turn a caption into fuller prose. Raises like `describe`."""
        inputs = [v2.Tensor.of_texts("text", [caption])]
        parameters = _parameters(sampling) | {"reasoning_level": level}
        return await self._infer(inputs, parameters, context)

    async def is_ready(self, timeout_seconds: float = 1.0) -> bool:
        """Whether the model answers ready now. Never raises."""
        answer = await self._get("/ready", timeout_seconds)
        return answer is not None and answer.get("ready", True) is True

    async def metadata(self, timeout_seconds: float = 1.0) -> StepMetadata | None:
        """What the model says about itself; None when it does not answer. Never raises."""
        answer = await self._get("", timeout_seconds)
        if answer is None:
            return None
        said = _object(answer.get("parameters")) or {}
        return StepMetadata(
            model=_text(said.get("model")),
            revision=_text(said.get("model_revision")),
            demo=said.get("demo_model") is True,
            device=_text(said.get("device")),
            backend=_text(said.get("backend")),
            dtype=_text(said.get("dtype")),
            reasoning_level=_text(said.get("reasoning_level")),
        )

    async def _infer(self, inputs: list[v2.Tensor], parameters: dict[str, v2.Scalar], context: Context) -> Completion:
        request = v2.InferRequest(tuple(inputs), parameters, id=context.request_id)
        body, header_length = v2.render_request(request)
        retry = 0
        while True:
            context.deadline.check()
            outcome = await self._attempt(body, header_length, context)
            if isinstance(outcome, Completion):
                return outcome
            pause = max(BACKOFF_SECONDS * 2**retry * (0.5 + self._jitter()), outcome.error.retry_after or 0)
            is_last = retry == MAX_RETRIES or not outcome.may_retry or self.breaker.retry_after() > 0
            if is_last or pause > MAX_PAUSE_SECONDS or pause >= context.deadline.remaining():
                raise outcome.error from outcome.cause
            retry += 1
            logger.info(
                "retry step=%s number=%d pause_ms=%.0f code=%s request_id=%s",
                self._step,
                retry,
                pause * 1000,
                outcome.error.code,
                context.request_id,
            )
            await self._sleep(pause)

    async def _attempt(self, body: bytes, header_length: int | None, context: Context) -> Completion | _Fault:
        """One call, and its outcome told to the breaker, whichever way it ends."""
        permit = self.breaker.admit()
        if permit is None:
            return _Fault(self._unavailable(retry_after=self.breaker.retry_after() or 1.0), False)
        given = context.deadline.remaining()
        outcome: Outcome = "abandoned"
        try:
            async with asyncio.timeout(given):
                answer = await self._post(body, header_length, context)
            is_down = isinstance(answer, _Fault) and answer.is_down
            outcome = "failed" if is_down else "answered"
            return answer
        except TimeoutError as error:
            return _Fault(
                DeadlineExceeded(f"The {self._step} step did not answer before the deadline."),
                is_down=False,
                cause=error,
            )
        finally:
            is_late = outcome == "abandoned" and context.deadline.remaining() <= 0
            before = self.breaker.state
            self.breaker.record(permit, "failed" if is_late and given >= PATIENCE_SECONDS else outcome)
            if (after := self.breaker.state) != before:
                logger.warning("breaker step=%s from=%s to=%s", self._step, before, after)

    async def _post(self, body: bytes, header_length: int | None, context: Context) -> Completion | _Fault:
        """Send once and read the whole answer; the caller bounds the time of all of it."""
        response: httpx.Response | None = None
        try:
            async with self._client.stream(
                "POST",
                f"{self._url}/infer",
                content=body,
                headers=self._headers(context, header_length),
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            ) as response:
                content = await _read(response)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return _Fault(self._unavailable(), is_down=True, may_retry=True, cause=error)
        except httpx.HTTPError as error:
            failure = self._nonsense() if response is not None else self._unavailable()
            return _Fault(failure, is_down=True, cause=error)
        if response.status_code != 200 or content is None:
            return self._refusal(response, content)
        try:
            return _completion(content, response.headers.get(v2.HEADER_LENGTH))
        except (BadRequest, TypeError, ValueError, RecursionError) as error:  # whatever a stranger may send
            return _Fault(self._nonsense(), is_down=True, cause=error)

    def _headers(self, context: Context, header_length: int | None) -> dict[str, str]:
        milliseconds = max(1, int(context.deadline.remaining() * 1000))
        headers = {
            "content-type": "application/octet-stream",
            "accept-encoding": "identity",
            v2.HEADER_LENGTH: str(header_length),
            REQUEST_ID_HEADER: _printable(context.request_id),
            TIMEOUT_HEADER: str(milliseconds),
        }
        if context.traceparent is not None:
            headers["traceparent"] = _printable(context.traceparent)
        return headers | self._key()

    def _key(self) -> dict[str, str]:
        return {} if self._api_key is None else {"x-api-key": self._api_key}

    def _refusal(self, response: httpx.Response, content: bytes | None) -> _Fault:
        """What an answer other than 200 means.

        A body with a `code` was said by the predictor itself, about this request; without one it
        comes from something in between. So a 502 or 504 with a code is an answer, and one without
        is an outage.
        """
        status = response.status_code
        code, message = _spoken(content)
        retry_after = _seconds(response.headers.get("retry-after"))
        sentence = message if code else f"The {self._step} step refused the request."
        if status == 503:
            down = self._unavailable(message if code else None, code=code, retry_after=retry_after)
            return _Fault(down, is_down=True, may_retry=True)
        if status == 429:
            busy = f"The {self._step} step has too many requests waiting."
            return _Fault(QueueFull(busy, code=code, retry_after=retry_after or 1.0), is_down=False)
        if status in {401, 403, 404, 405}:
            return _Fault(
                UpstreamFailed(
                    f"The {self._step} step does not know this gateway's key or model name.",
                    code=f"{self._step}_step_misconfigured",
                ),
                is_down=False,
            )
        if (code or status < 500) and (known := _BY_STATUS.get(status)):
            error = known(sentence, code=code, retry_after=retry_after)
            return _Fault(error, is_down=status == 500)
        return _Fault(self._nonsense(), is_down=status >= 500 or status == 200, may_retry=status == 502)

    def _unavailable(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> Unavailable:
        return Unavailable(
            message or f"The {self._step} step cannot be reached now.",
            code=code or f"{self._step}_step_unavailable",
            retry_after=retry_after,
        )

    def _nonsense(self) -> UpstreamFailed:
        return UpstreamFailed(f"The {self._step} step gave an answer that makes no sense.")

    async def _get(self, path: str, timeout_seconds: float) -> Mapping[str, object] | None:
        """The JSON object at a path of the model; None on anything else than 200. Never raises."""
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._client.stream("GET", self._url + path, headers=self._key()) as response,
            ):
                content = await _read(response)
            if response.status_code != 200 or content is None:
                return None
            answer: object = orjson.loads(content or b"{}")
        except (httpx.HTTPError, TimeoutError, orjson.JSONDecodeError):
            return None
        return _object(answer)


_BY_STATUS: Mapping[int, type[SightlineError]] = {
    kind.status: kind
    for kind in (
        BadRequest,
        PayloadTooLarge,
        InvalidParameter,
        InternalError,
        NotSupported,
        UpstreamFailed,
        DeadlineExceeded,
        OutOfMemory,
    )
}


async def _read(response: httpx.Response) -> bytes | None:
    """The body; None when it is larger than any answer of ours, or packed although we asked for it plain."""
    if response.headers.get("content-encoding", "identity") != "identity":
        return None
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            return None
    return bytes(content)


def _parameters(sampling: Sampling) -> dict[str, v2.Scalar]:
    parameters: dict[str, v2.Scalar] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
    }
    if sampling.seed is not None:
        parameters["seed"] = sampling.seed
    return parameters


def _completion(content: bytes, header_length: str | None) -> Completion:
    """Read a V2 answer. Raises BadRequest, TypeError or ValueError when it is none of ours."""
    response = v2.parse_response(content, header_length)
    output = response.output("text")
    if output is None:
        raise ValueError("no output 'text'")
    (text,) = output.texts()
    said = response.parameters
    model, revision = said.get("model"), said.get("model_revision")
    if not isinstance(model, str) or not isinstance(revision, str):
        raise ValueError("no model or revision")
    reason = said.get("finish_reason", "stop")
    if reason not in ("stop", "length"):
        raise ValueError("unknown finish_reason")
    milliseconds = said.get("milliseconds", 0)
    return Completion(
        text=text,
        finish_reason=reason,
        usage=Usage(
            prompt_tokens=_count(said.get("prompt_tokens")),
            completion_tokens=_count(said.get("completion_tokens")),
            image_tokens=_count(said.get("image_tokens")),
            reasoning_tokens=_count(said.get("reasoning_tokens")),
        ),
        model=ModelInfo(model, revision, demo=said.get("demo_model") is True),
        milliseconds=float(milliseconds),
    )


def _count(value: object) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("not a number of tokens")
    return value


def _spoken(content: bytes | None) -> tuple[str | None, str]:
    """Code and message of a V2 error body of ours; no code for anybody else's."""
    try:
        body: object = orjson.loads(content or b"")
    except orjson.JSONDecodeError:
        return None, ""
    fields = _object(body) or {}
    code, message = fields.get("code"), fields.get("error")
    if isinstance(code, str) and isinstance(message, str) and _CODE.fullmatch(code):
        return code, message[:MAX_MESSAGE_CHARACTERS]
    return None, ""


_CODE = re.compile(r"[a-z0-9_]{1,64}")


def _seconds(value: str | None) -> float | None:
    """Retry-After in seconds; the form with a date is not ours and counts as absent."""
    return float(value) if value is not None and value.isascii() and value.isdigit() else None


def _printable(value: str) -> str:
    """A client's text as a header value; an odd character must not fail the call."""
    return re.sub(r"[^\x21-\x7e]", "?", value)


def _object(value: object) -> Mapping[str, object] | None:
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
