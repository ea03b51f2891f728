"""How multi-vectors stand in a JSON body: as floats, as base64 of numbers, or as one bit a dimension; and back.

Dims   T tokens · D width

    float    [[number] * D] * T
    base64   little-endian numbers row by row, float16 or float32
    binary   base64 of T x D / 8 bytes: bit 1 where the number is positive, the first dimension is the highest bit
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from sightline.errors import InvalidParameter

Format = Literal["float", "base64", "binary"]
Dtype = Literal["float16", "float32"]

Vectors = NDArray[np.float32]
"""(T, D)."""

_NUMBERS: Mapping[Dtype, str] = {"float16": "<f2", "float32": "<f4"}


@dataclass(frozen=True, slots=True)
class Encoding:
    """What a client asked for. `dtype` is that of base64 numbers."""

    format: Format = "float"
    dtype: Dtype = "float32"

    @classmethod
    def of(cls, options: Mapping[str, object], default: "Encoding") -> "Encoding":
        """Read encoding_format and dtype; absent or null means the default. Raises InvalidParameter (422)."""
        form = options.get("encoding_format") or default.format
        if form not in get_args(Format):
            raise InvalidParameter("encoding_format must be float, base64 or binary.")
        dtype = options.get("dtype") or default.dtype
        if dtype not in get_args(Dtype):
            raise InvalidParameter("dtype must be float16 or float32.")
        return cls(cast("Format", form), cast("Dtype", dtype))

    def encode(self, vectors: Vectors) -> Vectors | str:
        """The JSON value of some vectors; floats stay an array, which orjson writes itself."""
        if self.format == "float":
            return vectors
        if self.format == "base64":
            return base64.b64encode(vectors.astype(_NUMBERS[self.dtype]).tobytes()).decode()
        return base64.b64encode(np.packbits(vectors > 0, axis=1).tobytes()).decode()

    def describe(self) -> dict[str, object]:
        """What an answer that holds no floats says about its embeddings."""
        if self.format == "float":
            return {}
        return {"encoding_format": self.format, "dtype": self.dtype if self.format == "base64" else "bit"}


def decode(value: object, dim: int, what: str) -> Vectors:
    """Vectors that a client sends back: `[[number]]`, or `{"embedding": base64, "dtype": …}` as it got them.

    dim   D, which they must have · what   how an error calls them

    Raises InvalidParameter (422, vectors_invalid).
    """
    dtype: object = "float16"
    if isinstance(value, Mapping):
        fields = cast("Mapping[str, object]", value)
        dtype = fields.get("dtype") or dtype
        value = fields.get("embedding")
    vectors = _from_base64(value, dtype, dim, what) if isinstance(value, str) else _from_lists(value, dim, what)
    if not np.isfinite(vectors).all():
        raise _invalid(what, "must hold finite numbers")
    return vectors


def _from_base64(text: str, dtype: object, dim: int, what: str) -> Vectors:
    if dtype not in get_args(Dtype):
        raise _invalid(what, "must have the dtype float16 or float32")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _invalid(what, "must be base64") from error
    number = np.dtype(_NUMBERS[cast("Dtype", dtype)])
    if not data or len(data) % (dim * number.itemsize):
        raise _invalid(what, f"must have a whole number of vectors of {dim} numbers")
    return np.frombuffer(data, number).reshape(-1, dim).astype(np.float32)


def _from_lists(value: object, dim: int, what: str) -> Vectors:
    rows = cast("Sequence[object]", value) if isinstance(value, list) else []
    if not rows or not all(isinstance(row, list) and len(cast("Sequence[object]", row)) == dim for row in rows):
        raise _invalid(what, f"must be a list of vectors of {dim} numbers")
    if not all(type(number) in {int, float} for row in rows for number in cast("Sequence[object]", row)):
        raise _invalid(what, "must hold numbers")
    try:
        with np.errstate(over="raise"):
            return np.array(rows, dtype=np.float64).astype(np.float32)
    except (ArithmeticError, ValueError) as error:
        raise _invalid(what, "must hold numbers that fit into float32") from error


def _invalid(what: str, fault: str) -> InvalidParameter:
    return InvalidParameter(f"{what} {fault}.", code="vectors_invalid")
