"""Errors as each protocol says them, and foreign errors as ours."""

import re

from kserve import errors as kserve_errors
from starlette.exceptions import HTTPException

from sightline.errors import (
    BadRequest,
    InternalError,
    InvalidParameter,
    NotFound,
    NotSupported,
    SightlineError,
    Unavailable,
)

_KSERVE_ROUTES = re.compile(r"/v[12](/|$)")


def error_body(path: str, error: SightlineError, request_id: str) -> dict[str, object]:
    """`{"error": …}` on the V1 and V2 routes, FastAPI's `{"detail": …}` elsewhere; always a code and the id."""
    key = "error" if _KSERVE_ROUTES.match(path) else "detail"
    return {key: error.message, "code": error.code, "request_id": request_id}


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
