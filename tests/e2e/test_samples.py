"""Every file of manifests/samples, applied: what can work on this cluster works, the rest says what it lacks."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.conftest import ROOT
from tests.e2e.conftest import Cluster
from tests.e2e.test_quick import is_over, results, seeded
from tests.scenes import RED_CIRCLE, red_circle

SAMPLES = ROOT / "manifests" / "samples"
SMALL = {"requests": {"cpu": "50m", "memory": "768Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}}
TRIED = {"demo.yaml", "batch.yaml", "gpu.yaml", "nightly.yaml", "openai.yaml", "referenced.yaml"}


def test_no_sample_is_forgotten_here():
    assert {file.name for file in SAMPLES.glob("*.yaml")} == TRIED


class Applied:
    """A sample that is there, and is gone when its test ends."""

    def __init__(self, cluster: Cluster, file: str) -> None:
        self.cluster = cluster
        self.manifest: dict[str, Any] = yaml.safe_load((SAMPLES / file).read_text())
        self.kind, self.name = self.manifest["kind"], self.manifest["metadata"]["name"]
        cluster.kubectl("apply", "-f", str(SAMPLES / file))

    def condition(self, type_: str) -> dict[str, Any]:
        return self.cluster.condition(self.kind, self.name, type_)

    def says(self, type_: str, status: str, reason: str, part: str = "") -> None:
        def is_so() -> bool:
            found = self.condition(type_)
            told = (found.get("status"), found.get("reason"))
            return told == (status, reason) and part in (found.get("message") or "")

        what = f"{self.name}: {type_} is {status}, {reason}, {part!r}"
        try:
            self.cluster.until(is_so, what)
        except AssertionError as error:
            raise AssertionError(f"{what}; it is {self.condition(type_)}\n{error}") from None

    def patch(self, spec: dict[str, Any]) -> None:
        self.cluster.kubectl("patch", self.kind, self.name, "--type=merge", "-p", json.dumps({"spec": spec}))

    def shrink(self) -> None:
        """What a pod asks for by default may be more than a small node has left."""
        own = (
            {"inferenceService": {"resources": SMALL}} if "inferenceService" in self.manifest["spec"]["caption"] else {}
        )
        gateway = {"resources": {"requests": {"cpu": "50m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}}}
        self.patch({"caption": own, "gateway": gateway})

    def captions(self, api_key: str, **fields: str) -> dict[str, Any]:
        with self.cluster.forwarded(f"service/{self.name}-gateway", 80) as url:
            headers = {"X-API-Key": api_key}
            files = {"image": red_circle()}
            answer = httpx.post(
                f"{url}/caption", files=files, data=fields, headers=headers, timeout=180, trust_env=False
            )
        assert answer.status_code == 200, answer.text
        return answer.json()

    def remove(self) -> None:
        self.cluster.kubectl("delete", self.kind, self.name, "--ignore-not-found", "--wait=true")
        owned = f"sightline.dev/pipeline={self.name}"
        if self.kind == "VisionPipeline":  # its CPU is needed by the next
            self.cluster.until(lambda: not self.cluster.all("pods", owned), f"the pods of {self.name} are gone", 300)


@pytest.fixture
def sample(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Applied]:
    applied = Applied(cluster, request.param)
    yield applied
    applied.remove()


@pytest.fixture
def minio(cluster: Cluster) -> Iterator[None]:
    """The sample's store under its address, minio.storage.svc:9000: another name of ours."""
    there = {"type": "ExternalName", "externalName": f"s3.{cluster.namespace}.svc.cluster.local"}
    cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "storage"}})
    spec = {**there, "ports": [{"port": 9000}]}
    Cluster("storage").apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "minio"}, "spec": spec})
    given = {"AWS_ACCESS_KEY_ID": "e2e-access", "AWS_SECRET_ACCESS_KEY": "e2e-secret-key"}
    for name in ("images", "captions"):
        cluster.apply({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": given})
    yield
    cluster.kubectl("delete", "secret", "images", "captions")
    cluster.kubectl("delete", "namespace", "storage", "--wait=true")


@pytest.mark.parametrize("sample", ["demo.yaml"], indirect=True)
@pytest.mark.usefixtures("minio")
def test_demo_and_batch(sample: Applied, cluster: Cluster, store: Any, api_key: str):
    truth = seeded(store, "holidays/", 40, seed=8)
    sample.says("Ready", "True", "AllReady")
    said = sample.captions(api_key)
    assert said["enhanced"]
    assert RED_CIRCLE in said["original_caption"]
    holidays = Applied(cluster, "batch.yaml")
    try:
        cluster.until(lambda: is_over(cluster, holidays.name), "the batch is over")
        assert holidays.condition("Complete")["reason"] == "Succeeded"
        batch = cluster.get("vbatch", holidays.name)
        assert batch is not None
        rows = results(store, batch)
        assert sorted(row["custom_id"] for row in rows) == sorted(truth)
        assert all(row["enhanced"] for row in rows)
    finally:
        holidays.remove()


@pytest.mark.parametrize("sample", ["gpu.yaml"], indirect=True)
def test_gpu_says_what_this_cluster_lacks(sample: Applied, cluster: Cluster):
    if not cluster.kubectl("get", "crd", "httproutes.gateway.networking.k8s.io", "--ignore-not-found", "-o", "name"):
        sample.says("Accepted", "False", "CRDMissing", "Gateway API")
    sample.says("EnhanceReady", "False", "InsufficientGPU", "nvidia.com/gpu")
    sample.says("CaptionReady", "False", "Deploying", 'persistentvolumeclaim "hub-cache" not found')
    sample.says("GatewayReady", "False", "Deploying", 'serviceaccount "images-reader" not found')
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    cluster.apply(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "hub-cache"}, "spec": claim}
    )
    try:
        sample.says("CaptionReady", "False", "InsufficientGPU", "nvidia.com/gpu")
    finally:
        cluster.kubectl("delete", "pvc", "hub-cache", "--wait=false")


@pytest.mark.parametrize("sample", ["nightly.yaml"], indirect=True)
def test_nightly(sample: Applied, cluster: Cluster, api_key: str):
    sample.shrink()
    sample.says("Ready", "True", "AllReady")
    assert RED_CIRCLE in sample.captions(api_key)["caption"]
    target = cluster.get("hpa", "archive-caption-predictor")
    assert target is not None
    assert (target["spec"]["minReplicas"], target["spec"]["maxReplicas"]) == (1, 4)

    def schedule() -> dict[str, Any]:
        pipeline = cluster.get("vpipe", "archive") or {}
        return next(iter(pipeline["status"].get("schedules") or []), {})

    assert "T" in cluster.until(schedule, "the schedule is known")["nextScheduleTime"]
    template = sample.manifest["spec"]["batches"][0]
    sample.patch({"batches": [{**template, "schedule": "* * * * *"}]})  # three o'clock is far
    name = cluster.until(lambda: schedule().get("lastBatch"), "its batch is made", 180)
    if not cluster.kubectl("get", "crd", "localqueues.kueue.x-k8s.io", "--ignore-not-found", "-o", "name"):
        admitted = lambda: cluster.condition("vbatch", name, "Admitted")  # noqa: E731
        cluster.until(lambda: admitted().get("reason") == "QueueNotFound", "that there is no Kueue is said", 120)


@pytest.mark.parametrize("sample", ["openai.yaml"], indirect=True)
def test_openai_captions_while_its_model_is_not_there(sample: Applied, cluster: Cluster, api_key: str):
    sample.shrink()
    sample.says("GatewayReady", "False", "SecretNotFound", '"llm"')
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "llm"}, "stringData": {"key": "nobody"}}
    cluster.apply(secret)
    try:
        sample.says("Ready", "True", "DegradedButServing", "llm.example.com")
        sample.says("EnhanceReady", "False", "EndpointUnreachable", "llm.example.com")
        said = sample.captions(api_key, use_gpt_oss="true")
        assert RED_CIRCLE in said["caption"]
        assert said["enhanced"] is False
        assert said["enhancement_error"]["code"]
    finally:
        cluster.kubectl("delete", "secret", "llm")


@pytest.mark.parametrize("sample", ["referenced.yaml"], indirect=True)
def test_referenced(sample: Applied, cluster: Cluster):
    sample.says("Accepted", "False", "InvalidReference", "team-captioner")
    image = cluster.all("isvc")[0]["spec"]["predictor"]["containers"][0]["image"]
    container = {
        "name": "kserve-container",
        "image": image,
        "args": ["describe"],
        "env": [{"name": "AUTH", "value": "off"}],
        "resources": SMALL,
        "readinessProbe": {"httpGet": {"path": "/v2/models/describe/ready", "port": 8080}, "periodSeconds": 2},
    }
    team = {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": "team-captioner",
            "annotations": {"serving.kserve.io/deploymentMode": "Standard"},
        },
        "spec": {"predictor": {"containers": [container]}},
    }
    cluster.apply(team)
    try:
        sample.shrink()
        sample.says("Ready", "True", "AllReady")
        assert RED_CIRCLE in sample.captions("nobody asks")["caption"]
        theirs = cluster.get("isvc", "team-captioner")
        assert theirs is not None
        assert "sightline.dev/pipeline" not in theirs["metadata"].get("labels", {})
    finally:
        cluster.kubectl("delete", "isvc", "team-captioner", "--wait=true")
