"""What a cluster does to a pipeline, and what is left of it: five models, repairs, a late GPU, rolls and losses."""

import contextlib
import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import tritonclient.http as triton
from numpy import array, object_

from tests.conftest import ROOT
from tests.e2e.conftest import PIPELINE, RELEASE, Cluster
from tests.e2e.test_quick import batch, is_over, results, seeded
from tests.scenes import RED_CIRCLE, red_circle

pytestmark = pytest.mark.usefixtures("gateway")
CHART = ROOT / "charts" / "sightline"


def helm(*words: str) -> None:
    done = subprocess.run(["helm", *words], capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


def pipeline_pods(cluster: Cluster, parts: str = "caption,enhance,gateway") -> set[str]:
    pods = cluster.all("pods", f"sightline.dev/pipeline={PIPELINE},app.kubernetes.io/component in ({parts})")
    return {pod["metadata"]["uid"] for pod in pods if "deletionTimestamp" not in pod["metadata"]}


def model_pods(cluster: Cluster) -> set[str]:
    return pipeline_pods(cluster, "caption,enhance")


def caption(gateway: httpx.Client, **fields: Any) -> httpx.Response:
    return gateway.post("/caption", files={"image": red_circle()}, data=fields)


# --- every model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="class")
def five(cluster: Cluster) -> Iterator[None]:
    """All five predictors of the chart, beside the pipeline's own two."""
    small = {"requests": {"cpu": "50m", "memory": "768Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}}
    on = {name: {"enabled": True, "resources": small} for name in ("describe", "generate", "embed", "enhance", "blip")}
    words = ("upgrade", RELEASE, str(CHART), "-n", cluster.namespace, "--reuse-values")
    helm(*words, "--set-json", f"predictors={json.dumps(on)}")
    yield
    helm(*words, "--set-json", f"predictors={json.dumps({name: {'enabled': False} for name in on})}")


@dataclass(frozen=True)
class Asked:
    """What is asked of a model over V2, and the same by the route of its own contract."""

    tensors: dict[str, list[bytes]]
    output: str
    path: str
    body: dict[str, Any]
    answer: Callable[[Any], object]
    """The part of the contract's answer that must be there."""


WORDS = "a large red circle on a white background"
FIVE = {
    "describe": Asked(
        {"image": [red_circle()]},
        "text",
        "/api/v1/run",
        {"files": {"image": red_circle()}},
        lambda said: said["status"] == "COMPLETED" and RED_CIRCLE in said["output"]["data"],
    ),
    "generate": Asked(
        {"prompt": [b"What is shown here?"], "image": [red_circle()]},
        "text",
        "/generate/image",
        {"files": {"images": red_circle()}, "data": {"prompt": "What is shown here?", "temperature": "0"}},
        lambda said: RED_CIRCLE in said["output"],
    ),
    "embed": Asked(
        {"image": [red_circle()]},
        "vectors",
        "/embed/images",
        {"files": {"files": red_circle()}},
        lambda said: 0 < said["embeddings"][0]["image_patch_len"] <= len(said["embeddings"][0]["embedding"]),
    ),
    "enhance": Asked(
        {"text": [WORDS.encode()]},
        "text",
        "/v1/chat/completions",
        {"json": {"model": "enhance", "messages": [{"role": "user", "content": WORDS}]}},
        lambda said: "circle" in said["choices"][0]["message"]["content"],
    ),
    "blip": Asked(
        {"image": [red_circle()]},
        "text",
        "/caption",
        {"files": {"image": red_circle()}},
        lambda said: RED_CIRCLE in said["caption"],
    ),
}


@pytest.mark.usefixtures("five")
class TestEach:
    @pytest.mark.parametrize("model", FIVE)
    def test_of_the_five_answers_its_contract_and_v2_by_triton_s_client(
        self, model: str, cluster: Cluster, api_key: str
    ):
        asked, name, headers = FIVE[model], f"{RELEASE}-{model}", {"X-API-Key": api_key}
        cluster.until(lambda: cluster.condition("isvc", name, "Ready").get("status") == "True", f"{model} is Ready")
        with cluster.forwarded(f"service/{name}-predictor", 80) as url:
            client = triton.InferenceServerClient(
                url.removeprefix("http://"), network_timeout=180, connection_timeout=60
            )
            declared = {item["name"] for item in client.get_model_metadata(model, headers=headers)["inputs"]}
            tensors = []
            for tensor, values in asked.tensors.items():
                assert tensor in declared, declared
                tensors.append(triton.InferInput(tensor, [len(values)], "BYTES"))
                tensors[-1].set_data_from_numpy(array(values, dtype=object_), binary_data=True)
            own = dict(headers)  # it writes into it
            answer = client.infer(model, tensors, headers=own).as_numpy(asked.output)
            assert answer.size > 0
            if model in {"describe", "generate", "blip"}:
                assert RED_CIRCLE in answer[0].decode()
            response = httpx.post(url + asked.path, headers=headers, timeout=180, trust_env=False, **asked.body)
            assert response.status_code == 200, response.text
            assert asked.answer(response.json()), response.text[:1000]


# --- what anybody breaks ---------------------------------------------------------------------------------------------


def test_what_is_deleted_or_changed_comes_back(cluster: Cluster):
    before = model_pods(cluster)
    cluster.kubectl("delete", "service", f"{PIPELINE}-gateway")
    cluster.until(lambda: cluster.get("service", f"{PIPELINE}-gateway"), "the Service is back", 120)
    change = {"spec": {"template": {"spec": {"containers": [{"name": "gateway", "image": "somebody/elses:1"}]}}}}
    name = f"{PIPELINE}-gateway"
    cluster.kubectl("patch", "deployment", name, "--type=strategic", "-p", json.dumps(change))

    def image() -> str:
        deployment = cluster.get("deployment", name)
        assert deployment is not None
        return deployment["spec"]["template"]["spec"]["containers"][0]["image"]

    cluster.until(lambda: "somebody" not in image(), "the image is ours again", 180)
    cluster.until(lambda: cluster.condition("vpipe", PIPELINE, "Ready").get("status") == "True", "Ready again")
    assert model_pods(cluster) == before


def test_an_upgrade_of_the_operator_and_the_way_back_restart_no_pod(cluster: Cluster):
    """The other tag has an operator's image only: a pod of a model or gateway with it could not even be pulled."""
    before = pipeline_pods(cluster)
    for tag in (os.environ["E2E_NEXT_TAG"], os.environ["E2E_TAG"]):
        helm("upgrade", RELEASE, str(CHART), "-n", cluster.namespace, "--reuse-values", "--set", f"imageTag={tag}")
        deployment = cluster.all("deployments", "app.kubernetes.io/name=sightline-operator")[0]
        assert deployment["spec"]["template"]["spec"]["containers"][0]["image"].endswith(f":{tag}")
        cluster.kubectl("rollout", "status", f"deployment/{deployment['metadata']['name']}", "--timeout=300s")
        pods = cluster.all("pods", "app.kubernetes.io/name=sightline-operator")
        new = next(
            pod["metadata"]["name"]
            for pod in pods
            if "deletionTimestamp" not in pod["metadata"] and pod["spec"]["containers"][0]["image"].endswith(f":{tag}")
        )
        cluster.until(lambda: "leading" in cluster.kubectl("logs", new), "the new one leads", 120)  # noqa: B023
        # It looks at everything once it leads, and a Service that comes back shows that it has.
        cluster.kubectl("delete", "service", f"{PIPELINE}-gateway")
        cluster.until(lambda: cluster.get("service", f"{PIPELINE}-gateway"), "the new one works", 120)
        assert cluster.condition("vpipe", PIPELINE, "Ready")["status"] == "True"
        assert pipeline_pods(cluster) == before


def test_without_the_enhancer_captions_go_on_and_say_so(cluster: Cluster, gateway: httpx.Client):
    """KServe puts back what `kubectl scale` says; this is its own way to no pod."""
    stop = "serving.kserve.io/stop"
    enhancer = f"{PIPELINE}-enhance"
    selector = f"sightline.dev/pipeline={PIPELINE},app.kubernetes.io/component=enhance"
    degraded = lambda: cluster.condition("vpipe", PIPELINE, "Degraded")  # noqa: E731
    cluster.kubectl("annotate", "isvc", enhancer, f"{stop}=true")
    try:
        cluster.until(lambda: not cluster.all("pods", selector), "the enhancer has no pod", 240)
        for _ in range(10):
            said = caption(gateway, use_gpt_oss="true").json()
            assert (said["enhanced"], said["enhancement_error"]["code"]) == (False, "enhancer_unavailable")
            assert RED_CIRCLE in said["caption"]
        assert caption(gateway, use_gpt_oss="true", strict="true").status_code == 503
        cluster.until(lambda: degraded().get("status") == "True", "the condition says so", 120)
        assert degraded()["reason"] == "EnhanceUnavailable"
        assert cluster.condition("vpipe", PIPELINE, "Ready")["reason"] == "DegradedButServing"
        assert 'sightline_breaker_state{model_name="pipeline",step="enhance"} 2.0' in gateway.get("/metrics").text
    finally:
        cluster.kubectl("annotate", "isvc", enhancer, f"{stop}-")
    cluster.until(lambda: caption(gateway, use_gpt_oss="true").json()["enhanced"], "captions are enhanced again")
    cluster.until(lambda: degraded().get("status") == "False", "the condition has gone", 120)


def test_a_pipeline_that_needs_a_gpu_waits_for_one(cluster: Cluster):
    def step(**more: Any) -> dict[str, Any]:
        small = {"requests": {"cpu": "50m", "memory": "768Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}}
        return {"inferenceService": {"resources": small, **more}}

    container = {"name": "kserve-container", "env": [{"name": "DEVICE", "value": "cpu"}]}
    override = {"spec": {"containers": [container]}}
    auth = {"apiKeysSecretRef": {"name": f"{RELEASE}-keys", "key": "keys"}}
    spec = {
        "caption": step(gpu={"count": 1}, podTemplateOverrides=override),
        "gateway": {"auth": auth, "resources": {"requests": {"cpu": "50m", "memory": "256Mi"}}},
        "enhancePolicy": {"default": "Never"},
    }
    pipeline = {
        "apiVersion": "sightline.dev/v1alpha1",
        "kind": "VisionPipeline",
        "metadata": {"name": "gpu"},
        "spec": spec,
    }
    cluster.apply(pipeline)
    try:
        reason = lambda: cluster.condition("vpipe", "gpu", "CaptionReady").get("reason")  # noqa: E731
        cluster.until(lambda: reason() == "InsufficientGPU", "the condition says that there is no GPU", 180)
        with _gpus(cluster, 1):
            cluster.until(
                lambda: cluster.condition("vpipe", "gpu", "Ready").get("status") == "True", "Ready with a GPU"
            )
            placed = cluster.all("pods", "sightline.dev/pipeline=gpu,app.kubernetes.io/component=caption")
            asked = [pod["spec"]["containers"][0]["resources"] for pod in placed]
            assert [(one["requests"]["nvidia.com/gpu"], one["limits"]["nvidia.com/gpu"]) for one in asked] == [
                ("1", "1")
            ]
            spec["caption"]["inferenceService"]["podTemplateOverrides"]["metadata"] = {"labels": {"again": "yes"}}
            cluster.apply(pipeline)  # a new version on the only GPU

            def is_rolled() -> bool:
                pods = cluster.all("pods", "again=yes")
                states = [status for pod in pods for status in pod["status"].get("containerStatuses", [])]
                return bool(states) and all(status["ready"] for status in states)

            cluster.until(is_rolled, "the new version has the only GPU", 300)
    finally:
        cluster.kubectl("delete", "vpipe", "gpu", "--wait=true")


@contextlib.contextmanager
def _gpus(cluster: Cluster, count: int) -> Iterator[None]:
    """A GPU that only the scheduler believes in."""
    node = json.loads(cluster.kubectl("get", "nodes", "-o", "json"))["items"][0]["metadata"]["name"]

    def patch(*changes: dict[str, str]) -> None:
        words = ("patch", "node", node, "--subresource=status", "--type=json", "-p", json.dumps(changes))
        cluster.kubectl(*words)

    path = "/status/capacity/nvidia.com~1gpu"
    patch({"op": "add", "path": path, "value": str(count)})
    try:
        yield
    finally:
        patch({"op": "remove", "path": path})


def test_no_request_is_lost_while_a_model_rolls(cluster: Cluster, gateway: httpx.Client):
    seen: Counter[int] = Counter()
    wrong: list[str] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            try:
                answer = caption(gateway, use_gpt_oss="false")
            except httpx.TransportError as error:  # the tunnel's, which is not what is tested
                wrong.append(repr(error))
                continue
            seen[answer.status_code] += 1
            if answer.status_code != 200 and not (answer.status_code in {429, 503} and "retry-after" in answer.headers):
                wrong.append(f"{answer.status_code} {answer.text}")

    before = model_pods(cluster)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        change = {
            "spec": {"caption": {"inferenceService": {"podTemplateOverrides": {"metadata": {"labels": {"roll": "1"}}}}}}
        }
        cluster.kubectl("patch", "vpipe", PIPELINE, "--type=merge", "-p", json.dumps(change))
        cluster.until(lambda: cluster.all("pods", "roll=1"), "a new pod comes", 180)
        cluster.until(
            lambda: len(model_pods(cluster) - before) == 1 and len(model_pods(cluster)) == 2, "it has rolled", 300
        )
        cluster.until(lambda: cluster.condition("vpipe", PIPELINE, "Ready").get("status") == "True", "Ready")
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert seen[200] > 10
    assert not wrong, wrong[:5]


def test_300_images_with_a_worker_the_gateway_and_the_operator_killed(cluster: Cluster, store: Any):
    truth = seeded(store, "faults/", 300, seed=5)
    cluster.kubectl("delete", "vbatch", "faults", "--ignore-not-found")
    cluster.apply(batch("faults", "faults/", shardSize=50, chunkSize=10))

    def done() -> int:
        found = store.list_objects_v2(Bucket="captions", Prefix="faults/").get("Contents", [])
        return sum("/parts/" in item["Key"] for item in found)

    for selector in (
        "app.kubernetes.io/component=worker,batch.kubernetes.io/job-completion-index",
        f"sightline.dev/pipeline={PIPELINE},app.kubernetes.io/component=gateway",
        "app.kubernetes.io/name=sightline-operator",
    ):
        before = done()
        cluster.until(lambda: done() > before or is_over(cluster, "faults"), "chunks are written")  # noqa: B023
        running = [pod for pod in cluster.all("pods", selector) if pod["status"].get("phase") == "Running"]
        if running:
            cluster.kubectl("delete", "pod", running[0]["metadata"]["name"], "--grace-period=0", "--force")
    cluster.until(lambda: is_over(cluster, "faults"), "the batch is over")
    said = cluster.get("vbatch", "faults")
    assert said is not None
    rows = results(store, said)
    assert sorted(row["custom_id"] for row in rows) == sorted(truth)
    assert sum(truth[row["custom_id"]] in row["caption"] for row in rows) >= 0.95 * len(truth)
