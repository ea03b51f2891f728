"""What the operator counts and shows at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()
REGISTRY = CollectorRegistry()
_PREFIX = "sightline_operator_"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def _counter(name: str, text: str, *labels: str) -> Counter:
    return Counter(_PREFIX + name, text, labels, registry=REGISTRY)


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(_PREFIX + name, text, labels, registry=REGISTRY)


def _histogram(name: str, text: str, *labels: str) -> Histogram:
    return Histogram(_PREFIX + name, text, labels, registry=REGISTRY, buckets=_SECONDS)


RECONCILES = _counter("reconcile_total", "Reconciles by the kind of the object and how they ended.", "kind", "result")
RECONCILE_SECONDS = _histogram("reconcile_duration_seconds", "Seconds of one reconcile.", "kind")
QUEUE_SECONDS = _histogram("workqueue_wait_seconds", "Seconds an object waited for its reconcile to start.")
QUEUE_DEPTH = _gauge("workqueue_depth", "Objects that are due and not being worked on.")
QUEUE_OLDEST = _gauge("workqueue_oldest_age_seconds", "Seconds the object that is due longest has waited.")
APPLIES = _counter(
    "apply_total", "Children by kind: created, changed, noop (nothing sent), conflict.", "kind", "outcome"
)
STATUS_WRITES = _counter("status_write_total", "Status writes by kind.", "kind")
DRIFT = _counter("drift_repaired_total", "Fields of ours that somebody else had changed.", "kind", "field")
API_ERRORS = _counter("api_error_total", "Calls that the API server refused or did not answer.", "code")
EVENTS = _counter("event_total", "Events written, and held back as repetitions.", "outcome")
WATCH_AGE = _gauge("watch_last_event_age_seconds", "Seconds since the watch of a kind gave a sign of life.", "kind")
WATCH_MISSED = _counter("watch_missed_total", "Changes that a list showed and the watch had not.", "kind")
LEADER = _gauge("leader", "1 while this process leads.")
OBJECTS = _gauge("objects", "Objects of ours by kind.", "kind")
BATCHES = _gauge("batch_state", "VisionBatches by the state they show.", "state")
BATCH_ITEMS = _gauge("batch_items", "Items of VisionBatches that are not at their end.", "outcome")
