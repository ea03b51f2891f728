"""Contract A: describe an image with Qwen2-VL or Qwen2.5-VL, now or by an id to ask for later."""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sightline import v2
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InvalidParameter,
    NotFound,
    QueueFull,
    SightlineError,
    Unavailable,
)
from sightline.images import Decoder, Limits
from sightline.jobs.objects import open_store
from sightline.jobs.runs import Runs, RunState, Status
from sightline.services.base import (
    Json,
    Run,
    context_of,
    demo_fields,
    health,
    image_of,
    images_of,
    instances_of,
    prompt_of,
    reject_unknown_inputs,
    sampling_of,
    spread,
    together,
)
from sightline.services.bodies import json_response, read_body
from sightline.services.generation import (
    Generation,
    completion,
    parameters_of,
    predictions_of,
    within,
)
from sightline.settings import DescribeSettings
from sightline.sources import Sources, parse_source
from sightline.wire import (
    PRESETS,
    Completion,
    Context,
    Deadline,
    DescribeRequest,
    ImageBytes,
    ImageS3,
    ImageSource,
    ImageUrl,
    Sampling,
)

if TYPE_CHECKING:
    from sightline.models.qwen_vl import QwenVL

MESSAGE = "Image description generated successfully."
DEFAULT_WAIT_SECONDS = 90
MAX_WAIT_SECONDS = 300


@dataclass(frozen=True, slots=True)
class _Prepared:
    prompts: tuple[tuple[Any, Sampling], ...]
    started: float


class DescribeService:
    """The `describe` predictor."""

    inputs = (v2.TensorSpec("image", "BYTES", (-1,)), v2.TensorSpec("prompt", "BYTES", (-1,)))
    outputs = (v2.TensorSpec("text", "BYTES", (-1,)),)

    def __init__(self, settings: DescribeSettings) -> None:
        self.name = settings.model_name
        self._settings = settings
        self._defaults = Sampling(max_tokens=settings.max_tokens)
        self._generation: Generation[QwenVL] = Generation(
            self._load_model, max_batch=settings.max_batch, threads=settings.decode_threads
        )
        self._sources = Sources(settings)
        self._decoder = Decoder(Limits.from_settings(settings), threads=settings.decode_threads)
        self._runs: Runs | None = None
        self._run: Run | None = None

    def _load_model(self) -> "QwenVL":
        from sightline.models.qwen_vl import QwenVL

        return QwenVL(self._settings)

    async def load(self) -> None:
        store = open_store(
            self._settings.job_store,
            self.name,
            endpoint_url=self._settings.s3_endpoint_url,
            region=self._settings.aws_region,
        )
        await self._generation.start()
        self._runs = Runs(store, self._execute, ttl_seconds=self._settings.job_ttl_seconds)
        await self._runs.start()

    async def close(self) -> None:
        if self._runs is not None:
            await self._runs.close(self._settings.grace_seconds)
        await self._generation.close()
        await self._sources.aclose()
        self._decoder.close()

    def metadata(self) -> dict[str, v2.Scalar]:
        """What V2 metadata says beside the tensors. Raises Unavailable (503) before the model is loaded."""
        return self._generation.metadata()

    async def preprocess(self, requests: Sequence[DescribeRequest], context: Context) -> _Prepared:
        started = time.monotonic()
        model = self._generation.model
        prompts = await within(context.deadline, together(self._prompt(model, request) for request in requests))
        samplings = [request.sampling for request in requests]
        return _Prepared(tuple(zip(prompts, samplings, strict=True)), started)

    async def _prompt(self, model: "QwenVL", request: DescribeRequest) -> object:
        data = await self._sources.fetch(request.image)
        width = request.max_width or self._settings.max_width
        image = await self._decoder.decode(data, max_width=width, max_height=2 * width)
        prompt = request.prompt or self._settings.prompt
        return await self._generation.in_pool(lambda: model.preprocess(image, prompt))

    async def predict(self, prepared: _Prepared, context: Context) -> list[Completion]:
        model = self._generation.model
        return [
            completion(model.postprocess(generated), generated, model.info, prepared.started)
            for generated in await self._generation.generate_all(prepared.prompts, context)
        ]

    def from_v1(self, body: Mapping[str, object]) -> list[DescribeRequest]:
        requests: list[DescribeRequest] = []
        for instance in instances_of(body):
            image, fields = image_of(instance)
            requests.append(self._request(image, fields))
        return requests

    def to_v1(self, results: Sequence[Completion]) -> Json:
        return predictions_of(results)

    def from_v2(self, request: v2.InferRequest) -> list[DescribeRequest]:
        reject_unknown_inputs(request, self.inputs)
        images = images_of(request)
        tensor = request.input("prompt")
        prompts = spread(None if tensor is None else tensor.texts(), len(images), "prompt")
        return [
            self._request(image, {**request.parameters, **({} if prompt is None else {"prompt": prompt})})
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def to_v2(self, results: Sequence[Completion]) -> v2.InferResponse:
        return v2.InferResponse(
            model_name=self.name,
            outputs=(v2.Tensor.of_texts("text", [item.text for item in results]),),
            parameters=parameters_of(results),
        )

    def _request(self, image: ImageSource, options: Mapping[str, object]) -> DescribeRequest:
        width = options.get("max_width")
        if width is not None and (isinstance(width, bool) or not isinstance(width, int) or not 28 <= width <= 8192):
            raise InvalidParameter("max_width must be a whole number from 28 to 8192.")
        return DescribeRequest(
            image=image,
            prompt=prompt_of(options.get("prompt")) or _preset(options.get("preset")),
            sampling=sampling_of(options, self._defaults),
            max_width=width,
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
        router.add_api_route("/api/v1/status/{run_id}", self._get_status, methods=["GET"], response_model=None)
        router.add_api_route("/health", health, methods=["GET"])
        return router

    async def _post_run(self, request: Request) -> Response:
        """Describe one image (contract A1–A6); see the fields in the request body."""
        runs = self._started_runs()
        context = context_of(request)
        wait = _wait_seconds(request)
        body = await read_body(request, self._settings)
        fields = body.fields
        if isinstance(envelope := fields.get("input"), dict):
            fields = cast("Mapping[str, object]", envelope)
        action = fields.get("action", "inference")
        if action == "warmup":
            return json_response({"status": "COMPLETED", "output": None} | demo_fields(self._generation.model.info))
        if action != "inference":
            raise BadRequest("action must be inference or warmup.", code="unknown_action")
        described = self._request(_native_image(fields, body.uploads), fields)
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
            }
        if state.error is not None:
            shown |= {"detail": state.error["message"], "code": state.error["code"]}
        return shown | demo_fields(self._generation.model.info)

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
                return "COMPLETED", {"text": cast("Completion", result).text}


def _preset(value: object) -> str | None:
    if value is None:
        return None
    if value not in PRESETS:
        raise InvalidParameter(f"preset must be one of {', '.join(PRESETS)}.")
    return PRESETS[cast("str", value)]


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


def _native_image(fields: Mapping[str, object], uploads: Mapping[str, ImageBytes]) -> ImageSource:
    for name in ("image", "image_url", "file"):
        if name in uploads:
            return uploads[name]
    for name in ("image_url", "image", "s3_uri"):
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            return parse_source(value)
        if value is not None and not isinstance(value, str):
            raise InvalidParameter(f"{name} must be text.")
    raise InvalidParameter("image_url is required.", code="image_missing")


def _stored(request: DescribeRequest, context: Context, *, is_patient: bool) -> tuple[dict[str, Any], bytes | None]:
    """A run as it is kept: JSON, and the bytes of an upload beside it."""
    data = request.image.data if isinstance(request.image, ImageBytes) else None
    source: dict[str, str] = {}
    if isinstance(request.image, ImageUrl):
        source = {"url": request.image.url}
    elif isinstance(request.image, ImageS3):
        source = {"s3": request.image.uri}
    stored = {
        "request_id": context.request_id,
        "source": source,
        "prompt": request.prompt,
        "sampling": asdict(request.sampling),
        "max_width": request.max_width,
        "is_patient": is_patient,
    }
    return stored, data


def _restored(stored: Mapping[str, Any], data: bytes | None) -> DescribeRequest:
    source = stored["source"]
    image: ImageSource
    if data is not None:
        image = ImageBytes(data)
    elif "url" in source:
        image = ImageUrl(source["url"])
    else:
        image = ImageS3(source["s3"])
    return DescribeRequest(image, stored["prompt"], Sampling(**stored["sampling"]), stored["max_width"])


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


_RUN_OPENAPI: Json = {
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
                    "required": ["image_url"],
                    "properties": {
                        "image_url": {
                            "type": "string",
                            "description": "Allowed https:// URL, data URI, base64 or s3:// URI.",
                        },
                        "prompt": {"type": "string", "nullable": True},
                        "preset": {"type": "string", "enum": list(PRESETS)},
                        "max_tokens": {"type": "integer", "minimum": 1, "maximum": 4096},
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
                        "prompt": {"type": "string"},
                    },
                }
            },
        },
    },
}
