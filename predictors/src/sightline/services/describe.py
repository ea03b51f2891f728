"""Contract A: describe an image with Qwen2-VL or Qwen2.5-VL, now or by an id to ask for later."""

import asyncio
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sightline import v2
from sightline.engines.health import MemoryHealth
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InvalidParameter,
    NotFound,
    QueueFull,
    SightlineError,
    Unavailable,
)
from sightline.jobs.objects import open_store
from sightline.jobs.runs import Runs, RunState, Status
from sightline.services.base import (
    Json,
    Run,
    context_of,
    demo_fields,
    health,
    images_of,
    instances_of,
    preset_of,
    prompt_of,
    reject_unknown_inputs,
    sampling_of,
    spread,
)
from sightline.services.bodies import Body, json_response, read_body
from sightline.services.generation import Outcome, parameters_of, predictions_of, texts_of
from sightline.services.vision import Conversations, Prepared, check_chat, check_count, sources_of, uploads_of
from sightline.services.vision_remote import RemoteConversations
from sightline.settings import DescribeSettings
from sightline.sources import parse_source
from sightline.wire import (
    MAX_IMAGES_PER_PROMPT,
    MAX_TOKENS_CEILING,
    PRESETS,
    ChatRequest,
    Completion,
    Context,
    Deadline,
    ImageBytes,
    ImageS3,
    ImageSource,
    ImageUrl,
    Sampling,
    Turn,
)

if TYPE_CHECKING:
    from sightline.models.qwen_vl import QwenVL

MESSAGE = "Image description generated successfully."
DEFAULT_WAIT_SECONDS = 90
MAX_WAIT_SECONDS = 300


class DescribeService:
    """The `describe` predictor."""

    inputs = (v2.TensorSpec("image", "BYTES", (-1,)), v2.TensorSpec("prompt", "BYTES", (-1,)))
    outputs = (v2.TensorSpec("text", "BYTES", (-1,)),)

    def __init__(self, settings: DescribeSettings) -> None:
        self.name = settings.model_name
        self._settings = settings
        self._defaults = Sampling(max_tokens=settings.max_tokens)
        self._conversations: Conversations[QwenVL] | RemoteConversations = (
            RemoteConversations(settings, max_width=settings.max_width)
            if settings.engine == "remote"
            else Conversations(self._load_model, settings, max_width=settings.max_width)
        )
        self._runs: Runs | None = None
        self._run: Run | None = None

    def _load_model(self) -> "QwenVL":
        from sightline.models.qwen_vl import QwenVL
        from sightline.models.selfcheck import checked

        return checked(QwenVL, self._settings)

    async def load(self) -> None:
        store = open_store(
            self._settings.job_store,
            self.name,
            endpoint_url=self._settings.s3_endpoint_url,
            region=self._settings.aws_region,
        )
        await self._conversations.start()
        self._runs = Runs(store, self._execute, ttl_seconds=self._settings.job_ttl_seconds)
        await self._runs.start()

    async def close(self) -> None:
        if self._runs is not None:
            await self._runs.close(self._settings.grace_seconds)
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
        """What V2 metadata says beside the tensors. Raises Unavailable (503) before the model is loaded."""
        return self._conversations.metadata()

    async def preprocess(self, requests: Sequence[ChatRequest], context: Context) -> Prepared:
        return await self._conversations.prepare(requests, context)

    async def predict(self, prepared: Prepared, context: Context) -> list[Outcome]:
        return await self._conversations.answer(prepared, context)

    def stream(self, request: ChatRequest, context: Context) -> AsyncGenerator[str | Completion]:
        """The description piece by piece, then the whole."""
        return self._conversations.stream(request, context)

    def from_chat(self, turns: Sequence[Turn], options: Mapping[str, object]) -> ChatRequest:
        """A conversation about one or several images. A user's turn without words gets the preset's or the default."""
        *before, last = check_chat(turns)
        if not any(turn.images for turn in turns):
            raise BadRequest("This model describes images; the messages have none.", code="image_missing")
        preset = None if last.text.strip() else preset_of(options.get("preset"))
        if not last.text.strip():
            last = Turn("user", (*last.images, self._words(None, preset)))
        return replace(self._request([], options), turns=(*before, last), preset=preset)

    def from_v1(self, body: Mapping[str, object]) -> list[ChatRequest]:
        """An instance is one prompt: with one image, or with several under `images`."""
        return [self._from_instance(instance) for instance in instances_of(body)]

    def _from_instance(self, instance: object) -> ChatRequest:
        if isinstance(instance, str):
            return self._request([parse_source(instance)], {})
        fields = cast("Mapping[str, object]", instance) if isinstance(instance, dict) else {}
        images = sources_of(fields)
        if not images:
            raise BadRequest(
                "An instance needs an image: base64, a data URI, an allowed URL or s3://.", code="image_missing"
            )
        return self._request(images, fields)

    def to_v1(self, results: Sequence[Outcome]) -> Json:
        return predictions_of(results)

    def from_v2(self, request: v2.InferRequest) -> list[ChatRequest]:
        reject_unknown_inputs(request, self.inputs)
        images = images_of(request)
        tensor = request.input("prompt")
        prompts = spread(None if tensor is None else tensor.texts(), len(images), "prompt")
        return [
            self._request([image], {**request.parameters, **({} if prompt is None else {"prompt": prompt})})
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def to_v2(self, results: Sequence[Outcome]) -> v2.InferResponse:
        return v2.InferResponse(
            model_name=self.name,
            outputs=(v2.Tensor.of_texts("text", texts_of(results)),),
            parameters=parameters_of(results),
        )

    def _words(self, prompt: str | None, preset: str | None) -> str:
        """Own words win over a preset, a preset over the server's default."""
        return prompt or (self._settings.prompt if preset is None else PRESETS[preset])

    def _request(self, images: Sequence[ImageSource], options: Mapping[str, object]) -> ChatRequest:
        width = options.get("max_width")
        if width is not None and (isinstance(width, bool) or not isinstance(width, int) or not 28 <= width <= 8192):
            raise InvalidParameter("max_width must be a whole number from 28 to 8192.")
        prompt, preset = prompt_of(options.get("prompt")), preset_of(options.get("preset"))
        return ChatRequest(
            turns=(Turn("user", (*images, self._words(prompt, preset))),),
            sampling=sampling_of(options, self._defaults),
            max_width=width,
            preset=None if prompt else preset,
        )

    # --- contract A: its own routes ---

    def router(self, run: Run) -> APIRouter:
        """`POST /api/v1/run`, `GET /api/v1/status/{id}`, `GET /health`."""
        self._run = run
        router = APIRouter(tags=["describe"])
        router.add_api_route(
            "/api/v1/run",
            self._post_run,
            methods=["POST"],
            openapi_extra=_RUN_OPENAPI,
            response_model=None,
        )
        router.add_api_route(
            "/api/v1/status/{run_id}",
            self._get_status,
            methods=["GET"],
            openapi_extra={"responses": _RUN_ANSWERS},
            response_model=None,
        )
        router.add_api_route("/health", health, methods=["GET"])
        return router

    async def _post_run(self, request: Request) -> Response:
        """Describe an image, or several together (contract A1–A6); see the fields in the request body."""
        runs = self._started_runs()
        context = context_of(request)
        wait = _wait_seconds(request)
        body = await read_body(request, self._settings, several=_SEVERAL)
        fields = body.fields
        if isinstance(envelope := fields.get("input"), dict):
            fields = cast("Mapping[str, object]", envelope)
        action = fields.get("action", "inference")
        if action == "warmup":
            return json_response({"status": "COMPLETED", "output": None} | demo_fields(self._conversations.info))
        if action != "inference":
            raise BadRequest("action must be inference or warmup.", code="unknown_action")
        described = self._request(_native_images(fields, body), fields)
        stored, data = _stored(described, context, is_patient=wait == 0)
        run_id = await runs.submit(stored, data, context.principal)
        if wait == 0:
            return json_response(
                self._shown(RunState(run_id, "IN_PROGRESS")),
                headers={"Preference-Applied": "respond-async"},
            )
        try:
            state = await runs.wait(run_id, context.principal, wait)
        except asyncio.CancelledError:  # the client left before it knew the id: nobody can ask for the result
            await asyncio.shield(runs.cancel(run_id))
            raise
        if state is None:  # its TTL is shorter than the wait
            raise NotFound("No such run.", code="run_not_found")
        status = 200
        if state.error is not None:
            status = int(state.error.get("http_status", 500))
        return json_response(self._shown(state), status_code=status, headers=_retry_after(state))

    async def _get_status(self, request: Request, run_id: str) -> Response:
        """The state of a run (contract A2): the same shape as its answer would have been."""
        state = await self._started_runs().get(run_id, context_of(request).principal)
        if state is None:
            raise NotFound("No such run.", code="run_not_found")
        return json_response(self._shown(state))

    def _started_runs(self) -> Runs:
        if self._runs is None:
            raise Unavailable("The model is still loading.", code="model_not_ready", retry_after=5)
        return self._runs

    def _shown(self, state: RunState) -> Json:
        shown: Json = {"id": state.id, "status": state.status, "output": None}
        if state.output is not None:
            shown["output"] = {
                "status": "COMPLETED",
                "message": MESSAGE,
                "data": state.output["text"],
            } | {name: state.output[name] for name in ("tags", "downscaled") if name in state.output}
        if state.error is not None:
            shown |= {"detail": state.error["message"], "code": state.error["code"]}
        return shown | demo_fields(self._conversations.info)

    async def _execute(self, stored: Mapping[str, Any], data: bytes | None) -> tuple[Status, Mapping[str, Any]]:
        """Do one run; never raises but for cancellation. A patient run waits while the queue is full."""
        context = Context(
            request_id=str(stored["request_id"]),
            deadline=Deadline.after(self._settings.job_timeout_seconds),
        )
        request = _restored(stored, data)
        while True:
            try:
                assert self._run is not None  # noqa: S101 - the router exists before the model is loaded
                (result,) = await self._run([request], context)
            except DeadlineExceeded as error:
                return "TIMED_OUT", _error(error)
            except QueueFull as error:
                if not stored["is_patient"] or context.deadline.remaining() <= 1:
                    return "FAILED", _error(error)
                await asyncio.sleep(min(1.0, error.retry_after or 1.0))
            except SightlineError as error:
                return "FAILED", _error(error)
            else:
                return "COMPLETED", _output(cast("Completion", result))


_SEVERAL = ("images", "image_urls")


def _wait_seconds(request: Request) -> float:
    """How long the client waits: `?wait=0..300` or `Prefer: respond-async[, wait=N]`; default 90 (contract A1)."""
    preferences = request.headers.get("prefer", "").lower()
    value: str | None = request.query_params.get("wait")
    if value is None and (match := re.search(r"\bwait\s*=\s*(\d+)", preferences)):
        value = match[1]
    if value is None:
        return 0 if re.search(r"\brespond-async\b", preferences) else DEFAULT_WAIT_SECONDS
    if not value.isascii() or not value.isdigit() or int(value) > MAX_WAIT_SECONDS:
        raise InvalidParameter(f"wait must be a whole number of seconds from 0 to {MAX_WAIT_SECONDS}.")
    return int(value)


def _native_images(fields: Mapping[str, object], body: Body) -> list[ImageSource]:
    """The images of a body: uploads, then what its fields name. Raises InvalidParameter (422) without any."""
    files = {**{name: [upload] for name, upload in body.uploads.items()}, **body.files}
    images = uploads_of(files, "image", "image_url", "file", "images") + sources_of(fields)
    if not images:
        raise InvalidParameter("image_url is required.", code="image_missing")
    return check_count(images)


def _output(made: Completion) -> Json:
    output: Json = {"text": made.text}
    if made.tags is not None:
        output["tags"] = list(made.tags)
    if made.downscaled:
        output["downscaled"] = True
    return output


# --- a run as it is kept ---------------------------------------------------------------------------------------------


def _stored(request: ChatRequest, context: Context, *, is_patient: bool) -> tuple[dict[str, Any], bytes | None]:
    """JSON, and beside it the bytes of all images that came with the request, one after the other."""
    (turn,) = request.turns
    data = b"".join(image.data for image in turn.images if isinstance(image, ImageBytes))
    stored = {
        "request_id": context.request_id,
        "sources": [_stored_source(image) for image in turn.images],
        "prompt": turn.text,
        "preset": request.preset,
        "sampling": asdict(request.sampling),
        "max_width": request.max_width,
        "is_patient": is_patient,
    }
    return stored, data or None


def _stored_source(image: ImageSource) -> dict[str, str | int]:
    if isinstance(image, ImageBytes):
        return {"bytes": len(image.data)}
    if isinstance(image, ImageUrl):
        return {"url": image.url}
    assert isinstance(image, ImageS3)  # noqa: S101 - this service takes no paths
    return {"s3": image.uri}


def _restored(stored: Mapping[str, Any], data: bytes | None) -> ChatRequest:
    images: list[ImageSource] = []
    at = 0
    for source in cast("Sequence[Mapping[str, Any]]", stored["sources"]):
        if "url" in source:
            images.append(ImageUrl(source["url"]))
        elif "s3" in source:
            images.append(ImageS3(source["s3"]))
        else:
            images.append(ImageBytes((data or b"")[at : at + source["bytes"]]))
            at += source["bytes"]
    sampling = Sampling(**stored["sampling"] | {"stop": tuple(stored["sampling"]["stop"])})
    turn = Turn("user", (*images, stored["prompt"]))
    return ChatRequest((turn,), sampling, stored["max_width"], stored["preset"])


def _error(error: SightlineError) -> Json:
    return {
        "message": error.message,
        "code": error.code,
        "http_status": error.status,
        "retry_after": error.retry_after,
    }


def _retry_after(state: RunState) -> dict[str, str]:
    seconds = (state.error or {}).get("retry_after")
    return {"Retry-After": str(max(1, round(seconds)))} if seconds else {}


_RUN_ANSWERS: Json = {
    "200": {
        "description": "The run; its output once it is COMPLETED, detail and code when it is FAILED.",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["status", "output"],
                    "properties": {
                        "id": {"type": "string", "format": "uuid", "description": "Of everything but a warm-up."},
                        "status": {
                            "enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
                        },
                        "output": {
                            "oneOf": [
                                {"type": "null"},
                                {
                                    "type": "object",
                                    "required": ["status", "message", "data"],
                                    "properties": {
                                        "status": {"const": "COMPLETED"},
                                        "message": {"const": MESSAGE},
                                        "data": {"type": "string", "description": "The description."},
                                    },
                                },
                            ]
                        },
                        "detail": {"type": "string"},
                        "code": {"type": "string"},
                        "demo_model": {"type": "boolean"},
                        "model": {"type": "string"},
                    },
                }
            }
        },
    }
}

_RUN_OPENAPI: Json = {
    "responses": _RUN_ANSWERS,
    "parameters": [
        {
            "name": "wait",
            "in": "query",
            "schema": {
                "type": "integer",
                "minimum": 0,
                "maximum": MAX_WAIT_SECONDS,
                "default": DEFAULT_WAIT_SECONDS,
            },
            "description": "Seconds to wait for the result; 0 answers at once with an id.",
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "anyOf": [
                        *({"required": [name]} for name in ("image_url", "image_urls", "s3_uri", "input")),
                        {"required": ["action"], "properties": {"action": {"const": "warmup"}}},
                    ],
                    "properties": {
                        "image_url": {
                            "type": "string",
                            "description": "Allowed https:// URL, data URI, base64 or s3:// URI.",
                        },
                        "image_urls": {
                            "type": "array",
                            "items": {"type": "string"},
                            "maxItems": MAX_IMAGES_PER_PROMPT,
                            "description": "Several images for one description, instead of or behind `image_url`.",
                        },
                        "s3_uri": {"type": "string", "pattern": "^s3://"},
                        "prompt": {"type": ["string", "null"]},
                        "preset": {"type": "string", "enum": list(PRESETS)},
                        "max_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_TOKENS_CEILING},
                        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
                        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                        "seed": {"type": "integer", "minimum": 0},
                        "max_width": {"type": "integer", "minimum": 28, "maximum": 8192},
                        "action": {"type": "string", "enum": ["inference", "warmup"]},
                        "input": {"type": "object", "description": "The same fields, wrapped."},
                    },
                }
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "images": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "prompt": {"type": "string"},
                        "preset": {"type": "string", "enum": list(PRESETS)},
                    },
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    },
}
