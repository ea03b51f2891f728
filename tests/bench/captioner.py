"""The small captioner through `sightline batch run` against calling its predictor directly, images a second.

Both from one folder of drawn scenes, over V2 with raw bytes, 16 in flight, greedy; direct before and after the batch.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np

from sightline import v2
from sightline.tiny import scenes
from tests.conftest import free_port
from tests.jobs.harness import until

IN_FLIGHT = 16
READY_SECONDS = 600


@dataclass(frozen=True)
class Captioned:
    """Images a second."""

    images: int
    direct: float
    batch: float


def compare(images: int, folder: Path, environment: Mapping[str, str]) -> Captioned:
    """Draw scenes, start the predictor, and caption them three times."""
    photos = folder / "photos"
    draw(images, photos)
    told = {**environment, "XDG_STATE_HOME": str(folder / "state"), "HF_HUB_OFFLINE": "1"}
    with serving(told, folder) as url:
        asyncio.run(direct(url, sorted(photos.iterdir())[:16]))  # warm
        first = asyncio.run(direct(url, sorted(photos.iterdir())))
        batch = through_batch(url, photos, told)
        second = asyncio.run(direct(url, sorted(photos.iterdir())))
    lines = (folder / "captions.jsonl").read_text().splitlines()
    assert len(lines) == images, f"{len(lines)} captions"
    assert all(json.loads(line)["caption"] for line in lines)
    return Captioned(images, 2 * images / (first + second), images / batch)


def draw(images: int, photos: Path) -> None:
    photos.mkdir()
    rng = np.random.default_rng(7)
    for number in range(images):
        scenes.render(scenes.draw_scene(rng)).save(photos / f"{number:05}.png")


@contextlib.contextmanager
def serving(environment: Mapping[str, str], folder: Path) -> Generator[str]:
    """`sightline serve describe`, ready."""
    port = free_port()
    words = ["serve", "describe", "--host", "127.0.0.1", "--port", str(port), "--grpc-port", str(free_port())]
    with (folder / "describe.log").open("wb") as log:
        command = [sys.executable, "-m", "sightline", *words, "--auth", "off"]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(environment), cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: _is_ready(url), READY_SECONDS, "the predictor")
        yield url
    finally:
        process.terminate()
        process.wait()


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/v2/health/ready", timeout=5, trust_env=False).status_code == 200
    return False


async def direct(url: str, files: list[Path]) -> float:
    """Seconds for all of them."""
    waiting, start = iter(files), time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:

        async def ask() -> None:
            for file in waiting:
                tensor = v2.Tensor.of_bytes("image", [file.read_bytes()])
                body, length = v2.render_request(v2.InferRequest((tensor,)))
                headers = {v2.HEADER_LENGTH: str(length), "content-type": "application/octet-stream"}
                answer = await client.post("/v2/models/describe/infer", content=body, headers=headers)
                v2.parse_response(answer.raise_for_status().content, answer.headers.get(v2.HEADER_LENGTH))

        await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
    return time.monotonic() - start


def through_batch(url: str, photos: Path, environment: Mapping[str, str]) -> float:
    """Seconds of the whole command, its start and finish too."""
    words = ["batch", "run", str(photos), "--out", str(photos.parent / "captions.jsonl"), "--url", url]
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "sightline", *words, "--predictor", "describe"],
        env=dict(environment) | {"COLUMNS": os.environ.get("COLUMNS", "100")},
        cwd=photos.parent,
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return time.monotonic() - start
