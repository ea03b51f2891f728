"""One function decides what a text argument or a V2 BYTES element stands for."""

import base64
import string
from urllib.parse import quote, quote_from_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.errors import InvalidImage, SourceRefused
from sightline.sources import parse_s3_uri, parse_source
from sightline.wire import ImageBytes, ImageS3, ImageUrl
from tests.unit.images.pictures import FORMATS, encoded, gradient

PNG = encoded(gradient(8, 8))
TEXT = base64.b64encode(PNG).decode()


def refused(value: str | bytes) -> str:
    with pytest.raises((InvalidImage, SourceRefused)) as caught:
        parse_source(value)
    assert caught.value.status == 400
    return caught.value.code


@pytest.mark.parametrize("as_bytes", [False, True], ids=["text", "bytes"])
class TestTextOrBytes:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            pytest.param(TEXT, ImageBytes(PNG), id="base64"),
            pytest.param(TEXT.rstrip("="), ImageBytes(PNG), id="padding is missing"),
            pytest.param(TEXT.replace("+", "-").replace("/", "_"), ImageBytes(PNG), id="URL-safe"),
            pytest.param(base64.encodebytes(PNG).decode() + "\r\n", ImageBytes(PNG), id="MIME lines"),
            pytest.param(f"data:image/png;base64,{TEXT}", ImageBytes(PNG), id="data URI"),
            pytest.param(f"DATA:IMAGE/PNG;BASE64,{TEXT}", ImageBytes(PNG), id="shouted"),
            pytest.param(f"data:image/png;name=a.png;base64,{TEXT}", ImageBytes(PNG), id="a parameter"),
            pytest.param(f"data:application/octet-stream;base64,{TEXT}", ImageBytes(PNG), id="octet-stream"),
            pytest.param(f"data:;base64,{TEXT}", ImageBytes(PNG), id="no type"),
            pytest.param(f"data:image/png;base64,{quote(TEXT, safe='')}", ImageBytes(PNG), id="escaped"),
            pytest.param(f"data:image/png;base64, {TEXT[:9]} {TEXT[9:]}", ImageBytes(PNG), id="white space"),
            pytest.param(f"data:image/png,{quote_from_bytes(PNG)}", ImageBytes(PNG), id="percent-encoded"),
            pytest.param("https://a.example/b.png?c#d", ImageUrl("https://a.example/b.png?c#d"), id="https"),
            pytest.param("HTTP://A.example", ImageUrl("HTTP://A.example"), id="http"),
            pytest.param(" \nhttps://a.example/ü\n", ImageUrl("https://a.example/ü"), id="white space around"),
            pytest.param("s3://b/k e+y%20ü#?", ImageS3("s3://b/k e+y%20ü#?"), id="s3"),
            pytest.param("s3://", ImageS3("s3://"), id="s3, to be checked later"),
        ],
    )  # fmt: skip
    def test_is_understood(self, as_bytes, text, expected):
        assert parse_source(text.encode() if as_bytes else text) == expected

    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("", "image_empty"),
            (" \n", "image_empty"),
            ("====", "image_base64_invalid"),
            ("a", "image_base64_invalid"),
            ("abcde", "image_base64_invalid"),
            ("ab=c", "image_base64_invalid"),
            ("abcd===", "image_base64_invalid"),
            ("ab!d", "image_base64_invalid"),
            ("not base64 at all!", "image_base64_invalid"),
            ("<svg/>", "image_base64_invalid"),
            ("ümläut", "image_base64_invalid"),
            ("../../etc/passwd", "image_base64_invalid"),
            ("data:image/png;base64,", "image_empty"),
            ("data:image/png,", "image_empty"),
            ("data:image/png;base64,a", "image_base64_invalid"),
            ("data:image/png;base64", "data_uri_invalid"),
            ("data:text/html,<b>", "data_uri_invalid"),
            ("data:text/html;base64,PGI+", "data_uri_invalid"),
            ("data:", "data_uri_invalid"),
            ("data:image/png,%zz", "data_uri_invalid"),
            ("data:image/png;base64,%4", "data_uri_invalid"),
            ("data:" + "x" * 10_000, "data_uri_invalid"),
            ("file:///etc/passwd", "source_scheme_unsupported"),
            ("FILE:/etc/passwd", "source_scheme_unsupported"),
            ("ftp://a.example/b", "source_scheme_unsupported"),
            ("gopher://a.example:70/1", "source_scheme_unsupported"),
            ("jar:https://a.example!/b", "source_scheme_unsupported"),
            ("gs://bucket/key", "source_scheme_unsupported"),
            ("javascript:alert(1)", "source_scheme_unsupported"),
            (r"C:\Windows\win.ini", "source_scheme_unsupported"),
        ],
    )
    def test_is_refused(self, as_bytes, text, code):
        assert refused(text.encode() if as_bytes else text) == code

    def test_a_path_is_never_guessed(self, as_bytes):
        # It happens to be base64, and so becomes eight bytes of nonsense, not the contents of a file.
        text = "/etc/passwd"
        assert parse_source(text.encode() if as_bytes else text) == ImageBytes(base64.b64decode(text + "="))


class TestRawBytes:
    @pytest.mark.parametrize("format", FORMATS)
    def test_an_image_is_itself(self, format):
        data = encoded(gradient(), format)
        assert parse_source(data) == ImageBytes(data)

    def test_an_image_that_is_all_text_is_itself(self):
        data = b"BM" + b"A" * 60
        assert parse_source(data) == ImageBytes(data)

    def test_bytes_that_are_no_text_are_left_to_the_decoder(self):
        assert parse_source(b"\xfe\xff\x00") == ImageBytes(b"\xfe\xff\x00")

    @pytest.mark.parametrize("format", FORMATS)
    def test_base64_is_never_taken_for_an_image(self, format):
        data = encoded(gradient(), format)
        assert parse_source(base64.b64encode(data)) == ImageBytes(data)


def test_lone_surrogates_of_json_are_refused():
    assert refused("\ud800abc") == "image_base64_invalid"
    assert refused("data:image/png,\ud800") == "data_uri_invalid"
    assert refused("data:image/png;base64,\ud800") == "image_base64_invalid"


def test_the_refusal_does_not_repeat_the_input():
    for text in ("secret!", "data:text/secret,x", "secret:x"):
        with pytest.raises((InvalidImage, SourceRefused)) as caught:
            parse_source(text)
        assert "secret" not in caught.value.message


@given(st.binary(min_size=1, max_size=400), st.booleans(), st.booleans(), st.lists(st.integers(0, 500), max_size=5))
def test_base64_survives_every_dialect(data, is_url_safe, is_padded, breaks):
    text = (base64.urlsafe_b64encode if is_url_safe else base64.b64encode)(data).decode()
    text = text if is_padded else text.rstrip("=")
    for at in breaks:
        text = text[:at] + "\n " + text[at:]
    assert parse_source(text) == ImageBytes(data)
    assert parse_source(f"data:image/x-any;base64,{text}") == ImageBytes(data)


@given(st.binary(min_size=1, max_size=200))
def test_percent_encoding_survives(data):
    assert parse_source(f"data:image/png,{quote_from_bytes(data, safe='')}") == ImageBytes(data)


@given(st.text(max_size=200) | st.text(string.ascii_letters + string.digits + ":;,/+=%-_ ", max_size=200) | st.binary())
def test_anything_is_understood_or_refused(value):
    try:
        source = parse_source(value)
    except (InvalidImage, SourceRefused):
        return
    assert isinstance(source, ImageBytes | ImageUrl | ImageS3)


class TestS3Uri:
    @pytest.mark.parametrize(
        ("uri", "expected"),
        [
            ("s3://bucket/key", ("bucket", "key")),
            ("s3://bucket/a/b c+%20#?ü", ("bucket", "a/b c+%20#?ü")),
            ("s3://bucket//leading", ("bucket", "/leading")),
            ("s3://my.bucket-1/x/", ("my.bucket-1", "x/")),
            ("s3://bucket/..a/b..", ("bucket", "..a/b..")),
        ],
    )
    def test_is_bucket_and_literal_key(self, uri, expected):
        assert parse_s3_uri(uri) == expected

    @pytest.mark.parametrize(
        "uri", ["", "bucket/key", "http://bucket/key", "s3:/b/k", "S3://b/k", " s3://b/k", "s3a://b/k"]
    )
    def test_contract_d6_text(self, uri):
        with pytest.raises(SourceRefused) as caught:
            parse_s3_uri(uri)
        assert caught.value.message == "s3_uri must start with s3://"
        assert (caught.value.status, caught.value.code) == (400, "s3_uri_invalid")

    @pytest.mark.parametrize(
        "uri",
        ["s3://", "s3://bucket", "s3://bucket/", "s3:///key", "s3://b/k", "s3://../key", "s3://a..b/key",
         "s3://user@bucket/k", "s3://arn:aws:s3:us-east-1:1:accesspoint/x/k", "s3://bucket/../other/k",
         "s3://bucket/a/./b", "s3://bucket/a\0b", "s3://bucket/a\nb", "s3://bucket/\ud800", "s3://bu cket/k",
         "s3://bucket/" + "ü" * 513],
    )  # fmt: skip
    def test_odd_ones_are_refused(self, uri):
        with pytest.raises(SourceRefused) as caught:
            parse_s3_uri(uri)
        assert caught.value.code == "s3_uri_invalid"
