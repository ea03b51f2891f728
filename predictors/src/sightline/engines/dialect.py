"""What a step's protocol must be able to say and to read: one request out, one completion or fault in. No I/O."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InternalError,
    InvalidParameter,
    NotSupported,
    OutOfMemory,
    PayloadTooLarge,
    SightlineError,
    UpstreamFailed,
)
from sightline.wire import Completion, ImageBytes, ReasoningLevel, Sampling, Turn

StepName = Literal["caption", "enhance", "remote"]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A POST: where to, what, and the headers that only this protocol has."""

    url: str
    body: bytes = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Spoken:
    """What the body of an error says. `code` is there only when the model itself spoke about this request.

    sentence  may be shown to a client; None when the words are a stranger's
    """

    code: str | None = None
    sentence: str | None = None


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """What a step says about itself; None where it does not."""

    model: str | None = None
    revision: str | None = None
    demo: bool = False
    device: str | None = None
    backend: str | None = None
    dtype: str | None = None
    reasoning_level: str | None = None


class Assembly(Protocol):
    """A streamed answer as it grows."""

    def feed(self, event: bytes) -> str:
        """Take one event in; returns the text that may be shown now. Raises ValueError, TypeError on nonsense."""
        ...

    def completion(self, milliseconds: float) -> Completion:
        """The whole answer, once the stream has ended. Raises like `Dialect.completion`."""
        ...


class Dialect(Protocol):
    """One protocol, spoken to one model."""

    is_streaming: bool

    def describing(self, image: ImageBytes, prompt: str | None, sampling: Sampling, request_id: str) -> Outgoing: ...

    def enhancing(self, caption: str, level: ReasoningLevel, sampling: Sampling, request_id: str) -> Outgoing: ...

    def chatting(self, turns: Sequence[Turn], sampling: Sampling, level: ReasoningLevel | None) -> Outgoing:
        """A conversation whose images are ImageBytes. Raises NotSupported where the protocol has none."""
        ...

    def streamed(self, outgoing: Outgoing) -> Outgoing:
        """The same request, to be answered in pieces. Only where `is_streaming`."""
        ...

    def assembly(self) -> Assembly:
        """For the pieces of one streamed answer. Only where `is_streaming`."""
        ...

    def completion(self, content: bytes, headers: Mapping[str, str], milliseconds: float) -> Completion:
        """Read an answer.

        Raises BadRequest, TypeError or ValueError when it is none, InvalidParameter when the model gave none to this.
        """
        ...

    def spoken(self, status: int, content: bytes) -> Spoken: ...

    def fault(self, status: int, spoken: Spoken, step: StepName) -> SightlineError | None:
        """What a refusal means that the model itself gave to this request; None when it was not the model's."""
        ...

    def learns(self, status: int, content: bytes) -> bool:
        """Whether a refusal told something about this server, so that the request, written anew, may be taken."""
        ...

    def key(self, api_key: str) -> Mapping[str, str]: ...

    def ready_url(self) -> str: ...

    def is_ready(self, status: int, answer: object) -> bool: ...

    def metadata_url(self) -> str: ...

    def metadata(self, answer: Mapping[str, object]) -> StepMetadata: ...


BY_STATUS: Mapping[int, type[SightlineError]] = {
    kind.status: kind
    for kind in (
        BadRequest,
        PayloadTooLarge,
        InvalidParameter,
        InternalError,
        NotSupported,
        UpstreamFailed,
        DeadlineExceeded,
        OutOfMemory,
    )
}


def refused(step: StepName) -> str:
    """The sentence for a refusal whose own words are not for the client."""
    return f"The {step} step refused the request."


def as_code(value: object) -> str | None:
    """A stable code as we write them; None for anything else."""
    return value if isinstance(value, str) and _CODE.fullmatch(value) else None


_CODE = re.compile(r"[a-z0-9_]{1,64}")


def count(value: object) -> int:
    """A number of tokens; absent is 0. Raises ValueError."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("not a number of tokens")
    return value


def as_object(value: object) -> Mapping[str, object] | None:
    """A JSON object, or None."""
    return cast("Mapping[str, object]", value) if isinstance(value, dict) else None


def as_text(value: object) -> str | None:
    """A JSON string, or None."""
    return value if isinstance(value, str) else None
