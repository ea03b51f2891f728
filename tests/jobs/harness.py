"""A batch on a bad day: real S3, real worker processes, a stub that captions, and a Job controller in small.

batch = Batch(…)                                    pictures in a bucket, a page, a proxy, a stub
batch.proxy.at("PUT", "plan/PLAN", BEFORE, batch.kill())
batch.through(parallelism=2)                    plan, run every index, finish; restarts what may be restarted
audit(batch)                                        tests/jobs/evidence.py
"""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.jobs.pictures import picture
from tests.jobs.store_proxy import Action, Call, StoreProxy
from tests.jobs.stub import REVISION, Stub
from tests.nursery import Forked, Nursery
from tests.s3 import S3Server

BUCKET = "batches"
FINGERPRINT = "5eed5eed5eed"
PATIENCE_SECONDS = 120.0
RETRIED = frozenset({75, 143, -signal.SIGKILL})
"""Exit codes of a pod that the Job controller does not count: see the operator's podFailurePolicy."""
BACKOFF_LIMIT = 5

WORKERS = Nursery("tests.jobs.nursery", ["python", "-m", "sightline.jobs"])


Launch = Callable[[list[str], Path, Mapping[str, str], Path], "Forked | subprocess.Popen[bytes]"]
"""Starts a worker: its words, where its output goes, its environment, its folder."""


class JobFailed(AssertionError):
    """A Job of the batch failed for good: exit code, last words, log."""

    def __init__(self, verb: str, code: int, words: str, log: str) -> None:
        super().__init__(f"{verb} failed with {code}: {words}\n{log[-3000:]}")
        self.code, self.words = code, words


@dataclass
class Worker:
    """One process of a batch."""

    verb: str
    index: int | None
    process: "Forked | subprocess.Popen[bytes]"
    log: Path
    words: Path
    is_killed: bool = False

    def kill(self) -> None:
        """As the kernel, the node or an impatient person does: no last words."""
        self.is_killed = True
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGTERM)


@dataclass
class Batch:
    """A batch of pictures, its store and its target.

    pictures     key in the bucket → bytes; they lie there already
    input_prefix below which they lie
    uid          of this run; two batches of the same pictures differ in it
    """

    s3: S3Server
    proxy: StoreProxy
    stub: Stub
    folder: Path
    pictures: Mapping[str, bytes]
    input_prefix: str
    uid: str
    shard_size: int = 20
    chunk_size: int = 5
    max_in_flight: int = 8
    changes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """To the page."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    launch: Launch = WORKERS.start

    kills: int = 0
    codes: Counter[tuple[str, int]] = field(default_factory=Counter[tuple[str, int]])
    """Ends of processes: by verb and exit code, negative for a signal."""
    workers: list[Worker] = field(default_factory=list[Worker])
    started: int = 0

    @property
    def root(self) -> str:
        """Where everything of this batch lies in the bucket."""
        return f"out/{self.uid}/{FINGERPRINT}/"

    @property
    def shards(self) -> int:
        return -(-len(self.pictures) // self.shard_size)

    @cached_property
    def page(self) -> Path:
        """As the operator writes it (its render/v1/batch.py)."""
        place = {"bucket": BUCKET, "endpoint": self.proxy.url, "region": self.s3.region, "pathStyle": True}
        page = {
            "batch": {"name": self.uid, "namespace": "test", "uid": self.uid},
            "fingerprint": FINGERPRINT,
            "pipeline": {"name": "stub", "url": self.stub.url, "revision": REVISION, "timeoutSeconds": 30},
            "input": {"s3Prefix": place | {"prefix": self.input_prefix, "suffixes": [".png"], "maxItems": 10_000_000}},
            "output": {"s3": place | {"prefix": "out/"}, "merge": "Always"},
            "credentials": {},
            "options": {"enhance": "Auto"},
            "shardSize": self.shard_size,
            "chunkSize": self.chunk_size,
            "maxInFlight": self.max_in_flight,
            "maxAttempts": 3,
            "maxFailedItems": None,
        }
        path = self.folder / "batch.json"
        path.write_text(json.dumps(page | dict(self.changes)))
        return path

    # --- processes ---------------------------------------------------------------------------------------------------

    def start(self, verb: str, index: int | None = None) -> Worker:
        """A process of this batch."""
        self.started += 1
        stem = f"{verb}-{self.started:03}"
        log, words = self.folder / f"{stem}.log", self.folder / f"{stem}.words"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "S3_"))}
        environment = clean | self.s3.environment() | {"BATCH_FILE": str(self.page), "LAST_WORDS": str(words)}
        environment["AWS_ENDPOINT_URL_S3"] = self.proxy.url
        if index is not None:
            environment["JOB_COMPLETION_INDEX"] = str(index)
        process = self.launch([verb], log, environment | dict(self.environment), self.folder)
        worker = Worker(verb, index, process, log, words)
        self.workers.append(worker)
        return worker

    def ended(self) -> list[tuple[Worker, int]]:
        """Take out the processes that have ended, with their exit codes."""
        found = [(worker, worker.process.poll()) for worker in list(self.workers)]
        over = [(worker, code) for worker, code in found if code is not None]
        for worker, code in over:
            self.workers.remove(worker)
            self.codes[worker.verb, code] += 1
            self.kills += worker.is_killed
        return over

    def wait(self, worker: Worker, seconds: float = PATIENCE_SECONDS) -> int:
        """The exit code of a process."""
        until(lambda: worker.process.poll() is not None, seconds, f"{worker.verb} to end")
        code = worker.process.poll()
        assert code is not None
        if worker in self.workers:
            self.workers.remove(worker)
            self.codes[worker.verb, code] += 1
            self.kills += worker.is_killed
        return code

    def end_all(self) -> None:
        """Nothing of this batch runs any more."""
        for worker in list(self.workers):
            worker.kill()
            self.wait(worker)

    # --- Jobs --------------------------------------------------------------------------------------------------------

    def do(self, verb: str, seconds: float = PATIENCE_SECONDS) -> Worker:
        """A Job of one pod: plan or finish."""
        return self.job(verb, [None], seconds=seconds)[-1]

    def job(
        self,
        verb: str,
        indexes: list[None] | list[int],
        *,
        parallelism: int = 1,
        seconds: float = PATIENCE_SECONDS,
        each: Callable[[], None] | None = None,
    ) -> list[Worker]:
        """Bring all indexes to exit code 0, as the Job controller does. Returns the workers that succeeded.

        each  called all the time
        """
        waiting, done = list(indexes), list[Worker]()
        failures: Counter[int | None] = Counter()
        deadline = time.monotonic() + seconds
        while waiting or self.workers:
            while waiting and len(self.workers) < parallelism:
                self.start(verb, waiting.pop(0))
            if each is not None:
                each()
            for worker, code in self.ended():
                if code == 0:
                    done.append(worker)
                    continue
                failures[worker.index] += code not in RETRIED
                if code in (42, 43, 44) or failures[worker.index] > BACKOFF_LIMIT:
                    raise JobFailed(verb, code, words_of(worker), worker.log.read_text(errors="replace"))
                waiting.insert(0, worker.index)  # type: ignore[arg-type]
            assert time.monotonic() < deadline, f"{verb} took too long; waiting {waiting}, ended {self.codes}"
            time.sleep(0.01)
        return done

    def run_shards(self, *, parallelism: int = 2, each: Callable[[], None] | None = None, seconds: float = 120) -> None:
        self.job("run", list(range(self.shards)), parallelism=parallelism, each=each, seconds=seconds)

    def through(self, *, parallelism: int = 2, each: Callable[[], None] | None = None, seconds: float = 120) -> None:
        """The three Jobs one after the other."""
        self.do("plan", seconds)
        self.run_shards(parallelism=parallelism, each=each, seconds=seconds)
        self.do("finish", seconds)

    # --- faults ------------------------------------------------------------------------------------------------------

    def kill(self, *, drops: bool = False) -> Action:
        """An action for a hook: kill -9 whoever made the call. `drops`: the store never gets it."""

        def action(call: Call) -> bool:
            shard = int(call.key.rpartition("shard-")[2][:5]) if "shard-" in call.key else None
            for worker in list(self.workers):
                if worker.index == shard or worker.index is None or len(self.workers) == 1:
                    worker.kill()
            return drops

        return action

    def kill_one(self, rng: random.Random) -> Worker | None:
        """Kill -9 one of those that run."""
        alive = [worker for worker in self.workers if not worker.is_killed and worker.process.poll() is None]
        if not alive:
            return None
        worker = rng.choice(alive)
        worker.kill()
        return worker

    # --- looking behind the scenes -----------------------------------------------------------------------------------

    def listing(self, prefix: str = "") -> list[str]:
        """Below this batch's root, past the proxy."""
        pages = self.s3.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self.root + prefix)
        return [entry["Key"][len(self.root) :] for page in pages for entry in page.get("Contents", ())]

    def read(self, key: str) -> bytes:
        return self.s3.client.get_object(Bucket=BUCKET, Key=self.root + key)["Body"].read()

    def uri(self, key: str) -> str:
        return f"s3://{BUCKET}/{key}"


def words_of(worker: Worker) -> str:
    return worker.words.read_text(errors="replace") if worker.words.exists() else ""


def until(is_so: Callable[[], object], seconds: float = PATIENCE_SECONDS, what: str = "it") -> None:
    """Poll until something is so."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.005)


def album(s3: S3Server, prefix: str, count: int, faults: Mapping[int, str] | None = None) -> dict[str, bytes]:
    """Put pictures below a prefix of the bucket. `faults` of some, by number."""
    from concurrent.futures import ThreadPoolExecutor

    fault = faults or {}
    pictures = {f"{prefix}{number:06}.png": picture(number, fault.get(number, "")) for number in range(count)}
    s3.bucket(BUCKET)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda entry: s3.client.put_object(Bucket=BUCKET, Key=entry[0], Body=entry[1]), pictures.items()))
    return pictures
