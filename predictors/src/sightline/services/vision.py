"""What describe and generate share: a conversation with images becomes a prompt and is answered.

An image that does not fit the device is looked at once more at half its pixels; when that does not fit either, its item
fails with 507 and the others of the call are answered.
"""

import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, cast

from sightline.engines.base import Generated, GenerativeModel
from sightline.engines.health import MemoryHealth
from sightline.errors import BadRequest, InvalidParameter, OutOfMemory
from sightline.images import Decoder
from sightline.services.base import s3_source, settled, together
from sightline.services.generation import Generation, Outcome, completion, within
from sightline.settings import VisionSettings
from sightline.sources import Sources, parse_source
from sightline.v2 import Scalar
from sightline.wire import (
    MAX_IMAGES_PER_PROMPT,
    ChatRequest,
    Completion,
    Context,
    ImageBytes,
    ImageSource,
    ModelInfo,
    Turn,
)

if TYPE_CHECKING:
    from sightline.models.pixels import Patches, Pixels

log = logging.getLogger("sightline.services")

Message = tuple[Literal["system", "user", "assistant"], Sequence["str | Patches"]]


class VisionModel(GenerativeModel[Any], Protocol):
    """A model that reads images and text, such as `models.qwen_vl.QwenVL`."""

    @property
    def pixels(self) -> "Pixels": ...
    def preprocess_chat(self, messages: Sequence[Message]) -> Any: ...  # noqa: ANN401
    def postprocess(self, generated: Generated) -> str: ...


Model = TypeVar("Model", bound=VisionModel)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Requests with their prompts, which belong to the model. `started` is `time.monotonic()` at their arrival."""

    items: tuple[tuple[ChatRequest, Any], ...]
    started: float


class Conversations(Generic[Model]):
    """A model that reads images, and all between a request and its answer.

    load       builds the model, on the engine's thread
    max_width  of images whose request says nothing; the height is bounded by twice the width
    """

    def __init__(self, load: Callable[[], Model], settings: VisionSettings, *, max_width: int) -> None:
        self._generation = Generation(
            load, max_batch=settings.max_batch, threads=settings.decode_threads, settings=settings
        )
        self._sources = Sources(settings)
        self._decoder = Decoder.from_settings(settings)
        self._max_width = max_width

    @property
    def model(self) -> Model:
        """The loaded model. Raises Unavailable (503) before it is there."""
        return self._generation.model

    @property
    def health(self) -> MemoryHealth | None:
        return self._generation.health

    async def try_again(self) -> None:
        """See `Generation.try_again`."""
        await self._generation.try_again()

    @property
    def info(self) -> ModelInfo:
        """Which model answers. Raises Unavailable (503) before it is there."""
        return self.model.info

    def metadata(self) -> dict[str, Scalar]:
        """What V2 metadata says of the loaded model. Raises Unavailable (503) before it is there."""
        return self._generation.metadata()

    @property
    def fault(self) -> str | None:
        """Why no request can be answered any more, or None."""
        return self._generation.fault

    async def start(self) -> None:
        """Load; raises what loading raised."""
        await self._generation.start()

    async def close(self) -> None:
        """End what runs, and let go of threads and connections."""
        await self._generation.close()
        await self._sources.aclose()
        self._decoder.close()

    async def prepare(self, requests: Sequence[ChatRequest], context: Context) -> Prepared:
        """Fetch and decode all images, write all prompts. Raises 4xx, and DeadlineExceeded (504)."""
        started = time.monotonic()
        prompts = await within(context.deadline, together(self._prompt(request) for request in requests))
        return Prepared(tuple(zip(requests, prompts, strict=True)), started)

    async def answer(self, prepared: Prepared, context: Context) -> list[Outcome]:
        """One outcome for each request, in order. Raises OutOfMemory (507) when no request of the call fits."""
        return settled(
            await together(
                self._answer(request, prompt, prepared.started, context) for request, prompt in prepared.items
            )
        )

    async def stream(self, request: ChatRequest, context: Context) -> AsyncGenerator[str | Completion]:
        """The text of one answer piece by piece, then the whole. Closing it ends the answer at the next token."""
        prepared = await self.prepare([request], context)
        ((_, prompt),) = prepared.items
        has_told = False
        try:
            async with aclosing(self._stream(request, prompt, prepared.started, context)) as parts:
                async for part in parts:
                    has_told = True
                    yield part
            return
        except OutOfMemory:
            if has_told or not _has_images(request):
                raise
        prompt = await self._smaller(request, context)
        async with aclosing(self._stream(request, prompt, prepared.started, context, downscaled=True)) as parts:
            async for part in parts:
                yield part

    def _stream(
        self, request: ChatRequest, prompt: object, started: float, context: Context, *, downscaled: bool = False
    ) -> AsyncGenerator[str | Completion]:
        finish = partial(self._finish, request, started=started, downscaled=downscaled)
        return self._generation.stream(prompt, request.sampling, context, finish)

    async def _answer(self, request: ChatRequest, prompt: object, started: float, context: Context) -> Outcome:
        try:
            (generated,) = await self._generation.generate_all([(prompt, request.sampling)], context)
            return self._finish(request, generated, started=started)
        except OutOfMemory as fault:
            if not _has_images(request):
                return fault
        try:
            smaller = await self._smaller(request, context)
            (generated,) = await self._generation.generate_all([(smaller, request.sampling)], context)
        except OutOfMemory as fault:
            return fault
        return self._finish(request, generated, started=started, downscaled=True)

    async def _smaller(self, request: ChatRequest, context: Context) -> object:
        """The prompt anew, with images of half the pixels.

        They are fetched again: rare, and cheaper than holding every picture until its answer is there.
        """
        log.warning("out of memory, again at half the pixels request_id=%s", context.request_id)
        return await within(context.deadline, self._prompt(request, at_half=True))

    async def _prompt(self, request: ChatRequest, *, at_half: bool = False) -> object:
        model = self.model
        width = request.max_width or self._max_width
        sources = [source for turn in request.turns for source in turn.images]
        seen = iter(await together(self._patches(source, width, at_half=at_half) for source in sources))
        messages: list[Message] = [
            (turn.role, [part if isinstance(part, str) else next(seen) for part in turn.parts])
            for turn in request.turns
        ]
        return await self._generation.in_pool(lambda: model.preprocess_chat(messages))

    async def _patches(self, source: ImageSource, width: int, *, at_half: bool) -> "Patches":
        data = await self._sources.fetch(source)
        pixels = self.model.pixels
        make = pixels.halved if at_half else pixels.patches
        return await self._decoder.prepare(
            data,
            pixels.wanted,
            lambda picture: make(picture.image, picture.size),
            max_width=width,
            max_height=2 * width,
        )

    def _finish(
        self, request: ChatRequest, generated: Generated, *, started: float, downscaled: bool = False
    ) -> Completion:
        model = self.model
        made = completion(model.postprocess(generated), generated, model.info, started)
        tags = tags_of(made.text) if request.preset == "tags" else None
        return replace(made, downscaled=downscaled, tags=tags)


def _has_images(request: ChatRequest) -> bool:
    return any(turn.images for turn in request.turns)


# --- what a client says ----------------------------------------------------------------------------------------------

_IMAGE_FIELDS = ("image", "images", "image_url", "image_urls", "s3_uri", "image_bytes", "b64")


def sources_of(fields: Mapping[str, object]) -> list[ImageSource]:
    """All images that a JSON object or form names, in the order of the fields above, each one or a list.

    An image is text (base64, data URI, URL, s3://), `{"b64": …}` or `{"url": …}`. Raises BadRequest (400) for one that
    cannot be read and for too many, InvalidParameter (422) for another type.
    """
    found: list[ImageSource] = []
    for name in _IMAGE_FIELDS:
        value = fields.get(name)
        entries = cast("Sequence[object]", value) if isinstance(value, list) else [value]
        found += [_source(name, entry) for entry in entries if entry is not None]
    return check_count(found)


def check_count(images: list[ImageSource]) -> list[ImageSource]:
    """The images, if they are not more than a prompt may have. Raises InvalidParameter (422)."""
    if len(images) > MAX_IMAGES_PER_PROMPT:
        raise InvalidParameter(f"At most {MAX_IMAGES_PER_PROMPT} images a prompt.", code="too_many_images")
    return images


def _source(name: str, value: object) -> ImageSource:
    if isinstance(value, dict):
        packed = cast("Mapping[str, object]", value)
        value = packed.get("b64", packed.get("url"))
    if value == "":  # not as if there were none: a question about it must not be answered without it
        raise InvalidParameter(f"{name} is empty.", code="image_missing")
    if not isinstance(value, str) or not value.strip():
        raise InvalidParameter(f"{name} must be text.")
    return s3_source(value) if name == "s3_uri" else parse_source(value)


def check_chat(turns: Sequence[Turn]) -> Sequence[Turn]:
    """A conversation that can be gone on with. Raises BadRequest (400), InvalidParameter (422)."""
    if not turns or turns[-1].role != "user":
        raise BadRequest("The last message must be the user's.", code="text_missing")
    check_count([image for turn in turns for image in turn.images])
    return turns


def uploads_of(files: Mapping[str, Sequence[ImageBytes]], *names: str) -> list[ImageSource]:
    """The uploaded images of several names, in order."""
    return [file for name in names for file in files.get(name, ())]


# --- tags ------------------------------------------------------------------------------------------------------------

_BETWEEN_TAGS = re.compile(r"[,;\n\u3001]")
_AROUND_TAG = re.compile(r"^(?:\d{1,2}[.)]\s+|[\s#*\u2022\"'\u201c\u201d-])+|[\s.\"'\u201c\u201d]+$")


def tags_of(text: str) -> tuple[str, ...]:
    """The tags of an answer to the preset `tags`: without bullets and numbers, each once, in order."""
    found: dict[str, str] = {}
    for part in _BETWEEN_TAGS.split(text):
        tag = _AROUND_TAG.sub("", part.strip())
        if tag:
            found.setdefault(tag.casefold(), tag)
    return tuple(found.values())
