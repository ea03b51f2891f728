"""The two CustomResourceDefinitions: schemas of the typed source, and what kubectl shows of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sightline_operator.settings import GROUP, PART_OF, VERSION

from .batch import Batch, BatchStatus
from .pipeline import BATCH_NAME_LENGTH, NAME_LENGTH, Pipeline, PipelineStatus
from .schema import Schema, structural
from .types import VALIDATIONS, Object, Rule

_HEADER = "# Made by `make manifests` from operator/src/sightline_operator/api; change it there.\n"
_DNS_1035 = "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')"


def crds() -> list[dict[str, Any]]:
    """Both definitions, as they are applied."""
    return [_pipelines(), _batches()]


def write_crds(folder: Path) -> list[Path]:
    """Write each definition to `<plural>.yaml` below the folder; the same text for the same source."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for crd in crds():
        path = folder / f"{crd['spec']['names']['plural']}.yaml"
        text = yaml.safe_dump(crd, sort_keys=False, allow_unicode=True, width=120)
        path.write_text(_HEADER + text, encoding="utf-8")
        paths.append(path)
    return paths


def _pipelines() -> dict[str, Any]:
    rules = (
        Rule(
            f"{_DNS_1035} && size(self.metadata.name) <= {NAME_LENGTH}",
            "metadata.name must start with a letter, hold only a-z, 0-9 and -, and have at most "
            f"{NAME_LENGTH} characters: children are named after it",
        ),
        Rule(
            f"!has(self.spec.batches) || self.spec.batches.all(b, size(self.metadata.name) + size(b.name) + "
            f"(has(b.schedule) ? 10 : 1) <= {BATCH_NAME_LENGTH})",
            "spec.batches[].name is too long: the VisionBatch's name, made of metadata.name, it and on a schedule nine "
            f"characters more, may have {BATCH_NAME_LENGTH} characters",
            ".spec.batches",
        ),
    )
    columns = [
        _condition_column("Ready", "Ready", "Whether it serves."),
        _condition_column("Degraded", "Degraded", "Whether it serves less than it should."),
        _column("Caption", '.status.steps[?(@.name=="caption")].model', "Model of the caption step."),
        _column("Enhance", '.status.steps[?(@.name=="enhance")].model', "Model of the enhance step."),
        _column("Replicas", ".status.gateway.ready", "Ready pods of the gateway, of wanted ones."),
        _column("URL", ".status.url", "Where it is called.", priority=1),
        _column("Reason", '.status.conditions[?(@.type=="Ready")].reason', "Why it is ready or not.", priority=1),
        _AGE,
    ]
    version = _version(
        Pipeline, PipelineStatus, rules, columns, "A caption→enhance endpoint: its models and its gateway."
    )
    version["subresources"]["scale"] = {
        "specReplicasPath": ".spec.gateway.replicas",
        "statusReplicasPath": ".status.gateway.replicas",
        "labelSelectorPath": ".status.gateway.selector",
    }
    return _definition("VisionPipeline", "visionpipelines", "vpipe", version)


def _batches() -> dict[str, Any]:
    rules = (
        Rule(
            f"{_DNS_1035} && size(self.metadata.name) <= {BATCH_NAME_LENGTH}",
            "metadata.name must start with a letter, hold only a-z, 0-9 and -, and have at most "
            f"{BATCH_NAME_LENGTH} characters: Jobs and pods are named after it",
        ),
    )
    columns = [
        _column("State", ".status.state", "All conditions in one word."),
        _column("Pipeline", ".spec.pipelineRef.name", "VisionPipeline that does the work."),
        _column("Done", ".status.progress.done", "Items done, of all."),
        _column("%", ".status.progress.percent", "Per cent done.", kind="integer"),
        _column("Failed", ".status.progress.failed", "Items that failed for good.", kind="integer"),
        _column("Rate", ".status.throughput.itemsPerSecond", "Items a second."),
        _column("ETA", ".status.eta", "Time until it is done."),
        _column("Reason", '.status.conditions[?(@.type=="Progressing")].reason', "Why it moves or not.", priority=1),
        _AGE,
    ]
    version = _version(Batch, BatchStatus, rules, columns, "Very many images through a VisionPipeline.")
    version["selectableFields"] = [{"jsonPath": ".spec.pipelineRef.name"}, {"jsonPath": ".spec.desiredState"}]
    return _definition("VisionBatch", "visionbatches", "vbatch", version)


def _version(
    spec: type[Object], status: type[Object], rules: tuple[Rule, ...], columns: list[dict[str, Any]], description: str
) -> dict[str, Any]:
    root: Schema = {
        "type": "object",
        "description": description,
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{GROUP}/{VERSION}."},
            "kind": {"type": "string", "description": "Kind of this object."},
            "metadata": {"type": "object"},
            "spec": structural(spec),
            "status": structural(status),
        },
        VALIDATIONS: [rule.as_schema() for rule in rules],
    }
    return {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": columns,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": root},
    }


def _definition(kind: str, plural: str, short: str, version: dict[str, Any]) -> dict[str, Any]:
    names = {
        "kind": kind,
        "listKind": f"{kind}List",
        "plural": plural,
        "singular": kind.lower(),
        "shortNames": [short],
        "categories": ["vision"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}", "labels": {"app.kubernetes.io/part-of": PART_OF}},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def _column(name: str, path: str, description: str, *, kind: str = "string", priority: int = 0) -> dict[str, Any]:
    column = {"name": name, "type": kind, "description": description, "jsonPath": path}
    return column | ({"priority": priority} if priority else {})


def _condition_column(name: str, condition: str, description: str) -> dict[str, Any]:
    return _column(name, f'.status.conditions[?(@.type=="{condition}")].status', description)


_AGE = _column("Age", ".metadata.creationTimestamp", "Time since it was made.", kind="date")
