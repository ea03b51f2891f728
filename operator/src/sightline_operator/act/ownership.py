"""Whether a live object still is what we applied, read from its managedFields. Pure.

The API server keeps, for each applier, the set of fields it owns. Whoever changes a field of ours takes it out of our
set. So an object is as we left it exactly when our set still holds every field of our manifest: nothing is compared
by value, so quantities, defaults and webhooks cannot mislead us.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from sightline_operator.resources import is_owned_entry

HASH_ANNOTATION = "sightline.dev/hash"


def lost_fields(manifest: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Fields of our manifest that we do not own in the live object, as dotted paths; empty: all is as we left it."""
    entries = [entry for entry in live["metadata"].get("managedFields") or [] if is_owned_entry(entry)]
    owned: dict[str, Any] = {}
    for entry in entries:
        owned = _merged(owned, entry.get("fieldsV1") or {})
    return list(_lost({k: v for k, v in manifest.items() if k not in ("apiVersion", "kind")}, owned, ""))


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for name, value in other.items():
        both[name] = _merged(both[name], value) if name in both else value
    return both


_NAMES = {"name", "namespace", "uid", "resourceVersion", "creationTimestamp", "generation"}


def _lost(value: object, owned: Mapping[str, Any], path: str) -> Iterator[str]:
    """Walk a value of the manifest beside the set of owned fields."""
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, Any]", value)
        for name, inner in fields.items():
            if inner is None or (path == "metadata" and name in _NAMES):
                continue
            here = f"{path}.{name}" if path else name
            node = owned.get(f"f:{name}")
            if node is None:
                yield here
            elif node:  # an empty one is a leaf: a scalar, or a list or map that is owned whole
                yield from _lost(inner, node, here)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        yield from _lost_items(cast("Sequence[Any]", value), owned, path)


def _lost_items(items: Sequence[Any], owned: Mapping[str, Any], path: str) -> Iterator[str]:
    """A list whose items are owned one by one: by key (k:), by value (v:); other lists are owned whole."""
    keyed = {name: node for name, node in owned.items() if name.startswith("k:")}
    values = {name for name in owned if name.startswith("v:")}
    for item in items:
        if keyed and isinstance(item, Mapping):
            one = cast("Mapping[str, Any]", item)
            name = next((name for name in keyed if _names(json.loads(name[2:]), one)), None)
            here = f"{path}[{next(iter(one.values()), '')}]"
            if name is None:
                yield here
            elif keyed[name]:  # an empty one is owned whole, as ownerReferences are
                yield from _lost(one, keyed[name], here)
        elif values and f"v:{json.dumps(item, separators=(',', ':'))}" not in values:
            yield f"{path}[{item}]"


def _names(key: Mapping[str, Any], item: Mapping[str, Any]) -> bool:
    """Whether a list item is the one with this key; parts of a key that the item leaves out were defaulted."""
    return any(part in item for part in key) and all(item.get(part, value) == value for part, value in key.items())
