"""KServe V2 (Open Inference Protocol) bodies, both ways: plain JSON and the binary tensor extension.

    bytes ──parse_request──▶ InferRequest ──▶ … ──▶ InferResponse ──render_response──▶ bytes
    (the gateway's client goes the other way: render_request, parse_response)

A body with the binary extension is a JSON header of `Inference-Header-Content-Length` bytes, followed by the raw
tensors in order; a BYTES element is a 4-byte little-endian length and its bytes. In JSON a BYTES element is a string
(taken as UTF-8), a flat or nested list. Source: open-inference-protocol `inference_rest.md` and Triton's
`protocol/extension_binary_data.md`. Faults raise BadRequest (400) and never repeat the offending input.
"""

import itertools
import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from sightline.errors import BadRequest, InternalError

HEADER_LENGTH = "inference-header-content-length"

Scalar = bool | int | float | str
Data = tuple[bytes, ...] | NDArray[Any]

NUMPY_TYPES: Mapping[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
}

_JSON_TYPES: Mapping[str, frozenset[type]] = {
    "b": frozenset({bool}),
    "u": frozenset({int}),
    "i": frozenset({int}),
    "f": frozenset({int, float}),
}
"""What JSON may hold for a numpy kind: a float would be cut to an integer, and true is not 1."""

MAX_DIMENSIONS = 32
_MAX_LENGTH_DIGITS = 18
_PLAIN_NAME = re.compile(r"[\w./:-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One line of a model's metadata. A dimension of -1 is free."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named tensor: BYTES as a tuple of bytes in row-major order, every other type as an array of `shape`."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Data = field(repr=False)

    @classmethod
    def of_texts(cls, name: str, texts: Sequence[str]) -> "Tensor":
        return cls.of_bytes(name, [text.encode() for text in texts])

    @classmethod
    def of_bytes(cls, name: str, elements: Sequence[bytes]) -> "Tensor":
        return cls(name, "BYTES", (len(elements),), tuple(elements))

    @classmethod
    def of_array(cls, name: str, datatype: str, array: NDArray[Any]) -> "Tensor":
        return cls(name, datatype, array.shape, array.astype(NUMPY_TYPES[datatype]))

    def elements(self) -> tuple[bytes, ...]:
        """The elements of a BYTES tensor. Raises BadRequest for another datatype."""
        if not isinstance(self.data, tuple):
            raise BadRequest(f"Input{_shown(self.name)} must have datatype BYTES.", code="invalid_tensor")
        return self.data

    def texts(self) -> tuple[str, ...]:
        """The elements of a BYTES tensor as UTF-8 text. Raises BadRequest where they are not."""
        try:
            return tuple(element.decode() for element in self.elements())
        except UnicodeDecodeError as error:
            raise BadRequest(f"Input{_shown(self.name)} must hold UTF-8 text.", code="invalid_tensor") from error


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A parsed V2 request.

    outputs            names that the client asked for, empty for all
    binary_outputs     names that it wants in binary form
    is_binary_default  True when it wants every output in binary form unless said otherwise
    """

    inputs: tuple[Tensor, ...]
    parameters: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    id: str | None = None
    outputs: tuple[str, ...] = ()
    binary_outputs: frozenset[str] = frozenset()
    json_outputs: frozenset[str] = frozenset()
    is_binary_default: bool = False

    def input(self, name: str) -> Tensor | None:
        """The input of that name, or None."""
        return next((tensor for tensor in self.inputs if tensor.name == name), None)

    def wants_binary(self, name: str) -> bool:
        """Whether the client wants that output in binary form."""
        if name in self.json_outputs:
            return False
        return name in self.binary_outputs or self.is_binary_default


@dataclass(frozen=True, slots=True)
class InferResponse:
    """A V2 response before rendering."""

    model_name: str
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar])
    model_version: str | None = None
    id: str | None = None

    def output(self, name: str) -> Tensor | None:
        """The output of that name, or None."""
        return next((tensor for tensor in self.outputs if tensor.name == name), None)


def parse_request(body: bytes, header_length: str | None = None) -> InferRequest:
    """Parse a request body; `header_length` is the value of the binary extension's header, if any."""
    head, blobs = _split(body, header_length)
    wishes = head.get("outputs")
    outputs = [_mapping(item, "outputs[]") for item in _list([] if wishes is None else wishes, "outputs")]
    parameters = _parameters(head.get("parameters"), "parameters")
    default = _flag(parameters.pop("binary_data_output", False))
    binary: dict[str, bool] = {}
    names: list[str] = []
    for output in outputs:
        name = output.get("name")
        if not isinstance(name, str) or not name:
            raise BadRequest("Every requested output needs a name.", code="invalid_tensor")
        if name in names:
            raise BadRequest("An output is requested twice.", code="invalid_tensor")
        names.append(name)
        wanted = _parameters(output.get("parameters"), "outputs[].parameters").get("binary_data")
        if wanted is not None:
            binary[name] = _flag(wanted)
    inputs = _tensors(_list(head.get("inputs"), "inputs"), blobs)
    if not inputs:
        raise BadRequest("'inputs' must hold at least one tensor.", code="invalid_request")
    return InferRequest(
        inputs=inputs,
        parameters=parameters,
        id=_text(head, "id"),
        outputs=tuple(names),
        binary_outputs=frozenset(name for name, wanted in binary.items() if wanted),
        json_outputs=frozenset(name for name, wanted in binary.items() if not wanted),
        is_binary_default=default,
    )


def render_response(response: InferResponse, request: InferRequest) -> tuple[bytes, int | None]:
    """Render what the client asked for.

    Returns the body and the length of its JSON header, which is None for plain JSON. Raises BadRequest when the
    request names an output that the model does not have.
    """
    available = {tensor.name: tensor for tensor in response.outputs}
    for name in request.outputs:
        if name not in available:
            raise BadRequest("A requested output does not exist.", code="unknown_output")
    chosen = [available[name] for name in request.outputs] or list(response.outputs)

    head: dict[str, object] = {"model_name": response.model_name}
    if response.model_version is not None:
        head["model_version"] = response.model_version
    request_id = response.id or request.id
    if request_id is not None:
        head["id"] = request_id
    if response.parameters:
        head["parameters"] = dict(response.parameters)
    return _join(head, "outputs", [(tensor, request.wants_binary(tensor.name)) for tensor in chosen])


def render_request(request: InferRequest) -> tuple[bytes, int | None]:
    """Render a request with every input in binary form, for a client of ours."""
    head: dict[str, object] = {}
    if request.id is not None:
        head["id"] = request.id
    parameters = dict(request.parameters)
    if request.is_binary_default:
        parameters["binary_data_output"] = True
    if parameters:
        head["parameters"] = parameters
    if request.outputs:
        head["outputs"] = [_wish(name, request) for name in request.outputs]
    return _join(head, "inputs", [(tensor, True) for tensor in request.inputs])


def parse_response(body: bytes, header_length: str | None = None) -> InferResponse:
    """Parse a response body, for a client of ours. Raises BadRequest when it is no V2 response."""
    head, blobs = _split(body, header_length)
    return InferResponse(
        model_name=_text(head, "model_name") or "",
        outputs=_tensors(_list(head.get("outputs"), "outputs"), blobs),
        parameters=_parameters(head.get("parameters"), "parameters"),
        model_version=_text(head, "model_version"),
        id=_text(head, "id"),
    )


def _split(body: bytes, header_length: str | None) -> tuple[Mapping[str, object], "_Blobs | None"]:
    blobs = None
    if header_length is not None:
        if not header_length.isascii() or not header_length.isdigit() or len(header_length) > _MAX_LENGTH_DIGITS:
            raise BadRequest("Inference-Header-Content-Length must be a number.", code="invalid_request")
        length = int(header_length)
        if length > len(body):
            raise BadRequest("Inference-Header-Content-Length is larger than the body.", code="invalid_request")
        blobs = _Blobs(memoryview(body)[length:])
        body = body[:length]
    try:
        parsed: object = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest("The body is not valid JSON.", code="invalid_json") from error
    return _mapping(parsed, "the body"), blobs


class _Blobs:
    """The raw tensors behind the JSON header, taken in order."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def take(self, size: int) -> memoryview:
        if size > len(self._view):
            raise BadRequest("The binary data is shorter than announced.", code="invalid_tensor")
        taken, self._view = self._view[:size], self._view[size:]
        return taken

    def finish(self) -> None:
        if len(self._view):
            raise BadRequest("The binary data is longer than announced.", code="invalid_tensor")


def _tensors(items: Sequence[object], blobs: _Blobs | None) -> tuple[Tensor, ...]:
    tensors = tuple(_tensor(_mapping(item, "a tensor"), blobs) for item in items)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise BadRequest("Two tensors have the same name.", code="invalid_tensor")
    if blobs is not None:
        blobs.finish()
    return tensors


def _tensor(item: Mapping[str, object], blobs: _Blobs | None) -> Tensor:
    name, datatype, shape = item.get("name"), item.get("datatype"), item.get("shape")
    if not isinstance(name, str) or not name:
        raise BadRequest("Every tensor needs a name.", code="invalid_tensor")
    if not isinstance(datatype, str) or (datatype != "BYTES" and datatype not in NUMPY_TYPES):
        raise BadRequest(f"Tensor{_shown(name)} has an unknown datatype.", code="invalid_tensor")
    dims = _list(shape, "a shape")
    is_valid = all(isinstance(dim, int) and not isinstance(dim, bool) and dim >= 0 for dim in dims)
    if not is_valid or len(dims) > MAX_DIMENSIONS:
        raise BadRequest(f"Tensor{_shown(name)} has an invalid shape.", code="invalid_tensor")
    sizes = tuple(cast("Sequence[int]", dims))
    size = _parameters(item.get("parameters"), "parameters").get("binary_data_size")
    if size is None:
        if "data" not in item:
            raise BadRequest(f"Tensor{_shown(name)} has no data.", code="invalid_tensor")
        data = _data_from_json(name, datatype, sizes, item["data"])
    elif isinstance(size, bool) or not isinstance(size, int) or size < 0 or blobs is None:
        raise BadRequest(f"Tensor{_shown(name)} has an invalid binary_data_size.", code="invalid_tensor")
    else:
        data = data_from_binary(name, datatype, sizes, blobs.take(size))
    return Tensor(name, datatype, sizes, data)


def _data_from_json(name: str, datatype: str, shape: tuple[int, ...], value: object) -> Data:
    flat = list(_flatten(_list(value, "the data of a tensor")))
    if len(flat) != math.prod(shape):
        raise BadRequest(f"Tensor{_shown(name)} has not as many elements as its shape says.", code="invalid_tensor")
    if datatype == "BYTES":
        if not all(isinstance(element, str) for element in flat):
            raise BadRequest(f"Tensor{_shown(name)} must hold strings.", code="invalid_tensor")
        return tuple(cast("str", element).encode("utf-8", "surrogatepass") for element in flat)
    dtype = np.dtype(NUMPY_TYPES[datatype])
    allowed = _JSON_TYPES[dtype.kind]
    if not all(type(element) in allowed for element in flat):
        raise BadRequest(f"Tensor{_shown(name)} has a value of another type.", code="invalid_tensor")
    try:
        with np.errstate(over="raise"):
            return np.array(flat, dtype=dtype).reshape(shape)
    except (ArithmeticError, ValueError) as error:
        raise BadRequest(f"Tensor{_shown(name)} has a value out of range.", code="invalid_tensor") from error


def data_from_binary(name: str, datatype: str, shape: tuple[int, ...], blob: memoryview) -> Data:
    """The data of a tensor in binary form, as in the REST extension and in gRPC. Raises BadRequest (400)."""
    count = math.prod(shape)
    if datatype == "BYTES":
        # One more than wanted is enough to know: a blob of zeros would be millions of empty elements.
        elements = tuple(itertools.islice(_length_prefixed(name, blob), min(count, len(blob)) + 1))
        if len(elements) != count:
            raise BadRequest(
                f"Tensor{_shown(name)} has not as many elements as its shape says.",
                code="invalid_tensor",
            )
        return elements
    dtype = np.dtype(NUMPY_TYPES[datatype]).newbyteorder("<")
    if len(blob) != count * dtype.itemsize:
        raise BadRequest(f"Tensor{_shown(name)} has not as many bytes as its shape says.", code="invalid_tensor")
    try:
        return np.frombuffer(blob, dtype=dtype).reshape(shape)
    except ValueError as error:  # no elements, but dimensions that numpy does not count to
        raise BadRequest(f"Tensor{_shown(name)} has an invalid shape.", code="invalid_tensor") from error


def _length_prefixed(name: str, blob: memoryview) -> Iterator[bytes]:
    at = 0
    while at < len(blob):
        if at + 4 > len(blob):
            raise BadRequest(f"Tensor{_shown(name)} ends inside a length.", code="invalid_tensor")
        (length,) = struct.unpack_from("<I", blob, at)
        at += 4
        if at + length > len(blob):
            raise BadRequest(f"Tensor{_shown(name)} ends inside an element.", code="invalid_tensor")
        yield bytes(blob[at : at + length])
        at += length


def _join(head: dict[str, object], key: str, tensors: Sequence[tuple[Tensor, bool]]) -> tuple[bytes, int | None]:
    items: list[dict[str, object]] = []
    blobs: list[bytes] = []
    for tensor, is_binary in tensors:
        item: dict[str, object] = {
            "name": tensor.name,
            "shape": list(tensor.shape),
            "datatype": tensor.datatype,
        }
        if is_binary:
            blob = to_binary(tensor)
            item["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            item["data"] = _to_json(tensor)
        items.append(item)
    head[key] = items
    rendered = orjson.dumps(head)
    if not blobs:
        return rendered, None
    return b"".join([rendered, *blobs]), len(rendered)


def to_binary(tensor: Tensor) -> bytes:
    """The data of a tensor in that form."""
    if isinstance(tensor.data, tuple):
        return b"".join(struct.pack("<I", len(element)) + element for element in tensor.data)
    return np.ascontiguousarray(tensor.data, dtype=tensor.data.dtype.newbyteorder("<")).tobytes()


def _to_json(tensor: Tensor) -> list[object]:
    if isinstance(tensor.data, tuple):
        return [element.decode("utf-8", "replace") for element in tensor.data]
    if tensor.data.dtype.kind == "f" and not np.isfinite(tensor.data).all():
        raise InternalError("The answer has a number that JSON cannot hold; ask for it in binary form.")
    return cast("list[object]", tensor.data.ravel().tolist())


def _mapping(value: object, what: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise BadRequest(f"Expected an object for {what}.", code="invalid_request")
    return cast("Mapping[str, object]", value)


def _list(value: object, what: str) -> Sequence[object]:
    if not isinstance(value, list):
        raise BadRequest(f"Expected a list for {what}.", code="invalid_request")
    return cast("Sequence[object]", value)


def _parameters(value: object, what: str) -> dict[str, Scalar]:
    if value is None:
        return {}
    parameters = dict(_mapping(value, what))
    for key, entry in list(parameters.items()):
        if entry is None:
            del parameters[key]
        elif not isinstance(entry, bool | int | float | str):
            raise BadRequest("Parameters must be numbers, strings or booleans.", code="invalid_parameter")
    return cast("dict[str, Scalar]", parameters)


def _flag(value: Scalar) -> bool:
    if not isinstance(value, bool):
        raise BadRequest("Whether an output is binary must be true or false.", code="invalid_parameter")
    return value


def _text(head: Mapping[str, object], key: str) -> str | None:
    value = head.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"'{key}' must be a string.", code="invalid_request")
    return value or None


def _wish(name: str, request: InferRequest) -> dict[str, object]:
    if name not in request.binary_outputs | request.json_outputs:
        return {"name": name}
    return {"name": name, "parameters": {"binary_data": name in request.binary_outputs}}


def _shown(name: str) -> str:
    """A tensor's name as an error may repeat it: a plain one in quotes, any other not at all."""
    return f" '{name}'" if _PLAIN_NAME.fullmatch(name) else ""


def _flatten(values: Sequence[object]) -> Iterator[object]:
    open_lists = [iter(values)]  # no recursion: the client chooses the depth
    while open_lists:
        for value in open_lists[-1]:
            if isinstance(value, list):
                open_lists.append(iter(cast("Sequence[object]", value)))
                break
            yield value
        else:
            open_lists.pop()
