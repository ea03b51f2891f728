"""Checks of the gRPC service, with `tritonclient.grpc` and with its bare messages."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sightline.conformance.binary import LARGE_SIDE
from sightline.conformance.faults import INTERNALS
from sightline.conformance.infer import output_names
from sightline.conformance.suite import Failed, Group, Level, Skipped, expect
from sightline.conformance.target import NO_SUCH_MODEL, Target
from sightline.conformance.tensors import Request, Tensor, as_array, elements_of, picture

if TYPE_CHECKING:
    import tritonclient.grpc as triton

GRPC = Group("grpc", "gRPC", is_isolated=True)

_CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The member of InferTensorContents for each datatype; FP16 has none."""


@GRPC.check("health", Level.MUST)
def health(target: Target) -> None:
    """ServerLive, ServerReady and ModelReady say true."""
    with _client(target) as client:
        headers = _headers(target)
        expect(client.is_server_live(headers), "ServerLive says false")
        expect(client.is_server_ready(headers), "ServerReady says false")
        expect(client.is_model_ready(target.model, headers=headers), "ModelReady says false")


@GRPC.check("server-metadata", Level.MUST)
def server_metadata(target: Target) -> None:
    """ServerMetadata has a name and a version."""
    with _client(target) as client:
        read: Any = client.get_server_metadata(headers=_headers(target))
    expect(read.name and read.version, f"name {read.name!r}, version {read.version!r}")


@GRPC.check("model-metadata", Level.MUST)
def model_metadata(target: Target) -> None:
    """ModelMetadata names the same tensors as REST does."""
    with _client(target) as client:
        read: Any = client.get_model_metadata(target.model, headers=_headers(target))
    expect(read.name == target.model, f"the name is {read.name!r}")
    for side, tensors in (("inputs", read.inputs), ("outputs", read.outputs)):
        got = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in tensors]
        wanted = [(spec["name"], spec["datatype"], spec["shape"]) for spec in target.metadata[side]]
        expect(got == wanted, f"{side}: REST says {wanted}, gRPC {got}")


@GRPC.check("infer", Level.MUST)
def infer(target: Target) -> None:
    """ModelInfer with `raw_input_contents` (what tritonclient sends); the id comes back."""
    with _client(target) as client:
        result: Any = client.infer(
            target.model, _inputs(target.request), request_id="conformance-9", headers=_headers(target)
        )
    response: Any = result.get_response()
    expect(response.id == "conformance-9", f"the id is {response.id!r}")
    _check(response, output_names(target))


@GRPC.check("typed-contents", Level.MUST)
def typed_contents(target: Target) -> None:
    """ModelInfer with typed `contents` instead of raw ones."""
    request = _messages().ModelInferRequest(model_name=target.model)
    for tensor in target.request.inputs:
        if tensor.datatype not in _CONTENTS:
            raise Skipped(f"{tensor.datatype} has no typed contents")
        entry = request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=list(tensor.shape))
        getattr(entry.contents, _CONTENTS[tensor.datatype]).extend(tensor.elements)
    _check(_stub_infer(target, request), output_names(target))


@GRPC.check("outputs", Level.MUST)
def outputs_filter(target: Target) -> None:
    """Only the outputs that were asked for come back."""
    import tritonclient.grpc as triton

    names = output_names(target)
    if len(names) < 2:
        raise Skipped("the model has one output")
    with _client(target) as client:
        wishes = [triton.InferRequestedOutput(names[-1])]
        result: Any = client.infer(target.model, _inputs(target.request), outputs=wishes, headers=_headers(target))
    _check(result.get_response(), names[-1:])


@GRPC.check("image-bytes", Level.MUST)
def image_bytes(target: Target) -> None:
    """An element of a BYTES tensor may be any bytes: a JPEG as it is."""
    request = target.image_request.with_image(picture("JPEG"))
    with _client(target) as client:
        result: Any = client.infer(target.model, _inputs(request), headers=_headers(target))
    _check(result.get_response(), output_names(target))


@GRPC.check("large-image", Level.PROMISE)
def large_image(target: Target) -> None:
    """An image of more than 8 MiB is taken."""
    request = target.image_request.with_image(picture(side=LARGE_SIDE, is_noise=True))
    with _client(target) as client:
        result: Any = client.infer(target.model, _inputs(request), headers=_headers(target))
    _check(result.get_response(), output_names(target))


@GRPC.check("unknown-model", Level.MUST)
def unknown_model(target: Target) -> None:
    """Inference by a model that does not exist ends with a status other than OK."""
    _fails(target, model=NO_SUCH_MODEL, request=target.request)


@GRPC.check("unknown-model-not-found", Level.PROMISE)
def unknown_model_not_found(target: Target) -> None:
    """For inference by, and metadata of, a model that does not exist the status is NOT_FOUND."""
    from tritonclient.utils import InferenceServerException

    _fails(target, model=NO_SUCH_MODEL, request=target.request, status="NOT_FOUND")
    with _client(target) as client:
        try:
            client.get_model_metadata(NO_SUCH_MODEL, headers=_headers(target))
        except InferenceServerException as error:
            expect("NOT_FOUND" in str(error.status()), f"metadata: {error.status()}: {error.message()}")
        else:
            raise Failed("metadata of an unknown model")


@GRPC.check("bad-input", Level.PROMISE)
def bad_input(target: Target) -> None:
    """Raw contents that do not fill their shape end with INVALID_ARGUMENT."""
    request = target.request
    first = request.inputs[0]
    shape = (first.shape[0] + 1, *first.shape[1:]) if first.shape else (2,)
    spoilt = Tensor(first.name, first.datatype, shape, first.elements)
    _fails(target, model=target.model, request=Request((spoilt, *request.inputs[1:]), {}), status="INVALID_ARGUMENT")


@GRPC.check("asyncio", Level.EXTENSION)
async def asyncio_client(target: Target) -> None:
    """`tritonclient.grpc.aio`: readiness and inference."""
    import tritonclient.grpc.aio as triton_aio

    async with triton_aio.InferenceServerClient(_address(target)) as client:
        expect(await client.is_model_ready(target.model, headers=_headers(target)), "ModelReady says false")
        result: Any = await client.infer(target.model, _inputs(target.request), headers=_headers(target))
        _check(result.get_response(), output_names(target))


def _fails(target: Target, *, model: str, request: Request, status: str | None = None) -> None:
    """The call ends with a status (this one, if given) and a text that names no internals. Raises Failed."""
    import grpc

    message = _messages().ModelInferRequest(model_name=model)
    for tensor in request.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=list(tensor.shape))
        message.raw_input_contents.append(tensor.blob())
    try:
        _stub_infer(target, message)
    except grpc.RpcError as error:
        name, details = error.code().name, error.details() or ""
        if status is not None:
            expect(name == status, f"{name}: {details}")
            expect(INTERNALS.search(details) is None, f"the text names internals: {details}")
    else:
        raise Failed("the call ended well")


def _messages() -> Any:  # noqa: ANN401 - generated code without types
    from tritonclient.grpc import service_pb2

    return service_pb2


def _stub_infer(target: Target, message: Any) -> Any:  # noqa: ANN401 - protobuf messages
    import grpc
    from tritonclient.grpc import service_pb2_grpc

    options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(_address(target), options=options) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        metadata = tuple(_headers(target).items())
        return stub.ModelInfer(message, metadata=metadata, timeout=target.address.timeout_seconds)


def _inputs(request: Request) -> "list[triton.InferInput]":
    import tritonclient.grpc as triton

    tensors: list[triton.InferInput] = []
    for tensor in request.inputs:
        entry = triton.InferInput(tensor.name, list(tensor.shape), tensor.datatype)
        entry.set_data_from_numpy(as_array(tensor))
        tensors.append(entry)
    return tensors


def _check(response: Any, names: list[str]) -> None:  # noqa: ANN401 - a protobuf message
    got = [output.name for output in response.outputs]
    expect(sorted(got) == sorted(names), f"wanted {names}, got {got}")
    raw = list(response.raw_output_contents)
    expect(not raw or len(raw) == len(got), f"{len(raw)} raw contents for {len(got)} outputs")
    for index, output in enumerate(response.outputs):
        if raw:
            count = len(elements_of(raw[index], output.datatype))
        else:
            count = len(getattr(output.contents, _CONTENTS[output.datatype]))
        expect(count == math.prod(output.shape), f"{output.name}: {count} elements, shape {list(output.shape)}")


def _address(target: Target) -> str:
    if target.address.grpc is None:
        raise Skipped("no gRPC address was given (--grpc)")
    return target.address.grpc


def _headers(target: Target) -> dict[str, str]:
    """GRPC wants lower-case names."""
    return {name.lower(): value for name, value in target.address.headers.items()}


@contextmanager
def _client(target: Target) -> "Generator[triton.InferenceServerClient]":
    import tritonclient.grpc as triton

    client = triton.InferenceServerClient(_address(target))
    try:
        yield client
    finally:
        client.close()
