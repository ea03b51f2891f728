"""The services' own routes in one application, also where several services of one process answer the same path.

`POST /caption` is decided by its body (contracts D and E), `GET /health` says what each of them says, `GET /` is the
page for browsers and the embedding service's greeting for everybody else.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.types import Message

from sightline.server.model import PredictorModel
from sightline.services.base import Json, Run
from sightline.services.bodies import json_response

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class _Owned:
    """One native route of one predictor."""

    kind: str
    model: PredictorModel
    route: APIRoute

    @property
    def handler(self) -> Handler:
        return cast("Handler", self.route.get_route_handler())


class NativeRoutes:
    """The native routes of all predictors of a process.

    models   by the predictor's name: describe, blip, …
    Raises ValueError when two of them answer one path and nothing says which is meant.
    """

    def __init__(self, models: Mapping[str, PredictorModel]) -> None:
        self._routers = [model.service.router(Run(model.run, model.stream)) for model in models.values()]
        owned: dict[tuple[str, str], list[_Owned]] = {}
        for (kind, model), router in zip(models.items(), self._routers, strict=True):
            for route in router.routes:
                if isinstance(route, APIRoute):
                    for method in route.methods:
                        owned.setdefault((method, route.path), []).append(_Owned(kind, model, route))
        self._shared = {key: owners for key, owners in owned.items() if len(owners) > 1}
        for (method, path), owners in self._shared.items():
            if (method, path) not in _DECIDERS:
                raise ValueError(f"{' and '.join(item.kind for item in owners)} both answer {method} {path}")
        self._documents: dict[tuple[str, str], Json] = {}
        for key, owners in self._shared.items():
            self._documents[key] = _either([_operation(item.route) for item in owners])
            for item in owners:  # FastAPI keeps one operation a path
                item.route.include_in_schema = False

    def include_in(self, app: FastAPI) -> None:
        """Add the routes; the route that is registered first wins, so those that decide come before the others."""
        deciders = APIRouter()
        for (method, path), owners in self._shared.items():
            decide = _DECIDERS[method, path](owners)
            deciders.add_api_route(path, decide, methods=[method], response_model=None, include_in_schema=False)
        app.include_router(deciders)
        for router in self._routers:
            app.include_router(router)
        if self._shared:
            document = app.openapi
            app.openapi = lambda: self._completed(document())

    def _completed(self, document: Json) -> Json:
        for (method, path), operation in self._documents.items():
            document["paths"].setdefault(path, {})[method.lower()] = operation
        return document


# --- deciders --------------------------------------------------------------------------------------------------------


def _by_body(owners: Sequence[_Owned]) -> Handler:
    """`s3_uri` → the pipeline; `image_path` or an uploaded `image` → BLIP; anything else → the pipeline."""
    by_kind = {item.kind: item.handler for item in owners}
    if set(by_kind) != {"pipeline", "blip"}:
        raise ValueError(f"{' and '.join(by_kind)} both answer POST /caption")

    async def caption(request: Request) -> Response:
        fields, has_upload = await _fields(request)
        is_blip = "s3_uri" not in fields and ("image_path" in fields or has_upload)
        return await by_kind["blip" if is_blip else "pipeline"](request)

    return caption


def _of_each(owners: Sequence[_Owned]) -> Handler:
    """All fields of all answers, and under `models` each one's own answer and whether it is ready."""

    async def health(request: Request) -> Response:
        together: Json = {}
        models: dict[str, Json] = {}
        for item in owners:
            body = (await item.handler(request)).body
            said = cast("Json", orjson.loads(bytes(body)))
            together |= said
            models[item.model.name] = {"ready": await item.model.healthy()} | said
        return json_response(together | {"models": models})

    return health


def _by_accept(owners: Sequence[_Owned]) -> Handler:
    """Contract C1 for programs; the first page there is for those who accept HTML."""
    greeting = next((item for item in owners if item.kind == "embed"), owners[0]).handler
    page = next((item for item in owners if item.kind != "embed"), owners[0]).handler

    async def root(request: Request) -> Response:
        return await (page if "text/html" in request.headers.get("accept", "") else greeting)(request)

    return root


_DECIDERS: Mapping[tuple[str, str], Callable[[Sequence[_Owned]], Handler]] = {
    ("POST", "/caption"): _by_body,
    ("GET", "/health"): _of_each,
    ("GET", "/"): _by_accept,
}


async def _fields(request: Request) -> tuple[set[str], bool]:
    """Names of the fields of a body, and whether it brings an image as a file; a body that cannot be read has none."""
    body = await request.body()  # kept by the request for whoever answers it
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/"):
        return set(), True
    if kind == "multipart/form-data":
        return await _form_fields(request, body)
    try:
        parsed: object = orjson.loads(body)
    except orjson.JSONDecodeError:
        return set(), False
    return set(cast("Mapping[str, object]", parsed)) if isinstance(parsed, dict) else set(), False


async def _form_fields(request: Request, body: bytes) -> tuple[set[str], bool]:
    async def replay() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, replay).form(max_part_size=len(body) + 1) as form:
            names = set(form.keys())
            return names, not isinstance(form.get("image", ""), str)
    except (MultiPartException, HTTPException, ValueError):  # whoever answers says what is wrong with it
        return set(), False


# --- OpenAPI ---------------------------------------------------------------------------------------------------------


def _operation(route: APIRoute) -> Json:
    """What one route documents, on its own: without references."""
    document = get_openapi(title="", version="", routes=[route])
    (operations,) = document["paths"].values()
    (operation,) = operations.values()
    return cast("Json", _inlined(operation, document.get("components", {}).get("schemas", {})))


def _inlined(node: Any, schemas: Mapping[str, Any]) -> Any:  # noqa: ANN401 - any JSON
    if isinstance(node, list):
        return [_inlined(item, schemas) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    fields = cast("Json", node)
    if isinstance(name := fields.get("$ref"), str):
        return _inlined(schemas[name.rpartition("/")[2]], schemas)
    return {key: _inlined(value, schemas) for key, value in fields.items()}


def _either(operations: Sequence[Json]) -> Json:
    """One operation whose bodies and answers are any of theirs."""
    merged = dict(operations[0])
    merged["summary"] = " / ".join(dict.fromkeys(item["summary"] for item in operations))
    merged["tags"] = list(dict.fromkeys(tag for item in operations for tag in item.get("tags", [])))
    merged["responses"] = {
        status: {
            "description": next(item["responses"][status]["description"] for item in operations
                                if status in item["responses"]),
            "content": _contents([item["responses"].get(status, {}) for item in operations]),
        }
        for status in sorted({status for item in operations for status in item["responses"]})
    }  # fmt: skip
    if bodies := [item["requestBody"] for item in operations if "requestBody" in item]:
        merged["requestBody"] = {"required": True, "content": _contents(bodies)}
    return merged


def _contents(parts: Sequence[Json]) -> Json:
    answer: dict[str, list[Any]] = {}
    for part in parts:
        for kind, content in part.get("content", {}).items():
            schemas = answer.setdefault(kind, [])
            if (schema := content.get("schema", {})) not in schemas:
                schemas.append(schema)
    return {
        kind: {"schema": schemas[0] if len(schemas) == 1 else {"anyOf": schemas}} for kind, schemas in answer.items()
    }
