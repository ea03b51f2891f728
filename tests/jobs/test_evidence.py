"""The audit itself: what is wrong in a store is found. Else every other test here would prove nothing."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import pytest

from tests.jobs.conftest import maker
from tests.jobs.evidence import audit
from tests.jobs.harness import BUCKET, Batch
from tests.jobs.pictures import NO_PICTURE, fault_of, picture
from tests.jobs.store_proxy import Call
from tests.jobs.stub import Stub
from tests.s3 import S3Server

CHUNK = "parts/shard-00000/chunk-0001.jsonl"
Change = Callable[[Batch, list[bytes]], list[bytes]]


@pytest.fixture(scope="module")
def finished(
    s3_server: S3Server, pictures: Mapping[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Batch]:
    """A good day, audited; each test puts back what it breaks."""
    with ExitStack() as stack:
        batch = maker(stack, s3_server, pictures, tmp_path_factory.mktemp("finished"))()
        batch.through()
        audit(batch)
        yield batch


@contextmanager
def holding(batch: Batch, key: str, data: bytes | None) -> Iterator[None]:
    """The store holds other bytes at a key, or none."""
    before = batch.read(key) if key in batch.listing() else None
    _put(batch, key, data)
    try:
        yield
    finally:
        _put(batch, key, before)


def _put(batch: Batch, key: str, data: bytes | None) -> None:
    client, place = batch.s3.client, {"Bucket": BUCKET, "Key": batch.root + key}
    if data is None:
        client.delete_object(**place)
    else:
        client.put_object(**place, Body=data)


def _drop(batch: Batch, lines: list[bytes]) -> list[bytes]:
    return lines[1:]


def _double(batch: Batch, lines: list[bytes]) -> list[bytes]:
    return [lines[0], *lines]


def _replace(batch: Batch, lines: list[bytes]) -> list[bytes]:
    return [batch.read("parts/shard-00001/chunk-0000.jsonl").splitlines(keepends=True)[0], *lines[1:]]


def _swap(batch: Batch, lines: list[bytes]) -> list[bytes]:
    return [lines[1], lines[0], *lines[2:]]


def _mix(batch: Batch, lines: list[bytes]) -> list[bytes]:
    first, second = json.loads(lines[0]), json.loads(lines[2])
    return [json.dumps(first | {"caption": second["caption"]}).encode() + b"\n", *lines[1:]]


def _fail(batch: Batch, lines: list[bytes]) -> list[bytes]:
    row = json.loads(lines[0])
    error = {"step": "caption", "code": "caption_unavailable", "message": "", "http_status": 503}
    burnt = {"custom_id": row["custom_id"], "uri": row["uri"], "error": error}
    return [json.dumps(burnt).encode() + b"\n", *lines[1:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(_drop, "does not hold its items", id="a lost item"),
        pytest.param(_double, "does not hold its items", id="a doubled item"),
        pytest.param(_replace, "does not hold its items", id="an item of another shard"),
        pytest.param(_swap, "does not hold its items", id="another order"),
        pytest.param(_mix, "another one's caption", id="another one's caption"),
        pytest.param(_fail, "must not fail", id="an item burnt by an outage"),
    ],
)
def test_a_broken_part_is_found(finished: Batch, change: Change, said: str) -> None:
    data = b"".join(change(finished, finished.read(CHUNK).splitlines(keepends=True)))
    with holding(finished, CHUNK, data), pytest.raises(AssertionError, match=said):
        audit(finished)


def test_a_missing_part_is_found(finished: Batch) -> None:
    with holding(finished, CHUNK, None), pytest.raises(AssertionError, match=r"missing.*chunk-0001"):
        audit(finished)


def test_a_surplus_part_is_found(finished: Batch) -> None:
    surplus = "parts/shard-00000/chunk-0004.jsonl"
    with holding(finished, surplus, finished.read(CHUNK)), pytest.raises(AssertionError, match=r"not wanted.*0004"):
        audit(finished)


@pytest.mark.parametrize("key", ["output/results.jsonl", "output/errors.jsonl"])
def test_a_merged_file_that_is_not_its_parts_is_found(finished: Batch, key: str) -> None:
    lines = finished.read(key).splitlines(keepends=True)
    with (
        holding(finished, key, b"".join(lines[:-1])),
        pytest.raises(AssertionError, match="not what the parts hold"),
    ):
        audit(finished)


def test_a_manifest_that_counts_wrongly_is_found(finished: Batch) -> None:
    said = json.loads(finished.read("output/MANIFEST.json"))
    said["counts"]["succeeded"] += 1
    with (
        holding(finished, "output/MANIFEST.json", json.dumps(said).encode()),
        pytest.raises(AssertionError, match="the manifest counts"),
    ):
        audit(finished)


@pytest.mark.parametrize("is_conditional", [True, False])
def test_a_second_write_and_an_unconditional_one_are_found(finished: Batch, is_conditional: bool) -> None:
    key = finished.root + (CHUNK if is_conditional else "parts/shard-00000/chunk-0009.jsonl")
    finished.proxy.calls.append((Call("PUT", key, is_conditional), 200))
    try:
        with pytest.raises(AssertionError, match="more than once" if is_conditional else "without If-None-Match"):
            audit(finished)
    finally:
        finished.proxy.calls.pop()


def test_work_done_twice_that_no_kill_explains_is_found(finished: Batch) -> None:
    finished.stub.given += 1
    try:
        with pytest.raises(AssertionError, match="1 captions given again"):
            audit(finished)
    finally:
        finished.stub.given -= 1


def test_pictures_are_what_they_are_told_to_be() -> None:
    assert fault_of(picture(7, "flaky")) == "flaky"
    assert fault_of(picture(7)) == ""
    assert picture(7, "text") == NO_PICTURE
    assert len({hashlib.sha256(picture(number)).digest() for number in range(1000)}) == 1000


def test_a_flaky_picture_fails_once_and_a_refused_one_always() -> None:
    stub = Stub()
    ask = {"content-type": "image/png"}
    flaky, refused = picture(1, "flaky"), picture(2, "422")
    assert [stub.answer("/caption", ask, flaky)[0] for _ in range(3)] == [500, 200, 200]
    assert [stub.answer("/caption", ask, refused)[0] for _ in range(2)] == [422, 422]
