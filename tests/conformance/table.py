"""The conformance table: our six models and a stock KServe 0.21 server with an echo model, side by side.

    make conformance             (or: python tests/conformance/table.py; --model describe --model stock for some)

Ours are served by one process (`sightline serve all`), the stock one is `stock_kserve.py`. Every mark is measured by
the run that writes it, the check that tries to take the model away included.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sightline.conformance.catalogue import CHECKS, selected  # noqa: E402
from sightline.conformance.report import MARKS, as_markdown, as_summary  # noqa: E402
from sightline.conformance.run import run, wait_until_ready  # noqa: E402
from sightline.conformance.suite import Outcome, Result  # noqa: E402
from sightline.conformance.target import Address  # noqa: E402
from tests.conftest import Launcher, Server, free_port  # noqa: E402

OURS = ("describe", "generate", "embed", "enhance", "blip", "pipeline")
STOCK = "stock KServe"
REPORT = ROOT / "docs" / "conformance.md"
MARKER = "<!-- conformance -->\n", "<!-- /conformance -->"
START_SECONDS = 300


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=[*OURS, "stock"], help="default: all")
    parser.add_argument("--write", action="store_true", help="write docs/conformance.md and the README's table")
    arguments = parser.parse_args()
    wanted = arguments.model or [*OURS, "stock"]
    started = time.monotonic()
    columns: dict[str, Sequence[Result]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if ours := [name for name in OURS if name in wanted]:
            launcher = Launcher(Path(folder))
            try:
                server = launcher.start(" ".join(ours))
                for name in ours:
                    columns[name] = measured(address_of(server, name))
            finally:
                launcher.stop()
        if "stock" in wanted:
            with stock_server(Path(folder)) as address:
                columns[STOCK] = measured(address)
    report = render(columns, time.monotonic() - started)
    print(report)
    if arguments.write:
        REPORT.write_text(report)
        readme = ROOT / "README.md"
        head, _, rest = readme.read_text().partition(MARKER[0])
        _, _, tail = rest.partition(MARKER[1])
        readme.write_text(f"{head}{MARKER[0]}{quoted(report)}{MARKER[1]}{tail}")
    return 0


def address_of(server: Server, model: str) -> Address:
    return Address(server.url, grpc=f"127.0.0.1:{server.grpc_port}", model=model, intrusive=True)


def measured(address: Address) -> list[Result]:
    wait_until_ready(address, START_SECONDS)
    print(f"{address.model} …", file=sys.stderr, flush=True)
    return run(selected(intrusive=True), address)


@contextmanager
def stock_server(folder: Path) -> Iterator[Address]:
    """A stock KServe process on free ports."""
    http_port, grpc_port = free_port(), free_port()
    address = Address(f"http://127.0.0.1:{http_port}", grpc=f"127.0.0.1:{grpc_port}", model="echo", intrusive=True)
    script = Path(__file__).with_name("stock_kserve.py")
    with (folder / "stock.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, script, str(http_port), str(grpc_port)], stdout=log, stderr=log, cwd=folder
        )
    try:
        wait_until_ready(address, START_SECONDS)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def render(columns: Mapping[str, Sequence[Result]], seconds: float) -> str:
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("kserve", "tritonclient", "openai", "schemathesis", "httpx")
    )
    parts = [
        INTRODUCTION,
        "## Table\n",
        f"`make conformance`: {versions}, {len(CHECKS)} checks a server, {seconds:.0f} s in all. "
        "A cell says how many of the checks that apply pass; a dash, that none applies.\n",
        as_summary(columns),
        "## Every check\n",
        "✓ passed · ✗ failed · – does not apply\n",
        as_markdown(columns),
    ]
    for name, results in columns.items():
        if failed := [result for result in results if result.outcome is Outcome.FAIL]:
            parts += [f"## What {name} does instead\n", *(f"- `{r.id}`: {shown(r.reason)}" for r in failed), ""]
    parts += ["## What does not apply\n", *(f"- {line}" for line in skipped(columns))]
    return "\n".join(parts) + "\n"


def skipped(columns: Mapping[str, Sequence[Result]]) -> list[str]:
    """One line for each reason: which servers, which checks."""
    groups: dict[str, dict[str, list[str]]] = {}
    for name, results in columns.items():
        for result in results:
            if result.outcome is Outcome.SKIP:
                groups.setdefault(shown(result.reason), {}).setdefault(result.id, []).append(name)
    lines: list[str] = []
    for reason, checks in groups.items():
        by_servers: dict[tuple[str, ...], list[str]] = {}
        for check, names in checks.items():
            by_servers.setdefault(tuple(names), []).append(f"`{check}`")
        lines += [f"{', '.join(names)}: {', '.join(ids)} ({reason})" for names, ids in by_servers.items()]
    return lines


def shown(reason: str) -> str:
    """As text of a Markdown page, without what differs from run to run."""
    plain = re.sub(r"[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}", "<id>", reason)
    plain = re.sub(r"127\.0\.0\.1:\d+", "<address>", plain)
    text = plain if len(plain) <= 140 else plain[:139] + "…"
    return f"`{text.replace('`', chr(39))}`"


def quoted(report: str) -> str:
    """What the README shows: the command and the summary."""
    return report.partition("## Table\n\n")[2].partition("## Every check")[0].rstrip() + "\n"


def column(report: str, name: str) -> dict[str, str]:
    """The marks of one server, by check."""
    marks: dict[str, str] = {}
    for line in report.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if cells[0] == "check":
            names = cells[3:]
        elif re.fullmatch(r"`[a-z]+\.[a-z0-9-]+`", cells[0]) and name in names:
            marks[cells[0].strip("`")] = cells[3 + names.index(name)]
    return marks


def marks_of(results: Sequence[Result]) -> dict[str, str]:
    return {result.id: MARKS[result.outcome] for result in results}


INTRODUCTION = """\
# Conformance

`sightline conformance` is a black-box suite for any server of the KServe V2 (Open Inference) protocol. It reads the
model's metadata, makes a request that the model takes, and asks over plain HTTP, the binary tensor data extension,
compressed bodies and gRPC, with bare sockets and with the clients that people use: tritonclient (http and grpc, sync
and async), KServe's REST and gRPC clients, openai, and schemathesis over
[a corrected OpenAPI document of the protocol](../predictors/src/sightline/conformance/open-inference-protocol.yaml).
It shares no code with our server.

```
pip install './predictors[conformance]'
sightline conformance --url http://127.0.0.1:8080 --grpc 127.0.0.1:8081
```

| option | |
|---|---|
| `--model NAME` | which model; default: the first that the server lists |
| `--grpc HOST:PORT` | its gRPC address; without it those checks do not apply |
| `--openai`, `--no-openai` | OpenAI's routes must be there, are left alone; default: checked when there are any |
| `--api-key KEY` | sent as `X-API-Key` and as `Authorization: Bearer` |
| `--request FILE` | a V2 request that the model takes, if it cannot be guessed; base64 of images goes raw in binary |
| `--select 'errors.*'` | some checks; repeatable. `--list` names all |
| `--wait`, `--timeout` | seconds for the model to be ready, for an answer |
| `--json`, `--markdown` | for programs, for pages |
| `--intrusive` | also tries to unload the model: not on a server in use |
| `--document` | prints the OpenAPI document |

It exits with 0 when everything that the protocol's text asks for holds, with 1 when something does not, with 2 when
nothing answers. Each check has a level: **must** (the text of the protocol), **extension** (binary tensor data,
compression, OpenAI's routes: what many clients and servers have), **promise** (what a client can reasonably expect and
Sightline promises, though no text says so).

That each check can fail is itself tested: `tests/conformance/test_checks.py` runs it against a server that does
everything right, and against the same server with the one fault that the check is about.
"""


if __name__ == "__main__":
    sys.exit(main())
