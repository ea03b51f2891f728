"""Memory that ran out several times in a row costs readiness, and one answer brings it back."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from sightline.engines.health import TRIAL_SECONDS, MemoryHealth
from sightline.errors import OutOfMemory
from sightline.server.model import DescribeModel
from sightline.server.protocols import Protocols
from sightline.settings import DescribeSettings
from tests.unit.test_vision import ask, context, png


class TestMemoryHealth:
    def test_only_failures_in_a_row_count(self):
        health = MemoryHealth(limit=2)
        for outcome in (health.ran_out, health.succeeded, health.ran_out):
            outcome()
        assert not health.is_exhausted
        health.ran_out()
        assert health.is_exhausted
        health.succeeded()
        assert not health.is_exhausted

    def test_it_is_tried_now_and_then_while_it_is_exhausted_and_never_else(self):
        health = MemoryHealth(limit=1)
        assert not health.wants_trial(0.0)
        health.ran_out()
        assert health.wants_trial(10.0)
        assert not health.wants_trial(10.0 + TRIAL_SECONDS / 2)
        assert health.wants_trial(10.0 + TRIAL_SECONDS)
        health.succeeded()
        assert not health.wants_trial(100.0)


@pytest.fixture
async def model() -> AsyncIterator[DescribeModel]:
    settings = DescribeSettings(
        _env_file=None, auth="off", device="cpu", threads=1, job_store="memory://", max_out_of_memory=2
    )  # type: ignore[call-arg]
    made = DescribeModel(settings)
    await made.start_engine()
    yield made
    await made.shut_down()


class Device:
    """A device whose memory can go and come."""

    def __init__(self, prefill: Any) -> None:
        self.prefill = prefill
        self.is_full = False

    def __call__(self, *arguments: Any) -> Any:
        if self.is_full:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.prefill(*arguments)


async def test_readiness_is_lost_and_found_again(model: DescribeModel, monkeypatch: pytest.MonkeyPatch):
    loaded: Any = model.service
    device = Device(loaded._conversations.model.prefill)
    monkeypatch.setattr(loaded._conversations.model, "prefill", device)
    app = FastAPI()
    app.include_router(Protocols([model], 1 << 20).router())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

        async def ready(path: str = "/v2/health/ready") -> tuple[int, str | None]:
            answer = await client.get(path)
            return answer.status_code, answer.json().get("reason")

        assert await ready() == (200, None)
        device.is_full = True
        with pytest.raises(OutOfMemory):  # twice without memory: whole, and at half its pixels
            await model.run([ask(png())], context())
        assert await ready() == (503, "out_of_memory")
        assert await ready("/v2/models/describe/ready") == (503, "out_of_memory")
        assert (await client.get("/v2/health/live")).status_code == 200

        with pytest.raises(OutOfMemory):  # and not Unavailable: whoever asks is still answered
            await model.run([ask(png())], context())
        device.is_full = False
        loaded.health._tried_at = float("-inf")  # as if five seconds had gone
        until = time.monotonic() + 60
        while await ready() != (200, None):
            assert time.monotonic() < until
            await asyncio.sleep(0.02)
        assert not loaded.health.is_exhausted
