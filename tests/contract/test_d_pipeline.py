"""Contract D, row by row: caption with enhancement, through the gateway and real models."""

import base64
import json
import random

import pytest

from sightline.client import Client, RequestFailed
from sightline.wire import CREATIVE_SEARCH_PROMPT, SHORT_PROMPT
from tests.conftest import Launcher, Server, free_port
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


class TestPresets:
    @pytest.mark.parametrize("preset", ["alt-text", "product", "tags"])
    def test_reach_the_caption_step(self, http, s3_uri, preset):
        body = http.post("/caption", json={"s3_uri": s3_uri, "preset": preset, "use_gpt_oss": False}).json()
        assert body["caption"].startswith("a large red circle")

    def test_an_unknown_one_is_422(self, http, s3_uri):
        assert http.post("/caption", json={"s3_uri": s3_uri, "preset": "haiku"}).status_code == 422


def events_of(text: str) -> list[tuple[str, dict]]:
    blocks = [block.split("\n") for block in text.strip().split("\n\n")]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]


@pytest.fixture(scope="module")
def by_openai(session_launcher: Launcher, describe: Server, enhance: Server, s3_server) -> Server:
    """A gateway whose two steps it knows by OpenAI's routes only; they happen to be ours."""
    return session_launcher.start(
        "pipeline", "--describe-url", describe.url, "--describe-protocol", "openai",
        "--enhance-url", f"{enhance.url}/v1", "--enhance-protocol", "openai", env=s3_server.environment(),
    ).wait_ready()  # fmt: skip


@pytest.fixture(scope="module")
def locked_enhancer(session_launcher: Launcher) -> Server:
    return session_launcher.start("enhance", "--api-keys", "right", auth="api-key").wait_ready()


class TestOpenAISteps:
    """Any OpenAI-compatible URL as describe or enhance step."""

    @pytest.fixture
    def gateway(self, by_openai: Server):
        with by_openai.client() as client:
            yield client

    @pytest.mark.parametrize("level", ["low", "medium"])
    def test_the_chain_says_the_same(self, http, gateway, s3_uri, level):
        question = {"s3_uri": s3_uri, "reasoning_level": level}
        assert gateway.post("/caption", json=question).json() == http.post("/caption", json=question).json()

    def test_usage_and_reasons_are_mapped(self, gateway, s3_uri):
        caption, enhance = gateway.post("/caption", json={"s3_uri": s3_uri, "explain": True}).json()["steps"]
        assert caption["model"] == "sightline-tiny-qwen2.5-vl"
        assert caption["image_tokens"] > 0
        assert enhance["model"] == "sightline-tiny-gpt-oss"
        assert enhance["reasoning_tokens"] > 0
        assert len(caption["revision"]) == 12
        cut = gateway.post("/caption", json={"s3_uri": s3_uri, "use_gpt_oss": False, "max_tokens": 2}).json()
        assert cut["truncated"] is True

    def test_health_tells_what_is_known(self, gateway):
        body = gateway.get("/health").json()
        assert (body["ok"], body["backend"], body["device"]) == (True, "openai", None)
        assert body["gpt_oss_model"] == "sightline-tiny-gpt-oss"

    def test_out_of_tokens_is_no_final_answer(self, gateway, s3_uri):
        body = gateway.post("/caption", json={"s3_uri": s3_uri, "max_tokens": 3}).json()
        assert body["enhancement_error"]["code"] == "no_final_answer"

    def test_the_enhancement_is_streamed_as_it_is_made(self, gateway, s3_uri):
        whole = gateway.post("/caption", json={"s3_uri": s3_uri, "reasoning_level": "high"}).json()
        response = gateway.post(
            "/caption", json={"s3_uri": s3_uri, "reasoning_level": "high"}, headers={"Accept": "text/event-stream"}
        )
        (first, caption), *pieces, (last, answer) = events_of(response.text)
        assert (first, caption) == ("caption", {"caption": RED_CIRCLE})
        assert {name for name, _ in pieces} == {"enhancement.delta"}
        assert len(pieces) > 3
        assert "".join(data["delta"] for _, data in pieces) == whole["caption"]
        assert (last, answer) == ("done", whole)

    def gateway_for(self, launcher: Launcher, describe: Server, s3_server, *enhancer: str) -> Server:
        return launcher.start(
            "pipeline", "--describe-url", describe.url, "--enhance-protocol", "openai", *enhancer,
            env=s3_server.environment(),
        ).wait_ready()  # fmt: skip

    @pytest.mark.parametrize(
        ("flags", "code", "told"),
        [
            (("--enhance-model", "gpt-5"), "enhancer_failed", "does not know this gateway's model name"),
            (("--enhance-api-key", "wrong"), "enhancer_failed", "refuses this gateway's key"),
            (("--enhance-api-key", "right"), None, None),
        ],
        ids=["a model that it has not", "a wrong key", "the right key"],
    )
    def test_a_wrong_enhancer_costs_the_enhancement_and_is_told_in_the_log(
        self, launcher: Launcher, describe, locked_enhancer, s3_server, s3_uri, flags, code, told
    ):
        given = {"--enhance-url": locked_enhancer.url, "--enhance-api-key": "right"} | dict([flags])
        gateway = self.gateway_for(launcher, describe, s3_server, *[word for pair in given.items() for word in pair])
        with gateway.client() as client:
            body = client.post("/caption", json={"s3_uri": s3_uri}).json()
        assert body.get("enhancement_error", {}).get("code") == code
        assert body["enhanced"] is (code is None)
        assert told is None or told in gateway.log()

    def test_nobody_listens(self, launcher: Launcher, describe, s3_server, s3_uri):
        gateway = self.gateway_for(launcher, describe, s3_server, "--enhance-url", f"http://127.0.0.1:{free_port()}")
        with gateway.client() as client:
            body = client.post("/caption", json={"s3_uri": s3_uri}).json()
        assert body["caption"] == RED_CIRCLE
        assert body["enhancement_error"]["code"] == "enhancer_unavailable"


def test_events_come_from_v2_steps_too(http, s3_uri):
    response = http.post("/caption", json={"s3_uri": s3_uri}, headers={"Accept": "text/event-stream"})
    assert response.headers["content-type"].startswith("text/event-stream")
    (first, caption), (last, answer) = events_of(response.text)
    assert (first, caption) == ("caption", {"caption": RED_CIRCLE})
    assert last == "done"
    assert answer == http.post("/caption", json={"s3_uri": s3_uri}).json()


def test_the_breakers_are_a_metric(http, s3_uri):
    http.post("/caption", json={"s3_uri": s3_uri})
    lines = http.get("/metrics").text.splitlines()
    for step in ("caption", "enhance"):
        assert f'sightline_breaker_state{{model_name="pipeline",step="{step}"}} 0.0' in lines


def test_trace_context_reaches_the_steps(http, describe: Server, s3_uri):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "tracestate": "vendor=value"}
    assert http.post("/caption", json={"s3_uri": s3_uri}, headers=headers).status_code == 200
    assert f"trace_id={trace}" in describe.log()


def test_the_python_client_watches_it(pipeline: Server):
    with Client(pipeline.url) as client:
        events = dict(client.watch(red_circle(), preset="alt-text"))
        assert events["caption"] == {"caption": RED_CIRCLE}
        assert events["done"]["original_caption"] == RED_CIRCLE
        with pytest.raises(RequestFailed) as raised:
            list(client.watch(b"no image"))
        assert (raised.value.status, raised.value.code) == (400, "image_undecodable")
