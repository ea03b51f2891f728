"""A service as a KServe `Model`: the four verbs, background loading, and a bound on what waits."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from kserve import Model

from sightline.engines.health import MemoryHealth
from sightline.errors import NotSupported, QueueFull, Unavailable
from sightline.server import metrics
from sightline.services.base import ChatService, OwnsMemory, Service
from sightline.services.blip import BlipService
from sightline.services.describe import DescribeService
from sightline.services.embed import EmbedService
from sightline.services.enhance import EnhanceService
from sightline.services.generate import GenerateService
from sightline.services.pipeline import PipelineService
from sightline.settings import (
    BlipSettings,
    DescribeSettings,
    EmbedSettings,
    EngineSettings,
    EnhanceSettings,
    GenerateSettings,
    PipelineSettings,
    ServerSettings,
)
from sightline.wire import Completion, Context

log = logging.getLogger("sightline.server")


@dataclass(frozen=True, slots=True)
class Call:
    """What travels through the four verbs: wire requests, later what the service prepared, and the context."""

    payload: Any
    context: Context


BATCH_SHARE = 0.5
"""Of a queue's places, those that batches may fill."""


class Admission:
    """A bound on items that are queued or running, taken before any work is done for them."""

    def __init__(self, limit: int) -> None:
        self._limit, self._batch_limit = limit, max(1, int(limit * BATCH_SHARE))
        self._items = 0
        self._seconds_per_item = 1.0

    @contextmanager
    def admit(self, items: int, *, is_batch: bool = False) -> Generator[None]:
        """Hold permits for `items`. Raises QueueFull (429) with the time that the waiting ones will take.

        is_batch  only while less than half of the places are taken, by whomever: the others are for people

        An idle server takes a request of any size, so that a limit below the size of one call blocks nobody.
        """
        if self._items and self._items + items > (self._batch_limit if is_batch else self._limit):
            raise QueueFull(
                "Too many requests are waiting; try again later.",
                retry_after=min(60.0, max(1.0, self._items * self._seconds_per_item)),
            )
        self._items += items
        waiting_before = self._items
        started = time.monotonic()
        try:
            yield
        finally:
            self._items -= items
            # Little's law on the last request: it left after everything before it had been served.
            measured = (time.monotonic() - started) / waiting_before
            self._seconds_per_item += 0.2 * (measured - self._seconds_per_item)


class PredictorModel(Model):
    """One of our services behind KServe's data plane.

    Live at once, ready when loaded: KServe registers only models that say `ready` at start, so `ready` is True from
    the beginning, loading happens in `start_engine`, and `healthy` tells the truth (KServe 0.21, reference §1.1).
    A load that fails ends the process.
    """

    settings_type: ClassVar[type[ServerSettings]]

    def __init__(self, service: Service[Any, Any, Any], settings: ServerSettings) -> None:
        super().__init__(service.name)
        self.service = service
        self.ready = True
        self.engine = True
        self.has_loaded = False
        self._admission = Admission(settings.queue_size)
        self._loading: asyncio.Task[None] | None = None
        self._trial: asyncio.Task[None] | None = None
        if self._health is not None and isinstance(settings, EngineSettings):
            self._health.limit = settings.max_out_of_memory

    def load(self) -> bool:
        """KServe calls this on the event loop when a model is not healthy; loading is under way already."""
        return self.has_loaded and self.fault is None

    def start(self) -> None:
        """KServe would set `ready` here."""

    async def start_engine(self) -> None:
        """Load in the background. Raises what loading raised, which ends the process with code 1."""
        started = time.monotonic()
        log.info("loading model=%s", self.name)
        self._loading = asyncio.create_task(self.service.load())
        try:
            await self._loading
        except asyncio.CancelledError:
            log.info("loading was cut off model=%s", self.name)
            return
        self.has_loaded = True
        seconds = time.monotonic() - started
        metrics.LOAD_SECONDS.labels(self.name).set(seconds)
        log.info("ready model=%s seconds=%.1f", self.name, seconds)

    async def shut_down(self) -> None:
        """Called once, after the last request was answered."""
        self.has_loaded = False
        for task in (self._loading, self._trial):
            if task is not None and not task.done():
                task.cancel()
        await self.service.close()

    async def healthy(self) -> bool:
        """Whether requests can be answered; asking finds out whether memory that ran out is there again."""
        health = self._health
        if self.has_loaded and health is not None and health.wants_trial():
            self._trial = asyncio.create_task(self._try_again())
        return self.unready is None

    @property
    def unready(self) -> str | None:
        """Why requests cannot be answered, in one stable word; None when they can."""
        if not self.has_loaded:
            return "loading"
        if self.fault is not None:
            return "engine_dead"
        return "out_of_memory" if self._health is not None and self._health.is_exhausted else None

    @property
    def fault(self) -> str | None:
        """Why no request can be answered any more, such as the end of the engine's process; None for most services."""
        return cast("str | None", getattr(self.service, "fault", None))

    @property
    def _health(self) -> MemoryHealth | None:
        return self.service.health if isinstance(self.service, OwnsMemory) else None

    async def _try_again(self) -> None:
        try:
            await cast("OwnsMemory", self.service).try_again()
        except Exception as error:
            log.warning("still not ready model=%s reason=out_of_memory: %s", self.name, error)

    def validate(self, payload: Any) -> Any:  # noqa: ANN401 - KServe's signature
        """Our bodies were checked when they were parsed."""
        return payload

    async def run(self, requests: Sequence[Any], context: Context) -> Sequence[Any]:
        """Requests in, results out, same length and order. Raises Unavailable (503), QueueFull (429)."""
        self.check_loaded()
        with (
            self._admission.admit(len(requests), is_batch=context.is_batch),
            metrics.in_flight(self.name, len(requests)),
        ):
            # KServe types bodies and answers as its own; they pass through it untouched.
            results, _ = await cast("Any", self)(Call(requests, context))
        return results

    async def stream(self, request: Any, context: Context) -> AsyncGenerator[str | Completion]:  # noqa: ANN401
        """Pieces of one answer, then the whole; the service must be a `ChatService`.

        Nothing is done before the first piece is asked for; then it raises like `run`. Closing it ends the work.
        """
        self.check_loaded()
        service = cast("ChatService[Any]", self.service)
        with self._admission.admit(1, is_batch=context.is_batch), metrics.in_flight(self.name, 1):
            async with aclosing(service.stream(request, context)) as parts:
                async for part in parts:
                    if isinstance(part, Completion):
                        metrics.observe(self.name, [part])
                    yield part

    def check_loaded(self) -> None:
        """Raises Unavailable (503)."""
        if not self.has_loaded:
            raise Unavailable("The model is still loading.", code="model_not_ready", retry_after=5)

    async def preprocess(self, payload: Any, headers: Any = None) -> Call:  # noqa: ANN401  # pyright: ignore[reportIncompatibleMethodOverride]
        """Fetch and decode; anything but a `Call` did not come by a route of ours."""
        if not isinstance(payload, Call):
            raise NotSupported("This protocol is not served yet.")
        prepared = await self.service.preprocess(payload.payload, payload.context)
        return Call(prepared, payload.context)

    async def predict(self, payload: Call, headers: Any = None) -> Sequence[Any]:  # noqa: ANN401  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model itself."""
        return await self.service.predict(payload.payload, payload.context)

    async def postprocess(self, result: Sequence[Any], headers: Any = None) -> Sequence[Any]:  # noqa: ANN401  # pyright: ignore[reportIncompatibleMethodOverride]
        """Results are wire types; each protocol renders them itself."""
        metrics.observe(self.name, result)
        return result


class DescribeModel(PredictorModel):
    """Qwen2-VL / Qwen2.5-VL."""

    settings_type = DescribeSettings

    def __init__(self, settings: DescribeSettings) -> None:
        super().__init__(DescribeService(settings), settings)


class EnhanceModel(PredictorModel):
    """gpt-oss."""

    settings_type = EnhanceSettings

    def __init__(self, settings: EnhanceSettings) -> None:
        super().__init__(EnhanceService(settings), settings)


class BlipModel(PredictorModel):
    """BLIP."""

    settings_type = BlipSettings

    def __init__(self, settings: BlipSettings) -> None:
        super().__init__(BlipService(settings), settings)


class GenerateModel(PredictorModel):
    """Kimi-VL."""

    settings_type = GenerateSettings

    def __init__(self, settings: GenerateSettings) -> None:
        super().__init__(GenerateService(settings), settings)


class EmbedModel(PredictorModel):
    """ColQwen2.5."""

    settings_type = EmbedSettings

    def __init__(self, settings: EmbedSettings) -> None:
        super().__init__(EmbedService(settings), settings)


class PipelineModel(PredictorModel):
    """The gateway in front of the two."""

    settings_type = PipelineSettings

    def __init__(self, settings: PipelineSettings, **steps: Any) -> None:  # noqa: ANN401 - steps of this process
        self.settings = settings
        service = PipelineService(settings, **steps)
        super().__init__(service, settings)
        for step, breaker in service.breakers.items():
            metrics.watch_breaker(self.name, step, breaker)


MODELS: dict[str, type[PredictorModel]] = {
    "describe": DescribeModel,
    "enhance": EnhanceModel,
    "generate": GenerateModel,
    "embed": EmbedModel,
    "blip": BlipModel,
    "pipeline": PipelineModel,
}
