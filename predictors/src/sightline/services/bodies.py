"""Bodies of routes: JSON, a form or a raw image become fields and uploads; answers become JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import orjson
from fastapi import Request, Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from sightline.errors import BadRequest, InvalidParameter
from sightline.settings import ServerSettings
from sightline.wire import ImageBytes


@dataclass(frozen=True, slots=True)
class Body:
    """What came.

    fields   JSON members or form fields (text)
    uploads  files by field name
    """

    fields: Mapping[str, object] = field(default_factory=dict[str, object])
    uploads: Mapping[str, ImageBytes] = field(default_factory=dict[str, ImageBytes])


async def read_body(request: Request, settings: ServerSettings) -> Body:
    """Read a body by its Content-Type; without one it is JSON, as curl users expect.

    A raw `image/*` body is an upload named `image`. Raises BadRequest (400).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in {"multipart/form-data", "application/x-www-form-urlencoded"}:
        return await _read_form(request, settings)
    data = await request.body()
    if kind.startswith("image/"):
        return Body(uploads={"image": ImageBytes(data)})
    try:
        parsed: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise BadRequest("The body is not valid JSON.", code="invalid_json") from error
    if not isinstance(parsed, dict):
        raise InvalidParameter("The body must be a JSON object.", code="invalid_body")
    return Body(cast("Mapping[str, object]", parsed))


async def _read_form(request: Request, settings: ServerSettings) -> Body:
    try:
        async with request.form(
            max_files=settings.max_parts, max_fields=settings.max_parts, max_part_size=1 << 20
        ) as form:
            fields: dict[str, object] = {}
            uploads: dict[str, ImageBytes] = {}
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    uploads[name] = ImageBytes(await value.read(), value.filename)
                else:
                    fields[name] = value
    except (MultiPartException, HTTPException) as error:
        raise BadRequest("The form cannot be read.", code="invalid_form") from error
    return Body(fields, uploads)


def numbers_of_form(fields: Mapping[str, object]) -> dict[str, object]:
    """Form fields are text: what reads as a JSON number or boolean becomes one; `null` and blanks go."""
    parsed: dict[str, object] = {}
    for name, value in fields.items():
        if not isinstance(value, str):
            parsed[name] = value
            continue
        if not value.strip():
            continue
        try:
            number: Any = orjson.loads(value)
        except orjson.JSONDecodeError:
            number = value
        if number is not None:
            parsed[name] = number if isinstance(number, bool | int | float) else value
    return parsed


def json_response(body: object, status_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer; FastAPI's own class for it is deprecated, Starlette's is slower."""
    return Response(orjson.dumps(body), status_code, headers, media_type="application/json")
