"""OpenAI's routes over every model that chats: `/v1/chat/completions` and `/v1/models`, also below `/openai`.

What a body may hold beside what is documented is OpenAI's: fields that would change the answer are refused with 400,
those that would not (`user`, `metadata`, `store`, …) are ignored. `/v1/models` is a route of KServe's V1 protocol too;
its answer serves both.
"""

import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response

from sightline import chain
from sightline.errors import BadRequest, InternalError, NotFound, SightlineError
from sightline.server.model import PredictorModel
from sightline.server.protocols import beside_the_loop, decompressed
from sightline.server.rendering import error_body, openai_error, translate
from sightline.services.base import ChatService, Json, context_of
from sightline.services.bodies import json_response
from sightline.services.events import EventStream
from sightline.sources import parse_source
from sightline.wire import (
    MAX_IMAGES_PER_PROMPT,
    MAX_PROMPT_CHARACTERS,
    Completion,
    Context,
    FinishReason,
    ImageSource,
    Turn,
    Usage,
)

log = logging.getLogger("sightline.server")

PREFIXES = ("/v1", "/openai/v1")
MAX_MESSAGES = 128
MAX_CHAT_CHARACTERS = 8 * MAX_PROMPT_CHARACTERS
"""Of all messages together. What the assistant said may be longer than what a user may say."""


class InvalidField(BadRequest):
    """A field of the body that cannot be taken. `param` is its place, such as `messages[0].content`."""

    def __init__(self, param: str, message: str, *, code: str = "invalid_value") -> None:
        super().__init__(message, code=code)
        self.param = param


@dataclass(frozen=True, slots=True)
class Chat:
    """A parsed request.

    options         every field but the messages, `max_completion_tokens` and `reasoning_effort` under our names
    includes_usage  whether a stream ends with a chunk of usage
    """

    model: str
    turns: tuple[Turn, ...]
    options: Mapping[str, object]
    is_stream: bool = False
    includes_usage: bool = False


class OpenAI:
    """The routes over the given models.

    max_bytes  of a request after decompression
    """

    def __init__(self, models: Sequence[PredictorModel], max_bytes: int) -> None:
        self._models = {model.name: model for model in models}
        self._max_bytes = max_bytes
        self._created = int(time.time())

    def router(self) -> APIRouter:
        """All routes; `include` it before KServe adds its own `/v1/models`."""
        router = APIRouter(tags=["OpenAI"])
        chats = any(hasattr(model.service, "from_chat") for model in self._models.values())
        for prefix in PREFIXES:
            shown: dict[str, Any] = {"include_in_schema": prefix == PREFIXES[0], "response_model": None}
            chat_shown: dict[str, Any] = shown | {"include_in_schema": chats and prefix == PREFIXES[0]}
            router.add_api_route(
                f"{prefix}/chat/completions",
                self._chat,
                methods=["POST"],
                openapi_extra=_CHAT_OPENAPI,
                responses=_CHAT_ANSWERS,
                **chat_shown,
            )
            router.add_api_route(f"{prefix}/models", self._list, methods=["GET"], **shown)
            router.add_api_route(f"{prefix}/models/{{model_name}}", self._retrieve, methods=["GET"], **shown)
        return router

    async def _list(self) -> Response:
        """The loaded models for OpenAI's clients (`data`), and the names of all for KServe's V1 (`models`)."""
        data = [self._card(model) for model in self._models.values() if model.has_loaded]
        return json_response({"object": "list", "data": data, "models": list(self._models)})

    async def _retrieve(self, model_name: str) -> Response:
        """One model, with V1's `name` and `ready`; 503 while it loads."""
        model = self._model(model_name)
        try:
            model.check_loaded()
        except SightlineError as error:
            body: Json = {"name": model_name, "ready": False, "error": openai_error(error)}
            return json_response(body, error.status, {"Retry-After": "5"})
        return json_response(self._card(model) | {"name": model_name, "ready": True})

    def _card(self, model: PredictorModel) -> Json:
        said = model.service.metadata()
        card: Json = {"id": model.name, "object": "model", "created": self._created, "owned_by": "sightline"}
        if "model" in said:
            card["root"] = said["model"]
        return card | _demo(said)

    async def _chat(self, request: Request) -> Response:
        """Answer a conversation; images as `image_url` parts: an allowed https:// URL, a data URI or s3://."""
        context = context_of(request)
        body = decompressed(await request.body(), request.headers.get("content-encoding"), self._max_bytes)
        chat = await beside_the_loop(len(body), lambda: parse_chat(body))
        model = self._model(chat.model)
        if not hasattr(model.service, "from_chat"):
            raise InvalidField("model", "This model does not chat.", code="not_a_chat_model")
        model.check_loaded()
        asked = cast("ChatService[Any]", model.service).from_chat(chat.turns, chat.options)
        said = model.service.metadata()
        head: Json = {
            "id": f"chatcmpl-{context.request_id}",
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": said.get("model_revision"),
        } | _demo(said)
        if not chat.is_stream:
            (result,) = await model.run([asked], context)
            return json_response(_answer(head, _completion(result)))
        parts = model.stream(asked, context)
        first = await anext(parts)  # what goes wrong until now gets a status of its own
        fault: Callable[[Exception], Json] = lambda error: _fault(error, request.url.path, context)  # noqa: E731
        return EventStream(_events(head, first, parts, fault, includes_usage=chat.includes_usage))

    def _model(self, name: str) -> PredictorModel:
        model = self._models.get(name)
        if model is None:
            raise NotFound("No such model. GET /v1/models lists those that are served.", code="model_not_found")
        return model


# --- answers ---------------------------------------------------------------------------------------------------------


def _demo(said: Mapping[str, object]) -> Json:
    return {"demo_model": True} if said.get("demo_model") else {}


def _completion(result: object) -> Completion:
    if isinstance(result, Completion):
        return result
    if isinstance(result, chain.ChainResult):
        return chain.as_completion(result)
    if isinstance(result, SightlineError):  # the fate of one item where others could have gone well
        raise result
    raise TypeError(f"a {type(result).__name__} is no answer to a conversation")


def _answer(head: Json, completion: Completion) -> Json:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": None,
        "finish_reason": completion.finish_reason,
    }
    answer: Json = head | {"object": "chat.completion", "choices": [choice], "usage": _usage(completion.usage)}
    return answer | _extras(completion)


def _extras(completion: Completion) -> Json:
    """What OpenAI's answers have no field for."""
    extras: Json = {}
    if completion.downscaled:
        extras["downscaled"] = True
    if completion.tags is not None:
        extras["tags"] = list(completion.tags)
    return extras


def _usage(usage: Usage) -> Json:
    prompt: Json = {"cached_tokens": 0}
    if usage.image_tokens is not None:
        prompt["image_tokens"] = usage.image_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": prompt,
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


async def _events(
    head: Json,
    first: str | Completion,
    parts: AsyncGenerator[str | Completion],
    fault: Callable[[Exception], Json],
    *,
    includes_usage: bool,
) -> AsyncGenerator[bytes]:
    """Server-sent events of one answer. A failure is an event too: the response has begun, and must end whole."""
    head = head | {"object": "chat.completion.chunk"}
    if includes_usage:
        head["usage"] = None

    def chunk(delta: Json, finish_reason: FinishReason | None = None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return head | {"choices": [choice]}

    whole: Completion | None = None
    try:
        async with aclosing(parts):
            yield _event(chunk({"role": "assistant", "content": ""}))
            if isinstance(first, str):
                yield _event(chunk({"content": first}))
                async for part in parts:
                    if isinstance(part, str):
                        yield _event(chunk({"content": part}))
                    else:
                        whole = part
            else:
                whole = first
        if whole is None:
            raise RuntimeError("a stream without its end")
    except Exception as error:
        yield _event(fault(error))  # without [DONE], by which clients know a whole answer
        return
    yield _event(chunk({}, whole.finish_reason) | _extras(whole))
    if includes_usage:
        yield _event(head | {"choices": [], "usage": _usage(whole.usage)})
    yield b"data: [DONE]\n\n"


def _event(data: Json) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def _fault(error: Exception, path: str, context: Context) -> Json:
    known = translate(error)
    if known is None:
        log.exception("bug in a stream request_id=%s path=%s", context.request_id, path, exc_info=error)
        known = InternalError("Something went wrong on the server.")
    else:
        log.warning("%s in a stream request_id=%s: %s", known.code, context.request_id, known.message)
    return error_body(path, known, context.request_id)


# --- requests --------------------------------------------------------------------------------------------------------

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "web_search_options": (),
}
"""Fields of OpenAI's that would change the answer in a way that no model here can, and the values that would not."""


def parse_chat(body: bytes) -> Chat:
    """Read the body of a chat completion. Raises BadRequest (400); images are not fetched yet."""
    try:
        parsed: object = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest("The body is not valid JSON.", code="invalid_json") from error
    if not isinstance(parsed, dict):
        raise BadRequest("The body must be a JSON object.")
    fields = cast("Mapping[str, object]", parsed)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidField("model", "model must name one of the served models.", code="model_missing")
    for name, values in _NEUTRAL.items():
        value = fields.get(name)
        if value is not None and value not in values:
            raise InvalidField(name, _refusal(name, values), code="unsupported_parameter")
    is_stream = _flag(fields, "stream", "stream")
    turns = _turns(fields.get("messages"))
    return Chat(model, turns, _options(fields), is_stream, _includes_usage(fields, is_stream=is_stream))


def _refusal(name: str, values: Sequence[object]) -> str:
    if not values:
        return f"{name} is not supported here; leave it out."
    told = " or ".join(orjson.dumps(value).decode() for value in values)
    return f"{name} is not supported here; leave it out or say {told}."


def _flag(fields: Mapping[str, object], name: str, param: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidField(param, f"{param} must be true or false.")
    return value is True


def _includes_usage(fields: Mapping[str, object], *, is_stream: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not is_stream or not isinstance(options, dict):
        raise InvalidField("stream_options", "stream_options must be an object, and only where stream is true.")
    return _flag(cast("Mapping[str, object]", options), "include_usage", "stream_options.include_usage")


def _options(fields: Mapping[str, object]) -> dict[str, object]:
    taken = {"messages", "model", "stream", "stream_options", "max_completion_tokens", "reasoning_effort"}
    options = {name: value for name, value in fields.items() if name not in taken}
    for theirs, ours in (("max_completion_tokens", "max_tokens"), ("reasoning_effort", "reasoning_level")):
        if fields.get(theirs) is not None:
            options[ours] = fields[theirs]
    return options


def _turns(value: object) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise InvalidField("messages", "messages must be a list with at least one message.")
    messages = cast("Sequence[object]", value)
    if len(messages) > MAX_MESSAGES:
        raise InvalidField(
            "messages", f"A conversation may have at most {MAX_MESSAGES} messages.", code="too_many_items"
        )
    turns = tuple(_turn(message, f"messages[{index}]") for index, message in enumerate(messages))
    if sum(len(turn.text) for turn in turns) > MAX_CHAT_CHARACTERS:
        message = f"A conversation may have at most {MAX_CHAT_CHARACTERS} characters."
        raise InvalidField("messages", message, code="prompt_too_long")
    if sum(len(turn.images) for turn in turns) > MAX_IMAGES_PER_PROMPT:
        message = f"A conversation may have at most {MAX_IMAGES_PER_PROMPT} images."
        raise InvalidField("messages", message, code="too_many_items")
    return turns


def _turn(value: object, place: str) -> Turn:
    message = _object(value, place)
    role = message.get("role")
    if role == "developer":
        role = "system"
    if role not in ("system", "user", "assistant"):
        raise InvalidField(f"{place}.role", "A role must be system, developer, user or assistant.")
    if message.get("tool_calls") or message.get("function_call"):
        raise InvalidField(f"{place}.tool_calls", "This server's models call no tools.", code="unsupported_parameter")
    turn = Turn(role, _parts(message.get("content"), f"{place}.content"))
    if turn.images and role != "user":
        raise InvalidField(f"{place}.content", "Only a user's message may hold images.")
    if role != "assistant" and len(turn.text) > MAX_PROMPT_CHARACTERS:
        text = f"A message may have at most {MAX_PROMPT_CHARACTERS} characters."
        raise InvalidField(f"{place}.content", text, code="prompt_too_long")
    return turn


def _parts(value: object, place: str) -> tuple[str | ImageSource, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise InvalidField(place, "The content of a message must be text or a list of parts.")
    parts = enumerate(cast("Sequence[object]", value))
    return tuple(_part(part, f"{place}[{index}]") for index, part in parts)


def _part(value: object, place: str) -> str | ImageSource:
    part = _object(value, place)
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise InvalidField(f"{place}.text", "The text of a part must be text.")
        return text
    if kind == "image_url":
        return _image(part.get("image_url"), f"{place}.image_url")
    raise InvalidField(f"{place}.type", "A part must be of type text or image_url.", code="unsupported_value")


def _image(value: object, place: str) -> ImageSource:
    if isinstance(value, dict):
        image = cast("Mapping[str, object]", value)
        if image.get("detail") not in (None, "auto", "low", "high", "original"):
            raise InvalidField(f"{place}.detail", "detail must be auto, low, high or original.")
        value, place = image.get("url"), f"{place}.url"
    if not isinstance(value, str) or not value.strip():
        raise InvalidField(place, "An image needs a URL.", code="image_missing")
    try:
        return parse_source(value)
    except BadRequest as error:
        raise InvalidField(place, error.message, code=error.code) from error


def _object(value: object, place: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise InvalidField(place, f"{place} must be an object.")
    return cast("Mapping[str, object]", value)


# --- OpenAPI ---------------------------------------------------------------------------------------------------------

_PART: Json = {
    "oneOf": [
        {
            "type": "object",
            "required": ["type", "text"],
            "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
        },
        {
            "type": "object",
            "required": ["type", "image_url"],
            "properties": {
                "type": {"const": "image_url"},
                "image_url": {
                    "type": "object",
                    "required": ["url"],
                    "properties": {
                        "url": {"type": "string", "description": "Data URI, allowed https:// URL or s3:// URI."},
                        "detail": {
                            "enum": ["auto", "low", "high", "original"],
                            "description": "Taken and ignored: the server's own limits decide.",
                        },
                    },
                },
            },
        },
    ]
}

_CHAT_OPENAPI: Json = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model", "messages"],
                    "properties": {
                        "model": {"type": "string", "description": "One of GET /v1/models."},
                        "messages": {
                            "type": "array",
                            "minItems": 1,
                            "maxItems": MAX_MESSAGES,
                            "items": {
                                "type": "object",
                                "required": ["role", "content"],
                                "properties": {
                                    "role": {"enum": ["system", "developer", "user", "assistant"]},
                                    "content": {
                                        "oneOf": [
                                            {"type": "string"},
                                            {"type": "array", "minItems": 1, "items": _PART},
                                        ]
                                    },
                                },
                            },
                        },
                        "max_tokens": {"type": "integer", "minimum": 1},
                        "max_completion_tokens": {"type": "integer", "minimum": 1},
                        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
                        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                        "seed": {"type": "integer", "minimum": 0},
                        "stop": {
                            "oneOf": [
                                {"type": "string", "minLength": 1},
                                {"type": "array", "maxItems": 4, "items": {"type": "string", "minLength": 1}},
                            ]
                        },
                        "stream": {"type": "boolean", "default": False},
                        "stream_options": {
                            "type": "object",
                            "properties": {"include_usage": {"type": "boolean", "default": False}},
                        },
                        "reasoning_effort": {
                            "enum": ["low", "medium", "high"],
                            "description": "Of a model that reasons; others ignore it.",
                        },
                    },
                }
            }
        },
    }
}

_CHAT_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or with `stream` its chunks.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["id", "object", "created", "model", "choices", "usage"],
                    "properties": {
                        "id": {"type": "string"},
                        "object": {"const": "chat.completion"},
                        "created": {"type": "integer"},
                        "model": {"type": "string"},
                        "choices": {"type": "array", "items": {"type": "object"}},
                        "usage": {"type": "object"},
                        "system_fingerprint": {"type": ["string", "null"], "description": "Revision of the model."},
                        "demo_model": {"type": "boolean", "description": "true: a demonstration model answered."},
                    },
                }
            },
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}
