"""What the generating services share: one engine, a preprocessing pool, and usage in answers."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Generic, TypeVar

from sightline import golden
from sightline.engines import vllm
from sightline.engines.base import Generated, GenerativeModel
from sightline.engines.health import MemoryHealth
from sightline.engines.hf import HFEngine
from sightline.engines.text import Pieces
from sightline.engines.vllm import VLLMEngine
from sightline.errors import DeadlineExceeded, OutOfMemory
from sightline.services.base import Json, demo_fields, item_error, item_errors, together
from sightline.settings import VllmSettings
from sightline.v2 import Scalar
from sightline.wire import Completion, Context, Deadline, ModelInfo, Sampling, Usage

Model = TypeVar("Model", bound=GenerativeModel[Any])
T = TypeVar("T")

JOIN_COST = 16_384
"""Tokens and patches of the prompts that are read in one go; a larger prompt goes alone."""
TRIAL_SECONDS = 60.0
"""For the small item that an engine is tried with after it ran out of memory."""

Outcome = Completion | OutOfMemory
"""What became of one item of a call. An item that does not fit the device fails alone when others are in the call."""


class Generation(Generic[Model]):
    """An engine with its preprocessing pool, and the life of both.

    load      builds the model, on the engine's thread
    settings  of a predictor that vLLM may answer for; without them the engine is `hf`
    """

    def __init__(
        self, load: Callable[[], Model], *, max_batch: int, threads: int, settings: VllmSettings | None = None
    ) -> None:
        self.engine: HFEngine[Model, Any, Sampling, Generated] | VLLMEngine[Any] = (
            VLLMEngine(load, partial(vllm.connect, settings), sleep_seconds=settings.vllm_sleep_seconds)
            if settings is not None and settings.uses_vllm
            else HFEngine(load, max_batch=max_batch, cost=lambda prompt: prompt.cost, max_cost=JOIN_COST)
        )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="preprocess")

    @property
    def model(self) -> Model:
        return self.engine.model

    @property
    def fault(self) -> str | None:
        """Why no request can be answered any more, or None."""
        return self.engine.fault

    @property
    def health(self) -> MemoryHealth | None:
        return self.engine.health

    async def try_again(self) -> None:
        """Answer something small, for an engine that ran out of memory. Raises what the engine raises."""
        model = self.model
        prompt = await self.in_pool(lambda: model.trial(golden.picture()))
        await self.engine.generate(prompt, Sampling(max_tokens=1), Deadline.after(TRIAL_SECONDS))

    def metadata(self) -> dict[str, Scalar]:
        """What V2 metadata says of the loaded model. Raises Unavailable (503) before it is there."""
        info, runtime = self.model.info, self.model.runtime
        return {
            "model": info.name,
            "model_revision": info.revision,
            "demo_model": info.demo,
            "backend": runtime.backend,
            "device": runtime.device,
            "dtype": runtime.dtype,
        }

    async def start(self) -> None:
        """Load; see `HFEngine.start`."""
        await self.engine.start()

    async def close(self) -> None:
        """End the running batch and both kinds of threads."""
        await self.engine.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def in_pool(self, work: Callable[[], T]) -> T:
        """Run CPU work beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def generate_all(self, prompts: Sequence[tuple[Any, Sampling]], context: Context) -> list[Generated]:
        """Answers in order. The first failure cancels the rest."""
        return await together(self._generate(prompt, sampling, context) for prompt, sampling in prompts)

    async def stream(
        self, prompt: object, sampling: Sampling, context: Context, finish: Callable[[Generated], Completion]
    ) -> AsyncGenerator[str | Completion]:
        """The text of one answer piece by piece, then the whole.

        finish  makes the wire type of the raw answer; its text is what all pieces are together

        Closing the generator ends the answer at the next token.
        """
        told = ""
        async with aclosing(self._parts(prompt, sampling, context)) as parts:
            async for part in parts:
                if isinstance(part, str):
                    told += part
                    yield part
                else:
                    made = finish(part)
                    if rest := made.text[len(told) :]:  # such as half a character that nothing made whole
                        yield rest
                    yield made

    async def _generate(self, prompt: object, sampling: Sampling, context: Context) -> Generated:
        if not sampling.stop:
            return await self.engine.generate(prompt, sampling, context.deadline, client=context.client)
        async with aclosing(self._parts(prompt, sampling, context)) as parts:
            return [part async for part in parts if isinstance(part, Generated)][-1]

    async def _parts(self, prompt: object, sampling: Sampling, context: Context) -> AsyncGenerator[str | Generated]:
        pieces = Pieces(self.model.reader(), sampling.stop)
        stream = self.engine.stream(
            prompt,
            sampling,
            context.deadline,
            is_enough=lambda: pieces.stopped_at is not None,
            client=context.client,
        )
        async with aclosing(stream) as parts:
            async for part in parts:
                if isinstance(part, list):
                    if text := pieces.push(part):
                        yield text
                elif pieces.stopped_at is None:
                    yield part
                else:
                    ids = part.token_ids[: pieces.tokens]
                    yield replace(part, token_ids=ids, finish_reason="stop", stopped_at=pieces.stopped_at)


async def within(deadline: Deadline, work: Awaitable[T]) -> T:
    """Await work until the deadline. Raises DeadlineExceeded (504)."""
    try:
        deadline.check()
    except DeadlineExceeded:
        if asyncio.iscoroutine(work):
            work.close()  # else Python complains that it was never awaited
        raise
    limit = asyncio.timeout(deadline.remaining())
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded("The request was not prepared within its deadline.") from error


def completion(
    text: str, generated: Generated, model: ModelInfo, started: float, reasoning_tokens: int = 0
) -> Completion:
    """The wire type of an answer. `started` is `time.monotonic()` at the arrival of the request."""
    if generated.stopped_at is not None:
        text = text.partition(generated.stopped_at)[0].rstrip()
    return Completion(
        text=text,
        finish_reason=generated.finish_reason,
        usage=Usage(
            prompt_tokens=generated.prompt_tokens,
            completion_tokens=len(generated.token_ids),
            image_tokens=generated.image_tokens,
            reasoning_tokens=reasoning_tokens,
        ),
        model=model,
        milliseconds=round((time.monotonic() - started) * 1000, 1),
    )


def texts_of(outcomes: Sequence[Outcome]) -> list[str]:
    """The V2 output `text`: empty for an item that failed."""
    return [item.text if isinstance(item, Completion) else "" for item in outcomes]


def parameters_of(outcomes: Sequence[Outcome]) -> dict[str, Scalar]:
    """What a V2 response says beside its tensors: the model, and the tokens of all items together.

    `item_errors`, a JSON list with null for each item that went well, is there when one did not.
    """
    completions = _made(outcomes)
    first = completions[0]
    parameters: dict[str, Scalar] = {
        "model": first.model.name,
        "model_revision": first.model.revision,
        "finish_reason": "length" if any(item.finish_reason == "length" for item in completions) else "stop",
        "prompt_tokens": sum(item.usage.prompt_tokens for item in completions),
        "completion_tokens": sum(item.usage.completion_tokens for item in completions),
        "image_tokens": sum(item.usage.image_tokens or 0 for item in completions),
        "reasoning_tokens": sum(item.usage.reasoning_tokens for item in completions),
        "milliseconds": max(item.milliseconds for item in completions),
    }
    if first.model.demo:
        parameters["demo_model"] = True
    if any(item.downscaled for item in completions):
        parameters["downscaled"] = True
    return parameters | item_errors(outcomes)


def predictions_of(outcomes: Sequence[Outcome]) -> Json:
    """The V1 answer; an item that failed has `error` and `code` instead of a text."""
    predictions = [_prediction(item) if isinstance(item, Completion) else item_error(item) for item in outcomes]
    return {"predictions": predictions} | demo_fields(_made(outcomes)[0].model)


def _made(outcomes: Sequence[Outcome]) -> list[Completion]:
    return [item for item in outcomes if isinstance(item, Completion)]


def _prediction(item: Completion) -> Json:
    prediction: Json = {"text": item.text, "finish_reason": item.finish_reason, "usage": asdict(item.usage)}
    if item.tags is not None:
        prediction["tags"] = list(item.tags)
    if item.downscaled:
        prediction["downscaled"] = True
    return prediction | demo_fields(item.model)
