"""What a batch is measured against: the same calls from a bare async loop, and nothing else.

    python -m tests.bench.bare_loop KEYS    $TARGET, $ENDPOINT, $BUCKET, $IN_FLIGHT

KEYS is a file with one key a line. Each image is fetched from the store (obstore in a thread, as a worker does) and
posted to the gateway with httpx, $IN_FLIGHT at a time; the answer is parsed and forgotten. No plan, no retries, no
pace, no output.
"""

import asyncio
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import obstore
import orjson
from obstore.store import S3Store


async def main() -> None:
    keys = iter(Path(sys.argv[1]).read_text().splitlines())
    width = int(os.environ["IN_FLIGHT"])
    store = S3Store(
        os.environ["BUCKET"],
        endpoint=os.environ["ENDPOINT"],
        region=os.environ["AWS_REGION"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True},
    )
    loop, pool = asyncio.get_running_loop(), ThreadPoolExecutor(width)

    def fetch(key: str) -> bytes:
        return bytes(obstore.get(store, key).bytes())

    limits = httpx.Limits(max_connections=width, max_keepalive_connections=width)
    async with httpx.AsyncClient(base_url=os.environ["TARGET"], limits=limits, timeout=60, trust_env=False) as client:

        async def ask() -> None:
            for key in keys:
                image = await loop.run_in_executor(pool, fetch, key)
                answer = await client.post("/caption", content=image, headers={"content-type": "image/png"})
                orjson.loads(answer.raise_for_status().content)["caption"]

        await asyncio.gather(*(ask() for _ in range(width)))


if __name__ == "__main__":
    asyncio.run(main())
