"""What an engine is given and gives back, whatever makes the tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from sightline.wire import FinishReason, ModelInfo, Sampling

Prepared_contra = TypeVar("Prepared_contra", contravariant=True)

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


class GenerativeModel(Protocol[Prepared_contra]):
    """A loaded model. `generate` runs on the engine's one thread only; it may hold the device."""

    info: ModelInfo
    runtime: Runtime

    def generate(
        self,
        batch: Sequence[Prepared_contra],
        sampling: Sampling,
        is_abandoned: IsAbandoned,
        on_token: OnToken | None = None,
    ) -> Sequence[Generated]:
        """One result for each item, in order, the same alone or in any batch when greedy."""
        ...

    def trial(self, image: Any) -> Any:  # noqa: ANN401 - a PIL image; what `generate` takes
        """A short prompt about an image, prepared, to try the model with."""
        ...

    def reader(self) -> TextReader:
        """A reader of one answer, for streams. Thread-safe; needs no device."""
        ...
