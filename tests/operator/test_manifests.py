"""manifests/base and its overlay against a real API server: taken strictly, pods by restricted Pod Security."""

import re
from pathlib import Path

import pytest
import yaml

from tests.chart.test_manifests import MANIFESTS, OVERLAY, kustomized, needs_kubectl, of, operator_of
from tests.operator.conftest import ApiServer

pytestmark = needs_kubectl


@pytest.mark.parametrize("folder", [MANIFESTS / "base", OVERLAY], ids=["base", "overlay"])
def test_the_api_server_takes_what_kustomize_makes(folder: Path, apiserver: ApiServer):
    made = kustomized(folder)
    (namespace,) = of(made, "Namespace").values()
    apiserver.apply(namespace)
    words = ("--dry-run=server", "--validate=strict", "--server-side", "--warnings-as-errors", "--force-conflicts")
    done = apiserver.kubectl("apply", *words, "-f", "-", stdin=yaml.safe_dump_all(made), check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\(server dry run\)", done.stdout)) == len(made)


def test_the_namespace_refuses_a_pod_that_restricted_pod_security_does(apiserver: ApiServer):
    """The guard is real: the operator's own pod is let in, the same one as root is not."""
    made = kustomized(MANIFESTS / "base")
    (namespace,) = of(made, "Namespace").values()
    apiserver.apply(namespace)
    template = operator_of(made)["spec"]["template"]
    spec = {name: value for name, value in template["spec"].items() if name != "serviceAccountName"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "operator", "namespace": "sightline-system"}}
    assert create(apiserver, pod | {"spec": spec}) == ""
    rooted = spec | {"securityContext": spec["securityContext"] | {"runAsNonRoot": False}}
    assert 'violates PodSecurity "restricted' in create(apiserver, pod | {"spec": rooted})


def create(apiserver: ApiServer, pod: dict) -> str:
    """What the API server has against it."""
    done = apiserver.kubectl("create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(pod), check=False)
    assert (done.returncode == 0) == (done.stderr == ""), done.stderr
    return done.stderr
