"""Contract E's bodies: the images of a request, what its answer repeats of them, and all of it as documented."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from sightline.errors import InvalidParameter, SightlineError, SourceRefused
from sightline.services.base import Json, s3_source
from sightline.services.bodies import Body
from sightline.sources import parse_source
from sightline.wire import (
    MAX_PROMPT_CHARACTERS,
    ImageBytes,
    ImagePath,
    ImageS3,
    ImageSource,
    ImageUrl,
)


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a batch: how the client called it, and the image or why it is none."""

    echo: Mapping[str, str]
    image: ImageSource | SightlineError


def one_image(body: Body) -> tuple[Json, ImageSource]:
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


LISTS: Mapping[str, str] = {
    "image_paths": "image_path",
    "image_urls": "image_url",
    "s3_uris": "s3_uri",
    "images": "image",
}
"""Names of the lists that a batch can be, and how each item's answer calls what it was."""


def images_of_batch(body: Body) -> list[Item]:
    """The images of a batch, in order. Raises InvalidParameter (422) when there is not exactly one list of them."""
    if unknown := set(body.uploads):
        raise InvalidParameter(f"Files are taken under the name images, not {sorted(unknown)[0]}.")
    uploads = list(body.files.get("images", ()))
    lists = [name for name in LISTS if body.fields.get(name) is not None]
    if len(lists) + bool(uploads) != 1 or set(body.files) - {"images"}:
        raise InvalidParameter(
            "Send one list: image_paths, image_urls, s3_uris, images, or uploaded files named images.",
            code="image_missing",
        )
    if uploads:
        return [Item({"filename": upload.filename or ""}, upload) for upload in uploads]
    (name,) = lists
    values = body.fields[name]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in cast("list[object]", values)):
        raise InvalidParameter(f"{name} must be a list of texts.")
    return [_item(name, value) for value in cast("list[str]", values)]


def _item(name: str, value: str) -> Item:
    try:
        image: ImageSource | SightlineError = _source(LISTS[name], value)
    except SightlineError as error:
        image = error
    return Item(_echo(LISTS[name], value), image)


def _source(name: str, value: str) -> ImageSource:
    """What the text of a field stands for. Raises BadRequest (400)."""
    if name == "image_path":
        return ImagePath(value)
    return s3_source(value) if name == "s3_uri" else parse_source(value)


def _echo(name: str, value: str) -> Json:
    """What names the image in an answer: the client's own word for it, but never the image itself."""
    is_reference = name == "image_path" or value.lstrip()[:8].lower().startswith(("https://", "http://", "s3://"))
    return {name: value} if is_reference and len(value) <= MAX_PROMPT_CHARACTERS else {}


def stored_source(image: ImageSource | SightlineError) -> Json:
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


def restored_source(source: Mapping[str, str], data: bytes | None) -> ImageSource | SightlineError:
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


CAPTION_OPENAPI: Json = {
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

BATCH_OPENAPI: Json = {
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

ASYNC_OPENAPI: Json = {
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

STATUS_OPENAPI: Json = {
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
