"""A queue that serves clients in turn, so that one with many requests does not keep the others waiting."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """First come, first served for each client; between clients one item each, round and round."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Item]] = {}  # the client whose turn it is comes first

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Item]:
        for line in self._lines.values():
            yield from line

    def push(self, client: str, item: Item) -> None:
        self._lines.setdefault(client, deque()).append(item)

    def clear(self) -> None:
        self._lines.clear()

    def discard(self, is_gone: Callable[[Item], bool]) -> None:
        """Let go of items, whoever's turn it is."""
        for client, line in list(self._lines.items()):
            kept = deque(item for item in line if not is_gone(item))
            if kept:
                self._lines[client] = kept
            else:
                del self._lines[client]

    def take(self, accept: Callable[[Item], bool | None]) -> list[Item]:
        """Offer items in turn.

        accept  True takes the item and gives the turn to the next client; False leaves it in its place, at the front of
                its line, and its client keeps the turn for the next time; None ends the taking
        """
        taken: list[Item] = []
        passed: dict[str, int] = {}  # items of a client that were not accepted
        round_ = deque(self._lines)
        while round_:
            client = round_.popleft()
            line, at = self._lines[client], passed.get(client, 0)
            if at >= len(line):
                continue
            verdict = accept(line[at])
            if verdict is None:
                break
            if verdict:
                taken.append(line[at])
                del line[at]
                self._lines[client] = self._lines.pop(client)  # behind everybody
            else:
                passed[client] = at + 1
            round_.append(client)
        self._lines = {client: line for client, line in self._lines.items() if line}
        return taken
