"""Pictures made on the spot: honest ones of every format and mode, and hostile ones."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from sightline.images import Limits

LIMITS = Limits(max_bytes=20 * 2**20, max_pixels=40_000_000, min_side=3, max_aspect=200)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")

ORIENTATION = 0x0112


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def gradient(width: int = 64, height: int = 48) -> Image.Image:
    """Smooth, and different in every corner: red grows to the right, green downwards, blue to the upper left."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - (x + y) / 2], -1).astype(np.uint8))


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference, in levels of 255."""
    assert one.size == other.size
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float32) for image in (one, other))
    return float(np.abs(a - b).mean())


def with_orientation(image: Image.Image, orientation: int, format: str = "JPEG") -> bytes:
    """A file that a viewer shows as `image`: stored turned, with the tag that turns it back."""
    stored = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    turned = image if stored is None else image.transpose(stored)
    options: dict[str, object] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    return encoded(turned, format, exif=exif, **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    width: int, height: int, rows: bytes | None = None, *, depth: int = 8, colour: int = 2, extra: bytes = b""
) -> bytes:
    """A PNG from its raw scanlines (each with its filter byte); without them a header and one empty IDAT."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(rows if rows is not None else b"", 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def tiff(tags: dict[int, tuple[int, list[int]]], data: bytes) -> bytes:
    """A little-endian TIFF of short and long tags; a value `-1` stands for the offset of `data`."""
    ifd_at, entries, spill = 8, [], b""
    spill_at = ifd_at + 2 + 12 * len(tags) + 4
    data_at = spill_at + sum(len(v) * (2 if kind == 3 else 4) for kind, v in tags.values() if _size(kind, v) > 4)
    for tag, (kind, values) in sorted(tags.items()):
        packed = b"".join(struct.pack("<H" if kind == 3 else "<I", data_at if v == -1 else v) for v in values)
        if len(packed) > 4:
            entries.append(struct.pack("<HHII", tag, kind, len(values), spill_at + len(spill)))
            spill += packed
        else:
            entries.append(struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0"))
    return (
        b"II*\0" + struct.pack("<I", ifd_at) + struct.pack("<H", len(entries)) + b"".join(entries) + b"\0" * 4
        + spill + data
    )  # fmt: skip


def _size(kind: int, values: list[int]) -> int:
    return len(values) * (2 if kind == 3 else 4)


def animated_webp_canvas(width: int, height: int) -> bytes:
    """An animation with a huge canvas and one frame of 8 × 8."""
    still = encoded(Image.new("RGB", (8, 8), "red"), "WEBP", lossless=True)[12:]
    frame = b"\0" * 6 + struct.pack("<I", 7)[:3] * 2 + b"\x10\0\0\0" + still
    body = (
        b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0"
        + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        + b"ANIM" + struct.pack("<I", 6) + b"\xff" * 4 + b"\0\0"
        + b"ANMF" + struct.pack("<I", len(frame)) + frame
    )  # fmt: skip
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def jpeg_of_many_scans(size: tuple[int, int], scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(Image.new("RGB", size), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xc4", 0, data.rfind(b"\xff\xda")) : -2]
    return data[:-2] + last * scans + b"\xff\xd9"
