"""A step of the chain that is served beside the gateway, in the same process: the model's own queue instead of HTTP."""

from collections.abc import AsyncGenerator

from sightline.engines.dialect import StepMetadata
from sightline.server.model import PredictorModel
from sightline.v2 import Scalar
from sightline.wire import (
    ChatRequest,
    Completion,
    Context,
    EnhanceRequest,
    ImageBytes,
    ReasoningLevel,
    Sampling,
    Turn,
)


class LocalStep:
    """What `RemoteStep` is to another process. Raises what the model raises."""

    def __init__(self, model: PredictorModel) -> None:
        self._model = model

    async def describe(self, image: ImageBytes, prompt: str | None, sampling: Sampling, context: Context) -> Completion:
        parts = (image,) if prompt is None else (image, prompt)
        (completion,) = await self._model.run([ChatRequest((Turn("user", parts),), sampling)], context)
        return completion

    async def enhance(self, caption: str, level: ReasoningLevel, sampling: Sampling, context: Context) -> Completion:
        (completion,) = await self._model.run([EnhanceRequest(caption, level, sampling)], context)
        return completion

    def enhance_stream(
        self, caption: str, level: ReasoningLevel, sampling: Sampling, context: Context
    ) -> AsyncGenerator[str | Completion]:
        return self._model.stream(EnhanceRequest(caption, level, sampling), context)

    async def is_ready(self, timeout_seconds: float = 1.0) -> bool:
        return await self._model.healthy()

    async def metadata(self, timeout_seconds: float = 1.0) -> StepMetadata | None:
        """What the model says about itself; None while it loads."""
        if not await self._model.healthy():
            return None
        said = self._model.service.metadata()

        def text(name: str) -> str | None:
            value: Scalar | None = said.get(name)
            return value if isinstance(value, str) else None

        return StepMetadata(
            model=text("model"),
            revision=text("model_revision"),
            demo=said.get("demo_model") is True,
            device=text("device"),
            backend=text("backend"),
            dtype=text("dtype"),
            reasoning_level=text("reasoning_level"),
        )
