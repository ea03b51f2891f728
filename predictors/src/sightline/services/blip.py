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
from sightline.errors import (
    DeadlineExceeded,
    InvalidParameter,
    NotFound,
    PayloadTooLarge,
    QueueFull,
    SightlineError,
    SourceRefused,
    Unavailable,
)
from sightline.images import Decoder, Limits
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
    s3_source,
    sampling_of,
    spread,
    together,
)
from sightline.services.bodies import Body, json_response, read_body
from sightline.services.generation import Generation, completion, parameters_of, predictions_of, texts_of, within
from sightline.settings import BlipSettings
from sightline.sources import Sources, parse_source
from sightline.wire import (
    MAX_PROMPT_CHARACTERS,
    Completion,
    Context,
    Deadline,
    ImageBytes,
    ImagePath,
    ImageS3,
    ImageSource,
    ImageUrl,
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


@dataclass(frozen=True, slots=True)
class _Item:
    """One image of a batch: how the client called it, and the image or why it is none."""

    echo: Mapping[str, str]
    image: ImageSource | SightlineError


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
        self._decoder = Decoder(Limits.from_settings(settings), threads=settings.decode_threads)
        self._batches: Batches | None = None
        self._run: Run | None = None

    def _load_model(self) -> "Blip":
        from sightline.models.blip import Blip

        return Blip(self._settings)

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
        image = await self._decoder.decode(data, max_width=side, max_height=side)
        return await self._generation.in_pool(lambda: model.preprocess(image, request.prefix))

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
        """The one image of the last turn; its text, if any, is continued by the caption.

        Raises InvalidParameter (422): BLIP knows no conversation and no instructions.
        """
        if len(turns) != 1 or turns[0].role != "user" or len(turns[0].images) != 1:
            raise InvalidParameter(
                "This model captions one image: send one user message with one image.", code="unsupported_conversation"
            )
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
            ("/caption", self._post_caption, _CAPTION_OPENAPI, 200),
            ("/batch-caption", self._post_batch, _BATCH_OPENAPI, 200),
            ("/async-batch-caption", self._post_async_batch, _ASYNC_OPENAPI, 202),
        ):
            router.add_api_route(
                path, handler, methods=["POST"], openapi_extra=extra, response_model=None, status_code=status
            )
        for path in ("/task-status/{task_id}", "/async-batch-caption/status/{task_id}"):
            router.add_api_route(
                path, self._get_status, methods=["GET"], openapi_extra=_STATUS_OPENAPI, response_model=None
            )
        router.add_api_route("/health", health, methods=["GET"])
        web.add_page(router)
        return router

    async def _post_caption(self, request: Request) -> Response:
        """Caption one image (contract E2): by its path below the image root, uploaded, or from any other source."""
        started = time.monotonic()
        context = context_of(request)
        body = await read_body(request, self._settings)
        echo, image = _one_image(body)
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

        async def one(item: _Item) -> Json:
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
                "source": _stored_source(item.image),
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

    async def _read_batch(self, request: Request) -> tuple[list[_Item], str, Sampling, bool]:
        """Images, text to continue, sampling, and whether the images were uploaded."""
        limit = self._settings.max_batch_items
        body = await read_body(
            request,
            self._settings,
            several={"images", *_LISTS},
            max_parts=max(self._settings.max_parts, limit + EXTRA_PARTS),
        )
        # Beside the event loop: base64 of a hundred megabytes would stop it.
        items = await asyncio.to_thread(_images_of_batch, body)
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

    async def _answer(self, item: _Item, prefix: str, sampling: Sampling, context: Context) -> Json:
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
        item = _Item(stored["echo"], _restored_source(stored["source"], data))
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


def _one_image(body: Body) -> tuple[Json, ImageSource]:
    """The image of a single request, and what of the request the answer repeats. Raises InvalidParameter (422)."""
    for name in ("image", "file"):
        if name in body.uploads:
            upload = body.uploads[name]
            return {"filename": upload.filename} if upload.filename else {}, upload
    for name in ("image_path", "image_url", "s3_uri", "image", "image_bytes", "b64"):
        value = body.fields.get(name)
        if isinstance(value, str) and value.strip():
            return _echo(name, value), _source(name, value)
        if value is not None and not isinstance(value, str):
            raise InvalidParameter(f"{name} must be text.")
    raise InvalidParameter("image_path or an uploaded image is required.", code="image_missing")


_LISTS: Mapping[str, str] = {
    "image_paths": "image_path",
    "image_urls": "image_url",
    "s3_uris": "s3_uri",
    "images": "image",
}
"""Names of the lists that a batch can be, and how each item's answer calls what it was."""


def _images_of_batch(body: Body) -> list[_Item]:
    """The images of a batch, in order. Raises InvalidParameter (422) when there is not exactly one list of them."""
    if unknown := set(body.uploads):
        raise InvalidParameter(f"Files are taken under the name images, not {sorted(unknown)[0]}.")
    uploads = list(body.files.get("images", ()))
    lists = [name for name in _LISTS if body.fields.get(name) is not None]
    if len(lists) + bool(uploads) != 1 or set(body.files) - {"images"}:
        raise InvalidParameter(
            "Send one list: image_paths, image_urls, s3_uris, images, or uploaded files named images.",
            code="image_missing",
        )
    if uploads:
        return [_Item({"filename": upload.filename or ""}, upload) for upload in uploads]
    (name,) = lists
    values = body.fields[name]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in cast("list[object]", values)):
        raise InvalidParameter(f"{name} must be a list of texts.")
    return [_item(name, value) for value in cast("list[str]", values)]


def _item(name: str, value: str) -> _Item:
    try:
        image: ImageSource | SightlineError = _source(_LISTS[name], value)
    except SightlineError as error:
        image = error
    return _Item(_echo(_LISTS[name], value), image)


def _source(name: str, value: str) -> ImageSource:
    """What the text of a field stands for. Raises BadRequest (400)."""
    if name == "image_path":
        return ImagePath(value)
    return s3_source(value) if name == "s3_uri" else parse_source(value)


def _echo(name: str, value: str) -> Json:
    """What names the image in an answer: the client's own word for it, but never the image itself."""
    is_reference = name == "image_path" or value.lstrip()[:8].lower().startswith(("https://", "http://", "s3://"))
    return {name: value} if is_reference and len(value) <= MAX_PROMPT_CHARACTERS else {}


def _stored_source(image: ImageSource | SightlineError) -> Json:
    match image:
        case ImageBytes():
            return {}  # its bytes are stored beside
        case ImageUrl(url):
            return {"url": url}
        case ImageS3(uri):
            return {"s3": uri}
        case ImagePath(path):
            return {"path": path}
        case SightlineError():
            return {"error": image.message, "code": image.code}


def _restored_source(source: Mapping[str, str], data: bytes | None) -> ImageSource | SightlineError:
    match source:
        case {"url": url}:
            return ImageUrl(url)
        case {"s3": uri}:
            return ImageS3(uri)
        case {"path": path}:
            return ImagePath(path)
        case {"error": message, "code": code}:
            return SourceRefused(message, code=code)
        case _:
            return ImageBytes(data or b"")


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


# --- OpenAPI ---------------------------------------------------------------------------------------------------------

_OPTIONS: Json = {
    "text": {
        "type": "string",
        "maxLength": MAX_PROMPT_CHARACTERS,
        "description": "Continued by the caption, such as `a photo of`; `prefix` and `prompt` are other names for it.",
    },
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 4096},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2, "description": "0, the default, is greedy."},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "seed": {"type": "integer", "minimum": 0},
}
_BINARY: Json = {"type": "string", "format": "binary"}
_DEMO: Json = {
    "demo_model": {"type": "boolean", "description": "true: answered by a demonstration model."},
    "model": {"type": "string", "description": "Its own name, beside `demo_model`."},
}
_ECHO: Json = {
    "image_path": {"type": "string", "description": "As in the request."},
    "image_url": {"type": "string", "description": "As in the request."},
    "s3_uri": {"type": "string", "description": "As in the request."},
    "filename": {"type": "string", "description": "Of an upload."},
}
_RESULT: Json = {
    "type": "object",
    "description": "`caption`, or `error` and `code` of an image that could not be captioned.",
    "properties": {
        **_ECHO,
        "caption": {"type": "string"},
        "processing_time": {"type": "number", "description": "Seconds, of an upload."},
        "error": {"type": "string"},
        "code": {"type": "string"},
        **_DEMO,
    },
}
_FAULT: Json = {
    "type": "object",
    "required": ["detail", "code"],
    "properties": {"detail": {"type": "string"}, "code": {"type": "string"}, "request_id": {"type": "string"}},
}


def _answers(status: str, description: str, schema: Json, *faults: str) -> Json:
    said: Json = {status: {"description": description, "content": {"application/json": {"schema": schema}}}}
    for fault in faults:
        said[fault] = {"description": "An error.", "content": {"application/json": {"schema": _FAULT}}}
    return said


_CAPTION_OPENAPI: Json = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "image_path": {"type": "string", "description": "A path below the server's image root."},
                        "image_url": {"type": "string", "description": "An allowed https:// URL, or a data URI."},
                        "s3_uri": {"type": "string", "description": "`s3://bucket/key`."},
                        "image": {"type": "string", "description": "Base64, a data URI, an allowed URL or s3://."},
                        **_OPTIONS,
                    },
                }
            },
            "multipart/form-data": {
                "schema": {"type": "object", "required": ["image"], "properties": {"image": _BINARY, **_OPTIONS}}
            },
            "image/*": {"schema": _BINARY},
        },
    },
    "responses": _answers("200", "The caption.", _RESULT, "400", "404", "413", "422", "429", "503", "504"),
}

_BATCH_BODY: Json = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "description": "One of the four lists.",
                "properties": {
                    **{
                        name: {"type": "array", "items": {"type": "string"}, "description": what}
                        for name, what in (
                            ("image_paths", "Paths below the server's image root."),
                            ("image_urls", "Allowed https:// URLs, or data URIs."),
                            ("s3_uris", "`s3://bucket/key` each."),
                            ("images", "Base64, data URIs, allowed URLs or s3:// each."),
                        )
                    },
                    **_OPTIONS,
                },
            }
        },
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {"images": {"type": "array", "items": _BINARY}, **_OPTIONS},
            }
        },
    },
}

_BATCH_OPENAPI: Json = {
    "requestBody": _BATCH_BODY,
    "responses": _answers(
        "200",
        "A bare list for JSON, an object for a form; in the order of the request.",
        {
            "anyOf": [
                {"type": "array", "items": _RESULT},
                {
                    "type": "object",
                    "required": ["results", "total_processing_time"],
                    "properties": {
                        "results": {"type": "array", "items": _RESULT},
                        "total_processing_time": {"type": "number", "description": "Seconds."},
                        **_DEMO,
                    },
                },
            ]
        },
        *("400", "413", "422", "503"),
    ),
}

_ASYNC_OPENAPI: Json = {
    "requestBody": _BATCH_BODY,
    "responses": _answers(
        "202",
        "The batch is stored; ask for it by its id.",
        {
            "type": "object",
            "required": ["message", "task_id"],
            "properties": {"message": {"type": "string"}, "task_id": {"type": "string", "format": "uuid"}, **_DEMO},
        },
        *("400", "413", "422", "429", "503"),
    ),
}

_STATUS_OPENAPI: Json = {
    "responses": _answers(
        "200",
        "The state of the batch.",
        {
            "type": "object",
            "required": ["task_id", "status", "results", "progress"],
            "properties": {
                "task_id": {"type": "string", "format": "uuid"},
                "status": {"type": "string", "enum": ["in_progress", "completed", "failed"]},
                "results": {
                    "type": "array",
                    "description": "Of the images that are done; `index` is the place in the request.",
                    "items": _RESULT | {"properties": {"index": {"type": "integer"}, **_RESULT["properties"]}},
                },
                "progress": {
                    "type": "object",
                    "properties": {name: {"type": "integer"} for name in ("done", "total", "failed")},
                    "description": "`done` counts the failed ones too.",
                },
                **_DEMO,
            },
        },
        *("404", "503"),
    )
}
