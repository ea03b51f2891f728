"""Images to patches, and the published tiktoken file to a tokenizer that reads as tiktoken does."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer

from sightline.models.kimi_vl import KimiVLImageProcessor
from sightline.models.kimi_vl.processing import PUBLISHED_IDS, RESERVED_TOKENS, control_ids
from sightline.models.loading import LoadFailed
from tests.unit.checkpoints import change_config, copy_of
from tests.unit.kimi.small import ranks, raw_config


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> Any:
    return AutoTokenizer.from_pretrained(checkpoint)


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def published_patches(image: Image.Image, limit: int = 4096, side: int = 14) -> tuple[np.ndarray, tuple[int, int]]:
    """The published steps, on PIL and numpy: shrink, pad at the right and bottom with black, normalise, cut."""
    width, height = image.size
    if (count := (width // side) * (height // side)) > limit:
        scale = math.sqrt(limit / count)
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    pixels = np.pad(pixels, ((0, -pixels.shape[0] % (2 * side)), (0, -pixels.shape[1] % (2 * side)), (0, 0)))
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    cut = (pixels / 255 - 0.5) / 0.5
    cut = cut.reshape(rows, side, columns, side, 3).transpose(0, 2, 4, 1, 3)
    return cut.reshape(-1, 3, side, side), (rows, columns)


class TestImages:
    @pytest.mark.parametrize("size", [(28, 28), (84, 56), (100, 61), (27, 300), (5, 3), (1, 1), (500, 3)])
    def test_become_the_published_patches(self, size: tuple[int, int]) -> None:
        image = noise(*size)
        expected, grid = published_patches(image)

        out = KimiVLImageProcessor()(image, return_tensors="pt")

        assert out["image_grid_thw"].tolist() == [[1, *grid]]
        np.testing.assert_allclose(out["pixel_values"].numpy(), expected, atol=1e-6)

    def test_above_the_limit_are_shrunk_as_published(self) -> None:
        smooth = noise(30, 20).resize((1500, 1000), Image.Resampling.BICUBIC)
        expected, grid = published_patches(smooth)

        out = KimiVLImageProcessor()(smooth, return_tensors="pt")

        assert out["image_grid_thw"].tolist() == [[1, *grid]]
        assert grid[0] * grid[1] < 1.1 * 4096
        assert np.abs(out["pixel_values"].numpy() - expected).max() < 2.5 / 127.5  # two steps of a byte

    def test_several_stand_one_after_the_other(self) -> None:
        images = [noise(28, 28), noise(84, 56), noise(30, 30)]

        out = KimiVLImageProcessor()(images, return_tensors="pt")

        parts = out["pixel_values"].split(out["image_grid_thw"].prod(-1).tolist())
        for image, part in zip(images, parts, strict=True):
            np.testing.assert_allclose(part.numpy(), published_patches(image)[0], atol=1e-6)

    def test_the_published_file_is_understood(self, checkpoint: Path, tmp_path: Path) -> None:
        folder = copy_of(checkpoint, tmp_path)
        change_config(folder, lambda file: file.update(in_token_limit=8), "preprocessor_config.json")

        processor = AutoProcessor.from_pretrained(folder).image_processor

        assert (processor.max_patches, processor.merge_size, processor.patch_size) == (8, 2, 14)
        assert processor(noise(200, 200), return_tensors="pt")["image_grid_thw"].prod() <= 16

    def test_cutting_instead_of_padding_is_refused(self) -> None:
        with pytest.raises(ValueError, match="pad_input"):
            KimiVLImageProcessor(pad_input=False)

    def test_stand_in_a_text_for_as_many_tokens_as_they_have(self, checkpoint: Path) -> None:
        processor = AutoProcessor.from_pretrained(checkpoint)

        text = "<|media_pad|> and <|media_pad|>"
        out = processor(text=text, images=[[noise(56, 84), noise(28, 28)]], return_tensors="pt")

        ids = out["input_ids"][0].tolist()
        pad = raw_config()["media_placeholder_token_id"]
        assert ids == [*[pad] * 6, *processor.tokenizer.encode(" and "), pad]


# What `processing.SPLIT` says, with another engine and without the intersection of classes.
_UP = r"(?:(?!\p{Han})[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}])"
_LOW = r"(?:(?!\p{Han})[\p{Ll}\p{Lm}\p{Lo}\p{M}])"
_TAIL = r"(?:'(?i:s|t|re|ve|m|ll|d))?"
_PIECE = regex.compile(
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?(?:{_UP}*{_LOW}+|{_UP}+{_LOW}*){_TAIL}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_by_hand(text: str, table: dict[bytes, int]) -> list[int]:
    """What tiktoken does: of a piece's neighbours join the pair of the lowest rank, until none has one."""
    ids: list[int] = []
    for piece in _PIECE.findall(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            joined = [(table.get(left + right, math.inf), at) for at, (left, right) in enumerate(pairwise(parts))]
            rank, at = min(joined, default=(math.inf, 0))
            if rank == math.inf:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [table[part] for part in parts]
    return ids


class TestTokenizer:
    @pytest.mark.parametrize(
        "text",
        [
            "hello world",
            "Hello  world\n\n 12345 你好，world",
            "I'LL don't x'S",
            "éàü ÅÄ 漢字かなHELLOworld",
            "  \n\t x",
            "",
        ],
    )
    def test_reads_as_tiktoken_does(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.encode(text) == read_by_hand(text, ranks())

    @given(st.text(st.sampled_from("helo wrdWHI'st19 \n\té你好，!.かÅ̈"), max_size=40))
    def test_reads_any_text_as_tiktoken_does(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.encode(text) == read_by_hand(text, ranks())

    @given(st.text(max_size=40))
    def test_gives_any_text_back(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_has_the_control_tokens_and_the_reserved_ones_behind_the_ranks(self, tokenizer: Any) -> None:
        first = len(ranks())

        assert len(tokenizer) == first + RESERVED_TOKENS
        for token, at in PUBLISHED_IDS.items():
            assert tokenizer.convert_tokens_to_ids(token) == first + at - PUBLISHED_IDS["[BOS]"]
        assert tokenizer.convert_ids_to_tokens(first + 5) == f"<|reserved_token_{first + 5}|>"

    def test_of_a_folder_with_tokenizer_json_is_that(self, tokenizer: Any, checkpoint: Path, tmp_path: Path) -> None:
        folder = copy_of(checkpoint, tmp_path)
        tokenizer.save_pretrained(folder)
        (folder / "tiktoken.model").unlink()

        again = AutoTokenizer.from_pretrained(folder)

        assert (folder / "tokenizer.json").exists()
        text = "<|im_user|>user<|im_middle|>hello 你好<|im_end|>"
        assert again.encode(text) == tokenizer.encode(text)


class TestControlTokens:
    def test_are_found(self, tokenizer: Any) -> None:
        ids = control_ids(tokenizer, raw_config()["media_placeholder_token_id"])

        assert set(ids) == set(PUBLISHED_IDS)
        assert len(set(ids.values())) == len(ids)

    def test_an_absent_one_is_refused(self, checkpoint: Path, tmp_path: Path) -> None:
        folder = copy_of(checkpoint, tmp_path)

        def forget(file: dict[str, Any]) -> None:
            tokens = file["added_tokens_decoder"]
            file["added_tokens_decoder"] = {
                at: value for at, value in tokens.items() if "middle" not in value["content"]
            }
            file["additional_special_tokens"].remove("<|im_middle|>")

        change_config(folder, forget, "tokenizer_config.json")

        with pytest.raises(LoadFailed, match=r"<\|im_middle\|>"):
            control_ids(AutoTokenizer.from_pretrained(folder), raw_config()["media_placeholder_token_id"])

    def test_another_id_of_images_is_refused(self, tokenizer: Any) -> None:
        with pytest.raises(LoadFailed, match="to the model"):
            control_ids(tokenizer, raw_config()["media_placeholder_token_id"] + 1)

    def test_of_the_published_vocabulary_have_the_published_ids(self, tokenizer: Any) -> None:
        with pytest.raises(LoadFailed, match="not at 163584"):
            control_ids(tokenizer, PUBLISHED_IDS["<|media_pad|>"])
