"""Contract D: the gateway, caption then enhance, as KServe model and as `POST /caption` (with E's upload shape).

`POST /caption` with `Accept: text/event-stream` answers as it goes: `caption` as soon as there is one, then the pieces
of its enhancement (`enhancement.delta`, where the step streams), then `done` with the whole answer, or `error`.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal, Protocol

import numpy as np
import orjson
from fastapi import APIRouter, Request, Response

from sightline import chain, images, v2, web
from sightline.chain import ChainOptions, ChainPolicy, ChainResult, as_completion
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InvalidParameter,
    OutOfMemory,
    Unavailable,
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
    item_error,
    item_errors,
    level_of,
    preset_of,
    prompt_of,
    reject_unknown_inputs,
    s3_source,
    sampling_of,
    settled,
    spread,
    together,
)
from sightline.services.batch_progress import add_progress
from sightline.services.bodies import json_response, read_body
from sightline.services.events import event, streaming, wants_events
from sightline.services.pipeline_openapi import CAPTION_CONTENT, EVENTS, FAULTS, CaptionAnswer, HealthAnswer
from sightline.services.pipeline_state import Storages, add_state
from sightline.services.pipeline_steps import HEALTH_SECONDS, CaptionStep, EnhanceStep, Health, Steps
from sightline.settings import PipelineSettings
from sightline.sources import Sources, parse_source
from sightline.wire import (
    Completion,
    Context,
    ImageBytes,
    ImagePath,
    ImageSource,
    Sampling,
    Turn,
)

logger = logging.getLogger(__name__)

IMAGE_FAULT = "Failed to fetch/decode image: "
"""Contract D6: how the original begins such an answer."""

FIRST_POLL_SECONDS = 0.25
LONGEST_POLL_SECONDS = 5.0


class Fetcher(Protocol):
    """What turns an image source into its encoded bytes, under the server's policy."""

    async def fetch(self, source: ImageSource) -> bytes: ...
    async def bucket_fault(self, bucket: str) -> str | None: ...
    async def aclose(self) -> None: ...


NO_OPTIONS = ChainOptions()


@dataclass(frozen=True, slots=True)
class PipelineRequest:
    """One image, wherever it is, and what is asked of the chain.

    tells_steps  of a stream: give the results of the chain as they are (`chain.stream`), not only the text
    """

    image: ImageSource
    options: ChainOptions = NO_OPTIONS
    tells_steps: bool = False


Prepared = tuple[tuple[ImageBytes, ChainOptions], ...]
Outcome = ChainResult | OutOfMemory


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
        caption: CaptionStep | None = None,
        enhance: EnhanceStep | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = settings.model_name
        self._settings = settings
        self._sources: Fetcher = sources or Sources(settings)
        self._storages = Storages(settings.s3_buckets, self._bucket_fault, clock)
        self._limits = images.Limits.from_settings(settings)
        self._decoder = images.Decoder(self._limits, threads=settings.decode_threads)
        self._steps = Steps(settings, caption, enhance)
        self.breakers = self._steps.breakers
        self._policy = ChainPolicy(
            enhance_by_default=settings.enhance_by_default,
            level=settings.reasoning_level,
            strict_by_default=settings.strict_by_default,
            caption_prompt=settings.caption_prompt,
            caption_timeout_seconds=settings.caption_timeout_seconds,
            enhance_timeout_seconds=settings.enhance_timeout_seconds,
            enhance_min_seconds=settings.enhance_min_seconds,
            caption_sampling=Sampling(
                max_tokens=settings.caption_tokens,
                temperature=settings.caption_temperature,
                top_p=settings.caption_top_p,
                seed=settings.caption_seed,
            ),
            enhance_sampling=Sampling(
                max_tokens=settings.enhance_tokens,
                temperature=settings.enhance_temperature,
                top_p=settings.enhance_top_p,
                seed=settings.enhance_seed,
            ),
        )
        self._fetching = asyncio.Semaphore(settings.max_concurrency)
        self._running = asyncio.Semaphore(settings.max_concurrency)
        self._sleep = sleep
        self._health = Health(self._steps.caption, self._steps.enhance, settings, clock)

    async def _bucket_fault(self, bucket: str) -> str | None:
        return await self._sources.bucket_fault(bucket)

    async def load(self) -> None:
        """Wait until the caption step is ready, however long it loads. The enhance step may be down."""
        pause = FIRST_POLL_SECONDS
        while not await self._steps.caption.is_ready(HEALTH_SECONDS):
            if pause == FIRST_POLL_SECONDS:
                logger.info("waiting for the caption step url=%s", self._settings.describe_url)
            await self._sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)
        await self._health.now()

    async def close(self) -> None:
        """Close the connections to the steps and to the image sources."""
        await self._steps.close()
        await self._storages.close()
        await self._sources.aclose()
        self._decoder.close()

    def metadata(self) -> dict[str, v2.Scalar]:
        """What the model's V2 metadata says beside its tensors, as the steps last said it."""
        return self._health.metadata()

    async def preprocess(self, requests: Sequence[PipelineRequest], context: Context) -> Prepared:
        """Fetch every image and check its header. Raises 4xx before a model is asked; 504 when it takes too long."""
        return tuple(await together([self._fetch(request, context) for request in requests]))

    async def predict(self, prepared: Prepared, context: Context) -> list[Outcome]:
        """Run the chains together, at most `max_concurrency` of all calls at once; the first failure ends the rest.

        But for an image that does not fit the caption step's device: it fails alone.
        """
        return settled(await together([self._outcome(image, options, context) for image, options in prepared]))

    async def _outcome(self, image: ImageBytes, options: ChainOptions, context: Context) -> Outcome:
        try:
            return await self._chain(image, options, context)
        except OutOfMemory as fault:
            return fault

    async def _fetch(self, request: PipelineRequest, context: Context) -> tuple[ImageBytes, ChainOptions]:
        async with _turn(self._fetching, context):
            try:
                async with asyncio.timeout(context.deadline.remaining()):
                    data = await self._sources.fetch(request.image)
                    data = await self._fit(data)
            except TimeoutError as error:
                raise DeadlineExceeded("The image did not arrive before the deadline.") from error
        filename = request.image.filename if isinstance(request.image, ImageBytes) else None
        return ImageBytes(data, filename), request.options

    async def _fit(self, data: bytes) -> bytes:
        """What the caption step is sent: the bytes as they came, once their header is checked.

        A stranger's step gets a small JPEG or PNG drawn anew: it need not know TIFF, what it sees costs by the pixel,
        and where a photograph was taken (EXIF) is none of its business.
        """
        if not self._steps.is_foreign:
            await asyncio.to_thread(images.probe, data, self._limits)
            return data
        width = self._settings.describe_max_width
        picture = await self._decoder.decode(data, max_width=width, max_height=2 * width)
        kind = "JPEG" if images.media_type(data) in ("image/jpeg", "image/webp") else "PNG"
        return await asyncio.to_thread(images.encode, picture, kind)

    async def _chain(self, image: ImageBytes, options: ChainOptions, context: Context) -> ChainResult:
        async with _turn(self._running, context):
            result = await chain.run(
                image,
                options,
                context,
                caption=self._steps.caption.describe,
                enhance=self._steps.enhance.enhance if self._steps.enhance else None,
                policy=self._policy,
            )
        return _logged(result, context)

    # --- conversations and streams -----------------------------------------------------------------------------------

    def from_chat(self, turns: Sequence[Turn], options: Mapping[str, object]) -> PipelineRequest:
        """One image, and what the client says about it as the caption's prompt."""
        if any(turn.role == "assistant" for turn in turns):
            raise BadRequest("This model holds no conversation.", code="conversation_unsupported")
        sources = [image for turn in turns for image in turn.images]
        if len(sources) != 1:
            code = "too_many_images" if sources else "image_missing"
            raise BadRequest("This model captions one image a request.", code=code)
        if options.get("stop") is not None:
            raise InvalidParameter("stop is not supported by this model.")
        prompt = "\n\n".join(turn.text for turn in turns if turn.text.strip())
        return self._request(sources[0], {**options, "prompt": prompt})

    async def stream(
        self, request: PipelineRequest, context: Context
    ) -> AsyncGenerator[str | Completion | ChainResult]:
        """The text as it is made, then the whole; or, when the request says so, every step (`chain.stream`).

        Of an enhancement that fails half-way the pieces cannot be taken back: raises Unavailable (503) with its code.
        """
        ((image, options),) = await self.preprocess([request], context)
        events = chain.stream(
            image,
            options,
            context,
            caption=self._steps.caption.describe,
            enhance=self._steps.enhance.enhance_stream if self._steps.enhance else None,
            policy=self._policy,
        )
        async with _turn(self._running, context), aclosing(events):
            if request.tells_steps:
                async for part in events:
                    yield part
                return
            told = ""
            result = await anext(events)
            async for part in events:
                if isinstance(part, str):
                    told += part
                    yield part
                else:
                    result = part
        assert isinstance(result, ChainResult)  # noqa: S101 - a chain begins and ends with one
        _logged(result, context)
        if told and result.enhancement_error is not None:
            raise Unavailable(result.enhancement_error.message, code=result.enhancement_error.code)
        if result.caption.startswith(told) and (rest := result.caption[len(told) :]):
            yield rest
        yield as_completion(result)

    # --- V1 and V2 -------------------------------------------------------------------------------------------------

    def from_v1(self, body: Mapping[str, object]) -> list[PipelineRequest]:
        return [self._request(*image_of(instance)) for instance in instances_of(body)]

    def to_v1(self, results: Sequence[Outcome]) -> Json:
        predictions = [_answer(item) if isinstance(item, ChainResult) else item_error(item) for item in results]
        return {"predictions": predictions} | _demo(_made(results)[0])

    def from_v2(self, request: v2.InferRequest) -> list[PipelineRequest]:
        reject_unknown_inputs(request, self.inputs)
        sources = images_of(request)
        tensor = request.input("prompt")
        prompts = spread(tensor.texts() if tensor else None, len(sources), "prompt")
        options = {name: value for name, value in request.parameters.items() if name != "prompt"}
        return [
            self._request(image, options | {"prompt": prompt}) for image, prompt in zip(sources, prompts, strict=True)
        ]

    def to_v2(self, results: Sequence[Outcome]) -> v2.InferResponse:
        items = [item if isinstance(item, ChainResult) else None for item in results]
        made = _made(results)
        first = made[0]
        steps = [step for result in made for step in result.steps]
        parameters: dict[str, v2.Scalar] = {
            "model": first.model.name,
            "model_revision": first.model.revision,
            "image_tokens": sum(step.image_tokens or 0 for step in steps),
            "milliseconds": max(sum(step.milliseconds for step in result.steps) for result in made),
        }
        if any(result.demo for result in made):
            parameters["demo_model"] = True
        if enhancer := next((step.model for step in steps if step.name == "enhance"), None):
            parameters["enhancer_model"] = enhancer
        if any(result.truncated for result in made):
            parameters["truncated"] = True
        if any(result.downscaled for result in made):
            parameters["downscaled"] = True
        if any(result.added_terms is not None for result in made):
            parameters["explanation"] = orjson.dumps([_explanation(item) if item else None for item in items]).decode()
        return v2.InferResponse(
            model_name=self.name,
            outputs=(
                v2.Tensor.of_texts("text", [item.caption if item else "" for item in items]),
                v2.Tensor.of_texts("original_text", [_first_caption(item) if item else "" for item in items]),
                v2.Tensor.of_array(
                    "enhanced", "BOOL", np.array([item is not None and item.enhanced for item in items])
                ),
                v2.Tensor.of_bytes("enhancement_error", [_fault_bytes(item) if item else b"" for item in items]),
            ),
            parameters=parameters | item_errors(results),
        )

    # --- native ----------------------------------------------------------------------------------------------------

    def router(self, run: Run) -> APIRouter:
        """`POST /caption` in three content types, `GET /health`, the progress of batches, and the page at `/`."""
        router = APIRouter()

        @router.post(
            "/caption",
            summary="Caption one image, and enhance the caption",
            response_model=None,
            responses={200: {"model": CaptionAnswer, "content": EVENTS}} | FAULTS,
            openapi_extra={"requestBody": {"required": True, "content": CAPTION_CONTENT}},
        )
        async def caption(request: Request) -> Response:  # pyright: ignore[reportUnusedFunction]
            started = time.perf_counter()
            wanted, echo, is_stream = await self._read(request)

            def whole(result: ChainResult) -> Json:
                answer = _answer(result)
                if "filename" in echo:
                    answer |= {"processing_time": round(time.perf_counter() - started, 4)}
                return echo | answer

            with _image_faults():
                if is_stream:
                    watched = run.stream(replace(wanted, tells_steps=True), context_of(request))
                    return await streaming(request, _named(watched), partial(_event, whole))
                (result,) = await run([wanted], context_of(request))
            return json_response(whole(result))

        @router.get("/health", summary="What the pipeline is made of, now", response_model=HealthAnswer)
        async def health() -> Json:  # pyright: ignore[reportUnusedFunction]
            return await self._health.now()

        add_progress(router, self._settings)
        add_state(router, self.breakers, self._storages)
        web.add_page(router)
        return router

    async def _read(self, request: Request) -> tuple[PipelineRequest, Json, bool]:
        """The request in whichever body it came, the fields of it that its answer repeats, whether it is a stream."""
        body = await read_body(request, self._settings)
        upload = body.uploads.get("image")
        if upload is None:
            image, echo = self._image(body.fields)
        else:
            image, echo = upload, {"filename": upload.filename} if upload.filename else {}
        return self._request(image, body.fields), echo, wants_events(request, body.fields)

    def _request(self, image: ImageSource, options: Mapping[str, object]) -> PipelineRequest:
        """Read the options that every protocol shares. Raises InvalidParameter (422)."""
        enhance = flag_of(options, "use_gpt_oss")
        return PipelineRequest(
            image,
            ChainOptions(
                prompt=prompt_of(options.get("prompt")),
                preset=preset_of(options.get("preset")),
                detailed=flag_of(options, "detailed") is not False,
                enhance=flag_of(options, "enhance") if enhance is None else enhance,
                level=level_of(options.get("reasoning_level")),
                strict=flag_of(options, "strict"),
                explain=flag_of(options, "explain") is True,
                caption_sampling=sampling_of(options, self._policy.caption_sampling),
                enhance_sampling=sampling_of(options, self._policy.enhance_sampling),
            ),
        )

    def _image(self, fields: Mapping[str, object]) -> tuple[ImageSource, Json]:
        """The image of a native body, and the field that the answer repeats. Raises 400 or 422."""
        if (s3_uri := _text(fields, "s3_uri")) is not None:
            return s3_source(s3_uri), {"s3_uri": s3_uri}
        for name in ("image", "image_url"):
            if (value := _text(fields, name)) is not None:
                with _image_faults():
                    return parse_source(value), {}
        if (path := _text(fields, "image_path")) is not None:
            if self._settings.image_root is None:
                raise BadRequest("This server reads no images from its own disk.", code="image_path_unsupported")
            return ImagePath(path), {"image_path": path}
        raise InvalidParameter("s3_uri or image is missing.", code="image_missing")


# --- bodies ----------------------------------------------------------------------------------------------------------


def _text(fields: Mapping[str, object], name: str) -> str | None:
    value = fields.get(name)
    if value is None or isinstance(value, str):
        return value
    raise InvalidParameter(f"{name} must be text.")


def _made(outcomes: Sequence[Outcome]) -> list[ChainResult]:
    return [item for item in outcomes if isinstance(item, ChainResult)]


def _answer(result: ChainResult) -> Json:
    """What every JSON answer says about one image: contract D1, and more only where there is more to say."""
    answer: Json = {"caption": result.caption}
    if result.original_caption is not None:
        answer["original_caption"] = result.original_caption
    answer["enhanced"] = result.enhanced
    if result.enhancement_error is not None:
        answer["enhancement_error"] = asdict(result.enhancement_error)
    if result.truncated:
        answer["truncated"] = True
    if result.downscaled:
        answer["downscaled"] = True
    if result.added_terms is not None:
        answer |= _explanation(result)
    return answer | _demo(result)


def _first_caption(result: ChainResult) -> str:
    return result.original_caption or result.caption


def _explanation(result: ChainResult) -> Json:
    return {"added_terms": list(result.added_terms or ()), "steps": [asdict(step) for step in result.steps]}


def _demo(result: ChainResult) -> Json:
    return demo_fields(replace(result.model, demo=result.demo))


def _fault_bytes(result: ChainResult) -> bytes:
    return orjson.dumps(asdict(result.enhancement_error)) if result.enhancement_error else b""


def _logged(result: ChainResult, context: Context) -> ChainResult:
    if result.enhancement_error is not None:
        logger.warning(
            "caption returned without enhancement code=%s request_id=%s",
            result.enhancement_error.code,
            context.request_id,
        )
    return result


Named = tuple[Literal["caption", "enhancement.delta", "done"], ChainResult | str]


async def _named(events: AsyncGenerator[ChainResult | str]) -> AsyncGenerator[Named]:
    """The first result is the caption's, the second the end."""
    has_caption = False
    async with aclosing(events):
        async for part in events:
            if isinstance(part, str):
                yield "enhancement.delta", part
            else:
                yield ("done" if has_caption else "caption"), part
                has_caption = True


def _event(whole: Callable[[ChainResult], Json], named: Named) -> bytes:
    name, part = named
    if isinstance(part, str):
        return event(name, {"delta": part})
    return event(name, whole(part) if name == "done" else {"caption": part.caption})


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
