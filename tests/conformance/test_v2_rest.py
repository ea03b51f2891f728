"""The V2 protocol as its real clients speak it: tritonclient, KServe's own client, and bare HTTP."""

import base64
import gzip
import json
from typing import ClassVar

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from tritonclient.utils import InferenceServerException

from tests.conftest import Server
from tests.scenes import RED_CIRCLE, red_circle

PROSE = "The image shows a large red circle on a white background."


@pytest.fixture(scope="module")
def image() -> bytes:
    return red_circle()


@pytest.fixture(params=["describe", "enhance", "pipeline"])
def server(request, chain_servers) -> Server:
    return chain_servers[request.param]


@pytest.fixture
def client(server: Server):
    client = triton.InferenceServerClient(server.url.removeprefix("http://"))
    yield client
    client.close()


def bytes_input(name: str, *elements: bytes, binary: bool) -> triton.InferInput:
    tensor = triton.InferInput(name, [len(elements)], "BYTES")
    tensor.set_data_from_numpy(np.array(elements, dtype=np.object_), binary_data=binary)
    return tensor


def describe_client(describe: Server) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(describe.url.removeprefix("http://"), network_timeout=60)


class TestServer:
    def test_is_live_and_ready(self, client, server):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(server.name)
        assert client.is_model_ready(server.name, "1")

    def test_unknown_models_are_not_ready(self, client):
        assert not client.is_model_ready("nothing")

    def test_announces_the_binary_extension(self, client):
        metadata = client.get_server_metadata()
        assert metadata["name"] == "sightline"
        assert "binary_tensor_data" in metadata["extensions"]

    def test_describes_its_model(self, client, server):
        metadata = client.get_model_metadata(server.name)
        assert metadata["name"] == server.name
        assert metadata["versions"] == ["1"]
        assert all(set(tensor) == {"name", "datatype", "shape"} for tensor in metadata["inputs"] + metadata["outputs"])
        assert metadata["parameters"]["demo_model"] is True
        assert None not in metadata.values()

    def test_lists_its_repository(self, client, server):
        assert [(entry["name"], entry["state"]) for entry in client.get_model_repository_index()] == [
            (server.name, "READY")
        ]

    def test_nobody_can_unload_it(self, client, server):
        with pytest.raises(InferenceServerException):
            client.unload_model(server.name)
        assert client.is_model_ready(server.name)


class TestTriton:
    @pytest.mark.parametrize("binary_out", [True, False], ids=["binary out", "JSON out"])
    def test_raw_image_bytes_in_binary(self, describe, image, binary_out):
        client = describe_client(describe)
        outputs = [triton.InferRequestedOutput("text", binary_data=binary_out)]
        result = client.infer("describe", [bytes_input("image", image, binary=True)], outputs=outputs, request_id="r7")
        (text,) = result.as_numpy("text")
        assert (text.decode() if isinstance(text, bytes) else text) == RED_CIRCLE
        assert result.get_response()["id"] == "r7"

    @pytest.mark.parametrize("form", ["base64", "data URI"])
    def test_json_mode(self, describe, image, form):
        encoded = base64.b64encode(image)
        if form == "data URI":
            encoded = b"data:image/png;base64," + encoded
        client = describe_client(describe)
        tensor = bytes_input("image", encoded, binary=False)
        outputs = [triton.InferRequestedOutput("text", binary_data=False)]
        result = client.infer("describe", [tensor], outputs=outputs)
        assert list(result.as_numpy("text")) == [RED_CIRCLE]

    @pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
    def test_compression_both_ways(self, describe, image, algorithm):
        client = describe_client(describe)
        result = client.infer(
            "describe",
            [bytes_input("image", image, binary=True)],
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        assert result.as_numpy("text")[0] == RED_CIRCLE.encode()

    def test_several_images_and_one_prompt(self, describe, image):
        client = describe_client(describe)
        inputs = [
            bytes_input("image", image, image, image, binary=True),
            bytes_input("prompt", b"Caption this image.", binary=True),
        ]
        result = client.infer("describe", inputs, parameters={"max_tokens": 64})
        assert list(result.as_numpy("text")) == [RED_CIRCLE.encode()] * 3
        assert result.get_response()["parameters"]["image_tokens"] > 0

    async def test_asyncio_client(self, describe, image):
        async with triton_aio.InferenceServerClient(describe.url.removeprefix("http://")) as client:
            assert await client.is_model_ready("describe")
            result = await client.infer("describe", [bytes_input("image", image, binary=True)])
            assert result.as_numpy("text")[0] == RED_CIRCLE.encode()

    def test_enhance(self, enhance):
        client = triton.InferenceServerClient(enhance.url.removeprefix("http://"), network_timeout=60)
        result = client.infer(
            "enhance", [bytes_input("text", RED_CIRCLE.encode(), binary=True)], parameters={"reasoning_level": "low"}
        )
        text = result.as_numpy("text")[0].decode()
        assert text.count(".") == 1
        assert "large red circle" in text

    def test_pipeline(self, pipeline, image):
        client = triton.InferenceServerClient(pipeline.url.removeprefix("http://"), network_timeout=60)
        result = client.infer("pipeline", [bytes_input("image", image, binary=True)], parameters={"enhance": True})
        assert result.as_numpy("original_text")[0] == RED_CIRCLE.encode()
        assert result.as_numpy("enhanced").tolist() == [True]
        assert b"large red circle" in result.as_numpy("text")[0]

    def test_errors_can_be_read_by_the_client(self, describe):
        client = describe_client(describe)
        with pytest.raises(InferenceServerException, match=r"not an image|image"):
            client.infer("describe", [bytes_input("image", b"\x89PNG\r\n\x1a\nnot", binary=True)])
        with pytest.raises(InferenceServerException, match="No such model"):
            client.infer("nothing", [bytes_input("image", b"x", binary=True)])


class TestKServeClient:
    @pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
    async def test_v2(self, describe, image, binary):
        client = InferenceRESTClient(RESTConfig(protocol="v2", retries=1, timeout=60))
        try:
            assert await client.is_server_live(describe.url)
            assert await client.is_server_ready(describe.url)
            assert await client.is_model_ready(describe.url, "describe")
            tensor = InferInput("image", [1], "BYTES")
            data = image if binary else base64.b64encode(image)
            tensor.set_data_from_numpy(np.array([data], dtype=np.object_), binary_data=binary)
            request = InferRequest(model_name="describe", infer_inputs=[tensor])
            response = await client.infer(describe.url, request, model_name="describe")
            assert response.outputs[0].data == [RED_CIRCLE]
        finally:
            await client.close()

    async def test_v1(self, describe, image):
        client = InferenceRESTClient(RESTConfig(protocol="v1", retries=1, timeout=60))
        try:
            body = {"instances": [{"image": base64.b64encode(image).decode()}]}
            response = await client.infer(describe.url, body, model_name="describe")
            assert response["predictions"][0]["text"] == RED_CIRCLE
        finally:
            await client.close()


class TestV1:
    @pytest.mark.parametrize("key", ["image", "image_url", "image_bytes", "bare"])
    def test_every_way_to_name_an_image(self, describe, image, key):
        text = base64.b64encode(image).decode()
        instance = {"bare": text, "image_bytes": {"image_bytes": {"b64": text}}}.get(key, {key: text})
        with describe.client() as client:
            body = client.post("/v1/models/describe:predict", json={"instances": [instance]}).json()
        assert body["predictions"][0]["text"] == RED_CIRCLE
        assert body["demo_model"] is True
        assert body["predictions"][0]["usage"]["image_tokens"] > 0

    def test_lists_and_readiness(self, server):
        with server.client() as client:
            assert client.get("/v1/models").json()["models"] == [server.name]
            assert client.get(f"/v1/models/{server.name}").json()["ready"] in {True, "True"}
            assert client.get("/v1/models/nothing").status_code == 404

    @pytest.mark.parametrize(
        "body", [{}, {"instances": []}, {"instances": [{}]}, {"instances": "x"}, [], {"instances": [5]}]
    )
    def test_bad_bodies_are_400(self, server, body):
        with server.client() as client:
            response = client.post(f"/v1/models/{server.name}:predict", json=body)
        assert response.status_code == 400
        assert set(response.json()) == {"error", "code", "request_id"}


class TestFaults:
    BODIES: ClassVar = {
        "no JSON": b"{",
        "no inputs": b"{}",
        "empty inputs": b'{"inputs": []}',
        "no data": b'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES"}]}',
        "wrong shape": b'{"inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": ["x"]}]}',
        "wrong type": b'{"inputs": [{"name": "image", "shape": [1], "datatype": "FP32", "data": [1]}]}',
        "unknown type": b'{"inputs": [{"name": "image", "shape": [1], "datatype": "X", "data": [1]}]}',
        "numbers for bytes": b'{"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": [1]}]}',
        "unknown input": b'{"inputs": [{"name": "zebra", "shape": [1], "datatype": "BYTES", "data": ["x"]}]}',
        "no elements": b'{"inputs": [{"name": "image", "shape": [0], "datatype": "BYTES", "data": []}]}',
        "deep": b"[" * 100_000,
        "list parameter": b'{"parameters": {"a": []}, "inputs": []}',
    }

    @pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
    def test_are_400_with_a_code_and_the_connection_stays_usable(self, server, body):
        with server.client(limits=httpx.Limits(max_connections=1)) as client:
            for _ in range(2):
                response = client.post(f"/v2/models/{server.name}/infer", content=body)
                assert response.status_code == 400
                assert set(response.json()) == {"error", "code", "request_id"}
                assert "connection" not in response.headers
            assert client.get("/v2/health/live").json() == {"live": True}

    def test_header_length_must_fit(self, describe):
        with describe.client() as client:
            for value in ("9999", "-1", "x", ""):
                response = client.post(
                    "/v2/models/describe/infer", content=b"{}", headers={"Inference-Header-Content-Length": value}
                )
                assert response.status_code == 400

    def test_broken_compression_is_400(self, describe):
        with describe.client() as client:
            for body in (b"nonsense", gzip.compress(b"x" * 1000)[:-9]):
                response = client.post("/v2/models/describe/infer", content=body, headers={"Content-Encoding": "gzip"})
                assert response.status_code == 400
                assert response.json()["code"] == "invalid_encoding"
            assert (
                client.post("/v2/models/describe/infer", content=b"", headers={"Content-Encoding": "br"}).status_code
                == 400
            )

    def test_a_compression_bomb_is_413(self, describe):
        bomb = gzip.compress(b"0" * (101 * 1024 * 1024), compresslevel=9)
        with describe.client() as client:
            response = client.post("/v2/models/describe/infer", content=bomb, headers={"Content-Encoding": "gzip"})
        assert response.status_code == 413

    def test_unknown_outputs_are_400(self, describe, image):
        body = {
            "inputs": [
                {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(image).decode()]}
            ],
            "outputs": [{"name": "zebra"}],
        }
        with describe.client() as client:
            response = client.post("/v2/models/describe/infer", json=body)
        assert response.status_code == 400
        assert response.json()["code"] == "unknown_output"

    def test_too_many_images_are_400(self, describe, image):
        text = base64.b64encode(image).decode()
        tensor = {"name": "image", "shape": [33], "datatype": "BYTES", "data": [text] * 33}
        with describe.client() as client:
            response = client.post("/v2/models/describe/infer", json={"inputs": [tensor]})
        assert response.status_code == 400

    def test_answers_hold_no_nulls(self, describe, image):
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(image).decode()]}
        with describe.client() as client:
            response = client.post("/v2/models/describe/infer", json={"inputs": [tensor]})
        assert "null" not in response.text
        body = response.json()
        assert body["model_name"] == "describe"
        assert body["outputs"] == [{"name": "text", "shape": [1], "datatype": "BYTES", "data": [RED_CIRCLE]}]
        assert body["parameters"]["demo_model"] is True
        assert json.dumps(body)

    def test_unknown_routes_and_methods(self, server):
        with server.client() as client:
            assert client.get("/nowhere").status_code == 404
            assert client.get("/nowhere").json()["code"] == "route_not_found"
            assert client.delete("/v2").status_code == 405
            assert client.get(f"/v2/models/{server.name}/versions/2").status_code == 404

    def test_documentation_is_there(self, server):
        with server.client() as client:
            assert client.get("/docs").status_code == 200
            schema = client.get("/openapi.json").json()
            assert "/v2/models/{model_name}/infer" in schema["paths"]
            assert b"sightline_request_seconds" in client.get("/metrics").content
