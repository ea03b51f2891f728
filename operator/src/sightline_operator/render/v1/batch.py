"""The Jobs of a VisionBatch: plan, run (one index a shard), finish; and the page that tells the workers what to do."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from sightline_operator.api import Batch, Pipeline, S3Location, seconds
from sightline_operator.api.batch import Retried
from sightline_operator.contract import Exit
from sightline_operator.render.errors import RenderError
from sightline_operator.render.merge import overlaid
from sightline_operator.render.names import child_name, digest, without_empty
from sightline_operator.render.v1.frame import Frame, Manifest
from sightline_operator.render.v1.gateway import COMPONENT as GATEWAY
from sightline_operator.render.v1.gateway import secret_volume
from sightline_operator.render.v1.network import EVERYWHERE, WORKER, to_url
from sightline_operator.render.v1.pods import (
    CONTAINER_SECURITY,
    POD_SECURITY,
    TMP,
    mount,
    resources_of,
    scratch,
    variables,
)
from sightline_operator.render.v1.steps import host
from sightline_operator.render.v1.stores import Stores, page_of, service_accounts, stores

OUTPUT_SCHEMA = 1
"""Of a result line; part of the fingerprint, so that no batch holds lines of two shapes."""

RETRIES = 5
"""Of one shard, and of planning and finishing. What is not the worker's fault is not counted."""
KEPT_SECONDS = 86_400
"""Jobs that are over stay for a day, so that an operator that was away still hears their last words."""
FLUSH_SECONDS = 20

CONFIGURATION = ("batch", "/etc/sightline/batch")
KEYS = ("api-keys", "/etc/sightline/keys")
CREDENTIALS = "/etc/sightline/credentials"
QUEUE = "kueue.x-k8s.io/queue-name"
PROXIES = frozenset({"HTTP_PROXY", "HTTPS_PROXY"})
MIN_PARALLELISM = "kueue.x-k8s.io/job-min-parallelism"


def fingerprint(spec: Batch, revision: str) -> str:
    """12 hexadecimal digits over everything that decides the results: the prefix that they lie under."""
    options = spec.options
    decides = {
        "revision": revision,
        "enhance": options.enhance,
        "prompt": options.prompt,
        "generation": options.generation.model_dump(by_alias=True, exclude_none=True),
        "schema": OUTPUT_SCHEMA,
    }
    return digest(decides, 12)


@dataclass(frozen=True)
class Work:
    """A batch as it is rendered: what it is, whose it is, and where its images and results are."""

    spec: Batch
    pipeline: Pipeline
    stores: Stores
    retried: Retried | None

    @classmethod
    def of(cls, spec: Batch, pipeline: Pipeline, output: S3Location | None, retried: Retried | None) -> Work:
        """Raises RenderError: a store cannot be told, or no pod can use them all."""
        found = stores(spec, pipeline, output, retried)
        if len(names := service_accounts(found.values())) > 1:
            message = f"the stores name the service accounts {' and '.join(names)}, and a pod has one"
            raise RenderError("spec.output.s3.serviceAccountName", message)
        return cls(spec, pipeline, found, retried)

    @property
    def credentials(self) -> dict[str, str]:
        """Names of Secrets, by what they open."""
        return {n: s3.credentials_secret_ref.name for n, s3 in self.stores.items() if s3.credentials_secret_ref}


def configuration(frame: Frame, work: Work, revision: str, mark: str) -> Manifest:
    """What every worker of this batch reads at its start. Parallelism and the like may change while it runs."""
    spec, pipeline = work.spec, work.pipeline
    gateway = host(frame, child_name(frame.pipeline, GATEWAY))
    port = pipeline.gateway.service.port
    page = {
        "batch": without_empty({"name": frame.name, "namespace": frame.namespace, "uid": frame.uid}),
        "fingerprint": mark,
        "pipeline": without_empty(
            {
                "name": frame.pipeline,
                "url": f"http://{gateway}" + (f":{port}" if port != 80 else ""),
                "revision": revision,
                "apiKeyFile": f"{KEYS[1]}/api-keys" if pipeline.gateway.auth.api_keys_secret_ref else None,
                "timeoutSeconds": seconds(pipeline.gateway.deadline.max),
            }
        ),
        **page_of(spec, work.stores, work.retried),
        "credentials": {name: f"{CREDENTIALS}/{name}" for name in work.credentials},
        "options": spec.options.model_dump(by_alias=True, exclude_none=True),
        "shardSize": spec.shard_size,
        "chunkSize": spec.chunk_size,
        "maxInFlight": spec.max_in_flight_per_worker,
        "maxAttempts": spec.item_retry.max_attempts,
        "maxFailedItems": spec.max_failed_items.model_dump(exclude_none=True) if spec.max_failed_items else None,
        "dryRun": spec.dry_run,
    }
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": frame.metadata(frame.child("batch"), frame.labels(WORKER)),
        "data": {"batch.json": json.dumps(page, indent=2, sort_keys=True, ensure_ascii=False) + "\n"},
    }


def policy(frame: Frame, work: Work) -> Manifest:
    """Beside what the pipeline lets all workers reach: the stores of this batch, and the proxy before them."""
    endpoints = [s3.endpoint for s3 in work.stores.values()]
    reached = [to_url(url) if url else {"to": EVERYWHERE, "ports": _HTTPS} for url in endpoints]
    reached += [to_url(url) for name, url in sorted(frame.settings.worker_env.items()) if name in PROXIES]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": frame.metadata(frame.child(WORKER), frame.labels(WORKER)),
        "spec": {
            "podSelector": {"matchLabels": frame.selector(WORKER)},
            "policyTypes": ["Ingress", "Egress"],
            "egress": [item for index, item in enumerate(reached) if item not in reached[:index]],
        },
    }


_HTTPS = [{"protocol": "TCP", "port": 443}]


# --- Jobs ------------------------------------------------------------------------------------------------------------


def single(frame: Frame, work: Work, verb: str) -> Manifest:
    """The plan Job or the finish Job: one pod that ends well, and does nothing when it was done already."""
    return _job(
        frame,
        frame.child(verb),
        {
            "backoffLimit": RETRIES,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules(has_indexes=False)},
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "template": _template(frame, work, verb),
        },
    )


def run(frame: Frame, work: Work, *, shards: int, mark: str) -> Manifest:
    """One index a shard. Made once: whether it runs and how wide is then Kueue's to say, where there is a queue."""
    spec = work.spec
    window = {"activeDeadlineSeconds": math.ceil(seconds(spec.completion_window))} if spec.completion_window else {}
    job = _job(
        frame,
        frame.child(f"run-{mark[:6]}"),
        {
            "suspend": spec.queue_name is not None or spec.desired_state != "Running",
            "completionMode": "Indexed",
            "completions": shards,
            "parallelism": min(spec.parallelism, shards),
            "backoffLimitPerIndex": RETRIES,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": _failure_rules(has_indexes=True)},
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            **window,
            "template": _template(frame, work, "run"),
        },
    )
    if spec.queue_name is not None:
        job["metadata"]["labels"][QUEUE] = spec.queue_name
    if spec.min_parallelism is not None:
        job["metadata"].setdefault("annotations", {})[MIN_PARALLELISM] = str(spec.min_parallelism)
    return job


def _job(frame: Frame, name: str, spec: Manifest) -> Manifest:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": frame.metadata(name, frame.labels(WORKER)),
        "spec": spec,
    }


def _failure_rules(*, has_indexes: bool) -> list[dict[str, Any]]:
    """First match wins, and the order is part of the contract (reference/operator.md §3.5).

    Node drains and preemptions come first: a pod that they end has an exit code as well.
    """
    rules: list[dict[str, Any]] = [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        _on_exit("FailJob", Exit.UNUSABLE),
        _on_exit("FailIndex" if has_indexes else "FailJob", Exit.SHARD_CORRUPT),
        _on_exit("FailJob", Exit.REVISION_MISMATCH),
        _on_exit("Ignore", Exit.BACKEND_UNAVAILABLE, Exit.INTERRUPTED),
    ]
    others = {"containerName": WORKER, "operator": "NotIn", "values": sorted(int(code) for code in Exit if code)}
    return [*rules, {"action": "Count", "onExitCodes": others}]


def _on_exit(action: str, *codes: Exit) -> dict[str, Any]:
    values = sorted(int(code) for code in codes)
    return {"action": action, "onExitCodes": {"containerName": WORKER, "operator": "In", "values": values}}


def _template(frame: Frame, work: Work, verb: str) -> Manifest:
    """A worker's pod. It talks to the gateway and to the store, needs no GPU and no right in the cluster."""
    spec = work.spec
    longest = math.ceil(seconds(work.pipeline.gateway.deadline.max))
    volumes, mounts = _files(frame, work)
    container = {
        "name": WORKER,
        "image": frame.settings.images["worker"],
        "command": ["python", "-m", "sightline.jobs"],  # the gateway's image is the worker's, too
        "args": [verb],
        "env": variables(_environment(frame, work)),
        "resources": resources_of(spec.resources, cpu="250m", memory="512Mi"),
        "securityContext": dict(CONTAINER_SECURITY),
        "volumeMounts": [mount(TMP), *mounts],
    }
    pod = without_empty(
        {
            "restartPolicy": "Never",
            "serviceAccountName": _service_account(frame, work),
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "priorityClassName": spec.priority_class_name,
            "terminationGracePeriodSeconds": longest + FLUSH_SECONDS,
            "securityContext": dict(POD_SECURITY),
            "containers": [container],
            "volumes": [scratch(TMP), *volumes],
        }
    )
    base = {"metadata": {"labels": frame.labels(WORKER)}, "spec": pod | {"automountServiceAccountToken": False}}
    template = overlaid(base, spec.pod_template_overrides, "spec.podTemplateOverrides")
    template["metadata"]["labels"] |= frame.labels(WORKER)
    return template


def _environment(frame: Frame, work: Work) -> dict[str, object | None]:
    """The page and what the libraries behind it look for: a region (a cloud's identity asks there), proxies.

    The gateway is reached past any proxy.
    """
    region = next((s3.region for s3 in work.stores.values() if s3.region), None)
    more = dict(frame.settings.worker_env)
    if PROXIES & more.keys():
        own = [more.get("NO_PROXY", ""), host(frame, child_name(frame.pipeline, GATEWAY))]
        more["NO_PROXY"] = ",".join(filter(None, own))
    return {"BATCH_FILE": f"{CONFIGURATION[1]}/batch.json", "AWS_REGION": region, **dict(sorted(more.items()))}


def _files(frame: Frame, work: Work) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    volumes: list[dict[str, Any]] = [{"name": CONFIGURATION[0], "configMap": {"name": frame.child("batch")}}]
    mounts = [mount(CONFIGURATION, is_read_only=True)]
    if (keys := work.pipeline.gateway.auth.api_keys_secret_ref) is not None:
        volumes.append(secret_volume(KEYS[0], keys, "api-keys"))
        mounts.append(mount(KEYS, is_read_only=True))
    for name, secret in work.credentials.items():
        volumes.append({"name": f"{name}-credentials", "secret": {"secretName": secret, "defaultMode": 0o440}})
        mounts.append(mount((f"{name}-credentials", f"{CREDENTIALS}/{name}"), is_read_only=True))
    return volumes, mounts


def _service_account(frame: Frame, work: Work) -> str:
    """One that the cloud gives rights to a store, if one is named; else that of all workers of the pipeline."""
    return next(iter(service_accounts(work.stores.values())), child_name(frame.pipeline, WORKER))
