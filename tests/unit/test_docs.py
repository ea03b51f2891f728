"""`/docs` needs no network, and the document is that of our own routes."""

import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from sightline.server.model import MODELS
from sightline.server.serve import build_app


def app_of(name: str, **settings: object) -> FastAPI:
    model_type = MODELS[name]
    built = model_type.settings_type(_env_file=None, **settings)  # type: ignore[call-arg]
    return build_app({name: model_type(built)}, built)  # type: ignore[arg-type]


@pytest.fixture(params=["describe", "enhance", "pipeline"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    app = app_of(request.param, api_keys="key")
    headers = {"X-API-Key": "key"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", headers=headers) as client:
        yield client


async def test_the_page_loads_nothing(client: httpx.AsyncClient) -> None:
    page = await client.get("/docs")

    assert page.headers["content-type"].startswith("text/html")
    html = re.sub(r"<(script|style)>.*?</\1>", "", page.text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["'](?!data:)""", html), html
    assert page.text.count("</script>") == 2, "nothing inside a script ends it"


async def test_the_document_tells_which_routes_want_a_key(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()

    assert document["security"] == [{"ApiKey": []}, {"Bearer": []}]
    assert document["paths"]["/v2/health/live"]["get"]["security"] == []
    assert document["paths"]["/v2/models/{model_name}/ready"]["get"]["security"] == []
    assert "security" not in document["paths"]["/v2/models/{model_name}/infer"]["post"]
    assert "security" not in document["paths"]["/v1/chat/completions"]["post"]


async def test_both_want_a_key_themselves(client: httpx.AsyncClient) -> None:
    for path in ("/docs", "/openapi.json"):
        assert (await client.get(path, headers={"X-API-Key": "wrong"})).status_code == 403


def test_a_server_without_keys_does_not_pretend_to_want_one() -> None:
    assert "security" not in app_of("enhance", auth="off").openapi()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
async def test_a_browser_without_a_network_shows_every_route(client: httpx.AsyncClient, tmp_path: Path) -> None:
    from playwright.async_api import async_playwright

    file = tmp_path / "docs.html"
    file.write_text((await client.get("/docs")).text)
    document = (await client.get("/openapi.json")).json()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = await browser.new_page()
        await page.context.set_offline(True)
        await page.goto(file.as_uri())
        await page.wait_for_selector(".opblock")
        shown = await page.eval_on_selector_all("[data-path]", "nodes => nodes.map(node => node.dataset.path)")
        await browser.close()

    assert set(shown) == set(document["paths"])
