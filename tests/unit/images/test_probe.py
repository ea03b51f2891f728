"""The header alone decides what is worth decoding."""

import dataclasses
import time

import pytest
from PIL import Image

from sightline.errors import InvalidImage, PayloadTooLarge, SightlineError
from sightline.images import Header, Limits, check_bytes, is_image, probe
from sightline.settings import ImageSettings
from tests.unit.images.pictures import (
    FORMATS,
    LIMITS,
    animated_webp_canvas,
    encoded,
    gradient,
    jpeg_of_many_scans,
    png,
    tiff,
    with_orientation,
)


def refusal(data: bytes, limits: Limits = LIMITS) -> SightlineError:
    with pytest.raises(SightlineError) as caught:
        probe(data, limits)
    return caught.value


def test_limits_are_those_of_the_settings():
    settings = ImageSettings(max_image_bytes=5, max_pixels=6, min_side=7, max_aspect=8)
    assert Limits.from_settings(settings) == Limits(max_bytes=5, max_pixels=6, min_side=7, max_aspect=8)
    assert Limits.from_settings(ImageSettings(_env_file=None)) == LIMITS


@pytest.mark.parametrize("format", FORMATS)
def test_reads_format_and_size(format):
    data = encoded(gradient(50, 40), format)
    assert is_image(data)
    assert probe(data, LIMITS) == Header(format, 50, 40)


def test_several_pictures_in_a_jpeg_are_still_a_jpeg():
    data = encoded(gradient(), "MPO", save_all=True, append_images=[gradient()])
    assert probe(data, LIMITS).format == "JPEG"


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_picture(format, orientation):
    header = probe(with_orientation(gradient(50, 40), orientation, format), LIMITS)
    assert (header.width, header.height) == (50, 40)


def test_does_not_decode():
    header = probe(png(6000, 6000), LIMITS)  # the pixels are not there
    assert (header.width, header.height) == (6000, 6000)


class TestTooLarge:
    def test_bytes_are_counted_before_anything_is_read(self):
        data = encoded(gradient())
        assert probe(data, dataclasses.replace(LIMITS, max_bytes=len(data)))
        error = refusal(data, dataclasses.replace(LIMITS, max_bytes=len(data) - 1))
        assert isinstance(error, PayloadTooLarge)
        assert error.code == "image_too_many_bytes"
        with pytest.raises(PayloadTooLarge):
            check_bytes(11, 10)

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(png(30_000, 30_000), id="PNG of 900 MP, beyond PIL's error"),
            pytest.param(png(10_000, 10_000), id="PNG of 100 MP, beyond PIL's warning"),
            pytest.param(png(6400, 6400), id="PNG of 41 MP, beyond ours"),
            pytest.param(png(2**31 - 1, 2**31 - 1), id="PNG of 4·10¹⁸ pixels"),
            pytest.param(animated_webp_canvas(16_384, 16_384), id="WEBP canvas"),
            pytest.param(animated_webp_canvas(7000, 7000), id="small WEBP canvas"),
            pytest.param(b"GIF89a\xff\xff\xff\xff\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\0;", id="GIF of 4 GP"),
            pytest.param(
                b"BM" + (54).to_bytes(4, "little") + b"\0" * 4 + b"\x36\0\0\0\x28\0\0\0"
                + (60_000).to_bytes(4, "little") * 2 + b"\x01\0\x18\0" + b"\0" * 24,
                id="BMP of 3.6 GP",
            ),
            pytest.param(
                tiff({256: (4, [60_000]), 257: (4, [60_000]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]),
                      273: (4, [-1]), 277: (3, [1]), 278: (4, [60_000]), 279: (4, [4])}, b"abcd"),
                id="TIFF of 3.6 GP",
            ),
            pytest.param(
                tiff({256: (4, [64]), 257: (4, [64]), 258: (3, [8]), 259: (3, [8]), 262: (3, [1]), 277: (3, [1]),
                      322: (4, [30_000]), 323: (4, [30_000]), 324: (4, [-1]), 325: (4, [4])}, b"abcd"),
                id="TIFF whose one tile is 900 MP",
            ),
        ],
    )  # fmt: skip
    def test_pixels_are_counted_in_the_header(self, data):
        error = refusal(data)
        assert isinstance(error, PayloadTooLarge)
        assert error.code == "image_too_many_pixels"

    def test_the_largest_is_taken_and_one_row_more_is_not(self):
        limits = dataclasses.replace(LIMITS, max_pixels=50 * 40)
        assert probe(encoded(gradient(50, 40)), limits)
        assert refusal(encoded(gradient(50, 41)), limits).code == "image_too_many_pixels"

    def test_a_limit_above_pils_own_is_still_no_500(self):
        error = refusal(png(20_000, 20_000), dataclasses.replace(LIMITS, max_pixels=10**9))
        assert error.status == 413


class TestShape:
    @pytest.mark.parametrize("size", [(1, 1), (2, 2), (2, 400), (400, 2), (1, 20_001)])
    def test_a_side_below_the_least_is_refused(self, size):
        assert refusal(encoded(Image.new("RGB", size))).code == "image_too_small"

    @pytest.mark.parametrize("size", [(3, 3), (3, 600), (600, 3)])
    def test_the_least_side_and_the_largest_aspect_are_taken(self, size):
        assert probe(encoded(Image.new("RGB", size)), LIMITS)

    @pytest.mark.parametrize("size", [(3, 601), (20_001, 3), (4, 801)])
    def test_beyond_the_aspect_is_refused(self, size):
        error = refusal(encoded(Image.new("RGB", size)))
        assert isinstance(error, InvalidImage)
        assert error.code == "image_aspect_too_large"

    def test_no_setting_lets_an_empty_picture_through(self):
        lenient = dataclasses.replace(LIMITS, min_side=0, max_aspect=1e9)
        assert isinstance(refusal(png(0, 5), lenient), InvalidImage)

    def test_20001_by_1_is_taken_when_the_limits_say_so(self):
        lenient = dataclasses.replace(LIMITS, min_side=1, max_aspect=30_000)
        assert probe(encoded(Image.new("RGB", (20_001, 1))), lenient).width == 20_001


class TestNoImage:
    def test_nothing_is_empty(self):
        assert refusal(b"").code == "image_empty"

    @pytest.mark.parametrize(
        "data",
        [
            b"\0",
            b"not an image at all",
            b"<!doctype html><html><body>404</body></html>",
            b"PK\x03\x04" + bytes(100),
            b"\x7fELF" + bytes(100),
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"BM",
            b"II*\0",
            b"RIFF\x04\0\0\0WEBP",
            b"#define x_width 9999\n#define x_height 9999\nstatic char x_bits[] = {",
            bytes(range(256)) * 20,
        ],
    )
    def test_other_bytes_are_undecodable(self, data):
        assert refusal(data).code in ("image_undecodable", "image_truncated")

    @pytest.mark.parametrize(
        "data",
        [
            pytest.param(b'<svg xmlns="http://www.w3.org/2000/svg"/>', id="SVG"),
            pytest.param(b'<?xml version="1.0"?>\n<!-- x -->\n<svg/>', id="SVG with prologue"),
            pytest.param(b"%PDF-1.7\n", id="PDF"),
            pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n", id="EPS"),
            pytest.param(b"\0\0\0\x1cftypavif" + bytes(16), id="AVIF header"),
            pytest.param(b"\0\0\0\x18ftypheic" + bytes(16), id="HEIC header"),
            pytest.param(b"8BPS\0\x01" + bytes(20), id="PSD"),
            pytest.param(b"SIMPLE  =                    T", id="FITS"),
            pytest.param(encoded(gradient(), "AVIF"), id="AVIF"),
            pytest.param(encoded(gradient(), "JPEG2000"), id="JPEG 2000"),
            pytest.param(encoded(gradient(), "ICO"), id="ICO"),
            pytest.param(encoded(gradient(), "PPM"), id="PPM"),
        ],
    )
    def test_pictures_of_other_formats_are_told_apart(self, data):
        error = refusal(data)
        assert error.code == "image_format_unsupported"
        assert "JPEG" in error.message

    def test_a_file_that_is_two_things_is_only_ever_the_image(self):
        assert probe(encoded(gradient(), "GIF") + b"PK\x03\x04<script>%PDF-1.7", LIMITS).format == "GIF"
        assert refusal(b"%PDF-1.7\n" + encoded(gradient(), "JPEG")).code == "image_format_unsupported"

    @pytest.mark.parametrize("data", [b"", b"junk", b"%PDF-1.7", png(30_000, 30_000), encoded(gradient())[:40]])
    def test_the_client_never_sees_the_librarys_text(self, data):
        message = refusal(data).message
        assert "0x" not in message
        assert "BytesIO" not in message
        assert "identify" not in message

    def test_the_cause_is_chained(self):
        assert refusal(b"junk").__cause__ is not None


class TestScanBomb:
    def test_more_scans_than_an_encoder_writes_are_refused_at_once(self):
        data = jpeg_of_many_scans((2000, 2000), 100_000)
        started = time.perf_counter()
        error = refusal(data)
        assert error.code == "image_too_complex"
        assert time.perf_counter() - started < 1

    def test_a_progressive_jpeg_is_taken(self):
        assert probe(encoded(gradient(), "JPEG", progressive=True), LIMITS)
        assert probe(jpeg_of_many_scans((64, 64), 40), LIMITS)

    def test_scan_like_bytes_in_metadata_and_behind_the_end_do_not_count(self):
        data = encoded(gradient(), "JPEG", icc_profile=b"\xff\xda" * 5000)
        assert probe(data + b"\xff\xda" * 5000, LIMITS)

    def test_strips_of_a_tiff_are_looked_into(self):
        tags = {256: (4, [64]), 257: (4, [64]), 258: (3, [8, 8, 8]), 259: (3, [7]), 262: (3, [6]), 273: (4, [-1]),
                277: (3, [3]), 278: (4, [64])}  # fmt: skip
        for scans, is_taken in ((1, True), (200, False)):
            strip = jpeg_of_many_scans((64, 64), scans)
            data = tiff(tags | {279: (4, [len(strip)])}, strip)
            if is_taken:
                assert probe(data, LIMITS)
            else:
                assert refusal(data).code == "image_too_complex"
