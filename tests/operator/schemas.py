"""JSON schemas for kubeconform out of what an API server says of its kinds: Kubernetes' own, our CRDs', KServe's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.operator.conftest import ApiServer

LOCATION = "{{ .Group }}/{{ .ResourceKind }}-{{ .ResourceAPIVersion }}.json"
"""Where kubeconform looks, below the folder. The group of Kubernetes' core is its version there."""
REFERENCE = "#/components/schemas/"


def write_schemas(apiserver: ApiServer, kinds: set[tuple[str, str]], folder: Path) -> set[tuple[str, str]]:
    """A closed schema of every kind, as (apiVersion, kind), that the server serves. Returns those."""
    written: set[tuple[str, str]] = set()
    with apiserver.client() as client:
        paths = client.get("/openapi/v3").raise_for_status().json()["paths"]
        for api_version in sorted({api_version for api_version, _ in kinds}):
            place = f"apis/{api_version}" if "/" in api_version else f"api/{api_version}"
            if place not in paths:
                continue
            schemas = client.get(paths[place]["serverRelativeURL"]).raise_for_status().json()["components"]["schemas"]
            group, _, version = api_version.rpartition("/")
            for name, schema in schemas.items():
                for row in schema.get("x-kubernetes-group-version-kind", []):
                    if (row["group"], row["version"]) == (group, version) and (api_version, row["kind"]) in kinds:
                        path = folder / (group or version) / f"{row['kind'].lower()}-{version}.json"
                        path.parent.mkdir(parents=True, exist_ok=True)
                        path.write_text(json.dumps(standalone(name, schemas)))
                        written.add((api_version, row["kind"]))
    return written


def standalone(name: str, schemas: dict[str, Any]) -> dict[str, Any]:
    """One schema with what it refers to beside it."""
    needed, waiting = {}, [name]
    while waiting:
        one = waiting.pop()
        if one not in needed:
            needed[one] = closed(schemas[one])
            waiting += _references(schemas[one])
    return {"definitions": needed, **needed[name]}  # draft 4, whose exclusive bounds are those of OpenAPI 3.0


def closed(schema: Any) -> Any:
    """As the server checks strictly: no field that the schema does not name, unless unknown ones are preserved."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items() if key not in {"default", "format", "nullable"}}
    if isinstance(made.get("$ref"), str):
        made["$ref"] = made["$ref"].replace(REFERENCE, "#/definitions/")
    if isinstance(schema.get("properties"), dict):  # else a field of that name
        made["properties"] = {key: closed(value) for key, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
        if schema.get("x-kubernetes-embedded-resource"):
            made["properties"] |= {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
    if schema.get("nullable") and isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].removeprefix(REFERENCE)
        schema = list(schema.values())
    if isinstance(schema, list):
        for item in schema:
            yield from _references(item)
