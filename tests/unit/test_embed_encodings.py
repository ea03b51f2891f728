"""Multi-vectors on the wire: each encoding can be read back by its documentation."""

import base64

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sightline.errors import InvalidParameter
from sightline.services.encodings import Encoding, decode

DIM = 16
vectors = arrays(
    np.float32, st.tuples(st.integers(1, 9), st.just(DIM)), elements=st.floats(-1, 1, width=16, allow_subnormal=False)
)


def sent(value: object) -> object:
    """What a client holds after the JSON trip."""
    return orjson.loads(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY))


@given(vectors)
def test_floats_are_rows_of_numbers(given_: np.ndarray) -> None:
    assert np.array_equal(np.array(sent(Encoding("float").encode(given_)), np.float32), given_)


@given(vectors, st.sampled_from(["float16", "float32"]))
def test_base64_is_little_endian_numbers_row_by_row(given_: np.ndarray, dtype: str) -> None:
    text = sent(Encoding("base64", dtype).encode(given_))

    read = np.frombuffer(base64.b64decode(text), "<f2" if dtype == "float16" else "<f4").reshape(given_.shape)
    assert np.array_equal(read, given_)


@given(vectors)
def test_binary_is_the_signs_highest_bit_first(given_: np.ndarray) -> None:
    data = base64.b64decode(sent(Encoding("binary").encode(given_)))

    assert len(data) == len(given_) * DIM // 8
    for row, vector in enumerate(given_):
        for place, number in enumerate(vector):
            bit = data[row * DIM // 8 + place // 8] >> (7 - place % 8) & 1
            assert bit == (number > 0)


@given(vectors, st.sampled_from(["float", "base64"]), st.sampled_from(["float16", "float32"]))
def test_what_was_given_can_be_sent_back(given_: np.ndarray, form: str, dtype: str) -> None:
    value = sent(Encoding(form, dtype).encode(given_))
    assert np.array_equal(decode(value if form == "float" else {"embedding": value, "dtype": dtype}, DIM, "it"), given_)


BAD = {
    "nothing": None,
    "empty": [],
    "an empty vector": [[]],
    "another width": [[0.0] * (DIM - 1)],
    "rows of two widths": [[0.0] * DIM, [0.0] * (DIM + 1)],
    "text among numbers": [[*([0.0] * (DIM - 1)), "1"]],
    "a boolean": [[*([0.0] * (DIM - 1)), True]],
    "null": [[*([0.0] * (DIM - 1)), None]],
    "too large for float32": [[*([0.0] * (DIM - 1)), 1e300]],
    "a huge whole number": [[*([0.0] * (DIM - 1)), 10**400]],
    "deeper lists": [[[0.0] * DIM]],
    "no base64": {"embedding": "%%%"},
    "base64 of nothing": {"embedding": ""},
    "half a vector": {"embedding": base64.b64encode(bytes(DIM)).decode()},
    "not a number": {"embedding": base64.b64encode(np.full(DIM, np.nan, "<f2").tobytes()).decode()},
    "an unknown type": {"embedding": base64.b64encode(bytes(2 * DIM)).decode(), "dtype": "int8"},
    "a type that is no text": {"embedding": base64.b64encode(bytes(2 * DIM)).decode(), "dtype": ["float16"]},
    "an object": {"data": 1},
    "a number": 5,
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())
def test_vectors_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(InvalidParameter) as caught:
        decode(value, DIM, "A page")
    assert caught.value.code == "vectors_invalid"
    assert caught.value.message.startswith("A page must")


@pytest.mark.parametrize("options", [{"encoding_format": "hex"}, {"encoding_format": 5}, {"dtype": "int8"}])
def test_unknown_encodings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidParameter):
        Encoding.of(options, Encoding())


def test_an_encoding_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidParameter):
        Encoding.of({"dtype": ["float16"]}, Encoding())
    with pytest.raises(InvalidParameter):
        Encoding.of({"encoding_format": {"a": 1}}, Encoding())


def test_what_is_not_said_is_the_route_s_default() -> None:
    default = Encoding("base64", "float16")
    assert Encoding.of({}, default) == Encoding.of({"encoding_format": None, "dtype": None}, default) == default
