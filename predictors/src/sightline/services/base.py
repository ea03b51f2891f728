"""What a service is: three verbs on wire types, its bodies in V1 and V2, and its own routes.

The server (the only importer of kserve) wraps a `Service` into a KServe `Model`; the service never sees KServe.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, TypeVar, cast, get_args, runtime_checkable

import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel

from sightline import v2
from sightline.engines.health import MemoryHealth
from sightline.errors import BadRequest, InvalidParameter, OutOfMemory, SightlineError
from sightline.sources import parse_source
from sightline.wire import (
    MAX_IMAGES_PER_CALL,
    MAX_PROMPT_CHARACTERS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_SEQUENCES,
    MAX_TOKENS_CEILING,
    PRESETS,
    Completion,
    Context,
    ImageS3,
    ImageSource,
    ModelInfo,
    ReasoningLevel,
    Sampling,
    Turn,
)

Req = TypeVar("Req")
Prepared = TypeVar("Prepared")
Res = TypeVar("Res")
T = TypeVar("T")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """The way of a service's own routes through its served model, with the queue and the counts of every protocol.

    items   requests in, results out, same length and order, through the three verbs
    stream  one request in, its pieces and then the whole out, as `ChatService.stream` gives them
    """

    items: Callable[[Sequence[Any], Context], Awaitable[Sequence[Any]]]
    stream: Callable[[Any, Context], AsyncGenerator[Any]]

    async def __call__(self, requests: Sequence[Any], context: Context) -> Sequence[Any]:
        return await self.items(requests, context)


class Service(Protocol[Req, Prepared, Res]):
    """One of the five services, or the gateway.

    name      the model name in the KServe routes
    inputs    its V2 inputs
    outputs   its V2 outputs
    """

    name: str
    inputs: tuple[v2.TensorSpec, ...]
    outputs: tuple[v2.TensorSpec, ...]

    async def load(self) -> None:
        """Make ready to serve; may take minutes; runs while the server already answers health checks.

        Raises anything when the model cannot be served; the process then exits with code 1.
        """
        ...

    async def close(self) -> None:
        """Release what `load` took. Called once, after the last request has been answered."""
        ...

    async def preprocess(self, requests: Sequence[Req], context: Context) -> Prepared:
        """Fetch and decode everything; raises 4xx errors before the model sees anything."""
        ...

    async def predict(self, prepared: Prepared, context: Context) -> Sequence[Res]:
        """One result for each request, in order."""
        ...

    def from_v1(self, body: Mapping[str, object]) -> Sequence[Req]: ...
    def to_v1(self, results: Sequence[Res]) -> Json: ...
    def from_v2(self, request: v2.InferRequest) -> Sequence[Req]: ...
    def to_v2(self, results: Sequence[Res]) -> v2.InferResponse: ...

    def metadata(self) -> dict[str, v2.Scalar]:
        """What V2 metadata says beside the tensors, once loaded: model, model_revision, demo_model, device."""
        ...

    def router(self, run: Run) -> APIRouter:
        """The service's own routes; each hands its requests to `run`."""
        ...


@runtime_checkable
class OwnsMemory(Protocol):
    """What a service has whose model lives on a device of this process."""

    @property
    def health(self) -> MemoryHealth | None:
        """Whether its device had the memory for what it was asked lately; None where the model is elsewhere."""
        ...

    async def try_again(self) -> None:
        """Answer something small, so that a device that has memory again is found out. Raises what answering raises."""
        ...


class ChatService(Protocol[Req]):
    """What a service that OpenAI's chat clients can talk to has beside a `Service`'s verbs."""

    def from_chat(self, turns: Sequence[Turn], options: Mapping[str, object]) -> Req:
        """A conversation as a request of this service.

        options   max_tokens, temperature, top_p, seed, and what else the body holds beside the messages
        Raises BadRequest (400) or InvalidParameter (422), as when the model takes no image, or needs one.
        """
        ...

    def stream(self, request: Req, context: Context) -> AsyncGenerator[str | Completion]:
        """Pieces of text as they are made, then the whole Completion. Closing it ends the generation."""
        ...


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order. The first failure cancels the rest and is raised alone, with its index when of several."""
    items = list(work)
    if len(items) == 1:
        return [await items[0]]
    tasks: list[asyncio.Task[T]] = []
    try:
        async with asyncio.TaskGroup() as group:
            tasks.extend(group.create_task(item) for item in items)
    except BaseExceptionGroup as failures:
        for index, task in enumerate(tasks):
            failure = None if task.cancelled() else task.exception()
            if isinstance(failure, SightlineError):
                raise type(failure)(
                    f"Item {index}: {failure.message}", code=failure.code, retry_after=failure.retry_after
                ) from failure
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def settled(outcomes: list[T]) -> list[T]:
    """What became of the items of a call, where one that did not fit the device is an OutOfMemory among the others.

    Raises it (507) when no item fits.
    """
    if all(isinstance(outcome, OutOfMemory) for outcome in outcomes):
        raise cast("OutOfMemory", outcomes[0])
    return outcomes


def item_error(fault: SightlineError) -> Json:
    """The answer to one item that failed among others that did not."""
    return {"error": fault.message, "code": fault.code, "http_status": fault.status}


def item_errors(outcomes: Sequence[object]) -> dict[str, v2.Scalar]:
    """The V2 parameter for the same: a JSON list with null for each item that went well; nothing when all did."""
    errors = [item_error(item) if isinstance(item, SightlineError) else None for item in outcomes]
    return {"item_errors": orjson.dumps(errors).decode()} if any(errors) else {}


def context_of(request: Request) -> Context:
    """The context that the server's outermost layer gave to this request."""
    return cast("Context", request.state.context)


class Health(BaseModel):
    """Contracts B8 and E1."""

    status: Literal["healthy"] = "healthy"


async def health() -> Health:
    """`GET /health` of a model (contracts B8, E1): alive, whatever the model is doing."""
    return Health()


def demo_fields(model: ModelInfo) -> Json:
    """The two fields that every answer of a demonstration model carries; nothing for a real one."""
    return {"demo_model": True, "model": model.name} if model.demo else {}


def sampling_of(options: Mapping[str, object], defaults: Sampling) -> Sampling:
    """Read max_tokens, temperature, top_p, seed and stop; absent or null means the default.

    Raises InvalidParameter (422) on a wrong type or range (contract B5, B6).
    """
    sampling = defaults
    tokens = options.get("max_tokens")
    if tokens is None:
        tokens = options.get("max_new_tokens")
    if tokens is not None:
        sampling = replace(
            sampling,
            max_tokens=int(_number("max_tokens", tokens, 1, MAX_TOKENS_CEILING, whole=True)),
        )
    if (temperature := options.get("temperature")) is not None:
        sampling = replace(sampling, temperature=float(_number("temperature", temperature, 0, 2)))
    if (top_p := options.get("top_p")) is not None:
        value = float(_number("top_p", top_p, 0, 1))
        if value == 0:
            raise InvalidParameter("top_p must be greater than 0 and at most 1.")
        sampling = replace(sampling, top_p=value)
    if (seed := options.get("seed")) is not None:
        sampling = replace(sampling, seed=int(_number("seed", seed, 0, 2**63 - 1, whole=True)))
    if (stop := options.get("stop")) is not None:
        sampling = replace(sampling, stop=_stop_sequences(stop))
    return sampling


def _stop_sequences(value: object) -> tuple[str, ...]:
    stops = cast("list[object]", value) if isinstance(value, list) else [value]
    is_good = len(stops) <= MAX_STOP_SEQUENCES and all(
        isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops
    )
    if not is_good:
        raise InvalidParameter(
            f"stop must be text, or up to {MAX_STOP_SEQUENCES} texts, of 1 to {MAX_STOP_CHARACTERS} characters."
        )
    return tuple(cast("list[str]", stops))


def _number(name: str, value: object, low: float, high: float, *, whole: bool = False) -> float:
    fault = InvalidParameter(f"{name} must be {'a whole number' if whole else 'a number'} from {low:g} to {high:g}.")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fault
    if not low <= value <= high or (whole and value != int(value)):  # no range holds NaN
        raise fault
    return value


def flag_of(options: Mapping[str, object], name: str) -> bool | None:
    """A boolean option; None when absent or null. Raises InvalidParameter (422) on another type."""
    value = options.get(name)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in {
        "true",
        "1",
        "yes",
        "on",
        "false",
        "0",
        "no",
        "off",
    }:
        return value.lower() in {"true", "1", "yes", "on"}  # form fields are text
    raise InvalidParameter(f"{name} must be true or false.")


def level_of(value: object) -> ReasoningLevel | None:
    """A reasoning level; None when absent. Raises InvalidParameter (422) on an unknown one."""
    if value is None:
        return None
    if not isinstance(value, str) or value not in get_args(ReasoningLevel):
        raise InvalidParameter("reasoning_level must be low, medium or high.")
    return cast("ReasoningLevel", value)


def prompt_of(value: object, name: str = "prompt") -> str | None:
    """A text option; None when absent, null or blank. Raises InvalidParameter (422) when too long."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidParameter(f"{name} must be text.")
    if len(value) > MAX_PROMPT_CHARACTERS:
        raise InvalidParameter(f"{name} must have at most {MAX_PROMPT_CHARACTERS} characters.")
    return value if value.strip() else None


def preset_of(value: object) -> str | None:
    """The name of a prompt of ours; None when absent or blank. Raises InvalidParameter (422) on an unknown one."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or value not in PRESETS:
        raise InvalidParameter(f"preset must be one of {', '.join(PRESETS)}.")
    return value


def instances_of(body: Mapping[str, object]) -> Sequence[object]:
    """The `instances` of a V1 body. Raises BadRequest (400)."""
    instances = body.get("instances")
    if not isinstance(instances, list) or not instances:
        raise BadRequest("'instances' must be a list with at least one entry.")
    entries = cast("Sequence[object]", instances)
    if len(entries) > MAX_IMAGES_PER_CALL:
        raise BadRequest(f"At most {MAX_IMAGES_PER_CALL} instances a call.", code="too_many_items")
    return entries


def image_of(instance: object) -> tuple[ImageSource, Mapping[str, object]]:
    """The image of one V1 instance and its other fields.

    An instance is text (base64, data URI, URL, s3://), `{"b64": …}`, or an object whose `image`, `image_url`,
    `s3_uri` or `image_bytes` is one of these. Raises BadRequest (400).
    """
    if isinstance(instance, str):
        return parse_source(instance), {}
    if isinstance(instance, dict):
        fields = cast("Mapping[str, object]", instance)
        for key in ("image", "image_url", "s3_uri", "image_bytes", "b64"):
            value = fields.get(key)
            if isinstance(value, dict):
                value = cast("Mapping[str, object]", value).get("b64")
            if isinstance(value, str) and value:
                return s3_source(value) if key == "s3_uri" else parse_source(value), fields
    raise BadRequest(
        "An instance needs an image: base64, a data URI, an allowed URL or s3://.",
        code="image_missing",
    )


def s3_source(value: str) -> ImageS3:
    """The image of a field `s3_uri`, which takes nothing else. Raises BadRequest (400, s3_uri_invalid)."""
    if not value.startswith("s3://"):
        raise BadRequest("s3_uri must start with s3://", code="s3_uri_invalid")
    return ImageS3(value)


def images_of(request: v2.InferRequest) -> tuple[ImageSource, ...]:
    """The elements of the V2 input `image`. Raises BadRequest (400)."""
    tensor = request.input("image")
    if tensor is None:
        raise BadRequest("The input 'image' is missing.", code="image_missing")
    elements = tensor.elements()
    if not 1 <= len(elements) <= MAX_IMAGES_PER_CALL:
        raise BadRequest(f"'image' must hold 1 to {MAX_IMAGES_PER_CALL} elements.", code="too_many_items")
    return tuple(parse_source(element) for element in elements)


def spread(texts: Sequence[str] | None, count: int, name: str) -> Sequence[str | None]:
    """`count` entries from a V2 text input of one element, of `count` elements, or absent."""
    if texts is None:
        return [None] * count
    if len(texts) == 1:
        return [texts[0]] * count
    if len(texts) != count:
        raise BadRequest(f"'{name}' must hold one element, or one for each image.", code="invalid_tensor")
    return texts


def reject_unknown_inputs(request: v2.InferRequest, specs: Sequence[v2.TensorSpec]) -> None:
    """Raises BadRequest (400) when the request has an input that the model does not."""
    known = {spec.name for spec in specs}
    if any(tensor.name not in known for tensor in request.inputs):
        raise BadRequest(f"The inputs of this model are: {', '.join(sorted(known))}.", code="unknown_input")
