"""What was last seen of the cluster: objects as compact JSON, and who must be looked at when one changes.

Fed by watch events, by lists, and by the answers to our own writes, so that a decision sees what the previous one did.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from sightline_operator.queue import Key
from sightline_operator.render.names import MAX_SERVED_NAME, child_name, label_value
from sightline_operator.resources import ISVC_LABEL, is_owned_entry
from sightline_operator.settings import GROUP

OUR_KINDS = ("VisionPipeline", "VisionBatch")
INSTANCE_LABEL = "app.kubernetes.io/instance"
TOMBSTONES = 20_000
PARSED = 128
"""Objects that are kept read: those of the keys being worked on."""
WARNINGS_PER_POD = 5
WARNED_PODS = 2_000
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


class Ref(NamedTuple):
    """An object of any kind."""

    kind: str
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One cached object."""

    version: int
    uid: str
    owners: tuple[str, ...]
    """uids of the owners."""
    data: bytes


def ref_of(obj: Mapping[str, Any]) -> Ref:
    """Kind, namespace and name."""
    metadata = obj["metadata"]
    return Ref(str(obj["kind"]), str(metadata.get("namespace", "")), str(metadata["name"]))


def trimmed(obj: Mapping[str, Any]) -> dict[str, Any]:
    """The object without what nobody here reads: others' managedFields, kubectl's copy, most of a pod."""
    metadata = dict(obj["metadata"])
    entries = [entry for entry in metadata.pop("managedFields", None) or [] if is_owned_entry(entry)]
    if entries:
        metadata["managedFields"] = entries
    if LAST_APPLIED in (metadata.get("annotations") or {}):
        metadata["annotations"] = {k: v for k, v in metadata["annotations"].items() if k != LAST_APPLIED}
    slim = dict(obj) | {"metadata": metadata}
    if obj["kind"] == "Pod":
        annotations = metadata.pop("annotations", None) or {}
        metadata["annotations"] = {k: v for k, v in annotations.items() if k.startswith(f"{GROUP}/")}
        spec = obj.get("spec") or {}
        kept = ("name", "image", "resources")
        containers = [{k: c[k] for k in kept if k in c} for c in spec.get("containers") or []]
        slim["spec"] = {"containers": containers} | {k: spec[k] for k in ("nodeName", "schedulerName") if k in spec}
    return slim


def named_by(cr: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """(kind, name) of what a VisionPipeline or VisionBatch refers to in its namespace, and does not own."""
    spec = cr.get("spec") or {}
    named: set[tuple[str, str]] = set()
    for name in ("caption", "enhance"):
        step = spec.get(name) or {}
        if cr["kind"] == "VisionPipeline" and "inferenceService" in step:  # one that outlives it is not owned
            named.add(("InferenceService", child_name(str(cr["metadata"]["name"]), name, MAX_SERVED_NAME)))
        if name := (step.get("inferenceServiceRef") or {}).get("name"):
            named.add(("InferenceService", name))
        if name := ((step.get("inferenceService") or {}).get("runtime") or {}).get("name"):
            named.add(("ServingRuntime", name))
    if name := (spec.get("pipelineRef") or {}).get("name"):
        named.add(("VisionPipeline", name))
    if name := ((spec.get("input") or {}).get("retryOf") or {}).get("batchName"):
        named.add(("VisionBatch", name))
    return frozenset(named)


class Cache:
    """Live objects by reference, with the indexes that reconciling needs."""

    def __init__(
        self,
        on_change: Callable[[Key], None] = lambda key: None,
        on_news: Callable[[Key, tuple[Ref, int]], None] | None = None,
        on_known: Callable[[Key, tuple[Ref, int]], None] = lambda key, news: None,
    ) -> None:
        """Tell of changes.

        on_change   who is concerned by one
        on_news     the same where an object and its version can be told, too; else `on_change`
        on_known    a watch told of what this writer wrote before the answer to the write was there
        """
        self._entries: dict[Ref, Entry] = {}
        self._children: defaultdict[str, set[Ref]] = defaultdict(set)
        """Owner uid → its children."""
        self._uids: dict[str, Ref] = {}
        self._named: dict[Ref, frozenset[Ref]] = {}
        self._naming: defaultdict[Ref, set[Ref]] = defaultdict(set)
        """Object → the objects of ours that refer to it."""
        self._instances: defaultdict[tuple[str, str], set[Ref]] = defaultdict(set)
        """(namespace, value of the instance label) → objects of ours with that label on their children."""
        self._pods: defaultdict[tuple[str, str, str], set[Ref]] = defaultdict(set)
        """(label, namespace, value) → pods."""
        self._warnings: OrderedDict[str, dict[str, dict[str, Any]]] = OrderedDict()
        """Pod uid → its warnings by event name."""
        self._gone: OrderedDict[str, int] = OrderedDict()
        """uid → version at which the object ended: an answer that comes later does not bring it back."""
        self._parsed: OrderedDict[Ref, tuple[Entry, dict[str, Any]]] = OrderedDict()
        """What was read last: an object is read several times while it is worked on."""

        def changed(key: Key, news: tuple[Ref, int]) -> None:
            on_change(key)

        self._on_change, self._on_news, self._on_known = on_change, on_news or changed, on_known

    # Reading.

    def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        """One object, or None."""
        return self._load(Ref(kind, namespace, name))

    def owned(self, uid: str) -> list[dict[str, Any]]:
        """The objects whose ownerReference has this uid."""
        return [obj for ref in self._children.get(uid, ()) if (obj := self._load(ref)) is not None]

    def naming(self, ref: Ref) -> list[dict[str, Any]]:
        """Our objects that refer to this one."""
        return [obj for one in sorted(self._naming.get(ref, ())) if (obj := self._load(one)) is not None]

    def pods(self, label: str, namespace: str, value: str) -> list[dict[str, Any]]:
        """The pods with this label."""
        refs = sorted(self._pods.get((label, namespace, value), ()))
        return [obj for ref in refs if (obj := self._load(ref)) is not None]

    def warnings(self, pod_uid: str) -> list[dict[str, Any]]:
        """Warning events about a pod."""
        return list(self._warnings.get(pod_uid, {}).values())

    def our_keys(self) -> list[Key]:
        """All objects of our kinds."""
        return [Key(*ref) for ref in self._entries if ref.kind in OUR_KINDS]

    def refs(self, kind: str) -> list[Ref]:
        """All cached objects of a kind."""
        return [ref for ref in self._entries if ref.kind == kind]

    def version(self, ref: Ref) -> int:
        """ResourceVersion of what is cached, 0 when nothing is."""
        entry = self._entries.get(ref)
        return entry.version if entry else 0

    def __len__(self) -> int:
        return len(self._entries)

    # Writing.

    def put(self, obj: Mapping[str, Any], *, by: Key | None = None) -> bool:
        """Take note of an object as it is now; False when it is not news. Those concerned are told, but not its writer.

        by   the object of ours on whose behalf we wrote it ourselves
        """
        if obj["kind"] == "Event":
            return self._put_warning(obj)
        metadata = obj["metadata"]
        ref, uid, version = ref_of(obj), str(metadata["uid"]), int(metadata["resourceVersion"])
        old = self._entries.get(ref)
        if (old is not None and old.version >= version) or self._gone.get(uid, -1) >= version:
            if by is not None and old is not None and old.version == version:
                self._on_known(by, (ref, version))
            return False
        affected = set(self._concerned(ref)) if old is not None else set[Key]()
        self._forget(ref)
        slim = trimmed(obj)
        owners = tuple(str(owner["uid"]) for owner in metadata.get("ownerReferences") or [])
        self._entries[ref] = Entry(version, uid, owners, orjson.dumps(slim))
        self._uids[uid] = ref
        for owner in owners:
            self._children[owner].add(ref)
        if ref.kind == "Pod":
            for label, value in self._pod_labels(slim):
                self._pods[label, ref.namespace, value].add(ref)
        if ref.kind in OUR_KINDS:
            self._instances[ref.namespace, label_value(ref.name)].add(ref)
            self._named[ref] = frozenset(Ref(kind, ref.namespace, name) for kind, name in named_by(slim))
            for named in self._named[ref]:
                self._naming[named].add(ref)
        for key in affected | set(self._concerned(ref)):
            if key != by:
                self._on_news(key, (ref, version))
        return True

    def remove(self, obj: Mapping[str, Any]) -> bool:
        """Take note that an object is gone."""
        if obj["kind"] == "Event":
            return False  # a warning that expired is no news
        ref, uid = ref_of(obj), str(obj["metadata"]["uid"])
        self._bury(uid, int(obj["metadata"]["resourceVersion"]))
        entry = self._entries.get(ref)
        if entry is None or entry.uid != uid:
            return False
        affected = set(self._concerned(ref))
        self._forget(ref)
        self._tell(affected)
        return True

    def absent(self, ref: Ref) -> None:
        """The API server says that there is no such object now."""
        entry = self._entries.get(ref)
        if entry is not None:
            affected = set(self._concerned(ref))
            self._forget(ref)
            self._tell(affected)

    def replace(self, kind: str, belongs: Callable[[Mapping[str, Any]], bool], objs: Iterable[Any], since: str) -> None:
        """A full list as of `since`: everything in it is so, and what belonged to it and is not in it is gone."""
        present: set[Ref] = set()
        for obj in objs:
            if obj["kind"] != "Event":
                present.add(ref_of(obj))
            self.put(obj)
        for ref in [ref for ref in self._entries if ref.kind == kind and ref not in present]:
            entry = self._entries[ref]
            if entry.version <= int(since) and belongs(orjson.loads(entry.data)):
                self._bury(entry.uid, entry.version)
                self.absent(ref)

    # Who is concerned.

    def _concerned(self, ref: Ref) -> Iterator[Key]:
        entry = self._entries.get(ref)
        if ref.kind in OUR_KINDS:
            yield Key(*ref)
        for naming in self._naming.get(ref, ()):
            yield Key(*naming)
        for named in self._named.get(ref, ()):
            if named.kind in OUR_KINDS:
                yield Key(*named)
        if entry is None:
            return
        obj = orjson.loads(entry.data)
        yield from self._owners(ref, obj)
        if ref.kind == "Pod":
            yield from self._pod_owners(ref, obj)

    def _owners(self, ref: Ref, obj: Mapping[str, Any]) -> Iterator[Key]:
        for owner in obj["metadata"].get("ownerReferences") or []:
            if owner.get("apiVersion", "").startswith(f"{GROUP}/") and owner.get("kind") in OUR_KINDS:
                yield Key(owner["kind"], ref.namespace, owner["name"])
            elif ref.kind == "Workload" and (job := self._uids.get(str(owner["uid"]))) is not None:
                yield from self._concerned(job)

    def _pod_owners(self, ref: Ref, obj: Mapping[str, Any]) -> Iterator[Key]:
        for label, value in self._pod_labels(obj):
            if label == ISVC_LABEL:
                yield from self._concerned(Ref("InferenceService", ref.namespace, value))
            else:
                for one in self._instances.get((ref.namespace, value), ()):
                    yield Key(*one)

    @staticmethod
    def _pod_labels(obj: Mapping[str, Any]) -> list[tuple[str, str]]:
        labels = obj["metadata"].get("labels") or {}
        return [(label, labels[label]) for label in (INSTANCE_LABEL, ISVC_LABEL) if label in labels]

    # Below: bookkeeping.

    def _load(self, ref: Ref) -> dict[str, Any] | None:
        """The object, shared with others who read it: nobody changes it."""
        entry = self._entries.get(ref)
        if entry is None:
            return None
        known = self._parsed.get(ref)
        if known is not None and known[0] is entry:
            return known[1]
        obj = orjson.loads(entry.data)
        self._parsed[ref] = entry, obj
        while len(self._parsed) > PARSED:
            self._parsed.popitem(last=False)
        return obj

    def _tell(self, keys: Iterable[Key | None]) -> None:
        for key in keys:
            if key is not None:
                self._on_change(key)

    def _bury(self, uid: str, version: int) -> None:
        self._gone[uid] = max(version, self._gone.pop(uid, 0))
        while len(self._gone) > TOMBSTONES:
            self._gone.popitem(last=False)

    def _forget(self, ref: Ref) -> None:
        entry = self._entries.get(ref)
        if entry is None:
            return
        if ref.kind == "Pod":
            for label, value in self._pod_labels(orjson.loads(entry.data)):
                _discard(self._pods, (label, ref.namespace, value), ref)
            self._warnings.pop(entry.uid, None)
        if ref.kind in OUR_KINDS:
            _discard(self._instances, (ref.namespace, label_value(ref.name)), ref)
        for named in self._named.pop(ref, ()):
            _discard(self._naming, named, ref)
        for owner in entry.owners:
            _discard(self._children, owner, ref)
        self._uids.pop(entry.uid, None)
        self._parsed.pop(ref, None)
        del self._entries[ref]

    def _put_warning(self, event: Mapping[str, Any]) -> bool:
        about = event.get("involvedObject") or {}
        kept = ("apiVersion", "kind", "type", "reason", "message", "count", "lastTimestamp", "eventTime")
        slim = {name: event[name] for name in kept if name in event} | {"involvedObject": about}
        slim["metadata"] = {name: event["metadata"].get(name) for name in ("name", "namespace", "creationTimestamp")}
        uid, name = str(about.get("uid", "")), str(event["metadata"]["name"])
        known = self._warnings.setdefault(uid, {})
        if known.get(name) == slim:
            return False
        known.pop(name, None)
        known[name] = slim
        for old in list(known)[:-WARNINGS_PER_POD]:
            del known[old]
        self._warnings.move_to_end(uid)
        while len(self._warnings) > WARNED_PODS:
            self._warnings.popitem(last=False)
        if (pod := self._uids.get(uid)) is not None:
            self._tell(set(self._concerned(pod)))
        return True


def _discard(index: defaultdict[Any, set[Ref]], name: object, ref: Ref) -> None:
    """Take a reference out of an index, and an empty set with it."""
    refs = index.get(name)
    if refs is not None:
        refs.discard(ref)
        if not refs:
            del index[name]
