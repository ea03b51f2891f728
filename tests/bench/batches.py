"""`make bench-batch`: what a batch costs beside the same calls made by a bare async loop, with kills, resumed, planned.

Workers are `python -m sightline.jobs`, four at a time as a Job of four would run them; the store is a real S3 server
and the gateway a stub that answers at once, all on this machine. Wall clock and the workers' CPU time; the latter is
what counts where others use the machine as well. Progress on stderr, the table (Markdown) on stdout.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "predictors/src")]

from tests.bench import captioner, planning  # noqa: E402
from tests.jobs.harness import BUCKET, Batch, until  # noqa: E402
from tests.jobs.pictures import picture  # noqa: E402
from tests.jobs.store_proxy import StoreProxy  # noqa: E402
from tests.jobs.stub import Stub  # noqa: E402
from tests.s3 import S3Server, running_s3  # noqa: E402

WORKERS = 4
IN_FLIGHT = 16
LOOK_SECONDS = 0.1
FIGURES, PAGE, README = ROOT / "docs/batch-evidence.json", ROOT / "docs/batch-evidence.md", ROOT / "README.md"
PYTHONPATH = os.pathsep.join(sys.path[:2])
MARKS = ("<!-- bench-batch -->\n", "<!-- /bench-batch -->")

Figures = dict[str, float]


def tell(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Spent:
    """What something took: seconds of the clock, and of the CPU by the processes that did it."""

    wall: float
    cpu: float


@contextlib.contextmanager
def spending() -> Generator[list[Spent]]:
    """Of the child processes that end in the block."""
    spent: list[Spent] = []
    start, before = time.monotonic(), _children()
    yield spent
    spent.append(Spent(time.monotonic() - start, _children() - before))


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@dataclass
class Bench:
    """One album in one bucket, one stub, and batches of it."""

    s3: S3Server
    stub: Stub
    folder: Path
    options: argparse.Namespace
    pictures: dict[str, bytes] = field(default_factory=dict[str, bytes])
    figures: Figures = field(default_factory=dict[str, float])
    batches: int = 0

    def fill(self) -> None:
        """Put the album into the bucket."""
        from concurrent.futures import ThreadPoolExecutor

        import obstore
        from obstore.store import S3Store

        self.s3.bucket(BUCKET)
        self.pictures = {f"album/{n // 1000:04}/{n:07}.png": picture(n) for n in range(self.options.items)}
        store = S3Store(
            BUCKET,
            endpoint=self.s3.endpoint_url,
            access_key_id=self.s3.access_key,
            secret_access_key=self.s3.secret_key,
            region=self.s3.region,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda entry: obstore.put(store, *entry), self.pictures.items()))
        tell(f"{len(self.pictures)} pictures of about 110 bytes are in the bucket ({self.s3.kind})")

    def warm(self) -> None:
        """Compile what both import, as it is in an installed image; the first start would pay for all."""
        command = "import sightline.jobs.worker, obstore.auth.boto3, tests.bench.bare_loop, anyio._backends._asyncio"
        subprocess.run([sys.executable, "-c", command], env=environment(), check=True)

    def batch(self) -> Batch:
        """A new one, planned and not begun."""
        self.batches += 1
        place = self.folder / f"batch-{self.batches}"
        place.mkdir()
        return Batch(
            self.s3,
            StoreProxy("", url=self.s3.endpoint_url),
            self.stub,
            place,
            self.pictures,
            "album/",
            f"bench-{self.batches}",
            shard_size=self.options.shard_size,
            chunk_size=50,
            max_in_flight=IN_FLIGHT,
            launch=launch,
        )

    def plan(self) -> None:
        """Planning a million keys, in a process of its own."""
        place = self.folder / "million"
        place.mkdir()
        found = planning.plan(self.options.keys, self.s3, place)
        tell(f"plan: {found}")
        self.figures |= {
            "plan_keys": found.keys,
            "plan_mib": found.mib,
            "plan_keys_seconds": found.seconds,
            "plan_keys_cpu": found.cpu_seconds,
        }

    def stub_says(self, route: str = "") -> dict[str, Any]:
        return httpx.get(f"{self.stub.url}/stub{route}", trust_env=False, timeout=60).json()

    # --- measures ----------------------------------------------------------------------------------------------------

    def overhead(self) -> None:
        """The bare loop, then a batch, in one run."""
        count = len(self.pictures)
        bare = self.bare()
        tell(f"bare loop: {bare}")
        batch = self.batch()
        with spending() as planned:
            batch.do("plan", 3600)
        with spending() as spent:
            batch.run_shards(parallelism=WORKERS, seconds=3600)
        with spending() as finished:
            batch.do("finish", 3600)
        tell(f"batch: {spent[0]}, plan {planned[0]}, finish {finished[0]}")
        assert self.done_twice() == 0
        self.figures |= {
            "items": count,
            "bare_wall": bare.wall,
            "bare_cpu": bare.cpu,
            "batch_wall": spent[0].wall,
            "batch_cpu": spent[0].cpu,
            "plan_seconds": planned[0].wall,
            "finish_seconds": finished[0].wall,
        }

    def kills(self) -> None:
        """The same with kill -9 for a random worker, each time at some random part of the work."""
        rng = random.Random(self.options.seed)
        marks = sorted(rng.uniform(0.01, 0.97) * len(self.pictures) for _ in range(self.options.kills))
        batch = self.batch()
        batch.do("plan", 3600)
        self.stub_says("/forget")
        looked = 0.0

        def kill_when_due() -> None:
            nonlocal looked
            if not marks or time.monotonic() < looked + LOOK_SECONDS:
                return
            looked = time.monotonic()
            if self.stub_says()["pictures"] >= marks[0] and batch.kill_one(rng):
                marks.pop(0)

        with spending() as spent:
            batch.run_shards(parallelism=WORKERS, seconds=3600, each=kill_when_due)
        batch.do("finish", 3600)
        tell(f"{batch.kills} kills: {spent[0]}")
        self.figures |= {
            "kills": batch.kills,
            "kills_wall": spent[0].wall,
            "kills_cpu": spent[0].cpu,
            "kills_rework": self.done_twice(),
        }

    def resume(self) -> None:
        """Kill all four at the half, start four again: until the first item that was not done yet."""
        batch = self.batch()
        batch.do("plan", 3600)
        self.stub_says("/forget")
        half = len(self.pictures) // 2
        with contextlib.suppress(_Half):
            batch.run_shards(parallelism=WORKERS, seconds=3600, each=lambda: self._stop_at(half))
        batch.end_all()
        before = self.stub_says()
        start = time.time()
        done = {int(key.split("/")[1].split("-")[1].split(".")[0]) for key in batch.listing("done/")}
        left = [shard for shard in range(batch.shards) if shard not in done]
        for shard in left[:WORKERS]:
            batch.start("run", shard)
        until(lambda: self.stub_says()["pictures"] > before["pictures"], 60, "a new item")
        first = self.stub_says(f"/new/{before['pictures']}")["at"] - start
        batch.end_all()
        tell(f"resumed at {before['pictures']} of {len(self.pictures)}: first new item after {first:.2f} s")
        self.figures |= {"resume_first_seconds": first, "resume_at": before["pictures"]}

    def captioner(self) -> None:
        """A real predictor, small, so that it is what takes the time."""
        place = self.folder / "captioner"
        place.mkdir()
        found = captioner.compare(self.options.scenes, place, environment())
        tell(f"captioner: {found}")
        self.figures |= {
            "captioner_images": found.images,
            "captioner_direct": found.direct,
            "captioner_batch": found.batch,
        }

    def _stop_at(self, count: int) -> None:
        if self.stub_says()["given"] >= count:
            raise _Half

    def bare(self) -> Spent:
        """Four processes, every fourth key each."""
        keys = sorted(self.pictures)
        told = environment() | self.s3.environment()
        told |= {
            "TARGET": self.stub.url,
            "ENDPOINT": self.s3.endpoint_url,
            "BUCKET": BUCKET,
            "IN_FLIGHT": str(IN_FLIGHT),
        }
        files = [self.folder / f"keys-{number}" for number in range(WORKERS)]
        for number, file in enumerate(files):
            file.write_text("\n".join(keys[number::WORKERS]))
        command = [sys.executable, "-m", "tests.bench.bare_loop"]
        with spending() as spent:
            processes = [subprocess.Popen([*command, str(file)], env=told, cwd=ROOT) for file in files]
            codes = [process.wait() for process in processes]
        assert not any(codes), f"a bare loop failed: {codes}"
        assert self.stub_says("/forget")["given"] == len(keys)
        return spent[0]

    def done_twice(self) -> int:
        """Captions given again since the last time that this was asked."""
        said = self.stub_says("/forget")
        assert said["pictures"] == len(self.pictures), said
        return said["given"] - said["pictures"]


class _Half(Exception):
    """Half of a batch is done."""


def launch(words: list[str], log: Path, told: Mapping[str, str], folder: Path) -> "subprocess.Popen[bytes]":
    """As a pod starts its worker: a new interpreter."""
    command = [sys.executable, "-m", "sightline.jobs", *words]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=environment() | dict(told) | LEARNT, cwd=folder)


def environment() -> dict[str, str]:
    """Of every process here: our sources, and byte code that is kept."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"} | LEARNT


LEARNT: dict[str, str] = {"PYTHONPATH": PYTHONPATH, "PYTHONDONTWRITEBYTECODE": ""}


@contextlib.contextmanager
def stub_process(folder: Path) -> Generator[Stub]:
    """The stub in a process of its own; the object here knows its address only."""
    port_file = folder / "stub.port"
    command = [sys.executable, "-m", "tests.jobs.stub", str(port_file)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": PYTHONPATH}, cwd=ROOT)
    try:
        until(port_file.exists, 30, "the stub")
        yield Stub(port=json.loads(port_file.read_text()))
    finally:
        process.terminate()
        process.wait()


# --- the table -------------------------------------------------------------------------------------------------------


def rows(figures: Figures) -> list[tuple[str, str, str]]:
    """What, measured, goal."""
    found: list[tuple[str, str, str]] = []
    if "batch_wall" in figures:
        f, count = figures, figures["items"]
        found += [
            (f"bare loop, {count:,.0f} images, four processes", _rate(count, f["bare_wall"], f["bare_cpu"]), ""),
            ("the same as a batch, four workers", _rate(count, f["batch_wall"], f["batch_cpu"]), ""),
            ("its planning; its finish", f"{f['plan_seconds']:.1f} s; {f['finish_seconds']:.1f} s", ""),
            ("**overhead of an item**: clock", f"× {f['batch_wall'] / f['bare_wall']:.3f}", "≤ 1.15"),
            ("overhead of an item: the workers' CPU time", f"× {f['batch_cpu'] / f['bare_cpu']:.3f}", ""),
        ]
    if "kills_wall" in figures:
        f = figures
        found += [
            (f"**with {f['kills']:.0f} kills** (kill -9): clock", f"× {f['kills_wall'] / f['bare_wall']:.3f}", "≤ 1.3"),
            ("with them: the workers' CPU time", f"× {f['kills_cpu'] / f['bare_cpu']:.3f}", ""),
            ("captions made twice thereby", f"{f['kills_rework']:,.0f}", f"≤ {f['kills'] * 100:,.0f}"),
        ]
    if "resume_first_seconds" in figures:
        at = f"**resume** at {figures['resume_at']:,.0f} of {figures['items']:,.0f}: first new item"
        found.append((at, f"{figures['resume_first_seconds']:.1f} s", "≤ 10 s"))
    if "plan_keys" in figures:
        f = figures
        took = f"{f['plan_mib']:.0f} MiB, {f['plan_keys_seconds']:.0f} s, of the CPU {f['plan_keys_cpu']:.0f} s"
        found.append((f"**planning {f['plan_keys']:,.0f} keys** (a listing as S3 answers it)", took, "≤ 300 MB"))
    if "captioner_batch" in figures:
        f = figures
        what = f"**the small captioner**, {f['captioner_images']:.0f} scenes: `sightline batch` beside itself"
        rate = f"{f['captioner_batch']:.1f} of {f['captioner_direct']:.1f} images/s"
        found.append((what, f"{rate}, × {f['captioner_batch'] / f['captioner_direct']:.3f}", "≥ 0.95"))
    return found


def _rate(count: float, wall: float, cpu: float) -> str:
    return f"{count / wall:,.0f} images/s, {1000 * cpu / count:.2f} ms of CPU each"


def table(figures: Figures, commands: list[str]) -> str:
    lines = ["| what | measured | goal |", "|---|---:|---:|"]
    lines += [f"| {what} | {measured} | {goal} |" for what, measured, goal in rows(figures)]
    return "\n".join([*lines, "", "Made by `make bench-batch`, that is:", "", *(f"- {line}" for line in commands), ""])


def write(figures: Figures, command: str) -> None:
    """Into docs/batch-evidence.md and the README; figures of other runs stay."""
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"figures": {}, "commands": {}}
    known["figures"] |= figures
    known["commands"] |= {name: command for name in figures}
    FIGURES.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    text = table(known["figures"], sorted(set(known["commands"].values())))
    for page in (PAGE, README):
        head, mark, rest = page.read_text().partition(MARKS[0])
        assert mark, f"{page} has no {MARKS[0].strip()}"
        page.write_text(head + mark + text + MARKS[1] + rest.partition(MARKS[1])[2])


MEASURES: dict[str, Callable[[Bench], None]] = {
    "overhead": Bench.overhead,
    "kills": Bench.kills,
    "resume": Bench.resume,
    "plan": Bench.plan,
    "captioner": Bench.captioner,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--shard-size", type=int, default=5_000)
    parser.add_argument("--keys", type=int, default=1_000_000, help="of plan")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--scenes", type=int, default=500, help="of captioner")
    parser.add_argument("--seed", type=int, default=20_261_121)
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="may be repeated")
    parser.add_argument("--write", action="store_true", help="write docs/batch-evidence.* and the README's table")
    options = parser.parse_args()
    wanted = [name for name in MEASURES if options.only is None or name in options.only]
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        s3 = stack.enter_context(running_s3(folder))
        bench = Bench(s3, stack.enter_context(stub_process(folder)), folder, options)
        LEARNT["PYTHONPYCACHEPREFIX"] = str(folder / "pycache")
        bench.warm()
        if {"overhead", "kills", "resume"} & set(wanted):
            bench.fill()
        for name in wanted:
            tell(name)
            MEASURES[name](bench)
        figures = bench.figures
    words = " ".join(["python tests/bench/batches.py", *(word for word in sys.argv[1:] if word != "--write")])
    command = f"`{words}` on {os.cpu_count()} CPUs ({platform.machine()}), {time.monotonic() - begun:.0f} s"
    command += f", load average {os.getloadavg()[1]:.0f} (others worked there too)" if os.getloadavg()[1] > 8 else ""
    print(table(figures, [command]))
    if options.write:
        write(figures, command)


if __name__ == "__main__":
    main()
