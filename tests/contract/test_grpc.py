"""V2 over gRPC as Triton's and KServe's own clients speak it, against real processes."""

import asyncio
import io
import json
import signal
import socket
import subprocess
import sys

import grpc
import httpx
import numpy as np
import pytest
from kserve import InferenceGRPCClient, InferInput, InferRequest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as pb_grpc
from PIL import Image

from tests.conftest import Launcher, Server
from tests.scenes import RED_CIRCLE, red_circle

PROSE = "The image shows a large red circle on a white background."


@pytest.fixture(params=["describe", "enhance", "pipeline"])
def server(request, chain_servers) -> Server:
    return chain_servers[request.param]


def element(server: Server) -> tuple[str, bytes]:
    return ("text", RED_CIRCLE.encode()) if server.name == "enhance" else ("image", red_circle())


def scaled(side: int) -> bytes:
    """The red circle as a BMP of side² pixels, three bytes each."""
    buffer = io.BytesIO()
    Image.open(io.BytesIO(red_circle())).convert("RGB").resize((side, side)).save(buffer, "BMP")
    return buffer.getvalue()


TRITON = """
import json, sys
import numpy as np
import tritonclient.grpc as triton

url, model, name, path = sys.argv[1:]
client = triton.InferenceServerClient(url)
tensor = triton.InferInput(name, [1], "BYTES")
tensor.set_data_from_numpy(np.array([open(path, "rb").read()], dtype=np.object_))
wanted = [triton.InferRequestedOutput("text")]
result = client.infer(
    model, [tensor], outputs=wanted, request_id="r7", parameters={"temperature": 0.0, "max_tokens": 200}
)
try:
    client.infer(model, [tensor], parameters={"temperature": 9.5})
    refused = None
except triton.InferenceServerException as error:
    refused = [error.status(), error.message()]
try:
    client.unload_model(model)
    unloaded = True
except triton.InferenceServerException:
    unloaded = False
parameters = result.get_response().parameters
print(json.dumps({
    "live": client.is_server_live(),
    "ready": client.is_server_ready() and client.is_model_ready(model),
    "server": client.get_server_metadata(as_json=True),
    "model": client.get_model_metadata(model, as_json=True),
    "text": [item.decode() for item in result.as_numpy("text")],
    "outputs": [output.name for output in result.get_response().outputs],
    "id": result.get_response().id,
    "milliseconds": parameters["milliseconds"].double_param,
    "demo_model": parameters["demo_model"].bool_param,
    "refused": refused,
    "unloaded": unloaded,
}))
"""
"""In a process of its own: its messages and KServe's have the same names, and protobuf takes each name once."""


def triton(server: Server, name: str, data: bytes, tmp_path) -> dict:
    (tmp_path / "element").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", TRITON, server.grpc, server.name, name, str(tmp_path / "element")],
        capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class TestTriton:
    def test_speaks_with_each_predictor(self, server, tmp_path):
        name, data = element(server)

        told = triton(server, name, data, tmp_path)

        assert told["live"]
        assert told["ready"]
        assert told["text"] == [RED_CIRCLE if server.name == "describe" else PROSE]
        assert told["outputs"] == ["text"]
        assert told["id"] == "r7"
        assert told["milliseconds"] > 0
        assert told["demo_model"] is True
        assert told["refused"][0] == "StatusCode.INVALID_ARGUMENT"
        assert "temperature" in told["refused"][1]
        assert told["unloaded"] is False

    def test_reads_the_same_metadata_as_over_http(self, server, tmp_path):
        told = triton(server, *element(server), tmp_path)
        with server.client() as http:
            model = http.get(f"/v2/models/{server.name}").json()
            assert told["server"] == http.get("/v2").json()
        for side in ("inputs", "outputs"):
            assert [
                {**tensor, "shape": [int(size) for size in tensor["shape"]]} for tensor in told["model"][side]
            ] == model[side]
        assert told["model"]["versions"] == model["versions"]

    def test_sends_an_image_of_20_mib(self, describe, tmp_path):
        image = scaled(2640)
        assert 19.9 * 2**20 < len(image) <= 20 * 2**20

        assert triton(describe, "image", image, tmp_path)["text"] == [RED_CIRCLE]


class TestKServe:
    async def test_speaks_with_each_predictor(self, server):
        client = InferenceGRPCClient(server.grpc)
        try:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready(server.name)
            name, data = element(server)
            tensor = InferInput(name, [1], "BYTES")
            tensor.set_data_from_numpy(np.array([data], dtype=np.object_), binary_data=True)

            response = await client.infer(InferRequest(model_name=server.name, infer_inputs=[tensor]))

            texts = {output.name: output for output in response.outputs}["text"].as_numpy()
            assert texts[0].decode() == (RED_CIRCLE if server.name == "describe" else PROSE)
        finally:
            await client.close()


def infer_message(server: Server, *elements: bytes) -> pb.ModelInferRequest:
    name, _ = element(server)
    message = pb.ModelInferRequest(model_name=server.name)
    tensor = message.inputs.add(name=name, datatype="BYTES", shape=[len(elements)])
    tensor.contents.bytes_contents.extend(elements)
    return message


class TestErrors:
    async def test_of_the_image_are_those_of_http(self, describe):
        async with grpc.aio.insecure_channel(describe.grpc) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            for data, code in ((b"\xff no image", "image_undecodable"), (b"https://x.example/a", "url_not_allowed")):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await stub.ModelInfer(infer_message(describe, data), metadata=(("x-request-id", "mine"),))
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
                told = dict(caught.value.trailing_metadata())
                assert (told["error-code"], told["x-request-id"]) == (code, "mine")
        assert "status=INVALID_ARGUMENT" in describe.log()

    async def test_of_a_full_queue(self, launcher: Launcher):
        server = launcher.start("describe", "--queue-size", "1").wait_ready()
        async with grpc.aio.insecure_channel(server.grpc) as channel:
            stub = pb_grpc.GRPCInferenceServiceStub(channel)
            results = await asyncio.gather(
                *(stub.ModelInfer(infer_message(server, red_circle())) for _ in range(12)), return_exceptions=True
            )
        faults = [result for result in results if isinstance(result, grpc.aio.AioRpcError)]
        assert 0 < len(faults) < 12
        assert {fault.code() for fault in faults} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert int(dict(faults[0].trailing_metadata())["retry-after"]) >= 1


async def test_sigterm_answers_what_is_running_on_both_ports_and_exits_0(launcher: Launcher):
    server = launcher.start("describe").wait_ready()
    in_flight = b'sightline_items_in_flight{model_name="describe"} 32.0'
    async with (
        httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http,
        grpc.aio.insecure_channel(server.grpc) as channel,
    ):
        stub = pb_grpc.GRPCInferenceServiceStub(channel)
        running = asyncio.ensure_future(stub.ModelInfer(infer_message(server, *[red_circle()] * 32)))
        while in_flight not in (await http.get("/metrics")).content and not running.done():
            pass
        assert not running.done(), "the request ended before the signal could be sent"
        server.process.send_signal(signal.SIGTERM)
        answer = await running
    assert answer.raw_output_contents[0].count(RED_CIRCLE.encode()) == 32
    assert await asyncio.to_thread(server.process.wait, 60) == 0


@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_port_that_is_taken_ends_the_process_with_1(launcher: Launcher, flag):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = launcher.start("enhance", flag, str(taken.getsockname()[1]))
        assert server.process.wait(240) == 1
    assert "the server could not start" in server.log()
