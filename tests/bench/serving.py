"""How fast the predictors answer, beside other ways to serve the same checkpoints, in one run on one machine.

    make bench                                                        all parts, into docs/bench.* and the README
    python tests/bench/serving.py --only captioner --clients 8,32 --seconds 5 --seeds 1
    python tests/bench/serving.py --only captioner --vllm-python .venv-vllm/bin/python

Beside ours stand a FastAPI server with a lock, stock KServe 0.21, and, given the Python of an environment with vLLM,
`vllm serve` and the bare AsyncLLM. Every server is a process of its own; all of a part are up at once, and take turns
in a new order each round, so that a noisy machine is as noisy for all. A round is a seed: its inputs are new to every
server, no cache helps. Warm-up is not counted.
"""

import argparse
import contextlib
import fcntl
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import contenders, hostility, inputs, report  # noqa: E402
from tests.bench.contenders import ENVIRONMENT, Contender, Model, Running, Said, running  # noqa: E402
from tests.bench.load import Run, closed_loop, open_loop, percentile  # noqa: E402
from tests.bench.roofline import bound, shape_of  # noqa: E402

TINY = ROOT / "predictors/src/sightline/tiny"
HOLD_SECONDS = 200
"""After so long the lock is given back at the end of a round."""
KEPT = 64
"""Answers of each run that are compared with the naive server's."""


@dataclass(frozen=True)
class Part:
    """A workload. clients: levels of the closed loop; rates: of the open loop, a second; deadline: of goodput, s."""

    name: str
    model: str
    kind: contenders.Kind
    tokens: int
    feed: str
    beside: tuple[str, ...]
    clients: tuple[int, ...]
    seconds: float
    deadline: float
    rates: tuple[float, ...] = ()
    flags: tuple[str, ...] = ()
    pool: int = 1000
    roof: str | None = None


BATCHED = ("--max-batch", "32")
PARTS = [
    Part("floor", "none", "none", 0, "blobs", ("starlette", "kserve", "ours", "ours, base64 in JSON"), (1, 16), 3, 0.1,
         pool=64),
    Part("captioner", "tiny/describe", "captioner", 64, "scenes", ("naive", "kserve", "vllm", "ours-hf", "ours-vllm"),
         (1, 8, 32, 128), 5, 1.0, rates=(15, 60), flags=BATCHED),
    Part("qwen-0.4b", "random/qwen", "captioner", 24, "scenes", ("naive", "vllm", "ours-hf", "ours-vllm"), (1, 8),
         12, 30, flags=BATCHED, pool=200),
    Part("blip-base", "random/blip", "blip", 20, "scenes", ("naive", "ours-hf"), (1, 16), 12, 30,
         flags=("--dtype", "bfloat16", "--max-batch", "16"), pool=200, roof="bfloat16"),
    Part("pages", "tiny/embed", "pages", 0, "scenes", ("naive", "ours-hf"), (1, 8, 32), 4, 1.0, pool=500),
    Part("queries", "tiny/embed", "queries", 0, "queries", ("naive", "ours-hf"), (1, 32), 4, 1.0, pool=500),
    Part("pages-0.4b", "random/colqwen", "pages", 0, "scenes", ("naive", "ours-hf"), (1, 8), 8, 30, pool=200),
    Part("queries-0.4b", "random/colqwen", "queries", 0, "queries", ("naive", "ours-hf"), (1, 8), 5, 30, pool=400),
    Part("photographs", "tiny/describe", "captioner", 64, "photographs", ("naive", "ours-hf"), (1, 8), 5, 2.0,
         flags=BATCHED, pool=24),
]  # fmt: skip
OTHERS = {"reading": "a 12-megapixel JPEG to the model's input", "hostile": "bad requests among good ones, 1:4"}


@dataclass
class Level:
    """All rounds of one server at one load."""

    part: str
    server: str
    load: str
    rates: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    within: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    failed: int = 0
    repeated: int = 0
    alike: tuple[int, int] = (0, 0)
    said: dict[tuple[int, int], Said] = field(default_factory=dict)
    stages: dict[str, list[float]] = field(default_factory=dict)


class Feed:
    """Inputs of one seed, for all servers alike; each server takes them in order, each once if they last."""

    def __init__(self, part: Part, seed: int, count: int) -> None:
        self.items = list(itertools.islice(inputs.KINDS[part.feed](seed * 1000 + 7), count))
        self._taken: dict[str, int] = {}

    def take(self, contender: Contender) -> "Taken":
        return Taken(self, contender, self._taken.setdefault(contender.name, 0))

    def given(self, contender: Contender, count: int) -> int:
        """Note that many as taken; returns how many of them had been taken before."""
        begun = self._taken[contender.name]
        self._taken[contender.name] += count
        return max(0, min(count, begun + count - len(self.items)))


class Taken:
    """The next inputs for one server, rendered as it wants them."""

    def __init__(self, feed: Feed, contender: Contender, begun: int) -> None:
        self._feed, self._contender, self._begun = feed, contender, begun

    def index(self, number: int) -> int:
        return (self._begun + number) % len(self._feed.items)

    def __call__(self, number: int) -> bytes:
        return self._contender.request(self._feed.items[self.index(number)])


def chosen(part: Part, model: Model, options: argparse.Namespace) -> list[Contender]:
    """The servers of a part that this machine can start."""
    python = options.vllm_python
    make = {
        "naive": lambda: [contenders.naive(model)],
        "starlette": lambda: [contenders.raw(model)],
        "kserve": lambda: [contenders.stock(model)],
        "ours": lambda: [contenders.noop(model)],
        "ours, base64 in JSON": lambda: [contenders.noop_json(model)],
        "ours-hf": lambda: [contenders.ours(model)],
        "vllm": lambda: [contenders.vllm_serve(model, python), contenders.bare_vllm(model, python)],
        "ours-vllm": lambda: [contenders.ours(model, "vllm", python)],
    }  # fmt: skip
    names = [name for name in part.beside if "vllm" not in name or python]
    found = [contender for name in names for contender in make[name]()]
    return [one for one in found if not options.servers or one.name in options.servers.split(",")]


def measure(part: Part, options: argparse.Namespace, folder: Path) -> list[Level]:
    """All rounds of a part. Rounds in which another holds the lock wait for it."""
    clients = [int(word) for word in options.clients.split(",")] if options.clients else list(part.clients)
    loads: list[float | int] = [*clients, *(part.rates if not options.clients else ())]
    flags = (*part.flags, *options.flags.split())
    model = Model(part.kind, checkpoint(part.model, options), part.tokens, flags)
    levels: dict[tuple[str, str], Level] = {}
    with running(chosen(part, model, options), folder) as servers:
        for seed in range(options.seeds):
            feed = Feed(part, options.seed + seed, part.pool)
            with options.turn.held():
                if seed == 0:
                    warm(part, servers, feed, max(clients))
                for load in loads:
                    order = random.Random(f"{seed} {load}").sample(servers, len(servers))
                    for server in order:
                        name = f"{load} clients" if isinstance(load, int) else f"{load:g} a second"
                        key = (server.contender.name, name)
                        level = levels.setdefault(key, Level(part.name, *key))
                        one_round(part, server, load, feed, level, options, seed)
    agree(part, list(levels.values()))
    return sorted(levels.values(), key=lambda level: [*map(str, loads)].index(level.load.split()[0]))


def warm(part: Part, servers: Sequence[Running], feed: Feed, clients: int) -> None:
    """Each server answers at one client and at all, on inputs that come back in no round."""
    others = Feed(part, -1, min(64, len(feed.items)))
    for server in servers:
        for count in (1, min(clients, 16)):
            taken = others.take(server.contender)
            uvloop.run(closed_loop(server.contender.port, taken, clients=count, seconds=1.0, at_least=2 * count))


def one_round(
    part: Part, server: Running, load: float, feed: Feed, level: Level, options: argparse.Namespace, seed: int
) -> None:
    taken, port = feed.take(server.contender), server.contender.port
    seconds = options.seconds or part.seconds
    stages, spent = stage_seconds(server), server.cpu_seconds()
    if isinstance(load, int):
        run = uvloop.run(closed_loop(port, taken, clients=load, seconds=seconds, at_least=2 * load))
    else:
        run = uvloop.run(open_loop(port, taken, rate=load, seconds=seconds, rng=random.Random(seed)))
    good = run.good
    level.repeated += feed.given(server.contender, len(run.served))
    level.failed += len(run.served) - len(good)
    level.rates.append(run.rate)
    level.seconds += [item.seconds for item in good]
    level.within.append(sum(item.seconds <= part.deadline for item in good) / (run.ended - run.begun))
    level.cpu.append((server.cpu_seconds() - spent) / max(1, len(good)))
    note_answers(server, run, taken, level, seed)
    for stage, value in stage_seconds(server).items():
        level.stages.setdefault(stage, []).append((value - stages.get(stage, 0.0)) / max(1, len(good)))
    tell(f"{part.name} {level.server} {level.load}: {run.rate:.2f}/s, seed {seed}, {level.failed} failed")


def note_answers(server: Running, run: Run, taken: Taken, level: Level, seed: int) -> None:
    """Tokens of all, texts and vectors of some."""
    made = 0
    for item in run.good:
        assert item.answer is not None
        said = server.contender.read(item.answer)
        made += said.tokens
        if len(level.said) < KEPT * (seed + 1):
            level.said[seed, taken.index(item.index)] = said
    level.tokens.append(made / (run.ended - run.begun))


def agree(part: Part, levels: Sequence[Level]) -> None:
    """Compare with what the first server of the part said of the same inputs; keep how many were alike."""
    first = levels[0].server
    reference = {key: said for level in levels if level.server == first for key, said in level.said.items()}
    for level in levels:
        common = [key for key in level.said if key in reference]
        alike = sum(is_alike(level.said[key], reference[key]) for key in common)
        level.alike = (alike, len(common))


def is_alike(left: Said, right: Said) -> bool:
    """The same text, or vectors whose cosines are all at least 0.99: bfloat16 beside float32 counts as alike."""
    if left.vectors is None or right.vectors is None:
        return left.text == right.text
    a, b = (item.vectors / np.linalg.norm(item.vectors, axis=1, keepdims=True) for item in (left, right))
    return a.shape == b.shape and float((a * b).sum(1).min()) >= 0.99


_STAGE = re.compile(r"(?:request_(\w+)|sightline_request)_seconds_sum\{(.*)\} (\S+)")


def stage_seconds(server: Running) -> dict[str, float]:
    """Seconds that our server has spent in each of KServe's verbs so far, from its metrics; nothing of others."""
    import httpx

    if not server.contender.name.startswith("ours"):
        return {}
    found: dict[str, float] = {}
    url = f"http://127.0.0.1:{server.contender.port}/metrics"
    for line in httpx.get(url, trust_env=False, timeout=60).text.splitlines():
        if (match := _STAGE.match(line)) and (match[1] or "infer" in match[2]):
            stage = match[1] or "whole"
            found[stage] = found.get(stage, 0.0) + float(match[3])
    return found


def checkpoint(name: str, options: argparse.Namespace) -> str:
    """The folder of `tiny/…`, or of `random/…`, which is made when it is not there; `none` is none."""
    kind, _, which = name.partition("/")
    if kind != "random":
        return str(TINY / which)
    folder = Path(options.checkpoints) / which
    if not (folder / "config.json").exists():
        tell(f"making {name}")
        command = [sys.executable, str(ROOT / "tests/bench/checkpoints.py"), which, str(folder)]
        subprocess.run(command, check=True, env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL)
    return str(folder)


class Turn:
    """The machine, among those who ask for it by the same file; given back between two rounds when others may wait."""

    def __init__(self, path: str | None) -> None:
        self._file = open(path, "a") if path else None  # noqa: SIM115 - as long as the process lives
        self._since: float | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        if self._file is not None and self._since is None:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._since = time.monotonic()
        yield
        if self._file is not None and self._since is not None and time.monotonic() - self._since > HOLD_SECONDS:
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._since = None


def tell(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S', time.gmtime())} {line}", file=sys.stderr, flush=True)


# --- the parts that are no loads -------------------------------------------------------------------------------------


def measure_reading(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Milliseconds from a 12-megapixel JPEG to the model's input, in a process of its own."""
    with options.turn.held():
        command = [sys.executable, str(ROOT / "tests/bench/reading.py")]
        environment = os.environ | ENVIRONMENT
        done = subprocess.run(command, check=True, env=environment, cwd=folder, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def measure_hostile(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Good requests alone and among bad ones, to our server with the small captioner."""
    model = Model("captioner", checkpoint("tiny/describe", options), 64, (*BATCHED, *options.flags.split()))
    part = next(part for part in PARTS if part.name == "captioner")
    with running([contenders.ours(model)], folder) as (server,):
        feed = Feed(part, options.seed, 400)
        with options.turn.held():
            warm(part, [server], feed, 8)
        found = hostility.Company()
        for seed in range(options.seeds):
            with options.turn.held():
                uvloop.run(found.round(server.contender, feed.items, options.seconds or 6, seed))
    return found.figures()


def machine(options: argparse.Namespace) -> dict[str, float]:
    """Its roofline, measured in the same run."""
    with options.turn.held():
        command = [sys.executable, str(ROOT / "tests/bench/roofline.py")]
        done = subprocess.run(command, check=True, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE)
    return json.loads(done.stdout)


def share_of_roof(part: Part, level: Level, levels: Sequence[Level], options: argparse.Namespace, roof: Any) -> float:
    """The rate beside the machine's bound for these shapes and this many clients; NaN where none is known."""
    told = [said for other in levels if other.server.startswith("ours") for said in other.said.values()]
    if not told or part.model == "none" or not told[0].prompt_tokens or "clients" not in level.load:
        return float("nan")
    shape = shape_of(Path(checkpoint(part.model, options)), part.roof)
    prompt, image, new = (statistics.mean(getattr(said, name) for said in told) for name in
                          ("prompt_tokens", "image_tokens", "tokens"))  # fmt: skip
    best = bound(shape, roof, batch=int(level.load.split()[0]), prompt=prompt, image=image, new=new)
    return statistics.median(level.rates) / best


def row(part: Part, level: Level, levels: Sequence[Level], options: argparse.Namespace, roof: Any) -> dict[str, Any]:
    """What is kept of a level."""
    count = max(1, len(level.seconds))
    stages = {name: statistics.median(values) * 1000 for name, values in level.stages.items()}
    return {
        "server": level.server,
        "load": level.load,
        "rate": statistics.median(level.rates),
        "rates": [round(rate, 3) for rate in level.rates],
        "p50": 1000 * percentile(level.seconds, 0.5),
        "p95": 1000 * percentile(level.seconds, 0.95),
        "p99": 1000 * percentile(level.seconds, 0.99),
        "requests": count,
        "tokens": statistics.median(level.tokens),
        "goodput": statistics.median(level.within),
        "cpu_ms": 1000 * statistics.median(level.cpu),
        "roof": share_of_roof(part, level, levels, options, roof),
        "failed": level.failed,
        "repeated": level.repeated,
        "alike": level.alike,
        "stages_ms": {name: round(value, 2) for name, value in stages.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS] + list(OTHERS)
    parser.add_argument("--only", action="append", choices=names, help="may be repeated; default: all")
    parser.add_argument("--clients", help="closed loop with these only, such as 8,32; no open loop")
    parser.add_argument("--servers", help="these only, such as naive,ours-hf")
    parser.add_argument("--seconds", type=float, help="of a round at one load; default: the part's own")
    parser.add_argument("--seeds", type=int, default=3, help="rounds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--flags", default="", help="more flags for our servers")
    parser.add_argument("--vllm-python", help="Python of an environment with vLLM; without it no server of vLLM's")
    parser.add_argument("--checkpoints", help="folder where random weights are kept; default: a temporary one")
    parser.add_argument("--lock", help="file to lock while rounds run, for a few minutes at a time")
    parser.add_argument("--write", action="store_true", help="write docs/bench.* and the README's table")
    options = parser.parse_args()
    words = " ".join(["python tests/bench/serving.py", *(word for word in sys.argv[1:] if word != "--write")])
    options.turn = Turn(options.lock)
    with tempfile.TemporaryDirectory() as place:
        options.checkpoints = str(Path(options.checkpoints or f"{place}/checkpoints").resolve())
        roof = machine(options)
        tell(f"roofline: {roof}")
        for name in options.only or names:
            folder = Path(place) / name
            folder.mkdir()
            figures = run_part(name, options, folder, roof)
            figures |= {"command": words, "roof": roof}
            print(report.section(name, figures))
            if options.write:
                report.write({name: figures})


def run_part(name: str, options: argparse.Namespace, folder: Path, roof: Any) -> dict[str, Any]:
    begun = time.monotonic()
    if name in OTHERS:
        found = {"reading": measure_reading, "hostile": measure_hostile}[name](options, folder)
        figures: dict[str, Any] = {"what": OTHERS[name], "figures": found}
    else:
        part = next(part for part in PARTS if part.name == name)
        levels = measure(part, options, folder)
        rows = [row(part, level, levels, options, roof) for level in levels]
        figures = {"rows": rows, "deadline": part.deadline, "tokens": part.tokens, "model": part.model}
    figures |= {"wall": round(time.monotonic() - begun), "load": round(os.getloadavg()[1], 1)}
    return figures | {"cpus": os.cpu_count(), "seeds": options.seeds, "date": time.strftime("%Y-%m-%d", time.gmtime())}


if __name__ == "__main__":
    main()
