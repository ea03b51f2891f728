"""How far a batch is: told from what lies in the store, in the operator's words; how fast, and until when."""

import asyncio
import math
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import MemoryStore

from sightline.jobs.finish import finish
from sightline.jobs.items import Counts
from sightline.jobs.objects import Objects
from sightline.jobs.progress import Meter, Watch, progress_of, waiting_of
from sightline.jobs.reports import Part, ShardReport
from sightline_operator import contract
from tests.jobs.written import FINGERPRINT, Written

ROOT_URL = "s3://pictures/out/uid/0123456789ab/"


async def test_there_is_no_progress_before_there_is_a_plan() -> None:
    batch = await Written.planned(5)
    await batch.objects.remove(batch.layout.plan)
    assert await progress_of(batch.objects, batch.layout) is None


async def test_finished_shards_count_by_what_they_hold_and_others_by_what_their_workers_said() -> None:
    batch = await Written.planned(40)
    await batch.write([0, 2])
    await batch.say(1, 7, at=1000)
    await batch.say(2, 3, at=900)  # of before it was finished
    progress = await progress_of(batch.objects, batch.layout)
    assert progress is not None
    assert (progress.total, progress.done, progress.counts.failed) == (40, 31, 2)
    assert (progress.shards, progress.shards_completed) == (4, 2)


async def test_the_operator_understands_what_is_said() -> None:
    batch = await Written.planned(40)
    await batch.write([0, 2])
    await batch.say(1, 7, at=1000, waiting="Throttled")
    progress = await progress_of(batch.objects, batch.layout)
    assert progress is not None
    said = orjson.loads(orjson.dumps(progress.to_json()))
    read = contract.Progress.read(said)
    assert read is not None
    assert (read.total, read.completed, read.failed, read.unenhanced) == (40, 31, 2, 3)
    assert (read.shards_completed, read.waiting, read.outputs) == (2, "Throttled", None)
    assert read.usage == {"promptTokens": 220, "completionTokens": progress.counts.completion_tokens}
    assert [dict(row) for row in read.failures] == [
        {"step": "decode", "code": "decode_failed", "count": 2, "sampleCustomId": "000003"}
    ]
    plan = contract.Plan.read(said["plan"])
    assert plan == contract.Plan(4, 40, FINGERPRINT, sum(100 + n for n in range(40)))


async def test_the_operator_understands_a_finished_batch() -> None:
    batch = await Written.whole(40)
    await finish(batch.page, batch.objects)
    progress = await progress_of(batch.objects, batch.layout, ROOT_URL)
    assert progress is not None
    read = contract.Progress.read(orjson.loads(orjson.dumps(progress.to_json())))
    assert read is not None
    assert (read.total, read.completed, read.shards_completed) == (40, 40, 4)
    assert read.outputs == {
        "manifest": ROOT_URL + "output/MANIFEST.json",
        "results": ROOT_URL + "output/results.jsonl",
        "errors": ROOT_URL + "output/errors.jsonl",
    }


async def test_a_report_that_cannot_be_read_says_nothing() -> None:
    batch = await Written.planned(40)
    await batch.say(0, 5, at=1000)
    await batch.objects.write(batch.layout.progress(1), b"{half")
    await batch.objects.write(batch.layout.progress(2), b'{"shard": 2}')
    await batch.objects.write(batch.layout.root + "progress/notes.txt", b"mine")
    progress = await progress_of(batch.objects, batch.layout)
    assert progress is not None
    assert progress.done == 5


class Counted(Objects):
    """A store that counts what is read of it."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.read_keys: list[str] = []

    async def fetch(self, key: str, *args: Any, **options: Any) -> Any:
        self.read_keys.append(key)
        return await super().fetch(key, *args, **options)


async def test_what_never_changes_is_read_once() -> None:
    objects = Counted(MemoryStore())
    batch = await Written.planned(60, objects=objects)
    await batch.write([0, 1])
    watch = Watch(objects, batch.layout)
    first = await watch.look()
    objects.read_keys.clear()
    assert await watch.look() == first
    assert objects.read_keys == [batch.layout.manifest]
    await batch.write([2])
    objects.read_keys.clear()
    more = await watch.look()
    assert objects.read_keys == [batch.layout.manifest, batch.layout.done(2)]
    assert more is not None
    assert more.done == 36


async def test_a_finished_batch_is_read_no_more() -> None:
    objects = Counted(MemoryStore())
    batch = await Written.whole(20, objects=objects)
    await finish(batch.page, objects)
    watch = Watch(objects, batch.layout)
    first = await watch.look()
    objects.read_keys.clear()
    assert await watch.look() is first
    assert objects.read_keys == []


async def test_two_that_look_at_once_count_no_shard_twice() -> None:
    batch = await Written.whole(40)
    watch = Watch(batch.objects, batch.layout)
    one, two = await asyncio.gather(watch.look(), watch.look())
    assert one == two
    assert one is not None
    assert one.done == 40


async def test_only_the_commonest_failures_are_told() -> None:
    batch = await Written.planned(12)
    failures = {("caption", f"code_{n:02}"): (n + 1, f"id-{n}") for n in range(30)}
    report = ShardReport(0, Counts(failed=465, failures=failures), 1000.0)
    await batch.objects.write(batch.layout.progress(0), orjson.dumps(report.to_json()))
    progress = await progress_of(batch.objects, batch.layout)
    assert progress is not None
    rows = progress.to_json()["failures"]
    assert (len(rows), rows[0]) == (16, {"step": "caption", "code": "code_29", "count": 30, "sampleCustomId": "id-29"})


def test_a_report_says_the_same_when_it_is_read_again() -> None:
    counts = Counts(5, 1, 1, 1234, 50, 7, {("fetch", "input_not_found"): (1, "a.jpg")})
    for report in (ShardReport(7, counts, 12.5, "Throttled"), ShardReport(7, counts, parts=(Part.of(b"x"),))):
        assert ShardReport.from_json(orjson.loads(orjson.dumps(report.to_json()))) == report


@pytest.mark.parametrize(
    ("said", "waiting"),
    [
        ([], ""),
        ([(1000, "")], ""),
        ([(1000, "Throttled")], "Throttled"),
        ([(1000, "Throttled"), (1000, "")], ""),
        ([(1000, "Throttled"), (995, "BackendUnavailable")], "BackendUnavailable"),
        ([(1000, "Throttled"), (900, "")], "Throttled"),
        ([(900, "Throttled"), (1000, "")], ""),
    ],
    ids=["nobody", "works", "throttled", "one works", "worst", "a dead one worked", "a dead one waited"],
)
def test_a_batch_waits_when_all_who_are_there_wait(said: list[tuple[float, Any]], waiting: str) -> None:
    assert waiting_of([ShardReport(n, Counts(), at, why) for n, (at, why) in enumerate(said)]) == waiting


# --- how fast --------------------------------------------------------------------------------------------------------


def measured(*counts: tuple[float, int]) -> Meter:
    meter = Meter()
    for seconds, done in counts:
        meter = meter.at(seconds, done)
    return meter


def test_a_steady_batch_has_its_rate_and_its_end() -> None:
    meter = measured(*((float(t), 10 * t) for t in range(0, 200, 5)))
    assert meter.rate == pytest.approx(10)
    assert meter.eta_seconds(10_000) == pytest.approx((10_000 - 1950) / 10)


@pytest.mark.parametrize("counts", [[], [(5.0, 100)]], ids=["never counted", "counted once"])
def test_from_less_than_two_counts_there_is_no_rate(counts: list[tuple[float, int]]) -> None:
    meter = measured(*counts)
    assert meter.rate is None
    assert meter.eta_seconds(1000) is None


def test_what_was_done_before_the_first_count_makes_nothing_faster() -> None:
    assert measured((0, 500_000), (100, 500_100)).rate == pytest.approx(1)


def test_recent_minutes_weigh_more() -> None:
    slow_then_fast = measured(
        *((t, t) for t in range(0, 600, 10)), *((600 + t, 600 + 10 * t) for t in range(0, 600, 10))
    )
    assert slow_then_fast.rate is not None
    assert 7 < slow_then_fast.rate < 10


def test_how_often_it_is_counted_changes_little() -> None:
    often, rarely = measured(*((t, 3 * t) for t in range(0, 400))), measured(*((t, 3 * t) for t in range(0, 400, 57)))
    assert often.rate == pytest.approx(rarely.rate)


def test_there_is_no_end_in_sight_until_two_minutes_or_one_per_cent() -> None:
    assert measured((0, 0), (10, 9)).eta_seconds(1000) is None
    assert measured((0, 0), (10, 10)).eta_seconds(1000) == pytest.approx(990)
    assert measured((0, 0), (120, 1)).eta_seconds(1000) == pytest.approx(999 * 120)


def test_a_batch_that_stands_still_for_ten_minutes_has_no_rate_and_no_end() -> None:
    meter = measured((0, 0), (60, 600))
    assert meter.at(660, 600).rate is not None
    stalled = meter.at(661, 600)
    assert (stalled.is_stalled, stalled.rate, stalled.eta_seconds(1000)) == (True, None, None)
    assert stalled.at(670, 601).rate is not None


def test_a_count_that_goes_back_and_comes_again_is_counted_once() -> None:
    """A worker was killed with chunks open: what it had said of them is done again."""
    meter = measured((0, 0), (10, 100), (20, 60), (30, 100), (40, 110))
    assert meter.done == 110
    assert meter.rate is not None
    assert meter.rate < 110 / 40 * 1.1


def test_a_finished_batch_ends_now() -> None:
    assert measured((0, 0), (10, 50)).eta_seconds(50) == 0


@given(st.lists(st.tuples(st.floats(0.001, 1000), st.integers(0, 10_000)), min_size=1, max_size=30))
def test_the_rate_is_between_the_slowest_and_the_fastest(steps: list[tuple[float, int]]) -> None:
    meter, seconds, done, rates = Meter().at(0, 0), 0.0, 0, list[float]()
    for passed, more in steps:
        before, seconds, done = seconds, seconds + passed, done + more
        rates.append(more / (seconds - before))
        meter = meter.at(seconds, done)
    if meter.rate is not None:
        assert min(rates) * (1 - 1e-6) - 1e-9 <= meter.rate <= max(rates) * (1 + 1e-6) + 1e-9
        assert not math.isnan(meter.rate)
