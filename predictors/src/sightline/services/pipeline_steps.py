"""The two steps of a gateway: how each is reached, and what they say of themselves."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import httpx
from pydantic import SecretStr

from sightline import v2
from sightline.engines.breaker import CircuitBreaker
from sightline.engines.dialect import StepMetadata, StepName
from sightline.engines.remote import CallPolicy, RemoteStep, new_client
from sightline.engines.remote_openai import OpenAI
from sightline.engines.remote_v2 import V2
from sightline.services.base import Json
from sightline.settings import PipelineSettings, StepProtocol
from sightline.wire import Completion, Context, ImageBytes, ReasoningLevel, Sampling

HEALTH_SECONDS = 1.0
HEALTH_CACHE_SECONDS = 2.0


class Step(Protocol):
    """What the gateway asks of a step beside its work."""

    async def is_ready(self, timeout_seconds: float = ...) -> bool: ...
    async def metadata(self, timeout_seconds: float = ...) -> StepMetadata | None: ...


class CaptionStep(Step, Protocol):
    """A step that describes; see `RemoteStep`."""

    async def describe(
        self, image: ImageBytes, prompt: str | None, sampling: Sampling, context: Context
    ) -> Completion: ...


class EnhanceStep(Step, Protocol):
    """A step that enhances; see `RemoteStep`."""

    async def enhance(
        self, caption: str, level: ReasoningLevel, sampling: Sampling, context: Context
    ) -> Completion: ...

    def enhance_stream(
        self, caption: str, level: ReasoningLevel, sampling: Sampling, context: Context
    ) -> AsyncGenerator[str | Completion]: ...


class Steps:
    """The steps of one gateway, and the connections to those that are other processes.

    caption, enhance  of this process; None: as the settings say
    breakers          of the remote ones
    is_foreign        whether the caption step is somebody else's model
    """

    def __init__(
        self, settings: PipelineSettings, caption: CaptionStep | None = None, enhance: EnhanceStep | None = None
    ) -> None:
        self._settings = settings
        self._clients: list[httpx.AsyncClient] = []  # one pool a step: a slow enhancer must not starve the captions
        self.breakers: dict[StepName, CircuitBreaker] = {}
        self.is_foreign = caption is None and settings.describe_protocol == "openai"
        self.caption: CaptionStep = caption or self._remote(
            "caption",
            settings.describe_protocol,
            settings.describe_url,
            settings.describe_model,
            settings.describe_api_key,
        )
        if enhance is None and settings.enhance_url is not None:
            enhance = self._remote(
                "enhance",
                settings.enhance_protocol,
                settings.enhance_url,
                settings.enhance_model,
                settings.enhance_api_key,
            )
        self.enhance = enhance

    def _remote(
        self, step: StepName, protocol: StepProtocol, url: str, model: str, key: SecretStr | None
    ) -> RemoteStep:
        told = self._settings
        authority = told.describe_ca_file if step == "caption" else told.enhance_ca_file
        client = new_client(told.max_concurrency, authority)
        self._clients.append(client)
        dialect = OpenAI(url, model) if protocol == "openai" else V2(url, model)
        key = key or self._settings.step_api_key
        made = RemoteStep(
            dialect,
            key.get_secret_value() if key else None,
            client,
            step=step,
            breaker=_breaker(told, step),
            policy=_policy(told, step),
        )
        self.breakers[step] = made.breaker
        return made

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            await client.aclose()


def _breaker(told: PipelineSettings, step: StepName) -> CircuitBreaker:
    if step == "caption":
        return CircuitBreaker(
            max_failures=told.caption_breaker_failures,
            error_percent=told.caption_breaker_error_percent,
            window=told.caption_breaker_min_requests,
            open_seconds=told.caption_breaker_open_seconds,
        )
    return CircuitBreaker(
        max_failures=told.enhance_breaker_failures,
        error_percent=told.enhance_breaker_error_percent,
        window=told.enhance_breaker_min_requests,
        open_seconds=told.enhance_breaker_open_seconds,
    )


def _policy(told: PipelineSettings, step: StepName) -> CallPolicy:
    if step == "caption":
        return CallPolicy(told.caption_attempts, told.caption_attempt_seconds, told.caption_max_in_flight)
    return CallPolicy(told.enhance_attempts, told.enhance_attempt_seconds, told.enhance_max_in_flight)


class Health:
    """What `GET /health` says: true values, short-lived, asked once for all who ask at the same time."""

    def __init__(
        self, caption: Step, enhance: Step | None, settings: PipelineSettings, clock: Callable[[], float]
    ) -> None:
        self._caption = caption
        self._enhance = enhance
        self._settings = settings
        self._clock = clock
        self._lock = asyncio.Lock()
        self._asked_at: float | None = None
        self._is_ready = False
        self._caption_said: StepMetadata | None = None
        self._enhance_said: StepMetadata | None = None

    async def now(self) -> Json:
        """The six keys of contract D4. Takes at most a second and never raises."""
        async with self._lock:
            if self._asked_at is None or self._clock() - self._asked_at >= HEALTH_CACHE_SECONDS:
                await self._ask()
                self._asked_at = self._clock()
        caption, enhance = self._caption_said, self._enhance_said
        return {
            "ok": self._is_ready,
            "backend": caption.backend if caption else None,
            "device": caption.device if caption else None,
            "gpt_oss_enabled": self._enhance is not None and self._settings.enhance_by_default,
            "gpt_oss_model": enhance.model if enhance else None,
            "gpt_oss_reasoning_level": self._settings.reasoning_level,
        }

    def metadata(self) -> dict[str, v2.Scalar]:
        """The same for the V2 metadata, without asking; unknown values are left out."""
        caption, enhance = self._caption_said, self._enhance_said
        said: dict[str, v2.Scalar | None] = {
            "model": caption.model if caption else None,
            "model_revision": caption.revision if caption else None,
            "demo_model": any(step.demo for step in (caption, enhance) if step),
            "backend": caption.backend if caption else None,
            "device": caption.device if caption else None,
            "dtype": caption.dtype if caption else None,
            "enhancer_model": enhance.model if enhance else None,
            "enhance_by_default": self._enhance is not None and self._settings.enhance_by_default,
            "reasoning_level": self._settings.reasoning_level,
        }
        return {name: value for name, value in said.items() if value is not None}

    async def _ask(self) -> None:
        self._is_ready, self._caption_said, self._enhance_said = await asyncio.gather(
            self._caption.is_ready(HEALTH_SECONDS),
            self._caption.metadata(HEALTH_SECONDS),
            self._enhance.metadata(HEALTH_SECONDS) if self._enhance else _nothing(),
        )


async def _nothing() -> None:
    return None
