"""The requests of batches that this process does itself: asked of its own application, without a network.

They pass the guard and every route as any other request does: with limits, deadline, queue, log line and metrics, and
for whoever made the batch. So a batch gives what its requests would have given one by one.
"""

import math
from collections import OrderedDict

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from sightline.jobs.asking import Asker, readiness
from sightline.jobs.items import Item, Line
from sightline.jobs.pace import Pace
from sightline.jobs.page import Input, Location, Outputs, Page, Target
from sightline.jobs.runner import Job
from sightline.server.guard import PRINCIPAL

KNOWN_BATCHES = 64
NOWHERE = Location("memory://")
"""The runner knows where a batch is kept; whoever asks need not."""


class BatchCalls:
    """Does one request of a batch; a `runner.Do`.

    app      the whole application, guard included
    width    requests that are open at once
    seconds  deadline of one request
    """

    def __init__(self, app: ASGIApp, *, width: int, seconds: float) -> None:
        self._app = app
        self._width = width
        self._target = Target("http://sightline", kind="openai", timeout_seconds=seconds)
        self._probe = self._client("")
        # A batch has a window that ends it; until then it waits for its models, however long they are away.
        self._pace = Pace(width, readiness(self._page_of("probe"), self._probe), patience_seconds=math.inf)
        self._askers: OrderedDict[str, Asker] = OrderedDict()

    async def __call__(self, job: Job, item: Item) -> Line:
        asker = self._askers.get(job.id)
        if asker is None:
            asker = Asker(self._page_of(job.id), _no_image, self._pace, client=self._client(job.principal))
            self._askers[job.id] = asker
            while len(self._askers) > KNOWN_BATCHES:
                self._askers.popitem(last=False)
        return await asker(item)

    async def aclose(self) -> None:
        await self._pace.aclose()
        await self._probe.aclose()

    def _client(self, principal: str) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(_as(self._app, principal), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, trust_env=False)

    def _page_of(self, uid: str) -> Page:
        return Page(
            name=uid,
            uid=uid,
            fingerprint="",
            input=Input("upload", NOWHERE, format="OpenAIBatch"),
            outputs=Outputs(NOWHERE),
            target=self._target,
            max_in_flight=self._width,
        )


def _as(app: ASGIApp, principal: str) -> ASGIApp:
    async def inside(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, PRINCIPAL: principal}, receive, send)

    return inside


async def _no_image(item: Item) -> bytes:
    raise ValueError(f"{item.custom_id} has no image beside its body")
