"""What the gateway tells the operator of its steps and its bucket: `GET /internal/state`, on a real S3."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from sightline.server.model import PipelineModel
from sightline.server.serve import build_app
from sightline.services import pipeline_state
from sightline.services.pipeline_state import Storages
from sightline.settings import PipelineSettings
from tests.s3 import S3Server, running_s3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("pictures")
        yield server


@pytest.fixture(autouse=True)
def keys(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)


def settings_of(s3: S3Server, **changes: Any) -> PipelineSettings:
    told = {"s3_buckets": ("pictures",), "s3_endpoint_url": s3.endpoint_url, "auth": "off", "aws_region": s3.region}
    told |= {"enhance_url": "http://127.0.0.1:9", "job_store": "memory://", "s3_connect_seconds": 1.0}
    return PipelineSettings(_env_file=None, **{**told, **changes})  # type: ignore[call-arg]


@asynccontextmanager
async def gateway(settings: PipelineSettings) -> AsyncIterator[tuple[PipelineModel, httpx.AsyncClient]]:
    model = PipelineModel(settings)
    app = build_app({"pipeline": model}, settings)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(model.service.close)
        transport = httpx.ASGITransport(app)
        yield model, await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway"))


async def told(client: httpx.AsyncClient) -> dict[str, Any]:
    """What it says when the store has been asked, or has kept it waiting for long."""
    async with asyncio.timeout(60):
        while True:
            answer = await client.get("/internal/state")
            assert answer.status_code == 200, answer.text
            if answer.json()["storage"] != "unknown":
                return answer.json()
            await asyncio.sleep(0.05)


async def test_it_tells_without_a_key_whether_steps_are_called_and_the_bucket_answers(s3: S3Server) -> None:
    async with gateway(settings_of(s3, auth="api-key", api_keys="secret")) as (model, client):
        assert await told(client) == {"steps": {"caption": "closed", "enhance": "closed"}, "storage": "ok"}
        breaker = model.service.breakers["enhance"]
        for _ in range(5):
            permit = breaker.admit()
            assert permit is not None
            breaker.record(permit, "failed")
        assert (await told(client))["steps"] == {"caption": "closed", "enhance": "open"}
        assert (await client.get("/internal")).status_code == 403


@pytest.mark.parametrize(
    ("changes", "storage"),
    [
        ({"s3_buckets": ()}, None),
        ({"s3_buckets": ("pic*",)}, None),
        ({"s3_buckets": ("pictures", "nobodys")}, "s3_not_found"),
        ({"s3_endpoint_url": "http://127.0.0.1:9"}, "s3_unavailable"),
    ],
    ids=["none", "any", "missing", "away"],
)
async def test_what_is_wrong_with_the_storage_is_told(
    changes: dict[str, Any], storage: str | None, s3: S3Server
) -> None:
    async with gateway(settings_of(s3, **changes)) as (_, client):
        assert (await told(client))["storage"] == storage


async def test_wrong_keys_are_told(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if not s3.is_real:
        pytest.skip("moto checks no keys")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7NOBODYS")
    async with gateway(settings_of(s3)) as (_, client):
        assert (await told(client))["storage"] == "s3_access_denied"


async def test_the_storage_is_asked_once_by_all_who_want_to_know_and_again_when_that_is_old() -> None:
    asked: list[str] = []
    now = 0.0

    async def ask(bucket: str) -> str | None:
        asked.append(bucket)
        return None if len(asked) == 1 else "s3_timeout"

    storages = Storages(("pictures",), ask, lambda: now)
    assert await asyncio.gather(*(storages.now() for _ in range(5))) == ["ok"] * 5
    assert asked == ["pictures"]
    now += pipeline_state.FRESH_SECONDS
    assert await storages.now() == "s3_timeout"
    assert await storages.now() == "s3_timeout"
    assert asked == ["pictures"] * 2
    await storages.close()


async def test_a_store_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_state, "PATIENCE_SECONDS", 0.01)

    async def ask(bucket: str) -> str | None:
        await asyncio.Event().wait()
        return None

    storages = Storages(("pictures",), ask)
    assert await storages.now() == "unknown"
    assert await storages.now() == "unknown"
    await storages.close()
