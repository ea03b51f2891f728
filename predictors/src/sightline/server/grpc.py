"""V2 over gRPC for the models that the HTTP routes serve: `inference.GRPCInferenceService` and `grpc.health.v1.Health`.

KServe 0.21's servicer maps its own errors to UNKNOWN, takes 8 MiB, asks for no key and lets anybody unload a model
(reference/kserve.md §1.3), so this one is ours, on KServe's messages. Tensors always leave as `raw_output_contents`.

    in       x-api-key or authorization, x-request-id, x-request-timeout-ms, traceparent, tracestate, x-priority
    out      x-request-id; with an error also error-code (stable, as over HTTP) and retry-after in seconds
"""

import asyncio
import logging
import struct
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
import numpy as np
from google.protobuf import wrappers_pb2
from google.protobuf.unknown_fields import UnknownFieldSet
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as pb_grpc

from sightline import __version__, v2
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InternalError,
    InvalidApiKey,
    NotFound,
    NotSupported,
    OutOfMemory,
    QueueFull,
    SightlineError,
    Unavailable,
    UpstreamFailed,
)
from sightline.server import metrics
from sightline.server.caller import context_of, request_id, trace_id
from sightline.server.keys import Keys
from sightline.server.model import PredictorModel
from sightline.server.protocols import EXTENSIONS, VERSION, beside_the_loop, check_outputs
from sightline.server.rendering import error_headers, translate
from sightline.settings import ServerSettings
from sightline.wire import REQUEST_ID_HEADER, Context

log = logging.getLogger("sightline.access")

Answer = TypeVar("Answer")
GrpcContext = Any
"""`grpc.aio.ServicerContext`; grpcio ships no types."""

_OPEN = frozenset({"ServerLive", "ServerReady", "ModelReady", "Check"})

_CODES: Sequence[tuple[type[SightlineError], grpc.StatusCode]] = (
    (InvalidApiKey, grpc.StatusCode.UNAUTHENTICATED),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (QueueFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (OutOfMemory, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NotSupported, grpc.StatusCode.UNIMPLEMENTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (UpstreamFailed, grpc.StatusCode.UNAVAILABLE),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
)


class GrpcServer:
    """The gRPC side of one process. Raises nothing until `start`."""

    def __init__(self, models: Sequence[PredictorModel], settings: ServerSettings, keys: Keys) -> None:
        self._models = models
        self._settings = settings
        self._keys = keys
        self._server: Any = None
        self._stopping: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Listen. Raises OSError when the port cannot be had."""
        settings = self._settings
        self._server = grpc.aio.server(
            ThreadPoolExecutor(1, thread_name_prefix="grpc"),  # grpcio asks for one; every handler is a coroutine
            options=[
                ("grpc.max_receive_message_length", settings.max_request_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
            ],
        )
        servicer = _Servicer(self._models, settings, self._keys)
        pb_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        self._server.add_generic_rpc_handlers((servicer.health_handler(),))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            self._server.add_insecure_port(f"{host}:{settings.grpc_port}")
        except RuntimeError as error:
            raise OSError(f"cannot listen on gRPC port {settings.grpc_port}") from error
        await self._server.start()
        log.info("gRPC on %s:%s", host, settings.grpc_port)

    async def stop(self) -> None:
        """Take nothing new, answer what is running within the grace, end. A second call waits for the first."""
        if self._server is not None and self._stopping is None:
            self._stopping = asyncio.ensure_future(self._server.stop(self._settings.grace_seconds))
        if self._stopping is not None:
            await asyncio.shield(self._stopping)


class _Servicer(pb_grpc.GRPCInferenceServiceServicer):
    """The methods; each goes through `_answer`, which is what the guard is to HTTP."""

    def __init__(self, models: Sequence[PredictorModel], settings: ServerSettings, keys: Keys) -> None:
        self._models = {model.name: model for model in models}
        self._settings = settings
        self._keys = keys

    async def ServerLive(self, request: pb.ServerLiveRequest, context: GrpcContext) -> pb.ServerLiveResponse:
        async def work(_: Context) -> pb.ServerLiveResponse:
            return pb.ServerLiveResponse(live=True)

        return await self._answer("ServerLive", context, work)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: GrpcContext) -> pb.ServerReadyResponse:
        async def work(_: Context) -> pb.ServerReadyResponse:
            return pb.ServerReadyResponse(ready=await self._are_ready())

        return await self._answer("ServerReady", context, work)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: GrpcContext) -> pb.ModelReadyResponse:
        async def work(_: Context) -> pb.ModelReadyResponse:
            return pb.ModelReadyResponse(ready=await self._model(request.name, request.version).healthy())

        return await self._answer("ModelReady", context, work)

    async def ServerMetadata(
        self, request: pb.ServerMetadataRequest, context: GrpcContext
    ) -> pb.ServerMetadataResponse:
        async def work(_: Context) -> pb.ServerMetadataResponse:
            return pb.ServerMetadataResponse(name="sightline", version=__version__, extensions=EXTENSIONS)

        return await self._answer("ServerMetadata", context, work)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: GrpcContext) -> pb.ModelMetadataResponse:
        async def work(_: Context) -> pb.ModelMetadataResponse:
            model = self._model(request.name, request.version)
            return pb.ModelMetadataResponse(
                name=model.name,
                versions=[VERSION],
                platform="sightline",
                inputs=[_spec(spec) for spec in model.service.inputs],
                outputs=[_spec(spec) for spec in model.service.outputs],
            )

        return await self._answer("ModelMetadata", context, work)

    async def ModelInfer(self, request: pb.ModelInferRequest, context: GrpcContext) -> pb.ModelInferResponse:
        async def work(called: Context) -> pb.ModelInferResponse:
            model = self._model(request.model_name, request.model_version)
            model.check_loaded()  # before the body: a loading model must not read images

            def parse() -> tuple[v2.InferRequest, Sequence[object]]:
                parsed = parse_infer(request)
                check_outputs(parsed, model)
                return parsed, model.service.from_v2(parsed)

            parsed, requests = await beside_the_loop(request.ByteSize(), parse)
            results = await model.run(requests, called)
            return render_infer(model.service.to_v2(results), parsed, called.request_id)

        return await self._answer("ModelInfer", context, work)

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, context: GrpcContext
    ) -> pb.RepositoryModelLoadResponse:
        return await self._answer("RepositoryModelLoad", context, _refuse)

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, context: GrpcContext
    ) -> pb.RepositoryModelUnloadResponse:
        return await self._answer("RepositoryModelUnload", context, _refuse)

    def health_handler(self) -> Any:  # noqa: ANN401 - a grpc.GenericRpcHandler
        """`grpc.health.v1.Health/Check`, as Kubernetes' gRPC probes call it.

        Its two messages have one field each, number 1, a string and an enum: on the wire they are protobuf's wrappers.
        """
        check = grpc.unary_unary_rpc_method_handler(
            self._check,
            request_deserializer=wrappers_pb2.StringValue.FromString,
            response_serializer=wrappers_pb2.Int32Value.SerializeToString,
        )
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})

    async def _check(self, request: wrappers_pb2.StringValue, context: GrpcContext) -> wrappers_pb2.Int32Value:
        async def work(_: Context) -> wrappers_pb2.Int32Value:
            if request.value in ("", "inference.GRPCInferenceService"):
                is_ready = await self._are_ready()
            else:
                is_ready = await self._model(request.value, "").healthy()
            return wrappers_pb2.Int32Value(value=1 if is_ready else 2)  # SERVING, NOT_SERVING

        return await self._answer("Check", context, work)

    async def _are_ready(self) -> bool:
        return all([await model.healthy() for model in self._models.values()])

    def _model(self, name: str, version: str) -> PredictorModel:
        model = self._models.get(name)
        if model is None or version not in {"", VERSION}:
            raise NotFound("No such model.", code="model_not_found")
        return model

    async def _answer(
        self, method: str, grpc_context: GrpcContext, work: Callable[[Context], Awaitable[Answer]]
    ) -> Answer:
        """Do the work of one call with a deadline and for somebody who may ask for it; every error leaves as ours.

        gRPC cancels this coroutine when the client leaves or its deadline passes, and with it the work.
        """
        started = time.monotonic()
        headers = _headers(grpc_context)
        own_id = request_id(headers)
        status = grpc.StatusCode.CANCELLED
        try:
            remaining = grpc_context.time_remaining()
            longest = self._settings.deadline_seconds
            seconds = longest if remaining is None else max(0.001, min(longest, remaining))
            usual = self._settings.usual_seconds if remaining is None else seconds
            is_open = method in _OPEN
            peer = grpc_context.peer().rpartition(":")[0]  # ipv4:10.0.0.7:43210
            context = context_of(
                headers, own_id, self._keys, seconds, is_open=is_open, usual_seconds=usual, address=peer
            )
            answer = await work(context)
            await grpc_context.send_initial_metadata(((REQUEST_ID_HEADER, own_id),))
            status = grpc.StatusCode.OK
            return answer
        except Exception as error:
            known = _known(error, method, own_id)
            status = next((code for kind, code in _CODES if isinstance(known, kind)), None) or _by_status(known.status)
            # Not as initial metadata: a client's own retries end with the first byte of an answer.
            told = {REQUEST_ID_HEADER: own_id, "error-code": known.code} | {
                name.lower(): value for name, value in error_headers(known).items()
            }
            await grpc_context.abort(status, known.message, tuple(told.items()))
            raise AssertionError("abort raises") from error
        finally:
            _record(method, status, own_id, headers, time.monotonic() - started)


async def _refuse(context: Context) -> Any:  # noqa: ANN401 - never returns
    raise NotSupported("Loading and unloading over gRPC is switched off.")


def _headers(grpc_context: GrpcContext) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in grpc_context.invocation_metadata() or ():
        if isinstance(value, str):
            headers[name] = f"{headers[name]},{value}" if name == "tracestate" and name in headers else value
    return headers


def _known(error: Exception, method: str, own_id: str) -> SightlineError:
    known = translate(error)
    if known is None:
        log.exception("bug request_id=%s method=%s", own_id, method, exc_info=error)
        return InternalError("Something went wrong on the server.")
    if known.status >= 500:
        log.warning("%s request_id=%s: %s", known.code, own_id, known.message, exc_info=error.__cause__)
    return known


def _by_status(status: int) -> grpc.StatusCode:
    return grpc.StatusCode.INVALID_ARGUMENT if 400 <= status < 500 else grpc.StatusCode.INTERNAL


def _record(method: str, status: grpc.StatusCode, own_id: str, headers: Mapping[str, str], seconds: float) -> None:
    metrics.REQUESTS.labels("gRPC", method, status.name).inc()
    metrics.REQUEST_SECONDS.labels(method).observe(seconds)
    trace = trace_id(headers.get("traceparent"))
    log.log(
        logging.DEBUG if method in _OPEN else logging.INFO,
        "gRPC %s status=%s ms=%.1f request_id=%s%s",
        method,
        status.name,
        seconds * 1000,
        own_id,
        f" trace_id={trace}" if trace else "",
    )


# --- messages --------------------------------------------------------------------------------------------------------

_CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where a datatype's values are when they do not come raw; FP16 must."""

_DOUBLE, _UINT64 = 4, 5
"""Numbers of the two parameter kinds that Triton's messages have and KServe's lack; they arrive as unknown fields."""


def parse_infer(request: pb.ModelInferRequest) -> v2.InferRequest:
    """Read a request whose tensors are all raw or all typed. Raises BadRequest (400)."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise BadRequest("raw_input_contents must have one entry for each input, or none.", code="invalid_tensor")
    if not request.inputs:
        raise BadRequest("'inputs' must hold at least one tensor.")
    tensors = tuple(
        _tensor(tensor, memoryview(raw[index]) if raw else None) for index, tensor in enumerate(request.inputs)
    )
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise BadRequest("Two tensors have the same name.", code="invalid_tensor")
    outputs = tuple(output.name for output in request.outputs)
    if len(set(outputs)) != len(outputs):
        raise BadRequest("An output is requested twice.", code="invalid_tensor")
    parameters = {name: _scalar(value) for name, value in request.parameters.items()}
    parameters.pop("binary_data_output", None)  # everything is
    return v2.InferRequest(tensors, parameters, request.id or None, outputs, is_binary_default=True)


def _tensor(tensor: pb.ModelInferRequest.InferInputTensor, raw: memoryview | None) -> v2.Tensor:
    name, datatype, shape = tensor.name, tensor.datatype, tuple(tensor.shape)
    if not name:
        raise BadRequest("Every tensor needs a name.", code="invalid_tensor")
    if datatype != "BYTES" and datatype not in v2.NUMPY_TYPES:
        raise BadRequest("A tensor has an unknown datatype.", code="invalid_tensor")
    if any(size < 0 for size in shape) or len(shape) > v2.MAX_DIMENSIONS:
        raise BadRequest("A tensor has an invalid shape.", code="invalid_tensor")
    if raw is None:
        return v2.Tensor(name, datatype, shape, _typed(tensor, shape))
    if tensor.HasField("contents"):
        raise BadRequest("A tensor may not be raw and typed at once.", code="invalid_tensor")
    return v2.Tensor(name, datatype, shape, v2.data_from_binary(name, datatype, shape, raw))


def _typed(tensor: pb.ModelInferRequest.InferInputTensor, shape: tuple[int, ...]) -> v2.Data:
    field = _CONTENTS.get(tensor.datatype)
    filled = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    if field is None or any(name != field for name in filled):
        raise BadRequest("A tensor's contents are not of its datatype.", code="invalid_tensor")
    values: Sequence[Any] = getattr(tensor.contents, field)
    count = 1
    for size in shape:
        count *= size
    if len(values) != count:
        raise BadRequest("A tensor has not as many elements as its shape says.", code="invalid_tensor")
    if tensor.datatype == "BYTES":
        return tuple(values)
    try:
        return np.array(values, dtype=v2.NUMPY_TYPES[tensor.datatype]).reshape(shape)
    except (OverflowError, ValueError) as error:  # 300 as INT8; dimensions that numpy does not count to
        raise BadRequest("A tensor has a value out of range.", code="invalid_tensor") from error


def _scalar(parameter: pb.InferParameter) -> v2.Scalar:
    kind = parameter.WhichOneof("parameter_choice")
    if kind is not None:
        return getattr(parameter, kind)
    for field in UnknownFieldSet(parameter):
        if field.field_number == _DOUBLE and isinstance(field.data, int):
            (number,) = struct.unpack("<d", struct.pack("<Q", field.data))
            return float(number)
        if field.field_number == _UINT64 and isinstance(field.data, int):
            return field.data
    raise BadRequest("A parameter has no value.", code="invalid_parameter")


def render_infer(response: v2.InferResponse, request: v2.InferRequest, own_id: str) -> pb.ModelInferResponse:
    """What the client asked for, every tensor raw: mixed forms would misalign the raw ones."""
    available = {tensor.name: tensor for tensor in response.outputs}
    chosen = [available[name] for name in request.outputs] or list(response.outputs)
    rendered = pb.ModelInferResponse(
        model_name=response.model_name,
        model_version=VERSION,
        id=request.id or own_id,
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(name=item.name, datatype=item.datatype, shape=item.shape)
            for item in chosen
        ],
        raw_output_contents=[v2.to_binary(item) for item in chosen],
    )
    for name, value in response.parameters.items():
        _set(rendered.parameters[name], value)
    return rendered


def _set(parameter: pb.InferParameter, value: v2.Scalar) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    elif isinstance(value, str):
        parameter.string_param = value
    else:
        parameter.MergeFromString(bytes([_DOUBLE << 3 | 1]) + struct.pack("<d", value))


def _spec(spec: v2.TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=spec.shape)
