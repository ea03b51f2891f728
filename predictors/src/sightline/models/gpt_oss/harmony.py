"""The harmony format, read by token ids: which part of an answer is meant for the user.

    <|channel|>analysis<|message|> … <|end|><|start|>assistant<|channel|>final<|message|> … <|return|>

The ids decide, never decoded text: an answer that talks about channels must not fool the parser, and reasoning must
never leak into the answer. Needs no network (`openai_harmony` fetches its vocabulary at first use).
Source: https://cookbook.openai.com/articles/openai-harmony
"""

from collections.abc import Sequence
from dataclasses import dataclass


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

    final             ids of the last final message, control tokens excluded; None when there is none
    is_complete       whether the final message was ended by the model itself
    reasoning_tokens  how many generated tokens are not part of the final message
    """

    final: tuple[int, ...] | None
    is_complete: bool
    reasoning_tokens: int


def parse(ids: Sequence[int], tokens: HarmonyTokens) -> Answer:
    """Find the final message in generated ids (the prompt ended in `<|start|>assistant`)."""
    final: tuple[int, ...] | None = None
    is_complete = False
    endings = {tokens.start, tokens.end, tokens.return_, tokens.call}
    control = endings | {tokens.channel, tokens.message}
    at = 0
    while at < len(ids):
        if ids[at] != tokens.channel:
            at += 1
            continue
        opened = _index(ids, control, at + 1)
        if opened == len(ids):
            break
        if ids[opened] != tokens.message:  # a header without a message must not lend its name to the next one
            at = opened
            continue
        # A header inside a final message ends it; one inside any other message is part of that message. So a
        # model that forgets to end its messages may lose an answer, but never shows its reasoning.
        is_final = tuple(ids[at + 1 : opened])[: len(tokens.final)] == tokens.final
        closed = _index(ids, control if is_final else endings, opened + 1)
        if is_final:
            final = tuple(ids[opened + 1 : closed])
            is_complete = closed < len(ids) and ids[closed] in {tokens.return_, tokens.end}
        at = closed
    return Answer(final, is_complete, len(ids) - len(final or ()))


def _index(ids: Sequence[int], wanted: set[int], start: int) -> int:
    return next((at for at in range(start, len(ids)) if ids[at] in wanted), len(ids))
