"""Untrusted bytes → one upright RGB image, within limits.

    bytes ──probe──▶ Header             reads the header only
    bytes ──decode─▶ PIL.Image (RGB)    checks the header, decodes, flattens, shrinks, turns, forgets the metadata
    bytes ──decode_for▶ Picture         the same for a model: a large JPEG at the scale that the model wants

Formats  JPEG (and MPO's first picture), PNG, WEBP, GIF, BMP, TIFF; of several frames the first
Pixels   `W × H` of the picture as a person sees it, that is, after the EXIF orientation
Colour   8 bits a channel, taken as sRGB: an ICC profile is dropped, not applied
Memory   at the peak 8 bytes a pixel (RGB), 15 with alpha: 0.6 GB for an image of 40 MP, times the decoding threads

What is refused, all as InvalidImage (400) but for the two of PayloadTooLarge (413):

    image_too_many_bytes 413, image_too_many_pixels 413, image_too_small, image_aspect_too_large, image_too_complex,
    image_empty, image_format_unsupported, image_truncated, image_undecodable

The text of a library never reaches the client; it is chained as the cause.
"""

import math
import re
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Literal, TypeVar, cast

from PIL import Image, JpegImagePlugin, TiffImagePlugin

from sightline.errors import InvalidImage, PayloadTooLarge, SightlineError
from sightline.pool import DECODED, Pool, stage
from sightline.settings import ImageSettings

T = TypeVar("T")

Size = tuple[int, int]
"""Width and height in pixels."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""The only parsers that ever see a client's bytes. Why a list: CVE-2026-40192, a bomb in a format nobody asked for."""

MAX_JPEG_SCANS = 64
"""Each further scan of a progressive JPEG costs a pass over the whole picture and as little as 83 bytes: a file of
20 MiB could hold a quarter of a million, two hours of CPU at 40 MP. Encoders write about 10.
Source: "Two Issues with the JPEG Standard", libjpeg-turbo; cost measured with Pillow 13 on one core (33 ms a scan).
"""

MAX_JPEG_SEGMENTS = 20_000

_MAGICS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_FOREIGN = re.compile(
    rb"....ftyp"  # HEIC, AVIF
    rb"|\0\0\0\x0c(?:jP  |JXL )|\xffO\xffQ|\xff\x0a"  # JPEG 2000, JPEG XL
    rb"|%PDF|%!PS|8BPS|\0\0\x01\0|P[1-7]\s|qoif|DDS |\x76\x2f\x31\x01|SIMPLE"
    rb"|\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?<svg",
    re.DOTALL,
)
"""How files begin that are pictures, but of a format that we do not take: the client gets the better message."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 2.32, tag 0x0112 → what makes the picture upright."""

_ORIENTATION_TAG = 0x0112
_TIFF_COMPRESSION, _TIFF_JPEG = 259, (6, 7)
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323
_TIFF_OFFSETS, _TIFF_COUNTS = (273, 324), (279, 325)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one image may be.

    max_bytes   of the encoded file
    max_pixels  of the decoded picture
    min_side    pixels of the shorter side
    max_aspect  longer side over shorter side
    """

    max_bytes: int
    max_pixels: int
    min_side: int
    max_aspect: float

    @classmethod
    def from_settings(cls, settings: ImageSettings) -> "Limits":
        """The limits of a server's configuration."""
        return cls(settings.max_image_bytes, settings.max_pixels, settings.min_side, settings.max_aspect)


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of an image say: one of FORMATS, and pixels after the EXIF orientation."""

    format: str
    width: int
    height: int


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded image, upright and RGB. `size` is what it stands for: of a JPEG there may be fewer pixels."""

    image: Image.Image
    size: Size


def is_image(data: bytes) -> bool:
    """Whether `data` begins like a file of one of FORMATS. No base64 text and no URL does."""
    return data.startswith(_MAGICS) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP")


def media_type(data: bytes) -> str:
    """`image/png` and so on, by the first bytes; application/octet-stream for what is no image that we take."""
    if not is_image(data):
        return "application/octet-stream"
    return next((kind for magic, kind in _MEDIA_TYPES.items() if data.startswith(magic)), "image/tiff")


_MEDIA_TYPES = {
    b"\xff\xd8\xff": "image/jpeg",
    b"\x89PNG": "image/png",
    b"GIF8": "image/gif",
    b"BM": "image/bmp",
    b"RIFF": "image/webp",
}


def check_bytes(count: int, max_bytes: int) -> None:
    """Raise PayloadTooLarge (413) when an encoded image has more bytes than are taken."""
    if count > max_bytes:
        raise PayloadTooLarge(f"The image has more than {max_bytes} bytes.", code="image_too_many_bytes")


def probe(data: bytes, limits: Limits) -> Header:
    """Read the header of an image and hold it against the limits, without decoding a pixel.

    A PNG that keeps its EXIF behind the pixels (rare, legal) is reported as it is stored, not as it is seen.

    Raises InvalidImage (400), PayloadTooLarge (413); see the module for the codes. A retry does not help.
    """
    with _refusing(data), _open(data, limits) as image:
        return _checked(image, data, limits)


def decode(data: bytes, limits: Limits, *, max_width: int | None = None, max_height: int | None = None) -> Image.Image:
    """Decode an image and make it what every model wants: upright, opaque, RGB, no larger than asked, no metadata.

    Transparency is flattened over white. 16-bit values are scaled, not clipped; integers and floats of TIFF are scaled
    from their natural range (0–1, 0–255, 0–65535) or, outside these, from their minimum and maximum. A picture that is
    wider than `max_width` or higher than `max_height` shrinks to fit, keeping its aspect, by LANCZOS (contract A7);
    a JPEG is first decoded at 1/2, 1/4 or 1/8 by its own transform, as long as LANCZOS still gets twice the target
    (differs from the full decode by less than 0.5 of 255 levels on average on three photographs, test_decode.py).

    data        encoded image, of one of FORMATS
    max_width   pixels after orientation, or None for no bound
    max_height  pixels after orientation, or None for no bound
    returns     a new image of mode RGB with an empty `info`; each side at least 1; deterministic

    Blocks: for 40 MP about 1 s, for a JPEG and `max_width=512` 0.1 s (one core of two, Pillow 13, 2026-11).
    Raises InvalidImage (400), PayloadTooLarge (413). A retry does not help.
    """
    return _decoded(data, limits, (max_width, max_height), None).image


def decode_for(
    data: bytes,
    limits: Limits,
    wanted: Callable[[Size], Size],
    *,
    detail: float = 1.0,
    max_width: int | None = None,
    max_height: int | None = None,
) -> Picture:
    """Decode an image for a model that will resize it anyway; see `decode` for all that is not said here.

    wanted  the size of a picture → what the model resizes it to
    detail  a JPEG is decoded at 1/2, 1/4 or 1/8 by its own transform where at least this many times what is wanted
            are left of each side; 0: only whole. At 1 what the model gets differs from the whole decode by up to 1.9
            of 255 levels on average (docs/preprocessing.md)

    Raises what `decode` and `wanted` raise.
    """

    def least(size: Size) -> Size | None:
        width, height = wanted(size)
        return (math.ceil(detail * width), math.ceil(detail * height)) if detail else None

    return _decoded(data, limits, (max_width, max_height), least)


def _decoded(
    data: bytes,
    limits: Limits,
    bounds: tuple[int | None, int | None],
    least: Callable[[Size], Size | None] | None,
) -> Picture:
    """least: of the upright size that the picture stands for, the pixels that it must keep; None: by LANCZOS to it."""
    with _refusing(data), _open(data, limits) as image:
        header = _checked(image, data, limits)
        # A TIFF is turned by PIL while it loads, and its size is announced as turned.
        orientation = _orientation(image)
        is_turned = orientation >= 5
        target = _fitted(image.size, *_turned(bounds, is_turned))
        # The part of what is decoded that is picture: at 1/8, 1411 pixels become 177, of which 0.6 are padding.
        box = (0.0, 0.0, float(image.width), float(image.height))
        width = image.width
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            kept = (2 * target[0], 2 * target[1]) if target != image.size else None
            if least is not None:
                upright = least(_turned(target, is_turned))
                kept = None if upright is None else _turned(upright, is_turned)
            drafted = image.draft(None, kept) if kept else None
            box = drafted[1] if drafted else box
        image.load()
        DECODED.labels(header.format, round(width / image.width)).inc()
        picture = _flattened(image)
        is_within = picture.width <= target[0] and picture.height <= target[1]
        if picture.size != target and not (least is not None and is_within):
            picture = picture.resize(target, Image.Resampling.LANCZOS, box)
        if orientation in _UPRIGHT:
            picture = picture.transpose(_UPRIGHT[orientation])
        # `convert` copies also when there is nothing to convert; what we hand out never holds on to the file.
        if picture is image or picture.mode != "RGB":
            picture = picture.convert("RGB")
        picture.info = {}
        return Picture(picture, _turned(target, is_turned))


def _turned(pair: tuple[T, T], is_turned: bool) -> tuple[T, T]:
    return (pair[1], pair[0]) if is_turned else pair


def scaled(picture: Image.Image, pixels: float) -> Image.Image:
    """The same picture with about so many pixels, keeping its aspect, by LANCZOS. Blocks."""
    scale = math.sqrt(pixels / (picture.width * picture.height))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def encode(picture: Image.Image, kind: Literal["JPEG", "PNG"]) -> bytes:
    """A decoded picture as a file without metadata. Blocks."""
    file = BytesIO()
    picture.save(file, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return file.getvalue()


class Decoder:
    """Decodes images beside the event loop. The pool bounds the memory: `threads` decoded images at a time.

    detail  of `decode_for`
    """

    def __init__(self, limits: Limits, *, threads: int, detail: float = 1.0) -> None:
        self._limits = limits
        self._detail = detail
        self._pool = Pool(threads)

    @classmethod
    def from_settings(cls, settings: ImageSettings) -> "Decoder":
        """As a server is configured."""
        limits = Limits.from_settings(settings)
        return cls(limits, threads=settings.decode_threads, detail=settings.jpeg_detail)

    async def decode(self, data: bytes, *, max_width: int | None = None, max_height: int | None = None) -> Image.Image:
        """Wait for a thread, then `decode` in it. An image whose caller left before its turn is not decoded.

        Raises what `decode` raises, and Unavailable (503) after `close`.
        """

        def work() -> Image.Image:
            with stage("decode"):
                return decode(data, self._limits, max_width=max_width, max_height=max_height)

        return await self._pool.run(work)

    async def prepare(
        self,
        data: bytes,
        wanted: Callable[[Size], Size] | None,
        make: Callable[[Picture], T],
        *,
        max_width: int | None = None,
        max_height: int | None = None,
    ) -> T:
        """Wait for a thread, then in one go decode the image for a model and make of it what the model takes.

        wanted  see `decode_for`; None: the whole picture is wanted
        make    the model's part; of the picture itself nothing need be left when it returns

        Raises what `decode_for` and `make` raise, and Unavailable (503) after `close`.
        """

        def work() -> T:
            detail = self._detail if wanted is not None else 0.0
            with stage("decode"):
                picture = decode_for(
                    data,
                    self._limits,
                    wanted or _whole,
                    detail=detail,
                    max_width=max_width,
                    max_height=max_height,
                )
            with stage("model"):
                return make(picture)

        return await self._pool.run(work)

    def close(self) -> None:
        """Take no more images; those in the pool are finished. Does not block, a second call changes nothing."""
        self._pool.close()


def _whole(size: Size) -> Size:
    return size


@contextmanager
def _refusing(data: bytes) -> Generator[None]:
    """Whatever PIL's parsers throw at a hostile file becomes one of our refusals."""
    _hush()
    try:
        yield
    except SightlineError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PayloadTooLarge("The image has too many pixels.", code="image_too_many_pixels") from error
    except Exception as error:  # by observation and by reading: a dozen types, not a closed list
        raise _refusal(data, error) from error


def _refusal(data: bytes, error: Exception) -> InvalidImage:
    if isinstance(error, EOFError) or "truncated" in str(error).lower() or _is_short_webp(data):
        return InvalidImage("The image is truncated.", code="image_truncated")
    if isinstance(error, Image.UnidentifiedImageError):
        if not is_image(data) and _FOREIGN.match(data[:4096]):
            return InvalidImage(
                "Images are taken as JPEG, PNG, WEBP, GIF, BMP or TIFF.", code="image_format_unsupported"
            )
        return InvalidImage("These bytes are no image.", code="image_undecodable")
    return InvalidImage("The image is damaged.", code="image_undecodable")


def _is_short_webp(data: bytes) -> bool:
    is_webp = data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    return is_webp and int.from_bytes(data[4:8], "little") + 8 > len(data)


_HUSHED = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def _hush() -> None:
    """Keep PIL's warnings about odd files out of the log.

    Not `warnings.catch_warnings`, which swaps the filters of the whole process and is not safe in threads. Looked up
    each time, as pytest puts back the filters before every test.
    """
    if _HUSHED not in warnings.filters:
        warnings.filterwarnings("ignore", module=_HUSHED[3].pattern)


def _open(data: bytes, limits: Limits) -> Image.Image:
    check_bytes(len(data), limits.max_bytes)
    if not data:
        raise InvalidImage("The image is empty.", code="image_empty")
    return Image.open(BytesIO(data), formats=FORMATS)


def _checked(image: Image.Image, data: bytes, limits: Limits) -> Header:
    width, height = image.size
    if width * height > limits.max_pixels:
        raise PayloadTooLarge(
            f"The image has {width} × {height} pixels; at most {limits.max_pixels} are taken.",
            code="image_too_many_pixels",
        )
    shorter, longer = sorted((width, height))
    if shorter < max(1, limits.min_side):
        raise InvalidImage(
            f"The image has {width} × {height} pixels; each side needs at least {limits.min_side}.",
            code="image_too_small",
        )
    if longer > limits.max_aspect * shorter:
        raise InvalidImage(
            f"The image has {width} × {height} pixels; one side may be at most {limits.max_aspect:g} times the other.",
            code="image_aspect_too_large",
        )
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        _check_scans(data)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image, data, limits)
    # Asking a PNG for an orientation that it has not shown yet would decode it.
    if (image.format != "PNG" or "exif" in image.info) and _orientation(image) >= 5:
        width, height = height, width
    return Header("JPEG" if image.format == "MPO" else str(image.format), width, height)


_JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]")
"""A marker that is followed by a length, or EOI. Stuffed zeros, fill bytes and restarts are none."""


def _check_scans(data: bytes, start: int = 0, end: int | None = None) -> None:
    """Raise InvalidImage when the JPEG at `data[start:end]` has more scans than any encoder writes."""
    end = len(data) if end is None else end
    at, scans = start + 2, 0
    for _ in range(MAX_JPEG_SEGMENTS):
        marker = _JPEG_MARKER.search(data, at, end)
        if marker is None or marker[0] == b"\xff\xd9":
            return
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_JPEG_SCANS:
            break
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    raise InvalidImage("The JPEG has too many scans or segments.", code="image_too_complex")


def _check_tiff(image: TiffImagePlugin.TiffImageFile, data: bytes, limits: Limits) -> None:
    """Two bombs that the size does not show: a tile far larger than the picture, and JPEG strips of many scans."""
    tile = [max(_numbers(image, tag), default=0) for tag in (_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH)]
    if math.prod(tile) > limits.max_pixels:
        raise PayloadTooLarge("The image has too many pixels in a tile.", code="image_too_many_pixels")
    if set(_numbers(image, _TIFF_COMPRESSION)).isdisjoint(_TIFF_JPEG):
        return
    offsets, counts = ([n for tag in tags for n in _numbers(image, tag)] for tags in (_TIFF_OFFSETS, _TIFF_COUNTS))
    pieces = set(zip(offsets, counts, strict=False))
    if len(pieces) > MAX_JPEG_SEGMENTS or sum(count for _, count in pieces) > 2 * len(data):
        raise InvalidImage("The strips of the TIFF overlap.", code="image_too_complex")
    for offset, count in pieces:
        _check_scans(data, offset, offset + count)


def _numbers(image: TiffImagePlugin.TiffImageFile, tag: int) -> tuple[int, ...]:
    value = cast("object", image.tag_v2.get(tag))
    values = cast("tuple[object, ...]", value) if isinstance(value, tuple) else (value,)
    return tuple(number for number in values if isinstance(number, int))


def _orientation(image: Image.Image) -> int:
    """1..8, by EXIF or XMP. Metadata that cannot be read costs the picture its turn, not its answer."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # hostile EXIF raises as many types as hostile pixels
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _fitted(size: tuple[int, int], max_width: int | None, max_height: int | None) -> tuple[int, int]:
    """The largest size of the same aspect within the bounds, never larger than `size`, at least 1 × 1."""
    width, height = size
    fitted = size
    if max_width is not None and fitted[0] > max_width:
        fitted = (max_width, max(1, round(height * max_width / width)))
    if max_height is not None and fitted[1] > max_height:
        fitted = (max(1, round(width * max_height / height)), max_height)
    return fitted


def _flattened(image: Image.Image) -> Image.Image:
    """The same picture, opaque, as L or RGB."""
    if image.mode.startswith("I;16"):
        return _from_16_bits(image.convert("I"), image.info.get("transparency"))
    if image.mode in ("I", "F"):
        return _from_numbers(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "LAB":
        raise InvalidImage("Images in the LAB colour space are not taken.", code="image_format_unsupported")
    return image.convert("RGB")


_FROM_16_BITS = [round(value / 257) for value in range(65_536)]


def _from_16_bits(image: Image.Image, transparent: object = None) -> Image.Image:
    grey = image.point(_FROM_16_BITS, "L")
    if isinstance(transparent, int) and 0 <= transparent <= 65_535:
        keyed = [0] * 65_536
        keyed[transparent] = 255
        grey.paste(255, mask=image.point(keyed, "L"))
    return grey


def _from_numbers(image: Image.Image) -> Image.Image:
    """Integers of 32 bits and floats, from the range that they seem to have."""
    low, high = cast("tuple[float, float]", image.getextrema())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InvalidImage("The image holds values that are no numbers.", code="image_undecodable")
    if image.mode == "I" and low >= 0 and 255 < high <= 65_535:
        return _from_16_bits(image)
    if low >= 0 and high <= 255:
        scale, offset = (255.0, 0.0) if image.mode == "F" and high <= 1 else (1.0, 0.0)
    else:
        scale = 255 / (high - low) if high > low else 0.0
        offset = -low * scale
    return image.convert("F").point(lambda value: value * scale + (offset + 0.5)).convert("L")
