"""From the typed source to structural schemas: references inlined, nulls dropped, lists typed, defaults kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from .types import VALIDATIONS, Object

Schema = dict[str, Any]


class _Generator(GenerateJsonSchema):
    """Defaults that are objects are written out: the API server checks them by the rules before it fills them in."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> Schema:
        inner = self.generate_inner(schema["schema"])
        default = schema.get("default")
        if default is None or default in ((), {}, ""):
            return inner
        told = _plain(default)
        return {"allOf": [inner], "default": told} if "$ref" in inner else {**inner, "default": told}


def _plain(default: object) -> object:
    """A default as JSON, without what is unset or empty inside."""
    if isinstance(default, BaseModel):
        fields = default.model_dump(mode="json", by_alias=True, exclude_none=True)
        return {name: kept for name, value in fields.items() if (kept := _plain(value)) not in ({}, [], "")}
    if isinstance(default, dict):
        members = cast("Mapping[str, object]", default)
        return {name: kept for name, value in members.items() if (kept := _plain(value)) not in ({}, [], "")}
    return list(cast("tuple[object, ...]", default)) if isinstance(default, tuple) else default


def described(model: type[Object]) -> Schema:
    """The schema of a model with its parts by name below `$defs`, as they are written."""
    return model.model_json_schema(by_alias=True, schema_generator=_Generator)


def structural(model: type[Object]) -> Schema:
    """The structural schema of a model, as a CustomResourceDefinition holds it."""
    whole = described(model)
    return _inlined(whole, cast("Mapping[str, Schema]", whole.get("$defs", {})))


def _inlined(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """One node and all below it. What stands beside a reference wins over what it refers to; rules add up."""
    node = _resolved(node, definitions)
    kept = {key: value for key, value in node.items() if key not in {"$defs", "title", "anyOf", "additionalProperties"}}
    if kept.get("x-kubernetes-int-or-string"):
        kept.pop("type", None)
        kept["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        kept["maxLength"] = 64
        return kept
    if kept.get("x-kubernetes-preserve-unknown-fields"):
        return kept
    if "properties" in node:
        properties = cast("Mapping[str, Schema]", node["properties"])
        kept["properties"] = {name: _inlined(child, definitions) for name, child in properties.items()}
    if isinstance(node.get("additionalProperties"), dict):
        kept["additionalProperties"] = _inlined(node["additionalProperties"], definitions)
    if "items" in node:
        kept["items"] = _inlined(node["items"], definitions)
    if "const" in kept:
        kept["enum"] = [kept.pop("const")]
    for bound in ("Minimum", "Maximum"):
        limit = kept.pop(f"exclusive{bound}", None)
        if limit is not None:  # OpenAPI 3.0 has the bound and a flag
            kept |= {bound.lower(): limit, f"exclusive{bound}": True}
    return kept


def _resolved(node: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The node with its references, its `X or null` and its `allOf` of one folded into itself."""
    while True:
        inner: Schema
        beside = dict(node)
        if "$ref" in node:
            inner = definitions[beside.pop("$ref").rpartition("/")[2]]
        elif "allOf" in node:
            (inner,) = beside.pop("allOf")
        elif any(choice == {"type": "null"} for choice in node.get("anyOf", ())):
            (inner,) = [choice for choice in beside.pop("anyOf") if choice != {"type": "null"}]
        else:
            return node
        rules = [*inner.get(VALIDATIONS, ()), *beside.get(VALIDATIONS, ())]
        node = {**inner, **beside} | ({VALIDATIONS: rules} if rules else {})
