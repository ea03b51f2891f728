"""What a batch is to do: prefixes, lists, uploads, earlier batches; what is wrong with them, in words that help."""

import asyncio
import re
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sightline.jobs import inputs
from sightline.jobs.inputs import InputFault, has_caption, id_of_key, items_of, plan_batch
from sightline.jobs.items import Fault, Item, Line, is_custom_id
from sightline.jobs.layout import slices
from sightline.jobs.objects import StoreUnavailable
from sightline.jobs.page import Input, Location, Outputs, Page, Target
from sightline.jobs.plan import layout_of, read_shard
from sightline.jobs.stores import Stores, open_location
from tests.s3 import S3Server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(params=["folder", "s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path, s3: S3Server) -> str:
    """An empty place for images and lists, of every kind of store."""
    name = f"inputs-{uuid.uuid4().hex[:12]}"
    if request.param == "s3":
        return f"s3://{s3.bucket(name)}/in"
    return f"file://{tmp_path}/in" if request.param == "folder" else f"memory://{name}/in"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return f"file://{tmp_path}/in"


async def fill(place: str, *names: str) -> None:
    objects = open_location(Location(place))
    await asyncio.gather(*(objects.create(name, name.encode()) for name in names))


async def drawn(said: Input) -> list[Item]:
    return [item async for item in items_of(said, Stores(said.location))]


async def refused(said: Input) -> tuple[str, str]:
    with pytest.raises(InputFault) as caught:
        await drawn(said)
    return caught.value.reason, caught.value.message


def prefix(place: str, **changes: Any) -> Input:
    return Input("prefix", Location(f"{place}/"), **changes)


# --- a prefix --------------------------------------------------------------------------------------------------------


async def test_a_prefix_is_its_images_pinned(place: str) -> None:
    await fill(place, "b.JPG", "a/c.jpeg", "a/d.webp", "e.png", "notes.txt", "f.jpg.json", "jpg")
    items = await drawn(prefix(place))
    assert [Path(item.custom_id).name for item in items] == ["c.jpeg", "d.webp", "b.JPG", "e.png"]
    stores = Stores(Location(place))
    for item in items:
        assert item.uri.endswith(f"/in/{item.custom_id.removeprefix('in/')}")
        assert (item.etag, item.size) == ((entry := await stores.stat(item.uri)).etag, entry.size)
        assert (await stores.fetch(item)).decode() == item.custom_id.removeprefix("in/")


async def test_an_item_of_a_bucket_is_named_by_its_key_and_one_of_a_folder_by_its_path(
    s3: S3Server, folder: str
) -> None:
    bucket = f"s3://{s3.bucket('named-by-key')}/in"
    await fill(bucket, "a/b.jpg")
    await fill(folder, "a/b.jpg")
    assert [item.custom_id for item in await drawn(prefix(bucket))] == ["in/a/b.jpg"]
    assert [item.custom_id for item in await drawn(prefix(folder))] == ["a/b.jpg"]


async def test_suffixes_and_limits_are_those_of_the_page(folder: str) -> None:
    await fill(folder, "a.tif", "b.tif", "c.jpg", "d")
    assert [item.custom_id for item in await drawn(prefix(folder, suffixes=(".TIF",)))] == ["a.tif", "b.tif"]
    assert len(await drawn(prefix(folder, suffixes=()))) == 4
    assert len(await drawn(prefix(folder, suffixes=(".tif",), max_items=2))) == 2
    reason, message = await refused(prefix(folder, suffixes=(".tif",), max_items=1))
    assert reason == "InputTooLarge"
    assert "more than 1 images" in message


async def test_an_empty_prefix_says_so(place: str) -> None:
    await fill(place.removesuffix("/in"), "other.jpg", "inside.jpg")
    open_location(Location(place))  # makes the folder
    reason, message = await refused(prefix(place))
    assert (reason, message) == ("InputEmpty", f"{place}/ has no images: it is empty")


async def test_a_directory_of_non_images_says_so(place: str) -> None:
    await fill(place, "a.txt", "b.pdf", "c")
    reason, message = await refused(prefix(place))
    assert reason == "InputEmpty"
    assert "none of the 3 objects below it ends in .jpg .jpeg .png .webp" in message


async def test_a_bucket_or_folder_that_is_not_there_is_not_found(s3: S3Server, tmp_path: Path) -> None:
    for url in ("s3://no-such-bucket/in/", f"file://{tmp_path}/none/"):
        assert (await refused(Input("prefix", Location(url))))[0] == "InputNotFound"


async def test_wrong_credentials_are_access_denied(s3: S3Server, tmp_path: Path) -> None:
    if not s3.is_real:
        pytest.skip("moto checks no keys")
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text("nobody")
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text("secret")
    location = Location(f"s3://{s3.bucket('denied')}/in/", credentials=tmp_path)
    assert (await refused(Input("prefix", location)))[0] == "AccessDenied"
    manifest = replace(location, url=f"{location.url}list.jsonl")
    assert (await refused(Input("manifest", manifest)))[0] == "AccessDenied"


async def test_a_store_that_is_away_is_no_fault_of_the_input(s3: S3Server) -> None:
    location = Location("s3://bucket/in/", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailable):
        _ = [i async for i in items_of(Input("prefix", location), Stores(location, patience_seconds=0.3))]


async def test_a_file_whose_name_is_no_text_is_named(folder: str, tmp_path: Path) -> None:
    await fill(folder, "a.jpg")
    Path(str(tmp_path / "in/caf").encode().decode() + "\udce9.jpg").write_bytes(b"x")
    reason, message = await refused(prefix(folder))
    assert reason == "InvalidManifest"
    assert "caf�.jpg is not UTF-8: rename the file" in message


@given(st.text(min_size=1, max_size=600))
def test_any_key_gives_a_name_that_items_may_have(key: str) -> None:
    assert is_custom_id(id_of_key(key))
    assert not is_custom_id(key) or id_of_key(key) == key


def test_long_keys_that_begin_alike_have_names_that_differ() -> None:
    names = {id_of_key("photos/" * 100 + str(n)) for n in range(100)}
    assert len(names) == 100
    assert all(name.startswith("photos/photos/") for name in names)


# --- a list ----------------------------------------------------------------------------------------------------------


async def listed(place: str, text: str | bytes, name: str = "list.jsonl", **said: Any) -> Input:
    data = text.encode() if isinstance(text, str) else text
    await open_location(Location(place)).write(name, data)
    return Input("manifest", Location(f"{place}/{name}"), **said)


def jsonl(*rows: Any) -> str:
    return "".join(f"{orjson.dumps(row).decode()}\n" for row in rows)


async def test_a_list_names_images_absolutely_or_from_where_it_lies(place: str) -> None:
    await fill(place, "a.jpg", "b/c.jpg")
    said = await listed(place, jsonl({"uri": f"{place}/a.jpg", "custom_id": "first"}, {"uri": "b/c.jpg"}))
    first, second = await drawn(said)
    assert (first.custom_id, first.uri) == ("first", f"{place}/a.jpg")
    assert (second.custom_id, second.uri) == ("b/c.jpg", f"{place}/b/c.jpg")
    stores = Stores(said.location)
    assert [await stores.fetch(item) for item in (first, second)] == [b"a.jpg", b"b/c.jpg"]


async def test_what_a_list_does_not_pin_is_pinned(place: str) -> None:
    await fill(place, "a.jpg", "b.jpg")
    said = await listed(place, jsonl({"uri": "a.jpg"}, {"uri": "b.jpg", "etag": "abc", "size": 3}, {"uri": "gone.jpg"}))
    a, b, gone = await drawn(said)
    entry = await Stores(said.location).stat(a.uri)
    assert (a.etag, a.size) == (entry.etag, entry.size)
    assert (b.etag, b.size) == ('"abc"', 3)
    assert (gone.etag, gone.size) == (None, None), "it fails by itself, as an item"


async def test_a_line_may_say_what_is_asked_about_its_image(folder: str) -> None:
    await fill(folder, "a.jpg")
    row = {"uri": "a.jpg", "prompt": "What is it?", "enhance": "Never", "body": {"max_tokens": 9}, "width": 640}
    (item,) = await drawn(await listed(folder, jsonl(row)))
    assert item.body == {"prompt": "What is it?", "enhance": "Never", "max_tokens": 9}


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
async def test_lists_of_all_editors_are_read(folder: str, ending: str, mark: str) -> None:
    lines = ['{"uri": "a.jpg"}', "", '  {"uri": "größe.jpg"}  ', '{"uri": "c.jpg"}']
    said = await listed(folder, mark + ending.join(lines))
    assert [item.custom_id for item in await drawn(said)] == ["a.jpg", "größe.jpg", "c.jpg"]
    said = await listed(folder, mark + ending.join(["custom_id,uri", "1,a.jpg", '"2","b, c.jpg"']), format="CSV")
    assert [(item.custom_id, Path(item.uri).name) for item in await drawn(said)] == [("1", "a.jpg"), ("2", "b, c.jpg")]


@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
async def test_a_table_has_its_columns_by_name(folder: str, separator: str) -> None:
    rows = [
        ["size", "uri", "etag", "prompt", "notes", "custom_id"],
        ["10", "a.jpg", "e1", '"Say ""what""\nit is."', "x", "a"],
        ["", "b.jpg", "", "", "", "b"],
    ]
    said = await listed(folder, "\n".join(separator.join(row) for row in rows), format="CSV")
    a, b = await drawn(said)
    assert (a.custom_id, a.size, a.etag, a.body) == ("a", 10, '"e1"', {"prompt": 'Say "what"\nit is.'})
    assert (b.custom_id, b.size, b.etag, b.body) == ("b", None, None, {})


BROKEN = {
    "not JSON": ('{"uri": "a.jpg"}\n{"uri": \n', "JSONL", "line 2 is not JSON"),
    "no object": ('{"uri": "a.jpg"}\n\n["b.jpg"]', "JSONL", "line 3 is not a JSON object"),
    "no uri": ('{"custom_id": "a"}', "JSONL", "line 1 has no uri"),
    "uri no text": ('{"uri": 3}', "JSONL", "line 1 has no uri"),
    "https": ('{"uri": "https://a/b.jpg"}', "JSONL", "line 1 has a uri that batches do not fetch: 'https://a/b.jpg'"),
    "another kind": (
        '{"uri": "memory://a/b.jpg"}',
        "JSONL",
        "line 1 has a uri of another kind of store than the list's",
    ),
    "data": ('{"uri": "data:image/png;base64,AAAA"}', "JSONL", "line 1 has a uri that batches do not fetch"),
    "id": ('{"uri": "a.jpg", "custom_id": 7}', "JSONL", "line 1 has no custom_id of 1 to 512 characters"),
    "empty id": ('{"uri": "a.jpg", "custom_id": ""}', "JSONL", "line 1 has no custom_id of 1 to 512 characters"),
    "long id": (f'{{"uri": "a.jpg", "custom_id": "{"x" * 513}"}}', "JSONL", "line 1 has no custom_id"),
    "etag": ('{"uri": "a.jpg", "etag": 7}', "JSONL", "line 1 has an etag"),
    "size": ('{"uri": "a.jpg", "size": -7}', "JSONL", "line 1 has a size"),
    "body": ('{"uri": "a.jpg", "body": "x"}', "JSONL", "line 1 has a body that is no JSON object"),
    "no head": ("a.jpg\nb.jpg\n", "CSV", "line 1 is the head of a CSV file and names no column `uri`"),
    "fields": ("uri,size\na.jpg,1\nb.jpg\n", "CSV", "line 3 has 1 fields, and the first line names 2"),
    "quote": ('uri,notes\na.jpg,"open\nb.jpg,x\n', "CSV", "line 2 opens a quote that is not closed"),
    "latin-1": (b'{"uri": "a.jpg"}\n{"uri": "caf\xe9.jpg"}', "JSONL", "line 2 is not UTF-8"),
    "too long": ('{"uri": "a.jpg"}\n' + "x" * 1_048_577, "JSONL", "line 2 is longer than 1,048,576 bytes"),
    "method": ('{"custom_id": "a", "method": "GET"}', "OpenAIBatch", "line 1 has a method that is not POST"),
    "url": ('{"custom_id": "a", "method": "POST", "url": "/v1/../x"}', "OpenAIBatch", "line 1 has a url"),
    "recursion": ('{"custom_id": "a", "method": "POST", "url": "/v1/batches"}', "OpenAIBatch", "line 1 has a url"),
    "host": ('{"custom_id": "a", "method": "POST", "url": "https://a/v1/chat"}', "OpenAIBatch", "line 1 has a url"),
    "no body": ('{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}', "OpenAIBatch", "has no body"),
    "no id": ('{"method": "POST", "url": "/v1/chat/completions", "body": {"a": 1}}', "OpenAIBatch", "no custom_id"),
}


@pytest.mark.parametrize(("text", "form", "told"), BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_line_is_named(folder: str, text: str | bytes, form: Any, told: str) -> None:
    reason, message = await refused(await listed(folder, text, format=form))
    assert reason == "InvalidManifest"
    assert told in message


@pytest.mark.parametrize("text", ["", "\n\n", "\ufeff"])
async def test_a_list_of_nothing_is_empty(folder: str, text: str) -> None:
    for form in ("JSONL", "OpenAIBatch", "CSV"):
        assert (await refused(await listed(folder, text, format=form)))[0] == "InputEmpty"
    assert (await refused(await listed(folder, "uri,custom_id\n", format="CSV")))[0] == "InputEmpty"


async def test_a_list_that_is_not_there_is_not_found(place: str) -> None:
    await fill(place, "a.jpg")
    assert (await refused(Input("manifest", Location(f"{place}/none.jsonl"))))[0] == "InputNotFound"


async def test_two_items_of_one_name_are_found_with_their_lines(place: str) -> None:
    rows = [{"uri": f"{n}.jpg", "custom_id": f"id-{n}", "etag": "e"} for n in range(3000)]
    rows[2998]["custom_id"] = "id-17"
    reason, message = await refused(await listed(place, jsonl(*rows)))
    assert (reason, message) == ("InvalidManifest", "line 2999 has the same custom_id as line 18: 'id-17'")


async def test_names_that_only_share_a_hash_are_no_repetition(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "hash", len, raising=False)
    rows = [{"uri": f"{n:04}.jpg", "etag": "e"} for n in range(500)]
    assert len(await drawn(await listed(folder, jsonl(*rows)))) == 500
    _, message = await refused(await listed(folder, jsonl(*rows, rows[3])))
    assert "line 501 has the same custom_id as line 4" in message


async def test_the_lists_of_a_bucket_cannot_name_files_of_this_machine(s3: S3Server, tmp_path: Path) -> None:
    bucket = f"s3://{s3.bucket('lists')}/in"
    for uri in (
        f"file://{tmp_path}/secret.jpg",
        "../../secret.jpg",
        "./a.jpg",
        f"s3://{s3.bucket('lists')}/a/../b.jpg",
    ):
        reason, message = await refused(await listed(bucket, jsonl({"uri": uri})))
        assert reason == "InvalidManifest"
        assert message.startswith("line 1 has a uri")


async def test_an_upload_cannot_name_files_of_the_server(folder: str, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"x")
    for uri in (f"file://{tmp_path}/secret.jpg", "../secret.jpg", "secret.jpg"):
        said = replace(await listed(folder, jsonl({"uri": uri})), kind="upload")
        assert (await refused(said))[0] == "InvalidManifest"


async def test_paths_of_a_local_list_may_go_up(folder: str, tmp_path: Path) -> None:
    (tmp_path / "up.jpg").write_bytes(b"x")
    rows = jsonl({"uri": "../up.jpg"}, {"uri": str(tmp_path / "up.jpg"), "custom_id": "again"})
    assert {item.uri for item in await drawn(await listed(folder, rows))} == {f"file://{tmp_path}/up.jpg"}


async def test_openais_lines_are_items_without_an_image(place: str) -> None:
    body = {"model": "describe", "messages": [{"role": "user", "content": "Say hello."}]}
    rows = [{"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(3)]
    for kind in ("manifest", "upload"):
        said = replace(await listed(place, jsonl(*rows), format="OpenAIBatch"), kind=kind)
        items = await drawn(said)
        assert [(item.custom_id, item.uri, item.url, item.body) for item in items] == [
            (f"r{n}", "", "/v1/chat/completions", body) for n in range(3)
        ]


async def test_a_line_with_a_picture_inside_is_a_line(folder: str) -> None:
    body = {"image": "A" * 5_000_000}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    said = await listed(folder, jsonl(row, row | {"custom_id": "b"}), format="OpenAIBatch")
    assert [item.body for item in await drawn(said)] == [body, body]


NAMES = st.characters(exclude_categories=["Cc", "Cs"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.lists(st.text(NAMES, min_size=1, max_size=20), unique=True, min_size=1, max_size=9))
def test_any_names_come_back_from_jsonl_and_csv(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    import csv
    import io

    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerows([["custom_id", "uri", "etag"], *([name, "a.jpg", "e"] for name in names)])
    place = f"file://{tmp_path_factory.mktemp('names')}"

    async def read() -> None:
        rows = jsonl(*({"custom_id": name, "uri": "a.jpg", "etag": "e"} for name in names))
        assert [item.custom_id for item in await drawn(await listed(place, rows))] == names
        assert [i.custom_id for i in await drawn(await listed(place, table.getvalue(), format="CSV"))] == names

    asyncio.run(read())


@pytest.mark.parametrize(("fence", "form"), [("jsonl", "JSONL"), ("csv", "CSV"), ("openai", "OpenAIBatch")])
async def test_the_examples_of_the_documentation_are_understood(s3: S3Server, fence: str, form: Any) -> None:
    page = (Path(__file__).parents[2] / "docs/batch-inputs.md").read_text()
    (example,) = re.findall(rf"```{fence}\n(.*?)```", page, re.DOTALL)
    items = await drawn(await listed(f"s3://{s3.bucket('documented')}/{fence}", example, format=form))
    assert len(items) == {"jsonl": 3, "csv": 2, "openai": 1}[fence]
    assert all(reason in page for reason in get_args(inputs.Reason))


# --- an earlier batch ------------------------------------------------------------------------------------------------

FAILED, UNENHANCED, LEFT, CHANGED = "02.jpg", "04.jpg", "08.jpg", "01.jpg"


@pytest.fixture
async def earlier(place: str) -> Page:
    """Ten images in chunks of two: one failed, one had changed, one was not enhanced, and a chunk was never done."""
    await fill(place, *(f"{n:02}.jpg" for n in range(10)))
    page = page_of(place, shard_size=4, chunk_size=2)
    objects = open_location(page.outputs.location)
    plan = await plan_batch(page, objects)
    for shard in range(len(plan.shards)):
        for n, part in enumerate(slices(await read_shard(objects, layout_of(page), plan, shard), 2)):
            if not any(item.uri.endswith(LEFT) for item in part):
                data = b"".join(_line(item).encoded() for item in part)
                await objects.create(layout_of(page).chunk(shard, n), data)
    return page


def _line(item: Item) -> Line:
    if item.uri.endswith(FAILED):
        return Line(item, fault=Fault("caption", "caption_timeout", "too slow"))
    if item.uri.endswith(CHANGED):
        return Line(item, fault=Fault("fetch", "input_changed", "another one"))
    return Line(item, {"caption": "a", "enhance_error": "x"} if item.uri.endswith(UNENHANCED) else {"caption": "a"})


def page_of(place: str, **changes: Any) -> Page:
    out = Outputs(Location(place.removesuffix("/in") + "/out"))
    page = Page("photos", "uid", "0123456789ab", prefix(place), out, Target("http://127.0.0.1:9"))
    return replace(page, **changes)


def again(page: Page, only: Any) -> Page:
    root = f"{page.outputs.location.url}/{page.uid}/{page.fingerprint}/"
    return replace(page, uid="again", input=Input("retry_of", Location(root), only=only))


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("Failed", [CHANGED, FAILED, LEFT, "09.jpg"]),
        ("Unenhanced", [CHANGED, FAILED, UNENHANCED, LEFT, "09.jpg"]),
    ],
)
async def test_what_an_earlier_batch_left_is_done_again(earlier: Page, only: str, names: list[str]) -> None:
    page = replace(again(earlier, only), shard_size=1000)
    objects = open_location(page.outputs.location)
    plan = await plan_batch(page, objects)
    items = await read_shard(objects, layout_of(page), plan, 0)
    assert [item.uri.rsplit("/", 1)[1] for item in items] == names
    stores = Stores.of(page, objects, plan.source)
    assert [(await stores.fetch(item)).decode() for item in items] == names


async def test_an_image_that_changed_is_taken_as_it_is_now(earlier: Page, place: str) -> None:
    await open_location(Location(place)).write(CHANGED, b"a new one")
    page = again(earlier, "Failed")
    objects = open_location(page.outputs.location)
    plan = await plan_batch(page, objects)
    item = (await read_shard(objects, layout_of(page), plan, 0))[0]
    assert item.size == 9
    assert await Stores.of(page, objects, plan.source).fetch(item) == b"a new one"


async def test_a_retry_of_a_retry_still_knows_where_the_images_lie(earlier: Page) -> None:
    once = again(earlier, "Failed")
    await plan_batch(once, open_location(once.outputs.location))
    twice = replace(again(once, "Failed"), uid="twice")
    objects = open_location(twice.outputs.location)
    plan = await plan_batch(twice, objects)
    assert plan.source == earlier.input.location
    assert plan.items == 4


async def test_the_images_of_a_retry_lie_where_its_page_says(earlier: Page, place: str) -> None:
    page = again(earlier, "Failed")
    page = replace(page, input=replace(page.input, images=Location(place)))
    objects = open_location(page.outputs.location)
    plan = await plan_batch(page, objects)
    item = (await read_shard(objects, layout_of(page), plan, 0))[1]
    assert await Stores.of(page, objects, plan.source).fetch(item) == FAILED.encode()


async def fault_of(page: Page) -> tuple[str, str]:
    with pytest.raises(InputFault) as caught:
        await plan_batch(page, open_location(page.outputs.location))
    return caught.value.reason, caught.value.message


async def test_an_earlier_batch_that_is_not_there_is_not_found(place: str) -> None:
    assert (await fault_of(again(page_of(place), "Failed")))[0] == "InputNotFound"


async def test_an_earlier_batch_that_left_nothing_says_so(place: str) -> None:
    await fill(place, "a.jpg")
    page = page_of(place)
    objects = open_location(page.outputs.location)
    plan = await plan_batch(page, objects)
    (item,) = await read_shard(objects, layout_of(page), plan, 0)
    await objects.create(layout_of(page).chunk(0, 0), Line(item, {"caption": "a"}).encoded())
    reason, message = await fault_of(again(page, "Failed"))
    assert (reason, message) == ("InputEmpty", "the earlier batch left nothing to be done again")


async def test_a_damaged_earlier_batch_says_so(earlier: Page) -> None:
    objects = open_location(earlier.outputs.location)
    await objects.write(layout_of(earlier).plan, b"{}")
    reason, message = await fault_of(again(earlier, "Failed"))
    assert reason == "InvalidManifest"
    assert "damaged" in message


# --- captions that are there -----------------------------------------------------------------------------------------


@pytest.fixture(params=["beside", "apart"])
def captioned(request: pytest.FixtureRequest, folder: str) -> tuple[Page, str]:
    """A batch that skips what has a caption, and where captions lie."""
    return skipping(folder, is_apart=request.param == "apart")


def skipping(place: str, *, is_apart: bool) -> tuple[Page, str]:
    page = page_of(place)
    sidecars = Location(place.removesuffix("/in") + "/captions") if is_apart else None
    outputs = replace(page.outputs, sidecars=sidecars, existing="skip")
    return replace(page, outputs=outputs), sidecars.url if sidecars else place


@pytest.mark.parametrize("is_apart", [False, True], ids=["beside", "apart"])
async def test_images_with_a_caption_are_left_out(place: str, is_apart: bool) -> None:
    page, captions = skipping(place, is_apart=is_apart)
    await fill(place, "a.jpg", "b.jpg", "c/d.png", "c/e.png")
    await fill(captions, "a.txt", "c/e.txt", "unrelated.txt", "b.caption")
    objects = open_location(page.outputs.location)
    plan = await plan_batch(page, objects)
    items = await read_shard(objects, layout_of(page), plan, 0)
    assert [item.uri.removeprefix(f"{place}/") for item in items] == ["b.jpg", "c/d.png"]
    assert (plan.items, plan.skipped) == (2, 2)


async def test_an_empty_caption_is_none(captioned: tuple[Page, str], folder: str) -> None:
    page, captions = captioned
    await fill(folder, "a.jpg")
    await open_location(Location(captions)).write("a.txt", b"")
    assert (await plan_batch(page, open_location(page.outputs.location))).items == 1


async def test_when_all_have_captions_there_is_nothing_to_do(captioned: tuple[Page, str], folder: str) -> None:
    page, captions = captioned
    await fill(folder, "a.jpg", "b.jpg")
    await fill(captions, "a.txt", "b.txt")
    plan = await plan_batch(page, open_location(page.outputs.location))
    assert (plan.items, plan.skipped, plan.shards) == (0, 2, ())


async def test_without_captions_nothing_is_left_out(captioned: tuple[Page, str], folder: str) -> None:
    page, _ = captioned
    await fill(folder, "a.jpg", "b.jpg")
    assert (await plan_batch(page, open_location(page.outputs.location))).items == 2


async def test_captions_stay_where_they_do_not_matter(folder: str) -> None:
    await fill(folder, "a.jpg", "a.txt")
    page = page_of(folder)
    for existing in ("overwrite", "append"):
        page = replace(page, uid=existing, outputs=replace(page.outputs, existing=existing))
        assert (await plan_batch(page, open_location(page.outputs.location))).items == 1


async def test_items_without_an_image_have_no_caption(folder: str) -> None:
    await fill(folder, "a.txt")
    has = await has_caption(page_of(folder))
    assert not has(Item("a", url="/v1/chat/completions", body={"x": 1}))
    assert not has(Item("a", uri="upload:uploads/a.jpg"))
    assert has(Item("a", uri=f"{folder}/a.jpg"))
