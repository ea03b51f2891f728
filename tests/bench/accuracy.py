"""Exact-match figures of the small checkpoints on fresh scenes, end to end over HTTP.

    make accuracy              (or: python tests/bench/accuracy.py --scenes 200 --seed 1)

Scenes come from tests/scenes.py, which shares no code with the training's generator: 96 to 2,000 px, aspect up to 2:1,
PNG, JPEG and WEBP, quality 60 to 95, nothing left out at the diagonal. The enhancer sees the captions of the same
scenes and is checked for facts kept, facts added and the number of sentences.
"""

import argparse
import contextlib
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from rich.progress import track

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sightline.tiny.prose import faults  # noqa: E402
from tests.conftest import Launcher  # noqa: E402
from tests.scenes import random_encoding, random_scene  # noqa: E402

LEVELS = ("low", "medium", "high")
REPORT = ROOT / "docs" / "accuracy.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    parser.add_argument("--url", help="a running pipeline; default: start one")
    parser.add_argument("--write", action="store_true", help="write docs/accuracy.md and the README's table")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 31)
    with pipeline(arguments.url) as url:
        report = measure(url, arguments.scenes, seed)
    print(report)
    if arguments.write:
        REPORT.write_text(report)
        readme = ROOT / "README.md"
        head, _, rest = readme.read_text().partition("<!-- accuracy -->\n")
        _, _, tail = rest.partition("<!-- /accuracy -->")
        readme.write_text(f"{head}<!-- accuracy -->\n{quoted(report)}<!-- /accuracy -->{tail}")
    return 0


def quoted(report: str) -> str:
    """What the README shows: the command and the table, without title and mistakes."""
    return report.partition("\n\n")[2].partition("\nMistakes:")[0]


@contextlib.contextmanager
def pipeline(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher(Path(folder))
        try:
            describe = launcher.start("describe").wait_ready()
            enhance = launcher.start("enhance").wait_ready()
            gateway = launcher.start("pipeline", "--describe-url", describe.url, "--enhance-url", enhance.url)
            yield gateway.wait_ready().url
        finally:
            launcher.stop()


def measure(url: str, scenes: int, seed: int) -> str:
    rng = random.Random(seed)
    right: dict[str, list[bool]] = {}
    mistakes: list[str] = []
    started = time.monotonic()
    with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        for index in track(range(scenes), "captioning", console=None):
            objects = 1 + index % 2
            image, caption = random_scene(rng, objects)
            data, kind = random_encoding(image, rng)
            level = LEVELS[index % 3]
            answer = client.post(
                "/caption", files={"image": ("scene", data)}, data={"reasoning_level": level, "use_gpt_oss": "true"}
            ).json()
            seen = answer.get("original_caption", answer.get("caption"))
            is_right = seen == caption
            for key in (f"caption, {'one object' if objects == 1 else 'two objects'}", f"caption, {kind}"):
                right.setdefault(key, []).append(is_right)
            band = "up to 300 px" if max(image.size) <= 300 else "larger than 300 px"
            right.setdefault(f"caption, {band}", []).append(is_right)
            found = faults(seen, level, answer["caption"]) if answer["enhanced"] else ["not enhanced"]
            right.setdefault(f"enhancement, {level}", []).append(not found)
            if not is_right:
                mistakes.append(f"{image.size} {kind}: wanted “{caption}”, got “{seen}”")
            if found:
                mistakes.append(f"{level}: “{answer['caption']}”: {'; '.join(found)}")
    return render(right, mistakes, scenes, seed, time.monotonic() - started)


def render(right: dict[str, list[bool]], mistakes: list[str], scenes: int, seed: int, seconds: float) -> str:
    lines = [
        "# Accuracy of the small checkpoints, end to end",
        "",
        f"`python tests/bench/accuracy.py --scenes {scenes} --seed {seed}` (`make accuracy`), "
        f"{os.cpu_count()} CPUs ({platform.machine()}), {seconds:.0f} s.",
        "",
        "| what | right | of | % |",
        "|---|---:|---:|---:|",
    ]
    for key, values in sorted(right.items()):
        lines.append(f"| {key} | {sum(values)} | {len(values)} | {100 * sum(values) / len(values):.1f} |")
    if mistakes:
        lines += ["", "Mistakes:", "", *(f"- {mistake}" for mistake in mistakes)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
