"""The engine in process, without HTTP: our decoding against `generate`, one at a time and in micro-batches.

    python -m tests.bench.engine                 # 1, 8, 32, 128 clients; images/s, p50 and p95
    python -m tests.bench.engine --mixed         # answers of 2 to 40 tokens, for the tail
    python -m tests.bench.engine --split         # where the engine's time goes

Closed loop, images drawn once and each asked once, prompts prepared beforehand unless --whole; the three take turns.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sightline.engines.base import Generated
from sightline.engines.hf import HFEngine
from sightline.models.qwen_vl import Prompt, QwenVL
from sightline.settings import DescribeSettings
from sightline.tiny import scenes
from sightline.wire import Deadline, Sampling

QUESTION = "Describe this image in detail"
SIDE = 336
MOST = 32
"""Rows of a batch, as in the figures to beat."""

Ask = Callable[[int], Awaitable[Generated]]


@dataclass(frozen=True)
class Measured:
    """Of one contender with so many clients. Seconds."""

    contender: str
    clients: int
    images_per_second: float
    tokens_per_second: float
    p50: float
    p95: float


class Work:
    """Images, their prompts, and how many tokens each answer may have."""

    def __init__(self, model: QwenVL, count: int, *, is_mixed: bool, is_whole: bool) -> None:
        rng = np.random.default_rng(11)
        self.model = model
        self.images = [scenes.render(scenes.draw_scene(rng)).resize((SIDE, SIDE)) for _ in range(count)]
        self._prompts = None if is_whole else [self._prepared(image) for image in self.images]
        limits = rng.integers(2, 41, count).tolist() if is_mixed else [64] * count
        self.samplings = [Sampling(max_tokens=limit) for limit in limits]

    def _prepared(self, image: Image.Image) -> Prompt:
        return self.model.preprocess(image, QUESTION)

    def prompt(self, at: int) -> Prompt:
        return self._prompts[at] if self._prompts else self._prepared(self.images[at])


def plain(model: QwenVL, prompts: Sequence[Prompt], most: int) -> list[Generated]:
    """`generate` of transformers on a left-padded batch, as the project's first engine did."""
    length = max(len(prompt.input_ids) for prompt in prompts)

    def padded(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (length - len(values), 0))

    inputs = {
        "input_ids": torch.stack([padded(prompt.input_ids) for prompt in prompts]),
        "mm_token_type_ids": torch.stack([padded(prompt.token_types) for prompt in prompts]),
        "attention_mask": torch.stack([padded(torch.ones_like(prompt.input_ids)) for prompt in prompts]),
        "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts]),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in prompts]),
    }
    with torch.inference_mode():
        out = model._model.generate(**inputs, max_new_tokens=most, do_sample=False, eos_token_id=sorted(model.stops))
    answers: list[Generated] = []
    for prompt, row in zip(prompts, out[:, length:].tolist(), strict=True):
        end = next((at for at, token in enumerate(row) if token in model.stops), None)
        ids = tuple(row if end is None else row[: end + 1])
        answers.append(Generated(ids, "length" if end is None else "stop", len(prompt.input_ids)))
    return answers


def naive(work: Work) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    """One at a time behind a lock."""
    lock = asyncio.Lock()

    async def ask(at: int) -> Generated:
        async with lock:
            most = work.samplings[at].max_tokens
            return (await asyncio.to_thread(lambda: plain(work.model, [work.prompt(at)], most)))[0]

    return ask, _nothing


def micro(work: Work) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    """What waits, up to 32, whenever the model is free: `generate` until the last of them ends."""
    waiting: asyncio.Queue[tuple[int, asyncio.Future[Generated]]] = asyncio.Queue()

    async def serve() -> None:
        while True:
            batch = [await waiting.get()]
            while len(batch) < MOST and not waiting.empty():
                batch.append(waiting.get_nowait())
            most = max(work.samplings[at].max_tokens for at, _ in batch)
            prompts = [work.prompt(at) for at, _ in batch]
            for (at, future), answer in zip(
                batch, await asyncio.to_thread(plain, work.model, prompts, most), strict=True
            ):
                ids = answer.token_ids[: work.samplings[at].max_tokens]
                future.set_result(replace(answer, token_ids=ids))

    async def ask(at: int) -> Generated:
        future = asyncio.get_running_loop().create_future()
        waiting.put_nowait((at, future))
        return await future

    task = asyncio.ensure_future(serve())

    async def close() -> None:
        task.cancel()

    return ask, close


async def ours(work: Work) -> tuple[Ask, Callable[[], Awaitable[None]]]:
    engine: HFEngine[QwenVL, Prompt, Sampling, Generated] = HFEngine(
        lambda: work.model, max_batch=MOST, cost=lambda prompt: prompt.cost, max_cost=16_384
    )
    await engine.start()

    async def ask(at: int) -> Generated:
        prompt = work.prompt(at) if work._prompts else await asyncio.to_thread(work.prompt, at)
        return await engine.generate(prompt, work.samplings[at], Deadline.after(600))

    return ask, engine.close


async def _nothing() -> None:
    return


async def measured(name: str, ask: Ask, clients: int, count: int) -> tuple[Measured, dict[int, Generated]]:
    """Each client asks for the next image as soon as it has its answer."""
    left = iter(range(count))
    seconds: list[float] = []
    answers: dict[int, Generated] = {}

    async def client() -> None:
        for at in left:
            started = time.perf_counter()
            answers[at] = await ask(at)
            seconds.append(time.perf_counter() - started)

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    whole = time.perf_counter() - started
    tokens = sum(len(answer.token_ids) for answer in answers.values())
    p50, p95 = np.percentile(seconds, [50, 95])
    return Measured(name, clients, count / whole, tokens / whole, float(p50), float(p95)), answers


async def compare(work: Work, clients: Sequence[int], count: int, rounds: int) -> list[Measured]:
    """Medians over rounds; every contender must give the same tokens."""
    found: dict[tuple[str, int], list[Measured]] = {}
    for number in range(rounds + 1):  # the first one warms
        for many in clients:
            asked = min(count, max(16, 4 * many)) if number else 16
            expected: dict[int, Generated] | None = None
            for name, make in (("generate, one at a time", naive), ("generate, micro-batches", micro), ("ours", ours)):
                made: Any = make(work)
                ask, close = await made if asyncio.iscoroutine(made) else made
                one, answers = await measured(name, ask, many, asked)
                await close()
                ids = {at: answer.token_ids for at, answer in answers.items()}
                expected = expected or answers
                assert ids == {at: answer.token_ids for at, answer in expected.items()}, f"{name} says something else"
                if number:
                    found.setdefault((name, many), []).append(one)
    return [_median(several) for several in found.values()]


def _median(several: Sequence[Measured]) -> Measured:
    middle = {
        name: statistics.median(getattr(one, name) for one in several)
        for name in ("images_per_second", "tokens_per_second", "p50", "p95")
    }
    return replace(several[0], **middle)


def table(found: Sequence[Measured]) -> str:
    lines = ["| clients | engine | images/s | tokens/s | p50 ms | p95 ms | of one at a time |", "|" + "---|" * 7]
    base = {one.clients: one.images_per_second for one in found if one.contender.endswith("one at a time")}
    lines += [
        f"| {one.clients} | {one.contender} | {one.images_per_second:.1f} | {one.tokens_per_second:.0f} | "
        f"{one.p50 * 1000:.0f} | {one.p95 * 1000:.0f} | {one.images_per_second / base[one.clients]:.2f} |"
        for one in sorted(found, key=lambda one: one.clients)
    ]
    return "\n".join(lines)


def split(work: Work, rows: int) -> str:
    """Milliseconds of each part for a batch of so many rows, and how many images a second each would allow."""
    prompts, seconds = [work.prompt(at) for at in range(rows)], {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        call()
        taken: list[float] = []
        for _ in range(5):
            started = time.perf_counter()
            found = call()
            taken.append(time.perf_counter() - started)
        seconds[name] = min(taken)
        return found

    model = work.model
    with torch.inference_mode():
        timed("preprocess, one thread", lambda: [work._prepared(image) for image in work.images[:rows]])
        seen = timed("see", lambda: model.see(prompts))
        timed("prefill", lambda: model.prefill(prompts, seen))
        decoder = model.decoder()
        decoder.join(prompts, work.samplings[:rows])
        timed("step", decoder.step)
    return "\n".join(f"{name}: {1000 * each:.1f} ms for {rows} rows" for name, each in seconds.items())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--mixed", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--split", action="store_true")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    more = {"model": str(given.model)} if given.model else {}
    settings = DescribeSettings(_env_file=None, auth="off", device="cpu", threads=given.threads, **more)
    work = Work(QwenVL(settings), given.count, is_mixed=given.mixed, is_whole=given.whole)
    if given.split:
        for rows in given.clients:
            print(split(work, rows), flush=True)
        return
    found = asyncio.run(compare(work, given.clients, given.count, given.rounds))
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps([vars(one) for one in found], indent=1))


if __name__ == "__main__":
    main()
