"""A gateway whose caption step is the stub: in a thread of this process, or as a process that can be killed."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from openai.types import Batch

from sightline.configuration import Configured
from sightline.server.serve import build_app, build_models
from sightline.settings import PipelineSettings
from tests.jobs.pictures import picture
from tests.jobs.threads import looping

ENDPOINT = "/v1/chat/completions"
KEYS = ("one", "two", *(f"key-{number}" for number in range(64)))
"""Files and batches are a key's own: a test with one of its own has a gateway to itself."""
ENDED = ("completed", "failed", "expired", "cancelled")
DEADLINE_SECONDS = 120.0


@dataclass
class Gateway:
    url: str

    @contextlib.contextmanager
    def client(self, key: str = KEYS[0], **options: Any) -> Iterator[openai.OpenAI]:
        """OpenAI's own client."""
        with openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options) as client:
            yield client

    @contextlib.contextmanager
    def http(self, key: str = KEYS[0]) -> Iterator[httpx.Client]:
        with httpx.Client(base_url=self.url, headers={"X-API-Key": key}, trust_env=False, timeout=60) as client:
            yield client


@contextlib.contextmanager
def running_gateway(step_url: str, job_store: str, *, port: int | None = None, **settings: Any) -> Iterator[Gateway]:
    """In a thread of this process, until the block ends."""
    port = port or free_port()
    told = PipelineSettings(
        _env_file=None,  # type: ignore[call-arg]
        describe_url=step_url,
        job_store=job_store,
        api_keys=",".join(KEYS),  # type: ignore[arg-type]
        **settings,
    )

    @contextlib.asynccontextmanager
    async def serving() -> AsyncGenerator[None]:
        models = build_models({"pipeline": Configured(told, {})})
        app = build_app(models, told)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None))
        ticking = asyncio.create_task(server.serve())
        while not server.started:
            assert not ticking.done()
            await asyncio.sleep(0.01)
        await models["pipeline"].start_engine()
        try:
            yield
        finally:
            server.should_exit = True
            await ticking
            await asyncio.sleep(0.01)  # transports say goodbye in the loop's next rounds

    with looping(serving):
        yield Gateway(f"http://127.0.0.1:{port}")


class Process(Gateway):
    """A gateway that can be killed. It is started and waited for by `start`."""

    def __init__(
        self, folder: Path, step_url: str, job_store: str, environment: Mapping[str, str], *flags: str
    ) -> None:
        super().__init__(f"http://127.0.0.1:{free_port()}")
        self._words = ["pipeline", "--host", "127.0.0.1", "--port", self.url.rsplit(":", 1)[1], *flags]
        self._words += ["--describe-url", step_url, "--job-store", job_store]
        self._environment = {**os.environ, **environment, "API_KEYS": ",".join(KEYS)}
        self._environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        self._log = folder / f"gateway-{self.url.rsplit(':', 1)[1]}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> "Process":
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sightline", "serve", *self._words],
                env=self._environment,
                stdout=log,
                stderr=log,
                cwd=self._log.parent,
            )
        until(self._is_ready, "the gateway")
        return self

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()[-3000:]
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/v2/health/ready", trust_env=False).status_code == 200
        return False

    def end(self, how: signal.Signals = signal.SIGKILL) -> int:
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(how)
        return self._process.wait(DEADLINE_SECONDS)


# --- requests --------------------------------------------------------------------------------------------------------


def request(custom_id: str, data: bytes, **body: Any) -> dict[str, Any]:
    """One line of a file: the pipeline is asked for a caption of a picture."""
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": uri}}]
    fields = {"model": "pipeline", "messages": [{"role": "user", "content": content}]} | body
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": fields}


def album(count: int, faults: Mapping[int, str] | None = None) -> list[dict[str, Any]]:
    """So many requests, each for a picture of its own; `faults` as `pictures.picture` takes them."""
    return [request(f"i{number}", picture(number, (faults or {}).get(number, ""))) for number in range(count)]


def jsonl(requests: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in requests)


def submit(client: openai.OpenAI, requests: Iterable[Mapping[str, Any]], **options: Any) -> Batch:
    """Upload and make a batch of it."""
    file = client.files.create(file=("album.jsonl", jsonl(requests)), purpose="batch")
    said = {"completion_window": "24h", "endpoint": ENDPOINT, **options}
    return client.batches.create(input_file_id=file.id, **said)


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    """The batch when it is over."""

    def look() -> Batch | None:
        seen = client.batches.retrieve(batch.id)
        return seen if seen.status in ENDED else None

    return until(look, f"the end of {batch.id}")


def rows(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    """The lines of an output or error file; none when there is no file."""
    if file_id is None:
        return []
    return [json.loads(line) for line in client.files.content(file_id).read().splitlines()]


def until(look: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not in {DEADLINE_SECONDS:.0f} seconds: {what}"
        time.sleep(0.05)
    return seen


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
