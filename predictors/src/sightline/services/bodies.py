"""Bodies of routes: JSON, a form or a raw image become fields and uploads; answers become JSON."""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import orjson
from fastapi import Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from sightline.errors import BadRequest, InvalidParameter, PayloadTooLarge, SightlineError
from sightline.settings import ServerSettings
from sightline.wire import ImageBytes


@dataclass(frozen=True, slots=True)
class Body:
    """What came.

    fields   JSON members or form fields (text; a list of texts under a name that may come several times)
    uploads  the file of each name that may come once
    files    the files, in order, of each name that may come several times
    """

    fields: Mapping[str, object] = field(default_factory=dict[str, object])
    uploads: Mapping[str, ImageBytes] = field(default_factory=dict[str, ImageBytes])
    files: Mapping[str, Sequence[ImageBytes]] = field(default_factory=dict[str, Sequence[ImageBytes]])


async def read_body(
    request: Request, settings: ServerSettings, *, several: Collection[str] = (), max_parts: int | None = None
) -> Body:
    """Read a body by its Content-Type; without one it is JSON, as curl users expect.

    several    names under which a form may send more than one file or text
    max_parts  of a form; default: the setting

    A raw `image/*` body is an upload named `image`, its options are in the query. Raises BadRequest (400),
    PayloadTooLarge (413) for too many parts or a huge field, InvalidParameter (422).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data" or (kind == "application/x-www-form-urlencoded" and not await _is_json(request)):
        return await _read_form(request, settings, several, max_parts or settings.max_parts)
    data = await request.body()
    if kind.startswith("image/"):
        return Body(numbers_of_form(request.query_params), {"image": ImageBytes(data)})
    try:
        parsed: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRequest("The body is not valid JSON.", code="invalid_json") from error
    if not isinstance(parsed, dict):
        raise InvalidParameter("The body must be a JSON object.")
    return Body(cast("Mapping[str, object]", parsed))


async def _is_json(request: Request) -> bool:
    """`curl -d '{…}'` calls its JSON a form."""
    return (await request.body()).lstrip()[:1] == b"{"


async def _read_form(request: Request, settings: ServerSettings, several: Collection[str], max_parts: int) -> Body:
    fields: dict[str, object] = {}
    uploads: dict[str, ImageBytes] = {}
    texts: dict[str, list[str]] = {}
    files: dict[str, list[ImageBytes]] = {}
    try:
        async with request.form(
            max_files=max_parts,
            max_fields=max_parts,
            max_part_size=2 * settings.max_image_bytes,  # an image as base64 is a third longer
        ) as form:
            if len(form.multi_items()) > max_parts:
                raise _too_many_parts()
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name in several:
                        files.setdefault(name, []).append(ImageBytes(await value.read(), value.filename))
                        continue
                    if name in uploads:
                        raise InvalidParameter("Send one file under each name.", code="too_many_items")
                    uploads[name] = ImageBytes(await value.read(), value.filename)
                elif value.strip():
                    if name in several:
                        texts.setdefault(name, []).append(value)
                    else:
                        fields[name] = value
    except (MultiPartException, HTTPException, ValueError) as error:  # ValueError: a charset that is none
        raise form_fault(error) from error
    return Body(numbers_of_form(fields) | texts, uploads, files)


def _too_many_parts() -> PayloadTooLarge:
    return PayloadTooLarge("The form has too many parts.", code="too_many_parts")


def form_fault(error: HTTPException | MultiPartException | ValueError) -> SightlineError:
    """The error for a form that cannot be read. Starlette tells why by its sentence alone, which stays with us."""
    text = str(getattr(error, "detail", "") or getattr(error, "message", ""))
    if text.startswith("Too many"):
        return _too_many_parts()
    if text.startswith(("Part exceeded", "Field exceeded")):
        return PayloadTooLarge("A field of the form is too large.")
    return BadRequest("The form cannot be read.", code="invalid_form")


NUMBERS = frozenset({"max_tokens", "max_new_tokens", "temperature", "top_p", "seed", "max_width"})


def numbers_of_form(fields: Mapping[str, object]) -> dict[str, object]:
    """Form fields are text: those that mean a number become one where they read as one."""
    parsed = dict(fields)
    for name in NUMBERS & fields.keys():
        with contextlib.suppress(orjson.JSONDecodeError):
            parsed[name] = orjson.loads(str(fields[name]))
    return parsed


def json_response(body: object, status_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer; FastAPI's own class for it is deprecated, Starlette's is slower."""
    return Response(orjson.dumps(body), status_code, headers, media_type="application/json")
