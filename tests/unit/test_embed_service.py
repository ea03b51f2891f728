"""The embed service around a loaded model: pages that do not fit the device, and what each protocol says of them."""

import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import orjson
import pytest
from PIL import Image

from sightline import v2
from sightline.errors import BadRequest, InvalidImage, InvalidParameter, OutOfMemory, Unavailable
from sightline.models.colqwen import ColQwen, Item
from sightline.services.embed import EmbedService
from sightline.services.embed_bodies import Embedding, EmbedRequest, Outcome, tokens_in
from sightline.settings import TINY, EmbedSettings
from sightline.wire import Context, Deadline, ImageBytes
from tests.unit.checkpoints import change_config, copy_of


def png(width: int, height: int) -> ImageBytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return ImageBytes(file.getvalue(), "page.png")


LARGE, SMALL = png(600, 600), png(72, 72)
"""144 and 36 patches of the roomy processor below."""


class Tight(ColQwen):
    """On a device with room for `room` tokens."""

    room = 120

    def encode(self, batch: Sequence[Item], *options: object) -> list:
        if max(item.tokens for item in batch) > self.room:
            raise MemoryError
        return super().encode(batch, *options)


class Service(EmbedService):
    def _load_model(self) -> ColQwen:
        return Tight(self._settings)


def context() -> Context:
    return Context("an id", Deadline.after(60))


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[EmbedService]:
    """Its processor takes pages as they are, so that half the pixels are half the patches."""
    folder = copy_of(TINY / "embed", tmp_path)
    roomy = {"shortest_edge": 12 * 12, "longest_edge": 144 * 144}
    change_config(folder, lambda c: c["image_processor"].update(size=roomy), "processor_config.json")
    service = Service(EmbedSettings(_env_file=None, auth="off", model=str(folder), device="cpu", threads=1))
    await service.load()
    yield service
    await service.close()


async def embed(service: EmbedService, *requests: EmbedRequest) -> Sequence[Outcome]:
    return await service.predict(await service.preprocess(requests, context()), context())


async def test_a_page_that_does_not_fit_is_seen_at_half_its_pixels(service: EmbedService):
    large, small, query = await embed(service, EmbedRequest(LARGE), EmbedRequest(SMALL), EmbedRequest("red"))

    assert isinstance(large, Embedding)
    assert large.downscaled
    assert 60 <= large.usage.image_tokens <= 75
    assert large.patches[0] * large.patches[1] == large.usage.image_tokens == large.span[1]
    assert not small.downscaled
    assert small.patches == (6, 6)
    assert not query.downscaled


async def test_a_page_that_does_not_fit_at_half_its_pixels_fails_alone(service: EmbedService, monkeypatch):
    monkeypatch.setattr(Tight, "room", 50)

    results = await embed(service, EmbedRequest(SMALL), EmbedRequest(LARGE), EmbedRequest("red"))

    assert [type(item) for item in results] == [Embedding, OutOfMemory, Embedding]
    predictions = service.to_v1(results)["predictions"]
    assert predictions[1] == {"error": results[1].message, "code": "out_of_memory", "http_status": 507}
    response = service.to_v2(results)
    offsets = response.output("offsets").data.tolist()
    assert offsets[1] == offsets[2] < offsets[3] == len(response.output("vectors").data)
    assert response.output("image_span").data.tolist()[1:] == [[-1, 0], [-1, 0]]
    errors = orjson.loads(response.parameters["item_errors"])
    assert errors[0] is errors[2] is None
    assert errors[1]["http_status"] == 507


async def test_a_page_that_stands_alone_is_507(service: EmbedService, monkeypatch):
    monkeypatch.setattr(Tight, "room", 50)

    with pytest.raises(OutOfMemory):
        await embed(service, EmbedRequest(LARGE))


async def test_a_query_that_does_not_fit_is_not_tried_again(service: EmbedService, monkeypatch):
    monkeypatch.setattr(Tight, "room", 5)

    with pytest.raises(OutOfMemory):
        await embed(service, EmbedRequest("red"))


async def test_queries_are_never_pooled(service: EmbedService):
    plain, pooled = await embed(service, EmbedRequest("a red circle"), EmbedRequest("a red circle", pool_factor=3))

    assert np.array_equal(plain.vectors, pooled.vectors)


async def test_a_refused_image_is_named_by_its_label(service: EmbedService):
    with pytest.raises(InvalidImage) as caught:
        await service.preprocess([EmbedRequest(ImageBytes(b"no image"), label="a.png")], context())
    assert caught.value.message.startswith("a.png: ")


async def test_fp16_tensors_are_the_same_numbers(service: EmbedService):
    body = {"inputs": [{"name": "query", "datatype": "BYTES", "shape": [1], "data": ["red"]}]}
    half = body | {"parameters": {"dtype": "FP16", "binary_data_output": True}}
    full, packed = [
        service.to_v2(await embed(service, *service.from_v2(v2.parse_request(orjson.dumps(b))))).output("vectors")
        for b in (body, half)
    ]
    assert (full.datatype, packed.datatype) == ("FP32", "FP16")
    assert packed.data.dtype == np.float16
    assert np.abs(packed.data - full.data).max() < 1e-3


def test_before_it_has_loaded_it_says_so():
    service = EmbedService(EmbedSettings(_env_file=None, auth="off"))
    assert service.device is None
    with pytest.raises(Unavailable):
        service.metadata()


def test_an_input_without_elements_is_refused():
    service = EmbedService(EmbedSettings(_env_file=None, auth="off"))
    empty = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [0], "data": []}]}
    with pytest.raises(BadRequest) as caught:
        service.from_v2(v2.parse_request(orjson.dumps(empty)))
    assert caught.value.code == "nothing_to_embed"


def test_tokens_may_come_as_text_in_a_form():
    assert tokens_in({"tokens": "[1, 0, 1]"}, 12, 10) == [1, 0]
    assert tokens_in({}, 12, 10) == [0, 1]
    with pytest.raises(InvalidParameter):
        tokens_in({"tokens": "[1"}, 12, 10)
