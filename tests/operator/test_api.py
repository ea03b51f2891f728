"""The typed source and what is made from it, without a cluster."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sightline_operator.api import (
    Batch,
    BatchStatus,
    Pipeline,
    PipelineStatus,
    crds,
    json_schemas,
    seconds,
    structural,
    write_crds,
    write_reference,
)
from tests.operator import simulation
from tests.operator.objects import GONE, batch, changed, pipeline

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
MODELS = [Pipeline, PipelineStatus, Batch, BatchStatus]
KINDS = {"VisionPipeline": Pipeline, "VisionBatch": Batch}
Node = dict[str, Any]


def nodes(node: Node, path: str) -> Iterator[tuple[str, Node]]:
    """Every schema at and below a node, with its path."""
    yield path, node
    for name, child in node.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(node.get(name), dict):
            yield from nodes(node[name], f"{path}[{'' if name == 'items' else '*'}]")


NODES = [(path, node) for model in MODELS for path, node in nodes(structural(model), model.__name__)]


def kind_of(node: Node) -> str:
    return "int-or-string" if node.get("x-kubernetes-int-or-string") else node["type"]


# --- structural schemas ----------------------------------------------------------------------------------------------


def test_nothing_is_left_that_a_structural_schema_may_not_hold():
    for path, node in NODES:
        assert not {"$ref", "$defs", "title", "allOf", "oneOf", "const"} & node.keys(), path
        assert "anyOf" not in node or node.get("x-kubernetes-int-or-string"), path
        assert kind_of(node) in {"object", "array", "string", "integer", "number", "boolean", "int-or-string"}, path


def test_every_field_tells_what_it_is():
    for path, node in NODES:
        if not path.endswith("]"):
            assert len(node.get("description", "")) >= 12, path


def test_everything_that_can_grow_is_bounded():
    for path, node in NODES:
        match kind_of(node):
            case "array":
                assert node["maxItems"] <= 64, path
                assert node["x-kubernetes-list-type"] in {"atomic", "set", "map"}, path
            case "string":
                assert {"maxLength", "enum"} & node.keys() or node.get("format") == "date-time", path
            case "object" if isinstance(node.get("additionalProperties"), dict):
                assert node["maxProperties"] <= 32, path
            case "integer" | "number":
                assert "minimum" in node, path
            case _:
                pass


def test_only_pod_templates_take_what_nobody_described():
    free = {path.rpartition(".")[2] for path, node in NODES if node.get("x-kubernetes-preserve-unknown-fields")}
    assert free == {"podTemplateOverrides"}
    for path, node in NODES:
        if kind_of(node) == "object" and not path.endswith("podTemplateOverrides"):
            assert "properties" in node or "additionalProperties" in node, path


def test_lists_with_identities_are_keyed_by_required_fields():
    for path, node in NODES:
        if node.get("x-kubernetes-list-type") == "map":
            assert set(node["x-kubernetes-list-map-keys"]) <= set(node["items"]["required"]), path


def test_every_rule_names_the_field_that_it_reports():
    for crd in crds():
        root = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        for path, node in nodes(root, "VisionX"):
            for rule in node.get("x-kubernetes-validations", ()):
                field = (rule.get("fieldPath") or path).rpartition(".")[2].removesuffix("[]")
                names = {field, *node.get("properties", {})} | ({"a duration"} if kind_of(node) == "string" else set())
                message = rule["message"]
                assert any(name in message for name in names) or "every amount" in message, f"{path}: {message}"
                assert not message.endswith("."), message


def test_secrets_are_named_never_held():
    for path, node in NODES:
        name = path.rpartition(".")[2].lower()
        if kind_of(node) == "string":
            assert not re.search("secret|password|token$|apikey|credential", name), path


# --- what the models read --------------------------------------------------------------------------------------------


def test_an_empty_object_is_filled_in():
    spec = Pipeline.model_validate(pipeline()["spec"])
    assert spec.caption.inference_service is not None
    assert spec.caption.inference_service.gpu.resource_name == "nvidia.com/gpu"
    assert spec.gateway.deadline.max == "120s"
    assert spec.batches == ()


@pytest.mark.parametrize(
    ("changes", "enhances", "steps"),
    [
        ({}, "Always", ["caption", "enhance"]),
        ({"enhancePolicy.default": "OnRequest"}, "OnRequest", ["caption", "enhance"]),
        ({"enhancePolicy.default": "Never"}, "Never", ["caption"]),
        ({"enhance": GONE}, "Never", ["caption"]),
    ],
    ids=str,
)
def test_which_steps_there_are(changes: Node, enhances: str, steps: list[str]):
    spec = Pipeline.model_validate(pipeline(changes)["spec"])
    assert spec.enhances == enhances
    assert list(spec.steps) == steps


@pytest.mark.parametrize(
    ("gpus", "rollout", "expected"),
    [(0, GONE, False), (1, GONE, True), (1, "Availability", False), (0, "ResourceAware", True)],
)
def test_a_pod_with_gpus_goes_before_its_successor_comes(gpus: int, rollout: object, expected: bool):
    service = changed({"gpu": {"count": gpus}}, {"rollout": rollout})
    spec = Pipeline.model_validate(pipeline({"caption": {"inferenceService": service}})["spec"])
    assert spec.caption.inference_service is not None
    assert spec.caption.inference_service.is_resource_aware is expected


def test_fields_of_a_newer_definition_are_passed_over():
    """An operator that was not upgraded yet goes on."""
    Pipeline.model_validate(pipeline({"caption.inferenceService.nextYears": 1, "nextYears": {}})["spec"])


def test_specs_never_change():
    spec = Batch.model_validate(batch()["spec"])
    with pytest.raises(ValidationError, match="frozen"):
        spec.parallelism = 5


@pytest.mark.parametrize(
    ("text", "expected"), [("500ms", 0.5), ("90s", 90), ("1h30m", 5400), ("1.5h", 5400), ("1m1s1ms", 61.001), ("0s", 0)]
)
def test_seconds(text: str, expected: float):
    assert seconds(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["", "90", "s", "1 h", "1d", "-1s", "1h30", "1s\n"])
def test_no_seconds(text: str):
    with pytest.raises(ValueError, match="no duration"):
        seconds(text)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from(["ms", "s", "m", "h"])), min_size=1, max_size=4))
def test_seconds_add_up(parts: list[tuple[int, str]]):
    text = "".join(f"{count}{unit}" for count, unit in parts)
    assert seconds(text) == pytest.approx(sum(seconds(f"{count}{unit}") for count, unit in parts))


# --- what is generated -----------------------------------------------------------------------------------------------


def test_the_files_are_those_of_the_source(tmp_path: Path):
    made = {ROOT / "manifests" / "crd": write_crds(tmp_path / "crd")}
    made |= {ROOT / "docs" / "operator": write_reference(tmp_path / "docs")}
    for folder, paths in made.items():
        for path in paths:
            kept = folder / path.name
            assert kept.read_text() == path.read_text(), f"{kept.relative_to(ROOT)}: make manifests"


def test_definitions_are_read_back_as_they_are(tmp_path: Path):
    assert [yaml.safe_load(path.read_text()) for path in write_crds(tmp_path)] == crds()


def test_the_page_has_every_field(tmp_path: Path):
    (page, *_) = write_reference(tmp_path)
    text = page.read_text()
    for path, _ in NODES:
        name = path.rpartition(".")[2]
        if "." in path and "[" not in name:
            assert f"| `{name}` |" in text, path
    for link in re.findall(r"\]\(#([^)]+)\)", text):
        assert f"\n### {link}\n" in text.lower(), link


def refusals(manifest: Node) -> list[str]:
    validator = jsonschema.Draft202012Validator(json_schemas()[manifest["kind"]])
    return [error.message for error in validator.iter_errors(manifest)]


def test_json_schemas_are_schemas():
    for schema in json_schemas().values():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert "x-kubernetes" not in json.dumps(schema)


@pytest.mark.parametrize("manifest", [pipeline(), batch()], ids=["pipeline", "batch"])
def test_editors_accept_what_is_valid(manifest: Node):
    assert refusals(manifest) == []


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (pipeline({"caption.inferenceServise": {}}), "inferenceServise"),
        (pipeline({"gateway": GONE}), "gateway"),
        (pipeline({"caption.timeout": "soon"}), "soon"),
        (batch({"desiredState": "Asleep"}), "Asleep"),
        (batch({"chunkSize": 0}), "0 is less than the minimum"),
    ],
    ids=["typo", "missing", "duration", "enum", "bound"],
)
def test_editors_mark_what_is_not(manifest: Node, words: str):
    (message,) = refusals(manifest)
    assert words in message


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_samples_are_valid_and_without_unknown_fields(path: Path):
    for manifest in yaml.safe_load_all(path.read_text()):
        if manifest and manifest["kind"] in KINDS:
            assert refusals(manifest) == []
            KINDS[manifest["kind"]].model_validate(manifest["spec"], extra="forbid")


def test_every_status_that_is_decided_fits_the_schema():
    """A field that the schema does not know would vanish without a word, and be written again for ever."""
    operator = simulation.Operator(simulation.Cluster(failing=3))
    once = {"name": "once", "template": {"spec": simulation.work()}}
    nightly = {"name": "nightly", "schedule": "0 3 * * *", "template": {"spec": simulation.work()}}
    operator.cluster.create(simulation.pipeline(batches=[once, nightly]))
    for broken in ({"gpus": 0}, {"gpus": 8, "gateway_answers": False}, {"gateway_answers": True}, {"slow": True}):
        for name, value in broken.items():
            setattr(operator.cluster, name, value)
        for _ in range(40):
            operator.cluster.settle_controllers()
            operator.relist()
            for key in operator.mine():
                operator.reconcile(key)
            simulation.later(operator.cluster, minutes=17)
    told = [thing for _, thing in operator.cluster.log if thing and "status" in thing and thing["kind"] in KINDS]
    assert {thing["kind"] for thing in told} == set(KINDS)
    assert {field for thing in told for field in thing["status"]} >= {"schedules", "steps", "progress", "jobs"}
    for thing in told:
        assert refusals({key: thing[key] for key in ("apiVersion", "kind", "metadata", "spec", "status")}) == []


def test_the_source_costs_neither_kopf_nor_a_client():
    heavy = "{'kopf', 'kubernetes', 'torch', 'aiohttp'}"
    code = f"import sys, sightline_operator.api; print(sorted({heavy} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"
