"""A request that nobody waits for takes the places that people leave, at the gateway and at the steps behind it."""

import contextlib

import pytest

from sightline.errors import QueueFull
from sightline.server.caller import context_of
from sightline.server.model import Admission


@pytest.mark.parametrize(
    ("said", "is_batch"),
    [({}, False), ({"x-priority": "batch"}, True), ({"x-priority": " Batch "}, True), ({"x-priority": "high"}, False)],
)
def test_a_caller_says_so(said: dict[str, str], is_batch: bool) -> None:
    class Everybody:
        def principal(self, presented: str | None) -> str:
            return ""

    assert context_of(said, "r", Everybody(), 60, is_open=False).is_batch is is_batch


def test_batches_fill_half_of_a_queue_and_people_all_of_it() -> None:
    admission = Admission(4)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(admission.admit(1, is_batch=True))
        with pytest.raises(QueueFull) as refused, admission.admit(1, is_batch=True):
            pass
        assert (refused.value.retry_after or 0) >= 1
        for _ in range(2):
            stack.enter_context(admission.admit(1))
        with pytest.raises(QueueFull), admission.admit(1):
            pass
    with admission.admit(1, is_batch=True):
        pass


def test_people_who_wait_leave_no_place_to_batches() -> None:
    admission = Admission(4)
    with admission.admit(3), pytest.raises(QueueFull), admission.admit(1, is_batch=True):
        pass


@pytest.mark.parametrize("items", [1, 9])
def test_an_idle_server_takes_a_batch_request_of_any_size(items: int) -> None:
    with Admission(1).admit(items, is_batch=True):
        pass
