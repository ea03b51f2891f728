"""VisionPipeline: its children as rendered, what no longer belongs to it, and how it is. Level by level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ValidationError

from sightline_operator.api import Pipeline
from sightline_operator.decide.decision import Apply, Decision, Delete, Note
from sightline_operator.decide.pipeline_batches import BatchesReport, batches_report, is_finished
from sightline_operator.decide.pipeline_conditions import accepted, degraded, gateway_ready, ready
from sightline_operator.decide.pipeline_steps import step_report
from sightline_operator.decide.pipeline_view import PipelineView, Workload, key_of
from sightline_operator.memo import Memo
from sightline_operator.observe.world import Manifest, World
from sightline_operator.render import (
    OPTIONAL_KINDS,
    Pinned,
    RenderError,
    is_applied,
    pinned,
    render_pipeline,
    revision,
)
from sightline_operator.settings import RenderSettings
from sightline_operator.status.conditions import Condition, find, merged

_LATE = {"ConfigMap", "InferenceService", "ServiceAccount"}
"""Kinds that pods of the old revision may still need: they go when the gateway has been rolled out."""
_STEPS = ("caption", "enhance")
_KEPT = ("lastDrift",)
"""Of the status, what the executor writes."""
_parsed, _rendered, _revision = Memo(Pipeline.model_validate), Memo(render_pipeline), Memo(revision)


def decide_pipeline(cr: Manifest, world: World, settings: RenderSettings) -> Decision:
    """What the pipeline needs now, and how it is. The same for the same cr and world, whatever came before."""
    previous: Mapping[str, Any] = cr.get("status") or {}
    if cr["metadata"].get("deletionTimestamp"):
        return Decision((), previous)
    try:
        spec = _parsed(cr["spec"])
        known = addresses(cr, world)
        children = _rendered(rendering(cr), settings, world.kinds, known)
    except ValidationError as error:
        first = error.errors()[0]
        return _invalid(cr, world, f"spec.{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except RenderError as error:
        return _invalid(cr, world, str(error))
    view = PipelineView.of(cr, spec, world, children, known)
    batches = batches_report(view)
    status = _status(view, batches, pinned(cr, settings))
    updates, leftovers = _applies(view), _leftovers(view)
    notes = _notes(view, status, updates)
    return Decision((*updates, *leftovers, *batches.actions), status, notes, _requeue(view, batches))


def rendering(cr: Manifest) -> Manifest:
    """As much of a pipeline as rendering reads: whatever else of it changes, its children are the same."""
    metadata = {name: cr["metadata"].get(name) for name in ("name", "namespace", "uid", "generation")}
    said: Mapping[str, Any] = cr.get("status") or {}
    status = {name: said.get(name) for name in ("observedGeneration", "renderVersion", "images")}
    return {"kind": cr["kind"], "metadata": metadata, "spec": cr["spec"], "status": status}


def addresses(cr: Manifest, world: World) -> dict[str, str]:
    """Where InferenceServices answer, by name. An address that went for a moment does not roll the gateway."""
    known = {
        str(row["inferenceService"]): str(row["url"])
        for row in (cr.get("status") or {}).get("steps") or ()
        if row.get("inferenceService") and row.get("url")
    }
    for (kind, name), thing in {**world.others, **world.owned}.items():
        url = ((thing.get("status") or {}).get("address") or {}).get("url")
        if kind == "InferenceService" and url:
            parts = urlsplit(url)
            known[name] = f"{parts.scheme}://{parts.netloc}"
    return known


def _invalid(cr: Manifest, world: World, message: str) -> Decision:
    """A spec that passed the API server and can't be rendered: nothing is touched, the condition says what is wrong."""
    previous: Mapping[str, Any] = cr.get("status") or {}
    generation = cr["metadata"].get("generation", 0)
    found = [
        Condition("Accepted", "False", "InvalidSpec", message),
        Condition("Ready", "False", "Invalid", message),
    ]
    kept = [
        condition for condition in previous.get("conditions") or () if condition["type"] not in ("Accepted", "Ready")
    ]
    rewritten = merged(previous.get("conditions") or (), found, generation=generation, now=world.now)
    conditions = [rewritten[0], *(dict(condition) for condition in kept), rewritten[1]]
    return Decision((), {**previous, "observedGeneration": generation, "conditions": conditions})


def _applies(view: PipelineView) -> tuple[Apply, ...]:
    """All children as rendered, but for names that somebody else has."""
    return tuple(Apply(child) for key, child in view.children.items() if key not in view.strangers)


def _leftovers(view: PipelineView) -> tuple[Delete, ...]:
    """Objects of ours that the spec asks for no more. Of a kind that the cluster does not serve, nothing is known."""
    may_go_late = view.gateway.is_rolled_out
    found: list[Delete] = []
    for (kind, name), thing in sorted(view.world.owned.items()):
        is_wanted = (kind, name) in view.children or kind == "VisionBatch"
        is_blind = kind in OPTIONAL_KINDS and kind not in view.world.kinds
        if is_wanted or is_blind or thing["metadata"].get("deletionTimestamp"):
            continue
        if may_go_late or kind not in _LATE:
            found.append(Delete(thing["apiVersion"], kind, name, thing["metadata"]["uid"]))
    return tuple(found)


def _status(view: PipelineView, batches: BatchesReport, by: Pinned) -> dict[str, Any]:
    gateway = view.gateway
    steps = {name: step_report(view, name) for name in _STEPS}
    found = accepted(view, tuple(steps.values()), batches.faults)
    front = gateway_ready(view, gateway)
    less = degraded(view, gateway, front, steps)
    summary = ready(view, found, front, less, steps)
    conditions = [found, *(step.condition for step in steps.values()), front, less, summary]
    fields: dict[str, Any] = {
        "observedGeneration": view.generation,
        "conditions": merged(
            view.previous.get("conditions") or (), conditions, generation=view.generation, now=view.now
        ),
        "url": _url(view),
        "revision": _revision({"spec": view.cr["spec"]}),
        "renderVersion": by.version,
        "images": dict(by.images),
        "steps": [step.row for step in steps.values() if step.row is not None],
        "gateway": _gateway_row(gateway),
        "batches": {"active": sum(not is_finished(batch) for batch in view.world.batches)},
        "schedules": list(batches.rows),
        **{name: view.previous[name] for name in _KEPT if name in view.previous},
    }
    return {name: value for name, value in fields.items() if value not in (None, [])}


def _gateway_row(gateway: Workload) -> dict[str, Any]:
    assert gateway.desired is not None  # noqa: S101 - it is always rendered
    live = gateway.found or gateway.desired
    wanted = live["spec"].get("replicas", 1)
    ready_replicas = gateway.status.get("readyReplicas") or 0
    labels = gateway.desired["spec"]["selector"]["matchLabels"]
    return {
        "replicas": gateway.status.get("replicas") or 0,
        "readyReplicas": ready_replicas,
        "ready": f"{ready_replicas}/{wanted}",
        "selector": ",".join(f"{name}={value}" for name, value in sorted(labels.items())),
        "image": _image(live) or _image(gateway.desired),
    }


def _image(deployment: Manifest) -> str | None:
    """Of the gateway itself; others may have put their sidecars before it."""
    containers = (deployment["spec"].get("template") or {}).get("spec", {}).get("containers", ())
    return next((container["image"] for container in containers if container["name"] == "gateway"), None)


def _url(view: PipelineView) -> str | None:
    """In the cluster, by the name of the Service."""
    service = view.child("Service", "gateway")
    if service is None:
        return None
    port = service["spec"]["ports"][0]["port"]
    name, namespace = service["metadata"]["name"], view.cr["metadata"].get("namespace")
    return f"http://{name}.{namespace}.svc" + (f":{port}" if port != 80 else "")


def _requeue(view: PipelineView, batches: BatchesReport) -> float | None:
    return max(0.0, (batches.next_at - view.now).total_seconds()) if batches.next_at else None


def _notes(view: PipelineView, status: Mapping[str, Any], updates: Sequence[Apply]) -> tuple[Note, ...]:
    """Events about what changed between the two statuses. Created, deleted and repaired children the executor tells."""
    notes: list[Note] = []
    for update in updates:
        key = key_of(update.manifest)
        live = view.world.owned.get(key)
        if live is not None and not is_applied(update.manifest, live):
            notes.append(Note("Normal", "Updated", "Apply", f"{key[0]} {key[1]}"))
    before, after = view.previous.get("conditions") or (), status["conditions"]
    notes.extend(_turn(before, after, "Degraded", "True", "Warning", "Degraded"))
    was = find(before, "Degraded")
    if was.get("status") == "True" and find(after, "Degraded")["status"] == "False":
        notes.append(Note("Normal", "Recovered", "Observe", f"no longer: {was['message']}"))
    notes.extend(_turn(before, after, "Ready", "True", "Normal", "Ready"))
    if find(before, "Ready").get("status") == "True":
        notes.extend(_turn(before, after, "Ready", "False", "Warning", "NotReady"))
    refused = find(after, "Accepted")
    if refused["status"] == "False" and refused["reason"] != find(before, "Accepted").get("reason"):
        notes.append(Note("Warning", refused["reason"], "Accept", refused["message"]))
    return tuple(notes)


def _turn(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    name: str,
    status: str,
    kind: Literal["Normal", "Warning"],
    reason: str,
) -> list[Note]:
    """An event when a condition has turned to this status."""
    now = find(after, name)
    if now.get("status") != status or find(before, name).get("status") == status:
        return []
    text = now["message"] or f"{name} is {status}"
    return [Note(kind, reason, "Observe", text)]
