"""Errors as each protocol says them, and foreign errors as ours.

{"detail": …, "code", "request_id"}               the services' own routes, FastAPI's shape
{"error": …, "code", "request_id"}                /v2/…, /v1/models/<m>:predict
{"error": {"message", "type", "param", "code"}, "request_id"}     /v1/… and /openai/v1/…, OpenAI's shape
"""

import re

from kserve import errors as kserve_errors
from starlette.exceptions import HTTPException

from sightline.errors import (
    BadRequest,
    InternalError,
    InvalidApiKey,
    InvalidParameter,
    NotFound,
    NotSupported,
    QueueFull,
    SightlineError,
    Unavailable,
)
from sightline.jobs.objects import StoreFault

_KSERVE_ROUTES = re.compile(r"/v2(/|$)|/v1/models/[^/]+:")
_OPENAI_ROUTES = re.compile(r"(/openai)?/v1(/|$)")


def error_status(path: str, error: SightlineError) -> int:
    """The error's own status; OpenAI's routes know no 422 and say 400."""
    return BadRequest.status if error.status == InvalidParameter.status and is_openai(path) else error.status


def error_body(path: str, error: SightlineError, request_id: str) -> dict[str, object]:
    """The error in the shape of the route; always with its code and the request's id."""
    if is_openai(path):
        return {"error": openai_error(error), "request_id": request_id}
    key = "error" if is_kserve(path) else "detail"
    return {key: error.message, "code": error.code, "request_id": request_id}


def is_openai(path: str) -> bool:
    """Whether a route answers errors in OpenAI's shape."""
    return _OPENAI_ROUTES.match(path) is not None and not is_kserve(path)


def is_kserve(path: str) -> bool:
    """Whether a route answers errors in KServe's shape."""
    return _KSERVE_ROUTES.match(path) is not None


def openai_error(error: SightlineError) -> dict[str, object]:
    """OpenAI's error object. `param` names the faulty field of the body where the error knows it."""
    return {
        "message": error.message,
        "type": _openai_type(error.status),
        "param": getattr(error, "param", None),
        "code": error.code,
    }


def _openai_type(status: int) -> str:
    if status == InvalidApiKey.status:
        return "authentication_error"
    if status == QueueFull.status:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_headers(error: SightlineError) -> dict[str, str]:
    """Retry-After, in whole seconds, where waiting helps."""
    if error.retry_after is None:
        return {}
    return {"Retry-After": str(max(1, round(error.retry_after)))}


def translate(error: Exception) -> SightlineError | None:
    """An error of ours for one of KServe's or Starlette's; None when it is unknown, that is, a bug."""
    if isinstance(error, SightlineError):
        return error
    if isinstance(error, HTTPException):
        return _from_http(error.status_code)
    if isinstance(error, kserve_errors.ModelNotFound):
        return NotFound("No such model.", code="model_not_found")
    if isinstance(error, kserve_errors.ModelNotReady | kserve_errors.ServerNotReady):
        return Unavailable("The model is still loading.", code="model_not_ready", retry_after=5)
    if isinstance(error, kserve_errors.InvalidInput):
        return BadRequest("The request cannot be read.")
    if isinstance(error, StoreFault):
        return Unavailable("The object store does not answer as it should.", code="store_unavailable", retry_after=5)
    if isinstance(error, NotImplementedError | kserve_errors.UnsupportedProtocol):
        return NotSupported("This operation is not supported.")
    return None


def _from_http(status: int) -> SightlineError:
    if status == 404:
        return NotFound("No such route.", code="route_not_found")
    if status == 405:
        return MethodNotAllowed("This route has no such method.")
    if status == 422:
        return InvalidParameter("The request has an invalid parameter.")
    if 400 <= status < 500:
        return BadRequest("The request cannot be read.")
    return InternalError("Something went wrong on the server.")


class MethodNotAllowed(SightlineError):
    status = 405
    default_code = "method_not_allowed"
