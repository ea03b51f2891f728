"""Why pods are not ready: the deepest message that kubelet, scheduler or the program itself gave."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from sightline_operator.observe.world import Manifest
from sightline_operator.status.conditions import find, is_true

_PULL_FAULTS = {
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError",
    "RegistryUnavailable",
}  # fmt: skip
_SECRET_ABSENT = re.compile(r'(?:secrets? "[^"]+" (?:is forbidden|not found))|references non-existent secret\b(?! key)')
_KEY_ABSENT = re.compile(r"couldn't find key .+ in Secret |references non-existent secret key")
_CONFIG_ABSENT = re.compile(r'configmap "[^"]+" not found|couldn\'t find key .+ in ConfigMap ', re.IGNORECASE)
_GPU = re.compile(r"Insufficient \S*(?:gpu|mig-|gaudi|tpu|neuron)\S*", re.IGNORECASE)


class Fault(IntEnum):
    """What keeps a pod from being ready, the most telling first."""

    SECRET_NOT_FOUND = 1
    SECRET_KEY_MISSING = 2
    INVALID_REFERENCE = 3
    IMAGE_PULL = 4
    CRASHING = 5
    NO_GPU = 6
    UNSCHEDULABLE = 7
    EVICTED = 8
    STARTING = 9


REFERENCE_FAULTS = {
    Fault.SECRET_NOT_FOUND: "SecretNotFound",
    Fault.SECRET_KEY_MISSING: "SecretKeyMissing",
    Fault.INVALID_REFERENCE: "InvalidReference",
}
"""Faults of what the user named, and the reason of `Accepted=False` that says so."""


@dataclass(frozen=True, order=True)
class Trouble:
    """The fault of one pod, in the words of whoever noticed it."""

    fault: Fault
    message: str
    pod: str = ""


def live(pods: Iterable[Manifest]) -> tuple[Manifest, ...]:
    """Pods that are meant to run: not being deleted, not over."""
    return tuple(
        pod
        for pod in pods
        if not pod["metadata"].get("deletionTimestamp")
        and pod.get("status", {}).get("phase") not in {"Succeeded", "Failed"}
    )


def is_ready(pod: Manifest) -> bool:
    return is_true(pod.get("status", {}).get("conditions"), "Ready")


def labelled(pods: Iterable[Manifest], labels: Mapping[str, str]) -> tuple[Manifest, ...]:
    """Pods that carry all these labels."""
    return tuple(pod for pod in pods if labels.items() <= (pod["metadata"].get("labels") or {}).items())


def worst(pods: Sequence[Manifest], warnings: Sequence[Manifest]) -> Trouble | None:
    """What is most worth telling about the pods that are not ready; None when all are, or there are none.

    The answer does not depend on the order of pods.
    """
    found = [trouble for pod in pods if (trouble := _trouble(pod, warnings)) is not None]
    return min(found, default=None)


def _trouble(pod: Manifest, warnings: Sequence[Manifest]) -> Trouble | None:
    if pod["metadata"].get("deletionTimestamp") or is_ready(pod):
        return None
    name, status = pod["metadata"]["name"], pod.get("status", {})
    if status.get("phase") == "Succeeded":
        return None
    said = [_message(event) for event in warnings if event.get("involvedObject", {}).get("name") == name]
    candidates = [*_of_containers(status, said), *_of_scheduling(status), *_of_mounts(status, said)]
    if status.get("phase") == "Failed" and status.get("reason"):
        candidates.append((Fault.EVICTED, f"{status['reason']}: {status.get('message', '')}".rstrip(": ")))
    fault, message = min(candidates, key=lambda each: each[0], default=(Fault.STARTING, _starting(status)))
    return Trouble(fault, message, name)


def _of_scheduling(status: Mapping[str, Any]) -> Iterator[tuple[Fault, str]]:
    scheduled = find(status.get("conditions"), "PodScheduled")
    if scheduled.get("status") == "False" and scheduled.get("reason") in {"Unschedulable", "SchedulerError"}:
        message = scheduled.get("message", "the scheduler found no node")
        yield (Fault.NO_GPU if _GPU.search(message) else Fault.UNSCHEDULABLE), message


def _of_mounts(status: Mapping[str, Any], said: Sequence[str]) -> Iterator[tuple[Fault, str]]:
    """A Secret that is only mounted is missed by an event, not by a container's state.

    Events outlive what they tell of by an hour; a container that has started has its mounts.
    """
    containers = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
    if any(not container.get("state", {}).get("waiting") for container in containers if container.get("state")):
        return
    for message in said:
        if (fault := _reference_fault(message)) is not None:
            yield fault, message


def _of_containers(status: Mapping[str, Any], said: Sequence[str]) -> Iterator[tuple[Fault, str]]:
    for container in [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]:
        waiting = container.get("state", {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _PULL_FAULTS:
            yield Fault.IMAGE_PULL, _pull_message(said) or message or f"{reason}: {container.get('image', '')}"
        elif reason in {"CreateContainerConfigError", "CreateContainerError"}:
            yield _reference_fault(message) or Fault.INVALID_REFERENCE, message or reason
        elif reason == "CrashLoopBackOff" or _ended_badly(container):
            yield Fault.CRASHING, _last_words(container) or message or reason


def _reference_fault(message: str) -> Fault | None:
    if _KEY_ABSENT.search(message):
        return Fault.SECRET_KEY_MISSING
    if _SECRET_ABSENT.search(message):
        return Fault.SECRET_NOT_FOUND
    return Fault.INVALID_REFERENCE if _CONFIG_ABSENT.search(message) else None


def _pull_message(said: Sequence[str]) -> str:
    """The registry's own answer. The container's state alternates between it and a mere `Back-off`."""
    return next((message for message in reversed(said) if message.startswith("Failed to pull image")), "")


def _ended_badly(container: Mapping[str, Any]) -> bool:
    """Is down with a non-zero exit code, or came back after one and is not ready yet."""
    now = container.get("state", {}).get("terminated") or {}
    last = container.get("lastState", {}).get("terminated") or {}
    return bool(now.get("exitCode")) or (bool(last.get("exitCode")) and not container.get("ready", False))


def _last_words(container: Mapping[str, Any]) -> str:
    """The last termination message, or how it ended when it left none."""
    for state in ("state", "lastState"):
        ended = container.get(state, {}).get("terminated")
        if ended and ended.get("exitCode"):
            how = f"{ended.get('reason', 'Error')}, exit code {ended['exitCode']}"
            return f"{ended['message'].strip()} ({how})" if ended.get("message") else f"container {how}"
    return ""


def _starting(status: Mapping[str, Any]) -> str:
    if not is_true(status.get("conditions"), "PodScheduled"):
        return "waiting for the scheduler"
    running = [c for c in status.get("containerStatuses", ()) if "running" in c.get("state", {})]
    return "started, not ready yet" if running else "the pod is starting"


def _message(event: Manifest) -> str:
    return event.get("message") or event.get("note") or ""
