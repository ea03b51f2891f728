"""What 10, 1,000 and 100,000 images a minute need: the arithmetic of docs/scale.md, whose tables this writes.

python3 scripts/scale.py [IMAGES_PER_MINUTE …]      prints the table; without numbers: writes docs/scale.md
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale.md"
RATES = (10, 1_000, 100_000)


@dataclass(frozen=True)
class Constant:
    """A number with where it comes from: measured here, a default or a limit of ours, or assumed."""

    value: float
    unit: str
    kind: str
    source: str


MEASURED, OURS, ASSUMED = "measured", "ours", "assumed"
CONSTANTS = {
    "gpu_peak": Constant(989, "TFLOP/s", ASSUMED, "dense bf16 of one H100 or H200, as its maker says"),
    "gpu_share": Constant(0.5, "of the peak", ASSUMED, "what encoder and prefill reach; **not measured here**"),
    "caption_work": Constant(
        14.6, "TFLOP", ASSUMED, "Qwen2.5-VL-7B, an image of 768 tokens: vision 4.2, language 10.4"
    ),
    "decode_rate": Constant(2_190, "tokens/s", ASSUMED, "gpt-oss-120b on one such GPU, 64 at once: 40 % of 5,475"),
    "prose_tokens": Constant(128, "tokens", ASSUMED, "of one enhanced caption, its reasoning included"),
    "filling": Constant(0.7, "of the capacity", ASSUMED, "what may be asked of a GPU so that queues stay short"),
    "latency": Constant(3.0, "s", ASSUMED, "of caption and enhance under that load"),
    "gateway_cpu": Constant(0.010, "s", ASSUMED, "CPU of the gateway for an image"),
    "gateway_in_flight": Constant(64, "requests", ASSUMED, "at once in one pod of the gateway"),
    "worker_cpu": Constant(0.00348, "s", MEASURED, "CPU of a batch's worker for an image: docs/batch-evidence.md"),
    "worker_in_flight": Constant(16, "requests", OURS, "`maxInFlightPerWorker`"),
    "shard_size": Constant(1_000, "images", OURS, "`shardSize`: one pod of the Job"),
    "chunk_size": Constant(50, "images", OURS, "`chunkSize`: one object in the bucket"),
    "plan_cpu": Constant(22, "s", MEASURED, "CPU of planning 1,000,000 keys: docs/batch-evidence.md"),
    "pod_writes": Constant(
        9, "writes", ASSUMED, "for a worker's pod; the simulation below had 6.4, Events apart, without a real kubelet's"
    ),
    "status_seconds": Constant(30, "s", OURS, "between two writes of a batch's progress"),
    "lease_seconds": Constant(2, "s", OURS, "between two renewals of the operator's Lease"),
    "heartbeat_seconds": Constant(10, "s", ASSUMED, "between two renewals of a node's Lease: the kubelet's default"),
    "gpus_of_a_node": Constant(8, "GPUs", ASSUMED, "of one node"),
}


@dataclass(frozen=True)
class Need:
    """What a rate takes, for an hour's batch at it."""

    rate: float
    caption_gpus: int
    enhance_gpus: int
    gateways: int
    workers: int
    worker_cores: float
    images: int
    shards: int
    puts: float
    plan_cpu: float
    pod_writes: float
    other_writes: float


def need(per_minute: float, **given: float) -> Need:
    """`given` replaces constants by name."""
    unknown = given.keys() - CONSTANTS.keys()
    if unknown:
        raise KeyError(f"no such constant: {', '.join(sorted(unknown))}")
    c = {name: constant.value for name, constant in CONSTANTS.items()} | given
    rate = per_minute / 60
    caption = c["gpu_peak"] * c["gpu_share"] / c["caption_work"] * c["filling"]
    enhance = c["decode_rate"] / c["prose_tokens"] * c["filling"]
    caption_gpus, enhance_gpus = _whole(rate / caption), _whole(rate / enhance)
    open_requests = rate * c["latency"]
    workers = _whole(open_requests / c["worker_in_flight"])
    images = round(per_minute * 60)
    shards = _whole(images / c["shard_size"])
    nodes = _whole((caption_gpus + enhance_gpus) / c["gpus_of_a_node"])
    return Need(
        rate=rate,
        caption_gpus=caption_gpus,
        enhance_gpus=enhance_gpus,
        gateways=_whole(max(open_requests / c["gateway_in_flight"], rate * c["gateway_cpu"] / c["filling"])),
        workers=min(workers, shards),
        worker_cores=rate * c["worker_cpu"],
        images=images,
        shards=shards,
        puts=rate / c["chunk_size"],
        plan_cpu=images / 1_000_000 * c["plan_cpu"],
        pod_writes=rate / c["shard_size"] * c["pod_writes"],
        other_writes=1 / c["status_seconds"] + 1 / c["lease_seconds"] + nodes / c["heartbeat_seconds"],
    )


def _whole(number: float) -> int:
    return max(1, math.ceil(number - 1e-9))


ROWS = (
    ("images a second", lambda n: f"{n.rate:,.2f}"),
    ("GPUs for the caption", lambda n: f"{n.caption_gpus:,}"),
    ("GPUs for enhance", lambda n: f"{n.enhance_gpus:,}"),
    ("pods of the gateway", lambda n: f"{n.gateways:,}"),
    ("workers (`parallelism`)", lambda n: f"{n.workers:,}"),
    ("CPU of all workers, cores", lambda n: f"{n.worker_cores:.3g}"),
    ("an hour's batch: images", lambda n: f"{n.images:,}"),
    ("an hour's batch: shards, so pods", lambda n: f"{n.shards:,}"),
    ("its planning, s of CPU", lambda n: f"{n.plan_cpu:.3g}"),
    ("objects written to the bucket, a second", lambda n: f"{n.puts:.3g}"),
    ("API server: writes of the workers' pods, a second", lambda n: f"{n.pod_writes:.3g}"),
    ("API server: progress, Leases of operator and nodes, a second", lambda n: f"{n.other_writes:.3g}"),
)


def table(rates: tuple[float, ...] = RATES) -> str:
    needs = [need(rate) for rate in rates]
    head = [
        "| images a minute | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |",
        "|---|" + "---:|" * len(rates),
    ]
    return "\n".join(head + [f"| {name} | " + " | ".join(map(show, needs)) + " |" for name, show in ROWS])


def constants() -> str:
    head = ["| constant | value | | from |", "|---|---:|---|---|"]
    rows = [f"| `{name}` | {c.value:,g} {c.unit} | {c.kind} | {c.source} |" for name, c in CONSTANTS.items()]
    return "\n".join(head + rows)


def page(text: str) -> str:
    """docs/scale.md with its tables made again."""
    for name, made in (("needs", table()), ("constants", constants())):
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", rf"\g<1>{made}\n\g<2>", text, flags=re.DOTALL)
    return text


def main() -> None:
    if sys.argv[1:]:
        print(table(tuple(float(word.replace(",", "")) for word in sys.argv[1:])))
    else:
        PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
