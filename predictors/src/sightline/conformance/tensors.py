"""Requests that any model can be asked: tensors made from its metadata, as JSON and in the binary extension."""

import base64
import io
import json
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

Json = dict[str, Any]
Element = bytes | int | float | bool

ITEM_FORMATS: Mapping[str, str] = {
    "BOOL": "?",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
DATATYPES = frozenset({*ITEM_FORMATS, "BYTES"})

MARKER = b"sightline-conformance-marker"
"""Stands in every image and text we send, so that an error which repeats its input can be told."""
TEXT = "A large red circle on a white background."

_IMAGE_NAME = re.compile(r"image|img|picture|photo|page|pixel", re.IGNORECASE)
_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor: elements flat, in row-major order; BYTES elements are bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    elements: tuple[Element, ...]

    @property
    def is_image(self) -> bool:
        """True for BYTES that hold encoded images."""
        return self.datatype == "BYTES" and any(
            isinstance(element, bytes) and element.startswith(_IMAGE_MAGIC) for element in self.elements
        )

    def as_text(self) -> "Tensor":
        """The same tensor with images as base64, which is what JSON can carry."""
        if self.datatype != "BYTES":
            return self
        return replace(self, elements=tuple(_text(element).encode() for element in self.elements))

    def as_json(self) -> Json:
        """As a tensor of a JSON body, its data flat."""
        return self.head() | {"data": [_json_element(element) for element in self.elements]}

    def as_nested_json(self) -> Json:
        """The same, its data in nested lists that follow the shape."""
        data: list[Any] = [_json_element(element) for element in self.elements]
        for size in reversed(self.shape[1:]):
            data = [data[at : at + size] for at in range(0, len(data), size)]
        return self.head() | {"data": data}

    def head(self) -> Json:
        """Name, shape and datatype."""
        return {"name": self.name, "shape": list(self.shape), "datatype": self.datatype}

    def blob(self) -> bytes:
        """As raw bytes of the binary extension (and of gRPC's raw contents)."""
        if self.datatype == "BYTES":
            parts = [element if isinstance(element, bytes) else str(element).encode() for element in self.elements]
            return b"".join(struct.pack("<I", len(part)) + part for part in parts)
        return struct.pack(f"<{len(self.elements)}{ITEM_FORMATS[self.datatype]}", *self.elements)


@dataclass(frozen=True, slots=True)
class Request:
    """A request that the model accepts (or should)."""

    inputs: tuple[Tensor, ...]
    parameters: Mapping[str, Any]

    @property
    def images(self) -> tuple[Tensor, ...]:
        """The inputs that hold encoded images."""
        return tuple(tensor for tensor in self.inputs if tensor.is_image)

    def with_image(self, data: bytes) -> "Request":
        """The same request about another image."""
        inputs = (replace(tensor, elements=(data,) * len(tensor.elements)) if tensor.is_image else tensor
                  for tensor in self.inputs)  # fmt: skip
        return replace(self, inputs=tuple(inputs))

    def as_json(self, **more: Any) -> Json:  # noqa: ANN401 - any JSON
        """As a JSON body; `more` are further members, such as `id` and `outputs`."""
        body: Json = {"inputs": [tensor.as_json() for tensor in self.inputs]}
        parameters = dict(self.parameters) | more.pop("parameters", {})
        if parameters:
            body["parameters"] = parameters
        return body | more

    def as_binary(self, **more: Any) -> tuple[bytes, int]:  # noqa: ANN401 - any JSON
        """As a body of the binary extension, every input in binary form, and the length of its JSON part."""
        body = self.as_json(**more)
        blobs = [tensor.blob() for tensor in self.inputs]
        body["inputs"] = [
            tensor.head() | {"parameters": {"binary_data_size": len(blob)}}
            for tensor, blob in zip(self.inputs, blobs, strict=True)
        ]
        head = json.dumps(body).encode()
        return b"".join([head, *blobs]), len(head)

    def as_text(self) -> "Request":
        """The same request with its images as base64."""
        return replace(self, inputs=tuple(tensor.as_text() for tensor in self.inputs))


def candidates(metadata: Mapping[str, Any]) -> Iterator[Request]:
    """Requests to try, from a model's metadata: all inputs, then each alone; it does not say which are optional."""
    tensors = tuple(tensor_for(spec) for spec in metadata["inputs"])
    yield Request(tensors, {})
    if len(tensors) > 1:
        yield from (Request((tensor,), {}) for tensor in tensors)


def tensor_for(spec: Mapping[str, Any]) -> Tensor:
    """A legal value for one line of a model's metadata: an image, a sentence, or zeros; a free dimension is 1."""
    name, datatype = str(spec["name"]), str(spec["datatype"])
    shape = tuple(1 if size < 0 else int(size) for size in spec["shape"])
    zero: Element = False if datatype == "BOOL" else 0.0 if datatype.startswith("FP") else 0
    if datatype == "BYTES":
        zero = picture() if _IMAGE_NAME.search(name) else TEXT.encode()
    return Tensor(name, datatype, shape, (zero,) * math.prod(shape))


def request_from(body: Mapping[str, Any]) -> Request:
    """A request of the user's own, from a V2 JSON body; an element that is base64 of an image becomes the image."""
    inputs: list[Tensor] = []
    for item in body["inputs"]:
        elements: Iterator[Element] = (
            _bytes(value) if item["datatype"] == "BYTES" else value for value in _flat(item["data"])
        )
        inputs.append(Tensor(item["name"], item["datatype"], tuple(item["shape"]), tuple(elements)))
    return Request(tuple(inputs), dict(body.get("parameters") or {}))


def picture(kind: str = "PNG", *, side: int = 96, is_noise: bool = False) -> bytes:
    """A red circle on white, with MARKER inside; as noise, a PNG that does not compress."""
    from PIL import Image, ImageDraw, PngImagePlugin

    if is_noise:
        import random

        image = Image.frombytes("RGB", (side, side), random.Random(side).randbytes(side * side * 3))  # noqa: S311
    else:
        image = Image.new("RGB", (side, side), "white")
        ImageDraw.Draw(image).ellipse((side // 5, side // 5, side * 4 // 5, side * 4 // 5), fill="red")
    buffer = io.BytesIO()
    if kind == "JPEG":
        image.save(buffer, "JPEG", comment=MARKER)
    else:
        notes = PngImagePlugin.PngInfo()
        notes.add_text("Comment", MARKER.decode())
        image.save(buffer, "PNG", pnginfo=notes, compress_level=0 if is_noise else 6)
    return buffer.getvalue()


def elements_of(blob: bytes, datatype: str) -> tuple[Element, ...]:
    """The elements of a raw tensor. Raises ValueError when the bytes do not come out even."""
    if datatype != "BYTES":
        size = struct.calcsize("<" + ITEM_FORMATS[datatype])
        if len(blob) % size:
            raise ValueError(f"{len(blob)} bytes are no whole number of {datatype} elements")
        return struct.unpack(f"<{len(blob) // size}{ITEM_FORMATS[datatype]}", blob)
    elements: list[Element] = []
    at = 0
    while at < len(blob):
        if at + 4 > len(blob):
            raise ValueError("a BYTES tensor ends inside a length")
        (length,) = struct.unpack_from("<I", blob, at)
        at += 4 + length
        if at > len(blob):
            raise ValueError("a BYTES tensor ends inside an element")
        elements.append(blob[at - length : at])
    return tuple(elements)


def _flat(value: object) -> Iterator[Any]:
    if isinstance(value, list):
        for item in cast("Sequence[object]", value):
            yield from _flat(item)
    else:
        yield value


def _bytes(value: object) -> bytes:
    text = str(value)
    payload = text.rpartition(",")[2] if text.startswith("data:") else text
    try:
        decoded = base64.b64decode(payload, validate=True)
    except ValueError:
        return text.encode()
    return decoded if decoded.startswith(_IMAGE_MAGIC) else text.encode()


def _json_element(element: Element) -> object:
    return _text(element) if isinstance(element, bytes) else element


def _text(element: Element) -> str:
    if not isinstance(element, bytes):
        return str(element)
    if element.startswith(_IMAGE_MAGIC):
        return base64.b64encode(element).decode()
    return element.decode("utf-8", "replace")


def as_array(tensor: Tensor) -> Any:  # noqa: ANN401 - an array of any dtype
    """As the numpy array that client libraries take; BYTES become objects."""
    import numpy as np

    if tensor.datatype == "BYTES":
        array = np.empty(len(tensor.elements), dtype=np.object_)
        array[:] = tensor.elements
    else:
        array = np.array(tensor.elements, dtype=np.dtype(f"<{ITEM_FORMATS[tensor.datatype]}"))
    return array.reshape(tensor.shape)
