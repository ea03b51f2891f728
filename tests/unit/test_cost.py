"""The measured cost of batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.engines.cost import ENOUGH, Cost, Line


def measured(*points: tuple[float, float]) -> Line:
    line = Line()
    line.add(1, 1e6)  # what is done once does not count
    for amount, seconds in points:
        line.add(amount, seconds)
    return line


@given(st.floats(0, 10), st.floats(0, 1))
def test_a_line_is_found(fixed: float, each: float) -> None:
    line = measured(*[(amount, fixed + each * amount) for amount in (1, 4, 9, 2, 30, 7, 12, 5, 40, 3)])

    assert line.fixed == pytest.approx(fixed, abs=1e-5)
    assert line.of(100) == pytest.approx(fixed + 100 * each, rel=1e-4, abs=1e-4)


def test_nothing_is_predicted_from_few_measurements() -> None:
    assert measured(*[(1, 5.0)] * (ENOUGH - 1)).of(1) == 0
    assert measured(*[(1, 5.0)] * ENOUGH).of(1) == pytest.approx(5)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=30), st.floats(0, 1000))
def test_a_prediction_is_never_negative(points: list[tuple[float, float]], amount: float) -> None:
    assert measured(*points).of(amount) >= 0


def test_what_was_long_ago_is_forgotten() -> None:
    slow, fast = [(amount % 7, 10.0 + amount % 7) for amount in range(50)], [(amount % 7, 1.0) for amount in range(300)]

    assert measured(*slow, *fast).of(3) == pytest.approx(1, abs=0.05)


def test_a_request_is_refused_only_when_it_is_far_from_possible() -> None:
    cost = Cost()
    for _ in range(20):
        cost.prefill.add(100, 2.0)
        cost.step.add(1, 0.1)
        cost.answered(20)

    assert cost.can_answer(100, most=1000, seconds=3)  # 2 + 20 * 0.1 = 4 is expected; it may be the machine's bad hour
    assert not cost.can_answer(100, most=1000, seconds=1.5)
    assert cost.can_answer(100, most=1, seconds=1.5)


def test_a_stop_is_known_once_few_prompts_can_be_told_from_many() -> None:
    cost = Cost()
    for _ in range(20):
        cost.prefill.add(100, 3.0)
    assert cost.stop == 0

    for _ in range(20):
        cost.prefill.add(300, 5.0)
    assert cost.stop == pytest.approx(2, rel=0.01)


def test_without_measurements_nobody_is_refused() -> None:
    assert Cost().can_answer(10**9, most=10**6, seconds=0.001)
    assert Cost().can_compute(10**9, seconds=0.001)
