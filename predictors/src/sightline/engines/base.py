"""What an engine is given and gives back, whatever makes the tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sightline.wire import FinishReason, ModelInfo, Sampling

Prepared_contra = TypeVar("Prepared_contra", contravariant=True)

IsAbandoned = Callable[[int], bool]
"""Whether nobody waits for item i of the batch any more; asked between two tokens."""


@dataclass(frozen=True, slots=True)
class Generated:
    """The raw answer to one prompt.

    token_ids      the new tokens, the stop token included, padding not
    finish_reason  `length` when max_tokens ended it
    prompt_tokens  tokens of the prompt, image tokens included, padding not
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    image_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Runtime:
    """Where a loaded model lives: `device` (cpu, cuda:0), `dtype` (torch.float32), `backend` (hf)."""

    backend: str
    device: str
    dtype: str


class GenerativeModel(Protocol[Prepared_contra]):
    """A loaded model. `generate` runs on the engine's one thread only; it may hold the device."""

    info: ModelInfo
    runtime: Runtime

    def generate(
        self, batch: Sequence[Prepared_contra], sampling: Sampling, is_abandoned: IsAbandoned
    ) -> Sequence[Generated]:
        """One result for each item, in order, the same alone or in any batch when greedy."""
        ...
