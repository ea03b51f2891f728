"""Bodies of routes: whatever kind they are, they become fields and uploads, or an error of ours."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.types import Message, Scope

from sightline.errors import BadRequest, InvalidParameter, PayloadTooLarge
from sightline.services.bodies import Body, json_response, read_body
from sightline.settings import ServerSettings
from sightline.wire import ImageBytes

SETTINGS = ServerSettings(_env_file=None, auth="off", max_parts=4, max_image_bytes=3_000_000)
PNG = b"\x89PNG\r\n\x1a\n\x00\xff"

FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data; boundary=edge"


async def read(
    content: bytes, content_type: str | None, *, query: str = "", is_in_app: bool = True, **options: Any
) -> Body:
    """Read a body that arrives in two pieces, inside an application or outside of any."""
    pieces = [content[: len(content) // 2], content[len(content) // 2 :]]
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "query_string": query.encode(),
        "headers": [] if content_type is None else [(b"content-type", content_type.encode("latin-1"))],
    }
    if is_in_app:
        scope["app"] = object()

    async def receive() -> Message:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    return await read_body(Request(scope, receive), SETTINGS, **options)


async def read_form(
    fields: Mapping[str, Any] | None = None, files: Sequence[tuple[str, tuple[str, bytes]]] = (), **options: Any
) -> Body:
    """Read what httpx makes of fields and files."""
    request = httpx.Request("POST", "http://x", data=fields, files=list(files) or None)
    return await read(request.read(), request.headers.get("content-type"), **options)


def part(disposition: str, data: bytes = b"", *, ending: bytes = b"\r\n--edge--\r\n") -> bytes:
    head = f"Content-Disposition: {disposition}\r\n\r\n" if disposition else "\r\n"
    return b"--edge\r\n" + head.encode() + data + ending


class TestJson:
    @pytest.mark.parametrize(
        "content_type",
        [None, "", "application/json", "application/json; charset=utf-8", "text/plain", "APPLICATION/JSON", FORM, "x"],
    )
    async def test_is_what_a_body_is_unless_its_type_says_otherwise(self, content_type: str | None) -> None:
        body = await read(b'  {"prompt": "5", "max_tokens": 5, "seed": null}', content_type)

        assert body == Body({"prompt": "5", "max_tokens": 5, "seed": None}, {})

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"hunter2", b"\xff\xfe{}", b"{'a': 1}", b"NaN", b"[" * 100_000],
        ids=lambda b: repr(b)[:9],
    )
    async def test_that_is_none_is_refused(self, content: bytes) -> None:
        with pytest.raises(BadRequest) as caught:
            await read(content, "application/json")

        assert caught.value.code == "invalid_json"
        assert "hunter2" not in caught.value.message

    @pytest.mark.parametrize("content", [b"[]", b"null", b'"text"', b"5", b"true"])
    async def test_must_be_an_object(self, content: bytes) -> None:
        with pytest.raises(InvalidParameter) as caught:
            await read(content, "application/json")

        assert caught.value.status == 422


class TestRawImages:
    @pytest.mark.parametrize("content_type", ["image/png", "image/x-unknown", "IMAGE/JPEG", "image/png; q=1"])
    async def test_are_an_upload_named_image(self, content_type: str) -> None:
        body = await read(PNG, content_type)

        assert body == Body({}, {"image": ImageBytes(PNG)})

    async def test_have_their_options_in_the_query(self) -> None:
        body = await read(PNG, "image/png", query="prompt=7%20of%209&max_tokens=5&strict=true")

        assert body.fields == {"prompt": "7 of 9", "max_tokens": 5, "strict": "true"}


class TestForms:
    @pytest.mark.parametrize("files", [[], [("image", ("cat.png", PNG))]], ids=["urlencoded", "multipart"])
    async def test_fields_are_text(self, files: list[Any]) -> None:
        body = await read_form({"prompt": "grüße & more", "reasoning_level": "low"}, files)

        assert body.fields == {"prompt": "grüße & more", "reasoning_level": "low"}

    async def test_files_are_uploads_with_their_names(self) -> None:
        body = await read_form({}, [("image", ("cat.png", PNG)), ("other", ("dog.png", b""))])

        assert body.uploads == {"image": ImageBytes(PNG, "cat.png"), "other": ImageBytes(b"", "dog.png")}

    async def test_a_large_file_arrives_whole(self) -> None:
        data = bytes(range(256)) * 10_000

        assert (await read_form({}, [("image", ("x", data))])).uploads["image"].data == data

    async def test_an_image_as_base64_fits_into_a_field(self) -> None:
        text = "A" * (4 * SETTINGS.max_image_bytes // 3)

        assert (await read_form({"image_url": text})).fields == {"image_url": text}
        assert (await read_form({"image_url": text}, [("x", ("x", b""))])).fields == {"image_url": text}

    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("max_tokens", "5", 5),
            ("max_new_tokens", "5", 5),
            ("temperature", "0.5", 0.5),
            ("temperature", "1", 1),
            ("top_p", "0.9", 0.9),
            ("seed", "7", 7),
            ("max_width", "512", 512),
            ("max_tokens", "many", "many"),
            ("max_tokens", "5 apples", "5 apples"),
            ("temperature", "NaN", "NaN"),
            ("prompt", "5", "5"),
            ("prompt", "true", "true"),
            ("prompt", "null", "null"),
            ("prompt", '["a"]', '["a"]'),
            ("preset", "1", "1"),
            ("strict", "true", "true"),
        ],
    )
    @pytest.mark.parametrize("files", [[], [("image", ("cat.png", PNG))]], ids=["urlencoded", "multipart"])
    async def test_only_options_that_are_numbers_become_numbers(
        self, name: str, text: str, value: object, files: list[Any]
    ) -> None:
        assert (await read_form({name: text}, files)).fields == {name: value}

    @pytest.mark.parametrize("files", [[], [("image", ("cat.png", PNG))]], ids=["urlencoded", "multipart"])
    async def test_a_blank_field_counts_as_absent(self, files: list[Any]) -> None:
        assert (await read_form({"prompt": "  ", "max_tokens": ""}, files)).fields == {}

    async def test_two_files_of_one_name_are_refused_rather_than_one_forgotten(self) -> None:
        with pytest.raises(InvalidParameter) as caught:
            await read_form({}, [("hunter2", ("a", PNG)), ("hunter2", ("b", PNG))])

        assert "hunter2" not in caught.value.message

    @pytest.mark.parametrize(("fields", "files"), [(5, 0), (0, 5), (3, 2), (200, 0), (0, 200)])
    async def test_too_many_parts(self, fields: int, files: int) -> None:
        with pytest.raises(PayloadTooLarge) as caught:
            await read_form(
                {f"field{number}": "x" for number in range(fields)},
                [(f"file{number}", ("x", b"")) for number in range(files)],
            )

        assert caught.value.status == 413

    @pytest.mark.parametrize(("fields", "files"), [(4, 0), (0, 4), (2, 2)])
    async def test_as_many_parts_as_are_allowed(self, fields: int, files: int) -> None:
        body = await read_form(
            {f"field{number}": "x" for number in range(fields)},
            [(f"file{number}", ("x", b"")) for number in range(files)],
        )

        assert (len(body.fields), len(body.uploads)) == (fields, files)

    @pytest.mark.parametrize("files", [[], [("image", ("cat.png", PNG))]], ids=["urlencoded", "multipart"])
    async def test_too_large_a_field(self, files: list[Any]) -> None:
        with pytest.raises(PayloadTooLarge):
            await read_form({"prompt": "x" * (2 * SETTINGS.max_image_bytes + 1)}, files)

    @pytest.mark.parametrize("is_in_app", [True, False])
    @pytest.mark.parametrize(
        ("content_type", "content"),
        [
            ("multipart/form-data", part('form-data; name="a"')),
            ("multipart/form-data; boundary=", part('form-data; name="a"')),
            ("multipart/form-data; boundary=" + "x" * 10_000, part('form-data; name="a"')),
            (MULTIPART, b"hunter2"),
            (MULTIPART, b"--other\r\n\r\n"),
            (MULTIPART, part("form-data")),
            (MULTIPART, part("")),
            (MULTIPART, b"--edge\r\nContent-Disposition\r\n\r\n\r\n--edge--\r\n"),
            (MULTIPART, b"--edge\r\n: x\r\n\r\n\r\n--edge--\r\n"),
            (MULTIPART, b"--edgehunter2\r\n"),
            (MULTIPART + "; charset=undefined", part('form-data; name="a"', b"x")),
            (MULTIPART + "; charset=a\0b", part('form-data; name="a"', b"x")),
        ],
    )
    async def test_that_are_broken_are_refused_in_our_words(
        self, content_type: str, content: bytes, is_in_app: bool
    ) -> None:
        with pytest.raises(BadRequest) as caught:
            await read(content, content_type, is_in_app=is_in_app)

        assert caught.value.code == "invalid_form"
        assert "hunter2" not in caught.value.message

    @pytest.mark.parametrize("charset", ["latin-1", "hex", "nonsense", "idna", "utf-16"])
    async def test_in_odd_charsets_are_read_somehow(self, charset: str) -> None:
        body = await read(part('form-data; name="image"; filename="x"', PNG), f"{MULTIPART}; charset={charset}")

        assert [upload.data for upload in body.uploads.values()] == [PNG]

    async def test_cut_off_in_the_middle_have_no_half_of_a_field(self) -> None:
        whole = part('form-data; name="prompt"', b"a long question")

        assert (await read(whole[: whole.index(b"question")], MULTIPART)).fields == {}

    @pytest.mark.parametrize("content_type", [MULTIPART, FORM])
    @given(content=st.binary(max_size=300))
    async def test_of_garbage_are_read_or_refused(self, content_type: str, content: bytes) -> None:
        for data in (content, part('form-data; name="a"', content), b"--edge\r\n" + content):
            with contextlib.suppress(BadRequest, InvalidParameter, PayloadTooLarge):
                await read(data, content_type)


class TestAnswers:
    def test_are_json_of_our_kind(self) -> None:
        response = json_response({"text": "grüße"}, 201, {"Retry-After": "1"})

        assert response.status_code == 201
        assert response.headers["content-type"] == "application/json"
        assert response.headers["retry-after"] == "1"
        assert orjson.loads(response.body) == {"text": "grüße"}


class TestSeveralUnderOneName:
    async def test_files_and_texts_keep_their_order(self) -> None:
        files = [("images", ("a.png", PNG)), ("images", ("b.png", PNG + b"b")), ("image", ("c.png", PNG))]

        body = await read_form({"image_url": ["s3://a/b"]}, files, several={"images", "image_url"})

        assert body.files == {"images": [ImageBytes(PNG, "a.png"), ImageBytes(PNG + b"b", "b.png")]}
        assert body.uploads == {"image": ImageBytes(PNG, "c.png")}
        assert body.fields == {"image_url": ["s3://a/b"]}

    async def test_is_refused_under_any_other_name(self) -> None:
        with pytest.raises(InvalidParameter):
            await read_form(None, [("image", ("a.png", PNG))] * 2, several={"images"})

    @pytest.mark.parametrize(("parts", "is_taken"), [(9, True), (10, False)])
    async def test_a_route_may_take_more_parts_than_the_setting(self, parts: int, is_taken: bool) -> None:
        files = [("images", ("a.png", PNG))] * parts
        reading = read_form(None, files, several={"images"}, max_parts=9)

        if is_taken:
            assert len((await reading).files["images"]) == parts
        else:
            with pytest.raises(PayloadTooLarge):
                await reading
