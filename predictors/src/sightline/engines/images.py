"""What the vision encoder made of images that were seen before, by their content."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import cast

import torch
from prometheus_client import Counter

LOOKED_UP = Counter(
    "sightline_image_cache",
    "Images of prompts looked up in the cache, by outcome: hit, miss.",
    ["model_name", "outcome"],
)


def content_hash(pixels: torch.Tensor, grid: torch.Tensor) -> bytes:
    """Of preprocessed images: equal for equal pictures of equal size, seen at equal resolution."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (pixels, grid):
        digest.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


class ImageCache:
    """The least recently used go when all together are too large. On the engine's thread only.

    model_name  in the counter
    most_bytes  of all embeddings; 0: nothing is kept, and nothing hashed
    """

    def __init__(self, model_name: str, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._hits = LOOKED_UP.labels(model_name, "hit")
        self._misses = LOOKED_UP.labels(model_name, "miss")

    @property
    def is_on(self) -> bool:
        return self._most_bytes > 0

    def seen(
        self, keys: Sequence[bytes | None], see: Callable[[Sequence[int]], Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """The embedding of each key, in order; equal ones are made once.

        keys  None: is made and not kept
        see   makes those of the given places, all in one go
        """
        found: dict[int, torch.Tensor] = {}
        first: dict[bytes, int] = {}  # where a key stands that others repeat
        missing: list[int] = []
        for at, key in enumerate(keys):
            if key is not None and key in self._kept:
                self._kept.move_to_end(key)
                found[at] = self._kept[key]
                self._hits.inc()
            elif key is not None and key in first:
                self._hits.inc()
            else:
                missing.append(at)
                if key is not None:
                    first[key] = at
                    self._misses.inc()
        if missing:
            found |= zip(missing, see(missing), strict=True)
        for key, at in first.items():
            self._keep(key, found[at])
        return [found[at] if at in found else found[first[cast("bytes", key)]] for at, key in enumerate(keys)]

    def _keep(self, key: bytes, embedding: torch.Tensor) -> None:
        embedding = embedding.clone()  # not a view that would hold all images it was made with
        size = embedding.numel() * embedding.element_size()
        if size > self._most_bytes:
            return
        self._kept[key] = embedding
        self._bytes += size
        while self._bytes > self._most_bytes:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= gone.numel() * gone.element_size()
