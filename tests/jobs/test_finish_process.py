"""`python -m sightline.jobs finish` as a Job runs it: a real process, a real S3, last words for the operator."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sightline.jobs.page import Location
from sightline.jobs.stores import open_location
from sightline_operator import contract
from tests.jobs.written import FINGERPRINT, UID, Written
from tests.s3 import S3Server, running_s3


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        server.bucket("pictures")
        yield server


def place(s3: S3Server, prefix: str) -> dict[str, Any]:
    return {
        "bucket": "pictures",
        "prefix": prefix,
        "endpoint": s3.endpoint_url,
        "region": s3.region,
        "pathStyle": True,
    }


def page_file(folder: Path, s3: S3Server, **output: Any) -> Path:
    """batch.json as the operator writes it, for the batch that `Written` makes."""
    page = {
        "batch": {"name": "photos", "namespace": "default", "uid": UID},
        "fingerprint": FINGERPRINT,
        "pipeline": {"name": "captions", "url": "http://127.0.0.1:9", "timeoutSeconds": 10},
        "input": {"s3Prefix": place(s3, "photos/")},
        "output": {"s3": place(s3, "out/"), **output},
        "shardSize": 12,
        "chunkSize": 5,
        "maxInFlight": 4,
        "maxAttempts": 3,
    }
    file = folder / "batch.json"
    file.write_text(json.dumps(page))
    return file


def finish(folder: Path, s3: S3Server, page: Path) -> tuple[int, contract.LastWords]:
    words = folder / "words"
    environment = os.environ | s3.environment() | {"BATCH_FILE": str(page), "LAST_WORDS": str(words)}
    done = subprocess.run(
        [sys.executable, "-m", "sightline.jobs", "finish"],
        env=environment,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return done.returncode, contract.LastWords.read(words.read_text() if words.exists() else done.stderr.decode())


async def test_from_parts_to_outputs_sidecars_and_last_words(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    said = place(s3, "out/")
    objects = open_location(Location("s3://pictures/out/", said["endpoint"], said["region"], path_style=True))
    batch = await Written.whole(40, objects=objects)
    s3.put("pictures", "photos/1/000001.txt", b"mine\n")
    page = page_file(tmp_path, s3, merge="Always", parquet=True, sidecars=place(s3, "photos/"), existing="Append")

    await objects.remove(batch.layout.chunk(3, 0))
    code, words = finish(tmp_path, s3, page)
    assert (code, words.reason) == (contract.Exit.UNUSABLE, "Unfinished")  # its shard has said that it was done
    assert "4 items have no result" in words.message

    await objects.remove(batch.layout.done(3))
    await batch.write([3])
    for _ in range(2):  # a Job's pod may be started twice, even with one completion
        code, words = finish(tmp_path, s3, page)
        assert code == contract.Exit.DONE
        assert words.progress is not None
        assert (words.progress.total, words.progress.completed, words.progress.failed) == (40, 40, 4)
        assert words.progress.outputs is not None
        assert words.progress.outputs["results"] == f"s3://pictures/out/{UID}/{FINGERPRINT}/output/results.jsonl"
        assert text(s3, "photos/1/000001.txt") == "mine\nPicture 1, é\n"
    assert text(s3, "photos/2/000002.txt") == "Picture 2, é\n"
    results = text(s3, f"out/{UID}/{FINGERPRINT}/output/results.jsonl").splitlines()
    assert len(results) == 36


def text(s3: S3Server, key: str) -> str:
    return s3.client.get_object(Bucket="pictures", Key=key)["Body"].read().decode()
