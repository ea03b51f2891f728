"""OpenAI's `/v1/files` and `/v1/batches` on the gateway, also below `/openai`: upload, have it done, read what became.

Everything is bound to the key that it came with; to another key it does not exist. What is uploaded and what is
answered is streamed: a file of 200 MB costs a few megabytes of memory.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import IO, Any, cast

import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from sightline.errors import BadRequest, NotFound, PayloadTooLarge
from sightline.jobs.objects import Missing
from sightline.jobs.openai import requests
from sightline.jobs.openai.batch import FINAL, Batch, Order, Which, batch_key, output_of
from sightline.jobs.openai.desk import Desk
from sightline.jobs.openai.files import File
from sightline.jobs.openai.output import output_line
from sightline.jobs.openai.requests import Checked, LineFault
from sightline.server.openai import PREFIXES, InvalidField
from sightline.server.openai_batches_openapi import OPERATIONS
from sightline.services.base import Json, context_of
from sightline.services.bodies import form_fault, json_response
from sightline.settings import PipelineSettings

FORM_BYTES = 65_536
"""Of an upload beside its file."""
FORM_FIELDS = 8
MAX_LINE_BYTES = 32 * 1024 * 1024
"""A request that holds a picture of 20 MiB in base64, and its words."""
MAX_NAME_CHARACTERS = 255
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
SECONDS_KEPT = (3600, 2_592_000)
SECONDS_OF_WINDOW = (60, 14 * 86_400)
MOST_FILES, MOST_BATCHES, USUAL_BATCHES = 10_000, 100, 20
KNOWN_SIZES = 1000

_WINDOW = re.compile(r"(?P<count>[0-9]{1,6})(?P<unit>[smhd])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def upload_limits(settings: PipelineSettings) -> dict[str, int]:
    """Bytes of a request to the paths that take files."""
    return {f"{prefix}/files": settings.max_upload_bytes + FORM_BYTES for prefix in PREFIXES}


class OpenAIBatches:
    """The routes.

    desk    where files and batches are
    models  names that a request may ask for
    """

    def __init__(self, settings: PipelineSettings, desk: Desk, models: frozenset[str]) -> None:
        self._settings = settings
        self._desk = desk
        self._models = models
        self._sizes: OrderedDict[str, int] = OrderedDict()

    def router(self) -> APIRouter:
        router = APIRouter(tags=["OpenAI"], dependencies=[Depends(self._desk.wait)])
        routes = {
            ("POST", "/files"): self._upload,
            ("GET", "/files"): self._list_files,
            ("GET", "/files/{file_id}"): self._file,
            ("DELETE", "/files/{file_id}"): self._delete,
            ("GET", "/files/{file_id}/content"): self._content,
            ("POST", "/batches"): self._create,
            ("GET", "/batches"): self._list_batches,
            ("GET", "/batches/{batch_id}"): self._batch,
            ("POST", "/batches/{batch_id}/cancel"): self._cancel,
        }
        for prefix in PREFIXES:
            for (method, path), handler in routes.items():
                router.add_api_route(
                    f"{prefix}{path}",
                    handler,
                    methods=[method],
                    response_model=None,
                    include_in_schema=prefix == PREFIXES[0],
                    **OPERATIONS[method, path],
                )
        return router

    # --- files -------------------------------------------------------------------------------------------------------

    async def _upload(self, request: Request) -> Response:
        """Keep a file of requests. Its lines are looked at now; a batch of it is told what was wrong with them."""
        files, context = self._desk.files, context_of(request)
        async with _form(request) as form:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise InvalidField("file", "file must be a file.", code="file_missing")
            if form.get("purpose") != "batch":
                raise InvalidField("purpose", "purpose must be batch: nothing else here reads files.")
            size = file.size or 0
            if size > self._settings.max_upload_bytes:
                message = f"A file may have at most {self._settings.max_upload_bytes} bytes."
                raise PayloadTooLarge(message, code="file_too_large")
            checked = await asyncio.to_thread(self._check, file.file)
            await file.seek(0)
            kept = await files.add(
                file.file,
                size_bytes=size,
                filename=(file.filename or "batch.jsonl")[:MAX_NAME_CHARACTERS],
                purpose="batch",
                principal=context.principal,
                checked=checked,
                seconds=_seconds_kept(_expiry_of_form(form), "expires_after"),
            )
        return json_response(_shown(kept))

    def _check(self, content: IO[bytes]) -> Checked:
        def lines() -> Iterator[bytes]:
            while line := content.readline(MAX_LINE_BYTES + 2):
                yield line

        return requests.check(lines(), max_requests=self._settings.max_batch_lines, max_line_bytes=MAX_LINE_BYTES + 1)

    async def _list_files(self, request: Request) -> Response:
        """What was uploaded, or, of purpose `batch_output`, what came of it; newest first unless `order` is `asc`."""
        principal, asked = context_of(request).principal, request.query_params
        limit = _limit(asked.get("limit"), MOST_FILES, MOST_FILES)
        order, purpose, after = asked.get("order", "desc"), asked.get("purpose"), asked.get("after")
        if order not in ("asc", "desc"):
            raise InvalidField("order", "order must be asc or desc.")
        if purpose == "batch_output":
            shown = await self._outputs(principal, after, limit)
            return json_response(_page(shown, limit))
        found = await self._desk.files.list(
            principal, purpose=purpose, after=after, limit=limit + 1, newest_first=order == "desc"
        )
        return json_response(_page([_shown(file) for file in found], limit))

    async def _outputs(self, principal: str, after: str | None, limit: int) -> list[Json]:
        """Output and error files behind the file `after`, newest batch first; one more than `limit` if there are."""
        key, which = (after and output_of(after)) or (None, None)
        shown: list[Json] = []
        if key is not None and which == "results" and (batch := await self._desk.backend.get(key, principal)):
            shown += [await self._output_shown(batch, each) for each in self._there(batch) if each == "errors"]
        while len(shown) <= limit:
            found = await self._desk.backend.list(principal, after=key, limit=MOST_BATCHES)
            for batch in found:
                key = batch.key
                shown += [await self._output_shown(batch, each) for each in self._there(batch)]
                if len(shown) > limit:
                    break
            if not found:
                break
        return shown

    def _there(self, batch: Batch) -> list[Which]:
        """The files that came of a batch and are kept still."""
        kinds: tuple[Which, ...] = ("results", "errors")
        return [] if self._has_expired(batch) else [each for each in kinds if batch.output_id(each) is not None]

    async def _file(self, request: Request, file_id: str) -> Response:
        """One file: what was uploaded, or what came of it."""
        principal = context_of(request).principal
        if (output := await self._output(file_id, principal)) is not None:
            return json_response(await self._output_shown(*output))
        return json_response(_shown(await self._kept(file_id, principal)))

    async def _delete(self, request: Request, file_id: str) -> Response:
        """Forget an uploaded file. A batch that has begun has its requests already."""
        principal = context_of(request).principal
        if await self._output(file_id, principal) is not None:
            message = "The output of a batch stays until it expires."
            raise BadRequest(message, code="file_not_deletable")
        if not await self._desk.files.delete(file_id, principal):
            raise _no_file()
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def _content(self, request: Request, file_id: str) -> Response:
        """The bytes of a file, as a stream; of a batch's output one JSON object a line."""
        principal = context_of(request).principal
        if (output := await self._output(file_id, principal)) is not None:
            return await _streamed(self._output_lines(*output), {})
        file = await self._kept(file_id, principal)
        return await _streamed(self._desk.files.content(file), {"Content-Length": str(file.size_bytes)})

    async def _kept(self, file_id: str, principal: str) -> File:
        file = await self._desk.files.get(file_id, principal)
        if file is None:
            raise _no_file()
        return file

    # --- outputs -----------------------------------------------------------------------------------------------------

    async def _output(self, file_id: str, principal: str) -> tuple[Batch, Which] | None:
        """The batch of which a file is the output, and which one. Raises NotFound when there is none (any more)."""
        known = output_of(file_id)
        if known is None:
            return None
        key, which = known
        batch = await self._desk.backend.get(key, principal)
        if batch is None or batch.output_id(which) is None or self._has_expired(batch):
            raise _no_file()
        return batch, which

    def _has_expired(self, batch: Batch) -> bool:
        return batch.output_expires(self._settings.file_ttl_seconds) <= self._desk.files.now()

    async def _output_lines(self, batch: Batch, which: Which) -> AsyncGenerator[bytes]:
        """The lines of an output or error file, some at a time."""
        async for piece in self._desk.backend.lines(batch, which):
            yield await asyncio.to_thread(_translated, batch.id, piece)

    async def _output_shown(self, batch: Batch, which: Which) -> Json:
        file_id = batch.output_id(which)
        assert file_id is not None  # noqa: S101 - whoever asks has looked
        ended = batch.times.get("ended", batch.times["created"])
        return {
            "id": file_id,
            "object": "file",
            "bytes": await self._size(file_id, batch, which),
            "created_at": int(ended),
            "expires_at": int(batch.output_expires(self._settings.file_ttl_seconds)),
            "filename": f"{batch.id}_{'output' if which == 'results' else 'error'}.jsonl",
            "purpose": "batch_output",
            "status": "processed",
            "status_details": None,
        }

    async def _size(self, file_id: str, batch: Batch, which: Which) -> int:
        """Bytes of an output: it has to be written once to be counted, and never changes."""
        if file_id not in self._sizes:
            size = 0
            async for piece in self._output_lines(batch, which):
                size += len(piece)
            self._sizes[file_id] = size
            while len(self._sizes) > KNOWN_SIZES:
                self._sizes.popitem(last=False)
        return self._sizes[file_id]

    # --- batches -----------------------------------------------------------------------------------------------------

    async def _create(self, request: Request) -> Response:
        """Have the requests of a file done, within a time; what is not done by then ends as `batch_expired`."""
        principal = context_of(request).principal
        fields = _object(await request.body())
        endpoint = fields.get("endpoint")
        if endpoint not in requests.ENDPOINTS:
            raise InvalidField("endpoint", f"endpoint must be {' or '.join(requests.ENDPOINTS)}.")
        window, seconds = _window(fields.get("completion_window"))
        metadata = _metadata(fields.get("metadata"))
        kept = _seconds_kept(fields.get("output_expires_after"), "output_expires_after")
        file_id = fields.get("input_file_id")
        if not isinstance(file_id, str):
            raise InvalidField("input_file_id", "input_file_id must name an uploaded file.")
        file = await self._desk.files.get(file_id, principal)
        if file is None or file.checked is None:
            raise InvalidField("input_file_id", "There is no such file.", code="file_not_found")
        order = Order(file, str(endpoint), principal, window, seconds, metadata, kept, self._faults(file.checked))
        batch = await self._desk.backend.create(order)
        return json_response(batch.to_json())

    def _faults(self, checked: Checked) -> tuple[LineFault, ...]:
        """What is wrong with a file, here: a model that nobody serves would cost an error for every request."""
        unknown = [model for model in checked.models if model not in self._models]
        told = "GET /v1/models lists those that are served."
        return (
            *checked.faults,
            *(
                LineFault("model_not_found", f"No model is called {name}. {told}", None, "body.model")
                for name in unknown
            ),
        )

    async def _list_batches(self, request: Request) -> Response:
        """The batches of this key, newest first."""
        asked = request.query_params
        limit, after = _limit(asked.get("limit"), MOST_BATCHES, USUAL_BATCHES), asked.get("after")
        key = None
        if after is not None and not (key := batch_key(after)):
            raise InvalidField("after", "after must be the id of a batch.")
        found = await self._desk.backend.list(context_of(request).principal, after=key, limit=limit + 1)
        return json_response(_page([batch.to_json() for batch in found], limit))

    async def _batch(self, request: Request, batch_id: str) -> Response:
        """How far a batch is, and, when it is over, where its output is."""
        key = batch_key(batch_id)
        batch = await self._desk.backend.get(key, context_of(request).principal) if key else None
        if batch is None:
            raise _no_batch()
        return json_response(batch.to_json())

    async def _cancel(self, request: Request, batch_id: str) -> Response:
        """End a batch early. What is done is kept; the rest ends as `batch_cancelled`."""
        key = batch_key(batch_id)
        batch = await self._desk.backend.cancel(key, context_of(request).principal) if key else None
        if batch is None:
            raise _no_batch()
        if batch.status in FINAL - {"cancelled"}:
            raise BadRequest(f"The batch is {batch.status} already.", code="batch_ended")
        return json_response(batch.to_json())


# --- answers ---------------------------------------------------------------------------------------------------------


def _shown(file: File) -> Json:
    """OpenAI's `file` object."""
    faults = file.checked.faults if file.checked else ()
    details = None
    if faults:
        where = f"Line {faults[0].line}: " if faults[0].line else ""
        details = f"{where}{faults[0].message}"
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created),
        "expires_at": int(file.expires),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "error" if faults else "processed",
        "status_details": details,
    }


def _page(found: list[Json], limit: int) -> Json:
    """A list of at most `limit`; one more says that there are more."""
    shown = found[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(found) > limit,
    }


def _translated(batch_id: str, lines: bytes) -> bytes:
    return b"".join(output_line(batch_id, line) for line in lines.splitlines() if line)


async def _streamed(pieces: AsyncGenerator[bytes], headers: Mapping[str, str]) -> Response:
    """What goes wrong until the first piece gets a status of its own; later it breaks the answer off, visibly."""
    try:
        first = await anext(pieces, b"")
    except Missing as error:
        raise _no_file() from error

    async def whole() -> AsyncGenerator[bytes]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    return StreamingResponse(whole(), headers=headers, media_type="application/octet-stream")


def _no_file() -> NotFound:
    return NotFound("No such file.", code="file_not_found")


def _no_batch() -> NotFound:
    return NotFound("No such batch.", code="batch_not_found")


# --- requests --------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _form(request: Request) -> AsyncGenerator[FormData]:
    """The form of a request; its file lies on the disk when it is larger than a megabyte."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise BadRequest("A file is sent as multipart/form-data.", code="invalid_form")
    try:
        form = await request.form(max_files=1, max_fields=FORM_FIELDS, max_part_size=FORM_BYTES)
    except (MultiPartException, HTTPException, ValueError) as error:  # ValueError: a charset that is none
        raise form_fault(error) from error
    try:
        yield form
    finally:
        await form.close()


def _expiry_of_form(form: FormData) -> object:
    """`expires_after[anchor]` and `expires_after[seconds]`, as the clients write an object into a form."""
    told = {name: form.get(f"expires_after[{name}]") for name in ("anchor", "seconds")}
    if told["anchor"] is None and told["seconds"] is None:
        return None
    seconds = str(told["seconds"])
    return {"anchor": told["anchor"], "seconds": int(seconds) if re.fullmatch("[0-9]{1,9}", seconds) else seconds}


def _object(body: bytes) -> Mapping[str, object]:
    try:
        parsed: object = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest("The body is not valid JSON.", code="invalid_json") from error
    if not isinstance(parsed, dict):
        raise BadRequest("The body must be a JSON object.")
    return cast("Mapping[str, object]", parsed)


def _seconds_kept(value: object, name: str) -> float | None:
    if value is None:
        return None
    said = cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}
    seconds = said.get("seconds")
    low, high = SECONDS_KEPT
    if said.get("anchor") != "created_at":
        raise InvalidField(f"{name}.anchor", f"{name}.anchor must be created_at.")
    if not isinstance(seconds, int) or isinstance(seconds, bool) or not low <= seconds <= high:
        raise InvalidField(f"{name}.seconds", f"{name}.seconds must be a whole number from {low} to {high}.")
    return float(seconds)


def _window(value: object) -> tuple[str, float]:
    """`24h` as everywhere; other windows are ours."""
    match = _WINDOW.fullmatch(value) if isinstance(value, str) else None
    seconds = int(match["count"]) * _UNITS[match["unit"]] if match else 0
    low, high = SECONDS_OF_WINDOW
    if match is None or not low <= seconds <= high:
        raise InvalidField("completion_window", "completion_window must be 24h, or another time from 1m to 14d.")
    return match.string, float(seconds)


def _metadata(value: object) -> Mapping[str, str] | None:
    if value is None:
        return None
    said = cast("Mapping[str, object]", value) if isinstance(value, dict) else {"": None}
    texts = {name: text for name, text in said.items() if isinstance(text, str) and len(text) <= MAX_METADATA_VALUE}
    if len(said) > MAX_METADATA or texts.keys() != said.keys() or any(len(name) > MAX_METADATA_KEY for name in said):
        message = (
            f"metadata must have at most {MAX_METADATA} pairs of texts, "
            f"of {MAX_METADATA_KEY} and {MAX_METADATA_VALUE} characters at most."
        )
        raise InvalidField("metadata", message)
    return texts


def _limit(value: str | None, most: int, usual: int) -> int:
    if value is None:
        return usual
    number = int(value) if re.fullmatch("[0-9]{1,9}", value) else 0
    if not 1 <= number <= most:
        raise InvalidField("limit", f"limit must be a whole number from 1 to {most}.")
    return number
