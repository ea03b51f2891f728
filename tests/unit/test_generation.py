"""What generating services share: work together, in time, and answers in order."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import pytest

from sightline.engines.base import Draft, Generated, Runtime
from sightline.engines.text import Detokenizer
from sightline.errors import DeadlineExceeded, InvalidImage, SightlineError
from sightline.services.base import together
from sightline.services.generation import Generation, completion, parameters_of, within
from sightline.wire import Completion, Context, Deadline, ModelInfo, Sampling, Usage

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


class Text(str):
    """A prompt that is its own answer."""

    cost = 1


END = 256


class Typist:
    """Says its prompt, byte by byte."""

    info = DEMO
    runtime = Runtime("fake", "cpu", "none")
    stops = frozenset({END})

    def __init__(self) -> None:
        self.pause: Callable[[int], None] = lambda number: None
        self.typed: list[int] = []
        """How many bytes each answer had when it left."""

    def decoder(self) -> "TypedRows":
        return TypedRows(self)

    def most_tokens(self, prompt: str, sampling: Sampling) -> int:
        return 1000

    def result(self, prompt: str, draft: Draft) -> Generated:
        ids = tuple(token for token in draft.token_ids if token != END)
        return Generated(ids, "length", prompt_tokens=3)

    def text(self, generated: Generated) -> str:
        return decoded(generated.token_ids).strip()

    def reader(self) -> Detokenizer:
        return Detokenizer(decoded)


class TypedRows:
    def __init__(self, typist: Typist) -> None:
        self._typist = typist
        self._rows: list[tuple[str, int]] = []

    def join(self, prompts: Sequence[str], samplings: Sequence[Sampling]) -> list[tuple[int, int]]:
        self._rows += [(prompt, 1) for prompt in prompts]
        return [(at, byte(prompt, 0)) for at, prompt in enumerate(prompts)]

    def step(self) -> list[int]:
        for _, number in self._rows:
            self._typist.pause(number)
        tokens = [byte(prompt, number) for prompt, number in self._rows]
        self._rows = [(prompt, number + 1) for prompt, number in self._rows]
        return tokens

    def leave(self, row: int) -> None:
        self._typist.typed.append(self._rows[row][1])
        self._rows[row] = self._rows[-1]
        self._rows.pop()


def byte(prompt: str, at: int) -> int:
    data = prompt.encode("utf-8", "surrogateescape")
    return data[at] if at < len(data) else END


def decoded(ids: Sequence[int]) -> str:
    return bytes(token for token in ids if token != END).decode(errors="replace")


@pytest.fixture
async def typing() -> AsyncIterator[Generation[Typist]]:
    generation = Generation(Typist, max_batch=4, threads=1)
    await generation.start()
    yield generation
    await generation.close()


def told(generation: Generation[Typist], text: str, stop: tuple[str, ...] = ()):
    model = generation.model
    return generation.stream(
        Text(text),
        Sampling(stop=stop),
        Context("id", Deadline.after(10)),
        lambda raw: completion(model.text(raw), raw, DEMO, 0),
    )


async def both(generation: Generation[Typist], text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Completion]:
    """The streamed pieces and their whole, which must be that of a request that is not streamed."""
    parts = [part async for part in told(generation, text, stop)]
    (raw,) = await generation.generate_all([(Text(text), Sampling(stop=stop))], Context("id", Deadline.after(10)))
    plain = completion(generation.model.text(raw), raw, DEMO, 0)
    whole = parts.pop()
    assert isinstance(whole, Completion)
    assert (plain.text, plain.usage, plain.finish_reason) == (whole.text, whole.usage, whole.finish_reason)
    pieces = [part for part in parts if isinstance(part, str)]
    assert "".join(pieces) == whole.text
    assert all(pieces)
    return pieces, whole


class TestStreams:
    @pytest.mark.parametrize("text", ["", " ", "a", "  a red  circle \n", "日本語 🙂!", "x" * 200])
    async def test_are_the_text_of_the_same_request_unstreamed(self, typing: Generation[Typist], text: str) -> None:
        _, whole = await both(typing, text)

        assert whole.text == text.strip()
        assert whole.usage.completion_tokens == len(text.encode())

    async def test_end_with_what_nothing_made_whole(self, typing: Generation[Typist]) -> None:
        _, whole = await both(typing, "ok \udcf0\udc9f")

        assert whole.text == "ok \ufffd"

    @pytest.mark.parametrize(
        ("stop", "text"), [(("circle",), "a red"), ((" c", "d"), "a re"), (("x",), "a red circle"), (("a",), "")]
    )
    async def test_end_before_a_stop_sequence(
        self, typing: Generation[Typist], stop: tuple[str, ...], text: str
    ) -> None:
        _, whole = await both(typing, "a red circle", stop)

        assert whole.text == text
        assert whole.finish_reason == ("length" if stop == ("x",) else "stop")

    async def test_a_stop_sequence_ends_the_work(self, typing: Generation[Typist]) -> None:
        """The model is held at the fourth token until the event loop has read the third: it makes no fifth."""
        loop, has_stopped = asyncio.get_running_loop(), threading.Event()

        def pause(number: int) -> None:
            if number == 3:
                loop.call_soon_threadsafe(has_stopped_soon)
                assert has_stopped.wait(10)

        def has_stopped_soon(rounds: int = 20) -> None:
            loop.call_soon(has_stopped_soon, rounds - 1) if rounds else has_stopped.set()

        typing.model.pause = pause
        parts = [part async for part in told(typing, "abcdef", ("c",))]

        assert parts[-1].text == "ab"  # type: ignore[union-attr]
        assert parts[-1].usage.completion_tokens == 3  # type: ignore[union-attr]
        assert typing.model.typed == [4]

    async def test_closing_one_ends_the_work(self, typing: Generation[Typist]) -> None:
        is_closed = threading.Event()
        typing.model.pause = lambda number: None if number < 2 else (is_closed.wait(10), None)[1]

        async with aclosing(told(typing, "abcdef")) as parts:
            assert await anext(parts) in {"a", "ab"}
        is_closed.set()
        await both(typing, "next")

        assert typing.model.typed[0] <= 3  # the third may be on its way when it is closed; the fourth never is

    async def test_a_whole_that_cannot_be_made_is_an_error_behind_the_pieces(self, typing: Generation[Typist]) -> None:
        def fail(raw: Generated) -> Completion:
            raise InvalidImage("no")

        parts = typing.stream(Text("ab"), Sampling(), Context("id", Deadline.after(10)), fail)
        got: list[object] = []

        async def read() -> None:
            async for part in parts:
                got.append(part)

        with pytest.raises(InvalidImage):
            await read()
        assert "".join(map(str, got)) == "ab"


def test_a_stop_sequence_cuts_the_text_at_its_first_occurrence() -> None:
    generated = Generated((1,), "stop", 1, stopped_at="b")

    assert completion("a b c b", generated, DEMO, started=0).text == "a"
