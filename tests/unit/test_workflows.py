"""The workflows, the tools that they bring and the cluster that they make: read, as nobody here can run GitHub's."""

import base64
import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

FOLDER = ROOT / ".github" / "workflows"
FILES = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.y*ml"))}
WORKFLOWS = {name: yaml.load(text, Loader=yaml.BaseLoader) for name, text in FILES.items()}  # "on" is no boolean there
TARGETS = set(re.findall(r"^([a-z0-9-]+(?: [a-z0-9-]+)*):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
TARGETS = {name for line in TARGETS for name in line.split()}


def script(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def jobs() -> Iterator[dict[str, Any]]:
    for workflow in WORKFLOWS.values():
        yield from workflow["jobs"].values()


def runs() -> list[str]:
    return [step["run"] for job in jobs() for step in job["steps"] if "run" in step]


def words(target: str) -> list[str]:
    """The ONLY=… of every `make target`, without quotes; an expression of the matrix stands for its values."""
    found = [only for run in runs() for only in re.findall(rf'make {target} ONLY="?([^"\n]+)"?', run)]
    return [name for only in found for name in ([] if "${{" in only else only.split())]


def matrix(name: str) -> list[list[str]]:
    return [job["strategy"]["matrix"][name] for job in jobs() if name in job.get("strategy", {}).get("matrix", {})]


def test_there_is_one_of_each():
    assert set(FILES) == {"test.yml", "chart.yml", "images.yml", "e2e.yml"}


@pytest.mark.parametrize("name", FILES)
def test_every_action_is_pinned_by_a_commit_and_says_its_version(name: str):
    used = re.findall(r"^.*\buses:.*$", FILES[name], re.MULTILINE)
    assert used
    for line in used:
        assert re.fullmatch(r"\s*(- )?uses: actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_an_action_is_the_same_commit_everywhere():
    pins = {}
    for action, commit, version in re.findall(r"uses: (\S+)@([0-9a-f]{40}) # (\S+)", "".join(FILES.values())):
        assert pins.setdefault(action, (commit, version)) == (commit, version)


def test_make_does_the_work_and_has_every_target_that_is_named():
    named = set()
    for run in runs():
        for line in run.strip().splitlines():
            if line == 'cat "$RUNNER_TEMP/e2e.md" >> "$GITHUB_STEP_SUMMARY"':
                continue
            match = re.match(r"make ([a-z0-9-]+)( [A-Z]+=.+)?$", line)
            assert match, line
            named.add(match[1])
    assert named <= TARGETS
    assert named == {"tools", "check", "test", "verify", "chart", "workflows", "images", "cluster", "e2e"}


def test_a_workflow_may_read_the_repository_and_no_more():
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {"contents": "read"}, name
        assert "pull_request_target" not in workflow["on"]
        assert "secrets." not in FILES[name]
    for run in runs():  # what a stranger writes into a title or a branch's name must not become a command
        assert not re.search(r"\$\{\{(?!\s*(matrix\.[a-z]+|runner\.temp)\s*\}\})", run), run
    for job in jobs():
        assert int(job["timeout-minutes"]) <= 120
        checkout = job["steps"][0]
        assert checkout["uses"].startswith("actions/checkout@")
        assert checkout["with"] == {"persist-credentials": "false"}


def test_the_matrices_are_what_we_say_we_work_with():
    said = tomllib.loads((ROOT / "predictors" / "pyproject.toml").read_text())["project"]["requires-python"]
    assert said == ">=3.11,<3.14"
    assert matrix("python") == [["3.11", "3.12", "3.13"]]
    assert matrix("kserve") == [["0.19.0", "0.20.0"]]
    targets = set(re.findall(r"^FROM .* AS (gateway|operator|predictor-\w+)$", (ROOT / "Dockerfile").read_text(), re.M))
    assert [set(each) for each in matrix("target")] == [targets]


def test_every_tool_that_is_asked_for_is_known():
    known = {*script("tools").PROGRAMS, "envtest", "kserve"}
    assert words("tools")
    assert set(words("tools")) <= known


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not on PATH (`make tools`)")
def test_actionlint_has_nothing_to_say():
    command = ["actionlint", "-shellcheck=", "-pyflakes=", *map(str, FOLDER.glob("*.yml"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_kserve_without_cert_manager_has_a_certificate_that_its_webhooks_trust():
    cluster = script("cluster")
    certificate, secret = cluster.certified()
    webhook = {"name": "w", "clientConfig": {"caBundle": "Cg==", "service": {"name": "s", "namespace": "kserve"}}}
    given = [
        {"apiVersion": "cert-manager.io/v1", "kind": "Certificate", "metadata": {"name": "serving-cert"}},
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "webhooks": [webhook],
        },
        {"apiVersion": "v1", "kind": "ConfigMap"},
    ]
    left = list(cluster.without_cert_manager(given, certificate))
    assert [item["kind"] for item in left] == ["ValidatingWebhookConfiguration", "ConfigMap"]
    assert base64.b64decode(left[0]["webhooks"][0]["clientConfig"]["caBundle"]) == certificate
    assert base64.b64decode(secret["data"]["tls.crt"]) == certificate
    assert secret["metadata"] == {"name": "kserve-webhook-server-cert", "namespace": "kserve"}
    told = subprocess.run(
        ["openssl", "x509", "-noout", "-checkhost", "kserve-webhook-server-service.kserve.svc"],
        input=certificate,
        capture_output=True,
        check=True,
    )
    assert b"does match" in told.stdout
