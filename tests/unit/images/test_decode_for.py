"""A JPEG that a model will shrink anyway is decoded smaller: what that may change, and what it may not."""

import io
import threading

import numpy as np
import pytest
import skimage
from PIL import Image

from sightline.errors import InvalidImage, Unavailable
from sightline.images import Decoder, Picture, decode, decode_for
from sightline.pool import DECODED
from tests.unit.images.pictures import LIMITS, difference, encoded, gradient, with_orientation


def at_most(side: int):
    """A model that shrinks pictures to a longer side, and enlarges none."""

    def wanted(size: tuple[int, int]) -> tuple[int, int]:
        scale = min(1.0, side / max(size))
        return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))

    return wanted


def photo(name: str) -> bytes:
    with open(f"{skimage.data_dir}/{name}", "rb") as file:
        return file.read()


class TestScale:
    @pytest.mark.parametrize(
        ("side", "detail", "expected"),
        [(800, 1, 800), (400, 1, 400), (399, 1, 400), (401, 1, 800), (100, 1, 100), (400, 2, 800), (150, 1.5, 400),
         (10, 1, 100), (10, 0, 800)],
    )  # fmt: skip
    def test_at_least_so_many_times_what_is_wanted_is_left(self, side, detail, expected):
        picture = decode_for(encoded(gradient(800, 600), "JPEG"), LIMITS, at_most(side), detail=detail)
        assert picture.image.size == (expected, expected * 3 // 4)
        assert picture.size == (800, 600)

    def test_the_wanted_size_may_have_another_aspect(self):
        picture = decode_for(encoded(gradient(800, 400), "JPEG"), LIMITS, lambda size: (150, 150))
        assert picture.image.size == (400, 200)

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_what_is_wanted_refers_to_the_upright_picture(self, orientation):
        asked = []
        data = with_orientation(gradient(800, 200), orientation)
        picture = decode_for(data, LIMITS, lambda size: asked.append(size) or (200, 50))
        assert asked == [(800, 200)]
        assert (picture.image.size, picture.size) == ((200, 50), (800, 200))
        assert difference(picture.image, gradient(800, 200).resize((200, 50), Image.Resampling.LANCZOS)) < 2

    @pytest.mark.parametrize("mode", ["L", "CMYK"])
    def test_other_modes(self, mode):
        picture = decode_for(encoded(gradient(800, 600).convert(mode), "JPEG"), LIMITS, at_most(200))
        assert (picture.image.mode, picture.image.size) == ("RGB", (200, 150))

    @pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "BMP", "TIFF"])
    def test_other_formats_are_decoded_whole(self, format):
        data = encoded(gradient(320, 240), format)
        picture = decode_for(data, LIMITS, at_most(10))
        assert picture.size == picture.image.size == (320, 240)
        assert difference(picture.image, decode(data, LIMITS)) == 0

    def test_a_bound_beyond_what_is_decoded_only_names_the_size(self):
        picture = decode_for(encoded(gradient(1600, 800), "JPEG"), LIMITS, at_most(700), max_width=1000)
        assert (picture.image.size, picture.size) == ((800, 400), (1000, 500))

    def test_a_bound_below_it_is_kept_by_lanczos(self):
        data = encoded(gradient(1600, 800), "JPEG")
        picture = decode_for(data, LIMITS, at_most(700), max_width=720)
        assert picture.image.size == picture.size == (720, 360)
        assert difference(picture.image, decode(data, LIMITS, max_width=720)) < 0.5

    def test_is_counted(self):
        before = DECODED.labels("JPEG", 4)._value.get()
        decode_for(encoded(gradient(800, 600), "JPEG"), LIMITS, at_most(200))
        assert DECODED.labels("JPEG", 4)._value.get() == before + 1


class TestRefusals:
    """The same files are refused for the same reasons, whatever the scale."""

    @pytest.mark.parametrize("side", [10, 100, 10_000])
    def test_truncated_and_damaged_files(self, side):
        whole = encoded(gradient(800, 600), "JPEG")
        for data in (whole[: len(whole) // 2], whole[:200], b"\xff\xd8\xff" + bytes(100)):
            codes = []
            for work in (lambda d=data: decode(d, LIMITS), lambda d=data: decode_for(d, LIMITS, at_most(side))):
                with pytest.raises(InvalidImage) as caught:
                    work()
                codes.append(caught.value.code)
            assert codes[0] == codes[1]

    def test_what_the_model_refuses_stays_its_refusal(self):
        def refuse(size: tuple[int, int]) -> tuple[int, int]:
            raise Unavailable("no", code="mine")

        with pytest.raises(Unavailable) as caught:
            decode_for(encoded(gradient(), "JPEG"), LIMITS, refuse)
        assert caught.value.code == "mine"


@pytest.mark.parametrize("name", ["retina.jpg", "hubble_deep_field.jpg", "rocket.jpg"])
@pytest.mark.parametrize("divisor", [2, 3, 4, 7])
def test_what_the_model_gets_is_close_to_the_whole_decode(name, divisor):
    """Share: of values more than 32 levels off. Detail 1 is furthest off where nothing is left to shrink (2, 4)."""
    whole = decode(photo(name), LIMITS)
    wanted = (whole.width // divisor, whole.height // divisor)
    expected = whole.resize(wanted, Image.Resampling.BICUBIC)
    for detail, mean, share in ((1, 2.0, 0.006), (2, 0.9, 0.0005)):
        small = decode_for(photo(name), LIMITS, lambda size: wanted, detail=detail).image
        made = small.resize(wanted, Image.Resampling.BICUBIC)
        gap = np.abs(np.asarray(made, dtype=np.int16) - np.asarray(expected, dtype=np.int16))
        assert gap.mean() < mean
        assert (gap > 32).mean() < share


class TestPrepare:
    async def test_decodes_and_makes_in_one_thread_beside_the_loop(self):
        def make(picture: Picture) -> tuple[tuple[int, int], str]:
            return picture.image.size, threading.current_thread().name

        decoder = Decoder(LIMITS, threads=1)
        size, thread = await decoder.prepare(encoded(gradient(800, 600), "JPEG"), at_most(100), make)
        whole, _ = await decoder.prepare(encoded(gradient(800, 600), "JPEG"), None, make)
        decoder.close()
        assert (size, whole) == ((100, 75), (800, 600))
        assert thread.startswith("decode")

    async def test_an_error_of_the_model_costs_its_own_request_only(self):
        def fail(picture: Picture) -> None:
            raise ZeroDivisionError

        decoder = Decoder(LIMITS, threads=1)
        data = encoded(gradient(), "PNG")
        with pytest.raises(ZeroDivisionError):
            await decoder.prepare(data, at_most(10), fail)
        assert (await decoder.prepare(data, at_most(10), lambda picture: picture.size)) == (64, 48)
        decoder.close()
        with pytest.raises(Unavailable):
            await decoder.prepare(data, at_most(10), fail)


def test_the_setting_reaches_the_decoder():
    from sightline.settings import BlipSettings

    for detail, expected in ((0, (800, 600)), (1, (100, 75)), (3, (400, 300))):
        decoder = Decoder.from_settings(BlipSettings(_env_file=None, auth="off", jpeg_detail=detail))
        file = io.BytesIO(encoded(gradient(800, 600), "JPEG"))
        picture = decode_for(file.getvalue(), LIMITS, at_most(100), detail=decoder._detail)
        decoder.close()
        assert picture.image.size == expected
