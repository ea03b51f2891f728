"""A small worker of the batch contract, and a gateway for it: plain processes over a folder instead of a bucket.

    python worker.py plan|run|finish     as the Jobs of a VisionBatch run it
    python worker.py gateway PORT_FILE   answers captions and tells progress

$BATCH_FILE   the page that all workers of a batch read (its ConfigMap)
$STORE        folder that stands for the bucket; created exclusively = If-None-Match: *
$LAST_WORDS   file of the termination message
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sightline_operator.contract import Exit


class Ended(Exception):
    """The end of this process, with what it says last."""

    def __init__(self, code: Exit, **words: Any) -> None:
        super().__init__(code)
        self.code, self.words = code, words


class Interrupted(Exception):
    """SIGTERM."""


class Folder:
    """Where a batch keeps everything; a process may die between any two of these calls."""

    def __init__(self, store: Path, uid: str, fingerprint: str) -> None:
        self.store, self.root = store, store / uid / fingerprint

    def read(self, name: str) -> Any:
        return json.loads((self.root / name).read_text())

    def has(self, name: str) -> bool:
        return (self.root / name).exists()

    def create(self, name: str, value: Any) -> bool:
        """Whole or not at all, and only once. False: it was there already, and stays."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(value))
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def rows(self, shard: int) -> list[dict[str, Any]]:
        chunks = sorted((self.root / f"parts/shard-{shard:05}").glob("chunk-*.json"))
        return [row for chunk in chunks for row in json.loads(chunk.read_text())]


# --- the three verbs -------------------------------------------------------------------------------------------------


def plan(page: dict[str, Any], folder: Folder) -> None:
    """List the input, cut it into shards; PLAN.json is the commit."""
    if not folder.has("PLAN.json"):
        source = folder.store / page["input"]["s3Prefix"]["prefix"].strip("/") / "items.jsonl"
        if not source.exists():
            raise Ended(Exit.UNUSABLE, reason="InputNotFound", message=f"{source.name} does not exist")
        items = [json.loads(line) for line in source.read_text().splitlines()]
        size = page["shardSize"]
        shards = [items[start : start + size] for start in range(0, len(items), size)]
        for number, shard in enumerate(shards):
            folder.create(f"plan/shard-{number:05}.json", shard)
        said = {"shards": len(shards), "items": len(items), "fingerprint": page["fingerprint"], "bytes": 0}
        folder.create("PLAN.json", said)
    raise Ended(Exit.DONE, plan=folder.read("PLAN.json"))


def run(page: dict[str, Any], folder: Folder) -> None:
    """One shard: every chunk that is not there yet, each written once."""
    shard = int(os.environ["JOB_COMPLETION_INDEX"])
    if not folder.has("PLAN.json"):
        raise Ended(Exit.UNUSABLE, reason="PlanCorrupt", message="PLAN.json does not exist")
    try:
        items = folder.read(f"plan/shard-{shard:05}.json")
    except ValueError as error:
        raise Ended(Exit.SHARD_CORRUPT, message=f"shard {shard}: {error}") from error
    size = page["chunkSize"]
    for start in range(0, len(items), size):
        name = f"parts/shard-{shard:05}/chunk-{start // size:04}.json"
        if not folder.has(name):
            folder.create(name, [captioned(page, item) for item in items[start : start + size]])
    folder.create(f"done/shard-{shard:05}.json", {"rows": len(items)})
    raise Ended(Exit.DONE)


def finish(page: dict[str, Any], folder: Folder) -> None:
    """Every item is there exactly once, or this fails; MANIFEST.json is the commit."""
    found = counts(folder)
    if found["succeeded"] + found["failed"] != found["total"]:
        missing = found["total"] - found["succeeded"] - found["failed"]
        raise Ended(Exit.UNUSABLE, reason="PlanCorrupt", message=f"{missing} items have no result")
    ids = [row["custom_id"] for shard in range(folder.read("PLAN.json")["shards"]) for row in folder.rows(shard)]
    if len(ids) != len(set(ids)):
        raise Ended(Exit.UNUSABLE, reason="PlanCorrupt", message="an item has two results")
    folder.create("output/MANIFEST.json", found)
    raise Ended(Exit.DONE, progress=found | {"outputs": {"manifest": str(folder.root / "output/MANIFEST.json")}})


def captioned(page: dict[str, Any], item: dict[str, Any]) -> dict[str, Any]:
    """The result of one item, for better or worse. The gateway being away is not the item's fault."""
    until = time.monotonic() + float(os.environ.get("PATIENCE", "30"))
    url = f"{page['pipeline']['url']}/caption?uri={item['uri']}"
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                revision, said = answer.headers["x-pipeline-revision"], json.loads(answer.read())
        except urllib.error.HTTPError as error:
            row = {"step": "caption", "code": "caption_rejected", "http_status": error.code}
            return {"custom_id": item["custom_id"], "error": row}
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > until:
                raise Ended(Exit.BACKEND_UNAVAILABLE, message="the gateway does not answer") from error
            time.sleep(0.05)
            continue
        if revision != page["pipeline"]["revision"]:
            raise Ended(Exit.REVISION_MISMATCH, message=f"the gateway answers with revision {revision}")
        return {"custom_id": item["custom_id"], "caption": said["caption"]}


def counts(folder: Folder) -> dict[str, Any]:
    """What is done, from what lies in the folder and nothing else."""
    found = folder.read("PLAN.json")
    rows = [row for shard in range(found["shards"]) for row in folder.rows(shard)]
    failed = [row for row in rows if "error" in row]
    rejected = {"step": "caption", "code": "caption_rejected", "count": len(failed)}
    return {
        "plan": found,
        "total": found["items"],
        "succeeded": len(rows) - len(failed),
        "failed": len(failed),
        "shards": {"total": found["shards"], "completed": len(list((folder.root / "done").glob("*.json")))},
        "failures": [rejected | {"sampleCustomId": failed[0]["custom_id"]}] if failed else [],
    }


# --- a gateway -------------------------------------------------------------------------------------------------------


class Gateway(BaseHTTPRequestHandler):
    """Captions what does not say `bad`; stands still at what says `slow`; tells progress."""

    page: dict[str, Any]
    folder: Folder

    def do_GET(self) -> None:
        if self.path == f"/internal/batches/{self.page['batch']['uid']}/progress":
            return self.answer(200, counts(self.folder)) if self.folder.has("PLAN.json") else self.answer(404, {})
        if "slow" in self.path:
            (self.folder.store / "asked").touch()
            while not (self.folder.store / "go").exists():
                time.sleep(0.01)
        return self.answer(422, {}) if "bad" in self.path else self.answer(200, {"caption": f"of {self.path}"})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("x-pipeline-revision", os.environ.get("REVISION", self.page["pipeline"]["revision"]))
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


def gateway(page: dict[str, Any], folder: Folder, port_file: str) -> None:
    Gateway.page, Gateway.folder = page, folder
    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as server:
        server.daemon_threads = True
        draft = Path(f"{port_file}.draft")
        draft.write_text(str(server.server_address[1]))
        draft.rename(port_file)
        server.serve_forever()


# --- the process -----------------------------------------------------------------------------------------------------


def interrupted(*_: object) -> None:
    raise Interrupted


def main() -> int:
    page = json.loads(Path(os.environ["BATCH_FILE"]).read_text())
    folder = Folder(Path(os.environ["STORE"]), page["batch"]["uid"], page["fingerprint"])
    verb, rest = sys.argv[1], sys.argv[2:]
    try:
        signal.signal(signal.SIGTERM, interrupted)
        {"plan": plan, "run": run, "finish": finish, "gateway": gateway}[verb](page, folder, *rest)
    except Interrupted:
        return int(Exit.INTERRUPTED)  # never 0: a Job would take this shard for done (kueue #10487)
    except Ended as end:
        if end.words and "LAST_WORDS" in os.environ:
            Path(os.environ["LAST_WORDS"]).write_text(json.dumps(end.words)[:4096])
        return int(end.code)
    return 1


if __name__ == "__main__":
    sys.exit(main())
