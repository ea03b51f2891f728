"""What describe and generate share: several images, conversations, streams, and a device that is too small."""

import io
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from sightline.errors import BadRequest, InvalidParameter, OutOfMemory, SightlineError
from sightline.services.describe import DescribeService
from sightline.services.vision import sources_of, tags_of
from sightline.settings import DescribeSettings
from sightline.wire import (
    PRESETS,
    ChatRequest,
    Completion,
    Context,
    Deadline,
    ImageBytes,
    ImageS3,
    ImageUrl,
    Sampling,
    Turn,
)


def png(color: str = "red", size: tuple[int, int] = (240, 160)) -> ImageBytes:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=color)
    file = io.BytesIO()
    image.save(file, "PNG")
    return ImageBytes(file.getvalue())


def ask(*images: ImageBytes, text: str = "Describe this image in detail", **changes: Any) -> ChatRequest:
    return ChatRequest((Turn("user", (*images, text)),), Sampling(max_tokens=16), **changes)


def context() -> Context:
    return Context("r-1", Deadline.after(120))


@pytest.fixture
async def service() -> AsyncIterator[DescribeService]:
    settings = DescribeSettings(_env_file=None, auth="off", device="cpu", threads=1, job_store="memory://")
    service = DescribeService(settings)
    await service.load()
    yield service
    await service.close()


async def run(service: DescribeService, *requests: ChatRequest) -> list[Completion | OutOfMemory]:
    return await service.predict(await service.preprocess(requests, context()), context())


class TestConversations:
    async def test_several_images_are_one_prompt(self, service: DescribeService) -> None:
        (alone,) = await run(service, ask(png()))
        (both,) = await run(service, ask(png(), png("blue")))
        assert isinstance(alone, Completion)
        assert isinstance(both, Completion)
        assert both.usage.image_tokens == 2 * (alone.usage.image_tokens or 0)

    async def test_items_of_a_call_are_answered_as_each_alone(self, service: DescribeService) -> None:
        requests = [ask(png()), ask(png("blue"), png("green")), ask(png("black", (90, 300)), text="What is it?")]
        together = await run(service, *requests)
        alone = [(await run(service, request))[0] for request in requests]
        assert [item.text for item in together] == [item.text for item in alone]  # type: ignore[union-attr]

    async def test_a_stream_is_the_answer_in_pieces(self, service: DescribeService) -> None:
        (whole,) = await run(service, ask(png()))
        *pieces, end = [part async for part in service.stream(ask(png()), context())]
        assert isinstance(whole, Completion)
        assert isinstance(end, Completion)
        assert len(pieces) > 1
        assert "".join(pieces) == end.text == whole.text

    async def test_turns_keep_their_order(self, service: DescribeService) -> None:
        turns = [Turn("system", ("Be brief.",)), Turn("user", (png(), "What?")), Turn("assistant", ("A square.",)),
                 Turn("user", ("Which colour?",))]  # fmt: skip
        request = service.from_chat(turns, {"max_tokens": 4})
        prepared = await service.preprocess([request], context())
        ((_, prompt),) = prepared.items
        text = service._conversations.model._tokenizer.decode(prompt.input_ids)
        said = ["Be brief.", "What?", "A square.", "Which colour?"]
        assert [text.index(words) for words in said] == sorted(text.index(words) for words in said)

    @pytest.mark.parametrize(
        ("turns", "code"),
        [
            pytest.param([Turn("user", ("Hi",))], "image_missing", id="no image"),
            pytest.param([Turn("user", (png(),)), Turn("assistant", ("x",))], "text_missing", id="nobody asks"),
            pytest.param([], "text_missing", id="nothing"),
            pytest.param([Turn("user", (png(),) * 9)], "too_many_images", id="nine images"),
        ],
    )
    async def test_what_cannot_be_answered(self, turns: list[Turn], code: str) -> None:
        service = DescribeService(DescribeSettings(_env_file=None, auth="off"))
        with pytest.raises(SightlineError) as raised:
            service.from_chat(turns, {})
        assert raised.value.code == code

    @pytest.mark.parametrize(
        ("parts", "options", "words", "preset"),
        [
            ((png(), "Own."), {"preset": "tags"}, "Own.", None),
            ((png(),), {"preset": "tags"}, PRESETS["tags"], "tags"),
            ((png(), " "), {}, PRESETS["detailed"], None),
        ],
        ids=["own words win", "a preset", "the default"],
    )
    async def test_words(self, parts: Any, options: Any, words: str, preset: str | None) -> None:
        service = DescribeService(DescribeSettings(_env_file=None, auth="off"))
        request = service.from_chat([Turn("user", parts)], options)
        assert (request.turns[-1].parts[-1], request.preset) == (words, preset)


class Tight:
    """A device with room for so many image tokens; what needs more is out of memory, as torch says it."""

    def __init__(self, see: Callable[..., Any], room: int) -> None:
        self.see = see
        self.room = room
        self.seen: list[int] = []

    def __call__(self, batch: Sequence[Any]) -> Any:
        self.seen += [prompt.image_tokens for prompt in batch]
        if any(prompt.image_tokens > self.room for prompt in batch):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return self.see(batch)


@pytest.fixture
def tight(service: DescribeService, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Tight]:
    def build(room: int) -> Tight:
        model = service._conversations.model
        device = Tight(model.see, room)
        monkeypatch.setattr(model, "see", device)
        return device

    return build


class TestOutOfMemory:
    """The limits table: free, once more at half the pixels, else 507 on that item only."""

    async def test_it_is_tried_again_at_half_the_pixels(
        self, service: DescribeService, tight: Callable[[int], Tight]
    ) -> None:
        device = tight(100)
        (made,) = await run(service, ask(png()))
        assert isinstance(made, Completion)
        assert made.downscaled
        full, half = device.seen
        assert full / 2.5 < half <= full / 2
        assert made.usage.image_tokens == half

    async def test_what_fits_is_not_downscaled(self, service: DescribeService, tight: Callable[[int], Tight]) -> None:
        tight(1000)
        (made,) = await run(service, ask(png()))
        assert isinstance(made, Completion)
        assert not made.downscaled

    async def test_alone_it_is_507(self, service: DescribeService, tight: Callable[[int], Tight]) -> None:
        device = tight(5)
        with pytest.raises(OutOfMemory) as raised:
            await run(service, ask(png()))
        assert (raised.value.status, raised.value.code) == (507, "out_of_memory")
        assert len(device.seen) == 2

    async def test_with_others_it_fails_alone(self, service: DescribeService, tight: Callable[[int], Tight]) -> None:
        tight(150)
        many = [png()] * 4
        outcomes = await run(service, ask(png()), ask(*many), ask(png("blue")))
        assert [isinstance(outcome, OutOfMemory) for outcome in outcomes] == [False, True, False]

        body = service.to_v1(outcomes)
        assert body["predictions"][1] == {
            "error": "This request needs more memory than the device has.", "code": "out_of_memory", "http_status": 507,
        }  # fmt: skip
        assert body["predictions"][0]["text"]
        response = service.to_v2(outcomes)
        texts = response.outputs[0].texts()
        assert (bool(texts[0]), texts[1], bool(texts[2])) == (True, "", True)
        assert str(response.parameters["item_errors"]).startswith('[null,{"error"')

    async def test_a_stream_begins_again_at_half_the_pixels(
        self, service: DescribeService, tight: Callable[[int], Tight]
    ) -> None:
        device = tight(100)
        *pieces, end = [part async for part in service.stream(ask(png()), context())]
        assert isinstance(end, Completion)
        assert end.downscaled
        assert "".join(pieces) == end.text
        assert len(device.seen) == 2

    async def test_a_stream_of_what_never_fits_is_507(
        self, service: DescribeService, tight: Callable[[int], Tight]
    ) -> None:
        tight(5)
        with pytest.raises(OutOfMemory):
            await anext(service.stream(ask(png()), context()))

    async def test_every_protocol_says_it(self, service: DescribeService, tight: Callable[[int], Tight]) -> None:
        tight(100)
        outcomes = await run(service, ask(png()))
        assert service.to_v1(outcomes)["predictions"][0]["downscaled"] is True
        assert service.to_v2(outcomes).parameters["downscaled"] is True

    async def test_the_next_request_is_answered_as_ever(
        self, service: DescribeService, tight: Callable[[int], Tight]
    ) -> None:
        before = await run(service, ask(png()))
        device = tight(5)
        with pytest.raises(OutOfMemory):
            await run(service, ask(png()))
        device.room = 1000
        (after,) = await run(service, ask(png()))
        assert isinstance(after, Completion)
        assert replace(after, milliseconds=0) == replace(before[0], milliseconds=0)  # type: ignore[type-var]


class TestTags:
    @pytest.mark.parametrize(
        ("text", "tags"),
        [
            ("red, kite, sky", ("red", "kite", "sky")),
            ("red; Red, RED.", ("red",)),
            ("1. red\n2) blue sky\n", ("red", "blue sky")),
            ("- #red\n* kite", ("red", "kite")),
            ('"red", \u201ckite\u201d', ("red", "kite")),
            ("3d print, 1990s", ("3d print", "1990s")),
            ("a red square on white", ("a red square on white",)),
            (" ,\n; . ", ()),
        ],
        ids=["plain", "each once", "numbered", "bullets", "quotes", "digits stay", "no list", "nothing"],
    )
    def test_are_taken_apart(self, text: str, tags: tuple[str, ...]) -> None:
        assert tags_of(text) == tags

    async def test_come_with_the_preset_only(self, service: DescribeService) -> None:
        tagged, plain = await run(service, ask(png(), preset="tags"), ask(png()))
        assert isinstance(tagged, Completion)
        assert isinstance(plain, Completion)
        assert tagged.tags == tags_of(tagged.text)
        assert plain.tags is None
        predictions = service.to_v1([tagged, plain])["predictions"]
        assert predictions[0]["tags"] == list(tagged.tags or ())
        assert "tags" not in predictions[1]


class TestSources:
    DATA = "data:image/png;base64,iVBORw0KGgo="

    def test_of_every_field_one_or_several(self) -> None:
        fields = {
            "image": "https://a/1", "images": ["https://a/2", {"url": "https://a/3"}], "image_url": "s3://b/4",
            "image_urls": ["https://a/5"], "s3_uri": "s3://b/6", "other": "https://a/7",
        }  # fmt: skip
        urls = [ImageUrl(f"https://a/{number}") for number in (1, 2, 3)]
        assert sources_of(fields) == [*urls, ImageS3("s3://b/4"), ImageUrl("https://a/5"), ImageS3("s3://b/6")]
        assert sources_of({"image": {"b64": "iVBORw0KGgo="}}) == [ImageBytes(b"\x89PNG\r\n\x1a\n")]

    @pytest.mark.parametrize("fields", [{}, {"image": None}, {"images": []}, {"image_urls": [None]}])
    def test_none_is_none(self, fields: dict[str, object]) -> None:
        assert sources_of(fields) == []

    @pytest.mark.parametrize("fields", [{"image": ""}, {"image_url": ""}, {"images": ["https://a/1", ""]}], ids=str)
    def test_an_empty_one_is_refused_and_no_question_is_answered_without_it(self, fields: dict[str, object]) -> None:
        with pytest.raises(InvalidParameter) as raised:
            sources_of(fields)
        assert raised.value.code == "image_missing"

    @pytest.mark.parametrize(
        "fields",
        [
            {"image": 5}, {"images": [5]}, {"image_url": True}, {"image": {"x": 1}}, {"image": "  "}, {"images": [[]]},
            {"images": ["https://a/1"] * 9},
        ],
        ids=str,
    )  # fmt: skip
    def test_another_type_or_too_many_are_422(self, fields: dict[str, object]) -> None:
        with pytest.raises(InvalidParameter):
            sources_of(fields)

    @pytest.mark.parametrize("value", ["https://a/1", DATA])
    def test_s3_uri_takes_s3_only(self, value: str) -> None:
        with pytest.raises(BadRequest) as raised:
            sources_of({"s3_uri": value})
        assert raised.value.code == "s3_uri_invalid"
