"""`sightline conformance` as people and programs use it."""

import json
import subprocess
import sys

import pytest

from sightline.conformance.catalogue import CHECKS
from sightline.conformance.schema import document
from sightline.conformance.tensors import MARKER, picture, request_from, tensor_for
from tests.conformance.faulty_server import running
from tests.conftest import free_port


@pytest.fixture(scope="module")
def server():
    with running() as server:
        yield server


def conformance(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sightline", "conformance", *words],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_it_exits_with_0_when_every_must_holds(server):
    done = conformance("--url", server.url, "--select", "ready.*", "--select", "errors.*")
    assert done.returncode == 0, done.stderr
    assert "every must holds" in done.stdout
    assert "errors.no-echo" in done.stdout


def test_it_exits_with_1_when_a_must_fails_and_says_what_happened(server):
    with server.with_faults("detail for invalid JSON"):
        done = conformance("--url", server.url, "--select", "errors.invalid-json", "--json")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["conforms"] is False
    assert answer["model"] == "probe"
    (result,) = answer["results"]
    assert (result["id"], result["outcome"], result["level"]) == ("errors.invalid-json", "fail", "must")
    assert "422" in result["reason"]


def test_a_broken_promise_is_no_broken_must(server):
    with server.with_faults("closes after errors"):
        done = conformance("--url", server.url, "--select", "connection.after-errors", "--markdown")
    assert done.returncode == 0
    assert "| `connection.after-errors` | promise |" in done.stdout
    assert "✗" in done.stdout


@pytest.mark.parametrize(
    "words",
    [("--url", f"http://127.0.0.1:{free_port()}", "--wait", "0"), ("--url", "ftp://x"), ("--select", "nonsense.*"), ()],
    ids=["nobody there", "no HTTP address", "no such check", "no address"],
)
def test_it_exits_with_2_when_it_cannot_ask(words):
    done = conformance(*words)
    assert done.returncode == 2
    assert done.stderr.startswith("sightline: ")


def test_it_lists_its_checks_and_prints_its_document():
    listed = conformance("--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == [check.id for check in CHECKS]
    assert conformance("--document").stdout == document()


def test_a_request_of_the_users_own_is_what_is_asked(server, tmp_path):
    import base64

    own = tmp_path / "request.json"
    image = base64.b64encode(picture("JPEG")).decode()
    tensors = [
        {"name": "image", "shape": [2], "datatype": "BYTES", "data": [image, image]},
        {"name": "scores", "shape": [1, 2], "datatype": "FP32", "data": [[1, 2]]},
    ]
    own.write_text(json.dumps({"inputs": tensors}))
    done = conformance("--url", server.url, "--request", str(own), "--select", "json.*", "--select", "binary.*")
    assert done.returncode == 0, done.stdout
    own.write_text(json.dumps({"inputs": tensors[:1]}))
    done = conformance("--url", server.url, "--request", str(own), "--select", "json.infer")
    assert done.returncode == 1


def test_a_checks_id_is_its_own_and_its_sentence_says_something():
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    assert all(len(check.sentence) > 20 and check.sentence.endswith(".") for check in CHECKS)


class TestRequests:
    @pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT64", "FP16", "FP32", "FP64"])
    def test_a_free_dimension_is_one_and_numbers_are_zeros(self, datatype):
        tensor = tensor_for({"name": "x", "datatype": datatype, "shape": [-1, 3]})
        assert tensor.shape == (1, 3)
        assert not any(tensor.elements)
        assert len(tensor.blob()) == 3 * {"BOOL": 1, "UINT8": 1, "INT64": 8, "FP16": 2, "FP32": 4, "FP64": 8}[datatype]

    @pytest.mark.parametrize("name", ["image", "INPUT_IMG", "page_image"])
    def test_bytes_called_an_image_are_one_with_our_marker_in_it(self, name):
        tensor = tensor_for({"name": name, "datatype": "BYTES", "shape": [1]})
        assert tensor.is_image
        assert MARKER in tensor.elements[0]
        assert MARKER in picture("JPEG")

    def test_other_bytes_are_text(self):
        tensor = tensor_for({"name": "prompt", "datatype": "BYTES", "shape": [1]})
        assert not tensor.is_image
        assert tensor.as_json()["data"] == ["A large red circle on a white background."]

    def test_base64_that_is_no_image_stays_text(self):
        request = request_from({"inputs": [{"name": "t", "datatype": "BYTES", "shape": [1], "data": ["abcd"]}]})
        assert request.inputs[0].elements == (b"abcd",)


def test_the_document_is_valid_openapi_without_dollars_in_its_paths():
    import yaml
    from openapi_spec_validator import validate

    parsed = yaml.safe_load(document())
    validate(parsed)
    assert "/v2/models/{model_name}/infer" in parsed["paths"]
    assert not any("$" in path for path in parsed["paths"])
    assert parsed["paths"]["/v2/models/{model_name}/infer"]["post"]["responses"].keys() == {"200", "4XX", "5XX"}
