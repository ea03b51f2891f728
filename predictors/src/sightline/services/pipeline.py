"""Contract D: the gateway, caption then enhance, as KServe model and as `POST /caption` (with E's upload shape)."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

import httpx
import numpy as np
import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from sightline import chain, images, v2
from sightline.engines.remote import RemoteStep, StepMetadata, StepName, new_client
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InvalidParameter,
)
from sightline.services.base import (
    Json,
    Run,
    context_of,
    demo_fields,
    flag_of,
    image_of,
    images_of,
    instances_of,
    level_of,
    prompt_of,
    reject_unknown_inputs,
    spread,
    together,
)
from sightline.services.bodies import json_response, read_body
from sightline.settings import PipelineSettings
from sightline.sources import Sources, parse_source
from sightline.wire import (
    Context,
    ImageBytes,
    ImagePath,
    ImageS3,
    ImageSource,
    ReasoningLevel,
    Sampling,
)

logger = logging.getLogger(__name__)

IMAGE_FAULT = "Failed to fetch/decode image: "
"""Contract D6: how the original begins such an answer."""

HEALTH_SECONDS = 1.0
HEALTH_CACHE_SECONDS = 2.0
FIRST_POLL_SECONDS = 0.25
LONGEST_POLL_SECONDS = 5.0


class Fetcher(Protocol):
    """What turns an image source into its encoded bytes, under the server's policy."""

    async def fetch(self, source: ImageSource) -> bytes: ...
    async def aclose(self) -> None: ...


class Step(Protocol):
    """What the gateway asks of a step beside its work."""

    async def is_ready(self, timeout_seconds: float = ...) -> bool: ...
    async def metadata(self, timeout_seconds: float = ...) -> StepMetadata | None: ...


@dataclass(frozen=True, slots=True)
class PipelineRequest:
    """One image, wherever it is, and what is asked of the chain. See `chain.ChainRequest`."""

    image: ImageSource
    prompt: str | None = None
    detailed: bool = True
    enhance: bool | None = None
    level: ReasoningLevel | None = None
    strict: bool = False
    explain: bool = False

    def fetched(self, data: bytes) -> chain.ChainRequest:
        """The request of the chain, with the bytes in hand."""
        filename = self.image.filename if isinstance(self.image, ImageBytes) else None
        return chain.ChainRequest(
            image=ImageBytes(data, filename),
            prompt=self.prompt,
            detailed=self.detailed,
            enhance=self.enhance,
            level=self.level,
            strict=self.strict,
            explain=self.explain,
        )


Prepared = tuple[chain.ChainRequest, ...]


class PipelineService:
    """The `pipeline` gateway. It holds no model; its two steps are processes of their own."""

    inputs = (v2.TensorSpec("image", "BYTES", (-1,)), v2.TensorSpec("prompt", "BYTES", (-1,)))
    outputs = (
        v2.TensorSpec("text", "BYTES", (-1,)),
        v2.TensorSpec("original_text", "BYTES", (-1,)),
        v2.TensorSpec("enhanced", "BOOL", (-1,)),
        v2.TensorSpec("enhancement_error", "BYTES", (-1,)),
    )

    def __init__(
        self,
        settings: PipelineSettings,
        *,
        sources: Fetcher | None = None,
        caption: RemoteStep | None = None,
        enhance: RemoteStep | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = settings.model_name
        self._settings = settings
        self._sources: Fetcher = sources or Sources(settings)
        self._limits = images.Limits.from_settings(settings)
        key = settings.step_api_key.get_secret_value() if settings.step_api_key else None
        self._clients: list[httpx.AsyncClient] = []  # one pool a step: a slow enhancer must not starve the captions

        def remote(url: str, model: str, step: StepName) -> RemoteStep:
            self._clients.append(new_client(settings.max_concurrency))
            return RemoteStep(url, model, key, self._clients[-1], step=step)

        self._caption = caption or remote(settings.describe_url, settings.describe_model, "caption")
        if enhance is None and settings.enhance_url is not None:
            enhance = remote(settings.enhance_url, settings.enhance_model, "enhance")
        self._enhance = enhance
        self._policy = chain.ChainPolicy(
            enhance_by_default=settings.enhance_by_default,
            level=settings.reasoning_level,
            enhance_timeout_seconds=settings.enhance_timeout_seconds,
            caption_sampling=Sampling(max_tokens=settings.caption_tokens),
            enhance_sampling=Sampling(max_tokens=settings.enhance_tokens),
        )
        self._fetching = asyncio.Semaphore(settings.max_concurrency)
        self._running = asyncio.Semaphore(settings.max_concurrency)
        self._sleep = sleep
        self._health = Health(self._caption, enhance, settings, clock)

    async def load(self) -> None:
        """Wait until the caption step is ready, however long it loads. The enhance step may be down."""
        pause = FIRST_POLL_SECONDS
        while not await self._caption.is_ready(HEALTH_SECONDS):
            if pause == FIRST_POLL_SECONDS:
                logger.info("waiting for the caption step url=%s", self._settings.describe_url)
            await self._sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)
        await self._health.now()

    async def close(self) -> None:
        """Close the connections to the steps and to the image sources."""
        for client in self._clients:
            await client.aclose()
        await self._sources.aclose()

    async def is_healthy(self) -> bool:
        """Whether the caption step is ready now; at most two seconds old. Never raises."""
        return bool((await self._health.now())["ok"])

    def metadata(self) -> dict[str, v2.Scalar]:
        """What the model's V2 metadata says beside its tensors, as the steps last said it."""
        return self._health.metadata()

    async def preprocess(self, requests: Sequence[PipelineRequest], context: Context) -> Prepared:
        """Fetch every image and check its header. Raises 4xx before a model is asked; 504 when it takes too long."""
        return tuple(await together([self._fetch(request, context) for request in requests]))

    async def predict(self, prepared: Prepared, context: Context) -> list[chain.ChainResult]:
        """Run the chains together, at most `max_concurrency` of all calls at once; the first failure ends the rest."""
        return await together([self._chain(request, context) for request in prepared])

    async def _fetch(self, request: PipelineRequest, context: Context) -> chain.ChainRequest:
        async with _turn(self._fetching, context):
            try:
                async with asyncio.timeout(context.deadline.remaining()):
                    data = await self._sources.fetch(request.image)
            except TimeoutError as error:
                raise DeadlineExceeded("The image did not arrive before the deadline.") from error
            await asyncio.to_thread(images.probe, data, self._limits)
        return request.fetched(data)

    async def _chain(self, request: chain.ChainRequest, context: Context) -> chain.ChainResult:
        async with _turn(self._running, context):
            result = await chain.run(
                request,
                context,
                caption=self._caption.describe,
                enhance=self._enhance.enhance if self._enhance else None,
                policy=self._policy,
            )
        if result.enhancement_error is not None:
            logger.warning(
                "caption returned without enhancement code=%s request_id=%s",
                result.enhancement_error.code,
                context.request_id,
            )
        return result

    # --- V1 and V2 -------------------------------------------------------------------------------------------------

    def from_v1(self, body: Mapping[str, object]) -> list[PipelineRequest]:
        return [_request(*image_of(instance)) for instance in instances_of(body)]

    def to_v1(self, results: Sequence[chain.ChainResult]) -> Json:
        return {"predictions": [_answer(result) for result in results]} | _demo(results[0])

    def from_v2(self, request: v2.InferRequest) -> list[PipelineRequest]:
        reject_unknown_inputs(request, self.inputs)
        sources = images_of(request)
        tensor = request.input("prompt")
        prompts = spread(tensor.texts() if tensor else None, len(sources), "prompt")
        options = {name: value for name, value in request.parameters.items() if name != "prompt"}
        return [_request(image, options | {"prompt": prompt}) for image, prompt in zip(sources, prompts, strict=True)]

    def to_v2(self, results: Sequence[chain.ChainResult]) -> v2.InferResponse:
        first = results[0]
        steps = [step for result in results for step in result.steps]
        parameters: dict[str, v2.Scalar] = {
            "model": first.model.name,
            "model_revision": first.model.revision,
            "image_tokens": sum(step.image_tokens for step in steps),
            "milliseconds": max(sum(step.milliseconds for step in result.steps) for result in results),
        }
        if any(result.demo for result in results):
            parameters["demo_model"] = True
        if enhancer := next((step.model for step in steps if step.name == "enhance"), None):
            parameters["enhancer_model"] = enhancer
        if any(result.truncated for result in results):
            parameters["truncated"] = True
        if any(result.added_terms is not None for result in results):
            parameters["explanation"] = orjson.dumps([_explanation(result) for result in results]).decode()
        return v2.InferResponse(
            model_name=self.name,
            outputs=(
                v2.Tensor.of_texts("text", [result.caption for result in results]),
                v2.Tensor.of_texts("original_text", [result.original_caption or result.caption for result in results]),
                v2.Tensor.of_array("enhanced", "BOOL", np.array([result.enhanced for result in results])),
                v2.Tensor.of_bytes("enhancement_error", [_fault_bytes(result) for result in results]),
            ),
            parameters=parameters,
        )

    # --- native ----------------------------------------------------------------------------------------------------

    def router(self, run: Run) -> APIRouter:
        """`POST /caption` in three content types, and `GET /health`."""
        router = APIRouter()

        @router.post(
            "/caption",
            summary="Caption one image, and enhance the caption",
            response_model=None,
            responses={200: {"model": CaptionAnswer}} | _FAULTS,
            openapi_extra={"requestBody": {"required": True, "content": _CAPTION_CONTENT}},
        )
        async def caption(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            started = time.perf_counter()
            wanted, echo = await self._read(request)
            with _image_faults():
                (result,) = await run([wanted], context_of(request))
            answer = _answer(result)
            if "filename" in echo:
                answer |= {"processing_time": round(time.perf_counter() - started, 4)}
            return json_response(echo | answer)

        @router.get("/health", summary="What the pipeline is made of, now", response_model=HealthAnswer)
        async def health() -> Json:  # pyright: ignore[reportUnusedFunction]
            return await self._health.now()

        return router

    async def _read(self, request: Request) -> tuple[PipelineRequest, Json]:
        """The request in whichever body it came, and the fields of it that its answer repeats."""
        body = await read_body(request, self._settings)
        upload = body.uploads.get("image")
        if upload is None:
            image, echo = self._image(body.fields)
            return _request(image, body.fields), echo
        return _request(upload, body.fields), {"filename": upload.filename} if upload.filename else {}

    def _image(self, fields: Mapping[str, object]) -> tuple[ImageSource, Json]:
        """The image of a native body, and the field that the answer repeats. Raises 400 or 422."""
        if (s3_uri := _text(fields, "s3_uri")) is not None:
            if not s3_uri.startswith("s3://"):
                raise BadRequest("s3_uri must start with s3://", code="s3_uri_invalid")
            return ImageS3(s3_uri), {"s3_uri": s3_uri}
        for name in ("image", "image_url"):
            if (value := _text(fields, name)) is not None:
                with _image_faults():
                    return parse_source(value), {}
        if (path := _text(fields, "image_path")) is not None:
            if self._settings.image_root is None:
                raise BadRequest("This server reads no images from its own disk.", code="image_path_unsupported")
            return ImagePath(path), {"image_path": path}
        raise InvalidParameter("s3_uri or image is missing.", code="image_missing")


class Health:
    """What `GET /health` says: true values, short-lived, asked once for all who ask at the same time."""

    def __init__(
        self, caption: Step, enhance: Step | None, settings: PipelineSettings, clock: Callable[[], float]
    ) -> None:
        self._caption = caption
        self._enhance = enhance
        self._settings = settings
        self._clock = clock
        self._lock = asyncio.Lock()
        self._asked_at: float | None = None
        self._is_ready = False
        self._caption_said: StepMetadata | None = None
        self._enhance_said: StepMetadata | None = None

    async def now(self) -> Json:
        """The six keys of contract D4. Takes at most a second and never raises."""
        async with self._lock:
            if self._asked_at is None or self._clock() - self._asked_at >= HEALTH_CACHE_SECONDS:
                await self._ask()
                self._asked_at = self._clock()
        caption, enhance = self._caption_said, self._enhance_said
        return {
            "ok": self._is_ready,
            "backend": caption.backend if caption else None,
            "device": caption.device if caption else None,
            "gpt_oss_enabled": self._enhance is not None and self._settings.enhance_by_default,
            "gpt_oss_model": enhance.model if enhance else None,
            "gpt_oss_reasoning_level": self._settings.reasoning_level,
        }

    def metadata(self) -> dict[str, v2.Scalar]:
        """The same for the V2 metadata, without asking; unknown values are left out."""
        caption, enhance = self._caption_said, self._enhance_said
        said: dict[str, v2.Scalar | None] = {
            "model": caption.model if caption else None,
            "model_revision": caption.revision if caption else None,
            "demo_model": any(step.demo for step in (caption, enhance) if step),
            "backend": caption.backend if caption else None,
            "device": caption.device if caption else None,
            "dtype": caption.dtype if caption else None,
            "enhancer_model": enhance.model if enhance else None,
            "enhance_by_default": self._enhance is not None and self._settings.enhance_by_default,
            "reasoning_level": self._settings.reasoning_level,
        }
        return {name: value for name, value in said.items() if value is not None}

    async def _ask(self) -> None:
        self._is_ready, self._caption_said, self._enhance_said = await asyncio.gather(
            self._caption.is_ready(HEALTH_SECONDS),
            self._caption.metadata(HEALTH_SECONDS),
            self._enhance.metadata(HEALTH_SECONDS) if self._enhance else _nothing(),
        )


# --- bodies ----------------------------------------------------------------------------------------------------------


def _request(image: ImageSource, options: Mapping[str, object]) -> PipelineRequest:
    """Read the options that every protocol shares. Raises InvalidParameter (422)."""
    enhance = flag_of(options, "use_gpt_oss")
    return PipelineRequest(
        image=image,
        prompt=prompt_of(options.get("prompt")),
        detailed=flag_of(options, "detailed") is not False,
        enhance=flag_of(options, "enhance") if enhance is None else enhance,
        level=level_of(options.get("reasoning_level")),
        strict=flag_of(options, "strict") is True,
        explain=flag_of(options, "explain") is True,
    )


def _text(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    raise InvalidParameter(f"{name} must be text.")


def _answer(result: chain.ChainResult) -> Json:
    """What every JSON answer says about one image: contract D1, and more only where there is more to say."""
    answer: Json = {"caption": result.caption}
    if result.original_caption is not None:
        answer["original_caption"] = result.original_caption
    answer["enhanced"] = result.enhanced
    if result.enhancement_error is not None:
        answer["enhancement_error"] = asdict(result.enhancement_error)
    if result.truncated:
        answer["truncated"] = True
    if result.added_terms is not None:
        answer |= _explanation(result)
    return answer | _demo(result)


def _explanation(result: chain.ChainResult) -> Json:
    return {"added_terms": list(result.added_terms or ()), "steps": [asdict(step) for step in result.steps]}


def _demo(result: chain.ChainResult) -> Json:
    return demo_fields(replace(result.model, demo=result.demo))


def _fault_bytes(result: chain.ChainResult) -> bytes:
    return orjson.dumps(asdict(result.enhancement_error)) if result.enhancement_error else b""


@contextmanager
def _image_faults() -> Generator[None, None, None]:
    """Contract D6: every 400 about the image begins with the same words."""
    try:
        yield
    except BadRequest as error:
        raise type(error)(IMAGE_FAULT + error.message, code=error.code, retry_after=error.retry_after) from error


# --- in turn -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def _turn(gate: asyncio.Semaphore, context: Context) -> AsyncGenerator[None, None]:
    """Hold one of the places of a gate. Raises DeadlineExceeded (504) when none comes free in time."""
    context.deadline.check()
    try:
        async with asyncio.timeout(context.deadline.remaining()):
            await gate.acquire()
    except TimeoutError as error:
        raise DeadlineExceeded("The deadline passed while the request waited for its turn.") from error
    try:
        yield
    finally:
        gate.release()


async def _nothing() -> None:
    return None


# --- OpenAPI ---------------------------------------------------------------------------------------------------------


class CaptionOptions(BaseModel):
    """What every body may say beside its image."""

    detailed: bool = Field(True, description="false: one short sentence.")
    use_gpt_oss: bool | None = Field(None, description="true: enhance; false: do not; absent: as the pipeline is set.")
    reasoning_level: ReasoningLevel | None = Field(
        None, description="Effort of the enhancer; absent: as the pipeline is set."
    )
    strict: bool = Field(False, description="true: a wanted enhancement that fails is 503, not a bare caption.")
    explain: bool = Field(False, description="true: tell the steps, and which terms the enhancement added.")
    prompt: str | None = Field(None, max_length=8192, description="Replaces the prompt of `detailed`.")


class CaptionBody(CaptionOptions):
    """One image by its place or its content, and options. Unknown fields are ignored."""

    s3_uri: str | None = Field(None, pattern="^s3://", description="`s3://bucket/key`; repeated in the answer.")
    image: str | None = Field(None, description="Base64, a data URI, an allowed URL or s3://.")
    image_url: str | None = Field(None, description="An allowed URL.")
    image_path: str | None = Field(None, description="A path below the server's image root, where it has one.")


class EnhancementError(BaseModel):
    """Why a wanted enhancement is missing."""

    code: Literal[
        "enhancer_not_configured",
        "enhancer_unavailable",
        "enhancer_timeout",
        "enhancer_failed",
        "no_final_answer",
    ]
    message: str


class StepAnswer(BaseModel):
    """One step that answered."""

    name: Literal["caption", "enhance"]
    model: str
    revision: str
    milliseconds: float
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int
    reasoning_tokens: int


class CaptionAnswer(BaseModel):
    """`caption`, `enhanced` and what the request named its image by; every other field only where it applies."""

    caption: str
    enhanced: bool
    original_caption: str | None = Field(None, description="The caption behind an enhanced one.")
    s3_uri: str | None = Field(None, description="As in the request.")
    image_path: str | None = Field(None, description="As in the request.")
    filename: str | None = Field(None, description="Of an upload.")
    processing_time: float | None = Field(None, description="Seconds, of an upload.")
    enhancement_error: EnhancementError | None = Field(None, description="Enhancement was wanted and failed.")
    truncated: bool | None = Field(None, description="true: a text was cut.")
    added_terms: list[str] | None = Field(None, description="With `explain`.")
    steps: list[StepAnswer] | None = Field(None, description="With `explain`.")
    demo_model: bool | None = Field(None, description="true: answered by a demonstration model.")
    model: str | None = Field(None, description="Own name of the caption model, beside `demo_model`.")


class HealthAnswer(BaseModel):
    """Contract D4."""

    ok: bool = Field(description="The caption step is ready now.")
    backend: str | None = Field(description="Engine of the caption step; null while it does not answer.")
    device: str | None = Field(description="Device of the caption step; null while it does not answer.")
    gpt_oss_enabled: bool = Field(description="There is an enhance step, and it is used unless a request says no.")
    gpt_oss_model: str | None = Field(description="Own name of the enhancing model; null while none answers.")
    gpt_oss_reasoning_level: ReasoningLevel = Field(description="Used when a request names none.")


class FaultAnswer(BaseModel):
    """An error of a native route."""

    detail: str
    code: str


_FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": FaultAnswer} for status in (400, 404, 413, 422, 429, 502, 503, 504)
}


def _form_schema() -> dict[str, Any]:
    schema = CaptionOptions.model_json_schema()
    schema["properties"] = {"image": {"type": "string", "format": "binary"}} | schema["properties"]
    return schema | {"title": "CaptionForm", "required": ["image"]}


_CAPTION_CONTENT: dict[str, Any] = {
    "application/json": {"schema": CaptionBody.model_json_schema()},
    "multipart/form-data": {"schema": _form_schema()},
    "image/*": {"schema": {"type": "string", "format": "binary"}},
}
