"""Contract D9: a caption to fuller prose by gpt-oss; the level is the model's own reasoning effort."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter

from sightline import v2
from sightline.engines.base import Generated
from sightline.engines.health import MemoryHealth
from sightline.errors import BadRequest, SightlineError
from sightline.services.base import (
    Json,
    Run,
    health,
    instances_of,
    level_of,
    prompt_of,
    reject_unknown_inputs,
    sampling_of,
    together,
)
from sightline.services.generation import Generation, completion, parameters_of, predictions_of
from sightline.settings import EnhanceSettings
from sightline.wire import (
    MAX_IMAGES_PER_CALL,
    Completion,
    Context,
    EnhanceRequest,
    ReasoningLevel,
    Sampling,
    Turn,
)

if TYPE_CHECKING:
    from sightline.models.gpt_oss.model import GptOss


class NoFinalAnswer(SightlineError):
    """The model reasoned but never came to an answer. With `length` a larger max_tokens may help: 422."""

    status = 422
    default_code = "no_final_answer"


@dataclass(frozen=True, slots=True)
class _Prepared:
    prompts: tuple[tuple[Any, Sampling], ...]
    started: float


class EnhanceService:
    """The `enhance` predictor."""

    inputs = (v2.TensorSpec("text", "BYTES", (-1,)),)
    outputs = (v2.TensorSpec("text", "BYTES", (-1,)),)

    def __init__(self, settings: EnhanceSettings) -> None:
        self.name = settings.model_name
        self._settings = settings
        self._defaults = Sampling(max_tokens=settings.max_tokens)
        self._generation: Generation[GptOss] = Generation(
            self._load_model, max_batch=settings.max_batch, threads=1, settings=settings
        )

    def _load_model(self) -> "GptOss":
        from sightline.models.gpt_oss.model import GptOss
        from sightline.models.selfcheck import checked

        return checked(GptOss, self._settings)

    async def load(self) -> None:
        await self._generation.start()

    async def close(self) -> None:
        await self._generation.close()

    @property
    def fault(self) -> str | None:
        """Why no request can be answered any more, or None."""
        return self._generation.fault

    @property
    def health(self) -> MemoryHealth | None:
        """Of the device's memory; None where the model is elsewhere."""
        return self._generation.health

    async def try_again(self) -> None:
        """Answer something small; see `MemoryHealth.wants_trial`."""
        await self._generation.try_again()

    def metadata(self) -> dict[str, v2.Scalar]:
        """What V2 metadata says beside the tensors. Raises Unavailable (503) before the model is loaded."""
        return self._generation.metadata() | {"reasoning_level": self._settings.reasoning_level}

    async def preprocess(self, requests: Sequence[EnhanceRequest], context: Context) -> _Prepared:
        started = time.monotonic()
        model = self._generation.model
        default: ReasoningLevel = self._settings.reasoning_level
        prompts = await together(
            self._generation.in_pool(partial(model.preprocess, _turns(request), request.level or default))
            for request in requests
        )
        samplings = [request.sampling for request in requests]
        return _Prepared(tuple(zip(prompts, samplings, strict=True)), started)

    async def predict(self, prepared: _Prepared, context: Context) -> list[Completion]:
        generated = await self._generation.generate_all(prepared.prompts, context)
        return [self._completion(item, prepared.started) for item in generated]

    def _completion(self, generated: Generated, started: float) -> Completion:
        model = self._generation.model
        text, answer = model.postprocess(generated)
        if text is None:
            raise _no_final(generated.finish_reason)
        return completion(text, generated, model.info, started, answer.reasoning_tokens)

    def from_chat(self, turns: Sequence[Turn], options: Mapping[str, object]) -> EnhanceRequest:
        """The user's text is the caption. A system turn replaces the enhancer's own instructions."""
        if any(turn.images for turn in turns):
            raise BadRequest("This model reads text only.", code="image_unsupported")
        captions = [_caption(turn.text) for turn in turns if turn.role == "user"]
        if not captions or turns[-1].role != "user":
            raise BadRequest("The last message must be the user's.", code="text_missing")
        level = level_of(options.get("reasoning_level"))
        sampling = sampling_of(options, self._defaults)
        return EnhanceRequest(captions[-1], level, sampling, () if len(turns) == 1 else tuple(turns))

    async def stream(self, request: EnhanceRequest, context: Context) -> AsyncGenerator[str | Completion]:
        """The final channel piece by piece, then the whole; reasoning is never shown."""
        prepared = await self.preprocess([request], context)
        ((prompt, sampling),) = prepared.prompts
        finish = partial(self._completion, started=prepared.started)
        async with aclosing(self._generation.stream(prompt, sampling, context, finish)) as parts:
            async for part in parts:
                yield part

    def from_v1(self, body: Mapping[str, object]) -> list[EnhanceRequest]:
        return [self._from_instance(instance) for instance in instances_of(body)]

    def to_v1(self, results: Sequence[Completion]) -> Json:
        return predictions_of(results)

    def from_v2(self, request: v2.InferRequest) -> list[EnhanceRequest]:
        reject_unknown_inputs(request, self.inputs)
        tensor = request.input("text")
        if tensor is None:
            raise BadRequest("The input 'text' is missing.", code="text_missing")
        texts = tensor.texts()
        if not 1 <= len(texts) <= MAX_IMAGES_PER_CALL:
            raise BadRequest(f"'text' must hold 1 to {MAX_IMAGES_PER_CALL} elements.", code="too_many_items")
        sampling = sampling_of(request.parameters, self._defaults)
        level = level_of(request.parameters.get("reasoning_level"))
        return [EnhanceRequest(_caption(text), level, sampling) for text in texts]

    def to_v2(self, results: Sequence[Completion]) -> v2.InferResponse:
        return v2.InferResponse(
            model_name=self.name,
            outputs=(v2.Tensor.of_texts("text", [item.text for item in results]),),
            parameters=parameters_of(results),
        )

    def router(self, run: Run) -> APIRouter:
        """`GET /health`; the enhancer itself is reached by V1 and V2."""
        router = APIRouter(tags=["enhance"])
        router.add_api_route("/health", health, methods=["GET"])
        return router

    def _from_instance(self, instance: object) -> EnhanceRequest:
        if isinstance(instance, str):
            return EnhanceRequest(_caption(instance), None, self._defaults)
        if not isinstance(instance, dict):
            raise BadRequest("An instance needs a text.", code="text_missing")
        fields = cast("Mapping[str, object]", instance)
        return EnhanceRequest(
            _caption(fields.get("text", fields.get("caption"))),
            level_of(fields.get("reasoning_level")),
            sampling_of(fields, self._defaults),
        )


def _turns(request: EnhanceRequest) -> tuple[Turn, ...]:
    return request.turns or (Turn("user", (request.caption,)),)


def _caption(value: object) -> str:
    caption = prompt_of(value, "text")
    if caption is None:
        raise BadRequest("The text to enhance is missing or blank.", code="text_missing")
    return caption


def _no_final(finish_reason: str) -> NoFinalAnswer:
    if finish_reason == "length":
        return NoFinalAnswer(
            "The model used up max_tokens before its final answer (length); raise max_tokens or lower reasoning_level."
        )
    return NoFinalAnswer("The model stopped without a final answer (stop).")
