"""Contract B: text from a prompt and any number of images, with Kimi-VL."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request, Response

from sightline import v2
from sightline.engines.health import MemoryHealth
from sightline.errors import BadRequest, InvalidParameter
from sightline.services.base import (
    Json,
    Run,
    context_of,
    demo_fields,
    health,
    instances_of,
    prompt_of,
    reject_unknown_inputs,
    sampling_of,
)
from sightline.services.bodies import Body, json_response, read_body
from sightline.services.events import event, streaming, wants_events
from sightline.services.generation import Outcome, parameters_of, predictions_of, texts_of
from sightline.services.vision import Conversations, Prepared, check_chat, check_count, sources_of, uploads_of
from sightline.services.vision_remote import RemoteConversations
from sightline.settings import GenerateSettings
from sightline.sources import parse_source
from sightline.wire import (
    MAX_IMAGES_PER_PROMPT,
    MAX_PROMPT_CHARACTERS,
    MAX_TOKENS_CEILING,
    ChatRequest,
    Completion,
    Context,
    ImageSource,
    Sampling,
    Turn,
)

if TYPE_CHECKING:
    from sightline.models.kimi_vl.model import KimiVL


class GenerateService:
    """The `generate` predictor: Kimi-VL."""

    inputs = (
        v2.TensorSpec("prompt", "BYTES", (1,)),
        v2.TensorSpec("image", "BYTES", (-1,)),
        v2.TensorSpec("system", "BYTES", (1,)),
    )
    outputs = (v2.TensorSpec("text", "BYTES", (1,)),)

    def __init__(self, settings: GenerateSettings) -> None:
        self.name = settings.model_name
        self._settings = settings
        self._defaults = Sampling(settings.max_tokens, settings.temperature, settings.top_p)
        self._conversations: Conversations[KimiVL] | RemoteConversations = (
            RemoteConversations(settings, max_width=settings.max_width)
            if settings.engine == "remote"
            else Conversations(self._load_model, settings, max_width=settings.max_width)
        )

    def _load_model(self) -> "KimiVL":
        from sightline.models.kimi_vl.model import KimiVL
        from sightline.models.selfcheck import checked

        return checked(KimiVL, self._settings)

    async def load(self) -> None:
        await self._conversations.start()

    async def close(self) -> None:
        await self._conversations.close()

    @property
    def fault(self) -> str | None:
        """Why no request can be answered any more, or None."""
        return self._conversations.fault

    @property
    def health(self) -> MemoryHealth | None:
        """Of the device's memory; None where the model is elsewhere."""
        return self._conversations.health

    async def try_again(self) -> None:
        """Answer something small; see `MemoryHealth.wants_trial`."""
        await self._conversations.try_again()

    def metadata(self) -> dict[str, v2.Scalar]:
        """What V2 metadata says beside the tensors: also how the weights are held, in bytes per dtype (B1).

        Raises Unavailable (503) before the model is loaded.
        """
        said = self._conversations.metadata()
        if isinstance(self._conversations, RemoteConversations):
            return said
        model = self._conversations.model
        held = {f"bytes_{dtype}": size for dtype, size in model.runtime.bytes_per_dtype.items()}
        return said | {"quantization": model.quantization} | held

    async def preprocess(self, requests: Sequence[ChatRequest], context: Context) -> Prepared:
        return await self._conversations.prepare(requests, context)

    async def predict(self, prepared: Prepared, context: Context) -> list[Outcome]:
        return await self._conversations.answer(prepared, context)

    def stream(self, request: ChatRequest, context: Context) -> AsyncGenerator[str | Completion]:
        """The answer piece by piece, then the whole."""
        return self._conversations.stream(request, context)

    # --- conversations, V1 and V2 ------------------------------------------------------------------------------------

    def from_chat(self, turns: Sequence[Turn], options: Mapping[str, object]) -> ChatRequest:
        """A conversation, with images or without."""
        turns = check_chat(turns)
        if not turns[-1].parts or not (turns[-1].text.strip() or turns[-1].images):
            raise BadRequest("The last message says nothing.", code="text_missing")
        return ChatRequest(tuple(turns), sampling_of(options, self._defaults))

    def from_v1(self, body: Mapping[str, object]) -> list[ChatRequest]:
        """An instance is a prompt, or an object with `prompt`, images and options."""
        return [self._from_instance(instance) for instance in instances_of(body)]

    def _from_instance(self, instance: object) -> ChatRequest:
        if isinstance(instance, str):
            instance = {"prompt": instance}
        if not isinstance(instance, dict):
            raise BadRequest("An instance needs a prompt.", code="prompt_missing")
        fields = cast("Mapping[str, object]", instance)
        return self._request(sources_of(fields), fields)

    def to_v1(self, results: Sequence[Outcome]) -> Json:
        return predictions_of(results)

    def from_v2(self, request: v2.InferRequest) -> list[ChatRequest]:
        """One prompt with all its images; the options are parameters."""
        reject_unknown_inputs(request, self.inputs)
        tensor = request.input("image")
        images = [parse_source(element) for element in tensor.elements()] if tensor else []
        fields = dict(request.parameters) | {
            "prompt": _one_text(request, "prompt"),
            "system_prompt": _one_text(request, "system"),
        }
        return [self._request(check_count(images), fields)]

    def to_v2(self, results: Sequence[Outcome]) -> v2.InferResponse:
        return v2.InferResponse(
            model_name=self.name,
            outputs=(v2.Tensor.of_texts("text", texts_of(results)),),
            parameters=parameters_of(results),
        )

    def _request(self, images: Sequence[ImageSource], fields: Mapping[str, object]) -> ChatRequest:
        """One prompt, images before the text (B3); no system prompt, no system turn (B7)."""
        prompt = prompt_of(fields.get("prompt"))
        if prompt is None:
            raise InvalidParameter("prompt is required.", code="prompt_missing")
        system = prompt_of(fields.get("system_prompt"), "system_prompt")
        before = () if system is None else (Turn("system", (system,)),)
        return ChatRequest((*before, Turn("user", (*images, prompt))), sampling_of(fields, self._defaults))

    # --- contract B: its own routes ----------------------------------------------------------------------------------

    def router(self, run: Run) -> APIRouter:
        """`POST /generate/text`, `/generate/image`, `/generate/image_url`, and `GET /health`."""
        router = APIRouter(tags=["generate"])

        async def text(request: Request) -> Response:
            """Text from a prompt (B2)."""
            body = await read_body(request, self._settings, several=_SEVERAL)
            if body.files or body.uploads:
                raise InvalidParameter("Images go to /generate/image.", code="image_unsupported")
            return await self._answer(request, run, self._request([], body.fields), body)

        async def images(request: Request) -> Response:
            """Text from a prompt and one to eight images, which all belong to it (B3, B4)."""
            body = await read_body(request, self._settings, several=_SEVERAL)
            sources = uploads_of(body.files, *_SEVERAL) + sources_of(body.fields)
            if not sources:
                raise InvalidParameter("images or image_url is required.", code="image_missing")
            return await self._answer(request, run, self._request(check_count(sources), body.fields), body)

        add = partial(router.add_api_route, methods=["POST"], response_model=None, responses=_ANSWERS)
        add("/generate/text", text, openapi_extra=_body(_TEXT))
        add("/generate/image", images, name="generate_image", openapi_extra=_body(_URLS, _UPLOADS))
        add("/generate/image_url", images, name="generate_image_url", openapi_extra=_body(_URLS, _URLS))
        router.add_api_route("/health", health, methods=["GET"])
        return router

    async def _answer(self, request: Request, run: Run, wanted: ChatRequest, body: Body) -> Response:
        context = context_of(request)
        if wants_events(request, body.fields):
            return await streaming(request, run.stream(wanted, context), partial(_event, context=context))
        (result,) = await run([wanted], context)
        return json_response(_shown(result, context))


def _one_text(request: v2.InferRequest, name: str) -> str | None:
    tensor = request.input(name)
    if tensor is None:
        return None
    texts = tensor.texts()
    if len(texts) != 1:
        raise BadRequest(f"'{name}' must hold one element.", code="invalid_tensor")
    return texts[0]


def _shown(made: Completion, context: Context) -> Json:
    """Contract B2, and what else there is to say."""
    shown: Json = {
        "output": made.text,
        "usage": asdict(made.usage),
        "finish_reason": made.finish_reason,
        "model": made.model.name,
        "request_id": context.request_id,
    }
    if made.downscaled:
        shown["downscaled"] = True
    return shown | demo_fields(made.model)


def _event(part: str | Completion, context: Context) -> bytes:
    return event("delta", {"delta": part}) if isinstance(part, str) else event("done", _shown(part, context))


# --- OpenAPI ---------------------------------------------------------------------------------------------------------

_SEVERAL = ("images", "image", "image_url", "image_urls")

_OPTIONS: Json = {
    "system_prompt": {"type": "string", "maxLength": MAX_PROMPT_CHARACTERS, "description": "None: no system turn."},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS_CEILING, "default": 4000},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2, "default": 0.7, "description": "0 is greedy."},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1, "default": 0.9},
    "seed": {"type": "integer", "minimum": 0, "description": "The same seed gives the same text."},
    "stream": {"type": "boolean", "description": "true, or `Accept: text/event-stream`: events delta, done, error."},
}
_PROMPT: Json = {"prompt": {"type": "string", "minLength": 1, "maxLength": MAX_PROMPT_CHARACTERS}}
_URL: Json = {"type": "string", "description": "Allowed https:// URL, data URI, base64 or s3:// URI."}
_FILES: Json = {"type": "array", "minItems": 1, "maxItems": MAX_IMAGES_PER_PROMPT, "items": {"type": "string"}}

_TEXT: Json = {"type": "object", "required": ["prompt"], "properties": _PROMPT | _OPTIONS}
_URLS: Json = {
    "type": "object",
    "required": ["prompt", "image_url"],
    "properties": _PROMPT | {"image_url": {"oneOf": [_URL, _FILES | {"items": _URL}]}} | _OPTIONS,
}
_UPLOADS: Json = {
    "type": "object",
    "required": ["prompt", "images"],
    "properties": _PROMPT | {"images": _FILES | {"items": {"type": "string", "format": "binary"}}} | _OPTIONS,
}


def _body(as_json: Json, as_form: Json | None = None) -> Json:
    content: Json = {"application/json": {"schema": as_json}}
    if as_form is not None:
        content["multipart/form-data"] = {"schema": as_form}
    return {"requestBody": {"required": True, "content": content}}


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or its events.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["output", "usage", "finish_reason", "model", "request_id"],
                    "properties": {
                        "output": {"type": "string"},
                        "usage": {"type": "object", "additionalProperties": {"type": ["integer", "null"]}},
                        "finish_reason": {"enum": ["stop", "length"]},
                        "model": {"type": "string"},
                        "request_id": {"type": "string"},
                        "downscaled": {
                            "type": "boolean",
                            "description": "true: seen at half the pixels, for lack of memory.",
                        },
                        "demo_model": {"type": "boolean", "description": "true: a demonstration model answered."},
                    },
                }
            },
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
}
