"""The gateway tells how far a batch is: counts only, without a key, of its own bucket, from a real S3."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest
from obstore.store import MemoryStore
from prometheus_client import REGISTRY

from sightline.errors import BadRequest, Unavailable
from sightline.jobs.finish import finish
from sightline.jobs.objects import Objects, StoreUnavailable
from sightline.jobs.page import Location
from sightline.jobs.stores import open_location
from sightline.server.model import PipelineModel
from sightline.server.serve import build_app
from sightline.services import batch_progress
from sightline.services.batch_progress import Watches
from sightline.settings import PipelineSettings
from sightline_operator import contract
from tests.jobs.written import FINGERPRINT, UID, Written
from tests.s3 import S3Server, running_s3

OUTPUT = "s3://pictures/out/"


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("pictures")
        yield server


@pytest.fixture(autouse=True)
def keys(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)


def objects_of(s3: S3Server, prefix: str = "out/") -> Objects:
    place = Location(f"s3://pictures/{prefix}", endpoint=s3.endpoint_url, region=s3.region, path_style=True)
    return open_location(place)


def settings_of(s3: S3Server, **changes: Any) -> PipelineSettings:
    told = {"s3_buckets": ("pictures",), "s3_endpoint_url": s3.endpoint_url, "s3_path_style": True, "auth": "off"}
    return PipelineSettings(_env_file=None, **{"aws_region": s3.region, **told, **changes})  # type: ignore[call-arg]


@asynccontextmanager
async def gateway(settings: PipelineSettings) -> AsyncIterator[httpx.AsyncClient]:
    model = PipelineModel(settings)
    app = build_app({"pipeline": model}, settings)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(model.service.close)
        yield await stack.enter_async_context(
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway")
        )


async def asked(client: httpx.AsyncClient, uid: str = UID, **changes: str) -> httpx.Response:
    query = {"fingerprint": FINGERPRINT, "output": OUTPUT} | changes
    return await client.get(f"/internal/batches/{uid}/progress", params=query)


async def test_a_batch_from_its_plan_to_its_end(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_progress, "FRESH_SECONDS", 0.0)
    async with gateway(settings_of(s3)) as client:
        objects = objects_of(s3, "whole/")
        output = "s3://pictures/whole/"
        assert (await asked(client, output=output)).status_code == 404
        batch = await Written.planned(40, objects=objects)
        planned = (await asked(client, output=output)).json()
        assert contract.Plan.read(planned["plan"]) == contract.Plan(4, 40, FINGERPRINT, batch.plan.size_bytes)
        assert (planned["done"], planned["total"]) == (0, 40)
        await batch.write([0, 2])
        await batch.say(1, 7, at=1000, waiting="BackendUnavailable")
        running = contract.Progress.read((await asked(client, output=output)).json())
        assert running is not None
        assert (running.completed, running.failed, running.waiting) == (31, 2, "BackendUnavailable")
        await batch.write([1, 3])
        await finish(batch.page, objects)
        ended = contract.Progress.read((await asked(client, output=output)).json())
        assert ended is not None
        assert (ended.completed, ended.shards_completed) == (40, 4)
        assert ended.outputs is not None
        key = ended.outputs["results"].removeprefix("s3://pictures/")
        assert s3.client.head_object(Bucket="pictures", Key=key)["ContentLength"] > 0


async def test_no_id_of_an_item_is_told(s3: S3Server) -> None:
    async with gateway(settings_of(s3)) as client:
        await Written.whole(20, objects=objects_of(s3, "quiet/"))
        answer = await asked(client, output="s3://pictures/quiet/")
        assert answer.json()["failures"] == [{"step": "decode", "code": "decode_failed", "count": 2}]
        assert "000003" not in answer.text


async def test_it_answers_without_a_key_and_all_else_does_not(s3: S3Server) -> None:
    async with gateway(settings_of(s3, auth="api-key", api_keys="secret")) as client:
        await Written.whole(5, objects=objects_of(s3, "open/"))
        assert (await asked(client, output="s3://pictures/open/")).status_code == 200
        assert (await client.get(f"/internal/batches/{UID}")).status_code == 403
        assert (await client.get(f"/internal/batches/{UID}/x/progress")).status_code == 403


@pytest.mark.parametrize(
    ("uid", "changes", "code"),
    [
        ("photos", {}, "batch_invalid"),
        (UID.upper(), {}, "batch_invalid"),
        (UID, {"fingerprint": "0123456789aB"}, "batch_invalid"),
        (UID, {"fingerprint": "0123"}, "batch_invalid"),
        (UID, {"output": "file:///etc/"}, "batch_invalid"),
        (UID, {"output": "s3://"}, "batch_invalid"),
        (UID, {"output": "s3://pictures/\n"}, "batch_invalid"),
        (UID, {"output": "s3://others/out/"}, "s3_bucket_not_allowed"),
    ],
)
async def test_what_names_no_batch_of_ours_is_refused(
    uid: str, changes: dict[str, str], code: str, s3: S3Server
) -> None:
    told = {"fingerprint": FINGERPRINT, "output": OUTPUT} | changes
    with pytest.raises(BadRequest) as caught:
        await Watches(settings_of(s3)).progress(uid, **told)
    assert caught.value.code == code


async def test_a_gateway_that_may_read_any_bucket_has_none_of_its_own(s3: S3Server) -> None:
    with pytest.raises(BadRequest) as caught:
        await Watches(settings_of(s3, s3_buckets=("*", "pic*"))).progress(UID, FINGERPRINT, OUTPUT)
    assert caught.value.code == "s3_bucket_not_allowed"


async def test_what_is_wrong_with_a_request_is_its_callers(s3: S3Server) -> None:
    async with gateway(settings_of(s3)) as client:
        missing = await client.get(f"/internal/batches/{UID}/progress")
        strange = await asked(client, "photos")
        assert (missing.status_code, missing.json()["code"]) == (422, "invalid_parameter")
        assert (strange.status_code, strange.json()["code"]) == (400, "batch_invalid")


async def test_a_bucket_that_is_gone_is_503_and_the_cause_stays_in_the_log(
    s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    async with gateway(settings_of(s3, s3_buckets=("nobodys",))) as client:
        answer = await asked(client, output="s3://nobodys/out/")
        assert (answer.status_code, answer.json()["code"]) == (503, "storage_unavailable")
        assert answer.json()["detail"] == "The batch's store cannot be read."
        assert "there is no such bucket" in caplog.text


# --- how often, and what is kept -------------------------------------------------------------------------------------


class Shelf:
    """A store whose reading may be held up or fail, and a clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> None:
        self.now = 1000.0
        self.reads = 0
        self.fault: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()
        shelf = self

        class Store(Objects):
            async def read_bytes(self, key: str) -> bytes | None:
                if key.endswith("PLAN.json"):
                    shelf.reads += 1
                await shelf.open.wait()
                if shelf.fault is not None:
                    raise shelf.fault
                return await super().read_bytes(key)

        self.objects = Store(MemoryStore())
        monkeypatch.setattr(batch_progress, "open_location", lambda *_, **__: self.objects)
        self.watches = Watches(settings_of(s3), clock=lambda: self.now)

    async def ask(self, uid: str = UID) -> Any:
        return await self.watches.progress(uid, FINGERPRINT, OUTPUT)


@pytest.fixture
async def shelf(monkeypatch: pytest.MonkeyPatch, s3: S3Server) -> Shelf:
    return Shelf(monkeypatch, s3)


async def test_the_store_is_read_at_most_every_ten_seconds_whoever_asks(shelf: Shelf) -> None:
    batch = await Written.planned(40, objects=shelf.objects)
    first = await asyncio.gather(*(shelf.ask() for _ in range(20)))
    assert {progress.done for progress in first} == {0}
    await batch.write([0])
    shelf.now += 9.9
    assert (await shelf.ask()).done == 0
    shelf.now += 0.2
    assert (await shelf.ask()).done == 12


async def test_a_batch_that_is_not_there_costs_the_store_as_little(shelf: Shelf) -> None:
    assert [await shelf.ask() for _ in range(20)] == [None] * 20
    assert shelf.reads == 1


async def test_while_the_store_is_slow_what_was_counted_last_is_told(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_progress, "PATIENCE_SECONDS", 0.01)
    batch = await Written.planned(40, objects=shelf.objects)
    shelf.open.clear()
    with pytest.raises(Unavailable) as caught:
        await shelf.ask()
    assert (caught.value.code, caught.value.retry_after) == ("batch_counting", 5)
    shelf.open.set()
    monkeypatch.setattr(batch_progress, "PATIENCE_SECONDS", 10)
    assert (await shelf.ask()).done == 0
    await batch.write([0])
    monkeypatch.setattr(batch_progress, "PATIENCE_SECONDS", 0.01)
    shelf.now += 60
    shelf.open.clear()
    assert (await shelf.ask()).done == 0
    shelf.open.set()
    monkeypatch.setattr(batch_progress, "PATIENCE_SECONDS", 10)
    assert (await shelf.ask()).done == 12


async def test_a_store_that_is_away_takes_back_nothing_and_is_asked_again(shelf: Shelf) -> None:
    batch = await Written.planned(40, objects=shelf.objects)
    await batch.write([0])
    assert (await shelf.ask()).done == 12
    shelf.fault = StoreUnavailable("away")
    shelf.now += 60
    assert (await shelf.ask()).done == 12
    shelf.fault = None
    await batch.write([1])
    shelf.now += 60
    assert (await shelf.ask()).done == 24


async def test_what_is_watched_is_bounded_in_memory_and_in_metrics(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_progress, "WATCHED", 2)
    batch = await Written.planned(40, objects=shelf.objects)
    await batch.write([0])
    await shelf.ask()
    value = REGISTRY.get_sample_value

    def of(state: str) -> float | None:
        return value("sightline_batch_watched_items", {"batch": UID, "state": state})

    assert (of("succeeded"), of("failed"), of("remaining")) == (11, 1, 28)
    for number in range(2):
        await shelf.ask(f"00000000-0000-4000-8000-00000000000{number}")
    assert of("succeeded") is None
