"""Every training runs from nothing to a checkpoint with all its files: two steps of each, as `make tiny` starts it."""

import json
from pathlib import Path

import pytest

from sightline import golden
from sightline.tiny import HERE
from sightline.tiny.__main__ import main

pytestmark = pytest.mark.slow


def train(which: str, out: Path, *flags: str) -> None:
    main(["train", which, "--steps", "2", "--seed", "5", "--out", str(out), *flags])


def files_of(which: str) -> set[str]:
    """Of the package; but for the golden file, which `make tiny` has the trained model write afterwards."""
    return {path.name for path in (HERE / which).iterdir()} - {golden.FILE_NAME}


@pytest.mark.parametrize("which", ["describe", "enhance", "embed", "blip"])
def test_two_steps_write_every_file_that_the_package_holds(
    which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(which, tmp_path)
    record = json.loads(capsys.readouterr().out)[which]
    assert (record["steps"], record["seed"]) == (2, 5)
    assert {path.name for path in (tmp_path / which).iterdir()} >= files_of(which)


def test_a_leg_goes_on_from_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "generate"
    train("generate", tmp_path)
    assert {path.name for path in folder.iterdir()} >= files_of("generate")
    before = (folder / "model.safetensors").read_bytes()
    train("generate", tmp_path, "--resume")
    legs = json.loads((folder / "sightline_training.json").read_text())["legs"]
    assert ["--resume" in leg["command"] for leg in legs] == [False, True]
    assert (folder / "model.safetensors").read_bytes() != before
