"""The chart as people install it: every shape in ci/ renders and is safe, and a wrong value is refused by its name.

helm is taken from PATH; without it these are skipped, loudly.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.tools import needs
from tests.conftest import ROOT

CHART = ROOT / "charts" / "sightline"
SHAPES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
MODELS = ("describe", "generate", "embed", "enhance", "blip")
KSERVE = ("--api-versions", "serving.kserve.io/v1beta1")

needs_helm = needs("helm")
pytestmark = needs_helm

Manifest = dict[str, Any]


def helm(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["helm", *words], capture_output=True, text=True, check=False, timeout=120)


def helm_template(*words: str, release: str = "it") -> str:
    done = helm("template", release, str(CHART), "--kube-version", "1.35.0", "-n", "vision", *KSERVE, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(*words: str, include_crds: bool = False, release: str = "it") -> list[Manifest]:
    crds = ["--include-crds"] if include_crds else []
    return [item for item in yaml.safe_load_all(helm_template(*crds, *words, release=release)) if item]


@pytest.fixture(scope="module", params=SHAPES)
def shape(request: pytest.FixtureRequest) -> list[Manifest]:
    return rendered("-f", str(SHAPES[request.param]))


def of(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {item["metadata"]["name"]: item for item in manifests if item["kind"] == kind}


def pods(manifests: list[Manifest]) -> list[Manifest]:
    """The spec of every pod that a release brings itself."""
    found = [item["spec"] for item in manifests if item["kind"] == "Pod"]
    found += [item["spec"]["template"]["spec"] for item in manifests if item["kind"] in {"Deployment", "Job"}]
    return found + [item["spec"]["predictor"] for item in manifests if item["kind"] == "InferenceService"]


def test_helm_lint_has_nothing_to_say():
    for path in SHAPES.values():
        done = helm("lint", str(CHART), "--kube-version", "1.35.0", "-f", str(path))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "[WARNING]" not in done.stdout


def test_pods_are_what_restricted_pod_security_takes(shape: list[Manifest]):
    assert pods(shape)
    for pod in pods(shape):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert container["resources"]["requests"]


def test_every_object_says_whose_it_is_and_none_has_two_names(shape: list[Manifest]):
    names = [(item["kind"], item["metadata"].get("namespace"), item["metadata"]["name"]) for item in shape]
    assert len(set(names)) == len(names)
    for item in shape:
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "sightline"
        assert len(item["metadata"]["name"]) <= 63


def test_no_role_reads_secrets_or_takes_everything(shape: list[Manifest]):
    roles = [item for item in shape if item["kind"] in {"Role", "ClusterRole"}]
    assert roles
    for role in roles:
        assert role["rules"], role["metadata"]["name"]
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
            assert "secrets" not in rule["resources"]
            assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


@pytest.mark.parametrize("profile", ["cpu", "gpu-1x24", "gpu-1x48", "gpu-1x80", "gpu-2x80"])
def test_a_profile_decides_models_and_gpus(profile: str):
    on = [f"--set=predictors.{name}.enabled=true" for name in MODELS]
    services = of(rendered(f"--set=profile={profile}", *on), "InferenceService")
    assert set(services) == {f"it-sightline-{name}" for name in MODELS}
    for service in services.values():
        predictor = service["spec"]["predictor"]
        (container,) = predictor["containers"]
        variables = {item["name"]: item.get("value") for item in container["env"]}
        gpus = container["resources"]["limits"].get("nvidia.com/gpu")
        assert (gpus == "1") == (profile != "cpu")
        assert ("MODEL" in variables) == (profile != "cpu")
        assert variables["DEVICE"] == ("cpu" if profile == "cpu" else "cuda")
        if profile != "cpu":  # the last GPU is never waited for by a pod that surges
            assert predictor["deploymentStrategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
            assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in predictor["tolerations"]


def test_each_predictor_is_off_until_it_is_asked_for():
    assert not of(rendered(), "InferenceService")
    for name in MODELS:
        made = of(rendered(f"--set=predictors.{name}.enabled=true"), "InferenceService")
        assert set(made) == {f"it-sightline-{name}"}
        (container,) = made[f"it-sightline-{name}"]["spec"]["predictor"]["containers"]
        assert container["args"] == [name]
        assert container["readinessProbe"]["httpGet"]["path"] == f"/v2/models/{name}/ready"


def test_a_predictor_without_a_key_is_not_made():
    done = helm("template", "it", str(CHART), "--kube-version", "1.35.0", "--set", "apiKey.create=false")
    assert done.returncode != 0
    assert "apiKey.existingSecret" in done.stderr
    for service in of(rendered("-f", str(SHAPES["production"])), "InferenceService").values():
        (volume,) = [item for item in service["spec"]["predictor"]["volumes"] if item["name"] == "keys"]
        assert volume["secret"]["secretName"] == "vision-keys"


def test_the_crds_come_first_and_can_be_left_out():
    crds = of(rendered(include_crds=True), "CustomResourceDefinition")
    assert set(crds) == {"visionpipelines.sightline.dev", "visionbatches.sightline.dev"}
    for path in (ROOT / "manifests" / "crd").glob("*.yaml"):
        assert yaml.safe_load(path.read_text()) in crds.values()
    assert not of(rendered("--set=crds.install=false", include_crds=True), "CustomResourceDefinition")


def test_the_operator_s_rules_are_those_of_its_code():
    from sightline_operator.rbac import lease_rules, rules

    made = rendered()
    assert of(made, "ClusterRole")["vision-it-sightline-operator"]["rules"] == rules()
    assert of(made, "Role")["it-sightline-operator-lease"]["rules"] == lease_rules()
    scoped = rendered("--set=operator.namespaces={a,b}")
    assert "vision-it-sightline-operator" not in of(scoped, "ClusterRole")
    roles = [item for item in scoped if item["kind"] == "Role" and item["metadata"]["name"] == "it-sightline-operator"]
    assert {item["metadata"]["namespace"] for item in roles} == {"a", "b"}
    assert all(item["rules"] == rules() for item in roles)


def test_the_operator_understands_its_words():
    from sightline_operator.__main__ import _parser, _settings

    for values in SHAPES.values():
        deployment = of(rendered("-f", str(values)), "Deployment")["it-sightline-operator"]
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        settings = _settings(_parser({}).parse_args(container["args"]))
        assert set(settings.render.images) == {*MODELS, "pipeline", "worker"}
        assert not any(image.startswith("sightline-describe") for image in settings.render.images.values())


def test_the_models_of_the_pipeline_and_of_the_chart_have_names_of_their_own():
    from sightline_operator.render import render_pipeline
    from sightline_operator.settings import RenderSettings

    made = rendered("-f", str(SHAPES["laptop"]))
    names = {(item["kind"], item["metadata"]["name"]) for item in made}
    (pipeline,) = of(made, "VisionPipeline").values()
    pipeline["metadata"]["namespace"] = "vision"
    children = render_pipeline(pipeline, RenderSettings(), frozenset({"InferenceService"}))
    theirs = {(item["kind"], item["metadata"]["name"]) for item in children}
    assert len(theirs) > 5
    assert not names & theirs


def test_a_pipeline_is_one_that_its_own_types_take():
    from sightline_operator.api import Pipeline

    for values in SHAPES.values():
        for pipeline in of(rendered("-f", str(values)), "VisionPipeline").values():
            Pipeline.model_validate(pipeline["spec"])
    hosted = of(rendered("-f", str(SHAPES["endpoints"])), "VisionPipeline")["hosted"]["spec"]
    assert set(hosted["caption"]) == {"inferenceServiceRef"}
    assert set(hosted["enhance"]) == {"endpoint"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("operater.enabled=true", "operater"),
        ("operator.replicas=none", "replicas"),
        ("profile=gpu-8x80", "profile"),
        ("predictors.describe.model=3", "model"),
        ("predictors.description.enabled=true", "description"),
        ("models.sharedMemory=lots", "sharedMemory"),
        ("models.tokenSecretRef.name=hub", "tokenSecretRef"),
        ("imagePrefix=images.example", "imagePrefix"),
        ("models.image=", "image"),
        ("pipeline.name=Not_A_Name", "name"),
        ("models.autoscaling.itemsInFlight=4", "prometheus"),
        ("models.autoscaling.targetPercent=50", "maxReplicas"),
        ("models.cache.size=much", "size"),
        ("models.cache.accessMode=Any", "accessMode"),
        ("predictors.blip.autoscaling.max=3", "autoscaling"),
        ("predictors.blip.enabled=true,predictors.blip.replicas=0,models.autoscaling.maxReplicas=3", "blip.replicas"),
        ("kueue.localQueue=batches", "kueue.clusterQueue"),
        ("pipeline.enabled=true,pipeline.name=it-sightline", "pipeline.name"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(words: str, named: str):
    done = helm("template", "it", str(CHART), "--kube-version", "1.35.0", "--set", words)
    assert done.returncode != 0
    assert named in done.stderr


def test_a_cluster_without_kserve_is_told_what_to_install():
    """`v1/Pod` is what Helm knows of a cluster that it asked; offline it knows none, and the operator can wait."""
    on = "--set=predictors.blip.enabled=true"
    for words in (["--set=operator.enabled=false", on], [on, "--api-versions", "v1/Pod"]):
        done = helm("template", "it", str(CHART), "--kube-version", "1.35.0", *words)
        assert done.returncode != 0
        assert "kserve-crd" in done.stderr
    assert helm("template", "it", str(CHART), "--kube-version", "1.35.0", on).returncode == 0
    assert rendered(on, "--api-versions", "v1/Pod")


def test_a_cluster_without_keda_is_told_what_to_install():
    there = ("--api-versions", "v1/Pod", "-f", str(SHAPES["scaled"]))
    done = helm("template", "it", str(CHART), "--kube-version", "1.35.0", *KSERVE, *there)
    assert done.returncode != 0
    assert "needs KEDA" in done.stderr
    assert of(rendered(*there, "--api-versions", "keda.sh/v1alpha1"), "ScaledObject")


def test_keda_scales_by_a_metric_that_the_predictors_have():
    from sightline.server import metrics

    (scaled,) = of(rendered("-f", str(SHAPES["scaled"])), "ScaledObject").values()
    service = of(rendered("-f", str(SHAPES["scaled"])), "InferenceService")["it-sightline-generate"]
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external"
    assert scaled["spec"]["scaleTargetRef"]["name"] == f"{service['metadata']['name']}-predictor"
    (trigger,) = scaled["spec"]["triggers"]
    asked = set(re.findall(r"sightline_\w+", trigger["metadata"]["query"]))
    assert asked == {"sightline_items_in_flight"} <= _names(metrics)


def test_every_alert_has_its_runbook_and_every_runbook_its_alert():
    alerts = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    books = {path.stem: path.read_text() for path in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert {alert["alert"] for alert in alerts} == set(books)
    for book in books.values():
        for head in ("## Meaning", "## Impact", "## Diagnosis", "## Mitigation"):
            assert head in book
    rules = of(rendered("-f", str(SHAPES["production"])), "PrometheusRule")["it-sightline"]["spec"]["groups"][0][
        "rules"
    ]
    assert all(rule["annotations"]["runbook_url"].endswith(f"/{rule['alert']}.md") for rule in rules)


def test_what_is_watched_is_what_our_processes_say():
    """Every metric that an alert or the dashboard asks for exists under that name in our code."""
    from sightline.server import metrics as served
    from sightline_operator import metrics as operated

    registered = {name for module in (served, operated) for name in _names(module)}
    said = (CHART / "files" / "alerts.yaml").read_text() + (CHART / "files" / "dashboard.json").read_text()
    asked = {re.sub(r"_bucket$", "", name) for name in re.findall(r"\bsightline_\w+", said)}
    assert len(asked) > 10
    assert asked <= registered
    panels = json.loads((CHART / "files" / "dashboard.json").read_text())["panels"]
    assert all(panel["targets"] for panel in panels)


def _names(module: object) -> set[str]:
    from prometheus_client import Counter, Gauge, Histogram

    found = [item for item in vars(module).values() if isinstance(item, Counter | Gauge | Histogram)]
    return {f"{item._name}_total" if isinstance(item, Counter) else item._name for item in found}


def test_the_generated_files_are_up_to_date(tmp_path: Path):
    """`make verify` finds the same; here without a git checkout."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def closed(part: dict[str, Any], value: object, path: str) -> None:
        if part.get("additionalProperties") is not False or not isinstance(value, dict) or not value:
            return
        assert set(part["properties"]) - {"global"} == set(value), path
        for name, item in value.items():
            closed(part["properties"][name], item, f"{path}.{name}")

    closed(schema, values, "")
    book = (CHART / "README.md").read_text()
    assert "<!--" not in book
    assert all(f"`{name}." in book or f"`{name}`" in book for name in values)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_renders_to_its_golden_file(shape: str):
    from tests.chart.golden import FOLDER, golden_of

    kept = {path.stem for path in FOLDER.glob("*.yaml")}
    assert kept == set(SHAPES)
    old, new = ((FOLDER / f"{shape}.yaml").read_text(), golden_of(shape))
    assert list(yaml.safe_load_all(new)) == list(yaml.safe_load_all(old)), "meant? `python -m tests.chart.golden`"


@needs("helm-unittest")
def test_the_chart_s_own_unit_tests_pass():
    done = subprocess.run(
        ["helm-unittest", "--strict", str(CHART)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Tests: +[1-9][0-9]+ passed", done.stdout), done.stdout


GIVEN = "predictors.generate.enabled=true"
TOO_LARGE = [
    (f"{GIVEN},predictors.generate.env.QUANTIZATION=none", "predictors.generate"),
    ("predictors.enhance.enabled=true,predictors.enhance.model=openai/gpt-oss-120b", "predictors.enhance"),
    ("pipeline.enabled=true,pipeline.spec.enhance.inferenceService.model.name=openai/gpt-oss-120b", "pipeline.spec"),
]


@pytest.mark.parametrize(("words", "named"), TOO_LARGE)
def test_a_model_that_no_gpu_of_the_profile_holds_is_refused_before_anything_is_scheduled(words: str, named: str):
    done = helm("template", "it", str(CHART), "--kube-version", "1.35.0", *KSERVE, "--set", f"profile=gpu-1x24,{words}")
    assert done.returncode != 0
    assert named in done.stderr
    assert "does not fit profile gpu-1x24" in done.stderr
    roomy = "gpu-1x48" if "generate" in words else "gpu-1x80"
    assert rendered(f"--set=profile={roomy},{words}")


@pytest.mark.parametrize(
    "words",
    [
        f"{GIVEN},predictors.generate.model=moonshotai/Kimi-VL-A3B-Instruct",  # on GPUs in 8 bits by itself
        f"{GIVEN},predictors.generate.model=my/own",
        "predictors.describe.enabled=true,predictors.describe.model=s3://weights/huge",
        "pipeline.enabled=true,pipeline.spec.caption.inferenceService.model.uri=s3://weights/huge",
    ],
)
def test_what_is_not_known_is_not_judged(words: str):
    assert rendered(f"--set=profile=gpu-1x24,{words}")


def test_the_pipeline_s_own_pods_get_the_chart_s_scheduling():
    from sightline_operator.render import render_pipeline
    from sightline_operator.settings import RenderSettings

    (pipeline,) = of(rendered("-f", str(SHAPES["scaled"])), "VisionPipeline").values()
    pipeline["metadata"]["namespace"] = "vision"
    services = of(
        list(render_pipeline(pipeline, RenderSettings(), frozenset({"InferenceService"}))), "InferenceService"
    )
    assert len(services) == 2
    for service in services.values():
        pod = service["spec"]["predictor"]
        assert pod["runtimeClassName"] == "nvidia"
        assert pod["priorityClassName"] == "sightline-serving"
        assert pod["nodeSelector"] == {"pool": "large"}
        (cache,) = [item for item in pod["volumes"] if item["name"] == "cache"]
        assert cache == {"name": "cache", "persistentVolumeClaim": {"claimName": "it-sightline-cache"}}


GPU_PROFILES = ("gpu-1x24", "gpu-1x48", "gpu-1x80", "gpu-2x80")


@pytest.fixture(scope="module")
def fits() -> dict[str, Any]:
    return yaml.safe_load((CHART / "files" / "fits.yaml").read_text())


@pytest.mark.parametrize("profile", GPU_PROFILES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_profile_s_model_fits_it_as_sightline_fit_says(profile: str, kind: str, fits: dict[str, Any]):
    """And its weights are those that the profile's sentence names."""
    from sightline.fit import Wish, estimates
    from sightline.memory import GIB, MIB, PROFILES
    from sightline.models.anatomy import anatomy_of

    profiles = yaml.safe_load((CHART / "files" / "profiles.yaml").read_text())
    chosen = profiles[profile][kind]
    anatomy = anatomy_of(chosen["model"])
    way = chosen.get("quantization") or fits["default"][kind]
    scheme = next(scheme for scheme in anatomy.schemes if scheme == way or (way == "none" and scheme[0] in "bf"))
    (made,) = estimates(anatomy, PROFILES[profile], [scheme], Wish())
    assert made.fits
    assert fits["needs"][chosen["model"]][way]["usual"] == -(-made.total // MIB)
    assert fits["memory"][profile] == PROFILES[profile].memory // MIB
    said = " ".join(profiles[name]["fits"] for name in GPU_PROFILES)
    assert f"{made.weights / GIB:.1f}" in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("profile=gpu-1x24,predictors.enhance.model=openai/gpt-oss-120b", "predictors.enhance: openai/gpt-oss-120b"),
        ("profile=gpu-1x24,predictors.enhance.model=hf://openai/gpt-oss-120b", "needs 63"),
        ("profile=gpu-1x24,predictors.generate.env.QUANTIZATION=none", "predictors.generate"),
        ("profile=gpu-1x48,predictors.enhance.env.MAX_BATCH=1,predictors.enhance.model=openai/gpt-oss-120b", "22|44"),
    ],
)
def test_a_model_that_does_not_fit_its_profile_is_refused_before_anything_is_scheduled(words: str, named: str):
    kind = words.partition("predictors.")[2].partition(".")[0]
    done = helm(
        "template",
        "it",
        str(CHART),
        "--kube-version",
        "1.35.0",
        *KSERVE,
        "--set",
        words,
        "--set",
        f"predictors.{kind}.enabled=true",
    )
    assert done.returncode != 0
    assert re.search(named, done.stderr)
    assert "sightline fit" in done.stderr
    assert rendered("--set", words)  # nobody asked for it: nothing to refuse


def test_a_model_that_nobody_knows_is_the_user_s_own_affair():
    words = "profile=gpu-1x24,predictors.describe.enabled=true,predictors.describe.model=somebody/else"
    assert of(rendered("--set", words), "InferenceService")
