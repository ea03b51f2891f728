"""What the generating services share: one engine, a preprocessing pool, and usage in answers."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, Generic, TypeVar

from sightline.engines.base import Generated, GenerativeModel
from sightline.engines.hf import HFEngine
from sightline.errors import DeadlineExceeded
from sightline.services.base import Json, demo_fields, together
from sightline.v2 import Scalar
from sightline.wire import Completion, Context, Deadline, ModelInfo, Sampling, Usage

Model = TypeVar("Model", bound=GenerativeModel[Any])
T = TypeVar("T")


class Generation(Generic[Model]):
    """An engine with its preprocessing pool, and the life of both.

    load   builds the model, on the engine's thread
    """

    def __init__(self, load: Callable[[], Model], *, max_batch: int, threads: int) -> None:
        self.engine: HFEngine[Model, Any, Sampling, Generated] = HFEngine(load, max_batch=max_batch)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="preprocess")

    @property
    def model(self) -> Model:
        return self.engine.model

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
        return await together(self.engine.generate(prompt, sampling, context.deadline) for prompt, sampling in prompts)


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


def parameters_of(completions: Sequence[Completion]) -> dict[str, Scalar]:
    """What a V2 response says beside its tensors: the model, and the tokens of all items together."""
    first = completions[0]
    parameters: dict[str, Scalar] = {
        "model": first.model.name,
        "model_revision": first.model.revision,
        "finish_reason": "length" if any(item.finish_reason == "length" for item in completions) else "stop",
        "prompt_tokens": sum(item.usage.prompt_tokens for item in completions),
        "completion_tokens": sum(item.usage.completion_tokens for item in completions),
        "image_tokens": sum(item.usage.image_tokens for item in completions),
        "reasoning_tokens": sum(item.usage.reasoning_tokens for item in completions),
        "milliseconds": max(item.milliseconds for item in completions),
    }
    if first.model.demo:
        parameters["demo_model"] = True
    return parameters


def predictions_of(completions: Sequence[Completion]) -> Json:
    """The V1 answer."""
    return {"predictions": [_prediction(item) for item in completions]} | demo_fields(completions[0].model)


def _prediction(item: Completion) -> Json:
    usage = asdict(item.usage)
    return {"text": item.text, "finish_reason": item.finish_reason, "usage": usage} | demo_fields(item.model)
