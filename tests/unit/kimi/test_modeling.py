"""The model against the published mathematics written out in float64, part by part and as a whole."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sightline.models.kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration
from sightline.models.kimi_vl.modeling import LatentAttention
from tests.unit.kimi import reference
from tests.unit.kimi.reference import Array
from tests.unit.kimi.small import TEXT, VISION, published_weights, random_model, raw_config, write_checkpoint

GRIDS = [(4, 6), (2, 2), (8, 8), (10, 4), (2, 14)]
"""Patches in height and width: smaller than the table of positions, its own size, larger, long."""


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> dict[str, Array]:
    return published_weights(checkpoint)


@pytest.fixture(scope="module")
def config(model: KimiVLForConditionalGeneration) -> dict[str, Any]:
    return raw_config()


def patches_of(*grids: tuple[int, int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((height * width, 3, 14, 14), generator=generator) * 2 - 1 for height, width in grids]


def grid_tensor(*grids: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([(1, height, width) for height, width in grids])


def below(weights: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def double(tensor: torch.Tensor) -> Array:
    return tensor.detach().double().numpy()


def close(ours: torch.Tensor, theirs: Array, tolerance: float) -> None:
    np.testing.assert_allclose(double(ours), theirs, rtol=0, atol=tolerance)


class TestVisionTower:
    def test_equals_the_reference_with_images_of_several_sizes_packed(
        self, model: KimiVLForConditionalGeneration, weights: dict[str, Array]
    ) -> None:
        patches = patches_of(*GRIDS)

        with torch.inference_mode():
            packed = model.model.vision_tower(torch.cat(patches), grid_tensor(*GRIDS)).last_hidden_state

        parts = packed.split([len(image) for image in patches])
        for (height, width), image, features in zip(GRIDS, patches, parts, strict=True):
            close(
                features, reference.tower(below(weights, "vision_tower."), VISION, double(image), height, width), 1e-5
            )

    def test_an_image_does_not_see_its_neighbours(self, model: KimiVLForConditionalGeneration) -> None:
        one, other = patches_of((4, 6), (10, 4))

        with torch.inference_mode():
            packed = model.model.vision_tower(torch.cat([one, other]), grid_tensor((4, 6), (10, 4))).last_hidden_state
            alone = model.model.vision_tower(other, grid_tensor((10, 4))).last_hidden_state

        torch.testing.assert_close(packed[len(one) :], alone, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("height", "width"), GRIDS)
    def test_the_position_table_is_resized_bicubically(
        self, model: KimiVLForConditionalGeneration, weights: dict[str, Array], height: int, width: int
    ) -> None:
        positions = model.model.vision_tower.patch_embed.pos_emb

        with torch.inference_mode():
            added = positions(torch.zeros((height * width, VISION["hidden_size"])), grid_tensor((height, width)))

        close(added, reference.positions(weights["vision_tower.patch_embed.pos_emb.weight"], height, width), 1e-6)

    def test_of_the_table_s_own_size_it_is_the_table(self, weights: dict[str, Array]) -> None:
        table = weights["vision_tower.patch_embed.pos_emb.weight"]

        np.testing.assert_allclose(reference.positions(table, 8, 8), table.reshape(64, -1), atol=1e-12)

    def test_patches_are_projected_as_by_a_convolution(self, model: KimiVLForConditionalGeneration) -> None:
        projection = model.model.vision_tower.patch_embed.proj
        (patches,) = patches_of((4, 6))

        with torch.inference_mode():
            convolved = torch.nn.functional.conv2d(patches, projection.weight, projection.bias)[..., 0, 0]

            torch.testing.assert_close(projection(patches), convolved, rtol=0, atol=5e-5)


def test_the_projector_merges_squares_of_patches(
    model: KimiVLForConditionalGeneration, weights: dict[str, Array]
) -> None:
    patches = patches_of(*GRIDS)

    with torch.inference_mode():
        seen = model.get_image_features(torch.cat(patches), grid_tensor(*GRIDS)).pooler_output

    for (height, width), image, tokens in zip(GRIDS, patches, seen, strict=True):
        features = reference.tower(below(weights, "vision_tower."), VISION, double(image), height, width)
        close(tokens, reference.project(below(weights, "multi_modal_projector."), features, height, width), 1e-5)


def test_latent_attention_equals_the_reference(
    model: KimiVLForConditionalGeneration, weights: dict[str, Array]
) -> None:
    text = model.model.language_model
    x = torch.randn((1, 40, TEXT["hidden_size"]), generator=torch.Generator().manual_seed(1))
    at = torch.arange(40)[None]
    later = torch.full((40, 40), -torch.inf).triu(1)[None, None]

    with torch.inference_mode():
        mixed, _ = text.layers[1].self_attn(x, text.rotary_emb(x, at), later)

    expected = reference.attention(below(weights, "language_model.model.layers.1.self_attn."), TEXT, double(x[0]))
    close(mixed[0], expected, 1e-5)


class TestRouting:
    def test_equals_the_reference(self, model: KimiVLForConditionalGeneration, weights: dict[str, Array]) -> None:
        moe = model.model.language_model.layers[2].mlp
        x = torch.randn((60, TEXT["hidden_size"]), generator=torch.Generator().manual_seed(2))

        with torch.inference_mode():
            _, counts, chosen = moe.gate(x)

        below_gate = below(weights, "language_model.model.layers.2.mlp.")
        for token, row in enumerate(double(x)):
            expected = reference.route(below_gate, TEXT, row)
            assert dict(zip(chosen[token].tolist(), counts[token].tolist(), strict=True)) == pytest.approx(expected)

    def test_the_correction_decides_who_is_chosen_but_not_how_much_one_counts(self, weights: dict[str, Array]) -> None:
        with_it = below(weights, "language_model.model.layers.2.mlp.")
        without = with_it | {"gate.e_score_correction_bias": np.zeros(TEXT["n_routed_experts"])}
        tokens = np.random.default_rng(3).standard_normal((60, TEXT["hidden_size"]))

        changed = [
            row
            for row in tokens
            if set(reference.route(with_it, TEXT, row)) != set(reference.route(without, TEXT, row))
        ]

        assert changed, "the correction has no effect in this test"
        for row in tokens:
            assert sum(reference.route(with_it, TEXT, row).values()) == pytest.approx(TEXT["routed_scaling_factor"])

    def test_in_groups_too(self, tmp_path: Path) -> None:
        groups = {"n_group": 4, "topk_group": 2}
        model = random_model(4, **groups)
        folder = write_checkpoint(tmp_path / "groups", model, **groups)
        weights = below(published_weights(folder), "language_model.model.layers.1.mlp.")
        x = torch.randn((40, TEXT["hidden_size"]), generator=torch.Generator().manual_seed(5))

        with torch.inference_mode():
            _, counts, chosen = model.model.language_model.layers[1].mlp.gate(x)

        for token, row in enumerate(double(x)):
            expected = reference.route(weights, TEXT | groups, row)
            assert dict(zip(chosen[token].tolist(), counts[token].tolist(), strict=True)) == pytest.approx(expected)

    def test_experts_equal_the_reference(
        self, model: KimiVLForConditionalGeneration, weights: dict[str, Array]
    ) -> None:
        x = torch.randn((1, 30, TEXT["hidden_size"]), generator=torch.Generator().manual_seed(6))

        with torch.inference_mode():
            ours = model.model.language_model.layers[2].mlp(x)

        close(
            ours[0], reference.experts(below(weights, "language_model.model.layers.2.mlp."), TEXT, double(x[0])), 1e-5
        )


class TestWholeModel:
    @pytest.mark.parametrize(
        "grids",
        [[], [(4, 6)], [(8, 8)], [(2, 2), (10, 4), (4, 6)]],
        ids=["text only", "one image", "an image as large as the table", "three images"],
    )
    def test_logits_equal_the_reference(
        self,
        model: KimiVLForConditionalGeneration,
        weights: dict[str, Array],
        config: dict[str, Any],
        grids: list[tuple[int, int]],
    ) -> None:
        pad = config["media_placeholder_token_id"]
        ids = [5, 9, 200]
        for height, width in grids:
            ids += [17, *[pad] * (height * width // 4), 18]
        ids += [40, 41, 42, 43]
        patches = patches_of(*grids)
        images = {"pixel_values": torch.cat(patches), "image_grid_thw": grid_tensor(*grids)} if grids else {}

        with torch.inference_mode():
            ours = model(input_ids=torch.tensor([ids]), **images).logits[0]

        seen = [(double(image), *grid) for image, grid in zip(patches, grids, strict=True)]
        expected = reference.logits(weights, config, ids, seen)
        assert expected.std() > 0.1, "logits are all alike: this would prove nothing"
        close(ours, expected, 1e-4)

    def test_every_weight_counts(self, model: KimiVLForConditionalGeneration, config: dict[str, Any]) -> None:
        pad = config["media_placeholder_token_id"]
        ids = torch.tensor([[5, *[pad] * 6, *range(20, 60)]])
        model.zero_grad()

        out = model(input_ids=ids, pixel_values=patches_of((4, 6))[0], image_grid_thw=grid_tensor((4, 6)))
        (out.logits * torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(7))).sum().backward()

        idle = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
        model.zero_grad(set_to_none=True)
        assert not idle

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_step_by_step_with_the_cache_gives_the_same_logits(
        self,
        model: KimiVLForConditionalGeneration,
        config: dict[str, Any],
        implementation: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        pad = config["media_placeholder_token_id"]
        ids = torch.tensor([[5, 17, *[pad] * 6, 18, 40, 41, 42, 43, 44, 45]])
        images = {"pixel_values": patches_of((4, 6))[0], "image_grid_thw": grid_tensor((4, 6))}
        first = 10
        monkeypatch.setattr(model.config.text_config, "_attn_implementation", implementation)

        with torch.inference_mode():
            whole = model(input_ids=ids, **images, use_cache=False).logits[0]
            out = model(input_ids=ids[:, :first], **images, use_cache=True)
            steps = [out.logits[0]]
            monkeypatch.setattr(LatentAttention, "expand_kv", None)  # never for one token: it reads the latents
            for at in range(first, ids.shape[1]):
                out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits[0])

        torch.testing.assert_close(torch.cat(steps), whole, rtol=0, atol=1e-5)

    def test_with_a_latent_for_queries_too(self) -> None:
        """Other DeepSeek-V3 text models have one; Kimi-VL-A3B has none."""
        model = random_model(8, q_lora_rank=32)
        ids = torch.arange(20, 30)[None]

        with torch.inference_mode():
            whole = model(input_ids=ids, use_cache=False).logits[:, -1]
            cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
            step = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1]

        torch.testing.assert_close(step, whole, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_padding_in_the_cache_is_not_seen(
        self, model: KimiVLForConditionalGeneration, implementation: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model.config.text_config, "_attn_implementation", implementation)
        ids = torch.arange(20, 30)[None]
        padded = torch.cat([torch.full((1, 4), 3), ids], dim=1)
        mask = torch.tensor([[0] * 4 + [1] * 10])
        at = (mask.cumsum(-1) - 1).clamp(min=0)

        with torch.inference_mode():
            cache = model(
                input_ids=padded[:, :-1], attention_mask=mask[:, :-1], position_ids=at[:, :-1], use_cache=True
            ).past_key_values
            last = model(
                input_ids=padded[:, -1:], attention_mask=mask, position_ids=at[:, -1:], past_key_values=cache
            ).logits[0, -1]
            alone = model(input_ids=ids, use_cache=False).logits[0, -1]

        torch.testing.assert_close(last, alone, rtol=0, atol=1e-5)


class TestFullSize:
    def test_has_the_published_number_of_parameters(self) -> None:
        model = KimiVLForConditionalGeneration.empty(KimiVLConfig(**full_config()))

        counts = {name: tensor.numel() for name, tensor in model.state_dict().items()}
        routing = {name: count for name, count in counts.items() if name.endswith("e_score_correction_bias")}

        assert all(weight.is_meta for weight in model.parameters())
        assert sum(counts.values()) == 16_407_656_048
        assert sum(routing.values()) == 26 * 64

    def test_what_follows_from_the_configuration_is_there_without_weights(self) -> None:
        config = KimiVLConfig(**raw_config())
        empty, whole = KimiVLForConditionalGeneration.empty(config), KimiVLForConditionalGeneration(config)

        tables = {name: table for name, table in empty.named_buffers() if name not in empty.state_dict()}

        assert len(tables) == 5
        for name, table in whole.named_buffers():
            if name in tables:
                torch.testing.assert_close(tables[name], table, rtol=0, atol=0)


def full_config() -> dict[str, Any]:
    """Kimi-VL-A3B: the sizes that are published with it."""
    text = TEXT | {
        "vocab_size": 163_840,
        "hidden_size": 2048,
        "intermediate_size": 11_264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 131_072,
    }
    vision = VISION | {
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
    }
    return raw_config() | {"media_placeholder_token_id": 163_605, "text_config": text, "vision_config": vision}
