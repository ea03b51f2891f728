"""Checks with `tritonclient.http`, the client that most V2 programs use: JSON, binary, compressed, sync and async."""

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sightline.conformance.infer import output_names
from sightline.conformance.suite import Failed, Group, Level, expect
from sightline.conformance.target import NO_SUCH_MODEL, Target
from sightline.conformance.tensors import Request, as_array, picture

if TYPE_CHECKING:
    import tritonclient.http as triton

TRITON = Group("triton", "tritonclient http")


@TRITON.check("health", Level.MUST)
def health(target: Target) -> None:
    """`is_server_live`, `is_server_ready` and `is_model_ready` say true, and false for an unknown model."""
    with _client(target) as client:
        headers = target.address.headers
        expect(client.is_server_live(headers), "is_server_live is false")
        expect(client.is_server_ready(headers), "is_server_ready is false")
        expect(client.is_model_ready(target.model, headers=headers), "is_model_ready is false")
        expect(not client.is_model_ready(NO_SUCH_MODEL, headers=headers), "an unknown model is ready")


@TRITON.check("metadata", Level.MUST)
def metadata(target: Target) -> None:
    """`get_server_metadata` and `get_model_metadata` can be read."""
    with _client(target) as client:
        expect("name" in client.get_server_metadata(target.address.headers), "server metadata have no name")
        read = client.get_model_metadata(target.model, headers=target.address.headers)
        expect(read["name"] == target.model, f"the name is {read['name']!r}")


@TRITON.check("json", Level.PROMISE)
def json_mode(target: Target) -> None:
    """`infer` in JSON both ways (the client sends no Content-Type)."""
    import tritonclient.http as triton

    outputs = [triton.InferRequestedOutput(name, binary_data=False) for name in output_names(target)]
    with _client(target) as client:
        _check(_infer(client, target, target.request, is_binary=False, outputs=outputs), target)


@TRITON.check("binary", Level.EXTENSION)
def binary(target: Target) -> None:
    """`infer` as the client does by default: binary both ways."""
    with _client(target) as client:
        result = _infer(client, target, target.request.as_text(), request_id="conformance-7")
    _check(result, target)
    expect(result.get_response().get("id") == "conformance-7", f"the id is {result.get_response().get('id')!r}")


@TRITON.check("image-bytes", Level.EXTENSION)
def image_bytes(target: Target) -> None:
    """`infer` with a JPEG as it is."""
    request = target.image_request.with_image(picture("JPEG"))
    with _client(target) as client:
        _check(_infer(client, target, request), target)


@TRITON.check("gzip", Level.EXTENSION)
def gzip(target: Target) -> None:
    """`infer` with gzip for the request and the answer."""
    _compressed(target, "gzip")


@TRITON.check("deflate", Level.EXTENSION)
def deflate(target: Target) -> None:
    """`infer` with deflate for the request and the answer."""
    _compressed(target, "deflate")


@TRITON.check("async-infer", Level.EXTENSION)
def async_infer(target: Target) -> None:
    """`async_infer`: two requests at a time, both answered."""
    with _client(target, concurrency=2) as client:
        pending = [
            client.async_infer(target.model, _inputs(target.request.as_text()), headers=target.address.headers)
            for _ in range(2)
        ]
        for request in pending:
            _check(request.get_result(), target)


@TRITON.check("asyncio", Level.EXTENSION)
async def asyncio_client(target: Target) -> None:
    """`tritonclient.http.aio`: readiness and inference."""
    import tritonclient.http.aio as triton_aio

    address, request = target.address, target.request.as_text()
    async with triton_aio.InferenceServerClient(address.netloc, ssl=address.is_tls) as client:
        expect(await client.is_model_ready(target.model, headers=address.headers), "is_model_ready is false")
        _check(await client.infer(target.model, _inputs(request), headers=address.headers), target)


@TRITON.check("errors", Level.MUST)
def errors(target: Target) -> None:
    """An error reaches the caller as InferenceServerException with a status and a text."""
    from tritonclient.utils import InferenceServerException

    with _client(target) as client:
        try:
            client.infer(NO_SUCH_MODEL, _inputs(target.request.as_text()), headers=target.address.headers)
        except InferenceServerException as error:
            expect(error.status() and error.message(), f"status {error.status()!r}, message {error.message()!r}")
        else:
            raise Failed("an unknown model answered")


def _compressed(target: Target, algorithm: str) -> None:
    with _client(target) as client:
        result = _infer(
            client,
            target,
            target.request.as_text(),
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
    _check(result, target)


def _inputs(request: Request, *, is_binary: bool = True) -> "list[triton.InferInput]":
    import tritonclient.http as triton

    tensors: list[triton.InferInput] = []
    for tensor in (request if is_binary else request.as_text()).inputs:
        entry = triton.InferInput(tensor.name, list(tensor.shape), tensor.datatype)
        entry.set_data_from_numpy(as_array(tensor), binary_data=is_binary)
        tensors.append(entry)
    return tensors


def _infer(
    client: "triton.InferenceServerClient",
    target: Target,
    request: Request,
    *,
    is_binary: bool = True,
    outputs: "Sequence[triton.InferRequestedOutput] | None" = None,
    **options: Any,  # noqa: ANN401 - handed on
) -> "triton.InferResult":
    return client.infer(
        target.model,
        _inputs(request, is_binary=is_binary),
        outputs=outputs,
        headers=target.address.headers,
        parameters=dict(request.parameters) or None,
        **options,
    )


def _check(result: Any, target: Target) -> None:  # noqa: ANN401 - an InferResult, whose types say None
    for name in output_names(target):
        array, output = result.as_numpy(name), result.get_output(name)
        if array is None or output is None:
            raise Failed(f"{name} is missing")
        expect(array.size == math.prod(output["shape"]), f"{name}: {array.size} elements, shape {output['shape']}")


@contextmanager
def _client(target: Target, concurrency: int = 1) -> "Generator[triton.InferenceServerClient]":
    import tritonclient.http as triton

    seconds = target.address.timeout_seconds
    client = triton.InferenceServerClient(
        target.address.netloc,
        concurrency=concurrency,
        connection_timeout=seconds,
        network_timeout=seconds,
        ssl=target.address.is_tls,
    )
    try:
        yield client
    finally:
        client.close()
