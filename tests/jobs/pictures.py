"""Small pictures that are all different, and what the stub says of each: a pure function of their bytes."""

import hashlib
import struct
import zlib

SIDE = 4
NO_PICTURE = b"These bytes are no picture."
MARK = b"tEXtfault\x00"


def picture(number: int, fault: str = "") -> bytes:
    """A PNG of 4×4 pixels, about 110 bytes.

    fault  what the stub does with it: `422` it is refused, `flaky` its first ask is answered 500, `unenhanced` its
           caption cannot be enhanced; `text`: it is no picture
    """
    if fault == "text":
        return NO_PICTURE
    pixels = hashlib.shake_128(number.to_bytes(8, "big")).digest(SIDE * SIDE * 3)
    rows = b"".join(b"\x00" + pixels[row * SIDE * 3 : (row + 1) * SIDE * 3] for row in range(SIDE))
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    note = _chunk(b"tEXt", b"fault\x00" + fault.encode()) if fault else b""
    return b"".join([b"\x89PNG\r\n\x1a\n", header, note, _chunk(b"IDAT", zlib.compress(rows, 1)), _chunk(b"IEND", b"")])


def fault_of(data: bytes) -> str:
    """What `picture` was told."""
    at = data.find(MARK)
    if at < 0:
        return ""
    length = int.from_bytes(data[at - 4 : at], "big") - len("fault\x00")
    start = at + len(MARK)
    return data[start : start + length].decode()


def digest(data: bytes) -> str:
    """A picture's name."""
    return hashlib.sha256(data).hexdigest()[:16]


def caption_of(data: bytes, prompt: str = "") -> str:
    """What the stub says of a picture."""
    return f"The picture {digest(data)}." + (f" Asked: {prompt}" if prompt else "")


def enhanced(caption: str) -> str:
    """What it makes of a caption."""
    return f"{caption} In fine prose."


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
