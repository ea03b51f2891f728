"""The gRPC service around a fake model: messages both ways, keys, errors, deadlines, cancellation, draining."""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as pb_grpc

from sightline import v2
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InvalidParameter,
    NotSupported,
    OutOfMemory,
    PayloadTooLarge,
    QueueFull,
    SightlineError,
    Unavailable,
    UpstreamFailed,
)
from sightline.server.grpc import GrpcServer, parse_infer, render_infer
from sightline.server.keys import Keys
from sightline.server.model import PredictorModel
from sightline.settings import ServerSettings
from sightline.wire import Context
from tests.conftest import free_port

T = TypeVar("T")
PATIENCE_SECONDS = 10
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await work


def tensor(datatype: str, shape: Sequence[int], **contents: Any) -> pb.ModelInferRequest.InferInputTensor:
    made = pb.ModelInferRequest.InferInputTensor(name="x", datatype=datatype, shape=shape)
    for name, values in contents.items():
        getattr(made.contents, name).extend(values)
    return made


def request(*inputs: pb.ModelInferRequest.InferInputTensor, raw: Sequence[bytes] = ()) -> pb.ModelInferRequest:
    return pb.ModelInferRequest(model_name="echo", inputs=inputs, raw_input_contents=raw)


class TestReading:
    @pytest.mark.parametrize(
        ("datatype", "field", "values"),
        [
            ("BOOL", "bool_contents", [True, False]),
            ("INT8", "int_contents", [-128, 127]),
            ("INT16", "int_contents", [-5, 5]),
            ("INT32", "int_contents", [-(2**31), 2**31 - 1]),
            ("INT64", "int64_contents", [-(2**63), 2**63 - 1]),
            ("UINT8", "uint_contents", [0, 255]),
            ("UINT64", "uint64_contents", [0, 2**64 - 1]),
            ("FP32", "fp32_contents", [0.5, -2.0]),
            ("FP64", "fp64_contents", [0.1, 1e300]),
        ],
    )
    def test_typed_and_raw_tensors_are_the_same(self, datatype: str, field: str, values: list[Any]) -> None:
        array = np.array(values, dtype=v2.NUMPY_TYPES[datatype])

        (typed,) = parse_infer(request(tensor(datatype, [2, 1], **{field: values}))).inputs
        (raw,) = parse_infer(request(tensor(datatype, [2, 1]), raw=[array.tobytes()])).inputs

        assert np.array_equal(typed.data, array.reshape(2, 1))
        assert np.array_equal(raw.data, array.reshape(2, 1))

    def test_bytes_may_hold_anything_either_way(self) -> None:
        image = b"\xff\xd8\xff\x00 no text"

        (typed,) = parse_infer(request(tensor("BYTES", [1], bytes_contents=[image]))).inputs
        (raw,) = parse_infer(request(tensor("BYTES", [1]), raw=[struct.pack("<I", len(image)) + image])).inputs

        assert typed.elements() == raw.elements() == (image,)

    def test_half_precision_comes_raw(self) -> None:
        array = np.array([0.5], dtype=np.float16)

        assert parse_infer(request(tensor("FP16", [1]), raw=[array.tobytes()])).inputs[0].data == array

    @pytest.mark.parametrize(
        "message",
        [
            request(),
            request(tensor("BYTES", [1])),
            request(tensor("BYTES", [2], bytes_contents=[b"a"])),
            request(tensor("BYTES", [-1], bytes_contents=[b"a"])),
            request(tensor("BYTES", [1] * 33, bytes_contents=[b"a"])),
            request(tensor("BYTES", [1], int_contents=[1])),
            request(tensor("BYTES", [1], bytes_contents=[b"a"], int_contents=[1])),
            request(tensor("INT8", [1], int_contents=[300])),
            request(tensor("UINT8", [2**62, 2**62, 0])),
            request(tensor("FP16", [1], fp32_contents=[1.0])),
            request(tensor("TEXT", [1], bytes_contents=[b"a"])),
            request(tensor("", [1], bytes_contents=[b"a"])),
            request(tensor("BYTES", [1]), tensor("BYTES", [1]), raw=[b"\0\0\0\0"] * 2),
            request(tensor("BYTES", [1]), raw=[b"\0\0\0\0"] * 2),
            request(tensor("BYTES", [1], bytes_contents=[b"a"]), raw=[b"\1\0\0\0a"]),
            request(tensor("BYTES", [1]), raw=[b"\5\0\0\0a"]),
            request(tensor("BYTES", [2**62]), raw=[b""]),
            request(tensor("INT64", [2**62, 2**62]), raw=[b""]),
            pb.ModelInferRequest(inputs=[pb.ModelInferRequest.InferInputTensor(datatype="BYTES", shape=[0])]),
        ],
        ids=lambda message: str(message).replace("\n", " ")[:60],
    )
    def test_nonsense_is_refused(self, message: pb.ModelInferRequest) -> None:
        with pytest.raises(BadRequest) as caught:
            parse_infer(message)

        assert caught.value.code in {"invalid_tensor", "invalid_request"}

    @pytest.mark.parametrize(
        ("parameter", "value"),
        [
            (pb.InferParameter(bool_param=True), True),
            (pb.InferParameter(int64_param=-3), -3),
            (pb.InferParameter(string_param="low"), "low"),
            (pb.InferParameter.FromString(b"\x21" + struct.pack("<d", 0.7)), 0.7),
            (pb.InferParameter.FromString(b"\x28\x07"), 7),
        ],
        ids=["bool", "int64", "string", "double, as Triton's clients send it", "uint64"],
    )
    def test_parameters_are_of_every_kind(self, parameter: pb.InferParameter, value: object) -> None:
        message = request(tensor("BYTES", [1], bytes_contents=[b"a"]))
        message.parameters["p"].CopyFrom(parameter)

        assert parse_infer(message).parameters == {"p": value}

    @pytest.mark.parametrize("raw", [b"", b"\x32\x00", b"\x22\x00"], ids=["none", "unknown", "4, of another type"])
    def test_a_parameter_without_a_value_is_refused_not_ignored(self, raw: bytes) -> None:
        message = request(tensor("BYTES", [1], bytes_contents=[b"a"]))
        message.parameters["temperature"].MergeFromString(raw)

        with pytest.raises(BadRequest):
            parse_infer(message)

    @given(st.binary(max_size=200))
    def test_any_bytes_that_are_a_message_are_read_or_refused(self, data: bytes) -> None:
        try:
            message = pb.ModelInferRequest.FromString(data)
        except DecodeError:
            return
        with suppress(BadRequest):
            parse_infer(message)


class TestWriting:
    RESPONSE = v2.InferResponse(
        model_name="echo",
        outputs=(
            v2.Tensor.of_texts("text", ["ä", "b"]),
            v2.Tensor.of_array("flags", "BOOL", np.array([True, False])),
            v2.Tensor.of_array("vectors", "FP16", np.ones((2, 3))),
        ),
        parameters={"ok": True, "tokens": 7, "model": "m", "milliseconds": 1.5},
    )

    def test_every_output_is_raw_and_aligned(self) -> None:
        rendered = render_infer(self.RESPONSE, v2.InferRequest((), id="mine"), "ours")

        assert [output.name for output in rendered.outputs] == ["text", "flags", "vectors"]
        assert [len(raw) for raw in rendered.raw_output_contents] == [4 + 2 + 4 + 1, 2, 12]
        assert not any(output.HasField("contents") for output in rendered.outputs)
        assert (rendered.id, rendered.model_version) == ("mine", "1")

    def test_only_what_was_asked_for_in_that_order(self) -> None:
        rendered = render_infer(self.RESPONSE, v2.InferRequest((), outputs=("vectors", "text")), "ours")

        assert [output.name for output in rendered.outputs] == ["vectors", "text"]
        assert len(rendered.raw_output_contents[0]) == 12
        assert rendered.id == "ours"

    def test_parameters_come_back_as_they_were(self) -> None:
        rendered = render_infer(self.RESPONSE, v2.InferRequest(()), "ours")
        message = request(tensor("BYTES", [1], bytes_contents=[b"a"]))
        for name, value in rendered.parameters.items():
            message.parameters[name].CopyFrom(value)

        assert parse_infer(message).parameters == self.RESPONSE.parameters


# --- a model that says what it is told --------------------------------------------------------------------------------


class Echo:
    """A service behind a gate."""

    name = "echo"
    inputs = outputs = (v2.TensorSpec("x", "BYTES", (-1,)),)

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.began = asyncio.Event()
        self.was_cancelled = asyncio.Event()
        self.fault: Exception | None = None
        self.contexts: list[Context] = []

    async def load(self) -> None: ...
    async def close(self) -> None: ...

    def metadata(self) -> dict[str, v2.Scalar]:
        return {}

    def from_v2(self, request: v2.InferRequest) -> Sequence[bytes]:
        return request.inputs[0].elements()

    def to_v2(self, results: Sequence[bytes]) -> v2.InferResponse:
        return v2.InferResponse(self.name, (v2.Tensor.of_bytes("x", results),))

    async def preprocess(self, requests: Sequence[bytes], context: Context) -> Sequence[bytes]:
        self.contexts.append(context)
        return requests

    async def predict(self, prepared: Sequence[bytes], context: Context) -> Sequence[bytes]:
        self.began.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise
        if self.fault is not None:
            raise self.fault
        return prepared


class Bench:
    """A running service and a stub for it."""

    def __init__(self, server: GrpcServer, echo: Echo, model: PredictorModel, channel: Any, port: int) -> None:
        self.server = server
        self.echo = echo
        self.model = model
        self.channel = channel
        self.stub: Any = pb_grpc.GRPCInferenceServiceStub(channel)
        self.port = port

    def infer(self, *elements: bytes, **options: Any) -> Any:
        return self.stub.ModelInfer(
            request(tensor("BYTES", [len(elements)], bytes_contents=elements)),
            **{"timeout": PATIENCE_SECONDS} | options,
        )


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Bench]:
    port = free_port()
    built = ServerSettings(
        _env_file=None, host="127.0.0.1", grpc_port=port, **{"auth": "off", "grace_seconds": 5} | settings
    )
    echo = Echo()
    model = PredictorModel(echo, built)  # type: ignore[arg-type]
    model.has_loaded = True
    server = GrpcServer([model], built, Keys(built))
    await server.start()
    async with grpc.aio.insecure_channel(
        f"127.0.0.1:{port}", options=[("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    ) as channel:
        yield Bench(server, echo, model, channel, port)
        echo.gate.set()
        await server.stop()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with running() as bench:
        yield bench


def trailing(error: grpc.aio.AioRpcError) -> dict[str, str]:
    return {key: value for key, value in error.trailing_metadata() or ()}


class TestCalls:
    async def test_are_answered(self, bench: Bench) -> None:
        answer = await bench.infer(b"a", b"\xff")

        assert answer.raw_output_contents == [b"\1\0\0\0a\1\0\0\0\xff"]

    async def test_may_be_as_large_as_over_http(self) -> None:
        async with running(max_request_bytes=30 * 2**20) as bench:
            answer = await bench.infer(bytes(20 * 2**20))
            assert len(answer.raw_output_contents[0]) == 20 * 2**20 + 4

            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bench.infer(bytes(31 * 2**20))
            assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    async def test_have_an_id_the_caller_s_or_a_new_one(self, bench: Bench) -> None:
        for sent, told in (("mine-1", "mine-1"), ("bad id", None), (None, None)):
            call = bench.infer(b"a", metadata=(("x-request-id", sent),) if sent else ())
            await call
            (own_id,) = [value for key, value in await call.initial_metadata() if key == "x-request-id"]
            assert own_id == told if told else len(own_id) == 32
            assert bench.echo.contexts[-1].request_id == own_id

    async def test_hand_on_the_trace(self, bench: Bench) -> None:
        await bench.infer(b"a", metadata=(("traceparent", TRACE), ("tracestate", "a=1"), ("tracestate", "b=2")))
        await bench.infer(b"a", metadata=(("traceparent", "nonsense"), ("tracestate", "a=1")))

        traced, untraced = bench.echo.contexts
        assert (traced.traceparent, traced.tracestate) == (TRACE, "a=1,b=2")
        assert (untraced.traceparent, untraced.tracestate) == (None, None)

    async def test_have_the_nearest_of_all_deadlines(self, bench: Bench) -> None:
        await bench.infer(b"a", timeout=7)
        await bench.infer(b"a", timeout=1000)
        await bench.infer(b"a", timeout=1000, metadata=(("x-request-timeout-ms", "5000"),))

        seconds = [context.deadline.remaining() for context in bench.echo.contexts]
        assert 5 < seconds[0] <= 7
        assert 100 < seconds[1] <= 120
        assert seconds[2] <= 5

    async def test_are_cancelled_when_the_client_leaves(self, bench: Bench) -> None:
        bench.echo.gate.clear()
        call = bench.infer(b"a")
        await soon(bench.echo.began.wait())

        call.cancel()

        await soon(bench.echo.was_cancelled.wait())

    async def test_are_cancelled_when_the_deadline_passes(self, bench: Bench) -> None:
        bench.echo.gate.clear()

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bench.infer(b"a", timeout=0.3)

        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await soon(bench.echo.was_cancelled.wait())


class TestErrors:
    @pytest.mark.parametrize(
        ("fault", "status", "code"),
        [
            (BadRequest("No."), "INVALID_ARGUMENT", "invalid_request"),
            (InvalidParameter("No."), "INVALID_ARGUMENT", "invalid_parameter"),
            (PayloadTooLarge("No."), "INVALID_ARGUMENT", "payload_too_large"),
            (QueueFull("Later.", retry_after=3), "RESOURCE_EXHAUSTED", "queue_full"),
            (OutOfMemory("No."), "RESOURCE_EXHAUSTED", "out_of_memory"),
            (NotSupported("No."), "UNIMPLEMENTED", "not_supported"),
            (Unavailable("Later.", retry_after=5), "UNAVAILABLE", "unavailable"),
            (UpstreamFailed("No."), "UNAVAILABLE", "upstream_failed"),
            (DeadlineExceeded("No."), "DEADLINE_EXCEEDED", "deadline_exceeded"),
            (RuntimeError("secret of a library"), "INTERNAL", "internal_error"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
    )
    async def test_have_a_status_a_stable_code_and_no_secrets(
        self, bench: Bench, fault: Exception, status: str, code: str
    ) -> None:
        bench.echo.fault = fault

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bench.infer(b"a", metadata=(("x-request-id", "mine"),))

        error = caught.value
        assert error.code() == grpc.StatusCode[status]
        assert "secret" not in (error.details() or "")
        assert trailing(error)["error-code"] == code
        assert trailing(error)["x-request-id"] == "mine"
        if isinstance(fault, SightlineError) and fault.retry_after:
            assert trailing(error)["retry-after"] == str(round(fault.retry_after))

    async def test_of_a_loading_model(self, bench: Bench) -> None:
        bench.model.has_loaded = False

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await bench.infer(b"a")

        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert trailing(caught.value)["error-code"] == "model_not_ready"
        assert not (await bench.stub.ServerReady(pb.ServerReadyRequest())).ready
        assert not (await bench.stub.ModelReady(pb.ModelReadyRequest(name="echo"))).ready
        assert (await bench.stub.ServerLive(pb.ServerLiveRequest())).live

    async def test_of_what_is_not_there(self, bench: Bench) -> None:
        for work in (
            bench.stub.ModelInfer(pb.ModelInferRequest(model_name="nothing")),
            bench.stub.ModelInfer(pb.ModelInferRequest(model_name="echo", model_version="2")),
            bench.stub.ModelReady(pb.ModelReadyRequest(name="nothing")),
            bench.stub.ModelMetadata(pb.ModelMetadataRequest(name="nothing")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await work
            assert caught.value.code() == grpc.StatusCode.NOT_FOUND
            assert trailing(caught.value)["error-code"] == "model_not_found"

    async def test_nobody_loads_or_unloads(self, bench: Bench) -> None:
        for work in (
            bench.stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="echo")),
            bench.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="echo")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await work
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert await bench.infer(b"a")

    async def test_a_second_server_on_the_port_fails(self, bench: Bench) -> None:
        settings = ServerSettings(_env_file=None, host="127.0.0.1", grpc_port=bench.port, auth="off")

        with pytest.raises(OSError, match="cannot listen"):
            await GrpcServer([bench.model], settings, Keys(settings)).start()


class TestKeys:
    @pytest.mark.parametrize(
        "metadata",
        [(), (("x-api-key", "wrong"),), (("authorization", "Bearer wrong"),), (("authorization", "Basic right"),)],
        ids=["none", "wrong", "wrong bearer", "another scheme"],
    )
    async def test_are_wanted_everywhere_but_at_the_probes(self, metadata: Any) -> None:
        async with running(auth="api-key", api_keys="right") as bench:
            for work in (
                bench.infer(b"a", metadata=metadata),
                bench.stub.ServerMetadata(pb.ServerMetadataRequest(), metadata=metadata),
                bench.stub.ModelMetadata(pb.ModelMetadataRequest(name="echo"), metadata=metadata),
                bench.stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="echo"), metadata=metadata),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await work
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
                assert trailing(caught.value)["error-code"] == "invalid_api_key"
            assert (await bench.stub.ServerLive(pb.ServerLiveRequest(), metadata=metadata)).live
            assert (await bench.stub.ServerReady(pb.ServerReadyRequest(), metadata=metadata)).ready
            assert (await bench.stub.ModelReady(pb.ModelReadyRequest(name="echo"), metadata=metadata)).ready
            assert await check(bench, metadata=metadata) == 1

    @pytest.mark.parametrize("metadata", [(("x-api-key", "right"),), (("authorization", "Bearer right"),)])
    async def test_of_both_kinds_open(self, metadata: Any) -> None:
        async with running(auth="api-key", api_keys="right") as bench:
            assert await bench.infer(b"a", metadata=metadata)
            assert bench.echo.contexts[0].principal


async def check(bench: Bench, service: str = "", **options: Any) -> int:
    """`grpc.health.v1.Health/Check` by hand: a string as field 1 in, an enum as field 1 out."""
    call = bench.channel.unary_unary("/grpc.health.v1.Health/Check")
    answer = await call((b"\x0a" + bytes([len(service)]) + service.encode()) if service else b"", **options)
    return answer[1] if answer else 0


class TestHealth:
    @pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService", "echo"])
    async def test_is_serving_or_not(self, bench: Bench, service: str) -> None:
        assert await check(bench, service) == 1

        bench.model.has_loaded = False

        assert await check(bench, service) == 2

    async def test_of_an_unknown_service_is_not_found(self, bench: Bench) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(bench, "nothing")

        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


class TestStopping:
    async def test_answers_what_is_running_and_takes_nothing_new(self, bench: Bench) -> None:
        bench.echo.gate.clear()
        running_call = bench.infer(b"a")
        await soon(bench.echo.began.wait())

        stopping = [asyncio.create_task(bench.server.stop()) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError):
            await bench.infer(b"b")
        assert len(bench.echo.contexts) == 1
        assert not any(task.done() for task in stopping)
        bench.echo.gate.set()

        assert await soon(running_call)
        await soon(asyncio.gather(*stopping))
