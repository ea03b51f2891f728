"""What FastAPI cannot know of the OpenAPI document: errors of every operation, and the answers of the protocols."""

from collections.abc import Mapping
from typing import Any

from sightline import v2
from sightline.server.guard import is_open
from sightline.server.rendering import is_kserve, is_openai
from sightline.services.base import Json

_CODE: Json = {"type": "string", "pattern": "^[a-z0-9_]+$", "description": "Stable, for programs."}
_REQUEST_ID: Json = {"type": "string", "description": "Also in the header X-Request-Id."}

_SCHEMAS: Json = {
    "Error": {
        "type": "object",
        "required": ["detail", "code"],
        "properties": {"detail": {"type": "string"}, "code": _CODE, "request_id": _REQUEST_ID},
    },
    "KServeError": {
        "type": "object",
        "required": ["error", "code"],
        "properties": {"error": {"type": "string"}, "code": _CODE, "request_id": _REQUEST_ID},
    },
    "OpenAIError": {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": _CODE,
                },
            },
            "request_id": _REQUEST_ID,
        },
    },
}

_WHY: Mapping[int, str] = {
    400: "The request cannot be understood, or its image cannot be taken.",
    403: "The API key is missing or wrong.",
    404: "There is no such model, run, task or image.",
    413: "Bytes, pixels or parts beyond the limits.",
    422: "A value is out of range.",
    429: "Too many requests are waiting; see Retry-After.",
    500: "A bug; the log has the cause.",
    501: "The protocol has it, this server does not.",
    502: "A model or store behind this server answered nonsense.",
    503: "Loading, or a part that is needed is down; see Retry-After.",
    504: "The deadline passed.",
    507: "The image does not fit the device.",
}
_OF_ALL = (400, 403, 422, 500)
_OF_WORK = (404, 413, 429, 502, 503, 504, 507)
_OPENAI_WITHOUT = 422
"""OpenAI's routes say 400 instead."""


def complete(document: Json) -> Json:
    """Add to every operation of FastAPI's document what it may answer beside its service's own answers."""
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas |= _SCHEMAS
    for path, operations in document["paths"].items():
        for operation in operations.values():
            responses: Json = operation["responses"]
            _add_answers(path, operation, responses)
            _add_errors(path, operation, responses)
            operation["responses"] = dict(sorted(responses.items()))
    for invented in ("HTTPValidationError", "ValidationError"):  # FastAPI's own 422, which ours replaces
        schemas.pop(invented, None)
    return document


def _add_answers(path: str, operation: Json, responses: Json) -> None:
    if path in _REFUSED:
        del responses["200"]
    if (contents := _ANSWERS.get(path)) is not None:
        responses["200"] = {"description": "The answer.", "content": contents}
    if path.endswith("/ready"):
        responses["503"] = {"description": "Still loading.", "content": _json(_NOT_READY)}


def _add_errors(path: str, operation: Json, responses: Json) -> None:
    kind = "OpenAIError" if is_openai(path) else "KServeError" if is_kserve(path) else "Error"
    content = _json({"$ref": f"#/components/schemas/{kind}"})
    statuses = {*_OF_ALL, *(_OF_WORK if "requestBody" in operation else ())}
    if "{" in path:
        statuses |= {404, 503}
    if is_open(path):
        statuses.discard(403)
    if path in _REFUSED:
        statuses.add(501)
    if is_openai(path):
        statuses.discard(_OPENAI_WITHOUT)
        responses.pop(str(_OPENAI_WITHOUT), None)
    for status in statuses | {int(status) for status in responses if int(status) >= 400}:
        own = responses.get(str(status), {})
        if path.endswith("/ready") and status == 503:
            continue
        said = own.get("description", "")
        description = said if said and said not in _EMPTY_WORDS else _WHY[status]
        responses[str(status)] = {"description": description, "content": content}


_EMPTY_WORDS = {"Validation Error", "Bad Request", "Not Found", "Unprocessable Content", "Unprocessable Entity"}

_REFUSED = {f"/v2/repository/models/{{model_name}}/{verb}" for verb in ("load", "unload")}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _object(properties: Json, *optional: str) -> Json:
    return {"type": "object", "required": [name for name in properties if name not in optional]} | {
        "properties": properties
    }


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}


_TEXT: Json = {"type": "string"}
_TRUTH: Json = {"type": "boolean"}
_NOT_READY = _object({"name": _TEXT, "ready": {"const": False}, "error": _TEXT, "code": _CODE}, "name")
_SPEC = _object({"name": _TEXT, "datatype": _TEXT, "shape": _list({"type": "integer"})})
_TENSOR = _object(
    {
        "name": _TEXT,
        "datatype": {"enum": ["BYTES", *v2.NUMPY_TYPES]},
        "shape": _list({"type": "integer", "minimum": 0}),
        "parameters": {"type": "object"},
        "data": _list({}),
    },
    "parameters",
    "data",
)
_INFERRED = _object(
    {
        "model_name": _TEXT,
        "model_version": _TEXT,
        "id": _TEXT,
        "parameters": {"type": "object"},
        "outputs": _list(_TENSOR),
    },
    "parameters",
)
_CARD = _object({
    "id": _TEXT, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by": _TEXT,
    "root": {"type": "string", "description": "The model's own name."}, "demo_model": _TRUTH,
}, "root", "demo_model")  # fmt: skip

_ANSWERS: Mapping[str, Any] = {
    "/v2": _json(_object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)})),
    "/v2/health/live": _json(_object({"live": {"const": True}})),
    "/v2/health/ready": _json(_object({"ready": {"const": True}})),
    "/v2/models": _json(_object({"models": _list(_TEXT)})),
    "/v2/repository/index": _json(
        _list(_object({"name": _TEXT, "version": _TEXT, "state": {"enum": ["READY", "LOADING"]}, "reason": _TEXT}))
    ),
    "/v2/models/{model_name}": _json(
        _object(
            {
                "name": _TEXT,
                "versions": _list(_TEXT),
                "platform": _TEXT,
                "inputs": _list(_SPEC),
                "outputs": _list(_SPEC),
                "parameters": {"type": "object", "description": "Which model it really is, once it is loaded."},
            },
            "parameters",
        )
    ),
    "/v2/models/{model_name}/ready": _json(_object({"name": _TEXT, "ready": {"const": True}})),
    "/v2/models/{model_name}/infer": _json(_INFERRED)
    | {
        "application/octet-stream": {
            "schema": {"type": "string", "format": "binary", "description": "JSON, then the binary tensors."}
        }
    },
    "/v1/models/{model_name}:predict": _json(_object({"predictions": _list({})})),
    "/v1/models": _json(_object({"object": {"const": "list"}, "data": _list(_CARD), "models": _list(_TEXT)})),
    "/v1/models/{model_name}": _json(
        _CARD | {"properties": _CARD["properties"] | {"name": _TEXT, "ready": {"const": True}}}
    ),
}
