"""Checks of inference over plain JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from sightline.conformance.metadata import listed_versions
from sightline.conformance.suite import Group, Level, Skipped, expect
from sightline.conformance.target import Target, mapping_of
from sightline.conformance.tensors import DATATYPES, Json

JSON = Group("json", "REST JSON")


@JSON.check("infer", Level.MUST)
def infer(target: Target) -> None:
    """A valid request answers 200 with the model's name and outputs whose data fill their shapes."""
    try:
        request = target.request
    except Skipped as reason:
        expect(False, str(reason))
        return
    check_response(mapping_of(target.infer(request.as_json())), target)


@JSON.check("id", Level.MUST)
def request_id(target: Target) -> None:
    """The request's id comes back."""
    body = mapping_of(target.infer(target.request.as_json(id="conformance-42")))
    expect(body.get("id") == "conformance-42", f"the id is {body.get('id')!r}")


@JSON.check("outputs", Level.MUST)
def outputs_filter(target: Target) -> None:
    """Only the outputs that were asked for come back."""
    names = output_names(target)
    if len(names) < 2:
        raise Skipped("the model has one output")
    for name in (names[0], names[-1]):
        body = mapping_of(target.infer(target.request.as_json(outputs=[{"name": name}])))
        got = [output["name"] for output in body["outputs"]]
        expect(got == [name], f"asked for {name}, got {got}")


@JSON.check("as-declared", Level.MUST)
def as_declared(target: Target) -> None:
    """Without a wish the outputs are those of the metadata, of the same datatypes and fitting shapes."""
    body = mapping_of(target.infer(target.request.as_json()))
    declared = {spec["name"]: spec for spec in target.metadata["outputs"]}
    got = {output["name"]: output for output in body["outputs"]}
    expect(set(got) == set(declared), f"declared {sorted(declared)}, got {sorted(got)}")
    for name, output in got.items():
        spec = declared[name]
        expect(output["datatype"] == spec["datatype"], f"{name}: {output['datatype']}, declared {spec['datatype']}")
        fits = len(output["shape"]) == len(spec["shape"]) and all(
            wanted in {-1, size} for wanted, size in zip(spec["shape"], output["shape"], strict=True)
        )
        expect(fits, f"{name} has the shape {output['shape']}, declared {spec['shape']}")


@JSON.check("nested-data", Level.MUST)
def nested_data(target: Target) -> None:
    """Data in nested lists mean the same as flat ones."""
    request = target.request
    if all(len(tensor.shape) < 2 for tensor in request.inputs):
        raise Skipped("the model's inputs have one dimension")
    body: Json = request.as_json() | {"inputs": [tensor.as_nested_json() for tensor in request.inputs]}
    check_response(mapping_of(target.infer(body)), target)


@JSON.check("version", Level.MUST)
def version(target: Target) -> None:
    """A version that the metadata lists can be asked for inference."""
    for name in listed_versions(target):
        path = f"{target.model_path}/versions/{name}/infer"
        check_response(mapping_of(target.post(path, json.dumps(target.request.as_json()).encode())), target)


@JSON.check("no-nulls", Level.MUST)
def no_nulls(target: Target) -> None:
    """What an answer does not have is left out; a null is neither a string nor an object."""
    body = mapping_of(target.infer(target.request.as_json()))
    nulls = [key for key, value in body.items() if value is None]
    for output in body["outputs"]:
        nulls += [f"{output.get('name')}.{key}" for key, value in output.items() if value is None]
    expect(not nulls, f"null: {', '.join(nulls)}")


def output_names(target: Target) -> list[str]:
    """The outputs that the metadata names."""
    return [str(spec["name"]) for spec in target.metadata["outputs"]]


def check_response(body: Mapping[str, Any], target: Target) -> None:
    """An inference response of the protocol, all outputs as JSON. Raises Failed."""
    expect(body.get("model_name") == target.model, f"model_name is {body.get('model_name')!r}")
    outputs = body.get("outputs")
    expect(isinstance(outputs, list) and outputs, f"outputs is {outputs!r}")
    for output in cast("list[Json]", outputs):
        name = output.get("name")
        expect(isinstance(name, str), f"an output has the name {name!r}")
        expect(output.get("datatype") in DATATYPES, f"{name} has the datatype {output.get('datatype')!r}")
        shape, data = output.get("shape"), output.get("data")
        expect(isinstance(shape, list), f"{name} has the shape {shape!r}")
        expect(isinstance(data, list), f"{name} has no data")
        wanted, got = math.prod(cast("Sequence[int]", shape)), len(flattened(data))
        expect(wanted == got, f"{name}: {got} elements in the shape {shape}")


def flattened(data: object) -> list[object]:
    """The elements of flat or nested data."""
    if not isinstance(data, list):
        return [data]
    return [element for item in cast("list[object]", data) for element in flattened(item)]
