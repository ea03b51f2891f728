"""What people read about the two kinds, from the typed source: a page of reference, and JSON schemas for editors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from sightline_operator.settings import API_VERSION

from .batch import Batch, BatchStatus
from .definitions import crds
from .pipeline import Pipeline, PipelineStatus
from .schema import Schema, described
from .types import VALIDATIONS, Object

_PAGE_INTRODUCTION = f"""\
# VisionPipeline and VisionBatch

Every field of the two kinds of `{API_VERSION}`. Made by `make manifests` from
`operator/src/sightline_operator/api`; change it there. `kubectl explain vpipe.spec --recursive` tells the same.

Rules are checked by the API server itself (CEL): an object that breaks one is refused with the sentence that stands
here, and `kubectl apply --dry-run=server` finds it without changing anything. Durations are written as `500ms`, `90s`
or `1h30m`. For editors: `visionpipeline.schema.json` and `visionbatch.schema.json` beside this page.
"""
_MODELS: Mapping[str, tuple[type[Object], type[Object]]] = {
    "VisionPipeline": (Pipeline, PipelineStatus),
    "VisionBatch": (Batch, BatchStatus),
}


def write_reference(folder: Path) -> list[Path]:
    """Write `reference.md` and a JSON schema for each kind; the same text for the same source."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"reference.md": reference()}
    for kind, schema in json_schemas().items():
        texts[f"{kind.lower()}.schema.json"] = json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


# --- JSON schemas ----------------------------------------------------------------------------------------------------


def json_schemas() -> dict[str, Schema]:
    """By kind, for editors: what the API server checks but for the rules, and no field that it would not know."""
    answer: dict[str, Schema] = {}
    for crd in crds():
        kind = crd["spec"]["names"]["kind"]
        schema = _for_editors(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
        properties = schema["properties"]
        properties["apiVersion"]["const"] = API_VERSION
        properties["kind"]["const"] = kind
        properties["metadata"] = {"type": "object", "description": "Name, namespace, labels and annotations."}
        head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": kind}
        answer[kind] = head | schema | {"required": ["apiVersion", "kind", "metadata", "spec"]}
    return answer


def _for_editors(node: Schema) -> Schema:
    kept = {name: value for name, value in node.items() if not name.startswith("x-kubernetes-")}
    for bound in ("Minimum", "Maximum"):
        if kept.pop(f"exclusive{bound}", False):
            kept[f"exclusive{bound}"] = kept.pop(bound.lower())
    if "properties" in node:
        kept["properties"] = {name: _for_editors(child) for name, child in node["properties"].items()}
        kept["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), dict):
        kept["additionalProperties"] = _for_editors(node["additionalProperties"])
    if "items" in node:
        kept["items"] = _for_editors(node["items"])
    if rules := node.get(VALIDATIONS):
        kept["$comment"] = "; ".join(rule["message"] for rule in rules)
    return kept


# --- the page --------------------------------------------------------------------------------------------------------


def reference() -> str:
    """The page, in Markdown."""
    parts = [_PAGE_INTRODUCTION]
    written: set[str] = set()
    for crd in crds():
        parts += _of_kind(crd, written)
    return "\n".join(parts)


def _of_kind(crd: Mapping[str, Any], written: set[str]) -> Iterator[str]:
    names, version = crd["spec"]["names"], crd["spec"]["versions"][0]
    root = version["schema"]["openAPIV3Schema"]
    yield f"## {names['kind']}\n"
    yield f"{root['description']} `kubectl get {names['shortNames'][0]}`, category `{names['categories'][0]}`.\n"
    yield "| column | what it shows |\n|---|---|"
    for column in version["additionalPrinterColumns"]:
        wide = " (`-o wide`)" if column.get("priority") else ""
        yield f"| {column['name'].upper()}{wide} | {column['description']} |"
    yield ""
    yield from _rules({VALIDATIONS: root[VALIDATIONS]})
    for part, model in zip(("spec", "status"), _MODELS[names["kind"]], strict=True):
        schema = described(model)
        yield f"### {names['kind']}.{part}\n"
        yield from _object(schema)
        for name, definition in _below(schema, schema.get("$defs", {})):
            if name not in written:
                written.add(name)
                yield f"### {name}\n"
                yield from _object(definition)


def _below(schema: Schema, definitions: Mapping[str, Schema]) -> Iterator[tuple[str, Schema]]:
    """What a schema refers to, directly and then further, each once, in the order of reading."""
    seen: set[str] = set()
    queue = [schema]
    while queue:
        for name in _references({key: value for key, value in queue.pop(0).items() if key != "$defs"}):
            if name not in seen:
                seen.add(name)
                yield name, definitions[name]
                queue.append(definitions[name])


def _references(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in cast("Mapping[str, object]", node).items():
            if key == "$ref":
                yield str(value).rpartition("/")[2]
            else:
                yield from _references(value)
    elif isinstance(node, list):
        for item in cast("list[object]", node):
            yield from _references(item)


def _object(schema: Schema) -> Iterator[str]:
    yield f"{schema['description']}\n"
    yield "| field | type | default | what it is |\n|---|---|---|---|"
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        default = "required" if name in required else _default(field)
        yield f"| `{name}` | {_type(field)} | {default} | {_words(field)} |"
    yield ""
    yield from _rules(schema)


def _words(field: Schema) -> str:
    """Its description, its own or that of its type, fit for a cell."""
    choices = [choice for choice in field.get("anyOf", ()) if "description" in choice]
    return " ".join((field.get("description") or choices[0]["description"]).replace("|", "\\|").split())


def _rules(schema: Schema) -> Iterator[str]:
    """Rules of the object itself, then those of its fields by name."""
    rows = list(schema.get(VALIDATIONS, ()))
    for field in schema.get("properties", {}).values():
        rows += field.get(VALIDATIONS, ())
    seen: set[str] = set()
    for rule in rows:
        if rule["message"] not in seen and "a duration such as" not in rule["message"]:
            seen.add(rule["message"])
            yield f"- Rule: {rule['message']}."
    if seen:
        yield ""


def _default(field: Schema) -> str:
    default = field.get("default")
    if default in (None, {}, []) or isinstance(default, dict):
        return ""
    return f"`{json.dumps(default, ensure_ascii=False)}`"


def _type(field: Schema) -> str:
    if field.get("x-kubernetes-int-or-string"):
        return "quantity"
    if field.get("format") == "date-time":
        return "time"
    for key in ("allOf", "anyOf"):
        choices = [choice for choice in field.get(key, ()) if choice != {"type": "null"}]
        if choices:
            return _type(choices[0])
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field or "const" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {_type(field['items'])}, at most {field['maxItems']}"
    if field["type"] == "object":
        inner = field.get("additionalProperties")
        return f"map to {_type(inner)}" if isinstance(inner, dict) else "object, free"
    if field["type"] == "string":
        is_duration = any("duration(self)" in rule["rule"] for rule in field.get(VALIDATIONS, ()))
        return "duration" if is_duration else "string"
    return f"{field['type']}{_bounds(field)}"


def _bounds(field: Schema) -> str:
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum", field.get("exclusiveMaximum"))
    if low is None and high is None:
        return ""
    return f" {'>' if 'exclusiveMinimum' in field else '≥'} {low:,}" if high is None else f" {low:,} to {high:,}"
