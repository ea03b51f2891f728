"""Checks of the binary tensor data extension and of compressed bodies, on bare HTTP."""

import gzip
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import httpx

from sightline.conformance.infer import check_response, output_names
from sightline.conformance.suite import Group, Level, Skipped, expect
from sightline.conformance.target import HEADER_LENGTH, Target, mapping_of, said
from sightline.conformance.tensors import Element, elements_of, picture

BINARY = Group("binary", "REST binary")
COMPRESSION = Group("compression", "Compression")

LARGE_SIDE = 1800
"""A noise PNG of this side has 9.7 MB: more than the 8 MiB at which KServe's gRPC server stops by default."""


@BINARY.check("input", Level.EXTENSION)
def binary_input(target: Target) -> None:
    """Inputs in binary form are taken (text as UTF-8, images as the base64 text that JSON would carry)."""
    check_response(mapping_of(target.infer_binary(*target.request.as_text().as_binary())), target)


@BINARY.check("image-bytes", Level.EXTENSION)
def image_bytes(target: Target) -> None:
    """An element of a BYTES tensor may be any bytes: a JPEG as it is."""
    request = target.image_request.with_image(picture("JPEG"))
    check_response(mapping_of(target.infer_binary(*request.as_binary())), target)


@BINARY.check("large-image", Level.PROMISE)
def large_image(target: Target) -> None:
    """An image of more than 8 MiB is taken."""
    request = target.image_request.with_image(picture(side=LARGE_SIDE, is_noise=True))
    check_response(mapping_of(target.infer_binary(*request.as_binary())), target)


@BINARY.check("output", Level.EXTENSION)
def binary_output(target: Target) -> None:
    """`outputs[].parameters.binary_data` brings that output in binary form, its sizes true."""
    wishes = [{"name": name, "parameters": {"binary_data": True}} for name in output_names(target)]
    head, data = binary_answer(target.infer(target.request.as_json(outputs=wishes)))
    _check_outputs(head, data, set(output_names(target)))


@BINARY.check("output-default", Level.EXTENSION)
def binary_output_default(target: Target) -> None:
    """`parameters.binary_data_output` brings all outputs in binary form."""
    head, data = binary_answer(target.infer(target.request.as_json(parameters={"binary_data_output": True})))
    _check_outputs(head, data, set(output_names(target)))


@BINARY.check("output-exception", Level.EXTENSION)
def binary_output_exception(target: Target) -> None:
    """`binary_data: false` of one output is stronger than `binary_data_output`."""
    name = output_names(target)[0]
    wishes = [{"name": name, "parameters": {"binary_data": False}}]
    response = target.infer(target.request.as_json(outputs=wishes, parameters={"binary_data_output": True}))
    expect(HEADER_LENGTH not in response.headers, "the answer has a binary part")
    check_response(mapping_of(response), target)


@COMPRESSION.check("request-gzip", Level.EXTENSION)
def gzip_request(target: Target) -> None:
    """A body with `Content-Encoding: gzip` is taken."""
    body = gzip.compress(json.dumps(target.request.as_json()).encode())
    check_response(mapping_of(target.post(f"{target.model_path}/infer", body, {"Content-Encoding": "gzip"})), target)


@COMPRESSION.check("request-deflate", Level.EXTENSION)
def deflate_request(target: Target) -> None:
    """A body with `Content-Encoding: deflate` is taken."""
    body = zlib.compress(json.dumps(target.request.as_json()).encode())
    check_response(mapping_of(target.post(f"{target.model_path}/infer", body, {"Content-Encoding": "deflate"})), target)


@COMPRESSION.check("response-gzip", Level.EXTENSION)
def gzip_response(target: Target) -> None:
    """A client that accepts only gzip can read the answer, and it is compressed."""
    response = target.infer(target.request.as_json(), {"Accept-Encoding": "gzip"})
    check_response(mapping_of(response), target)
    if response.headers.get("content-encoding") is None:
        raise Skipped("answers are not compressed")
    expect(response.headers["content-encoding"] == "gzip", f"it is {response.headers['content-encoding']}")


@COMPRESSION.check("broken-gzip", Level.PROMISE)
def broken_gzip(target: Target) -> None:
    """A body that only claims to be gzip is answered with a 4xx."""
    body = json.dumps(target.request.as_json()).encode()
    response = target.post(f"{target.model_path}/infer", b"\x1f\x8b" + body, {"Content-Encoding": "gzip"})
    expect(400 <= response.status_code < 500, f"HTTP {said(response)}")


def binary_answer(response: httpx.Response) -> tuple[dict[str, Any], bytes]:
    """The JSON part and the rest of a 200 answer in the binary extension. Raises Failed."""
    expect(response.status_code == 200, f"HTTP {response.status_code}: {said(response)}")
    announced = response.headers.get(HEADER_LENGTH)
    expect(announced is not None, f"no {HEADER_LENGTH}: the answer is plain JSON")
    length = int(announced)
    expect(length <= len(response.content), f"{HEADER_LENGTH} is {length}, the body has {len(response.content)}")
    return json.loads(response.content[:length]), response.content[length:]


def _check_outputs(head: Mapping[str, Any], data: bytes, names: set[str]) -> None:
    expect({output["name"] for output in head["outputs"]} == names, f"got {[o['name'] for o in head['outputs']]}")
    at = 0
    for output in head["outputs"]:
        size: Any = (output.get("parameters") or {}).get("binary_data_size")
        expect(type(size) is int, f"{output['name']} has no binary_data_size")
        elements: tuple[Element, ...] = elements_of(data[at : at + size], output["datatype"])
        at += size
        wanted = math.prod(output["shape"])
        expect(len(elements) == wanted, f"{output['name']}: {len(elements)} elements in the shape {output['shape']}")
    expect(at == len(data), f"{len(data) - at} bytes are left over")
