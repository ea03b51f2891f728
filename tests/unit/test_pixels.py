"""What the towers get is what the published processors would have made of the same picture, number by number."""

from typing import Any

import numpy as np
import pytest
import torch
from colpali_engine.models import ColQwen2_5_Processor
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoProcessor, BlipImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from sightline.models.blip import Blip
from sightline.models.colqwen import ColQwen
from sightline.models.kimi_vl.processing import KimiVLImageProcessor
from sightline.models.loading import LoadFailed
from sightline.models.pixels import KimiPixels, Levels, Patches, Pixels, QwenPixels, SquarePixels
from sightline.models.qwen_vl import QwenVL
from sightline.settings import BlipSettings, DescribeSettings, EmbedSettings

ODD_SIZES = [(3, 3), (5, 600), (600, 3), (57, 31), (111, 99), (336, 252), (641, 479), (1001, 333), (333, 1999)]

CASES: dict[str, tuple[type[Any], Any]] = {
    "qwen2-vl": (QwenPixels, Qwen2VLImageProcessor()),
    "qwen2.5-vl-7b": (
        QwenPixels,
        Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 640 * 28 * 28}),
    ),
    "colqwen2.5-v0.2": (QwenPixels, Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 768 * 28 * 28})),
    "tiny-qwen": (QwenPixels, Qwen2VLImageProcessor(patch_size=12, merge_size=1)),
    "kimi-vl-a3b": (KimiPixels, KimiVLImageProcessor(in_token_limit=4096, merge_kernel_size=[2, 2])),
    "tiny-kimi": (KimiPixels, KimiVLImageProcessor(in_token_limit=96, patch_size=12)),
    "blip-base": (SquarePixels, BlipImageProcessor()),
}


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Every level next to every other: the hardest picture for a resize to get right."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def by_processor(processor: Any, *images: Image.Image) -> tuple[torch.Tensor, torch.Tensor | None]:
    made = processor(images=list(images), return_tensors="pt")
    return made["pixel_values"], made.get("image_grid_thw")


@pytest.mark.parametrize("size", ODD_SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_processor(case: str, size: tuple[int, int]) -> None:
    kind, processor = CASES[case]
    image = noise(size)
    expected, grid = by_processor(processor, image)

    made: Patches = kind.of(processor).patches(image)

    if grid is None:
        expected, grid = expected[0], torch.ones((1, 3), dtype=torch.int64)
    assert made.values.dtype == torch.float32
    assert torch.equal(made.grid, grid)
    assert made.values.shape == expected.shape
    assert float((made.values - expected).abs().max()) == 0.0


def test_torchvision_transforms_say_the_same_as_the_processors() -> None:
    """Neither our code nor the processors': transforms v2, a loop over patches, float64."""
    processor = Qwen2VLImageProcessor()
    image = noise((201, 149))
    width, height = QwenPixels.of(processor).wanted(image.size)
    steps = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize([height, width], interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.ToDtype(torch.float64, scale=True),
            v2.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    picture = steps(image)
    rows: list[torch.Tensor] = []
    for top in range(0, height, 28):
        for left in range(0, width, 28):
            for y in (top, top + 14):
                for x in (left, left + 14):
                    patch = picture[:, y : y + 14, x : x + 14]
                    rows.append(torch.stack([patch, patch], dim=1).flatten())

    made = QwenPixels.of(processor).patches(image)

    assert float((made.values - torch.stack(rows)).abs().max()) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_images_of_one_prompt_do_not_depend_on_each_other(case: str) -> None:
    kind, processor = CASES[case]
    pair = [noise((130, 97)), noise((130, 97), seed=1)]
    expected, _ = by_processor(processor, *pair)
    apart = [kind.of(processor).patches(image).values for image in pair]
    together = torch.stack(apart) if kind is SquarePixels else torch.cat(apart)
    assert torch.equal(together, expected)


@pytest.mark.parametrize("case", CASES)
def test_a_picture_that_was_decoded_smaller_is_seen_with_the_patches_of_the_whole(case: str) -> None:
    kind, processor = CASES[case]
    pixels: Pixels = kind.of(processor)
    whole, small = noise((1777, 1333)), noise((889, 667))
    assert pixels.patches(small, size=whole.size).values.shape == pixels.patches(whole).values.shape


@pytest.mark.parametrize("case", ["qwen2-vl", "kimi-vl-a3b"])
def test_half_the_pixels_are_half_the_patches(case: str) -> None:
    kind, processor = CASES[case]
    pixels: Pixels = kind.of(processor)
    image = noise((1500, 1100))
    whole, half = len(pixels.patches(image).values), len(pixels.halved(image).values)
    assert 0.42 < half / whole < 0.52


@pytest.mark.parametrize(
    "change", [{"do_resize": False}, {"do_rescale": False}, {"do_normalize": False}, {"resample": 2}], ids=str
)
def test_a_processor_that_is_set_otherwise_is_refused_not_imitated(change: dict[str, Any]) -> None:
    with pytest.raises(LoadFailed):
        Levels.of(Qwen2VLImageProcessor(**change))


class TestWholePrompts:
    """Of the small checkpoints: ids, types and pixels are those of the whole processor, texts included."""

    @pytest.mark.parametrize("size", [(57, 31), (336, 252), (641, 479)], ids=str)
    def test_describe(self, size: tuple[int, int]) -> None:
        settings = DescribeSettings(_env_file=None, auth="off", device="cpu", threads=1)
        model, processor = QwenVL(settings), AutoProcessor.from_pretrained(settings.model)
        images = [noise(size), noise((99, 111))]
        content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        expected = processor(text=[text], images=images, return_tensors="pt")

        prompt = model.preprocess_chat([("user", [images[0], "and", images[1], "?"])])

        assert torch.equal(prompt.input_ids, expected["input_ids"][0])
        assert torch.equal(prompt.token_types, expected["mm_token_type_ids"][0])
        assert torch.equal(prompt.pixel_values, expected["pixel_values"])
        assert torch.equal(prompt.image_grid_thw, expected["image_grid_thw"])

    def test_embed(self) -> None:
        settings = EmbedSettings(_env_file=None, auth="off", device="cpu", threads=1)
        model, processor = ColQwen(settings), ColQwen2_5_Processor.from_pretrained(settings.model)
        for size in ((57, 31), (641, 479)):
            expected = processor.process_images([noise(size)])
            item = model.preprocess_page(noise(size))
            assert item.pixel_values is not None
            assert item.grid is not None
            assert torch.equal(item.input_ids, expected["input_ids"][0])
            assert torch.equal(item.token_types, expected["mm_token_type_ids"][0])
            assert torch.equal(item.pixel_values, expected["pixel_values"][0])
            assert torch.equal(item.grid, expected["image_grid_thw"])

    def test_blip(self) -> None:
        settings = BlipSettings(_env_file=None, auth="off", device="cpu", threads=1)
        model, processor = Blip(settings), AutoProcessor.from_pretrained(settings.model)
        expected, _ = by_processor(processor.image_processor, noise((641, 479)))
        assert torch.equal(model.preprocess(noise((641, 479))).pixel_values, expected[0])
