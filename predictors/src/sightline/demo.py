"""`make demo`: the whole chain on 127.0.0.1 as three processes, two sample images, readable answers."""

import ctypes
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import httpx
from rich.console import Console
from rich.table import Table

from sightline.client import Client, RequestFailed

START_SECONDS = 300
STOP_SECONDS = 20
HOST = "127.0.0.1"
_PR_SET_PDEATHSIG = 1


class DemoFailed(Exception):
    """The demonstration cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Process:
    """One running server and the file its log goes to."""

    name: str
    port: int
    popen: subprocess.Popen[bytes]
    log: IO[bytes]

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(Path(self.log.name).read_text(errors="replace").splitlines()[-lines:])


def run(port: int, *, keep_serving: bool) -> int:
    """Run the demonstration. Returns 0 when both samples were captioned and enhanced, else 1."""
    console = Console()
    signal.signal(signal.SIGTERM, _exit)  # so that the servers are stopped, too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
    try:
        _check_free(port)
        with _servers(port) as processes:
            _wait_until_ready(processes, console)
            is_good = _caption_samples(port, console)
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
    for wanted in range(port, port + 3):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((HOST, wanted))
            except (OSError, OverflowError) as error:
                raise DemoFailed(f"port {wanted} cannot be used; choose another with PORT=9000 make demo") from error


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextmanager
def _servers(port: int) -> Generator[Sequence[Process]]:
    """Start gateway, describe and enhance on three ports in a row; stop them at the end, whatever happens."""
    flags = {
        "describe": [],
        "enhance": [],
        "pipeline": [
            "--describe-url", f"http://{HOST}:{port + 1}",
            "--enhance-url", f"http://{HOST}:{port + 2}",
        ],
    }  # fmt: skip
    ports = {"describe": port + 1, "enhance": port + 2, "pipeline": port}
    processes: list[Process] = []
    with tempfile.TemporaryDirectory(prefix="sightline-demo-") as folder:
        try:
            for name, extra in flags.items():
                log = (Path(folder) / f"{name}.log").open("w+b")
                command = [
                    sys.executable, "-m", "sightline", "serve", name,
                    "--host", HOST, "--port", str(ports[name]), "--auth", "off", *extra,
                ]  # fmt: skip
                popen = subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=log,
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C is ours to hand on
                    preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - no threads yet
                )
                processes.append(Process(name, ports[name], popen, log))
            yield processes
        finally:
            _stop(processes)


def _end_with_parent() -> None:
    """Ask the kernel for a SIGTERM when the demonstration is killed and cannot stop its servers itself."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _environment() -> dict[str, str]:
    """The caller's environment without settings that would turn the demonstration into something else."""
    ours = {"PORT", "HOST", "AUTH", "API_KEY", "MODEL", "MODEL_NAME", "QWEN_MODEL_NAME", "VLM_MODEL_ID",
            "GPT_OSS_MODEL_ID", "USE_GPT_OSS", "DESCRIBE_URL", "ENHANCE_URL", "JOB_STORE"}  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name.upper() not in ours}
    return kept | {"HF_HUB_OFFLINE": "1"}


def _stop(processes: Sequence[Process]) -> None:
    for process in processes:
        if process.popen.poll() is None:
            process.popen.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.popen.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.popen.kill()
            process.popen.wait()
        process.log.close()


def _check_alive(processes: Sequence[Process]) -> None:
    for process in processes:
        if (code := process.popen.poll()) is not None:
            raise DemoFailed(f"{process.name} ended with code {code}. Its log:\n{process.log_tail()}")


def _wait_until_ready(processes: Sequence[Process], console: Console) -> None:
    console.print("Starting three servers on 127.0.0.1 (authentication is OFF: for this machine only):")
    started = time.monotonic()
    waiting = list(processes)
    with console.status("loading …") as status:
        while waiting:
            _check_alive(processes)
            for process in list(waiting):
                if _is_ready(process):
                    seconds = time.monotonic() - started
                    console.print(f"  {process.name:<9} http://{HOST}:{process.port}  ready in {seconds:.1f} s")
                    waiting.remove(process)
            if time.monotonic() - started > START_SECONDS:
                raise DemoFailed(f"{waiting[0].name} was not ready in {START_SECONDS} s.\n{waiting[0].log_tail()}")
            status.update(f"loading {', '.join(process.name for process in waiting)} …")
            time.sleep(0.2)


def _is_ready(process: Process) -> bool:
    url = f"http://{HOST}:{process.port}/v2/models/{process.name}/ready"
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code == 200
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


def _keep_serving(processes: Sequence[Process], port: int, console: Console) -> None:
    console.print(
        f"Serving on http://{HOST}:{port} until Ctrl-C. Try, from another terminal:\n"
        f"  .venv/bin/python -m sightline.tiny scene scene.png\n"
        f"  curl -F image=@scene.png http://{HOST}:{port}/caption",
        highlight=False,
    )
    while True:
        _check_alive(processes)
        time.sleep(1)
