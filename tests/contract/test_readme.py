"""The README's commands are the ones that run."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.bench.accuracy import page, read_figures, table
from tests.conftest import ROOT, Server
from tests.scenes import red_circle

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHELL = [block for kind, block in BLOCKS if kind == "sh"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """A folder in which the README's paths hold."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.fixture(scope="module")
def servers(chain_servers, everything) -> dict[str, Server]:
    """The six of the demonstration, by the port that the README names."""
    chain = {"8080": "pipeline", "8081": "describe", "8082": "enhance"}
    others = dict.fromkeys(("8083", "8084", "8085"), everything)
    return {port: chain_servers[name] for port, name in chain.items()} | others


def on_ports(text: str, servers: dict[str, Server]) -> str:
    for documented, server in servers.items():
        text = text.replace(f"127.0.0.1:{documented}", f"127.0.0.1:{server.port}")
    return text


def test_its_two_commands_are_make_targets():
    makefile = (ROOT / "Makefile").read_text()
    assert SHELL[0].strip() == "make demo"
    assert SHELL[1].strip() == "make test"
    for target in re.findall(r"`make ([a-z0-9-]+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_ci_runs_the_readmes_test_command():
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert SHELL[1].strip() in [line.partition("|")[0].strip() for line in lines]


def test_its_shell_blocks_are_answered_as_written(folder, servers):
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    for line in "".join(SHELL[2:]).splitlines():
        done = subprocess.run(
            ["bash", "-c", on_ports(line, servers)],
            cwd=folder, capture_output=True, text=True, check=False, timeout=180,
            env=os.environ | {"SIGHTLINE_URL": servers["8080"].url},
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        if "curl" in line:
            answer = json.loads(done.stdout)
            assert not {"detail", "error"} & set(answer), f"{line}\n{answer}"
            if not {"ok", "task_id"} & set(answer):
                assert answer.get("demo_model") or answer["parameters"]["demo_model"], line
        else:
            assert done.stdout.strip(), line


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"], ids=["triton", "openai"])
def test_its_python_blocks_run(folder, servers, block):
    (folder / "scene.png").write_bytes(red_circle())
    done = subprocess.run(
        [sys.executable, "-c", on_ports(block, servers)],
        cwd=folder, capture_output=True, text=True, check=False, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "->" in done.stdout


def test_its_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in link or (ROOT / link).exists(), link


def test_it_quotes_the_measured_accuracy():
    figures = read_figures()
    assert table(figures) in README
    assert page(figures) == (ROOT / "docs" / "accuracy.md").read_text()
