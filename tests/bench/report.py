"""The figures of tests/bench/serving.py as tables: docs/bench.md, docs/bench.json, and the goals in the README."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "bench.md"
FIGURES = ROOT / "docs" / "bench.json"
README = ROOT / "README.md"
MARKS = ("<!-- bench -->\n", "<!-- /bench -->")
Parts = Mapping[str, dict[str, Any]]


def section(name: str, part: dict[str, Any]) -> str:
    """One part as Markdown."""
    lines = [f"## {name}", "", *(_loads(part) if "rows" in part else _list(part["figures"]))]
    roof = part["roof"]
    lines += ["", f"`{part['command']}` on {part['date']}, {part['cpus']} CPUs, {part['wall']} s, load average "
              f"{part['load']:g}. Machine: {roof['float32'] / 1e9:.0f} GFLOP/s float32, "
              f"{roof['bfloat16'] / 1e9:.0f} bfloat16, {roof['bytes'] / 1e9:.1f} GB/s."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _loads(part: dict[str, Any]) -> list[str]:
    within = f"in {part['deadline']:g} s"
    names = ("server", "load", "a second (rounds)", "p50", "p95", "p99 ms", "tokens/s", within, "CPU ms", "of the roof")
    lines = [f"| {' | '.join(names)} | alike |", "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in part["rows"]:
        rates = f"{_short(row['rate'])} ({_short(min(row['rates']))}–{_short(max(row['rates']))})"
        roof = "" if row["roof"] is None or math.isnan(row["roof"]) else f"{100 * row['roof']:.0f} %"
        failed = f", {row['failed']} failed" if row["failed"] else ""
        lines.append(
            f"| {row['server']} | {row['load']}{failed} | {rates} | {_short(row['p50'])} | {_short(row['p95'])} "
            f"| {_short(row['p99'])} | {row['tokens']:.0f} | {_short(row['goodput'])} | {_short(row['cpu_ms'])} "
            f"| {roof} | {row['alike'][0]}/{row['alike'][1]} |"
        )
    stages = [row for row in part["rows"] if row["stages_ms"]]
    if stages:
        names = ("preprocess", "predict", "postprocess", "whole")
        lines += [
            "",
            "Where a request's time goes, ms on average (`whole`: from the first byte in to the last byte out):",
        ]
        lines += ["", f"| server | load | {' | '.join(names)} |", f"|---|---|{'---:|' * len(names)}"]
        for row in stages:
            cells = " | ".join(_short(row["stages_ms"].get(name, math.nan)) for name in names)
            lines.append(f"| {row['server']} | {row['load']} | {cells} |")
    return lines


def _list(figures: Mapping[str, float]) -> list[str]:
    return ["| what | measured |", "|---|---:|", *(f"| {name} | {_short(value)} |" for name, value in figures.items())]


def _short(value: float) -> str:
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


# --- goals -----------------------------------------------------------------------------------------------------------


def goals(parts: Parts) -> list[tuple[str, float, str, bool]]:
    """What, measured, goal, whether it is reached; of what was measured."""
    found: list[tuple[str, float, str, bool]] = []

    def ratio(what: str, name: str, load: str, servers: tuple[str, str], least: float, field: str = "rate") -> None:
        one, other = (_row(parts, name, load, server) for server in servers)
        if one and other:
            value = one[field] / other[field]
            found.append((what, value, f"≥ {least:g}", value >= least))

    small, large = "the small captioner", "random Qwen2.5-VL of 0.4 B"
    for engine in ("ours-hf", "ours-vllm"):
        via = f"`{engine.removeprefix('ours-')}`"
        ratio(f"{small}, 1 client, {via} beside naive", "captioner", "1 clients", (engine, "naive"), 1)
        ratio(f"{small}, 32 clients, {via} beside naive", "captioner", "32 clients", (engine, "naive"), 7)
        ratio(f"{small}, 8 clients, {via} beside `vllm serve`", "captioner", "8 clients", (engine, "vllm serve"), 1.3)
        ratio(f"{small}, 32 clients, {via} beside `vllm serve`", "captioner", "32 clients", (engine, "vllm serve"), 1.4)
        ratio(f"{large}, 8 clients, {via} beside naive", "qwen-0.4b", "8 clients", (engine, "naive"), 3.2)
        ratio(f"{large}, 8 clients, {via} beside `vllm serve`", "qwen-0.4b", "8 clients", (engine, "vllm serve"), 1)
    for name, clients in (("captioner", 32), ("qwen-0.4b", 8)):
        ratio(f"`vllm` beside the bare AsyncLLM, {name}", name, f"{clients} clients", ("ours-vllm", "AsyncLLM"), 0.97)
    ratio("BLIP-base in bfloat16, 16 clients, beside one at a time", "blip-base", "16 clients", ("ours-hf", "naive"), 4)
    ratio("no model, 100 KB in V2 binary, beside KServe's base64", "floor", "16 clients", ("ours", "kserve"), 2.5)
    if one := _row(parts, "floor", "1 clients", "ours"):
        found.append(("the same, latency added, p50 in ms", one["p50"], "≤ 3", one["p50"] <= 3))
    if "reading" in parts:
        told = parts["reading"]["figures"]
        value = told["plain_input"] / told["ours_input"]
        found.append(("12-megapixel JPEG to the model's input, beside plain PIL", value, "≥ 3", value >= 3))
    if "hostile" in parts:
        told = parts["hostile"]["figures"]
        value = told["p95_ratio"]
        found.append(("good requests' p95 among bad ones, beside alone", value, "< 1.2", value < 1.2))
        found.append(("their answers that changed", told["answers_changed"], "0", told["answers_changed"] == 0))
    return found


def _row(parts: Parts, name: str, load: str, server: str) -> dict[str, Any] | None:
    rows: Sequence[dict[str, Any]] = parts.get(name, {}).get("rows", [])
    return next((row for row in rows if row["load"] == load and row["server"] == server), None)


def table(parts: Parts) -> str:
    lines = ["| what | measured | goal | |", "|---|---:|---:|---|"]
    for what, value, goal, is_reached in goals(parts):
        lines.append(f"| {what} | {value:.2f} | {goal} | {'reached' if is_reached else '**missed**'} |")
    loads = sorted(part["load"] for part in parts.values())
    cpus = max(part["cpus"] for part in parts.values())
    minutes = sum(part["wall"] for part in parts.values()) / 60
    lines += ["", f"Made by `make bench` in {minutes:.0f} minutes on {cpus} CPUs, at a load average of {loads[0]:g} to "
              f"{loads[-1]:g} (1 for each that wants a CPU); [every figure](docs/bench.md)."]  # fmt: skip
    return "\n".join(lines) + "\n"


INTRODUCTION = """# How fast it is, beside other ways to serve the same models

Every part is one run: each server is a process of its own, all are up at once and take turns, in a new order each
round, so that a noisy machine is as noisy for all; **ratios hold, absolute figures are this machine's at that hour**.
A round has a seed; its pictures are new to every server. Clients are bare keep-alive connections in one process on the
same cores; latency counts from when a request was due. Warm-up is not counted.

| server | what it is |
|---|---|
| naive | FastAPI, one request at a time behind a lock, transformers' `generate` |
| kserve | stock KServe 0.21, the same call in `Model.predict`, base64 in V2 JSON (its binary route is slower) |
| vllm serve | vLLM's OpenAI server on CPU, bound to all cores, eager, without prefix or image caches |
| AsyncLLM | vLLM's engine behind the least of FastAPI |
| ours-hf, ours-vllm | `sightline serve`, asked over V2 with binary tensors, by engine |
| starlette | nothing but reading the body: what HTTP in Python costs |

*a second*: median of the rounds, and their range. *in … s*: goodput, good answers a second within that deadline.
*CPU ms*: of the server's processes per answer, which says more than the clock where others work on the machine.
*of the roof*: the rate beside what the machine's measured matrix products and memory bandwidth allow for these shapes
with as many requests in each step. *alike*: answers equal to the first server's of the same input (vectors: every
cosine ≥ 0.99). `N a second`: open loop, requests arriving by a Poisson process. [Where the time goes](profile.md).
"""


def page(parts: Parts) -> str:
    return "\n".join([INTRODUCTION, "## Goals", "", table(parts), *(section(*item) for item in parts.items())])


def write(found: Parts) -> None:
    """Into docs/bench.* and the README; parts of other runs stay as they were."""
    known = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    known |= json.loads(json.dumps(found).replace("NaN", "null"))
    FIGURES.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(known))
    head, mark, rest = README.read_text().partition(MARKS[0])
    assert mark, f"{README} has no {MARKS[0].strip()}"
    README.write_text(head + mark + table(known) + MARKS[1] + rest.partition(MARKS[1])[2])
