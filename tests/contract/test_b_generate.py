"""Contract B, row by row: the generate service's own routes, behind its keys."""

import base64
import inspect
import json
import os
import threading
from pathlib import Path

import httpx
import pytest
from PIL import Image

from sightline.settings import TINY, GenerateSettings, load
from tests.conftest import ROOT, START_SECONDS, Launcher, Server
from tests.hostile import REFUSED_IMAGES, images
from tests.scenes import RED_CIRCLE, Thing, draw, encoded, red_circle

KEYS = ("first-key", "second-key")
DESCRIBE = "Describe this image in detail"
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def generate(session_launcher: Launcher, s3_server) -> Server:
    server = session_launcher.start(
        "generate", "--api-keys", ",".join(KEYS), auth="api-key", env=s3_server.environment()
    )
    server.headers["X-API-Key"] = KEYS[0]
    return server.wait_ready()


@pytest.fixture
def http(generate: Server):
    with generate.client() as client:
        yield client


@pytest.fixture(scope="module")
def star() -> bytes:
    import random

    thing = Thing("large", "blue", "star", 64, 64, 26)
    return encoded(draw([thing], (250, 250, 250), 128, 128, random.Random(1)))


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def upload(*pictures: bytes, name: str = "images") -> list:
    return [(name, (f"{number}.png", data, "image/png")) for number, data in enumerate(pictures)]


def metadata(http: httpx.Client) -> dict:
    return http.get("/v2/models/generate").json()["parameters"]


def experts_of_the_small_model() -> int:
    """Numbers in the routed experts of the demonstration checkpoint."""
    text = json.loads((TINY / "generate" / "config.json").read_text())["text_config"]
    layers = text["num_hidden_layers"] - text["first_k_dense_replace"]
    return layers * text["n_routed_experts"] * 3 * text["hidden_size"] * text["moe_intermediate_size"]


class TestB1Weights:
    def test_metadata_says_how_they_are_held(self, http):
        said = metadata(http)
        held = {name: size for name, size in said.items() if name.startswith("bytes_")}
        assert said["quantization"] == "none"  # of the small model, that is
        assert set(held) == {"bytes_float32"}
        assert held["bytes_float32"] > 1_000_000

    def test_8bit_is_the_default_of_every_other_model(self):
        assert load(GenerateSettings, ["--auth", "off"]).quantization == "auto"

    def test_8bit_really_is(self, launcher: Launcher, http):
        """Everything that becomes int8 took four bytes before: the routed experts too, which bitsandbytes skips."""
        pytest.importorskip("bitsandbytes")
        server = launcher.start("generate", "--quantization", "8bit").wait_ready()
        with server.client() as packed:
            said = metadata(packed)
            answer = packed.post("/generate/image", data={"prompt": DESCRIBE, "temperature": "0"},
                                 files=upload(red_circle())).json()  # fmt: skip
        assert said["quantization"] == "8bit"
        saved = metadata(http)["bytes_float32"] - said["bytes_float32"]
        assert saved == pytest.approx(4 * said["bytes_int8"], rel=0.1)  # the scales of their rows are float32
        assert said["bytes_int8"] > experts_of_the_small_model()
        assert "circle" in answer["output"]

    def test_an_unknown_scheme_refuses_to_start(self, launcher: Launcher):
        server = launcher.start("generate", "--quantization", "3bit")
        assert server.process.wait(START_SECONDS) == 2
        assert "quantization" in server.log()


class TestB2Text:
    def test_answers_output_usage_model_and_request_id(self, http):
        response = http.post(
            "/generate/text", json={"prompt": "What can you do?"} | GREEDY, headers={"X-Request-Id": "r-77"}
        )
        body = response.json()
        assert response.status_code == 200
        assert set(body) == {"output", "usage", "finish_reason", "model", "request_id", "demo_model"}
        assert body["output"] == "I am a small demonstration model. I describe coloured shapes."
        assert body["request_id"] == response.headers["X-Request-Id"] == "r-77"
        assert body["model"] == "sightline-tiny-kimi-vl"
        assert body["demo_model"] is True
        assert body["usage"]["prompt_tokens"] > 0
        assert body["usage"]["completion_tokens"] > 0
        assert body["usage"]["image_tokens"] == 0

    @pytest.mark.parametrize("body", [{}, {"prompt": None}, {"prompt": ""}, {"prompt": "  "}, {"system_prompt": "x"}])
    def test_without_a_prompt_is_422(self, http, body):
        response = http.post("/generate/text", json=body)
        assert response.status_code == 422
        assert set(response.json()) == {"detail", "code", "request_id"}
        assert response.json()["code"] == "prompt_missing"

    @pytest.mark.parametrize("prompt", [5, ["x"], {"text": "x"}, True])
    def test_a_prompt_is_text(self, http, prompt):
        assert http.post("/generate/text", json={"prompt": prompt}).status_code == 422

    def test_a_prompt_has_a_limit(self, http):
        assert http.post("/generate/text", json={"prompt": "x" * 8193}).status_code == 422

    @pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b"\xff\xfe"])
    def test_no_json_is_400(self, http, body):
        response = http.post("/generate/text", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert response.json()["code"] == "invalid_json"

    def test_images_are_not_silently_ignored(self, http):
        response = http.post("/generate/text", data={"prompt": DESCRIBE}, files=upload(red_circle()))
        assert response.status_code == 422
        assert response.json()["code"] == "image_unsupported"

    def test_an_answer_may_come_in_pieces(self, http):
        whole = http.post("/generate/text", json={"prompt": "What can you do?"} | GREEDY).json()
        response = http.post(
            "/generate/text", json={"prompt": "What can you do?"} | GREEDY, headers={"Accept": "text/event-stream"}
        )
        assert response.headers["content-type"].startswith("text/event-stream")
        *pieces, (name, end) = events_of(response.text)
        assert name == "done"
        assert {name for name, _ in pieces} == {"delta"}
        assert len(pieces) > 1
        assert "".join(data["delta"] for _, data in pieces) == end["output"] == whole["output"]
        assert set(end) == set(whole)

    def test_or_when_the_body_says_stream(self, http):
        response = http.post("/generate/text", json={"prompt": "Hi!", "stream": True, "max_tokens": 3})
        assert events_of(response.text)[-1][0] == "done"


def events_of(text: str) -> list[tuple[str, dict]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


class TestB3Image:
    def test_one_file(self, http):
        response = http.post(
            "/generate/image", data={"prompt": DESCRIBE, "temperature": "0"}, files=upload(red_circle())
        )
        body = response.json()
        assert response.status_code == 200
        assert body["output"] == RED_CIRCLE
        assert body["usage"]["image_tokens"] > 0

    def test_several_files_are_all_in_one_prompt(self, http, star):
        one = http.post("/generate/image", data={"prompt": DESCRIBE, "temperature": "0"}, files=upload(star)).json()
        body = http.post(
            "/generate/image",
            data={"prompt": "Which image holds a star?", "temperature": "0"},
            files=upload(red_circle(), star, red_circle()),
        ).json()
        assert body["output"] == "image 2"
        assert body["usage"]["image_tokens"] > 2 * one["usage"]["image_tokens"]

    @pytest.mark.parametrize("name", ["images", "image"])
    def test_under_either_name(self, http, name):
        body = http.post("/generate/image", data={"prompt": DESCRIBE, "max_tokens": "3", "temperature": "0"},
                         files=upload(red_circle(), name=name)).json()  # fmt: skip
        assert RED_CIRCLE.startswith(body["output"])

    @pytest.mark.parametrize("count", [1, 8])
    def test_up_to_eight(self, http, count):
        response = http.post("/generate/image", data={"prompt": "x", "max_tokens": "2"},
                             files=upload(*[red_circle(64)] * count))  # fmt: skip
        assert response.status_code == 200

    def test_nine_are_422(self, http):
        response = http.post("/generate/image", data={"prompt": "x"}, files=upload(*[red_circle(64)] * 9))
        assert (response.status_code, response.json()["code"]) == (422, "too_many_images")

    def test_none_is_422(self, http):
        response = http.post("/generate/image", data={"prompt": "x"})
        assert (response.status_code, response.json()["code"]) == (422, "image_missing")

    def test_form_fields_are_the_same_options(self, http):
        for field, value in [("max_tokens", "0"), ("temperature", "3"), ("top_p", "0"), ("max_tokens", "many")]:
            response = http.post("/generate/image", data={"prompt": "x", field: value}, files=upload(red_circle()))
            assert response.status_code == 422, (field, value)

    @pytest.mark.parametrize("name", REFUSED_IMAGES)
    def test_a_hostile_image_is_4xx(self, http, name):
        response = http.post("/generate/image", data={"prompt": "x", "max_tokens": "2"}, files=upload(images()[name]))
        assert 400 <= response.status_code < 500, response.text
        assert response.json()["code"]

    def test_and_the_server_lives_on(self, http):
        assert self_check(http)


def self_check(http: httpx.Client) -> bool:
    response = http.post("/generate/text", json={"prompt": "Hi!", "max_tokens": 2})
    return response.status_code == 200


class TestB4ImageUrl:
    def test_form(self, http):
        response = http.post(
            "/generate/image_url",
            data={"prompt": DESCRIBE, "image_url": data_uri(red_circle()), "temperature": "0"},
        )
        assert response.json()["output"] == RED_CIRCLE

    def test_repeatable(self, http, star):
        body = http.post(
            "/generate/image_url",
            data={
                "prompt": "Which image holds a star?",
                "image_url": [data_uri(star), data_uri(red_circle())],
                "temperature": "0",
            },
        ).json()
        assert body["output"] == "image 1"

    @pytest.mark.parametrize("several", [False, True], ids=["one", "a list"])
    def test_json_too(self, http, several):
        url = data_uri(red_circle())
        body = http.post(
            "/generate/image_url", json={"prompt": DESCRIBE, "image_url": [url] if several else url} | GREEDY
        ).json()
        assert body["output"] == RED_CIRCLE

    def test_every_reference(self, http, s3_server):
        uri = s3_server.put("generate", "circle.png", red_circle())
        for url in (uri, base64.b64encode(red_circle()).decode()):
            body = http.post("/generate/image_url", json={"prompt": DESCRIBE, "image_url": url} | GREEDY).json()
            assert body["output"] == RED_CIRCLE

    @pytest.mark.parametrize(
        ("url", "code"),
        [
            ("https://example.com/a.png", "url_not_allowed"),
            ("http://169.254.169.254/latest/meta-data", "url_not_allowed"),
            ("file:///etc/passwd", "source_scheme_unsupported"),
            ("s3://generate/absent.png", "s3_not_found"),
            ("data:image/png;base64,!!!!", "image_base64_invalid"),
        ],
    )
    def test_under_the_policy(self, http, url, code):
        response = http.post("/generate/image_url", data={"prompt": "x", "image_url": url})
        assert (response.status_code, response.json()["code"]) == (400, code)

    @pytest.mark.parametrize("body", [{}, {"image_url": None}, {"image_url": []}, {"image_url": 5}])
    def test_missing_is_422(self, http, body):
        assert http.post("/generate/image_url", json={"prompt": "x"} | body).status_code == 422


class TestB5MaxTokens:
    def test_default_is_4000(self):
        assert load(GenerateSettings, ["--auth", "off"]).max_tokens == 4000

    @pytest.mark.parametrize("max_tokens", [0, -1, 4097, 1.5, "ten", True])
    def test_out_of_range_is_422(self, http, max_tokens):
        response = http.post("/generate/text", json={"prompt": "x", "max_tokens": max_tokens})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_parameter")

    def test_cuts(self, http):
        body = http.post("/generate/text", json={"prompt": "What can you do?", "max_tokens": 2} | GREEDY).json()
        assert body["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 2


class TestB6Sampling:
    def test_zero_is_greedy(self, http):
        answers = {
            http.post("/generate/text", json={"prompt": "Tell me a joke.", "seed": seed} | GREEDY).json()["output"]
            for seed in (1, 2, 3)
        }
        assert len(answers) == 1

    def test_a_seed_repeats_the_answer_and_others_differ(self, http):
        unheard_of = encoded(Image.effect_noise((160, 160), 120).convert("RGB"))  # of what it knows it is too sure

        def ask(seed: int) -> str:
            options = {"prompt": "Describe this image.", "temperature": 2.0, "top_p": 1.0, "seed": seed}
            return http.post("/generate/image", data=options, files=upload(unheard_of)).json()["output"]

        assert ask(1) == ask(1)
        assert len({ask(seed) for seed in range(6)}) > 1

    def test_defaults(self):
        settings = load(GenerateSettings, ["--auth", "off"])
        assert (settings.temperature, settings.top_p) == (0.7, 0.9)

    @pytest.mark.parametrize(
        "option",
        [{"temperature": -0.1}, {"temperature": 2.1}, {"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.1},
         {"top_p": -1}, {"seed": -1}],
        ids=json.dumps,
    )  # fmt: skip
    def test_out_of_range_is_422(self, http, option):
        assert http.post("/generate/text", json={"prompt": "x"} | option).status_code == 422

    @pytest.mark.parametrize("option", [{"temperature": 2}, {"top_p": 1}, {"temperature": 0, "top_p": 0.1}])
    def test_the_ends_of_the_ranges_are_taken(self, http, option):
        assert http.post("/generate/text", json={"prompt": "x", "max_tokens": 2} | option).status_code == 200


def test_b7_no_system_prompt_is_no_system_turn(http):
    def tokens(**fields: str) -> int:
        body = http.post("/generate/text", json={"prompt": "Hi!", "max_tokens": 1, **fields}).json()
        return body["usage"]["prompt_tokens"]

    none = tokens()
    assert tokens(system_prompt="") == tokens(system_prompt="  ") == none
    assert tokens(system_prompt="Answer briefly.") > none + 3


class TestB8Health:
    def test_is_open(self, generate: Server):
        response = httpx.get(f"{generate.url}/health", trust_env=False)
        assert (response.status_code, response.json()) == (200, {"status": "healthy"})

    def test_is_never_blocked_by_a_generation(self, generate: Server, http):
        """Health is asked while a long answer is being made; it is answered before that ends."""
        has_ended = threading.Event()

        def generating() -> None:
            with generate.client() as client:
                client.post("/generate/text", json={"prompt": "x", "temperature": 2.0, "top_p": 1.0, "seed": 3,
                                                    "max_tokens": 600})  # fmt: skip
            has_ended.set()

        thread = threading.Thread(target=generating)
        thread.start()
        answered = 0
        while not has_ended.is_set():
            assert http.get("/health", timeout=30).status_code == 200
            answered += not has_ended.is_set()
        thread.join()
        assert answered > 0


class TestB9Keys:
    ROUTES = (
        ("POST", "/generate/text"), ("POST", "/generate/image"), ("POST", "/generate/image_url"), ("GET", "/docs"),
        ("GET", "/openapi.json"), ("GET", "/metrics"), ("GET", "/v2/models/generate"), ("GET", "/nowhere"),
        ("POST", "/v1/models/generate:predict"), ("POST", "/v2/models/generate/infer"),
    )  # fmt: skip

    @pytest.mark.parametrize(("method", "path"), ROUTES)
    @pytest.mark.parametrize("headers", [{}, {"X-API-Key": "wrong"}, {"X-API-Key": ""}, {"X-API-Key": "first-key2"}],
                             ids=["missing", "wrong", "empty", "longer"])  # fmt: skip
    def test_every_other_route_is_403(self, generate: Server, method, path, headers):
        response = httpx.request(method, generate.url + path, headers=headers, trust_env=False)
        assert response.status_code == 403
        body = response.json()
        told = body.get("detail") or body["error"]
        assert told == "Invalid API key"

    @pytest.mark.parametrize("key", KEYS)
    def test_any_of_several_keys_opens(self, generate: Server, key):
        response = httpx.post(
            f"{generate.url}/generate/text", json={"prompt": "x", "max_tokens": 1}, headers={"X-API-Key": key},
            trust_env=False, timeout=60,
        )  # fmt: skip
        assert response.status_code == 200

    def test_keys_from_a_file_are_read_again(self, launcher: Launcher, tmp_path: Path):
        file = tmp_path / "keys"
        file.write_text("old-key\n")
        server = launcher.start("generate", "--api-key-file", str(file), auth="api-key").wait_live()

        def status(key: str) -> int:
            return httpx.get(f"{server.url}/v2/models", headers={"X-API-Key": key}, trust_env=False).status_code

        assert (status("old-key"), status("new-key")) == (200, 403)
        file.write_text("new-key\n")
        os.utime(file, (1, 1))  # whatever the clock's grain
        for _ in range(200):
            if status("new-key") == 200:
                break
        assert (status("old-key"), status("new-key")) == (403, 200)

    def test_without_any_key_it_refuses_to_start(self, launcher: Launcher):
        server = launcher.start("generate", auth="api-key")
        assert server.process.wait(START_SECONDS) == 2
        assert "no API key configured" in server.log()


class TestB10Environment:
    def test_names_of_the_older_service_are_understood(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        for name, value in {"API_KEY": "k", "KIMI_MODEL_PATH": "/models/kimi", "MAX_TOKENS": "77",
                            "HF_TOKEN": "hf_x"}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        settings = load(GenerateSettings)
        assert settings.api_keys is not None
        assert settings.api_keys.get_secret_value() == "k"
        assert (settings.model, settings.max_tokens) == ("/models/kimi", 77)
        assert settings.hf_token is not None
        assert settings.hf_token.get_secret_value() == "hf_x"

    def test_model_path_is_another_name(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MODEL_PATH", "/models/other")
        assert load(GenerateSettings, ["--auth", "off"]).model == "/models/other"

    def test_from_a_dotenv_file_too(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        (tmp_path / ".env").write_text("KIMI_MODEL_PATH=/from/dotenv\nAPI_KEY=k\n")
        assert load(GenerateSettings).model == "/from/dotenv"

    def test_the_example_names_nothing_that_is_not_understood(self):
        from sightline import settings as all_settings
        from sightline.settings import ServerSettings

        known: set[str] = set()
        for _, kind in inspect.getmembers(all_settings, inspect.isclass):
            if issubclass(kind, ServerSettings):
                for name, field in kind.model_fields.items():
                    choices = getattr(field.validation_alias, "choices", [name])
                    known |= {str(choice).upper() for choice in choices}
        lines = (ROOT / ".env.example").read_text().splitlines()
        names = {line.lstrip("#").partition("=")[0] for line in lines if line.startswith("#") and "=" in line}
        named = {name for name in names if name.isupper() and " " not in name}
        assert {"API_KEY", "KIMI_MODEL_PATH", "MAX_TOKENS", "HF_TOKEN"} <= named
        assert named <= known


class TestProtocols:
    """V1, V2 and OpenAI beside the contract's routes."""

    def test_v1(self, http, star):
        instances = [
            "What can you do?",
            {"prompt": DESCRIBE, "image": base64.b64encode(red_circle()).decode(), "temperature": 0},
            {"prompt": "Which image holds a star?", "images": [data_uri(red_circle()), data_uri(star)],
             "temperature": 0},
        ]  # fmt: skip
        body = http.post("/v1/models/generate:predict", json={"instances": instances}).json()
        texts = [prediction["text"] for prediction in body["predictions"]]
        assert texts[1:] == [RED_CIRCLE, "image 2"]
        assert texts[0]
        assert body["demo_model"] is True

    @pytest.mark.parametrize("instance", [5, {}, {"image": "x"}, {"prompt": "x", "images": ["https://a/1"] * 9}])
    def test_v1_refuses(self, http, instance):
        response = http.post("/v1/models/generate:predict", json={"instances": [instance]})
        assert 400 <= response.status_code < 500
        assert set(response.json()) == {"error", "code", "request_id"}

    def test_v2_puts_all_images_into_one_prompt(self, http, star):
        tensors = [
            {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["Which image holds a star?"]},
            {"name": "image", "datatype": "BYTES", "shape": [2], "data": [data_uri(star), data_uri(red_circle())]},
            {"name": "system", "datatype": "BYTES", "shape": [1], "data": ["Answer briefly."]},
        ]
        body = http.post("/v2/models/generate/infer", json={"inputs": tensors, "parameters": {"temperature": 0}}).json()
        (output,) = body["outputs"]
        assert (output["name"], output["shape"], output["data"]) == ("text", [1], ["image 1"])
        assert body["parameters"]["image_tokens"] > 0

    @pytest.mark.parametrize(
        "tensors",
        [
            [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["x"]}],
            [{"name": "prompt", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}],
            [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]},
             {"name": "pictures", "datatype": "BYTES", "shape": [1], "data": ["a"]}],
        ],
        ids=["no prompt", "two prompts", "an unknown input"],
    )  # fmt: skip
    def test_v2_refuses(self, http, tensors):
        response = http.post("/v2/models/generate/infer", json={"inputs": tensors})
        assert response.status_code in {400, 422}

    def test_openai_with_turns(self, http, star):
        parts = [{"type": "image_url", "image_url": {"url": data_uri(data)}} for data in (red_circle(), star)]
        question = {"type": "text", "text": "Which image holds a star?"}
        body = http.post(
            "/v1/chat/completions",
            json={
                "model": "generate",
                "temperature": 0,
                "messages": [{"role": "user", "content": [*parts, question]}],
            },
        ).json()
        assert body["choices"][0]["message"]["content"] == "image 2"

    def test_the_document_tells_the_routes(self, http):
        paths = http.get("/openapi.json").json()["paths"]
        assert {"/generate/text", "/generate/image", "/generate/image_url", "/health"} <= set(paths)
        form = paths["/generate/image"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert form["required"] == ["prompt", "images"]


@pytest.mark.parametrize("name", sorted(images().keys() - set(REFUSED_IMAGES)))
def test_an_odd_but_honest_image_is_taken_or_refused_as_an_image(http, name):
    response = http.post("/generate/image", data={"prompt": "x", "max_tokens": "1"}, files=upload(images()[name]))
    assert response.status_code == 200 or response.json()["code"].startswith("image_"), response.text
