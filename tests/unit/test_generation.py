"""What generating services share: work together, in time, and answers in order."""

import asyncio

import pytest

from sightline.engines.base import Generated
from sightline.errors import DeadlineExceeded, InvalidImage, SightlineError
from sightline.services.base import together
from sightline.services.generation import completion, parameters_of, within
from sightline.wire import Completion, Deadline, ModelInfo, Usage

DEMO = ModelInfo("sightline-tiny", "abc", demo=True)


async def value(number: int) -> int:
    await asyncio.sleep(0)
    return number


async def failing(error: Exception) -> int:
    raise error


class TestTogether:
    async def test_gives_results_in_order(self) -> None:
        assert await together(value(number) for number in (3, 1, 2)) == [3, 1, 2]
        assert await together([]) == []

    async def test_the_first_failure_is_raised_alone_and_ends_the_others(self) -> None:
        was_cancelled = asyncio.Event()

        async def endless() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                was_cancelled.set()
                raise

        with pytest.raises(InvalidImage) as caught:
            await together([endless(), value(1), failing(InvalidImage("no image"))])

        assert was_cancelled.is_set()
        assert caught.value.message == "Item 2: no image"

    async def test_of_two_failures_one_is_raised(self) -> None:
        with pytest.raises(SightlineError):
            await together([failing(InvalidImage("a")), failing(InvalidImage("b"))])

    async def test_nested_failures_come_out_plain(self) -> None:
        with pytest.raises(InvalidImage):
            await together([together([failing(InvalidImage("a"))])])

    async def test_being_cancelled_is_no_failure(self) -> None:
        began = asyncio.Event()

        async def endless() -> None:
            began.set()
            await asyncio.Event().wait()

        task = asyncio.create_task(together([endless()]))
        await began.wait()
        task.cancel()

        with pytest.raises(asyncio.CancelledError):
            await task


class TestWithin:
    async def test_in_time(self) -> None:
        assert await within(Deadline.after(60), value(1)) == 1

    async def test_too_late(self) -> None:
        with pytest.raises(DeadlineExceeded):
            await within(Deadline.after(0.01), asyncio.Event().wait())

    async def test_past_before_it_began_nothing_is_begun(self) -> None:
        began: list[int] = []

        async def work() -> None:
            began.append(1)

        with pytest.raises(DeadlineExceeded):
            await within(Deadline.after(-1), work())

        assert not began

    async def test_a_timeout_of_the_work_itself_is_not_the_deadline(self) -> None:
        with pytest.raises(TimeoutError):
            await within(Deadline.after(60), failing(TimeoutError("of a socket")))


def completed(finish_reason: str = "stop", milliseconds: float = 10, model: ModelInfo = DEMO) -> Completion:
    return Completion("text", finish_reason, Usage(10, 5, 3, 2), model, milliseconds)  # type: ignore[arg-type]


class TestParameters:
    def test_add_up_all_items(self) -> None:
        parameters = parameters_of([completed(), completed("length", 30), completed(milliseconds=20)])

        assert parameters == {
            "model": "sightline-tiny",
            "model_revision": "abc",
            "finish_reason": "length",
            "prompt_tokens": 30,
            "completion_tokens": 15,
            "image_tokens": 9,
            "reasoning_tokens": 6,
            "milliseconds": 30,
            "demo_model": True,
        }

    def test_of_a_real_model_do_not_speak_of_demonstrations(self) -> None:
        assert "demo_model" not in parameters_of([completed(model=ModelInfo("Qwen", "1"))])


def test_a_completion_counts_what_was_generated() -> None:
    made = completion("text", Generated((1, 2, 3), "length", 20, image_tokens=9), DEMO, started=0, reasoning_tokens=2)

    assert made.usage == Usage(prompt_tokens=20, completion_tokens=3, image_tokens=9, reasoning_tokens=2)
    assert made.finish_reason == "length"
    assert made.milliseconds > 0
