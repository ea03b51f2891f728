"""OpenAI's chat completions to any server that has them: vLLM, an LLMInferenceService, a hosted model, ours.

Servers differ in which optional parameters they take, so a parameter that one refuses by name is left out (or, for
`max_tokens`, sent under its newer name) and the request repeated; that is remembered as long as the process lives.
What a server says in words is never shown to a client: it is a stranger.
"""

import base64
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import orjson

from sightline.engines.dialect import (
    BY_STATUS,
    Assembly,
    Outgoing,
    Spoken,
    StepMetadata,
    StepName,
    as_code,
    as_object,
    as_text,
    count,
    refused,
)
from sightline.engines.reasoning import Filter, final_of
from sightline.errors import BadRequest, InvalidParameter, OutOfMemory, SightlineError, UpstreamFailed
from sightline.images import media_type
from sightline.wire import (
    ENHANCE_INSTRUCTIONS,
    Completion,
    FinishReason,
    ImageBytes,
    ModelInfo,
    ReasoningLevel,
    Sampling,
    Turn,
    Usage,
    quoted_caption,
)

logger = logging.getLogger(__name__)

Json = dict[str, Any]

_VERSION = re.compile(r"v\d+(?:alpha|beta)?\d*")
_OPTIONAL = frozenset({"temperature", "top_p", "seed", "reasoning_effort", "stream_options"})
_REFUSALS = frozenset({"unsupported_parameter", "unsupported_value", "unknown_parameter", "invalid_parameter"})
_CONTENT = frozenset({"content_filter", "content_policy_violation", "image_content_policy_violation"})
_TOO_LONG = frozenset({"context_length_exceeded", "string_above_max_length", "prompt_too_long"})

NO_ANSWER = "no_final_answer"
MAX_LOGGED_CHARACTERS = 300


class OpenAI:
    """See `Dialect`.

    base_url  with or without its `/v1`
    """

    is_streaming = True

    def __init__(self, base_url: str, model: str) -> None:
        self._url = with_version(base_url)
        self._model = model
        self._left_out: set[str] = set()
        self._limit_name = "max_tokens"
        self._own_name = model

    def describing(self, image: ImageBytes, prompt: str | None, sampling: Sampling, request_id: str) -> Outgoing:
        parts = (image,) if prompt is None else (image, prompt)
        return self.chatting((Turn("user", parts),), sampling, None)

    def enhancing(self, caption: str, level: ReasoningLevel, sampling: Sampling, request_id: str) -> Outgoing:
        turns = (Turn("system", (ENHANCE_INSTRUCTIONS,)), Turn("user", (quoted_caption(caption),)))
        return self.chatting(turns, sampling, level)

    def chatting(self, turns: Sequence[Turn], sampling: Sampling, level: ReasoningLevel | None) -> Outgoing:
        body: Json = {
            "model": self._model,
            "messages": [{"role": turn.role, "content": _content(turn)} for turn in turns],
            self._limit_name: sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.temperature > 0 and sampling.top_p < 1:
            body["top_p"] = sampling.top_p
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if level is not None:
            body["reasoning_effort"] = level
        return self._outgoing(body)

    def streamed(self, outgoing: Outgoing) -> Outgoing:
        body = orjson.loads(outgoing.body)
        return self._outgoing(body | {"stream": True, "stream_options": {"include_usage": True}})

    def _outgoing(self, body: Json) -> Outgoing:
        kept = {name: value for name, value in body.items() if name not in self._left_out}
        return Outgoing(f"{self._url}/chat/completions", orjson.dumps(kept), {"content-type": "application/json"})

    def assembly(self) -> Assembly:
        return _Assembly(self._named)

    def completion(self, content: bytes, headers: Mapping[str, str], milliseconds: float) -> Completion:
        body = as_object(orjson.loads(content))
        choice = _first_choice(body)
        if body is None or choice is None:
            raise ValueError("no choice")
        message = as_object(choice.get("message"))
        if message is None:
            raise ValueError("no message")
        text = final_of(as_text(message.get("content")) or "")
        return _completion(text, choice.get("finish_reason"), body, self._named, milliseconds)

    def _named(self, told: str | None) -> str:
        """The model's own name where its server has told it, else the name that an answer tells."""
        return self._own_name if told in (None, self._model) else str(told)

    def spoken(self, status: int, content: bytes) -> Spoken:
        error = _error(content)
        return Spoken(as_code(error.get("code")))

    def fault(self, status: int, spoken: Spoken, step: StepName) -> SightlineError | None:
        """A refusal is the client's fault only where its code says so: the request around the image is our own."""
        code = spoken.code or ""
        if code == NO_ANSWER:  # a server of ours
            return InvalidParameter("The model stopped without a final answer.", code=code)
        if status == OutOfMemory.status:
            return OutOfMemory(refused(step), code=spoken.code)
        if status >= 500 or status < 400:
            return None
        if code in _CONTENT:
            return InvalidParameter(f"The {step} step's content filter refused the request.", code="content_refused")
        if code in _TOO_LONG:
            return InvalidParameter("The prompt is longer than the model reads.", code="prompt_too_long")
        if status == BadRequest.status and "image" not in code:
            return UpstreamFailed(refused(step), code=f"{step}_step_refused")
        known = BY_STATUS.get(status)
        return None if known is None else known(refused(step), code=spoken.code)

    def learns(self, status: int, content: bytes) -> bool:
        """400 or 422 with OpenAI's `param` and a code that says it is not supported."""
        if status not in (400, 422):
            return False
        error = _error(content)
        name, code = as_text(error.get("param")), as_text(error.get("code"))
        logger.warning(
            "refused url=%s status=%d code=%s param=%s: %.*s",
            self._url, status, code, name, MAX_LOGGED_CHARACTERS, error.get("message"),
        )  # fmt: skip
        if code not in _REFUSALS or name is None:
            return False
        if name == "max_tokens" and self._limit_name == name:
            self._limit_name = "max_completion_tokens"
            return True
        if name in _OPTIONAL and name not in self._left_out:
            self._left_out.add(name)
            return True
        return False

    def key(self, api_key: str) -> Mapping[str, str]:
        return {"authorization": f"Bearer {api_key}"}

    def ready_url(self) -> str:
        return f"{self._url}/models"

    def is_ready(self, status: int, answer: object) -> bool:
        """A server that lists its models must list ours; one without a list is taken at its word."""
        if status in (404, 405, 501):
            return True
        return status == 200 and self._card(answer) is not None

    def metadata_url(self) -> str:
        return f"{self._url}/models"

    def metadata(self, answer: Mapping[str, object]) -> StepMetadata:
        """`root` is what vLLM and we say the model really is; `demo_model` is a word of ours."""
        card = self._card(answer) or {}
        self._own_name = as_text(card.get("root")) or self._own_name
        return StepMetadata(model=self._own_name, demo=card.get("demo_model") is True, backend="openai")

    def _card(self, answer: object) -> Mapping[str, object] | None:
        """The entry of a list of models that is ours."""
        listed = (as_object(answer) or {}).get("data")
        cards = [as_object(entry) or {} for entry in listed] if isinstance(listed, list) else []
        return next((card for card in cards if card.get("id") == self._model), None)


def with_version(base_url: str) -> str:
    """The base URL of the routes: `/v1` is added unless one of its last two segments is a version already."""
    url = base_url.rstrip("/")
    segments = urlsplit(url).path.split("/")[-2:]
    return url if any(_VERSION.fullmatch(segment) for segment in segments) else f"{url}/v1"


class _Assembly:
    """Chunks of one streamed answer."""

    def __init__(self, named: Callable[[str | None], str]) -> None:
        self._named = named
        self._filter = Filter()
        self._finish: object = None
        self._head: Mapping[str, object] = {}
        self._usage: object = None

    def feed(self, event: bytes) -> str:
        chunk = as_object(orjson.loads(event))
        if chunk is None:
            raise ValueError("not a chunk")
        if "error" in chunk:
            raise ValueError("an error in the stream")
        self._head = self._head or chunk
        self._usage = chunk.get("usage") or self._usage
        choice = _first_choice(chunk)
        if choice is None:  # the one with the usage
            return ""
        self._finish = choice.get("finish_reason") or self._finish
        delta = as_object(choice.get("delta")) or {}
        return self._filter.feed(as_text(delta.get("content")) or "")

    def completion(self, milliseconds: float) -> Completion:
        text = final_of(self._filter.text)
        if self._finish is None:
            raise ValueError("the stream ended before the answer")
        return _completion(text, self._finish, {**self._head, "usage": self._usage}, self._named, milliseconds)


def _completion(
    text: str,
    finish: object,
    body: Mapping[str, object],
    named: Callable[[str | None], str],
    milliseconds: float,
) -> Completion:
    reason = _reason(finish)
    if not text:
        raise InvalidParameter(f"The model stopped without a final answer ({reason}).", code=NO_ANSWER)
    usage = as_object(body.get("usage")) or {}
    prompt = as_object(usage.get("prompt_tokens_details")) or {}
    completion = as_object(usage.get("completion_tokens_details")) or {}
    image_tokens = prompt.get("image_tokens")
    return Completion(
        text=text,
        finish_reason=reason,
        usage=Usage(
            prompt_tokens=count(usage.get("prompt_tokens")),
            completion_tokens=count(usage.get("completion_tokens")),
            image_tokens=None if image_tokens is None else count(image_tokens),
            reasoning_tokens=count(completion.get("reasoning_tokens")),
        ),
        model=ModelInfo(
            name=named(as_text(body.get("model"))),
            revision=as_text(body.get("system_fingerprint")) or "unknown",
            demo=body.get("demo_model") is True,
        ),
        milliseconds=milliseconds,
        downscaled=body.get("downscaled") is True,
    )


def _reason(finish: object) -> FinishReason:
    if finish in ("length", "max_tokens"):
        return "length"
    if finish in ("stop", "eos", "end_turn", None):
        return "stop"
    if finish == "content_filter":
        raise InvalidParameter("The model's content filter stopped its answer.", code="content_refused")
    raise ValueError("unknown finish_reason")


def _first_choice(body: Mapping[str, object] | None) -> Mapping[str, object] | None:
    choices = (body or {}).get("choices")
    return as_object(choices[0]) if isinstance(choices, list) and choices else None


def _error(content: bytes) -> Mapping[str, object]:
    """The error object of a body: OpenAI's, or bare as older vLLM's."""
    try:
        body = as_object(orjson.loads(content)) or {}
    except orjson.JSONDecodeError:
        return {}
    return as_object(body.get("error")) or body


def _content(turn: Turn) -> object:
    if not turn.images:
        return turn.text
    return [_part(part) for part in turn.parts]


def _part(part: object) -> Json:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, ImageBytes):
        raise TypeError("images are fetched before they are sent on")
    packed = base64.b64encode(part.data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{media_type(part.data)};base64,{packed}"}}
