"""What strangers send: pictures that are none, bodies that lie, headers that do not fit."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from PIL import Image

from tests.unit.images.pictures import (
    animated_webp_canvas,
    chunk,
    encoded,
    gradient,
    jpeg_of_many_scans,
    png,
    with_orientation,
)

REFUSED_IMAGES = (
    "nothing", "one byte", "text", "text called PNG", "html", "svg", "pdf", "postscript", "zip", "PNG signature only",
    "cut JPEG", "cut PNG", "cut WEBP", "cut GIF", "PNG bomb", "wide PNG bomb", "GIF bomb", "BMP bomb", "WEBP bomb",
    "1 x 1", "2 x 2", "201:1", "ICO", "noise behind a JPEG header",
)  # fmt: skip
"""Names of `images()` that no route may take."""


@cache
def images() -> Mapping[str, bytes]:
    """Pictures by name: hostile ones, and odd but honest ones."""
    picture = gradient(60, 40)
    jpeg, whole = encoded(picture, "JPEG"), encoded(picture)
    frames = {"save_all": True, "append_images": [Image.new("RGB", (60, 40), "red")] * 3, "duration": 50}
    return {
        "nothing": b"",
        "one byte": b"\x89",
        "text": b"I am a picture, honestly.",
        "text called PNG": b"\x89PNG\r\n\x1a\nI am a picture, honestly.",
        "html": b"<html><img src=x onerror=alert(1)></html>",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage",
        "zip": b"PK\x03\x04" + b"\0" * 100,
        "PNG signature only": b"\x89PNG\r\n\x1a\n",
        "cut JPEG": jpeg[: len(jpeg) // 2],
        "cut PNG": whole[: len(whole) // 2],
        "cut WEBP": encoded(picture, "WEBP")[:60],
        "cut GIF": encoded(picture, "GIF")[:200],
        "PNG bomb": png(60_000, 60_000, b"\0" * 1_000_000),
        "wide PNG bomb": png(2_000_000_000, 3),
        "GIF bomb": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;",
        "BMP bomb": _bmp_of(60_000, 60_000),
        "WEBP bomb": animated_webp_canvas(16_000, 16_000),
        "1 x 1": encoded(gradient(1, 1)),
        "2 x 2": encoded(gradient(2, 2)),
        "201:1": encoded(Image.new("RGB", (603, 3))),
        "ICO": encoded(picture, "ICO"),
        "noise behind a JPEG header": jpeg[:200] + bytes(range(256)) * 40,
        # honest, if unusual: to be taken, or refused as an image
        "wrong checksum": whole[:-14] + bytes([whole[-14] ^ 1]) + whole[-13:],
        "200:1": encoded(Image.new("RGB", (600, 3), "blue")),
        "CMYK": encoded(picture.convert("CMYK"), "JPEG"),
        "16 bit": encoded(Image.new("I;16", (60, 40), 40_000)),
        "1 bit": encoded(picture.convert("1")),
        "grey with alpha": encoded(picture.convert("LA")),
        "palette": encoded(picture.quantize(8), "GIF"),
        "animated GIF": encoded(picture, "GIF", **frames),
        "animated WEBP": encoded(picture, "WEBP", **frames),
        "animated PNG": encoded(picture, "PNG", **frames),
        "turned by EXIF": with_orientation(picture, 6),
        "text bomb": png(60, 40, (b"\0" + b"\x7f" * 180) * 40, extra=_text_bomb()),
        "many scans": jpeg_of_many_scans((60, 40), 2_000),
        "something behind the end": jpeg + b"<?php system('id'); ?>" * 1000,
    }


def _bmp_of(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    gradient(8, 8).save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[18:22], data[22:26] = width.to_bytes(4, "little"), height.to_bytes(4, "little")
    return bytes(data)


def _text_bomb() -> bytes:
    """A chunk of text of 64 MB in 64 kB."""
    return chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 64_000_000, 9))


# --- JSON ------------------------------------------------------------------------------------------------------------

BODIES: Mapping[str, bytes] = {
    "nothing": b"",
    "open": b'{"',
    "a list": b"[]",
    "null": b"null",
    "a number": b"3",
    "text": b'"text"',
    "an empty object": b"{}",
    "unknown fields": b'{"unknown": 1, "imge_url": "x"}',
    "no UTF-8": b'{"prompt": "\xff\xfe"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf{}",
    "NaN": b'{"temperature": NaN, "max_tokens": Infinity}',
    "half a surrogate": b'{"prompt": "\\ud800", "text": "\\udfff"}',
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "closed deep lists": b'{"input": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "many digits": b'{"max_tokens": ' + b"9" * 10_000 + b"}",
    "many fields": json.dumps({f"field{index}": index for index in range(20_000)}).encode(),
    "gzip without saying so": gzip.compress(b"{}"),
}

VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, 2**63, -(2**63), "", " ", "\0", "x" * 100_000, "\U0001f4a3" * 3, "true", "NaN",
    [], [[]], {}, {"a": {"b": {}}}, [None], [1, 2, 3], ["x"] * 2_000, [{}] * 33,
    "../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:22/", "https://169.254.169.254/latest/",
    "https://[::1]/a.png", "gopher://x/", "s3://", "s3://b", "s3://no-such-bucket-here/k", "data:",
    "data:image/png;base64,", "data:image/png;base64,!!!!", "data:text/html,<b>", "iVBORw0KGgo=", "%2e%2e%2f",
)  # fmt: skip
"""What may stand where something else is meant."""


EVERY = 4
"""A field meets every fourth value, its neighbour the ones between: all fields of a route together meet all."""


def replaced(body: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A good body with one value, at any depth, that is none; with one name missing, and one misspelt."""
    for number, path in enumerate(_paths(body)):
        for value in VALUES[number % EVERY :: EVERY]:
            yield f"{'.'.join(map(str, path))} = {str(value)[:30]!r}", _with(body, path, value)
    for name in body:
        rest = {key: value for key, value in body.items() if key != name}
        yield f"without {name}", rest
        yield f"{name} misspelt", rest | {f"{name}s": body[name]}


def _paths(node: Any, so_far: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node[:1]) if isinstance(node, list) else ()
    for key, value in items:
        yield (*so_far, key)
        yield from _paths(value, (*so_far, key))


def _with(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(node) if isinstance(node, Mapping) else list(node)
    copy[path[0]] = _with(node[path[0]], path[1:], value)
    return copy


# --- headers ---------------------------------------------------------------------------------------------------------

HEADERS: Mapping[str, Mapping[str, str]] = {
    "XML": {"content-type": "application/xml"},
    "a charset that is none": {"content-type": "application/json; charset=no-such"},
    "UTF-16": {"content-type": "application/json; charset=utf-16"},
    "a form without boundary": {"content-type": "multipart/form-data"},
    "a form with an endless boundary": {"content-type": "multipart/form-data; boundary=" + "x" * 2_000},
    "a form that is none": {"content-type": "multipart/form-data; boundary=x"},
    "an image that is none": {"content-type": "image/png"},
    "video": {"content-type": "video/mp4"},
    "no kind": {"content-type": ""},
    "nonsense kind": {"content-type": ";;;=,"},
    "gzip that is none": {"content-encoding": "gzip"},
    "brotli": {"content-encoding": "br"},
    "two encodings": {"content-encoding": "gzip, gzip"},
    "no time": {"x-request-timeout-ms": "0"},
    "negative time": {"x-request-timeout-ms": "-5"},
    "time that is none": {"x-request-timeout-ms": "nan"},
    "endless time": {"x-request-timeout-ms": "1e999"},
    "a header length": {"inference-header-content-length": "5"},
    "a negative header length": {"inference-header-content-length": "-5"},
    "an endless header length": {"inference-header-content-length": "9" * 30},
    "a wrong trace": {"traceparent": "00-zz-zz-01", "tracestate": "x" * 5_000},
    "wishes": {"prefer": "respond-async, wait=99999999999999999999", "accept": "x/y", "accept-language": "\xe9"},
}


@cache
def gzip_bomb() -> bytes:
    """110 MB of zeros, ten more than a request may have, in 110 kB."""
    return gzip.compress(b"\0" * 110_000_000, 9)
