"""The lines of an OpenAI batch file: what is wrong with them, and the items that they are. Pure.

A line is `{"custom_id": …, "method": "POST", "url": …, "body": {…}}`. A file is read once, when it is uploaded; whoever
makes a batch of it later is told from what was found then.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from sightline.jobs.items import Item, is_custom_id

ENDPOINTS = ("/v1/chat/completions",)
"""What a line may ask for: any model that chats."""

MAX_FAULTS = 50
"""A file that is wrong in more places is described well enough by these."""
MAX_MODELS = 8


@dataclass(frozen=True, slots=True)
class LineFault:
    """What is wrong with a file. `line` counts from 1; None: the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "LineFault":
        return cls(str(said["code"]), str(said["message"]), said.get("line"), said.get("param"))


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found in a file.

    requests   lines that are not blank
    endpoints  and
    models     that they name
    faults     at most MAX_FAULTS; a file with any is no batch
    """

    requests: int
    endpoints: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    faults: tuple[LineFault, ...] = ()


@dataclass(slots=True)
class _Findings:
    faults: list[LineFault] = field(default_factory=list[LineFault])
    endpoints: set[str] = field(default_factory=set[str])
    models: set[str] = field(default_factory=set[str])
    seen: set[bytes] = field(default_factory=set[bytes])
    """Digests of the ids: 50,000 ids of 512 characters would be 25 MB, these are 5."""
    requests: int = 0


def check(lines: Iterable[bytes], *, max_requests: int, max_line_bytes: int) -> Checked:
    """Read a whole file. It may be of any size: memory is bounded by its number of lines.

    lines   with or without their line feeds; one that is longer than `max_line_bytes` ends the reading
    """
    found = _Findings()
    for number, line in enumerate(lines, 1):
        if len(line) > max_line_bytes:
            found.faults.append(LineFault("line_too_long", f"A line may have at most {max_line_bytes} bytes.", number))
            break
        if not line.strip():
            continue
        found.requests += 1
        if found.requests > max_requests:
            found.faults.append(
                LineFault("too_many_requests", f"A file may have at most {max_requests} requests.", number)
            )
            break
        if (fault := _check_line(line, number, found)) is not None:
            found.faults.append(fault)
            if len(found.faults) == MAX_FAULTS:
                break
    if not found.requests and not found.faults:
        found.faults.append(LineFault("empty_file", "The file has no requests."))
    return Checked(found.requests, tuple(sorted(found.endpoints)), tuple(sorted(found.models)), tuple(found.faults))


def _check_line(line: bytes, number: int, found: _Findings) -> LineFault | None:
    try:
        said: object = orjson.loads(line)
    except orjson.JSONDecodeError:
        return LineFault("invalid_json_line", "This line is not valid JSON.", number)
    if not isinstance(said, dict):
        return LineFault("invalid_json_line", "A line must be a JSON object.", number)
    request = cast("Mapping[str, object]", said)
    custom_id, url, body = request.get("custom_id"), request.get("url"), request.get("body")
    if not isinstance(custom_id, str) or not is_custom_id(custom_id):
        message = "custom_id must be text of 1 to 512 characters without control characters."
        return LineFault("invalid_custom_id", message, number, "custom_id")
    digest = hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
    if digest in found.seen:
        return LineFault("duplicate_custom_id", "Another line has the same custom_id.", number, "custom_id")
    found.seen.add(digest)
    if request.get("method") != "POST":
        return LineFault("invalid_method", "method must be POST.", number, "method")
    if not isinstance(url, str) or url not in ENDPOINTS:
        return LineFault("invalid_url", f"url must be {' or '.join(ENDPOINTS)}.", number, "url")
    found.endpoints.add(url)
    return _check_body(body, number, found)


def _check_body(body: object, number: int, found: _Findings) -> LineFault | None:
    if not isinstance(body, dict):
        return LineFault("invalid_body", "body must be a JSON object.", number, "body")
    fields = cast("Mapping[str, object]", body)
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        return LineFault("model_missing", "body.model must name one of the served models.", number, "body.model")
    found.models.add(model)
    if len(found.models) > MAX_MODELS:
        found.models.discard(model)
        return LineFault("too_many_models", f"A file may name at most {MAX_MODELS} models.", number, "body.model")
    if fields.get("stream"):
        return LineFault("invalid_body", "A request of a batch cannot be streamed.", number, "body.stream")
    return None


def item(line: bytes) -> Item:
    """One line of a file that has no faults. Raises ValueError, TypeError or KeyError when it has."""
    said = cast("Mapping[str, Any]", orjson.loads(line))
    return Item(custom_id=said["custom_id"], url=said["url"], body=said["body"])
