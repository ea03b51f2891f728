"""A model behind somebody else's HTTP: one call, bounded in time, size and repetition.

    caption, image or turns ──dialect──▶ POST ──dialect──▶ Completion, or pieces of text and then the Completion

A call that cannot have started (no connection) or was turned away (502 of a proxy, 503) is repeated
a few times while the deadline allows; after the first byte of any other answer it never is. A
step that keeps failing is left alone for a while by its circuit breaker, so that nobody waits for a
model that is known to be down. Every failure is one of `sightline.errors`; no text of httpx reaches
a client.
"""

import asyncio
import logging
import math
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson

from sightline.engines.breaker import CircuitBreaker, Outcome
from sightline.engines.dialect import Dialect, Outgoing, Spoken, StepMetadata, StepName, as_object
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InvalidParameter,
    QueueFull,
    SightlineError,
    Unavailable,
    UpstreamFailed,
)
from sightline.wire import (
    BATCH_PRIORITY,
    PRIORITY_HEADER,
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    Completion,
    Context,
    ImageBytes,
    ReasoningLevel,
    Sampling,
    Turn,
)

logger = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[object]]

CONNECT_SECONDS = 3.0
KEEPALIVE_SECONDS = 2.0
"""Less than uvicorn keeps an idle connection (5 s), so that no request meets a closing one."""

SPARE_CONNECTIONS = 2
"""For readiness probes, which must not wait behind the calls."""

MAX_LESSONS = 6
"""How often one call is written anew because the server named a parameter that it does not take."""
BACKOFF_SECONDS = 0.1
"""The first pause; it doubles, and each is spread over 50-150 %."""
MAX_PAUSE_SECONDS = 1.0
"""A step that asks for a longer pause (Retry-After) is reported to the caller instead of waited for."""

PATIENCE_SECONDS = 30.0
"""A call that got less time than this and ran out of it says nothing about the health of the step."""

MAX_ANSWER_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """How one step is called.

    attempts         calls at most, the first included; further ones only where they are safe
    attempt_seconds  until the answer of one call, or the first piece of it, is there; None: the deadline alone decides
    max_in_flight    calls that are open at once; None: no bound of its own
    """

    attempts: int = 3
    attempt_seconds: float | None = None
    max_in_flight: int | None = None


DEFAULT_POLICY = CallPolicy()


def new_client(max_concurrency: int, authority: Path | None = None) -> httpx.AsyncClient:
    """A connection pool for one step. It ignores the proxies of the environment and follows no redirects.

    authority   file of certificates to trust instead of the public ones. Raises OSError when it cannot be read.
    """
    return httpx.AsyncClient(
        trust_env=False,
        verify=True if authority is None else ssl.create_default_context(cafile=authority),
        follow_redirects=False,
        limits=httpx.Limits(
            max_connections=max_concurrency + SPARE_CONNECTIONS,
            max_keepalive_connections=max_concurrency,
            keepalive_expiry=KEEPALIVE_SECONDS,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Fault:
    """A failed attempt.

    is_down     counts for the breaker
    may_retry   repeating it is safe
    has_taught  the dialect will write the same request differently now
    """

    error: SightlineError
    is_down: bool
    may_retry: bool = False
    cause: BaseException | None = None
    has_taught: bool = False


Write = Callable[[], Outgoing]
"""Writes the request as the dialect knows the server by now."""


class RemoteStep:
    """One model of another process. The client stays the caller's to close.

    step    its place in the chain; names the codes `caption_step_unavailable`,
            `enhance_step_unavailable`
    policy  attempts, their time, and how many calls are open at once
    sleep   takes the pauses between attempts, in seconds
    jitter  a number from 0 to 1 for each pause
    """

    def __init__(
        self,
        dialect: Dialect,
        api_key: str | None,
        client: httpx.AsyncClient,
        *,
        step: StepName = "caption",
        breaker: CircuitBreaker | None = None,
        policy: CallPolicy = DEFAULT_POLICY,
        sleep: Sleep = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._dialect = dialect
        self._api_key = api_key
        self._client = client
        self.name: StepName = step
        self.breaker = breaker or CircuitBreaker()
        self._policy = policy
        self._gate = asyncio.Semaphore(policy.max_in_flight) if policy.max_in_flight else None
        self._sleep = sleep
        self._jitter = jitter

    async def describe(self, image: ImageBytes, prompt: str | None, sampling: Sampling, context: Context) -> Completion:
        """Describe an encoded image.

        Raises the predictor's own error where it speaks our language (4xx, 429, 5xx with a code);
        UpstreamFailed (502) on nonsense; Unavailable (503) when it cannot be reached, is not ready
        or is left alone by the breaker; DeadlineExceeded (504).
        """
        return await self._ask(lambda: self._dialect.describing(image, prompt, sampling, context.request_id), context)

    async def enhance(self, caption: str, level: ReasoningLevel, sampling: Sampling, context: Context) -> Completion:
        """Turn a caption into fuller prose. Raises like `describe`."""
        return await self._ask(lambda: self._dialect.enhancing(caption, level, sampling, context.request_id), context)

    def enhance_stream(
        self, caption: str, level: ReasoningLevel, sampling: Sampling, context: Context
    ) -> AsyncGenerator[str | Completion]:
        """The same in pieces of text, then the whole; at once the whole where the protocol does not stream."""
        return self._stream(lambda: self._dialect.enhancing(caption, level, sampling, context.request_id), context)

    async def chat(
        self, turns: Sequence[Turn], sampling: Sampling, context: Context, level: ReasoningLevel | None = None
    ) -> Completion:
        """Answer a conversation whose images are ImageBytes. Raises like `describe`."""
        return await self._ask(lambda: self._dialect.chatting(turns, sampling, level), context)

    def chat_stream(
        self, turns: Sequence[Turn], sampling: Sampling, context: Context, level: ReasoningLevel | None = None
    ) -> AsyncGenerator[str | Completion]:
        """The same in pieces of text, then the whole."""
        return self._stream(lambda: self._dialect.chatting(turns, sampling, level), context)

    async def is_ready(self, timeout_seconds: float = 1.0) -> bool:
        """Whether the model answers ready now. Never raises."""
        answer = await self._get(self._dialect.ready_url(), timeout_seconds)
        return answer is not None and self._dialect.is_ready(*answer)

    async def metadata(self, timeout_seconds: float = 1.0) -> StepMetadata | None:
        """What the model says about itself; None when it does not answer. Never raises."""
        answer = await self._get(self._dialect.metadata_url(), timeout_seconds)
        if answer is None or answer[0] != 200 or (said := as_object(answer[1])) is None:
            return None
        return self._dialect.metadata(said)

    # --- the whole answer ----------------------------------------------------------------------

    async def _ask(self, write: Write, context: Context) -> Completion:
        tries = _Tries()
        while True:
            context.deadline.check()
            outcome = await self._attempt(write(), context)
            if isinstance(outcome, Completion):
                return outcome
            await self._pause(outcome, tries, context)

    async def _attempt(self, outgoing: Outgoing, context: Context) -> Completion | _Fault:
        async with self._admitted(context) as call:
            if isinstance(call, _Fault):
                return call
            try:
                async with asyncio.timeout(self._patience(context)):
                    answer = await self._post(outgoing, context)
            except TimeoutError as error:
                return self._slow(call, context, error)
            call.outcome = "failed" if isinstance(answer, _Fault) and answer.is_down else "answered"
            return answer

    async def _post(self, outgoing: Outgoing, context: Context) -> Completion | _Fault:
        """Send once and read the whole answer; the caller bounds the time of all of it."""
        response: httpx.Response | None = None
        started = time.monotonic()
        try:
            async with self._sent(outgoing, context) as response:
                content = await _read(response)
        except httpx.HTTPError as error:
            return self._broken(error, has_answer=response is not None)
        if response.status_code != 200 or content is None:
            return self._refusal(response, content)
        try:
            milliseconds = round((time.monotonic() - started) * 1000, 1)
            return self._dialect.completion(content, response.headers, milliseconds)
        except InvalidParameter as error:  # it answered, and had no answer to this
            return _Fault(error, is_down=False)
        except (BadRequest, TypeError, ValueError, RecursionError) as error:  # whatever a stranger may send
            return _Fault(self._nonsense(), is_down=True, cause=error)

    # --- in pieces -----------------------------------------------------------------------------

    async def _stream(self, write: Write, context: Context) -> AsyncGenerator[str | Completion]:
        if not self._dialect.is_streaming:
            yield await self._ask(write, context)
            return
        tries = _Tries()
        while True:
            context.deadline.check()
            fault: _Fault | None = None
            async with aclosing(self._stream_once(self._dialect.streamed(write()), context)) as pieces:
                async for piece in pieces:
                    if isinstance(piece, _Fault):
                        fault = piece
                    else:
                        yield piece
            if fault is None:
                return
            await self._pause(fault, tries, context)

    async def _stream_once(self, outgoing: Outgoing, context: Context) -> AsyncGenerator[str | Completion | _Fault]:
        """One call: pieces and the completion; or a fault alone. What goes wrong after a piece is raised."""
        async with self._admitted(context) as call:
            if isinstance(call, _Fault):
                yield call
                return
            has_shown = False
            async with aclosing(self._pieces(outgoing, context)) as pieces:
                while True:
                    patience = context.deadline.remaining() if has_shown else self._patience(context)
                    try:
                        async with asyncio.timeout(patience):
                            piece = await anext(pieces)
                    except StopAsyncIteration:
                        return
                    except TimeoutError as error:
                        piece = self._slow(call, context, error)
                    else:
                        if isinstance(piece, _Fault):
                            call.outcome = "failed" if piece.is_down else "answered"
                        elif isinstance(piece, Completion):
                            call.outcome = "answered"
                    if isinstance(piece, _Fault) and has_shown:
                        raise piece.error from piece.cause
                    has_shown = True
                    yield piece
                    if isinstance(piece, _Fault):
                        return

    async def _pieces(self, outgoing: Outgoing, context: Context) -> AsyncGenerator[str | Completion | _Fault]:
        """Send once and read the events; ends after a completion or a fault."""
        response: httpx.Response | None = None
        started = time.monotonic()
        assembly = self._dialect.assembly()
        try:
            async with self._sent(outgoing, context) as response:
                if response.status_code != 200:
                    yield self._refusal(response, await _read(response))
                    return
                async with aclosing(_events(response)) as events:
                    async for event in events:
                        if text := assembly.feed(event):
                            yield text
            yield assembly.completion(round((time.monotonic() - started) * 1000, 1))
        except httpx.HTTPError as error:
            yield self._broken(error, has_answer=response is not None)
        except InvalidParameter as error:
            yield _Fault(error, is_down=False)
        except (BadRequest, TypeError, ValueError, RecursionError) as error:
            yield _Fault(self._nonsense(), is_down=True, cause=error)

    # --- around one call -----------------------------------------------------------------------

    @asynccontextmanager
    async def _admitted(self, context: Context) -> AsyncGenerator["_Call | _Fault"]:
        """A place among the open calls and leave of the breaker, which is told the outcome, whichever way it ends."""
        async with self._place(context), self._permitted(context) as call:
            yield call

    @asynccontextmanager
    async def _place(self, context: Context) -> AsyncGenerator[None]:
        """Raises DeadlineExceeded (504) when none comes free in time."""
        if self._gate is None:
            yield
            return
        try:
            async with asyncio.timeout(context.deadline.remaining()):
                await self._gate.acquire()
        except TimeoutError as error:
            raise self._late(error).error from error
        try:
            yield
        finally:
            self._gate.release()

    @asynccontextmanager
    async def _permitted(self, context: Context) -> AsyncGenerator["_Call | _Fault"]:
        permit = self.breaker.admit()
        if permit is None:
            yield _Fault(self._unavailable(retry_after=self.breaker.retry_after() or 1.0), False)
            return
        given = context.deadline.remaining()
        call = _Call()
        try:
            yield call
        finally:
            is_late = call.outcome == "abandoned" and context.deadline.remaining() <= 0
            before = self.breaker.state
            self.breaker.record(permit, "failed" if is_late and given >= PATIENCE_SECONDS else call.outcome)
            if (after := self.breaker.state) != before:
                logger.warning("breaker step=%s from=%s to=%s", self.name, before, after)

    def _sent(self, outgoing: Outgoing, context: Context) -> AbstractAsyncContextManager[httpx.Response]:
        return self._client.stream(
            "POST",
            outgoing.url,
            content=outgoing.body,
            headers={**self._headers(context), **outgoing.headers},
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
        )

    async def _pause(self, fault: _Fault, tries: "_Tries", context: Context) -> None:
        """Wait before the next attempt. Raises the fault's error when there is to be none."""
        if fault.has_taught and tries.lessons < MAX_LESSONS:
            tries.lessons += 1
            return
        pause = max(BACKOFF_SECONDS * 2**tries.retries * (0.5 + self._jitter()), fault.error.retry_after or 0)
        is_last = tries.retries + 1 >= self._policy.attempts or not fault.may_retry or self.breaker.retry_after() > 0
        if is_last or pause > MAX_PAUSE_SECONDS or pause >= context.deadline.remaining():
            raise fault.error from fault.cause
        tries.retries += 1
        logger.info(
            "retry step=%s number=%d pause_ms=%.0f code=%s request_id=%s",
            self.name,
            tries.retries,
            pause * 1000,
            fault.error.code,
            context.request_id,
        )
        await self._sleep(pause)

    def _headers(self, context: Context) -> dict[str, str]:
        milliseconds = max(1, int(context.deadline.remaining() * 1000))
        headers = {
            "accept-encoding": "identity",
            REQUEST_ID_HEADER: _printable(context.request_id),
            TIMEOUT_HEADER: str(milliseconds),
        }
        if context.is_batch:
            headers[PRIORITY_HEADER] = BATCH_PRIORITY
        if context.traceparent is not None:
            headers["traceparent"] = _printable(context.traceparent)
        if context.tracestate is not None:
            headers["tracestate"] = context.tracestate
        return headers | self._key()

    def _key(self) -> dict[str, str]:
        return {} if self._api_key is None else dict(self._dialect.key(self._api_key))

    # --- what went wrong -----------------------------------------------------------------------

    def _refusal(self, response: httpx.Response, content: bytes | None) -> _Fault:
        """What an answer other than 200 means.

        A body with a `code` was said by the model itself, about this request; without one it comes from something in
        between. So a 502 or 504 with a code is an answer, and one without is an outage.
        """
        status = response.status_code
        spoken = self._dialect.spoken(status, content) if content is not None else Spoken()
        retry_after = _seconds(response.headers.get("retry-after"))
        if status == 503:
            down = self._unavailable(spoken.sentence, code=spoken.code, retry_after=retry_after)
            return _Fault(down, is_down=True, may_retry=True)
        if status == 429:
            busy = f"The {self.name} step has too many requests waiting."
            return _Fault(QueueFull(busy, code=spoken.code, retry_after=retry_after or 1.0), is_down=False)
        if status in _MISCONFIGURED:
            return _Fault(self._misconfigured(status), is_down=False)
        if content is not None and self._dialect.learns(status, content):
            return _Fault(self._nonsense(), is_down=False, has_taught=True)
        if (error := self._dialect.fault(status, spoken, self.name)) is not None:
            error.retry_after = retry_after
            return _Fault(error, is_down=status == 500)
        return _Fault(self._nonsense(), is_down=status >= 500 or status == 200, may_retry=status == 502)

    def _misconfigured(self, status: int) -> UpstreamFailed:
        return UpstreamFailed(f"The {self.name} step {_MISCONFIGURED[status]}.", code=f"{self.name}_step_misconfigured")

    def _broken(self, error: httpx.HTTPError, *, has_answer: bool) -> _Fault:
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            return _Fault(self._unavailable(), is_down=True, may_retry=True, cause=error)
        return _Fault(self._nonsense() if has_answer else self._unavailable(), is_down=True, cause=error)

    def _patience(self, context: Context) -> float:
        """How long one call may take until something of its answer is there."""
        return min(context.deadline.remaining(), self._policy.attempt_seconds or math.inf)

    def _slow(self, call: "_Call", context: Context, cause: TimeoutError) -> _Fault:
        """Out of time: of the whole request, or of this one attempt, which says that the step is in trouble."""
        if self._policy.attempt_seconds is None or context.deadline.remaining() <= 0:
            return self._late(cause)
        call.outcome = "failed"
        return _Fault(self._unavailable(), is_down=True, may_retry=True, cause=cause)

    def _late(self, cause: TimeoutError) -> _Fault:
        error = DeadlineExceeded(f"The {self.name} step did not answer before the deadline.")
        return _Fault(error, is_down=False, cause=cause)

    def _unavailable(
        self,
        message: str | None = None,
        *,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> Unavailable:
        return Unavailable(
            message or f"The {self.name} step cannot be reached now.",
            code=code or f"{self.name}_step_unavailable",
            retry_after=retry_after,
        )

    def _nonsense(self) -> UpstreamFailed:
        return UpstreamFailed(f"The {self.name} step gave an answer that makes no sense.")

    async def _get(self, url: str, timeout_seconds: float) -> tuple[int, object] | None:
        """Status and JSON at an address; None when there is no answer, or no JSON. Never raises."""
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._client.stream("GET", url, headers=self._key()) as response,
            ):
                content = await _read(response)
            if content is None:
                return None
            answer: object = orjson.loads(content or b"{}") if response.status_code == 200 else None
        except (httpx.HTTPError, TimeoutError, orjson.JSONDecodeError):
            return None
        return response.status_code, answer


@dataclass(slots=True)
class _Call:
    """An admitted call; `outcome` is set when it is known."""

    outcome: Outcome = "abandoned"


@dataclass(slots=True)
class _Tries:
    retries: int = 0
    lessons: int = 0


_MISCONFIGURED: Mapping[int, str] = {
    401: "refuses this gateway's key",
    403: "refuses this gateway's key",
    404: "does not know this gateway's model name",
    405: "does not speak this gateway's protocol",
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


async def _events(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The data of each server-sent event, up to `[DONE]`. Raises ValueError when they are too much, or packed."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ValueError("packed although we asked for it plain")
    taken, rest = 0, b""
    async for chunk in response.aiter_bytes():
        taken += len(chunk)
        if taken > MAX_ANSWER_BYTES:
            raise ValueError("larger than any answer")
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            yield data


def _seconds(value: str | None) -> float | None:
    """Retry-After in seconds; the form with a date is not ours and counts as absent."""
    return float(value) if value is not None and _NUMBER.fullmatch(value) else None


_NUMBER = re.compile(r"\d{1,6}(?:\.\d{1,6})?", re.ASCII)


def _printable(value: str) -> str:
    """A client's text as a header value; an odd character must not fail the call."""
    return re.sub(r"[^\x21-\x7e]", "?", value)
