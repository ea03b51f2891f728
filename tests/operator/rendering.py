"""What the tests render: objects of every kind of step, mode and option, and what they became (golden/).

`python -m tests.operator.rendering` writes the golden files of the newest version, and says their digest.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sightline_operator.render import OPTIONAL_KINDS, RENDER_VERSION, render_batch, render_pipeline, retried
from sightline_operator.render.cli import as_yaml
from sightline_operator.render.names import digest
from sightline_operator.settings import RenderSettings
from tests.operator.objects import GONE, batch, pipeline

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"
DIGESTS: Mapping[int, str] = {1: "25629de8f66f5143da1923104fa10340e01dda7bbade2c06668712093039539a"}
"""Of all golden files of a version. Until Sightline 0.1.0 is out, a change of version 1 is a new digest here. From then
on what it renders stays for ever: another output is another version, or every upgrade restarts somebody's models."""

PLAN = {"shards": 3, "items": 2500}
UID = "11111111-2222-4333-8444-555555555555"
KNATIVE = RenderSettings(deployment_mode="Serverless")
KEYS = {"apiKeysSecretRef": {"name": "keys", "key": "keys"}}
STORE = {"bucket": "images", "endpoint": "http://minio.storage.svc:9000", "pathStyle": True}
OPEN_STORE = STORE | {"credentialsSecretRef": {"name": "images"}}


@dataclass(frozen=True)
class Case:
    """One object to be rendered.

    batch   a VisionBatch of the pipeline; then its children are what is rendered
    """

    pipeline: dict[str, Any]
    batch: dict[str, Any] | None = None
    plan: Mapping[str, Any] | None = None
    settings: RenderSettings = field(default_factory=RenderSettings)
    kinds: frozenset[str] = OPTIONAL_KINDS

    def rendered(self, version: int | None = None) -> tuple[dict[str, Any], ...]:
        """All children; by the given version, as an object that was rendered by it before."""
        cr = self.pipeline
        if version is not None:
            status = {"renderVersion": version, "observedGeneration": 1}
            cr = {**cr, "metadata": {**cr["metadata"], "generation": 1}, "status": status}
        if self.batch is not None:
            return tuple(render_batch(self.batch, cr, self.plan, self.settings).values())
        return render_pipeline(cr, self.settings, self.kinds)


def owned(cr: dict[str, Any]) -> dict[str, Any]:
    """As the API server has it: with a uid, so that its children have an owner."""
    return {**cr, "metadata": {**cr["metadata"], "uid": UID}}


def cases() -> dict[str, Case]:
    """By name. Their golden files are called so."""
    return _pipelines() | _batches() | {f"sample-{name}": case for name, case in _samples()}


def _pipelines() -> dict[str, Case]:
    gpu = {"caption.inferenceService": {"gpu": {"count": 2}, "quantization": "8bit", "model": {"name": "org/vlm"}}}
    everything = {
        "caption.inferenceService": {
            "model": {"name": "org/vlm", "revision": "abc", "tokenSecretRef": {"name": "hub", "key": "token"}},
            "runtime": {"image": "mirror.example/describe:7"},
            "args": ["--max-batch=16"],
            "replicas": {"min": 2, "max": 5},
            "scaling": {"metric": "CPU", "target": 60},
            "rollout": "Availability",
            "gpu": {"count": 1, "resourceName": "nvidia.com/mig-3g.40gb"},
            "resources": {"requests": {"cpu": 2, "memory": "20Gi"}, "limits": {"memory": "24Gi"}},
            "nodeSelector": {"accelerator": "h100"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
        },
        "caption.prompt": "What is it?",
        "caption.generation": {"maxTokens": 200, "temperature": 0.5, "topP": 0.9, "seed": 7},
        "caption.timeout": "45.5s",
        "caption.retry": {"maxAttempts": 3, "perTryTimeout": "20s"},
        "caption.circuitBreaker": {"consecutiveErrors": 4},
        "enhance": {
            "endpoint": {
                "url": "https://llm.example.com:8443/v1",
                "model": "big",
                "authSecretRef": {"name": "llm", "key": "key"},
                "caSecretRef": {"name": "llm", "key": "ca.pem"},
            },
            "circuitBreaker": {"errorPercent": 30, "minRequests": 10, "openFor": "1m"},
            "maxInFlight": 8,
        },
        "enhancePolicy": {"default": "OnRequest", "onFailure": "Fail", "minRemaining": "5s"},
        "gateway": {
            "auth": KEYS,
            "image": "mirror.example/gateway:7",
            "service": {"type": "LoadBalancer", "port": 8081, "annotations": {"cloud.example/internal": "true"}},
            "httpRoute": {"parentRefs": [{"name": "public", "namespace": "edge", "sectionName": "https"}]},
            "autoscaling": {"minReplicas": 2, "maxReplicas": 9},
            "serviceMonitor": {"interval": "1.5m", "labels": {"release": "prometheus"}},
            "deadline": {"default": "60s", "max": "3m"},
            "logLevel": "debug",
            "limits": {"maxImageBytes": 1000000},
        },
        "storage": {"s3": OPEN_STORE},
    }
    overrides = {
        "metadata": {"annotations": {"team": "vision"}, "labels": {"team": "vision"}},
        "spec": {
            "affinity": {"nodeAffinity": {}},
            "volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "hub"}}],
            "containers": [{"name": "kserve-container", "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}]}],
        },
    }
    runtime = {"name": "vllm", "modelFormat": "vLLM", "protocol": "OpenAI"}
    return {
        "minimal": Case(owned(pipeline())),
        "everything": Case(owned(pipeline(everything))),
        "gpu": Case(owned(pipeline(gpu))),
        "caption-only": Case(owned(pipeline({"enhancePolicy": {"default": "Never"}}))),
        "knative": Case(
            owned(pipeline({"caption.inferenceService": {"replicas": {"min": 0, "max": 3}}})), settings=KNATIVE
        ),
        "knative-concurrency": Case(
            owned(
                pipeline(
                    {
                        "caption.inferenceService": {
                            "replicas": {"min": 0, "max": 3},
                            "scaling": {"metric": "Concurrency", "target": 4},
                        }
                    }
                )
            ),
            settings=RenderSettings(deployment_mode="Knative"),
        ),
        "raw-deployment": Case(owned(pipeline()), settings=RenderSettings(deployment_mode="RawDeployment")),
        "runtime": Case(
            owned(pipeline({"enhance.inferenceService": {"runtime": runtime, "model": {"name": "org/llm"}}}))
        ),
        "weights-from-a-claim": Case(
            owned(pipeline({"caption.inferenceService": {"model": {"uri": "pvc://weights/qwen"}}}))
        ),
        "references": Case(
            owned(
                pipeline(
                    {
                        "caption": {"inferenceServiceRef": {"name": "theirs", "model": "describe"}},
                        "enhance": {"inferenceServiceRef": {"name": "llm", "protocol": "OpenAI", "path": "/openai"}},
                    }
                )
            )
        ),
        "suspended": Case(owned(pipeline({"suspend": True, "gateway.autoscaling": {"maxReplicas": 3}}))),
        "orphans": Case(owned(pipeline({"deletionPolicy": "OrphanModels", "networkPolicy": "Unmanaged"}))),
        "overrides": Case(owned(pipeline({"caption.inferenceService": {"podTemplateOverrides": overrides}}))),
        "cloud-identity": Case(
            owned(pipeline({"storage": {"s3": {"bucket": "images", "serviceAccountName": "reader"}}}))
        ),
        "gateway-makes-batches": Case(
            owned(pipeline({"gateway.batches": "VisionBatches", "storage": {"s3": OPEN_STORE | {"prefix": "own"}}}))
        ),
        "no-kserve": Case(owned(pipeline()), kinds=frozenset()),
        "no-namespace": Case({**pipeline(), "metadata": {"name": "docs"}}),
    }


def _batches() -> dict[str, Case]:
    keyed = owned(pipeline({"gateway.auth": KEYS}))
    queued = {"queueName": "vision", "minParallelism": 2, "parallelism": 2, "priorityClassName": "low"}
    stores = {"input.s3Prefix": OPEN_STORE, "output.s3": OPEN_STORE | {"bucket": "captions"}}
    stored = owned(pipeline({"storage": {"s3": OPEN_STORE}}))
    uploaded = {"input": {"upload": {"fileId": "file-1"}}, "output": GONE}
    listed = {
        "input": {"manifest": {"uri": "s3://lists/a/list.csv", "format": "CSV"}},
        "output": {"s3": OPEN_STORE, "sidecars": OPEN_STORE, "existing": "Append", "parquet": True},
        "options.reuse": True,
    }
    again = batch({"input": {"retryOf": {"batchName": "night", "only": "Unenhanced"}}}, name="again")
    night = batch(stores) | {"status": {"fingerprint": "0123456789ab"}}
    night["metadata"]["uid"] = "9b2f"
    known = {"status": {"retryOf": retried(night)}}
    proxies = {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": ".svc"}
    return {
        "batch-upload": Case(stored, owned(batch(uploaded))),
        "batch-manifest": Case(stored, owned(batch(listed))),
        "batch-retry": Case(stored, owned(again) | known),
        "batch-proxy": Case(owned(pipeline()), owned(batch()), settings=RenderSettings(worker_env=proxies)),
        "batch-plan": Case(owned(pipeline()), owned(batch())),
        "batch": Case(keyed, owned(batch(stores | {"completionWindow": "24h"})), PLAN),
        "batch-queued": Case(keyed, owned(batch(queued)), PLAN),
        "batch-paused": Case(owned(pipeline()), owned(batch({"desiredState": "Paused"})), PLAN),
        "batch-empty": Case(owned(pipeline()), owned(batch()), {"shards": 0, "items": 0}),
        "batch-dry": Case(owned(pipeline()), owned(batch({"dryRun": True})), PLAN),
        "batch-unmanaged": Case(owned(pipeline({"networkPolicy": "Unmanaged"})), owned(batch()), PLAN),
    }


def _samples() -> Iterator[tuple[str, Case]]:
    loaded = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(SAMPLES.glob("*.yaml"))}
    placed = {name: owned({**cr, "metadata": {**cr["metadata"], "namespace": "vision"}}) for name, cr in loaded.items()}
    pipelines = {cr["metadata"]["name"]: cr for cr in placed.values() if cr["kind"] == "VisionPipeline"}
    for name, cr in placed.items():
        if cr["kind"] == "VisionPipeline":
            yield name, Case(cr)
        else:
            yield name, Case(pipelines[cr["spec"]["pipelineRef"]["name"]], cr, PLAN)


def golden(version: int, name: str) -> Path:
    return GOLDEN / f"v{version}" / f"{name}.yaml"


def golden_digest(version: int) -> str:
    return digest({path.stem: path.read_text() for path in (GOLDEN / f"v{version}").glob("*.yaml")}, 64)


def main() -> None:
    folder = GOLDEN / f"v{RENDER_VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = cases()
    for path in folder.glob("*.yaml"):
        if path.stem not in wanted:
            path.unlink()
    for name, case in wanted.items():
        golden(RENDER_VERSION, name).write_text(as_yaml(case.rendered(RENDER_VERSION)))
    print(f"digest of version {RENDER_VERSION}: {golden_digest(RENDER_VERSION)}")


if __name__ == "__main__":
    main()
