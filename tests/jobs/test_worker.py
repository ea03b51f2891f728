"""A worker as a process: exit codes, last words and signals as the operator reads them; `python -m sightline.jobs`."""

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sightline.jobs.asking import RevisionMismatch, TargetRefuses
from sightline.jobs.finish import PartCorrupt, Unfinished
from sightline.jobs.inputs import InputFault
from sightline.jobs.items import Counts
from sightline.jobs.objects import AccessDenied, BucketMissing, NoConditionalWrites, StoreUnavailable
from sightline.jobs.pace import TargetGone
from sightline.jobs.plan import PlanCorrupt, ShardCorrupt
from sightline.jobs.shard import Stopped, TooManyFailures
from sightline.jobs.worker import Exit, ending_of, last_words
from sightline_operator.contract import PLAN_FAULTS, RUN_FAULTS, LastWords
from sightline_operator.contract import Exit as OperatorExit
from tests.jobs.conftest import NewBatch
from tests.jobs.harness import Batch, Worker, until, words_of
from tests.jobs.store_proxy import BEFORE, Call
from tests.jobs.stub import REVISION
from tests.s3 import S3Server

ROOT = Path(__file__).resolve().parents[2]


def heard(worker: Worker) -> LastWords:
    """What the operator makes of a worker's last words."""
    return LastWords.read(words_of(worker))


# --- the contract ----------------------------------------------------------------------------------------------------


def test_exit_codes_are_the_operators() -> None:
    ours = {code.name: code.value for code in Exit if code is not Exit.FAILED}
    assert ours == {code.name: code.value for code in OperatorExit}
    assert Exit.FAILED not in set(OperatorExit), "counted against the backoff limit"


@pytest.mark.parametrize(
    ("error", "verb", "code", "reason"),
    [
        (InputFault("InputEmpty", "nothing"), "plan", 42, "InputEmpty"),
        (AccessDenied("no"), "plan", 42, "AccessDenied"),
        (AccessDenied("no"), "run", 42, "AccessDenied"),
        (BucketMissing("no"), "run", 42, "AccessDenied"),
        (TargetRefuses("no"), "run", 42, "AccessDenied"),
        (NoConditionalWrites("no"), "plan", 42, "NoConditionalWrites"),
        (PlanCorrupt("no"), "run", 42, "PlanCorrupt"),
        (ShardCorrupt("no"), "run", 43, "ShardCorrupt"),
        (PartCorrupt("no"), "run", 43, "ShardCorrupt"),
        (ShardCorrupt("no"), "finish", 42, "PlanCorrupt"),
        (PartCorrupt("no"), "finish", 42, "PlanCorrupt"),
        (Unfinished(1, 5), "finish", 42, "Unfinished"),
        (TooManyFailures("no"), "run", 42, "TooManyFailures"),
        (RevisionMismatch("no"), "run", 44, "PipelineChanged"),
        (TargetGone("no"), "run", 75, "BackendUnavailable"),
        (StoreUnavailable("no"), "plan", 75, "StorageUnavailable"),
        (StoreUnavailable("no"), "run", 75, "StorageUnavailable"),
        (Stopped(Counts()), "run", 143, ""),
        (RuntimeError("secret"), "run", 1, ""),
    ],
)
def test_what_ends_a_worker_is_told_so(error: Exception, verb: str, code: int, reason: str) -> None:
    ending = ending_of(error, verb)
    words = LastWords.read(last_words(ending.words).decode())
    assert (ending.code, words.reason) == (code, reason)
    assert words.message
    assert "secret" not in words.message
    if code == 42 and verb == "run":
        assert reason in RUN_FAULTS
    if reason.startswith("Input"):
        assert reason in PLAN_FAULTS


def test_last_words_fit_and_keep_what_matters() -> None:
    failures = [
        {"step": "caption", "code": f"code_{number}", "count": 100 - number, "sampleCustomId": "é" * 250}
        for number in range(16)
    ]
    progress = {"total": 100, "succeeded": 3, "failed": 97, "failures": failures}
    data = last_words({"progress": progress, "message": "x" * 9000})
    assert len(data) <= 4096
    words = LastWords.read(data.decode())
    assert words.progress is not None
    assert (words.progress.total, words.progress.failed) == (100, 97)
    assert [row["code"] for row in words.progress.failures][:3] == ["code_0", "code_1", "code_2"]


# --- processes -------------------------------------------------------------------------------------------------------


def test_what_a_batch_says_at_its_ends(batch: Batch) -> None:
    plan = heard(batch.do("plan")).plan
    assert plan is not None
    assert (plan.shards, plan.items, plan.fingerprint) == (2, 40, "5eed5eed5eed")
    assert plan.size_bytes == sum(map(len, batch.pictures.values()))
    (one, two) = batch.job("run", [0, 1])
    assert [json.loads(words_of(worker))["shard"]["shard"] for worker in (one, two)] == [0, 1]
    progress = heard(batch.do("finish")).progress
    assert progress is not None
    assert (progress.total, progress.completed, progress.failed, progress.unenhanced) == (40, 40, 3, 1)
    assert progress.outputs is not None
    assert progress.outputs["results"] == f"s3://batches/{batch.root}output/results.jsonl"


def test_it_says_that_there_is_no_hurry(batch: Batch) -> None:
    batch.do("plan")
    batch.run_shards()
    assert set(batch.stub.priorities) == {"batch"}


def test_the_command_itself_with_metrics(new_batch: NewBatch) -> None:
    """The other tests fork what this one starts as a Job does."""
    batch = new_batch()
    batch.do("plan")
    batch.stub.delay_seconds = 0.05
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | batch.s3.environment() | {
        "BATCH_FILE": str(batch.page), "JOB_COMPLETION_INDEX": "1", "LAST_WORDS": str(batch.folder / "words"),
        "AWS_ENDPOINT_URL_S3": batch.proxy.url, "METRICS_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "sightline.jobs", "run"], env=environment, cwd=ROOT)
    seen = ""

    def told() -> str:
        nonlocal seen
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                seen = answer.read().decode()
        except OSError:
            return ""
        return seen

    try:
        until(lambda: "sightline_batch_in_flight_limit" in told() or process.poll() is not None, 60, "metrics")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert 'sightline_batch_waiting{reason="Throttled"} 0.0' in seen
    assert json.loads((batch.folder / "words").read_text())["shard"]["shard"] == 1
    assert len(batch.listing("parts/shard-00001")) == 4


def test_a_verb_that_there_is_not() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sightline.jobs", "nonsense"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "usage: python -m sightline.jobs plan|run|finish" in done.stderr


def ended(batch: Batch, verb: str, index: int | None = None) -> tuple[int, LastWords]:
    worker = batch.start(verb, index)
    return batch.wait(worker), heard(worker)


class TestUnusable:
    def test_a_page_that_is_none(self, batch: Batch) -> None:
        batch.page.write_text("{}")
        code, words = ended(batch, "run", 0)
        assert (code, words.reason) == (42, "PlanCorrupt")
        assert "batch page" in words.message

    @pytest.mark.parametrize("verb", ["run", "finish"])
    def test_a_batch_without_a_plan(self, batch: Batch, verb: str) -> None:
        assert (found := ended(batch, verb, 0))[0] == 42
        assert found[1].reason == "PlanCorrupt"

    def test_no_shard_named(self, batch: Batch) -> None:
        batch.do("plan")
        code, words = ended(batch, "run")
        assert (code, words.reason) == (42, "PlanCorrupt")
        assert "JOB_COMPLETION_INDEX" in words.message

    def test_a_shard_that_there_is_not(self, batch: Batch) -> None:
        batch.do("plan")
        assert ended(batch, "run", 7)[0] == 43

    def test_an_empty_prefix(self, new_batch: NewBatch) -> None:
        batch = changed(new_batch(), input={"prefix": "nothing/here/"})
        code, words = ended(batch, "plan")
        assert (code, words.reason) == (42, "InputEmpty")
        assert "nothing/here" in words.message

    @pytest.mark.parametrize("place", ["input", "output"])
    def test_a_bucket_that_is_missing(self, new_batch: NewBatch, place: str) -> None:
        batch = changed(new_batch(), **{place: {"bucket": "no-such-bucket-here"}})
        code, words = ended(batch, "plan")
        assert code == 42
        assert words.reason in PLAN_FAULTS
        assert "no-such-bucket-here" in words.message

    def test_wrong_credentials(self, new_batch: NewBatch, s3_server: S3Server) -> None:
        if not s3_server.is_real:
            pytest.skip("this server checks no keys")
        batch = new_batch(environment={"AWS_SECRET_ACCESS_KEY": "wrong"})
        code, words = ended(batch, "plan")
        assert (code, words.reason) == (42, "AccessDenied")
        assert "wrong" not in words.message

    def test_a_gateway_of_another_revision(self, batch: Batch) -> None:
        batch.do("plan")
        batch.stub.revision = "another"
        code, words = ended(batch, "run", 0)
        assert (code, words.reason) == (44, "PipelineChanged")
        assert REVISION in words.message
        assert batch.listing("parts/") == []

    def test_more_failures_than_allowed(self, new_batch: NewBatch) -> None:
        batch = new_batch(changes={"maxFailedItems": {"count": 1}})
        batch.do("plan")
        code, words = ended(batch, "run", 0)
        assert (code, words.reason) == (42, "TooManyFailures")


def changed(batch: Batch, **places: Mapping[str, Any]) -> Batch:
    """With another input prefix or output bucket on its page."""
    page = json.loads(batch.page.read_text())
    for name, change in places.items():
        page[name] = {kind: place | change for kind, place in page[name].items() if isinstance(place, dict)} | {
            kind: value for kind, value in page[name].items() if not isinstance(value, dict)
        }
    batch.page.write_text(json.dumps(page))
    return batch


class TestPatience:
    def test_a_gateway_that_stays_away_is_75_and_no_item_is_lost(self, new_batch: NewBatch) -> None:
        batch = new_batch(environment={"BATCH_PATIENCE_SECONDS": "1"})
        batch.do("plan")
        batch.stub.go_down()
        code, words = ended(batch, "run", 0)
        assert (code, words.reason) == (75, "BackendUnavailable")
        assert batch.listing("parts/") == []
        batch.stub.come_up()
        assert ended(batch, "run", 0)[0] == 0


class TestSigterm:
    def test_complete_chunks_are_stored_and_the_rest_is_not_begun(self, batch: Batch) -> None:
        batch.do("plan")
        batch.stub.delay_seconds = 0.3
        worker = batch.start("run", 0)
        until(lambda: batch.stub.asks >= 6)
        worker.stop()
        assert batch.wait(worker) == 143
        asked = batch.stub.asks
        assert asked < 20, "it went on feeding"
        stored = len(batch.listing("parts/"))
        assert "interrupted" in heard(worker).message
        batch.stub.delay_seconds = 0
        assert ended(batch, "run", 0)[0] == 0
        assert batch.stub.asks - asked <= 20 - 5 * stored + 1, "what was stored is not asked again (one item is flaky)"

    def test_in_an_outage_it_ends_at_once(self, batch: Batch) -> None:
        batch.do("plan")
        batch.stub.is_unavailable = True
        worker = batch.start("run", 0)
        until(lambda: batch.stub.refused[503] >= 3)
        worker.stop()
        assert batch.wait(worker, 20) == 143

    @pytest.mark.parametrize("verb", ["plan", "finish"])
    def test_the_others_end_too_and_do_it_all_next_time(self, batch: Batch, verb: str) -> None:
        if verb == "finish":
            batch.do("plan")
            batch.run_shards()
        pattern = r"plan/PLAN\.json" if verb == "plan" else r"output/MANIFEST\.json"
        held, go = threading.Event(), threading.Event()

        def hold(_: Call) -> bool:
            held.set()
            go.wait(60)
            return False

        batch.proxy.at("PUT", pattern, BEFORE, hold)
        worker = batch.start(verb)
        assert held.wait(60)
        worker.stop()
        assert batch.wait(worker, 20) == 143
        go.set()
        batch.do(verb)


def test_a_dry_run_only_plans(new_batch: NewBatch) -> None:
    batch = new_batch(changes={"dryRun": True})
    batch.through()
    assert batch.listing("parts/") == []
    assert batch.listing("output/") == []
    assert batch.stub.asks == 0
    assert heard(batch.do("plan")).plan is not None


def test_the_same_pictures_are_asked_once(new_batch: NewBatch, s3_server: S3Server) -> None:
    """Content-hash reuse: twenty names, two pictures, two workers."""
    batch = new_batch(changes={"options": {"enhance": "Auto", "reuse": True}}, shard_size=10)
    same = list(batch.pictures.values())[:2]
    keys = {f"twins-{batch.uid}/{number:02}.png": same[number % 2] for number in range(20)}
    for key, data in keys.items():
        s3_server.put("batches", key, data)
    batch.pictures = keys
    changed(batch, input={"prefix": f"twins-{batch.uid}/"})
    batch.through()
    rows = [json.loads(line) for key in batch.listing("parts/") for line in batch.read(key).splitlines()]
    assert len(rows) == 20
    assert len({row["caption"] for row in rows}) == 2
    assert batch.stub.given <= 4, "two pictures; two workers may begin one at the same time"
