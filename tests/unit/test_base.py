"""What all services read from options, V1 bodies and V2 requests, and what they refuse."""

import base64
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline import v2
from sightline.errors import BadRequest, InvalidParameter
from sightline.services.base import (
    demo_fields,
    flag_of,
    image_of,
    images_of,
    instances_of,
    level_of,
    prompt_of,
    reject_unknown_inputs,
    sampling_of,
    spread,
)
from sightline.wire import (
    MAX_IMAGES_PER_CALL,
    MAX_PROMPT_CHARACTERS,
    MAX_TOKENS_CEILING,
    ImageBytes,
    ImageS3,
    ImageUrl,
    ModelInfo,
    Sampling,
)

PNG = b"\x89PNG\r\n\x1a\n\x00\xff"
BASE64 = base64.b64encode(PNG).decode()
DEFAULTS = Sampling(max_tokens=256, temperature=0.0, top_p=1.0, seed=None)


def refused(work: Callable[[], object], status: int) -> str:
    with pytest.raises((BadRequest, InvalidParameter)) as caught:
        work()
    assert caught.value.status == status
    return caught.value.message


class TestSampling:
    def test_of_nothing_is_the_default(self) -> None:
        assert sampling_of({}, DEFAULTS) == DEFAULTS
        assert sampling_of({"prompt": "other options", "x": 1}, DEFAULTS) == DEFAULTS

    def test_null_is_the_default(self) -> None:
        options = dict.fromkeys(["max_tokens", "max_new_tokens", "temperature", "top_p", "seed"])

        assert sampling_of(options, DEFAULTS) == DEFAULTS

    def test_of_everything(self) -> None:
        options = {"max_tokens": 5, "temperature": 0.7, "top_p": 0.9, "seed": 42}

        assert sampling_of(options, DEFAULTS) == Sampling(5, 0.7, 0.9, 42)

    def test_whole_numbers_become_the_floats_that_transformers_insists_on(self) -> None:
        sampling = sampling_of({"temperature": 2, "top_p": 1}, DEFAULTS)

        assert [type(value) for value in (sampling.temperature, sampling.top_p)] == [float, float]

    @pytest.mark.parametrize(
        ("options", "tokens"),
        [
            ({"max_new_tokens": 7}, 7),
            ({"max_tokens": 5, "max_new_tokens": 7}, 5),
            ({"max_tokens": None, "max_new_tokens": 7}, 7),
            ({"max_tokens": 8.0}, 8),
        ],
        ids=str,
    )
    def test_max_tokens_by_either_name(self, options: Mapping[str, object], tokens: int) -> None:
        sampling = sampling_of(options, DEFAULTS)

        assert sampling.max_tokens == tokens
        assert isinstance(sampling.max_tokens, int)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("max_tokens", 1),
            ("max_tokens", MAX_TOKENS_CEILING),
            ("temperature", 0),
            ("temperature", 2),
            ("temperature", 1e-300),
            ("top_p", 1e-9),
            ("top_p", 1),
            ("seed", 0),
            ("seed", 2**63 - 1),
        ],
    )
    def test_the_ends_of_each_range_belong_to_it(self, name: str, value: float) -> None:
        assert getattr(sampling_of({name: value}, DEFAULTS), name) == value

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            # B5
            ("max_tokens", 0),
            ("max_tokens", -1),
            ("max_tokens", MAX_TOKENS_CEILING + 1),
            ("max_tokens", 1.5),
            ("max_new_tokens", 0),
            # B6
            ("temperature", -0.01),
            ("temperature", 2.01),
            ("top_p", 0),
            ("top_p", -0.5),
            ("top_p", 1.01),
            ("seed", -1),
            ("seed", 2**63),
            ("seed", 1.5),
        ],
    )
    def test_beyond_its_range_is_422(self, name: str, value: float) -> None:
        refused(lambda: sampling_of({name: value}, DEFAULTS), 422)

    @pytest.mark.parametrize(
        "value", ["5", "", True, False, [], [5], {}, float("nan"), float("inf"), float("-inf"), 10**400], ids=repr
    )
    @pytest.mark.parametrize("name", ["max_tokens", "temperature", "top_p", "seed"])
    def test_of_another_type_is_422(self, name: str, value: object) -> None:
        message = refused(lambda: sampling_of({name: value}, DEFAULTS), 422)

        assert name in message

    def test_the_refusal_says_the_range(self) -> None:
        message = refused(lambda: sampling_of({"max_tokens": 0}, DEFAULTS), 422)

        assert message == "max_tokens must be a whole number from 1 to 4096."

    @given(
        st.dictionaries(st.sampled_from(["max_tokens", "temperature", "top_p", "seed"]), st.floats() | st.integers())
    )
    def test_is_in_range_or_refused(self, options: dict[str, float]) -> None:
        try:
            sampling = sampling_of(options, DEFAULTS)
        except InvalidParameter:
            return
        assert 1 <= sampling.max_tokens <= MAX_TOKENS_CEILING
        assert 0 <= sampling.temperature <= 2
        assert 0 < sampling.top_p <= 1
        assert sampling.seed is None or 0 <= sampling.seed < 2**63


class TestFlags:
    @pytest.mark.parametrize(
        ("value", "meaning"),
        [(True, True), (False, False), (None, None)]
        + [(text, True) for text in ("true", "True", "1", "yes", "on")]
        + [(text, False) for text in ("false", "FALSE", "0", "no", "off")],
    )
    def test_are_booleans_or_the_text_of_a_form(self, value: object, meaning: bool | None) -> None:
        assert flag_of({"strict": value}, "strict") is meaning

    def test_absent_are_none(self) -> None:
        assert flag_of({}, "strict") is None

    @pytest.mark.parametrize("value", ["", "maybe", "truee", 1, 0, 1.0, [], {}], ids=repr)
    def test_of_another_type_are_422(self, value: object) -> None:
        assert "strict" in refused(lambda: flag_of({"strict": value}, "strict"), 422)


class TestLevels:
    @pytest.mark.parametrize("level", ["low", "medium", "high", None])
    def test_known(self, level: str | None) -> None:
        assert level_of(level) == level

    @pytest.mark.parametrize("level", ["", "extreme", "LOW", 1, True, ["low"], {"low": 1}], ids=repr)
    def test_unknown_are_422(self, level: object) -> None:
        refused(lambda: level_of(level), 422)


class TestPrompts:
    def test_are_kept_as_they_are(self) -> None:
        assert prompt_of("  What is this?\n") == "  What is this?\n"

    @pytest.mark.parametrize("value", [None, "", " ", "\n\t ", "\u2003"], ids=ascii)
    def test_absent_or_blank_mean_the_default(self, value: str | None) -> None:
        assert prompt_of(value) is None

    def test_may_have_just_so_many_characters(self) -> None:
        text = "é" * MAX_PROMPT_CHARACTERS

        assert prompt_of(text) == text
        message = refused(lambda: prompt_of(text + "!", "caption"), 422)
        assert message == "caption must have at most 8192 characters."

    def test_blank_and_too_long_is_too_long(self) -> None:
        refused(lambda: prompt_of(" " * (MAX_PROMPT_CHARACTERS + 1)), 422)

    @pytest.mark.parametrize("value", [5, True, [], ["text"], {"text": "x"}], ids=repr)
    def test_of_another_type_are_422(self, value: object) -> None:
        refused(lambda: prompt_of(value), 422)


class TestInstances:
    @pytest.mark.parametrize("count", [1, MAX_IMAGES_PER_CALL])
    def test_are_given_back(self, count: int) -> None:
        assert list(instances_of({"instances": ["x"] * count})) == ["x"] * count

    @pytest.mark.parametrize(
        "body", [{}, {"instances": None}, {"instances": []}, {"instances": {}}, {"instances": "x"}, {"inputs": ["x"]}]
    )
    def test_that_are_none_are_400(self, body: Mapping[str, object]) -> None:
        refused(lambda: instances_of(body), 400)

    def test_too_many_are_400(self) -> None:
        assert "32" in refused(lambda: instances_of({"instances": ["x"] * 33}), 400)


class TestImagesOfV1:
    @pytest.mark.parametrize(
        ("instance", "image"),
        [
            (BASE64, ImageBytes(PNG)),
            (f"data:image/png;base64,{BASE64}", ImageBytes(PNG)),
            ("https://a.example/x.png", ImageUrl("https://a.example/x.png")),
            ("s3://bucket/key", ImageS3("s3://bucket/key")),
            ({"b64": BASE64}, ImageBytes(PNG)),
            ({"image": BASE64}, ImageBytes(PNG)),
            ({"image": {"b64": BASE64}}, ImageBytes(PNG)),
            ({"image_bytes": {"b64": BASE64}}, ImageBytes(PNG)),
            ({"image_url": "https://a.example/x.png"}, ImageUrl("https://a.example/x.png")),
            ({"s3_uri": "s3://bucket/key"}, ImageS3("s3://bucket/key")),
            ({"image": "", "image_url": BASE64}, ImageBytes(PNG)),
            ({"image": None, "b64": BASE64}, ImageBytes(PNG)),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_in_every_form(self, instance: object, image: object) -> None:
        assert image_of(instance)[0] == image

    def test_come_with_the_other_fields(self) -> None:
        _, fields = image_of({"image": BASE64, "prompt": "What?", "max_tokens": 5})

        assert (fields["prompt"], fields["max_tokens"]) == ("What?", 5)

    @pytest.mark.parametrize(
        "instance",
        [
            None,
            5,
            True,
            [],
            [BASE64],
            {},
            {"image": None},
            {"image": 5},
            {"image": {}},
            {"image": {"b64": 5}},
            {"x": 1},
        ],
        ids=repr,
    )
    def test_that_are_absent_are_400(self, instance: object) -> None:
        with pytest.raises(BadRequest) as caught:
            image_of(instance)

        assert caught.value.code == "image_missing"

    @pytest.mark.parametrize("text", ["!!!hunter2", "file:///etc/passwd", "gopher://hunter2", "data:image/png"])
    def test_that_are_none_are_400_in_our_words(self, text: str) -> None:
        message = refused(lambda: image_of({"image": text}), 400)

        assert "hunter2" not in message
        assert "passwd" not in message


def request_of(*tensors: v2.Tensor) -> v2.InferRequest:
    return v2.InferRequest(inputs=tensors)


class TestImagesOfV2:
    def test_are_raw_bytes_or_what_a_text_stands_for(self) -> None:
        request = request_of(v2.Tensor.of_bytes("image", [PNG, BASE64.encode(), b"s3://bucket/key"]))

        assert images_of(request) == (ImageBytes(PNG), ImageBytes(PNG), ImageS3("s3://bucket/key"))

    def test_need_an_input_of_that_name(self) -> None:
        with pytest.raises(BadRequest) as caught:
            images_of(request_of(v2.Tensor.of_bytes("picture", [PNG])))

        assert caught.value.code == "image_missing"

    @pytest.mark.parametrize("count", [0, MAX_IMAGES_PER_CALL + 1])
    def test_too_few_or_too_many_are_400(self, count: int) -> None:
        refused(lambda: images_of(request_of(v2.Tensor.of_bytes("image", [PNG] * count))), 400)

    def test_as_many_as_are_allowed(self) -> None:
        images = images_of(request_of(v2.Tensor.of_bytes("image", [PNG] * MAX_IMAGES_PER_CALL)))

        assert len(images) == MAX_IMAGES_PER_CALL

    def test_of_numbers_are_400(self) -> None:
        import numpy as np

        refused(lambda: images_of(request_of(v2.Tensor.of_array("image", "UINT8", np.zeros(4)))), 400)


class TestSpreading:
    @pytest.mark.parametrize(
        ("texts", "count", "result"),
        [
            (None, 3, [None, None, None]),
            (["a"], 3, ["a", "a", "a"]),
            (["a", "b"], 2, ["a", "b"]),
            (["a"], 1, ["a"]),
            (None, 0, []),
        ],
    )
    def test_one_is_for_all_and_many_are_one_each(self, texts: Any, count: int, result: list[Any]) -> None:
        assert list(spread(texts, count, "prompt")) == result

    @pytest.mark.parametrize(("texts", "count"), [([], 1), (["a", "b"], 3), (["a", "b"], 1)])
    def test_anything_else_is_400(self, texts: list[str], count: int) -> None:
        assert "prompt" in refused(lambda: spread(texts, count, "prompt"), 400)


class TestUnknownInputs:
    SPECS = (v2.TensorSpec("image", "BYTES", (-1,)), v2.TensorSpec("prompt", "BYTES", (-1,)))

    def test_known_ones_pass(self) -> None:
        reject_unknown_inputs(request_of(v2.Tensor.of_bytes("image", [PNG])), self.SPECS)

    def test_a_slip_of_the_pen_is_told(self) -> None:
        request = request_of(v2.Tensor.of_bytes("image", [PNG]), v2.Tensor.of_texts("hunter2", ["x"]))

        message = refused(lambda: reject_unknown_inputs(request, self.SPECS), 400)

        assert message == "The inputs of this model are: image, prompt."


class TestDemonstrations:
    def test_say_so_under_their_own_name(self) -> None:
        assert demo_fields(ModelInfo("sightline-tiny", "1", demo=True)) == {
            "demo_model": True,
            "model": "sightline-tiny",
        }

    def test_real_models_say_nothing(self) -> None:
        assert demo_fields(ModelInfo("Qwen/Qwen2.5-VL-7B-Instruct", "1")) == {}
