"""A batch's worker as a process: `plan`, `run` one shard, or `finish`; every end of it is an exit code and last words.

$BATCH_FILE               the page of the batch (see `page.read_page`)
$JOB_COMPLETION_INDEX     the shard to run
$LAST_WORDS               file of the termination message; default /dev/termination-log where there is one
$BATCH_PATIENCE_SECONDS   how long `run` waits for a target that is away, default 1800
$METRICS_PORT             serve Prometheus metrics there; default: nowhere

Exit codes and reasons are a contract with the operator (its `contract.py`), which turns them into podFailurePolicy and
conditions. Whoever got SIGTERM says 143 and never 0: a Job takes 0 for a finished shard (kueue #10487).
"""

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import orjson

from sightline.jobs import metrics
from sightline.jobs.asking import MAX_IMAGE_BYTES, Asker, RevisionMismatch, TargetRefuses, new_client, readiness
from sightline.jobs.finish import PartCorrupt, Unfinished, finish
from sightline.jobs.objects import AccessDenied, BucketMissing, NoConditionalWrites, StoreFault
from sightline.jobs.pace import PATIENCE_SECONDS, Pace, TargetGone
from sightline.jobs.page import Page, read_page
from sightline.jobs.parquet import ParquetMissing
from sightline.jobs.plan import PlanCorrupt, ShardCorrupt, layout_of, read_plan
from sightline.jobs.progress import final
from sightline.jobs.reports import ShardReport
from sightline.jobs.reuse import Reuse
from sightline.jobs.shard import Stop, Stopped, TooManyFailures, run_shard
from sightline.jobs.stores import Stores, open_location

log = logging.getLogger("sightline.jobs")

MAX_LAST_WORDS = 4096
MAX_MESSAGE_CHARACTERS = 1000
TERMINATION_LOG = Path("/dev/termination-log")
FETCHED_AHEAD = 8
"""Items whose image is being fetched while all calls that may be in flight are."""
SPARE_SECONDS = 5.0


class Exit(IntEnum):
    """As in the operator's `contract.Exit`."""

    DONE = 0
    FAILED = 1
    UNUSABLE = 42
    SHARD_CORRUPT = 43
    REVISION_MISMATCH = 44
    BACKEND_UNAVAILABLE = 75
    INTERRUPTED = 143


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker ends. `words`: what the operator reads of it, JSON."""

    code: Exit
    words: Mapping[str, Any] = field(default_factory=dict[str, Any])


Words = Mapping[str, Any]


def main(verb: str, environment: Mapping[str, str]) -> int:
    """Do one verb of the batch that the environment names. Returns the exit code; never raises."""
    try:
        page = _page(environment)
    except ValueError as error:
        ending = Ending(Exit.UNUSABLE, {"reason": "PlanCorrupt", "message": str(error)})
    else:
        ending = asyncio.run(_end_of(verb, page, environment))
    log.info("%s ends code=%d %s", verb, ending.code, orjson.dumps(ending.words).decode())
    _say_last(ending.words, environment)
    return int(ending.code)


async def _end_of(verb: str, page: Page, environment: Mapping[str, str]) -> Ending:
    """Do it, and be stoppable: SIGTERM asks `run` to flush, and cancels the others."""
    stop = Stop()
    work = asyncio.ensure_future(_VERBS[verb](page, environment, stop))
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        if verb != "run" or stop.is_ending:
            work.cancel()
        grace = page.target.timeout_seconds + SPARE_SECONDS
        stop.now(grace)
        loop.call_later(grace + SPARE_SECONDS, work.cancel)  # whatever it waits for

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, interrupted)
    try:
        return Ending(Exit.DONE, await work)
    except asyncio.CancelledError:
        return Ending(Exit.INTERRUPTED, {"message": "interrupted"})
    except Exception as error:
        return ending_of(error, verb)


def ending_of(error: Exception, verb: str) -> Ending:
    """What an exception of a verb means to the Job: exit code, reason and message."""
    if isinstance(error, Stopped):
        return Ending(Exit.INTERRUPTED, {"message": f"interrupted; {error.counts.done} items are stored"})
    from sightline.jobs.inputs import InputFault

    if isinstance(error, InputFault):
        return _said(Exit.UNUSABLE, error.reason, error)
    if isinstance(error, ShardCorrupt | PartCorrupt) and verb == "run":
        return _said(Exit.SHARD_CORRUPT, "ShardCorrupt", error)
    for kinds, code, reason in _ENDINGS:
        if isinstance(error, kinds):
            return _said(code, reason, error)
    log.exception("bug in %s", verb, exc_info=error)
    return Ending(Exit.FAILED, {"message": "Something went wrong in the worker; its log says what."})


_ENDINGS: tuple[tuple[tuple[type[Exception], ...], Exit, str], ...] = (
    ((RevisionMismatch,), Exit.REVISION_MISMATCH, "PipelineChanged"),
    ((TooManyFailures,), Exit.UNUSABLE, "TooManyFailures"),
    ((TargetRefuses, AccessDenied, BucketMissing), Exit.UNUSABLE, "AccessDenied"),
    ((NoConditionalWrites,), Exit.UNUSABLE, "NoConditionalWrites"),
    ((PlanCorrupt, ShardCorrupt, PartCorrupt), Exit.UNUSABLE, "PlanCorrupt"),
    ((Unfinished,), Exit.UNUSABLE, "Unfinished"),
    ((ParquetMissing,), Exit.UNUSABLE, "ParquetMissing"),
    ((TargetGone,), Exit.BACKEND_UNAVAILABLE, "BackendUnavailable"),
    ((StoreFault,), Exit.BACKEND_UNAVAILABLE, "StorageUnavailable"),
)


def _said(code: Exit, reason: str, error: Exception) -> Ending:
    return Ending(code, {"reason": reason, "message": str(error)})


# --- the three verbs -------------------------------------------------------------------------------------------------


async def _plan(page: Page, environment: Mapping[str, str], stop: Stop) -> Words:
    """Plan, or find that it was planned. The store must be able to write an object once."""
    objects = open_location(page.outputs.location)
    plan = await read_plan(objects, layout_of(page))
    if plan is None:
        from sightline.jobs.inputs import plan_batch  # brings numpy, which a run does without

        await objects.probe()
        plan = await plan_batch(page, objects)
    return {"plan": plan.in_short()}


async def _run(page: Page, environment: Mapping[str, str], stop: Stop) -> Words:
    """Do the shard of $JOB_COMPLETION_INDEX."""
    if page.dry_run:
        return {"message": "a dry run: nothing is asked"}
    objects = open_location(page.outputs.location)
    plan = await read_plan(objects, layout_of(page))
    if plan is None:
        raise PlanCorrupt("PLAN.json does not exist")
    shard = _shard_index(environment)
    patience = float(environment.get("BATCH_PATIENCE_SECONDS") or PATIENCE_SECONDS)
    async with new_client(page) as client:
        pace = Pace(page.max_in_flight, readiness(page, client), patience_seconds=patience)
        reuse = Reuse(objects, layout_of(page)) if page.options.reuse else None
        stores = Stores.of(page, objects, plan.source, max_bytes=MAX_IMAGE_BYTES)
        _serve_metrics(environment, pace)
        flushing = asyncio.create_task(_hurry(stop, pace))
        try:
            asker = Asker(page, stores.fetch, pace, reuse=reuse, client=client)
            width = page.max_in_flight + min(page.max_in_flight, FETCHED_AHEAD)
            counts = await run_shard(
                page, plan, shard, objects, asker, width=width, stop=stop, waiting=lambda: pace.waiting
            )
        finally:
            flushing.cancel()
            await pace.aclose()
    return {"shard": ShardReport(shard, counts).to_json()}


async def _finish(page: Page, environment: Mapping[str, str], stop: Stop) -> Words:
    """Verify, make the outputs, commit."""
    if page.dry_run:
        return {"message": "a dry run: there is nothing to finish"}
    objects, layout = open_location(page.outputs.location), layout_of(page)
    sidecars = open_location(page.outputs.sidecars) if page.outputs.sidecars else None
    # The operator lets this run when no shard runs any more, also when some were given up (backoffLimitPerIndex).
    manifest = await finish(page, objects, sidecars=sidecars, ended="given_up")
    plan = await read_plan(objects, layout)
    if plan is None:
        raise PlanCorrupt("PLAN.json does not exist")
    root_url = f"{page.outputs.location.url.rstrip('/')}/{layout.root}"
    return {"progress": final(manifest, plan, root_url).to_json()}


_VERBS: Mapping[str, Callable[[Page, Mapping[str, str], Stop], Awaitable[Words]]] = {
    "plan": _plan,
    "run": _run,
    "finish": _finish,
}
VERBS = tuple(_VERBS)


async def _hurry(stop: Stop, pace: Pace) -> None:
    """Nothing is worth waiting for when a worker is stopped in an outage."""
    await stop.ending()
    while not pace.waiting:
        await asyncio.sleep(0.1)
    stop.now(0)


# --- around ----------------------------------------------------------------------------------------------------------


def _page(environment: Mapping[str, str]) -> Page:
    """Raises ValueError."""
    file = environment.get("BATCH_FILE")
    if not file:
        raise ValueError("BATCH_FILE is not set")
    try:
        text = Path(file).read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read") from error
    return read_page(text)


def _shard_index(environment: Mapping[str, str]) -> int:
    said = environment.get("JOB_COMPLETION_INDEX", "")
    if not said.isdecimal():
        raise PlanCorrupt("JOB_COMPLETION_INDEX is not set: which shard?")
    return int(said)


def _serve_metrics(environment: Mapping[str, str], pace: Pace) -> None:
    metrics.LIMIT.set_function(lambda: pace.limit)
    metrics.IN_FLIGHT.set_function(lambda: pace.in_flight)
    for reason in ("BackendUnavailable", "Throttled"):
        metrics.WAITING.labels(reason).set_function(lambda reason=reason: float(pace.waiting == reason))
    if port := environment.get("METRICS_PORT"):
        from prometheus_client import start_http_server

        start_http_server(int(port))


def last_words(words: Words) -> bytes:
    """Words as the termination message holds them: JSON of at most 4 KiB, shortened where nobody minds."""
    told = dict(words)
    if isinstance(message := told.get("message"), str):
        told["message"] = message[:MAX_MESSAGE_CHARACTERS]
    while len(data := orjson.dumps(told)) > MAX_LAST_WORDS:
        name = next(name for name in ("progress", "shard") if told.get(name, {}).get("failures"))
        told[name] = told[name] | {"failures": told[name]["failures"][:-1]}
    return data


def _say_last(words: Words, environment: Mapping[str, str]) -> None:
    path = Path(environment["LAST_WORDS"]) if "LAST_WORDS" in environment else TERMINATION_LOG
    if "LAST_WORDS" not in environment and not path.exists():
        return
    try:
        path.write_bytes(last_words(words))
    except OSError:
        log.warning("the last words cannot be written to %s", path)


def run(argv: list[str]) -> int:
    """The command: `python -m sightline.jobs plan|run|finish`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it writes a line for every call
    if len(argv) != 1 or argv[0] not in VERBS:
        log.error("usage: python -m sightline.jobs %s", "|".join(VERBS))
        return 2
    return main(argv[0], os.environ)
