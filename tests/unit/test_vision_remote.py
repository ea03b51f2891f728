"""describe and generate in front of somebody else's model: what is sent, what comes back, what goes wrong."""

import base64
import io
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from PIL import Image

from sightline.errors import OutOfMemory, SourceRefused, UpstreamFailed
from sightline.services.describe import DescribeService
from sightline.services.generate import GenerateService
from sightline.settings import DescribeSettings, GenerateSettings
from sightline.wire import ChatRequest, Completion, Context, Deadline, ImageBytes, ImageUrl, Sampling, Turn
from tests.unit.test_remote import Answer, Call, Server, answer, serving
from tests.unit.test_remote_openai import body, chunk, events, fault, said

MODELS = answer(200, {"data": [{"id": "qwen", "root": "Qwen/Qwen2.5-VL-72B", "demo_model": False}]})


def photo(size: tuple[int, int] = (2000, 1000)) -> ImageBytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    Image.new("RGB", size, "red").save(file, "JPEG", exif=exif)
    return ImageBytes(file.getvalue())


def ask(*images: Any, **changes: Any) -> ChatRequest:
    return ChatRequest((Turn("user", (*images, "What is it?")),), Sampling(max_tokens=9), **changes)


def context() -> Context:
    return Context("r-1", Deadline.after(60))


def replying(*answers: Answer) -> Callable[[Call], Answer]:
    """The list of models for a GET, else the answers in turn."""
    waiting = list(answers)

    def behave(call: Call) -> Answer:
        if call.method == "GET":
            return MODELS
        return waiting.pop(0) if len(waiting) > 1 else waiting[0]

    return behave


Front = tuple[DescribeService, Server]


@pytest.fixture
async def front() -> AsyncIterator[Callable[..., Any]]:
    opened: list[Any] = []

    async def build(*answers: Answer) -> Front:
        listening = serving(replying(*answers))
        server = await listening.__aenter__()
        settings = DescribeSettings(
            _env_file=None, auth="off", engine="remote", remote_url=server.url, remote_model="qwen",
            remote_api_key="sk", job_store="memory://",
        )  # fmt: skip
        service = DescribeService(settings)
        await service.load()
        opened.append((service, listening))
        return service, server

    yield build
    for service, listening in opened:
        await service.close()
        await listening.__aexit__(None, None, None)


async def run(service: DescribeService, *requests: ChatRequest) -> list[Completion | OutOfMemory]:
    return await service.predict(await service.preprocess(requests, context()), context())


async def test_images_are_shrunk_and_drawn_anew(front: Callable[..., Any]) -> None:
    service, server = await front(said("a red field"))
    (made,) = await run(service, ask(photo(), photo((90, 60))))
    assert isinstance(made, Completion)
    assert (made.text, made.model.name) == ("a red field", "gpt-oss-120b")
    call = server.calls[-1]
    assert call.headers["authorization"] == "Bearer sk"
    *images, text = body(call)["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"}
    pictures = [Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))) for part in images]
    assert [picture.size for picture in pictures] == [(512, 256), (90, 60)]
    assert [dict(picture.getexif()) for picture in pictures] == [{}, {}]


async def test_metadata_says_whose_model_it_is(front: Callable[..., Any]) -> None:
    service, _ = await front(said())
    assert service.metadata() == {
        "model": "Qwen/Qwen2.5-VL-72B", "model_revision": "unknown", "demo_model": False, "backend": "openai",
    }  # fmt: skip


async def test_a_demonstration_behind_it_is_told(front: Callable[..., Any]) -> None:
    service, _ = await front(said("x", model="qwen", system_fingerprint="0123", demo_model=True))
    (made,) = await run(service, ask(photo()))
    assert isinstance(made, Completion)
    assert (made.model.name, made.model.revision, made.model.demo) == ("Qwen/Qwen2.5-VL-72B", "0123", True)
    assert service.metadata()["demo_model"] is True


async def test_a_stream(front: Callable[..., Any]) -> None:
    service, _ = await front(events(chunk("a red "), chunk("field"), chunk(None, "stop")))
    *pieces, whole = [part async for part in service.stream(ask(photo(), preset="tags"), context())]
    assert pieces == ["a red ", "field"]
    assert isinstance(whole, Completion)
    assert whole.tags == ("a red field",)


async def test_what_does_not_fit_fails_alone(front: Callable[..., Any]) -> None:
    full = fault(507, "out_of_memory")
    service, _ = await front(said("one"), full)
    outcomes = await run(service, ask(photo()), ask(photo()))
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Completion", "OutOfMemory"]
    service, _ = await front(full)
    with pytest.raises(OutOfMemory):
        await run(service, ask(photo()))


async def test_a_wrong_key_is_the_server_s_fault(front: Callable[..., Any]) -> None:
    service, _ = await front(fault(401, "invalid_api_key"))
    with pytest.raises(UpstreamFailed) as raised:
        await run(service, ask(photo()))
    assert raised.value.code == "remote_step_misconfigured"


async def test_the_policy_holds_before_anything_is_sent(front: Callable[..., Any]) -> None:
    service, server = await front(said())
    before = len(server.calls)
    with pytest.raises(SourceRefused):
        await run(service, ask(ImageUrl("https://example.com/a.png")))
    assert len(server.calls) == before


async def test_loading_waits_until_the_model_is_listed() -> None:
    listings = [answer(503, b""), answer(200, {"data": []}), MODELS]

    def behave(call: Call) -> Answer:
        return listings.pop(0) if len(listings) > 1 else listings[0]

    async with serving(behave) as server:
        settings = GenerateSettings(
            _env_file=None, auth="off", engine="remote", remote_url=server.url, remote_model="qwen"
        )
        service = GenerateService(settings)
        await service.load()
        assert service.metadata()["model"] == "Qwen/Qwen2.5-VL-72B"
        assert len(server.calls) == 4
        await service.close()


@pytest.mark.parametrize("given", [{}, {"remote_url": "ftp://a"}], ids=["no address", "an odd one"])
def test_settings_want_an_address(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"remote_url|must start with"):
        DescribeSettings(_env_file=None, auth="off", engine="remote", **given)
