"""What one of a batch's Jobs says about itself, its pods' last words included."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sightline_operator.contract import LastWords
from sightline_operator.observe.world import Manifest
from sightline_operator.status.conditions import find, is_true

_EXIT_CODE = re.compile(r"exit code (\d+)")


@dataclass(frozen=True)
class JobView:
    """A live Job, read once.

    exits        exit codes and last words of its pods that ended, oldest first
    why_failed   reason of the Job's own Failed condition: PodFailurePolicy, BackoffLimitExceeded, FailedIndexes …
    """

    manifest: Manifest
    exits: tuple[tuple[int, LastWords], ...]

    @classmethod
    def of(cls, manifest: Manifest, pods: Iterable[Manifest]) -> JobView:
        return cls(manifest, _exits(pods_of(manifest, pods)))

    @property
    def name(self) -> str:
        return self.manifest["metadata"]["name"]

    @property
    def status(self) -> Mapping[str, Any]:
        return self.manifest.get("status") or {}

    @property
    def is_complete(self) -> bool:
        return is_true(self.status.get("conditions"), "Complete")

    @property
    def is_failed(self) -> bool:
        return is_true(self.status.get("conditions"), "Failed")

    @property
    def is_over(self) -> bool:
        return self.is_complete or self.is_failed

    @property
    def is_suspended(self) -> bool:
        return bool(self.manifest["spec"].get("suspend"))

    @property
    def why_failed(self) -> str:
        return find(self.status.get("conditions"), "Failed").get("reason", "")

    @property
    def failure_message(self) -> str:
        return find(self.status.get("conditions"), "Failed").get("message", "")

    @property
    def active(self) -> int:
        return self.status.get("active") or 0

    @property
    def completions(self) -> int:
        return self.manifest["spec"].get("completions") or 1

    @property
    def completed(self) -> int:
        return min(self.status.get("succeeded") or 0, self.completions)

    @property
    def failed_indexes(self) -> int:
        return count_indexes(self.status.get("failedIndexes") or "")

    @property
    def words(self) -> LastWords:
        """Of the pod that ended well, the latest if there are several."""
        return next((words for code, words in reversed(self.exits) if code == 0), LastWords())

    def fatal(self) -> tuple[int, LastWords]:
        """The exit code that ended the Job and what was said with it; code 0 when none is known.

        Pods may be gone already; then the Job's own message still holds the code.
        """
        said = _EXIT_CODE.search(self.failure_message)
        code = int(said.group(1)) if said and self.why_failed == "PodFailurePolicy" else 0
        bad = [(exit, words) for exit, words in self.exits if exit and code in (0, exit)]
        return bad[-1] if bad else (code, LastWords())


def pods_of(job: Manifest, pods: Iterable[Manifest]) -> tuple[Manifest, ...]:
    """The pods of this Job, and not those of an earlier one of its name."""
    uid = job["metadata"].get("uid")
    return tuple(pod for pod in pods if any(o.get("uid") == uid for o in pod["metadata"].get("ownerReferences", ())))


def count_indexes(ranges: str) -> int:
    """How many indexes `0,3-5` names."""
    total = 0
    for part in filter(None, ranges.split(",")):
        first, dash, last = part.partition("-")
        total += int(last) - int(first) + 1 if dash else 1
    return total


def _exits(pods: Iterable[Manifest]) -> tuple[tuple[int, LastWords], ...]:
    ended: list[tuple[str, str, int, LastWords]] = []
    for pod in pods:
        for container in pod.get("status", {}).get("containerStatuses", ())[:1]:
            terminated = container.get("state", {}).get("terminated")
            if terminated:
                words = LastWords.read(terminated.get("message") or "")
                when = terminated.get("finishedAt") or ""
                ended.append((when, pod["metadata"]["name"], terminated.get("exitCode", 0), words))
    ended.sort(key=lambda each: each[:3])
    return tuple((code, words) for _, _, code, words in ended)
