"""What a batch has come to, as the page that commits it: `output/MANIFEST.json`. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from sightline.jobs.items import Counts
from sightline.jobs.reports import Part

Ended = Literal["batch_cancelled", "batch_expired"]
"""The error of items that were not done when their batch was ended early."""

VERSION = 1


@dataclass(frozen=True, slots=True)
class Made:
    """One output: its key below the batch's root, its bytes and their SHA-256."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A finished batch. It holds no time and no attempt: the same plan and parts always make the same page.

    parts     of every shard, its chunks in order
    outputs   what was made of them: results, errors, parquet
    sidecars  captions that were handed to files beside images
    ended     why it was ended early, if it was: items that were not done by then are lines with that error
    """

    name: str
    uid: str
    fingerprint: str
    items: int
    counts: Counts
    parts: tuple[tuple[Part, ...], ...]
    outputs: Mapping[str, Made]
    sidecars: int = 0
    ended: Ended | None = None

    def to_json(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "version": VERSION,
            "batch": {"name": self.name, "uid": self.uid},
            "fingerprint": self.fingerprint,
            "items": self.items,
            "counts": self.counts.to_json(),
            "outputs": {
                name: {"key": made.key, "bytes": made.size, "sha256": made.sha256}
                for name, made in sorted(self.outputs.items())
            },
            "sidecars": self.sidecars,
            "shards": [
                {"shard": number, "chunks": [{"bytes": part.size, "sha256": part.sha256} for part in parts]}
                for number, parts in enumerate(self.parts)
            ],
        }
        return said | ({"ended": self.ended} if self.ended else {})

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> "Manifest":
        """Raises ValueError when it is none."""
        try:
            return cls._read(said)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a manifest: {error!r}") from error

    @classmethod
    def _read(cls, said: Mapping[str, Any]) -> "Manifest":
        if said["version"] != VERSION:
            raise ValueError(f"a manifest of version {said['version']}")
        return cls(
            name=str(said["batch"]["name"]),
            uid=str(said["batch"]["uid"]),
            fingerprint=str(said["fingerprint"]),
            items=int(said["items"]),
            counts=Counts.from_json(said["counts"]),
            parts=tuple(
                tuple(Part(int(part["bytes"]), str(part["sha256"])) for part in shard["chunks"])
                for shard in said["shards"]
            ),
            outputs={
                str(name): Made(str(made["key"]), int(made["bytes"]), str(made["sha256"]))
                for name, made in said["outputs"].items()
            },
            sidecars=int(said.get("sidecars", 0)),
            ended=cast("Ended | None", said.get("ended")),
        )
