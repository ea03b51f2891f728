"""Captions beside images: whose file is whose, and what becomes of one that is there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import LocalStore, MemoryStore

from sightline.jobs.finish import finish
from sightline.jobs.items import Item, Line
from sightline.jobs.objects import Objects
from sightline.jobs.page import Location
from sightline.jobs.sidecars import Sidecars, appended, caption_of, sidecar_key
from tests.jobs.written import Written, captions_in, items_of, page_of

IMAGES = Location("s3://pictures/photos/")


@pytest.mark.parametrize(
    ("sidecars", "images", "uri", "key"),
    [
        ("s3://pictures/photos/", "s3://pictures/photos/", "s3://pictures/photos/a/b.jpg", "a/b.txt"),
        ("s3://pictures/photos", "s3://pictures/photos", "s3://pictures/photos/a/b.jpg", "a/b.txt"),
        ("s3://pictures/", "s3://pictures/photos/", "s3://pictures/photos/a/b.jpg", "photos/a/b.txt"),
        ("s3://captions/2026/", "s3://pictures/photos/", "s3://pictures/photos/a/b.jpg", "a/b.txt"),
        ("s3://captions/", "s3://pictures/photos/2024-", "s3://pictures/photos/2024-05/b.jpg", "2024-05/b.txt"),
        ("s3://captions/", "s3://lists/today.jsonl", "s3://pictures/photos/b.jpg", "photos/b.txt"),
        ("s3://pictures/photos/", "s3://pictures/photos/", "s3://pictures/photos/b.tar.jpeg", "b.tar.txt"),
        ("s3://pictures/photos/", "s3://pictures/photos/", "s3://pictures/photos/no-suffix", "no-suffix.txt"),
        ("s3://pictures/photos/", "s3://pictures/photos/", "s3://pictures/photos/.jpg", ".jpg.txt"),
        ("file:///home/me/photos", "file:///home/me/photos", "file:///home/me/photos/a b/ü.PNG", "a b/ü.txt"),
        ("file:///out", "file:///home/me/photos", "file:///home/me/photos/a/b.png", "a/b.txt"),
        ("s3://pictures/pho", "s3://pictures/pho", "s3://pictures/photos/b.jpg", "photos/b.txt"),
    ],
)
def test_a_sidecar_lies_where_its_image_lies(sidecars: str, images: str, uri: str, key: str) -> None:
    assert sidecar_key(Location(sidecars), Location(images), uri) == key


@pytest.mark.parametrize(
    ("row", "caption"),
    [
        ({"caption": "A cat."}, "A cat."),
        ({"caption": " "}, None),
        ({"caption": 7}, None),
        ({}, None),
        ({"response": {"body": {"choices": [{"message": {"content": "A dog."}}]}}}, "A dog."),
        ({"response": {"body": {"choices": []}}}, None),
        ({"response": {"body": {"data": [{"embedding": [1.0]}]}}}, None),
        ({"response": {"body": None}}, None),
    ],
)
def test_the_caption_of_a_line(row: dict[str, Any], caption: str | None) -> None:
    assert caption_of(row) == caption


@pytest.mark.parametrize(
    ("text", "after"),
    [
        (b"", b"A cat.\n"),
        (b"tags, of, mine", b"tags, of, mine\nA cat.\n"),
        (b"tags\n", b"tags\nA cat.\n"),
        (b"A cat.\n", b"A cat.\n"),
        (b"A cat.", b"A cat.\n"),
        (b"tags\nA cat.\nmore\n", b"tags\nA cat.\nmore\n"),
        (b"Not A cat.\n", b"Not A cat.\nA cat.\n"),
        (b"A cat. Sits.\n", b"A cat. Sits.\nA cat.\n"),
        (b"\xff\xfe\n", b"\xff\xfe\nA cat.\n"),
    ],
)
def test_a_caption_becomes_one_more_line_once(text: bytes, after: bytes) -> None:
    assert appended(text, b"A cat.\n") == after


@given(st.binary(max_size=30), st.binary(min_size=1, max_size=10).filter(lambda line: b"\n" not in line))
def test_appending_again_changes_nothing_and_loses_nothing(text: bytes, line: bytes) -> None:
    once = appended(text, line + b"\n")
    assert appended(once, line + b"\n") == once
    assert once.startswith(text)
    assert line in once.splitlines() or line in once.split(b"\n")


def batch_options(folder: Path, existing: str) -> dict[str, Any]:
    return {"sidecars": Location(f"file://{folder}"), "existing": existing}


async def finished(folder: Path, existing: str, count: int = 20) -> Written:
    batch = await Written.whole(count, **batch_options(folder, existing))
    await finish(batch.page, batch.objects, sidecars=Objects(LocalStore(folder)))
    return batch


async def test_every_result_has_its_file_and_no_error_has_one(tmp_path: Path) -> None:
    await finished(tmp_path, "overwrite")
    wanted = {f"{n % 7}/{n:06}.txt": f"Picture {n}, é\n" for n in range(20) if n % 10 != 3}  # 3 and 13 failed
    assert captions_in(tmp_path) == wanted


@pytest.mark.parametrize(
    ("existing", "after"),
    [("skip", "mine\n"), ("overwrite", "Picture 1, é\n"), ("append", "mine\nPicture 1, é\n")],
)
async def test_a_file_that_is_there(existing: str, after: str, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "000001.txt").write_text("mine\n")
    await finished(tmp_path, existing)
    assert (tmp_path / "1" / "000001.txt").read_text() == after


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append"])
async def test_an_empty_file_is_no_caption(existing: str, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "000001.txt").touch()
    await finished(tmp_path, existing)
    assert (tmp_path / "1" / "000001.txt").read_text() == "Picture 1, é\n"


@pytest.mark.parametrize("existing", ["skip", "overwrite", "append"])
async def test_a_finish_that_died_before_its_commit_is_repeated_without_a_trace(existing: str, tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "000001.txt").write_text("mine")
    batch = await finished(tmp_path, existing)
    before = captions_in(tmp_path)
    await batch.objects.remove(batch.layout.manifest)
    manifest = await finish(batch.page, batch.objects, sidecars=Objects(LocalStore(tmp_path)))
    assert captions_in(tmp_path) == before
    assert manifest.sidecars == 18


def rows(*named: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"uri": f"s3://pictures/photos/{name}", "caption": caption} for name, caption in named]


async def texts(objects: Objects) -> dict[str, bytes]:
    return {key: (await objects.fetch(key)).data for key in await objects.keys("")}


async def test_two_images_of_one_name_have_a_file_each() -> None:
    objects = Objects(MemoryStore())
    sidecars = Sidecars(objects, IMAGES, IMAGES, "overwrite")
    await sidecars.write(rows(("a.jpg", "one"), ("b.jpg", "two")))
    await sidecars.write(rows(("a.png", "three")))
    assert await texts(objects) == {"a.txt": b"one\n", "a.png.txt": b"three\n", "b.txt": b"two\n"}


async def test_appending_two_images_of_one_name_share_a_file() -> None:
    objects = Objects(MemoryStore())
    await Sidecars(objects, IMAGES, IMAGES, "append").write(
        rows(("a.png", "one"), ("b.jpg", "two"), ("a.jpg", "three"))
    )
    assert await texts(objects) == {"a.txt": b"one\nthree\n", "b.txt": b"two\n"}


async def test_an_image_whose_key_no_store_can_be_asked_for_has_none_and_harms_nobody() -> None:
    objects = Objects(MemoryStore())
    sidecars = Sidecars(objects, IMAGES, IMAGES, "overwrite")
    await sidecars.write(rows(("a//b.jpg", "one"), ("../c.jpg", "two"), ("d.jpg", "three")))
    assert await texts(objects) == {"d.txt": b"three\n"}
    assert sidecars.count == 1


async def test_lines_without_an_image_have_no_file() -> None:
    objects = Objects(MemoryStore())
    await Sidecars(objects, IMAGES, IMAGES, "overwrite").write([{"custom_id": "a", "caption": "one"}])
    assert await texts(objects) == {}


async def test_the_images_of_a_retry_lie_where_the_page_says() -> None:
    """Its input is another batch; a sidecar's place is told from the images."""
    page = page_of(sidecars=Location("s3://captions/"))
    page = replace(page, input=replace(page.input, location=Location("s3://pictures/out/u/f/"), images=IMAGES))
    batch = await Written.whole(3, do=lambda item: Line(Item(item.custom_id, item.uri), {"caption": "a"}))
    store = Objects(MemoryStore())
    await finish(page, batch.objects, sidecars=store)
    assert set(await texts(store)) == {f"{n % 7}/{n:06}.txt" for n in range(len(items_of(3)))}
