"""V2 bodies: what we read, what we write, and what we refuse; checked against tritonclient's own code."""

import contextlib
import math
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sightline import v2
from sightline.errors import BadRequest, InternalError

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe"
"""Starts like an image and is no UTF-8."""


def tensor_json(
    data: object = ("hello",), *, name: str = "text", datatype: str = "BYTES", shape: object = (1,), **more: object
) -> dict[str, object]:
    return {"name": name, "datatype": datatype, "shape": shape, "data": data} | more


def body(*inputs: Mapping[str, object], **head: object) -> bytes:
    return orjson.dumps({"inputs": list(inputs) or [tensor_json()]} | head)


def binary_body(
    blob: bytes, *, shape: Sequence[int] = (1,), datatype: str = "BYTES", size: object = None, **head: object
) -> tuple[bytes, str]:
    """A body of one binary tensor and the value of its header-length header."""
    tensor = {
        "name": "image",
        "datatype": datatype,
        "shape": shape,
        "parameters": {"binary_data_size": len(blob) if size is None else size},
    }
    header = orjson.dumps({"inputs": [tensor]} | head)
    return header + blob, str(len(header))


def element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def refusal(data: bytes, header_length: str | None = None) -> BadRequest:
    """The error for a body, which must come quickly."""
    started = time.monotonic()
    with pytest.raises(BadRequest) as caught:
        v2.parse_request(data, header_length)
    assert time.monotonic() - started < 2
    assert caught.value.status == 400
    return caught.value


def assert_same_tensor(left: v2.Tensor, right: v2.Tensor) -> None:
    assert (left.name, left.datatype, left.shape) == (right.name, right.datatype, right.shape)
    if isinstance(left.data, tuple) or isinstance(right.data, tuple):
        assert left.data == right.data
    else:
        assert left.data.dtype.newbyteorder("=") == right.data.dtype.newbyteorder("=")
        np.testing.assert_array_equal(left.data, right.data)


def request_of(*names: str, binary: Sequence[str] = (), json: Sequence[str] = (), default: bool = False):
    return v2.InferRequest(
        inputs=(v2.Tensor.of_texts("text", ["hello"]),),
        outputs=names,
        binary_outputs=frozenset(binary),
        json_outputs=frozenset(json),
        is_binary_default=default,
    )


RESPONSE = v2.InferResponse(
    model_name="describe",
    outputs=(
        v2.Tensor.of_texts("text", ["a red square", "a blue disc"]),
        v2.Tensor.of_array("scores", "FP32", np.array([[0.5, 1.5], [2.5, 3.5]])),
    ),
)


class TestReadingJson:
    def test_a_text(self) -> None:
        request = v2.parse_request(body(tensor_json(["grüße"])))

        assert request.inputs == (v2.Tensor.of_texts("text", ["grüße"]),)
        assert request.input("text").texts() == ("grüße",)

    def test_what_is_not_said_is_absent(self) -> None:
        request = v2.parse_request(body())

        assert request.id is None
        assert request.parameters == {}
        assert request.outputs == ()
        assert not request.is_binary_default
        assert request.input("other") is None

    def test_id_and_parameters(self) -> None:
        request = v2.parse_request(
            body(id="r-1", parameters={"max_tokens": 5, "temperature": 0.5, "preset": "short", "strict": True})
        )

        assert request.id == "r-1"
        assert request.parameters == {"max_tokens": 5, "temperature": 0.5, "preset": "short", "strict": True}

    def test_a_parameter_that_is_null_counts_as_absent(self) -> None:
        assert v2.parse_request(body(parameters={"seed": None})).parameters == {}

    def test_an_empty_id_counts_as_absent(self) -> None:
        assert v2.parse_request(body(id="")).id is None

    @pytest.mark.parametrize(
        "data",
        [[1, 2, 3, 4], [[1, 2], [3, 4]], [[[1], [2]], [[3], [4]]], [[1, 2, 3], [4]]],
        ids=["flat", "nested like the shape", "nested deeper", "nested unevenly"],
    )
    def test_nesting_is_read_in_row_major_order(self, data: object) -> None:
        request = v2.parse_request(body(tensor_json(data, datatype="INT32", shape=[2, 2])))

        np.testing.assert_array_equal(request.inputs[0].data, np.array([[1, 2], [3, 4]], np.int32))

    def test_nested_texts(self) -> None:
        request = v2.parse_request(body(tensor_json([["a", "b"], ["c", "d"]], shape=[2, 2])))

        assert request.inputs[0].texts() == ("a", "b", "c", "d")
        assert request.inputs[0].shape == (2, 2)

    @pytest.mark.parametrize("datatype", v2.NUMPY_TYPES)
    def test_every_datatype(self, datatype: str) -> None:
        value = True if datatype == "BOOL" else 7

        tensor = v2.parse_request(body(tensor_json([value], datatype=datatype))).inputs[0]

        assert tensor.data.dtype == v2.NUMPY_TYPES[datatype]
        assert tensor.data.tolist() == [value]

    @pytest.mark.parametrize(
        ("shape", "data"),
        [([], [7]), ([0], []), ([0, 3], []), ([2, 0], [[], []])],
        ids=["scalar", "no elements", "no rows", "empty rows"],
    )
    def test_odd_but_valid_shapes(self, shape: list[int], data: list[object]) -> None:
        tensor = v2.parse_request(body(tensor_json(data, datatype="INT64", shape=shape))).inputs[0]

        assert tensor.data.shape == tuple(shape)

    def test_whole_numbers_do_for_floats(self) -> None:
        assert v2.parse_request(body(tensor_json([1], datatype="FP32"))).inputs[0].data.tolist() == [1.0]


class TestReadingBinary:
    def test_raw_image_bytes_arrive_untouched(self) -> None:
        data, length = binary_body(element(PNG) + element(b""), shape=[2])

        assert v2.parse_request(data, length).inputs[0].elements() == (PNG, b"")

    def test_numbers_are_little_endian(self) -> None:
        data, length = binary_body(struct.pack("<2h", 1, -2), shape=[2], datatype="INT16")

        assert v2.parse_request(data, length).inputs[0].data.tolist() == [1, -2]

    def test_fp16(self) -> None:
        data, length = binary_body(struct.pack("<2e", 0.5, -1.5), shape=[2], datatype="FP16")

        tensor = v2.parse_request(data, length).inputs[0]

        assert tensor.data.dtype == np.float16
        assert tensor.data.tolist() == [0.5, -1.5]

    def test_binary_and_json_tensors_in_one_body(self) -> None:
        blob = element(PNG)
        header = orjson.dumps(
            {
                "inputs": [
                    {
                        "name": "image",
                        "datatype": "BYTES",
                        "shape": [1],
                        "parameters": {"binary_data_size": len(blob)},
                    },
                    tensor_json(["what is this?"], name="prompt"),
                ]
            }
        )

        request = v2.parse_request(header + blob, str(len(header)))

        assert request.input("image").elements() == (PNG,)
        assert request.input("prompt").texts() == ("what is this?",)

    def test_a_header_length_over_plain_json(self) -> None:
        data = body()

        assert v2.parse_request(data, str(len(data))).inputs[0].texts() == ("hello",)

    def test_bytes_that_are_no_text_are_refused_where_text_is_wanted(self) -> None:
        data, length = binary_body(element(PNG))

        with pytest.raises(BadRequest):
            v2.parse_request(data, length).inputs[0].texts()

    def test_numbers_are_refused_where_bytes_are_wanted(self) -> None:
        tensor = v2.parse_request(body(tensor_json([1], datatype="INT8"))).inputs[0]

        with pytest.raises(BadRequest):
            tensor.elements()


class TestRefusals:
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"[]",
            b"null",
            b'"inputs"',
            b"{}",
            b'{"inputs": {}}',
            b'{"inputs": []}',
            b'{"inputs": null}',
            b'{"inputs": [null]}',
            b'{"inputs": ["text"]}',
        ],
        ids=repr,
    )
    def test_bodies_that_are_no_request(self, data: bytes) -> None:
        refusal(data)

    @pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "01", "+1", "0x1"])
    def test_numbers_that_json_does_not_have(self, literal: str) -> None:
        data = b'{"inputs":[{"name":"a","datatype":"FP64","shape":[1],"data":[' + literal.encode() + b"]}]}"

        assert refusal(data).code == "invalid_json"

    @pytest.mark.parametrize("depth", [999, 1000, 1005, 1020, 5_000, 200_000])
    def test_deep_nesting_never_overflows_the_stack(self, depth: int) -> None:
        data = b'{"inputs":[{"name":"a","datatype":"BYTES","shape":[2],"data":' + b"[" * depth + b"]" * depth + b"}]}"

        refusal(data)
        refusal(b"[" * depth)
        refusal(b'{"inputs":' + b'{"a":' * depth)

    @pytest.mark.parametrize(
        "change",
        [
            {"name": None},
            {"name": ""},
            {"name": 5},
            {"datatype": None},
            {"datatype": "bytes"},
            {"datatype": "FP8"},
            {"datatype": ["BYTES"]},
            {"datatype": {}},
            {"shape": None},
            {"shape": 1},
            {"shape": "1"},
            {"shape": [1.0]},
            {"shape": ["1"]},
            {"shape": [True]},
            {"shape": [None]},
            {"shape": [[1]]},
            {"shape": [-1]},
            {"shape": [-1, -1]},
            {"shape": [2]},
            {"shape": [0]},
            {"shape": [1, 2]},
            {"shape": [1] * 100},
            {"shape": [2**63] * 1000},
            {"shape": [10**12]},
            {"shape": [2**64 - 1, 2**64 - 1]},
            {"shape": [0, 10**18, 10**18]},
            {"data": None},
            {"data": "hello"},
            {"data": {"0": "hello"}},
            {"data": [1]},
            {"data": [None]},
            {"data": [{}]},
            {"data": ["hello", "again"]},
            {"parameters": []},
            {"parameters": {"binary_data_size": 0}},
            {"parameters": {"x": {}}},
        ],
        ids=str,
    )
    def test_tensors_that_contradict_themselves(self, change: Mapping[str, object]) -> None:
        refusal(body(tensor_json() | change))

    def test_no_data_at_all(self) -> None:
        refusal(body({"name": "a", "datatype": "BYTES", "shape": [1]}))

    @pytest.mark.parametrize(
        ("datatype", "value"),
        [
            ("UINT8", 256),
            ("UINT8", -1),
            ("INT8", 128),
            ("INT64", 2**63),
            ("UINT64", -1),
            ("INT32", 1.5),
            ("INT32", 1e30),
            ("UINT8", 300.0),
            ("INT32", True),
            ("FP32", True),
            ("BOOL", 7),
            ("BOOL", "true"),
            ("FP16", 70_000),
            ("FP32", 1e300),
            ("FP32", "1.0"),
            ("INT8", None),
            ("BYTES", True),
        ],
    )
    def test_values_that_the_datatype_cannot_hold(self, datatype: str, value: object) -> None:
        refusal(body(tensor_json([value], datatype=datatype)))

    def test_two_inputs_of_one_name(self) -> None:
        refusal(body(tensor_json(), tensor_json()))

    @pytest.mark.parametrize(
        "blob",
        [
            b"\x01\x00\x00",
            element(b"abc")[:-1],
            b"\xff\xff\xff\xff",
            element(b"a") + b"\x00",
            element(b"a") + element(b"b"),
            b"",
        ],
        ids=["inside a length", "inside an element", "huge length", "trailing byte", "one too many", "none"],
    )
    def test_byte_elements_that_do_not_add_up(self, blob: bytes) -> None:
        refusal(*binary_body(blob))

    @pytest.mark.parametrize("delta", [-1, 1, 4])
    def test_number_blobs_of_the_wrong_size(self, delta: int) -> None:
        refusal(*binary_body(bytes(8 + delta), shape=[2], datatype="FP32"))

    @pytest.mark.parametrize("size", [-1, 4.0, "4", True, 10**12], ids=repr)
    def test_strange_blob_sizes(self, size: object) -> None:
        refusal(*binary_body(element(b""), size=size))

    def test_bytes_behind_the_last_tensor(self) -> None:
        data, length = binary_body(element(PNG))

        refusal(data + b"\x00", length)

    def test_a_body_that_ends_before_its_tensors(self) -> None:
        data, length = binary_body(element(PNG))

        refusal(data[:-1], length)

    def test_a_binary_tensor_without_the_header(self) -> None:
        header = orjson.loads(binary_body(b"")[0])

        refusal(orjson.dumps(header))

    @pytest.mark.parametrize(
        "length",
        ["", "-1", "+5", " 5", "5.0", "0x10", "1e3", "٣", "²", "99999999", "9" * 5_000, "0", "3"],
        ids=lambda text: ascii(text)[:12],
    )
    def test_header_lengths_that_are_none(self, length: str) -> None:
        refusal(body(), length)

    @pytest.mark.parametrize(
        ("shape", "datatype"),
        [
            ([10**12], "BYTES"),
            ([10**12], "FP64"),
            ([1] * 100, "INT32"),
            ([0, 10**18, 10**18], "INT32"),
            ([2**64 - 1] * 500, "INT8"),
        ],
        ids=["many texts", "many numbers", "many dimensions", "empty but huge", "huge and many"],
    )
    def test_huge_shapes_with_little_data(self, shape: list[int], datatype: str) -> None:
        refusal(*binary_body(b"", shape=shape, datatype=datatype))

    def test_a_blob_of_very_many_elements_for_a_small_shape(self) -> None:
        refusal(*binary_body(bytes(4 * 2_000_000), shape=[1]))

    @pytest.mark.parametrize(
        "head",
        [
            {"id": 5},
            {"id": ["a"]},
            {"parameters": []},
            {"parameters": {"x": [1]}},
            {"parameters": {"binary_data_output": "false"}},
            {"outputs": {}},
            {"outputs": ["text"]},
            {"outputs": [{}]},
            {"outputs": [{"name": ""}]},
            {"outputs": [{"name": "text"}, {"name": "text"}]},
            {"outputs": [{"name": "text", "parameters": {"binary_data": "false"}}]},
            {"outputs": [{"name": "text", "parameters": "binary"}]},
        ],
        ids=str,
    )
    def test_heads_that_are_none(self, head: Mapping[str, object]) -> None:
        refusal(body(**head))

    HOSTILE = "<script>hunter2\n"

    @pytest.mark.parametrize(
        "data",
        [
            body(tensor_json() | {"name": HOSTILE, "datatype": "BYTES", "shape": [9]}),
            body(tensor_json() | {"name": HOSTILE * 10_000, "shape": "x"}),
            body(tensor_json(datatype=HOSTILE)),
            body(tensor_json([HOSTILE], datatype="INT8")),
            body(tensor_json([HOSTILE, HOSTILE])),
            body(parameters={HOSTILE: []}),
            body(outputs=[{"name": [HOSTILE]}]),
            body(outputs=[{"name": "a", "parameters": {HOSTILE: [HOSTILE]}}]),
            body(id=[HOSTILE]),
            b'{"' + HOSTILE.encode(),
        ],
    )
    def test_errors_do_not_repeat_what_was_sent(self, data: bytes) -> None:
        error = refusal(data)

        assert "script" not in error.message
        assert "hunter2" not in error.message
        assert len(error.message) < 200

    def test_errors_name_the_tensor_when_its_name_is_plain(self) -> None:
        assert "'image_2'" in refusal(body(tensor_json(name="image_2", shape=[9]))).message

    @given(st.binary(max_size=200), st.none() | st.text(max_size=5) | st.integers(0, 200).map(str))
    def test_garbage_is_never_more_than_a_bad_request(self, data: bytes, length: str | None) -> None:
        with pytest.raises(BadRequest):
            v2.parse_request(data, length)

    @given(st.data())
    def test_a_damaged_body_is_read_or_refused(self, data: st.DataObject) -> None:
        whole, length = binary_body(element(PNG) + element(b"abc"), shape=[2])
        at = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + data.draw(st.integers(0, 3)) :]

        with contextlib.suppress(BadRequest):
            v2.parse_request(damaged, length)


class TestWriting:
    def test_json_by_default(self) -> None:
        rendered, header_length = v2.render_response(RESPONSE, request_of())

        assert header_length is None
        assert orjson.loads(rendered) == {
            "model_name": "describe",
            "outputs": [
                {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a red square", "a blue disc"]},
                {"name": "scores", "datatype": "FP32", "shape": [2, 2], "data": [0.5, 1.5, 2.5, 3.5]},
            ],
        }

    def test_no_member_is_null(self) -> None:
        rendered, _ = v2.render_response(RESPONSE, request_of())

        assert b"null" not in rendered

    def test_id_version_and_parameters_when_there_are_any(self) -> None:
        response = replace(RESPONSE, id="r-1", model_version="1", parameters={"demo_model": True})

        head = orjson.loads(v2.render_response(response, request_of())[0])

        assert (head["id"], head["model_version"], head["parameters"]) == ("r-1", "1", {"demo_model": True})

    def test_the_request_s_id_is_the_answer_s(self) -> None:
        head = orjson.loads(v2.render_response(RESPONSE, replace(request_of(), id="asked"))[0])

        assert head["id"] == "asked"

    @pytest.mark.parametrize(
        ("request_", "binary"),
        [
            (request_of(), []),
            (request_of(default=True), ["text", "scores"]),
            (request_of("text", "scores", binary=["text"]), ["text"]),
            (request_of("text", "scores", binary=["scores"], json=["text"]), ["scores"]),
            (request_of("text", "scores", json=["text"], default=True), ["scores"]),
            (request_of("text", "scores", json=["text", "scores"], default=True), []),
        ],
        ids=["nothing said", "default", "one", "one of two", "default but one", "default but all"],
    )
    def test_binary_where_it_was_asked_for(self, request_: v2.InferRequest, binary: list[str]) -> None:
        rendered, header_length = v2.render_response(RESPONSE, request_)

        head = orjson.loads(rendered[:header_length])
        assert [item["name"] for item in head["outputs"] if "binary_data_size" in item.get("parameters", {})] == binary
        assert [item["name"] for item in head["outputs"] if "data" not in item] == binary
        assert (header_length is None) == (not binary)

    def test_requested_outputs_in_the_order_asked_for(self) -> None:
        head = orjson.loads(v2.render_response(RESPONSE, request_of("scores", "text"))[0])

        assert [item["name"] for item in head["outputs"]] == ["scores", "text"]

    def test_only_what_was_asked_for(self) -> None:
        head = orjson.loads(v2.render_response(RESPONSE, request_of("scores"))[0])

        assert [item["name"] for item in head["outputs"]] == ["scores"]

    def test_an_output_that_does_not_exist(self) -> None:
        with pytest.raises(BadRequest) as caught:
            v2.render_response(RESPONSE, request_of("hunter2"))

        assert caught.value.code == "unknown_output"
        assert "hunter2" not in caught.value.message

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_json_never_holds_null_for_a_number_that_it_does_not_have(self, value: float) -> None:
        response = v2.InferResponse("m", (v2.Tensor.of_array("scores", "FP32", np.array([value])),))

        with pytest.raises(InternalError):
            v2.render_response(response, request_of())

        rendered, length = v2.render_response(response, request_of(default=True))
        assert length is not None
        np.testing.assert_array_equal(v2.parse_response(rendered, str(length)).outputs[0].data, [value])

    def test_numbers_of_any_memory_layout_and_byte_order(self) -> None:
        array = np.arange(6, dtype=">i4").reshape(2, 3).T
        response = v2.InferResponse("m", (v2.Tensor("n", "INT32", (3, 2), array),))

        for default in (False, True):
            rendered, length = v2.render_response(response, request_of(default=default))
            parsed = v2.parse_response(rendered, None if length is None else str(length))
            assert parsed.outputs[0].data.tolist() == [[0, 3], [1, 4], [2, 5]]


NAMES = st.text(min_size=1, max_size=8)
SCALARS = (
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text()
)
PARAMETERS = st.dictionaries(st.text(max_size=5).filter(lambda key: key != "binary_data_output"), SCALARS, max_size=3)


@st.composite
def tensors(draw: st.DrawFn, *, is_json: bool = False) -> v2.Tensor:
    name = draw(NAMES)
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    datatype = draw(st.sampled_from(["BYTES", *v2.NUMPY_TYPES]))
    if datatype == "BYTES":
        content = st.text(max_size=5).map(str.encode) if is_json else st.binary(max_size=5)
        count = math.prod(shape)
        return v2.Tensor(name, datatype, shape, tuple(draw(st.lists(content, min_size=count, max_size=count))))
    finite = {"allow_nan": False, "allow_infinity": False} if is_json else {}
    elements = arrays.from_dtype(np.dtype(v2.NUMPY_TYPES[datatype]), **finite)
    return v2.Tensor(name, datatype, shape, draw(arrays.arrays(v2.NUMPY_TYPES[datatype], shape, elements=elements)))


def unique(strategy: st.SearchStrategy[v2.Tensor]) -> st.SearchStrategy[tuple[v2.Tensor, ...]]:
    return st.lists(strategy, min_size=1, max_size=3, unique_by=lambda tensor: tensor.name).map(tuple)


@st.composite
def requests(draw: st.DrawFn) -> v2.InferRequest:
    outputs = tuple(draw(st.lists(NAMES, max_size=3, unique=True)))
    wishes = [draw(st.sampled_from(["binary", "json", "none"])) for _ in outputs]
    return v2.InferRequest(
        inputs=draw(unique(tensors())),
        parameters=draw(PARAMETERS),
        id=draw(st.none() | NAMES),
        outputs=outputs,
        binary_outputs=frozenset(name for name, wish in zip(outputs, wishes, strict=True) if wish == "binary"),
        json_outputs=frozenset(name for name, wish in zip(outputs, wishes, strict=True) if wish == "json"),
        is_binary_default=draw(st.booleans()),
    )


@st.composite
def responses(draw: st.DrawFn, *, is_json: bool) -> v2.InferResponse:
    return v2.InferResponse(
        model_name=draw(NAMES),
        outputs=draw(unique(tensors(is_json=is_json))),
        parameters=draw(PARAMETERS),
        model_version=draw(st.none() | NAMES),
        id=draw(st.none() | NAMES),
    )


class TestRoundTrips:
    @given(requests())
    def test_a_request_comes_back(self, request_: v2.InferRequest) -> None:
        rendered, length = v2.render_request(request_)

        parsed = v2.parse_request(rendered, None if length is None else str(length))

        assert replace(parsed, inputs=()) == replace(request_, inputs=())
        for left, right in zip(parsed.inputs, request_.inputs, strict=True):
            assert_same_tensor(left, right)

    @pytest.mark.parametrize("is_json", [True, False], ids=["json", "binary"])
    @given(data=st.data())
    def test_a_response_comes_back(self, is_json: bool, data: st.DataObject) -> None:
        response = data.draw(responses(is_json=is_json))

        rendered, length = v2.render_response(response, request_of(default=not is_json))
        parsed = v2.parse_response(rendered, None if length is None else str(length))

        assert replace(parsed, outputs=()) == replace(response, outputs=())
        for left, right in zip(parsed.outputs, response.outputs, strict=True):
            assert_same_tensor(left, right)

    @pytest.mark.parametrize(
        "data",
        [b"", b"{}", b"[]", b'{"outputs": null}', b'{"model_name": "m", "outputs": [], "id": 5}'],
        ids=repr,
    )
    def test_what_is_no_response_is_refused(self, data: bytes) -> None:
        with pytest.raises(BadRequest):
            v2.parse_response(data)


def triton_input(name: str, array: np.ndarray[Any, Any], datatype: str, *, is_binary: bool) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=is_binary)
    return tensor


def from_triton(*inputs: triton.InferInput, **options: object) -> v2.InferRequest:
    data, length = triton.InferenceServerClient.generate_request_body(list(inputs), **options)
    return v2.parse_request(data, None if length is None else str(length))


class TestTritonClient:
    """The reference client of the protocol understands us and we understand it."""

    def test_its_raw_images(self) -> None:
        request = from_triton(triton_input("image", np.array([PNG, b"", b"\x00"], object), "BYTES", is_binary=True))

        assert request.input("image").elements() == (PNG, b"", b"\x00")
        assert request.is_binary_default

    def test_its_texts_in_json(self) -> None:
        request = from_triton(triton_input("text", np.array(["naïve", "中"], object), "BYTES", is_binary=False))

        assert request.input("text").texts() == ("naïve", "中")

    @pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
    @pytest.mark.parametrize("datatype", v2.NUMPY_TYPES)
    def test_its_numbers(self, datatype: str, is_binary: bool) -> None:
        array = np.array([[0, 1, 1], [1, 0, 1]], v2.NUMPY_TYPES[datatype])

        request = from_triton(triton_input("n", array, datatype, is_binary=is_binary))

        assert_same_tensor(request.inputs[0], v2.Tensor.of_array("n", datatype, array))

    def test_its_id_parameters_and_output_wishes(self) -> None:
        request = from_triton(
            triton_input("text", np.array(["a"], object), "BYTES", is_binary=True),
            outputs=[
                triton.InferRequestedOutput("text", binary_data=True),
                triton.InferRequestedOutput("scores", binary_data=False),
            ],
            request_id="r-1",
            parameters={"max_tokens": 5},
        )

        assert request.id == "r-1"
        assert request.parameters == {"max_tokens": 5}
        assert request.outputs == ("text", "scores")
        assert request.binary_outputs == {"text"}
        assert request.json_outputs == {"scores"}

    @pytest.mark.parametrize(
        "request_", [request_of(), request_of(default=True), request_of("scores", "text", binary=["scores"])]
    )
    def test_it_reads_our_answers(self, request_: v2.InferRequest) -> None:
        rendered, length = v2.render_response(RESPONSE, request_)

        result = triton.InferenceServerClient.parse_response_body(rendered, header_length=length)

        texts = [text.decode() if isinstance(text, bytes) else text for text in result.as_numpy("text").tolist()]
        assert texts == ["a red square", "a blue disc"]
        np.testing.assert_array_equal(result.as_numpy("scores"), np.array([[0.5, 1.5], [2.5, 3.5]], np.float32))

    @given(requests())
    def test_both_encode_the_same_bytes(self, request_: v2.InferRequest) -> None:
        ours, our_length = v2.render_request(request_)
        inputs = []
        for tensor in request_.inputs:
            array = tensor.data
            if isinstance(array, tuple):
                array = np.empty(len(tensor.data), object)
                array[:] = tensor.data
                array = array.reshape(tensor.shape)
            inputs.append(triton_input(tensor.name, array, tensor.datatype, is_binary=True))

        theirs, their_length = triton.InferenceServerClient.generate_request_body(inputs)

        assert ours[our_length:] == theirs[their_length:]
        assert orjson.loads(ours[:our_length])["inputs"] == orjson.loads(theirs[:their_length])["inputs"]
