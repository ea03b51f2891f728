"""What an apply would change, in words, for `--dry-run`. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

_SERVER = {"managedFields", "resourceVersion", "generation", "uid", "creationTimestamp", "selfLink"}


def changes(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    """Lines `path: old -> new`, without what the API server itself keeps."""
    if before is None:
        return ["(new)"]
    return list(_walk(_meaning(before), _meaning(after), ""))


def _meaning(obj: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in obj.items() if name != "status"}
    kept["metadata"] = {name: value for name, value in obj["metadata"].items() if name not in _SERVER}
    return kept


def _walk(before: object, after: object, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        old, new = cast("dict[str, Any]", before), cast("dict[str, Any]", after)
        for name in sorted({*old, *new}):
            yield from _walk(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _walk(old, new, f"{path}[{index}]")
    elif before != after:
        yield f"{path}: {_short(before)} -> {_short(after)}"


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else f"{text[:197]}..."
