"""Contract C: page images and queries to multi-vector embeddings with ColQwen2.5.

Dims   T tokens of an item · D embedding width (128)
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import orjson
from fastapi import APIRouter

from sightline import golden, v2
from sightline.engines.health import MemoryHealth
from sightline.engines.hf import HFEngine
from sightline.errors import BadRequest, InvalidParameter, OutOfMemory, SightlineError, Unavailable
from sightline.images import Decoder, Picture
from sightline.services import embed_openapi as openapi
from sightline.services.base import Json, Run, demo_fields, instances_of, reject_unknown_inputs, together
from sightline.services.embed_bodies import (
    OPENAI,
    OVERLAY_SIDE,
    Embedding,
    EmbedRequest,
    Outcome,
    check_count,
    embedding_out,
    error_out,
    instance_in,
    made_of,
    pool_factor_in,
    query_in,
    usage_out,
)
from sightline.services.embed_routes import EmbedRoutes
from sightline.services.encodings import Vectors
from sightline.services.generation import TRIAL_SECONDS, within
from sightline.settings import EmbedSettings
from sightline.sources import Sources, parse_source
from sightline.wire import Context, Deadline, ImageSource, Usage

if TYPE_CHECKING:
    from sightline.models.colqwen import ColQwen, Item

T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """A preprocessed item; `data` are the encoded bytes of a page, kept for a second try at half its pixels."""

    request: EmbedRequest
    item: "Item"
    data: bytes | None = None
    picture: Any = None


@dataclass(frozen=True, slots=True)
class _Prepared:
    items: tuple[_Ready, ...]
    started: float


class EmbedService:
    """The `embed` predictor."""

    inputs = (v2.TensorSpec("image", "BYTES", (-1,)), v2.TensorSpec("query", "BYTES", (-1,)))
    outputs = (
        v2.TensorSpec("vectors", "FP32", (-1, -1)),
        v2.TensorSpec("offsets", "INT64", (-1,)),
        v2.TensorSpec("image_span", "INT64", (-1, 2)),
    )

    def __init__(self, settings: EmbedSettings) -> None:
        self.name = settings.model_name
        self._settings = settings
        self._engine: HFEngine[ColQwen, Item, None, Vectors] = HFEngine(
            self._load_model,
            max_batch=settings.max_batch,
            run=lambda model, batch, _, is_abandoned: model.encode(batch, is_abandoned),
            cost=lambda item: item.tokens,
            max_cost=settings.max_batch_tokens,
        )
        self._sources = Sources(settings)
        self._decoder = Decoder.from_settings(settings)
        self._pool = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="preprocess")

    def _load_model(self) -> "ColQwen":
        from sightline.models.colqwen import ColQwen
        from sightline.models.selfcheck import checked

        return checked(ColQwen, self._settings)

    async def load(self) -> None:
        await self._engine.start()

    async def close(self) -> None:
        await self._engine.close()
        await self._sources.aclose()
        self._decoder.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def health(self) -> MemoryHealth:
        """Of the device's memory."""
        return self._engine.health

    async def try_again(self) -> None:
        """Embed something small; see `MemoryHealth.wants_trial`."""
        model = self._engine.model
        item = await self._in_pool(lambda: model.trial(golden.picture()))
        await self._engine.generate(item, None, Deadline.after(TRIAL_SECONDS))

    def metadata(self) -> dict[str, v2.Scalar]:
        """What V2 metadata says beside the tensors. Raises Unavailable (503) before the model is loaded."""
        model = self._engine.model
        return {
            "model": model.info.name,
            "model_revision": model.info.revision,
            "demo_model": model.info.demo,
            "backend": model.runtime.backend,
            "device": model.runtime.device,
            "dtype": model.runtime.dtype,
            "dim": model.dim,
        }

    # --- the verbs ---

    async def preprocess(self, requests: Sequence[EmbedRequest], context: Context) -> _Prepared:
        started = time.monotonic()
        model = self._engine.model
        items = await within(context.deadline, together(self._ready(model, request) for request in requests))
        return _Prepared(tuple(items), started)

    async def _ready(self, model: "ColQwen", request: EmbedRequest) -> _Ready:
        content = request.content
        try:
            if isinstance(content, str):
                return _Ready(request, await self._in_pool(lambda: model.preprocess_query(content)))
            data = await self._sources.fetch(content)
            item, picture = await self._page(model, data, keeps_picture=request.keeps_picture)
            return _Ready(request, item, data, picture)
        except SightlineError as error:
            if request.label is None:
                raise
            message = f"{request.label}: {error.message}"
            raise type(error)(message, code=error.code, retry_after=error.retry_after) from error

    async def _page(
        self, model: "ColQwen", data: bytes, *, is_halved: bool = False, keeps_picture: bool = False
    ) -> tuple["Item", Any]:
        """The page as the model takes it, and when asked for, as a picture to draw over."""
        pixels = model.pixels
        prepare = pixels.halved if is_halved else pixels.patches

        def make(picture: Picture) -> "tuple[Item, Any]":
            item = model.preprocess_page(prepare(picture.image, picture.size))
            if not keeps_picture:
                return item, None
            picture.image.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
            return item, picture.image

        # What is drawn over is seen by a person, so nothing of it may be left out.
        return await self._decoder.prepare(data, None if keeps_picture else pixels.wanted, make)

    async def predict(self, prepared: _Prepared, context: Context) -> list[Outcome]:
        is_alone = len(prepared.items) == 1
        return await together(self._embedded(ready, prepared.started, context, is_alone) for ready in prepared.items)

    async def _embedded(self, ready: _Ready, started: float, context: Context, is_alone: bool) -> Outcome:
        model = self._engine.model
        item, is_halved = ready.item, False
        try:
            vectors = await self._engine.generate(item, None, context.deadline, client=context.client)
        except OutOfMemory as error:
            if ready.data is None:
                return _alone_or(error, is_alone)
            item, _ = await within(context.deadline, self._page(model, ready.data, is_halved=True))
            is_halved = True
            try:
                vectors = await self._engine.generate(item, None, context.deadline, client=context.client)
            except OutOfMemory as again:
                return _alone_or(again, is_alone)
        factor = ready.request.pool_factor
        is_pooled = factor > 1 and item.span is not None
        if is_pooled:
            whole = vectors
            vectors = await self._in_pool(lambda: model.pool(whole, factor))
        is_query = item.span is None
        return Embedding(
            vectors=vectors,
            span=None if is_pooled else item.span,
            patches=item.patches,
            usage=Usage(prompt_tokens=item.tokens, image_tokens=item.span[1] if item.span else 0),
            model=model.info,
            milliseconds=round((time.monotonic() - started) * 1000, 1),
            dtype=ready.request.dtype,
            tokens=tuple(model.token_texts(item)) if is_query else (),
            augmentation=model.augmentation if is_query else 0,
            downscaled=is_halved,
            picture=ready.picture,
        )

    async def _in_pool(self, work: Callable[[], T]) -> T:
        """Run CPU work beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    # --- V1 and V2 ---

    def from_v1(self, body: Mapping[str, object]) -> list[EmbedRequest]:
        return [instance_in(instance) for instance in instances_of(body)]

    def to_v1(self, results: Sequence[Outcome]) -> Json:
        predictions = [
            {**embedding_out(item, OPENAI), "usage": usage_out([item])}
            if isinstance(item, Embedding)
            else error_out(item)
            for item in results
        ]
        for prediction in predictions:
            if isinstance(prediction.get("embedding"), np.ndarray):
                prediction["embedding"] = cast("Vectors", prediction["embedding"]).tolist()
        return {"predictions": predictions} | demo_fields(made_of(results)[0].model)

    def from_v2(self, request: v2.InferRequest) -> list[EmbedRequest]:
        """Images first, then queries. Parameters: dtype (FP32, FP16), pool_factor."""
        reject_unknown_inputs(request, self.inputs)
        dtype = request.parameters.get("dtype", "FP32")
        if dtype not in {"FP32", "FP16"}:
            raise InvalidParameter("dtype must be FP32 or FP16.")
        is_wanted = not request.outputs or "vectors" in request.outputs
        if dtype == "FP16" and is_wanted and not request.wants_binary("vectors"):
            raise BadRequest(
                "FP16 has no JSON form: ask for the output 'vectors' with binary_data true.", code="fp16_needs_binary"
            )
        factor = pool_factor_in(request.parameters)
        images, queries = request.input("image"), request.input("query")
        contents: list[ImageSource | str] = []
        if images is not None:
            contents += [parse_source(element) for element in images.elements()]
        if queries is not None:
            contents += [query_in(text) for text in queries.texts()]
        check_count(len(contents), "elements of 'image' and 'query'")
        return [EmbedRequest(content, factor, dtype) for content in contents]

    def to_v2(self, results: Sequence[Outcome]) -> v2.InferResponse:
        """Vectors of all items one after the other; item i has the rows offsets[i] to offsets[i + 1].

        image_span is (-1, 0) for a query, a pooled page, or an item that failed, which has no rows.
        """
        made = made_of(results)
        first = made[0]
        rows = [item.vectors for item in made]
        lengths = [len(item.vectors) if isinstance(item, Embedding) else 0 for item in results]
        spans = [(item.span if isinstance(item, Embedding) else None) or (-1, 0) for item in results]
        parameters: dict[str, v2.Scalar] = {
            "model": first.model.name,
            "model_revision": first.model.revision,
            "prompt_tokens": sum(item.usage.prompt_tokens for item in made),
            "image_tokens": sum(item.usage.image_tokens or 0 for item in made),
            "milliseconds": max(item.milliseconds for item in made),
        }
        if first.model.demo:
            parameters["demo_model"] = True
        if any(item.downscaled for item in made):
            parameters["downscaled"] = True
        if len(made) < len(results):
            errors = [None if isinstance(item, Embedding) else error_out(item) for item in results]
            parameters["item_errors"] = orjson.dumps(errors).decode()
        return v2.InferResponse(
            model_name=self.name,
            outputs=(
                v2.Tensor.of_array("vectors", first.dtype, np.concatenate(rows)),
                v2.Tensor.of_array("offsets", "INT64", np.cumsum([0, *lengths])),
                v2.Tensor.of_array("image_span", "INT64", np.array(spans)),
            ),
            parameters=parameters,
        )

    # --- contract C: its own routes ---

    def router(self, run: Run) -> APIRouter:
        """`/`, `/health`, `/info`, `/patches`, `/embed/*`, `/score`, `/interpret`, `/v1/embeddings`."""
        routes = EmbedRoutes(self, run)
        router = APIRouter(tags=["embed"])
        add = router.add_api_route
        add("/", routes.greet, methods=["GET"], openapi_extra=openapi.GREET)
        add("/health", routes.health, methods=["GET"], openapi_extra=openapi.HEALTH)
        add("/info", routes.info, methods=["GET"], response_model=None, openapi_extra=openapi.INFO)
        for path, endpoint, extra in (
            ("/patches", routes.patches, openapi.PATCHES),
            ("/embed/queries", routes.embed_queries, openapi.QUERIES),
            ("/embed/images", routes.embed_images, openapi.IMAGES),
            ("/score", routes.score, openapi.SCORE),
            ("/interpret", routes.interpret, openapi.INTERPRET),
            ("/v1/embeddings", routes.openai_embeddings, openapi.OPENAI),
        ):
            add(path, endpoint, methods=["POST"], response_model=None, openapi_extra=extra)
        add(
            "/openai/v1/embeddings",
            routes.openai_embeddings,
            methods=["POST"],
            response_model=None,
            include_in_schema=False,
        )
        return router

    @property
    def settings(self) -> EmbedSettings:
        return self._settings

    @property
    def model(self) -> "ColQwen":
        """The loaded model. Raises Unavailable (503) before it is there."""
        return self._engine.model

    @property
    def device(self) -> str | None:
        """Where the model lives; None while it loads."""
        try:
            return self._engine.model.runtime.device
        except Unavailable:
            return None


def _alone_or(error: OutOfMemory, is_alone: bool) -> OutOfMemory:
    """The error as one item's outcome; raised when there is no other item."""
    if is_alone:
        raise error
    return error
