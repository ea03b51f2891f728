"""Caption, then enhance: one image, one or two models, one deadline, every call injected.

    image, ChainOptions ──caption──▶ tidy ──enhance?──▶ ChainResult

What goes wrong in the caption step is the caller's error. What goes wrong in the enhance step is
not: the caption is there, so it is returned with the reason, unless the caller asked for `strict`.
`run` gives the end; `stream` gives the caption and the pieces of its enhancement as they come, and
then the same end. Nothing here does I/O, and cancelling either cancels the step that is running.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from sightline.errors import (
    DeadlineExceeded,
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
    ReasoningLevel,
    Sampling,
    Usage,
)

logger = logging.getLogger(__name__)

MAX_CAPTION_WORDS = 50
"""Contract D8."""

CaptionStep = Callable[[ImageBytes, str, Sampling, Context], Awaitable[Completion]]
"""Image, prompt, sampling, context → a description. Keeps to the deadline of its context."""

EnhanceStep = Callable[[str, ReasoningLevel, Sampling, Context], Awaitable[Completion]]
"""Caption, level, sampling, context → fuller prose. Keeps to the deadline of its context."""

EnhanceStream = Callable[[str, ReasoningLevel, Sampling, Context], AsyncGenerator[str | Completion]]
"""The same in pieces, then the whole; the whole alone where a step cannot stream."""

_CAPTION_SAMPLING = Sampling(max_tokens=128)
_ENHANCE_SAMPLING = Sampling(max_tokens=1024)


@dataclass(frozen=True, slots=True)
class ChainPolicy:
    """What a pipeline does when a request does not say.

    enhance_by_default       whether a request that says nothing is enhanced
    strict_by_default        whether a missing enhancement is an error then
    level                    reasoning effort of such a request
    caption_prompt           of a request with neither prompt nor preset; None: contract D7
    caption_timeout_seconds  what the caption step gets at most; None: all of the deadline
    enhance_timeout_seconds  what the enhance step gets at most
    enhance_min_seconds      what must be left of the deadline, or nothing is enhanced
    reserve_seconds          what it must leave of the deadline, so that the caption still reaches
                             the caller in time
    """

    enhance_by_default: bool = True
    strict_by_default: bool = False
    level: ReasoningLevel = "low"
    caption_prompt: str | None = None
    caption_timeout_seconds: float | None = None
    enhance_timeout_seconds: float = 60
    enhance_min_seconds: float = 0
    reserve_seconds: float = 0.5
    caption_sampling: Sampling = _CAPTION_SAMPLING
    enhance_sampling: Sampling = _ENHANCE_SAMPLING


@dataclass(frozen=True, slots=True)
class ChainOptions:
    """What is asked about one image.

    prompt            None: that of the preset
    preset            a name of PRESETS; None: contract D7 when `detailed`, else one short sentence
    enhance           True forces, False skips, None leaves it to the policy
    strict            no enhancement where one was wanted is an error, not a bare caption; None leaves it to the policy
    explain           tell which terms the enhancement added
    caption_sampling  None: the policy's
    enhance_sampling  None: the policy's
    """

    prompt: str | None = None
    preset: str | None = None
    detailed: bool = True
    enhance: bool | None = None
    level: ReasoningLevel | None = None
    strict: bool | None = None
    explain: bool = False
    caption_sampling: Sampling | None = None
    enhance_sampling: Sampling | None = None

    @property
    def words(self) -> str:
        """The prompt of the caption step."""
        if self.prompt is not None:
            return self.prompt
        if self.preset is not None:
            return PRESETS[self.preset]
        return CREATIVE_SEARCH_PROMPT if self.detailed else SHORT_PROMPT

    @property
    def is_caption(self) -> bool:
        """Whether the answer is to be one caption (contract D8), not a longer text or a list."""
        return self.prompt is not None or self.preset not in _NO_CAPTIONS


_NO_CAPTIONS = frozenset({"detailed", "product", "tags"})


@dataclass(frozen=True, slots=True)
class StepReport:
    """Who did one step, how long it took by its own clock, and what it cost in tokens."""

    name: str
    model: str
    revision: str
    milliseconds: float
    prompt_tokens: int
    completion_tokens: int
    image_tokens: int | None
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class EnhancementFault:
    """Why a wanted enhancement is missing: a stable code, and a sentence."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class ChainResult:
    """The answer of one chain.

    caption            the enhanced text where there is one, else the caption
    original_caption   the caption behind an enhanced text, else None
    enhancement_error  why a wanted enhancement is missing, else None
    truncated          a text was cut, by us at 50 words or by its model's max_tokens
    downscaled         the caption step saw the image at half its pixels, for lack of memory
    steps              one report for each step that answered, in order
    added_terms        terms that the enhancement added; None when nobody asked
    model              the model of the caption step
    demo               one of the models is a demonstration model
    """

    caption: str
    original_caption: str | None
    enhanced: bool
    enhancement_error: EnhancementFault | None
    truncated: bool
    steps: tuple[StepReport, ...]
    added_terms: tuple[str, ...] | None
    model: ModelInfo
    demo: bool
    downscaled: bool = False


async def run(
    image: ImageBytes,
    options: ChainOptions,
    context: Context,
    *,
    caption: CaptionStep,
    enhance: EnhanceStep | None,
    policy: ChainPolicy,
) -> ChainResult:
    """Caption one image and, where wanted, enhance the caption.

    Raises what the caption step raises; DeadlineExceeded (504) when it takes too long;
    UpstreamFailed (502, `image_not_seen` or `empty_caption`) when its answer is no description of
    the image; and, only for a `strict` request, Unavailable (503) with the code that would have
    been the `enhancement_error`.
    """
    result = await _captioned(image, options, context, caption, policy)
    if not _is_wanted(options, policy):
        return result
    try:
        with _enhancing(context):
            step, level, sampling, within = _prepared(options, context, enhance, policy)
            async with asyncio.timeout(within.deadline.remaining()):
                prose = await step(result.caption, level, sampling, within)
            return _enhanced(result, prose, options)
    except Unavailable as error:
        return _without(result, error, options, policy)


async def stream(
    image: ImageBytes,
    options: ChainOptions,
    context: Context,
    *,
    caption: CaptionStep,
    enhance: EnhanceStream | None,
    policy: ChainPolicy,
) -> AsyncGenerator[ChainResult | str]:
    """The same as it happens: the result of the caption step, pieces of the enhanced text, and the end result.

    An enhancement that fails half-way ends in a result without it: its pieces are void then. Raises like `run`.
    """
    result = await _captioned(image, options, context, caption, policy)
    yield result
    if not _is_wanted(options, policy):
        yield result
        return
    try:
        with _enhancing(context):
            step, level, sampling, within = _prepared(options, context, enhance, policy)
            prose: Completion | None = None
            async with aclosing(step(result.caption, level, sampling, within)) as pieces:
                while (piece := await _next(pieces, within.deadline)) is not None:
                    if isinstance(piece, str):
                        yield piece
                    else:
                        prose = piece
            if prose is None:
                raise UpstreamFailed("The enhance step ended without its answer.")
            result = _enhanced(result, prose, options)
    except Unavailable as error:
        result = _without(result, error, options, policy)
    yield result


def as_completion(result: ChainResult) -> Completion:
    """A chain as one answer: its last text, and the tokens and the time of all its steps together."""
    seen = [step.image_tokens for step in result.steps if step.image_tokens is not None]
    return Completion(
        text=result.caption,
        finish_reason="length" if result.truncated else "stop",
        usage=Usage(
            prompt_tokens=sum(step.prompt_tokens for step in result.steps),
            completion_tokens=sum(step.completion_tokens for step in result.steps),
            image_tokens=sum(seen) if result.steps[0].image_tokens is not None else None,
            reasoning_tokens=sum(step.reasoning_tokens for step in result.steps),
        ),
        model=replace(result.model, demo=result.demo),
        milliseconds=round(sum(step.milliseconds for step in result.steps), 1),
        downscaled=result.downscaled,
    )


def _is_wanted(options: ChainOptions, policy: ChainPolicy) -> bool:
    return policy.enhance_by_default if options.enhance is None else options.enhance


async def _captioned(
    image: ImageBytes, options: ChainOptions, context: Context, step: CaptionStep, policy: ChainPolicy
) -> ChainResult:
    """The result as it is when nothing is enhanced."""
    context.deadline.check()
    if policy.caption_timeout_seconds is not None:
        seconds = min(policy.caption_timeout_seconds, context.deadline.remaining())
        context = replace(context, deadline=Deadline.after(seconds))
    is_silent = options.prompt is None and options.preset is None
    words = policy.caption_prompt if is_silent and policy.caption_prompt is not None else options.words
    try:
        async with asyncio.timeout(context.deadline.remaining()):
            described = await step(image, words, options.caption_sampling or policy.caption_sampling, context)
    except TimeoutError as error:
        raise DeadlineExceeded("The caption step did not answer before the deadline.") from error
    if described.usage.image_tokens is not None and described.usage.image_tokens <= 0:
        raise UpstreamFailed("The caption step did not show that its model saw the image.", code="image_not_seen")
    text, is_cut = tidy(
        described.text,
        close=not described.model.demo and options.preset != "tags",
        max_words=MAX_CAPTION_WORDS if options.is_caption else None,
    )
    if not text:
        raise UpstreamFailed("The caption step answered with an empty caption.", code="empty_caption")
    return ChainResult(
        caption=text,
        original_caption=None,
        enhanced=False,
        enhancement_error=None,
        truncated=is_cut or described.finish_reason == "length",
        steps=(_report("caption", described),),
        added_terms=() if options.explain else None,
        model=described.model,
        demo=described.model.demo,
        downscaled=described.downscaled,
    )


Step = TypeVar("Step")


def _prepared(
    options: ChainOptions, context: Context, step: Step | None, policy: ChainPolicy
) -> tuple[Step, ReasoningLevel, Sampling, Context]:
    """The enhance step and what it is asked, with what may be spent of the deadline. Raises Unavailable (503)."""
    if step is None:
        raise _NotAnswered("This pipeline has no enhance step.", code="enhancer_not_configured")
    seconds = min(policy.enhance_timeout_seconds, context.deadline.remaining() - policy.reserve_seconds)
    if seconds <= 0 or context.deadline.remaining() < policy.enhance_min_seconds:
        raise _too_slow()
    within = replace(context, deadline=Deadline.after(seconds))
    return step, options.level or policy.level, options.enhance_sampling or policy.enhance_sampling, within


@contextmanager
def _enhancing(context: Context) -> Generator[None]:
    """Whatever goes wrong is Unavailable (503), the reason its code."""
    try:
        yield
    except (TimeoutError, DeadlineExceeded) as error:
        raise _too_slow() from error
    except _NotAnswered:
        raise
    except SightlineError as error:
        logger.warning("enhance step code=%s request_id=%s: %s", error.code, context.request_id, error.message)
        raise _as_unavailable(error) from error
    except Exception as error:  # a bug in the client of a step must not cost the caption either
        logger.exception("enhance step failed unexpectedly request_id=%s", context.request_id)
        raise _NotAnswered("The enhancer failed.", code="enhancer_failed") from error


class _NotAnswered(Unavailable):
    """Unavailable with a reason that is the chain's own, and so needs no translation."""


async def _next(pieces: AsyncGenerator[str | Completion], deadline: Deadline) -> str | Completion | None:
    async with asyncio.timeout(deadline.remaining()):
        return await anext(pieces, None)


def _enhanced(result: ChainResult, prose: Completion, options: ChainOptions) -> ChainResult:
    """Raises Unavailable (503) when there is nothing in it."""
    text = unwrap(prose.text)
    if not text:
        raise _NotAnswered("The enhancer gave no final answer.", code="no_final_answer")
    return replace(
        result,
        caption=text,
        original_caption=result.caption,
        enhanced=True,
        truncated=result.truncated or prose.finish_reason == "length",
        steps=(*result.steps, _report("enhance", prose)),
        added_terms=tuple(added_terms(result.caption, text)) if options.explain else None,
        demo=result.demo or prose.model.demo,
    )


def _without(result: ChainResult, error: Unavailable, options: ChainOptions, policy: ChainPolicy) -> ChainResult:
    """The caption alone, with the reason. Raises the error when that is not enough."""
    if policy.strict_by_default if options.strict is None else options.strict:
        raise error
    return replace(result, enhancement_error=EnhancementFault(error.code, error.message))


def _too_slow() -> _NotAnswered:
    return _NotAnswered("The enhancer did not answer in time.", code="enhancer_timeout")


def _as_unavailable(error: SightlineError) -> _NotAnswered:
    if error.code == "no_final_answer":
        return _NotAnswered(error.message, code=error.code)
    if isinstance(error, Unavailable | QueueFull):
        return _NotAnswered(
            "The enhancer is not available now.",
            code="enhancer_unavailable",
            retry_after=error.retry_after,
        )
    return _NotAnswered("The enhancer failed.", code="enhancer_failed")


def _report(name: str, completion: Completion) -> StepReport:
    return StepReport(
        name=name,
        model=completion.model.name,
        revision=completion.model.revision,
        milliseconds=completion.milliseconds,
        prompt_tokens=completion.usage.prompt_tokens,
        completion_tokens=completion.usage.completion_tokens,
        image_tokens=completion.usage.image_tokens,
        reasoning_tokens=completion.usage.reasoning_tokens,
    )


# --- cosmetics: contract D8 ------------------------------------------------------------

_ROLE = re.compile(
    r"""^[\s*_#>-]*
        (?: (?:assistant|caption|image\ caption|description|answer|response|output)[\s*_]*[:\uff1a]
          | assistant[*_]*\n
          | (?:sure[,!.]?\s+)?here(?:\ is|['\u2019]s)\s[^:.\n]{1,60}:
        )[\s*_]*""",
    re.IGNORECASE | re.VERBOSE,
)
"""What chat models write before the sentence that was asked for.

A role word counts only with its colon: `Caption contest winners on a stage` is a caption.
"""

_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb"}
_APOSTROPHE = re.compile(r"(?<=\w)['\u2019](?=\w)")
_END_MARKS = tuple(".!?\u2026\u3002\uff01\uff1f")
_CLOSERS = "\"'\u201d\u2019\u00bb)]"


def tidy(caption: str, *, close: bool = True, max_words: int | None = MAX_CAPTION_WORDS) -> tuple[str, bool]:
    """A model's words as one caption: bare, on one line, at most 50 words, closed by a full stop.

    close      add the end mark that a sentence needs. Off for demonstration models, whose captions
               are exact strings without one, compared word for word with the scene that they
               describe.
    max_words  None: not a caption, but a text of any length
    returns    the caption, empty when the text holds neither letter nor digit, and whether words were
               cut
    """
    words = unwrap(caption).split()
    is_cut = max_words is not None and len(words) > max_words
    text = unwrap(" ".join(words[:max_words]))
    if not any(character.isalnum() for character in text):
        return "", False
    if close and not text.rstrip(_CLOSERS).endswith(_END_MARKS):
        text = text.rstrip(" ,;:-\u2013\u2014") + "."
    return text, is_cut


def unwrap(text: str) -> str:
    """Without leading role words and without quotes around the whole, however they are nested."""
    while True:
        inner = _without_quotes(_ROLE.sub("", text).strip())
        if inner == text:
            return text
        text = inner


def _without_quotes(text: str) -> str:
    """Unwrap `"A dog"`, `"A dog".` and a dangling `"A dog`, but not `"Stop" and "Go"`."""
    closing = _QUOTES.get(text[:1])
    if closing is None:
        return text
    body, end = text[1:], ""
    if body.endswith(_END_MARKS) and body[:-1].endswith(closing):
        body, end = body[:-1], body[-1]
    inside = body.removesuffix(closing)
    rest = _APOSTROPHE.sub("", inside)
    is_one_quotation = closing not in rest and text[0] not in rest
    is_apostrophe = inside == body and text[0] in "'\u2018"  # 'Tis the season
    if not is_one_quotation or is_apostrophe:
        return text
    return (inside if inside.endswith(_END_MARKS) else inside + end).strip()


# --- what an enhancement added: contract D9 --------------------------------------------

_TOKEN = re.compile(r"\d+(?:[.,]\d+)+|[^\W_]+(?:['\u2019-][^\W_]+)*")
_BETWEEN_SENTENCES = re.compile(r"[.!?:\u2026\n]")

_STOP_WORDS = frozenset(
    """
    a about above across after against all along also although an and another any are around as at
    away be because been before behind being below beneath beside between beyond both but by can
    could did do does down during each either else even every few for from had has have having he
    her here hers him his how i if in inside into is it its itself just like many may might more
    most much near no nor not now of off on one onto only or other our out over own per quite rather
    same several she should since so some such than that the their them themselves then there these
    they this those though through throughout to together too toward towards under until up upon us
    very was we were what when where whether which while who whom whose why will with within without
    would yet you your
    """.split()  # noqa: SIM905 - words read as words
)
_NEUTRAL_WORDS = frozenset(
    """
    appear backdrop background capture center centre composition contain create depict detail
    display element evoke feature focal foreground form frame give image impression include lend
    make moment offer overall photo photograph picture place point portray position present scene
    see seen set setting shot show showcase shown single sense surround view viewer visible visual
    """.split()  # noqa: SIM905
)
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        (
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ),
        start=2,
    )
}


def added_terms(caption: str, enhanced: str) -> list[str]:
    """The content words that the caption does not hold: lower-cased, in order, each once.

    Inflections count as one word (`rides`, `riding`, `ride`). Function words and the furniture of
    descriptive prose (`scene`, `captures`, `backdrop`) are no additions. Names and numbers are
    compared as they stand and always told: they are what an enhancer must not invent. English only
    and by rules; a hint for people, not a proof.
    """
    held: set[str] = set()
    for term in _terms(caption):
        held |= {term.text, *term.keys}
    added: list[str] = []
    for term in _terms(enhanced):
        if term.text not in held and not held.issuperset(term.keys):
            added.append(term.text)
            held |= {term.text, *term.keys}
    return added


@dataclass(frozen=True, slots=True)
class _Term:
    """A content word in lower case, and what it is compared by."""

    text: str
    keys: tuple[str, ...]


def _terms(text: str) -> Iterator[_Term]:
    end = None
    for match in _TOKEN.finditer(text):
        word = re.sub(r"['\u2019]s$", "", match[0])
        is_first = end is None or _BETWEEN_SENTENCES.search(text, end, match.start()) is not None
        end = match.end()
        lowered = word.lower()
        if lowered in _NUMBERS or any(character.isdigit() for character in word):
            yield _Term(lowered, (_NUMBERS.get(lowered, lowered),))
        elif _is_name(word, is_first=is_first):
            yield _Term(lowered, (lowered,))
        else:
            parts = [part for part in lowered.split("-") if part not in _STOP_WORDS]
            keys = tuple(key for key in map(_stem, parts) if key not in _NEUTRAL_STEMS)
            if keys:
                yield _Term(lowered, keys)


def _is_name(word: str, *, is_first: bool) -> bool:
    if any(character.isupper() for character in word[1:]):  # BMW, iPhone
        return True
    return word[0].isupper() and not is_first and word.lower() not in _STOP_WORDS


def _stem(word: str) -> str:
    """A key that the plain inflections of an English word share; not a word itself."""
    word = _cut(word, (("ies", "y"), ("sses", "ss"))) or (
        word if word.endswith(("ss", "us", "is")) else _cut(word, (("s", ""),)) or word
    )
    stem = _cut(word, (("ing", ""), ("edly", ""), ("ed", ""), ("ly", "")))
    if stem is not None:
        is_doubled = stem[-1] == stem[-2] and stem[-1] not in "lsz" and not word.endswith("ly")
        word = stem[:-1] if is_doubled else stem  # running, run
    if word.endswith("e") and len(word) > 3:
        word = word[:-1]  # ride, riding; boxe(s), box
    return "gray" if word == "grey" else word


def _cut(word: str, suffixes: tuple[tuple[str, str], ...]) -> str | None:
    """The word with the first fitting suffix replaced; None when none leaves a stem of three letters."""
    for suffix, ending in suffixes:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            return word.removesuffix(suffix) + ending
    return None


_NEUTRAL_STEMS = frozenset(_stem(word) for word in _NEUTRAL_WORDS)
