"""Harmony by token ids: what of an answer is meant for the user, and that reasoning never is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.models.gpt_oss.harmony import Answer, HarmonyTokens, parse

START, END, MESSAGE, CHANNEL, RETURN, CALL = 1, 2, 3, 4, 5, 6
CONSTRAIN = 7
"""A control token of the format that separates nothing."""
FINAL, ANALYSIS, COMMENTARY, ASSISTANT = (10, 11), (12,), (13,), (14,)
"""Plain ids; here the word `final` takes two."""

TOKENS = HarmonyTokens(start=START, end=END, message=MESSAGE, channel=CHANNEL, return_=RETURN, call=CALL, final=FINAL)

THOUGHT = (1001, 1002, 1003)
ANSWER = (101, 102)


def said(channel: tuple[int, ...], text: tuple[int, ...], *ending: int) -> tuple[int, ...]:
    return (CHANNEL, *channel, MESSAGE, *text, *ending)


NEXT = (END, START, *ASSISTANT)
"""Ends a message and begins another turn of the assistant."""


@pytest.mark.parametrize(
    ("ids", "final", "is_complete"),
    [
        pytest.param((), None, False, id="nothing"),
        pytest.param(THOUGHT, None, False, id="text outside of any channel"),
        pytest.param((MESSAGE, *THOUGHT, RETURN), None, False, id="message of no channel"),
        pytest.param(said(FINAL, ANSWER, RETURN), ANSWER, True, id="final alone"),
        pytest.param(
            said(ANALYSIS, THOUGHT, *NEXT) + said(FINAL, ANSWER, RETURN), ANSWER, True, id="analysis, then final"
        ),
        pytest.param(said(ANALYSIS, THOUGHT, *NEXT) + said(FINAL, ANSWER, END), ANSWER, True, id="final ended by end"),
        pytest.param(said(ANALYSIS, THOUGHT), None, False, id="cut inside the analysis"),
        pytest.param(said(ANALYSIS, THOUGHT, RETURN), None, False, id="analysis only"),
        pytest.param(said(ANALYSIS, THOUGHT, *NEXT), None, False, id="cut after the analysis"),
        pytest.param((*said(ANALYSIS, THOUGHT, *NEXT), CHANNEL), None, False, id="cut inside a header"),
        pytest.param((*said(ANALYSIS, THOUGHT, *NEXT), CHANNEL, *FINAL), None, False, id="cut before message"),
        pytest.param(said(ANALYSIS, THOUGHT, *NEXT) + said(FINAL, ()), (), False, id="cut after message"),
        pytest.param(said(FINAL, ANSWER), ANSWER, False, id="cut inside the final"),
        pytest.param(
            said(FINAL, ANSWER, *NEXT) + said(FINAL, (100,), RETURN), ANSWER, True, id="several finals: the first"
        ),
        pytest.param(
            said(FINAL, (), *NEXT) + said(FINAL, ANSWER),
            ANSWER,
            False,
            id="several finals: the first that is not empty",
        ),
        pytest.param(
            said(FINAL, ANSWER, *NEXT) + said(ANALYSIS, THOUGHT, RETURN), ANSWER, True, id="thoughts after the final"
        ),
        pytest.param(
            said(COMMENTARY, THOUGHT, CALL, START, *ASSISTANT) + said(FINAL, ANSWER, RETURN),
            ANSWER,
            True,
            id="commentary, then final",
        ),
        pytest.param(said(COMMENTARY, THOUGHT, CALL), None, False, id="a call only"),
        pytest.param(said((*FINAL, CONSTRAIN, 20), ANSWER, RETURN), ANSWER, True, id="final with a constrained format"),
        pytest.param(said(FINAL[:1], THOUGHT, RETURN), None, False, id="half of the word final"),
        pytest.param(
            said(ANALYSIS, (*THOUGHT, *FINAL, 1004), RETURN), None, False, id="the analysis says the word final"
        ),
        pytest.param(
            said(ANALYSIS, (1001, CHANNEL, *FINAL, MESSAGE, 1002), RETURN),
            None,
            False,
            id="the analysis holds a whole final header",
        ),
        pytest.param(
            said(ANALYSIS, (1001, MESSAGE, 1002), *NEXT) + said(FINAL, ANSWER, RETURN),
            ANSWER,
            True,
            id="the analysis holds a message token",
        ),
        pytest.param(
            (CHANNEL, *ANALYSIS, *NEXT, *said(FINAL, ANSWER, RETURN)), ANSWER, True, id="a channel without a message"
        ),
        pytest.param(
            (CHANNEL, *FINAL, *NEXT, *said(ANALYSIS, THOUGHT, RETURN)),
            None,
            False,
            id="a final channel without a message, then thoughts",
        ),
        pytest.param(
            (CHANNEL, *FINAL, *said(ANALYSIS, THOUGHT, RETURN)), None, False, id="a final header broken by an analysis"
        ),
        pytest.param((CHANNEL, CHANNEL, *said(FINAL, ANSWER, RETURN)), ANSWER, True, id="channel upon channel"),
        pytest.param(
            said(FINAL, ANSWER) + said(ANALYSIS, THOUGHT, RETURN), ANSWER, False, id="thoughts in an unended final"
        ),
        pytest.param(said(FINAL, (*ANSWER, MESSAGE, 1001), RETURN), ANSWER, False, id="a message token in the final"),
        pytest.param(said(FINAL, ANSWER, RETURN) + THOUGHT, ANSWER, True, id="text behind the end"),
    ],
)
def test_the_final_message_is(ids: tuple[int, ...], final: tuple[int, ...] | None, is_complete: bool) -> None:
    answer = parse(ids, TOKENS)

    assert answer.final == final
    assert answer.is_complete == is_complete


def test_all_but_the_final_text_counts_as_reasoning() -> None:
    ids = said(ANALYSIS, THOUGHT, *NEXT) + said(FINAL, ANSWER, RETURN)

    assert parse(ids, TOKENS) == Answer(ANSWER, is_complete=True, reasoning_tokens=len(ids) - len(ANSWER))


def test_without_a_final_message_all_is_reasoning() -> None:
    ids = said(ANALYSIS, THOUGHT)

    assert parse(ids, TOKENS).reasoning_tokens == len(ids)


thoughts = st.lists(st.integers(1000, 1009), max_size=4).map(tuple)
answers = st.lists(st.integers(100, 109), max_size=4).map(tuple)
endings = st.sampled_from([(), (END,), (RETURN,), (CALL,), (START,), NEXT, (END, START)])


@st.composite
def segments(draw: st.DrawFn) -> tuple[int, ...]:
    """A message, well-formed or not; ids of 1000 and more are in no message of the final channel."""
    kind = draw(st.sampled_from(["thought", "answer", "header only", "stray thought"]))
    other = draw(st.sampled_from([ANALYSIS, COMMENTARY, (), FINAL[:1], (*ANALYSIS, *FINAL)]))
    if kind == "thought":
        return said(other, draw(thoughts), *draw(endings))
    if kind == "answer":
        return said(FINAL, draw(answers), *draw(endings))
    if kind == "header only":
        return (CHANNEL, *draw(st.sampled_from([other, FINAL])), *draw(endings))
    return (draw(st.sampled_from([END, RETURN, CALL, START])), *draw(thoughts), *draw(endings))


@given(st.lists(segments(), max_size=6), st.integers(0, 60))
def test_thoughts_never_reach_the_answer(parts: list[tuple[int, ...]], cut: int) -> None:
    ids = tuple(token for part in parts for token in part)[:cut]

    answer = parse(ids, TOKENS)

    assert all(100 <= token < 110 for token in answer.final or ())
    assert answer.reasoning_tokens + len(answer.final or ()) == len(ids)


@given(st.lists(st.integers(1, 20), max_size=40).map(tuple))
def test_any_ids_at_all_give_a_piece_without_control_tokens(ids: tuple[int, ...]) -> None:
    answer = parse(ids, TOKENS)

    if answer.final is None:
        assert not answer.is_complete
    else:
        assert not set(answer.final) & {START, END, MESSAGE, CHANNEL, RETURN, CALL}
        assert any(
            ids[at : at + len(answer.final)] == answer.final and ids[at - 1] == MESSAGE for at in range(1, len(ids) + 1)
        )
