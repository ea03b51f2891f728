"""8 and 4 bits: routed experts too, close to full precision, and experts that live on another device.

There is no GPU here. A second device is played by a second share of the CPU: which experts go where, and that they give
the same results there, is tested; that tensors cross between devices is not.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from sightline.models.kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration, save_published
from sightline.models.kimi_vl.quantize import (
    Experts,
    FloatMatrices,
    Int8Matrices,
    Nf4Matrices,
    QuantizedLinear,
    Room,
    Scheme,
    bytes_per_dtype,
    check,
    prepare,
)
from sightline.models.loading import LoadFailed
from tests.unit.checkpoints import change_weights, copy_of
from tests.unit.kimi.small import TEXT, random_model, raw_config

pytest.importorskip("bitsandbytes", reason="needs the extra `bnb`")

CPU = torch.device("cpu")
EXPERT_VALUES = 2 * TEXT["n_routed_experts"] * 3 * TEXT["moe_intermediate_size"] * TEXT["hidden_size"]
"""Of all routed experts of the two layers that have some."""


def load(folder: Path, scheme: Scheme, rooms: Sequence[Room] = (Room(CPU),)) -> KimiVLForConditionalGeneration:
    return KimiVLForConditionalGeneration.from_pretrained(folder, quantization=scheme, rooms=rooms)


def logits(model: KimiVLForConditionalGeneration, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        return model(input_ids=ids).logits


def likeness(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(cosine_similarity(one.flatten().double(), other.flatten().double(), 0))


def experts_of(model: KimiVLForConditionalGeneration) -> list[torch.nn.Module]:
    return [layer.mlp.experts for layer in model.model.language_model.layers[1:]]


@pytest.fixture(scope="module")
def everyone_chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every token goes to every expert: what is measured is rounding, not a choice that rounding tipped over."""
    folder = tmp_path_factory.mktemp("kimi") / "everyone"
    save_published(random_model(1, num_experts_per_tok=TEXT["n_routed_experts"]), folder)
    return folder


class TestEightBits:
    def test_every_routed_expert_is_int8(self, checkpoint: Path) -> None:
        model = load(checkpoint, "8bit")

        for experts in experts_of(model):
            assert isinstance(experts, Experts)
            assert experts.gate_up.weight.dtype == experts.down.weight.dtype == torch.int8
        assert not [name for name, _ in model.named_parameters() if "experts." in name and "shared" not in name]

    def test_what_they_hold_says_so(self, checkpoint: Path) -> None:
        whole, eight = (bytes_per_dtype(load(checkpoint, scheme)) for scheme in ("none", "8bit"))

        assert whole["float32"] > 4 * EXPERT_VALUES
        assert eight["int8"] >= EXPERT_VALUES
        assert eight["float32"] < whole["float32"] - 4 * EXPERT_VALUES

    def test_the_other_linears_are_int8_and_the_named_exceptions_are_not(self, checkpoint: Path) -> None:
        model = load(checkpoint, "8bit")
        layers = model.model.language_model.layers

        quantised = {name for name, module in layers.named_modules() if isinstance(module, QuantizedLinear)}

        attention = {f"{n}.self_attn.{part}" for n in range(3) for part in ("q_proj", "kv_a_proj_with_mqa", "o_proj")}
        dense = {f"0.mlp.{part}_proj" for part in ("gate", "up", "down")}
        shared = {f"{n}.mlp.shared_experts.{part}_proj" for n in (1, 2) for part in ("gate", "up", "down")}
        assert quantised == attention | dense | shared
        assert type(layers[0].self_attn.kv_b_proj) is torch.nn.Linear
        assert type(model.lm_head) is torch.nn.Linear
        assert not any(isinstance(module, QuantizedLinear) for module in model.model.vision_tower.modules())

    def test_logits_are_nearly_those_of_full_precision(self, everyone_chosen: Path) -> None:
        assert likeness(logits(load(everyone_chosen, "none")), logits(load(everyone_chosen, "8bit"))) > 0.999

    def test_a_layer_of_experts_gives_nearly_the_same(self, checkpoint: Path) -> None:
        whole, eight = load(checkpoint, "none"), load(checkpoint, "8bit")
        x = torch.randn((50, TEXT["hidden_size"]), generator=torch.Generator().manual_seed(0))

        with torch.inference_mode():
            for ours, theirs, layer in zip(
                experts_of(eight), experts_of(whole), whole.model.language_model.layers[1:], strict=True
            ):
                _, weights, chosen = layer.mlp.gate(x)
                assert likeness(ours(x, chosen, weights), theirs(x, chosen, weights)) > 0.9995

    def test_a_decoded_token_s_logits_too(self, everyone_chosen: Path) -> None:
        whole, eight = load(everyone_chosen, "none"), load(everyone_chosen, "8bit")
        ids = torch.arange(20)[None]

        with torch.inference_mode():
            results: list[torch.Tensor] = []
            for model in (whole, eight):
                cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
                results.append(model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits)

        assert likeness(*results) > 0.999

    def test_the_weights_are_read_one_at_a_time(self, checkpoint: Path) -> None:
        """Never a whole layer of experts in full precision: 32 GB would otherwise pass through the memory."""
        config = KimiVLConfig(**raw_config())
        model = KimiVLForConditionalGeneration.empty(config)

        prepare(model, "8bit", torch.float32, [Room(CPU)])

        stacks = [tensor for experts in experts_of(model) for tensor in (*experts.parameters(), *experts.buffers())]
        assert {tensor.dtype for tensor in stacks if tensor.ndim == 3} == {torch.int8}
        assert all(weight.is_meta for weight in model.parameters())


class TestInt8Matrices:
    def matrices(self, values: torch.Tensor) -> Int8Matrices:
        made = Int8Matrices(2, *values.shape, dtype=torch.float32, device=CPU)
        made.put(1, slice(None), values)
        return made

    def weights(self, rows: int = 48, columns: int = 64) -> torch.Tensor:
        return torch.randn((rows, columns), generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_multiply(self, dtype: torch.dtype) -> None:
        values = self.weights()
        x = torch.randn((7, 64), generator=torch.Generator().manual_seed(1)).to(dtype)

        product = self.matrices(values).multiply(x, 1)

        assert product.dtype == dtype
        assert likeness(product.float(), x.float() @ values.T) > 0.9998

    def test_large_activations_do_not_spoil_the_small_ones(self) -> None:
        values = self.weights()
        x = torch.randn((7, 64), generator=torch.Generator().manual_seed(1))
        x[2, 5] = 4000.0

        difference = self.matrices(values).multiply(x, 1) - x @ values.T

        assert difference[2].abs().max() < 4000 * 0.02  # the weight's own rounding
        assert difference[[0, 1, 3, 4, 5, 6]].abs().max() < 0.5

    def test_a_row_s_result_does_not_depend_on_its_company(self) -> None:
        made = self.matrices(self.weights())
        x = torch.randn((7, 64), generator=torch.Generator().manual_seed(1))
        alone = made.multiply(x[:1], 1)
        x[1:, ::3] *= 1000

        torch.testing.assert_close(made.multiply(x, 1)[:1], alone, rtol=0, atol=1e-5)

    def test_rows_of_zeros_stay_zero(self) -> None:
        values = self.weights()
        values[3] = 0

        product = self.matrices(values).multiply(torch.cat([torch.ones(1, 64), torch.zeros(1, 64)]), 1)

        assert product[0, 3] == 0
        assert not product[1].any()
        assert product.isfinite().all()

    def test_a_matrix_can_come_in_parts(self) -> None:
        values = self.weights()
        parts = Int8Matrices(1, *values.shape, dtype=torch.float32, device=CPU)
        parts.put(0, slice(0, 24), values[:24])
        parts.put(0, slice(24, 48), values[24:])
        x = torch.randn((3, 64))

        assert torch.equal(parts.multiply(x, 0), self.matrices(values).multiply(x, 1))


class TestFourBits:
    def test_every_routed_expert_is_nf4(self, checkpoint: Path) -> None:
        model = load(checkpoint, "4bit")

        for experts in experts_of(model):
            assert isinstance(experts, Experts)
            assert isinstance(experts.gate_up, Nf4Matrices)
            assert isinstance(experts.down, Nf4Matrices)
        assert bytes_per_dtype(model)["nf4"] >= EXPERT_VALUES // 2

    def test_multiply_as_bitsandbytes_does(self) -> None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        values = torch.randn((48, 128), generator=torch.Generator().manual_seed(0))
        made = Nf4Matrices(1, 48, 128, dtype=torch.float32, device=CPU)
        made.put(0, slice(0, 16), values[:16])
        made.put(0, slice(16, 48), values[16:])
        x = torch.randn((5, 128), generator=torch.Generator().manual_seed(1))

        rounded = dequantize_4bit(*quantize_4bit(values, blocksize=64, quant_type="nf4"))

        torch.testing.assert_close(made.multiply(x, 0), x @ rounded.T, rtol=0, atol=1e-4)
        assert likeness(made.multiply(x, 0), x @ values.T) > 0.99

    def test_logits_are_like_those_of_full_precision(self, everyone_chosen: Path) -> None:
        assert likeness(logits(load(everyone_chosen, "none")), logits(load(everyone_chosen, "4bit"))) > 0.9

    def test_odd_widths_are_refused(self, tmp_path: Path) -> None:
        narrow = {"moe_intermediate_size": 40}
        save_published(random_model(0, **narrow), tmp_path)

        with pytest.raises(LoadFailed, match="64"):
            load(tmp_path, "4bit")


class TestPlacement:
    """Sizes are those of the small model: 98,304 values of experts a layer, each a byte and its share of scales."""

    LAYER = EXPERT_VALUES // 2 + 4 * TEXT["n_routed_experts"] * (
        2 * TEXT["moe_intermediate_size"] + TEXT["hidden_size"]
    )

    def rest(self, checkpoint: Path) -> int:
        return sum(bytes_per_dtype(load(checkpoint, "8bit")).values()) - 2 * self.LAYER

    @pytest.mark.parametrize("scheme", ["8bit", "4bit", "none"])
    def test_experts_elsewhere_give_the_same(self, checkpoint: Path, scheme: Scheme) -> None:
        together = load(checkpoint, scheme)
        size = sum(bytes_per_dtype(together).values())
        experts = {"8bit": 1, "4bit": 0.5625, "none": 4}[scheme] * EXPERT_VALUES

        split = load(checkpoint, scheme, [Room(CPU, int(size - 0.4 * experts)), Room(CPU)])

        torch.testing.assert_close(logits(split), logits(together), rtol=0, atol=1e-5)
        if scheme == "none":
            near, far = experts_of(split)
            assert not isinstance(near, Experts)
            assert isinstance(far, Experts)
            assert isinstance(far.down, FloatMatrices)

    def test_layers_fill_the_first_device_and_then_the_next(self, checkpoint: Path) -> None:
        meta = torch.device("meta")
        rest = self.rest(checkpoint)

        def homes(*limits: int | None) -> list[str]:
            model = KimiVLForConditionalGeneration.empty(KimiVLConfig(**raw_config()))
            rooms = [Room(device, limit) for device, limit in zip((CPU, meta), limits, strict=True)]
            prepare(model, "8bit", torch.float32, rooms)
            return [str(experts.device) for experts in experts_of(model)]

        assert homes(None, 0) == ["cpu", "cpu"]
        assert homes(rest + 2 * self.LAYER, 0) == ["cpu", "cpu"]
        assert homes(rest + 2 * self.LAYER - 1, None) == ["cpu", "meta"]
        assert homes(rest + self.LAYER - 1, None) == ["meta", "meta"]
        assert homes(rest, 2 * self.LAYER) == ["meta", "meta"]

    def test_too_little_memory_is_refused_before_anything_is_read(self, checkpoint: Path) -> None:
        rest = self.rest(checkpoint)

        with pytest.raises(LoadFailed, match="all but the experts"):
            load(checkpoint, "8bit", [Room(CPU, rest - 1), Room(CPU)])
        with pytest.raises(LoadFailed, match="no device may hold"):
            load(checkpoint, "8bit", [Room(CPU, rest), Room(CPU, 2 * self.LAYER - 1)])


class TestSelfCheck:
    @pytest.mark.parametrize("scheme", ["8bit", "4bit"])
    def test_experts_left_in_full_precision_are_noticed(
        self, model: KimiVLForConditionalGeneration, scheme: Scheme
    ) -> None:
        """What bitsandbytes' own conversion leaves behind (bitsandbytes#1849)."""
        with pytest.raises(LoadFailed, match="experts"):
            check(model, scheme)

    def test_experts_of_the_other_width_are_noticed(self, checkpoint: Path) -> None:
        with pytest.raises(LoadFailed, match="int8"):
            check(load(checkpoint, "4bit"), "8bit")

    def test_one_missing_expert_is_noticed(self, checkpoint: Path, tmp_path: Path) -> None:
        folder = copy_of(checkpoint, tmp_path)
        name = "language_model.model.layers.2.mlp.experts.3.up_proj.weight"
        change_weights(folder, lambda weights: [weights.pop(name)])

        with pytest.raises(LoadFailed, match="missing"):
            load(folder, "8bit")

    def test_bitsandbytes_itself_would_skip_the_experts(self, model: KimiVLForConditionalGeneration) -> None:
        """Why all this is here; when it fails, bitsandbytes or transformers has learned to do it."""
        linears = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}

        skipped = sum(
            weight.numel()
            for name, weight in model.named_parameters()
            if ".experts." in name and id(weight) not in linears
        )

        assert skipped == EXPERT_VALUES
