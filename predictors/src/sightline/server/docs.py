"""`/docs` and `/openapi.json`: the true document of our routes, and a page for it that needs no network.

FastAPI's own page loads Swagger UI from a CDN, and asks for the document in a second request, which a browser would
send without the key. Here both are inside the page, so one authorised request brings all of it.
"""

import re
from functools import cache
from html import escape
from importlib.resources import files

import orjson
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from sightline.server.document import complete
from sightline.server.guard import is_open
from sightline.services.base import Json
from sightline.services.bodies import json_response

_SCHEMES: Json = {
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer", "description": "The same key."},
}


def add_docs(app: FastAPI, *, asks_for_keys: bool) -> None:
    """Add the two routes. The document is made now, before KServe adds routes of its own, which ours hide.

    app   made with `docs_url=None` and `openapi_url=None`
    """
    document = complete(app.openapi())
    if asks_for_keys:
        document = _with_keys(document)
    app.openapi = lambda: document
    app.add_api_route("/openapi.json", lambda: json_response(document), include_in_schema=False, response_model=None)
    app.add_api_route("/docs", lambda: HTMLResponse(_page(document)), include_in_schema=False, response_model=None)


def _with_keys(document: Json) -> Json:
    """Say which routes want a key: all but the probes."""
    document.setdefault("components", {})["securitySchemes"] = _SCHEMES
    document["security"] = [{name: []} for name in _SCHEMES]
    for path, operations in document["paths"].items():
        if is_open(path):
            for operation in operations.values():
                operation["security"] = []
    return document


def _page(document: Json) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(document["info"]["title"])}</title>
<link rel="icon" href="data:,">
<style>{_asset("swagger-ui.css")}</style>
</head>
<body>
<div id="docs"></div>
<script>{_inside_script(_asset("swagger-ui-bundle.js"))}</script>
<script>
SwaggerUIBundle({{
  dom_id: "#docs", presets: [SwaggerUIBundle.presets.apis], layout: "BaseLayout", deepLinking: true, validatorUrl: null,
  spec: {_inside_script(orjson.dumps(document).decode())},
}});
</script>
</body>
</html>
"""


def _inside_script(text: str) -> str:
    """Nothing in it may end the element; in the texts of JSON and JavaScript the backslash changes nothing."""
    return re.sub("</(?=script)", r"<\\/", text, flags=re.IGNORECASE)


@cache
def _asset(name: str) -> str:
    return (files("fastapi_offline") / "static" / name).read_text(encoding="utf-8")
