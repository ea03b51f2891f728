"""`make demo`: the gateway and the five models on 127.0.0.1 as six processes, sample pictures, readable answers."""

import base64
import io
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, Any

import httpx
from rich.console import Console
from rich.table import Table

from sightline import nursery
from sightline.client import Client, RequestFailed

SERVERS = ("pipeline", "describe", "enhance", "generate", "embed", "blip")
"""In the order of their ports."""
CHAIN = ("describe", "enhance", "pipeline")
GRPC_OFFSET = 100

START_SECONDS = 300
STOP_SECONDS = 20
HOST = "127.0.0.1"

Serve = Callable[[Sequence[str]], int]


class DemoFailed(Exception):
    """The demonstration cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Process:
    """One running server and the file its log goes to."""

    name: str
    port: int
    child: nursery.Child
    log: IO[bytes]

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(Path(self.log.name).read_text(errors="replace").splitlines()[-lines:])


def run(port: int, import_server: Callable[[], Serve], *, keep_serving: bool) -> int:
    """Run the demonstration. Returns 0 when both samples were captioned and enhanced, and the other models answered.

    import_server   imports what servers need, once for all of them, and returns what serves: `sightline serve`'s words
                    in, exit code out
    """
    console = Console()
    signal.signal(signal.SIGTERM, _exit)  # so that the servers are stopped, too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
    try:
        _check_free(port)
        console.print("Starting six servers on 127.0.0.1 (authentication is OFF: for this machine only) …")
        started = time.monotonic()
        with _servers(port, import_server) as processes:
            _wait_until_ready([item for item in processes if item.name in CHAIN], processes, started, console)
            is_good = _caption_samples(port, console)
            _wait_until_ready([item for item in processes if item.name not in CHAIN], processes, started, console)
            _ask_the_others({item.name: item.url for item in processes}, console)
            if keep_serving:
                _keep_serving(processes, port, console)
            return 0 if is_good else 1
    except (DemoFailed, RequestFailed) as error:
        console.print(f"[bold red]The demonstration failed:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("\nStopped.")
        return 0


def _check_free(port: int) -> None:
    """An earlier demonstration would answer in the new one's place."""
    for wanted in (first + index for first in (port, port + GRPC_OFFSET) for index in range(len(SERVERS))):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, wanted))
            except (OSError, OverflowError) as error:
                raise DemoFailed(f"port {wanted} cannot be used; choose another with PORT=9000 make demo") from error


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextmanager
def _servers(port: int, import_server: Callable[[], Serve]) -> Generator[Sequence[Process]]:
    """Start the six servers on six ports in a row; stop them at the end, whatever happens."""
    os.environ.update(_FOR_LIBRARIES)
    serve = import_server()
    nursery.settle()
    processes: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="sightline-demo-") as folder:
        try:
            for name in (*CHAIN, *(name for name in SERVERS if name not in CHAIN)):  # the first answers soonest
                own = port + SERVERS.index(name)
                log = (Path(folder) / f"{name}.log").open("w+b")
                words = [name, "--host", HOST, "--port", str(own), "--grpc-port", str(own + GRPC_OFFSET),
                         "--auth", "off", *_flags(name, port)]  # fmt: skip
                child = nursery.fork(
                    partial(serve, words), log=log, environment=_environment(), folder=Path(folder)
                )  # in a folder without a `.env`
                processes.append(Process(name, own, child, log))
            yield processes
        finally:
            _stop(processes)


_FOR_LIBRARIES = {
    "HF_HUB_OFFLINE": "1",
    "OPENBLAS_NUM_THREADS": "1",  # numpy's threads must not be there when we fork, and nothing here needs them
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking the driver itself would make CUDA unusable in the children
}


def _flags(name: str, port: int) -> list[str]:
    if name != "pipeline":
        return []
    return [f"--{step}-url=http://{HOST}:{port + SERVERS.index(step)}" for step in ("describe", "enhance")]


def _environment() -> dict[str, str]:
    """The caller's environment without settings that would turn the demonstration into something else."""
    owned = tuple(f"{name.upper()}__" for name in SERVERS)
    return {
        name: value
        for name, value in os.environ.items()
        if name.upper() not in _OURS and not name.upper().startswith(owned)
    }


_OURS = {
    "HOST", "PORT", "GRPC_PORT", "AUTH", "API_KEY", "API_KEYS", "API_KEY_FILE", "WORKERS", "RELOAD", "JOB_STORE",
    "MODEL", "MODEL_PATH", "MODEL_NAME", "SERVED_MODEL_NAME", "REVISION", "QUANTIZATION", "LOAD_8BIT",
    "VLM_LOAD_8BIT", "MAX_TOKENS", "QWEN_MODEL_NAME", "VLM_MODEL_ID", "GPT_OSS_MODEL_ID", "KIMI_MODEL_PATH",
    "COLQWEN_MODEL_ID", "USE_GPT_OSS", "ENHANCE_BY_DEFAULT", "DESCRIBE_URL", "DESCRIBE_MODEL", "ENHANCE_URL",
    "ENHANCE_MODEL",
}  # fmt: skip


def _stop(processes: Sequence[Process]) -> None:
    for process in processes:
        process.child.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.child.wait(max(0.1, deadline - time.monotonic()))
        except nursery.StillRunning:
            process.child.send_signal(signal.SIGKILL)
            process.child.wait(STOP_SECONDS)
        process.log.close()


def _check_alive(processes: Sequence[Process]) -> None:
    for process in processes:
        if (code := process.child.poll()) is not None:
            raise DemoFailed(f"{process.name} ended with code {code}. Its log:\n{process.log_tail()}")


def _wait_until_ready(
    wanted: Sequence[Process], processes: Sequence[Process], started: float, console: Console
) -> None:
    waiting = list(wanted)
    with console.status("loading …") as status:
        while waiting:
            _check_alive(processes)
            for process in list(waiting):
                if _is_ready(process):
                    seconds = time.monotonic() - started
                    console.print(f"  {process.name:<9} {process.url}  ready in {seconds:.1f} s")
                    waiting.remove(process)
            if time.monotonic() - started > START_SECONDS:
                raise DemoFailed(f"{waiting[0].name} was not ready in {START_SECONDS} s.\n{waiting[0].log_tail()}")
            status.update(f"loading {', '.join(process.name for process in waiting)} …")
            time.sleep(0.2)


def _is_ready(process: Process) -> bool:
    try:
        return httpx.get(f"{process.url}/v2/models/{process.name}/ready", timeout=2, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def samples() -> Iterator[tuple[str, bytes]]:
    """A drawn scene of the world the demonstration models know, and a photograph of one they do not."""
    import numpy as np

    from sightline.tiny import scenes

    scene = scenes.draw_scene(np.random.default_rng(7), 2, sides=(300, 640))
    buffer = io.BytesIO()
    scenes.render(scene).save(buffer, "PNG")
    yield f"a scene: {scenes.caption(scene)}", buffer.getvalue()
    try:
        from skimage import data  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]
    except ImportError:
        return
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(data.astronaut()).save(buffer, "JPEG", quality=90)
    yield (
        "astronaut, a photograph (outside the small models' world: expect a wrong answer)",
        buffer.getvalue(),
    )


def _caption_samples(port: int, console: Console) -> bool:
    is_good = True
    with Client(f"http://{HOST}:{port}") as client:
        for title, image in samples():
            started = time.monotonic()
            answer = client.caption(image, enhance=True, level="medium", explain=True)
            seconds = time.monotonic() - started
            is_good = is_good and bool(answer["enhanced"])
            console.print(_shown(title, image, answer, seconds))
    return is_good


def _shown(title: str, image: bytes, answer: dict[str, Any], seconds: float) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, min_width=60)
    table.add_row("image", f"{len(image):,} bytes")
    table.add_row("caption", answer.get("original_caption", answer["caption"]))
    if answer["enhanced"]:
        table.add_row("enhanced", answer["caption"])
    else:
        table.add_row("not enhanced", json.dumps(answer.get("enhancement_error")))
    for step in answer.get("steps", []):
        table.add_row(
            f"{step['name']} step",
            f"{step['model']} @ {step['revision']} · {step['milliseconds']:.0f} ms · "
            f"{step['image_tokens']} image tokens · {step['completion_tokens']} new tokens",
        )
    table.add_row("in all", f"{seconds:.2f} s")
    if answer.get("demo_model"):
        table.add_row("note", "small demonstration models; they know coloured shapes and nothing else")
    return table


def _ask_the_others(urls: dict[str, str], console: Console) -> None:
    """One question to each model that is not part of the chain. Raises DemoFailed when one of them does not answer."""
    circle, star = _drawn(("large", "red", "circle"), "white"), _drawn(("small", "blue", "star"), "gray")
    with httpx.Client(timeout=120, trust_env=False) as client:
        question = "Which image holds a star?"
        files = [("images", ("1.png", circle)), ("images", ("2.png", star))]
        answer = _asked(
            client, f"{urls['generate']}/generate/image", data={"prompt": question, "temperature": "0"}, files=files
        )
        console.print(_told("generate", "two images", question, str(answer["output"]), answer))

        query = "a small blue star on a gray background"
        pages = [f"data:image/png;base64,{base64.b64encode(page).decode()}" for page in (circle, star)]
        answer = _asked(client, f"{urls['embed']}/score", json={"queries": [query], "images": pages})
        scores = ", ".join(f"page {number}: {score:.2f}" for number, score in enumerate(answer["scores"][0], 1))
        console.print(_told("embed", "two pages", query, scores, answer))

        answer = _asked(client, f"{urls['blip']}/caption", files={"image": ("1.png", circle)})
        console.print(_told("blip", "one image", "", str(answer["caption"]), answer))


def _asked(client: httpx.Client, url: str, **body: Any) -> dict[str, Any]:  # noqa: ANN401
    try:
        response = client.post(url, **body)
    except httpx.HTTPError as error:
        raise DemoFailed(f"{url} does not answer ({type(error).__name__})") from error
    if response.status_code != 200:
        raise DemoFailed(f"{url} answered {response.status_code}: {response.text[:300]}")
    return response.json()


def _told(name: str, shown: str, asked: str, said: str, answer: dict[str, Any]) -> Table:
    table = Table(title=f"{name}: {shown}", title_justify="left", show_header=False, min_width=60)
    if asked:
        table.add_row("asked", asked)
    table.add_row("answer", said)
    if answer.get("demo_model"):
        table.add_row("model", f"{answer.get('model')}, a small demonstration model")
    return table


def _drawn(words: tuple[str, str, str], background: str) -> bytes:
    """A scene of one object as PNG, the same each time."""
    import numpy as np

    from sightline.tiny import scenes

    rng = np.random.default_rng(3)
    while True:
        scene = scenes.draw_scene(rng, 1, sides=(300, 500))
        (drawn,) = scene.objects
        if (drawn.size, drawn.colour, drawn.shape) == words and scene.background == background:
            buffer = io.BytesIO()
            scenes.render(scene).save(buffer, "PNG")
            return buffer.getvalue()


def _keep_serving(processes: Sequence[Process], port: int, console: Console) -> None:
    addresses = " ".join(f"{item.name} :{item.port}" for item in processes)
    console.print(
        f"Serving on http://{HOST}:{port} until Ctrl-C ({addresses}; gRPC on +{GRPC_OFFSET}). "
        f"Try, from another terminal:\n"
        f"  .venv/bin/python -m sightline.tiny scene scene.png\n"
        f"  curl -F image=@scene.png http://{HOST}:{port}/caption",
        highlight=False,
    )
    while True:
        _check_alive(processes)
        time.sleep(1)
