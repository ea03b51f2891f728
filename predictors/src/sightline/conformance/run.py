"""Runs checks: those whose client library must be alone in a process of their own, the others here."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import groupby

import httpx

from sightline.conformance.suite import Check, Failed, Outcome, Result, run_here, shortened
from sightline.conformance.target import Address, Target
from sightline.conformance.tensors import Json


class Unreachable(Exception):
    """Nothing answers at the address."""


def wait_until_ready(address: Address, seconds: float) -> None:
    """Wait for the models to load, as long as `seconds`; what is wrong after that is for the checks to say."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with Target(address) as target, contextlib.suppress(httpx.HTTPError, Failed):
            paths = (f"{target.model_path}/ready", "/v2/health/ready")
            if all(target.get(path).status_code == 200 for path in paths):
                return
        time.sleep(0.5)


def run(checks: Sequence[Check], address: Address, progress: Callable[[str], None] = lambda _: None) -> list[Result]:
    """Run the checks against one server, in order; `progress` hears the title of each group.

    Raises Unreachable when the server does not answer at all.
    """
    try:
        httpx.get(f"{address.url}/v2/health/live", timeout=address.timeout_seconds, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(f"{address.url} cannot be reached ({type(error).__name__})") from error
    results: list[Result] = []
    with Target(address) as target:
        for group, members in groupby(checks, key=lambda check: check.group):
            progress(group)
            together = list(members)
            alone = [check for check in together if check.is_isolated]
            results += _run_alone(alone, address) if alone else run_here(together, target)
    return results


def _run_alone(checks: Sequence[Check], address: Address) -> list[Result]:
    """Run checks in a fresh interpreter; see `worker.py`."""
    order = {"address": asdict(address), "ids": [check.id for check in checks]}
    seconds = len(checks) * 2 * address.timeout_seconds
    # gRPC would ask the environment's proxies, which know nothing of a server under test.
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    said = ""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "sightline.conformance.worker"],
            input=json.dumps(order),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            env=environment,
        )
        said, lines = done.stderr.strip(), done.stdout.strip().splitlines()
        return [_read(entry) for entry in json.loads(lines[-1])]
    except subprocess.TimeoutExpired:
        reason = f"no answer within {seconds:.0f} s"
    except (ValueError, LookupError):
        reason = f"the process with the client library ended: {said[-200:]}"
    return [Result(check.id, Outcome.FAIL, shortened(reason)) for check in checks]


def _read(entry: Json) -> Result:
    return Result(entry["id"], Outcome(entry["outcome"]), entry["reason"], entry["seconds"])
