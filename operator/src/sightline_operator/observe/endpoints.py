"""Asks what is outside the API server, in the background: external steps' URLs, gateways' state and batch progress."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

from sightline_operator.contract import GatewayState
from sightline_operator.observe.world import Answer
from sightline_operator.queue import Key

log = logging.getLogger(__name__)
TIMEOUT = aiohttp.ClientTimeout(total=3, sock_connect=2)
MAX_ANSWER_BYTES = 65_536
OK_SECONDS, FAILED_SECONDS, PROGRESS_SECONDS = 60.0, 10.0, 15.0
STATE_SECONDS, TROUBLED_SECONDS, SILENT_SECONDS = 30.0, 10.0, 60.0
"""Of gateways: all is well, something is not, nothing is said (their pods may be out of reach of this operator)."""

Kind = Literal["probe", "progress", "state"]
"""Whether a URL answers · how far a batch is · how a gateway is."""


@dataclass
class _Target:
    """A URL that somebody wants to know about."""

    wanted_by: set[Key] = field(default_factory=set)
    next_at: float = 0.0
    answer: Answer | None = None
    document: Mapping[str, Any] | None = None
    kind: Kind = "probe"
    asked: asyncio.Event = field(default_factory=asyncio.Event)


class Endpoints:
    """Latest answers by URL. Asking is bounded: few at a time, three seconds each, no redirects, little read."""

    def __init__(self, on_change: Callable[[Key], None], *, concurrency: int = 8) -> None:
        self._on_change = on_change
        self._targets: dict[str, _Target] = {}
        self._wanted: dict[Key, frozenset[str]] = {}
        self._slots = asyncio.Semaphore(concurrency)
        self._wake = asyncio.Event()

    def want(self, key: Key, urls: Mapping[str, Kind]) -> None:
        """What this object wants to know from now on: that a URL answers, or what JSON it answers."""
        for url in self._wanted.get(key, frozenset()) - urls.keys():
            target = self._targets[url]
            target.wanted_by.discard(key)
            if not target.wanted_by:
                del self._targets[url]
        for url, kind in urls.items():
            if url not in self._targets:
                self._targets[url] = _Target(kind=kind)
                self._wake.set()
            self._targets[url].wanted_by.add(key)
        if urls:
            self._wanted[key] = frozenset(urls)
        else:
            self._wanted.pop(key, None)

    def answers(self, urls: frozenset[str]) -> dict[str, Answer]:
        """What is known of these URLs; one not asked yet is not in it."""
        return {url: a for url in urls if (t := self._targets.get(url)) is not None and (a := t.answer) is not None}

    def document(self, url: str) -> Mapping[str, Any] | None:
        """The JSON object last answered; None: none yet, or the last attempt failed."""
        target = self._targets.get(url)
        return target.document if target else None

    def was_asked(self, url: str) -> bool:
        """Whether a URL has been asked at all, for better or worse."""
        target = self._targets.get(url)
        return target is not None and target.answer is not None

    async def asked(self, urls: frozenset[str]) -> None:
        """Wait until each of these has been asked once, so that nobody decides on "not known yet"."""
        targets = [target for url in urls if (target := self._targets.get(url)) is not None]
        await asyncio.gather(*(target.asked.wait() for target in targets))

    async def run(self) -> None:
        """Ask what is due, until cancelled."""
        loop = asyncio.get_running_loop()
        async with aiohttp.ClientSession(timeout=TIMEOUT) as session:
            while True:
                self._wake.clear()
                due = [url for url, target in self._targets.items() if target.next_at <= loop.time()]
                await asyncio.gather(*(self._ask(session, url) for url in due))
                waits = [target.next_at - loop.time() for target in self._targets.values()]
                try:
                    await asyncio.wait_for(self._wake.wait(), max(0.05, min(waits, default=3600.0)))
                except TimeoutError:
                    continue

    async def _ask(self, session: aiohttp.ClientSession, url: str) -> None:
        target = self._targets.get(url)
        if target is None:
            return
        async with self._slots:
            answer, document = await self._get(session, url, is_document=target.kind != "probe")
        target.next_at = asyncio.get_running_loop().time() + _pause(target.kind, answer, document)
        is_news = (answer, document) != (target.answer, target.document)
        target.answer, target.document = answer, document
        target.asked.set()
        if is_news:
            for key in list(target.wanted_by):
                self._on_change(key)

    @staticmethod
    async def _get(
        session: aiohttp.ClientSession, url: str, *, is_document: bool
    ) -> tuple[Answer, Mapping[str, Any] | None]:
        try:
            async with session.get(url, allow_redirects=False) as response:
                body = await response.content.read(MAX_ANSWER_BYTES) if is_document else b""
                if is_document and response.status == 200:
                    document = json.loads(body)
                    return Answer(is_ok=True), document if isinstance(document, dict) else None
                # Whoever answers at all is there: 401 and 404 at the root are what many model servers say.
                is_ok = response.status < 500
                return Answer(is_ok, "" if is_ok else f"HTTP {response.status}"), None
        except TimeoutError:
            return Answer(False, f"no answer in {TIMEOUT.total:g} s"), None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Answer(False, _said(error)), None


def _pause(kind: Kind, answer: Answer, document: Mapping[str, Any] | None) -> float:
    """Seconds until it is worth asking again."""
    if kind == "progress":
        return PROGRESS_SECONDS
    if kind == "probe":
        return OK_SECONDS if answer.is_ok else FAILED_SECONDS
    said = GatewayState.read(document)
    return SILENT_SECONDS if said is None else STATE_SECONDS if said.is_well else TROUBLED_SECONDS


def _said(error: Exception) -> str:
    """The cause in a few words, without addresses that change from one attempt to the next."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect: {error.os_error.strerror or type(error.os_error).__name__}"
    return type(error).__name__
