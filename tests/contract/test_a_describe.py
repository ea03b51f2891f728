"""Contract A, row by row: the describe service's own routes."""

import base64
import io
import json
import random
import signal
import uuid

import httpx
import pytest
from PIL import Image

from sightline.wire import DEFAULT_PROMPT, PRESETS
from tests.conftest import START_SECONDS, Launcher, Server, free_port
from tests.scenes import BACKGROUNDS, RED_CIRCLE, Thing, draw, encoded, red_circle

pytestmark = pytest.mark.usefixtures("chain_servers")

MESSAGE = "Image description generated successfully."


@pytest.fixture
def http(describe: Server):
    with describe.client() as client:
        yield client


@pytest.fixture(scope="module")
def image_url() -> str:
    return "data:image/png;base64," + base64.b64encode(red_circle()).decode()


def wait_finished(http: httpx.Client, run_id: str) -> dict:
    for _ in range(3000):
        answer = http.get(f"/api/v1/status/{run_id}").json()
        if answer["status"] not in {"IN_QUEUE", "IN_PROGRESS"}:
            return answer
    raise AssertionError(answer)


class TestA1Run:
    def test_is_synchronous_and_completed_by_default(self, http, image_url):
        response = http.post("/api/v1/run", json={"image_url": image_url, "prompt": "What is this?"})
        assert response.status_code == 200
        body = response.json()
        assert str(uuid.UUID(body["id"])) == body["id"]
        assert body["status"] == "COMPLETED"
        assert body["output"] == {"status": "COMPLETED", "message": MESSAGE, "data": RED_CIRCLE}

    def test_says_that_the_model_is_a_demonstration(self, http, image_url):
        body = http.post("/api/v1/run", json={"image_url": image_url}).json()
        assert body["demo_model"] is True
        assert body["model"] == "sightline-tiny-qwen2.5-vl"

    @pytest.mark.parametrize(
        ("query", "headers"),
        [("?wait=0", {}), ("", {"Prefer": "respond-async"})],
        ids=["wait=0", "Prefer: respond-async"],
    )
    def test_answers_at_once_when_asked_to(self, http, image_url, query, headers):
        body = http.post(f"/api/v1/run{query}", json={"image_url": image_url}, headers=headers).json()
        assert body["status"] == "IN_PROGRESS"
        assert body["output"] is None
        assert wait_finished(http, body["id"])["output"]["data"] == RED_CIRCLE

    def test_prefer_with_a_wait_is_synchronous(self, http, image_url):
        body = http.post("/api/v1/run", json={"image_url": image_url}, headers={"Prefer": "wait=30"}).json()
        assert body["status"] == "COMPLETED"

    @pytest.mark.parametrize("wait", ["-1", "301", "soon", "1.5", ""])
    def test_refuses_an_unreasonable_wait(self, http, image_url, wait):
        response = http.post(f"/api/v1/run?wait={wait}", json={"image_url": image_url})
        assert response.status_code == 422
        assert response.json()["code"] == "invalid_parameter"


class TestA2Status:
    def test_has_the_shape_of_the_answer(self, http, image_url):
        answer = http.post("/api/v1/run", json={"image_url": image_url}).json()
        assert http.get(f"/api/v1/status/{answer['id']}").json() == answer

    @pytest.mark.parametrize("run_id", ["nope", str(uuid.uuid4()), "..%2f..", "a" * 300])
    def test_is_404_for_an_unknown_id(self, http, run_id):
        response = http.get(f"/api/v1/status/{run_id}")
        assert response.status_code == 404
        assert set(response.json()) == {"detail", "code", "request_id"}

    def test_survives_a_restart_and_is_known_to_other_replicas(self, launcher: Launcher, tmp_path, image_url):
        store = ("--job-store", f"file://{tmp_path}/runs")
        first = launcher.start("describe", *store).wait_ready()
        with first.client() as client:
            answer = client.post("/api/v1/run", json={"image_url": image_url}).json()
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
        second = launcher.start("describe", *store).wait_ready()
        with second.client() as client:
            assert client.get(f"/api/v1/status/{answer['id']}").json() == answer


class TestA3Envelope:
    def test_is_accepted(self, http, image_url):
        body = http.post("/api/v1/run", json={"input": {"image_url": image_url, "prompt": "Hi"}}).json()
        assert body["output"]["data"] == RED_CIRCLE

    @pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "bare"])
    def test_warmup_needs_no_image(self, http, wrapped):
        body = {"action": "warmup"}
        response = http.post("/api/v1/run", json={"input": body} if wrapped else body)
        assert response.status_code == 200
        assert response.json()["status"] == "COMPLETED"

    @pytest.mark.parametrize("action", ["delete", "", 5])
    def test_another_action_is_400(self, http, image_url, action):
        response = http.post("/api/v1/run", json={"action": action, "image_url": image_url})
        assert response.status_code == 400
        assert response.json()["code"] == "unknown_action"


class TestA4Prompt:
    @pytest.mark.parametrize("prompt", [None, "", "   "], ids=["null", "empty", "blank"])
    def test_nothing_means_the_default(self, http, image_url, prompt):
        default = http.post("/api/v1/run", json={"image_url": image_url, "prompt": DEFAULT_PROMPT}).json()
        answer = http.post("/api/v1/run", json={"image_url": image_url, "prompt": prompt}).json()
        assert answer["output"] == default["output"]

    def test_default_is_as_documented(self):
        assert DEFAULT_PROMPT == "Describe this image in detail"

    def test_longer_than_the_limit_is_422(self, http, image_url):
        response = http.post("/api/v1/run", json={"image_url": image_url, "prompt": "x" * 8193})
        assert response.status_code == 422


class TestA5Missing:
    @pytest.mark.parametrize(
        "body",
        [
            {},
            {"prompt": "x"},
            {"image_url": None},
            {"image_url": ""},
            {"input": {}},
            {"image_url": 5},
            {"image_url": []},
        ],
        ids=json.dumps,
    )
    def test_image_url_is_422(self, http, body):
        response = http.post("/api/v1/run", json=body)
        assert response.status_code == 422
        assert set(response.json()) == {"detail", "code", "request_id"}

    @pytest.mark.parametrize("body", [b"", b"{", b"nonsense", b"\xff\xfe"])
    def test_no_json_is_400(self, http, body):
        response = http.post("/api/v1/run", content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400
        assert response.json()["code"] == "invalid_json"


class TestA6FailedImage:
    NOT_AN_IMAGE = "data:image/png;base64," + base64.b64encode(b"not an image at all").decode()

    def test_is_a_4xx_with_a_failed_run_behind_it(self, http):
        response = http.post("/api/v1/run", json={"image_url": self.NOT_AN_IMAGE})
        body = response.json()
        assert response.status_code == 400
        assert body["status"] == "FAILED"
        assert body["output"] is None
        assert body["code"] == "image_undecodable"
        assert http.get(f"/api/v1/status/{body['id']}").json()["status"] == "FAILED"

    def test_is_a_failed_run_with_a_reason_when_asynchronous(self, http):
        started = http.post("/api/v1/run?wait=0", json={"image_url": self.NOT_AN_IMAGE}).json()
        ended = wait_finished(http, started["id"])
        assert ended["status"] == "FAILED"
        assert ended["code"] == "image_undecodable"
        assert ended["detail"]

    @pytest.mark.parametrize("url", ["https://example.com/a.png", "http://169.254.169.254/", "s3://b", "ftp://x/y"])
    def test_refused_sources_are_400(self, http, url):
        response = http.post("/api/v1/run", json={"image_url": url})
        assert response.status_code == 400
        assert response.json()["code"]


class TestA7Image:
    def test_wide_images_are_resized_to_512(self, http):
        wide = encoded(Image.open(io.BytesIO(red_circle(2000))))
        body = http.post("/api/v1/run", files={"image": ("a.png", wide, "image/png")}).json()
        assert body["output"]["data"] == RED_CIRCLE

    def test_exif_orientation_is_applied(self, http):
        things = [
            Thing("large", "blue", "square", 60, 64, 26),
            Thing("large", "red", "circle", 180, 64, 26),
        ]
        upright = draw(things, BACKGROUNDS["white"], 240, 128, random.Random(1))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90° clockwise
        turned = encoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)
        body = http.post("/api/v1/run", files={"image": ("a.jpg", turned)}).json()
        assert body["output"]["data"] == ("a large blue square to the left of a large red circle on a white background")

    def test_alpha_is_over_white(self, http):
        image = Image.open(io.BytesIO(red_circle())).convert("RGBA")
        pixels = image.load()
        for x in range(image.width):
            for y in range(image.height):
                if min(pixels[x, y][:3]) > 200:
                    pixels[x, y] = (0, 0, 0, 0)
        body = http.post("/api/v1/run", files={"image": ("a.png", encoded(image))}).json()
        assert body["output"]["data"] == RED_CIRCLE


class TestA8Decoding:
    def test_max_tokens_cuts(self, http, image_url):
        body = http.post("/api/v1/run", json={"image_url": image_url, "max_tokens": 2}).json()
        assert RED_CIRCLE.startswith(body["output"]["data"])
        assert body["output"]["data"] != RED_CIRCLE

    def test_a_seed_repeats(self, http, image_url):
        options = {"image_url": image_url, "temperature": 2, "top_p": 1, "seed": 5}
        first, second = (http.post("/api/v1/run", json=options).json()["output"] for _ in range(2))
        assert first == second

    def test_text_is_stripped_and_holds_no_control_tokens(self, http, image_url):
        text = http.post("/api/v1/run", json={"image_url": image_url}).json()["output"]["data"]
        assert text == text.strip()
        assert "<|" not in text

    @pytest.mark.parametrize(
        "option",
        [
            {"max_tokens": 0}, {"max_tokens": -1}, {"max_tokens": 5000}, {"max_tokens": "ten"}, {"max_tokens": 1.5},
            {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": True}, {"top_p": 0}, {"top_p": 1.1},
            {"seed": -1}, {"max_width": 1}, {"preset": "haiku"},
        ],
        ids=json.dumps,
    )  # fmt: skip
    def test_out_of_range_is_422(self, http, image_url, option):
        response = http.post("/api/v1/run", json={"image_url": image_url} | option)
        assert response.status_code == 422
        assert response.json()["code"] == "invalid_parameter"


class TestPresets:
    """Prompts by name, on every route."""

    @pytest.mark.parametrize("preset", PRESETS)
    def test_native(self, http, image_url, preset):
        by_name = http.post("/api/v1/run", json={"image_url": image_url, "preset": preset}).json()["output"]
        in_words = http.post("/api/v1/run", json={"image_url": image_url, "prompt": PRESETS[preset]}).json()["output"]
        assert by_name["data"] == in_words["data"]
        assert by_name.get("tags") == (["a large red circle on a white background"] if preset == "tags" else None)

    def test_own_words_win(self, http, image_url):
        body = http.post("/api/v1/run", json={"image_url": image_url, "preset": "tags", "prompt": "What is this?"})
        assert "tags" not in body.json()["output"]

    def test_v1_v2_and_openai(self, http, image_url):
        v1 = http.post(
            "/v1/models/describe:predict", json={"instances": [{"image_url": image_url, "preset": "alt-text"}]}
        ).json()["predictions"][0]
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [image_url]}
        v2 = http.post(
            "/v2/models/describe/infer", json={"inputs": [tensor], "parameters": {"preset": "alt-text"}}
        ).json()
        part = {"type": "image_url", "image_url": {"url": image_url}}
        chat = http.post(
            "/v1/chat/completions",
            json={"model": "describe", "preset": "alt-text", "messages": [{"role": "user", "content": [part]}]},
        ).json()
        tokens = {v1["usage"]["prompt_tokens"], v2["parameters"]["prompt_tokens"], chat["usage"]["prompt_tokens"]}
        assert len(tokens) == 1, "the same prompt, whichever route it came by"
        assert v1["text"] == v2["outputs"][0]["data"][0] == chat["choices"][0]["message"]["content"]

    @pytest.mark.parametrize("preset", ["haiku", 5, ["tags"]])
    def test_an_unknown_one_is_422(self, http, image_url, preset):
        assert http.post("/api/v1/run", json={"image_url": image_url, "preset": preset}).status_code == 422


class TestSeveralImages:
    """One description of up to eight images together."""

    def test_by_reference_and_upload(self, http, image_url):
        one = http.post("/v1/models/describe:predict", json={"instances": [image_url]}).json()
        tokens = one["predictions"][0]["usage"]["image_tokens"]
        both = http.post("/v1/models/describe:predict", json={"instances": [{"images": [image_url] * 2}]}).json()
        assert both["predictions"][0]["usage"]["image_tokens"] == 2 * tokens

        for request in (
            {"json": {"image_urls": [image_url, image_url]}},
            {"json": {"image_url": image_url, "image_urls": [image_url]}},
            {"files": [("images", ("a.png", red_circle())), ("images", ("b.png", red_circle()))]},
        ):
            body = http.post("/api/v1/run", **request).json()
            assert body["status"] == "COMPLETED"
            assert body["output"]["data"]

    def test_a_run_with_uploads_and_urls_is_restored_in_order(self, http, image_url):
        started = http.post(
            "/api/v1/run?wait=0",
            data={"image_urls": [image_url]},
            files=[("images", ("a.png", red_circle())), ("images", ("b.png", red_circle(64)))],
        ).json()
        assert wait_finished(http, started["id"])["status"] == "COMPLETED"

    def test_nine_are_422(self, http, image_url):
        response = http.post("/api/v1/run", json={"image_urls": [image_url] * 9})
        assert (response.status_code, response.json()["code"]) == (422, "too_many_images")

    def test_a_bad_one_among_them_fails_the_run(self, http, image_url):
        response = http.post("/api/v1/run", json={"image_urls": [image_url, TestA6FailedImage.NOT_AN_IMAGE]})
        assert (response.status_code, response.json()["code"]) == (400, "image_undecodable")


class TestImageReferences:
    """https, data URI and s3:// wherever an image is named; `s3_uri` for S3 alone."""

    @pytest.mark.parametrize("name", ["image_url", "image", "s3_uri"])
    def test_s3(self, http, s3_server, name):
        uri = s3_server.put("describe", "circle.png", red_circle())
        assert http.post("/api/v1/run", json={name: uri}).json()["output"]["data"] == RED_CIRCLE

    @pytest.mark.parametrize("value", ["https://example.com/a.png", "data:image/png;base64,aGk=", "bucket/key"])
    def test_s3_uri_takes_nothing_else(self, http, value):
        for response in (
            http.post("/api/v1/run", json={"s3_uri": value}),
            http.post("/v1/models/describe:predict", json={"instances": [{"s3_uri": value}]}),
        ):
            assert (response.status_code, response.json()["code"]) == (400, "s3_uri_invalid")


@pytest.fixture(scope="module")
def front(session_launcher: Launcher, describe: Server):
    server = session_launcher.start(
        "describe", "--model-name", "front", "--engine", "remote", "--remote-url", describe.url,
        "--remote-model", "describe", "--job-store", "memory://",
    )  # fmt: skip
    server.name = "front"
    with server.wait_ready().client() as client:
        yield client


class TestRemoteEngine:
    """`--engine remote`: the same routes in front of a model behind an OpenAI-compatible URL; here, one of ours."""

    def test_contract_a_in_front_of_it(self, front, image_url):
        body = front.post("/api/v1/run", json={"image_url": image_url}).json()
        assert body["output"] == {"status": "COMPLETED", "message": MESSAGE, "data": RED_CIRCLE}
        assert body["demo_model"] is True
        assert body["model"] == "sightline-tiny-qwen2.5-vl"

    def test_every_other_protocol_too(self, front, image_url):
        v1 = front.post("/v1/models/front:predict", json={"instances": [image_url]}).json()
        assert v1["predictions"][0]["text"] == RED_CIRCLE
        assert v1["predictions"][0]["usage"]["image_tokens"] > 0
        part = {"type": "image_url", "image_url": {"url": image_url}}
        question = {"model": "front", "messages": [{"role": "user", "content": [part]}], "stream": True}
        told = front.post("/v1/chat/completions", json=question).text
        chunks = [json.loads(line.removeprefix("data: ")) for line in told.splitlines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == RED_CIRCLE

    def test_policy_and_limits_hold_in_front_of_it(self, front):
        response = front.post("/api/v1/run", json={"image_url": "https://example.com/a.png"})
        assert (response.status_code, response.json()["code"]) == (400, "url_not_allowed")
        response = front.post("/api/v1/run", json={"image_url": TestA6FailedImage.NOT_AN_IMAGE})
        assert (response.status_code, response.json()["code"]) == (400, "image_undecodable")

    def test_without_an_address_it_refuses_to_start(self, launcher: Launcher):
        server = launcher.start("describe", "--engine", "remote")
        assert server.process.wait(START_SECONDS) == 2
        assert "remote_url" in server.log()


def test_a9_runs_on_the_cpu_when_there_is_no_gpu(http):
    device = http.get("/v2/models/describe").json()["parameters"]["device"]
    assert device.startswith(("cpu", "cuda"))


class TestA10Environment:
    def test_names_of_the_older_service_are_understood(self, launcher: Launcher, tmp_path):
        import sightline

        model = f"{sightline.__path__[0]}/tiny/describe"
        port = free_port()
        (tmp_path / ".env").write_text("PROMPT=Describe this image in one short sentence.\n")
        server = launcher.start(
            "describe",
            "--port", str(port),
            env={"QWEN_MODEL_NAME": model, "QWEN_MAX_MEMORY_CPU": "4GiB", "HUGGINGFACE_CACHE_DIR": str(tmp_path)},
            port=port,
        ).wait_ready()  # fmt: skip
        assert "Describe this image in one short sentence." in server.log()

    def test_port_comes_from_the_environment(self, tmp_path):
        from sightline.settings import DescribeSettings, load

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PORT", "9123")
            assert load(DescribeSettings, ["--auth", "off"]).port == 9123


def test_a11_uploads_reach_the_same_route(http):
    body = http.post(
        "/api/v1/run", files={"image": ("scene.png", red_circle())}, data={"prompt": "x", "max_tokens": "50"}
    )
    assert body.json()["output"]["data"] == RED_CIRCLE


def test_health_is_open_and_light(http):
    assert http.get("/health").json() == {"status": "healthy"}
