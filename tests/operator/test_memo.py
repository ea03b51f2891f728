"""What is remembered of a pure function is what it would say again, and rendering reads no more than it is asked by."""

from typing import Any

import pytest
from hypothesis import given

from sightline_operator.decide.pipeline import rendering
from sightline_operator.memo import Memo
from sightline_operator.render import OPTIONAL_KINDS, RenderSettings, render_pipeline
from tests.operator.rendering import owned
from tests.operator.specs import PIPELINES
from tests.operator.test_render_properties import EXAMPLES


def test_the_same_question_is_answered_once() -> None:
    asked: list[Any] = []
    memo = Memo(lambda *question: asked.append(question) or len(asked), size=2)
    assert [memo({"a": 1}, frozenset({"x"})), memo({"a": 1}, frozenset({"x"})), memo({"a": 2}, frozenset())] == [
        1,
        1,
        2,
    ]
    assert memo({"a": 1}, frozenset({"x"})) == 1
    memo("third")
    assert memo({"a": 2}, frozenset()) == 4, "of two, what was asked longest ago is forgotten"


def test_what_it_raises_is_raised_again() -> None:
    def inverse(value: int) -> float:
        return 1 / value

    memo = Memo(inverse)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            memo(0)


@EXAMPLES
@given(cr=PIPELINES)
def testrendering_reads_nothing_else_of_an_object(cr: dict[str, Any]) -> None:
    whole = owned(cr) | {
        "status": {"renderVersion": 1, "images": {"describe": "mine:1"}, "observedGeneration": 3, "url": "x"}
    }
    whole["metadata"] |= {"generation": 3, "labels": {"team": "a"}}
    settings = RenderSettings()
    assert render_pipeline(rendering(whole), settings, OPTIONAL_KINDS) == render_pipeline(
        whole, settings, OPTIONAL_KINDS
    )
