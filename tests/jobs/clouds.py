"""What obstore needs of Google's and Azure's object stores, in memory: requests, conditions, listings.

with serving_clouds() as clouds:
    …                        `gs://bucket/…` with the endpoint clouds.google, `az://container/…` with clouds.azure
    clouds.objects           {"bucket/key": data}
"""

import contextlib
import hashlib
import re
from collections.abc import AsyncGenerator, Generator
from dataclasses import dataclass, field
from urllib.parse import unquote
from xml.sax.saxutils import escape

from aiohttp import web

from tests.jobs.threads import looping

MODIFIED = "Sat, 21 Nov 2026 00:00:00 GMT"


def etag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@dataclass
class Clouds:
    """Both stores. A container of Azure's is `<account>/<container>` in the path, as its emulator has it.

    page  objects of one page of a listing
    """

    url: str = ""
    page: int = 3
    objects: dict[str, bytes] = field(default_factory=dict[str, bytes])
    conditions: list[str] = field(default_factory=list[str])
    """Headers that asked for a write only where nothing is."""

    @property
    def google(self) -> str:
        return f"{self.url}/google"

    @property
    def azure(self) -> str:
        return f"{self.url}/azure"

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncGenerator[None]:
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{cloud:google|azure}/{tail:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield
        finally:
            await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        cloud, path = request.match_info["cloud"], request.match_info["tail"].strip("/")
        if request.method == "PUT":
            return await self._put(request, cloud, path)
        if request.method == "DELETE":
            gone = self.objects.pop(path, None) is None
            return web.Response(status=404 if gone else 202 if cloud == "azure" else 204)
        if request.method == "POST":
            return self._delete_many(await request.text())
        if "/" not in path:
            return self._list(request, cloud, path)
        return self._get(request, path)

    async def _put(self, request: web.Request, cloud: str, path: str) -> web.Response:
        name, value = ("If-None-Match", "*") if cloud == "azure" else ("x-goog-if-generation-match", "0")
        data = await request.read()
        if request.headers.get(name) == value:
            self.conditions.append(name)
            if path in self.objects:
                return web.Response(status=409 if cloud == "azure" else 412)
        self.objects[path] = data
        headers = {"ETag": etag_of(data), "x-goog-generation": "1", "x-ms-version-id": "1"}
        return web.Response(status=201 if cloud == "azure" else 200, headers=headers)

    def _get(self, request: web.Request, path: str) -> web.Response:
        data = self.objects.get(path)
        if data is None:
            return web.Response(status=404)
        etag = etag_of(data)
        if request.headers.get("If-Match", etag) != etag:
            return web.Response(status=412)
        headers = {"ETag": etag, "Last-Modified": MODIFIED, "x-goog-generation": "1", "x-ms-version-id": "1"}
        if (asked := request.http_range).start is None or request.method == "HEAD":
            return web.Response(body=data, headers=headers)
        part = data[asked]
        headers["Content-Range"] = f"bytes {asked.start}-{asked.start + len(part) - 1}/{len(data)}"
        return web.Response(status=206, body=part, headers=headers)

    def _delete_many(self, text: str) -> web.Response:
        """Azure's batch, which obstore deletes with: a request in each part, and an answer to each."""
        paths = re.findall(r"^DELETE /(?:azure/)?(\S+) HTTP", text, re.MULTILINE)
        parts = ""
        for number, path in enumerate(paths):
            gone = self.objects.pop(unquote(path), None) is None
            status = "404 The specified blob does not exist." if gone else "202 Accepted"
            parts += f"--b\r\nContent-Type: application/http\r\nContent-ID: {number}\r\n\r\nHTTP/1.1 {status}\r\n\r\n"
        headers = {"Content-Type": "multipart/mixed; boundary=b"}
        return web.Response(status=202, body=f"{parts}--b--\r\n".encode(), headers=headers)

    def _list(self, request: web.Request, cloud: str, bucket: str) -> web.Response:
        query = request.query
        after = query.get("marker") or query.get("continuation-token") or query.get("start-after") or ""
        prefix = query.get("prefix", "")
        names = sorted(name.removeprefix(f"{bucket}/") for name in self.objects if name.startswith(f"{bucket}/"))
        found = [name for name in names if name.startswith(prefix) and name > after]
        page, more = found[: self.page], len(found) > self.page
        text = (self._azure if cloud == "azure" else self._google)(bucket, page, page[-1] if more else "")
        return web.Response(text=text, content_type="application/xml")

    def _google(self, bucket: str, page: list[str], token: str) -> str:
        rows = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{len(data)}</Size><ETag>{escape(etag_of(data))}</ETag>"
            "<LastModified>2026-11-21T00:00:00.000Z</LastModified></Contents>"
            for name in page
            for data in (self.objects[f"{bucket}/{name}"],)
        )
        more = f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else ""
        return f"<ListBucketResult><IsTruncated>{str(bool(token)).lower()}</IsTruncated>{more}{rows}</ListBucketResult>"

    def _azure(self, bucket: str, page: list[str], token: str) -> str:
        rows = "".join(
            f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{MODIFIED}</Last-Modified>"
            f"<Content-Length>{len(data)}</Content-Length><Content-Type>application/octet-stream</Content-Type>"
            f"<Etag>{escape(etag_of(data))}</Etag></Properties></Blob>"
            for name in page
            for data in (self.objects[f"{bucket}/{name}"],)
        )
        return (
            f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ContainerName="{bucket}"><Blobs>{rows}</Blobs>'
            f"<NextMarker>{escape(token)}</NextMarker></EnumerationResults>"
        )


@contextlib.contextmanager
def serving_clouds() -> Generator[Clouds]:
    """In a thread of this process, until the block ends."""
    clouds = Clouds()
    with looping(clouds.serving):
        yield clouds
