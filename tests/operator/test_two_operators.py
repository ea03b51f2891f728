"""Two operators at once, their clocks ten minutes apart, one of which stood still while the other took over."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.operator.conftest import ApiServer
from tests.operator.harness import process, until
from tests.operator.live import Live, is_true, living

LOSER_SECONDS = 15.0
"""By when one that lost its Lease must have ended (reference/operator.md §6.2, row 8)."""


@contextlib.contextmanager
def operator(live: Live, name: str, skew: float) -> Iterator[Any]:
    namespace = live.user.namespace
    flags = [f"--namespace={namespace}", f"--lease-namespace={namespace}", "--metrics-port=0", f"--identity={name}"]
    flags.append(f"--gateway-url={live.gateway.url}")
    own = {"module": "tests.operator.skewed", "CLOCK_SKEW_SECONDS": str(skew)}
    with process(live.apiserver, *flags, **own) as running:
        yield running


def lease(live: Live) -> dict[str, Any]:
    return (live.user.get("Lease", "sightline-operator") or {}).get("spec") or {}


@pytest.mark.slow
@pytest.mark.parametrize("skew", [300.0, -300.0], ids=["the first is ahead", "the first is behind"])
async def test_one_that_wakes_up_beside_its_successor_ends_and_nothing_is_made_twice(
    controlled: ApiServer, tmp_path: Path, skew: float
) -> None:
    with controlled.namespace() as namespace:
        async with living(controlled, namespace, tmp_path) as live:
            live.input(6)
            with operator(live, "one", skew) as one:
                await until(lambda: lease(live).get("holderIdentity") == "one", "the first leads", 120)
                told = datetime.fromisoformat(lease(live)["renewTime"]) - datetime.now(UTC)
                assert abs(told - timedelta(seconds=skew)) < timedelta(seconds=60), "its clock is wrong"
                await live.serving()
                await live.running(captions=2)
                one.send_signal(signal.SIGSTOP)
                with operator(live, "two", -skew):
                    await until(lambda: lease(live).get("holderIdentity") == "two", "the second leads", 120)
                    live.user.apply(live.batch("late"))  # both see it at the same moment
                    one.send_signal(signal.SIGCONT)
                    woke = time.monotonic()
                    assert await asyncio.to_thread(one.wait, LOSER_SECONDS) == 1
                    assert time.monotonic() - woke < LOSER_SECONDS
                    live.gateway.stops_after = float("inf")
                    for name in ("b", "late"):
                        cr = await live.ended(name)
                        assert is_true(cr, "Complete")
                        assert live.is_once(cr, 6)
            assert lease(live)["leaseTransitions"] == 1
            assert "leadership lost" in one.log.read_text()
