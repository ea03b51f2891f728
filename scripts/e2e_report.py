"""What a run of scripts/e2e.py tells: times, versions, sizes of the images, and a picture of the objects."""

import datetime
import io
import json
import os
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"


class Test(NamedTuple):
    name: str
    result: str
    """passed, failed or skipped"""
    seconds: float


def tests(junit: Path) -> list[Test]:
    """The tests in a file of pytest's --junitxml."""
    if not junit.stat().st_size:  # pytest was killed
        return []
    found = []
    for case in ElementTree.parse(junit).iter("testcase"):
        ends = {child.tag for child in case}
        result = "failed" if ends & {"failure", "error"} else "skipped" if "skipped" in ends else "passed"
        words = case.get("name", "").removeprefix("test_").replace("_", " ")
        found.append(Test(words, result, float(case.get("time", 0))))
    return found


def text(times: Sequence[tuple[str, float]], of: Sequence[Test], images: Sequence[str], shown: str) -> str:
    """The report as Markdown."""
    results = [test.result for test in of]
    counts = ", ".join(f"{results.count(one)} {one}" for one in ("passed", "failed", "skipped") if one in results)
    parts = [
        "# The last run on a cluster",
        f"Made by `scripts/e2e.py --report` on {datetime.date.today()}. {_machine()}",
        _table(("what", "version"), list(_versions().items())),
        _table(("step", "seconds"), [(name, f"{seconds:.0f}") for name, seconds in times]),
        f"{counts}:",
        _table(("test", "result", "seconds"), [(test.name, test.result, f"{test.seconds:.0f}") for test in of]),
    ]
    sizes = [(image.rpartition("/")[2], *_size(image)) for image in images]
    if any(size for _, *both in sizes for size in both):
        parts.append(_table(("image", "compressed, MB", "on disk, MB"), sizes))
    parts.append(f"What `kubectl get vpipe,vbatch` showed before the end:\n\n```\n{shown}\n```")
    return "\n\n".join(parts) + "\n"


def picture(shown: str) -> str:
    """What kubectl printed, as SVG; without rich's link to a font elsewhere."""
    from rich._export_format import CONSOLE_SVG_FORMAT
    from rich.console import Console
    from rich.terminal_theme import MONOKAI

    lines = ["$ kubectl get vpipe,vbatch", *shown.splitlines()]
    console = Console(record=True, width=max(map(len, lines)) + 1, file=io.StringIO())
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(title="", theme=MONOKAI, code_format=form, unique_id="kubectl")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _says(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT).stdout.strip()


def _machine() -> str:
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} CPUs ({os.uname().machine}), load average {load:.0f} at the end."


def _versions() -> dict[str, str]:
    version = json.loads(_says("kubectl", "version", "-o", "json") or "{}")
    node = (json.loads(_says("kubectl", "get", "nodes", "-o", "json") or '{"items": []}')["items"] or [{}])[0]
    manager = ("kubectl", "get", "deployment", "-n", "kserve", "kserve-controller-manager")
    kserve = _says(*manager, "-o", "jsonpath={.spec.template.spec.containers[0].image}")
    return {
        "Sightline": _says("git", "describe", "--always", "--dirty"),
        "Kubernetes": version.get("serverVersion", {}).get("gitVersion", ""),
        "container runtime": node.get("status", {}).get("nodeInfo", {}).get("containerRuntimeVersion", ""),
        "KServe": kserve.rpartition(":")[2],
        "Helm": _says("helm", "version", "--short"),
    }


def _size(image: str) -> tuple[str, str]:
    """Its compressed layers as its registry tells them, and its size on disk; both in MB, or empty."""
    disk = _says("docker", "image", "inspect", "-f", "{{.Size}}", image) if shutil.which("docker") else ""
    host, _, name = image.partition("/")
    layers = []
    if name and ":" in host:
        path, _, tag = name.rpartition(":")
        request = urllib.request.Request(f"http://{host}/v2/{path}/manifests/{tag}", headers={"Accept": MANIFEST})
        with urllib.request.urlopen(request, timeout=10) as answer:
            layers = [layer["size"] for layer in json.load(answer)["layers"]]
    return f"{sum(layers) / 1e6:.0f}" if layers else "", f"{int(disk) / 1e6:.0f}" if disk else ""
