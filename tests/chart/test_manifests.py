"""manifests/base for people without Helm: the same operator as the chart's, and an overlay that changes what it says.

kubectl is taken from PATH for its Kustomize; without it these are skipped, loudly.
"""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sightline_operator.__main__ import PREFIX, _parser, _settings
from sightline_operator.settings import OperatorSettings
from tests.chart.test_chart import Manifest, needs_helm, of, rendered
from tests.chart.tools import needs
from tests.conftest import ROOT

MANIFESTS = ROOT / "manifests"
OVERLAY = MANIFESTS / "overlays" / "example"

needs_kubectl = needs("kubectl")
pytestmark = needs_kubectl


def kustomized(folder: Path) -> list[Manifest]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr  # deprecated fields are told there
    return list(yaml.safe_load_all(done.stdout))


def operator_of(manifests: list[Manifest]) -> Manifest:
    return of(manifests, "Deployment")["sightline-operator"]


def settings_of(deployment: Manifest) -> OperatorSettings:
    """What the operator takes from the words and the variables of its container."""
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    variables = {item["name"]: item["value"] for item in container["env"] if "value" in item}
    assert all(name.startswith(PREFIX) for name in variables)
    told = ["run", "--identity=one", f"--lease-namespace={deployment['metadata']['namespace']}"]
    return _settings(_parser(variables).parse_args([*told, *container["args"][1:]]))


def without_names(value: Any) -> Any:
    """But for labels and selectors, which each of the two ways has of its own."""
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if name not in {"labels", "matchLabels"}}
        return {name: without_names(item) for name, item in kept.items()}
    return [without_names(item) for item in value] if isinstance(value, list) else value


@needs_helm
def test_the_base_is_what_the_chart_renders_by_default():
    ours = kustomized(MANIFESTS / "base")
    charts = rendered("--namespace=sightline-system", release="sightline", include_crds=True)
    theirs = operator_of(charts) | {"metadata": {"namespace": "sightline-system"}}
    assert settings_of(operator_of(ours)) == settings_of(theirs)
    specs = [without_names(operator_of(made)["spec"]) for made in (ours, charts)]
    for spec in specs:
        (container,) = spec["template"]["spec"]["containers"]
        container["env"] = [item for item in container["env"] if "valueFrom" in item]
        assert container.pop("args")[0] == "run"
    assert specs[0] == specs[1]
    for kind in ("Service", "NetworkPolicy"):
        pair = [of(made, kind)["sightline-operator"]["spec"] for made in (ours, charts)]
        assert {**without_names(pair[0]), "selector": 0} == {**without_names(pair[1]), "selector": 0}
    rules = [
        {str(role["rules"]) for kind in ("Role", "ClusterRole") for role in of(made, kind).values()}
        for made in (ours, [item for item in charts if "helm.sh/hook" not in item["metadata"].get("annotations", {})])
    ]
    assert rules[0] == rules[1]
    assert of(ours, "CustomResourceDefinition") == of(charts, "CustomResourceDefinition")


@pytest.mark.parametrize("folder", [MANIFESTS / "base", OVERLAY], ids=["base", "overlay"])
def test_what_selects_the_operator_finds_its_pods(folder: Path):
    made = kustomized(folder)
    labels = operator_of(made)["spec"]["template"]["metadata"]["labels"].items()
    selectors = [
        operator_of(made)["spec"]["selector"]["matchLabels"],
        of(made, "Service")["sightline-operator"]["spec"]["selector"],
    ]
    selectors += [item["spec"]["podSelector"]["matchLabels"] for item in of(made, "NetworkPolicy").values()]
    selectors += [item["spec"]["selector"]["matchLabels"] for item in of(made, "PodDisruptionBudget").values()]
    assert len(selectors) == (4 if folder == OVERLAY else 3)
    for selector in selectors:
        assert selector
        assert selector.items() <= labels


def test_the_overlay_changes_images_replicas_and_the_namespace_everywhere():
    made = kustomized(OVERLAY)
    assert "sightline-system" not in yaml.safe_dump(made)
    assert set(of(made, "Namespace")) == {"vision-system"}
    (subject,) = of(made, "ClusterRoleBinding")["sightline-operator"]["subjects"]
    assert subject["namespace"] == "vision-system"
    deployment = operator_of(made)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert deployment["spec"]["replicas"] == 2
    images = settings_of(deployment).render.images
    assert set(images) == set(OperatorSettings().render.images)
    for image in (container["image"], *images.values()):
        assert image.startswith("images.example/vision/sightline-")
        assert image.endswith(":v1")


def test_the_folders_of_plain_manifests_stay_plain():
    """`kubectl apply -f manifests/crd` takes every *.yaml there; a Kustomization among them would be refused."""
    for folder in ("crd", "rbac"):
        for path in (MANIFESTS / folder).glob("*.y*ml"):
            assert all(item["kind"] != "Kustomization" for item in yaml.safe_load_all(path.read_text()))
        listed = yaml.safe_load((MANIFESTS / folder / "Kustomization").read_text())["resources"]
        assert all((MANIFESTS / folder / name).exists() for name in listed)
    crds = yaml.safe_load((MANIFESTS / "crd" / "Kustomization").read_text())["resources"]
    assert set(crds) == {path.name for path in (MANIFESTS / "crd").glob("*.yaml")}
