"""What the OpenAPI document says of `/v1/files` and `/v1/batches`."""

from collections.abc import Mapping
from typing import Any, Literal

from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from sightline.jobs.openai.requests import ENDPOINTS


class FileAnswer(BaseModel):
    """A file that was uploaded, or that came of a batch."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int = Field(description="Seconds since 1970.")
    expires_at: int = Field(description="Seconds since 1970; then it is forgotten.")
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed", "error"] = Field(description="error: its lines are no requests; a batch of it fails.")
    status_details: str | None = Field(description="What is wrong with the first of them.")


class DeletedAnswer(BaseModel):
    """A file that is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class CountsAnswer(BaseModel):
    """Requests of a batch."""

    total: int
    completed: int = Field(description="With an answer.")
    failed: int = Field(description="Without one, for good.")


class UsageAnswer(BaseModel):
    """Tokens of all answers so far."""

    input_tokens: int
    output_tokens: int
    total_tokens: int


class FaultAnswer(BaseModel):
    """Why a batch failed as a whole."""

    code: str
    message: str
    line: int | None = Field(description="Of the file, from 1.")
    param: str | None = Field(description="Field of that line.")


class FaultsAnswer(BaseModel):
    """At most fifty of them."""

    object: Literal["list"]
    data: list[FaultAnswer]


class BatchAnswer(BaseModel):
    """A batch as it is now. Moments are seconds since 1970."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: FaultsAnswer | None
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None = Field(description="Answers, once the batch is over.")
    error_file_id: str | None = Field(description="Requests without an answer, once the batch is over.")
    created_at: int
    expires_at: int | None = Field(description="End of the window.")
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: CountsAnswer
    usage: UsageAnswer
    metadata: dict[str, str] | None


class _List(BaseModel):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FilesAnswer(_List):
    """A page of files."""

    data: list[FileAnswer]


class BatchesAnswer(_List):
    """A page of batches."""

    data: list[BatchAnswer]


class _Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """An error as OpenAI says it."""

    error: _Error
    request_id: str


_EXPIRY: dict[str, Any] = {
    "type": "object",
    "required": ["anchor", "seconds"],
    "properties": {
        "anchor": {"const": "created_at"},
        "seconds": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}

_UPLOAD: dict[str, Any] = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {
            "type": "string",
            "format": "binary",
            "description": "JSONL: `{custom_id, method: POST, url, body}` a line.",
        },
        "purpose": {"const": "batch"},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}

_BATCH: dict[str, Any] = {
    "type": "object",
    "required": ["input_file_id", "endpoint", "completion_window"],
    "properties": {
        "input_file_id": {"type": "string", "description": "An uploaded file of purpose batch."},
        "endpoint": {"enum": list(ENDPOINTS)},
        "completion_window": {
            "type": "string",
            "pattern": "^[0-9]{1,6}[smhd]$",
            "description": "24h, or another time from 1m to 14d.",
        },
        "metadata": {
            "type": ["object", "null"],
            "maxProperties": 16,
            "additionalProperties": {"type": "string", "maxLength": 512},
        },
        "output_expires_after": _EXPIRY,
    },
}


def _query(name: str, description: str, **schema: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON schema
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


_AFTER = _query("after", "The id that the list before this one ended with.", type="string")


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer} for status in (*statuses, 503)}


def _body(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema}}}}


OPERATIONS: Mapping[tuple[str, str], dict[str, Any]] = {
    ("POST", "/files"): {
        "responses": {200: {"model": FileAnswer}} | _errors(400, 413),
        "openapi_extra": _body("multipart/form-data", _UPLOAD),
    },
    ("GET", "/files"): {
        "responses": {200: {"model": FilesAnswer}} | _errors(400),
        "openapi_extra": {
            "parameters": [
                _query("purpose", "Of the files.", type="string"),
                _query("limit", "Files at most.", type="integer", minimum=1, maximum=10_000),
                _query("order", "By the time of upload.", enum=["asc", "desc"]),
                _AFTER,
            ]
        },
    },
    ("GET", "/files/{file_id}"): {"responses": {200: {"model": FileAnswer}} | _errors(404)},
    ("DELETE", "/files/{file_id}"): {"responses": {200: {"model": DeletedAnswer}} | _errors(400, 404)},
    ("GET", "/files/{file_id}/content"): {
        "response_class": StreamingResponse,
        "responses": {
            200: {
                "description": "The bytes.",
                "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
            }
        }
        | _errors(404),
    },
    ("POST", "/batches"): {
        "responses": {200: {"model": BatchAnswer}} | _errors(400, 429),
        "openapi_extra": _body("application/json", _BATCH),
    },
    ("GET", "/batches"): {
        "responses": {200: {"model": BatchesAnswer}} | _errors(400),
        "openapi_extra": {
            "parameters": [_query("limit", "Batches at most.", type="integer", minimum=1, maximum=100), _AFTER]
        },
    },
    ("GET", "/batches/{batch_id}"): {"responses": {200: {"model": BatchAnswer}} | _errors(404)},
    ("POST", "/batches/{batch_id}/cancel"): {"responses": {200: {"model": BatchAnswer}} | _errors(400, 404)},
}
"""What `APIRouter.add_api_route` is told of each route."""
