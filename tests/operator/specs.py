"""Specs of VisionPipelines and VisionBatches that the API server would take, drawn at random."""

from typing import Any

from hypothesis import strategies as st

from tests.operator.objects import batch, pipeline

NAMES = st.from_regex(r"[a-z][a-z0-9]{0,6}(-[a-z0-9]{1,4}){0,2}", fullmatch=True)
SECRET = st.fixed_dictionaries({"name": NAMES, "key": st.sampled_from(["key", "api.key", "TOKEN_1"])})
PROMPT = st.text(alphabet='Was ist das? "é\n', min_size=1, max_size=12)
SECONDS = st.sampled_from(["1s", "1.5s", "750ms", "10s", "29s"])
LONGER = st.sampled_from(["30s", "45s", "1m", "1m30s"])


def objects(required: dict[str, Any], optional: dict[str, Any] | None = None) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(required, optional=optional or {})


RESOURCES = st.sampled_from(
    [
        {},
        {"requests": {"cpu": "250m"}},
        {"limits": {"memory": "3Gi"}},
        {"requests": {"cpu": 2, "memory": "20Gi"}, "limits": {"cpu": "4", "memory": "24Gi"}},
        {"requests": {"ephemeral-storage": "1Gi"}},
    ]
)
GENERATION = objects(
    {},
    {
        "maxTokens": st.integers(1, 4096),
        "temperature": st.sampled_from([0, 0.5, 2]),
        "topP": st.sampled_from([0.1, 1]),
        "seed": st.integers(0, 4_294_967_295),
    },
)
MODEL = st.one_of(
    st.just({}),
    objects({"name": st.sampled_from(["org/model", "/opt/model"])}, {"revision": NAMES, "tokenSecretRef": SECRET}),
    st.sampled_from([{"uri": "s3://bucket/x"}, {"uri": "pvc://claim/x"}, {"uri": "hf://org/model"}]),
)
REPLICAS = st.sampled_from([{"min": 0, "max": 1}, {"min": 1, "max": 1}, {"min": 3, "max": 3}])
SCALED = st.sampled_from([{"metric": "CPU", "target": 70}, {"metric": "Memory", "target": 80}])
GPU = objects({"count": st.integers(0, 8)}, {"resourceName": st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"])})
OVERRIDES = st.sampled_from(
    [
        {"metadata": {"labels": {"team": "a"}, "annotations": {"b": "c"}}},
        {"spec": {"runtimeClassName": "gvisor", "imagePullSecrets": [{"name": "mirror"}]}},
        {"spec": {"volumes": [{"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}]}},
    ]
)
SERVICE_PARTS: dict[str, Any] = {
    "model": MODEL,
    "args": st.lists(st.sampled_from(["--max-batch=4", "--threads=2"]), max_size=2),
    "resources": RESOURCES,
    "gpu": GPU,
    "rollout": st.sampled_from(["ResourceAware", "Availability"]),
    "loadTimeout": st.sampled_from(["5m", "2h"]),
    "nodeSelector": st.just({"disk": "ssd"}),
    "tolerations": st.just([{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]),
    "podTemplateOverrides": OVERRIDES,
}
SERVICE = st.one_of(
    objects({}, SERVICE_PARTS | {"replicas": REPLICAS}),
    objects({"replicas": st.just({"min": 1, "max": 6})}, SERVICE_PARTS | {"scaling": SCALED}),
    objects(
        {"runtime": objects({"name": NAMES}, {"protocol": st.sampled_from(["V2", "OpenAI"]), "servedModel": NAMES})},
        {"model": MODEL},
    ),
)
PLACES = st.one_of(
    objects({"inferenceService": SERVICE}),
    objects({"inferenceServiceRef": objects({"name": NAMES}, {"model": NAMES, "protocol": st.just("OpenAI")})}),
    objects(
        {
            "endpoint": objects(
                {
                    "url": st.sampled_from(
                        [
                            "https://llm.example.com/v1",
                            "http://10.1.2.3:8000",
                            "http://[fd00::7]:8000/v1",
                            "http://vllm.models.svc.cluster.local:8000",
                            "http://vllm",
                        ]
                    ),
                    "model": st.sampled_from(["gpt-oss-20b", "org/model"]),
                },
                {"authSecretRef": SECRET, "caSecretRef": SECRET},
            )
        }
    ),
)
BREAKER = st.one_of(
    objects({"errorPercent": st.integers(1, 100)}, {"minRequests": st.integers(1, 100), "openFor": LONGER}),
    objects({"consecutiveErrors": st.integers(1, 9)}),
)
STEP_PARTS = {
    "timeout": LONGER,
    "retry": objects({"maxAttempts": st.integers(1, 5)}, {"perTryTimeout": SECONDS}),
    "circuitBreaker": BREAKER,
    "maxInFlight": st.integers(1, 100),
}


def step(parts: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda place, rest: {**place, **rest}, PLACES, objects({}, STEP_PARTS | parts))


S3 = st.one_of(
    objects(
        {"bucket": st.just("images")},
        {
            "endpoint": st.sampled_from(["http://minio.storage.svc:9000", "https://s3.example.com"]),
            "region": st.just("eu-central-1"),
            "pathStyle": st.booleans(),
            "credentialsSecretRef": objects({"name": NAMES}),
        },
    ),
    objects({"bucket": st.just("images"), "serviceAccountName": st.just("reader")}),
)
STORED = pipeline({"storage": {"s3": {"bucket": "images"}}})
"""A pipeline with what batches may need of one, and """
EARLIER = {"output": {"bucket": "captions", "prefix": "b/"}, "images": {"bucket": "images", "region": "eu-west-1"}}
"""the batch that one may retry."""
GATEWAY = objects(
    {
        "auth": st.one_of(st.just({"none": True}), objects({"apiKeysSecretRef": SECRET})),
        "deadline": st.sampled_from([{"max": "3m"}, {"max": "5m", "default": "1m"}]),
    },
    {
        "replicas": st.integers(0, 9),
        "image": st.just("mirror.example/gateway:7"),
        "resources": RESOURCES,
        "service": objects({"port": st.sampled_from([80, 8080, 8081])}, {"type": st.just("LoadBalancer")}),
        "httpRoute": objects({"parentRefs": st.just([{"name": "public"}])}, {"hostnames": st.just(["a.example"])}),
        "autoscaling": objects({"maxReplicas": st.integers(1, 9)}),
        "serviceMonitor": objects({}, {"interval": st.sampled_from(["500ms", "30s", "1.5m"])}),
        "logLevel": st.sampled_from(["debug", "error"]),
        "limits": objects({}, {"maxImageBytes": st.integers(1, 10_000_000), "queueSize": st.integers(1, 100)}),
        "podTemplateOverrides": OVERRIDES,
    },
)
PIPELINES = st.builds(
    lambda name, spec: pipeline(name=name) | {"spec": spec},
    NAMES,
    objects(
        {"caption": step({"prompt": PROMPT, "generation": GENERATION}), "gateway": GATEWAY},
        {
            "enhance": step({"generation": GENERATION}),
            "storage": objects({"s3": S3}),
            "suspend": st.booleans(),
            "networkPolicy": st.sampled_from(["Managed", "Unmanaged"]),
            "deletionPolicy": st.sampled_from(["Delete", "OrphanModels"]),
        },
    ),
)
BATCHES = st.builds(
    lambda name, spec: batch(name=name) | {"spec": spec},
    NAMES,
    objects(
        {
            "pipelineRef": st.just({"name": "docs"}),
            "input": st.one_of(
                objects({"s3Prefix": S3}),
                st.sampled_from(
                    [
                        {"manifest": {"uri": "s3://lists/x"}},
                        {"manifest": {"uri": "s3://lists/x", "endpoint": "http://10.1.2.3:9000", "pathStyle": True}},
                        {"upload": {"fileId": "f1"}},
                        {"retryOf": {"batchName": "b"}},
                    ]
                ),
            ),
            "output": objects({}, {"s3": S3, "sidecars": S3, "parquet": st.booleans()}),
        },
        {
            "options": objects({}, {"prompt": PROMPT, "generation": GENERATION, "reuse": st.booleans()}),
            "parallelism": st.integers(2, 1000),
            "completionWindow": LONGER,
            "queueName": NAMES,
            "priorityClassName": NAMES,
            "resources": RESOURCES,
            "desiredState": st.sampled_from(["Running", "Paused"]),
        },
    ),
)
PLANS = st.none() | objects({"shards": st.integers(0, 2000), "items": st.integers(0, 10_000)})
