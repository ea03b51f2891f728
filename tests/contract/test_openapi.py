"""The OpenAPI documents: made without a model, served as they are kept, and true."""

import json
import subprocess
import sys
import time

import httpx
import pytest

from tests.conftest import ROOT, Server
from tests.documents import FOLDER, Operation, check, check_error, document, operations, parametrized
from tests.examples import UNKNOWN, requests


def test_they_are_made_without_torch_and_are_those_that_are_kept(tmp_path):
    program = (
        "import runpy, sys; sys.argv = ['openapi.py', '--folder', sys.argv[1]];"
        "runpy.run_path('scripts/openapi.py', run_name='__main__');"
        "heavy = {'torch', 'transformers', 'colpali_engine', 'bitsandbytes'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, timeout=240)
    made = {file.name: json.loads(file.read_text()) for file in tmp_path.iterdir()}
    assert made == {file.name: json.loads(file.read_text()) for file in FOLDER.glob("*.json")}, "say make openapi"
    assert len(made) == 6


@pytest.mark.parametrize("operation", operations(), ids=str)
def test_every_operation_says_what_it_takes_and_answers(operation: Operation):
    spec = operation.spec
    assert spec["summary"]
    for status, answer in spec["responses"].items():
        contents = answer.get("content")
        assert contents, (status, answer)
        for kind, content in contents.items():
            schema = content.get("schema")
            assert schema, f"{status} {kind} says nothing"
            if kind == "application/json":
                assert schema.keys() & {"$ref", "properties", "items", "anyOf", "oneOf"}, (status, schema)
    assert "200" in spec["responses"] or "202" in spec["responses"] or "501" in spec["responses"]
    for kind, schema in operation.contents.items():
        assert kind.startswith(("application/", "image/", "multipart/"))
        assert schema, kind
    assert '"nullable"' not in json.dumps(spec), "OpenAPI 3.1 says type: [x, null]"


@pytest.mark.parametrize("operation", operations(), ids=str)
def test_a_good_request_is_answered_as_documented(operation: Operation, everything: Server, request):
    # Where both are served, an uploaded image goes to BLIP (contract E).
    is_ambiguous = (operation.predictor, operation.path) == ("pipeline", "/caption")
    server = request.getfixturevalue("pipeline") if is_ambiguous else everything
    with server.client() as client:
        for good in requests(operation):
            path, rest = good["path"], {name: value for name, value in good.items() if name != "path"}
            response = client.request(operation.method, path, **rest)
            check(operation, response)
            expected = (
                {501} if "501" in operation.spec["responses"] else {400, 404} if UNKNOWN in str(good) else {200, 202}
            )
            assert response.status_code in expected, response.text


def test_the_states_of_jobs_are_as_documented(everything: Server):
    run = Operation("describe", "GET", "/api/v1/status/{run_id}")
    task = Operation("blip", "GET", "/task-status/{task_id}")
    with everything.client() as client:
        image = requests(Operation("describe", "POST", "/api/v1/run"))[0]["json"]
        run_id = client.post("/api/v1/run", json=image, params={"wait": 0}).json()["id"]
        task_id = client.post("/async-batch-caption", json={"image_paths": ["circle.png", "no.png"]}).json()["task_id"]
        for operation, path in ((run, f"/api/v1/status/{run_id}"), (task, f"/task-status/{task_id}")):
            while True:
                response = client.get(path)
                check(operation, response)
                if response.json()["status"].lower() == "completed":
                    break
                time.sleep(0.05)


@pytest.mark.parametrize("name", [file.stem for file in sorted(FOLDER.glob("*.json"))])
def test_a_server_serves_its_document(name: str, everything: Server):
    with everything.client() as client:
        served = client.get("/openapi.json").json()
    missing = set(document(name)["paths"]) - set(served["paths"])
    assert not missing


@parametrized()
def test_without_a_key_every_route_but_the_probes_is_403(operation: Operation, locked_app: httpx.Client):
    path = requests(operation)[0]["path"]
    response = locked_app.request(operation.method, path)
    if operation.spec.get("security") == []:
        assert response.status_code != 403
    else:
        assert response.status_code == 403
        check_error(response)
    check(operation, response)


@pytest.fixture(scope="module")
def locked_app():
    """Each predictor's application, in this process, without its model, wanting a key."""
    from fastapi.testclient import TestClient

    from sightline.configuration import configure
    from sightline.server.model import MODELS
    from sightline.server.serve import build_app, build_models

    kinds = {name: model.settings_type for name, model in MODELS.items()}
    configured = configure(kinds, ["--api-keys", "secret"])
    app = build_app(build_models(configured), next(iter(configured.values())).settings)
    return TestClient(app)  # not entered: nothing is started, nothing is to be closed
