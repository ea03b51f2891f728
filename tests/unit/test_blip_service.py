"""Contract E on the service alone: what it does around its model, which here is a function."""

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from obstore.store import MemoryStore
from starlette.responses import JSONResponse

from sightline.errors import BadRequest, DeadlineExceeded, OutOfMemory, QueueFull, SightlineError, SourceRefused
from sightline.jobs.batches import Batches
from sightline.services import blip as module
from sightline.services.base import Run
from sightline.services.blip import BlipService, CaptionRequest
from sightline.services.blip_bodies import restored_source, stored_source
from sightline.settings import BlipSettings
from sightline.wire import (
    Completion,
    Context,
    Deadline,
    ImageBytes,
    ImagePath,
    ImageS3,
    ImageSource,
    ImageUrl,
    ModelInfo,
    Sampling,
    Turn,
    Usage,
)

INFO = ModelInfo("some-blip", "1")
Reply = Callable[[CaptionRequest], Awaitable[Completion]]


def said(text: str) -> Completion:
    return Completion(text, "stop", Usage(), INFO, 1.0)


class Served:
    """A service whose model is a function, and a client of its routes."""

    def __init__(self, **settings: object) -> None:
        self.service = BlipService(BlipSettings(_env_file=None, auth="off", **settings))
        self.service._generation.engine._model = SimpleNamespace(info=INFO)
        self.requests: list[CaptionRequest] = []
        self.running = self.most = 0
        self.reply: Reply | None = None
        app = FastAPI()

        @app.middleware("http")
        async def with_context(request: Request, call_next: Any) -> Any:
            seconds = float(request.headers.get("seconds", "60"))
            request.state.context = Context("id-1", Deadline.after(seconds), principal="me")
            try:
                return await call_next(request)
            except SightlineError as error:
                return JSONResponse({"detail": error.message, "code": error.code}, error.status)

        app.include_router(self.service.router(Run(self.run, None)))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")

    async def run(self, requests: Sequence[CaptionRequest], context: Context) -> list[Completion]:
        (request,) = requests
        self.requests.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.reply is not None:
                return [await self.reply(request)]
            await self.service._sources.fetch(request.image)
            return [said(f"{request.prefix} a thing".strip())]
        finally:
            self.running -= 1


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served(max_batch=3)
    served.service._batches = Batches(MemoryStore(), served.service._execute, ttl_seconds=60, width=3)
    yield served
    await served.service._batches.close()
    await served.http.aclose()
    await served.service._sources.aclose()


IMAGE = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()


async def test_without_a_root_every_path_is_404(served: Served) -> None:
    """Contract E2 says 404 for a bad path, and without a mounted folder every path is bad."""
    response = await served.http.post("/caption", json={"image_path": "a.png"})
    (item,) = (await served.http.post("/batch-caption", json={"image_paths": ["a.png"]})).json()

    assert (response.status_code, response.json()["code"]) == (404, "path_not_allowed")
    assert item == {"image_path": "a.png", "error": response.json()["detail"], "code": "path_not_allowed"}


async def test_a_real_model_s_answers_have_exactly_the_contract_s_keys(served: Served) -> None:
    served.reply = lambda request: asyncio.sleep(0, said("a cat"))

    single = (await served.http.post("/caption", json={"image_path": "a.png"})).json()
    batch = (await served.http.post("/batch-caption", json={"image_paths": ["a.png"]})).json()
    started = (await served.http.post("/async-batch-caption", json={"image_paths": ["a.png"]})).json()

    assert single == {"image_path": "a.png", "caption": "a cat"}
    assert batch == [single]
    assert started.keys() == {"message", "task_id"}


async def test_a_batch_never_fills_the_queue_for_others(served: Served) -> None:
    """No more than `max_batch` of its images are in the model's queue at a time, of however many."""
    await served.http.post("/batch-caption", json={"images": [IMAGE] * 20})

    assert len(served.requests) == 20
    assert served.most <= 3


async def test_a_batch_waits_while_the_queue_is_full(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []

    async def sleep(seconds: float) -> None:
        naps.append(seconds)

    async def busy_at_first(request: CaptionRequest) -> Completion:
        if len(served.requests) <= 2:
            raise QueueFull("Busy.", retry_after=0.3)
        return said("a cat")

    served.reply = busy_at_first
    monkeypatch.setattr(module, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))

    results = (await served.http.post("/batch-caption", json={"images": [IMAGE]})).json()

    assert results == [{"caption": "a cat"}]
    assert naps == [0.3, 0.3]


async def test_a_single_image_does_not_wait_while_the_queue_is_full(served: Served) -> None:
    async def busy(request: CaptionRequest) -> Completion:
        raise QueueFull("Busy.", retry_after=1)

    served.reply = busy

    assert (await served.http.post("/caption", json={"image": IMAGE})).status_code == 429


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (DeadlineExceeded("Too late."), "deadline_exceeded"),
        (OutOfMemory("Too large."), "out_of_memory"),
        (QueueFull("Busy.", retry_after=1), "deadline_exceeded"),
    ],
)
async def test_what_befalls_one_image_is_its_own_error(served: Served, fault: SightlineError, code: str) -> None:
    async def reply(request: CaptionRequest) -> Completion:
        if request.image == ImageBytes(b"bad!"):
            raise fault
        return said("a cat")

    served.reply = reply
    images = [IMAGE, base64.b64encode(b"bad!").decode(), IMAGE]

    response = await served.http.post("/batch-caption", json={"images": images}, headers={"seconds": "0.9"})

    assert response.status_code == 200
    assert [item.get("code") for item in response.json()] == [None, code, None]


@pytest.mark.parametrize("route", ["/caption", "/batch-caption", "/async-batch-caption"])
async def test_while_the_model_loads_nothing_is_read(route: str) -> None:
    served = Served()
    served.service._generation.engine._model = None

    response = await served.http.post(route, content=b"{", headers={"Content-Type": "application/json"})

    assert (response.status_code, response.json()["code"]) == (503, "model_not_ready")
    await served.http.aclose()


async def test_a_stored_batch_keeps_text_and_sampling(served: Served) -> None:
    served.reply = lambda request: asyncio.sleep(0, said("a cat"))
    body = {"images": [IMAGE], "prefix": "a photo of", "max_tokens": 7, "seed": 3, "stop": ["x"]}

    task_id = (await served.http.post("/async-batch-caption", json=body)).json()["task_id"]
    await served.service._batches.wait(task_id)

    wanted = Sampling(max_tokens=7, seed=3, stop=("x",))
    assert served.requests == [CaptionRequest(ImageBytes(base64.b64decode(IMAGE)), "a photo of", wanted)]


@pytest.mark.parametrize(
    "image", [ImageUrl("https://a/b"), ImageS3("s3://a/b"), ImagePath("a.png"), ImageBytes(b"x")], ids=str
)
def test_every_source_comes_back_from_the_store(image: ImageSource) -> None:
    data = image.data if isinstance(image, ImageBytes) else None

    assert restored_source(stored_source(image), data) == image


def test_a_refusal_comes_back_from_the_store() -> None:
    restored = restored_source(stored_source(BadRequest("No.", code="s3_uri_invalid")), None)

    assert isinstance(restored, SourceRefused)
    assert (restored.message, restored.code) == ("No.", "s3_uri_invalid")


class TestChat:
    def test_the_text_beside_the_image_is_continued(self, served: Served) -> None:
        turns = [Turn("user", ("a photo of", ImageUrl("https://a/b")))]

        request = served.service.from_chat(turns, {"max_tokens": 5})

        assert request == CaptionRequest(ImageUrl("https://a/b"), "a photo of", Sampling(max_tokens=5))

    @pytest.mark.parametrize(
        ("turns", "code"),
        [
            ([], "conversation_unsupported"),
            ([Turn("system", ("Be kind.",)), Turn("user", (ImagePath("a"),))], "conversation_unsupported"),
            ([Turn("user", ("hello",))], "image_missing"),
            ([Turn("user", (ImagePath("a"), ImagePath("b")))], "too_many_images"),
        ],
    )
    def test_what_blip_cannot_do_is_400(self, served: Served, turns: list[Turn], code: str) -> None:
        with pytest.raises(BadRequest) as caught:
            served.service.from_chat(turns, {})

        assert caught.value.code == code
