"""`make chaos`: exactly once, large. Thousands of items, every fault at once, minutes instead of seconds.

$CHAOS_ITEMS, $CHAOS_SECONDS_DARK and $CHAOS_SEED say how large, how long the store is away, and which kills.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import pytest

from tests.jobs.conftest import NewBatch, maker
from tests.jobs.evidence import OPEN_CHUNKS, Outcome, audit, rework
from tests.jobs.harness import Batch, album, until
from tests.jobs.store_proxy import AFTER
from tests.s3 import S3Server

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(3600)]

ITEMS = int(os.environ.get("CHAOS_ITEMS", "3000"))
DARK_SECONDS = float(os.environ.get("CHAOS_SECONDS_DARK", "30"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
LONG = 3000.0
KINDS = ("422", "text", "flaky", "unenhanced")
SIZES = {"shard_size": 250, "chunk_size": 25, "max_in_flight": 16}
WORKERS = 4


@pytest.fixture(scope="module")
def pictures(s3_server: S3Server) -> Mapping[str, bytes]:
    """One of a hundred has something wrong with it."""
    faults = {number: KINDS[number // 100 % len(KINDS)] for number in range(37, ITEMS, 100)}
    return album(s3_server, "many/", ITEMS, faults)


@pytest.fixture(scope="module")
def undisturbed(
    s3_server: S3Server, pictures: Mapping[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    with ExitStack() as stack:
        make = maker(stack, s3_server, pictures, tmp_path_factory.mktemp("undisturbed"), "many/")
        batch = make(**SIZES)
        batch.through(parallelism=WORKERS, seconds=LONG)
        assert rework(batch) == 0
        return audit(batch)


@pytest.fixture
def new_batch(s3_server: S3Server, pictures: Mapping[str, bytes], tmp_path) -> Iterator[NewBatch]:
    with ExitStack() as stack:
        yield maker(stack, s3_server, pictures, tmp_path, "many/")


@pytest.fixture
def many(new_batch: NewBatch) -> Batch:
    return new_batch(**SIZES)


def killer(batch: Batch, rng: random.Random, most: int, pause: tuple[float, float]) -> Callable[[], None]:
    """Kills somebody, `most` times in all, some seconds after the last."""
    due, kills = time.monotonic() + rng.uniform(*pause), 0

    def kill_when_due() -> None:
        nonlocal due, kills
        if kills < most and time.monotonic() >= due and batch.kill_one(rng) is not None:
            kills += 1
            due = time.monotonic() + rng.uniform(*pause)

    return kill_when_due


@pytest.mark.parametrize("seed", range(SEED, SEED + 3))
def test_thirty_kills_at_random(many: Batch, undisturbed: Outcome, seed: int) -> None:
    rng = random.Random(seed)
    many.stub.delay_seconds = 0.02
    many.job("plan", [None], each=killer(many, rng, 3, (0.05, 0.5)), seconds=LONG)
    many.run_shards(parallelism=WORKERS, each=killer(many, rng, 30, (0.1, 1.5)), seconds=LONG)
    many.job("finish", [None], each=killer(many, rng, 3, (0.05, 0.5)), seconds=LONG)
    assert many.codes["run", -9] >= 3
    assert audit(many) == undisturbed
    print(f"{many.kills} kills, {rework(many)} captions twice of at most {many.kills * OPEN_CHUNKS * many.chunk_size}")


def test_a_store_with_errors_conflicts_and_a_blackout_and_kills(many: Batch, undisturbed: Outcome) -> None:
    """5 % errors and 20 % conflicts all the time, one blackout, workers killed and the gateway throttling."""
    proxy, rng = many.proxy, random.Random(SEED)
    proxy.error_share, proxy.conflict_share, many.stub.throttle_share = 0.05, 0.2, 0.05
    back = threading.Timer(DARK_SECONDS, lambda: setattr(proxy, "is_black", False))

    def go_dark(_: object) -> None:
        proxy.is_black = True
        back.start()

    proxy.at("PUT", "/parts/", AFTER, go_dark, after_calls=len(many.pictures) // many.chunk_size // 3)
    many.do("plan", LONG)
    many.run_shards(parallelism=WORKERS, each=killer(many, rng, 10, (0.5, 3)), seconds=LONG)
    back.join()
    many.do("finish", LONG)
    assert proxy.faults["black"] > 0
    assert audit(many) == undisturbed
    print(f"{dict(proxy.faults)}, {many.kills} kills, {rework(many)} captions twice")


def test_two_workers_on_every_shard_and_kills(many: Batch, undisturbed: Outcome) -> None:
    """Every shard has a zombie: whoever is second gives way, and nothing is there twice."""
    kill = killer(many, random.Random(SEED), 20, (0.2, 1.5))
    many.stub.delay_seconds = 0.02
    many.do("plan", LONG)
    twice = [shard for shard in range(many.shards) for _ in range(2)]
    many.job("run", twice, parallelism=WORKERS, each=kill, seconds=LONG)
    many.do("finish", LONG)
    assert audit(many, writers=2) == undisturbed


def test_evicted_again_and_again(many: Batch, undisturbed: Outcome) -> None:
    """SIGTERM to all, five times, and each time another parallelism. Never exit code 0 for a shard that is not done."""
    many.stub.delay_seconds = 0.02
    many.do("plan", LONG)
    rng, left = random.Random(SEED), list(range(many.shards))
    for parallelism in (4, 1, 3, 2, 4):
        begun = [many.start("run", shard) for shard in left[:parallelism]]
        enough = many.stub.given + rng.randrange(20, 150)
        until(lambda enough=enough: many.stub.given >= enough or not _running(many), LONG, "some captions")
        for worker in begun:
            worker.stop()
        codes = {worker.index: many.wait(worker, LONG) for worker in begun}
        assert set(codes.values()) <= {0, 143}
        done = {int(key.split("-")[1].split(".")[0]) for key in many.listing("done/")}
        assert {shard for shard, code in codes.items() if code == 0} <= done
        left = [shard for shard in left if shard not in done]
    many.job("run", left, parallelism=2, seconds=LONG)
    many.do("finish", LONG)
    assert audit(many) == undisturbed


def _running(batch: Batch) -> bool:
    return any(worker.process.poll() is None for worker in batch.workers)


def test_the_gateway_comes_and_goes(many: Batch, undisturbed: Outcome) -> None:
    """Away for ten seconds, three times, dead and unready in turn: no item is burnt."""
    many.stub.delay_seconds = 0.02
    many.do("plan", LONG)
    marks = [len(many.pictures) * part // 4 for part in (1, 2, 3)]
    outages, back = 0, 0.0

    def come_and_go() -> None:
        nonlocal outages, back
        if back:
            if time.monotonic() < back:
                return
            back = 0.0
            if many.stub.is_unavailable:
                many.stub.is_unavailable = False
            else:
                many.stub.come_up()
        elif outages < len(marks) and many.stub.given >= marks[outages]:
            outages += 1
            back = time.monotonic() + 10
            if outages % 2:
                many.stub.go_down()
            else:
                many.stub.is_unavailable = True

    many.run_shards(parallelism=WORKERS, each=come_and_go, seconds=LONG)
    many.do("finish", LONG)
    assert outages == len(marks)
    assert audit(many, writers=2) == undisturbed
    assert rework(many) <= outages * WORKERS * many.max_in_flight
