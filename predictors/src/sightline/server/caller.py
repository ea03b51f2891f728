"""What a caller says around its request, in HTTP headers and gRPC metadata alike: id, key, deadline, trace, rank."""

import re
import uuid
from collections.abc import Mapping
from typing import Protocol

from sightline.errors import BadRequest, InvalidApiKey, InvalidParameter
from sightline.wire import BATCH_PRIORITY, PRIORITY_HEADER, REQUEST_ID_HEADER, TIMEOUT_HEADER, Context, Deadline

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(
    r"(?!ff)(?P<version>[0-9a-f]{2})-(?!0{32})(?P<trace>[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?P<more>-.{1,200})?"
)
_TRACESTATE = re.compile(r"[\x20-\x7e]{1,512}")


class Principals(Protocol):
    """What tells whose a key is: `Keys`."""

    def principal(self, presented: str | None) -> str | None: ...


def request_id(headers: Mapping[str, str]) -> str:
    """The caller's own id where it is fit for logs and headers, else a new one."""
    given = headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def context_of(
    headers: Mapping[str, str],
    request_id: str,
    keys: Principals,
    longest_seconds: float,
    *,
    is_open: bool,
    usual_seconds: float | None = None,
    address: str = "",
) -> Context:
    """Who calls, until when, as part of which trace, and whether anybody waits for it.

    headers          by their names in lower case
    longest_seconds  of the deadline; the caller may ask for less
    usual_seconds    of the deadline when it asks for none; None: the longest
    is_open          whether the place called answers those without a key, as for probes
    address          of the peer, without its port

    Raises InvalidApiKey (403), BadRequest (400), InvalidParameter (422).
    """
    principal = keys.principal(presented_key(headers))
    if principal is None:
        if not is_open:
            raise InvalidApiKey("Invalid API key")
        principal = ""
    traceparent = headers.get("traceparent", "")
    tracestate = headers.get("tracestate", "")
    is_traced = trace_id(traceparent) is not None
    return Context(
        request_id=request_id,
        deadline=Deadline.after(_seconds(headers, longest_seconds, usual_seconds or longest_seconds)),
        principal=principal,
        traceparent=traceparent if is_traced else None,
        tracestate=tracestate if is_traced and _TRACESTATE.fullmatch(tracestate) else None,
        is_batch=headers.get(PRIORITY_HEADER, "").strip().lower() == BATCH_PRIORITY,
        address=address,
    )


def presented_key(headers: Mapping[str, str]) -> str | None:
    """`X-API-Key`, else the token of `Authorization: Bearer`."""
    key = headers.get("x-api-key")
    if key is None:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        key = value.strip() if scheme.lower() == "bearer" else None
    return key


def trace_id(traceparent: str | None) -> str | None:
    """The trace's id for the log; None when there is no trace. Source: W3C Trace Context, section 3.2."""
    match = _TRACEPARENT.fullmatch(traceparent or "")
    if match is None or (match["version"] == "00" and match["more"]):
        return None
    return match["trace"]


def _seconds(headers: Mapping[str, str], longest: float, usual: float) -> float:
    value = headers.get(TIMEOUT_HEADER)
    if value is None:
        return usual
    try:
        milliseconds = float(value)
    except ValueError as error:
        raise BadRequest("X-Request-Timeout-Ms must be a number.") from error
    if not milliseconds > 0:
        raise InvalidParameter("X-Request-Timeout-Ms must be greater than 0.")
    return min(milliseconds / 1000, longest)
