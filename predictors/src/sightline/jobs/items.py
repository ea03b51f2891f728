"""An item of a batch and the one line that becomes of it, as types and as JSON. Pure.

A line of a success holds nothing that changes from one attempt to the next (no times, no counts of attempts), so that a
batch that was killed twenty times has the same bytes as one that ran through.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import orjson

MAX_ID_CHARACTERS = 512
MAX_MESSAGE_BYTES = 512

StepName = Literal["fetch", "decode", "caption", "enhance", "write"]
Code = Literal[
    "input_not_found",
    "input_changed",
    "input_too_large",
    "decode_failed",
    "unsupported_media",
    "caption_rejected",
    "caption_timeout",
    "caption_unavailable",
    "enhance_timeout",
    "enhance_unavailable",
    "content_filter",
    "batch_expired",
    "batch_cancelled",
    "internal",
]
"""Why an item failed; fixed, so that people can write programs on it."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to be done.

    custom_id  unique in its batch, at most 512 characters: the caller's own, else the key or path
    uri        where its image is (`s3://…`, `file:///…`, or `upload:<key>` of the batch's store); empty: `body` says it
    etag       of the image as it was when it was planned; another one later is the error `input_changed`
    size       bytes of the image when it was planned
    url        of an OpenAI batch line, such as `/v1/chat/completions`
    body       of an OpenAI batch line; or options of this item alone (prompt, enhance, …)
    """

    custom_id: str
    uri: str = ""
    etag: str | None = None
    size: int | None = None
    url: str = ""
    body: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        said = {
            "custom_id": self.custom_id,
            "uri": self.uri,
            "etag": self.etag,
            "size": self.size,
            "url": self.url,
            "body": dict(self.body),
        }
        return {name: value for name, value in said.items() if value not in (None, "", {})}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Item":
        """Raises KeyError, TypeError or ValueError when it is none."""
        if not isinstance(said["custom_id"], str) or not said["custom_id"]:
            raise ValueError("custom_id is empty")
        return cls(
            custom_id=said["custom_id"],
            uri=str(said.get("uri", "")),
            etag=said.get("etag"),
            size=said.get("size"),
            url=str(said.get("url", "")),
            body=cast("Mapping[str, Any]", said.get("body") or {}),
        )


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an item has no result, for good.

    http_status  of the last answer, None when there was none
    first_at     of the first and
    last_at      of the last attempt, seconds since 1970
    detail       what a server's own route says of it beside that, such as its stable code; JSON
    """

    step: StepName
    code: Code
    message: str
    http_status: int | None = None
    attempts: int = 1
    first_at: float = 0.0
    last_at: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        message = self.message.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")
        said = {
            "step": self.step,
            "code": self.code,
            "message": message,
            "http_status": self.http_status,
            "attempts": self.attempts,
            "first_at": round(self.first_at, 3),
            "last_at": round(self.last_at, 3),
        }
        return said | ({"detail": dict(self.detail)} if self.detail else {})


@dataclass(frozen=True, slots=True)
class Line:
    """What became of an item: a result or a fault.

    result        what is written of a success beside `custom_id` and `uri`: `caption`, `enhanced`, …; or, of an OpenAI
                  batch line, its `response`
    fault         of a failure
    size          bytes of the image that were read
    is_unenhanced a wanted enhancement is missing (`enhance_error` in the result): counted, and no failure
    """

    item: Item
    result: Mapping[str, Any] | None = None
    fault: Fault | None = None
    size: int = 0
    is_unenhanced: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def encoded(self) -> bytes:
        """One line of JSON with its line feed."""
        said: dict[str, Any] = {"custom_id": self.item.custom_id}
        if self.item.uri:
            said["uri"] = self.item.uri
        if self.fault is not None:
            return orjson.dumps(said | {"error": self.fault.to_json()}, option=orjson.OPT_APPEND_NEWLINE)
        return orjson.dumps(said | dict(self.result or {}), option=orjson.OPT_APPEND_NEWLINE)


@dataclass(frozen=True, slots=True)
class Counts:
    """What is done of a shard or a batch. Adds up.

    failures  items by (step, code), with the id of one of them
    """

    succeeded: int = 0
    failed: int = 0
    unenhanced: int = 0
    size_bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    failures: Mapping[tuple[str, str], tuple[int, str]] = field(default_factory=dict[tuple[str, str], tuple[int, str]])

    @property
    def done(self) -> int:
        return self.succeeded + self.failed

    def __add__(self, other: "Counts") -> "Counts":
        failures = dict(self.failures)
        for key, (count, sample) in other.failures.items():
            mine = failures.get(key)
            failures[key] = (count, sample) if mine is None else (count + mine[0], mine[1])
        return Counts(
            self.succeeded + other.succeeded,
            self.failed + other.failed,
            self.unenhanced + other.unenhanced,
            self.size_bytes + other.size_bytes,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            failures,
        )

    @classmethod
    def of(cls, line: Line) -> "Counts":
        if line.fault is not None:
            return cls(
                failed=1,
                size_bytes=line.size,
                failures={(line.fault.step, line.fault.code): (1, line.item.custom_id)},
            )
        return cls(
            succeeded=1,
            unenhanced=int(line.is_unenhanced),
            size_bytes=line.size,
            prompt_tokens=line.prompt_tokens,
            completion_tokens=line.completion_tokens,
        )

    @classmethod
    def of_row(cls, row: Mapping[str, Any], size: int = 0) -> "Counts":
        """Of a line as it was read back: what is counted of a chunk that somebody else, or an earlier process, wrote.

        size   bytes of the image, which no line tells; the plan may
        Tokens are counted where the row has `usage` {prompt_tokens, completion_tokens}, of its own or in its response.
        """
        fault = row.get("error")
        if fault:
            key = (str(fault["step"]), str(fault["code"]))
            return cls(failed=1, size_bytes=size, failures={key: (1, str(row["custom_id"]))})
        usage = row.get("usage") or ((row.get("response") or {}).get("body") or {}).get("usage") or {}
        return cls(
            succeeded=1,
            unenhanced=int(bool(row.get("enhance_error"))),
            size_bytes=size,
            prompt_tokens=int(usage.get("prompt_tokens") or 0),
            completion_tokens=int(usage.get("completion_tokens") or 0),
        )

    def to_json(self) -> dict[str, Any]:
        """As the operator reads it (its `contract.Progress`), but for the total."""
        rows = sorted(self.failures.items(), key=lambda row: (-row[1][0], row[0]))
        return {
            "succeeded": self.succeeded,
            "failed": self.failed,
            "unenhanced": self.unenhanced,
            "bytes": self.size_bytes,
            "usage": {"promptTokens": self.prompt_tokens, "completionTokens": self.completion_tokens},
            "failures": [
                {"step": step, "code": code, "count": count, "sampleCustomId": sample}
                for (step, code), (count, sample) in rows
            ],
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Counts":
        usage = said.get("usage") or {}
        return cls(
            int(said["succeeded"]),
            int(said["failed"]),
            int(said.get("unenhanced", 0)),
            int(said.get("bytes", 0)),
            int(usage.get("promptTokens", 0)),
            int(usage.get("completionTokens", 0)),
            {
                (row["step"], row["code"]): (int(row["count"]), str(row.get("sampleCustomId", "")))
                for row in said.get("failures", ())
            },
        )


_ID = re.compile(rf"[^\x00-\x1f\x7f]{{1,{MAX_ID_CHARACTERS}}}")


def is_custom_id(text: str) -> bool:
    """Whether a text may name an item: 1 to 512 characters, none of them a control character."""
    return _ID.fullmatch(text) is not None
