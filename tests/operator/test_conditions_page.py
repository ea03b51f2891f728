"""docs/operator/conditions.md names every reason that a condition can have, and none that it cannot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import sightline_operator

PAGE = Path(__file__).parents[2] / "docs" / "operator" / "conditions.md"
SOURCE = Path(sightline_operator.__file__).parent
CONDITIONS = {
    *("Accepted", "CaptionReady", "EnhanceReady", "GatewayReady", "Degraded", "Ready"),
    *("Planned", "Admitted", "Progressing", "Stalled", "Complete", "Failed"),
}
BOTH = {"Admitted", "Planned", "Ready"}
"""Reasons that are called as a condition is."""
OTHERS = {
    *("True", "False", "Unknown", "Warning", "Normal"),
    *("VisionPipeline", "VisionBatch", "InferenceService", "InferenceServiceRef", "Endpoint", "Deployment", "Service"),
    *("ServiceAccount", "ConfigMap", "HTTPRoute", "Job", "Workload", "Indexed"),
    *("Forbid", "Pause", "Fail"),  # of the specs
    *("Accept", "Apply", "Finish", "Observe", "Queue", "Run"),  # actions of events
    *("Completed", "NotReady", "Progress", "Recovered", "ShardFailed", "Updated"),  # reasons of events
    # What Kubernetes, KServe and Kueue say:
    *("BackoffLimitExceeded", "DeadlineExceeded", "MaxFailedIndexesExceeded", "PodFailurePolicy", "ReplicaFailure"),
    *("BlockedByFailedLoad", "IngressReady", "LatestDeploymentReady", "NoSupportingRuntime", "PredictorReady"),
    *("RuntimeDisabled", "RuntimeNotRecognized", "Evicted", "QuotaReserved"),
}


def reasons_of_the_page() -> set[str]:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("|")]
    return {name.strip() for row in rows for name in row[2].split(",") if re.fullmatch(r" *[A-Z]\w+ *", name)}


def words_of_the_source() -> Iterator[str]:
    """Every quoted word in capitals of what decides conditions, and of what workers may give as reasons."""
    for path in [*(SOURCE / "decide").glob("*.py"), SOURCE / "contract.py", SOURCE / "status" / "pods.py"]:
        text = path.read_text()
        if path.name == "pods.py":  # beside faults of containers, it holds the reasons of missing references
            text = text[text.index("REFERENCE_FAULTS = ") : text.index("@dataclass")]
        yield from re.findall(r'"([A-Z][A-Za-z]+)"', text)


def test_every_reason_is_on_the_page_and_nothing_else_is() -> None:
    possible = set(words_of_the_source()) - OTHERS - (CONDITIONS - BOTH)
    assert reasons_of_the_page() == possible


def test_every_condition_is_on_the_page() -> None:
    first = {line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if line.startswith("|")}
    assert {name for cell in first for name in cell.split(", ")} >= CONDITIONS
