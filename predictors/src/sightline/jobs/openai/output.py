"""A batch's lines as OpenAI's clients read them: `{"id", "custom_id", "response", "error"}`. Pure.

What the store holds of an item is a `Line`: its `response` or its `error`. What was answered with a status other than
200 has both here: `response` as OpenAI tells it, and `error` with the fixed code that says which step failed.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import orjson


def output_line(batch_id: str, line: bytes) -> bytes:
    """One line of a store as one line of an output or error file, with its line feed.

    The line's `id` is always the same for the same request of the same batch.
    """
    said = cast("Mapping[str, Any]", orjson.loads(line))
    custom_id = str(said["custom_id"])
    fault = cast("Mapping[str, Any] | None", said.get("error"))
    told: dict[str, Any] = {
        "id": request_id(batch_id, custom_id),
        "custom_id": custom_id,
        "response": said.get("response") if fault is None else _refused(fault, said.get("response")),
        "error": None if fault is None else dict(fault),
    }
    return orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE)


def request_id(batch_id: str, custom_id: str) -> str:
    digest = hashlib.sha256(f"{batch_id}\n{custom_id}".encode()).hexdigest()
    return f"batch_req_{digest[:32]}"


def _refused(fault: Mapping[str, Any], response: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The last answer to a request that failed; None when there was none."""
    if response is not None:
        return dict(response)
    status = fault.get("http_status")
    if status is None:
        return None
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": fault.get("message", ""), "type": kind, "param": None, "code": fault.get("code")}
    return {"status_code": status, "request_id": "", "body": {"error": error}}
