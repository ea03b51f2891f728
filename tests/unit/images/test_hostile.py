"""Whatever the bytes are, only our own refusals come out, and no truncated picture passes as a whole one."""

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sightline.errors import InvalidImage, PayloadTooLarge
from sightline.images import Limits, decode, probe
from tests.unit.images.pictures import FORMATS, LIMITS, difference, encoded, gradient, with_orientation

SMALL = Limits(max_bytes=100_000, max_pixels=100_000, min_side=3, max_aspect=200)

SAMPLES = {
    **{format: encoded(gradient(40, 30), format) for format in FORMATS},
    "progressive JPEG": encoded(gradient(40, 30), "JPEG", progressive=True),
    "JPEG with EXIF": with_orientation(gradient(40, 30), 6),
    "interlaced palette": encoded(gradient(40, 30).quantize(16), "PNG", optimize=True),
    "RGBA": encoded(gradient(40, 30).convert("RGBA")),
    "lossless WEBP": encoded(gradient(40, 30), "WEBP", lossless=True),
    "animated WEBP": encoded(gradient(40, 30), "WEBP", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "animated GIF": encoded(gradient(40, 30), "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "APNG": encoded(gradient(40, 30), "PNG", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "MPO": encoded(gradient(40, 30), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "LZW TIFF": encoded(gradient(40, 30), "TIFF", compression="tiff_lzw"),
    "JPEG TIFF": encoded(gradient(40, 30), "TIFF", compression="jpeg"),
    "palette BMP": encoded(gradient(40, 30).quantize(16), "BMP"),
}


def survives(data: bytes) -> Image.Image | None:
    """The picture, or None when refused properly; any other exception fails the test."""
    for look in (probe, decode):
        try:
            result = look(data, SMALL)
        except (InvalidImage, PayloadTooLarge):
            return None
    assert isinstance(result, Image.Image)
    assert result.mode == "RGB"
    assert not result.info
    return result


@pytest.mark.parametrize("name", SAMPLES)
def test_a_cut_file_is_refused_or_whole(name):
    data = SAMPLES[name]
    whole = decode(data, LIMITS)
    cuts = sorted({*range(0, min(len(data), 64)), *range(0, len(data), max(1, len(data) // 60)), len(data) - 1})
    for cut in cuts:
        result = survives(data[:cut])
        if result is not None:
            assert result.size == whole.size, f"cut at {cut} of {len(data)}"
            assert difference(result, whole) == 0, f"cut at {cut} of {len(data)}"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("fraction", [0.5, 0.75, 0.9])
def test_a_cut_file_says_so(format, fraction):
    noise = Image.effect_noise((200, 150), 80).convert("RGB")
    data = encoded(noise, format)
    with pytest.raises(InvalidImage) as caught:
        decode(data[: int(len(data) * fraction)], LIMITS)
    assert caught.value.code == "image_truncated"


def test_truncation_is_refused_although_pil_can_be_told_otherwise():
    noise = encoded(Image.effect_noise((200, 150), 80), "JPEG")
    with pytest.raises(InvalidImage) as caught:
        decode(noise[:-200], LIMITS)
    assert caught.value.__cause__ is not None
    assert "truncated" in caught.value.message
    assert "bytes not processed" not in caught.value.message


@given(st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_random_bytes(data):
    survives(data)


@given(st.sampled_from([data[:12] for data in SAMPLES.values()]), st.binary(max_size=300))
@example(SAMPLES["WEBP"][:12], b"")
@settings(max_examples=150, deadline=None)
def test_a_magic_and_random_bytes(magic, data):
    survives(magic + data)


@given(
    name=st.sampled_from(sorted(SAMPLES)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=8),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_flipped_bits(name, flips):
    data = bytearray(SAMPLES[name])
    for where, mask in flips:
        data[int(where * len(data))] ^= mask
    survives(bytes(data))


@pytest.mark.parametrize("name", SAMPLES)
def test_flipped_header_bytes(name, rng: random.Random):
    """Headers hold the lengths and offsets that parsers trust, so they get more than their share."""
    for _ in range(60):
        data = bytearray(SAMPLES[name])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(min(len(data), 200))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        survives(bytes(data))


@given(name=st.sampled_from(sorted(SAMPLES)), start=st.floats(0, 1), length=st.integers(1, 400))
@settings(max_examples=150, deadline=None)
def test_missing_pieces(name, start, length):
    data = SAMPLES[name]
    at = int(start * len(data))
    survives(data[:at] + data[at + length :])


def test_a_head_of_one_and_the_tail_of_another():
    for head in SAMPLES.values():
        for tail in SAMPLES.values():
            survives(head[: len(head) // 2] + tail[len(tail) // 2 :])
