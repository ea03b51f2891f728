"""ColQwen2.5 with our small checkpoint: mechanics. How well it retrieves: `tests/unit/tiny/test_embedder.py`."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from sightline.engines.packing import packs
from sightline.errors import DeadlineExceeded, InternalError, InvalidParameter
from sightline.models.colqwen import ColQwen, Item, Vectors, golden_page, pool
from sightline.models.loading import LoadFailed
from sightline.settings import TINY, EmbedSettings
from tests.unit.checkpoints import DAMAGE, Weights, change_config, change_weights, copy_of

CHECKPOINT = TINY / "embed"
QUERIES = ("red", "a small red circle above a large blue star on a gray background", "what is this? " * 30)
SIZES = ((320, 200), (90, 400), (400, 90), (64, 64))


def load(model: Path = CHECKPOINT, **options: object) -> ColQwen:
    return ColQwen(EmbedSettings(_env_file=None, auth="off", model=str(model), device="cpu", threads=1, **options))


@pytest.fixture(scope="module")
def model() -> ColQwen:
    return load()


def picture(color: str = "red", size: tuple[int, int] = (320, 200)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle((size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2), fill=color)
    return image


@pytest.fixture(scope="module")
def items(model: ColQwen) -> list[Item]:
    """Pages and queries of many lengths, mixed."""
    pages = [model.preprocess_page(picture(size=size)) for size in SIZES]
    queries = [model.preprocess_query(text) for text in QUERIES]
    return [queries[0], pages[0], queries[2], *pages[1:], queries[1]]


@pytest.fixture(scope="module")
def alone(model: ColQwen, items: list[Item]) -> list[Vectors]:
    """What each item is when nothing shares its forward."""
    return [model.encode([item])[0] for item in items]


def least_cosine(left: Vectors, right: Vectors) -> float:
    """Of two items' vectors, token by token."""
    assert left.shape == right.shape
    return float((left * right).sum(axis=1).min())


class TestPages:
    def test_the_span_is_the_run_of_image_tokens_of_the_unpadded_sequence(self, model: ColQwen) -> None:
        item = model.preprocess_page(picture())

        start, length = item.span
        is_image = item.input_ids == model.image_token_id
        assert is_image.nonzero()[:, 0].tolist() == list(range(start, start + length))
        assert torch.equal(item.token_types == 1, is_image)

    @pytest.mark.parametrize("size", [(3, 3), (28, 28), (600, 3), (3, 600), (1000, 700), *SIZES])
    def test_the_patches_are_those_that_the_processor_announced(self, model: ColQwen, size: tuple[int, int]) -> None:
        item = model.preprocess_page(picture(size=size))

        across, down = item.patches
        assert (across, down) == model.patches(*size)
        assert across * down == item.span[1]
        assert item.grid.tolist() == [[1, down * model.spatial_merge_size, across * model.spatial_merge_size]]

    def test_wide_pages_have_more_patches_across_than_down(self, model: ColQwen) -> None:
        across, down = model.patches(800, 400)
        assert across > down

    def test_a_size_beyond_the_processor_is_refused(self, model: ColQwen) -> None:
        with pytest.raises(InvalidParameter) as caught:
            model.patches(1000, 4)
        assert caught.value.code == "image_size_unsupported"

    def test_a_page_seen_at_half_its_pixels_has_about_half_its_patches(self, tmp_path: Path) -> None:
        folder = copy_of(CHECKPOINT, tmp_path)
        roomy = {"shortest_edge": 12 * 12, "longest_edge": 144 * 144}
        change_config(folder, lambda c: c["image_processor"].update(size=roomy), "processor_config.json")
        model = load(folder)

        whole = model.preprocess_page(picture(size=(1200, 1200)))
        half = model.preprocess_page(picture(size=(1200, 1200)), is_halved=True)

        assert whole.span[1] == 144
        assert 60 <= half.span[1] <= 75
        assert model.encode([half])[0].shape == (half.tokens, model.dim)


class TestQueries:
    def test_keep_their_augmentation_tokens(self, model: ColQwen) -> None:
        tokens = model.token_texts(model.preprocess_query("red circle"))

        assert model.augmentation == 10
        assert tokens[-10:] == ["<|endoftext|>"] * 10
        assert "".join(tokens[:-10]) == "red circle"

    @pytest.mark.parametrize(
        "text",
        ["<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "<|endoftext|>", "<|<|im_end|>im_end|>"],
    )
    def test_control_tokens_in_a_text_are_only_text(self, model: ColQwen, text: str) -> None:
        special = set(model._processor.tokenizer.all_special_ids)

        ids = model.preprocess_query(text).input_ids.tolist()

        assert not special & set(ids[: -model.augmentation])

    def test_longer_than_the_model_reads_are_refused_before_they_cost_memory(self, model: ColQwen) -> None:
        with pytest.raises(InvalidParameter) as caught:
            model.preprocess_query("é" * 8192)
        assert caught.value.code == "prompt_too_long"


class TestVectors:
    def test_have_unit_length_and_one_row_a_token(
        self, model: ColQwen, items: list[Item], alone: list[Vectors]
    ) -> None:
        for item, vectors in zip(items, alone, strict=True):
            assert vectors.shape == (item.tokens, model.dim)
            assert vectors.dtype == np.float32
            assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)

    def test_are_those_of_colpali_engine(self, model: ColQwen) -> None:
        from colpali_engine.models import ColQwen2_5

        page, text = picture(), QUERIES[1]
        theirs = ColQwen2_5.from_pretrained(CHECKPOINT).eval()
        with torch.no_grad():
            seen = theirs(**model._processor.process_images([page]))[0].numpy()
            said = theirs(**model._processor.process_queries([text]))[0].numpy()

        mine = model.encode([model.preprocess_page(page), model.preprocess_query(text)])

        assert np.abs(mine[0] - seen).max() < 1e-5
        assert np.abs(mine[1] - said).max() < 1e-5

    def test_are_the_same_alone_and_in_one_mixed_batch(
        self, model: ColQwen, items: list[Item], alone: list[Vectors]
    ) -> None:
        for mine, single in zip(model.encode(items), alone, strict=True):
            assert least_cosine(mine, single) >= 0.9999

    def test_are_the_same_padded_to_any_length(self, model: ColQwen, items: list[Item], alone: list[Vectors]) -> None:
        """One forward for all of them: queries stand beside pages many times as long."""
        for mine, single in zip(model._forward(items), alone, strict=True):
            assert least_cosine(mine, single) >= 0.9999

    @settings(max_examples=25)
    @given(data=st.data())
    def test_are_the_same_in_any_company(
        self, model: ColQwen, items: list[Item], alone: list[Vectors], data: st.DataObject
    ) -> None:
        chosen = data.draw(st.lists(st.sampled_from(range(len(items))), min_size=1, max_size=9))

        for index, mine in zip(chosen, model.encode([items[index] for index in chosen]), strict=True):
            assert least_cosine(mine, alone[index]) >= 0.9999

    def test_depend_on_where_a_patch_lies(self, model: ColQwen) -> None:
        page = picture()
        left, right = (model.encode([model.preprocess_page(image)])[0] for image in (page, page.transpose(0)))
        assert least_cosine(left, right) < 0.99

    def test_nobody_waits_for_are_not_made(self, model: ColQwen, items: list[Item], alone: list[Vectors]) -> None:
        results = model.encode(items, is_abandoned=lambda index: index == 1)

        assert isinstance(results[1], DeadlineExceeded)
        assert least_cosine(results[0], alone[0]) >= 0.9999

    def test_that_are_not_finite_are_an_error(self, model: ColQwen, items: list[Item]) -> None:
        class Broken(torch.nn.Module):
            def forward(self, hidden: torch.Tensor) -> torch.Tensor:
                return torch.full((*hidden.shape[:2], model.dim), float("nan"))

        broken = object.__new__(ColQwen)
        broken.__dict__ |= model.__dict__
        broken._model = _with_projection(model, Broken())

        with pytest.raises(InternalError) as caught:
            broken.encode(items[:1])
        assert caught.value.code == "output_not_finite"


def _with_projection(model: ColQwen, projection: torch.nn.Module) -> torch.nn.Module:
    import copy

    changed = copy.copy(model._model)
    changed._modules = dict(changed._modules) | {"custom_text_proj": projection}
    return changed


class TestPacks:
    @given(
        lengths=st.lists(st.integers(1, 500), max_size=40),
        max_items=st.integers(1, 8),
        max_tokens=st.integers(1, 3000),
    )
    def test_hold_every_item_once_within_both_budgets(
        self, lengths: list[int], max_items: int, max_tokens: int
    ) -> None:
        found = packs(lengths, max_items, max_tokens)

        assert sorted(index for pack in found for index in pack) == list(range(len(lengths)))
        for pack in found:
            longest = max(lengths[index] for index in pack)
            assert len(pack) <= max_items
            assert len(pack) == 1 or len(pack) * longest <= max_tokens
            assert all(2 * lengths[index] >= longest for index in pack)

    def test_queries_are_not_padded_to_the_length_of_pages(self) -> None:
        assert packs([20, 780, 22, 780], 8, 10_000) == [[1, 3], [2, 0]]


class TestPooling:
    @pytest.mark.parametrize("factor", [2, 3, 1000])
    def test_leaves_about_a_part_of_the_vectors_all_of_unit_length(self, alone: list[Vectors], factor: int) -> None:
        page = alone[1]
        pooled = pool(page, factor)

        assert 1 <= len(pooled) <= max(1, len(page) // factor)
        assert np.allclose(np.linalg.norm(pooled, axis=1), 1, atol=1e-5)

    def test_by_one_changes_nothing(self, alone: list[Vectors]) -> None:
        assert pool(alone[1], 1) is alone[1]

    def test_of_a_single_vector_changes_nothing(self, alone: list[Vectors]) -> None:
        assert np.array_equal(pool(alone[1][:1], 3), alone[1][:1])


class TestLoading:
    def test_a_small_model_says_what_it_is(self, model: ColQwen) -> None:
        assert model.info.name == "sightline-tiny-colqwen2.5"
        assert model.info.demo
        assert len(model.info.revision) == 12
        assert (model.runtime.device, model.runtime.dtype) == ("cpu", "torch.float32")
        assert model.dim == 128
        assert model.flash_attention is False

    def test_the_golden_checksum_is_repeatable_and_the_weights_own(self, model: ColQwen, tmp_path: Path) -> None:
        folder = copy_of(CHECKPOINT, tmp_path)
        change_weights(folder, lambda weights: weights["custom_text_proj.bias"].add_(0.1))

        assert load().golden == model.golden
        assert load(folder).golden != model.golden

    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
    def test_damaged_weights_are_never_served(self, damage: Callable[[Weights], None], tmp_path: Path) -> None:
        folder = copy_of(CHECKPOINT, tmp_path)
        change_weights(folder, damage)

        with pytest.raises(LoadFailed):
            load(folder)

    def test_a_missing_projection_is_never_made_up(self, tmp_path: Path) -> None:
        """The describer has all the weights but the projection."""
        folder = copy_of(TINY / "describe", tmp_path)

        with pytest.raises(LoadFailed, match="custom_text_proj"):
            load(folder)

    def test_a_head_of_the_language_model_is_not_missed(self, model: ColQwen, tmp_path: Path) -> None:
        folder = copy_of(CHECKPOINT, tmp_path)
        change_weights(folder, lambda weights: weights.update({"lm_head.weight": torch.zeros(563, 128)}))

        assert load(folder).golden == model.golden

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            (lambda w: w["custom_text_proj.weight"].fill_(float("nan")), "not finite"),
            (lambda w: (w["custom_text_proj.weight"].zero_(), w["custom_text_proj.bias"].zero_()), "no length"),
        ],
        ids=["not a number", "zero"],
    )
    def test_weights_that_give_no_vectors_are_not_served(
        self, change: Callable[[Weights], None], fault: str, tmp_path: Path
    ) -> None:
        folder = copy_of(CHECKPOINT, tmp_path)
        change_weights(folder, change)

        with pytest.raises(LoadFailed, match=fault):
            load(folder)

    def test_a_model_that_ignores_where_patches_lie_is_not_served(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import Qwen2_5_VLModel

        forward = Qwen2_5_VLModel.forward

        def blind(self: Qwen2_5_VLModel, *args: object, **options: object) -> object:
            options.pop("mm_token_type_ids", None)
            return forward(self, *args, **options)

        monkeypatch.setattr(Qwen2_5_VLModel, "forward", blind)

        with pytest.raises(LoadFailed, match="mm_token_type_ids"):
            load()

    def test_another_kind_of_model_is_refused(self) -> None:
        with pytest.raises(LoadFailed, match="not a qwen2_5_vl"):
            load(TINY / "enhance")

    def test_pickled_weights_are_never_read(self, tmp_path: Path) -> None:
        folder = copy_of(CHECKPOINT, tmp_path)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

        with pytest.raises((LoadFailed, OSError)):
            load(folder)


# --- adapters ---


TARGETS = r"(.*(model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$|.*(custom_text_proj).*$)"
"""As in the published adapter's configuration."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter over our checkpoint in the published layout: `model.layers`, processor files beside it."""
    from colpali_engine.models import ColQwen2_5
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    wrapped = get_peft_model(
        ColQwen2_5.from_pretrained(CHECKPOINT),
        LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False, task_type="FEATURE_EXTRACTION"),
    )
    wrapped.save_pretrained(folder)
    change_config(folder, lambda c: c.update(base_model_name_or_path=str(CHECKPOINT)), "adapter_config.json")
    file = folder / "adapter_model.safetensors"
    old = {name.replace(".language_model.layers", ".model.layers"): t for name, t in load_file(file).items()}
    assert any(".model.model.layers" in name for name in old)
    save_file(old, file, metadata={"format": "pt"})
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
    return folder


def change_adapter(folder: Path, change: Callable[[Weights], None]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


class TestAdapters:
    def test_are_merged_into_their_base(self, adapter: Path) -> None:
        """Held to a sum written out by hand for each matrix."""
        merged = load(adapter)

        base = load_file(CHECKPOINT / "model.safetensors")
        lora = load_file(adapter / "adapter_model.safetensors")
        state = merged._model.state_dict()
        changed = 0
        for name, before in base.items():
            plain = re.sub(r"^model\.", "language_model.", name)
            key = "base_model.model." + name.removesuffix(".weight")
            after = before
            if f"{key}.lora_A.weight" in lora:
                after = before + 2 * lora[f"{key}.lora_B.weight"] @ lora[f"{key}.lora_A.weight"]
                changed += 1
            assert torch.allclose(state[plain], after, atol=1e-5), plain
        assert changed == len(lora) // 2 == 3 * 7 + 1

    def test_change_the_vectors(self, adapter: Path, model: ColQwen) -> None:
        merged = load(adapter)

        mine, base = (m.encode([m.preprocess_page(golden_page())])[0] for m in (merged, model))

        assert least_cosine(mine, base) < 0.99

    def test_give_the_model_their_own_name_and_revision(self, adapter: Path, model: ColQwen) -> None:
        info = load(adapter).info

        assert info.name == adapter.name
        assert info.revision != model.info.revision

    def test_may_be_put_on_another_base(self, adapter: Path, tmp_path: Path) -> None:
        folder = tmp_path / "moved"
        shutil.copytree(adapter, folder)
        change_config(folder, lambda c: c.update(base_model_name_or_path="nobody/nowhere"), "adapter_config.json")

        assert load(folder, base_model=str(CHECKPOINT)).golden == load(adapter).golden

    @pytest.mark.parametrize(
        "damage",
        [
            lambda weights: weights.pop(sorted(weights)[0]),
            lambda weights: weights.update(
                {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(1)}
            ),
            lambda weights: weights.update(
                {name.replace(".model.layers", ".decoder.layers"): weights.pop(name) for name in list(weights)}
            ),
        ],
        ids=["one tensor missing", "one too many", "names of another layout"],
    )
    def test_that_do_not_fit_their_base_are_never_served(
        self, damage: Callable[[Weights], object], adapter: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "damaged"
        shutil.copytree(adapter, folder)
        change_adapter(folder, damage)

        with pytest.raises(LoadFailed, match="do not match the base"):
            load(folder)

    def test_pickled_ones_are_never_read(self, adapter: Path, tmp_path: Path) -> None:
        folder = tmp_path / "pickled"
        shutil.copytree(adapter, folder)
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()

        with pytest.raises(LoadFailed, match="an adapter without"):
            load(folder)

    def test_of_another_kind_are_refused(self, adapter: Path, tmp_path: Path) -> None:
        folder = tmp_path / "prefix"
        shutil.copytree(adapter, folder)
        change_config(folder, lambda c: c.update(peft_type="PREFIX_TUNING"), "adapter_config.json")

        with pytest.raises(LoadFailed, match="LoRA"):
            load(folder)


class TestPublishedProcessor:
    """Contract C4: with the pixel limits of colqwen2.5-v0.2 (768 visual tokens of 28 x 28 pixels)."""

    @pytest.mark.parametrize(
        ("size", "patches"),
        [
            ((1024, 768), (32, 24)),
            ((512, 512), (18, 18)),
            ((512, 600), (18, 21)),
            ((640, 427), (23, 15)),
            ((1411, 1411), (27, 27)),
            ((448, 172), (16, 6)),
            ((384, 191), (14, 7)),
        ],
    )
    def test_cuts_pages_as_the_original_does(
        self, model: ColQwen, size: tuple[int, int], patches: tuple[int, int], tmp_path: Path
    ) -> None:
        shutil.copytree(CHECKPOINT, tmp_path / "v0.2")
        path = tmp_path / "v0.2" / "processor_config.json"
        config = json.loads(path.read_text())
        published = {"patch_size": 14, "merge_size": 2, "size": {"shortest_edge": 3136, "longest_edge": 768 * 28 * 28}}
        config["image_processor"].update(published)
        path.write_text(json.dumps(config))
        from colpali_engine.models import ColQwen2_5_Processor

        shown = object.__new__(ColQwen)
        shown.__dict__ |= model.__dict__
        shown._processor = ColQwen2_5_Processor.from_pretrained(tmp_path / "v0.2")
        shown.spatial_merge_size = 2

        assert shown.patches(*size) == patches
