"""Uploaded files over a store: whose they are, how long they last, and what a dead server leaves."""

import io
from pathlib import Path

import pytest
from obstore.store import LocalStore, MemoryStore

from sightline.jobs.objects import Missing, Objects
from sightline.jobs.openai.files import ORPHAN_SECONDS, PIECE_BYTES, File, Files, content_key, is_file_id
from sightline.jobs.openai.requests import Checked, LineFault

DAY = 86_400.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 0.01  # two uploads have two ids in order
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["memory", "folder"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    return Objects(MemoryStore() if request.param == "memory" else LocalStore(tmp_path, automatic_cleanup=True))


@pytest.fixture
def files(objects: Objects, clock: Clock) -> Files:
    return Files(objects, ttl_seconds=30 * DAY, clock=clock)


async def add(files: Files, content: bytes = b"{}\n", principal: str = "me", **said: object) -> File:
    options = {"filename": "batch.jsonl", "purpose": "batch", **said}
    return await files.add(io.BytesIO(content), size_bytes=len(content), principal=principal, **options)  # type: ignore[arg-type]


async def read(files: Files, file: File) -> bytes:
    return b"".join([piece async for piece in files.content(file)])


async def test_a_file_comes_back_byte_for_byte_and_with_what_was_found_in_it(files: Files) -> None:
    content = bytes(range(256)) * (3 * PIECE_BYTES // 256) + b"end"
    found = Checked(2, ("/v1/chat/completions",), ("m",), (LineFault("invalid_url", "No.", 2, "url"),))
    file = await add(files, content, checked=found)
    assert is_file_id(file.id)
    assert await files.get(file.id, "me") == file
    assert await read(files, file) == content


async def test_a_file_is_its_owners_alone(files: Files) -> None:
    file = await add(files)
    assert await files.get(file.id, "you") is None
    assert await files.list("you", purpose=None, after=None, limit=10) == []
    assert not await files.delete(file.id, "you")
    assert await files.get(file.id, "me") is not None


async def test_without_keys_there_is_one_owner(files: Files) -> None:
    file = await add(files, principal="")
    assert await files.get(file.id, "") == file


@pytest.mark.parametrize("file_id", ["", "file-", "file-../../x", "file-" + "g" * 32, "x" * 37])
async def test_what_is_no_id_is_no_file(files: Files, file_id: str) -> None:
    assert await files.get(file_id, "me") is None


async def test_a_list_goes_on_where_it_ended(files: Files) -> None:
    ids = [(await add(files, purpose=purpose)).id for purpose in ("batch", "vision", "batch", "batch")]
    newest = await files.list("me", purpose=None, after=None, limit=10)
    assert [file.id for file in newest] == ids[::-1]
    batches = await files.list("me", purpose="batch", after=None, limit=2)
    assert [file.id for file in batches] == [ids[3], ids[2]]
    assert [file.id for file in await files.list("me", purpose="batch", after=ids[2], limit=2)] == [ids[0]]
    oldest = await files.list("me", purpose=None, after=ids[0], limit=2, newest_first=False)
    assert [file.id for file in oldest] == ids[1:3]


async def test_a_deleted_file_leaves_nothing(files: Files, objects: Objects) -> None:
    file = await add(files)
    assert await files.delete(file.id, "me")
    assert await files.get(file.id, "me") is None
    assert await objects.keys("") == []
    with pytest.raises(Missing):
        await read(files, file)
    assert not await files.delete(file.id, "me")


async def test_an_expired_file_is_gone_and_then_swept(files: Files, objects: Objects, clock: Clock) -> None:
    short, long = await add(files, seconds=3600), await add(files)
    clock.now += 3601
    assert await files.get(short.id, "me") is None
    assert [file.id for file in await files.list("me", purpose=None, after=None, limit=10)] == [long.id]
    await files.sweep()
    assert [key for key in await objects.keys("") if short.id in key] == []
    assert await read(files, long) == b"{}\n"


async def test_a_sweep_takes_what_a_dead_server_left_and_nothing_of_others(
    files: Files, objects: Objects, clock: Clock
) -> None:
    left = await add(files)
    await objects.remove(f"openai/files/me/{left.id}.json")
    await objects.write("uploads/holiday.jsonl", b"somebody's own")
    await objects.write("uploads/file-0/0", b"somebody's own")
    await files.sweep()
    assert await objects.exists(content_key(left.id)), "it may still be on its way"
    clock.now += ORPHAN_SECONDS + 1
    await files.sweep()
    assert sorted(await objects.keys("uploads/")) == ["uploads/file-0/0", "uploads/holiday.jsonl"]


async def test_lines_are_cut_wherever_a_piece_ends(files: Files) -> None:
    lines = [b'{"n": %d, "pad": "%s"}' % (number, b"x" * 1000) for number in range(5000)]
    file = await add(files, b"\n\n".join(lines) + b"\n")
    assert file.size_bytes > PIECE_BYTES
    assert [line async for line in files.lines(file)] == lines
