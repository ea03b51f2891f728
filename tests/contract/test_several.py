"""One process for several predictors: every route of each, one port, one readiness, one end."""

import base64
import signal

import pytest

from tests.conftest import Launcher, Server
from tests.scenes import RED_CIRCLE, red_circle

NAMES = ("describe", "enhance", "generate", "embed", "blip", "pipeline")


def tensor(name: str, *values: str) -> dict:
    return {"name": name, "shape": [len(values)], "datatype": "BYTES", "data": list(values)}


def test_v2_lists_all_and_each_is_asked_by_its_name(everything: Server):
    image = base64.b64encode(red_circle()).decode()
    with everything.client() as client:
        names = set(NAMES)
        assert set(client.get("/v2/models").json()["models"]) == names
        assert {item["name"]: item["state"] for item in client.post("/v2/repository/index").json()} == dict.fromkeys(
            names, "READY"
        )
        for name in names - {"enhance", "embed"}:
            asked = [tensor("prompt", "What is in this image?")] if name in {"describe", "generate"} else []
            body = {"inputs": [tensor("image", image), *asked], "parameters": {"temperature": 0.0}}
            answer = client.post(f"/v2/models/{name}/infer", json=body).json()
            assert answer.get("model_name") == name, answer
            (text,) = (item["data"][0] for item in answer["outputs"] if item["name"] == "text")
            assert "red circle" in text, (name, text)
        for name in names:
            assert client.get(f"/v2/models/{name}").json()["parameters"]["demo_model"] is True


def test_the_gateway_takes_the_steps_beside_it(everything: Server):
    with everything.client() as client:
        answer = client.post(
            "/caption", json={"image": base64.b64encode(red_circle()).decode(), "explain": True}
        ).json()
    assert answer["enhanced"] is True
    assert answer["original_caption"] == RED_CIRCLE
    assert [step["name"] for step in answer["steps"]] == ["caption", "enhance"]


def test_caption_is_decided_by_its_body(everything: Server, s3_server):
    s3_server.put("several", "circle.png", red_circle())
    with everything.client() as client:
        by_d = client.post("/caption", json={"s3_uri": "s3://several/circle.png", "use_gpt_oss": False}).json()
        assert by_d["enhanced"] is False
        assert by_d["s3_uri"] == "s3://several/circle.png"
        by_e = client.post("/caption", json={"image_path": "circle.png"}).json()
        assert by_e["image_path"] == "circle.png"
        assert "enhanced" not in by_e
        upload = client.post("/caption", files={"image": ("circle.png", red_circle())}).json()
        assert upload["filename"] == "circle.png"
        assert "enhanced" not in upload


def test_every_native_route_is_there(everything: Server):
    with everything.client() as client:
        assert client.post("/api/v1/run", files={"image": red_circle()}).json()["status"] == "COMPLETED"
        patches = client.post("/patches", json={"dimensions": [{"width": 512, "height": 512}]}).json()["results"]
        assert patches[0]["n_patches_x"] == 12
        assert client.post("/generate/text", json={"prompt": "Which shapes do you know?"}).json()["output"]
        assert client.post("/batch-caption", json={"image_paths": ["circle.png"]}).json()[0]["caption"]


def test_health_is_the_truth_about_each(everything: Server):
    with everything.client() as client:
        health = client.get("/health").json()
    assert health["ok"] is True
    assert health["status"] == "healthy"
    assert health["device"] == "cpu"
    assert set(health["models"]) == set(NAMES)
    assert all(model["ready"] for model in health["models"].values())


def test_root_is_the_page_for_browsers_and_the_greeting_for_programs(everything: Server):
    with everything.client() as client:
        assert "<html" in client.get("/", headers={"Accept": "text/html,*/*;q=0.8"}).text
        assert client.get("/").json()["message"] == "ColQwen2.5 Embedding API"


def test_openai_s_model_list_has_all_who_speak_it(everything: Server):
    with everything.client() as client:
        listed = {model["id"] for model in client.get("/v1/models", headers={"Accept": "*/*"}).json()["data"]}
    assert {"describe", "enhance", "generate", "embed"} <= listed


def test_the_document_has_every_route_once(everything: Server):
    with everything.client() as client:
        document = client.get("/openapi.json").json()
    paths = set(document["paths"])
    assert {"/api/v1/run", "/caption", "/patches", "/generate/text", "/batch-caption", "/health", "/"} <= paths
    properties = document["paths"]["/caption"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "s3_uri" in str(properties)
    assert "image_path" in str(properties)


def test_readiness_needs_all_and_the_end_drains_all(launcher: Launcher):
    server = launcher.start("describe enhance").wait_live()
    with server.client() as client:
        while client.get("/v2/models/describe/ready").status_code != 200:
            assert client.get("/v2/health/ready").status_code == 503
        server.wait_ready()
        assert client.get("/v2/models/enhance/ready").status_code == 200
        text = client.post("/v2/models/enhance/infer", json={"inputs": [tensor("text", RED_CIRCLE)]}).json()
        assert "red circle" in text["outputs"][0]["data"][0]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(40) == 0


def test_a_model_that_cannot_be_loaded_ends_the_process(launcher: Launcher):
    server = launcher.start("enhance describe", "--describe.model", "/nowhere")
    assert server.process.wait(240) == 1
    assert "stopped:" in server.log()
    assert "never awaited" not in server.log()


@pytest.mark.parametrize(
    ("words", "flags", "reason"),
    [
        ("describe enhance", ["--model", "x"], "say --describe.model or --enhance.model"),
        (
            "describe enhance",
            ["--describe.model-name", "x", "--enhance.model-name", "x"],
            "two predictors have one name",
        ),
        ("describe nonsense", [], "usage: sightline serve {"),
    ],
)
def test_what_cannot_be_meant_does_not_start(launcher: Launcher, words: str, flags: list[str], reason: str):
    server = launcher.start(words, *flags)
    assert server.process.wait(240) in {1, 2}
    assert reason in server.log()
