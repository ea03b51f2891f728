"""Conditions change their times only with their status; the deepest message about a pod is found wherever it is."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline_operator.status.conditions import MAX_MESSAGE, Condition, find, merged
from sightline_operator.status.pods import Fault, worst
from sightline_operator.status.times import moment, stamp

NOON = datetime(2026, 1, 5, 12, 0, tzinfo=UTC)


def pod(name: str = "p", **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": {"phase": "Pending", **status}}


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    state = {"state": {"waiting": {"reason": reason, "message": message}}, "ready": False, "image": "describe:1"}
    return pod(containerStatuses=[{**state, **more}])


def warning(message: str, name: str = "p") -> dict[str, Any]:
    return {"involvedObject": {"kind": "Pod", "name": name}, "message": message}


def unschedulable(message: str) -> dict[str, Any]:
    return pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}])


# --- conditions ------------------------------------------------------------------------------------------------------


def test_a_transition_time_stays_while_the_status_does() -> None:
    first = merged([], [Condition("Ready", "False", "Deploying", "one")], generation=1, now=NOON)
    second = merged(
        first, [Condition("Ready", "False", "ModelLoading", "two")], generation=2, now=NOON + timedelta(hours=1)
    )
    third = merged(second, [Condition("Ready", "True", "Ready", "")], generation=2, now=NOON + timedelta(hours=2))
    assert [c[0]["lastTransitionTime"] for c in (first, second, third)] == [
        "2026-01-05T12:00:00Z",
        "2026-01-05T12:00:00Z",
        "2026-01-05T14:00:00Z",
    ]
    assert second[0]["reason"] == "ModelLoading"
    assert second[0]["observedGeneration"] == 2


_truths = st.sampled_from(["True", "False", "Unknown"])
_reasons = st.sampled_from(["A", "B"])


@given(st.lists(st.tuples(_truths, _reasons), min_size=1, max_size=12))
def test_times_change_exactly_with_the_status(history: list[tuple[Any, str]]) -> None:
    rows: list[dict[str, Any]] = []
    since, last = NOON, None
    for minute, (status, reason) in enumerate(history):
        now = NOON + timedelta(minutes=minute)
        rows = merged(rows, [Condition("Ready", status, reason)], generation=1, now=now)
        since, last = (since, last) if status == last else (now, status)
        assert rows[0]["lastTransitionTime"] == stamp(since)


def test_a_long_message_keeps_its_beginning_and_its_lines_become_one() -> None:
    (row,) = merged([], [Condition("Ready", "False", "X", "first\n  second " + "x" * 5000)], generation=1, now=NOON)
    assert row["message"].startswith("first second x")
    assert len(row["message"]) == MAX_MESSAGE


def test_a_condition_that_is_not_there_is_empty() -> None:
    assert find(None, "Ready") == {}
    assert find([{"type": "Other", "status": "True"}], "Ready") == {}


def test_times_are_read_with_and_without_fractions() -> None:
    assert moment("2026-01-05T12:00:00Z") == NOON
    assert moment("2026-01-05T12:00:00.5Z") == NOON + timedelta(seconds=0.5)
    assert moment(None) is None


# --- pods ------------------------------------------------------------------------------------------------------------

NO_GPU = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: none"
SECRET_VOLUME = 'MountVolume.SetUp failed for volume "keys" : secret "vision-keys" not found'
SECRET_KEY = 'MountVolume.SetUp failed for volume "keys" : references non-existent secret key: api-keys'
PULL = 'Failed to pull image "describe:1": rpc error: code = NotFound'
CONFIG_KEY = "couldn't find key batch.json in ConfigMap vision/page"

ROWS = [
    ("gpu", unschedulable(NO_GPU), [], Fault.NO_GPU, NO_GPU),
    ("mig", unschedulable("3 Insufficient nvidia.com/mig-3g.40gb."), [], Fault.NO_GPU, "mig-3g.40gb"),
    ("memory", unschedulable("3 Insufficient memory."), [], Fault.UNSCHEDULABLE, "Insufficient memory"),
    ("taint", unschedulable("3 node(s) had untolerated taint {x: y}"), [], Fault.UNSCHEDULABLE, "taint"),
    ("pull", waiting("ImagePullBackOff", "Back-off"), [warning(PULL)], Fault.IMAGE_PULL, "code = NotFound"),
    ("pull, no event", waiting("ErrImagePull", "rpc error"), [], Fault.IMAGE_PULL, "rpc error"),
    ("pull, no words", waiting("InvalidImageName"), [], Fault.IMAGE_PULL, "describe:1"),
    (
        "secret variable",
        waiting("CreateContainerConfigError", 'secret "token" not found'),
        [],
        Fault.SECRET_NOT_FOUND,
        '"token"',
    ),
    (
        "secret key variable",
        waiting("CreateContainerConfigError", "couldn't find key t in Secret vision/token"),
        [],
        Fault.SECRET_KEY_MISSING,
        "key t",
    ),
    (
        "config map",
        waiting("CreateContainerConfigError", 'configmap "page" not found'),
        [],
        Fault.INVALID_REFERENCE,
        "page",
    ),
    (
        "config map key",
        waiting("CreateContainerConfigError", CONFIG_KEY),
        [],
        Fault.INVALID_REFERENCE,
        "key batch.json",
    ),
    ("secret volume", waiting("ContainerCreating"), [warning(SECRET_VOLUME)], Fault.SECRET_NOT_FOUND, "vision-keys"),
    ("secret volume key", waiting("ContainerCreating"), [warning(SECRET_KEY)], Fault.SECRET_KEY_MISSING, "api-keys"),
    (
        "crash with last words",
        waiting(
            "CrashLoopBackOff",
            "back-off 5m0s",
            lastState={"terminated": {"exitCode": 1, "reason": "Error", "message": "no weights in /mnt\n"}},
        ),
        [],
        Fault.CRASHING,
        "no weights in /mnt (Error, exit code 1)",
    ),
    (
        "out of memory",
        waiting("CrashLoopBackOff", "", lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}),
        [],
        Fault.CRASHING,
        "container OOMKilled, exit code 137",
    ),
    (
        "the storage initializer",
        pod(
            initContainerStatuses=[
                {
                    "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                    "lastState": {"terminated": {"exitCode": 1, "message": "s3: 403"}},
                }
            ],
            containerStatuses=[{"state": {"waiting": {"reason": "PodInitializing"}}}],
        ),
        [],
        Fault.CRASHING,
        "s3: 403",
    ),
    (
        "evicted",
        pod(phase="Failed", reason="Evicted", message="node was low on memory"),
        [],
        Fault.EVICTED,
        "Evicted: node was low on memory",
    ),
    ("not scheduled yet", pod(), [], Fault.STARTING, "waiting for the scheduler"),
    (
        "loading",
        pod(
            phase="Running",
            conditions=[{"type": "PodScheduled", "status": "True"}],
            containerStatuses=[{"state": {"running": {}}, "ready": False}],
        ),
        [],
        Fault.STARTING,
        "started, not ready yet",
    ),
]


@pytest.mark.parametrize(("it", "warnings", "fault", "words"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_the_deepest_message_is_found(it: Any, warnings: Any, fault: Fault, words: str) -> None:
    trouble = worst([it], warnings)
    assert trouble is not None
    assert trouble.fault == fault
    assert words in trouble.message


def test_an_old_event_about_a_mount_says_nothing_of_a_pod_that_runs() -> None:
    running = pod(
        phase="Running",
        conditions=[{"type": "PodScheduled", "status": "True"}],
        containerStatuses=[{"state": {"running": {}}, "ready": False}],
    )
    trouble = worst([running], [warning(SECRET_VOLUME)])
    assert trouble is not None
    assert trouble.fault == Fault.STARTING


def test_events_of_other_pods_say_nothing() -> None:
    trouble = worst([waiting("ContainerCreating")], [warning(SECRET_VOLUME, name="another")])
    assert trouble is not None
    assert trouble.fault == Fault.STARTING


def test_ready_finished_and_leaving_pods_have_no_trouble() -> None:
    ready = pod(phase="Running", conditions=[{"type": "Ready", "status": "True"}])
    leaving = {"metadata": {"name": "l", "deletionTimestamp": "2026-01-05T12:00:00Z"}, "status": {"phase": "Pending"}}
    assert worst([ready, leaving, pod(phase="Succeeded")], []) is None


def test_the_order_of_pods_does_not_matter() -> None:
    named = [it | {"metadata": {"name": f"p{i}"}} for i, (_, it, _, _, _) in enumerate(ROWS[:5])]
    answers = {worst(order, []) for order in itertools.permutations(named)}
    assert len(answers) == 1
    assert next(iter(answers)).fault == Fault.IMAGE_PULL  # type: ignore[union-attr]
