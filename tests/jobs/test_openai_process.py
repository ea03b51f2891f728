"""OpenAI's batches on a gateway that is a process: killed in the middle, and given the largest file there may be."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.jobs.openai_gateway import ENDPOINT, Process, album, ended, rows, submit, until
from tests.jobs.stub import Stub, running_stub
from tests.s3 import S3Server

FLAGS = ("--s3-path-style", "true")
WIDTH = 8


@contextmanager
def processes(folder: Path, stub: Stub, s3: S3Server, count: int, *flags: str) -> Iterator[list[Process]]:
    """Gateways that share a bucket, none of them started."""
    s3.bucket("batches")
    store = f"s3://batches/{folder.name}"
    made = [Process(folder, stub.url, store, s3.environment(), *FLAGS, *flags) for _ in range(count)]
    try:
        yield made
    finally:
        for each in made:
            each.end()


def test_a_killed_gateways_batch_is_done_by_another_and_every_request_answered_once(
    tmp_path: Path, s3_server: S3Server
) -> None:
    with running_stub(delay_seconds=0.1) as stub, processes(tmp_path, stub, s3_server, 2) as (first, second):
        with first.start().client() as client:
            batch = submit(client, album(120, {7: "422"}))
            until(lambda: stub.given > 40, "forty answers")
        first.end(signal.SIGKILL)
        before = stub.given
        assert before < 119
        with second.start().client() as client:
            batch = ended(client, batch)
            answers, errors = rows(client, batch.output_file_id), rows(client, batch.error_file_id)
            assert batch.status == "completed"
            assert [row["custom_id"] for row in answers] == [f"i{number}" for number in range(120) if number != 7]
            assert [row["custom_id"] for row in errors] == ["i7"]
        assert second.end(signal.SIGTERM) == 0
        assert stub.given <= 119 + WIDTH + 2  # what was open when it was killed


def memory(process: Process) -> int:
    """The most that a process has had in memory, bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (line,) = [each for each in status.splitlines() if each.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_the_largest_file_is_streamed(tmp_path: Path, s3_server: S3Server) -> None:
    request = album(1)[0]
    request["body"]["pad"] = "x" * 3_500
    path = tmp_path / "large.jsonl"
    with path.open("wb") as file:
        for number in range(49_000):
            file.write(json.dumps(request | {"custom_id": f"i{number}"}).encode() + b"\n")
    size = path.stat().st_size
    assert 180_000_000 < size < 200_000_000
    with running_stub() as stub, processes(tmp_path, stub, s3_server, 1) as (gateway,):
        with gateway.start().client() as client:
            before = memory(gateway)
            with path.open("rb") as file:
                kept = client.files.create(file=file, purpose="batch", timeout=300)
            assert (kept.bytes, kept.status) == (size, "processed")
            with client.files.with_streaming_response.content(kept.id) as answer, path.open("rb") as file:
                for piece in answer.iter_bytes():
                    assert piece == file.read(len(piece))
                assert file.read() == b""
            batch = client.batches.create(input_file_id=kept.id, endpoint=ENDPOINT, completion_window="24h")
            until(lambda: stub.given > 100, "it is planned and begun")
            grown = memory(gateway) - before
            assert client.batches.cancel(batch.id).status == "cancelling"
        print(f"a file of {size / 1e6:.0f} MB: {grown / 1e6:.0f} MB more memory")
        assert grown < 150_000_000
