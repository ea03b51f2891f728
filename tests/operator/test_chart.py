"""The chart against a real API server: every shape in ci/ is taken, strictly checked, with restricted Pod Security."""

import re
from pathlib import Path

import pytest
import yaml

from tests.chart.test_chart import SHAPES, needs_helm, rendered
from tests.operator.conftest import ApiServer

pytestmark = needs_helm

FOREIGN = ("monitoring.coreos.com", "kueue.x-k8s.io")
"""Groups whose CRDs these tests have not."""


@pytest.mark.parametrize("shape", SHAPES)
def test_the_api_server_takes_every_object_of_a_release(
    shape: str, apiserver: ApiServer, namespace: str, tmp_path: Path
):
    apiserver.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/warn=restricted")
    found = rendered("-f", str(SHAPES[shape]), "--namespace", namespace)
    known = [item for item in found if not item["apiVersion"].startswith(FOREIGN) and _is_served(item, apiserver)]
    assert {item["kind"] for item in known} >= {"Deployment", "Service", "Role", "ClusterRole", "Pod"}
    for item in known:
        if item["metadata"].get("namespace") in {"team-a", "team-b"}:
            item["metadata"]["namespace"] = namespace  # two teams' namespaces, which are not there
    file = tmp_path / "release.yaml"
    file.write_text(yaml.safe_dump_all(known))
    words = ("--dry-run=server", "--validate=strict", "--server-side", "--warnings-as-errors", "-n", namespace)
    done = apiserver.kubectl("apply", *words, "-f", str(file), check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\(server dry run\)", done.stdout)) == len(known)


def _is_served(item: dict, apiserver: ApiServer) -> bool:
    """KServe's kinds are there where KSERVE_CRDS is."""
    if not item["apiVersion"].startswith("serving.kserve.io"):
        return True
    return "inferenceservices" in apiserver.kubectl("api-resources", "--api-group=serving.kserve.io").stdout
