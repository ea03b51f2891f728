"""What lies in a batch's store when it is over, held against what must: nothing of `sightline.jobs` is used for it.

The items are the pictures' keys in order; shard s holds items s·S … , chunk c of it items c·C … of these. So what every
part must hold is known without asking the plan.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.jobs.harness import Batch
from tests.jobs.pictures import NO_PICTURE, caption_of, digest, enhanced, fault_of

OPEN_CHUNKS = 2
FAILURES = {"422": ("caption", "caption_rejected"), "text": ("decode", "decode_failed")}
"""Step and code of a picture's fault."""


@dataclass(frozen=True)
class Outcome:
    """What a batch left behind, in a form in which two runs of the same pictures are equal.

    parts      lines of every part, by key, without the times of errors
    outputs    of the merged files, likewise
    succeeded  results
    failed     errors
    """

    parts: dict[str, tuple[bytes, ...]]
    outputs: dict[str, tuple[bytes, ...]]
    succeeded: int
    failed: int


def audit(batch: Batch, *, failures: dict[str, tuple[str, str]] | None = None, writers: int = 1) -> Outcome:
    """Every item once, its line true, failures listed apart, and no more done twice than kills explain.

    failures  (step, code) by key, where it is not the picture's own fault
    writers   of each shard at the same time

    Raises AssertionError that says what is wrong.
    """
    wanted = _failures(batch) | (failures or {})
    parts = {key: batch.read(key) for key in batch.listing("parts/")}
    expected = expected_parts(batch)
    assert sorted(parts) == sorted(expected), _difference("parts", parts, expected)
    for key, items in expected.items():
        _check_part(batch, key, parts[key], items, wanted)
    rows = [row for key in sorted(expected) for row in map(json.loads, parts[key].splitlines())]
    ids = Counter(row["custom_id"] for row in rows)
    assert max(ids.values(), default=1) == 1, f"doubled: {[name for name, times in ids.items() if times > 1][:5]}"
    outputs = _check_outputs(batch, parts)
    _check_commits(batch)
    failed = sum("error" in row for row in rows)
    _check_rework(batch, wanted, writers)
    lines = {key: normal(data) for key, data in parts.items()}
    return Outcome(lines, outputs, len(rows) - failed, failed)


def expected_parts(batch: Batch) -> dict[str, Sequence[str]]:
    """The pictures' keys that each part must tell of, in order."""
    keys, size, chunk = sorted(batch.pictures), batch.shard_size, batch.chunk_size
    return {
        f"parts/shard-{start // size:05}/chunk-{first // chunk:04}.jsonl": keys[start : start + size][first:][:chunk]
        for start in range(0, len(keys), size)
        for first in range(0, len(keys[start : start + size]), chunk)
    }


def normal(data: bytes) -> tuple[bytes, ...]:
    """The lines of a part; those of errors without times and attempts, which no two runs share."""
    return tuple(_normal(line) for line in data.splitlines(keepends=True))


def _normal(line: bytes) -> bytes:
    row = json.loads(line)
    if "error" not in row:
        return line
    row["error"] = {name: row["error"][name] for name in ("step", "code", "message", "http_status")}
    return json.dumps(row).encode()


def _failures(batch: Batch) -> dict[str, tuple[str, str]]:
    fates = {key: "text" if data == NO_PICTURE else fault_of(data) for key, data in batch.pictures.items()}
    return {key: FAILURES[fate] for key, fate in fates.items() if fate in FAILURES}


def _check_part(
    batch: Batch, key: str, data: bytes, items: Sequence[str], failures: dict[str, tuple[str, str]]
) -> None:
    rows: list[dict[str, Any]] = [json.loads(line) for line in data.splitlines()]
    uris = [row["uri"] for row in rows]
    assert uris == [batch.uri(item) for item in items], f"{key} does not hold its items in order: {uris}"
    for item, row in zip(items, rows, strict=True):
        error = row.get("error")
        if item in failures:
            assert error, f"{item} must fail, and did not: {row}"
            assert (error["step"], error["code"]) == failures[item], f"{item}: {error}"
            assert {"custom_id", "uri", "error"} == set(row), f"{item}: {row}"
            continue
        assert error is None, f"{item} must not fail: {error}"
        picture = batch.pictures[item]
        text, is_plain = caption_of(picture), fault_of(picture) == "unenhanced"
        assert row["caption"] == (text if is_plain else enhanced(text)), f"{item} has another one's caption: {row}"
        assert row["enhanced"] is not is_plain, f"{item}: {row}"


def _check_outputs(batch: Batch, parts: dict[str, bytes]) -> dict[str, tuple[bytes, ...]]:
    """The manifest tells the truth, and the merged files are the parts' lines, in order, successes and errors apart."""
    manifest = json.loads(batch.read("output/MANIFEST.json"))
    lines = [line for key in sorted(parts) for line in parts[key].splitlines(keepends=True)]
    errors = [line for line in lines if "error" in json.loads(line)]
    results = [line for line in lines if "error" not in json.loads(line)]
    said = [manifest["items"], manifest["counts"]["succeeded"], manifest["counts"]["failed"]]
    assert said == [len(lines), len(results), len(errors)], f"the manifest counts {said}"
    told = [(part["bytes"], part["sha256"]) for shard in manifest["shards"] for part in shard["chunks"]]
    assert told == [_hash(parts[key]) for key in sorted(parts)], "the manifest has another part's hash"
    merged = {"output/results.jsonl": results, "output/errors.jsonl": errors}
    for key, wanted in merged.items():
        data = batch.read(key)
        assert data.splitlines(keepends=True) == wanted, f"{key} is not what the parts hold"
        said = [(made["bytes"], made["sha256"]) for made in manifest["outputs"].values() if made["key"] == key]
        assert said == [_hash(data)], f"the manifest has another hash of {key}"
    return {key: normal(b"".join(wanted)) for key, wanted in merged.items()}


def _hash(data: bytes) -> tuple[int, str]:
    return len(data), hashlib.sha256(data).hexdigest()


COMMITS = r"/(parts/.*|plan/PLAN\.json|output/MANIFEST\.json)$"


def _check_commits(batch: Batch) -> None:
    """What is written once was written once, by a conditional write: the store's own answers say so."""
    ours = f"^{batch.root.rstrip('/')}{COMMITS}"
    again = {key: times for key, times in batch.proxy.written(ours).items() if times > 1}
    assert not again, f"the store took these more than once: {again}"
    assert not batch.proxy.unconditional(ours), "written without If-None-Match"


def _check_rework(batch: Batch, failures: Iterable[str], times: int) -> None:
    """Captions given beyond one an item: at most what was open in the workers that were killed or stopped."""
    ends = sum(n for (verb, code), n in batch.codes.items() if verb == "run" and code != 0)
    most = ends * OPEN_CHUNKS * batch.chunk_size + (times - 1) * len(batch.pictures)
    assert rework(batch) <= most, f"{rework(batch)} captions given again; {ends} ends of workers explain {most}"
    asked = batch.stub.answered
    unasked = [key for key, data in batch.pictures.items() if key not in failures and not asked[digest(data)]]
    assert not unasked, f"a caption that nobody gave: {unasked[:5]}"


def rework(batch: Batch) -> int:
    """Captions that the stub gave beyond one of each picture."""
    return batch.stub.given - len(+batch.stub.answered)


def _difference(what: str, found: Iterable[str], expected: Iterable[str]) -> str:
    found, expected = set(found), set(expected)
    return f"{what}: missing {sorted(expected - found)[:5]}, not wanted {sorted(found - expected)[:5]}"
