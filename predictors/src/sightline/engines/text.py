"""Token ids to text while they are made: whole characters, no stop sequence, nothing that would be stripped later."""

from collections.abc import Callable, Sequence

from sightline.engines.base import TextReader

_HALF = "\ufffd"
"""What a decoder writes for the first bytes of a character whose last ones are still to come."""


class Detokenizer:
    """Decodes one answer token by token; see `engines.base.TextReader`.

    decode  token ids → text, control tokens left out. More tokens may only lengthen its text, but for a character whose
            last bytes are missing; true of byte-level vocabularies

    Only the last few tokens are decoded again for a new one, so that the whole costs linear time; those before the new
    one are decoded with it because some vocabularies write a word's leading space only inside a text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._told_tokens = 0
        self._told_text = ""
        self._has_begun = False

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_HALF) or len(text) <= len(self._told_text):
            return ""
        new = text[len(self._told_text) :]
        self._window = self._window[self._told_tokens :]
        self._told_tokens = len(self._window)
        self._told_text = self._decode(self._window)
        if not self._has_begun:
            new = new.lstrip()
            self._has_begun = bool(new)
        return new


class Pieces:
    """The text of one answer as it may be shown: what may belong to a stop sequence or be stripped is held back.

    stop  the answer ends before the first occurrence of any of these
    """

    def __init__(self, reader: TextReader, stop: Sequence[str] = ()) -> None:
        self._reader = reader
        self._stop = stop
        self._held = ""
        self.stopped_at: str | None = None
        self.tokens = 0

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that is certain with these tokens. After a stop sequence tokens are neither read nor counted."""
        shown = ""
        for token_id in token_ids:
            if self.stopped_at is not None:
                break
            self.tokens += 1
            shown += self._next(self._held + self._reader.push(token_id))
        return shown

    def _next(self, text: str) -> str:
        found = min((at, stop) for stop in self._stop if (at := text.find(stop)) >= 0) if self._finds(text) else None
        if found is not None:
            at, self.stopped_at = found
            self._held = ""
            return text[:at].rstrip()
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        shown = text[: len(text) - held].rstrip()
        self._held = text[len(shown) :]
        return shown

    def _finds(self, text: str) -> bool:
        return any(stop in text for stop in self._stop)


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop sequence."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
