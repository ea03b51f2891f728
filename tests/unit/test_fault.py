"""A model that can answer no more takes its readiness and its server with it; fakes for what loads and what listens."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from sightline.server import serve
from sightline.server.model import PredictorModel
from sightline.server.serve import _ModelServer
from sightline.settings import BlipSettings


class FakeListener:
    """Serves until told to stop."""

    def __init__(self) -> None:
        self._is_told = asyncio.Event()

    @property
    def is_stopping(self) -> bool:
        return self._is_told.is_set()

    def stop_soon(self) -> None:
        self._is_told.set()

    async def start(self) -> None:
        await self._is_told.wait()


async def nothing() -> None:
    return None


@pytest.fixture(autouse=True)
def asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "FAULT_SECONDS", 0.01)


def model(**service: Any) -> PredictorModel:
    return PredictorModel(SimpleNamespace(name="m", load=nothing, close=nothing, **service), BlipSettings(auth="off"))


def server() -> tuple[Any, FakeListener]:
    made = _ModelServer.__new__(_ModelServer)
    made._rest_server = FakeListener()  # type: ignore[assignment]
    return made, made._rest_server  # type: ignore[return-value]


async def test_a_fault_takes_the_readiness() -> None:
    broken = model(fault=None)
    await broken.start_engine()
    assert await broken.healthy()

    broken.service.fault = "its engine has ended"  # type: ignore[attr-defined]

    assert not await broken.healthy()
    assert not broken.load()


async def test_a_service_without_faults_stays_ready() -> None:
    sound = model()
    await sound.start_engine()

    assert await sound.healthy()


async def test_a_fault_ends_the_server_and_says_why() -> None:
    running, listener = server()
    broken = model(fault=None)
    task = asyncio.create_task(running._serve_while_loading([broken]))
    async with asyncio.timeout(10):
        while not await broken.healthy():
            await asyncio.sleep(0.01)
    assert not task.done()

    broken.service.fault = "its engine has ended"  # type: ignore[attr-defined]

    with pytest.raises(RuntimeError, match="m: its engine has ended"):
        await asyncio.wait_for(task, 10)
    assert listener.is_stopping


async def test_a_server_that_is_told_to_stop_ends_without_a_word() -> None:
    running, listener = server()
    task = asyncio.create_task(running._serve_while_loading([model(fault=None)]))
    await asyncio.sleep(0.05)

    listener.stop_soon()

    assert await asyncio.wait_for(task, 10) is None


async def test_a_load_that_fails_ends_the_server() -> None:
    async def fail() -> None:
        raise ValueError("no weights")

    running, listener = server()
    broken = model(fault=None)
    broken.service.load = fail  # type: ignore[method-assign]

    with pytest.raises(ValueError, match="no weights"):
        await asyncio.wait_for(running._serve_while_loading([broken]), 10)
    assert listener.is_stopping
