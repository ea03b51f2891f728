"""What an engine is given and gives back, whatever makes the tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sightline.wire import FinishReason, ModelInfo, Sampling

Prepared_contra = TypeVar("Prepared_contra", contravariant=True)

MIN_TEMPERATURE = 1e-5
"""Below this sampling is greedy, as in vLLM (_SAMPLING_EPS): scores divided by 1e-38 are infinite."""

IsAbandoned = Callable[[int], bool]
"""Whether nobody waits for item i of the batch any more; asked between two tokens."""

OnToken = Callable[[int, int], None]
"""Takes each new token of the batch as it is made: row, token id. Called on the engine's thread."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The raw answer to one prompt.

    token_ids      the new tokens, the stop token included, padding not
    finish_reason  `length` when max_tokens ended it
    prompt_tokens  tokens of the prompt, image tokens included, padding not
    stopped_at     the stop sequence of the request that ended it: the text ends before its first occurrence
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    image_tokens: int = 0
    stopped_at: str | None = None


@dataclass(slots=True)
class Draft:
    """One answer while it is made.

    most   new tokens that it may have
    stops  tokens that end it
    """

    most: int
    stops: frozenset[int]
    token_ids: list[int] = field(default_factory=list[int])

    @property
    def is_stopped(self) -> bool:
        """Whether the model itself ended it."""
        return bool(self.token_ids) and self.token_ids[-1] in self.stops

    @property
    def finish_reason(self) -> FinishReason:
        return "stop" if self.is_stopped else "length"

    def add(self, token_id: int) -> bool:
        """Take its next token; whether that was its last."""
        self.token_ids.append(token_id)
        return self.is_stopped or len(self.token_ids) >= self.most


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where a loaded model lives: `device` (cpu, cuda:0), `dtype` (torch.float32), `backend` (hf).

    bytes_per_dtype  of its weights, such as {"int8": 2, "float16": 1}, where a model says so
    """

    backend: str
    device: str
    dtype: str
    bytes_per_dtype: Mapping[str, int] = field(default_factory=dict[str, int])


class TextReader(Protocol):
    """Turns the tokens of one answer into text while they are made."""

    def push(self, token_id: int) -> str:
        """The text that is certain with this token: whole characters, no leading white space, maybe nothing.

        All pieces together begin the text that the model's postprocessing gives for all tokens.
        """
        ...


class Decoder(Protocol[Prepared_contra]):
    """The answers of one model that are being made, a row each. On the engine's one thread only."""

    def join(self, prompts: Sequence[Prepared_contra], samplings: Sequence[Sampling]) -> Sequence[tuple[int, int]]:
        """Read prompts and add a row for each. Rows that run are as they were when this raises.

        returns  index of the prompt and its first token, in the order of the new rows
        """
        ...

    def step(self) -> Sequence[int]:
        """The next token of each row."""
        ...

    def leave(self, row: int) -> None:
        """Give a row up; the last one takes its place."""
        ...


class GenerativeModel(Protocol[Prepared_contra]):
    """A loaded model. What it computes runs on the engine's one thread only; it may hold the device."""

    info: ModelInfo
    runtime: Runtime

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ...

    def decoder(self) -> Decoder[Prepared_contra]:
        """An empty set of rows. Two of them may exist; their steps must not overlap."""
        ...

    def most_tokens(self, prompt: Prepared_contra, sampling: Sampling) -> int:
        """New tokens that an answer may have: as many as were asked for, or fewer where the model ends before."""
        ...

    def result(self, prompt: Prepared_contra, draft: Draft) -> Generated:
        """An answer with its counts."""
        ...

    def generate(
        self,
        batch: Sequence[Prepared_contra],
        sampling: Sampling,
        is_abandoned: IsAbandoned,
        on_token: OnToken | None = None,
    ) -> Sequence[Generated]:
        """One result for each item, in order, the same alone or in any company; the engine lets others join instead."""
        ...

    def trial(self, image: Any) -> Any:  # noqa: ANN401 - a PIL image; what `generate` takes
        """A short prompt about an image, prepared, to try the model with."""
        ...

    def reader(self) -> TextReader:
        """A reader of one answer, for streams. Thread-safe; needs no device."""
        ...
