"""The small checkpoints, loaded once for the folder."""

from __future__ import annotations

import pytest

from sightline.tiny import DESCRIBE, ENHANCE, GENERATE


@pytest.fixture(scope="session")
def describer():
    from sightline.tiny import report

    if not (DESCRIBE / "model.safetensors").exists():
        pytest.fail("tiny/describe holds no checkpoint: run python -m sightline.tiny train describe")
    return report.load_describer()


@pytest.fixture(scope="session")
def enhancer():
    from sightline.tiny import report

    if not (ENHANCE / "model.safetensors").exists():
        pytest.fail("tiny/enhance holds no checkpoint: run python -m sightline.tiny train enhance")
    return report.load_enhancer()


@pytest.fixture(scope="session")
def generator():
    from sightline.tiny import answers

    if not (GENERATE / "model.safetensors").exists():
        pytest.fail("tiny/generate holds no checkpoint: run python -m sightline.tiny train generate")
    return answers.load()
