"""The embedding service's own routes (contract C): bodies into requests, results into the answers they document.

Dims   T tokens of a query · R, C rows and columns of a page's patches
"""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import TYPE_CHECKING, cast

import numpy as np
import orjson
from fastapi import Request
from fastapi.responses import Response
from numpy.typing import NDArray

from sightline import __version__, heatmap
from sightline.errors import BadRequest, InvalidParameter, NotFound
from sightline.maxsim import maxsim, similarity_maps
from sightline.services.base import Json, Run, context_of, demo_fields
from sightline.services.bodies import read_body
from sightline.services.embed_bodies import (
    NATIVE,
    OPENAI,
    Embedding,
    EmbedRequest,
    Outcome,
    check_count,
    count_code,
    embedding_out,
    error_out,
    list_in,
    made_of,
    openai_inputs_in,
    or_raise,
    page_in,
    pages_in,
    pool_factor_in,
    query_in,
    scored_page_in,
    scored_query_in,
    tokens_in,
    usage_out,
)
from sightline.services.encodings import Encoding
from sightline.services.generation import within
from sightline.wire import MAX_IMAGES_PER_CALL

if TYPE_CHECKING:
    from sightline.models.colqwen import ColQwen
    from sightline.services.embed import EmbedService

GREETING = "ColQwen2.5 Embedding API"
"""Contract C1."""
MAX_DIMENSIONS = 1_000
MAX_SIDE = 1_000_000
MAX_SCORED_PAGES = 256
MAX_SCORED_PAIRS = 500_000_000
"""Query vectors x page vectors of one /score call: about two seconds of one core."""
MAX_OVERLAYS = 32


class EmbedRoutes:
    """The native routes; each turns a body into EmbedRequests and results into the answer it documents."""

    def __init__(self, service: "EmbedService", run: Run) -> None:
        self._service = service
        self._run = run

    async def greet(self) -> Json:
        """What this is (contract C1)."""
        return {"message": GREETING, "version": __version__}

    async def health(self) -> Json:
        """Alive, whatever the model is doing; the device is null while it loads (contract C2)."""
        return {"status": "healthy", "device": self._service.device}

    async def info(self) -> Json:
        """What the loaded model really is, and what it makes of a fixed input (contract C3)."""
        model = self._service.model
        return {
            "version": __version__,
            "device": model.runtime.device,
            "dtype": model.runtime.dtype,
            "flash_attn": model.flash_attention,
            "spatial_merge_size": model.spatial_merge_size,
            "dim": model.dim,
            "image_token_id": model.image_token_id,
            "model": model.info.name,
            "model_revision": model.info.revision,
            "demo_model": model.info.demo,
            "engine": {name: version(name) for name in ("colpali-engine", "transformers", "torch")},
            "golden": {"sha256": model.golden.sha256, "first_numbers": model.golden.first_numbers},
            "max_images_per_call": MAX_IMAGES_PER_CALL,
        }

    async def patches(self, request: Request) -> Response:
        """How the processor will cut pages of these sizes (contract C4); a bad size fails alone."""
        model = self._service.model
        fields = (await read_body(request, self._service.settings)).fields
        dimensions = fields.get("dimensions")
        if not isinstance(dimensions, list):
            raise InvalidParameter("dimensions must be a list of {width, height}.")
        items = cast("Sequence[object]", dimensions)
        if len(items) > MAX_DIMENSIONS:
            raise BadRequest(f"At most {MAX_DIMENSIONS} dimensions a call.", code="too_many_items")
        return await _json({"results": [_patches(model, item) for item in items]})

    async def embed_queries(self, request: Request) -> Response:
        """Embed one or several queries (contract C5)."""
        fields = (await read_body(request, self._service.settings, several=("queries",))).fields
        encoding = Encoding.of(fields, NATIVE)
        if fields.get("pool_factor") is not None:
            raise InvalidParameter("pool_factor is for images: a query's vectors are never pooled.")
        value = fields.get("queries")
        texts: Sequence[object] = [value] if isinstance(value, str) else cast("Sequence[object]", value)
        if not isinstance(texts, list):
            raise InvalidParameter("queries must be text or a list of texts.")
        check_count(len(texts), "queries")
        results = await self._embed([EmbedRequest(query_in(text)) for text in texts], request)
        made = [or_raise(item) for item in results]
        answer: Json = {"embeddings": [encoding.encode(item.vectors) for item in made]}
        if encoding.format != "float":
            answer |= {"shapes": [list(item.vectors.shape) for item in made]} | encoding.describe()
        return await _json(answer | self._about(results))

    async def embed_images(self, request: Request) -> Response:
        """Embed one or several page images (contract C6): multipart `files`, or JSON `images`."""
        body = await read_body(
            request, self._service.settings, several=("files", "images"), max_parts=MAX_IMAGES_PER_CALL + 8
        )
        encoding = Encoding.of(body.fields, NATIVE)
        factor = pool_factor_in(body.fields)
        pages = [EmbedRequest(page.content, factor, label=page.label) for page in pages_in(body)]
        check_count(len(pages), "images")
        results = await self._embed(pages, request)
        answer: Json = {
            "embeddings": [
                embedding_out(item, encoding) if isinstance(item, Embedding) else error_out(item) for item in results
            ]
        }
        if factor > 1:
            answer["pool_factor"] = factor
        return await _json(answer | encoding.describe() | self._about(results))

    async def score(self, request: Request) -> Response:
        """MaxSim of every query against every page, from texts and images or from vectors (contract C10)."""
        body = await read_body(
            request,
            self._service.settings,
            several=("files", "images", "queries"),
            max_parts=2 * MAX_IMAGES_PER_CALL + 8,
        )
        dim = self._service.model.dim
        queries = [scored_query_in(value, dim) for value in list_in(body.fields.get("queries"), "queries")]
        pages = [scored_page_in(value, dim) for value in list_in(body.fields.get("pages"), "pages", is_optional=True)]
        pages += pages_in(body)
        check_count(len(queries), "queries")
        if not 1 <= len(pages) <= MAX_SCORED_PAGES:
            raise BadRequest(f"Send 1 to {MAX_SCORED_PAGES} pages a call.", code=count_code(len(pages)))
        if sum(isinstance(page, EmbedRequest) for page in pages) > MAX_IMAGES_PER_CALL:
            raise BadRequest(f"At most {MAX_IMAGES_PER_CALL} images a call.", code="too_many_items")
        wanted = [item for item in (*queries, *pages) if isinstance(item, EmbedRequest)]
        results = await self._embed(wanted, request) if wanted else []
        made = iter([or_raise(item).vectors for item in results])
        vectors = [next(made) if isinstance(item, EmbedRequest) else item for item in (*queries, *pages)]
        said, seen = vectors[: len(queries)], vectors[len(queries) :]
        if sum(map(len, said)) * sum(map(len, seen)) > MAX_SCORED_PAIRS:
            raise InvalidParameter("These are too many vectors for one call.", code="too_many_vectors")
        scores = await within(context_of(request).deadline, asyncio.to_thread(maxsim, said, seen))
        ranking = np.argsort(-scores, axis=1, kind="stable")
        answer: Json = {"scores": scores, "ranking": np.ascontiguousarray(ranking)}
        return await _json(answer | self._about(results))

    async def interpret(self, request: Request) -> Response:
        """Where on a page each token of a query finds its like (contract C10)."""
        body = await read_body(request, self._service.settings)
        form = str(body.fields.get("output") or "grid")
        if form not in {"grid", "png", "both"}:
            raise InvalidParameter("output must be grid, png or both.")
        page = replace(page_in(body), keeps_picture=form != "grid")
        query = EmbedRequest(query_in(body.fields.get("query")))
        seen, said = [or_raise(item) for item in await self._embed([page, query], request)]
        chosen = tokens_in(body.fields, len(said.tokens), said.augmentation)
        if form != "grid" and len(chosen) > MAX_OVERLAYS:
            raise InvalidParameter(f"At most {MAX_OVERLAYS} overlays a call: name the tokens.", code="too_many_items")
        answer = await asyncio.to_thread(_interpretation, said, seen, chosen, form)
        return await _json(answer | self._about([seen, said]))

    async def openai_embeddings(self, request: Request) -> Response:
        """OpenAI's embeddings, several vectors an item; `shape` says how many (contract C9)."""
        fields = (await read_body(request, self._service.settings)).fields
        self._check_openai(fields)
        encoding = Encoding.of(fields, OPENAI)
        factor = pool_factor_in(fields)
        inputs = [replace(item, pool_factor=factor) for item in openai_inputs_in(fields.get("input"))]
        results = await self._embed(inputs, request)
        data: list[Json] = []
        for index, item in enumerate(results):
            entry: Json = {"object": "embedding", "index": index}
            if isinstance(item, Embedding):
                data.append(entry | embedding_out(item, encoding) | {"shape": list(item.vectors.shape)})
            else:
                raise item
        info = self._service.model.info
        answer: Json = {"object": "list", "data": data, "model": info.name, "usage": usage_out(made_of(results))}
        return await _json(answer | encoding.describe() | demo_fields(info))

    def _check_openai(self, fields: Mapping[str, object]) -> None:
        model = fields.get("model")
        if model is not None and model not in (self._service.name, self._service.model.info.name):
            raise NotFound("No such model.", code="model_not_found")
        dimensions = fields.get("dimensions")
        if dimensions is not None and dimensions != self._service.model.dim:
            raise BadRequest(f"dimensions must be {self._service.model.dim}.", code="invalid_parameter")

    async def _embed(self, requests: Sequence[EmbedRequest], request: Request) -> Sequence[Outcome]:
        return cast("Sequence[Outcome]", await self._run(requests, context_of(request)))

    def _about(self, results: Sequence[Outcome]) -> Json:
        """What every answer says beside its own fields."""
        info = self._service.model.info
        return {"model": info.name, "usage": usage_out(made_of(results))} | demo_fields(info)


def _patches(model: "ColQwen", item: object) -> Json:
    fields = cast("Mapping[str, object]", item) if isinstance(item, dict) else {}
    sides = [fields.get("width"), fields.get("height")]
    numbers = [side for side in sides if isinstance(side, int) and not isinstance(side, bool)]
    shown = [side if side in numbers and abs(cast("int", side)) < 2**53 else None for side in sides]
    answer: Json = dict(zip(("width", "height"), shown, strict=True))
    if len(numbers) != 2 or not all(1 <= side <= MAX_SIDE for side in numbers):
        fault = f"width and height must be whole numbers from 1 to {MAX_SIDE}."
        return answer | {"error": fault, "code": "invalid_parameter"}
    try:
        across, down = model.patches(*numbers)
    except InvalidParameter as error:
        return answer | {"error": error.message, "code": error.code}
    return answer | {"n_patches_x": across, "n_patches_y": down}


def _interpretation(query: Embedding, page: Embedding, chosen: Sequence[int], form: str) -> Json:
    """Similarity of the chosen tokens with each patch, and of their mean, which says where the query as a whole is."""
    if page.span is None or page.patches is None:
        raise BadRequest("The image is missing.", code="image_missing")
    start, length = page.span
    columns, rows = page.patches
    maps = similarity_maps(query.vectors, page.vectors[start : start + length], rows, columns)
    own = maps[: len(maps) - query.augmentation]
    mean = own.mean(axis=0)
    drawn = maps[list(chosen)]
    low, high = float(min(drawn.min(), mean.min())), float(max(drawn.max(), mean.max()))

    def shown(grid: NDArray[np.float32]) -> Json:
        answer: Json = {}
        if form != "png":
            answer["grid"] = np.ascontiguousarray(grid)
        if form != "grid":
            answer["overlay"] = base64.b64encode(heatmap.overlay(page.picture, grid, low, high)).decode()
        return answer

    tokens = [
        {
            "index": index,
            "token": query.tokens[index],
            "is_augmentation": index >= len(own),
            "max_similarity": float(maps[index].max()),
        }
        | shown(maps[index])
        for index in chosen
    ]
    return {
        "n_patches_x": columns,
        "n_patches_y": rows,
        "score": float(maxsim([query.vectors], [page.vectors])[0, 0]),
        "low": low,
        "high": high,
        "mean": shown(mean),
        "tokens": tokens,
    }


async def _json(body: Json) -> Response:
    """A JSON answer with arrays; 32 pages are three million numbers, so they are written beside the event loop."""
    data = await asyncio.to_thread(orjson.dumps, body, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, media_type="application/json")
