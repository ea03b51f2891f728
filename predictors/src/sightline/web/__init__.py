"""The page at `/`: one HTML file that captions pictures by the routes of whatever server it came from."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

FILE = Path(__file__).parent / "index.html"


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers: no script, style or address may be used that is not in the file itself."""
    html = FILE.read_text(encoding="utf-8")
    policy = (
        "default-src 'none'; "
        f"script-src {_hash(html, 'script')}; style-src {_hash(html, 'style')}; "
        "img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return html.encode(), headers


def _hash(html: str, tag: str) -> str:
    """What a Content-Security-Policy calls the one inline script or style of the page."""
    (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"


def add_page(router: APIRouter) -> None:
    """Answer `GET /` with the page."""

    @router.get("/", response_class=HTMLResponse, summary="Page", tags=["page"])
    async def root() -> HTMLResponse:  # pyright: ignore[reportUnusedFunction]
        """A page for browsers: pick or drop pictures, read their captions."""
        html, headers = page()
        return HTMLResponse(html, headers=headers)
