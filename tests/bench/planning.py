"""Planning a million keys: how much memory and time `python -m sightline.jobs plan` takes, and whether it lost any.

The keys are a listing as S3 answers it, made up page by page by a process of its own (a real bucket of a million
objects would measure its server); the plan is written to a real S3 server.

    python tests/bench/planning.py [--keys 1000000]
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT), str(ROOT / "predictors/src")]
sys.path[:0] = PATHS

from sightline.jobs.page import Location, Page, read_page  # noqa: E402
from sightline.jobs.plan import layout_of, read_plan, read_shard  # noqa: E402
from sightline.jobs.stores import open_location  # noqa: E402
from tests.s3 import S3Server, running_s3  # noqa: E402

PAGE_KEYS = 1000
SHARD_SIZE = 1000
START_SECONDS = 30
CONTENT = (
    "<Contents><Key>{key}</Key><LastModified>2026-11-21T00:00:00.000Z</LastModified>"
    "<ETag>&quot;{etag:032x}&quot;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
)


@dataclass(frozen=True)
class Planned:
    """What it took. `mib`: the largest resident size of the process."""

    keys: int
    seconds: float
    cpu_seconds: float
    mib: float


# --- a bucket of so many keys ----------------------------------------------------------------------------------------


def key_of(number: int) -> str:
    return f"photos/{number // PAGE_KEYS:05}/img_{number:09}.jpg"


def page_of_keys(start: int, keys: int) -> str:
    """One answer of ListObjectsV2."""
    end = min(start + PAGE_KEYS, keys)
    rows = "".join(CONTENT.format(key=key_of(n), etag=n, size=100_000 + n) for n in range(start, end))
    more = f"<NextContinuationToken>{end}</NextContinuationToken>" if end < keys else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>million</Name><Prefix>photos/</Prefix><KeyCount>{end - start}</KeyCount><MaxKeys>{PAGE_KEYS}</MaxKeys>"
        f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>{more}{rows}</ListBucketResult>"
    )


async def serve(port_file: Path, keys: int) -> None:
    async def answer(request: web.Request) -> web.Response:
        assert request.query["list-type"] == "2", request.query_string
        assert "start-after" not in request.query, "nothing may go wrong, so nobody goes on by key"
        start = int(request.query.get("continuation-token", "0"))
        return web.Response(text=page_of_keys(start, keys), content_type="application/xml")

    app = web.Application()
    app.router.add_get("/{tail:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    draft = port_file.with_suffix(".draft")
    draft.write_text(str(runner.addresses[0][1]))
    draft.rename(port_file)
    await asyncio.Event().wait()


@contextlib.contextmanager
def bucket_of(keys: int, folder: Path) -> Generator[str]:
    """The endpoint of a store with so many keys."""
    port_file = folder / "lister.port"
    command = [sys.executable, str(Path(__file__)), "--serve", str(port_file), "--keys", str(keys)]
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not port_file.exists():
            assert process.poll() is None, "the listing ended"
            assert time.monotonic() < deadline, "the listing did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port_file.read_text()}"
    finally:
        process.terminate()
        process.wait()


# --- planning it -----------------------------------------------------------------------------------------------------


def plan(keys: int, s3: S3Server, folder: Path) -> Planned:
    """Plan so many keys as a pod would, and read back every item."""
    s3.bucket("plans")
    with bucket_of(keys, folder) as endpoint:
        page_file = folder / "batch.json"
        page_file.write_text(json.dumps(page_json(keys, endpoint, s3)))
        environment = os.environ | s3.environment() | {"BATCH_FILE": str(page_file), "PYTHONPATH": ":".join(PATHS)}
        environment |= {"LAST_WORDS": str(folder / "words.json")}
        start = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "sightline.jobs", "plan"], env=environment, cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (folder / "words.json").read_text()
    os.environ.update(s3.environment())
    asyncio.run(check(keys, read_page(page_file.read_bytes())))
    return Planned(keys, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def page_json(keys: int, endpoint: str, s3: S3Server) -> dict[str, object]:
    place = {"region": s3.region, "pathStyle": True}
    photos = place | {"bucket": "million", "prefix": "photos/", "endpoint": endpoint, "maxItems": keys}
    return {
        "batch": {"name": "million", "namespace": "bench", "uid": "million"},
        "fingerprint": "0123456789ab",
        "pipeline": {"name": "nobody", "url": "http://127.0.0.1:9"},
        "input": {"s3Prefix": photos},
        "output": {"s3": place | {"bucket": "plans", "prefix": "out", "endpoint": s3.endpoint_url}},
        "shardSize": SHARD_SIZE,
        "chunkSize": 50,
        "maxInFlight": 16,
        "maxAttempts": 3,
    }


async def check(keys: int, page: Page) -> None:
    """Every key is an item, once, in order, pinned."""
    objects = open_location(Location(page.outputs.location.url, page.outputs.location.endpoint))
    found = await read_plan(objects, layout_of(page))
    assert found is not None
    assert found.items == keys, found.in_short()
    numbers = itertools.count()
    for shard in range(len(found.shards)):
        for item in await read_shard(objects, layout_of(page), found, shard):
            n = next(numbers)
            assert (item.custom_id, item.etag, item.size) == (key_of(n), f'"{n:032x}"', 100_000 + n), item
    assert next(numbers) == keys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        asyncio.run(serve(options.serve, options.keys))
        return
    with tempfile.TemporaryDirectory() as folder, running_s3(Path(folder)) as s3:
        found = plan(options.keys, s3, Path(folder))
    print(
        f"{found.keys:,} keys: {found.mib:.0f} MiB at most, {found.seconds:.1f} s, of the CPU {found.cpu_seconds:.1f} s"
        f" ({os.cpu_count()} CPUs, {platform.machine()}, {s3.kind})"
    )


if __name__ == "__main__":
    main()
