"""One engine in this process: the tokens of `hf`, alone and in any company; streams, deadlines, aborts, its end."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

import psutil
import pytest
import pytest_asyncio
from PIL import Image

from sightline.engines import vllm
from sightline.engines.base import Generated
from sightline.engines.vllm import EngineDied, VLLMEngine
from sightline.errors import DeadlineExceeded, InvalidParameter
from sightline.models.qwen_vl import Prompt, QwenVL
from sightline.settings import DescribeSettings
from sightline.wire import Deadline, Sampling
from tests.scenes import BACKGROUNDS, COLORS, SHAPES, Thing, draw
from tests.vllm.conftest import children, wait_gone

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # vLLM reads a name of torch that is going away
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

GREEDY = Sampling(max_tokens=48)
SAMPLED = Sampling(max_tokens=24, temperature=1.0, top_p=0.9, seed=7)


def later() -> Deadline:
    return Deadline.after(300)


def picture(seed: int) -> Image.Image:
    """One or two things somewhere, of any size and shape of picture."""
    rng = random.Random(seed)
    width, height = rng.randrange(60, 500), rng.randrange(60, 500)
    things = [
        Thing(
            "large", rng.choice(list(COLORS)), rng.choice(SHAPES), x * width, rng.uniform(0.3, 0.7) * height, width / 7
        )
        for x in rng.sample([0.25, 0.75], rng.randint(1, 2))
    ]
    return draw(things, rng.choice(list(BACKGROUNDS.values())), width, height, rng)


def engines() -> list[psutil.Process]:
    """vLLM's processes; multiprocessing's own helper stays as long as this one."""
    return [item for item in children(os.getpid()) if "resource_tracker" not in " ".join(item.cmdline())]


class Both:
    """A front with its engine, and what `hf` answers."""

    def __init__(self, hf: QwenVL, engine: VLLMEngine[QwenVL]) -> None:
        self.hf = hf
        self.engine = engine
        self.prompts = [hf.preprocess(picture(seed), "Describe this image.") for seed in range(12)]
        two = [("user", [picture(20), picture(21), "What is different?"])]
        talk = [
            ("user", [picture(22), "Describe this image."]),
            ("assistant", ["a star"]),
            ("user", ["And its color?"]),
        ]
        self.prompts += [hf.preprocess_chat(two), hf.preprocess_chat(talk)]  # type: ignore[list-item]
        self.answers = [self.answer(prompt) for prompt in self.prompts]

    def answer(self, prompt: Prompt, sampling: Sampling = GREEDY) -> Generated:
        (made,) = self.hf.generate([prompt], sampling, lambda index: False)
        return made

    def unfinished(self) -> int:
        client: Any = self.engine._client
        return int(client._engine.get_num_unfinished_requests())

    async def wait_idle(self) -> None:
        async with asyncio.timeout(60):
            while self.unfinished():
                await asyncio.sleep(0.02)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both() -> AsyncIterator[Both]:
    hf = QwenVL(DescribeSettings(auth="off"))
    settings = DescribeSettings(auth="off", engine="vllm", vllm_cache_gib=0.25)
    engine = VLLMEngine(partial(QwenVL, settings), partial(vllm.connect, settings))
    await engine.start()
    yield Both(hf, engine)
    processes = engines()
    await engine.close()
    wait_gone(processes)


async def test_the_front_has_no_weights_and_makes_the_same_prompt(both: Both) -> None:
    front: Any = both.engine.model
    made = front.preprocess(picture(0), "Describe this image.")

    assert front._model.device.type == "meta"
    assert made.input_ids.equal(both.prompts[0].input_ids)
    assert made.pixel_values.equal(both.prompts[0].pixel_values)
    assert front.info == both.hf.info
    assert front.runtime.backend == "vllm"


async def test_tokens_are_those_of_hf_one_at_a_time(both: Both) -> None:
    made = [await both.engine.generate(prompt, GREEDY, later()) for prompt in both.prompts]

    assert made == both.answers
    assert len({answer.token_ids for answer in made}) > len(made) // 2  # or the pictures were not seen


async def test_tokens_are_those_of_hf_in_company(both: Both) -> None:
    made = await asyncio.gather(*(both.engine.generate(prompt, GREEDY, later()) for prompt in both.prompts * 2))

    assert made == both.answers * 2


async def test_tokens_are_those_of_hf_while_neighbours_are_cancelled(both: Both) -> None:
    tasks = [asyncio.create_task(both.engine.generate(prompt, GREEDY, later())) for prompt in both.prompts * 2]
    await asyncio.sleep(0.05)
    for task in tasks[::2]:
        task.cancel()

    made = await asyncio.gather(*tasks, return_exceptions=True)

    assert made[1::2] == (both.answers * 2)[1::2]
    await both.wait_idle()


async def test_a_stream_gives_the_same_tokens(both: Both) -> None:
    parts = [part async for part in both.engine.stream(both.prompts[0], GREEDY, later())]

    *lists, whole = parts
    assert whole == both.answers[0]
    assert tuple(token for part in lists for token in part) == whole.token_ids  # type: ignore[union-attr]
    assert len(lists) > 1


async def test_what_ends_for_its_length_says_so(both: Both) -> None:
    short = Sampling(max_tokens=3)

    made = await both.engine.generate(both.prompts[0], short, later())

    assert made == both.answer(both.prompts[0], short)
    assert made.finish_reason == "length"


async def test_a_temperature_below_the_least_is_greedy(both: Both) -> None:
    made = await both.engine.generate(both.prompts[0], Sampling(48, temperature=1e-6, seed=3), later())

    assert made == both.answers[0]


async def test_the_checkpoints_repetition_penalty_is_kept(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    hf: Any = both.hf
    for model in (hf, both.engine.model):
        monkeypatch.setattr(model, "repetition_penalty", 20.0)
    monkeypatch.setattr(hf._model.generation_config, "repetition_penalty", 20.0)
    wanted = [both.answer(prompt) for prompt in both.prompts[:4]]

    made = await asyncio.gather(*(both.engine.generate(prompt, GREEDY, later()) for prompt in both.prompts[:4]))

    assert made == wanted
    assert made != both.answers[:4]


async def test_a_seed_gives_the_same_text_alone_and_in_company(both: Both) -> None:
    alone = await both.engine.generate(both.prompts[0], SAMPLED, later())
    others = [both.engine.generate(prompt, Sampling(24, temperature=1.0), later()) for prompt in both.prompts]

    again, *_ = await asyncio.gather(both.engine.generate(both.prompts[0], SAMPLED, later()), *others)

    assert again == alone


async def test_a_closed_stream_leaves_nothing_running(both: Both) -> None:
    async with aclosing(both.engine.stream(both.prompts[0], GREEDY, later())) as parts:
        await anext(parts)

    await both.wait_idle()


async def test_a_missed_deadline_leaves_nothing_running(both: Both) -> None:
    with pytest.raises(DeadlineExceeded):
        await both.engine.generate(both.prompts[0], Sampling(2048, temperature=2.0), Deadline.after(0.01))

    await both.wait_idle()


async def test_a_prompt_that_does_not_fit_is_refused(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    config = both.engine._client._engine.model_config  # type: ignore[union-attr]
    monkeypatch.setattr(config, "max_model_len", 20)

    with pytest.raises(InvalidParameter, match="this engine reads 20"):
        await both.engine.generate(both.prompts[0], GREEDY, later())


async def test_the_end_of_its_process_is_told_at_once(both: Both) -> None:
    """The last of this file: there is no engine after it."""
    running = [asyncio.create_task(both.engine.generate(prompt, GREEDY, later())) for prompt in both.prompts]
    await asyncio.sleep(0.05)
    processes = engines()

    for process in processes:
        process.kill()
    made = await asyncio.gather(*running, return_exceptions=True)

    assert all(isinstance(item, EngineDied) or item in both.answers for item in made), made
    assert any(isinstance(item, EngineDied) for item in made)
    async with asyncio.timeout(60):
        while both.engine.fault is None:
            await asyncio.sleep(0.02)
    with pytest.raises(EngineDied):
        await both.engine.generate(both.prompts[0], GREEDY, later())
