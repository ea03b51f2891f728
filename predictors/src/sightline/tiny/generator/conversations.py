"""Conversations about a batch of pictures, written as the chat template does, with hints where to look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from sightline.tiny import dialogue, scenes
from sightline.tiny.generator.checkpoint import END, PAD, TEXT_LAYERS
from sightline.tiny.generator.pictures import MERGE, Grid, Pictures


@dataclass(frozen=True)
class Turn:
    """A conversation: prompt with an id for each image token, then the answer.

    ids        prompt and answer, ended by <|im_end|>
    given      the same as the model reads it; training hides some of the answer's words
    answer_at  index of the answer's first token
    pictures   which pictures it holds, in order
    kind       caption, which, list or text
    fits       of each of its image tokens, whether it shows what a which-question looks for; () for other kinds
    """

    ids: list[int]
    given: list[int]
    answer_at: int
    pictures: tuple[int, ...]
    kind: str = "caption"
    fits: tuple[bool, ...] = ()

    @property
    def asks_at(self) -> int:
        """Index of the last word of a which-question, the one before the `?` that ends the prompt."""
        return self.answer_at - self.ids[: self.answer_at][::-1].index(END) - 3

    def hints(self) -> list[tuple[int, int, np.ndarray]]:
        """Where a which-question should be looked for: layer, row, and a share for each token up to it, summing to 1.

        In the first layer the question's last word looks at the word before it (`red star`), in the second at the
        pictures that fit; in the third the rows that tell the answer look at that word.
        """
        ask, last = self.asks_at, TEXT_LAYERS - 1
        found = [(0, ask, _one_hot(ask + 1, ask - 1)), (1, ask, self.pointing())]
        return found + [(last, row, _one_hot(row + 1, ask)) for row in range(self.answer_at - 1, len(self.ids) - 1)]

    def pointing(self) -> np.ndarray:
        """A share for each token up to the question's last word.

        Each picture that fits gets the same share, spread over its tokens that fit; the first token when none does.
        """
        shares = np.zeros(self.asks_at + 1, np.float32)
        for rows, fits in self._each_picture():
            shares[rows[fits]] = 1 / max(fits.sum(), 1)
        shares[0] = 0.0 if shares.any() else 1.0
        return shares / shares.sum()

    def found(self) -> list[float]:
        """1.0 for each picture that fits, else 0.0."""
        return [float(fits.any()) for _, fits in self._each_picture()]

    def _each_picture(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each picture the rows of its tokens, and whether each fits."""
        at = np.array([index for index, token in enumerate(self.ids[: self.asks_at]) if token == PAD])
        cuts = np.flatnonzero(np.diff(at) > 1) + 1
        yield from zip(np.split(at, cuts), np.split(np.array(self.fits), cuts), strict=True)


def _one_hot(length: int, at: int) -> np.ndarray:
    shares = np.zeros(length, np.float32)
    shares[at] = 1.0
    return shares


class Conversations:
    """Writes conversations about a batch of pictures as the chat template does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def turn(
        self,
        prompt: str,
        answer: str,
        grids: Sequence[Grid],
        pictures: tuple[int, ...] = (),
        *,
        system: str = "",
        kind: str = "caption",
        fits: tuple[bool, ...] = (),
    ) -> Turn:
        """Images first, then the prompt, then the answer. `grids` are of all pictures of the batch."""
        head = f"<|im_system|>system<|im_middle|>{system}<|im_end|>" if system else ""
        shown = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>" * len(pictures)
        asked = f"{head}<|im_user|>user<|im_middle|>{shown}{prompt}<|im_end|><|im_assistant|>assistant<|im_middle|>"
        ids: list[int] = []
        left = iter(pictures)
        for token in self._tokenizer.encode(asked).ids:
            repeats = math.prod(grids[next(left)]) // MERGE**2 if token == PAD else 1
            ids += [token] * repeats
        whole = [*ids, *self._tokenizer.encode(answer).ids, END]
        return Turn(whole, whole, len(ids), pictures, kind, fits)

    def draw(self, rng: np.random.Generator, pictures: Pictures, asked: Asked) -> list[Turn]:
        """As many conversations of each kind as `asked`.

        The short ones come first, so that neighbours are of about one length.
        """
        shown = [one.scene for one in pictures.views]
        turns: list[Turn] = []

        def add(kind: str, prompt: str, answer: str, which: tuple[int, ...] = (), fits: tuple[bool, ...] = ()) -> None:
            system = ""
            if rng.random() < 0.15:
                system = str(rng.choice(dialogue.SYSTEMS)) if rng.random() < 0.7 else dialogue.draw_noise(rng)
            turns.append(self.turn(prompt, answer, pictures.grids, which, system=system, kind=kind, fits=fits))

        for number in rng.permutation(len(shown))[: asked.captions].tolist():
            add("caption", dialogue.draw_describe_prompt(rng), scenes.caption(shown[number]), (number,))
        for _ in range(asked.which):
            which = _draw_some(rng, len(shown), (0.1, 0.52, 0.33, 0.05))
            query = dialogue.draw_query(rng, [shown[i] for i in which])
            fits = [fit for i in which for fit in pictures.views[i].fits(query, pictures.grids[i])]
            add("which", *dialogue.ask_which(rng, query, [shown[i] for i in which]), which, tuple(fits))
        for _ in range(asked.lists):
            which = _draw_some(rng, len(shown), (0.0, 0.7, 0.3))
            answer = dialogue.describe_answer([shown[i] for i in which])
            add("list", dialogue.draw_describe_prompt(rng), answer, which)
        for _ in range(asked.texts):
            add("text", *dialogue.draw_text(rng))
        return sorted(turns, key=lambda turn: len(turn.ids))


def _draw_some(rng: np.random.Generator, pictures: int, chances: tuple[float, ...]) -> tuple[int, ...]:
    """Some pictures in any order; how many is 1, 2, … with these chances."""
    count = 1 + int(rng.choice(len(chances), p=chances))
    return tuple(int(i) for i in rng.choice(pictures, size=count, replace=False))


@dataclass(frozen=True)
class Asked:
    """How many conversations of each kind are held about a batch of pictures."""

    captions: int
    which: int
    lists: int
    texts: int
