"""Describe's and generate's conversations answered by a model behind an OpenAI-compatible URL instead of one in here.

Images are fetched, checked, shrunk and drawn anew here as ever, so the policy holds and no EXIF leaves the house.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from sightline.engines.breaker import CircuitBreaker
from sightline.engines.remote import RemoteStep, new_client
from sightline.engines.remote_openai import OpenAI
from sightline.errors import OutOfMemory
from sightline.images import Decoder, encode, media_type
from sightline.services.base import settled, together
from sightline.services.generation import Outcome, within
from sightline.services.vision import Prepared, tags_of
from sightline.settings import VisionSettings
from sightline.sources import Sources
from sightline.v2 import Scalar
from sightline.wire import ChatRequest, Completion, Context, ImageBytes, ImageSource, ModelInfo, Turn

log = logging.getLogger("sightline.services")

FIRST_POLL_SECONDS = 0.25
LONGEST_POLL_SECONDS = 5.0


class RemoteConversations:
    """What `Conversations` is to a model of this process."""

    def __init__(self, settings: VisionSettings, *, max_width: int) -> None:
        self._model = settings.remote_model or settings.model_name
        self._url = settings.remote_url or ""
        self._client = new_client(settings.queue_size)
        key = settings.remote_api_key.get_secret_value() if settings.remote_api_key else None
        self.breaker = CircuitBreaker()
        self._step = RemoteStep(OpenAI(self._url, self._model), key, self._client, step="remote", breaker=self.breaker)
        self._sources = Sources(settings)
        self._decoder = Decoder.from_settings(settings)
        self._max_width = max_width
        self.info = ModelInfo(self._model, "unknown")
        """Which model answers, as it last said."""
        self.fault: str | None = None
        """Nothing is given up for good: the breaker asks again."""

    @property
    def health(self) -> None:
        """Its memory is its own affair."""

    async def try_again(self) -> None:
        """Nothing to try here."""

    def metadata(self) -> dict[str, Scalar]:
        """What is known without asking."""
        return {
            "model": self.info.name,
            "model_revision": self.info.revision,
            "demo_model": self.info.demo,
            "backend": "openai",
        }

    async def start(self) -> None:
        """Wait until the model is ready, however long it loads."""
        pause = FIRST_POLL_SECONDS
        while not await self._step.is_ready():
            if pause == FIRST_POLL_SECONDS:
                log.info("waiting for the remote model url=%s model=%s", self._url, self._model)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)
        said = await self._step.metadata()
        if said is not None:
            self.info = ModelInfo(said.model or self._model, self.info.revision, said.demo)

    async def close(self) -> None:
        """Let go of threads and connections."""
        await self._client.aclose()
        await self._sources.aclose()
        self._decoder.close()

    async def prepare(self, requests: Sequence[ChatRequest], context: Context) -> Prepared:
        """Fetch all images and draw them anew. Raises 4xx, and DeadlineExceeded (504)."""
        started = time.monotonic()
        turns = await within(context.deadline, together(self._turns(request) for request in requests))
        return Prepared(tuple(zip(requests, turns, strict=True)), started)

    async def answer(self, prepared: Prepared, context: Context) -> list[Outcome]:
        """One outcome for each request, in order; the first failure ends the rest."""
        return settled(await together(self._answer(request, turns, context) for request, turns in prepared.items))

    async def stream(self, request: ChatRequest, context: Context) -> AsyncGenerator[str | Completion]:
        """The text of one answer piece by piece, then the whole."""
        prepared = await self.prepare([request], context)
        ((_, turns),) = prepared.items
        told = ""
        async with aclosing(self._step.chat_stream(turns, request.sampling, context)) as parts:
            async for part in parts:
                if isinstance(part, str):
                    told += part
                    yield part
                else:
                    if part.text.startswith(told) and (rest := part.text[len(told) :]):
                        yield rest
                    yield self._finished(request, part)

    async def _answer(self, request: ChatRequest, turns: Sequence[Turn], context: Context) -> Outcome:
        try:
            return self._finished(request, await self._step.chat(turns, request.sampling, context))
        except OutOfMemory as fault:
            return fault

    def _finished(self, request: ChatRequest, made: Completion) -> Completion:
        self.info = made.model
        return replace(made, tags=tags_of(made.text)) if request.preset == "tags" else made

    async def _turns(self, request: ChatRequest) -> list[Turn]:
        width = request.max_width or self._max_width
        sources = [source for turn in request.turns for source in turn.images]
        drawn = iter(await together(self._drawn(source, width) for source in sources))
        return [
            replace(turn, parts=tuple(part if isinstance(part, str) else next(drawn) for part in turn.parts))
            for turn in request.turns
        ]

    async def _drawn(self, source: ImageSource, width: int) -> ImageBytes:
        data = await self._sources.fetch(source)
        picture = await self._decoder.decode(data, max_width=width, max_height=2 * width)
        kind = "JPEG" if media_type(data) in ("image/jpeg", "image/webp") else "PNG"
        return ImageBytes(await asyncio.to_thread(encode, picture, kind))
