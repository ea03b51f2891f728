"""One shard done: chunks once each, two open at most; stopped, resumed, with others beside it. In memory, one loop."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
import pytest
from obstore.store import MemoryStore

from sightline.jobs import shard as shards
from sightline.jobs.finish import PartCorrupt
from sightline.jobs.items import Counts, Fault, Item, Line
from sightline.jobs.objects import Objects, StoreUnavailable
from sightline.jobs.page import Input, Location, Outputs, Page, Target
from sightline.jobs.plan import Plan, ShardCorrupt, layout_of, make_plan
from sightline.jobs.reports import Part, ShardReport
from sightline.jobs.shard import Stop, Stopped, TooManyFailures, run_shard

PLACE = Location("memory://")


def page(**changes: Any) -> Page:
    said = {"shard_size": 100, "chunk_size": 5, "max_in_flight": 8} | changes
    return Page("b", "uid", "0123456789ab", Input("prefix", PLACE), Outputs(PLACE), Target("http://x"), **said)


class Store(Objects):
    """A store in memory that can be away, and tells what is written."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())
        self.created: list[str] = []
        self.away_for = 0
        self.before_create: Callable[[str], Any] | None = None

    async def create(self, key: str, data: bytes) -> bool:
        if self.before_create is not None and (waits := self.before_create(key)) is not None:
            await waits
        if self.away_for and "parts/" in key:
            self.away_for -= 1
            raise StoreUnavailable("the store is away")
        is_new = await super().create(key, data)
        if is_new:
            self.created.append(key.rsplit("/", 1)[1])
        return is_new


class Work:
    """Does items; counts how often each, and how many at a time. `held` items wait until they are let go."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.open = self.most_open = 0
        self.held: dict[str, asyncio.Event] = {}
        self.faults: set[str] = set()
        self.error: Exception | None = None

    def hold(self, *names: str) -> None:
        self.held |= {name: asyncio.Event() for name in names}

    async def __call__(self, item: Item) -> Line:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            if item.custom_id in self.held:
                await self.held[item.custom_id].wait()
            await asyncio.sleep(0)
            if self.error is not None:
                raise self.error
        finally:
            self.open -= 1
        self.done.append(item.custom_id)
        if item.custom_id in self.faults:
            return Line(item, fault=Fault("caption", "caption_rejected", "no"), size=item.size or 0)
        usage = {"prompt_tokens": 3, "completion_tokens": 2}
        result = {"caption": f"of {item.custom_id}", "usage": usage}
        return Line(item, result, size=item.size or 0, prompt_tokens=3, completion_tokens=2)


async def planned(store: Objects, count: int, said: Page) -> Plan:
    async def items() -> AsyncGenerator[Item]:
        for number in range(count):
            yield Item(f"i{number:03}", f"s3://b/{number}.png", size=10)

    return await make_plan(said, store, items())


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def work() -> Work:
    return Work()


async def run(store: Objects, plan: Plan, work: Any, said: Page | None = None, **options: Any) -> Counts:
    return await run_shard(said or page(), plan, 0, store, work, **{"width": 8} | options)


async def rows(store: Objects, chunk: int) -> list[dict[str, Any]]:
    data = await store.read_bytes(layout_of(page()).chunk(0, chunk))
    return [orjson.loads(line) for line in (data or b"").splitlines()]


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.001)


async def test_every_item_has_its_line_in_its_chunk_and_the_shard_says_so(store: Store, work: Work) -> None:
    plan = await planned(store, 12, page())
    work.faults = {"i007"}
    told: list[str] = []
    counts = await run(store, plan, work, on_line=lambda line: told.append(line.item.custom_id))
    assert (counts.succeeded, counts.failed, counts.size_bytes) == (11, 1, 120)
    assert (counts.prompt_tokens, counts.completion_tokens) == (33, 22)
    assert counts.failures == {("caption", "caption_rejected"): (1, "i007")}
    found = [row["custom_id"] for chunk in range(3) for row in await rows(store, chunk)]
    assert found == [f"i{number:03}" for number in range(12)]
    assert sorted(told) == found
    layout = layout_of(page())
    report = ShardReport.from_json(await store.read(layout.done(0)) or {})
    assert report.counts == counts
    parts = [Part.of(await store.read_bytes(layout.chunk(0, chunk)) or b"") for chunk in range(3)]
    assert list(report.parts) == parts


async def test_a_shard_that_is_done_asks_nothing(store: Store, work: Work) -> None:
    plan = await planned(store, 12, page())
    first = await run(store, plan, work)
    again = Work()
    assert await run(store, plan, again) == first
    assert again.done == []


async def test_only_missing_chunks_are_done_and_all_are_counted(store: Store, work: Work) -> None:
    plan = await planned(store, 20, page())
    whole = await run(store, plan, work)
    layout = layout_of(page())
    before = await store.read_bytes(layout.done(0))
    await store.remove(layout.done(0))
    await store.remove(layout.chunk(0, 2))
    again = Work()
    assert await run(store, plan, again) == whole
    assert sorted(again.done) == [f"i{number:03}" for number in range(10, 15)]
    assert await store.read_bytes(layout.done(0)) == before, "the same whoever counts"


async def test_at_most_two_chunks_are_open_and_width_items(store: Store, work: Work) -> None:
    plan = await planned(store, 40, page())
    work.hold("i000")
    task = asyncio.create_task(run(store, plan, work, width=4))
    await until(lambda: len(work.done) == 39)  # chunk 0 stays open, the others pass by it one at a time
    assert work.most_open == 4
    assert "chunk-0000.jsonl" not in store.created
    work.held["i000"].set()
    assert (await task).succeeded == 40


async def test_a_chunk_is_open_until_it_lies_in_the_store(store: Store, work: Work) -> None:
    plan = await planned(store, 40, page())
    gate = asyncio.Event()
    store.before_create = lambda key: gate.wait() if "parts/" in key else None
    task = asyncio.create_task(run(store, plan, work))
    await until(lambda: len(work.done) == 10)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(work.done) == 10, "two chunks are done and not stored: a third would be rework"
    gate.set()
    assert (await task).succeeded == 40


async def test_of_two_workers_on_a_shard_one_does_a_chunk_and_both_count_alike(store: Store) -> None:
    plan = await planned(store, 60, page())
    works = [Work(), Work()]

    def by(name: str, work: Work) -> Callable[[Item], Any]:
        async def do(item: Item) -> Line:
            line = await work(item)
            return Line(item, {"caption": f"{name} {item.custom_id}"}, size=line.size)

        return do

    one, two = await asyncio.gather(*(run(store, plan, by(name, work)) for name, work in zip("ab", works, strict=True)))
    assert one == two
    assert one.succeeded == 60
    chunks = [name for name in store.created if name.startswith("chunk")]
    assert sorted(chunks) == [f"chunk-{number:04}.jsonl" for number in range(12)], "each created once"
    for chunk in range(12):
        assert len({row["caption"][0] for row in await rows(store, chunk)}) == 1, "a chunk is of one worker"


async def test_what_somebody_else_has_stored_is_not_done_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PROGRESS_SECONDS", 0.01)
    plan = await planned(store, 60, page())
    late = Work()
    late.hold(*(f"i{number:03}" for number in range(10)))
    task = asyncio.create_task(run(store, plan, late, width=4))
    await until(lambda: late.open == 4)
    first = Work()
    await run(store, plan, first)
    key = layout_of(page()).progress(0)
    async with asyncio.timeout(10):
        while (await store.read(key) or {}).get("succeeded") != 50:  # all but its own two open chunks
            await asyncio.sleep(0.005)
    for event in late.held.values():
        event.set()
    assert (await task).succeeded == 60
    assert sorted(late.done) == [f"i{number:03}" for number in range(10)], "its open chunks, and nothing else"


async def test_finished_chunks_wait_for_a_store_that_is_away(
    store: Store, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "STORE_PAUSE_SECONDS", 0.001)
    plan = await planned(store, 20, page())
    store.away_for = 5
    assert (await run(store, plan, work)).succeeded == 20
    assert len(work.done) == 20, "nothing is asked twice"


async def test_a_store_that_stays_away_ends_the_shard(store: Store, work: Work) -> None:
    plan = await planned(store, 20, page())
    store.away_for = 1_000_000
    with pytest.raises(StoreUnavailable):
        await run(store, plan, work, store_patience_seconds=0)


async def test_what_is_no_items_fault_ends_the_shard_and_leaves_whole_chunks(store: Store, work: Work) -> None:
    plan = await planned(store, 20, page())
    work.hold("i012")
    task = asyncio.create_task(run(store, plan, work))
    await until(lambda: "chunk-0001.jsonl" in store.created)
    work.error = RuntimeError("the target is another")
    work.held["i012"].set()
    with pytest.raises(RuntimeError, match="another"):
        await task
    assert work.open == 0
    work.error, work.held = None, {}
    counts = await run(store, plan, work)
    assert counts.succeeded == 20


class TestStopped:
    async def test_after_chunks_finishes_those_that_are_open(self, store: Store, work: Work) -> None:
        plan, stop = await planned(store, 40, page()), Stop()
        work.hold("i000", "i009")
        task = asyncio.create_task(run(store, plan, work, stop=stop, width=3))
        await until(lambda: len(work.done) >= 5)
        stop.after_chunks()
        for event in work.held.values():
            event.set()
        with pytest.raises(Stopped) as stopped:
            await task
        assert stopped.value.counts.done == 10
        assert sorted(work.done) == [f"i{number:03}" for number in range(10)]
        assert (await run(store, plan, work)).succeeded == 40
        assert len(work.done) == 40, "nothing twice"

    async def test_now_writes_chunks_whose_items_are_all_begun(self, store: Store, work: Work) -> None:
        plan, stop = await planned(store, 40, page()), Stop()
        work.hold("i004", "i005")
        task = asyncio.create_task(run(store, plan, work, stop=stop, width=2))
        await until(lambda: len(work.done) == 4 and work.open == 2)
        stop.now(grace_seconds=10)
        work.held["i004"].set()
        with pytest.raises(Stopped) as stopped:
            await task
        assert store.created[-1] == "chunk-0000.jsonl"
        assert stopped.value.counts.done == 5
        assert work.open == 0
        assert await store.read(layout_of(page()).done(0)) is None

    async def test_now_without_grace_waits_for_nothing(self, store: Store, work: Work) -> None:
        plan, stop = await planned(store, 40, page()), Stop()
        work.hold("i004", "i005")
        task = asyncio.create_task(run(store, plan, work, stop=stop, width=2))
        await until(lambda: len(work.done) == 4 and work.open == 2)
        stop.now(grace_seconds=1000)
        stop.now()
        with pytest.raises(Stopped):
            await asyncio.wait_for(task, 10)
        assert work.open == 0
        assert [name for name in store.created if name.startswith("chunk")] == []

    async def test_a_shard_stopped_when_all_is_stored_is_done(self, store: Store, work: Work) -> None:
        plan, stop = await planned(store, 5, page()), Stop()

        def last(line: Line) -> None:
            if line.item.custom_id == "i004":
                stop.after_chunks()

        assert (await run(store, plan, work, stop=stop, on_line=last, width=1)).succeeded == 5


class TestReports:
    async def test_how_far_it_is_is_told_every_few_seconds(
        self, store: Store, work: Work, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(shards, "PROGRESS_SECONDS", 0.005)
        plan = await planned(store, 20, page())
        work.hold("i007")
        task = asyncio.create_task(run(store, plan, work, waiting=lambda: "Throttled"))
        key = layout_of(page()).progress(0)
        async with asyncio.timeout(10):
            while True:
                said = await store.read(key)
                if said is not None and ShardReport.from_json(said).counts.succeeded == 19:
                    break
                await asyncio.sleep(0.005)
        report = ShardReport.from_json(said)
        assert (report.shard, report.waiting, report.parts) == (0, "Throttled", ())
        assert report.at > 0
        work.held["i007"].set()
        await task

    async def test_a_stopped_shard_says_last_what_is_stored(self, store: Store, work: Work) -> None:
        plan, stop = await planned(store, 20, page()), Stop()
        work.hold("i007")
        task = asyncio.create_task(run(store, plan, work, stop=stop))
        await until(lambda: "chunk-0003.jsonl" in store.created)
        stop.now()
        with pytest.raises(Stopped):
            await task
        said = ShardReport.from_json(await store.read(layout_of(page()).progress(0)) or {})
        assert said.counts.done == 15


class TestBroken:
    async def test_a_chunk_that_is_none_of_this_shard(self, store: Store, work: Work) -> None:
        plan = await planned(store, 20, page())
        await store.write(layout_of(page()).chunk(0, 1), b'{"custom_id":"somebody else"}\n' * 5)
        with pytest.raises(PartCorrupt):
            await run(store, plan, work)

    async def test_items_that_are_not_those_that_were_planned(self, store: Store, work: Work) -> None:
        plan = await planned(store, 20, page())
        await store.write(layout_of(page()).items(plan.attempt, 0), b"{}\n")
        with pytest.raises(ShardCorrupt):
            await run(store, plan, work)

    @pytest.mark.parametrize("limit", [{"max_failed_items": 2}, {"max_failed_percent": 10}])
    async def test_more_failures_than_the_batch_may_have(self, store: Store, work: Work, limit: dict[str, int]) -> None:
        plan = await planned(store, 20, page())
        work.faults = {"i001", "i002", "i013", "i019"}
        with pytest.raises(TooManyFailures):
            await run(store, plan, work, page(**limit), width=1)
        assert "i019" not in work.done
