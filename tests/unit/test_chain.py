"""The chain: skip, force, degrade, strict, one deadline, cancel; contract D8's cosmetics; what an enhancement added."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.chain import (
    MAX_CAPTION_WORDS,
    ChainOptions,
    ChainPolicy,
    ChainResult,
    EnhancementFault,
    StepReport,
    added_terms,
    run,
    stream,
    tidy,
    unwrap,
)
from sightline.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidImage,
    InvalidParameter,
    QueueFull,
    SightlineError,
    Unavailable,
    UpstreamFailed,
)
from sightline.wire import (
    CREATIVE_SEARCH_PROMPT,
    PRESETS,
    SHORT_PROMPT,
    Completion,
    Context,
    Deadline,
    ImageBytes,
    ModelInfo,
    Sampling,
    Usage,
)

IMAGE = ImageBytes(b"not looked at here", "a.png")
SEEN = Usage(prompt_tokens=19, completion_tokens=9, image_tokens=9)
CAPTIONED = Completion("A red kite.", "stop", SEEN, ModelInfo("qwen", "abc"), 12.5)
THOUGHT = Usage(prompt_tokens=30, completion_tokens=40, reasoning_tokens=21)
ENHANCED = Completion("A red kite rides the wind.", "stop", THOUGHT, ModelInfo("oss", "def"), 80.0)


class Caption:
    """A caption step that answers, fails or hangs, and remembers what it was asked."""

    def __init__(self, answer: Completion | Exception | None = CAPTIONED) -> None:
        self.answer = answer
        self.calls: list[tuple[object, ...]] = []
        self.was_cancelled = False
        self.has_begun = asyncio.Event()

    async def __call__(self, *arguments: object) -> Completion:
        self.calls.append(arguments)
        self.has_begun.set()
        if self.answer is None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer


class Enhance(Caption):
    def __init__(self, answer: Completion | Exception | None = ENHANCED) -> None:
        super().__init__(answer)


async def ask(
    caption: Caption | None = None,
    enhance: Enhance | None = None,
    *,
    seconds: float = 60,
    policy: ChainPolicy | None = None,
    **request: object,
) -> ChainResult:
    return await run(
        IMAGE,
        ChainOptions(**request),  # type: ignore[arg-type]
        Context("r1", Deadline.after(seconds)),
        caption=caption or Caption(),
        enhance=enhance,
        policy=policy or ChainPolicy(),
    )


class TestWhetherToEnhance:
    @pytest.mark.parametrize(
        ("asked", "default", "is_enhanced"),
        [
            pytest.param(None, True, True, id="silent request, on by default"),
            pytest.param(None, False, False, id="silent request, off by default"),
            pytest.param(True, False, True, id="true forces"),
            pytest.param(False, True, False, id="false skips"),
        ],
    )
    async def test_request_then_policy(self, asked: bool | None, default: bool, is_enhanced: bool) -> None:
        enhance = Enhance()
        result = await run(
            IMAGE,
            ChainOptions(enhance=asked),
            Context("r1", Deadline.after(60)),
            caption=Caption(),
            enhance=enhance,
            policy=ChainPolicy(enhance_by_default=default),
        )
        assert result.enhanced is is_enhanced
        assert len(enhance.calls) == int(is_enhanced)
        assert result.enhancement_error is None

    async def test_skipping_is_no_fault_even_without_an_enhancer(self) -> None:
        result = await run(
            IMAGE,
            ChainOptions(enhance=False, strict=True),
            Context("r1", Deadline.after(60)),
            caption=Caption(),
            enhance=None,
            policy=ChainPolicy(),
        )
        assert (result.caption, result.enhanced, result.enhancement_error) == ("A red kite.", False, None)

    async def test_an_enhanced_result_keeps_the_caption_and_reports_both_steps(self) -> None:
        assert await ask(enhance=Enhance()) == ChainResult(
            caption="A red kite rides the wind.",
            original_caption="A red kite.",
            enhanced=True,
            enhancement_error=None,
            truncated=False,
            steps=(
                StepReport("caption", "qwen", "abc", 12.5, 19, 9, 9, 0),
                StepReport("enhance", "oss", "def", 80.0, 30, 40, 0, 21),
            ),
            added_terms=None,
            model=ModelInfo("qwen", "abc"),
            demo=False,
        )

    async def test_explain_tells_the_added_terms(self) -> None:
        assert (await ask(enhance=Enhance(), explain=True)).added_terms == ("rides", "wind")

    async def test_explain_without_enhancement_adds_nothing(self) -> None:
        policy = ChainPolicy(enhance_by_default=False)
        assert (await ask(policy=policy, explain=True)).added_terms == ()

    @pytest.mark.parametrize("demo", ["caption", "enhance"])
    async def test_one_demonstration_model_makes_a_demonstration(self, demo: str) -> None:
        toy = ModelInfo("toy", "0", demo=True)
        caption = Caption(replace(CAPTIONED, model=toy) if demo == "caption" else CAPTIONED)
        enhance = Enhance(replace(ENHANCED, model=toy) if demo == "enhance" else ENHANCED)
        assert (await ask(caption, enhance)).demo


class TestWhatTheStepsAreAsked:
    @pytest.mark.parametrize(
        ("request_", "prompt"),
        [
            pytest.param({}, CREATIVE_SEARCH_PROMPT, id="detailed by default"),
            pytest.param({"detailed": False}, SHORT_PROMPT, id="detailed false is short"),
            pytest.param({"detailed": False, "prompt": "Count."}, "Count.", id="a prompt overrides"),
        ],
    )
    async def test_prompt(self, request_: dict[str, object], prompt: str) -> None:
        caption = Caption()
        await ask(caption, Enhance(), **request_)
        image, asked, sampling, _ = caption.calls[0]
        assert (image, asked, sampling) == (IMAGE, prompt, Sampling(max_tokens=128))

    @pytest.mark.parametrize(("asked", "level"), [(None, "medium"), ("high", "high")])
    async def test_level(self, asked: str | None, level: str) -> None:
        enhance = Enhance()
        await ask(enhance=enhance, policy=ChainPolicy(level="medium"), level=asked)
        assert enhance.calls[0][:3] == ("A red kite.", level, Sampling(max_tokens=1024))

    async def test_the_enhancer_gets_the_tidied_caption(self) -> None:
        enhance = Enhance()
        await ask(Caption(replace(CAPTIONED, text=' Caption: "A red kite" ')), enhance)
        assert enhance.calls[0][0] == "A red kite."

    async def test_the_caption_step_gets_the_whole_deadline_and_the_enhancer_less(self) -> None:
        caption, enhance = Caption(), Enhance()
        context = Context("r1", Deadline.after(60), traceparent="00-1-2-01")
        policy = ChainPolicy(enhance_timeout_seconds=600, reserve_seconds=1)
        await run(IMAGE, ChainOptions(), context, caption=caption, enhance=enhance, policy=policy)
        within = enhance.calls[0][3]
        assert caption.calls[0][3] is context
        assert isinstance(within, Context)
        assert context.deadline.at - within.deadline.at == pytest.approx(1, abs=0.2)
        assert (within.request_id, within.traceparent) == ("r1", "00-1-2-01")

    async def test_the_enhancer_gets_at_most_its_own_timeout(self) -> None:
        enhance = Enhance()
        await ask(enhance=enhance, seconds=600, policy=ChainPolicy(enhance_timeout_seconds=5))
        within = enhance.calls[0][3]
        assert isinstance(within, Context)
        assert within.deadline.remaining() <= 5


class TestCaptionStepFails:
    @pytest.mark.parametrize(
        "error",
        [
            InvalidImage("No image.", code="truncated_image"),
            Unavailable("Down.", code="caption_step_unavailable"),
            QueueFull("Busy.", retry_after=2),
            InternalError("Bug."),
        ],
        ids=lambda error: error.code,
    )
    async def test_its_error_is_the_callers_as_it_is(self, error: SightlineError) -> None:
        enhance = Enhance()
        with pytest.raises(SightlineError) as raised:
            await ask(Caption(error), enhance)
        assert raised.value is error
        assert not enhance.calls

    async def test_a_hanging_step_is_504_and_cancelled(self) -> None:
        caption = Caption(None)
        with pytest.raises(DeadlineExceeded):
            await ask(caption, seconds=0.1)
        assert caption.was_cancelled

    async def test_a_deadline_already_past_costs_no_call(self) -> None:
        caption = Caption()
        with pytest.raises(DeadlineExceeded):
            await ask(caption, seconds=-1)
        assert not caption.calls

    async def test_no_image_tokens_is_an_error_not_a_guess(self) -> None:
        blind = replace(CAPTIONED, usage=Usage(prompt_tokens=10, completion_tokens=9))
        with pytest.raises(UpstreamFailed) as raised:
            await ask(Caption(blind), Enhance())
        assert raised.value.code == "image_not_seen"

    @pytest.mark.parametrize("text", ["", "  \n", '""', "Caption:", "..."])
    async def test_an_empty_caption_is_502(self, text: str) -> None:
        with pytest.raises(UpstreamFailed) as raised:
            await ask(Caption(replace(CAPTIONED, text=text)), Enhance())
        assert raised.value.code == "empty_caption"


NO_ANSWER = InvalidParameter("It used up max_tokens before its answer (length).", code="no_final_answer")
DEGRADED = [
    pytest.param(Unavailable("x"), "enhancer_unavailable", id="down, or breaker open"),
    pytest.param(QueueFull("x", retry_after=3), "enhancer_unavailable", id="busy"),
    pytest.param(UpstreamFailed("x"), "enhancer_failed", id="nonsense"),
    pytest.param(InternalError("x"), "enhancer_failed", id="500"),
    pytest.param(InvalidParameter("x"), "enhancer_failed", id="422"),
    pytest.param(NO_ANSWER, "no_final_answer", id="no final answer"),
    pytest.param(replace(ENHANCED, text=" "), "no_final_answer", id="blank answer"),
    pytest.param(DeadlineExceeded("x"), "enhancer_timeout", id="504"),
    pytest.param(TimeoutError(), "enhancer_timeout", id="timeout"),
    pytest.param(ZeroDivisionError(), "enhancer_failed", id="a bug of ours"),
]


class TestEnhanceStepFails:
    @pytest.mark.parametrize(("fault", "code"), DEGRADED)
    async def test_the_caption_arrives_with_the_reason(self, fault: Exception | Completion, code: str) -> None:
        result = await ask(enhance=Enhance(fault), explain=True)
        assert (result.caption, result.original_caption, result.enhanced) == ("A red kite.", None, False)
        assert result.enhancement_error is not None
        assert result.enhancement_error.code == code
        assert result.enhancement_error.message.endswith(".")
        assert [step.name for step in result.steps] == ["caption"]
        assert result.added_terms == ()

    @pytest.mark.parametrize(("fault", "code"), DEGRADED)
    async def test_strict_makes_it_503_with_the_same_code(self, fault: Exception | Completion, code: str) -> None:
        with pytest.raises(Unavailable) as raised:
            await ask(enhance=Enhance(fault), strict=True)
        assert (raised.value.status, raised.value.code) == (503, code)

    async def test_no_enhancer_at_all(self) -> None:
        assert (await ask(enhance=None)).enhancement_error == EnhancementFault(
            "enhancer_not_configured", "This pipeline has no enhance step."
        )
        with pytest.raises(Unavailable, match="no enhance step"):
            await ask(enhance=None, strict=True)

    async def test_the_reason_of_no_final_answer_is_told(self) -> None:
        fault = (await ask(enhance=Enhance(NO_ANSWER))).enhancement_error
        assert fault is not None
        assert fault.message == NO_ANSWER.message

    async def test_other_words_of_the_enhancer_are_not_told(self) -> None:
        fault = (await ask(enhance=Enhance(InternalError("secret")))).enhancement_error
        assert fault is not None
        assert "secret" not in fault.message

    async def test_strict_passes_on_when_to_come_back(self) -> None:
        with pytest.raises(Unavailable) as raised:
            await ask(enhance=Enhance(QueueFull("x", retry_after=3)), strict=True)
        assert raised.value.retry_after == 3

    async def test_a_hanging_enhancer_is_cancelled_and_the_caption_arrives(self) -> None:
        enhance = Enhance(None)
        result = await ask(enhance=enhance, policy=ChainPolicy(enhance_timeout_seconds=0.01))
        assert result.enhancement_error is not None
        assert result.enhancement_error.code == "enhancer_timeout"
        assert enhance.was_cancelled

    async def test_a_hanging_enhancer_leaves_the_reserve_of_the_deadline(self) -> None:
        enhance = Enhance(None)
        deadline = Deadline.after(30.01)
        policy = ChainPolicy(reserve_seconds=30)
        context = Context("r1", deadline)
        result = await run(IMAGE, ChainOptions(), context, caption=Caption(), enhance=enhance, policy=policy)
        assert result.enhancement_error is not None
        assert deadline.remaining() > 1

    async def test_without_time_left_the_enhancer_is_not_called(self) -> None:
        enhance = Enhance()
        result = await ask(enhance=enhance, seconds=5, policy=ChainPolicy(reserve_seconds=10))
        assert result.enhancement_error is not None
        assert result.enhancement_error.code == "enhancer_timeout"
        assert not enhance.calls


@pytest.mark.parametrize("hanging", ["caption", "enhance"])
async def test_cancelling_the_chain_cancels_the_running_step(hanging: str) -> None:
    caption = Caption(None if hanging == "caption" else CAPTIONED)
    enhance = Enhance(None if hanging == "enhance" else ENHANCED)
    step = caption if hanging == "caption" else enhance
    task = asyncio.create_task(ask(caption, enhance))
    await step.has_begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert step.was_cancelled


class Pieces:
    """An enhance step that streams: texts, then the whole, or an error; None hangs."""

    def __init__(self, *pieces: str | Completion | Exception | None) -> None:
        self.pieces = pieces
        self.calls: list[tuple[object, ...]] = []
        self.was_closed = False

    async def __call__(self, *arguments: object) -> AsyncGenerator[str | Completion]:
        self.calls.append(arguments)
        try:
            for piece in self.pieces:
                if piece is None:
                    await asyncio.Event().wait()
                if isinstance(piece, Exception):
                    raise piece
                assert piece is not None
                yield piece
        finally:
            self.was_closed = True


async def watch(step: Pieces | None, *, policy: ChainPolicy | None = None, **options: object) -> list[object]:
    """All events, with each result as its caption."""
    events = stream(
        IMAGE,
        ChainOptions(**options),  # type: ignore[arg-type]
        Context("r1", Deadline.after(60)),
        caption=Caption(),
        enhance=step,
        policy=policy or ChainPolicy(),
    )
    return [event async for event in events]


class TestStream:
    async def test_the_caption_then_pieces_then_the_end(self) -> None:
        first, *pieces, last = await watch(Pieces("A red kite ", "rides the wind.", ENHANCED))
        assert isinstance(first, ChainResult)
        assert isinstance(last, ChainResult)
        assert (first.caption, first.enhanced, len(first.steps)) == ("A red kite.", False, 1)
        assert pieces == ["A red kite ", "rides the wind."]
        assert last == await ask(enhance=Enhance())

    async def test_a_step_that_cannot_stream_gives_no_pieces(self) -> None:
        assert len(await watch(Pieces(ENHANCED))) == 2

    async def test_without_enhancement_the_caption_is_the_end(self) -> None:
        first, last = await watch(Pieces(ENHANCED), enhance=False)
        assert first == last

    @pytest.mark.parametrize(
        ("pieces", "code"),
        [
            pytest.param((UpstreamFailed("x"),), "enhancer_failed", id="at once"),
            pytest.param(("A red", UpstreamFailed("x")), "enhancer_failed", id="half-way"),
            pytest.param(("A red",), "enhancer_failed", id="ends without the whole"),
            pytest.param((replace(ENHANCED, text=" "),), "no_final_answer", id="blank"),
            pytest.param(("A red", None), "enhancer_timeout", id="stalls half-way"),
            pytest.param((ZeroDivisionError(),), "enhancer_failed", id="a bug of ours"),
        ],
    )
    async def test_a_failing_enhancement_ends_in_the_caption(
        self, pieces: tuple[str | Completion | Exception | None, ...], code: str
    ) -> None:
        step = Pieces(*pieces)
        policy = ChainPolicy(enhance_timeout_seconds=0.05 if None in pieces else 60)
        last = (await watch(step, policy=policy))[-1]
        assert isinstance(last, ChainResult)
        assert (last.caption, last.enhanced) == ("A red kite.", False)
        assert last.enhancement_error is not None
        assert last.enhancement_error.code == code
        assert step.was_closed
        with pytest.raises(Unavailable) as raised:
            await watch(Pieces(*pieces), policy=policy, strict=True)
        assert raised.value.code == code

    async def test_no_enhancer_at_all(self) -> None:
        last = (await watch(None))[-1]
        assert isinstance(last, ChainResult)
        assert last.enhancement_error == EnhancementFault(
            "enhancer_not_configured", "This pipeline has no enhance step."
        )

    async def test_closing_it_closes_the_step(self) -> None:
        step = Pieces("A red", None)
        context = Context("r1", Deadline.after(60))
        events = stream(IMAGE, ChainOptions(), context, caption=Caption(), enhance=step, policy=ChainPolicy())
        await anext(events)
        assert await anext(events) == "A red"
        await events.aclose()
        assert step.was_closed


class TestPresets:
    @pytest.mark.parametrize("preset", PRESETS)
    async def test_is_the_prompt(self, preset: str) -> None:
        caption = Caption()
        await ask(caption, Enhance(), preset=preset)
        assert caption.calls[0][1] == PRESETS[preset]

    async def test_own_words_win(self) -> None:
        caption = Caption()
        await ask(caption, Enhance(), preset="tags", prompt="Count.")
        assert caption.calls[0][1] == "Count."

    @pytest.mark.parametrize(("preset", "is_cut"), [("creative-search", True), ("alt-text", True), ("product", False)])
    async def test_only_captions_are_cut(self, preset: str, is_cut: bool) -> None:
        result = await ask(Caption(replace(CAPTIONED, text="kite " * 60)), preset=preset, enhance=False)
        assert result.truncated is is_cut

    async def test_tags_are_no_sentence(self) -> None:
        result = await ask(Caption(replace(CAPTIONED, text="kite, red, sky")), preset="tags", enhance=False)
        assert result.caption == "kite, red, sky"


async def test_a_request_may_bring_its_own_sampling() -> None:
    caption, enhance = Caption(), Enhance()
    short, hot = Sampling(max_tokens=5, seed=3), Sampling(max_tokens=6, temperature=1)
    await ask(caption, enhance, caption_sampling=short, enhance_sampling=hot)
    assert (caption.calls[0][2], enhance.calls[0][2]) == (short, hot)


async def test_what_a_model_does_not_tell_is_no_proof_of_blindness() -> None:
    untold = replace(CAPTIONED, usage=Usage(prompt_tokens=10, completion_tokens=9, image_tokens=None))
    result = await ask(Caption(untold), enhance=Enhance())
    assert result.steps[0].image_tokens is None


async def test_a_smaller_look_is_told() -> None:
    assert (await ask(Caption(replace(CAPTIONED, downscaled=True)), Enhance())).downscaled


class TestTruncated:
    @pytest.mark.parametrize(
        ("caption", "enhanced"),
        [
            pytest.param(replace(CAPTIONED, finish_reason="length"), ENHANCED, id="caption ran out of tokens"),
            pytest.param(replace(CAPTIONED, text="kite " * 51), ENHANCED, id="caption over 50 words"),
            pytest.param(CAPTIONED, replace(ENHANCED, finish_reason="length"), id="enhancement ran out of tokens"),
        ],
    )
    async def test_flagged(self, caption: Completion, enhanced: Completion) -> None:
        assert (await ask(Caption(caption), Enhance(enhanced))).truncated

    async def test_an_enhancement_may_be_longer_than_50_words(self) -> None:
        result = await ask(enhance=Enhance(replace(ENHANCED, text="kite " * 80)))
        assert not result.truncated
        assert len(result.caption.split()) == 80


class TestTidy:
    @pytest.mark.parametrize(
        ("text", "caption"),
        [
            pytest.param("A dog.", "A dog.", id="nothing to do"),
            pytest.param("  A dog\n on a  lawn. ", "A dog on a lawn.", id="one line"),
            pytest.param("A dog", "A dog.", id="closed"),
            pytest.param("A dog,", "A dog.", id="closed in place of a comma"),
            pytest.param("A dog!", "A dog!", id="its own end mark"),
            pytest.param("Is it a dog?", "Is it a dog?", id="a question"),
            pytest.param('A sign says "Stop."', 'A sign says "Stop."', id="end mark inside quotes"),
            pytest.param('A sign says "Stop"', 'A sign says "Stop".', id="no end mark inside quotes"),
            pytest.param("assistant: A dog.", "A dog.", id="role"),
            pytest.param("assistant\nA dog.", "A dog.", id="role on its own line"),
            pytest.param("Caption: A dog.", "A dog.", id="caption"),
            pytest.param("**Caption:** A dog.", "A dog.", id="caption in bold"),
            pytest.param("assistant: Description: A dog.", "A dog.", id="two roles"),
            pytest.param("Here is a caption: A dog.", "A dog.", id="here is"),
            pytest.param("Sure! Here's the description: A dog.", "A dog.", id="sure"),
            pytest.param("Assistant coaches on a bench.", "Assistant coaches on a bench.", id="a word, no role"),
            pytest.param("Caption contest winners.", "Caption contest winners.", id="a word without its colon"),
            pytest.param('"A dog."', "A dog.", id="quotes"),
            pytest.param('"A dog".', "A dog.", id="end mark after the quotes"),
            pytest.param('"A dog!".', "A dog!", id="end marks on both sides"),
            pytest.param("\u201cA dog.\u201d", "A dog.", id="curly quotes"),
            pytest.param("'A dog's bone.'", "A dog's bone.", id="apostrophe inside quotes"),
            pytest.param('Caption: "A dog."', "A dog.", id="role, then quotes"),
            pytest.param('"Caption: A dog."', "A dog.", id="role inside quotes"),
            pytest.param('"A dog', "A dog.", id="quotes cut off"),
            pytest.param('"Stop" and "Go" on signs.', '"Stop" and "Go" on signs.', id="two quotations"),
            pytest.param("'Tis the season.", "'Tis the season.", id="leading apostrophe"),
        ],
    )
    def test_caption(self, text: str, caption: str) -> None:
        assert tidy(text) == (caption, False)

    def test_fifty_words_stay(self) -> None:
        assert tidy(" ".join(["word"] * 50)) == (" ".join(["word"] * 50) + ".", False)

    def test_the_fifty_first_is_cut(self) -> None:
        text, is_cut = tidy(" ".join(f"word{number}," for number in range(51)))
        assert is_cut
        assert text.split()[-1] == "word49."

    @pytest.mark.parametrize("text", ["", '"', "''", "...", "--- !"])
    def test_nothing_said_is_empty(self, text: str) -> None:
        assert tidy(text) == ("", False)

    @pytest.mark.parametrize(
        "caption",
        [
            "a large red circle on a white background",
            "a small blue square to the left of a large green star on a gray background",
        ],
    )
    def test_a_demonstration_caption_stays_letter_for_letter(self, caption: str) -> None:
        assert tidy(caption, close=False) == (caption, False)

    async def test_the_chain_closes_only_the_sentences_of_real_models(self) -> None:
        bare = "a large red circle on a white background"
        toy = replace(CAPTIONED, text=bare, model=ModelInfo("toy", "0", demo=True))
        real = replace(CAPTIONED, text=bare)
        policy = ChainPolicy(enhance_by_default=False)
        assert (await ask(Caption(toy), policy=policy)).caption == bare
        assert (await ask(Caption(real), policy=policy)).caption == bare + "."

    @given(st.text(max_size=200) | st.text(alphabet="ab \"'.:\u201c\u201d\n,", max_size=60), st.booleans())
    def test_once_is_enough(self, text: str, close: bool) -> None:
        caption, _ = tidy(text, close=close)
        assert tidy(caption, close=close) == (caption, False)
        assert len(caption.split()) <= MAX_CAPTION_WORDS
        assert unwrap(caption) == caption


class TestAddedTerms:
    @pytest.mark.parametrize(
        ("caption", "enhanced", "terms"),
        [
            pytest.param("A dog.", "A dog.", [], id="nothing"),
            pytest.param("A dog.", "A brown dog sleeps.", ["brown", "sleeps"], id="in order"),
            pytest.param("A dog.", "A wet, wet, WET dog.", ["wet"], id="once"),
            pytest.param("A boy rides.", "Boys riding a ride.", [], id="inflections"),
            pytest.param("Two boxes, berries.", "A box, a berry.", [], id="plurals"),
            pytest.param("A dog runs.", "A running dog stopped.", ["stopped"], id="doubled consonant"),
            pytest.param("A tie, a glass.", "Ties, glasses.", [], id="short and double s"),
            pytest.param("A grey cat.", "A gray cat.", [], id="spelling"),
            pytest.param("A dog.", "The image captures a dog in its setting.", [], id="neutral prose"),
            pytest.param("A dog.", "A dog near Paris.", ["paris"], id="name"),
            pytest.param("A view of Texas.", "Texas.", [], id="name that opens a sentence"),
            pytest.param("Some wood.", "A dog and Mr Woods.", ["dog", "mr", "woods"], id="names exactly"),
            pytest.param("A dog.", "A dog by The Setting.", ["setting"], id="name in spite of the lists"),
            pytest.param("A dog.", "The US, not us.", ["us"], id="acronym that looks like a stop word"),
            pytest.param("A dog.", "3 dogs in 1999, 2.5 m.", ["3", "1999", "2.5", "m"], id="numbers"),
            pytest.param("Two dogs.", "2 dogs, three cats.", ["three", "cats"], id="number words"),
            pytest.param("A star.", "A star-shaped, state-of-the-art star.", ["star-shaped", "state-of-the-art"],
                         id="compounds"),
            pytest.param("A dog's bone.", "The dogs bone.", [], id="possessive"),
            pytest.param("", "", [], id="empty"),
        ],
    )  # fmt: skip
    def test_terms(self, caption: str, enhanced: str, terms: list[str]) -> None:
        assert added_terms(caption, enhanced) == terms

    @given(st.text(max_size=200))
    def test_a_text_adds_nothing_to_itself(self, text: str) -> None:
        assert added_terms(text, text) == []

    @given(st.text(max_size=100), st.text(max_size=200))
    def test_no_repeats(self, caption: str, enhanced: str) -> None:
        terms = added_terms(caption, enhanced)
        assert len(set(terms)) == len(terms)


def test_the_chain_brings_no_http_and_no_torch() -> None:
    code = "import sys, sightline.chain as c; print({'httpx', 'torch', 'kserve', 'fastapi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
