"""Checks of what a server says about itself: health, readiness, metadata."""

from typing import Any, cast

from sightline.conformance.suite import Group, Level, Skipped, expect
from sightline.conformance.target import NO_SUCH_MODEL, Target, json_object, mapping_of, said
from sightline.conformance.tensors import DATATYPES, Json

READY = Group("ready", "Readiness")
METADATA = Group("metadata", "Metadata")


@READY.check("live", Level.MUST)
def live(target: Target) -> None:
    """`/v2/health/live` answers 200 and does not say false."""
    _affirms(target, "/v2/health/live")


@READY.check("server", Level.MUST)
def server_ready(target: Target) -> None:
    """`/v2/health/ready` answers 200 and does not say false."""
    _affirms(target, "/v2/health/ready")


@READY.check("model", Level.MUST)
def model_ready(target: Target) -> None:
    """`/v2/models/{model}/ready` answers 200 with the model's name and `ready` true."""
    body = mapping_of(target.get(f"{target.model_path}/ready"))
    expect(body.get("name") == target.model, f"the name is {body.get('name')!r}")
    expect(body.get("ready") is True, f"ready is {body.get('ready')!r}")


@READY.check("unknown-model", Level.MUST)
def unknown_model_not_ready(target: Target) -> None:
    """A model that does not exist is not ready."""
    response = target.get(f"/v2/models/{NO_SUCH_MODEL}/ready")
    expect(response.status_code != 200, f"HTTP {said(response)}")


@METADATA.check("server", Level.MUST)
def server_metadata(target: Target) -> None:
    """`/v2` answers 200 with name, version and a list of extensions."""
    body = target.server_metadata
    for key in ("name", "version"):
        expect(isinstance(body.get(key), str), f"{key} is {body.get(key)!r}")
    expect(_are_texts(body.get("extensions")), f"extensions is {body.get('extensions')!r}")


@METADATA.check("model", Level.MUST)
def model_metadata(target: Target) -> None:
    """`/v2/models/{model}` answers 200 with name, platform, and name, datatype and shape of each tensor."""
    body = target.metadata
    expect(body.get("name") == target.model, f"the name is {body.get('name')!r}")
    expect(isinstance(body.get("platform"), str), f"platform is {body.get('platform')!r}")
    for side in ("inputs", "outputs"):
        tensors = body.get(side)
        expect(isinstance(tensors, list) and tensors, f"{side} is {tensors!r}")
        for tensor in cast("list[object]", tensors):
            _check_tensor(side, tensor)


@METADATA.check("no-nulls", Level.MUST)
def no_nulls(target: Target) -> None:
    """What the model does not have is left out of its metadata; a null is neither a list nor a string."""
    nulls = [key for key, value in target.metadata.items() if value is None]
    expect(not nulls, f"null: {', '.join(nulls)}")


@METADATA.check("unknown-model", Level.MUST)
def unknown_model(target: Target) -> None:
    """Metadata of a model that does not exist is an HTTP error with `{"error": string}`."""
    response = target.get(f"/v2/models/{NO_SUCH_MODEL}")
    expect(response.status_code >= 400, f"HTTP {said(response)}")
    expect(isinstance(json_object(response).get("error"), str), f"no error object: {said(response)}")


@METADATA.check("versions", Level.MUST)
def versions(target: Target) -> None:
    """A version that the metadata lists can be asked for by name: metadata and readiness."""
    for version in listed_versions(target):
        base = f"{target.model_path}/versions/{version}"
        expect(mapping_of(target.get(base)).get("name") == target.model, f"{base} has another name")
        expect(mapping_of(target.get(f"{base}/ready")).get("ready") is True, f"{base}/ready does not say true")


@METADATA.check("binary-announced", Level.EXTENSION)
def binary_announced(target: Target) -> None:
    """`/v2` announces the extension `binary_tensor_data`."""
    extensions = target.server_metadata.get("extensions")
    expect("binary_tensor_data" in (extensions or []), f"extensions: {extensions}")


def listed_versions(target: Target) -> list[str]:
    """The versions in the metadata. Raises Skipped when it lists none."""
    listed = target.metadata.get("versions")
    if not listed:
        raise Skipped("the metadata lists no versions")
    return [str(version) for version in listed]


def _affirms(target: Target, path: str) -> None:
    """200; the protocol draws a body with one boolean, Triton sends none."""
    response = target.get(path)
    expect(response.status_code == 200, f"HTTP {said(response)}")
    if not response.content.strip():
        return
    body: Any = json_object(response)
    booleans = [body[key] for key in ("live", "ready") if key in body]
    expect(booleans, f"neither live nor ready: {said(response)}")
    expect(all(value is True for value in booleans), f"it says {body}")


def _check_tensor(side: str, tensor: object) -> None:
    expect(isinstance(tensor, dict), f"{side} holds {tensor!r}")
    entry = cast("Json", tensor)
    name = entry.get("name")
    expect(isinstance(name, str) and name, f"a tensor of {side} has the name {name!r}")
    expect(entry.get("datatype") in DATATYPES, f"{name} has the datatype {entry.get('datatype')!r}")
    shape = entry.get("shape")
    is_shape = isinstance(shape, list) and all(type(size) is int and size >= -1 for size in cast("list[object]", shape))
    expect(is_shape, f"{name} has the shape {shape!r}")


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in cast("list[object]", value))
