"""Checks with KServe's own clients, over REST and gRPC."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from sightline.conformance.infer import output_names
from sightline.conformance.suite import Group, Level, Skipped, expect
from sightline.conformance.target import Target
from sightline.conformance.tensors import Request, as_array, picture

if TYPE_CHECKING:
    from kserve import InferenceGRPCClient, InferenceRESTClient

KSERVE = Group("kserve", "KServe clients", is_isolated=True)


@KSERVE.check("rest-health", Level.MUST)
async def rest_health(target: Target) -> None:
    """InferenceRESTClient: `is_server_live`, `is_server_ready` and `is_model_ready` say true."""
    url, headers = target.address.url, target.address.headers
    async with _rest(target) as client:
        expect(await client.is_server_live(url, headers=headers), "is_server_live is not true")
        expect(await client.is_server_ready(url, headers=headers), "is_server_ready is not true")
        expect(await client.is_model_ready(url, target.model, headers=headers), "is_model_ready is not true")


@KSERVE.check("rest-json", Level.MUST)
async def rest_json(target: Target) -> None:
    """InferenceRESTClient: `infer` in JSON."""
    async with _rest(target) as client:
        await _infer(client, target, _request(target, target.request.as_text(), is_binary=False))


@KSERVE.check("rest-binary", Level.EXTENSION)
async def rest_binary(target: Target) -> None:
    """InferenceRESTClient: `infer` with the binary extension, text only."""
    async with _rest(target) as client:
        await _infer(client, target, _request(target, target.request.as_text(), is_binary=True))


@KSERVE.check("rest-image-bytes", Level.EXTENSION)
async def rest_image_bytes(target: Target) -> None:
    """InferenceRESTClient: `infer` with a JPEG as it is."""
    request = target.image_request.with_image(picture("JPEG"))
    async with _rest(target) as client:
        await _infer(client, target, _request(target, request, is_binary=True))


@KSERVE.check("grpc-health", Level.MUST)
async def grpc_health(target: Target) -> None:
    """InferenceGRPCClient: `is_server_live`, `is_server_ready` and `is_model_ready` say true."""
    headers = tuple(_metadata(target))
    async with _grpc(target) as client:
        expect(await client.is_server_live(headers=headers), "is_server_live is not true")
        expect(await client.is_server_ready(headers=headers), "is_server_ready is not true")
        expect(await client.is_model_ready(target.model, headers=headers), "is_model_ready is not true")


@KSERVE.check("grpc-infer", Level.MUST)
async def grpc_infer(target: Target) -> None:
    """InferenceGRPCClient: `infer`, images as they are."""
    request = _request(target, target.request, is_binary=True)
    async with _grpc(target) as client:
        response = await client.infer(request, headers=tuple(_metadata(target)))
    _check(response, target)


def _request(target: Target, request: Request, *, is_binary: bool) -> Any:  # noqa: ANN401 - kserve has no types
    from kserve import InferInput, InferRequest

    inputs: list[Any] = []
    for tensor in request.inputs:
        entry = InferInput(tensor.name, list(tensor.shape), tensor.datatype)
        entry.set_data_from_numpy(as_array(tensor), binary_data=is_binary)
        inputs.append(entry)
    return InferRequest(model_name=target.model, infer_inputs=inputs, parameters=dict(request.parameters) or None)


async def _infer(client: "InferenceRESTClient", target: Target, request: Any) -> None:  # noqa: ANN401
    headers = dict(target.address.headers)
    _check(await client.infer(target.address.url, request, model_name=target.model, headers=headers), target)


def _check(response: Any, target: Target) -> None:  # noqa: ANN401
    got = {output.name: output for output in response.outputs}
    for name in output_names(target):
        expect(name in got, f"{name} is missing")
        got[name].as_numpy()  # raises when the data do not fill the shape


def _metadata(target: Target) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, value in target.address.headers.items()]


@asynccontextmanager
async def _rest(target: Target) -> "AsyncGenerator[InferenceRESTClient]":
    from kserve import InferenceRESTClient, RESTConfig

    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=1, timeout=target.address.timeout_seconds))
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def _grpc(target: Target) -> "AsyncGenerator[InferenceGRPCClient]":
    if target.address.grpc is None:
        raise Skipped("no gRPC address was given (--grpc)")
    from kserve import InferenceGRPCClient

    client = InferenceGRPCClient(target.address.grpc, timeout=target.address.timeout_seconds)
    try:
        yield client
    finally:
        await client.close()
