"""The queue that serves clients in turn."""

from hypothesis import given
from hypothesis import strategies as st

from sightline.engines.fair import FairQueue


def filled(*items: str) -> FairQueue[str]:
    """Each item's client is its first letter."""
    queue: FairQueue[str] = FairQueue()
    for item in items:
        queue.push(item[0], item)
    return queue


def test_one_client_is_served_in_its_order() -> None:
    assert filled("a1", "a2", "a3").take(lambda item: True) == ["a1", "a2", "a3"]


def test_clients_take_turns() -> None:
    assert filled("a1", "a2", "a3", "b1", "c1", "b2").take(lambda item: True) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_who_was_served_comes_after_the_others_the_next_time() -> None:
    queue = filled("a1", "a2", "b1")
    assert queue.take(lambda item: True if item == "a1" else None) == ["a1"]

    assert queue.take(lambda item: True) == ["b1", "a2"]


def test_what_is_not_accepted_keeps_its_place_and_its_client_the_turn() -> None:
    queue = filled("a1", "a2", "b1")
    assert queue.take(lambda item: item != "a1") == ["b1", "a2"]

    queue.push("b", "b2")
    assert queue.take(lambda item: True) == ["a1", "b2"]


@given(st.lists(st.sampled_from("abc"), max_size=20), st.sets(st.integers(0, 19)))
def test_nothing_is_lost_or_doubled(clients: list[str], gone: set[int]) -> None:
    items = [f"{client}{at}" for at, client in enumerate(clients)]
    queue = filled(*items)

    queue.discard(lambda item: int(item[1:]) in gone)
    left = [item for item in items if int(item[1:]) not in gone]
    assert len(queue) == len(left)
    assert sorted(queue) == sorted(left)

    some = queue.take(lambda item: int(item[1:]) % 2 == 0)
    rest = queue.take(lambda item: True)
    assert sorted(some + rest) == sorted(left)
    assert not len(queue)
    for client in "abc":
        assert [item for item in rest if item[0] == client] == sorted(
            (item for item in rest if item[0] == client), key=lambda item: int(item[1:])
        )


@given(st.integers(1, 30), st.integers(1, 4))
def test_a_heavy_client_keeps_nobody_waiting(heavy: int, others: int) -> None:
    """However much one asks, each other client's first item is among the first, one for each client."""
    queue = filled(*[f"h{at}" for at in range(heavy)], *[f"{'abcd'[at]}0" for at in range(others)])
    taken: list[str] = []

    def accept(item: str) -> bool | None:
        if len(taken) == others + 1:
            return None
        taken.append(item)
        return True

    assert {item[0] for item in queue.take(accept)} == {"h", *"abcd"[:others]}
