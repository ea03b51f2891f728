"""The harmony format, read by token ids: which part of an answer is meant for the user.

    <|channel|>analysis<|message|> … <|end|><|start|>assistant<|channel|>final<|message|> … <|return|>

The ids decide, never decoded text: an answer that talks about channels must not fool the parser, and reasoning must
never leak into the answer. Needs no network (`openai_harmony` fetches its vocabulary at first use).
Source: https://cookbook.openai.com/articles/openai-harmony
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class HarmonyTokens:
    """Ids of the control tokens, and the ids that the word `final` encodes to."""

    start: int
    end: int
    message: int
    channel: int
    return_: int
    call: int
    final: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found.

    final             ids of the first final message that says something, control tokens excluded; None without any
    is_complete       whether the final message was ended by the model itself
    reasoning_tokens  how many generated tokens are not part of the final message
    """

    final: tuple[int, ...] | None
    is_complete: bool
    reasoning_tokens: int


class Reader:
    """Reads generated ids one by one (the prompt ended in `<|start|>assistant`).

    The answer is the first final message that holds anything, so that what was streamed is never taken back.
    """

    def __init__(self, tokens: HarmonyTokens) -> None:
        self._tokens = tokens
        self._endings = {tokens.start, tokens.end, tokens.return_, tokens.call}
        self._control = self._endings | {tokens.channel, tokens.message}
        self._place: Literal["between", "header", "other", "final"] = "between"
        self._header: list[int] = []
        self.final: list[int] | None = None
        self.is_complete = False

    def push(self, token_id: int) -> bool:
        """Take the next id; True when it is part of the answer."""
        if self._place == "final" and token_id not in self._control:
            assert self.final is not None  # noqa: S101 - entering the message made it
            self.final.append(token_id)
            return True
        if self._place == "final":
            # A header inside a final message ends it; one inside any other message is part of that message. So a
            # model that forgets to end its messages may lose an answer, but never shows its reasoning.
            self.is_complete = token_id in {self._tokens.return_, self._tokens.end}
            self._place = "between"
        if self._place == "header":
            self._read_header(token_id)
        elif self._place == "other" and token_id in self._endings:
            self._place = "between"
        elif self._place == "between" and token_id == self._tokens.channel:
            self._place, self._header = "header", []
        return False

    def _read_header(self, token_id: int) -> None:
        if token_id not in self._control:
            self._header.append(token_id)
        elif token_id == self._tokens.channel:
            self._header = []  # a header without a message must not lend its name to the next one
        elif token_id != self._tokens.message:
            self._place = "between"
        elif tuple(self._header[: len(self._tokens.final)]) != self._tokens.final or self.final:
            self._place = "other"
        else:
            self._place, self.final, self.is_complete = "final", [], False


def parse(ids: Sequence[int], tokens: HarmonyTokens) -> Answer:
    """Find the final message in generated ids."""
    reader = Reader(tokens)
    for token_id in ids:
        reader.push(token_id)
    final = None if reader.final is None else tuple(reader.final)
    return Answer(final, reader.is_complete, len(ids) - len(final or ()))
