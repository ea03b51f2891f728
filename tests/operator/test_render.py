"""Rendering: what every child must be, what must never be in one, and what a change of the spec may touch."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from sightline.jobs.page import Location, Page, read_page
from sightline_operator.render import (
    HASH,
    RENDER_VERSION,
    RENDERED_BY,
    VERSIONS,
    RenderError,
    is_applied,
    pinned,
    render_batch,
    render_pipeline,
    retried,
    revision,
)
from sightline_operator.render.cli import as_yaml
from sightline_operator.settings import RenderSettings
from tests.operator.objects import GONE, batch, changed, pipeline
from tests.operator.rendering import DIGESTS, GOLDEN, KEYS, KNATIVE, PLAN, Case, cases, golden, golden_digest, owned

CASES = cases()
SETTINGS = RenderSettings()

Manifest = Mapping[str, Any]


def rendered(changes: dict[str, Any] | None = None, settings: RenderSettings = SETTINGS) -> dict[str, Manifest]:
    """Children by `Kind/name` without the pipeline's own name; a hash in a name is left out."""
    children = render_pipeline(owned(pipeline(changes)), settings)
    return {f"{c['kind']}/{re.sub('-[0-9a-f]{8}$', '', c['metadata']['name'])}": c for c in children}


def container(child: Manifest) -> Manifest:
    spec = child["spec"]
    pod = spec["predictor"] if child["kind"] == "InferenceService" else spec["template"]["spec"]
    return pod["containers"][0]


def environment(child: Manifest) -> dict[str, str]:
    return {item["name"]: item["value"] for item in container(child)["env"] if "value" in item}


def walk(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every field with its path; indexes of lists are left out."""
    yield path, value
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from walk(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner, path)


# --- golden files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", sorted(VERSIONS))
@pytest.mark.parametrize("name", CASES)
def test_what_a_version_renders_never_changes(name: str, version: int) -> None:
    path = golden(version, name)
    assert path.exists() or version < RENDER_VERSION, "python -m tests.operator.rendering makes new golden files"
    if path.exists():  # later versions have cases that earlier ones had not
        assert as_yaml(CASES[name].rendered(version)) == path.read_text()


def test_every_golden_file_has_its_version_and_its_case() -> None:
    found = {(path.parent.name, path.stem) for path in GOLDEN.glob("*/*.yaml")}
    assert {folder for folder, _ in found} == {f"v{version}" for version in VERSIONS}
    assert {name for _, name in found} <= CASES.keys()


def test_golden_files_are_those_that_were_agreed_on() -> None:
    found = {version: golden_digest(version) for version in VERSIONS}
    assert found == DIGESTS, "what a version renders was changed: make a new version beside it (rendering.py)"


def test_all_earlier_versions_are_still_there() -> None:
    assert sorted(VERSIONS) == list(range(1, RENDER_VERSION + 1))


# --- all children ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_children_are_deterministic_and_share_nothing(name: str) -> None:
    once, again = CASES[name].rendered(), CASES[name].rendered()
    assert as_yaml(once) == as_yaml(again)
    assert "&id" not in yaml.dump_all(once)


@pytest.mark.parametrize("name", CASES)
def test_children_have_owner_labels_and_marks(name: str) -> None:
    case = CASES[name]
    owner = case.batch or case.pipeline
    is_orphaned = case.pipeline["spec"].get("deletionPolicy") == "OrphanModels"
    for child in case.rendered():
        metadata = child["metadata"]
        assert metadata["labels"]["app.kubernetes.io/managed-by"] == "sightline-operator"
        assert metadata["labels"]["app.kubernetes.io/instance"] == owner["metadata"]["name"]
        assert metadata["labels"]["sightline.dev/pipeline"] == case.pipeline["metadata"]["name"]
        assert re.fullmatch(r"[0-9a-f]{16}", metadata["annotations"][HASH])
        assert (RENDERED_BY in metadata["annotations"]) == (child["kind"] != "InferenceService")
        assert metadata.get("namespace") == owner["metadata"].get("namespace")
        if "uid" not in owner["metadata"] or (is_orphaned and child["kind"] == "InferenceService"):
            assert "ownerReferences" not in metadata
        else:
            (reference,) = metadata["ownerReferences"]
            assert reference["uid"] == owner["metadata"]["uid"]
            assert reference["controller"]
            assert not reference["blockOwnerDeletion"]


FOREIGN = (
    r"status(\..*)?",
    r"metadata\.(uid|resourceVersion|generation|creationTimestamp|managedFields|finalizers|selfLink)",
    r"spec\.(clusterIP|clusterIPs|ipFamilies|healthCheckNodePort|ports\.nodePort)",
    r"spec\.template\.metadata\.creationTimestamp",
    r"spec\.(manualSelector|template\.spec\.(nodeName|schedulerName))",
)


@pytest.mark.parametrize("name", CASES)
def test_no_field_is_set_that_somebody_else_owns(name: str) -> None:
    for child in CASES[name].rendered():
        for path, _ in walk(child):
            assert not any(re.fullmatch(pattern, path) for pattern in FOREIGN), f"{child['kind']}: {path}"
        if child["kind"] == "Job":
            assert "selector" not in child["spec"]


@pytest.mark.parametrize("name", CASES)
def test_names_are_dns_labels(name: str) -> None:
    for child in CASES[name].rendered():
        limit = 46 if child["kind"] == "InferenceService" else 63
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", child["metadata"]["name"])
        assert len(child["metadata"]["name"]) <= limit


@pytest.mark.parametrize("name", CASES)
def test_pods_are_restricted(name: str) -> None:
    for child in CASES[name].rendered():
        if child["kind"] in ("Deployment", "Job"):
            pod = child["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["automountServiceAccountToken"] is (name == "gateway-makes-batches")
        elif child["kind"] == "InferenceService" and "model" not in child["spec"]["predictor"]:
            pod = child["spec"]["predictor"]
        else:
            continue
        assert pod["enableServiceLinks"] is False
        for each in pod["containers"]:
            security = each["securityContext"]
            assert security["readOnlyRootFilesystem"]
            assert security["runAsNonRoot"]
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not security["allowPrivilegeEscalation"]
            assert each["resources"]["limits"]["memory"]
            mounted = {m["mountPath"] for m in each["volumeMounts"]}
            assert "/tmp" in mounted, "the root file system is read-only"
            assert {m["name"] for m in each["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}


def test_children_come_in_the_order_to_be_applied() -> None:
    order = [child["kind"] for child in CASES["everything"].rendered()]
    assert list(dict.fromkeys(order)) == [
        "ServiceAccount",
        "ConfigMap",
        "InferenceService",
        "Deployment",
        "Service",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "HTTPRoute",
        "HorizontalPodAutoscaler",
        "ServiceMonitor",
    ]


@pytest.mark.parametrize("kind", ["HTTPRoute", "ServiceMonitor", "InferenceService"])
def test_a_kind_that_the_cluster_does_not_serve_is_left_out(kind: str) -> None:
    case = CASES["everything"]
    served = {c["kind"] for c in render_pipeline(case.pipeline, SETTINGS)}
    without = {c["kind"] for c in render_pipeline(case.pipeline, SETTINGS, frozenset(served - {kind}))}
    assert served - without == {kind}


def test_a_route_from_outside_leads_to_all_but_what_the_operator_asks_without_a_key() -> None:
    (route,) = (child for child in CASES["everything"].rendered() if child["kind"] == "HTTPRoute")
    by_path = {rule["matches"][0]["path"]["value"]: rule for rule in route["spec"]["rules"]}
    assert "backendRefs" not in by_path["/internal"]
    assert by_path["/"]["backendRefs"] == [{"name": "docs-gateway", "port": 8081}]


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_model_is_ready_only_with_its_weights_and_may_load_long() -> None:
    child = container(rendered({"caption.inferenceService": {"loadTimeout": "2h"}})["InferenceService/docs-caption"])
    assert child["name"] == "kserve-container"
    assert child["readinessProbe"]["httpGet"]["path"] == "/v2/models/describe/ready"
    startup = child["startupProbe"]
    assert startup["httpGet"]["path"] == "/v2/models/describe/ready"
    assert startup["periodSeconds"] * startup["failureThreshold"] == 7200
    assert child["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"


@pytest.mark.parametrize(
    ("child", "longest"), [("InferenceService/docs-caption", 75), ("Deployment/docs-gateway", 200)]
)
def test_pods_leave_their_endpoints_then_finish_what_is_running(child: str, longest: int) -> None:
    found = rendered({"caption.timeout": "75s", "gateway.deadline": {"max": "200s"}})[child]
    pod = found["spec"]["predictor"] if "predictor" in found["spec"] else found["spec"]["template"]["spec"]
    (command,) = [container(found)["lifecycle"]["preStop"]["exec"]["command"]]
    assert command[0] == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= int(command[1]) + longest


def test_a_route_gives_a_model_longer_than_the_gateway_waits() -> None:
    assert rendered({"caption.timeout": "75.2s"})["InferenceService/docs-caption"]["spec"]["predictor"]["timeout"] > 76


def test_with_a_gpu_a_pod_goes_before_its_successor_comes() -> None:
    predictor = rendered({"caption.inferenceService": {"gpu": {"count": 1}}})["InferenceService/docs-caption"]["spec"][
        "predictor"
    ]
    assert predictor["deploymentStrategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert predictor["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    ("service", "surge"),
    [({}, 1), ({"gpu": {"count": 1}, "rollout": "Availability"}, 1), ({"rollout": "ResourceAware"}, 0)],
    ids=["no GPU", "told otherwise", "asked for"],
)
def test_rollout_can_be_chosen(service: dict[str, Any], surge: int) -> None:
    found = rendered({"caption.inferenceService": service})["InferenceService/docs-caption"]
    assert found["spec"]["predictor"]["deploymentStrategy"]["rollingUpdate"]["maxSurge"] == surge


def test_a_fixed_number_of_replicas_has_no_autoscaler() -> None:
    found = rendered({"caption.inferenceService": {"replicas": {"min": 3, "max": 3}}})["InferenceService/docs-caption"]
    assert found["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "none"
    assert found["spec"]["predictor"]["minReplicas"] == found["spec"]["predictor"]["maxReplicas"] == 3


def test_scaling_by_concurrency_needs_knative() -> None:
    service = {"replicas": {"min": 1, "max": 3}, "scaling": {"metric": "Concurrency", "target": 4}}
    with pytest.raises(RenderError, match="needs KServe's Knative mode") as caught:
        rendered({"caption.inferenceService": service})
    assert caught.value.field == "spec.caption.inferenceService.scaling.metric"
    found = rendered({"caption.inferenceService": service}, KNATIVE)["InferenceService/docs-caption"]
    assert found["spec"]["predictor"]["scaleMetric"] == "concurrency"


@pytest.mark.parametrize("mode", ["Standard", "RawDeployment", "Knative", "Serverless"])
def test_the_mode_is_called_as_the_cluster_calls_it(mode: str) -> None:
    found = rendered(settings=RenderSettings(deployment_mode=mode))["InferenceService/docs-caption"]
    assert found["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == mode
    is_knative = mode in ("Knative", "Serverless")
    assert ("deploymentStrategy" in found["spec"]["predictor"]) != is_knative
    assert ("terminationGracePeriodSeconds" in found["spec"]["predictor"]) != is_knative
    assert ("lifecycle" in container(found)) != is_knative


def test_what_goes_into_pods_stays_when_only_scale_owner_or_gateway_change() -> None:
    """KServe copies an InferenceService's annotations and labels into its pods: a change of one is a new pod."""

    def copied(changes: dict[str, Any], cr: dict[str, Any] | None = None) -> tuple[Any, ...]:
        child = next(
            c
            for c in render_pipeline(cr or owned(pipeline(changes)), SETTINGS)
            if c["metadata"]["name"] == "docs-caption" and c["kind"] == "InferenceService"
        )
        return child["metadata"]["annotations"], child["metadata"]["labels"], child["spec"]["predictor"]["containers"]

    scale = "caption.inferenceService.replicas"
    before = copied({scale: {"min": 1, "max": 4}})
    assert copied({scale: {"min": 2, "max": 6}}) == before
    assert copied({scale: {"min": 1, "max": 4}, "gateway.logLevel": "debug"}) == before
    assert copied({scale: {"min": 1, "max": 4}, "caption.inferenceService.rollout": "ResourceAware"}) == before
    assert copied({scale: {"min": 1, "max": 4}, "enhance.timeout": "20s"}) == before
    assert copied({scale: {"min": 1, "max": 4}, "deletionPolicy": "OrphanModels"}) == before
    recreated = owned(pipeline({scale: {"min": 1, "max": 4}}))
    recreated["metadata"]["uid"] = "another"
    assert copied({}, recreated) == before
    assert copied({scale: {"min": 1, "max": 4}, "caption.inferenceService.model": {"name": "org/vlm"}}) != before


def test_a_change_of_scale_is_still_a_change() -> None:
    live = rendered({"caption.inferenceService.replicas": {"min": 1, "max": 4}})["InferenceService/docs-caption"]
    same = rendered({"caption.inferenceService.replicas": {"min": 1, "max": 4}})["InferenceService/docs-caption"]
    wider = rendered({"caption.inferenceService.replicas": {"min": 1, "max": 5}})["InferenceService/docs-caption"]
    orphan = rendered({"caption.inferenceService.replicas": {"min": 1, "max": 4}, "deletionPolicy": "OrphanModels"})[
        "InferenceService/docs-caption"
    ]
    assert is_applied(same, live)
    assert not is_applied(wider, live)
    assert not is_applied(orphan, live)
    stranger = {**live, "metadata": {**live["metadata"], "annotations": {}}}
    assert not is_applied(same, stranger)


def test_weights_come_from_the_hub_a_store_or_the_image() -> None:
    hub = {"name": "org/vlm", "revision": "abc", "tokenSecretRef": {"name": "hub", "key": "token"}}
    found = rendered({"caption.inferenceService.model": hub})["InferenceService/docs-caption"]
    assert environment(found)["MODEL"] == "org/vlm"
    assert environment(found)["REVISION"] == "abc"
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}} in container(found)[
        "env"
    ]
    stored = rendered({"caption.inferenceService.model": {"uri": "s3://weights/qwen"}})["InferenceService/docs-caption"]
    assert environment(stored)["STORAGE_URI"] == "s3://weights/qwen"
    assert environment(stored)["MODEL"] == "/mnt/models"
    assert "MODEL" not in environment(rendered()["InferenceService/docs-caption"])


def test_a_runtime_of_somebody_else_says_itself_what_runs() -> None:
    predictor = next(c for c in CASES["runtime"].rendered() if c["metadata"]["name"] == "docs-enhance")["spec"][
        "predictor"
    ]
    assert predictor["model"]["runtime"] == "vllm"
    assert predictor["model"]["storageUri"] == "hf://org/llm"
    assert "containers" not in predictor


def test_models_have_no_route_from_outside() -> None:
    for child in rendered().values():
        if child["kind"] == "InferenceService":
            assert child["metadata"]["labels"]["networking.kserve.io/visibility"] == "cluster-local"


def test_suspend_stops_models_and_gateway() -> None:
    children = rendered({"suspend": True, "gateway.autoscaling": {"maxReplicas": 3}})
    for name in ("caption", "enhance"):
        stop = children[f"InferenceService/docs-{name}"]["metadata"]["annotations"]["serving.kserve.io/stop"]
        assert stop == "true"
    assert children["Deployment/docs-gateway"]["spec"]["replicas"] == 0
    assert "HorizontalPodAutoscaler/docs-gateway" not in children
    assert "serving.kserve.io/stop" not in rendered()["InferenceService/docs-caption"]["metadata"]["annotations"]


# --- the gateway -----------------------------------------------------------------------------------------------------


def test_replicas_are_the_autoscalers_where_there_is_one() -> None:
    assert rendered({"gateway.replicas": 4})["Deployment/docs-gateway"]["spec"]["replicas"] == 4
    scaled = rendered({"gateway.replicas": 4, "gateway.autoscaling": {"maxReplicas": 9}})
    assert "replicas" not in scaled["Deployment/docs-gateway"]["spec"]
    assert scaled["HorizontalPodAutoscaler/docs-gateway"]["spec"]["maxReplicas"] == 9


def test_another_configuration_is_another_config_map() -> None:
    def name(changes: dict[str, Any]) -> str:
        children = render_pipeline(owned(pipeline(changes)), SETTINGS)
        config = next(c for c in children if c["kind"] == "ConfigMap")
        gateway = next(c for c in children if c["kind"] == "Deployment")
        assert container(gateway)["envFrom"] == [{"configMapRef": {"name": config["metadata"]["name"]}}]
        assert config["immutable"]
        return config["metadata"]["name"]

    assert name({}) == name({"gateway.replicas": 3})
    assert name({}) != name({"gateway.logLevel": "debug"})


@pytest.mark.parametrize(
    ("step", "url", "model", "protocol"),
    [
        ({"inferenceService": {}}, "http://docs-caption-predictor.default.svc.cluster.local", "describe", "v2"),
        ({"inferenceServiceRef": {"name": "x"}}, "http://x-predictor.default.svc.cluster.local", "x", "v2"),
        (
            {"inferenceServiceRef": {"name": "x", "model": "m", "protocol": "OpenAI", "path": "/openai"}},
            "http://x-predictor.default.svc.cluster.local/openai",
            "m",
            "openai",
        ),
        ({"endpoint": {"url": "https://a.example/v1", "model": "m"}}, "https://a.example/v1", "m", "openai"),
    ],
    ids=["owned", "referenced", "referenced, OpenAI", "endpoint"],
)
def test_the_gateway_is_told_where_the_caption_step_is(
    step: dict[str, Any], url: str, model: str, protocol: str
) -> None:
    data = rendered({"caption": step})["ConfigMap/docs-gateway"]["data"]
    told = (data["DESCRIBE_URL"], data["DESCRIBE_MODEL"], data["DESCRIBE_PROTOCOL"])
    assert told == (url, model, protocol)


def test_an_address_that_kserve_told_wins() -> None:
    children = render_pipeline(
        owned(pipeline()), SETTINGS, addresses={"docs-caption": "http://docs-caption-predictor.default.svc:8080"}
    )
    data = next(c for c in children if c["kind"] == "ConfigMap")["data"]
    assert data["DESCRIBE_URL"] == "http://docs-caption-predictor.default.svc:8080"
    assert data["ENHANCE_URL"] == "http://docs-enhance-predictor.default.svc.cluster.local"


def test_without_an_enhance_step_there_is_no_trace_of_one() -> None:
    for changes in ({"enhance": GONE}, {"enhancePolicy": {"default": "Never"}}):
        children = rendered(changes)
        assert "InferenceService/docs-enhance" not in children
        assert "ENHANCE_URL" not in children["ConfigMap/docs-gateway"]["data"]


def test_a_step_with_two_places_is_refused() -> None:
    both = {"inferenceService": {}, "endpoint": {"url": "https://a.example", "model": "m"}}
    with pytest.raises(RenderError, match=r"spec\.caption: exactly one of"):
        rendered({"caption": both})
    with pytest.raises(RenderError, match=r"spec\.caption: exactly one of"):
        rendered({"caption": {}})


def test_secrets_are_named_and_never_held() -> None:
    pods = CASES["everything"].rendered()
    gateway = next(c for c in pods if c["kind"] == "Deployment")
    volumes = {v["name"]: v["secret"] for v in gateway["spec"]["template"]["spec"]["volumes"] if "secret" in v}
    assert volumes["api-keys"]["secretName"] == "keys"
    assert volumes["enhance-authority"]["items"] == [{"key": "ca.pem", "path": "ca.crt"}]
    named = {e["name"] for e in container(gateway)["env"] if "secretKeyRef" in e.get("valueFrom", {})}
    assert named == {"ENHANCE_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"}
    for child in pods:
        assert child["kind"] != "Secret"


def test_who_may_talk_to_whom() -> None:
    children = rendered({"storage": {"s3": {"bucket": "images", "endpoint": "http://10.0.0.7:9000"}}})
    model = children["NetworkPolicy/docs-caption"]["spec"]
    (source,) = model["ingress"]
    assert source["from"] == [
        {"podSelector": {"matchLabels": children["Deployment/docs-gateway"]["spec"]["selector"]["matchLabels"]}}
    ]
    assert [rule for rule in model["egress"] if "to" in rule] == [], "a demonstration model needs no way out"
    gateway = children["NetworkPolicy/docs-gateway"]["spec"]
    assert {"to": [{"ipBlock": {"cidr": "10.0.0.7/32"}}], "ports": [{"protocol": "TCP", "port": 9000}]} in gateway[
        "egress"
    ]
    for name in ("gateway", "caption", "enhance", "worker"):
        assert children[f"NetworkPolicy/docs-{name}"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert not any(name.startswith("NetworkPolicy") for name in rendered({"networkPolicy": "Unmanaged"}))


def test_policies_select_the_pods_that_are_rendered() -> None:
    children = rendered()
    for name in ("caption", "enhance"):
        selector = children[f"NetworkPolicy/docs-{name}"]["spec"]["podSelector"]["matchLabels"]
        assert selector.items() <= children[f"InferenceService/docs-{name}"]["metadata"]["labels"].items()
    worker = children["NetworkPolicy/docs-worker"]["spec"]["podSelector"]["matchLabels"]
    jobs = render_batch(owned(batch()), owned(pipeline()), PLAN, SETTINGS)
    assert worker.items() <= jobs["run"]["spec"]["template"]["metadata"]["labels"].items()
    own = jobs["policy"]["spec"]["podSelector"]["matchLabels"]
    assert own.items() <= jobs["run"]["spec"]["template"]["metadata"]["labels"].items()


def test_overrides_are_laid_over_pods() -> None:
    over = {
        "metadata": {"labels": {"team": "vision", "sightline.dev/pipeline": "stolen"}},
        "spec": {
            "runtimeClassName": "gvisor",
            "containers": [
                {"name": "gateway", "resources": {"limits": {"memory": "3Gi"}}},
                {"name": "proxy", "image": "proxy:1"},
            ],
        },
    }
    template = rendered({"gateway.podTemplateOverrides": over})["Deployment/docs-gateway"]["spec"]["template"]
    assert template["metadata"]["labels"]["team"] == "vision"
    assert template["metadata"]["labels"]["sightline.dev/pipeline"] == "docs", "what selects the pods stays ours"
    assert template["spec"]["runtimeClassName"] == "gvisor"
    first, second = template["spec"]["containers"]
    assert first["resources"]["limits"]["memory"] == "3Gi"
    assert first["image"] == "sightline-pipeline:0.1.0"
    assert second["image"] == "proxy:1"


def test_overrides_of_the_wrong_shape_are_refused_by_field() -> None:
    with pytest.raises(RenderError, match=r"spec\.gateway\.podTemplateOverrides.*spec\.containers.*must be a list"):
        rendered({"gateway.podTemplateOverrides": {"spec": {"containers": {"name": "gateway"}}}})


# --- versions and revisions ------------------------------------------------------------------------------------------


def seen(cr: dict[str, Any], **status: Any) -> dict[str, Any]:
    metadata = {**cr["metadata"], "generation": 4}
    return {**cr, "metadata": metadata, "status": {"observedGeneration": 4, "renderVersion": 1, **status}}


def test_an_upgrade_of_the_operator_changes_no_image() -> None:
    before = seen(owned(pipeline()), images=dict(SETTINGS.images))
    upgraded = RenderSettings(images={name: f"sightline-{name}:0.2.0" for name in SETTINGS.images})
    assert as_yaml(render_pipeline(before, upgraded)) == as_yaml(render_pipeline(before, SETTINGS))
    edited = {**before, "metadata": {**before["metadata"], "generation": 5}}
    assert "sightline-describe:0.2.0" in as_yaml(render_pipeline(edited, upgraded))
    told = {**before, "spec": {**before["spec"], "updatePolicy": "WithOperator"}}
    assert "sightline-describe:0.2.0" in as_yaml(render_pipeline(told, upgraded))


def test_a_version_that_this_operator_does_not_know_is_as_good_as_none() -> None:
    assert pinned(seen(owned(pipeline()), renderVersion=99), SETTINGS).version == RENDER_VERSION
    assert pinned(owned(pipeline()), SETTINGS).version == RENDER_VERSION


@pytest.mark.parametrize(
    "changes",
    [
        {"caption.prompt": "What?"},
        {"caption.generation": {"temperature": 0.5}},
        {"caption.inferenceService": {"model": {"name": "org/vlm"}}},
        {"caption.inferenceService": {"model": {"name": "org/vlm", "revision": "abc"}}},
        {"caption.inferenceService": {"quantization": "8bit"}},
        {"caption.inferenceService": {"args": ["--max-width=900"]}},
        {"caption": {"inferenceServiceRef": {"name": "x"}}},
        {"enhance": GONE},
        {"enhancePolicy": {"default": "OnRequest"}},
        {"enhance.generation": {"reasoningEffort": "high"}},
    ],
    ids=lambda changes: json.dumps(changes, default=str),
)
def test_what_changes_answers_changes_the_revision(changes: dict[str, Any]) -> None:
    assert revision(pipeline(changes)) != revision(pipeline())


@pytest.mark.parametrize(
    "changes",
    [
        {"caption.timeout": "50s"},
        {"caption.inferenceService": {"replicas": {"min": 1, "max": 4}}},
        {"caption.inferenceService": {"gpu": {"count": 1}}},
        {"gateway.replicas": 4},
        {"gateway.logLevel": "debug"},
        {"suspend": True},
        {"networkPolicy": "Unmanaged"},
        {"enhancePolicy": {"default": "Always"}},
    ],
    ids=lambda changes: json.dumps(changes, default=str),
)
def test_what_does_not_leaves_running_batches_alone(changes: dict[str, Any]) -> None:
    assert revision(pipeline(changes)) == revision(pipeline())


def test_a_token_is_no_part_of_the_revision() -> None:
    named = {"caption.inferenceService": {"model": {"name": "org/vlm"}}}
    token = {"caption.inferenceService": {"model": {"name": "org/vlm", "tokenSecretRef": {"name": "a", "key": "b"}}}}
    assert revision(pipeline(named)) == revision(pipeline(token))


# --- batches ---------------------------------------------------------------------------------------------------------


def jobs(changes: dict[str, Any] | None = None, plan: Mapping[str, Any] | None = PLAN) -> dict[str, dict[str, Any]]:
    return render_batch(owned(batch(changes)), owned(pipeline({"gateway.auth": KEYS})), plan, SETTINGS)


def test_run_and_finish_wait_for_the_plan() -> None:
    assert list(jobs(plan=None)) == ["configuration", "policy", "plan"]
    assert list(jobs()) == ["configuration", "policy", "plan", "run", "finish"]
    assert list(jobs(plan={"shards": 0, "items": 0})) == ["configuration", "policy", "plan", "finish"]
    assert list(jobs({"dryRun": True})) == ["configuration", "policy", "plan"]


def test_a_run_is_one_indexed_job() -> None:
    spec = jobs({"parallelism": 8, "completionWindow": "2h"})["run"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == 3
    assert spec["parallelism"] == 3, "no more workers than shards"
    assert spec["backoffLimitPerIndex"] == 5
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["activeDeadlineSeconds"] == 7200
    assert spec["suspend"] is False
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_failures_are_judged_in_the_order_of_the_contract() -> None:
    def told(name: str) -> list[tuple[str, Any]]:
        rules = jobs()[name]["spec"]["podFailurePolicy"]["rules"]
        return [(rule["action"], rule.get("onExitCodes", {}).get("values", "DisruptionTarget")) for rule in rules]

    assert told("run") == [
        ("Ignore", "DisruptionTarget"),
        ("FailJob", [42]),
        ("FailIndex", [43]),
        ("FailJob", [44]),
        ("Ignore", [75, 143]),
        ("Count", [42, 43, 44, 75, 143]),
    ]
    assert "FailIndex" not in [action for action, _ in told("plan") + told("finish")], "they have no index"


def test_a_queue_holds_the_run_until_it_admits_it() -> None:
    run = jobs({"queueName": "vision", "minParallelism": 2})["run"]
    assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "vision"
    assert run["metadata"]["annotations"]["kueue.x-k8s.io/job-min-parallelism"] == "2"
    assert run["spec"]["suspend"] is True
    for other in ("plan", "finish"):
        assert "kueue.x-k8s.io/queue-name" not in jobs({"queueName": "vision"})[other]["metadata"]["labels"]


def test_names_of_jobs_follow_from_what_decides_the_results() -> None:
    assert jobs()["plan"]["metadata"]["name"] == "night-plan"
    assert re.fullmatch(r"night-run-[0-9a-f]{6}", jobs()["run"]["metadata"]["name"])
    assert jobs()["run"]["metadata"]["name"] == jobs({"parallelism": 9})["run"]["metadata"]["name"]
    assert jobs()["run"]["metadata"]["name"] != jobs({"options": {"prompt": "What?"}})["run"]["metadata"]["name"]
    told = jobs(plan={**PLAN, "fingerprint": "abcdef012345"})
    assert told["run"]["metadata"]["name"] == "night-run-abcdef"


def test_a_batch_holds_to_the_revision_that_it_began_with() -> None:
    begun = {**owned(batch()), "status": {"pipelineRevision": "0123456789ab"}}
    page = json.loads(render_batch(begun, owned(pipeline()), None, SETTINGS)["configuration"]["data"]["batch.json"])
    assert page["pipeline"]["revision"] == "0123456789ab"


def test_workers_are_told_what_to_do_and_nothing_secret() -> None:
    secret = {"credentialsSecretRef": {"name": "cloud"}}
    children = jobs({"output.s3": {"bucket": "captions", **secret}})
    page = json.loads(children["configuration"]["data"]["batch.json"])
    assert page["pipeline"]["url"] == "http://docs-gateway.default.svc.cluster.local"
    assert page["pipeline"]["apiKeyFile"] == "/etc/sightline/keys/api-keys"
    assert page["credentials"] == {"output": "/etc/sightline/credentials/output"}
    for name in ("plan", "run", "finish"):
        pod = children[name]["spec"]["template"]["spec"]
        assert pod["containers"][0]["args"] == [name]
        secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
        assert secrets == {"api-keys": "keys", "output-credentials": "cloud"}
        assert pod["terminationGracePeriodSeconds"] >= 130


def page_of(name: str) -> Page:
    """What the workers themselves read of the page of a golden case."""
    (config,) = (child for child in CASES[name].rendered() if child["kind"] == "ConfigMap")
    return read_page(config["data"]["batch.json"])


def test_the_workers_read_the_page() -> None:
    page = page_of("batch")
    assert (page.name, page.shard_size, page.chunk_size, page.max_attempts) == ("night", 1000, 50, 3)
    assert page.input.location == Location(
        "s3://images/",
        endpoint="http://minio.storage.svc:9000",
        path_style=True,
        credentials=Path("/etc/sightline/credentials/input"),
    )
    assert page.outputs.location.url == "s3://captions/"
    assert page.target.revision
    assert not page.dry_run
    assert page_of("batch-dry").dry_run


def test_an_upload_lies_in_the_pipelines_storage_and_so_do_its_results() -> None:
    page = page_of("batch-upload")
    assert (page.input.kind, page.target.kind) == ("upload", "openai")
    assert page.input.location.url == "s3://images/sightline/uploads/file-1"
    assert page.input.location.credentials == Path("/etc/sightline/credentials/input")
    assert page.outputs.location.url == "s3://images/sightline/batches/"
    for spec in ({"input": {"upload": {"fileId": "f"}}}, {"output": GONE}):
        with pytest.raises(RenderError, match="needs VisionPipeline docs to have a storage"):
            jobs(spec)


def test_a_batch_goes_on_writing_where_it_began() -> None:
    begun = owned(batch({"output": GONE})) | {"status": {"output": {"bucket": "before", "prefix": "x/"}}}
    moved = owned(pipeline({"storage": {"s3": {"bucket": "after"}}}))
    page = json.loads(render_batch(begun, moved, None, SETTINGS)["configuration"]["data"]["batch.json"])
    assert page["output"]["s3"] == {"bucket": "before", "prefix": "x/", "pathStyle": False}


def test_a_list_of_images_lies_in_the_outputs_store_unless_it_says_otherwise() -> None:
    page = page_of("batch-manifest")
    assert (page.input.location.url, page.input.format) == ("s3://lists/a/list.csv", "CSV")
    assert page.input.location.endpoint == "http://minio.storage.svc:9000"
    assert page.input.location.credentials == Path("/etc/sightline/credentials/input")
    assert (page.outputs.existing, page.outputs.parquet, page.options.reuse) == ("append", True, True)
    assert page.outputs.sidecars is not None
    assert page.outputs.sidecars.credentials == Path("/etc/sightline/credentials/sidecars")
    own = {"input.manifest": {"uri": "s3://lists/x", "region": "eu-west-1"}, "input.s3Prefix": GONE}
    children = jobs(own | {"output.s3": {"bucket": "captions", "credentialsSecretRef": {"name": "cloud"}}})
    elsewhere = read_page(children["configuration"]["data"]["batch.json"]).input.location
    assert (elsewhere.region, elsewhere.endpoint, elsewhere.credentials) == ("eu-west-1", None, None)


def test_a_retry_reads_the_earlier_batch_and_its_images() -> None:
    page = page_of("batch-retry")
    assert (page.input.kind, page.input.only) == ("retry_of", "Unenhanced")
    assert page.input.location.url == "s3://captions/9b2f/0123456789ab/"
    assert page.input.images is not None
    assert page.input.images.url == "s3://images/"
    assert page.input.images.credentials == Path("/etc/sightline/credentials/images")
    with pytest.raises(RenderError, match="VisionBatch other is not known"):
        jobs({"input": {"retryOf": {"batchName": "other"}}})


@pytest.mark.parametrize(
    ("source", "form", "has_images"),
    [
        ({"s3Prefix": {"bucket": "images"}}, "JSONL", True),
        ({"manifest": {"uri": "s3://lists/x", "format": "OpenAIBatch"}}, "OpenAIBatch", True),
        ({"upload": {"fileId": "f"}}, "OpenAIBatch", False),
    ],
)
def test_a_retry_of_a_retry_asks_as_the_first_batch_did(source: dict[str, Any], form: str, has_images: bool) -> None:
    def done(cr: dict[str, Any], uid: str, **status: Any) -> dict[str, Any]:
        return cr | {"metadata": cr["metadata"] | {"uid": uid}, "status": {"fingerprint": "f" * 12, **status}}

    first = retried(done(batch({"input": source}), "1"))
    assert first is not None
    assert (first["format"], "images" in first) == (form, has_images)
    assert first["output"]["prefix"] == f"1/{'f' * 12}/"
    second = retried(done(batch({"input": {"retryOf": {"batchName": "night"}}}), "2", retryOf=first))
    assert second is not None
    assert second == first | {"output": first["output"] | {"prefix": f"2/{'f' * 12}/"}}
    assert retried(batch({"input": source})) is None, "never planned"


def test_workers_know_the_region_and_reach_the_gateway_past_a_proxy() -> None:
    cr = owned(batch({"output.s3": {"bucket": "captions", "region": "eu-central-1"}}))
    settings = RenderSettings(worker_env={"HTTPS_PROXY": "http://10.0.0.9:3128", "NO_PROXY": ".local"})
    children = render_batch(cr, owned(pipeline()), None, settings)
    said = environment(children["plan"])
    assert said["AWS_REGION"] == "eu-central-1"
    assert said["HTTPS_PROXY"] == "http://10.0.0.9:3128"
    assert said["NO_PROXY"] == ".local,docs-gateway.default.svc.cluster.local"
    proxy = {"to": [{"ipBlock": {"cidr": "10.0.0.9/32"}}], "ports": [{"protocol": "TCP", "port": 3128}]}
    assert proxy in children["policy"]["spec"]["egress"]
    assert "NO_PROXY" not in environment(jobs()["plan"])


def test_two_identities_fit_into_no_pod() -> None:
    one, other = ({"bucket": "images", "serviceAccountName": name} for name in ("reader", "writer"))
    with pytest.raises(RenderError, match=r"reader.*and a pod has one"):
        jobs({"input.s3Prefix": one, "output.s3": other})
    pod = jobs({"input.s3Prefix": one, "output.s3": {"bucket": "captions"}})["plan"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "reader"


def test_a_gateway_keeps_its_jobs_in_the_storage_and_makes_batches_where_that_was_asked_for() -> None:
    def gateway(changes: dict[str, Any] | None = None) -> Manifest:
        return rendered(changes)["ConfigMap/docs-gateway"]["data"]

    assert gateway()["JOB_STORE"] == "file:///var/lib/sightline/jobs"
    stored = gateway({"storage": {"s3": {"bucket": "images"}}})
    assert (stored["JOB_STORE"], "BATCH_BACKEND" in stored) == ("s3://images/sightline", False)
    makes = {"storage": {"s3": {"bucket": "images", "prefix": ""}}, "gateway.batches": "VisionBatches"}
    assert gateway(makes)["JOB_STORE"] == "s3://images"
    assert (gateway(makes)["BATCH_BACKEND"], gateway(makes)["BATCH_PIPELINE"]) == ("kubernetes", "docs")


def test_a_pause_and_a_wider_window_leave_the_pods_as_they_are() -> None:
    before, paused = jobs()["run"]["spec"], jobs({"desiredState": "Paused", "maxInFlightPerWorker": 2})["run"]["spec"]
    assert paused["suspend"] is True
    assert paused["template"] == before["template"]


@pytest.mark.parametrize("name", ["a" * 40, "a" * 31 + "-" + "b" * 8])
def test_long_names_stay_apart(name: str) -> None:
    cr = owned(pipeline({"storage": {"s3": {"bucket": "images"}}}, name=name))
    names = [(c["kind"], c["metadata"]["name"]) for c in render_pipeline(cr, SETTINGS)]
    assert len(set(names)) == len(names)
    assert all(len(each) <= 63 for _, each in names)
    job = render_batch(owned(batch(name="b" * 52)), cr, PLAN, SETTINGS)["run"]["metadata"]["name"]
    assert len(job) <= 63


def test_cases_change_below_spec_as_they_say() -> None:
    """Of the helper that all of this stands on."""
    assert changed({"a": {"b": 1}}, {"a.b": GONE, "a.c": 2}) == {"a": {"c": 2}}
    assert isinstance(CASES["minimal"], Case)
