"""One item of a batch asked of its target over HTTP: fetched, sent, repeated where that is safe, and made one line.

What counts as an attempt is what says something about the item: an error of a target that works. A target that is busy
(429) or away (503, no connection, a proxy's 502) says nothing about it; then the item waits, as do all the others, for
as long as `Pace` is patient. But a target that works for others, or says that it is ready, and again and again not for
this item, has said something after all: from the second time on that is an attempt.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import httpx

from sightline.jobs import metrics, target
from sightline.jobs.items import Code, Fault, Item, Line, StepName
from sightline.jobs.objects import AccessDenied, BucketMissing, Changed, Missing, StoreUnavailable, TooLarge
from sightline.jobs.page import Page
from sightline.jobs.pools import Pools
from sightline.jobs.target import Answer, Outgoing, Refusal, Success
from sightline.wire import BATCH_PRIORITY, PRIORITY_HEADER, REQUEST_ID_HEADER, REVISION_HEADER, TIMEOUT_HEADER

if TYPE_CHECKING:
    from sightline.jobs.pace import Pace
    from sightline.jobs.reuse import Reuse

log = logging.getLogger("sightline.jobs")

Fetch = Callable[[Item], Awaitable[bytes]]
"""The bytes of an item's image as it was planned (If-Match). Raises `objects`' Missing, Changed, AccessDenied, …"""

CONNECT_SECONDS = 5.0
SPARE_SECONDS = 5.0
"""More than the target was given, so that it is the target that says 504."""
READY_SECONDS = 3.0
MAX_IMAGE_BYTES = 20 * 1024 * 1024
DENIED_IN_A_ROW = 20


class RevisionMismatch(Exception):
    """The target answers with another revision than the batch's (exit code 44)."""


class TargetRefuses(Exception):
    """The target takes none of our keys (exit code 42, AccessDenied)."""


class Asker:
    """Asks one target for a whole batch; a `shard.Do`.

    page             its target, options and attempts
    fetch            the bytes of an item with a `uri`
    pace             how many calls are open at once, and when all of them wait
    reuse            results by content, where the page wants that
    max_image_bytes  more are `input_too_large`, without being fetched where the plan knows the size
    client           stays the caller's to close
    """

    def __init__(
        self,
        page: Page,
        fetch: Fetch,
        pace: Pace,
        *,
        reuse: Reuse | None = None,
        client: httpx.AsyncClient | None = None,
        max_image_bytes: int = MAX_IMAGE_BYTES,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._page = page
        self._fetch = fetch
        self._pace = pace
        self._reuse = reuse
        self._own = None if client else new_client(page)
        self._client = client or self._own or new_client(page)
        self._max_image_bytes = max_image_bytes
        self._wall = wall
        self._key = _read_key(page)
        self._denied = 0
        self._has_fetched = False
        self._has_succeeded = False

    async def __call__(self, item: Item) -> Line:
        """Fetch, ask, and say what became of it.

        Raises RevisionMismatch, TargetRefuses, pace.TargetGone and StoreUnavailable after too long an outage, and
        AccessDenied or BucketMissing when no image can be fetched at all.
        """
        begun = self._wall()
        image = b""
        if item.uri and not item.url:
            found = await self._fetched(item, begun)
            if isinstance(found, Fault):
                return self._line(item, found)
            image = found
        outgoing = target.write(self._page, item, image)
        if isinstance(outgoing, Refusal):
            return self._line(item, self._fault(outgoing, begun, 1, None))
        if self._reuse is None:
            return self._line(item, await self._asked(item, outgoing, begun))
        key = target.digest(self._page, item, image)
        return self._line(item, await self._reuse.result(key, lambda: self._asked(item, outgoing, begun)))

    async def aclose(self) -> None:
        """Close the connections that are ours."""
        if self._own is not None:
            await self._own.aclose()

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # --- the image ---------------------------------------------------------------------------------------------------

    async def _fetched(self, item: Item, begun: float) -> bytes | Fault:
        """The bytes of an item. A store that is away is waited for, as the target is."""
        if item.size is not None and item.size > self._max_image_bytes:
            return self._too_large(begun)
        tried, silent_since = 0, self._wall()
        while True:
            try:
                data = await self._fetch(item)
            except StoreUnavailable:
                tried += 1
                if self._wall() - silent_since > self._pace.patience_seconds:
                    raise
                await self._pace.pause(tried)
            except TooLarge:
                return self._too_large(begun)
            except (Missing, Changed, AccessDenied, BucketMissing, ValueError) as error:
                return self._absent(error, begun)
            else:
                self._has_fetched = True
                metrics.FETCHED_BYTES.inc(len(data))
                return data if len(data) <= self._max_image_bytes else self._too_large(begun)

    def _absent(self, error: Exception, begun: float) -> Fault:
        """Why there is no image. Raises AccessDenied or BucketMissing when there is none for anybody."""
        if isinstance(error, AccessDenied | BucketMissing) and not self._has_fetched:
            self._denied += 1
            if self._denied >= min(DENIED_IN_A_ROW, self._page.chunk_size):  # before a chunk is full of such lines
                raise error
        code, words = _ABSENT.get(type(error), ("unsupported_media", "The item has no address that can be fetched."))
        return Fault("fetch", code, words, None, 1, begun, self._wall())

    def _too_large(self, begun: float) -> Fault:
        words = f"The image has more than {self._max_image_bytes} bytes."
        return Fault("fetch", "input_too_large", words, None, 1, begun, self._wall())

    # --- the target --------------------------------------------------------------------------------------------------

    async def _asked(self, item: Item, outgoing: Outgoing, begun: float) -> Success | Fault:
        """Ask until there is a result, or as often as the page allows."""
        attempts = tried = 0
        worked: int | None = None
        while True:
            before = self._pace.signs
            answer, verdict = await self._call(item, outgoing)
            if isinstance(verdict, Success):
                self._has_succeeded = True
                return verdict
            tried += 1
            if verdict.health == "answered" or verdict.code == "caption_timeout":
                says_of_item = answer is not None or self._pace.signs > before
            elif verdict.health == "refused":
                says_of_item = worked is not None and self._pace.signs > worked
                worked = self._pace.signs
            else:
                says_of_item = False
            attempts += says_of_item
            if not verdict.may_retry or attempts >= self._page.max_attempts:
                return self._fault(verdict, begun, max(attempts, 1), answer)
            metrics.REPEATS.labels(verdict.code).inc()
            if verdict.health == "answered":
                await self._pace.repeat()
            await self._pace.pause(tried, verdict.retry_after)

    async def _call(self, item: Item, outgoing: Outgoing) -> tuple[Answer | None, Success | Refusal]:
        """One call in its turn, and what it means. The answer is None when there was none."""
        async with self._pace.turn() as number:
            started = time.monotonic()
            try:
                answer = await self._sent(item, outgoing)
            except httpx.TimeoutException as error:
                answer, verdict = None, _no_answer_in_time(error)
            except httpx.TransportError as error:
                log.debug("no answer: %r", error)
                answer, verdict = None, _NO_CONNECTION
            else:
                verdict = target.read(self._page, item, answer)
            status = str(answer.status) if answer else "none"
            metrics.CALL_SECONDS.labels(status).observe(time.monotonic() - started)
            if isinstance(verdict, Success) or verdict.health == "answered":
                self._pace.answered()
            elif verdict.health == "throttled":
                self._pace.throttled(number)
            else:
                self._pace.refused(number)
        return answer, verdict

    async def _sent(self, item: Item, outgoing: Outgoing) -> Answer:
        """Raises httpx.TransportError, RevisionMismatch, TargetRefuses."""
        answer = await self._post(item, outgoing)
        if target.refuses_us(answer) and (key := _read_key(self._page)) != self._key:
            self._key = key  # rotated
            answer = await self._post(item, outgoing)
        told, wanted = answer.headers.get(REVISION_HEADER), self._page.target.revision
        if told and wanted and told != wanted:
            raise RevisionMismatch(f"the target answers with revision {told[:64]}, the batch is of {wanted}")
        if target.refuses_us(answer) and (answer.status == 401 or not self._has_succeeded):
            raise TargetRefuses(f"the target refuses our key (status {answer.status})")
        return answer

    async def _post(self, item: Item, outgoing: Outgoing) -> Answer:
        said = self._page.target
        headers = {
            **outgoing.headers,
            PRIORITY_HEADER: BATCH_PRIORITY,
            TIMEOUT_HEADER: str(int(said.timeout_seconds * 1000)),
            REQUEST_ID_HEADER: request_id(self._page, item),
        }
        if self._key is not None:
            headers |= {"authorization": f"Bearer {self._key}"} if said.kind == "openai" else {"x-api-key": self._key}
        response = await self._client.post(_parsed(outgoing.url), content=outgoing.body, headers=headers)
        return Answer(response.status_code, response.headers, response.content)

    # --- lines -------------------------------------------------------------------------------------------------------

    def _fault(self, refusal: Refusal, begun: float, attempts: int, answer: Answer | None) -> Fault:
        status = answer.status if answer else None
        return Fault(refusal.step, refusal.code, refusal.message, status, attempts, begun, self._wall())

    def _line(self, item: Item, outcome: Success | Fault) -> Line:
        """`size` is the plan's, not the one that came: a line that is read back after a kill must count the same."""
        size = item.size or 0
        if isinstance(outcome, Fault):
            metrics.ITEMS.labels(outcome.code).inc()
            return Line(item, fault=outcome, size=size)
        metrics.ITEMS.labels("unenhanced" if outcome.is_unenhanced else "ok").inc()
        return Line(
            item,
            outcome.result,
            size=size,
            is_unenhanced=outcome.is_unenhanced,
            prompt_tokens=outcome.prompt_tokens,
            completion_tokens=outcome.completion_tokens,
        )


_ABSENT: dict[type[Exception], tuple[Code, str]] = {
    Missing: ("input_not_found", "There is no such image."),
    BucketMissing: ("input_not_found", "There is no such bucket."),
    AccessDenied: ("input_not_found", "The image may not be read."),
    Changed: ("input_changed", "The image is not the one that was planned."),
}
_CAPTION: StepName = "caption"
_NO_CONNECTION = Refusal(_CAPTION, "caption_unavailable", "The target could not be reached.", "refused", may_retry=True)


def _no_answer_in_time(error: httpx.TimeoutException) -> Refusal:
    """Waiting for a connection is an outage; waiting for an answer may be the item's fault."""
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        return _NO_CONNECTION
    return Refusal(_CAPTION, "caption_timeout", "The target did not answer in time.", "refused", may_retry=True)


_parsed = functools.lru_cache(256)(httpx.URL)
"""The same address for nearly all items of a batch."""


def new_client(page: Page) -> httpx.AsyncClient:
    """A connection pool for a batch's target. It ignores the proxies of the environment and follows no redirects."""
    seconds = page.target.timeout_seconds + SPARE_SECONDS
    return httpx.AsyncClient(
        transport=Pools(page.max_in_flight),
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS),
    )


def readiness(page: Page, client: httpx.AsyncClient) -> Callable[[], Awaitable[bool]]:
    """What `Pace` asks during an outage."""

    async def is_ready() -> bool:
        try:
            answer = await client.get(target.ready_url(page.target), timeout=READY_SECONDS)
        except httpx.TransportError:
            return False
        return target.is_ready(page.target, answer.status_code, answer.content)

    return is_ready


def request_id(page: Page, item: Item) -> str:
    """The same for every attempt at an item, so that the target's log tells its whole story."""
    return f"batch-{page.uid[:36]}-{hashlib.sha256(item.custom_id.encode()).hexdigest()[:16]}"


def _read_key(page: Page) -> str | None:
    """The first key of the file. Raises TargetRefuses when there is a file without one."""
    file = page.target.api_key_file
    if file is None:
        return None
    try:
        keys = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise TargetRefuses(f"{file} cannot be read") from error
    if not keys:
        raise TargetRefuses(f"{file} holds no key")
    return keys[0]
