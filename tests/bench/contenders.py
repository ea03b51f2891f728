"""The servers that are measured side by side, each a process of its own: how it starts, is asked, and answers."""

import base64
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import httpx
import numpy as np
import orjson
import psutil

from sightline import v2
from tests.bench.load import Answer, post
from tests.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 400
PROMPT = "Describe this image in detail"
Kind = Literal["captioner", "blip", "pages", "queries", "none"]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": f"{ROOT / 'predictors/src'}:{ROOT}",
}
"""Of every server alike: threads that spin while they wait would measure the neighbours."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a server said of one input. tokens: made; prompt and image tokens only where it tells them."""

    text: str
    tokens: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    vectors: Any = None


@dataclass(frozen=True)
class Contender:
    """One server.

    command    of its process
    ready      path that answers 200 when it can be asked
    request    input bytes → a whole HTTP request
    read       its 200 answer
    """

    name: str
    port: int
    command: Sequence[str]
    ready: str
    request: Callable[[bytes], bytes]
    read: Callable[[Answer], Said]
    environment: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Model:
    """What they all serve. tokens: new ones at most; `folder` and `fast_folder` hold the same weights."""

    kind: Kind
    folder: str
    tokens: int
    flags: tuple[str, ...] = ()
    """Of our server."""


def naive(model: Model) -> Contender:
    port = free_port()
    words = [model.kind, model.folder, str(model.tokens), str(port)]
    command = [sys.executable, str(ROOT / "tests/bench/naive.py"), *words]
    return Contender("naive", port, command, "/ready", _raw, lambda answer: _plain(orjson.loads(answer.body)))


def raw(model: Model) -> Contender:
    port = free_port()
    command = [sys.executable, str(ROOT / "tests/bench/raw.py"), str(port)]
    return Contender("starlette", port, command, "/ready", _raw, lambda answer: _plain(orjson.loads(answer.body)))


def stock(model: Model) -> Contender:
    port = free_port()
    words = [model.kind, model.folder, str(model.tokens), str(port), str(free_port())]
    command = [sys.executable, str(ROOT / "tests/bench/stock.py"), *words]
    return Contender("kserve", port, command, "/v2/health/ready", _v2_json("stock"), _from_stock)


def ours(model: Model, engine: str = "hf", python: str = sys.executable) -> Contender:
    """`sightline serve`, asked over V2's binary extension. engine: hf, or vllm with the Python of its environment."""
    port = free_port()
    predictor = predictor_of(model)
    words = ["--host", "127.0.0.1", "--port", str(port), "--auth", "off", "--queue-size", "512"]
    words += ["--model", model.folder, "--deadline-seconds", "600", *model.flags]
    words += ["--job-store", "memory://"] if predictor != "embed" else []
    words += ["--max-tokens", str(model.tokens)] if predictor != "embed" else []
    words += ["--engine", engine] if engine != "hf" else []
    command = [python, "-m", "sightline", "serve", predictor, *words]
    ask, read = asked_of_ours(model)
    environment = VLLM if engine == "vllm" else {}
    return Contender(f"ours-{engine}", port, command, "/v2/health/ready", ask, read, environment)


def predictor_of(model: Model) -> str:
    return {"captioner": "describe", "blip": "blip"}.get(model.kind, "embed")


def asked_of_ours(model: Model) -> tuple[Callable[[bytes], bytes], Callable[[Answer], Said]]:
    """How our server is asked, over V2's binary extension, and how its answer is read."""
    predictor = predictor_of(model)
    tensor = "query" if model.kind == "queries" else "image"
    return _v2_binary(predictor, tensor, output=None if predictor != "embed" else "vectors"), _from_ours


def noop(model: Model) -> Contender:
    port = free_port()
    command = [sys.executable, str(ROOT / "tests/bench/noop.py"), str(port)]
    return Contender("ours", port, command, "/v2/health/ready", _v2_binary("noop", "image"), _from_ours)


def noop_json(model: Model) -> Contender:
    """The same server, asked as stock KServe is."""
    port = free_port()
    command = [sys.executable, str(ROOT / "tests/bench/noop.py"), str(port)]
    return Contender("ours, base64 in JSON", port, command, "/v2/health/ready", _v2_json("noop"), _from_ours)


VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # `auto` keeps one core for the front end: of two, that is half.
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def vllm_serve(model: Model, python: str) -> Contender:
    """vLLM's own OpenAI server on CPU."""
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model.folder]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "vllm", "--dtype", "auto"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "128", "--enforce-eager", "--no-enable-prefix-caching"]
    command += ["--mm-processor-cache-gb", "0", "--limit-mm-per-prompt", '{"image": 1, "video": 0}']
    return Contender("vllm serve", port, command, "/health", _openai(model.tokens), _from_openai, VLLM)


def bare_vllm(model: Model, python: str) -> Contender:
    """vLLM's AsyncLLM behind the least of FastAPI: what our engine `vllm` is compared with."""
    port = free_port()
    command = [python, str(ROOT / "tests/bench/bare_vllm.py"), model.folder, str(model.tokens), str(port)]
    return Contender("AsyncLLM", port, command, "/ready", _raw, lambda answer: _plain(orjson.loads(answer.body)), VLLM)


# --- processes -------------------------------------------------------------------------------------------------------


class Running:
    """A contender's process, and the CPU time of it and its children."""

    def __init__(self, contender: Contender, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.contender = contender
        self._process = process
        self._log = log

    def cpu_seconds(self) -> float:
        parent = psutil.Process(self._process.pid)
        spent = 0.0
        for one in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                spent += times.user + times.system
        return spent

    def wait_ready(self) -> None:
        """Raises RuntimeError when it ends, or takes too long."""
        url = f"http://127.0.0.1:{self.contender.port}{self.contender.ready}"
        deadline = time.monotonic() + READY_SECONDS
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self.contender.name} did not start:\n{self._log.read_text()[-3000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        children = psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        self._process.kill()
        self._process.wait()
        for child in children:  # vLLM's engine outlives a parent that is told to end
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@contextlib.contextmanager
def running(contenders: Sequence[Contender], folder: Path) -> Iterator[list[Running]]:
    """All of them, ready."""
    with contextlib.ExitStack() as stack:
        started: list[Running] = []
        for contender in contenders:
            log = folder / f"{contender.name.replace(' ', '-')}-{contender.port}.log"
            environment = dict(os.environ) | ENVIRONMENT | dict(contender.environment)
            environment["XDG_STATE_HOME"] = str(folder / "state")
            with log.open("wb") as out:
                process = subprocess.Popen(contender.command, stdout=out, stderr=out, env=environment, cwd=folder)
            one = Running(contender, process, log)
            stack.callback(one.stop)
            started.append(one)
        for one in started:
            one.wait_ready()
        yield started


# --- what each protocol says -----------------------------------------------------------------------------------------

_OCTETS = {"content-type": "application/octet-stream"}
_JSON = {"content-type": "application/json"}


def _raw(data: bytes) -> bytes:
    return post("/run", _OCTETS, data)


def _v2_binary(model: str, tensor: str, output: str | None = None) -> Callable[[bytes], bytes]:
    def request(data: bytes) -> bytes:
        asked = v2.InferRequest(
            (v2.Tensor.of_bytes(tensor, [data]),),
            outputs=(output,) if output else (),
            is_binary_default=output is not None,
        )
        body, length = v2.render_request(asked)
        return post(f"/v2/models/{model}/infer", _OCTETS | {"inference-header-content-length": str(length)}, body)

    return request


def _v2_json(model: str) -> Callable[[bytes], bytes]:
    def request(data: bytes) -> bytes:
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(data).decode()]}
        return post(f"/v2/models/{model}/infer", _JSON, orjson.dumps({"inputs": [tensor]}))

    return request


def _openai(tokens: int) -> Callable[[bytes], bytes]:
    def request(data: bytes) -> bytes:
        url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
        body = {"model": "vllm", "messages": [{"role": "user", "content": content}]}
        return post("/v1/chat/completions", _JSON, orjson.dumps(body | {"temperature": 0, "max_tokens": tokens}))

    return request


def _plain(said: dict[str, Any]) -> Said:
    vectors = said.get("embedding")
    return Said(said.get("text", ""), said["tokens"], vectors=None if vectors is None else np.array(vectors, "f4"))


def _from_stock(answer: Answer) -> Said:
    return _plain(orjson.loads(orjson.loads(answer.body)["outputs"][0]["data"][0]))


def _from_ours(answer: Answer) -> Said:
    told = v2.parse_response(answer.body, answer.headers.get(v2.HEADER_LENGTH.lower()))
    numbers = cast("dict[str, Any]", told.parameters)
    counts = (int(numbers.get(f"{kind}_tokens", 0)) for kind in ("completion", "prompt", "image"))
    vectors = told.output("vectors")
    if vectors is not None:
        return Said("", *counts, vectors=np.array(vectors.data, "f4"))
    return Said(told.outputs[0].texts()[0], *counts)


def _from_openai(answer: Answer) -> Said:
    told = orjson.loads(answer.body)
    return Said(
        (told["choices"][0]["message"]["content"] or "").strip(),
        told["usage"]["completion_tokens"],
        told["usage"]["prompt_tokens"],
    )
