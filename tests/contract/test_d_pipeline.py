"""Contract D, row by row: caption with enhancement, through the gateway and real models."""

import base64
import random

import pytest

from sightline.wire import CREATIVE_SEARCH_PROMPT, SHORT_PROMPT
from tests.conftest import Launcher, Server
from tests.scenes import RED_CIRCLE, encoded, random_scene, red_circle

DEMO = {"demo_model", "model"}


@pytest.fixture
def http(pipeline: Server):
    with pipeline.client() as client:
        yield client


@pytest.fixture(scope="module")
def s3_uri(s3_server) -> str:
    return s3_server.put("scenes", "deep folder/red circle+1.png", red_circle())


class TestD1Caption:
    def test_without_enhancement_has_exactly_its_keys(self, http, s3_uri):
        response = http.post("/caption", json={"s3_uri": s3_uri, "use_gpt_oss": False})
        body = response.json()
        assert response.status_code == 200
        assert set(body) - DEMO == {"caption", "enhanced", "s3_uri"}
        assert body["caption"] == RED_CIRCLE
        assert body["enhanced"] is False
        assert body["s3_uri"] == s3_uri

    def test_with_enhancement_has_exactly_its_keys(self, http, s3_uri):
        body = http.post("/caption", json={"s3_uri": s3_uri, "use_gpt_oss": True}).json()
        assert set(body) - DEMO == {"caption", "original_caption", "enhanced", "s3_uri"}
        assert body["original_caption"] == RED_CIRCLE
        assert body["enhanced"] is True
        assert all(word in body["caption"] for word in ("large", "red", "circle", "white", "background"))

    def test_says_that_the_models_are_demonstrations(self, http, s3_uri):
        for use in (True, False):
            body = http.post("/caption", json={"s3_uri": s3_uri, "use_gpt_oss": use}).json()
            assert body["demo_model"] is True
            assert body["model"] == "sightline-tiny-qwen2.5-vl"


class TestD2Detailed:
    @pytest.mark.parametrize("detailed", [True, False])
    def test_both_work(self, http, s3_uri, detailed):
        body = http.post("/caption", json={"s3_uri": s3_uri, "detailed": detailed, "use_gpt_oss": False}).json()
        assert body["caption"] == RED_CIRCLE

    def test_the_prompts_differ(self):
        assert "30 to 50 words" in CREATIVE_SEARCH_PROMPT
        assert "short" in SHORT_PROMPT

    @pytest.mark.parametrize("detailed", ["often", 3, []])
    def test_must_be_a_boolean(self, http, s3_uri, detailed):
        assert http.post("/caption", json={"s3_uri": s3_uri, "detailed": detailed}).status_code == 422


class TestD3UseGptOss:
    def test_absent_means_the_setting(self, http, s3_uri):
        assert http.post("/caption", json={"s3_uri": s3_uri}).json()["enhanced"] is True

    def test_setting_off_means_off_until_forced(self, launcher: Launcher, describe, enhance, s3_server, s3_uri):
        gateway = launcher.start(
            "pipeline", "--describe-url", describe.url, "--enhance-url", enhance.url,
            env=s3_server.environment() | {"USE_GPT_OSS": "false"},
        ).wait_ready()  # fmt: skip
        with gateway.client() as client:
            assert client.post("/caption", json={"s3_uri": s3_uri}).json()["enhanced"] is False
            assert client.post("/caption", json={"s3_uri": s3_uri, "use_gpt_oss": True}).json()["enhanced"] is True

    def test_true_without_an_enhancer_tells_the_reason(self, launcher: Launcher, describe, s3_server, s3_uri):
        gateway = launcher.start("pipeline", "--describe-url", describe.url, env=s3_server.environment()).wait_ready()
        with gateway.client() as client:
            response = client.post("/caption", json={"s3_uri": s3_uri, "use_gpt_oss": True})
            assert response.status_code == 200
            body = response.json()
            assert body["enhanced"] is False
            assert body["caption"] == RED_CIRCLE
            assert body["enhancement_error"]["code"] == "enhancer_not_configured"
            strict = client.post("/caption", json={"s3_uri": s3_uri, "use_gpt_oss": True, "strict": True})
            assert strict.status_code == 503
            assert strict.json()["code"] == "enhancer_not_configured"


def test_d4_health_has_its_keys_and_true_values(http):
    body = http.get("/health").json()
    assert body == {
        "ok": True,
        "backend": "hf",
        "device": body["device"],
        "gpt_oss_enabled": True,
        "gpt_oss_model": "sightline-tiny-gpt-oss",
        "gpt_oss_reasoning_level": "low",
    }
    assert body["device"].startswith(("cpu", "cuda"))


class TestD5Levels:
    @pytest.mark.parametrize(("level", "sentences"), [("low", 1), ("medium", 2)])
    def test_is_the_models_effort_per_request(self, http, s3_uri, level, sentences):
        body = http.post("/caption", json={"s3_uri": s3_uri, "reasoning_level": level}).json()
        assert body["caption"].count(".") == sentences

    def test_high_says_most(self, http, s3_uri):
        body = http.post("/caption", json={"s3_uri": s3_uri, "reasoning_level": "high"}).json()
        assert body["caption"].count(".") >= 3

    def test_an_unknown_level_is_422(self, http, s3_uri):
        assert http.post("/caption", json={"s3_uri": s3_uri, "reasoning_level": "extreme"}).status_code == 422

    @pytest.mark.parametrize("name", ["pipeline", "enhance"])
    def test_an_unknown_level_refuses_to_start(self, launcher: Launcher, name):
        server = launcher.start(name, env={"GPT_OSS_REASONING_LEVEL": "extreme"})
        assert server.process.wait(60) != 0
        assert "reasoning_level" in server.log()


class TestD6S3:
    @pytest.mark.parametrize("uri", ["http://bucket/key", "bucket/key", "S4://b/k", ""])
    def test_another_scheme_is_400_with_the_known_text(self, http, uri):
        response = http.post("/caption", json={"s3_uri": uri})
        assert response.status_code == 400
        assert response.json()["detail"] == "s3_uri must start with s3://"

    @pytest.mark.parametrize("uri", ["s3://scenes/absent.png", "s3://no-such-bucket-here/x.png"])
    def test_an_absent_object_is_400_with_the_known_prefix(self, http, s3_uri, uri):
        response = http.post("/caption", json={"s3_uri": uri})
        assert response.status_code == 400
        assert response.json()["detail"].startswith("Failed to fetch/decode image: ")
        assert response.json()["code"] == "s3_not_found"

    def test_undecodable_is_told_apart(self, http, s3_server):
        uri = s3_server.put("scenes", "text.png", b"no image at all")
        response = http.post("/caption", json={"s3_uri": uri})
        assert response.status_code == 400
        assert response.json()["detail"].startswith("Failed to fetch/decode image: ")
        assert response.json()["code"] == "image_undecodable"

    def test_truncated_is_told_apart(self, http, s3_server):
        uri = s3_server.put("scenes", "cut.png", red_circle()[:-400])
        response = http.post("/caption", json={"s3_uri": uri})
        assert response.status_code == 400
        assert response.json()["detail"].startswith("Failed to fetch/decode image: ")
        assert response.json()["code"] == "image_truncated"

    def test_wrong_credentials_are_told_apart(self, launcher: Launcher, describe, s3_server, s3_uri):
        if not s3_server.is_real:
            pytest.skip("moto does not check keys")
        env = s3_server.environment() | {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}
        gateway = launcher.start("pipeline", "--describe-url", describe.url, env=env).wait_ready()
        with gateway.client() as client:
            response = client.post("/caption", json={"s3_uri": s3_uri})
        assert response.status_code == 400
        assert response.json()["code"] == "s3_access_denied"

    def test_a_bucket_outside_the_list_is_refused(self, launcher: Launcher, describe, s3_server, s3_uri):
        gateway = launcher.start(
            "pipeline", "--describe-url", describe.url, "--s3-buckets", "other-*", env=s3_server.environment()
        ).wait_ready()
        with gateway.client() as client:
            response = client.post("/caption", json={"s3_uri": s3_uri})
        assert response.status_code == 400
        assert response.json()["code"] == "s3_bucket_not_allowed"


def test_d8_captions_are_bare(http, s3_uri):
    caption = http.post("/caption", json={"s3_uri": s3_uri, "use_gpt_oss": False}).json()["caption"]
    assert not caption.startswith(('"', "assistant", "Caption"))
    assert len(caption.split()) <= 50


class TestD9Enhancer:
    @pytest.mark.parametrize("level", ["low", "medium", "high"])
    def test_reasoning_never_leaks(self, http, level):
        rng = random.Random(99)
        for _ in range(3):
            image, caption = random_scene(rng, diagonal_margin=0.05)
            answer = http.post(
                "/caption", files={"image": ("s.png", encoded(image))}, data={"reasoning_level": level}
            ).json()
            assert answer["original_caption"] == caption
            for leak in ("<|", "analysis", "channel", "assistant", "final"):
                assert leak not in answer["caption"]

    def test_explain_tells_terms_and_steps(self, http, s3_uri):
        body = http.post("/caption", json={"s3_uri": s3_uri, "explain": True}).json()
        assert isinstance(body["added_terms"], list)
        caption, enhance = body["steps"]
        assert caption["name"] == "caption"
        assert enhance["name"] == "enhance"
        keys = {
            "name", "model", "revision", "milliseconds",
            "prompt_tokens", "completion_tokens", "image_tokens", "reasoning_tokens",
        }  # fmt: skip
        assert set(caption) == set(enhance) == keys
        assert caption["image_tokens"] > 0
        assert caption["model"] == "sightline-tiny-qwen2.5-vl"
        assert enhance["model"] == "sightline-tiny-gpt-oss"
        assert enhance["reasoning_tokens"] > 0
        assert caption["milliseconds"] > 0


def test_d10_s3_uri_alone_keeps_working(http, s3_uri):
    response = http.post("/caption", json={"s3_uri": s3_uri})
    assert response.status_code == 200
    assert response.json()["original_caption"] == RED_CIRCLE


def test_d11_the_two_models_are_two_processes(chain_servers):
    assert len({server.process.pid for server in chain_servers.values()}) == 3


class TestOtherImageArguments:
    def test_multipart(self, http):
        body = http.post("/caption", files={"image": ("my scene.png", red_circle(), "image/png")}).json()
        assert body["filename"] == "my scene.png"
        assert body["processing_time"] > 0
        assert body["original_caption"] == RED_CIRCLE

    def test_base64_and_data_uri(self, http):
        text = base64.b64encode(red_circle()).decode()
        for image in (text, f"data:image/png;base64,{text}"):
            body = http.post("/caption", json={"image": image, "use_gpt_oss": False}).json()
            assert body["caption"] == RED_CIRCLE
            assert "s3_uri" not in body

    def test_raw_body(self, http):
        response = http.post("/caption", content=red_circle(), headers={"Content-Type": "image/png"})
        assert response.json()["original_caption"] == RED_CIRCLE

    @pytest.mark.parametrize("body", [{}, {"detailed": True}, {"s3_uri": None}, {"s3_uri": 5}])
    def test_nothing_is_422(self, http, body):
        response = http.post("/caption", json=body)
        assert response.status_code == 422
        assert set(response.json()) == {"detail", "code", "request_id"}

    def test_v1(self, http):
        text = base64.b64encode(red_circle()).decode()
        body = http.post("/v1/models/pipeline:predict", json={"instances": [{"image": text}]}).json()
        (prediction,) = body["predictions"]
        assert prediction["original_caption"] == RED_CIRCLE
        assert prediction["enhanced"] is True
        assert body["demo_model"] is True
