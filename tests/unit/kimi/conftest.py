"""The small random checkpoint that these tests share."""

from pathlib import Path

import pytest

from sightline.models.kimi_vl import KimiVLForConditionalGeneration
from tests.unit.kimi.small import random_model, write_checkpoint


@pytest.fixture(scope="session")
def model() -> KimiVLForConditionalGeneration:
    return random_model()


@pytest.fixture(scope="session")
def checkpoint(model: KimiVLForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("kimi") / "checkpoint", model)
