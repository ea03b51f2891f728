"""Every item exactly once, whatever is killed and whatever fails: the crash table of docs/batches.md, row by row.

After each: every item once, failures listed apart, at most the open chunks done again per kill, and the same bytes as
on a good day. Workers are real processes on a real S3 server; `make chaos` does the same large and at random.
"""

import random
import threading

import pytest

from tests.jobs.conftest import NewBatch
from tests.jobs.evidence import Outcome, audit, rework
from tests.jobs.harness import BUCKET, Batch, JobFailed, album, until
from tests.jobs.pictures import picture
from tests.jobs.store_proxy import AFTER, BEFORE, hold
from tests.s3 import S3Server

PLAN, CHUNK, DONE, MANIFEST = r"plan/PLAN\.json$", r"parts/.*/chunk-", r"done/shard-", r"output/MANIFEST\.json$"


def test_a_good_day(undisturbed: Outcome, batch: Batch) -> None:
    batch.through()
    assert audit(batch) == undisturbed
    assert (undisturbed.succeeded, undisturbed.failed) == (37, 3)
    assert rework(batch) == 0
    assert set(batch.codes) == {("plan", 0), ("run", 0), ("finish", 0)}


# --- killed where it hurts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "when", "drops"),
    [
        pytest.param(r"plan/[^/]+/shard-00001", BEFORE, True, id="between two shard files"),
        pytest.param(PLAN, BEFORE, True, id="before PLAN.json"),
        pytest.param(PLAN, BEFORE, False, id="while PLAN.json is written"),
        pytest.param(PLAN, AFTER, False, id="after PLAN.json, before its exit"),
    ],
)
def test_planner_killed(batch: Batch, undisturbed: Outcome, pattern: str, when, drops: bool) -> None:
    hook = batch.proxy.at("PUT", pattern, when, batch.kill(drops=drops))
    batch.through()
    assert hook.reached.is_set()
    assert batch.codes["plan", -9] == 1
    assert audit(batch) == undisturbed
    attempts = {key.split("/")[1] for key in batch.listing("plan/") if key.count("/") == 2}
    assert len(attempts) == (2 if drops else 1), "a plan that is there is planned again"


@pytest.mark.parametrize(
    ("pattern", "when", "drops"),
    [
        pytest.param(CHUNK, BEFORE, True, id="before a chunk"),
        pytest.param(CHUNK, BEFORE, False, id="while a chunk is written"),
        pytest.param(CHUNK, AFTER, False, id="after a chunk, before done"),
        pytest.param(DONE, BEFORE, True, id="before done"),
        pytest.param(DONE, AFTER, False, id="after done, before its exit"),
    ],
)
def test_worker_killed(batch: Batch, undisturbed: Outcome, pattern: str, when, drops: bool) -> None:
    hook = batch.proxy.at("PUT", pattern, when, batch.kill(drops=drops), after_calls=int(pattern == CHUNK))
    batch.through(parallelism=1)
    assert hook.reached.is_set()
    assert batch.codes["run", -9] == 1
    assert audit(batch) == undisturbed
    if pattern == DONE:
        assert rework(batch) == 0, "a shard whose chunks are all there is done again"


@pytest.mark.parametrize("nth", [1, 7, 23])
def test_worker_killed_in_the_midst_of_a_chunk(batch: Batch, undisturbed: Outcome, nth: int) -> None:
    def kill(ask: int) -> None:
        if ask == nth:
            for worker in batch.workers:
                worker.kill()

    batch.stub.on_ask = kill
    batch.through(parallelism=1)
    assert batch.codes["run", -9] == 1
    assert audit(batch) == undisturbed


@pytest.mark.parametrize(
    ("pattern", "when", "drops"),
    [
        pytest.param(r"output/results\.jsonl$", BEFORE, True, id="before results.jsonl"),
        pytest.param(MANIFEST, BEFORE, True, id="before MANIFEST.json"),
        pytest.param(MANIFEST, BEFORE, False, id="while MANIFEST.json is written"),
        pytest.param(MANIFEST, AFTER, False, id="after MANIFEST.json, before its exit"),
    ],
)
def test_finish_killed(batch: Batch, undisturbed: Outcome, pattern: str, when, drops: bool) -> None:
    hook = batch.proxy.at("PUT", pattern, when, batch.kill(drops=drops))
    batch.through()
    assert hook.reached.is_set()
    assert batch.codes["finish", -9] == 1
    assert audit(batch) == undisturbed


def test_a_second_run_of_a_finished_batch_changes_nothing(batch: Batch, undisturbed: Outcome) -> None:
    batch.through()
    before = {key: batch.read(key) for key in batch.listing() if not key.startswith("progress/")}
    asks = batch.stub.asks
    batch.through()
    assert {key: batch.read(key) for key in batch.listing() if not key.startswith("progress/")} == before
    assert batch.stub.asks == asks
    assert audit(batch) == undisturbed


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_random(new_batch: NewBatch, undisturbed: Outcome, seed: int) -> None:
    """Whoever runs, planner and finisher too, some milliseconds after the last kill."""
    batch = new_batch()
    rng = random.Random(seed)
    batch.stub.delay_seconds = 0.005
    due = rng.randrange(1, 40)
    calls = 0

    def kill_now_and_then() -> None:
        nonlocal due, calls
        calls = len(batch.proxy.calls)
        if calls >= due and batch.kills + sum(worker.is_killed for worker in batch.workers) < 6:
            batch.kill_one(rng)
            due = calls + rng.randrange(5, 60)

    batch.do("plan")
    batch.run_shards(each=kill_now_and_then)
    batch.job("finish", [None], each=kill_now_and_then)
    assert batch.kills >= 2
    assert audit(batch) == undisturbed


# --- two of a kind ---------------------------------------------------------------------------------------------------


def test_a_zombie_writes_after_its_successor(batch: Batch, undisturbed: Outcome) -> None:
    """A node that was lost comes back with a chunk in its hands."""
    batch.do("plan")
    let_go = threading.Event()
    held = batch.proxy.at("PUT", r"parts/shard-00000/chunk-0000", BEFORE, hold(let_go))
    zombie = batch.start("run", 0)
    until(lambda: held.seen, what="the zombie's write")
    successor = batch.start("run", 0)
    assert batch.wait(successor) == 0
    let_go.set()
    assert batch.wait(zombie) == 0
    batch.job("run", [1])
    batch.do("finish")
    assert audit(batch, writers=2) == undisturbed
    assert any(
        call.key.endswith("shard-00000/chunk-0000.jsonl") and status == 412 for call, status in batch.proxy.calls
    )


def test_two_workers_on_every_shard(batch: Batch, undisturbed: Outcome) -> None:
    batch.do("plan")
    batch.job("run", [0, 0, 1, 1], parallelism=4)
    batch.do("finish")
    assert audit(batch, writers=2) == undisturbed


def test_two_planners_and_two_finishers(batch: Batch, undisturbed: Outcome) -> None:
    batch.job("plan", [None, None], parallelism=2)
    batch.run_shards()
    batch.job("finish", [None, None], parallelism=2)
    assert audit(batch) == undisturbed


# --- told to stop ----------------------------------------------------------------------------------------------------


def test_evicted_and_admitted_again_with_less_parallelism(batch: Batch, undisturbed: Outcome) -> None:
    """Kueue's preemption: SIGTERM to all, never exit code 0, and only what is missing afterwards."""
    batch.do("plan")

    def slow_down(ask: int) -> None:
        if ask == 6:
            batch.stub.delay_seconds = 2

    batch.stub.on_ask = slow_down
    evicted = [batch.start("run", index) for index in (0, 1)]
    until(lambda: batch.stub.asks >= 6, what="the first asks")
    for worker in evicted:
        worker.stop()
    assert [batch.wait(worker) for worker in evicted] == [143, 143]
    there = batch.listing("parts/")
    batch.stub.delay_seconds, batch.stub.on_ask = 0, None
    batch.run_shards(parallelism=1)
    batch.do("finish")
    assert audit(batch) == undisturbed
    assert 0 < len(there) < 8, "nothing was flushed, or all was done"


# --- the store's bad days --------------------------------------------------------------------------------------------


def test_a_store_with_five_percent_errors(batch: Batch, undisturbed: Outcome) -> None:
    """503s, 500s, and writes that are done but whose answers are lost."""
    batch.proxy.error_share = 0.05
    batch.through()
    assert batch.proxy.faults.total() > 0
    assert audit(batch) == undisturbed


def test_a_store_that_answers_the_first_conditional_write_of_every_key_409(batch: Batch, undisturbed: Outcome) -> None:
    """Which says that somebody else writes, and not that it is written."""
    batch.proxy.conflicts_once = True
    batch.through()
    assert batch.proxy.faults["ConditionalRequestConflict"] >= 8, "not even the chunks'"
    assert audit(batch) == undisturbed


def test_a_blackout_of_the_store(batch: Batch, undisturbed: Outcome) -> None:
    batch.do("plan")
    timer = threading.Timer(1.5, lambda: setattr(batch.proxy, "is_black", False))

    def go_dark(_: object) -> None:
        batch.proxy.is_black = True
        timer.start()

    batch.proxy.at("PUT", CHUNK, AFTER, go_dark)
    batch.run_shards()
    timer.join()
    batch.do("finish")
    assert batch.proxy.faults["black"] > 0
    assert audit(batch) == undisturbed


def test_a_full_bucket(batch: Batch, undisturbed: Outcome) -> None:
    """Every write is refused for a while, as by a server whose disk is full; what is there stays."""
    batch.do("plan")

    def fill(_: object) -> None:
        batch.proxy.is_full = True

    batch.proxy.at("PUT", CHUNK, AFTER, fill)
    worker = batch.start("run", 0)
    until(lambda: batch.proxy.faults["InsufficientStorage"] > 2, what="a write that is refused")
    batch.proxy.is_full = False
    batch.wait(worker)
    batch.run_shards()
    batch.do("finish")
    assert audit(batch) == undisturbed


# --- the target's bad days -------------------------------------------------------------------------------------------


def _progress(batch: Batch, shard: int) -> bytes:
    key = f"progress/shard-{shard:05}.json"
    return batch.read(key) if key in batch.listing("progress/") else b""


@pytest.mark.parametrize("way", ["gone", "unready"])
def test_the_gateway_is_away(batch: Batch, undisturbed: Outcome, way: str) -> None:
    """Workers wait for it; no item pays for it."""
    batch.do("plan")
    outage = threading.Event()

    def begin(ask: int) -> None:
        if ask == 9:
            batch.stub.is_unavailable = way == "unready"
            outage.set()

    batch.stub.on_ask = begin
    batch.start("run", 0)
    assert outage.wait(60)
    if way == "gone":
        batch.stub.go_down()
    worker = batch.workers[0]
    progress = "progress/shard-00000.json"
    until(
        lambda: progress in batch.listing("progress/") and b"BackendUnavailable" in batch.read(progress), what="waiting"
    )
    assert worker.process.poll() is None, "the worker gave up"
    batch.stub.is_unavailable = False
    if way == "gone":
        batch.stub.come_up()
    assert batch.wait(worker) == 0
    batch.job("run", [1])
    batch.do("finish")
    # What the gateway was answering when it went is asked again.
    found = audit(batch, writers=2)
    assert found == undisturbed
    assert rework(batch) <= batch.max_in_flight


def test_a_gateway_that_is_busy(batch: Batch, undisturbed: Outcome) -> None:
    """Four asks at a time, whatever the worker would like: it finds that out, and no item fails."""
    batch.stub.limit, batch.stub.delay_seconds = 4, 0.1  # longer than a slow machine takes for five
    batch.through()
    assert batch.stub.refused[429] > 0
    assert audit(batch) == undisturbed
    assert rework(batch) == 0
    assert set(batch.stub.priorities) == {"batch"}


def test_a_gateway_that_throttles_at_random(batch: Batch, undisturbed: Outcome) -> None:
    batch.stub.throttle_share = 0.2
    batch.through()
    assert audit(batch) == undisturbed
    assert rework(batch) == 0


def test_images_that_are_changed_or_deleted_meanwhile(s3_server: S3Server, new_batch: NewBatch) -> None:
    """Errors of these two items, with their codes; the batch goes on."""
    batch = new_batch(shard_size=10)
    batch.input_prefix = f"album-of-{batch.uid}/"
    batch.pictures = album(s3_server, batch.input_prefix, 20)
    batch.do("plan")
    changed, deleted = sorted(batch.pictures)[4], sorted(batch.pictures)[13]
    s3_server.client.put_object(Bucket=BUCKET, Key=changed, Body=picture(999))
    s3_server.client.delete_object(Bucket=BUCKET, Key=deleted)
    batch.run_shards()
    batch.do("finish")
    failures = {changed: ("fetch", "input_changed"), deleted: ("fetch", "input_not_found")}
    found = audit(batch, failures=failures)
    assert (found.succeeded, found.failed) == (18, 2)


def test_the_pipeline_changes_in_the_midst_of_it(batch: Batch) -> None:
    """No line of another revision; the Job fails at once, and says why."""
    batch.do("plan")

    def change(ask: int) -> None:
        if ask == 12:
            batch.stub.revision = "another"

    batch.stub.on_ask = change
    with pytest.raises(JobFailed) as failed:
        batch.run_shards(parallelism=1)
    assert failed.value.code == 44
    assert "PipelineChanged" in failed.value.words
    chunks = batch.listing("parts/")
    assert len(chunks) <= 2, "lines of another revision were written"
