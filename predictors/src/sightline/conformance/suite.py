"""What a check is: a function with a stable id, a group and a level, that passes, fails or is skipped with a reason."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sightline.conformance.target import Target

LONGEST_REASON = 240


class Level(StrEnum):
    """Who asks for it.

    MUST       the protocol's text
    EXTENSION  an extension of it that many servers and clients have
    PROMISE    Sightline: what a client can reasonably expect, though no text says so
    """

    MUST = "must"
    EXTENSION = "extension"
    PROMISE = "promise"


class Outcome(StrEnum):
    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"
    SKIP = "skip"


class Failed(Exception):
    """The server does not do what the check asks for; the text says what it did instead."""


class Skipped(Exception):
    """The check does not apply to this server or cannot be made here; the text says why."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    id             stable: `<group>.<what>`
    sentence       what holds when it passes
    is_isolated    its client library must be alone in a process: Triton's and KServe's gRPC messages have the same
                   names, and protobuf takes each name once
    is_intrusive   may harm the server; runs last and only when asked for
    """

    id: str
    group: str
    level: Level
    sentence: str
    function: "Callable[[Target], Awaitable[None] | None]" = field(repr=False)
    is_isolated: bool = False
    is_intrusive: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a check; `reason` is empty when it passed."""

    id: str
    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0


class Group:
    """Checks that belong together; use `check` as a decorator."""

    def __init__(self, key: str, title: str, *, is_isolated: bool = False) -> None:
        self.key = key
        self.title = title
        self.is_isolated = is_isolated
        self.checks: list[Check] = []

    def check(
        self, name: str, level: Level, *, is_intrusive: bool = False
    ) -> "Callable[[Callable[[Target], Awaitable[None] | None]], Callable[[Target], Awaitable[None] | None]]":
        """Register a function; the first line of its docstring is the sentence."""

        def register(
            function: "Callable[[Target], Awaitable[None] | None]",
        ) -> "Callable[[Target], Awaitable[None] | None]":
            sentence = (inspect.getdoc(function) or "").partition("\n")[0]
            self.checks.append(
                Check(f"{self.key}.{name}", self.title, level, sentence, function, self.is_isolated, is_intrusive)
            )
            return function

        return register


def expect(condition: object, reason: str) -> None:
    """Raise Failed with the reason unless the condition holds."""
    if not condition:
        raise Failed(reason)


def run_here(checks: Iterable[Check], target: "Target") -> list[Result]:
    """Run checks in this process, one after the other."""
    return [_run(check, target) for check in checks]


def _run(check: Check, target: "Target") -> Result:
    started = time.monotonic()
    try:
        pending = check.function(target)
        if inspect.iscoroutine(pending):
            asyncio.run(pending)
        outcome, reason = Outcome.PASS, ""
    except Skipped as skipped:
        outcome, reason = Outcome.SKIP, str(skipped)
    except Failed as failed:
        outcome, reason = Outcome.FAIL, str(failed)
    except ImportError as error:
        outcome = Outcome.SKIP
        reason = f"{error.name or error} is not installed; it is in the extra sightline[conformance]"
    except Exception as error:  # a client library gave up: that is the finding, in its words
        outcome, reason = Outcome.FAIL, f"{type(error).__name__}: {error}"
    return Result(check.id, outcome, shortened(reason), round(time.monotonic() - started, 3))


def shortened(text: str) -> str:
    """One printable line of bounded length."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 1] + "…"
