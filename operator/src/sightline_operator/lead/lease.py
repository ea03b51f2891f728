"""Leadership by a coordination.k8s.io Lease: 15 s long, renewed within 10 s, tried every 2 s; client-go's rules.

A Lease held by another is expired when *we* have seen it unchanged for its duration: no two clocks are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from sightline_operator.act.client import ApiError, Client, Conflict
from sightline_operator.resources import LEASES

DURATION_SECONDS = 15
RENEW_DEADLINE_SECONDS = 10.0
RETRY_SECONDS = 2.0


class LeaseLost(Exception):
    """Another process leads, or we could not renew in time; whatever this one does next may be wrong."""


class Leader:
    """Candidate for, then holder of, one Lease."""

    def __init__(
        self,
        client: Client,
        *,
        namespace: str,
        name: str,
        identity: str,
        monotonic: Callable[[], float] | None = None,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._client = client
        self._namespace, self._name, self._identity = namespace, name, identity
        self._monotonic = monotonic or asyncio.get_running_loop().time
        self._wall = wall
        self._seen: tuple[str, float] = ("", 0.0)
        """resourceVersion of the Lease as last seen, and when it was first seen so."""
        self._lease: dict[str, Any] | None = None
        self.is_leader = False

    async def acquire(self) -> None:
        """Wait until the Lease is ours."""
        while not await self._try():
            await asyncio.sleep(RETRY_SECONDS * random.uniform(1.0, 1.2))  # noqa: S311  jitter
        self.is_leader = True

    async def hold(self) -> None:
        """Renew for ever.

        Raises LeaseLost: another holds it, or ten seconds passed without a renewal.
        """
        renewed = self._monotonic()
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            left = RENEW_DEADLINE_SECONDS - (self._monotonic() - renewed)
            is_ours = False
            with contextlib.suppress(TimeoutError):
                is_ours = await asyncio.wait_for(self._try(), max(left, 0.1))
            if is_ours:
                renewed = self._monotonic()
            elif self._holder() not in (self._identity, "") or self._monotonic() - renewed > RENEW_DEADLINE_SECONDS:
                self.is_leader = False
                lease, holder = f"lease {self._namespace}/{self._name}", self._holder()
                if holder in (self._identity, ""):
                    raise LeaseLost(f"{lease} could not be renewed for {RENEW_DEADLINE_SECONDS:.0f} s")
                raise LeaseLost(f"{lease} is held by {holder}")

    async def release(self) -> None:
        """Give the Lease back, so that the next process need not wait for it to expire."""
        if not self.is_leader or self._lease is None:
            return
        self.is_leader = False
        spec = dict(self._lease["spec"]) | {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": self._now()}
        with contextlib.suppress(ApiError):
            await self._client.replace(dict(self._lease) | {"spec": spec})

    async def _try(self) -> bool:
        """One attempt to take or renew; False: not ours, or the API server did not answer."""
        try:
            lease = await self._client.get(LEASES, self._namespace, self._name)
            if lease is None:
                self._lease = await self._client.create(self._manifest({}, transitions=0))
                return True
            self._note(lease)
            holder = self._holder()
            if holder not in ("", self._identity) and not self._is_expired(lease):
                return False
            transitions = int(lease["spec"].get("leaseTransitions") or 0) + (holder != self._identity)
            self._lease = await self._client.replace(self._manifest(lease, transitions=transitions))
        except Conflict:
            return False
        except ApiError:
            return False
        return True

    def _note(self, lease: dict[str, Any]) -> None:
        version = str(lease["metadata"]["resourceVersion"])
        if version != self._seen[0]:
            self._seen = (version, self._monotonic())
        self._lease = lease

    def _is_expired(self, lease: dict[str, Any]) -> bool:
        duration = float(lease["spec"].get("leaseDurationSeconds") or DURATION_SECONDS)
        return self._monotonic() - self._seen[1] > duration

    def _holder(self) -> str:
        return str((self._lease or {}).get("spec", {}).get("holderIdentity") or "")

    def _now(self) -> str:
        return self._wall().strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def _manifest(self, lease: dict[str, Any], *, transitions: int) -> dict[str, Any]:
        old = dict(lease.get("spec") or {})
        is_ours = old.get("holderIdentity") == self._identity
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": DURATION_SECONDS,
            "acquireTime": old.get("acquireTime") if is_ours else self._now(),
            "renewTime": self._now(),
            "leaseTransitions": transitions,
        }
        metadata = lease.get("metadata") or {"name": self._name, "namespace": self._namespace}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
