"""Contract E: short captions with BLIP, one image at a time, a batch at once, or a batch to ask for later."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter, Request
from fastapi.responses import Response

from sightline import v2, web
from sightline.engines.health import MemoryHealth
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    NotFound,
    PayloadTooLarge,
    QueueFull,
    SightlineError,
    SourceRefused,
    Unavailable,
)
from sightline.images import Decoder
from sightline.jobs.batches import Batches, BatchState
from sightline.jobs.objects import open_store
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
from sightline.services.blip_bodies import (
    ASYNC_OPENAPI,
    BATCH_OPENAPI,
    CAPTION_OPENAPI,
    LISTS,
    STATUS_OPENAPI,
    Item,
    images_of_batch,
    one_image,
    restored_source,
    stored_source,
)
from sightline.services.bodies import json_response, read_body
from sightline.services.generation import Generation, completion, parameters_of, predictions_of, texts_of, within
from sightline.settings import BlipSettings
from sightline.sources import Sources
from sightline.wire import (
    Completion,
    Context,
    Deadline,
    ImageBytes,
    ImageSource,
    Sampling,
    Turn,
)

if TYPE_CHECKING:
    from sightline.models.blip import Blip, Prompt

MESSAGE = "Batch captioning started in the background."
DETAIL_KEPT = 4
"""An image is decoded to at most so many times the model's own side: how it looks is decided by the model's resize."""
EXTRA_PARTS = 16
"""Parts of a form beside its images: the text, the sampling."""


@dataclass(frozen=True, slots=True)
class CaptionRequest:
    """One image to caption. `prefix` is continued by the caption (contract E6); empty: none."""

    image: ImageSource
    prefix: str
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class _Prepared:
    prompts: "tuple[tuple[Prompt, Sampling], ...]"
    started: float


class BlipService:
    """The `blip` predictor."""

    inputs = (v2.TensorSpec("image", "BYTES", (-1,)), v2.TensorSpec("prompt", "BYTES", (-1,)))
    outputs = (v2.TensorSpec("text", "BYTES", (-1,)),)

    def __init__(self, settings: BlipSettings) -> None:
        self.name = settings.model_name
        self._settings = settings
        self._defaults = Sampling(max_tokens=settings.max_tokens)
        self._generation: Generation[Blip] = Generation(
            self._load_model, max_batch=settings.max_batch, threads=settings.decode_threads
        )
        self._sources = Sources(settings)
        self._decoder = Decoder.from_settings(settings)
        self._batches: Batches | None = None
        self._run: Run | None = None

    def _load_model(self) -> "Blip":
        from sightline.models.blip import Blip
        from sightline.models.selfcheck import checked

        return checked(Blip, self._settings)

    async def load(self) -> None:
        store = open_store(
            self._settings.job_store,
            self.name,
            endpoint_url=self._settings.s3_endpoint_url,
            region=self._settings.aws_region,
        )
        await self._generation.start()
        self._batches = Batches(
            store,
            self._execute,
            ttl_seconds=self._settings.job_ttl_seconds,
            width=self._settings.max_batch,
        )
        await self._batches.start()

    async def close(self) -> None:
        if self._batches is not None:
            await self._batches.close()
        await self._generation.close()
        await self._sources.aclose()
        self._decoder.close()

    @property
    def health(self) -> MemoryHealth | None:
        """Of the device's memory; None where the model is elsewhere."""
        return self._generation.health

    async def try_again(self) -> None:
        """Answer something small; see `MemoryHealth.wants_trial`."""
        await self._generation.try_again()

    def metadata(self) -> dict[str, v2.Scalar]:
        """What V2 metadata says beside the tensors. Raises Unavailable (503) before the model is loaded."""
        return self._generation.metadata()

    async def preprocess(self, requests: Sequence[CaptionRequest], context: Context) -> _Prepared:
        started = time.monotonic()
        model = self._generation.model
        prompts = await within(context.deadline, together(self._prompt(model, request) for request in requests))
        samplings = [request.sampling for request in requests]
        return _Prepared(tuple(zip(prompts, samplings, strict=True)), started)

    async def _prompt(self, model: "Blip", request: CaptionRequest) -> "Prompt":
        data = await self._sources.fetch(request.image)
        side = DETAIL_KEPT * model.image_side
        pixels = model.pixels
        return await self._decoder.prepare(
            data,
            pixels.wanted,
            lambda picture: model.preprocess(pixels.patches(picture.image, picture.size), request.prefix),
            max_width=side,
            max_height=side,
        )

    async def predict(self, prepared: _Prepared, context: Context) -> list[Completion]:
        model = self._generation.model
        answers = await self._generation.generate_all(prepared.prompts, context)
        return [
            completion(model.postprocess(prompt, generated), generated, model.info, prepared.started)
            for (prompt, _), generated in zip(prepared.prompts, answers, strict=True)
        ]

    def from_v1(self, body: Mapping[str, object]) -> list[CaptionRequest]:
        requests: list[CaptionRequest] = []
        for instance in instances_of(body):
            image, fields = image_of(instance)
            requests.append(CaptionRequest(image, *self._options(fields)))
        return requests

    def to_v1(self, results: Sequence[Completion]) -> Json:
        return predictions_of(results)

    def from_v2(self, request: v2.InferRequest) -> list[CaptionRequest]:
        reject_unknown_inputs(request, self.inputs)
        images = images_of(request)
        tensor = request.input("prompt")
        prompts = spread(None if tensor is None else tensor.texts(), len(images), "prompt")
        return [
            CaptionRequest(
                image, *self._options({**request.parameters, **({} if prompt is None else {"prompt": prompt})})
            )
            for image, prompt in zip(images, prompts, strict=True)
        ]

    def to_v2(self, results: Sequence[Completion]) -> v2.InferResponse:
        return v2.InferResponse(
            model_name=self.name,
            outputs=(v2.Tensor.of_texts("text", texts_of(results)),),
            parameters=parameters_of(results),
        )

    def _options(self, options: Mapping[str, object]) -> tuple[str, Sampling]:
        """Text to continue and sampling; `text` and `prefix` are contract E's names, `prompt` that of V1 and V2."""
        prefix = next((text for name in _PREFIX_NAMES if (text := prompt_of(options.get(name), name))), "")
        return prefix, sampling_of(options, self._defaults)

    # --- OpenAI's chat ---

    def from_chat(self, turns: Sequence[Turn], options: Mapping[str, object]) -> CaptionRequest:
        """The one image of the one turn; its text, if any, is continued by the caption.

        Raises BadRequest (400): BLIP holds no conversation and follows no instructions.
        """
        if len(turns) != 1 or turns[0].role != "user":
            raise BadRequest("This model holds no conversation.", code="conversation_unsupported")
        if len(turns[0].images) != 1:
            code = "too_many_images" if turns[0].images else "image_missing"
            raise BadRequest("This model captions one image a request.", code=code)
        prefix = prompt_of(turns[0].text, "text") or ""
        return CaptionRequest(turns[0].images[0], prefix, sampling_of(options, self._defaults))

    async def stream(self, request: CaptionRequest, context: Context) -> AsyncGenerator[str | Completion]:
        """The caption in pieces, then the whole; after a text that is continued it comes in one piece."""
        prepared = await self.preprocess([request], context)
        ((prompt, sampling),) = prepared.prompts
        model = self._generation.model
        if request.prefix:
            (made,) = await self.predict(prepared, context)
            yield made.text
            yield made
            return
        pieces = self._generation.stream(
            prompt,
            sampling,
            context,
            lambda raw: completion(model.postprocess(prompt, raw), raw, model.info, prepared.started),
        )
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece

    # --- contract E: its own routes ---

    def router(self, run: Run) -> APIRouter:
        """`POST /caption`, `/batch-caption`, `/async-batch-caption`, both status routes, `GET /health`, the page."""
        self._run = run
        router = APIRouter(tags=["blip"])
        for path, handler, extra, status in (
            ("/caption", self._post_caption, CAPTION_OPENAPI, 200),
            ("/batch-caption", self._post_batch, BATCH_OPENAPI, 200),
            ("/async-batch-caption", self._post_async_batch, ASYNC_OPENAPI, 202),
        ):
            router.add_api_route(
                path, handler, methods=["POST"], openapi_extra=extra, response_model=None, status_code=status
            )
        for path in ("/task-status/{task_id}", "/async-batch-caption/status/{task_id}"):
            router.add_api_route(
                path, self._get_status, methods=["GET"], openapi_extra=STATUS_OPENAPI, response_model=None
            )
        router.add_api_route("/health", health, methods=["GET"])
        web.add_page(router)
        return router

    async def _post_caption(self, request: Request) -> Response:
        """Caption one image (contract E2): by its path below the image root, uploaded, or from any other source."""
        started = time.monotonic()
        context = context_of(request)
        _ = self._generation.model  # 503 while there is none, before the image is read
        body = await read_body(request, self._settings)
        echo, image = one_image(body)
        (made,) = await self._caption(CaptionRequest(image, *self._options(body.fields)), context)
        answer: Json = {**echo, "caption": made.text}
        if body.uploads:
            answer["processing_time"] = _seconds_since(started)
        return json_response(answer | demo_fields(made.model))

    async def _post_batch(self, request: Request) -> Response:
        """Caption a batch and wait for it (contract E3).

        JSON is answered by a bare list, a form by an object; both in the order of the request. An item that failed has
        `error` and `code` and no `caption`.
        """
        started = time.monotonic()
        context = context_of(request)
        model = self._generation.model  # 503 for the whole while there is none
        items, prefix, sampling, is_upload = await self._read_batch(request)
        permits = asyncio.Semaphore(self._settings.max_batch)

        async def one(item: Item) -> Json:
            async with permits:
                begun = time.monotonic()
                answer = await self._answer(item, prefix, sampling, context)
                timing = {"processing_time": _seconds_since(begun)} if is_upload else {}
                return answer | timing

        results = await asyncio.gather(*(one(item) for item in items))
        if not is_upload:
            return json_response([result | demo_fields(model.info) for result in results])
        answer: Json = {"results": results, "total_processing_time": _seconds_since(started)}
        return json_response(answer | demo_fields(model.info))

    async def _post_async_batch(self, request: Request) -> Response:
        """Store a batch, answer with the id to ask by, caption it behind the request (contract E4)."""
        batches = self._started_batches()
        context = context_of(request)
        items, prefix, sampling, _ = await self._read_batch(request)
        stored = [
            {
                "request_id": context.request_id,
                "echo": item.echo,
                "source": stored_source(item.image),
                "prefix": prefix,
                "sampling": asdict(sampling),
            }
            for item in items
        ]
        uploads = {index: item.image.data for index, item in enumerate(items) if isinstance(item.image, ImageBytes)}
        task_id = await batches.submit(stored, uploads, context.principal)
        answer = {"message": MESSAGE, "task_id": task_id} | demo_fields(self._generation.model.info)
        return json_response(answer, status_code=202)

    async def _get_status(self, request: Request, task_id: str) -> Response:
        """The state of a batch and the results that it has so far, in order (contract E5)."""
        state = await self._started_batches().get(task_id, context_of(request).principal)
        if state is None:
            raise NotFound("No such task.", code="task_not_found")
        return json_response(_shown(state) | demo_fields(self._generation.model.info))

    def _started_batches(self) -> Batches:
        if self._batches is None:
            raise Unavailable("The model is still loading.", code="model_not_ready", retry_after=5)
        return self._batches

    async def _read_batch(self, request: Request) -> tuple[list[Item], str, Sampling, bool]:
        """Images, text to continue, sampling, and whether the images were uploaded."""
        limit = self._settings.max_batch_items
        body = await read_body(
            request,
            self._settings,
            several={"images", *LISTS},
            max_parts=max(self._settings.max_parts, limit + EXTRA_PARTS),
        )
        # Beside the event loop: base64 of a hundred megabytes would stop it.
        items = await asyncio.to_thread(images_of_batch, body)
        if len(items) > limit:
            raise PayloadTooLarge(f"At most {limit} images a request.", code="too_many_items")
        return items, *self._options(body.fields), bool(body.files)

    async def _caption(self, request: CaptionRequest, context: Context) -> Sequence[Completion]:
        assert self._run is not None  # noqa: S101 - the router exists before a request comes
        try:
            return cast("Sequence[Completion]", await self._run([request], context))
        except SourceRefused as error:
            if error.code != "path_not_allowed":
                raise
            raise NotFound(error.message, code=error.code) from error  # contract E2: a bad path is 404

    async def _answer(self, item: Item, prefix: str, sampling: Sampling, context: Context) -> Json:
        """What becomes of one item of a batch; waits while the queue is full. Never raises but for cancellation."""
        try:
            if isinstance(item.image, SightlineError):
                raise item.image
            request = CaptionRequest(item.image, prefix, sampling)
            (made,) = await _patiently(lambda: self._caption(request, context), context.deadline)
        except SightlineError as error:
            return {**item.echo, "error": error.message, "code": error.code}
        return {**item.echo, "caption": made.text}

    async def _execute(self, stored: Mapping[str, Any], data: bytes | None) -> Json:
        """Do one item of a stored batch."""
        context = Context(
            request_id=str(stored["request_id"]),
            deadline=Deadline.after(self._settings.job_timeout_seconds),
        )
        item = Item(stored["echo"], restored_source(stored["source"], data))
        sampling = Sampling(**stored["sampling"] | {"stop": tuple(stored["sampling"]["stop"])})
        return await self._answer(item, stored["prefix"], sampling, context)


async def _patiently(work: Callable[[], Awaitable[Sequence[Completion]]], deadline: Deadline) -> Sequence[Completion]:
    """Try again while the queue is full, until the deadline. Raises DeadlineExceeded (504) and what the work raises."""
    while True:
        try:
            return await work()
        except QueueFull as error:
            if deadline.remaining() <= 1:
                raise DeadlineExceeded("The queue was full until the deadline.") from error
            await asyncio.sleep(min(1.0, error.retry_after or 1.0))


_PREFIX_NAMES = ("text", "prefix", "prompt")


def _shown(state: BatchState) -> Json:
    shown: Json = {
        "task_id": state.id,
        "status": state.status,
        "results": [{"index": index, **result} for index, result in state.results.items()],
        "progress": {"done": len(state.results), "total": state.total, "failed": state.failed},
    }
    if state.error is not None:
        shown |= {"detail": state.error["message"], "code": state.error["code"]}
    return shown


def _seconds_since(started: float) -> float:
    return round(time.monotonic() - started, 3)
