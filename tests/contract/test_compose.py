"""The compose file and the image: all five and the gateway on CPU, on GPUs by profile, each on a port of its own.

Nothing is built here: no container runtime is at hand. What can be read is read, what can be run without one is run.
"""

import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, Launcher, Server

COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
MODELS = ("describe", "enhance", "generate", "embed", "blip")
DOCKERFILE = (ROOT / "Dockerfile").read_text()
READY = ROOT / "predictors" / "docker" / "ready"


def ports(service: dict[str, Any]) -> list[int]:
    """Published on the host."""
    return [int(port.rsplit(":", 2)[1]) for port in service["ports"]]


def test_has_the_five_and_the_gateway_on_cpu_and_on_gpus():
    assert set(SERVICES) == {f"{name}{kind}" for name in (*MODELS, "gateway") for kind in ("", "-gpu")}
    for name in MODELS:
        assert "profiles" not in SERVICES[name]
        assert SERVICES[name]["environment"]["DEVICE"] == "cpu"
        gpu = SERVICES[f"{name}-gpu"]
        assert gpu["profiles"] == ["gpu"]
        assert gpu["environment"]["DEVICE"] == "cuda"
        (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]


def test_the_ports_are_the_original_ones_where_they_are_known_and_nobody_s_twice():
    assert ports(SERVICES["embed"])[0] == 7001  # contract C12
    assert ports(SERVICES["embed-gpu"])[0] == 7002
    assert ports(SERVICES["blip"])[0] == 8000  # contract E8
    every = [port for service in SERVICES.values() for port in ports(service)]
    assert len(set(every)) == len(every)
    for service in SERVICES.values():
        http, grpc = ports(service)
        assert grpc == http + 100
        assert all(port.startswith("${BIND:-127.0.0.1}:") for port in service["ports"])


def test_the_hub_s_cache_is_a_named_volume_and_blip_has_its_images():
    assert {"hf-cache", "state"} <= set(COMPOSE["volumes"])
    for name in MODELS:
        assert "hf-cache:/var/cache/huggingface" in SERVICES[name]["volumes"]
        assert "hf-cache:/var/cache/huggingface" in SERVICES[f"{name}-gpu"]["volumes"]
    assert any(volume.endswith(":/app/images:ro") for volume in SERVICES["blip"]["volumes"])
    assert "HF_HOME=/var/cache/huggingface" in DOCKERFILE
    assert "IMAGE_ROOT=/app/images" in DOCKERFILE


def test_every_container_starts_a_predictor_and_every_variable_is_a_setting():
    from sightline.configuration import configure
    from sightline.server.model import MODELS as REGISTRY

    for name, service in SERVICES.items():
        (kind,) = service["command"]
        assert kind == name.removesuffix("-gpu").replace("gateway", "pipeline")
        values = {key: substituted(str(value)) for key, value in service["environment"].items()}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in values.items():
                patch.setenv(key, value)
            (item,) = configure({kind: REGISTRY[kind].settings_type}, []).values()
        assert item.settings.port == 8080
        assert item.origins["port"] == "env PORT"
        said = {origin.partition(" ")[2] for origin in item.origins.values()}
        own = {key for key, value in values.items() if value} - {"OMP_WAIT_POLICY", "HF_HUB_OFFLINE"}
        if kind != "pipeline":
            assert own <= said | {"AUTH"}, own - said


def substituted(text: str) -> str:
    """What compose makes of `${NAME:-default}` when only the key is set."""
    while match := re.search(r"\$\{(\w+)(?::-((?:[^{}]|\{[^{}]*\})*))?\}", text):
        value = "secret" if match[1] == "API_KEY" else match[2] or ""
        text = text[: match.start()] + value + text[match.end() :]
    return text


def test_without_a_key_no_container_starts():
    for service in SERVICES.values():
        assert service["environment"]["AUTH"] == "${AUTH:-api-key}"
        assert service["environment"]["API_KEY"] == "${API_KEY:-}"


def test_containers_have_no_more_rights_than_they_need():
    for service in SERVICES.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.search(r"^USER 1000:1000$", DOCKERFILE, re.MULTILINE)
    assert all(
        "--require-hashes" in line for line in DOCKERFILE.splitlines() if "pip install" in line and "-r " in line
    )
    assert DOCKERFILE.index("ARG BASE_IMAGE=") < DOCKERFILE.index("FROM ${BASE_IMAGE}")
    froms = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE, re.MULTILINE))
    assert set(froms) - stages == {"${BASE_IMAGE}"}, "no registry is named"
    assert {"gateway", "operator", "predictor-cpu", "predictor-cuda"} <= stages
    for service in SERVICES.values():
        assert service["build"]["target"] in stages


@pytest.mark.parametrize("name", ["serve", "gateway", "operator"])
def test_the_images_locks_have_hashes_and_the_gateway_no_torch(name: str):
    lock = (ROOT / "requirements" / f"{name}.txt").read_text()
    pins = re.findall(r"^[a-z0-9][\w.-]*(?:\[.*\])?==", lock, re.MULTILINE)
    assert len(pins) > 30
    assert lock.count("--hash=sha256:") >= len(pins)
    assert ("\ntorch==" in lock) == (name == "serve")
    assert not re.search(r"^(-i|--index-url|--extra-index-url|--find-links)", lock, re.MULTILINE)


def is_ready(*words: str) -> bool:
    return subprocess.run([sys.executable, READY, *words], capture_output=True, check=False).returncode == 0


def test_the_health_check_tells_the_truth(describe: Server, launcher: Launcher):
    assert is_ready("sightline", "serve", "describe", "--port", str(describe.port))
    assert is_ready("sightline", "serve", "describe", f"--port={describe.port}")
    assert not is_ready("sightline", "serve", "describe", "--port", "1")
    waiting = launcher.start("pipeline", "--describe-url", "http://127.0.0.1:1").wait_live()
    assert not is_ready("--port", str(waiting.port)), "alive, but not ready"
