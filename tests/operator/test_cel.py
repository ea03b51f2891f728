"""The definitions in a real API server: what it accepts and fills in, what it refuses in which words, what it shows."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from sightline_operator.api import Batch, Pipeline, crds
from tests.operator.conftest import ApiServer
from tests.operator.objects import GONE, batch, pipeline
from tests.operator.specs import BATCHES, PIPELINES

PLURALS = {"VisionPipeline": "visionpipelines", "VisionBatch": "visionbatches"}
SAMPLES = Path(__file__).resolve().parents[2] / "manifests" / "samples"
ENDPOINT = {"url": "https://models.example.com/v1", "model": "gpt-oss-20b"}
WORK = {"input": {"s3Prefix": {"bucket": "images"}}, "output": {"s3": {"bucket": "captions"}}}
TIME = "2026-11-21T12:00:00Z"


def scheduled(schedule: str, **fields: Any) -> dict[str, Any]:
    """A pipeline that makes a batch at these times."""
    return pipeline({"batches": [{"name": "a", "schedule": schedule, "template": {"spec": WORK}, **fields}]})


class Api:
    """The two kinds over HTTP, strict about unknown fields."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def path(self, manifest: dict[str, Any], *more: str) -> str:
        namespace = manifest["metadata"]["namespace"]
        return "/".join(["/apis", manifest["apiVersion"], "namespaces", namespace, PLURALS[manifest["kind"]], *more])

    def create(self, manifest: dict[str, Any], *, dry_run: bool = False) -> httpx.Response:
        params = {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        return self.client.post(self.path(manifest), json=manifest, params=params)

    def patch(self, manifest: dict[str, Any], spec: dict[str, Any]) -> httpx.Response:
        """Merge patch of the spec: None removes."""
        return self.client.patch(
            self.path(manifest, manifest["metadata"]["name"]),
            content=json.dumps({"spec": spec}),
            headers={"Content-Type": "application/merge-patch+json"},
            params={"fieldValidation": "Strict"},
        )

    def patch_status(self, manifest: dict[str, Any], status: dict[str, Any]) -> httpx.Response:
        return self.client.patch(
            self.path(manifest, manifest["metadata"]["name"], "status"),
            content=json.dumps({"status": status}),
            headers={"Content-Type": "application/merge-patch+json"},
            params={"fieldValidation": "Strict"},
        )

    def created(self, manifest: dict[str, Any]) -> dict[str, Any]:
        response = self.create(manifest)
        assert response.status_code == 201, response.text
        return response.json()


@pytest.fixture(scope="module")
def api(apiserver: ApiServer):
    with apiserver.client() as client:
        yield Api(client)


def refusal(response: httpx.Response) -> str:
    assert response.status_code == 422, f"{response.status_code}: {response.text}"
    return response.json()["message"]


# --- rows: accepted --------------------------------------------------------------------------------------------------

ACCEPTED = {
    "the smallest": pipeline(),
    "caption only": pipeline({"enhance": GONE}),
    "caption only, and says so": pipeline({"enhance": GONE, "enhancePolicy.default": "Never"}),
    "enhanced on request": pipeline({"enhancePolicy.default": "OnRequest"}),
    "an InferenceService that exists": pipeline({"caption": {"inferenceServiceRef": {"name": "vlm"}}}),
    "any OpenAI URL": pipeline(
        {"enhance": {"endpoint": ENDPOINT | {"authSecretRef": {"name": "key", "key": "token"}}}}
    ),
    "an address without TLS in the cluster": pipeline({"enhance": {"endpoint": ENDPOINT | {"url": "http://llm:8000"}}}),
    "an IPv6 address": pipeline({"enhance": {"endpoint": ENDPOINT | {"url": "http://[fd00::1]:8000/v1"}}}),
    "a model of the hub on a GPU": pipeline(
        {
            "caption.inferenceService": {
                "model": {"name": "Qwen/Qwen2.5-VL-7B-Instruct", "revision": "cc59489"},
                "quantization": "8bit",
                "gpu": {"count": 1},
                "replicas": {"min": 1, "max": 4},
                "scaling": {"metric": "Concurrency", "target": 8},
                "rollout": "Availability",
                "resources": {"requests": {"cpu": 4, "memory": "24Gi"}, "limits": {"memory": "24Gi"}},
                "podTemplateOverrides": {"spec": {"priorityClassName": "high", "anything": [{"at": "all"}]}},
            }
        }
    ),
    "a runtime of KServe": pipeline(
        {
            "caption.inferenceService": {
                "runtime": {"name": "vllm", "protocol": "OpenAI"},
                "model": {"uri": "pvc://w/qwen"},
            }
        }
    ),
    "timeouts that fill the deadline": pipeline(
        {"caption.timeout": "1m30s", "enhance.timeout": "30s", "gateway.deadline.max": "2m"}
    ),
    "a try as long as its step": pipeline({"caption.timeout": "10s", "caption.retry.perTryTimeout": "10000ms"}),
    "a breaker by rate": pipeline({"enhance.circuitBreaker": {"errorPercent": 50, "minRequests": 10}}),
    "a breaker by count": pipeline({"enhance.circuitBreaker": {"consecutiveErrors": 3, "openFor": "30s"}}),
    "keys from a Secret": pipeline({"gateway.auth": {"apiKeysSecretRef": {"name": "keys", "key": "keys.txt"}}}),
    "a gateway that scales, with a route": pipeline(
        {
            "gateway.autoscaling": {"minReplicas": 2, "maxReplicas": 5},
            "gateway.httpRoute": {
                "parentRefs": [{"name": "public", "namespace": "infra"}],
                "hostnames": ["a.example.com"],
            },
            "gateway.serviceMonitor": {},
        }
    ),
    "storage": pipeline({"storage.s3": {"bucket": "images", "endpoint": "http://minio:9000", "pathStyle": True}}),
    "a name of 40": pipeline(name="a" * 40),
    "batches, once and on a schedule": pipeline(
        {
            "batches": [
                {"name": "backlog", "template": {"spec": WORK}},
                {"name": "nightly", "schedule": "0 3 * * *", "timeZone": "Europe/Vienna", "template": {"spec": WORK}},
                {"name": "daily", "schedule": "@daily", "startingDeadline": "1h", "template": {"spec": WORK}},
            ]
        }
    ),
    "every form of a schedule": scheduled("*/15,59 0-6/2,22 1,15,31 JAN-mar,12 Mon-Fri,7"),
    "batch names as long as may be": pipeline(
        {"batches": [{"name": "b" * 20, "schedule": "@daily", "template": {"spec": WORK}}]}, name="a" * 22
    ),
    "a batch": batch(),
    "a batch from a manifest": batch({"input": {"manifest": {"uri": "s3://lists/a.csv", "format": "CSV"}}}),
    "a batch from an upload": batch({"input": {"upload": {"fileId": "file-123"}}}),
    "what failed, once more": batch({"input": {"retryOf": {"batchName": "night", "only": "Unenhanced"}}}),
    "a batch that writes where its pipeline keeps things": batch({"output": GONE}),
    "a list in a store of its own": batch(
        {"input": {"manifest": {"uri": "s3://lists/x.csv", "format": "CSV", "endpoint": "http://minio.local:9000"}}}
    ),
    "captions beside the images": batch({"output.sidecars": {"bucket": "images"}, "output.existing": "Skip"}),
    "a gateway that makes batches": pipeline(
        {"gateway.batches": "VisionBatches", "storage": {"s3": {"bucket": "images", "prefix": "own/"}}}
    ),
    "a batch in a queue": batch({"queueName": "gpu", "minParallelism": 2, "parallelism": 8}),
    "a chunk as large as its shard": batch({"chunkSize": 100, "shardSize": 100}),
    "a bound on failures": batch({"maxFailedItems": {"percent": 5}}),
    "a batch that is deleted at once": batch({"ttlAfterFinished": "0s", "completionWindow": "24h"}),
    "a batch's name of 52": batch(name="b" * 52),
    "a batch that starts paused": batch({"desiredState": "Paused"}),
}


@pytest.mark.parametrize("manifest", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_accepted(api: Api, manifest: dict[str, Any]):
    response = api.create(manifest, dry_run=True)
    assert response.status_code == 201, response.text
    spec = response.json()["spec"]
    (Pipeline if manifest["kind"] == "VisionPipeline" else Batch).model_validate(spec)


# --- rows: refused ---------------------------------------------------------------------------------------------------

SERVICE = "spec.caption.inferenceService"
WAIVE = "name a Secret of accepted keys by apiKeysSecretRef, or say none: true"
ONE_INPUT = "exactly one of s3Prefix, manifest, upload and retryOf must be set"
ONE_BOUND = "exactly one of count and percent must be set"
ONE_THRESHOLD = "exactly one of errorPercent and consecutiveErrors must be set"
ONE_SOURCE = "exactly one of inferenceService, inferenceServiceRef and endpoint must be set"
CAPTION = "caption.inferenceService"
REFUSED = {
    # a step
    "no source": (pipeline({"caption": {}}), "spec.caption", ONE_SOURCE),
    "two sources": (pipeline({"enhance.endpoint": ENDPOINT}), "spec.enhance", ONE_SOURCE),
    "three sources": (
        pipeline({"enhance.endpoint": ENDPOINT, "enhance.inferenceServiceRef": {"name": "x"}}),
        "spec.enhance", ONE_SOURCE,
    ),
    "a try longer than its step": (
        pipeline({"caption.timeout": "10s", "caption.retry": {"perTryTimeout": "11s"}}),
        "spec.caption.retry.perTryTimeout", "retry.perTryTimeout must not be longer than timeout",
    ),
    "a try longer than the default": (
        pipeline({"caption.retry": {"perTryTimeout": "61s"}}),
        "spec.caption.retry.perTryTimeout", "retry.perTryTimeout must not be longer than timeout",
    ),
    "no threshold": (
        pipeline({"caption.circuitBreaker": {}}),
        "spec.caption.circuitBreaker", ONE_THRESHOLD,
    ),
    "two thresholds": (
        pipeline({"caption.circuitBreaker": {"errorPercent": 5, "consecutiveErrors": 5}}),
        "spec.caption.circuitBreaker", ONE_THRESHOLD,
    ),
    "requests without a rate": (
        pipeline({"caption.circuitBreaker": {"minRequests": 5, "consecutiveErrors": 5}}),
        "spec.caption.circuitBreaker.minRequests", "circuitBreaker.minRequests needs circuitBreaker.errorPercent",
    ),
    "a timeout of nothing": (pipeline({"caption.timeout": "0s"}), "spec.caption.timeout", "must be longer than 0s"),
    "a timeout of years": (pipeline({"caption.timeout": "9000h"}), "spec.caption.timeout", "longer than 8760h"),
    "a timeout past all clocks": (
        pipeline({"caption.timeout": "99999999999999h"}), "spec.caption.timeout", "longer than 8760h",
    ),
    "a number for a duration": (pipeline({"caption.timeout": 30}), "spec.caption.timeout", "must be of type string"),
    "a duration without unit": (pipeline({"caption.timeout": "30"}), "spec.caption.timeout", "should match"),
    # a URL
    "a URL of another scheme": (
        pipeline({"enhance": {"endpoint": ENDPOINT | {"url": "ftp://models.example.com"}}}),
        "spec.enhance.endpoint.url", "endpoint.url must be an http:// or https:// URL",
    ),
    "no URL": (
        pipeline({"enhance": {"endpoint": ENDPOINT | {"url": "models.example.com"}}}),
        "spec.enhance.endpoint.url", "endpoint.url must be an http:// or https:// URL",
    ),
    "a URL without host": (
        pipeline({"enhance": {"endpoint": ENDPOINT | {"url": "https:///v1"}}}),
        "spec.enhance.endpoint.url", "endpoint.url must be an http:// or https:// URL",
    ),
    "a URL with a password": (
        pipeline({"enhance": {"endpoint": ENDPOINT | {"url": "https://me:secret@models.example.com"}}}),
        "spec.enhance.endpoint.url", "endpoint.url must not hold a user name or password",
    ),
    "a key in the spec": (
        pipeline({"enhance": {"endpoint": ENDPOINT | {"apiKey": "secret"}}}),
        "spec.enhance.endpoint.apiKey", "unknown field",
    ),
    "a Secret of another namespace": (
        pipeline({"gateway.auth": {"apiKeysSecretRef": {"name": "a", "key": "b", "namespace": "c"}}}),
        "spec.gateway.auth.apiKeysSecretRef.namespace", "unknown field",
    ),
    # an InferenceService of ours
    "two models": (
        pipeline({f"{CAPTION}.model": {"name": "a/b", "uri": "s3://a/b"}}),
        f"{SERVICE}.model", "at most one of name and uri may be set",
    ),
    "a revision of nothing": (
        pipeline({f"{CAPTION}.model": {"uri": "s3://a/b", "revision": "main"}}),
        f"{SERVICE}.model.revision", "model.revision needs model.name",
    ),
    "a token for nothing": (
        pipeline({f"{CAPTION}.model": {"tokenSecretRef": {"name": "hub", "key": "token"}}}),
        f"{SERVICE}.model.tokenSecretRef", "model.tokenSecretRef needs model.name",
    ),
    "two runtimes": (
        pipeline({f"{CAPTION}.runtime": {"name": "a", "image": "b"}}),
        f"{SERVICE}.runtime", "at most one of name and image may be set",
    ),
    "fewer at most than at least": (
        pipeline({f"{CAPTION}.replicas": {"min": 3, "max": 2}}),
        f"{SERVICE}.replicas.min", "replicas.min must not be larger than replicas.max",
    ),
    "scaling of a fixed number": (
        pipeline({f"{CAPTION}.scaling": {"metric": "CPU"}}),
        f"{SERVICE}.scaling", "inferenceService.scaling needs replicas.max larger than replicas.min",
    ),
    "GPUs as a limit": (
        pipeline({f"{CAPTION}.resources": {"limits": {"nvidia.com/gpu": 1}}}),
        f"{SERVICE}.resources", "resources.limits must not name the resource of gpu: set gpu.count",
    ),
    "GPUs as a request": (
        pipeline({f"{CAPTION}.resources": {"requests": {"nvidia.com/gpu": "1"}}}),
        f"{SERVICE}.resources", "resources.requests must not name the resource of gpu: set gpu.count",
    ),
    "an amount that is none": (
        pipeline({f"{CAPTION}.resources": {"requests": {"memory": "16Gig"}}}),
        f"{SERVICE}.resources.requests", "every amount must be a quantity",
    ),
    "a request beyond its limit": (
        pipeline({f"{CAPTION}.resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}}),
        f"{SERVICE}.resources.requests", "resources.requests must not be larger than resources.limits",
    ),
    "a quantization that nobody has": (
        pipeline({f"{CAPTION}.quantization": "3bit"}), f"{SERVICE}.quantization", "Unsupported value",
    ),
    "enhance has no quantization": (
        pipeline({"enhance.inferenceService.quantization": "8bit"}),
        "spec.enhance.inferenceService.quantization", "unknown field",
    ),
    "the same load timeout for ever": (
        pipeline({f"{CAPTION}.loadTimeout": "0s"}), f"{SERVICE}.loadTimeout", "longer than 0s",
    ),
    # a pipeline
    "always enhanced by nothing": (
        pipeline({"enhance": GONE, "enhancePolicy.default": "Always"}),
        "spec.enhancePolicy.default", "must be Never, or unset, without an enhance step",
    ),
    "enhanced by nothing on request": (
        pipeline({"enhance": GONE, "enhancePolicy.default": "OnRequest"}),
        "spec.enhancePolicy.default", "must be Never, or unset, without an enhance step",
    ),
    "steps longer than the deadline": (
        pipeline({"caption.timeout": "90s", "enhance.timeout": "31s"}),
        "spec.gateway.deadline.max", "caption.timeout and enhance.timeout together must not be longer",
    ),
    "a caption longer than the deadline": (
        pipeline({"enhance": GONE, "caption.timeout": "121s"}),
        "spec.gateway.deadline.max", "caption.timeout and enhance.timeout together must not be longer",
    ),
    "an enhancement that never starts": (
        pipeline({"enhance.timeout": "5s", "enhancePolicy.minRemaining": "5s"}),
        "spec.enhancePolicy.minRemaining", "enhancePolicy.minRemaining must be shorter than enhance.timeout",
    ),
    "a default beyond the maximum": (
        pipeline({"gateway.deadline.default": "3m"}),
        "spec.gateway.deadline.default", "deadline.default must not be longer than deadline.max",
    ),
    "no gateway": (pipeline({"gateway": GONE}), "spec.gateway", "Required value"),
    "nothing said about keys": (pipeline({"gateway": {}}), "spec.gateway.auth", "Required value"),
    "keys neither named nor waived": (
        pipeline({"gateway.auth": {}}), "spec.gateway.auth", WAIVE,
    ),
    "keys not waived": (
        pipeline({"gateway.auth": {"none": False}}), "spec.gateway.auth", "or say none: true",
    ),
    "keys both named and waived": (
        pipeline({"gateway.auth": {"none": True, "apiKeysSecretRef": {"name": "a", "key": "b"}}}),
        "spec.gateway.auth", "(and not both)",
    ),
    "a gateway that scales down upwards": (
        pipeline({"gateway.autoscaling": {"minReplicas": 3, "maxReplicas": 2}}),
        "spec.gateway.autoscaling.minReplicas", "minReplicas must not be larger than autoscaling.maxReplicas",
    ),
    "a route to nowhere": (
        pipeline({"gateway.httpRoute": {"parentRefs": []}}), "spec.gateway.httpRoute.parentRefs", "at least 1 items",
    ),
    "two identities for one bucket": (
        pipeline({"storage.s3": {"bucket": "abc", "serviceAccountName": "a", "credentialsSecretRef": {"name": "b"}}}),
        "spec.storage.s3", "at most one of credentialsSecretRef and serviceAccountName may be set",
    ),
    "a store with a password": (
        pipeline({"storage.s3": {"bucket": "abc", "endpoint": "https://a:b@minio"}}),
        "spec.storage.s3.endpoint", "s3.endpoint must not hold a user name or password",
    ),
    "a store that is no URL": (
        pipeline({"storage.s3": {"bucket": "abc", "endpoint": "minio:9000"}}),
        "spec.storage.s3.endpoint", "s3.endpoint must be an http:// or https:// URL",
    ),
    "a name that is too long": (pipeline(name="a" * 41), "metadata.name", "at most 40 characters"),
    "a name that starts with a digit": (pipeline(name="1a"), "metadata.name", "must start with a letter"),
    "a name with a dot": (pipeline(name="a.b"), "metadata.name", "hold only a-z, 0-9 and -"),
    # its batches
    "batches of one name": (
        pipeline({"batches": [{"name": "a", "template": {"spec": WORK}}, {"name": "a", "template": {"spec": WORK}}]}),
        "spec.batches[1]", "Duplicate value",
    ),
    "a batch's name that does not fit": (
        pipeline({"batches": [{"name": "b" * 21, "schedule": "@daily", "template": {"spec": WORK}}]}, name="a" * 22),
        "spec.batches", "spec.batches[].name is too long",
    ),
    "a schedule that is none": (scheduled("every night"), "spec.batches[0].schedule", "must have five fields"),
    "a nickname that cron has not": (scheduled("@nightly"), "spec.batches[0].schedule", "must have five fields"),
    "six fields": (scheduled("0 0 3 * * *"), "spec.batches[0].schedule", "must have five fields"),
    "minute 60": (scheduled("60 3 * * *"), "spec.batches[0].schedule", "the minute must be of 0-59"),
    "hour 24": (scheduled("0 24 * * *"), "spec.batches[0].schedule", "the hour must be of 0-23"),
    "day 0": (scheduled("0 3 0 * *"), "spec.batches[0].schedule", "the day of month must be of 1-31"),
    "month 13": (scheduled("0 3 1 1-13 *"), "spec.batches[0].schedule", "the month must be of 1-12"),
    "weekday 8": (scheduled("0 3 * * 1,8"), "spec.batches[0].schedule", "the day of week must be of 0-7"),
    "a step of nothing": (scheduled("*/0 3 * * *"), "spec.batches[0].schedule", "the minute must be of 0-59"),
    "a time zone that nobody keeps": (
        scheduled("@daily", timeZone="Mars/Olympus"), "spec.batches[0].timeZone", "must be the name of a time zone",
    ),
    "whatever zone the server is in": (
        scheduled("@daily", timeZone="Local"), "spec.batches[0].timeZone", "must be the name of a time zone",
    ),
    "a time zone of no schedule": (
        pipeline({"batches": [{"name": "a", "timeZone": "UTC", "template": {"spec": WORK}}]}),
        "spec.batches[0].timeZone", "batches[].timeZone needs batches[].schedule",
    ),
    "a deadline of no schedule": (
        pipeline({"batches": [{"name": "a", "startingDeadline": "1h", "template": {"spec": WORK}}]}),
        "spec.batches[0].startingDeadline", "batches[].startingDeadline needs batches[].schedule",
    ),
    "a template that names a pipeline": (
        pipeline({"batches": [{"name": "a", "template": {"spec": WORK | {"pipelineRef": {"name": "x"}}}}]}),
        "spec.batches[0].template.spec.pipelineRef", "unknown field",
    ),
    "rules hold inside a template": (
        pipeline({"batches": [{"name": "a", "template": {"spec": WORK | {"chunkSize": 20, "shardSize": 10}}}]}),
        "spec.batches[0].template.spec.chunkSize", "chunkSize must not be larger than shardSize",
    ),
    # a batch
    "no input": (batch({"input": {}}), "spec.input", ONE_INPUT),
    "two inputs": (
        batch({"input.upload": {"fileId": "x"}}), "spec.input", ONE_INPUT,
    ),
    "a manifest on a web server": (
        batch({"input": {"manifest": {"uri": "https://example.com/a.jsonl"}}}),
        "spec.input.manifest.uri", "should match",
    ),
    "a chunk larger than its shard": (
        batch({"chunkSize": 101, "shardSize": 100}), "spec.chunkSize", "chunkSize must not be larger than shardSize",
    ),
    "two bounds on failures": (
        batch({"maxFailedItems": {"count": 5, "percent": 5}}), "spec.maxFailedItems", ONE_BOUND,
    ),
    "no bound on failures": (
        batch({"maxFailedItems": {}}), "spec.maxFailedItems", ONE_BOUND,
    ),
    "more workers at least than at most": (
        batch({"queueName": "q", "parallelism": 2, "minParallelism": 3}),
        "spec.minParallelism", "minParallelism must not be larger than parallelism",
    ),
    "workers at least, without a queue": (
        batch({"minParallelism": 2}), "spec.minParallelism", "minParallelism needs queueName",
    ),
    "what happens to captions that are nowhere": (
        batch({"output.existing": "Append"}), "spec.output.existing", "output.existing needs output.sidecars",
    ),
    "a gateway that makes batches of nothing": (
        pipeline({"gateway.batches": "VisionBatches"}),
        "spec.gateway.batches", "gateway.batches VisionBatches needs storage",
    ),
    "two identities for a list": (
        batch({"input": {"manifest": {
            "uri": "s3://lists/x", "credentialsSecretRef": {"name": "a"}, "serviceAccountName": "b",
        }}}),
        "spec.input.manifest", "at most one of credentialsSecretRef and serviceAccountName may be set",
    ),
    "too many items": (
        batch({"input.s3Prefix.maxItems": 10_000_001}),
        "spec.input.s3Prefix.maxItems", "less than or equal to 10000000",
    ),
    "a state that nobody knows": (batch({"desiredState": "Asleep"}), "spec.desiredState", "Unsupported value"),
    "a batch's name that is too long": (batch(name="b" * 53), "metadata.name", "at most 52 characters"),
}  # fmt: skip


@pytest.mark.parametrize(("manifest", "field", "rule"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_in_words(api: Api, manifest: dict[str, Any], field: str, rule: str):
    response = api.create(manifest, dry_run=True)
    assert response.status_code in (400, 422), f"{response.status_code}: {response.text}"
    message = response.json()["message"]
    assert rule in message
    assert field in message.replace('"', "") or f"<nil>: Invalid value: {rule}" in message, message


# --- what may change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"pipelineRef": {"name": "other"}}, "pipelineRef is immutable"),
        ({"input": {"s3Prefix": {"prefix": "outbox/"}}}, "input is immutable"),
        ({"input": {"s3Prefix": None, "upload": {"fileId": "x"}}}, "input is immutable"),
        ({"output": {"merge": "Never"}}, "output is immutable"),
        ({"options": {"enhance": "Never"}}, "options is immutable"),
        ({"options": None}, None),  # what was there is the default
        ({"shardSize": 500}, "shardSize is immutable"),
        ({"chunkSize": 10}, "chunkSize is immutable"),
        ({"queueName": "gpu"}, "queueName is immutable"),
        ({"parallelism": 8}, None),
        ({"maxInFlightPerWorker": 2}, None),
        ({"completionWindow": "1h"}, None),
        ({"ttlAfterFinished": "1h"}, None),
        ({"desiredState": "Paused"}, None),
    ],
    ids=str,
)
def test_a_batch_changes_only_where_it_may(api: Api, namespace: str, changes: dict[str, Any], rule: str | None):
    manifest = batch(namespace=namespace)
    api.created(manifest)
    response = api.patch(manifest, changes)
    if rule is None:
        assert response.status_code == 200, response.text
    else:
        message = refusal(response)
        assert rule in message
        assert f"spec.{next(iter(changes))}" in message


def test_a_queue_is_neither_changed_nor_left(api: Api, namespace: str):
    manifest = batch({"queueName": "gpu"}, namespace=namespace)
    api.created(manifest)
    for queue in ("cpu", None):
        assert "queueName is immutable" in refusal(api.patch(manifest, {"queueName": queue}))


def test_cancelled_is_for_good(api: Api, namespace: str):
    manifest = batch(namespace=namespace)
    api.created(manifest)
    for state in ("Paused", "Running", "Cancelled"):
        assert api.patch(manifest, {"desiredState": state}).status_code == 200
    for state in ("Running", "Paused"):
        message = refusal(api.patch(manifest, {"desiredState": state}))
        assert "spec.desiredState" in message
        assert "desiredState cannot leave Cancelled" in message
    assert api.patch(manifest, {"parallelism": 1}).status_code == 200


GPU_ROWS = [
    ({}, {"gpu": {"count": 2}}, False, True),
    ({"rollout": "ResourceAware"}, {"gpu": {"count": 2}}, False, True),
    ({"rollout": "Availability"}, {"gpu": {"count": 2}}, False, False),
    ({"rollout": "Availability"}, {"gpu": {"resourceName": "amd.com/gpu"}}, False, False),
    ({"rollout": "Availability"}, {"gpu": {"count": 2}}, True, True),
    ({"rollout": "Availability"}, {"gpu": {"count": 2}, "rollout": "ResourceAware"}, False, True),
    ({"rollout": "Availability"}, {"loadTimeout": "1h"}, False, True),
]


@pytest.mark.parametrize("step", ["caption", "enhance"])
@pytest.mark.parametrize(("before", "change", "is_suspended", "is_accepted"), GPU_ROWS)
def test_gpus_change_only_where_no_pod_waits_for_them(
    api: Api,
    namespace: str,
    step: str,
    before: dict[str, Any],
    change: dict[str, Any],
    is_suspended: bool,
    is_accepted: bool,
):
    manifest = pipeline({f"{step}.inferenceService": {"gpu": {"count": 1}, **before}}, namespace=namespace)
    api.created(manifest)
    response = api.patch(manifest, {step: {"inferenceService": change}, "suspend": is_suspended})
    if is_accepted:
        assert response.status_code == 200, response.text
    else:
        message = refusal(response)
        assert f"spec.{step}" in message
        assert f"{step}.inferenceService.gpu may change only with rollout ResourceAware" in message


def test_a_step_may_move_elsewhere_whatever_its_gpus(api: Api, namespace: str):
    manifest = pipeline(
        {"caption.inferenceService": {"gpu": {"count": 1}, "rollout": "Availability"}}, namespace=namespace
    )
    api.created(manifest)
    assert api.patch(manifest, {"caption": {"inferenceService": None, "endpoint": ENDPOINT}}).status_code == 200


def test_a_rule_that_came_later_spares_what_was_there(api: Api, apiserver: ApiServer, namespace: str):
    """Ratcheting: an object that a tightened rule would refuse can still be changed elsewhere, not made worse."""
    (tight, _) = copy.deepcopy(crds())
    tight["spec"]["group"] = "ratcheting.sightline.dev"
    tight["metadata"] = {"name": "visionpipelines.ratcheting.sightline.dev"}
    tight["spec"]["names"] |= {"shortNames": ["rpipe"], "categories": ["ratcheting"]}
    loose = copy.deepcopy(tight)
    spec = loose["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"]["caption"]["properties"]["inferenceService"]["properties"]["replicas"][
        "x-kubernetes-validations"
    ]
    apiserver.install([loose])
    manifest = pipeline({f"{CAPTION}.replicas": {"min": 3, "max": 2}}, namespace=namespace)
    manifest["apiVersion"] = "ratcheting.sightline.dev/v1alpha1"
    api.created(manifest)
    apiserver.install([tight])
    probe = copy.deepcopy(manifest) | {"metadata": {"name": "probe", "namespace": namespace}}
    deadline = time.monotonic() + 60
    while api.create(probe, dry_run=True).status_code != 422:
        assert time.monotonic() < deadline, "the tightened definition was not taken over"
    assert api.patch(manifest, {"gateway": {"replicas": 2}}).status_code == 200
    message = refusal(api.patch(manifest, {"caption": {"inferenceService": {"replicas": {"min": 4}}}}))
    assert "replicas.min must not be larger than replicas.max" in message
    assert api.patch(manifest, {"caption": {"inferenceService": {"replicas": {"min": 2}}}}).status_code == 200


# --- what is filled in, and what it costs ----------------------------------------------------------------------------


@pytest.mark.parametrize("manifest", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_the_server_and_the_typed_source_fill_in_the_same(api: Api, manifest: dict[str, Any]):
    """An operator that reads an object, and `sightline render` that reads a file, see the same spec."""
    kind = Pipeline if manifest["kind"] == "VisionPipeline" else Batch
    filled = api.create(manifest, dry_run=True).json()["spec"]
    assert kind.model_validate(filled) == kind.model_validate(manifest["spec"])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(manifest=PIPELINES | BATCHES)
def test_whatever_is_drawn_is_accepted_and_filled_in_alike(api: Api, manifest: dict[str, Any]):
    kind = Pipeline if manifest["kind"] == "VisionPipeline" else Batch
    response = api.create(manifest, dry_run=True)
    assert response.status_code == 201, response.text
    assert kind.model_validate(response.json()["spec"]) == kind.model_validate(manifest["spec"])


def test_defaults_appear(api: Api, namespace: str):
    spec = api.created(pipeline(namespace=namespace))["spec"]
    assert spec["caption"]["timeout"] == "60s"
    assert spec["caption"]["inferenceService"]["replicas"] == {"min": 1, "max": 1}
    assert spec["caption"]["inferenceService"]["gpu"] == {"resourceName": "nvidia.com/gpu", "count": 0}
    assert spec["gateway"]["replicas"] == 1
    assert spec["gateway"]["deadline"] == {"max": "120s"}
    assert spec["networkPolicy"] == "Managed"
    assert "default" not in spec["enhancePolicy"]
    assert api.created(batch(namespace=namespace))["spec"]["desiredState"] == "Running"


def test_the_largest_objects_are_within_the_cost_of_rules(api: Api):
    """Every list, map and string that a rule looks at is as large as the schema lets it be."""
    words = {f"example.com/resource-{index:02}": "1000000000m" for index in range(16)}
    resources = {"requests": words, "limits": words}
    service = {
        "resources": resources,
        "args": ["--x" * 300] * 64,
        "nodeSelector": {f"label-{index}": "v" * 63 for index in range(32)},
        "tolerations": [{"key": "k" * 300, "value": "v" * 63}] * 32,
    }
    work = WORK | {"resources": resources, "options": {"prompt": "p" * 8192}}
    scheduled = {"schedule": "0 3 * * *", "startingDeadline": "1h", "timeZone": "UTC"}
    largest = pipeline(
        {
            "caption": {"inferenceService": service, "prompt": "p" * 8192, "retry": {"perTryTimeout": "1s"}},
            "enhance": {"inferenceService": service},
            "gateway.resources": resources,
            "gateway.service.annotations": {f"note-{index}": "v" * 4096 for index in range(32)},
            "batches": [{"name": f"b-{index:02}", **scheduled, "template": {"spec": work}} for index in range(16)],
        },
        name="a" * 38,
    )
    response = api.create(largest, dry_run=True)
    assert response.status_code == 201, response.text
    response = api.create(batch({"resources": resources, "options.prompt": "p" * 8192}), dry_run=True)
    assert response.status_code == 201, response.text


# --- status ----------------------------------------------------------------------------------------------------------

CONDITION = {"type": "Ready", "status": "False", "reason": "CaptionNotReady", "message": "", "lastTransitionTime": TIME}
PIPELINE_STATUS = {
    "observedGeneration": 1,
    "conditions": [CONDITION, CONDITION | {"type": "Degraded", "status": "True"}],
    "url": "http://docs.default.svc.cluster.local",
    "revision": "0123456789ab",
    "renderVersion": 1,
    "steps": [
        {"name": "caption", "source": "InferenceService", "model": "Qwen2.5-VL", "ready": True, "readyReplicas": 1},
        {"name": "enhance", "source": "Endpoint", "model": "gpt-oss-20b", "ready": False},
    ],
    "gateway": {
        "replicas": 2,
        "readyReplicas": 1,
        "ready": "1/2",
        "selector": "app=docs",
        "image": "sightline-pipeline",
    },
    "batches": {"active": 1},
    "lastDrift": {"time": TIME, "object": "Deployment docs", "fields": ["spec.replicas"]},
}
BATCH_STATUS = {
    "observedGeneration": 1,
    "conditions": [CONDITION | {"type": "Progressing", "status": "True", "reason": "Running"}],
    "state": "Running",
    "progress": {"total": 1000, "succeeded": 630, "failed": 10, "percent": 64, "done": "640/1000"},
    "throughput": {"itemsPerSecond": "12.4", "window": "5m"},
    "eta": "29s",
    "failureSummary": [{"step": "decode", "code": "decode_failed", "count": 10, "sampleCustomId": "a.jpg"}],
    "jobs": {"plan": "night-plan", "run": "night-run-0123ab"},
}


def test_status_is_a_subresource_and_its_conditions_are_keyed(api: Api, namespace: str):
    manifest = pipeline(namespace=namespace) | {"status": PIPELINE_STATUS}
    assert "status" not in api.created(manifest)
    patched = api.patch_status(manifest, PIPELINE_STATUS)
    assert patched.status_code == 200, patched.text
    assert patched.json()["status"] == PIPELINE_STATUS
    assert patched.json()["metadata"]["generation"] == 1
    twice = refusal(api.patch_status(manifest, {"conditions": [CONDITION, CONDITION]}))
    assert "Duplicate value" in twice


def test_two_writers_of_conditions_leave_each_other_alone(api: Api, apiserver: ApiServer, namespace: str):
    manifest = pipeline(namespace=namespace)
    api.created(manifest)
    for manager, kind in (("ours", "Ready"), ("theirs", "Blessed"), ("ours", "Ready")):
        status = {"conditions": [CONDITION | {"type": kind}]}
        body = {key: manifest[key] for key in ("apiVersion", "kind", "metadata")} | {"status": status}
        response = api.client.patch(
            api.path(manifest, manifest["metadata"]["name"], "status"),
            content=json.dumps(body),
            headers={"Content-Type": "application/apply-patch+yaml"},
            params={"fieldManager": manager},
        )
        assert response.status_code == 200, response.text
    assert {each["type"] for each in response.json()["status"]["conditions"]} == {"Ready", "Blessed"}


def test_a_status_that_the_schema_does_not_know_is_noticed(api: Api, namespace: str):
    manifest = batch(namespace=namespace)
    api.created(manifest)
    response = api.patch_status(manifest, {"progress": {"totl": 1}})
    assert 'unknown field "status.progress.totl"' in refusal(response)


# --- kubectl ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(apiserver: ApiServer, api: Api) -> str:
    """A namespace with one of each, with a status."""
    with apiserver.namespace() as namespace:
        for manifest, status in (
            (pipeline(namespace=namespace), PIPELINE_STATUS),
            (batch(namespace=namespace), BATCH_STATUS),
        ):
            api.created(manifest)
            assert api.patch_status(manifest, status).status_code == 200
        return namespace


@pytest.mark.parametrize(
    ("kind", "wide", "columns", "row"),
    [
        (
            "vpipe", False, ["NAME", "READY", "DEGRADED", "CAPTION", "ENHANCE", "REPLICAS", "AGE"],
            ["docs", "False", "True", "Qwen2.5-VL", "gpt-oss-20b", "1/2"],
        ),
        (
            "vpipe", True,
            ["NAME", "READY", "DEGRADED", "CAPTION", "ENHANCE", "REPLICAS", "URL", "REASON", "AGE"],
            ["docs", "False", "True", "Qwen2.5-VL", "gpt-oss-20b", "1/2", PIPELINE_STATUS["url"], "CaptionNotReady"],
        ),
        (
            "vbatch", False, ["NAME", "STATE", "PIPELINE", "DONE", "%", "FAILED", "RATE", "ETA", "AGE"],
            ["night", "Running", "docs", "640/1000", "64", "10", "12.4", "29s"],
        ),
        (
            "vbatch", True, ["NAME", "STATE", "PIPELINE", "DONE", "%", "FAILED", "RATE", "ETA", "REASON", "AGE"],
            ["night", "Running", "docs", "640/1000", "64", "10", "12.4", "29s", "Running"],
        ),
    ],
)  # fmt: skip
def test_get_reads_like_a_dashboard(
    apiserver: ApiServer, shown: str, kind: str, wide: bool, columns: list[str], row: list[str]
):
    told = apiserver.kubectl("get", kind, "-n", shown, *(["-o", "wide"] if wide else [])).stdout.splitlines()
    assert told[0].split() == columns
    assert told[1].split()[:-1] == row


def test_both_are_of_the_category(apiserver: ApiServer, shown: str):
    told = apiserver.kubectl("get", "vision", "-n", shown, "-o", "name").stdout.split()
    assert sorted(told) == ["visionbatch.sightline.dev/night", "visionpipeline.sightline.dev/docs"]


def test_batches_are_selected_by_pipeline_and_state(apiserver: ApiServer, api: Api, namespace: str):
    for name, changes in (("a", {}), ("b", {"pipelineRef.name": "other"}), ("c", {"desiredState": "Paused"})):
        api.created(batch(changes, name=name, namespace=namespace))

    def found(selector: str) -> list[str]:
        names = apiserver.kubectl("get", "vbatch", "-n", namespace, "-o", "name", f"--field-selector={selector}").stdout
        return sorted(name.rpartition("/")[2] for name in names.split())

    assert found("spec.pipelineRef.name=docs") == ["a", "c"]
    assert found("spec.pipelineRef.name=docs,spec.desiredState=Running") == ["a"]
    assert found("spec.desiredState!=Running") == ["c"]


def test_scale_sets_the_gateways_replicas(apiserver: ApiServer, api: Api, namespace: str):
    manifest = pipeline(namespace=namespace)
    api.created(manifest)
    assert api.patch_status(manifest, PIPELINE_STATUS).status_code == 200
    apiserver.kubectl("scale", "vpipe/docs", "-n", namespace, "--replicas=3", "--current-replicas=1")
    scale = api.client.get(api.path(manifest, "docs", "scale")).json()
    assert scale["spec"] == {"replicas": 3}
    assert scale["status"] == {"replicas": 2, "selector": "app=docs"}
    assert api.client.get(api.path(manifest, "docs")).json()["spec"]["gateway"]["replicas"] == 3


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("vpipe", "A caption→enhance endpoint"),
        ("vpipe.spec", "The step that looks at the image."),
        ("vpipe.spec.caption.inferenceService.rollout", "no successor waits for the GPU that it holds"),
        ("vpipe.spec.gateway.auth", "anybody may has to be said"),
        ("vpipe.spec.batches.schedule", "Five fields of cron"),
        ("vpipe.status.conditions.reason", "One word for why"),
        ("vbatch.spec.desiredState", "Cancelled: for good"),
        ("vbatch.status.progress.done", "Done of all, such as"),
    ],
)
def test_explain_is_a_manual(apiserver: ApiServer, path: str, words: str):
    told = " ".join(apiserver.kubectl("explain", path).stdout.split())
    assert words in told


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("**/*.yaml")), ids=lambda path: path.name)
def test_samples_are_accepted(apiserver: ApiServer, path: Path):
    ours = [each for each in yaml.safe_load_all(path.read_text()) if each and each["kind"] in PLURALS]
    assert ours, "a sample without an object of ours"
    text = yaml.safe_dump_all(ours)
    apiserver.kubectl("apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)
