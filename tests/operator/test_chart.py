"""The chart against a real API server: every shape in ci/ is taken, strictly checked, with restricted Pod Security."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.test_chart import SHAPES, needs_helm, of, rendered
from tests.chart.tools import needs
from tests.operator.conftest import ApiServer
from tests.operator.schemas import LOCATION, write_schemas

pytestmark = needs_helm

FOREIGN = ("monitoring.coreos.com", "kueue.x-k8s.io", "keda.sh")
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


@needs("kubeconform")
def test_every_shape_passes_kubeconform(apiserver: ApiServer, tmp_path: Path):
    """Against the schemas of this API server: Kubernetes' own, our CRDs', and KServe's where KSERVE_CRDS is."""
    shapes = {shape: rendered("-f", str(path), include_crds=True) for shape, path in SHAPES.items()}
    kinds = {(item["apiVersion"], item["kind"]) for found in shapes.values() for item in found}
    known = write_schemas(apiserver, kinds, tmp_path)
    ours = {kind for kind in kinds if not kind[0].startswith((*FOREIGN, "serving.kserve.io"))}
    assert ours <= known
    assert len(ours) >= 14
    judged = [item for found in shapes.values() for item in found if (item["apiVersion"], item["kind"]) in known]
    assert kubeconform(judged, tmp_path) == []
    deployment = of(shapes["default"], "Deployment")["it-sightline-operator"]
    (pipeline,) = of(shapes["laptop"], "VisionPipeline").values()
    wrong = [  # it can say no: a type, a name that nobody knows, here and deep down
        deployment | {"spec": deployment["spec"] | {"replicas": "one"}},
        deployment | {"spec": deployment["spec"] | {"replica": 1}},
        pipeline | {"spec": pipeline["spec"] | {"gatewy": {}}},
        pipeline | {"spec": pipeline["spec"] | {"gateway": {"replicas": "one"}}},
    ]
    assert len(kubeconform(wrong, tmp_path)) == len(wrong)


def kubeconform(manifests: list[dict[str, Any]], folder: Path) -> list[str]:
    """What it has against them. A kind without a schema is an error, too."""
    command = ["kubeconform", "-output=json", "-summary", f"-schema-location={folder}/{LOCATION}", "-"]
    text = yaml.safe_dump_all(manifests)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    answer = json.loads(done.stdout)
    assert sum(answer["summary"].values()) == len(manifests)
    assert answer["summary"]["skipped"] == 0
    return [f"{item['kind']}: {item['msg']}" for item in answer["resources"] or []]


@pytest.mark.parametrize("shape", ["laptop", "scaled"])
def test_the_models_pods_are_let_into_a_restricted_namespace(shape: str, apiserver: ApiServer, namespace: str):
    """KServe makes pods of an InferenceService's predictor; its own fields are left out here."""
    apiserver.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    theirs = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "deploymentStrategy", "labels"}
    services = of(rendered("-f", str(SHAPES[shape])), "InferenceService")
    assert services
    for name, service in services.items():
        spec = {key: value for key, value in service["spec"]["predictor"].items() if key not in theirs}
        spec.pop("priorityClassName", None)  # not there
        spec.pop("runtimeClassName", None)
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace}, "spec": spec}
        words = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
        done = apiserver.kubectl(*words, stdin=yaml.safe_dump(pod), check=False)
        assert done.returncode == 0, done.stderr
