"""A small cluster in memory: an API server, KServe, a Deployment and a Job controller, a kubelet, an operator's cache.

Every part moves one small step when it is asked to, so that a test chooses who moves when, what the operator gets to
see of it, and where it dies. Nothing here waits or reads a clock.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sightline_operator.contract import Exit
from sightline_operator.decide import decide_batch, decide_pipeline
from sightline_operator.decide.decision import Apply, Decision, Delete, Note
from sightline_operator.observe.world import Answer, Key, World
from sightline_operator.settings import API_VERSION, RenderSettings

NAMESPACE = "vision"
ISVC_LABEL = "serving.kserve.io/inferenceservice"
START = datetime(2026, 1, 5, 12, 0, tzinfo=UTC)
SETTINGS = RenderSettings()
Object = dict[str, Any]


class Crash(Exception):
    """The operator dies here."""


class Conflict(Exception):
    """The name is taken."""


def stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def key_of(thing: Mapping[str, Any]) -> Key:
    return thing["kind"], thing["metadata"]["name"]


def condition(type: str, status: str, reason: str = "", message: str = "") -> Object:
    return {"type": type, "status": status, "reason": reason or type, "message": message}


def is_true(thing: Mapping[str, Any], type: str) -> bool:
    return any(c["type"] == type and c["status"] == "True" for c in thing.get("status", {}).get("conditions", ()))


@dataclass
class Cluster:
    """Objects of one namespace by kind and name, and the faults that its parts suffer from.

    log        every change, as a watch would tell it: key and the object, None when it went
    created    how often an object of each kind and name was created
    secrets    Secrets that exist; kubelets can't start pods that name others
    gpus       free ones
    bad        images that can't be pulled
    broken     images whose program ends with code 1
    slow       pods do not get ready
    """

    now: datetime = START
    objects: dict[Key, Object] = field(default_factory=dict)
    applied: dict[Key, Object] = field(default_factory=dict)
    log: list[tuple[Key, Object | None]] = field(default_factory=list)
    created: dict[Key, int] = field(default_factory=dict)
    secrets: set[str] = field(default_factory=set)
    gpus: int = 8
    runtimes: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    slow: bool = False
    kinds: frozenset[str] = frozenset({"InferenceService"})
    endpoints: dict[str, bool] = field(default_factory=dict)
    items: int = 40
    shards: int = 4
    failing: int = 0
    worker_exit: dict[str, int] = field(default_factory=dict)
    gateway_answers: bool = True
    version: int = 0
    writes: int = 0

    # The API server.

    def create(self, manifest: Mapping[str, Any]) -> Object:
        key = key_of(manifest)
        if key in self.objects:
            raise Conflict(f"{key} exists")
        thing = copy.deepcopy(dict(manifest))
        self.created[key] = self.created.get(key, 0) + 1
        thing["metadata"] |= {
            "namespace": NAMESPACE,
            "uid": f"uid-{key[0]}-{key[1]}-{self.created[key]}",
            "generation": 1,
            "creationTimestamp": stamp(self.now),
        }
        if key[0] == "Job":
            thing["spec"].setdefault("suspend", False)
            thing["spec"].setdefault("parallelism", 1)
        self._put(key, thing)
        return thing

    def apply(self, manifest: Mapping[str, Any]) -> Object:
        """Server-side apply: our fields are set, those that we had and no longer have are taken away."""
        key = key_of(manifest)
        if key not in self.objects:
            self.applied[key] = copy.deepcopy(dict(manifest))
            return self.create(manifest)
        live = copy.deepcopy(self.objects[key])
        _remove(live, self.applied.get(key, {}), manifest)
        _merge(live, manifest)
        self.applied[key] = copy.deepcopy(dict(manifest))
        return self.update(live)

    def update(self, thing: Object) -> Object:
        """Replace an object; its generation counts changes of the spec. An equal one changes nothing."""
        key, live = key_of(thing), self.objects[key_of(thing)]
        if _meaning(thing) == _meaning(live):
            return live
        thing = copy.deepcopy(thing)
        if thing.get("spec") != live.get("spec"):
            thing["metadata"]["generation"] = live["metadata"]["generation"] + 1
        self._put(key, thing)
        return thing

    def set_status(self, key: Key, status: Mapping[str, Any]) -> None:
        if key in self.objects:
            self.update({**self.objects[key], "status": copy.deepcopy(dict(status))})

    def delete(self, key: Key, uid: str | None = None) -> None:
        """Gone at once, and all that it owned with it."""
        thing = self.objects.get(key)
        if thing is None or (uid is not None and thing["metadata"]["uid"] != uid):
            return
        del self.objects[key]
        self.applied.pop(key, None)
        self.version += 1
        self.log.append((key, None))
        for other in [k for k, o in self.objects.items() if thing["metadata"]["uid"] in owners(o)]:
            self.delete(other)

    def _put(self, key: Key, thing: Object) -> None:
        self.version += 1
        thing["metadata"]["resourceVersion"] = str(self.version)
        self.objects[key] = thing
        self.log.append((key, copy.deepcopy(thing)))

    def of_kind(self, kind: str) -> list[Object]:
        return [copy.deepcopy(self.objects[key]) for key in sorted(self.objects) if key[0] == kind]

    def edit(self, key: Key, **spec: Any) -> None:
        """What a user does: change fields of the spec."""
        thing = copy.deepcopy(self.objects[key])
        for path, value in spec.items():
            *parents, name = path.split("__")
            target = thing["spec"]
            for parent in parents:
                target = target[parent]
            if value is None:
                target.pop(name, None)
            else:
                target[name] = value
        self.update(thing)

    # Its controllers. Each `step` moves one thing and says whether it did.

    def step(self, which: str) -> bool:
        return {"deployment": self.deployments, "kserve": self.kserve, "kubelet": self.kubelet, "job": self.jobs}[
            which
        ]()

    def settle_controllers(self) -> None:
        while any(self.step(name) for name in ("deployment", "kserve", "kubelet", "job")):
            pass

    def _pods_of(self, uid: str) -> list[Object]:
        return [pod for pod in self.of_kind("Pod") if uid in owners(pod)]

    def _make_pod(self, owner: Object, name: str, template: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        reference = {"kind": owner["kind"], "name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        metadata = {
            "name": name,
            "labels": {**template.get("metadata", {}).get("labels", {}), **extra.get("labels", {})},
            "annotations": {**template.get("metadata", {}).get("annotations", {}), **extra.get("annotations", {})},
            "ownerReferences": [reference | {"controller": True}],
        }
        self.create(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": metadata,
                "spec": template["spec"],
                "status": {"phase": "Pending"},
            }
        )

    def _rolling(self, owner: Object, wanted: int, template: Mapping[str, Any], extra: Mapping[str, Any]) -> bool:
        """Old pods go when their successors are ready, or first, when nothing is to surge."""
        mark = digest(template["spec"])[:8]
        pods = self._pods_of(owner["metadata"]["uid"])
        new = [pod for pod in pods if pod["metadata"]["name"].endswith(mark)]
        old = [pod for pod in pods if pod not in new]
        for pod in old:
            if (len(new) >= wanted and all(is_true(p, "Ready") for p in new)) or not wanted or self.gpus < 1:
                self._remove_pod(pod)
                return True
        for index in range(wanted):
            name = f"{owner['metadata']['name']}-{index}-{mark}"
            if ("Pod", name) not in self.objects:
                self._make_pod(owner, name, template, extra)
                return True
        for pod in new[wanted:]:
            self._remove_pod(pod)
            return True
        return False

    def _remove_pod(self, pod: Object) -> None:
        if pod["status"].get("nodeName"):
            self.gpus += gpus_of(pod)
        self.delete(key_of(pod))

    def deployments(self) -> bool:
        for thing in self.of_kind("Deployment"):
            wanted, template = thing["spec"].get("replicas", 1), thing["spec"]["template"]
            if self._rolling(thing, wanted, template, {}):
                return True
            pods = self._pods_of(thing["metadata"]["uid"])
            mark = digest(template["spec"])[:8]
            ready = sum(is_true(pod, "Ready") for pod in pods)
            status = {
                "observedGeneration": thing["metadata"]["generation"],
                "replicas": len(pods),
                "readyReplicas": ready,
                "updatedReplicas": sum(pod["metadata"]["name"].endswith(mark) for pod in pods),
            }
            if thing.get("status") != status:
                self.set_status(key_of(thing), status)
                return True
        return False

    def kserve(self) -> bool:
        if "InferenceService" not in self.kinds:
            return False
        for thing in self.of_kind("InferenceService"):
            name, metadata = thing["metadata"]["name"], thing["metadata"]
            is_stopped = metadata.get("annotations", {}).get("serving.kserve.io/stop") == "true"
            predictor = thing["spec"]["predictor"]
            runtime = predictor.get("model", {}).get("runtime")
            if runtime is not None and runtime not in self.runtimes:
                if self._no_runtime(thing, runtime):
                    return True
                continue
            given = predictor if runtime is None else {"containers": [{"name": "c", "image": f"{runtime}:1"}]}
            template = {"spec": {k: given[k] for k in ("containers", "volumes") if k in given}}
            extra = {"labels": {ISVC_LABEL: name}, "annotations": metadata.get("annotations", {})}
            wanted = 0 if is_stopped else predictor.get("minReplicas", 1)
            if self._rolling(thing, wanted, template, extra):
                return True
            pods = self._pods_of(metadata["uid"])
            is_ready = bool(pods) and all(is_true(pod, "Ready") for pod in pods)
            status = {
                "observedGeneration": 1,  # it lies (kserve #6081)
                "address": {"url": f"http://{name}-predictor.{NAMESPACE}.svc.cluster.local"},
                "conditions": [condition("Ready", "True" if is_ready else "False")],
            }
            if thing.get("status") != status:
                self.set_status(key_of(thing), status)
                return True
        return False

    def _no_runtime(self, thing: Object, runtime: str) -> bool:
        message = f"Waiting for runtime {runtime} to become available"
        info = {"reason": "RuntimeNotRecognized", "message": message}
        status = {
            "modelStatus": {"transitionStatus": "InvalidSpec", "lastFailureInfo": info},
            "conditions": [condition("Ready", "False")],
        }
        if thing.get("status") == status:
            return False
        self.set_status(key_of(thing), status)
        return True

    def kubelet(self) -> bool:
        for pod in self.of_kind("Pod"):
            status = self._pod_status(pod)
            if status != pod["status"]:
                if status.get("nodeName") and not pod["status"].get("nodeName"):
                    self.gpus -= gpus_of(pod)
                self.set_status(key_of(pod), status)
                return True
        return False

    def _pod_status(self, pod: Object) -> Object:
        now, container = pod["status"], pod["spec"]["containers"][0]
        if now["phase"] in ("Succeeded", "Failed") or "JOB" in pod["metadata"]["name"]:
            return now
        if gpus_of(pod) > self.gpus and not now.get("nodeName"):
            message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
            return {"phase": "Pending", "conditions": [condition("PodScheduled", "False", "Unschedulable", message)]}
        scheduled = condition("PodScheduled", "True")
        base: Object = {"phase": "Pending", "nodeName": "node-1"}
        missing = sorted(secrets_of(pod) - self.secrets)
        waiting: Object | None = None
        last: Object = {}
        if missing:
            waiting = {"reason": "CreateContainerConfigError", "message": f'secret "{missing[0]}" not found'}
        elif container["image"] in self.bad:
            waiting = {"reason": "ImagePullBackOff", "message": f'Back-off pulling image "{container["image"]}"'}
        elif container["image"] in self.broken:
            waiting = {"reason": "CrashLoopBackOff", "message": "back-off 5m0s restarting failed container"}
            last = {"terminated": {"exitCode": 1, "reason": "Error", "message": "weights are missing"}}
        if waiting is not None:
            row = {"name": container["name"], "ready": False, "state": {"waiting": waiting}, "lastState": last}
            return base | {"conditions": [scheduled], "containerStatuses": [row]}
        row = {"name": container["name"], "ready": not self.slow, "state": {"running": {}}, "lastState": {}}
        ready = condition("Ready", "False" if self.slow else "True")
        return base | {"phase": "Running", "conditions": [scheduled, ready], "containerStatuses": [row]}

    # Jobs. A worker's pod does its part in one step; the run Job does a shard a step.

    def jobs(self) -> bool:
        return any(self._job(job) for job in self.of_kind("Job"))

    def _job(self, job: Object) -> bool:
        spec, key = job["spec"], key_of(job)
        if is_true(job, "Complete") or is_true(job, "Failed") or spec.get("suspend"):
            return False
        part = spec["template"]["spec"]["containers"][0]["args"][0]
        code = self.worker_exit.get(part, 0)
        status = dict(job.get("status") or {"succeeded": 0, "active": 0})
        if code:
            return self._job_failed(job, part, code)
        done, wanted = status["succeeded"], spec.get("completions", 1)
        if done < wanted and not status["active"]:
            self.set_status(key, status | {"active": 1})
            return True
        if done < wanted:
            words = self._words(part, job["metadata"]["ownerReferences"][0]["name"]) if part != "run" else {}
            self._ended_pod(job, f"JOB-{part}-{done}", 0, words)
            self.set_status(key, status | {"succeeded": done + 1, "active": 0})
            return True
        conditions = [condition("Complete", "True")]
        self.set_status(key, status | {"conditions": conditions, "completionTime": stamp(self.now)})
        return True

    def _job_failed(self, job: Object, part: str, code: int) -> bool:
        is_fatal = code in (Exit.UNUSABLE, Exit.REVISION_MISMATCH)
        words = {"reason": "InputNotFound", "message": "no such bucket"} if part == "plan" else {"message": "it broke"}
        self._ended_pod(job, f"JOB-{part}-bad", code, words)
        message = (
            f"Container worker for pod {NAMESPACE}/x failed with exit code {code} matching FailJob rule at index 1"
        )
        reason = "PodFailurePolicy" if is_fatal else "FailedIndexes" if part == "run" else "BackoffLimitExceeded"
        status: Object = {"active": 0, "succeeded": 0, "conditions": [condition("Failed", "True", reason, message)]}
        if reason == "FailedIndexes":
            status |= {"succeeded": self.shards - 1, "failedIndexes": "1"}
        self.set_status(key_of(job), status)
        return True

    def _ended_pod(self, job: Object, suffix: str, code: int, words: Mapping[str, Any]) -> None:
        name = f"{job['metadata']['name']}-{suffix}"
        if ("Pod", name) in self.objects:
            return
        self._make_pod(job, name, job["spec"]["template"], {})
        ended = {"exitCode": code, "message": json.dumps(words), "finishedAt": stamp(self.now)}
        rows = [{"name": "worker", "state": {"terminated": ended}}]
        phase = "Failed" if code else "Succeeded"
        self.set_status(("Pod", name), {"phase": phase, "containerStatuses": rows})

    def _words(self, part: str, owner: str) -> Object:
        if part == "plan":
            page = json.loads(self.objects["ConfigMap", f"{owner}-batch"]["data"]["batch.json"])
            plan = {"shards": self.shards, "items": self.items, "fingerprint": page["fingerprint"], "bytes": 1}
            return {"plan": plan}
        return {"progress": self.counts(self.shards) | {"outputs": {"manifest": "s3://out/MANIFEST.json"}}}

    def counts(self, shards_done: int) -> Object:
        done = self.items * shards_done // self.shards
        failed = min(self.failing, done)
        failures = [{"step": "decode", "code": "decode_failed", "count": failed}] if failed else []
        return {
            "total": self.items,
            "succeeded": done - failed,
            "failed": failed,
            "shards": {"completed": shards_done},
            "failures": failures,
        }

    def progress(self, batch: Mapping[str, Any]) -> Object | None:
        """What the gateway answers: from its bucket, so it knows what Jobs did that are gone."""
        if not self.gateway_answers:
            return None
        runs = [j for j in self.of_kind("Job") if batch["metadata"]["uid"] in owners(j) and "completions" in j["spec"]]
        return self.counts(runs[0].get("status", {}).get("succeeded", 0)) if runs else None


@dataclass
class Operator:
    """The shell around `decide`: a cache that may be old, an executor that may die.

    seen         the cache
    dies_after   writes until it dies; None: it doesn't
    """

    cluster: Cluster
    seen: dict[Key, Object] = field(default_factory=dict)
    dies_after: int | None = None
    writes: int = 0
    notes: list[Note] = field(default_factory=list)

    def relist(self) -> None:
        """What is there now. What has not changed since is the same copy."""
        self.seen = {key: self._copy(key, thing) for key, thing in self.cluster.objects.items()}

    def _copy(self, key: Key, thing: Object) -> Object:
        known = self.seen.get(key)
        return known if known == thing else copy.deepcopy(thing)

    def deliver(self, event: tuple[Key, Object | None]) -> None:
        key, thing = event
        if thing is None:
            self.seen.pop(key, None)
        else:
            self.seen[key] = copy.deepcopy(thing)

    def world(self, cr: Mapping[str, Any]) -> World:
        uid, mine = cr["metadata"]["uid"], cr["metadata"]["name"]
        owned = {key: thing for key, thing in self.seen.items() if uid in owners(thing) and key[0] != "Pod"}
        others = {key: thing for key, thing in self.seen.items() if key not in owned and key[0] != "Pod"}
        pods = tuple(thing for key, thing in sorted(self.seen.items()) if key[0] == "Pod")
        batches = tuple(
            thing
            for key, thing in sorted(self.seen.items())
            if key[0] == "VisionBatch" and thing["spec"]["pipelineRef"]["name"] == mine
        )
        answers = {url: Answer(ok, "" if ok else "refused") for url, ok in self.cluster.endpoints.items()}
        is_batch = cr["kind"] == "VisionBatch"
        return World(
            now=self.cluster.now,
            owned=owned,
            others=others,
            pods=pods,
            kinds=self.cluster.kinds,
            answers=answers,
            progress=self.cluster.progress(cr) if is_batch else None,
            batches=() if is_batch else batches,
        )

    def decide(self, key: Key) -> Decision | None:
        cr = self.seen.get(key)
        if cr is None:
            return None
        decide = decide_pipeline if key[0] == "VisionPipeline" else decide_batch
        return decide(cr, self.world(cr), SETTINGS)

    def reconcile(self, key: Key) -> bool:
        """Decide on what is cached, act on what is there. Returns whether anything was written."""
        decision = self.decide(key)
        cr = self.seen.get(key)
        if decision is None or cr is None:
            return False
        before = self.writes
        for action in decision.actions:
            if not self._act(cr, action):
                return self.writes > before
        self.notes.extend(decision.notes)
        if decision.status != (cr.get("status") or {}) and self._is_current(cr):
            self._write(lambda: self.cluster.set_status(key, decision.status))
        return self.writes > before

    def _is_current(self, cr: Mapping[str, Any]) -> bool:
        """Asked of the API server before anything is created, deleted or reported: what was decided on is still so."""
        live = self.cluster.objects.get(key_of(cr))
        return live is not None and live["metadata"]["resourceVersion"] == cr["metadata"]["resourceVersion"]

    def _act(self, cr: Mapping[str, Any], action: Apply | Delete) -> bool:
        """Whether to go on: not when the decision has turned out to be about something old."""
        if isinstance(action, Delete):
            key = action.kind, action.name
            if not self._is_current(cr):
                return False
            if key in self.cluster.objects and self.cluster.objects[key]["metadata"]["uid"] == action.uid:
                self._write(lambda: self.cluster.delete(key, action.uid))
            return True
        key, live = key_of(action.manifest), self.cluster.objects.get(key_of(action.manifest))
        if live is None:
            if not self._is_current(cr):
                return False
            make = self.cluster.create if action.is_create_only else self.cluster.apply
            self._write(lambda: make(action.manifest))
        elif not action.is_create_only and self._is_ours(cr, live) and not _holds(live, action.manifest):
            self._write(lambda: self.cluster.apply(action.manifest))
        return True

    def _is_ours(self, cr: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
        """Owned, a Workload of a Job that is, or a model that is free to outlive its pipeline."""
        uids = owners(live)
        jobs = {job["metadata"]["uid"] for job in self.cluster.of_kind("Job") if cr["metadata"]["uid"] in owners(job)}
        return cr["metadata"]["uid"] in uids or bool(uids & jobs) or not uids

    def _write(self, call: Any) -> None:
        if self.dies_after is not None and self.writes >= self.dies_after:
            raise Crash
        call()
        self.writes += 1
        self.cluster.writes += 1

    def mine(self) -> list[Key]:
        return [key for key in sorted(self.seen) if key[0] in ("VisionPipeline", "VisionBatch")]


def settle(operator: Operator, *, rounds: int = 400) -> None:
    """Everybody moves, everything is seen, until nothing changes any more."""
    cluster = operator.cluster
    for _ in range(rounds):
        cluster.settle_controllers()
        operator.relist()
        if not any([operator.reconcile(key) for key in operator.mine()]):
            return
    raise AssertionError("it does not come to rest")


def summary(cluster: Cluster) -> dict[str, Any]:
    """What two runs must agree on: everything but identities and times."""
    return {
        f"{kind}/{name}": _timeless(thing) for (kind, name), thing in sorted(cluster.objects.items()) if kind != "Pod"
    }


_IDENTITY = {"uid", "resourceVersion", "creationTimestamp", "generation", "observedGeneration", "controller"}
_TIMES = {
    "lastTransitionTime", "startTime", "plannedTime", "completionTime", "lastProgressTime", "estimatedCompletionTime",
    "eta", "throughput", "expiresTime", "lastScheduleTime", "nextScheduleTime",
}  # fmt: skip


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _timeless(v) for k, v in value.items() if k not in _IDENTITY | _TIMES}
    if isinstance(value, list | tuple):
        return [_timeless(item) for item in value]
    return value


def owners(thing: Mapping[str, Any]) -> set[str]:
    return {owner["uid"] for owner in thing["metadata"].get("ownerReferences", ())}


def gpus_of(pod: Mapping[str, Any]) -> int:
    containers = pod["spec"]["containers"]
    return sum(int(c.get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0)) for c in containers)


def secrets_of(pod: Mapping[str, Any]) -> set[str]:
    """Every Secret that a pod can't start without."""
    return set(_secrets(pod["spec"]))


def _secrets(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == "secretKeyRef" and not inner.get("optional"):
                yield inner["name"]
            elif name == "secret" and isinstance(inner, Mapping):
                yield inner.get("secretName") or inner["name"]
            else:
                yield from _secrets(inner)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _secrets(item)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _meaning(thing: Mapping[str, Any]) -> Any:
    metadata = {k: v for k, v in thing["metadata"].items() if k not in ("resourceVersion", "generation")}
    return {**thing, "metadata": metadata}


def _merge(live: Object, manifest: Mapping[str, Any]) -> None:
    for name, value in manifest.items():
        if isinstance(value, Mapping) and isinstance(live.get(name), dict):
            _merge(live[name], value)
        else:
            live[name] = copy.deepcopy(value)


def _remove(live: Object, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for name, value in before.items():
        if name not in after:
            live.pop(name, None)
        elif isinstance(value, Mapping) and isinstance(live.get(name), dict) and isinstance(after[name], Mapping):
            _remove(live[name], value, after[name])


def _holds(live: Any, wanted: Any) -> bool:
    """Whether everything that is wanted is there: what the managedFields of a live object tell the executor."""
    if isinstance(wanted, Mapping):
        return isinstance(live, Mapping) and all(_holds(live.get(k), v) for k, v in wanted.items())
    return bool(live == wanted)


# --- objects ---------------------------------------------------------------------------------------------------------


def pipeline(name: str = "scenes", **spec: Any) -> Object:
    """A VisionPipeline of two predictors of ours, as the API server would hand it over."""
    body = {
        "caption": {"inferenceService": {"gpu": {"count": 1}}},
        "enhance": {"inferenceService": {"gpu": {"count": 1}}},
        "gateway": {"auth": {"none": True}},
    }
    body |= spec
    return {
        "apiVersion": API_VERSION,
        "kind": "VisionPipeline",
        "metadata": {"name": name},
        "spec": {k: v for k, v in body.items() if v is not None},
    }


def work(**spec: Any) -> Object:
    """What a batch does, without its pipeline."""
    body = {
        "input": {"s3Prefix": {"bucket": "images", "prefix": "in/"}},
        "output": {"s3": {"bucket": "images", "prefix": "out/"}},
    }
    return body | spec


def batch(name: str = "nightly", pipeline_name: str = "scenes", **spec: Any) -> Object:
    return {
        "apiVersion": API_VERSION,
        "kind": "VisionBatch",
        "metadata": {"name": name},
        "spec": {"pipelineRef": {"name": pipeline_name}} | work(**spec),
    }


def later(cluster: Cluster, **duration: float) -> None:
    cluster.now += timedelta(**duration)
