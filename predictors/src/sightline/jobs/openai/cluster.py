"""Batches that a cluster does: each is a VisionBatch, whose name is the id, and whose workers write to the same store.

The object is all that is kept of a batch beside its results: who made it is a label, what it was asked an annotation,
how far it is its status. It goes `ttl_seconds` after its end, and the batch with it.
"""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, cast

import orjson

from sightline.jobs.finish import PartCorrupt, finish, lines_of, read_manifest
from sightline.jobs.items import Counts
from sightline.jobs.layout import Layout
from sightline.jobs.manifest import Ended, Manifest
from sightline.jobs.objects import Objects
from sightline.jobs.openai.batch import Batch, Order, Status, Which
from sightline.jobs.openai.files import owner
from sightline.jobs.openai.kubernetes import VisionBatches
from sightline.jobs.openai.local import chunk_size
from sightline.jobs.openai.requests import LineFault
from sightline.jobs.page import Input, Location, Outputs, Page, Target
from sightline.jobs.plan import PlanCorrupt, ShardCorrupt, read_plan

log = logging.getLogger("sightline.jobs")

RESULTS = "batches/"
"""Where a VisionBatch without an output of its own writes, below the prefix of its pipeline's storage."""

NAME = "batch-"
OWNER = "sightline.dev/asked-by"
ABOUT = "sightline.dev/openai"

SMALLEST_SHARD, LARGEST_SHARD = 100, 1000
SHARDS = 16
"""Of a batch that is large enough: some for each worker, so that none waits for another at the end."""

_STATUSES: Mapping[str, Status] = {
    "": "validating",
    "Pending": "validating",
    "Planning": "validating",
    "Running": "in_progress",
    "Paused": "in_progress",
    "Finishing": "finalizing",
    "Complete": "completed",
    "Failed": "failed",
    "Expired": "expired",
    "Cancelled": "cancelled",
}
_CUT: Mapping[str, Ended] = {"Expired": "batch_expired", "Cancelled": "batch_cancelled"}
_OVER = frozenset({"Complete", "Failed", "Expired", "Cancelled"})


class ClusterBackend:
    """A `Backend` that makes VisionBatches. The operator and its workers do the rest.

    objects      the store of the pipeline's storage, rooted at its prefix
    pipeline     the VisionPipeline that does the work: this gateway's own
    ttl_seconds  how long a batch is known after its end
    """

    def __init__(
        self,
        cluster: VisionBatches,
        objects: Objects,
        *,
        pipeline: str,
        ttl_seconds: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._results = objects.below(RESULTS)
        self._pipeline = pipeline
        self._ttl = ttl_seconds
        self._clock = clock
        self._sealing: dict[str, asyncio.Task[Manifest]] = {}

    async def start(self) -> None:
        """Nothing is left undone here: the cluster goes on by itself."""

    async def close(self) -> None:
        for task in self._sealing.values():
            task.cancel()
        await asyncio.gather(*self._sealing.values(), return_exceptions=True)
        await self._cluster.aclose()

    async def create(self, order: Order) -> Batch:
        key = f"{int(self._clock() * 1000):012x}{secrets.token_hex(10)}"
        made = await self._cluster.create(manifest(key, order, pipeline=self._pipeline, ttl_seconds=self._ttl))
        return read(made, order.about())

    async def get(self, key: str, principal: str) -> Batch | None:
        found = await self._cluster.get(NAME + key)
        about = None if found is None else _about(found, principal)
        return None if found is None or about is None else await self._settled(found, about, is_sealing=True)

    async def list(self, principal: str, *, after: str | None, limit: int) -> Sequence[Batch]:
        found = await self._cluster.list(f"{OWNER}={owner(principal)}")
        found.sort(key=_name, reverse=True)  # names begin with the time
        older = [item for item in found if after is None or _name(item) < NAME + after]
        told: list[Batch] = []
        for item in older:
            if len(told) == limit:
                break
            if (about := _about(item, principal)) is not None:
                told.append(await self._settled(item, about, is_sealing=False))
        return told

    async def cancel(self, key: str, principal: str) -> Batch | None:
        found = await self._cluster.get(NAME + key)
        if found is None or (about := _about(found, principal)) is None:
            return None
        if _state(found) not in _OVER and found["spec"].get("desiredState") != "Cancelled":
            found = await self._cluster.patch(NAME + key, {"spec": {"desiredState": "Cancelled"}})
        return None if found is None else await self._settled(found, about, is_sealing=True)

    async def lines(self, batch: Batch, which: Which) -> AsyncGenerator[bytes]:
        found = await self._cluster.get(NAME + batch.key)
        if found is None or (layout := _layout(found)) is None:
            return
        if (plan := await read_plan(self._results, layout)) is not None:
            async for lines in lines_of(self._results, layout, plan, which):
                yield lines

    # --- the end of a batch that was ended early ---------------------------------------------------------------------

    async def _settled(self, found: Mapping[str, Any], about: Mapping[str, Any], *, is_sealing: bool) -> Batch:
        """The batch as it is. One that was cut off is over when every request that was not done has its error."""
        batch = read(found, about)
        why = _CUT.get(_state(found))
        layout = _layout(found)
        if why is None or batch.status == "failed" or layout is None:
            return batch
        end = await read_manifest(self._results, layout)
        if end is None and await read_plan(self._results, layout) is None:
            return batch  # nothing was planned: nothing was done
        if end is None and is_sealing:
            try:
                end = await self._seal(found, why)
            except (PlanCorrupt, ShardCorrupt, PartCorrupt) as error:
                log.error("VisionBatch %s cannot be told whole: %s", _name(found), error)
                return batch
        if end is None:
            return read(found, about, status="finalizing" if why == "batch_expired" else "cancelling")
        return read(found, about, counts=end.counts)

    async def _seal(self, found: Mapping[str, Any], why: Ended) -> Manifest | None:
        """Write what is missing, behind the requests that ask; None while that is under way."""
        uid = str(found["metadata"]["uid"])
        if uid not in self._sealing:
            self._sealing[uid] = asyncio.create_task(finish(_page(found), self._results, ended=why))
        task = self._sealing[uid]
        done, _ = await asyncio.wait([task], timeout=1.0)
        if not done:
            return None
        self._sealing.pop(uid, None)
        return task.result()


def manifest(key: str, order: Order, *, pipeline: str, ttl_seconds: float) -> dict[str, Any]:
    """The VisionBatch of an order. One whose file is no good is never begun."""
    requests = order.file.checked.requests if order.file.checked else 0
    chunk = chunk_size(requests)
    spec: dict[str, Any] = {
        "pipelineRef": {"name": pipeline},
        "input": {"upload": {"fileId": order.file.id}},
        "output": {"merge": "Never"},
        "completionWindow": f"{math.ceil(order.window_seconds)}s",
        "ttlAfterFinished": f"{math.ceil(ttl_seconds)}s",
        "chunkSize": chunk,
        "shardSize": max(chunk, SMALLEST_SHARD, min(LARGEST_SHARD, math.ceil(requests / SHARDS))),
    }
    if order.faults:
        spec["desiredState"] = "Cancelled"
    return {
        "metadata": {
            "name": NAME + key,
            "labels": {OWNER: owner(order.principal), "app.kubernetes.io/managed-by": "sightline-gateway"},
            "annotations": {ABOUT: orjson.dumps(order.about()).decode()},
        },
        "spec": spec,
    }


def read(
    found: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    status: Status | None = None,
    counts: Counts | None = None,
) -> Batch:
    """A VisionBatch as a batch. `status` and `counts` where they are known better than the object says."""
    said = cast("Mapping[str, Any]", found.get("status") or {})
    metadata, progress = found["metadata"], said.get("progress") or {}
    faults = tuple(LineFault.from_json(fault) for fault in about["faults"])
    state = _state(found)
    if status is None:
        status = "failed" if faults else _STATUSES.get(state, "in_progress")
        if state not in _OVER and not faults and found["spec"].get("desiredState") == "Cancelled":
            status = "cancelling"
    created = _seconds(metadata["creationTimestamp"])
    times = {"created": created, "expires": created + float(about["window_seconds"])}
    moments = {"in_progress": said.get("startTime"), "ended": said.get("completionTime")}
    times |= {name: _seconds(moment) for name, moment in moments.items() if moment}
    if status == "failed":
        faults = faults or _reason(said)
        times.setdefault("ended", created)
    return Batch(
        key=_name(found).removeprefix(NAME),
        status=status,
        about=about,
        total=int(progress.get("total") or about["requests"]),
        counts=counts or _counts(said),
        times=times,
        faults=faults if status == "failed" else (),
    )


def _about(found: Mapping[str, Any], principal: str) -> Mapping[str, Any] | None:
    """What a VisionBatch was asked; None when it is somebody else's, or nobody asked us."""
    metadata = found["metadata"]
    if (metadata.get("labels") or {}).get(OWNER) != owner(principal):
        return None
    try:
        return cast("Mapping[str, Any]", orjson.loads(metadata["annotations"][ABOUT]))
    except (KeyError, TypeError, orjson.JSONDecodeError):
        log.warning("VisionBatch %s has our label and no word of ours", _name(found))
        return None


def _name(found: Mapping[str, Any]) -> str:
    return str(found["metadata"]["name"])


def _state(found: Mapping[str, Any]) -> str:
    return str((found.get("status") or {}).get("state") or "")


def _layout(found: Mapping[str, Any]) -> Layout | None:
    """Where its plan and parts are; None before it has a place."""
    fingerprint = (found.get("status") or {}).get("fingerprint")
    return Layout.of("", str(found["metadata"]["uid"]), str(fingerprint)) if fingerprint else None


def _page(found: Mapping[str, Any]) -> Page:
    """As much of a page as finishing needs."""
    nowhere = Location("memory://")
    return Page(
        name=_name(found),
        uid=str(found["metadata"]["uid"]),
        fingerprint=str(found["status"]["fingerprint"]),
        input=Input("upload", nowhere, format="OpenAIBatch"),
        outputs=Outputs(nowhere, merge="Never"),
        target=Target(""),
    )


def _counts(said: Mapping[str, Any]) -> Counts:
    progress, usage = said.get("progress") or {}, said.get("usage") or {}
    return Counts(
        succeeded=int(progress.get("succeeded") or 0),
        failed=int(progress.get("failed") or 0),
        unenhanced=int(progress.get("unenhanced") or 0),
        prompt_tokens=int(usage.get("promptTokens") or 0),
        completion_tokens=int(usage.get("completionTokens") or 0),
    )


def _reason(said: Mapping[str, Any]) -> tuple[LineFault, ...]:
    """Why the operator gave a batch up, in its own words."""
    conditions = cast("Sequence[Mapping[str, Any]]", said.get("conditions") or ())
    return tuple(
        LineFault(str(each.get("reason", "")), str(each.get("message", "")))
        for each in conditions
        if each.get("type") == "Failed" and each.get("status") == "True"
    )


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
