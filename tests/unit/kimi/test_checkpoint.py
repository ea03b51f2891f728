"""The published file layout: names, shards, what is refused, and that no code of a checkpoint is ever run."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from sightline.models.kimi_vl import (
    KimiVLConfig,
    KimiVLForConditionalGeneration,
    KimiVLImageProcessor,
    KimiVLProcessor,
    TikTokenTokenizer,
    register,
    save_published,
)
from sightline.models.kimi_vl.keys import from_published, to_published
from sightline.models.loading import LoadFailed
from tests.unit.checkpoints import DAMAGE, Weights, change_weights, copy_of
from tests.unit.kimi.small import TEXT, VISION

PUBLISHED = [
    "vision_tower.patch_embed.proj.{weight,bias}",
    "vision_tower.patch_embed.pos_emb.weight",
    "vision_tower.encoder.blocks.{0,1}.{norm0,norm1,wqkv,wo,mlp.fc0,mlp.fc1}.{weight,bias}",
    "vision_tower.encoder.final_layernorm.{weight,bias}",
    "multi_modal_projector.{pre_norm,linear_1,linear_2}.{weight,bias}",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.{0,1,2}.self_attn.{q_proj,kv_a_proj_with_mqa,kv_a_layernorm,kv_b_proj,o_proj}.weight",
    "language_model.model.layers.{0,1,2}.{input_layernorm,post_attention_layernorm}.weight",
    "language_model.model.layers.0.mlp.{gate,up,down}_proj.weight",
    "language_model.model.layers.{1,2}.mlp.experts.{0,1,2,3,4,5,6,7}.{gate,up,down}_proj.weight",
    "language_model.model.layers.{1,2}.mlp.shared_experts.{gate,up,down}_proj.weight",
    "language_model.model.layers.{1,2}.mlp.gate.{weight,e_score_correction_bias}",
    "language_model.model.norm.weight",
    "language_model.lm_head.weight",
]


def expanded(pattern: str) -> list[str]:
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        return [pattern]
    return [name for word in match[1].split(",") for name in expanded(pattern.replace(match[0], word, 1))]


def load(folder: Path) -> KimiVLForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)


class TestNames:
    def test_are_the_published_ones(self, checkpoint: Path) -> None:
        expected = {name for pattern in PUBLISHED for name in expanded(pattern)}

        assert set(load_file(checkpoint / "model.safetensors")) == expected

    def test_there_and_back_is_the_same(self, model: KimiVLForConditionalGeneration) -> None:
        heads = VISION["num_attention_heads"]
        ours = model.state_dict()
        again = {name: torch.full_like(tensor, torch.nan) for name, tensor in ours.items()}

        for name, tensor in to_published(ours, vision_heads=heads).items():
            for piece in from_published(name, tensor, vision_heads=heads):
                piece.place(again[piece.name]).copy_(piece.tensor)

        for name, tensor in ours.items():
            assert torch.equal(again[name], tensor), name

    def test_the_tower_s_queries_and_keys_are_turned_and_its_values_are_not(self) -> None:
        rows = torch.arange(3 * 8)[:, None].float()  # 2 heads of 4 in each third

        pieces = list(from_published("vision_tower.encoder.blocks.0.wqkv.weight", rows, vision_heads=2))

        q, k, v = (piece.tensor[:, 0].tolist() for piece in pieces)
        assert q == [0, 2, 1, 3, 4, 6, 5, 7]
        assert k == [8 + at for at in (0, 2, 1, 3, 4, 6, 5, 7)]
        assert v == list(range(16, 24))

    def test_derived_tables_are_passed_over(self) -> None:
        name = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"

        assert not list(from_published(name, torch.ones(4), vision_heads=2))


class TestFiles:
    def test_are_loaded_as_they_were_saved(self, model: KimiVLForConditionalGeneration, checkpoint: Path) -> None:
        loaded = load(checkpoint)

        assert isinstance(loaded, KimiVLForConditionalGeneration)
        assert not loaded.training
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    def test_in_shards_with_an_index_too(self, model: KimiVLForConditionalGeneration, tmp_path: Path) -> None:
        save_published(model, tmp_path, shard_bytes=100_000)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())

        loaded = load(tmp_path)

        assert len(set(index["weight_map"].values())) == len(list(tmp_path.glob("*.safetensors"))) > 3
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name

    def test_save_pretrained_writes_the_published_layout(
        self, model: KimiVLForConditionalGeneration, checkpoint: Path, tmp_path: Path
    ) -> None:
        model.save_pretrained(tmp_path)

        assert (tmp_path / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()

    def test_are_loaded_in_the_type_that_is_asked_for(self, checkpoint: Path) -> None:
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="bfloat16")

        types = {tensor.dtype for name, tensor in model.state_dict().items() if "correction" not in name}
        assert types == {torch.bfloat16}

    def test_the_router_s_correction_is_never_rounded(
        self, model: KimiVLForConditionalGeneration, checkpoint: Path
    ) -> None:
        loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="bfloat16")

        name = "model.language_model.layers.1.mlp.gate.e_score_correction_bias"
        assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])

    def test_placement_by_transformers_is_refused_rather_than_ignored(self, checkpoint: Path) -> None:
        with pytest.raises(TypeError, match="rooms"):
            AutoModelForImageTextToText.from_pretrained(checkpoint, device_map="auto")


def one_expert_more(weights: Weights) -> None:
    name = "language_model.model.layers.1.mlp.experts.{}.up_proj.weight"
    weights[name.format(8)] = weights[name.format(7)].clone()


def one_expert_less(weights: Weights) -> None:
    del weights["language_model.model.layers.2.mlp.experts.3.gate_proj.weight"]


def no_correction(weights: Weights) -> None:
    del weights["language_model.model.layers.1.mlp.gate.e_score_correction_bias"]


def half_of_qkv(weights: Weights) -> None:
    name = "vision_tower.encoder.blocks.0.wqkv.weight"
    weights[name] = weights[name][: len(weights[name]) // 2].clone()


DAMAGES = {
    **DAMAGE,
    "a surplus expert": one_expert_more,
    "a missing expert": one_expert_less,
    "a missing correction": no_correction,
    "half of q, k and v": half_of_qkv,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_weights_are_never_loaded(damage: Callable[[Weights], None], checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    change_weights(folder, damage)

    with pytest.raises(LoadFailed):
        load(folder)


def test_a_folder_without_safetensors_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    with pytest.raises(OSError, match="safetensors"):
        load(folder)


class TestAutoClasses:
    def test_know_the_published_layout_and_never_run_its_code(self, checkpoint: Path) -> None:
        """Every file of the checkpoint names remote code; running it ends the process."""
        assert isinstance(AutoConfig.from_pretrained(checkpoint, trust_remote_code=False), KimiVLConfig)
        assert isinstance(AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False), TikTokenTokenizer)
        image_processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=False)
        assert isinstance(image_processor, KimiVLImageProcessor)
        assert isinstance(AutoProcessor.from_pretrained(checkpoint, trust_remote_code=False), KimiVLProcessor)
        assert isinstance(load(checkpoint), KimiVLForConditionalGeneration)

    def test_registering_again_does_no_harm(self, checkpoint: Path) -> None:
        register()
        register()

        assert isinstance(AutoConfig.from_pretrained(checkpoint), KimiVLConfig)

    def test_the_configuration_is_read_as_published(self, checkpoint: Path) -> None:
        config = AutoConfig.from_pretrained(checkpoint)

        assert config.image_token_id == config.media_placeholder_token_id
        assert config.vision_config.init_pos_emb_height == config.vision_config.pos_emb_height == 8
        assert config.text_config.q_lora_rank is None
        assert config.text_config.rope_parameters["rope_theta"] == TEXT["rope_theta"]
        assert not config.tie_word_embeddings
        assert config.dtype == torch.float32

    def test_a_position_table_that_is_not_square_is_refused(self) -> None:
        with pytest.raises(ValueError, match="square"):
            KimiVLConfig(vision_config=VISION | {"init_pos_emb_width": 4}, text_config=TEXT)
