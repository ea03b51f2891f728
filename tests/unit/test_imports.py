"""Imports are free: what is light stays light, and the rooms only know whom they may know."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "torchvision", "transformers", "accelerate", "bitsandbytes", "vllm"}
LIGHT_MODULES = [
    "sightline",
    "sightline.errors",
    "sightline.wire",
    "sightline.v2",
    "sightline.settings",
    "sightline.chain",
    "sightline.client",
    "sightline.cli",
    "sightline.sources",
    "sightline.images",
    "sightline.engines.remote",
    "sightline.jobs.batches",
    "sightline.jobs.objects",
    "sightline.jobs.runs",
    "sightline.services.pipeline",
    "sightline.tiny",
]


def modules_after(*imports: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after these imports."""
    code = (
        "".join(f"import {name}\n" for name in imports) + "import sys\nprint(*{m.split('.')[0] for m in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def light() -> set[str]:
    return modules_after(*LIGHT_MODULES)


@pytest.mark.parametrize("module", sorted(HEAVY))
def test_no_light_module_brings(module: str, light: set[str]) -> None:
    assert module not in light


def test_no_light_module_brings_kserve(light: set[str]) -> None:
    assert "kserve" not in light


def test_the_services_of_the_models_bring_no_torch_before_they_load() -> None:
    found = modules_after("sightline.services.describe", "sightline.services.enhance")

    assert not found & (HEAVY | {"kserve"})


def test_the_server_brings_kserve_and_no_torch() -> None:
    found = modules_after("sightline.server.serve")

    assert "kserve" in found
    assert not found & HEAVY


def test_what_is_pure_brings_no_network() -> None:
    found = modules_after("sightline.chain", "sightline.wire", "sightline.errors", "sightline.v2")

    assert not found & {"httpx", "fastapi", "starlette", "boto3", "obstore", "PIL", "pydantic_settings"}


def test_the_bare_package_brings_nothing() -> None:
    assert not modules_after("sightline") & {"numpy", "httpx", "fastapi", "pydantic", "orjson", "typer"}


def test_the_import_rules_hold() -> None:
    lint = Path(sys.executable).with_name("lint-imports")

    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
