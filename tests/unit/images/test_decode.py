"""Every format and mode becomes the same thing: upright, opaque, 8-bit RGB, small enough, nameless."""

import asyncio
import dataclasses
import io
import struct
import subprocess
import sys

import numpy as np
import pytest
import skimage
from PIL import Image, ImageCms

from sightline import images
from sightline.errors import InvalidImage, Unavailable
from sightline.images import Decoder, decode
from tests.unit.images.pictures import (
    FORMATS,
    LIMITS,
    chunk,
    difference,
    encoded,
    gradient,
    jpeg_of_many_scans,
    png,
    with_orientation,
)

PHOTOS = skimage.data_dir


def photo(name: str) -> bytes:
    with open(f"{PHOTOS}/{name}", "rb") as file:
        return file.read()


def pixel(data: bytes, at: tuple[int, int] = (0, 0)) -> tuple[int, int, int]:
    return decode(data, LIMITS).getpixel(at)


MODES = {
    "JPEG": ("RGB", "L", "CMYK", "YCbCr"),
    "PNG": ("RGB", "L", "1", "P", "RGBA", "LA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("RGB", "P", "L", "1"),
    "BMP": ("RGB", "L", "1", "P", "RGBA"),
    "TIFF": ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F"),
}
TOLERANCE = {"JPEG": 3.0, "WEBP": 3.0, "GIF": 6.0, "TIFF": 1.5}


def in_mode(mode: str) -> tuple[Image.Image, Image.Image]:
    """A picture in a mode, and what it should look like."""
    colour = gradient()
    grey = colour.convert("L")
    if mode in ("I;16", "I", "F"):
        wide = np.asarray(grey, dtype=np.uint32) * (1 if mode == "F" else 257)
        array = wide.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
        return Image.fromarray(array / 255 if mode == "F" else array), grey
    if mode in ("L", "LA"):
        return colour.convert(mode), grey
    if mode == "1":
        return colour.convert("1"), colour.convert("1")
    if mode == "P":
        palette = colour.quantize(64)
        return palette, palette
    return colour.convert(mode), colour


class TestModes:
    @pytest.mark.parametrize(("format", "mode"), [(format, mode) for format, modes in MODES.items() for mode in modes])
    def test_every_mode_of_every_format_becomes_rgb(self, format, mode):
        stored, seen = in_mode(mode)
        result = decode(encoded(stored, format), LIMITS)
        assert type(result) is Image.Image
        assert result.mode == "RGB"
        assert difference(result, seen) < TOLERANCE.get(format, 1.0)

    @pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_deflate", "packbits", "jpeg", "group4"])
    def test_compressed_tiff(self, compression):
        stored = gradient().convert("1") if compression == "group4" else gradient()
        assert difference(decode(encoded(stored, "TIFF", compression=compression), LIMITS), stored) < 3

    def test_16_bits_are_scaled_not_clipped(self):
        values = np.array([[0, 255, 256, 32_768, 65_535]] * 3, dtype=np.uint16)
        for format in ("PNG", "TIFF"):
            result = decode(encoded(Image.fromarray(values), format), LIMITS)
            assert [result.getpixel((x, 0))[0] for x in range(5)] == [0, 1, 1, 128, 255]

    def test_big_endian_16_bit_tiff(self):
        image = Image.frombytes("I;16B", (4, 3), struct.pack(">4H", 0, 0x4000, 0x8000, 0xFFFF) * 3)
        result = decode(encoded(image, "TIFF"), LIMITS)
        assert [result.getpixel((x, 0))[0] for x in range(4)] == [0, 64, 128, 255]

    def test_16_bit_colour_png(self):
        rows = (b"\0" + struct.pack(">3H", 0x1234, 0x8000, 0xFFFF) * 3) * 3
        assert pixel(png(3, 3, rows, depth=16)) == (0x12, 0x80, 0xFF)

    @pytest.mark.parametrize("depth", [1, 2, 4])
    def test_shallow_grey_png_uses_the_whole_range(self, depth):
        width = 8
        rows = (b"\0" + b"\xff" * (width * depth // 8)) * 8
        assert pixel(png(width, 8, rows, depth=depth, colour=0)) == (255, 255, 255)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            pytest.param([0.0, 0.5, 1.0], [0, 128, 255], id="0 to 1"),
            pytest.param([0.0, 100.0, 255.0], [0, 100, 255], id="0 to 255"),
            pytest.param([-1000.0, 0.0, 1000.0], [0, 128, 255], id="any range is stretched"),
            pytest.param([7e30, 7e30, 7e30], [0, 0, 0], id="a constant far out"),
        ],
    )
    def test_floats_are_taken_from_the_range_they_have(self, values, expected):
        image = Image.fromarray(np.array([values] * 3, dtype=np.float32))
        result = decode(encoded(image, "TIFF"), LIMITS)
        assert [result.getpixel((x, 0))[0] for x in range(3)] == expected

    def test_large_integers_are_stretched(self):
        image = Image.fromarray(np.array([[-(2**31), 0, 2**31 - 1]] * 3, dtype=np.int32))
        result = decode(encoded(image, "TIFF"), LIMITS)
        assert [result.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_values_that_are_no_numbers_are_refused(self, value):
        image = Image.fromarray(np.full((3, 3), value, dtype=np.float32))
        with pytest.raises(InvalidImage):
            decode(encoded(image, "TIFF"), LIMITS)

    def test_lab_is_refused_by_name(self):
        with pytest.raises(InvalidImage) as caught:
            decode(encoded(Image.new("LAB", (8, 8)), "TIFF"), LIMITS)
        assert caught.value.code == "image_format_unsupported"

    def test_the_first_frame_counts(self):
        frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
        for format in ("GIF", "WEBP", "PNG", "TIFF"):
            options = {"lossless": True} if format == "WEBP" else {}
            data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
            assert pixel(data) == (255, 0, 0), format


class TestAlpha:
    """Transparent is white, half is half."""

    @pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
    def test_rgba(self, format):
        image = Image.new("RGBA", (9, 3), (0, 0, 200, 0))
        image.paste((0, 0, 200, 255), (3, 0, 6, 3))
        image.paste((0, 0, 200, 128), (6, 0, 9, 3))
        result = decode(encoded(image, format, **({"lossless": True} if format == "WEBP" else {})), LIMITS)
        assert result.getpixel((1, 1)) == (255, 255, 255)
        assert result.getpixel((4, 1)) == (0, 0, 200)
        assert result.getpixel((7, 1)) == pytest.approx((127, 127, 227), abs=1)

    def test_la(self):
        image = Image.new("LA", (6, 3), (0, 0))
        image.paste((0, 255), (3, 0, 6, 3))
        data = encoded(image)
        assert (pixel(data, (1, 1)), pixel(data, (4, 1))) == ((255, 255, 255), (0, 0, 0))

    def test_a_palette_with_transparency(self):
        image = Image.new("P", (6, 3), 0)
        image.putpalette([10, 20, 30, 200, 0, 0])
        image.paste(1, (3, 0, 6, 3))
        for format in ("PNG", "GIF"):
            data = encoded(image, format, transparency=0)
            assert (pixel(data, (1, 1)), pixel(data, (4, 1))) == ((255, 255, 255), (200, 0, 0)), format

    def test_a_palette_with_degrees_of_transparency(self):
        image = Image.new("P", (6, 3), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.paste(1, (3, 0, 6, 3))
        data = encoded(image, "PNG", transparency=bytes([0, 128]))
        assert pixel(data, (1, 1)) == (255, 255, 255)
        assert pixel(data, (4, 1)) == pytest.approx((127, 127, 127), abs=1)

    @pytest.mark.parametrize(
        ("colour", "depth", "key", "row"),
        [
            pytest.param(2, 8, struct.pack(">3H", 9, 8, 7), bytes([9, 8, 7]) * 2 + bytes([9, 8, 6]) * 2, id="RGB"),
            pytest.param(0, 8, struct.pack(">H", 5), bytes([5, 5, 6, 6]), id="grey"),
            pytest.param(0, 16, struct.pack(">H", 1000), struct.pack(">4H", 1000, 1000, 1001, 1001), id="16-bit grey"),
            pytest.param(0, 1, struct.pack(">H", 0), bytes([0b00110000]), id="1-bit grey"),
        ],
    )
    def test_a_png_with_a_colour_that_stands_for_transparent(self, colour, depth, key, row):
        data = png(4, 4, (b"\0" + row) * 4, colour=colour, depth=depth, extra=chunk(b"tRNS", key))
        assert pixel(data, (0, 0)) == (255, 255, 255)
        if depth != 1:
            assert max(pixel(data, (3, 0))) < 10

    def test_the_horse_stands_on_white(self):
        horse = decode(photo("horse.png"), LIMITS)
        assert horse.size == (400, 328)
        assert horse.getpixel((0, 0)) == (255, 255, 255)
        assert min(horse.getextrema()) == (0, 255)

    def test_shrinking_mixes_no_hidden_colour_into_the_edge(self):
        image = Image.new("RGBA", (400, 400), (255, 0, 0, 0))
        image.paste((255, 255, 255, 255), (200, 0, 400, 400))
        result = decode(encoded(image), LIMITS, max_width=100)
        assert result.getextrema() == ((255, 255),) * 3


class TestOrientation:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_the_picture_is_upright(self, format, orientation):
        result = decode(with_orientation(gradient(64, 48), orientation, format), LIMITS)
        assert difference(result, gradient(64, 48)) < 2

    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_bounds_refer_to_the_upright_picture(self, format, orientation):
        data = with_orientation(gradient(800, 200), orientation, format)
        result = decode(data, LIMITS, max_width=100, max_height=100)
        assert result.size == (100, 25)
        assert difference(result, gradient(800, 200).resize((100, 25), Image.Resampling.LANCZOS)) < 2

    @pytest.mark.parametrize("value", [0, 9, 65_535])
    def test_a_value_that_means_nothing_turns_nothing(self, value):
        exif = Image.Exif()
        exif[0x0112] = value
        assert decode(encoded(gradient(), "JPEG", exif=exif), LIMITS).size == (64, 48)

    @pytest.mark.parametrize(
        "exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(30)]
    )
    def test_damaged_exif_costs_the_turn_not_the_picture(self, exif):
        assert decode(encoded(gradient(), "JPEG", exif=exif), LIMITS).size == (64, 48)

    def test_exif_behind_the_pixels_of_a_png_counts(self):
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encoded(gradient(64, 48))
        late = data[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + data[-12:]
        assert decode(late, LIMITS).size == (48, 64)


class TestSize:
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize(
        ("size", "bounds", "expected"),
        [
            ((600, 400), (512, None), (512, 341)),
            ((512, 400), (512, None), (512, 400)),
            ((600, 400), (None, 200), (300, 200)),
            ((600, 400), (512, 100), (150, 100)),
            ((600, 400), (None, None), (600, 400)),
            ((10, 10), (512, 1024), (10, 10)),
            ((600, 3), (30, None), (30, 1)),
            ((3, 600), (30, 20), (1, 20)),
        ],
    )
    def test_fits_the_bounds_and_keeps_the_aspect(self, format, size, bounds, expected):
        result = decode(encoded(gradient(*size), format), LIMITS, max_width=bounds[0], max_height=bounds[1])
        assert result.size == expected

    def test_contract_a7_a_wide_image_is_512_wide_by_lanczos(self):
        data = photo("coffee.png")
        expected = Image.open(io.BytesIO(data)).resize((512, 341), Image.Resampling.LANCZOS)
        assert difference(decode(data, LIMITS, max_width=512, max_height=1024), expected) == 0

    @pytest.mark.parametrize("name", ["retina.jpg", "hubble_deep_field.jpg", "rocket.jpg"])
    @pytest.mark.parametrize("width", [64, 150, 320, 512])
    def test_a_jpeg_scaled_while_decoding_equals_the_full_decode(self, name, width):
        full = Image.open(io.BytesIO(photo(name))).convert("RGB")
        height = round(full.height * width / full.width)
        expected = full.resize((width, height), Image.Resampling.LANCZOS)
        result = decode(photo(name), LIMITS, max_width=width)
        assert result.size == expected.size
        assert difference(result, expected) < 0.5

    def test_a_jpeg_is_really_scaled_while_decoding(self, monkeypatch):
        seen = []
        resize = Image.Image.resize
        monkeypatch.setattr(
            Image.Image, "resize", lambda self, *a, **k: (seen.append(self.size), resize(self, *a, **k))[1]
        )
        assert decode(photo("retina.jpg"), LIMITS, max_width=150).size == (150, 150)
        assert seen == [(353, 353)]  # 1411 / 4, at least twice the target

    @pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "camera.png"])
    def test_photographs_keep_their_pixels(self, name):
        assert difference(decode(photo(name), LIMITS), Image.open(io.BytesIO(photo(name)))) == 0


class TestMetadata:
    @pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
    @pytest.mark.parametrize("bounds", [None, 32])
    def test_nothing_survives(self, format, bounds):
        exif = Image.Exif()
        exif[0x010F] = "Secret Camera"
        exif.get_ifd(0x8825)[1] = "N"
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        data = encoded(gradient(), format, exif=exif, icc_profile=profile, dpi=(300, 300))
        result = decode(data, LIMITS, max_width=bounds)
        assert result.info == {}
        assert dict(result.getexif()) == {}
        for format_out in ("PNG", "JPEG", "TIFF"):
            saved = Image.open(io.BytesIO(encoded(result, format_out)))
            assert not {"exif", "icc_profile", "xmp"} & set(saved.info)
            assert b"Secret" not in encoded(result, format_out)

    def test_chelseas_xmp_is_dropped(self):
        assert "xmp" in Image.open(io.BytesIO(photo("chelsea.png"))).info
        assert decode(photo("chelsea.png"), LIMITS).info == {}

    def test_the_result_lets_go_of_the_file(self):
        result = decode(encoded(gradient(), "GIF"), LIMITS)
        assert type(result) is Image.Image
        assert not hasattr(result, "fp")


class TestDecoder:
    async def test_decodes_beside_the_loop(self):
        decoder = Decoder(LIMITS, threads=2)
        results = await asyncio.gather(*(decoder.decode(photo("rocket.jpg"), max_width=64) for _ in range(8)))
        assert {image.size for image in results} == {(64, 43)}
        decoder.close()

    async def test_refuses_like_decode(self):
        decoder = Decoder(LIMITS, threads=1)
        with pytest.raises(InvalidImage):
            await decoder.decode(b"junk")
        decoder.close()

    async def test_the_pool_is_the_bound_and_who_left_is_not_served(self, monkeypatch):
        loop, started, gate, served = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event(), []

        def slow(data, *_, **__):
            served.append(data)
            loop.call_soon_threadsafe(started.set)
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(10)
            return Image.new("RGB", (1, 1))

        monkeypatch.setattr(images, "decode", slow)
        decoder = Decoder(LIMITS, threads=1)
        first = asyncio.create_task(decoder.decode(b"first"))
        left = asyncio.create_task(decoder.decode(b"left"))
        last = asyncio.create_task(decoder.decode(b"last"))
        await started.wait()
        left.cancel()
        assert served == [b"first"]
        gate.set()
        await asyncio.gather(first, last)
        assert served == [b"first", b"last"]
        decoder.close()

    async def test_after_close_it_is_503(self):
        decoder = Decoder(LIMITS, threads=1)
        decoder.close()
        decoder.close()
        with pytest.raises(Unavailable):
            await decoder.decode(photo("rocket.jpg"))


def test_many_scans_within_the_limit_decode():
    assert decode(jpeg_of_many_scans((64, 64), 40), LIMITS).size == (64, 64)


def test_a_lower_limit_holds_for_decode_too():
    with pytest.raises(images.PayloadTooLarge):
        decode(encoded(gradient()), dataclasses.replace(LIMITS, max_pixels=100))


def test_importing_costs_neither_torch_nor_boto3():
    code = "import sys, sightline.images, sightline.sources; assert not {'torch', 'boto3', 'kserve'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
