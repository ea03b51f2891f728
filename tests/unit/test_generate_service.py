"""The generate service: bodies to conversations without a model, and the whole on a Kimi-VL of random weights."""

import base64
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sightline import v2
from sightline.errors import BadRequest, InvalidParameter, OutOfMemory, SightlineError
from sightline.services.generate import GenerateService
from sightline.settings import GenerateSettings
from sightline.wire import ChatRequest, Completion, Context, Deadline, ImageBytes, ImageUrl, Sampling, Turn
from tests.unit.kimi.small import random_model, write_checkpoint


def png(size: tuple[int, int] = (120, 80)) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(file, "PNG")
    return file.getvalue()


PNG = png()
TEXT = base64.b64encode(PNG).decode()
DEFAULTS = Sampling(max_tokens=4000, temperature=0.7, top_p=0.9)


def settings(**changes: Any) -> GenerateSettings:
    return GenerateSettings(_env_file=None, auth="off", device="cpu", threads=1, **changes)


@pytest.fixture
def service() -> GenerateService:
    return GenerateService(settings())


class TestV1:
    def test_a_text_is_a_prompt(self, service: GenerateService) -> None:
        assert service.from_v1({"instances": ["Hi"]}) == [ChatRequest((Turn("user", ("Hi",)),), DEFAULTS)]

    def test_images_come_before_the_text_and_the_system_first(self, service: GenerateService) -> None:
        (request,) = service.from_v1(
            {"instances": [{"prompt": "Hi", "system_prompt": "Be brief.", "images": [TEXT, "https://a/b"], "seed": 3}]}
        )
        assert request.turns == (
            Turn("system", ("Be brief.",)),
            Turn("user", (ImageBytes(PNG), ImageUrl("https://a/b"), "Hi")),
        )
        assert request.sampling == Sampling(4000, 0.7, 0.9, 3)

    @pytest.mark.parametrize("system", [None, "", "  "])
    def test_no_system_prompt_no_turn(self, service: GenerateService, system: str | None) -> None:
        (request,) = service.from_v1({"instances": [{"prompt": "Hi", "system_prompt": system}]})
        assert [turn.role for turn in request.turns] == ["user"]

    @pytest.mark.parametrize("instance", [{}, {"prompt": " "}, {"image": TEXT}, {"prompt": ["x"]}, 5, None, ["x"]])
    def test_without_a_prompt(self, service: GenerateService, instance: object) -> None:
        with pytest.raises(SightlineError) as raised:
            service.from_v1({"instances": [instance]})
        assert raised.value.status in (400, 422)


class TestV2:
    def request(self, *tensors: v2.Tensor, **parameters: v2.Scalar) -> v2.InferRequest:
        return v2.InferRequest(tensors, parameters)

    def test_all_images_are_one_prompt_s(self, service: GenerateService) -> None:
        (request,) = service.from_v2(
            self.request(
                v2.Tensor.of_texts("prompt", ["Hi"]),
                v2.Tensor.of_bytes("image", [PNG, b"https://a/b"]),
                v2.Tensor.of_texts("system", ["Be brief."]),
                max_tokens=7,
                temperature=0,
            )
        )
        assert request.turns[1].parts == (ImageBytes(PNG), ImageUrl("https://a/b"), "Hi")
        assert (request.sampling.max_tokens, request.sampling.temperature) == (7, 0)

    @pytest.mark.parametrize(
        "tensors",
        [
            (),
            (v2.Tensor.of_texts("prompt", ["a", "b"]),),
            (v2.Tensor.of_texts("prompt", []),),
            (v2.Tensor.of_texts("prompt", ["a"]), v2.Tensor.of_texts("system", ["a", "b"])),
            (v2.Tensor.of_texts("prompt", ["a"]), v2.Tensor.of_bytes("image", [PNG] * 9)),
            (v2.Tensor.of_texts("prompt", ["a"]), v2.Tensor.of_texts("other", ["a"])),
        ],
        ids=["nothing", "two prompts", "no element", "two systems", "nine images", "an unknown input"],
    )
    def test_bad_requests(self, service: GenerateService, tensors: tuple[v2.Tensor, ...]) -> None:
        with pytest.raises((BadRequest, InvalidParameter)):
            service.from_v2(self.request(*tensors))


class TestConversations:
    def test_turns_are_taken_as_they_are(self, service: GenerateService) -> None:
        turns = [
            Turn("system", ("a",)),
            Turn("user", (ImageBytes(PNG),)),
            Turn("assistant", ("b",)),
            Turn("user", ("c",)),
        ]
        assert service.from_chat(turns, {"max_tokens": 5}) == ChatRequest(tuple(turns), Sampling(5, 0.7, 0.9))

    @pytest.mark.parametrize(
        "turns", [[], [Turn("assistant", ("x",))], [Turn("user", ())], [Turn("user", (" ",))]], ids=str
    )
    def test_somebody_must_ask(self, service: GenerateService, turns: Sequence[Turn]) -> None:
        with pytest.raises(BadRequest) as raised:
            service.from_chat(turns, {})
        assert raised.value.code == "text_missing"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(max_position_embeddings=4096)
    return write_checkpoint(tmp_path_factory.mktemp("kimi"), model, max_position_embeddings=4096)


@pytest.fixture
async def loaded(checkpoint: Path) -> AsyncIterator[GenerateService]:
    service = GenerateService(settings(model=str(checkpoint), quantization="none"))
    await service.load()
    yield service
    await service.close()


def context() -> Context:
    return Context("r-1", Deadline.after(120))


async def run(service: GenerateService, *requests: ChatRequest) -> list[Completion | OutOfMemory]:
    return await service.predict(await service.preprocess(requests, context()), context())


def ask(*images: bytes, sampling: Sampling = Sampling(max_tokens=6)) -> ChatRequest:  # noqa: B008 - frozen
    return ChatRequest((Turn("user", (*(ImageBytes(data) for data in images), "hello")),), sampling)


class TestWithAModel:
    async def test_metadata_counts_the_bytes_of_the_weights(self, loaded: GenerateService, checkpoint: Path) -> None:
        said = loaded.metadata()
        assert said["quantization"] == "none"
        assert said["bytes_float32"] == pytest.approx((checkpoint / "model.safetensors").stat().st_size, rel=0.05)

    async def test_text_and_images_in_one_call(self, loaded: GenerateService) -> None:
        requests = [ask(), ask(PNG), ask(PNG, png((300, 60)))]
        outcomes = await run(loaded, *requests)
        tokens = [item.usage.image_tokens for item in outcomes if isinstance(item, Completion)]
        assert tokens[0] == 0
        assert 0 < (tokens[1] or 0) < (tokens[2] or 0)
        alone = [(await run(loaded, request))[0] for request in requests]
        assert [item.text for item in outcomes] == [item.text for item in alone]  # type: ignore[union-attr]

    async def test_a_seed_repeats(self, loaded: GenerateService) -> None:
        def seeded(seed: int) -> ChatRequest:
            return ask(PNG, sampling=Sampling(8, 2.0, 1.0, seed))

        one, again, other = [(await run(loaded, seeded(seed)))[0] for seed in (1, 1, 2)]
        assert one.text == again.text  # type: ignore[union-attr]
        assert one.text != other.text  # type: ignore[union-attr]

    async def test_a_stream_is_the_answer_in_pieces(self, loaded: GenerateService) -> None:
        *pieces, end = [part async for part in loaded.stream(ask(PNG), context())]
        (whole,) = await run(loaded, ask(PNG))
        assert isinstance(end, Completion)
        assert isinstance(whole, Completion)
        assert "".join(pieces) == end.text == whole.text

    @pytest.mark.parametrize("size", [(600, 400), (2000, 1500), (100, 900)])
    async def test_too_small_a_device_sees_half_the_pixels(
        self, loaded: GenerateService, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (before,) = await run(loaded, ask(png(size)))
        assert isinstance(before, Completion)
        full = before.usage.image_tokens or 0
        model: Any = loaded._conversations.model  # type: ignore[union-attr]
        prefill = model.prefill

        def tight(batch: Sequence[Any], *arguments: Any) -> Any:
            if any(prompt.image_tokens >= full for prompt in batch):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return prefill(batch, *arguments)

        monkeypatch.setattr(model, "prefill", tight)
        (made,) = await run(loaded, ask(png(size)))
        assert isinstance(made, Completion)
        assert made.downscaled
        assert full / 3 < (made.usage.image_tokens or 0) < full * 0.65

    async def test_a_text_that_does_not_fit_has_nothing_to_shrink(
        self, loaded: GenerateService, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[int] = []

        def full(batch: Sequence[Any], *arguments: Any) -> Any:
            calls.append(len(batch))
            raise MemoryError

        monkeypatch.setattr(loaded._conversations.model, "prefill", full)  # type: ignore[union-attr]
        with pytest.raises(OutOfMemory):
            await run(loaded, ask())
        assert calls == [1]
