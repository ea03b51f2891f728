"""From an installed chart to right captions and a batch that loses nothing, with a worker killed in the middle."""

import json
import random
import subprocess
from typing import Any

import httpx
import tritonclient.http as triton
from numpy import array, object_

from tests.e2e.conftest import PIPELINE, RELEASE, Cluster
from tests.scenes import RED_CIRCLE, encoded, random_scene, red_circle

IMAGES = 60


def test_the_pipeline_is_ready_and_says_so(cluster: Cluster):
    cluster.until(
        lambda: cluster.condition("vpipe", PIPELINE, "Ready").get("status") == "True", "the pipeline is Ready"
    )
    pipeline = cluster.get("vpipe", PIPELINE)
    assert pipeline is not None
    status = pipeline["status"]
    assert status["observedGeneration"] == pipeline["metadata"]["generation"]
    assert {step["name"]: step["ready"] for step in status["steps"]} == {"caption": True, "enhance": True}
    row = cluster.kubectl("get", "vpipe", PIPELINE, "--no-headers").split()
    assert row[:2] == [PIPELINE, "True"]


def test_helm_test_passes(cluster: Cluster):
    command = ["helm", "test", RELEASE, "--namespace", cluster.namespace, "--timeout", "10m"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=700)
    assert done.returncode == 0, done.stdout + done.stderr


def test_captions_are_right_and_enhanced(gateway: httpx.Client):
    response = gateway.post("/caption", files={"image": red_circle()})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert RED_CIRCLE in answer["original_caption"]
    assert answer["enhanced"] is True
    assert len(answer["caption"]) > len(answer["original_caption"])
    without = gateway.post("/caption", files={"image": red_circle()}, headers={"X-API-Key": "wrong"})
    assert without.status_code == 403


def test_the_same_over_the_v2_protocol_by_triton_s_client(gateway: httpx.Client, api_key: str):
    client = triton.InferenceServerClient(gateway.base_url.netloc.decode(), network_timeout=180, connection_timeout=60)
    headers = {"X-API-Key": api_key}
    assert client.is_model_ready("pipeline", headers=headers)
    image = triton.InferInput("image", [1], "BYTES")
    image.set_data_from_numpy(array([red_circle()], dtype=object_), binary_data=True)
    answer = client.infer("pipeline", [image], headers=headers, parameters={"use_gpt_oss": False})
    assert RED_CIRCLE in answer.as_numpy("text")[0].decode()


def batch(name: str, prefix: str, **more: Any) -> dict[str, Any]:
    def at(bucket: str) -> dict[str, Any]:
        own = {"endpoint": "http://s3:9000", "pathStyle": True, "credentialsSecretRef": {"name": "store"}}
        return {"bucket": bucket, "prefix": prefix, **own}

    spec = {
        "pipelineRef": {"name": PIPELINE},
        "input": {"s3Prefix": at("images")},
        "output": {"s3": at("captions")},
        "options": {"enhance": "Never"},
        "resources": {"requests": {"cpu": "50m", "memory": "192Mi"}, "limits": {"memory": "512Mi"}},
        "parallelism": 2,
        "shardSize": 20,
        "chunkSize": 5,
        **more,
    }
    return {"apiVersion": "sightline.dev/v1alpha1", "kind": "VisionBatch", "metadata": {"name": name}, "spec": spec}


def seeded(store: Any, prefix: str, count: int, seed: int) -> dict[str, str]:
    """Scenes in the bucket, and what is in them, by key; no results of an earlier run."""
    for item in store.list_objects_v2(Bucket="captions", Prefix=prefix).get("Contents", []):
        store.delete_object(Bucket="captions", Key=item["Key"])
    rng = random.Random(seed)
    truth = {}
    for number in range(count):
        image, words = random_scene(rng, objects=1, side=224)
        truth[f"{prefix}{number:04}.png"] = words
        store.put_object(Bucket="images", Key=f"{prefix}{number:04}.png", Body=encoded(image))
    return truth


def results(store: Any, said: dict[str, Any]) -> list[dict[str, Any]]:
    bucket, _, key = said["status"]["outputs"]["results"].removeprefix("s3://").partition("/")
    return [json.loads(line) for line in store.get_object(Bucket=bucket, Key=key)["Body"].read().splitlines()]


def is_over(cluster: Cluster, name: str) -> bool:
    ends = [cluster.condition("vbatch", name, end).get("status") for end in ("Complete", "Failed")]
    return "True" in ends


def test_a_batch_with_a_killed_worker_has_each_result_once(cluster: Cluster, store: Any):
    truth = seeded(store, "killed/", IMAGES, seed=11)
    cluster.kubectl("delete", "vbatch", "killed", "--ignore-not-found")
    cluster.apply(batch("killed", "killed/"))
    selector = "app.kubernetes.io/component=worker,batch.kubernetes.io/job-completion-index"

    def running() -> list[str]:
        pods = cluster.all("pods", selector)
        return [pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") == "Running"]

    victim = cluster.until(running, "a worker runs")[0]
    cluster.kubectl("delete", "pod", victim, "--grace-period=0", "--force")
    cluster.until(lambda: is_over(cluster, "killed"), "the batch is over")
    assert cluster.condition("vbatch", "killed", "Complete")["reason"] == "Succeeded"
    said = cluster.get("vbatch", "killed")
    assert said is not None
    assert said["status"]["progress"]["succeeded"] == IMAGES
    rows = results(store, said)
    assert sorted(row["custom_id"] for row in rows) == sorted(truth)
    right = sum(truth[row["custom_id"]] in row["caption"] for row in rows)
    assert right >= 0.95 * IMAGES, f"{right} of {IMAGES} captions name what was drawn"
