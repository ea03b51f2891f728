"""Strategic merge of pod templates: what a user lays over what we render, as `kubectl patch --type=strategic` would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from sightline_operator.render.errors import RenderError

MERGE_KEYS: Mapping[str, tuple[str, ...]] = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "resourceClaims": ("name",),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ports": ("containerPort", "protocol"),
    "hostAliases": ("ip",),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}
"""Lists whose items have an identity, from the patch strategies of core/v1 PodSpec; every other list is replaced."""

_DEFAULTS = {"protocol": "TCP"}
_EXCLUSIVE = {"volumes", "env"}
"""Items that hold one of several members: a new one takes the place of the old, as `retainKeys` says."""


class MergeError(ValueError):
    """The overlay is not of the shape that it is laid over."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


def overlaid(template: Mapping[str, Any], overlay: Mapping[str, Any] | None, path: str) -> dict[str, Any]:
    """A pod template with what a user lays over it; its metadata, its spec and its containers stay there.

    path   of the overlay in the object that has it
    Raises RenderError.
    """
    try:
        answer = merged(template, overlay or {}, path)
    except MergeError as error:
        raise RenderError(error.path, error.message) from error
    for part in ("metadata", "spec"):
        if not isinstance(answer.get(part), dict):
            raise RenderError(f"{path}.{part}", "must be an object")
    if "containers" in template["spec"] and not answer["spec"].get("containers"):
        raise RenderError(f"{path}.spec.containers", "must not take all containers away")
    answer["metadata"]["labels"] = answer["metadata"].get("labels") or {}
    return answer


def merged(base: Mapping[str, Any], overlay: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A new object: `overlay` over `base`. A null removes a field; `$patch: delete` or `replace` does so in lists.

    path   of the overlay, for what is said about it
    Raises MergeError when the overlay has a list where the base has an object, and the like.
    """
    answer = dict(base)
    if overlay.get("$patch") == "replace":
        answer = {}
    for name, value in overlay.items():
        where = f"{path}.{name}"
        if name == "$patch":
            continue
        if name.startswith("$"):
            raise MergeError(where, "this directive is not supported; $patch: delete and $patch: replace are")
        if value is None:
            answer.pop(name, None)
        else:
            answer[name] = _value(name, answer.get(name), value, where)
    return answer


def _value(name: str, old: object, new: object, path: str) -> object:
    if isinstance(new, Mapping):
        if isinstance(old, list) or name in MERGE_KEYS:
            raise MergeError(path, "must be a list")
        if old is not None and not isinstance(old, Mapping):
            raise MergeError(path, "must not be an object")
        return merged(cast("Mapping[str, Any]", old or {}), cast("Mapping[str, Any]", new), path)
    if isinstance(old, Mapping):
        raise MergeError(path, "must be an object")
    if name not in MERGE_KEYS:
        if isinstance(old, list) and not isinstance(new, list):
            raise MergeError(path, "must be a list")
        return new
    if not isinstance(new, list):
        raise MergeError(path, "must be a list")
    return _items(name, cast("Sequence[Mapping[str, Any]]", old or []), cast("list[object]", new), path)


def _items(name: str, old: Sequence[Mapping[str, Any]], new: Sequence[object], path: str) -> list[dict[str, Any]]:
    answer: dict[tuple[object, ...], dict[str, Any]] = {_identity(name, item): dict(item) for item in old}
    for index, item in enumerate(new):
        where = f"{path}[{index}]"
        if not isinstance(item, Mapping):
            raise MergeError(where, "must be an object")
        overlay = cast("Mapping[str, Any]", item)
        if "$patch" in overlay and not overlay.keys() & set(MERGE_KEYS[name]):
            if overlay["$patch"] == "replace":
                answer.clear()
            continue
        if MERGE_KEYS[name][0] not in overlay:
            raise MergeError(where, f"{MERGE_KEYS[name][0]} is missing; items are matched by it")
        for part in MERGE_KEYS[name]:
            if not isinstance(overlay.get(part, ""), str | int):
                raise MergeError(f"{where}.{part}", "must be a text or a number")
        key = _identity(name, overlay)
        if overlay.get("$patch") == "delete":
            answer.pop(key, None)
        else:
            base = answer.get(key, {})
            if name in _EXCLUSIVE and base.keys() - {"name"} != overlay.keys() - {"name"}:
                base = {}
            answer[key] = merged(base, overlay, where)
    return list(answer.values())


def _identity(name: str, item: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(item.get(key, _DEFAULTS.get(key)) for key in MERGE_KEYS[name])
