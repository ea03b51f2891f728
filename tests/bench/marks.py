"""What an operator under tests/bench/operators.py writes down: which object it began to look at, and when.

A process of its own can't be asked from outside when it starts to work; everything else is measured there.
"""

import os
import time
from collections.abc import Mapping
from functools import cache
from typing import Any, TextIO

VARIABLE = "BENCH_MARKS"
"""Names the file; on Linux all processes share the monotonic clock of its lines."""


def mark(metadata: Mapping[str, Any]) -> None:
    """A reconcile, or a handler, starts now for this generation of an object."""
    if os.environ.get(VARIABLE):
        print(time.monotonic(), metadata["name"], metadata["generation"], file=_file(), flush=True)


def read(path: str | os.PathLike[str]) -> dict[tuple[str, int], float]:
    """When each generation of each object was looked at first."""
    first: dict[tuple[str, int], float] = {}
    with open(path) as lines:
        for line in lines:
            when, name, generation = line.split()
            first.setdefault((name, int(generation)), float(when))
    return first


@cache
def _file() -> TextIO:
    return open(os.environ[VARIABLE], "a")  # as long as the process lives
