"""Write what of the chart is made: its CRDs, the operator's rules, and its README and schema of values.yaml."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "operator" / "src")]

from sightline_operator.rbac import lease_rules, rules, user_roles  # noqa: E402

CHART = ROOT / "charts" / "sightline"
PREDICTORS = ("describe", "generate", "embed", "enhance", "blip")

NAME = {"pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", "maxLength": 253}
OBJECTS = {"items": {"type": "object"}}
STRINGS = {"additionalProperties": {"type": "string"}}
VARIABLES = {"additionalProperties": {"type": ["string", "number", "boolean"]}}
ANYTHING = {"additionalProperties": True}
RESOURCES = {
    "properties": {name: {"type": "object", "additionalProperties": True} for name in ("requests", "limits")},
    "additionalProperties": False,
}
REFERENCE = {
    "properties": {"name": {"type": "string"}, "key": {"type": "string"}},
    "additionalProperties": False,
    "dependentRequired": {"name": ["key"], "key": ["name"]},
}
AUTOSCALING = {
    "properties": {
        "maxReplicas": {"type": "integer", "minimum": 1},
        "targetPercent": {"type": "integer", "minimum": 1, "maximum": 100},
        "itemsInFlight": {"type": "integer", "minimum": 1},
        "prometheus": {"type": "string", "pattern": "^https?://"},
    },
    "additionalProperties": False,
    "dependentRequired": {
        "targetPercent": ["maxReplicas"],
        "itemsInFlight": ["maxReplicas", "prometheus"],
        "prometheus": ["itemsInFlight"],
    },
    "dependentSchemas": {"itemsInFlight": {"properties": {"targetPercent": False}}},
}
RULES: dict[str, dict[str, Any]] = {
    "profile": {"enum": ["cpu", "gpu-1x24", "gpu-1x48", "gpu-1x80", "gpu-2x80"]},
    "imagePullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "imagePrefix": {"pattern": "^$|/$"},
    "imagePullSecrets": OBJECTS,
    **{f"{part}.image": {"minLength": 1} for part in ("operator", "models", "gateway")},
    "operator.replicas": {"minimum": 1, "maximum": 5},
    "operator.namespaces": {"items": {"type": "string", **NAME}},
    "operator.deploymentMode": {"enum": ["Standard", "RawDeployment", "Knative", "Serverless"]},
    "operator.logLevel": {"enum": ["debug", "info", "warning", "error"]},
    "operator.resources": RESOURCES,
    "models.tokenSecretRef": REFERENCE,
    "models.loadSeconds": {"minimum": 10},
    "models.sharedMemory": {"pattern": "^[0-9]+(Mi|Gi)$"},
    "models.autoscaling": AUTOSCALING,
    "models.cache.size": {"pattern": "^([0-9]+(Mi|Gi|Ti))?$"},
    "models.cache.accessMode": {"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]},
    "apiKey.existingSecret": NAME,
    "apiKey.key": {"minLength": 1},
    "pipeline.name": {**NAME, "minLength": 1, "maxLength": 40},
    "pipeline.spec": ANYTHING,
    "networkPolicy.from": OBJECTS,
    "monitoring.labels": STRINGS,
    **{f"{part}.nodeSelector": STRINGS for part in ("operator", "models")},
    **{f"{part}.tolerations": OBJECTS for part in ("operator", "models")},
    "operator.affinity": ANYTHING,
    **{f"predictors.{name}.replicas": {"minimum": 0} for name in PREDICTORS},
    **{f"predictors.{name}.resources": RESOURCES for name in PREDICTORS},
    **{f"predictors.{name}.autoscaling": AUTOSCALING for name in PREDICTORS},
    **{f"predictors.{name}.nodeSelector": STRINGS for name in PREDICTORS},
    **{f"predictors.{name}.tolerations": OBJECTS for name in PREDICTORS},
    **{f"predictors.{name}.env": VARIABLES for name in PREDICTORS},
}
"""What a value's type does not say."""


def comments(text: str) -> dict[str, str]:
    """What is said of each value, by its path: the lines that begin with `# --` and those that go on."""
    said: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    pending: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("# -- "):
            pending = [bare.removeprefix("# -- ")]
        elif bare.startswith("# ") and pending:
            pending.append(bare.removeprefix("# "))
        elif match := re.match(r"( *)([A-Za-z]\w*):", line):
            depth = len(match[1])
            path = [*(part for part in path if part[0] < depth), (depth, match[2])]
            if pending:
                said[".".join(name for _, name in path)] = " ".join(pending)
            pending = []
    return said


def schema_of(value: object, path: str, said: dict[str, str]) -> dict[str, Any]:
    """A closed schema: a value that is not in values.yaml is a mistake, named with its path by Helm."""
    about = {"description": said[path]} if path in said else {}
    if isinstance(value, dict) and value and path not in said:
        properties = {name: schema_of(item, f"{path}.{name}".lstrip("."), said) for name, item in value.items()}
        return {"type": "object", "additionalProperties": False, "properties": properties}
    kinds = {bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}
    return {"type": kinds[type(value)], **about, "default": value, **RULES.get(path, {})}


def rows(value: dict[str, Any], said: dict[str, str], above: str = "") -> list[str]:
    """One row of the README for each value that is described."""
    made: list[str] = []
    for name, item in value.items():
        path = f"{above}.{name}".lstrip(".")
        if path in said:
            made.append(f"| `{path}` | `{json.dumps(item)}` | {said[path].replace('|', '&#124;')} |")
        elif isinstance(item, dict):
            made += rows(item, said, path)
    return made


def profile_rows() -> list[str]:
    profiles = yaml.safe_load((CHART / "files" / "profiles.yaml").read_text())
    return [f"| `{name}` | {profile['fits']} |" for name, profile in profiles.items()]


def readme(values: dict[str, Any], said: dict[str, str]) -> str:
    text = (CHART / "README.md.gotmpl").read_text()
    text = text.replace("<!-- profiles -->", "\n".join(["| profile | what fits |", "|---|---|", *profile_rows()]))
    head = ["| value | default | what it is |", "|---|---|---|"]
    return text.replace("<!-- values -->", "\n".join([*head, *rows(values, said)]))


def main() -> None:
    crds = CHART / "charts" / "crds" / "crds"
    crds.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "manifests" / "crd").glob("*.yaml"):
        shutil.copyfile(path, crds / path.name)
    users = [
        {
            "name": role["metadata"]["name"].removeprefix("sightline-"),
            "labels": _into(role),
            "rules": role["rules"],
        }
        for role in user_roles()
    ]
    made = {"rules": rules(), "lease": lease_rules(), "users": users}
    head = "# Made by `make manifests` of what the operator calls; do not edit.\n"
    (CHART / "files" / "rbac.yaml").write_text(head + yaml.safe_dump(made, sort_keys=False))
    text = (CHART / "values.yaml").read_text()
    values, said = yaml.safe_load(text), comments(text)
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_of(values, "", said)}
    for part in (schema, schema["properties"]["crds"]):
        part["properties"]["global"] = {"type": "object"}  # Helm's own
    (CHART / "values.schema.json").write_text(json.dumps(schema, indent=2) + "\n")
    (CHART / "README.md").write_text(readme(values, said))


def _into(role: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in role["metadata"]["labels"].items() if "aggregate-to" in name}


if __name__ == "__main__":
    main()
