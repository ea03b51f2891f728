"""Where everything of a batch lies in its store: keys as pure functions of the plan.

Below `<prefix>/<batch>/<fingerprint>/`:

    plan/<attempt>/shard-00000.jsonl       its items, one a line
    plan/PLAN.json                         created once: the commit of planning
    parts/shard-00042/chunk-0007.jsonl     created once: every line of that fixed slice, in the order of its items
    done/shard-00042.json                  counts of a finished shard, and its parts with their SHA-256
    progress/shard-00042.json              advisory; written over, may be old or absent
    cache/<sha256>.json                    created once: a result by content, where reuse is on
    output/MANIFEST.json                   created once: the commit of the batch
    output/results.jsonl, errors.jsonl     the lines joined, where that was asked for
    output/results.parquet                 all lines as a table, where that was asked for

So who finishes what is decided by who creates a key, and any process may die between any two of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

PLAN = "plan/PLAN.json"
MANIFEST = "output/MANIFEST.json"
RESULTS = "output/results.jsonl"
ERRORS = "output/errors.jsonl"
PARQUET = "output/results.parquet"
PARTS = "parts/"
DONE = "done/"
PROGRESS = "progress/"
CANCELLED = "CANCELLED"
"""Created by whoever ends a laptop's or a server's batch early; a cluster's is ended by its Jobs."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Layout:
    """Keys of one batch. `root` ends with `/` unless it is empty."""

    root: str

    @classmethod
    def of(cls, prefix: str, batch: str, fingerprint: str) -> "Layout":
        folder = prefix.strip("/")
        return cls(f"{folder}/{batch}/{fingerprint}/" if folder else f"{batch}/{fingerprint}/")

    @property
    def plan(self) -> str:
        return self.root + PLAN

    @property
    def manifest(self) -> str:
        return self.root + MANIFEST

    def items(self, attempt: str, shard: int) -> str:
        return f"{self.root}plan/{attempt}/shard-{shard:05}.jsonl"

    def parts(self, shard: int) -> str:
        """The folder of a shard's chunks."""
        return f"{self.root}{PARTS}shard-{shard:05}/"

    def chunk(self, shard: int, chunk: int) -> str:
        return f"{self.parts(shard)}chunk-{chunk:04}.jsonl"

    def done(self, shard: int) -> str:
        return f"{self.root}{DONE}shard-{shard:05}.json"

    def progress(self, shard: int) -> str:
        return f"{self.root}{PROGRESS}shard-{shard:05}.json"

    def cached(self, content: str) -> str:
        return f"{self.root}cache/{content}.json"


def chunk_number(key: str) -> int:
    """Of a chunk's key. Raises ValueError when it is none."""
    name = key.rsplit("/", 1)[-1]
    if not (name.startswith("chunk-") and name.endswith(".jsonl")):
        raise ValueError(f"{key} is no chunk")
    return int(name[len("chunk-") : -len(".jsonl")])


def shard_number(key: str) -> int:
    """Of a key of `done/` or `progress/`. Raises ValueError when it is none."""
    name = key.rsplit("/", 1)[-1]
    if not (name.startswith("shard-") and name.endswith(".json")):
        raise ValueError(f"{key} is of no shard")
    return int(name[len("shard-") : -len(".json")])


def slices(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Cut into fixed pieces; the last may be shorter. Chunk n of a shard is always the same items."""
    return [items[start : start + size] for start in range(0, len(items), size)]
