"""A photograph of 12 megapixels to the numbers a model takes: plain PIL, transformers, and what Sightline does.

    python tests/bench/decode.py            prints the tables
    python tests/bench/decode.py --write    and puts them into docs/preprocessing.md

CPU time of one thread, unique photographs, the ways in turn within each round, medians. Then how many images are
prepared on this machine while an engine thread generates, by a pool of threads (ours) and by a pool of processes with
shared memory.
"""

# ruff: noqa: E402 - a script finds its packages first

import argparse
import io
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "predictors/src")]
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import skimage.data
import torch
from PIL import Image
from transformers import BlipImageProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from sightline.images import Limits, decode_for
from sightline.models.kimi_vl.processing import KimiVLImageProcessor
from sightline.models.pixels import KimiPixels, Pixels, QwenPixels, SquarePixels
from sightline.models.qwen_vl import QwenVL
from sightline.settings import DescribeSettings
from sightline.wire import Sampling

PAGE = ROOT / "docs/preprocessing.md"
LIMITS = Limits(20 * 2**20, 40_000_000, 3, 200)


def photograph(seed: int, size: tuple[int, int] = (4000, 3000), quality: int = 91) -> bytes:
    """A JPEG of its own: four photographs side by side with the grain of a sensor. About 2.9 MB at 12 megapixels."""
    rng = np.random.default_rng(seed)
    tiles = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.rocket()]
    half = (size[0] // 2, size[1] // 2)
    canvas = Image.new("RGB", size)
    for place, index in enumerate(rng.permutation(4)):
        tile = Image.fromarray(tiles[index]).resize(half, Image.Resampling.BICUBIC)
        canvas.paste(tile, ((place % 2) * half[0], (place // 2) * half[1]))
    grain = rng.normal(0, 4, (size[1], size[0], 1)).astype(np.int16)
    levels = (np.asarray(canvas).astype(np.int16) + grain).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=quality)
    return file.getvalue()


@dataclass(frozen=True)
class Route:
    """A model at its published limits. `bound` is the service's max_width; Kimi-VL has no PIL processor."""

    name: str
    pil: Any
    torchvision: Any
    pixels: Pixels
    bound: int | None

    def plain(self, data: bytes) -> object:
        """As a plain server would: open, convert, shrink to the bound, the processor on PIL (else torchvision's)."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return (self.pil or self.torchvision)(images=[self._bounded(image)], return_tensors="pt")["pixel_values"]

    def fast(self, data: bytes) -> object:
        """The same with the processor on torchvision."""
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return self.torchvision(images=[self._bounded(image)], return_tensors="pt")["pixel_values"]

    def ours(self, data: bytes, detail: float = 1.0) -> torch.Tensor:
        bounds = {} if self.bound is None else {"max_width": self.bound, "max_height": 2 * self.bound}
        picture = decode_for(data, LIMITS, self.pixels.wanted, detail=detail, **bounds)
        return self.pixels.patches(picture.image, picture.size).values

    def _bounded(self, image: Image.Image) -> Image.Image:
        if self.bound is None or image.width <= self.bound:
            return image
        height = round(image.height * self.bound / image.width)
        return image.resize((self.bound, height), Image.Resampling.LANCZOS)


def routes() -> list[Route]:
    """ColQwen2.5 first: its 768 tokens are the nearest to the 1152 x 864 of reference measurements."""
    page, full = ({"shortest_edge": 3136, "longest_edge": pixels} for pixels in (768 * 784, 1152 * 864))
    kimi = KimiVLImageProcessor(in_token_limit=4096)
    blip, qwen, large = BlipImageProcessor(), Qwen2VLImageProcessor(size=page), Qwen2VLImageProcessor(size=full)
    return [
        Route("Qwen2.5-VL at 1 megapixel", Qwen2VLImageProcessorPil(size=full), large, QwenPixels.of(large), None),
        Route("ColQwen2.5, 768 tokens", Qwen2VLImageProcessorPil(size=page), qwen, QwenPixels.of(qwen), None),
        Route("describe: Qwen2.5-VL, 512 wide", Qwen2VLImageProcessorPil(), large, QwenPixels.of(large), 512),
        Route("generate: Kimi-VL, 4,096 patches", None, kimi, KimiPixels.of(kimi), 2048),
        Route("blip: 384 x 384", BlipImageProcessorPil(), blip, SquarePixels.of(blip), None),
    ]


def alone(photos: Sequence[bytes], rounds: int) -> list[list[str]]:
    """Milliseconds of CPU an image: plain, torchvision, ours whole, ours; ours as a multiple of plain."""
    rows: list[list[str]] = []
    for route in routes():
        ways: list[Callable[[bytes], object]] = [route.plain, route.fast, partial(route.ours, detail=0), route.ours]
        seconds: list[list[float]] = [[] for _ in ways]
        for turn in range(rounds + 1):
            for way, taken in zip(ways, seconds, strict=True):
                began = time.thread_time()
                way(photos[turn % len(photos)])
                if turn:  # the first is a warm-up
                    taken.append(time.thread_time() - began)
        each = [1000 * statistics.median(taken) for taken in seconds]
        rows.append([route.name, *(f"{value:.0f}" for value in each), f"{each[0] / each[-1]:.1f}"])
        print(rows[-1], flush=True)
    return rows


def gaps(photos: Sequence[bytes]) -> list[list[str]]:
    """What scaling changes: mean and largest difference of the levels that the model reads, at details 1 and 2."""
    rows: list[list[str]] = []
    for route in routes():
        scale = 255 * float(np.mean(0.27)) if "Kimi" not in route.name else 255 * 0.5
        row = [route.name]
        for detail in (1.0, 2.0):
            off = [(route.ours(photo, detail) - route.ours(photo, 0)).abs() * scale for photo in photos[:2]]
            mean, most = statistics.mean(float(gap.mean()) for gap in off), max(float(gap.max()) for gap in off)
            row += [f"{mean:.2f}", f"{most:.0f}"]
        rows.append(row)
    return rows


# --- beside an engine ---


def in_process(pixels: Pixels, data: bytes) -> tuple[str, tuple[int, ...]]:
    """Prepare in a worker process; the numbers come back in shared memory, whose name is the answer."""
    picture = decode_for(data, LIMITS, pixels.wanted, max_width=512, max_height=1024)
    values = pixels.patches(picture.image, picture.size).values.numpy()
    memory = shared_memory.SharedMemory(create=True, size=values.nbytes)
    np.ndarray(values.shape, np.float32, memory.buf)[:] = values
    resource_tracker.unregister(f"/{memory.name.lstrip('/')}", "shared_memory")  # whoever reads it removes it
    memory.close()
    return memory.name, values.shape


def taken_over(answer: tuple[str, tuple[int, ...]]) -> torch.Tensor:
    memory = shared_memory.SharedMemory(name=answer[0])
    values = torch.from_numpy(np.ndarray(answer[1], np.float32, memory.buf).copy())
    memory.close()
    memory.unlink()
    return values


def in_thread(pixels: Pixels, data: bytes) -> torch.Tensor:
    picture = decode_for(data, LIMITS, pixels.wanted, max_width=512, max_height=1024)
    return pixels.patches(picture.image, picture.size).values


class Engine:
    """The small captioner generating batches of eight on a thread of its own, until it is told to stop."""

    def __init__(self) -> None:
        self.model = QwenVL(DescribeSettings(_env_file=None, auth="off", device="cpu", threads=1))  # type: ignore[call-arg]
        prompt = self.model.preprocess(Image.fromarray(skimage.data.coffee()), "Describe this image in detail")
        self._batch = [prompt] * 8
        self.images = 0
        self._stop = threading.Event()

    def run(self) -> None:
        while not self._stop.is_set():
            self.model.generate(self._batch, Sampling(max_tokens=24), lambda index: self._stop.is_set())
            self.images += len(self._batch)

    def window(self, seconds: float, prepare: Callable[[], None]) -> float:
        """Images a second that it answers while `prepare` is called again and again on this thread."""
        self._stop.clear()
        self.images = 0
        thread = threading.Thread(target=self.run)
        began = time.perf_counter()
        thread.start()
        while time.perf_counter() - began < seconds:
            prepare()
        self._stop.set()
        answered, spent = self.images, time.perf_counter() - began
        thread.join()
        return answered / spent


class Closed:
    """So many images in preparation at a time; counts those that are done."""

    def __init__(self, submit: Callable[[bytes], "Future[Any]"], take: Callable[[Any], object], data: Sequence[bytes]):
        self._submit, self._take, self._data = submit, take, data
        self._sent = self.done = 0
        self._flying: set[Future[Any]] = set()

    def step(self) -> None:
        while len(self._flying) < 4:
            self._flying.add(self._submit(self._data[self._sent % len(self._data)]))
            self._sent += 1
        ended, self._flying = wait(self._flying, timeout=0.05, return_when=FIRST_COMPLETED)
        for future in ended:
            self._take(future.result())
            self.done += 1


def beside(data: Sequence[bytes], rounds: int, seconds: float) -> list[list[str]]:
    """(prepared/s, answered/s) by kind of pool, the kinds in turn; medians."""
    engine = Engine()
    pixels = engine.model.pixels
    told: dict[str, list[tuple[float, float]]] = {"no preparation": [], "2 threads": [], "2 processes": []}
    context = multiprocessing.get_context("forkserver")
    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2, mp_context=context) as processes:
        for _ in range(8):
            taken_over(processes.submit(in_process, pixels, data[0]).result())
        for turn in range(rounds):
            for kind, found in told.items():
                if kind == "no preparation":
                    found.append((0.0, engine.window(seconds, lambda: time.sleep(0.01))))
                    continue
                if kind == "2 threads":
                    closed = Closed(partial(threads.submit, in_thread, pixels), lambda values: values, data)
                else:
                    closed = Closed(partial(processes.submit, in_process, pixels), taken_over, data)
                began = time.perf_counter()
                answered = engine.window(seconds, closed.step)
                found.append((closed.done / (time.perf_counter() - began), answered))
                while closed._flying:
                    closed._take(closed._flying.pop().result())
            print(turn, {kind: found[-1] for kind, found in told.items()}, flush=True)
    return [
        [kind, *(f"{statistics.median(pair[side] for pair in found):.0f}" for side in (0, 1))]
        for kind, found in told.items()
    ]


# --- the page ---


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def write(name: str, text: str) -> None:
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = PAGE.read_text().partition(begin)
    assert found, f"{PAGE} has no place for {name}"
    PAGE.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=6, help="of a window beside the engine")
    parser.add_argument("--only", choices=("alone", "beside"))
    parser.add_argument("--write", action="store_true", help="write docs/preprocessing.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    photos = [photograph(seed) for seed in range(3)]
    load = os.getloadavg()[0]
    where = f"{os.cpu_count()} cores, load average {load:.0f} at the start; `make bench-decode`"
    texts: dict[str, str] = {}
    if options.only != "beside":
        head = ["12 MP JPEG to model input, ms", "plain PIL", "PIL + torchvision", "ours, whole", "ours", "x plain"]
        texts["alone"] = table(head, alone(photos, options.rounds)) + f"\n\nCPU time of one thread; {where}."
        head = ["levels of 255", "detail 1: mean", "largest", "detail 2: mean", "largest"]
        texts["gaps"] = table(head, gaps(photos))
    if options.only != "alone":
        small = [photograph(seed, (336, 252), 90) for seed in range(16)]
        for name, data in (("beside-small", small), ("beside-large", photos)):
            rows = beside(data, max(1, options.rounds // 3), options.seconds)
            texts[name] = table(["pool", "prepared/s", "answered/s"], rows) + f"\n\n{where}."
    for name, text in texts.items():
        print(f"\n{name}\n{text}")
        if options.write:
            write(name, text)


if __name__ == "__main__":
    main()
