"""`sightline batch run` on a folder of scenes and photographs, stopped by Ctrl-C and run again; with the whole demo.

Prints what a person would see, and checks that every image has one result, and that none was asked for again.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from pathlib import Path

import skimage

from tests.scenes import random_encoding, random_scene

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/batch-folder.md"
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
START_SECONDS = 300


def fill(folder: Path, count: int, seed: int) -> Counter[str]:
    """Photographs and whatever else scikit-image brings along, then scenes until there are so many files."""
    rng, made = random.Random(seed), Counter[str]()
    for file in sorted(Path(skimage.data_dir).iterdir()):
        if file.suffix.lower() in PICTURES:
            shutil.copy(file, folder / f"photo-{file.name}")
            made["pictures of scikit-image"] += 1
    (folder / "notes.txt").write_text("No image, and no image's name.")
    (folder / "broken.jpg").write_bytes(b"This is not an image.")
    made["a text that is called broken.jpg"] += 1
    while made.total() < count:
        image, _ = random_scene(rng)
        data, kind = random_encoding(image, rng)
        (folder / f"scene-{made.total():03}.{kind.lower()}").write_bytes(data)
        made["drawn scenes"] += 1
    return made


def serve(port: int, log: Path) -> "subprocess.Popen[bytes]":
    """`sightline demo`, when its gateway answers."""
    command = [sys.executable, "-m", "sightline", "demo", "--port", str(port)]
    with log.open("wb") as out:
        demo = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT)
    until = time.monotonic() + START_SECONDS
    while b"Ctrl-C" not in log.read_bytes():  # said last, when all samples were shown
        if demo.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"the demo does not start:\n{log.read_text()}")
        time.sleep(0.5)
    return demo


def asked(port: int) -> float:
    """Captions that the gateway has given so far."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    ours = [line for line in lines if line.startswith("sightline_requests_total{") and 'route="/caption"' in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in ours)


def run(folder: Path, place: Path, port: int, stop_after: int = 0) -> tuple[int, str]:
    """One run in a shell of its own; stopped by Ctrl-C when the gateway has given so many more captions."""
    command = [sys.executable, "-m", "sightline", "batch", "run", "photos/", "--out", "captions.jsonl"]
    command += ["--url", f"http://127.0.0.1:{port}"]
    environment = os.environ | {"COLUMNS": "100", "XDG_DATA_HOME": str(place / "data")}
    before = asked(port)
    process = subprocess.Popen(
        command, cwd=folder.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while stop_after and process.poll() is None and asked(port) < before + stop_after:
        time.sleep(0.2)
    if stop_after:
        process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    return process.returncode, said


def check(folder: Path) -> dict[str, int]:
    """One line for each file, in one of the two files."""
    lines: dict[str, list[dict[str, object]]] = {}
    for name in ("captions.jsonl", "captions.errors.jsonl"):
        file = folder.parent / name
        lines[name] = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    ids = Counter(str(line["custom_id"]) for some in lines.values() for line in some)
    wanted = {file.name for file in folder.iterdir()} - {"notes.txt"}
    assert set(ids) == wanted, wanted ^ set(ids)
    assert set(ids.values()) == {1}
    return {name: len(some) for name, some in lines.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--stop-after", type=int, default=200, help="captions, then Ctrl-C")
    parser.add_argument("--port", type=int, default=8380)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        folder = place / "photos"
        folder.mkdir()
        made = fill(folder, options.images, options.seed)
        demo = serve(options.port, place / "demo.log")
        try:
            before = asked(options.port)
            first = run(folder, place, options.port, options.stop_after)
            second = run(folder, place, options.port)
            third = run(folder, place, options.port)
            given = asked(options.port) - before
        finally:
            demo.send_signal(signal.SIGINT)
            demo.wait(60)
        counts = check(folder)
    page = report(made, (first, second, third), counts, given)
    print(page)
    if options.write:
        PAGE.write_text(page)


def report(made: Counter[str], runs: tuple[tuple[int, str], ...], counts: dict[str, int], given: float) -> str:
    """What happened, as a page."""
    title = "# A folder of pictures, stopped by Ctrl-C and run again\n"
    what = ", ".join(f"{text} ({count})" for text, count in made.items())
    lines = [
        title,
        f"Written by `python tests/bench/folder.py --write`: {what};\nasked of the gateway of `make demo`.\n",
    ]
    for text, (code, said) in zip(
        ("Ctrl-C in the middle", "the same command again", "and once more"), runs, strict=True
    ):
        lines.append(f"`sightline batch run photos/ --out captions.jsonl`, {text} (exit code {code}):\n")
        lines.append(f"```text\n{said.strip()}\n```\n")
    lines.append(f"Lines: {', '.join(f'{count} in {name}' for name, count in counts.items())}; every file once.")
    lines.append(f"Requests to the gateway's `/caption` in all: {given:.0f}.\n")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
