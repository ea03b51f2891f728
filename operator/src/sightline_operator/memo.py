"""Remembers what a pure function answered last: one object is looked at several times while it comes to rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import orjson

P = ParamSpec("P")
T = TypeVar("T")
SIZE = 64
"""Answers kept: some for each object that is being worked on."""


class Memo(Generic[P, T]):
    """The same function, called once for the same question; its answers are shared, so nobody changes them.

    function   of JSON values, sets and dataclasses, told by position; what it raises is not remembered
    """

    def __init__(self, function: Callable[P, T], size: int = SIZE) -> None:
        self._function, self._size = function, size
        self._known: OrderedDict[bytes, T] = OrderedDict()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        question = orjson.dumps((args, kwargs), default=sorted)
        if question not in self._known:
            self._known[question] = self._function(*args, **kwargs)
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        self._known.move_to_end(question)
        return self._known[question]
