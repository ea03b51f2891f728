"""Token ids to text while they are made, with the vocabularies of our own checkpoints and with hostile ones."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import sightline
from sightline.engines.text import Detokenizer, Pieces

TINY = Path(sightline.__path__[0]) / "tiny"


def decode_bytes(ids: Sequence[int]) -> str:
    """A vocabulary of single bytes, the hardest for characters of several; 256 is a control token."""
    return bytes(token for token in ids if token < 256).decode(errors="replace")


class Bytes:
    """A reader of that vocabulary."""

    def __init__(self) -> None:
        self._detokenizer = Detokenizer(decode_bytes)

    def push(self, token_id: int) -> str:
        return self._detokenizer.push(token_id)


def read(ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], Pieces]:
    pieces = Pieces(Bytes(), stop)
    return [piece for token in ids if (piece := pieces.push([token]))], pieces


class TestDetokenizer:
    @given(st.text(max_size=60))
    @example("  naïve 🙂 \u200d 日本語 \ufffd x \n")
    def test_pieces_begin_the_whole_text_and_halve_no_character(self, text: str) -> None:
        reader = Detokenizer(decode_bytes)
        told = ""

        for token in text.encode("utf-8", "replace"):
            told += reader.push(token)
            assert text.encode("utf-8", "replace").decode().lstrip().startswith(told)

    @given(st.binary(max_size=40))
    def test_bytes_that_are_no_text_do_no_harm(self, data: bytes) -> None:
        reader = Detokenizer(decode_bytes)

        told = "".join(reader.push(token) for token in data)

        assert decode_bytes(data).lstrip().startswith(told)

    def test_control_tokens_are_nothing(self) -> None:
        reader = Detokenizer(decode_bytes)

        assert [reader.push(token) for token in (256, *b"a", 256, *b"b")] == ["", "a", "", "b"]

    @pytest.mark.parametrize("checkpoint", ["describe", "enhance"])
    @given(text=st.text(max_size=40))
    def test_with_the_vocabularies_of_our_checkpoints(self, checkpoint: str, text: str) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(TINY / checkpoint / "tokenizer.json"))
        ids = tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids
        reader = Detokenizer(lambda window: tokenizer.decode(list(window), skip_special_tokens=True))

        told = "".join(reader.push(token) for token in ids)

        whole = tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        assert whole.startswith(told)
        assert whole.removeprefix(told).strip("\ufffd") == ""


class TestPieces:
    def test_come_token_by_token(self) -> None:
        assert read(b"a bc")[0] == ["a", " b", "c"]

    def test_trailing_white_space_waits_for_what_follows(self) -> None:
        assert read(b" \n a \n ")[0] == ["a"]
        assert read(b"a \n b")[0] == ["a", " \n b"]

    @pytest.mark.parametrize(
        ("text", "stop", "shown", "stopped_at"),
        [
            ("a red circle", ["circle"], "a red", "circle"),
            ("a red circle", ["red", "a r"], "", "a r"),
            ("one\ntwo", ["\n"], "one", "\n"),
            ("\n\none\ntwo", ["\n"], "one", "\n"),
            ("abab abc", ["abc"], "abab", "abc"),
            ("aaab", ["aab"], "a", "aab"),
            ("ein Häuschen", ["äu"], "ein H", "äu"),
            ("nothing", ["###"], "nothing", None),
            ("abcd", ["abcd", "c"], "ab", "c"),
        ],
    )
    def test_end_before_a_stop_sequence(self, text: str, stop: list[str], shown: str, stopped_at: str | None) -> None:
        told, pieces = read(text.encode(), stop)

        assert "".join(told) == shown
        assert pieces.stopped_at == stopped_at

    def test_what_may_begin_a_stop_sequence_is_held_until_it_does_not(self) -> None:
        assert read(b"x##y", ["###"])[0] == ["x", "##y"]

    def test_tokens_behind_a_stop_sequence_are_not_counted(self) -> None:
        pieces = Pieces(Bytes(), ["c"])

        assert pieces.push(b"abcdef") == "ab"
        assert pieces.push(b"ghi") == ""
        assert pieces.tokens == 3

    @given(st.text("ab \n", max_size=30), st.lists(st.text("ab \n", min_size=1, max_size=4), max_size=3))
    def test_never_show_a_stop_sequence_nor_white_space_that_would_be_stripped(
        self, text: str, stop: list[str]
    ) -> None:
        told, pieces = read(text.encode(), stop)
        shown = "".join(told)

        whole = text.lstrip()
        if pieces.stopped_at is None:
            assert whole.startswith(shown)
            assert not any(end in whole for end in stop)
        else:
            assert shown == whole.partition(pieces.stopped_at)[0].rstrip()
        assert shown == shown.strip()
