"""What the embedding service takes and gives: its requests and results, read from bodies and written into answers.

Dims   T tokens of an item · D embedding width (128)
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import orjson

from sightline.errors import BadRequest, InvalidParameter, OutOfMemory
from sightline.services.base import Json, prompt_of
from sightline.services.bodies import Body
from sightline.services.encodings import Encoding, Vectors, decode
from sightline.sources import parse_source
from sightline.wire import (
    MAX_IMAGES_PER_CALL,
    ImageBytes,
    ImagePath,
    ImageSource,
    ModelInfo,
    Usage,
)

NATIVE = Encoding("float", "float16")
OPENAI = Encoding("float", "float32")
"""OpenAI's clients ask for base64 by themselves and read it as float32."""

MAX_POOL_FACTOR = 100
OVERLAY_SIDE = 512
"""Longest side of a picture kept for an overlay, pixels."""


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """One page image or one query to embed.

    content         an image, or the text of a query
    pool_factor     how many of a page's vectors become one; 1 keeps them all; queries are never pooled
    dtype           of the V2 output: FP32 or FP16
    label           what an error calls the item, such as an upload's name
    keeps_picture   the result carries the page's picture, small
    """

    content: ImageSource | str
    pool_factor: int = 1
    dtype: str = "FP32"
    label: str | None = None
    keeps_picture: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """The vectors of one item.

    vectors      (T, D) float32, unit rows, no padding; fewer than T rows when pooled
    span         first image token and their number in the un-padded sequence; None for a query or when pooled
    patches      (n_patches_x, n_patches_y) of a page; None for a query
    tokens       each token of a query as text; empty for a page
    augmentation how many of the last tokens of a query are not the client's
    downscaled   the device's memory did not suffice, so the model saw the page at half its pixels
    picture      PIL.Image of the page, when it was asked for
    """

    vectors: Vectors
    span: tuple[int, int] | None
    patches: tuple[int, int] | None
    usage: Usage
    model: ModelInfo
    milliseconds: float
    dtype: str = "FP32"
    tokens: tuple[str, ...] = ()
    augmentation: int = 0
    downscaled: bool = False
    picture: Any = None


Outcome = Embedding | OutOfMemory
"""What became of one item of a call. A page that does not fit the device fails alone when others are in the call."""


# --- bodies in ---


def instance_in(instance: object) -> EmbedRequest:
    """One V1 instance: text is an image reference; an object has an image, or `query`."""
    if isinstance(instance, dict):
        fields = cast("Mapping[str, object]", instance)
        query = fields.get("query", fields.get("text"))
        if query is not None:
            return EmbedRequest(query_in(query))
        return EmbedRequest(image_in(fields), pool_factor_in(fields))
    return EmbedRequest(image_in(instance))


_IMAGE_KEYS = ("image", "image_url", "s3_uri", "image_bytes", "b64", "url")


def image_in(value: object) -> ImageSource:
    """An image by reference: a data URI, an allowed URL, s3://, base64, or an object holding one, or `image_path`.

    Raises BadRequest (400, image_missing).
    """
    if isinstance(value, str) and value.strip():
        return parse_source(value)
    if isinstance(value, dict):
        fields = cast("Mapping[str, object]", value)
        path = fields.get("image_path")
        if isinstance(path, str) and path:
            return ImagePath(path)
        for key in _IMAGE_KEYS:
            inner = fields.get(key)
            if isinstance(inner, dict):  # {"image": {"b64": …}}, {"image_url": {"url": …}}
                nested = cast("Mapping[str, object]", inner)
                inner = nested.get("url", nested.get("b64"))
            if isinstance(inner, str) and inner.strip():
                return parse_source(inner)
    raise BadRequest(
        "An image is missing: send a data URI, base64, an allowed URL, s3:// or image_path.", code="image_missing"
    )


def pages_in(body: Body) -> list[EmbedRequest]:
    """The pages of a body: uploads under `files`, `images`, `file` or `image`, references, or a raw image body."""
    uploads = [*body.files.get("files", ()), *body.files.get("images", ())]
    uploads += [body.uploads[name] for name in ("file", "image") if name in body.uploads]
    pages = [EmbedRequest(upload, label=_shown(upload)) for upload in uploads]
    for name in ("images", "image_url", "image"):
        value = body.fields.get(name)
        if value is not None:
            values = cast("Sequence[object]", value) if isinstance(value, list) else [value]
            pages += [EmbedRequest(image_in(item)) for item in values]
    if body.fields.get("files"):
        raise InvalidParameter("files must be uploads, not text.")
    return pages


def page_in(body: Body) -> EmbedRequest:
    if body.fields.get("image_path") is not None:
        return EmbedRequest(image_in(body.fields))
    pages = pages_in(body)
    if len(pages) != 1:
        raise BadRequest("Send one image.", code="image_missing" if not pages else "too_many_items")
    return pages[0]


def _shown(upload: ImageBytes) -> str | None:
    """An upload's name as an error may repeat it: its last part, letters, digits and a few signs."""
    name = (upload.filename or "").replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[^\w.\- ]", "_", name)[:80].strip() or None


def query_in(value: object) -> str:
    text = prompt_of(value, "a query")
    if text is None:
        raise InvalidParameter("A query must be text that is not blank.", code="query_blank")
    return text


def list_in(value: object, name: str, *, is_optional: bool = False) -> Sequence[object]:
    if value is None and is_optional:
        return []
    if isinstance(value, list):
        return cast("Sequence[object]", value)
    if isinstance(value, str | dict):
        return [value]
    raise InvalidParameter(f"{name} must be a list.")


def _has_vectors(value: object) -> bool:
    return isinstance(value, list) or (isinstance(value, dict) and ("vectors" in value or "embedding" in value))


def _vectors(value: object, dim: int, what: str) -> Vectors:
    fields = cast("Mapping[str, object]", value) if isinstance(value, dict) else {}
    return decode(fields.get("vectors", value), dim, what)


def scored_query_in(value: object, dim: int) -> EmbedRequest | Vectors:
    """Text, or the vectors of a query."""
    return _vectors(value, dim, "A query") if _has_vectors(value) else EmbedRequest(query_in(value))


def scored_page_in(value: object, dim: int) -> EmbedRequest | Vectors:
    """An image by reference, or the vectors of a page."""
    return _vectors(value, dim, "A page") if _has_vectors(value) else EmbedRequest(image_in(value))


def openai_inputs_in(value: object) -> list[EmbedRequest]:
    """OpenAI's `input`: a text, or a list of texts and content parts; one item each."""
    if isinstance(value, str | dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRequest("input must be text, a content part, or a list of these.", code="invalid_input")
    items = cast("Sequence[object]", value)
    check_count(len(items), "inputs")
    return [_openai_input(item) for item in items]


def _openai_input(item: object) -> EmbedRequest:
    if isinstance(item, str):
        return EmbedRequest(query_in(item))
    if isinstance(item, dict):
        part = cast("Mapping[str, object]", item)
        if part.get("type") in ("text", "input_text") or ("text" in part and "type" not in part):
            return EmbedRequest(query_in(part.get("text")))
        return EmbedRequest(image_in(part))
    raise BadRequest("Token ids are not taken: send text.", code="invalid_input")


def check_count(count: int, what: str) -> None:
    """Raises BadRequest (400) unless 1 to MAX_IMAGES_PER_CALL."""
    if not 1 <= count <= MAX_IMAGES_PER_CALL:
        raise BadRequest(f"Send 1 to {MAX_IMAGES_PER_CALL} {what} a call.", code=count_code(count))


def count_code(count: int) -> str:
    return "too_many_items" if count else "nothing_to_embed"


def _whole(options: Mapping[str, object], name: str, low: int, high: int) -> int | None:
    """A whole number; None when absent or null. In a form it is text. Raises InvalidParameter (422)."""
    value = options.get(name)
    if value is None:
        return None
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value, re.ASCII):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidParameter(f"{name} must be a whole number from {low} to {high}.")
    return value


def pool_factor_in(options: Mapping[str, object]) -> int:
    return _whole(options, "pool_factor", 1, MAX_POOL_FACTOR) or 1


def tokens_in(options: Mapping[str, object], count: int, augmentation: int) -> list[int]:
    """Which tokens of a query are wanted: those named by `tokens`, or all that are the client's own."""
    named = options.get("tokens")
    if named is None:
        return list(range(count - augmentation))
    try:
        values: object = orjson.loads(named) if isinstance(named, str) else named
    except orjson.JSONDecodeError:
        values = None
    chosen = cast("list[object]", values) if isinstance(values, list) else []
    if not chosen or not all(type(index) is int and 0 <= index < count for index in chosen):
        raise InvalidParameter(f"tokens must be a list of numbers from 0 to {count - 1}.")
    return cast("list[int]", list(dict.fromkeys(chosen)))


# --- answers out ---


def made_of(results: Sequence[Outcome]) -> list[Embedding]:
    return [item for item in results if isinstance(item, Embedding)]


def or_raise(item: Outcome) -> Embedding:
    if isinstance(item, OutOfMemory):
        raise item
    return item


def error_out(fault: OutOfMemory) -> Json:
    return {"error": fault.message, "code": fault.code, "http_status": fault.status}


def usage_out(items: Sequence[Embedding]) -> Json:
    tokens = sum(item.usage.prompt_tokens for item in items)
    images = sum(item.usage.image_tokens or 0 for item in items)
    return {"prompt_tokens": tokens, "total_tokens": tokens, "image_tokens": images}


def embedding_out(item: Embedding, encoding: Encoding) -> Json:
    """One embedding; a page with its span and patches (contract C6)."""
    answer: Json = {"embedding": encoding.encode(item.vectors)}
    if encoding.format != "float":
        answer["shape"] = list(item.vectors.shape)
    if item.patches is not None:
        start, length = item.span or (None, None)
        answer |= {
            "image_patch_start": start,
            "image_patch_len": length,
            "n_patches_x": item.patches[0],
            "n_patches_y": item.patches[1],
        }
    if item.downscaled:
        answer["downscaled"] = True
    return answer
