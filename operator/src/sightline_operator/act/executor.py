"""Carries out a decision: applies what differs, repairs what others changed, deletes what should go, writes status."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sightline_operator import metrics
from sightline_operator.act.client import ApiError, Client, Conflict, Object
from sightline_operator.act.diff import changes
from sightline_operator.act.events import EventWriter
from sightline_operator.act.ownership import HASH_ANNOTATION, lost_fields
from sightline_operator.decide.decision import Apply, Decision, Delete, Note
from sightline_operator.decide.pipeline_view import is_orphan_of
from sightline_operator.observe.cache import Cache, Ref, ref_of
from sightline_operator.queue import Key
from sightline_operator.render import is_applied
from sightline_operator.render.names import digest
from sightline_operator.resources import BY_KIND, resource_of

log = logging.getLogger(__name__)
REPAIR_WINDOW_SECONDS = 60.0
"""A field that somebody else keeps changing is put back at most once in so long, for each object."""
CREATE_AGAIN_SECONDS = 5.0
"""So long at least between two creations of a child that somebody keeps deleting."""
DELETE_AGAIN_SECONDS = 30.0
MAX_DRIFT_FIELDS = 8


class Outdated(Exception):
    """The object is no longer what was decided on: newer, being deleted, or gone."""


@dataclass
class _Memory:
    """What we did last to one child."""

    owner: str
    """Uid of the object it was done for: the children of its successor of the same name are not known yet."""
    uid: str
    digest: str
    """Of the manifest applied last by this process; empty: none yet."""
    written_at: float = float("-inf")
    repaired_at: float = float("-inf")
    unownable: frozenset[str] = frozenset()
    """Fields of our manifest that the API server does not record as ours (it drops or rewrites them)."""
    looked: tuple[str, str, list[str]] = ("", "", [])
    """The version and the digest of the manifest that were compared last, and the fields that we had lost."""

    def lost(self, manifest: Mapping[str, Any], live: Mapping[str, Any], digest: str) -> list[str]:
        """See `lost_fields`: the walk through both is long, and most looks are at what was looked at before."""
        version = str(live["metadata"]["resourceVersion"])
        if self.looked[:2] != (version, digest):
            self.looked = version, digest, lost_fields(manifest, live)
        return self.looked[2]


@dataclass
class Report:
    """What was done, and what is left.

    strangers        names that we want and somebody else's objects have
    is_news          children were found that the cache did not know: what was decided was decided without them
    requeue_seconds  when a repair that was put off may be done
    drift            the last repair, as status.lastDrift
    """

    written: list[str] = field(default_factory=list)
    created: list[str] = field(default_factory=list)
    strangers: dict[Ref, Object] = field(default_factory=dict)
    is_news: bool = False
    requeue_seconds: float | None = None
    drift: dict[str, Any] | None = None


class Executor:
    """The only writer of children and status."""

    def __init__(
        self,
        client: Client,
        cache: Cache,
        events: EventWriter,
        *,
        monotonic: Callable[[], float],
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        repair_window_seconds: float = REPAIR_WINDOW_SECONDS,
        is_dry_run: bool = False,
    ) -> None:
        self._client, self._cache, self._events = client, cache, events
        self._monotonic, self._wall = monotonic, wall
        self._window = repair_window_seconds
        self._is_dry_run = is_dry_run
        self._memory: dict[Ref, _Memory] = {}
        self._owners: dict[Ref, str] = {}
        self._deleted: dict[str, float] = {}
        self._status: dict[Ref, tuple[Any, Any]] = {}
        """Object → the status we sent last, and what the API server made of it."""

    async def act(self, cr: Mapping[str, Any], decision: Decision) -> Report:
        """Apply and delete, in order.

        Raises Outdated: nothing more should be done for this decision. ApiError: the first action that failed.
        """
        report = Report()
        self._owners[ref_of(cr)] = str(cr["metadata"]["uid"])
        missing = await self._missing(cr, decision, report)
        for action in decision.actions:
            if isinstance(action, Delete):
                await self._delete(cr, action, report)
            elif ref_of(action.manifest) in missing:
                await self._create(cr, action, report)
            elif ref_of(action.manifest) not in report.strangers and not action.is_create_only:
                await self._update(cr, action, report)
        if report.created:
            names = ", ".join(report.created)
            await self._note(cr, Note("Normal", "Created", "Create", f"Created {names}"))
        if report.drift and not report.drift["fields"]:
            text = f"Made {report.drift['object']} again, which somebody had deleted"
            await self._note(cr, Note("Warning", "DriftRepaired", "Apply", text))
        return report

    async def report(self, cr: Mapping[str, Any], status: Mapping[str, Any], drift: dict[str, Any] | None) -> bool:
        """Write the status unless it is the live one; returns whether it was written."""
        live = cr.get("status") or {}
        last = drift or live.get("lastDrift")
        wanted = dict(status) | ({"lastDrift": last} if last else {})
        ref = ref_of(cr)
        if wanted == live or self._status.get(ref) == (wanted, live):
            return False
        # With its version: a status that was decided on an older object never takes back what was said since.
        metadata = {name: cr["metadata"][name] for name in ("name", "namespace", "uid", "resourceVersion")}
        manifest = {"apiVersion": cr["apiVersion"], "kind": cr["kind"], "metadata": metadata, "status": wanted}
        if self._is_dry_run:
            log.info("dry run: status %s", "; ".join(changes(_as_object(live), _as_object(wanted))))
            self._status[ref] = (wanted, live)
            return False
        try:
            answer = await self._client.apply_status(manifest)
        except ApiError as error:
            if error.status == 404 or isinstance(error, Conflict):
                await self._confirm(cr)
                raise Outdated(str(error)) from error
            raise
        self._status[ref] = (wanted, answer.get("status") or {})
        self._cache.put(answer, by=Key(*ref))
        metrics.STATUS_WRITES.labels(cr["kind"]).inc()
        return True

    async def announce(self, cr: Mapping[str, Any], notes: tuple[Note, ...]) -> None:
        """Write the decision's events."""
        for note in notes:
            await self._note(cr, note)

    def forget(self, key: Key) -> None:
        """The object is gone."""
        self._status.pop(Ref(*key), None)
        owner = self._owners.pop(Ref(*key), None)
        self._memory = {ref: memory for ref, memory in self._memory.items() if memory.owner != owner}

    # Before writing.

    async def _missing(self, cr: Mapping[str, Any], decision: Decision, report: Report) -> set[Ref]:
        """Children that do not exist, after asking the API server itself about them and about their owner."""
        absent: list[Apply] = []
        for action in decision.actions:
            if isinstance(action, Apply):
                live = self._cache.get(*ref_of(action.manifest))
                if live is None:
                    absent.append(action)
                elif not self._is_ours(cr, live):
                    report.strangers[ref_of(action.manifest)] = live
        if absent or any(isinstance(action, Delete) for action in decision.actions):
            await self._confirm(cr)
        found = await asyncio.gather(*(self._live(action.manifest) for action in absent))
        missing: set[Ref] = set()
        for action, live in zip(absent, found, strict=True):
            ref = ref_of(action.manifest)
            if live is None:
                self._miss(cr, ref, missing, report)
            elif self._is_ours(cr, live):
                self._cache.put(live, by=Key(*ref_of(cr)))
                report.is_news = True
            else:
                report.strangers[ref] = live
                metrics.APPLIES.labels(ref.kind, "conflict").inc()
        return missing

    def _miss(self, cr: Mapping[str, Any], ref: Ref, missing: set[Ref], report: Report) -> None:
        """A child is not there: for the first time, or because somebody deleted it."""
        memory = self._memory.get(ref)
        if memory is not None and memory.owner != cr["metadata"]["uid"]:
            memory = None
        wait = memory.written_at + CREATE_AGAIN_SECONDS - self._monotonic() if memory else 0.0
        if wait > 0:
            report.requeue_seconds = min(wait, report.requeue_seconds or wait)
            return
        missing.add(ref)
        if memory is not None:
            del self._memory[ref]
            report.drift = {"time": self._time(), "object": f"{ref.kind}/{ref.name}", "fields": []}

    async def _confirm(self, cr: Mapping[str, Any]) -> None:
        """Our cache may be old; nothing is created or deleted for an object that has changed or gone."""
        ref = ref_of(cr)
        live = await self._client.get(BY_KIND[ref.kind], ref.namespace, ref.name)
        if live is None:
            self._cache.absent(ref)
            raise Outdated(f"{ref.kind} {ref.name} is gone")
        self._cache.put(live, by=Key(*ref))
        was, now = cr["metadata"], live["metadata"]
        # The version and not only the generation: a batch that an old status shows running may have ended.
        if now.get("deletionTimestamp") or (was["uid"], was["resourceVersion"]) != (now["uid"], now["resourceVersion"]):
            raise Outdated(f"{ref.kind} {ref.name} has changed")

    def _is_ours(self, cr: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
        """Owned; or a model that outlives its pipeline; or Kueue's Workload, whose owner is a Job of ours."""
        if _is_owned_by(cr, live) or is_orphan_of(cr, live):
            return True
        jobs = {
            child["metadata"]["uid"]
            for child in self._cache.owned(str(cr["metadata"]["uid"]))
            if child["kind"] == "Job"
        }
        owners = {owner.get("uid") for owner in live["metadata"].get("ownerReferences") or []}
        return live["kind"] == "Workload" and bool(owners & jobs)

    async def _live(self, manifest: Mapping[str, Any]) -> Object | None:
        ref = ref_of(manifest)
        return await self._client.get(resource_of(manifest), ref.namespace, ref.name)

    # Writing.

    async def _create(self, cr: Mapping[str, Any], action: Apply, report: Report) -> None:
        ref = ref_of(action.manifest)
        if action.is_create_only:
            try:
                answer = await self._client.create(action.manifest, is_dry_run=self._is_dry_run)
            except Conflict:
                live = await self._live(action.manifest)
                if live is not None and not self._is_ours(cr, live):
                    report.strangers[ref] = live
                elif live is not None:
                    self._cache.put(live, by=Key(*ref_of(cr)))
                    report.is_news = True
                return
        else:
            answer = await self._client.apply(action.manifest, is_dry_run=self._is_dry_run)
        self._wrote(cr, action, None, answer, report)
        report.created.append(f"{ref.kind} {ref.name}")

    async def _update(self, cr: Mapping[str, Any], action: Apply, report: Report) -> None:
        ref = ref_of(action.manifest)
        live = self._cache.get(*ref)
        if live is None or live["metadata"].get("deletionTimestamp"):
            return  # on its way out; it is made again when it is gone
        memory = self._memory.get(ref)
        if memory is None or memory.uid != live["metadata"]["uid"]:
            memory = self._memory[ref] = _Memory(str(cr["metadata"]["uid"]), str(live["metadata"]["uid"]), "")
        mark = _digest(action.manifest)
        lost = [path for path in memory.lost(action.manifest, live, mark) if path not in memory.unownable]
        is_new = memory.digest != mark and not _is_applied(action.manifest, live)
        if not is_new and not lost:
            metrics.APPLIES.labels(ref.kind, "noop").inc()
            return
        if not is_new:
            wait = memory.repaired_at + self._window - self._monotonic()
            if wait > 0:
                report.requeue_seconds = min(wait, report.requeue_seconds or wait)
                return
            memory.repaired_at = self._monotonic()
        answer = await self._client.apply(action.manifest, is_dry_run=self._is_dry_run)
        self._wrote(cr, action, live, answer, report)
        if not is_new:
            await self._repaired(cr, ref, lost, report)

    def _wrote(self, cr: Mapping[str, Any], action: Apply, live: Object | None, answer: Object, report: Report) -> None:
        ref = ref_of(action.manifest)
        if self._is_dry_run:
            log.info("dry run: %s %s/%s: %s", ref.kind, ref.namespace, ref.name, "; ".join(changes(live, answer)))
            if live is not None:  # said once, not at every look
                uid, lost = str(live["metadata"]["uid"]), frozenset(lost_fields(action.manifest, live))
                owner = str(cr["metadata"]["uid"])
                self._memory[ref] = _Memory(owner, uid, _digest(action.manifest), unownable=lost)
            return
        self._cache.put(answer, by=Key(*ref_of(cr)))
        is_same = live is not None and live["metadata"]["resourceVersion"] == answer["metadata"]["resourceVersion"]
        outcome = "noop" if is_same else "created" if live is None else "changed"
        metrics.APPLIES.labels(ref.kind, outcome).inc()
        log.info("%s %s %s/%s", outcome, ref.kind, ref.namespace, ref.name)
        report.written.append(f"{ref.kind} {ref.name}")
        old = self._memory.get(ref)
        unownable = frozenset() if action.is_create_only else frozenset(lost_fields(action.manifest, answer))
        if unownable:
            log.warning("%s %s: the API server does not keep %s", ref.kind, ref.name, ", ".join(sorted(unownable)))
        repaired_at = old.repaired_at if old else float("-inf")
        owner, uid, mark = str(cr["metadata"]["uid"]), str(answer["metadata"]["uid"]), _digest(action.manifest)
        self._memory[ref] = _Memory(owner, uid, mark, self._monotonic(), repaired_at, unownable)

    async def _repaired(self, cr: Mapping[str, Any], ref: Ref, lost: list[str], report: Report) -> None:
        fields = lost[:MAX_DRIFT_FIELDS] or ["metadata.annotations"]
        for path in fields:
            metrics.DRIFT.labels(ref.kind, path.split("[")[0]).inc()
        report.drift = {"time": self._time(), "object": f"{ref.kind}/{ref.name}", "fields": fields}
        text = f"Put back {', '.join(fields)} of {ref.kind} {ref.name}, which somebody else had changed"
        await self._note(cr, Note("Warning", "DriftRepaired", "Apply", text))

    async def _delete(self, cr: Mapping[str, Any], action: Delete, report: Report) -> None:
        namespace, now = str(cr["metadata"]["namespace"]), self._monotonic()
        if now - self._deleted.get(action.uid, float("-inf")) < DELETE_AGAIN_SECONDS:
            return
        self._deleted = {uid: at for uid, at in self._deleted.items() if now - at < DELETE_AGAIN_SECONDS}
        self._deleted[action.uid] = now
        if self._is_dry_run:
            log.info("dry run: delete %s %s/%s", action.kind, namespace, action.name)
            return
        manifest = {"apiVersion": action.api_version, "kind": action.kind}
        self._memory.pop(Ref(action.kind, namespace, action.name), None)
        if await self._client.delete(resource_of(manifest), namespace, action.name, action.uid):
            log.info("deleted %s %s/%s", action.kind, namespace, action.name)
            report.written.append(f"-{action.kind} {action.name}")
            await self._note(cr, Note("Normal", "Deleted", "Delete", f"Deleted {action.kind} {action.name}"))

    def _time(self) -> str:
        return self._wall().strftime("%Y-%m-%dT%H:%M:%SZ")

    async def _note(self, cr: Mapping[str, Any], note: Note) -> None:
        if self._is_dry_run:
            log.info("dry run: event %s: %s", note.reason, note.note)
            return
        await self._events.write(cr, note)


def _is_owned_by(cr: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    owners = live["metadata"].get("ownerReferences") or []
    return any(owner.get("uid") == cr["metadata"]["uid"] for owner in owners)


def _digest(manifest: Mapping[str, Any]) -> str:
    """Of the whole manifest. Its own mark is that already, but for an InferenceService, which leaves scale out."""
    mark = (manifest["metadata"].get("annotations") or {}).get(HASH_ANNOTATION)
    return digest(manifest, 16) if mark is None or manifest["kind"] == "InferenceService" else str(mark)


def _is_applied(manifest: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    """Whether the live object bears the mark of this manifest; one without a mark is never known to."""
    return HASH_ANNOTATION in (manifest["metadata"].get("annotations") or {}) and is_applied(manifest, live)


def _as_object(status: Mapping[str, Any]) -> dict[str, Any]:
    """A status as `changes` takes it, which leaves `status` itself out."""
    return {"metadata": {}, "fields": status}
