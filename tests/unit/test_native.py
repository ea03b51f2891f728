"""Native routes that several services of one process answer: who is asked, and what the document says."""

import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from sightline.server.native import NativeRoutes
from sightline.services.bodies import json_response


class Answer(BaseModel):
    said_by: str


class Service:
    """Routes that say whose they are, and how many bytes they read."""

    def __init__(self, name: str, *paths: str) -> None:
        self._name = name
        self._paths = paths

    def router(self, run: object) -> APIRouter:
        router = APIRouter(tags=[self._name])
        for path in self._paths:
            if path == "/caption":
                router.add_api_route(path, self._caption, methods=["POST"], response_model=Answer)
            elif path == "page":
                router.add_api_route("/", self._page, methods=["GET"], response_class=HTMLResponse)
            else:
                router.add_api_route(path, self._say, methods=["GET"])
        return router

    async def _caption(self, request: Request):
        fields: list[str] = []
        if request.headers.get("content-type", "").startswith("multipart"):
            with contextlib.suppress(HTTPException):
                async with request.form() as form:
                    fields = sorted(form)
        return json_response({"said_by": self._name, "bytes": len(await request.body()), "fields": fields})

    async def _say(self) -> dict[str, str]:
        return {self._name: "well", "status": "healthy"}

    async def _page(self) -> HTMLResponse:
        return HTMLResponse("<p>a page</p>")


class Model:
    def __init__(self, name: str, *paths: str, is_ready: bool = True) -> None:
        self.name = name
        self.service = Service(name, *paths)
        self._is_ready = is_ready

    async def run(self, *arguments: object) -> None: ...
    async def stream(self, *arguments: object) -> None: ...

    async def healthy(self) -> bool:
        return self._is_ready


def app_of(**models: Model) -> FastAPI:
    app = FastAPI()
    mapping: Mapping[str, Any] = models
    NativeRoutes(mapping).include_in(app)
    return app


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    app = app_of(
        pipeline=Model("chain", "/caption", "/health"),
        blip=Model("blip", "/caption", "/health", "page", "/task"),
        embed=Model("embed", "/health", "/", is_ready=False),
    )
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        yield client


class TestCaption:
    @pytest.mark.parametrize(
        ("body", "owner"),
        [
            ({"json": {"s3_uri": "s3://b/k"}}, "chain"),
            ({"json": {"s3_uri": "s3://b/k", "image_path": "/x"}}, "chain"),
            ({"json": {"image_path": "/x"}}, "blip"),
            ({"json": {"image": "aGFsbG8="}}, "chain"),
            ({"json": {}}, "chain"),
            ({"json": ["image_path"]}, "chain"),
            ({"content": b"not json"}, "chain"),
            ({"content": b'{"image_path": "/x"}', "headers": {"content-type": "text/plain"}}, "blip"),
            ({"content": b"\xff\xd8", "headers": {"content-type": "image/jpeg"}}, "blip"),
            ({"files": {"image": ("a.png", b"123")}}, "blip"),
            ({"files": {"image": ("a.png", b"123")}, "data": {"s3_uri": "s3://b/k"}}, "chain"),
            ({"files": {"file": ("a.png", b"123")}}, "chain"),
            ({"files": {"x": (None, "1")}, "data": {"image_path": "/x"}}, "blip"),
            ({"content": b"--nonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}}, "chain"),
            ({"content": b"", "headers": {"content-type": "multipart/form-data"}}, "chain"),
        ],
    )
    async def test_is_decided_by_its_body(self, client: httpx.AsyncClient, body: dict[str, Any], owner: str):
        assert (await client.post("/caption", **body)).json()["said_by"] == owner

    async def test_reaches_its_owner_whole(self, client: httpx.AsyncClient):
        data = b"x" * 3_000_000

        answer = (await client.post("/caption", files={"image": ("a.png", data)}, data={"prompt": "p"})).json()

        assert answer["bytes"] > len(data)
        assert answer["fields"] == ["image", "prompt"]


async def test_health_is_what_each_says(client: httpx.AsyncClient):
    assert (await client.get("/health")).json() == {
        "status": "healthy",
        "chain": "well",
        "blip": "well",
        "embed": "well",
        "models": {
            "chain": {"ready": True, "chain": "well", "status": "healthy"},
            "blip": {"ready": True, "blip": "well", "status": "healthy"},
            "embed": {"ready": False, "embed": "well", "status": "healthy"},
        },
    }


async def test_root_is_the_page_for_browsers_and_the_greeting_for_programs(client: httpx.AsyncClient):
    browser = await client.get("/", headers={"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert browser.text == "<p>a page</p>"
    assert (await client.get("/")).json()["embed"] == "well"
    assert (await client.get("/", headers={"Accept": "application/json"})).json()["embed"] == "well"


async def test_what_only_one_answers_is_untouched(client: httpx.AsyncClient):
    assert (await client.get("/task")).json()["blip"] == "well"


async def test_the_document_says_what_both_say(client: httpx.AsyncClient):
    document = (await client.get("/openapi.json")).json()

    caption = document["paths"]["/caption"]["post"]
    assert caption["tags"] == ["chain", "blip"]
    schema = caption["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema["properties"] == {"said_by": {"title": "Said By", "type": "string"}}
    assert set(document["paths"]["/"]["get"]["responses"]["200"]["content"]) == {"text/html", "application/json"}
    assert document == (await client.get("/openapi.json")).json(), "made once"


def test_a_path_that_nobody_can_decide_does_not_start():
    with pytest.raises(ValueError, match="blip and describe both answer GET /task"):
        app_of(blip=Model("blip", "/task"), describe=Model("describe", "/task"))
    with pytest.raises(ValueError, match="both answer POST /caption"):
        app_of(blip=Model("blip", "/caption"), embed=Model("embed", "/caption"))
