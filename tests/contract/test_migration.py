"""The migration pages' commands are answered as written."""

import json
import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT
from tests.scenes import red_circle

PAGES = sorted((ROOT / "docs" / "migration").glob("*.md"))
COMMANDS = [
    pytest.param(line, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, line in enumerate("".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S)).splitlines())
]


def test_there_is_a_page_for_each_of_the_five_services():
    assert {page.stem for page in PAGES} == {"describe", "generate", "embed", "caption-enhance", "blip"}


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
@pytest.mark.parametrize("line", COMMANDS)
def test_its_commands_are_answered(line, everything, tmp_path):
    (tmp_path / "scene.png").write_bytes(red_circle())
    command = line.replace("http://127.0.0.1:8080", everything.url)

    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )

    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    if isinstance(answer, dict):
        assert not {"detail", "error"} & set(answer), answer


def test_their_links_and_variables_exist():
    from sightline import settings

    known = (ROOT / "predictors/src/sightline/settings.py").read_text() + (ROOT / ".env.example").read_text()
    fields = {
        name.upper() for cls in vars(settings).values() if hasattr(cls, "model_fields") for name in cls.model_fields
    }
    for page in PAGES:
        for name in re.findall(r"`([A-Z][A-Z0-9_]{3,})`", page.read_text()):
            assert name in fields or name in known, f"{page.name}: {name}"
