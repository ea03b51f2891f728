"""Contract D on the gateway alone: bodies in, bodies out, concurrency, health; the steps are fakes behind real V2."""

import asyncio
import base64
import io
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from fastapi import FastAPI, Request
from PIL import Image
from starlette.responses import JSONResponse

from sightline import v2
from sightline.chain import ChainOptions
from sightline.engines.remote import RemoteStep
from sightline.engines.remote_v2 import V2
from sightline.errors import (
    BadRequest,
    DeadlineExceeded,
    InvalidImage,
    InvalidParameter,
    NotFound,
    OutOfMemory,
    QueueFull,
    SightlineError,
    SourceRefused,
    Unavailable,
    UpstreamFailed,
)
from sightline.services.base import Run
from sightline.services.pipeline import PipelineRequest, PipelineService
from sightline.settings import PipelineSettings
from sightline.wire import (
    CREATIVE_SEARCH_PROMPT,
    PRESETS,
    SHORT_PROMPT,
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


def png(side: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(file, "PNG")
    return file.getvalue()


PNG = png()
CAPTION = "A red square."
PROSE = "A red square rests on white."


@dataclass
class Model:
    """A predictor of ours as its HTTP answers tell it. `reply` replaces the answer; an event holds it back."""

    name: str
    text: str
    image_tokens: int = 9
    demo: bool = False
    reply: Callable[[v2.InferRequest], httpx.Response | None] = lambda _: None
    calls: list[v2.InferRequest] = field(default_factory=list)
    gets: list[str] = field(default_factory=list)
    ready: list[bool] = field(default_factory=lambda: [True])
    held: asyncio.Event | None = None
    is_held: Callable[[v2.InferRequest], bool] = lambda _: True
    running: int = 0
    most_running: int = 0
    cancelled: int = 0
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            self.gets.append(request.url.path)
            is_ready = self.ready.pop(0) if len(self.ready) > 1 else self.ready[0]
            if not is_ready:
                return httpx.Response(503, json={"error": "Loading.", "code": "model_not_ready"})
            said = self.parameters() | {"backend": "hf", "device": "cpu"}
            return httpx.Response(200, json={"name": self.name, "parameters": said})
        call = v2.parse_request(request.content, request.headers.get(v2.HEADER_LENGTH))
        self.calls.append(call)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.has_begun.set()
        try:
            if self.held is not None and self.is_held(call):
                await self.held.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        answer = v2.InferResponse(self.name, (v2.Tensor.of_texts("text", [self.text]),), self.parameters())
        return self.reply(call) or httpx.Response(200, content=v2.render_response(answer, call)[0])

    def parameters(self) -> dict[str, v2.Scalar]:
        said: dict[str, v2.Scalar] = {
            "model": f"own-name-of-{self.name}", "model_revision": "0123456789ab", "finish_reason": "stop",
            "prompt_tokens": 19, "completion_tokens": 7, "image_tokens": self.image_tokens, "reasoning_tokens": 3,
            "milliseconds": 12.5,
        }  # fmt: skip
        return said | ({"demo_model": True} if self.demo else {})

    def step(self, name: Any) -> RemoteStep:
        client = httpx.AsyncClient(transport=httpx.MockTransport(self))
        return RemoteStep(V2("http://step", self.name), None, client, step=name, sleep=at_once)


async def at_once(_: float) -> None:
    return None


class Shelf:
    """Image sources without network or disk."""

    def __init__(self) -> None:
        self.fetched: list[ImageSource] = []
        self.error: SightlineError | None = None
        self.is_closed = False
        self.hangs = False

    async def fetch(self, source: ImageSource) -> bytes:
        self.fetched.append(source)
        if self.hangs:
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        return source.data if isinstance(source, ImageBytes) else PNG

    async def aclose(self) -> None:
        self.is_closed = True


@dataclass
class Gateway:
    """The service under test, its fakes, and an HTTP client in front of it."""

    service: PipelineService
    describe: Model
    enhance: Model
    shelf: Shelf
    http: httpx.AsyncClient
    seconds: list[float]

    async def caption(self, **body: object) -> dict[str, Any]:
        response = await self.http.post("/caption", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def refused(self, status: int, **body: object) -> dict[str, Any]:
        response = await self.http.post("/caption", json=body)
        assert response.status_code == status, response.text
        return response.json()

    async def run(self, requests: Any, seconds: float = 60) -> Any:
        context = Context("r-1", Deadline.after(seconds))
        return await self.service.predict(await self.service.preprocess(requests, context), context)


def wanted(image: ImageSource, **options: Any) -> PipelineRequest:
    """A request as a body makes it: with the sampling of an ordinary gateway."""
    sampling = {"caption_sampling": Sampling(max_tokens=128), "enhance_sampling": Sampling(max_tokens=1024)}
    return PipelineRequest(image, ChainOptions(**sampling | options))


def settings(**changes: Any) -> PipelineSettings:
    return PipelineSettings(_env_file=None, auth="off", **changes)


Build = Callable[..., Gateway]


@pytest.fixture
async def build() -> AsyncIterator[Build]:
    gateways: list[Gateway] = []

    def build(*, with_enhancer: bool = True, demo: bool = False, **changes: Any) -> Gateway:
        describe = Model("describe", CAPTION, demo=demo)
        enhance = Model("enhance", PROSE, image_tokens=0, demo=demo)
        shelf = Shelf()
        clock = [0.0]
        service = PipelineService(
            settings(**changes),
            sources=shelf,
            caption=describe.step("caption"),
            enhance=enhance.step("enhance") if with_enhancer else None,
            sleep=at_once,
            clock=lambda: clock[0],
        )
        transport = httpx.ASGITransport(application(service))
        http = httpx.AsyncClient(transport=transport, base_url="http://gateway")
        gateways.append(Gateway(service, describe, enhance, shelf, http, clock))
        return gateways[-1]

    yield build
    for gateway in gateways:
        await gateway.http.aclose()
        await gateway.service.close()
        assert gateway.shelf.is_closed


@pytest.fixture
def gateway(build: Build) -> Gateway:
    return build()


def application(service: PipelineService) -> FastAPI:
    """What the server does around the routes, as far as they can tell."""
    app = FastAPI()

    async def run(requests: Any, context: Context) -> Any:
        return await service.predict(await service.preprocess(requests, context), context)

    @app.middleware("http")
    async def with_context(request: Request, call_next: Any) -> Any:
        request.state.context = Context("r-1", Deadline.after(60))
        return await call_next(request)

    @app.exception_handler(SightlineError)
    async def fault(_: Request, error: SightlineError) -> JSONResponse:
        return JSONResponse({"detail": error.message, "code": error.code}, error.status)

    app.include_router(service.router(Run(run, service.stream)))
    return app


URI = "s3://bucket/deep folder/a+b.png"


class TestD1Keys:
    async def test_without_enhancement(self, gateway: Gateway) -> None:
        assert await gateway.caption(s3_uri=URI, use_gpt_oss=False) == {
            "caption": CAPTION,
            "enhanced": False,
            "s3_uri": URI,
        }

    async def test_enhanced(self, gateway: Gateway) -> None:
        assert await gateway.caption(s3_uri=URI) == {
            "caption": PROSE,
            "original_caption": CAPTION,
            "enhanced": True,
            "s3_uri": URI,
        }
        assert gateway.shelf.fetched == [ImageS3(URI)]

    @pytest.mark.parametrize("use", [True, False])
    async def test_demonstration_models_say_so(self, build: Build, use: bool) -> None:
        body = await build(demo=True).caption(s3_uri=URI, use_gpt_oss=use)
        assert (body["demo_model"], body["model"]) == (True, "own-name-of-describe")

    async def test_unknown_fields_are_ignored(self, gateway: Gateway) -> None:
        assert (await gateway.caption(s3_uri=URI, colour="blue"))["enhanced"]


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "prompt"),
        [
            pytest.param({}, CREATIVE_SEARCH_PROMPT, id="detailed by default"),
            pytest.param({"detailed": None}, CREATIVE_SEARCH_PROMPT, id="null is the default"),
            pytest.param({"detailed": False}, SHORT_PROMPT, id="short"),
            pytest.param({"detailed": False, "prompt": "Count."}, "Count.", id="a prompt overrides"),
            pytest.param({"prompt": "  "}, CREATIVE_SEARCH_PROMPT, id="blank is none"),
        ],
    )
    async def test_prompt(self, gateway: Gateway, options: dict[str, object], prompt: str) -> None:
        await gateway.caption(s3_uri=URI, **options)
        tensor = gateway.describe.calls[0].input("prompt")
        assert tensor is not None
        assert tensor.texts() == (prompt,)

    @pytest.mark.parametrize(
        ("default", "options", "is_enhanced"),
        [
            pytest.param(True, {}, True, id="the setting, on"),
            pytest.param(False, {}, False, id="the setting, off"),
            pytest.param(False, {"use_gpt_oss": True}, True, id="forced"),
            pytest.param(True, {"use_gpt_oss": False}, False, id="skipped"),
            pytest.param(True, {"enhance": False}, False, id="by its other name"),
            pytest.param(True, {"use_gpt_oss": True, "enhance": False}, True, id="the contract's name wins"),
        ],
    )
    async def test_use_gpt_oss(self, build: Build, default: bool, options: Any, is_enhanced: bool) -> None:
        body = await build(enhance_by_default=default).caption(s3_uri=URI, **options)
        assert body["enhanced"] is is_enhanced

    @pytest.mark.parametrize(("options", "level"), [({}, "medium"), ({"reasoning_level": "high"}, "high")])
    async def test_reasoning_level(self, build: Build, options: Any, level: str) -> None:
        gateway = build(reasoning_level="medium", enhance_tokens=77, caption_tokens=33)
        await gateway.caption(s3_uri=URI, **options)
        assert gateway.enhance.calls[0].parameters["reasoning_level"] == level
        assert gateway.enhance.calls[0].parameters["max_tokens"] == 77
        assert gateway.describe.calls[0].parameters["max_tokens"] == 33

    async def test_explain(self, gateway: Gateway) -> None:
        body = await gateway.caption(s3_uri=URI, explain=True)
        assert body["added_terms"] == ["rests", "white"]
        assert body["steps"][0] == {
            "name": "caption", "model": "own-name-of-describe", "revision": "0123456789ab", "milliseconds": 12.5,
            "prompt_tokens": 19, "completion_tokens": 7, "image_tokens": 9, "reasoning_tokens": 3,
        }  # fmt: skip
        assert [step["name"] for step in body["steps"]] == ["caption", "enhance"]

    async def test_explain_without_enhancement(self, gateway: Gateway) -> None:
        body = await gateway.caption(s3_uri=URI, explain=True, use_gpt_oss=False)
        assert (body["added_terms"], len(body["steps"])) == ([], 1)

    async def test_truncated(self, gateway: Gateway) -> None:
        gateway.describe.text = "word " * 60
        assert (await gateway.caption(s3_uri=URI))["truncated"] is True

    @pytest.mark.parametrize(
        "options",
        [
            {"detailed": 3},
            {"use_gpt_oss": "perhaps"},
            {"strict": []},
            {"explain": {}},
            {"reasoning_level": "extreme"},
            {"reasoning_level": ["low"]},
            {"prompt": 5},
            {"prompt": "x" * 8193},
        ],
        ids=str,
    )
    async def test_wrong_types_and_ranges_are_422(self, gateway: Gateway, options: dict[str, Any]) -> None:
        await gateway.refused(422, s3_uri=URI, **options)
        assert not gateway.describe.calls


class TestD3Degrades:
    async def test_without_an_enhancer(self, build: Build) -> None:
        body = await build(with_enhancer=False).caption(s3_uri=URI, use_gpt_oss=True)
        assert body == {
            "caption": CAPTION,
            "enhanced": False,
            "enhancement_error": {
                "code": "enhancer_not_configured",
                "message": "This pipeline has no enhance step.",
            },
            "s3_uri": URI,
        }

    async def test_strict_is_503(self, build: Build) -> None:
        gateway = build(with_enhancer=False)
        assert await gateway.refused(503, s3_uri=URI, strict=True) == {
            "detail": "This pipeline has no enhance step.",
            "code": "enhancer_not_configured",
        }

    async def test_an_enhancer_that_is_down(self, gateway: Gateway) -> None:
        def down(_: v2.InferRequest) -> httpx.Response:
            raise httpx.ConnectError("refused")

        gateway.enhance.reply = down
        body = await gateway.caption(s3_uri=URI)
        assert body["enhancement_error"]["code"] == "enhancer_unavailable"
        assert body["caption"] == CAPTION

    async def test_a_caption_step_that_is_down_is_503(self, gateway: Gateway) -> None:
        def down(_: v2.InferRequest) -> httpx.Response:
            raise httpx.ConnectError("refused")

        gateway.describe.reply = down
        assert (await gateway.refused(503, s3_uri=URI))["code"] == "caption_step_unavailable"

    async def test_a_model_that_did_not_see_the_image(self, gateway: Gateway) -> None:
        gateway.describe.image_tokens = 0
        assert (await gateway.refused(502, s3_uri=URI))["code"] == "image_not_seen"


class TestImageArguments:
    @pytest.mark.parametrize("uri", ["http://bucket/key", "bucket/key", "S3://b/k", ""])
    async def test_s3_uri_with_another_scheme(self, gateway: Gateway, uri: str) -> None:
        body = await gateway.refused(400, s3_uri=uri)
        assert body == {"detail": "s3_uri must start with s3://", "code": "s3_uri_invalid"}

    @pytest.mark.parametrize("body", [{}, {"detailed": True}, {"s3_uri": None}, {"s3_uri": 5}, {"image": ["x"]}])
    async def test_no_image_is_422(self, gateway: Gateway, body: dict[str, Any]) -> None:
        await gateway.refused(422, **body)

    @pytest.mark.parametrize(
        ("error", "status", "detail"),
        [
            (
                SourceRefused("No such object.", code="s3_not_found"),
                400,
                "Failed to fetch/decode image: No such object.",
            ),
            (InvalidImage("Not an image."), 400, "Failed to fetch/decode image: Not an image."),
            (NotFound("There is no such image.", code="image_not_found"), 404, "There is no such image."),
        ],
        ids=["unfetchable", "undecodable", "absent path"],
    )
    async def test_a_bad_image(self, gateway: Gateway, error: SightlineError, status: int, detail: str) -> None:
        gateway.shelf.error = error
        assert await gateway.refused(status, s3_uri=URI) == {"detail": detail, "code": error.code}

    async def test_the_header_is_checked_before_a_model_is_asked(self, gateway: Gateway) -> None:
        body = await gateway.refused(400, image=base64.b64encode(b"no image at all").decode())
        assert body["detail"].startswith("Failed to fetch/decode image: ")
        assert not gateway.describe.calls

    async def test_what_only_the_predictor_finds(self, gateway: Gateway) -> None:
        gateway.describe.reply = lambda _: httpx.Response(400, json={"error": "Cut off.", "code": "image_truncated"})
        assert await gateway.refused(400, s3_uri=URI) == {
            "detail": "Failed to fetch/decode image: Cut off.",
            "code": "image_truncated",
        }

    @pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
    async def test_base64_and_data_uri(self, gateway: Gateway, prefix: str) -> None:
        body = await gateway.caption(image=prefix + base64.b64encode(PNG).decode(), use_gpt_oss=False)
        assert body == {"caption": CAPTION, "enhanced": False}
        image = gateway.describe.calls[0].input("image")
        assert image is not None
        assert image.data == (PNG,)

    async def test_broken_base64(self, gateway: Gateway) -> None:
        assert (await gateway.refused(400, image="&&&"))["detail"].startswith("Failed to fetch/decode image: ")

    @pytest.mark.parametrize("name", ["image", "image_url"])
    async def test_url(self, gateway: Gateway, name: str) -> None:
        await gateway.caption(**{name: "https://example.org/a.png"})
        assert gateway.shelf.fetched == [ImageUrl("https://example.org/a.png")]

    async def test_a_path_needs_a_root(self, gateway: Gateway) -> None:
        assert (await gateway.refused(400, image_path="a.png"))["code"] == "image_path_unsupported"

    async def test_a_path_below_the_root(self, build: Build, tmp_path: Any) -> None:
        gateway = build(image_root=tmp_path)
        body = await gateway.caption(image_path="a.png", use_gpt_oss=False)
        assert body == {"image_path": "a.png", "caption": CAPTION, "enhanced": False}
        assert gateway.shelf.fetched == [ImagePath("a.png")]

    async def test_raw_body_with_options_in_the_query(self, gateway: Gateway) -> None:
        headers = {"content-type": "image/png"}
        response = await gateway.http.post("/caption?use_gpt_oss=false", content=PNG, headers=headers)
        assert response.json() == {"caption": CAPTION, "enhanced": False}

    @pytest.mark.parametrize(
        ("content", "status", "code"),
        [
            (b"{", 400, "invalid_json"),
            (b"", 400, "invalid_json"),
            (b"[1]", 422, "invalid_parameter"),
            (b'"text"', 422, "invalid_parameter"),
        ],
    )
    async def test_bodies_that_are_no_object(self, gateway: Gateway, content: bytes, status: int, code: str) -> None:
        response = await gateway.http.post("/caption", content=content)
        assert (response.status_code, response.json()["code"]) == (status, code)


class TestForms:
    async def test_upload(self, gateway: Gateway) -> None:
        response = await gateway.http.post("/caption", files={"image": ("my scene.png", PNG)})
        body = response.json()
        assert body.pop("processing_time") >= 0
        assert body == {
            "filename": "my scene.png",
            "caption": PROSE,
            "original_caption": CAPTION,
            "enhanced": True,
        }
        assert gateway.shelf.fetched == [ImageBytes(PNG, "my scene.png")]

    async def test_options_are_text(self, gateway: Gateway) -> None:
        data = {"use_gpt_oss": "false", "detailed": "0", "explain": "true"}
        body = (await gateway.http.post("/caption", files={"image": ("a.png", PNG)}, data=data)).json()
        assert (body["enhanced"], body["added_terms"]) == (False, [])

    async def test_blank_fields_say_nothing(self, gateway: Gateway) -> None:
        data = {"use_gpt_oss": "", "reasoning_level": "", "prompt": " "}
        body = (await gateway.http.post("/caption", files={"image": ("a.png", PNG)}, data=data)).json()
        assert body["enhanced"] is True

    async def test_an_option_with_another_text_is_422(self, gateway: Gateway) -> None:
        response = await gateway.http.post("/caption", files={"image": ("a.png", PNG)}, data={"strict": "perhaps"})
        assert response.status_code == 422

    async def test_urlencoded_s3_uri(self, gateway: Gateway) -> None:
        body = (await gateway.http.post("/caption", data={"s3_uri": URI, "use_gpt_oss": "false"})).json()
        assert body == {"caption": CAPTION, "enhanced": False, "s3_uri": URI}

    @pytest.mark.parametrize(
        ("request_", "status", "code"),
        [
            pytest.param({"files": {"other": ("a.png", PNG)}}, 422, "image_missing", id="no image"),
            pytest.param(
                {"files": [("image", ("a.png", PNG)), ("image", ("b.png", PNG))]}, 422, "too_many_items",
                id="two images",
            ),
            pytest.param({"files": [("x", ("a", b""))] * 4}, 413, "too_many_parts", id="too many files"),
            pytest.param({"data": {str(n): "x" for n in range(4)}}, 413, "too_many_parts", id="too many fields"),
            pytest.param({"data": {"image": "x" * 201}}, 413, "payload_too_large", id="a field too large"),
            pytest.param(
                {"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "invalid_form",
                id="no boundary",
            ),
            pytest.param(
                {"content": b"xx", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400,
                "invalid_form", id="no form",
            ),
        ],
    )  # fmt: skip
    async def test_bad_forms(self, build: Build, request_: Any, status: int, code: str) -> None:
        gateway = build(max_parts=3, max_image_bytes=100)
        response = await gateway.http.post("/caption", **request_)
        assert (response.status_code, response.json()["code"]) == (status, code)


class TestHealth:
    async def test_true_values(self, build: Build) -> None:
        gateway = build(reasoning_level="high")
        assert (await gateway.http.get("/health")).json() == {
            "ok": True,
            "backend": "hf",
            "device": "cpu",
            "gpt_oss_enabled": True,
            "gpt_oss_model": "own-name-of-enhance",
            "gpt_oss_reasoning_level": "high",
        }

    async def test_caption_step_down(self, gateway: Gateway) -> None:
        gateway.describe.ready = [False]
        response = await gateway.http.get("/health")
        assert response.status_code == 200
        assert (response.json()["ok"], response.json()["backend"]) == (False, None)

    async def test_enhancer_down_is_still_ok(self, gateway: Gateway) -> None:
        gateway.enhance.ready = [False]
        body = (await gateway.http.get("/health")).json()
        assert (body["ok"], body["gpt_oss_enabled"], body["gpt_oss_model"]) == (True, True, None)

    @pytest.mark.parametrize("changes", [{"with_enhancer": False}, {"enhance_by_default": False}], ids=str)
    async def test_not_enabled(self, build: Build, changes: Any) -> None:
        assert (await build(**changes).http.get("/health")).json()["gpt_oss_enabled"] is False

    async def test_asked_once_in_two_seconds_however_many_ask(self, gateway: Gateway) -> None:
        await asyncio.gather(*(gateway.http.get("/health") for _ in range(5)))
        assert len(gateway.describe.gets) == 2  # ready, metadata
        gateway.seconds[0] += 2
        await gateway.http.get("/health")
        assert len(gateway.describe.gets) == 4

    async def test_v2_metadata_says_the_same(self, gateway: Gateway) -> None:
        await gateway.service.load()
        assert gateway.service.metadata() == {
            "model": "own-name-of-describe", "model_revision": "0123456789ab", "demo_model": False, "backend": "hf",
            "device": "cpu", "enhancer_model": "own-name-of-enhance", "enhance_by_default": True,
            "reasoning_level": "low",
        }  # fmt: skip

    async def test_v2_metadata_before_loading_says_what_is_known(self, gateway: Gateway) -> None:
        assert gateway.service.metadata() == {
            "demo_model": False, "enhance_by_default": True, "reasoning_level": "low",
        }  # fmt: skip


async def test_loading_waits_for_the_caption_step_only(gateway: Gateway) -> None:
    gateway.describe.ready = [False] * 50 + [True]
    gateway.enhance.ready = [False]
    await gateway.service.load()
    assert gateway.describe.gets.count("/v2/models/describe/ready") == 52


class TestV1:
    async def test_instances(self, gateway: Gateway) -> None:
        text = base64.b64encode(PNG).decode()
        requests = gateway.service.from_v1(
            {
                "instances": [
                    {"image": text, "enhance": False},
                    {"s3_uri": URI, "prompt": "Count.", "detailed": False, "reasoning_level": "high", "strict": True},
                    {"image_bytes": {"b64": text}, "explain": True},
                    text,
                ]
            }
        )
        assert requests == [
            wanted(ImageBytes(PNG), enhance=False),
            wanted(ImageS3(URI), prompt="Count.", detailed=False, level="high", strict=True),
            wanted(ImageBytes(PNG), explain=True),
            wanted(ImageBytes(PNG)),
        ]
        body = gateway.service.to_v1(await gateway.run(requests[:2]))
        assert body == {
            "predictions": [
                {"caption": CAPTION, "enhanced": False},
                {"caption": PROSE, "original_caption": CAPTION, "enhanced": True},
            ]
        }

    async def test_demonstration_models_say_so_twice(self, build: Build) -> None:
        gateway = build(demo=True)
        body = gateway.service.to_v1(await gateway.run([PipelineRequest(ImageBytes(PNG))]))
        assert body["demo_model"] is body["predictions"][0]["demo_model"] is True
        assert body["model"] == "own-name-of-describe"

    @pytest.mark.parametrize("body", [{}, {"instances": []}, {"instances": [{}]}, {"instances": [{"prompt": "x"}]}])
    async def test_bad_bodies(self, gateway: Gateway, body: Any) -> None:
        with pytest.raises(BadRequest):
            gateway.service.from_v1(body)


class TestV2:
    def request(self, *prompts: str, images: int = 2, **parameters: v2.Scalar) -> v2.InferRequest:
        inputs = [v2.Tensor.of_bytes("image", [PNG] * images)]
        if prompts:
            inputs.append(v2.Tensor.of_texts("prompt", prompts))
        return v2.InferRequest(tuple(inputs), parameters)

    @pytest.mark.parametrize(
        ("given", "prompts"),
        [((), [None, None]), (("Count.",), ["Count."] * 2), (("a", "b"), ["a", "b"])],
        ids=["none", "one for all", "one each"],
    )
    async def test_prompts(self, gateway: Gateway, given: tuple[str, ...], prompts: list[str | None]) -> None:
        requests = gateway.service.from_v2(self.request(*given))
        assert [request.options.prompt for request in requests] == prompts

    async def test_parameters(self, gateway: Gateway) -> None:
        requests = gateway.service.from_v2(
            self.request(
                images=1,
                detailed=False,
                use_gpt_oss=False,
                reasoning_level="high",
                strict=True,
                explain=True,
                prompt="x",
            )
        )
        assert requests == [
            wanted(ImageBytes(PNG), detailed=False, enhance=False, level="high", strict=True, explain=True)
        ]

    async def test_outputs(self, gateway: Gateway) -> None:
        requests = [PipelineRequest(ImageBytes(PNG)), wanted(ImageBytes(PNG), enhance=False)]
        response = gateway.service.to_v2(await gateway.run(requests))
        text, original, enhanced, error = response.outputs
        assert [tensor.name for tensor in response.outputs] == [spec.name for spec in gateway.service.outputs]
        assert [tensor.datatype for tensor in response.outputs] == [spec.datatype for spec in gateway.service.outputs]
        assert text.texts() == (PROSE, CAPTION)
        assert original.texts() == (CAPTION, CAPTION)
        assert np.asarray(enhanced.data).tolist() == [True, False]
        assert error.texts() == ("", "")
        assert response.parameters == {
            "model": "own-name-of-describe",
            "model_revision": "0123456789ab",
            "enhancer_model": "own-name-of-enhance",
            "image_tokens": 18,
            "milliseconds": 25.0,
        }

    async def test_an_enhancement_error_is_json(self, build: Build) -> None:
        gateway = build(with_enhancer=False, demo=True)
        gateway.describe.text = "word " * 60
        response = gateway.service.to_v2(await gateway.run([wanted(ImageBytes(PNG), explain=True)]))
        assert orjson.loads(response.outputs[3].elements()[0])["code"] == "enhancer_not_configured"
        assert response.parameters["demo_model"] is True
        assert response.parameters["truncated"] is True
        (explanation,) = orjson.loads(str(response.parameters["explanation"]))
        assert [step["name"] for step in explanation["steps"]] == ["caption"]

    @pytest.mark.parametrize(
        "request_",
        [
            v2.InferRequest((v2.Tensor.of_texts("text", ["x"]),)),
            v2.InferRequest((v2.Tensor.of_texts("prompt", ["x"]),)),
            v2.InferRequest((v2.Tensor.of_bytes("image", [PNG] * 2), v2.Tensor.of_texts("prompt", ["x"] * 3))),
        ],
        ids=["unknown input", "no image", "three prompts for two images"],
    )
    async def test_bad_requests(self, gateway: Gateway, request_: v2.InferRequest) -> None:
        with pytest.raises(BadRequest):
            gateway.service.from_v2(request_)


class TestManyItems:
    async def test_order_is_kept(self, gateway: Gateway) -> None:
        gateway.describe.reply = lambda call: None
        requests = [wanted(ImageBytes(PNG), enhance=index % 2 == 0) for index in range(6)]
        assert [result.enhanced for result in await gateway.run(requests)] == [True, False] * 3

    async def test_one_failing_item_fails_the_call_by_its_index(self, gateway: Gateway) -> None:
        images = [PNG, png(9), PNG]

        def refuse(call: v2.InferRequest) -> httpx.Response | None:
            if call.inputs[0].data == (images[1],):
                return httpx.Response(422, json={"error": "Too odd.", "code": "odd"})
            return None

        gateway.describe.reply = refuse
        with pytest.raises(InvalidParameter, match=r"^Item 1: Too odd\.$") as raised:
            await gateway.run([PipelineRequest(ImageBytes(image)) for image in images])
        assert raised.value.code == "odd"

    async def test_a_failing_item_keeps_when_to_come_back(self, gateway: Gateway) -> None:
        gateway.describe.reply = lambda _: httpx.Response(
            429, json={"error": "Full.", "code": "queue_full"}, headers={"retry-after": "7"}
        )
        with pytest.raises(QueueFull) as raised:
            await gateway.run([PipelineRequest(ImageBytes(PNG))] * 2)
        assert raised.value.retry_after == 7

    async def test_the_rest_is_cancelled(self, gateway: Gateway) -> None:
        bad = png(9)

        def is_bad(call: v2.InferRequest) -> bool:
            return call.inputs[0].data == (bad,)

        refusal = httpx.Response(422, json={"error": "No.", "code": "odd"})
        gateway.describe.held = asyncio.Event()
        gateway.describe.is_held = lambda call: not is_bad(call)
        gateway.describe.reply = lambda call: refusal if is_bad(call) else None
        with pytest.raises(InvalidParameter, match=r"^Item 1: No\.$"):
            await gateway.run([PipelineRequest(ImageBytes(image)) for image in (PNG, bad)])
        assert gateway.describe.cancelled == 1

    async def test_at_most_max_concurrency_at_once_over_all_calls(self, build: Build) -> None:
        gateway = build(max_concurrency=2, enhance_by_default=False)
        calls = [gateway.run([PipelineRequest(ImageBytes(PNG))] * 4) for _ in range(3)]
        results = await asyncio.gather(*calls)
        assert [len(result) for result in results] == [4, 4, 4]
        assert gateway.describe.most_running == 2

    async def test_waiting_for_a_place_has_the_deadline_too(self, build: Build) -> None:
        gateway = build(max_concurrency=1)
        gateway.describe.held = asyncio.Event()
        first = asyncio.create_task(gateway.run([PipelineRequest(ImageBytes(PNG))]))
        await gateway.describe.has_begun.wait()
        with pytest.raises(DeadlineExceeded, match="turn"):
            await gateway.run([PipelineRequest(ImageBytes(PNG))], seconds=0.5)
        gateway.describe.held.set()
        assert (await first)[0].enhanced

    async def test_one_that_does_not_fit_the_device_fails_alone(self, gateway: Gateway) -> None:
        large = png(9)

        def full(call: v2.InferRequest) -> httpx.Response | None:
            if call.inputs[0].data == (large,):
                return httpx.Response(507, json={"error": "Too large.", "code": "out_of_memory"})
            return None

        gateway.describe.reply = full
        outcomes = await gateway.run([wanted(ImageBytes(image)) for image in (PNG, large, PNG)])
        error = {"error": "Too large.", "code": "out_of_memory", "http_status": 507}
        predictions = gateway.service.to_v1(outcomes)["predictions"]
        assert [prediction.get("caption") for prediction in predictions] == [PROSE, None, PROSE]
        assert predictions[1] == error
        response = gateway.service.to_v2(outcomes)
        assert response.outputs[0].texts() == (PROSE, "", PROSE)
        assert np.asarray(response.outputs[2].data).tolist() == [True, False, True]
        assert orjson.loads(str(response.parameters["item_errors"])) == [None, error, None]
        with pytest.raises(OutOfMemory):
            await gateway.run([wanted(ImageBytes(large))])

    async def test_a_slow_source_is_504(self, gateway: Gateway) -> None:
        gateway.shelf.hangs = True
        with pytest.raises(DeadlineExceeded, match="did not arrive"):
            await gateway.run([PipelineRequest(ImageUrl("https://slow.example"))], seconds=0.2)

    async def test_a_bug_stays_a_bug(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        async def broken(*_: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(gateway.shelf, "fetch", broken)
        with pytest.raises(ZeroDivisionError):
            await gateway.run([PipelineRequest(ImageBytes(PNG))] * 2)

    async def test_cancelling_the_call_cancels_the_steps(self, gateway: Gateway) -> None:
        gateway.describe.held = asyncio.Event()
        task = asyncio.create_task(gateway.run([PipelineRequest(ImageBytes(PNG))] * 3))
        while gateway.describe.running < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert gateway.describe.cancelled == 3


def events_of(text: str) -> list[tuple[str, Any]]:
    """Names and data of server-sent events."""
    told = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        told.append((name.removeprefix("event: "), orjson.loads(data.removeprefix("data: "))))
    return told


class Streaming(RemoteStep):
    """An enhance step that streams: texts, then the whole, or an error."""

    pieces: tuple[str | Completion | Exception, ...] = ()

    async def enhance_stream(self, *arguments: object) -> AsyncGenerator[str | Completion]:  # type: ignore[override]
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece


DONE = Completion(PROSE, "stop", Usage(30, 12, 0, 5), ModelInfo("own-name-of-enhance", "0123456789ab"), 12.5)
BROKEN = UpstreamFailed("The enhance step broke off.")


def streaming_by(gateway: Gateway, *pieces: str | Completion | Exception) -> Gateway:
    step = Streaming(V2("http://step", "enhance"), None, httpx.AsyncClient(), step="enhance")
    step.pieces = pieces
    gateway.service._steps.enhance = step
    return gateway


class TestEvents:
    """`POST /caption` with `Accept: text/event-stream`."""

    async def watch(self, gateway: Gateway, **body: object) -> list[tuple[str, Any]]:
        response = await gateway.http.post("/caption", json=body, headers={"accept": "text/event-stream"})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.text)

    async def test_the_caption_then_pieces_then_the_answer(self, gateway: Gateway) -> None:
        streaming_by(gateway, "A red square ", "rests on white.", DONE)
        answer = {"s3_uri": URI, "caption": PROSE, "original_caption": CAPTION, "enhanced": True}
        assert await self.watch(gateway, s3_uri=URI) == [
            ("caption", {"caption": CAPTION}),
            ("enhancement.delta", {"delta": "A red square "}),
            ("enhancement.delta", {"delta": "rests on white."}),
            ("done", answer),
        ]

    async def test_a_step_that_does_not_stream(self, gateway: Gateway) -> None:
        assert [name for name, _ in await self.watch(gateway, s3_uri=URI)] == ["caption", "done"]

    async def test_without_enhancement(self, gateway: Gateway) -> None:
        events = await self.watch(gateway, s3_uri=URI, use_gpt_oss=False)
        assert events[-1] == ("done", {"s3_uri": URI, "caption": CAPTION, "enhanced": False})

    async def test_an_enhancement_that_breaks_off_is_told_in_the_answer(self, gateway: Gateway) -> None:
        streaming_by(gateway, "A red", BROKEN)
        *_, (name, answer) = await self.watch(gateway, s3_uri=URI)
        assert name == "done"
        assert (answer["caption"], answer["enhanced"]) == (CAPTION, False)
        assert answer["enhancement_error"]["code"] == "enhancer_failed"

    async def test_strict_makes_it_an_error_event(self, gateway: Gateway) -> None:
        streaming_by(gateway, "A red", BROKEN)
        *_, (name, error) = await self.watch(gateway, s3_uri=URI, strict=True)
        assert (name, set(error), error["code"]) == ("error", {"detail", "code", "request_id"}, "enhancer_failed")

    async def test_what_goes_wrong_before_the_caption_has_a_status(self, gateway: Gateway) -> None:
        gateway.shelf.error = InvalidImage("Not an image.")
        response = await gateway.http.post("/caption", json={"s3_uri": URI, "stream": True})
        assert response.status_code == 400
        assert response.json()["detail"] == "Failed to fetch/decode image: Not an image."

    async def test_a_bug_is_an_event_too_and_tells_nothing(
        self, gateway: Gateway, caplog: pytest.LogCaptureFixture
    ) -> None:
        streaming_by(gateway, DONE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sightline.services.pipeline._answer", lambda result: 1 / 0)
            *_, (name, error) = await self.watch(gateway, s3_uri=URI)
        assert (name, error["code"]) == ("error", "internal_error")
        assert "ZeroDivisionError" in caplog.text


class TestConversations:
    """What OpenAI's routes ask."""

    async def told(self, gateway: Gateway, request: PipelineRequest) -> list[Any]:
        return [part async for part in gateway.service.stream(request, Context("r-1", Deadline.after(60)))]

    async def test_one_image_and_its_text(self, gateway: Gateway) -> None:
        turns = [Turn("system", ("Be brief.",)), Turn("user", (ImageUrl("https://a/b.png"), "Count."))]
        request = gateway.service.from_chat(turns, {"reasoning_level": "high", "use_gpt_oss": False, "seed": 3})
        assert request.image == ImageUrl("https://a/b.png")
        assert (request.options.prompt, request.options.level, request.options.enhance) == (
            "Be brief.\n\nCount.", "high", False,
        )  # fmt: skip
        assert request.options.caption_sampling == Sampling(max_tokens=128, seed=3)

    async def test_without_words_the_preset_or_the_default_is_the_prompt(self, gateway: Gateway) -> None:
        turns = [Turn("user", (ImageBytes(PNG),))]
        assert gateway.service.from_chat(turns, {}).options.words == CREATIVE_SEARCH_PROMPT
        assert gateway.service.from_chat(turns, {"preset": "tags"}).options.words == PRESETS["tags"]

    @pytest.mark.parametrize(
        ("turns", "code"),
        [
            ([Turn("user", ("Hi",))], "image_missing"),
            ([Turn("user", (ImageBytes(PNG), ImageBytes(PNG)))], "too_many_images"),
            ([Turn("user", (ImageBytes(PNG),)), Turn("assistant", ("Hm",)), Turn("user", ("?",))],
             "conversation_unsupported"),
        ],
        ids=["no image", "two images", "a conversation"],
    )  # fmt: skip
    async def test_what_it_cannot_answer_is_400(self, gateway: Gateway, turns: Any, code: str) -> None:
        with pytest.raises(BadRequest) as raised:
            gateway.service.from_chat(turns, {})
        assert raised.value.code == code

    async def test_stop_sequences_are_refused(self, gateway: Gateway) -> None:
        with pytest.raises(InvalidParameter):
            gateway.service.from_chat([Turn("user", (ImageBytes(PNG),))], {"stop": ["x"]})

    async def test_the_text_is_streamed_and_then_whole(self, gateway: Gateway) -> None:
        streaming_by(gateway, "A red square ", "rests on white", DONE)
        *pieces, whole = await self.told(gateway, wanted(ImageBytes(PNG)))
        assert pieces == ["A red square ", "rests on white", "."]
        assert isinstance(whole, Completion)
        assert (whole.text, whole.usage) == (PROSE, Usage(49, 19, 9, 8))

    async def test_without_enhancement_it_comes_at_once(self, gateway: Gateway) -> None:
        text, whole = await self.told(gateway, wanted(ImageBytes(PNG), enhance=False))
        assert (text, whole.text) == (CAPTION, CAPTION)

    async def test_an_enhancement_that_fails_at_once_leaves_the_caption(self, gateway: Gateway) -> None:
        streaming_by(gateway, BROKEN)
        text, whole = await self.told(gateway, wanted(ImageBytes(PNG)))
        assert (text, whole.text) == (CAPTION, CAPTION)

    async def test_one_that_breaks_off_cannot_be_taken_back(self, gateway: Gateway) -> None:
        streaming_by(gateway, "A red", BROKEN)
        with pytest.raises(Unavailable) as raised:
            await self.told(gateway, wanted(ImageBytes(PNG)))
        assert raised.value.code == "enhancer_failed"


class TestPresets:
    @pytest.mark.parametrize("preset", PRESETS)
    async def test_reach_the_caption_step(self, gateway: Gateway, preset: str) -> None:
        await gateway.caption(s3_uri=URI, preset=preset)
        tensor = gateway.describe.calls[0].input("prompt")
        assert tensor is not None
        assert tensor.texts() == (PRESETS[preset],)

    @pytest.mark.parametrize("preset", ["haiku", 5, []], ids=str)
    async def test_an_unknown_one_is_422(self, gateway: Gateway, preset: object) -> None:
        await gateway.refused(422, s3_uri=URI, preset=preset)

    async def test_sampling_reaches_both_steps(self, gateway: Gateway) -> None:
        await gateway.caption(s3_uri=URI, max_tokens=9, temperature=0.5, seed=3)
        for step in (gateway.describe, gateway.enhance):
            said = step.calls[0].parameters
            assert (said["max_tokens"], said["temperature"], said["seed"]) == (9, 0.5, 3)


class TestImageReferences:
    """Every place that takes an image by reference takes https, data URI and s3://; `s3_uri` takes S3 alone."""

    DATA = "data:image/png;base64," + base64.b64encode(PNG).decode()

    @pytest.mark.parametrize("name", ["image", "image_url"])
    @pytest.mark.parametrize(
        ("text", "source"),
        [("https://a/b.png", ImageUrl("https://a/b.png")), (URI, ImageS3(URI)), (DATA, ImageBytes(PNG))],
        ids=["https", "s3", "data"],
    )
    async def test_native_and_v1(self, gateway: Gateway, name: str, text: str, source: ImageSource) -> None:
        await gateway.caption(**{name: text})
        assert gateway.shelf.fetched == [source]
        (request,) = gateway.service.from_v1({"instances": [{name: text}]})
        assert request.image == source

    async def test_v2(self, gateway: Gateway) -> None:
        texts = ["https://a/b.png", URI, self.DATA]
        requests = gateway.service.from_v2(v2.InferRequest((v2.Tensor.of_texts("image", texts),)))
        assert [request.image for request in requests] == [ImageUrl(texts[0]), ImageS3(URI), ImageBytes(PNG)]

    @pytest.mark.parametrize("text", ["https://a/b.png", DATA, "bucket/key"], ids=["https", "data", "bare"])
    async def test_s3_uri_is_for_s3_in_v1_too(self, gateway: Gateway, text: str) -> None:
        with pytest.raises(BadRequest) as raised:
            gateway.service.from_v1({"instances": [{"s3_uri": text}]})
        assert raised.value.code == "s3_uri_invalid"


class TestForeignSteps:
    """A caption step that is not ours gets a small picture without metadata."""

    @pytest.mark.parametrize(("kind", "sent"), [("JPEG", "JPEG"), ("TIFF", "PNG"), ("WEBP", "JPEG")])
    async def test_images_are_drawn_anew(self, kind: str, sent: str) -> None:
        service = PipelineService(settings(describe_protocol="openai", describe_max_width=64), sources=Shelf())
        file = io.BytesIO()
        exif = Image.Exif()
        exif[0x010F] = "a camera"
        Image.new("RGB", (200, 100), "red").save(file, kind, exif=exif)
        ((image, _),) = await service.preprocess(
            [PipelineRequest(ImageBytes(file.getvalue(), "a"))], Context("r-1", Deadline.after(60))
        )
        picture = Image.open(io.BytesIO(image.data))
        assert (picture.format, picture.size, dict(picture.getexif())) == (sent, (64, 32), {})
        await service.close()

    async def test_ours_get_the_bytes_as_they_came(self, gateway: Gateway) -> None:
        await gateway.caption(image=base64.b64encode(PNG).decode())
        assert gateway.describe.calls[0].inputs[0].data == (PNG,)

    async def test_each_step_has_its_key_protocol_and_breaker(self) -> None:
        service = PipelineService(
            settings(enhance_url="http://b/v1", enhance_protocol="openai", enhance_api_key="sk", step_api_key="k")
        )
        assert set(service.breakers) == {"caption", "enhance"}
        keys = [step._key() for step in (service._steps.caption, service._steps.enhance)]  # type: ignore[union-attr]
        assert keys == [{"x-api-key": "k"}, {"authorization": "Bearer sk"}]
        await service.close()


async def test_a_smaller_look_is_told_by_every_protocol(gateway: Gateway) -> None:
    said = gateway.describe.parameters() | {"downscaled": True}
    answer = v2.InferResponse("describe", (v2.Tensor.of_texts("text", [CAPTION]),), said)
    gateway.describe.reply = lambda call: httpx.Response(200, content=v2.render_response(answer, call)[0])
    assert (await gateway.caption(s3_uri=URI))["downscaled"] is True
    results = await gateway.run([wanted(ImageBytes(PNG))])
    assert gateway.service.to_v1(results)["predictions"][0]["downscaled"] is True
    assert gateway.service.to_v2(results).parameters["downscaled"] is True


async def test_the_service_builds_its_own_parts() -> None:
    service = PipelineService(settings(enhance_url="http://127.0.0.1:9", step_api_key="k"))
    assert (service.name, service.metadata()["enhance_by_default"]) == ("pipeline", True)
    await service.close()


def test_openapi_tells_the_bodies(build: Build) -> None:
    schema = application(PipelineService(settings())).openapi()
    post = schema["paths"]["/caption"]["post"]
    content = post["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data", "image/*"}
    assert set(content["application/json"]["schema"]["properties"]) == {
        "s3_uri", "image", "image_url", "image_path", "prompt", "preset", "detailed", "use_gpt_oss", "reasoning_level",
        "strict", "explain", "max_tokens", "temperature", "top_p", "seed", "stream",
    }  # fmt: skip
    assert content["multipart/form-data"]["schema"]["required"] == ["image"]
    answer = schema["components"]["schemas"]["CaptionAnswer"]
    assert answer["required"] == ["caption", "enhanced"]
    assert {"400", "422", "503", "504"} < set(post["responses"])
    assert set(schema["components"]["schemas"]["HealthAnswer"]["properties"]) == {
        "ok", "backend", "device", "gpt_oss_enabled", "gpt_oss_model", "gpt_oss_reasoning_level",
    }  # fmt: skip
