"""The KServe routes that every model has, ours before KServe's own.

KServe 0.21's V2 route cannot take raw image bytes, gzip bodies or tritonclient's JSON, writes nulls where the protocol
has none, and lets anybody unload the model (reference/kserve.md §0). A route that is registered first wins.
"""

import asyncio
import gzip
import zlib
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from sightline import __version__, v2
from sightline.errors import BadRequest, NotFound, NotSupported, PayloadTooLarge
from sightline.server.model import PredictorModel
from sightline.services.base import Json, context_of
from sightline.services.bodies import json_response

T = TypeVar("T")

VERSION = "1"
EXTENSIONS = ["binary_tensor_data"]


class Protocols:
    """V1 and V2 over the given models.

    max_bytes   of a request after decompression
    """

    def __init__(self, models: Sequence[PredictorModel], max_bytes: int) -> None:
        self._models = {model.name: model for model in models}
        self._max_bytes = max_bytes

    def router(self) -> APIRouter:
        """All routes; `include` it before KServe adds its own."""
        router = APIRouter()
        add = router.add_api_route
        add("/v2", self._server, methods=["GET"], tags=["V2"])
        add("/v2/health/live", self._live, methods=["GET"], tags=["V2"])
        add("/v2/health/ready", self._ready, methods=["GET"], tags=["V2"], response_model=None)
        add("/v2/models", self._list, methods=["GET"], tags=["V2"])
        add("/v2/repository/index", self._index, methods=["POST"], tags=["V2"], response_model=None)
        for verb in ("load", "unload"):
            path = f"/v2/repository/models/{{model_name}}/{verb}"
            add(path, self._refuse, methods=["POST"], tags=["V2"], name=f"{verb}_model")
        for prefix, is_shown in (("", True), ("/versions/{model_version}", False)):
            base = f"/v2/models/{{model_name}}{prefix}"
            shown: dict[str, Any] = {"include_in_schema": is_shown, "response_model": None, "tags": ["V2"]}
            add(base, self._metadata, methods=["GET"], **shown)
            add(f"{base}/ready", self._model_ready, methods=["GET"], **shown)
            add(
                f"{base}/infer",
                self._infer,
                methods=["POST"],
                openapi_extra=_INFER_OPENAPI,
                route_class_override=_Bare,
                **shown,
            )
        add(
            "/v1/models/{model_name}:predict",
            self._predict,
            methods=["POST"],
            tags=["V1"],
            response_model=None,
            openapi_extra=_PREDICT_OPENAPI,
        )
        return router

    async def _server(self) -> Json:
        """Server metadata."""
        return {"name": "sightline", "version": __version__, "extensions": EXTENSIONS}

    async def _live(self) -> Json:
        """True as long as the process answers."""
        return {"live": True}

    async def _ready(self) -> Response:
        """True when every model is loaded; 503 until then."""
        is_ready = all([await model.healthy() for model in self._models.values()])
        return _readiness({"ready": is_ready}, None if is_ready else _reason(self._models.values()))

    async def _list(self) -> Json:
        """Names of the models."""
        return {"models": list(self._models)}

    async def _index(self) -> Response:
        """The model repository index extension."""
        return json_response(
            [
                {
                    "name": name,
                    "version": VERSION,
                    "state": "READY" if await model.healthy() else "LOADING",
                    "reason": "",
                }
                for name, model in self._models.items()
            ]
        )

    async def _refuse(self, model_name: str) -> None:
        """Models are loaded by starting a server and unloaded by stopping it."""
        raise NotSupported("Loading and unloading over HTTP is switched off.")

    async def _metadata(self, model_name: str, model_version: str | None = None) -> Response:
        """Model metadata: tensors, and which model it really is."""
        model = self._model(model_name, model_version)
        service = model.service
        body: Json = {
            "name": model.name,
            "versions": [VERSION],
            "platform": "sightline",
            "inputs": [spec.as_json() for spec in service.inputs],
            "outputs": [spec.as_json() for spec in service.outputs],
        }
        if await model.healthy():
            body["parameters"] = service.metadata()
        return json_response(body)

    async def _model_ready(self, model_name: str, model_version: str | None = None) -> Response:
        """True when the model is loaded; 503 until then."""
        model = self._model(model_name, model_version)
        is_ready = await model.healthy()
        return _readiness({"name": model_name, "ready": is_ready}, None if is_ready else _reason([model]))

    async def _infer(self, request: Request, model_name: str, model_version: str | None = None) -> Response:
        """V2 inference: JSON or the binary tensor extension, optionally compressed."""
        model = self._model(model_name, model_version)
        model.check_loaded()  # before the body: a loading model must not read images
        context = context_of(request)
        body = decompressed(await request.body(), request.headers.get("content-encoding"), self._max_bytes)
        announced = request.headers.get(v2.HEADER_LENGTH)

        def parse() -> tuple[v2.InferRequest, Sequence[object]]:
            parsed = v2.parse_request(body, announced)
            check_outputs(parsed, model)
            return parsed, model.service.from_v2(parsed)

        parsed, requests = await beside_the_loop(len(body), parse)
        results = await model.run(requests, context)
        response = model.service.to_v2(results)
        # KServe's own client insists on an id; the protocol lets us choose one.
        response = v2.InferResponse(
            model_name=response.model_name,
            outputs=response.outputs,
            parameters=response.parameters,
            model_version=VERSION,
            id=parsed.id or context.request_id,
        )
        rendered, header_length = v2.render_response(response, parsed)
        return _infer_response(rendered, header_length, request.headers.get("accept-encoding"))

    async def _predict(self, request: Request, model_name: str) -> Response:
        """V1 prediction: `{"instances": […]}`."""
        model = self._model(model_name, None)
        model.check_loaded()
        body = decompressed(await request.body(), request.headers.get("content-encoding"), self._max_bytes)

        def parse() -> Sequence[object]:
            try:
                parsed: object = orjson.loads(body)
            except orjson.JSONDecodeError as error:
                raise BadRequest("The body is not valid JSON.", code="invalid_json") from error
            if not isinstance(parsed, dict):
                raise BadRequest("The body must be a JSON object with 'instances'.")
            return model.service.from_v1(cast("Mapping[str, object]", parsed))

        requests = await beside_the_loop(len(body), parse)
        results = await model.run(requests, context_of(request))
        return json_response(model.service.to_v1(results))

    def _model(self, name: str, version: str | None) -> PredictorModel:
        model = self._models.get(name)
        if model is None or version not in {None, VERSION}:
            raise NotFound("No such model.", code="model_not_found")
        return model


class _Bare(APIRoute):
    """A route whose only parameters are the request and text of its path: FastAPI need not look for others."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handler(request: Request) -> Response:
            return await self.endpoint(request, **request.path_params)

        return handler


LARGE_BYTES = 1 << 20


async def beside_the_loop(size: int, work: Callable[[], T]) -> T:
    """Parse a large body in a thread: 100 MB of base64 would stop the event loop, and with it the probes."""
    return await asyncio.to_thread(work) if size > LARGE_BYTES else work()


def check_outputs(request: v2.InferRequest, model: PredictorModel) -> None:
    """Refuse unknown outputs before the model has worked for them."""
    known = {spec.name for spec in model.service.outputs}
    if not known.issuperset(request.outputs):
        raise BadRequest("A requested output does not exist.", code="unknown_output")


_UNREADY = {
    "loading": ("The model is still loading.", "model_not_ready"),
    "out_of_memory": ("The device had no memory for the last requests.", "out_of_memory"),
}


def _reason(models: Iterable[PredictorModel]) -> str:
    """Why the first of them that is not ready is not."""
    return next((model.unready for model in models if model.unready), "loading")


def _readiness(body: Json, reason: str | None) -> Response:
    if reason is None:
        return json_response(body)
    error, code = _UNREADY[reason]
    body |= {"error": error, "code": code, "reason": reason}
    return json_response(body, status_code=503, headers={"Retry-After": "5"})


def decompressed(body: bytes, encoding: str | None, limit: int) -> bytes:
    """Undo Content-Encoding gzip or deflate, never making more than `limit` bytes."""
    encoding = (encoding or "identity").strip().lower()
    if encoding == "identity":
        return body
    if encoding not in {"gzip", "deflate"}:
        raise BadRequest("Content-Encoding must be gzip or deflate.", code="unknown_encoding")
    decompressor = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # zlib or gzip header
    try:
        plain = decompressor.decompress(body, limit + 1)
    except zlib.error as error:
        raise BadRequest("The compressed body cannot be read.", code="invalid_encoding") from error
    if len(plain) > limit:
        raise PayloadTooLarge(f"The request has more than {limit} bytes.", code="request_too_large")
    if not decompressor.eof:
        raise BadRequest("The compressed body is cut off.", code="invalid_encoding")
    return plain


def _infer_response(body: bytes, header_length: int | None, accept_encoding: str | None) -> Response:
    headers: dict[str, str] = {}
    media_type = "application/json"
    if header_length is not None:
        headers["Inference-Header-Content-Length"] = str(header_length)
        media_type = "application/octet-stream"
    # Only for a client that asks for just this, as tritonclient does: browsers and httpx always offer gzip,
    # and compressing floats costs more than it saves.
    accepted = (accept_encoding or "").strip().lower()
    if accepted == "gzip":
        body = gzip.compress(body, compresslevel=1)
        headers["Content-Encoding"] = "gzip"
    elif accepted == "deflate":
        body = zlib.compress(body, level=1)
        headers["Content-Encoding"] = "deflate"
    return Response(body, headers=headers, media_type=media_type)


_TENSOR: Json = {
    "type": "object",
    "required": ["name", "datatype", "shape"],
    "properties": {
        "name": {"type": "string"},
        "datatype": {"type": "string", "enum": ["BYTES", *v2.NUMPY_TYPES]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "parameters": {"type": "object"},
        "data": {"type": "array", "items": {}},
    },
}

_INFER_OPENAPI: Json = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["inputs"],
                    "properties": {
                        "id": {"type": "string"},
                        "parameters": {"type": "object"},
                        "inputs": {"type": "array", "minItems": 1, "items": _TENSOR},
                        "outputs": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["name"],
                                "properties": {
                                    "name": {"type": "string"},
                                    "parameters": {"type": "object"},
                                },
                            },
                        },
                    },
                }
            },
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}

_PREDICT_OPENAPI: Json = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["instances"],
                    "properties": {"instances": {"type": "array", "minItems": 1, "items": {}}},
                }
            }
        },
    }
}
