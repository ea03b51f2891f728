"""What the tests of exactly-once share: an album in a bucket, what becomes of it on a good day, and batches of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.evidence import Outcome, audit
from tests.jobs.harness import WORKERS, Batch, album
from tests.jobs.store_proxy import proxying
from tests.jobs.stub import running_stub
from tests.s3 import S3Server

ALBUM = "album/"
FAULTS = {3: "422", 11: "text", 17: "flaky", 22: "unenhanced", 38: "422"}

NewBatch = Callable[..., Batch]


@pytest.fixture(scope="session")
def pictures(s3_server: S3Server) -> Mapping[str, bytes]:
    """40 in the bucket: with chunks of 5 and shards of 20, that is 2 shards of 4 chunks."""
    return album(s3_server, ALBUM, 40, FAULTS)


@pytest.fixture(scope="session", autouse=True)
def _nursery() -> Iterator[None]:
    yield
    WORKERS.close()


@pytest.fixture
def new_batch(s3_server: S3Server, pictures: Mapping[str, bytes], tmp_path: Path) -> Iterator[NewBatch]:
    """Makes batches of the album, each with a store proxy and a stub of its own; ends their processes."""
    with ExitStack() as stack:
        yield maker(stack, s3_server, pictures, tmp_path)


@pytest.fixture
def batch(new_batch: NewBatch) -> Batch:
    return new_batch()


@pytest.fixture(scope="session")
def undisturbed(
    s3_server: S3Server, pictures: Mapping[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """What becomes of the album when nothing goes wrong."""
    with ExitStack() as stack:
        batch = maker(stack, s3_server, pictures, tmp_path_factory.mktemp("undisturbed"))()
        batch.through()
        return audit(batch)


def maker(stack: ExitStack, s3: S3Server, pictures: Mapping[str, bytes], folder: Path, prefix: str = ALBUM) -> NewBatch:
    """Batches of an album, with proxies and stubs that last as long as the stack."""
    made: list[Batch] = []

    def make(**options: Any) -> Batch:
        place = folder / f"batch-{len(made)}"
        place.mkdir()
        proxy = stack.enter_context(proxying(s3.endpoint_url))
        stub = stack.enter_context(running_stub())
        uid = f"{folder.name}-{len(made)}"
        batch = Batch(s3, proxy, stub, place, pictures, prefix, uid, **options)
        made.append(batch)
        stack.callback(batch.end_all)
        return batch

    return make
