"""The contract between a batch's workers and the operator, kept by a small worker that runs as plain processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sightline_operator.contract import Exit, LastWords, Plan, Progress
from sightline_operator.render import render_batch

from .simulation import SETTINGS, batch, pipeline

WORKER = Path(__file__).with_name("worker.py")
DEADLINE_SECONDS = 60


def until(is_true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while not is_true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


class Bench:
    """A batch with its page as the operator renders it, its folder, and a gateway when it is asked for."""

    def __init__(self, folder: Path, items: list[str]) -> None:
        self.folder = folder
        source = folder / "in"
        source.mkdir()
        lines = [json.dumps({"custom_id": f"i{n}", "uri": uri}) for n, uri in enumerate(items)]
        (source / "items.jsonl").write_text("\n".join(lines))
        self.page = self.rendered()
        self.write()

    def rendered(self) -> dict[str, Any]:
        cr, owner = batch(shardSize=4, chunkSize=2), pipeline()
        cr["metadata"] |= {"namespace": "vision", "uid": "b-1", "generation": 1}
        owner["metadata"] |= {"namespace": "vision", "uid": "p-1", "generation": 1}
        children = render_batch(cr, owner, None, SETTINGS)
        return json.loads(children["configuration"]["data"]["batch.json"])

    def write(self) -> None:
        (self.folder / "batch.json").write_text(json.dumps(self.page))

    def environment(self, **more: str) -> dict[str, str]:
        own = {
            "BATCH_FILE": str(self.folder / "batch.json"),
            "STORE": str(self.folder),
            "LAST_WORDS": str(self.folder / "words"),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        return {**os.environ, **own, **more}

    def start(self, verb: str, shard: int = 0, **more: str) -> subprocess.Popen[bytes]:
        environment = self.environment(JOB_COMPLETION_INDEX=str(shard), **more)
        return subprocess.Popen([sys.executable, str(WORKER), verb], env=environment)

    def do(self, verb: str, shard: int = 0, **more: str) -> int:
        (self.folder / "words").unlink(missing_ok=True)
        return self.start(verb, shard, **more).wait(DEADLINE_SECONDS)

    @property
    def words(self) -> LastWords:
        path = self.folder / "words"
        return LastWords.read(path.read_text() if path.exists() else "")

    @property
    def root(self) -> Path:
        return self.folder / "b-1" / self.page["fingerprint"]

    def chunks(self) -> list[str]:
        return sorted(f"{path.parent.name}/{path.name}" for path in (self.root / "parts").glob("*/*.json"))

    def progress(self) -> Progress | None:
        url = f"{self.page['pipeline']['url']}/internal/batches/b-1/progress"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return Progress.read(json.loads(answer.read()))

    @contextlib.contextmanager
    def gateway(self, **more: str) -> Iterator[None]:
        port = self.folder / "port"
        port.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, str(WORKER), "gateway", str(port)], env=self.environment(**more))
        try:
            until(port.exists, "the gateway's port")
            self.page["pipeline"]["url"] = f"http://127.0.0.1:{port.read_text()}"
            self.write()
            yield
        finally:
            process.kill()
            process.wait()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, [f"s3://images/{n}.png" for n in range(9)] + ["s3://images/bad.png"])


def test_a_batch_is_planned_run_and_finished_and_every_step_can_be_repeated(bench: Bench) -> None:
    assert bench.do("plan") == Exit.DONE
    assert bench.words.plan == Plan(shards=3, items=10, fingerprint=bench.page["fingerprint"])
    assert bench.do("plan") == Exit.DONE
    assert bench.words.plan == Plan(shards=3, items=10, fingerprint=bench.page["fingerprint"])
    with bench.gateway():
        assert bench.do("run", 0) == Exit.DONE
        seen = bench.progress()
        assert seen is not None
        assert (seen.total, seen.succeeded, seen.failed, seen.shards_completed) == (10, 4, 0, 1)
        assert [bench.do("run", shard) for shard in (1, 2, 0)] == [Exit.DONE] * 3
    assert bench.do("finish") == Exit.DONE
    end = bench.words.progress
    assert end is not None
    assert (end.succeeded, end.failed, end.shards_completed) == (9, 1, 3)
    assert end.failures == ({"step": "caption", "code": "caption_rejected", "count": 1, "sampleCustomId": "i9"},)
    assert end.outputs is not None
    assert Path(end.outputs["manifest"]).exists()
    assert bench.do("finish") == Exit.DONE


def test_a_terminated_worker_never_says_zero_and_its_whole_chunks_stay(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ["s3://a", "s3://b", "s3://slow", "s3://d"])
    assert bench.do("plan") == Exit.DONE
    with bench.gateway():
        worker = bench.start("run")
        until((tmp_path / "asked").exists, "the worker's third item")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(DEADLINE_SECONDS) == Exit.INTERRUPTED
        assert bench.chunks() == ["shard-00000/chunk-0000.json"]
        (tmp_path / "go").touch()
        assert bench.do("run") == Exit.DONE
    assert bench.chunks() == ["shard-00000/chunk-0000.json", "shard-00000/chunk-0001.json"]
    assert bench.do("finish") == Exit.DONE


def test_a_killed_worker_loses_its_open_chunk_and_no_more(tmp_path: Path) -> None:
    bench = Bench(tmp_path, ["s3://a", "s3://b", "s3://slow", "s3://d"])
    assert bench.do("plan") == Exit.DONE
    with bench.gateway():
        worker = bench.start("run")
        until((tmp_path / "asked").exists, "the worker's third item")
        before = (bench.root / "parts/shard-00000/chunk-0000.json").stat().st_mtime_ns
        worker.kill()
        worker.wait(DEADLINE_SECONDS)
        (tmp_path / "go").touch()
        assert bench.do("run") == Exit.DONE
    assert (bench.root / "parts/shard-00000/chunk-0000.json").stat().st_mtime_ns == before
    assert bench.do("finish") == Exit.DONE


def test_an_input_that_is_not_there_is_said_in_the_last_words(bench: Bench) -> None:
    (bench.folder / "in/items.jsonl").unlink()
    assert bench.do("plan") == Exit.UNUSABLE
    assert bench.words.reason == "InputNotFound"


def test_a_corrupt_shard_fails_alone(bench: Bench) -> None:
    bench.do("plan")
    (bench.root / "plan/shard-00001.json").write_text("{")
    with bench.gateway():
        assert [bench.do("run", shard) for shard in range(3)] == [Exit.DONE, Exit.SHARD_CORRUPT, Exit.DONE]
    assert bench.do("finish") == Exit.UNUSABLE
    assert (bench.words.reason, bench.words.message) == ("PlanCorrupt", "4 items have no result")


def test_a_gateway_of_another_revision_stops_the_worker(bench: Bench) -> None:
    bench.do("plan")
    with bench.gateway(REVISION="another"):
        assert bench.do("run") == Exit.REVISION_MISMATCH
    assert bench.chunks() == []


def test_a_gateway_that_is_away_costs_no_item(bench: Bench) -> None:
    bench.do("plan")
    bench.page["pipeline"]["url"] = "http://127.0.0.1:9"
    bench.write()
    assert bench.do("run", PATIENCE="0.2") == Exit.BACKEND_UNAVAILABLE
    assert bench.chunks() == []
    with bench.gateway():
        assert bench.do("run") == Exit.DONE


def test_running_without_a_plan_is_useless(bench: Bench) -> None:
    assert bench.do("run") == Exit.UNUSABLE
    assert bench.words.reason == "PlanCorrupt"
