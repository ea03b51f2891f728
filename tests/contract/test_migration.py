"""The migration pages: their commands are run, their variables understood, their links lead somewhere."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Server
from tests.scenes import red_circle

FOLDER = ROOT / "docs" / "migration"
PAGES = {file.stem: file.read_text() for file in sorted(FOLDER.glob("*.md"))}
PREDICTORS = {
    "describe": ["describe"],
    "generate": ["generate"],
    "embed": ["embed"],
    "caption-enhance": ["pipeline", "describe", "enhance"],
    "blip": ["blip"],
}


VALUES = {
    "PORT": "9000", "AUTH": "off", "DEVICE": "cpu", "MAX_BATCH": "3", "MAX_TOKENS": "9", "WORKERS": "1",
    "RELOAD": "true", "LOG_LEVEL": "debug", "USE_GPT_OSS": "false", "GPT_OSS_REASONING_LEVEL": "high",
    "VLM_LOAD_8BIT": "true", "QUANTIZATION": "none", "DESCRIBE_URL": "http://a", "ENHANCE_URL": "http://a",
}  # fmt: skip
"""Where `x` will not do."""


def lines(page: str) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    return "".join(blocks).splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("migration")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.fixture(scope="module")
def servers(chain_servers: dict[str, Server], everything: Server, s3_server) -> dict[str, Server]:
    """By the port of the demonstration."""
    s3_server.put("migration", "photo.png", red_circle())
    chain = {"8080": "pipeline", "8081": "describe", "8082": "enhance"}
    return {port: chain_servers[name] for port, name in chain.items()} | dict.fromkeys(("8083", "8085"), everything)


@pytest.fixture(scope="module")
def embed_url(everything: Server) -> str:
    return everything.url


def test_there_is_one_for_each_service():
    assert set(PAGES) == set(PREDICTORS)


@pytest.mark.parametrize("page", PAGES)
def test_its_commands_answer_what_it_says(page: str, folder: Path, servers: dict[str, Server], embed_url: str):
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    ran = 0
    for line in lines(page):
        command = line.replace("http://127.0.0.1:8084", embed_url)
        for port, server in servers.items():
            command = command.replace(f"127.0.0.1:{port}", f"127.0.0.1:{server.port}")
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=False, timeout=120,
            env=os.environ | {"API_KEY": "none"},
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        _, has_fields, fields = line.rpartition("  # ")
        if not has_fields:
            continue
        answer = json.loads(done.stdout)
        expected = fields.split()
        if expected[0] == "[]":
            assert isinstance(answer, list), f"{line}\n{answer}"
            answer, expected = answer[0], expected[1:]
        assert set(expected) <= set(answer), f"{line}\n{answer}"
        assert "detail" not in answer, f"{line}\n{answer}"
        ran += 1
    assert ran >= 4


@pytest.mark.parametrize("page", PAGES)
def test_its_variables_are_understood(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from sightline.configuration import configure
    from sightline.server.model import MODELS

    monkeypatch.chdir(tmp_path)
    table = PAGES[page].partition("## Environment")[2].partition("\n## ")[0]
    names = {name for row in re.findall(r"^\| (`[^|]*)\|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert names
    for name in names:
        understood = []
        for predictor in PREDICTORS[page]:
            with monkeypatch.context() as patch:
                patch.setenv(name, VALUES.get(name, "x"))
                (item,) = configure({predictor: MODELS[predictor].settings_type}, ["--auth", "off"]).values()
            understood += [field for field, origin in item.origins.items() if origin == f"env {name}"]
        assert understood, f"{name} is nobody's"


@pytest.mark.parametrize("page", PAGES)
def test_its_links_lead_somewhere(page: str):
    for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        assert (FOLDER / link).exists(), link


def test_the_flags_of_the_older_blip_command_are_understood():
    from sightline.configuration import configure
    from sightline.settings import BlipSettings

    (words,) = set(re.findall(r"sightline serve blip (--host[^`]*)`", PAGES["blip"]))
    (item,) = configure({"blip": BlipSettings}, [*words.split(), "--auth", "off"]).values()
    assert (item.settings.host, item.settings.port, item.settings.reload) == ("0.0.0.0", 8000, True)
