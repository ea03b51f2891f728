"""Reasoning that a server left in an answer, taken out: harmony's channels, `<think>`, and what is left of either.

A server that knows its model puts reasoning into a field of its own, which nobody here reads. One that does not know it
leaves the control tokens in the text, or drops them and leaves the words:

    <|channel|>analysis<|message|>We …<|end|><|start|>assistant<|channel|>final<|message|>A dog runs.<|return|>
    analysisWe …assistantfinalA dog runs.
    <think>We …</think>A dog runs.                       some begin behind the <think>, which their template wrote
"""

import re

_FINAL = re.compile(r"<\|channel\|>\s*final\b(?:(?!<\|channel\|>).)*?<\|message\|>(.*?)(?:<\||\Z)", re.DOTALL)
_FLAT = re.compile(r"(?:assistant)?(?:analysis|commentary)(?=[A-Z\"'\u201c]).*?(?:assistantfinal(.*)|\Z)", re.DOTALL)
_BARE_FINAL = re.compile(r"(?:assistant)?final(?=[A-Z\"'\u201c])")
_MARKS = ("<|", "<think", "assistant", "analysis", "commentary", "final")


def final_of(text: str) -> str:
    """The answer without the reasoning around it; empty when there is nothing else."""
    text = text.strip()
    if "<|" in text:
        finals = _FINAL.findall(text)
        if finals:
            return next((final.strip() for final in finals if final.strip()), "")
        return "" if "<|channel|>" in text else text.partition("<|")[0].strip()
    if "</think>" in text:
        return text.rpartition("</think>")[2].strip()
    if text.startswith("<think"):
        return ""
    if flat := _FLAT.fullmatch(text):
        return (flat[1] or "").strip()
    return _BARE_FINAL.sub("", text, count=1) if _BARE_FINAL.match(text) else text


class Filter:
    """Pieces of a text as they come, held back while they may be reasoning.

    An answer that begins like a mark of reasoning is held to its end; any other is let through at once. Reasoning whose
    mark comes only at its end, as behind a `<think>` of the template's, is shown: nothing tells it from an answer.
    """

    def __init__(self) -> None:
        self.text = ""
        self._is_open = False
        self._shown = 0

    def feed(self, piece: str) -> str:
        """What may be shown now: nothing behind a control token, nor what may become one."""
        self.text += piece
        if not self._is_open:
            start = self.text.lstrip()
            if not start or any(mark.startswith(start) or start.startswith(mark) for mark in _MARKS):
                return ""
            self._is_open = True
            self._shown = len(self.text) - len(start)
        end = self.text.find("<|", self._shown)
        if end < 0:
            end = len(self.text) - self.text.endswith("<")
        new = self.text[self._shown : end]
        self._shown = end
        return new
