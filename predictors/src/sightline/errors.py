"""What can go wrong: one small family of errors, each with a status, a stable code and whether a retry helps.

    SightlineError
    ├── BadRequest 400 ........ the request cannot be understood
    │   ├── InvalidImage ...... the bytes are no image that we take
    │   └── SourceRefused ..... the place the image should come from is not allowed or has no image
    ├── InvalidApiKey 403
    ├── NotFound 404
    ├── PayloadTooLarge 413 ... bytes, pixels, parts
    ├── InvalidParameter 422 .. understood, but a value is out of range
    ├── QueueFull 429 ......... come back after `retry_after` seconds
    ├── ClientGone 499 ........ nobody is waiting for the answer
    ├── InternalError 500 ..... our bug; the log has the cause
    ├── NotSupported 501 ...... the protocol has it, we do not
    ├── UpstreamFailed 502 .... a model or store that we call answered nonsense
    ├── Unavailable 503 ....... loading, draining, or a part we need is down
    ├── DeadlineExceeded 504
    └── OutOfMemory 507 ....... this image does not fit the device

Raised where the fault is known, with the cause chained (`raise … from`), and rendered once per protocol by the
server. The client sees `message` and `code`, never the text of a library.
"""

from typing import ClassVar


class SightlineError(Exception):
    """Base of all faults that a client may see.

    message      one sentence for the client; holds no library text and no secrets
    code         stable, machine-readable; the class has a default, a raise may be more precise
    retry_after  seconds after which the same request may succeed, or None
    """

    status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal_error"
    is_retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, code: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.retry_after = retry_after


class BadRequest(SightlineError):
    status = 400
    default_code = "invalid_request"


class InvalidImage(BadRequest):
    default_code = "invalid_image"


class SourceRefused(BadRequest):
    default_code = "source_refused"


class InvalidApiKey(SightlineError):
    status = 403
    default_code = "invalid_api_key"


class NotFound(SightlineError):
    status = 404
    default_code = "not_found"


class PayloadTooLarge(SightlineError):
    status = 413
    default_code = "payload_too_large"


class InvalidParameter(SightlineError):
    status = 422
    default_code = "invalid_parameter"


class QueueFull(SightlineError):
    status = 429
    default_code = "queue_full"
    is_retryable = True


class ClientGone(SightlineError):
    status = 499
    default_code = "client_gone"


class InternalError(SightlineError):
    status = 500
    default_code = "internal_error"


class NotSupported(SightlineError):
    status = 501
    default_code = "not_supported"


class UpstreamFailed(SightlineError):
    status = 502
    default_code = "upstream_failed"
    is_retryable = True


class Unavailable(SightlineError):
    status = 503
    default_code = "unavailable"
    is_retryable = True


class DeadlineExceeded(SightlineError):
    status = 504
    default_code = "deadline_exceeded"
    is_retryable = True


class OutOfMemory(SightlineError):
    status = 507
    default_code = "out_of_memory"
