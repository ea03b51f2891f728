"""Figures of the five small checkpoints on fresh scenes, end to end over HTTP.

    make accuracy              (or: python tests/bench/accuracy.py --scenes 200 --seed 1)
    make accuracy ONLY=embed   (one predictor's rows again; the others' stay as they were measured)

Scenes come from tests/scenes.py, which shares no code with the training's generator: 96 to 2,000 px, aspect up to 2:1,
PNG, JPEG and WEBP, quality 60 to 95, nothing left out at the diagonal. The enhancer sees the captions of the same
scenes and is checked for facts kept, facts added and the number of sentences. `embed` ranks scenes for each caption.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.progress import track

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sightline.tiny.prose import faults  # noqa: E402
from tests.conftest import Launcher  # noqa: E402
from tests.scenes import SHAPES, random_encoding, random_scene  # noqa: E402

LEVELS = ("low", "medium", "high")
REPORT = ROOT / "docs" / "accuracy.md"
FIGURES = ROOT / "docs" / "accuracy.json"
PAGES_A_CALL = 32
RANKED = 500


@dataclass
class Tally:
    """What one predictor got right: by row, and the mistakes in words."""

    right: dict[str, list[float]] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def add(self, row: str, value: float) -> None:
        self.right.setdefault(row, []).append(value)


@dataclass(frozen=True)
class Figures:
    """One predictor's part of the table. rows: name → (sum, of)."""

    command: str
    machine: str
    seconds: float
    rows: dict[str, tuple[float, int]]
    mistakes: list[str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="default: all")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy.* and the README's table")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 31)
    figures = read_figures() if arguments.write and arguments.only else {}
    for name in arguments.only or PARTS:
        figures[name] = measure(name, arguments.scenes, seed)
        print(table({name: figures[name]}))
        print("\n".join(figures[name].mistakes))
    if arguments.write:
        write({name: figures[name] for name in PARTS if name in figures})
    return 0


def read_figures() -> dict[str, Figures]:
    if not FIGURES.exists():
        return {}
    return {name: Figures(**part) for name, part in json.loads(FIGURES.read_text()).items()}


def write(figures: dict[str, Figures]) -> None:
    FIGURES.write_text(json.dumps({name: asdict(part) for name, part in figures.items()}, indent=1) + "\n")
    REPORT.write_text(page(figures))
    readme = ROOT / "README.md"
    head, _, rest = readme.read_text().partition("<!-- accuracy -->\n")
    _, _, tail = rest.partition("<!-- /accuracy -->")
    readme.write_text(f"{head}<!-- accuracy -->\n{table(figures)}<!-- /accuracy -->{tail}")


def measure(name: str, scenes: int, seed: int) -> Figures:
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher(Path(folder))
        try:
            started = time.monotonic()
            PARTS[name](launcher, scenes, random.Random(seed), tally)
        finally:
            launcher.stop()
    return Figures(
        command=f"python tests/bench/accuracy.py --scenes {scenes} --seed {seed} --only {name}",
        machine=f"{os.cpu_count()} CPUs ({platform.machine()})",
        seconds=round(time.monotonic() - started),
        rows={row: (round(sum(values), 3), len(values)) for row, values in tally.right.items()},
        mistakes=tally.mistakes,
    )


@contextlib.contextmanager
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        yield client


def answer(response: httpx.Response) -> Any:
    response.raise_for_status()
    return response.json()


def of_objects(objects: int) -> str:
    return "one object" if objects == 1 else "two objects"


# ---- describe and enhance, through the pipeline ----------------------------------------------------------------------


def measure_pipeline(launcher: Launcher, scenes: int, rng: random.Random, tally: Tally) -> None:
    describe = launcher.start("describe").wait_ready()
    enhance = launcher.start("enhance").wait_ready()
    gateway = launcher.start("pipeline", "--describe-url", describe.url, "--enhance-url", enhance.url).wait_ready()
    with client(gateway.url) as http:
        for index in track(range(scenes), "describe, enhance", console=None):
            objects = 1 + index % 2
            image, caption = random_scene(rng, objects)
            data, kind = random_encoding(image, rng)
            level = LEVELS[index % 3]
            form = {"reasoning_level": level, "use_gpt_oss": "true"}
            body = answer(http.post("/caption", files={"image": ("scene", data)}, data=form))
            seen = body.get("original_caption", body.get("caption"))
            tally.add(f"describe: caption, {of_objects(objects)}", seen == caption)
            found = faults(seen, level, body["caption"]) if body["enhanced"] else ["not enhanced"]
            tally.add(f"enhance: prose without fault, level {level}", not found)
            if seen != caption:
                tally.mistakes.append(f"describe, {image.size} {kind}: wanted “{caption}”, got “{seen}”")
            if found:
                tally.mistakes.append(f"enhance, {level}: “{body['caption']}”: {'; '.join(found)}")


# ---- generate --------------------------------------------------------------------------------------------------------


def measure_generate(launcher: Launcher, scenes: int, rng: random.Random, tally: Tally) -> None:
    with client(launcher.start("generate").wait_ready().url) as http:
        for index in track(range(scenes), "generate", console=None):
            objects = 1 + index % 2
            image, caption = random_scene(rng, objects)
            said = generated(http, [random_encoding(image, rng)[0]], "Describe this image in detail")
            judge(tally, f"generate: caption, {of_objects(objects)}", caption, said)
            images, shape, wanted = question(rng, 2 + index % 2)
            said = generated(http, images, f"Which image holds a {shape}?")
            judge(tally, f"generate: which of {len(images)} images holds a shape", wanted, said)


def generated(http: httpx.Client, images: list[bytes], prompt: str) -> str:
    files = [("images", (f"{index}", data)) for index, data in enumerate(images)]
    form = {"prompt": prompt, "temperature": "0", "max_tokens": "96"}
    return answer(http.post("/generate/image", files=files, data=form))["output"]


def question(rng: random.Random, count: int) -> tuple[list[bytes], str, str]:
    """`count` scenes of one object, a shape that at least one of them holds, and the true answer."""
    pictures = [random_scene(rng, 1) for _ in range(count)]
    held = [next(shape for shape in SHAPES if shape in caption) for _, caption in pictures]
    shape = rng.choice(held)
    numbers = [str(index + 1) for index, other in enumerate(held) if other == shape]
    plural = "s" if len(numbers) > 1 else ""
    listed = " and ".join(filter(None, [", ".join(numbers[:-1]), numbers[-1]]))
    return [random_encoding(image, rng)[0] for image, _ in pictures], shape, f"image{plural} {listed}"


def judge(tally: Tally, row: str, wanted: str, said: str) -> None:
    tally.add(row, said == wanted)
    if said != wanted:
        tally.mistakes.append(f"{row}: wanted “{wanted}”, got “{said}”")


# ---- embed -----------------------------------------------------------------------------------------------------------


def measure_embed(launcher: Launcher, scenes: int, rng: random.Random, tally: Tally) -> None:
    """nDCG@5 of RANKED captions, each of which is true of one of as many scenes, by MaxSim computed here."""
    pages: dict[str, bytes] = {}
    while len(pages) < RANKED:
        image, caption = random_scene(rng, 2, side=rng.randint(96, 700))
        pages.setdefault(caption, random_encoding(image, rng)[0])
    captions = list(pages)
    with client(launcher.start("embed").wait_ready().url) as http:
        page_vectors: list[np.ndarray] = []
        query_vectors: list[np.ndarray] = []
        for start in track(range(0, RANKED, PAGES_A_CALL), "embed", console=None):
            part = captions[start : start + PAGES_A_CALL]
            files = [("files", (f"{index}", pages[caption])) for index, caption in enumerate(part)]
            body = answer(http.post("/embed/images", files=files))
            page_vectors += [np.array(item["embedding"], np.float32) for item in body["embeddings"]]
            body = answer(http.post("/embed/queries", json={"queries": part}))
            query_vectors += [np.array(vectors, np.float32) for vectors in body["embeddings"]]
    for index, query in enumerate(query_vectors):
        scores = np.array([(query @ page.T).max(axis=1).sum() for page in page_vectors])
        rank = int((scores > scores[index]).sum())
        tally.add(
            "embed: nDCG@5 of captions over 500 scenes of two objects", 1 / math.log2(rank + 2) if rank < 5 else 0
        )
        tally.add("embed: the right scene first", rank == 0)


# ---- blip ------------------------------------------------------------------------------------------------------------


def measure_blip(launcher: Launcher, scenes: int, rng: random.Random, tally: Tally) -> None:
    with client(launcher.start("blip").wait_ready().url) as http:
        for index in track(range(scenes), "blip", console=None):
            objects = 1 + index % 2
            image, caption = random_scene(rng, objects)
            said = answer(http.post("/caption", files={"image": ("scene", random_encoding(image, rng)[0])}))["caption"]
            judge(tally, f"blip: caption, {of_objects(objects)}", caption, said)


PARTS = {
    "pipeline": measure_pipeline,
    "generate": measure_generate,
    "embed": measure_embed,
    "blip": measure_blip,
}


def table(figures: dict[str, Figures]) -> str:
    """What the README shows."""
    lines = ["| what | right | of | % |", "|---|---:|---:|---:|"]
    for part in figures.values():
        for row, (right, of) in sorted(part.rows.items()):
            lines.append(f"| {row} | {right:g} | {of} | {100 * right / of:.1f} |")
    lines += ["", "Made by `make accuracy`, that is:", ""]
    lines += [f"- `{part.command}` on {part.machine}, {part.seconds:g} s" for part in figures.values()]
    return "\n".join(lines) + "\n"


def page(figures: dict[str, Figures]) -> str:
    lines = ["# Accuracy of the small checkpoints, end to end", "", table(figures)]
    for name, part in figures.items():
        if part.mistakes:
            lines += [f"## Mistakes: {name}", "", *(f"- {mistake}" for mistake in part.mistakes), ""]
    return re.sub(r"\n+$", "\n", "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
