"""The variables that are rendered are settings of the servers: every one is known there, and arrives as it was meant.

Nothing of a VisionPipeline may end in a variable that nobody reads.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from sightline.configuration import configure
from sightline.settings import DescribeSettings, EnhanceSettings, PipelineSettings, ServerSettings
from sightline_operator.render import RenderSettings, render_pipeline
from tests.operator.objects import pipeline
from tests.operator.rendering import cases, owned
from tests.operator.specs import PIPELINES

CASES = cases()
KINDS: Mapping[str, type[ServerSettings]] = {
    "caption": DescribeSettings,
    "enhance": EnhanceSettings,
    "gateway": PipelineSettings,
}
PREDICTORS = {"caption": "describe", "enhance": "enhance", "gateway": "pipeline"}
OTHERS = {"PROTOCOL", "STORAGE_URI", "OMP_WAIT_POLICY", "HF_HUB_OFFLINE"}
"""KServe's, OpenMP's, the hub's."""
SECRETS = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
"""The AWS library's own."""


def variables(children: tuple[dict[str, Any], ...]) -> dict[str, dict[str, str]]:
    """Of our containers, by component. Secrets are worth `secret`."""
    found: dict[str, dict[str, str]] = {}
    data = next(c["data"] for c in children if c["kind"] == "ConfigMap")
    for child in children:
        component = child["metadata"]["labels"]["app.kubernetes.io/component"]
        if child["kind"] == "Deployment":
            env = child["spec"]["template"]["spec"]["containers"][0].get("env", [])
            found[component] = dict(data)
        elif child["kind"] == "InferenceService" and "containers" in child["spec"]["predictor"]:
            env = child["spec"]["predictor"]["containers"][0]["env"]
            found[component] = {}
        else:
            continue
        found[component] |= {item["name"]: item.get("value", "secret") for item in env}
    return found


def loaded(monkeypatch: pytest.MonkeyPatch, component: str, said: Mapping[str, str]) -> Any:
    """As `sightline serve` reads them in the container, and nothing else beside."""
    with monkeypatch.context() as only:
        for name in [field.upper() for cls in KINDS.values() for field in cls.model_fields]:
            only.delenv(name, raising=False)
        for name, value in said.items():
            only.setenv(name, value)
        predictor = PREDICTORS[component]
        return configure({predictor: KINDS[component]}, [])[predictor].settings


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("batch", "sample-batch"))])
def test_every_variable_is_a_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for component, said in variables(CASES[name].rendered()).items():
        fields = KINDS[component].model_fields
        unknown = {v for v in said if v.lower() not in fields} - OTHERS - SECRETS
        assert not unknown, f"{component} does not know {unknown}"
        loaded(monkeypatch, component, said)


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(cr=PIPELINES)
def test_whatever_a_spec_says_the_servers_start_with_it(cr: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for component, said in variables(render_pipeline(owned(cr), RenderSettings())).items():
        loaded(monkeypatch, component, said)


def test_the_gateway_does_what_the_spec_says(monkeypatch: pytest.MonkeyPatch) -> None:
    told: PipelineSettings = loaded(monkeypatch, "gateway", variables(CASES["everything"].rendered())["gateway"])
    assert told.caption_prompt == "What is it?"
    assert (told.caption_tokens, told.caption_temperature, told.caption_top_p, told.caption_seed) == (200, 0.5, 0.9, 7)
    assert (told.caption_timeout_seconds, told.caption_attempts, told.caption_attempt_seconds) == (45.5, 3, 20)
    assert (told.caption_breaker_failures, told.caption_breaker_open_seconds) == (4, 10)
    assert (told.enhance_breaker_error_percent, told.enhance_breaker_min_requests) == (30, 10)
    assert (told.enhance_protocol, told.enhance_url) == ("openai", "https://llm.example.com:8443/v1")
    assert told.enhance_api_key is not None
    assert str(told.enhance_ca_file) == "/etc/sightline/authorities/enhance/ca.crt"
    assert (told.enhance_by_default, told.strict_by_default, told.enhance_min_seconds) == (False, True, 5)
    assert told.enhance_max_in_flight == 8
    assert (told.deadline_seconds, told.default_deadline_seconds) == (180, 60)
    assert (told.max_image_bytes, told.log_level, told.grpc_port) == (1_000_000, "debug", 8081)
    assert (told.s3_buckets, told.s3_endpoint_url, told.s3_path_style) == (
        ("images",),
        "http://minio.storage.svc:9000",
        True,
    )
    assert str(told.api_key_file) == "/etc/sightline/keys/api-keys"
    assert told.pipeline_revision is not None


def test_the_defaults_of_the_spec_are_those_of_a_gateway_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A breaker that is not said is five failures, ten seconds; a caption is greedy; enhancing is the default."""
    told: PipelineSettings = loaded(monkeypatch, "gateway", variables(CASES["minimal"].rendered())["gateway"])
    assert (told.caption_breaker_failures, told.caption_breaker_open_seconds) == (5, 10)
    assert (told.caption_temperature, told.caption_prompt, told.enhance_by_default) == (0, None, True)
    assert (told.auth, told.s3_buckets) == ("off", ())


def test_models_load_what_the_spec_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"name": "org/vlm", "revision": "abc", "tokenSecretRef": {"name": "hub", "key": "token"}}
    service = {"model": model, "quantization": "8bit", "gpu": {"count": 1}}
    said = variables(render_pipeline(owned(pipeline({"caption.inferenceService": service})), RenderSettings()))
    told: DescribeSettings = loaded(monkeypatch, "caption", said["caption"])
    assert (told.model, told.revision, told.load_8bit, told.device) == ("org/vlm", "abc", True, "cuda")
    assert told.hf_token is not None
    plain: EnhanceSettings = loaded(monkeypatch, "enhance", said["enhance"])
    assert plain.model == EnhanceSettings.model_fields["model"].default, "the demonstration model"
    assert (plain.device, plain.s3_buckets, plain.auth, plain.port) == ("cpu", (), "off", 8080)
