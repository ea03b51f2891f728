"""Kimi-VL: MoonViT, its 2×2-merge projector and a DeepSeek-V3 text model, on transformers' Kimi-K2.5 classes."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from transformers import GenerationConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, apply_rotary_pos_emb_interleave
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25ForConditionalGeneration

from sightline.models.kimi_vl.checkpoint import checkpoint_files, fill, save_published
from sightline.models.kimi_vl.configuration import KimiVLConfig
from sightline.models.kimi_vl.quantize import Room, Scheme, check, prepare

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class PatchProjection(torch.nn.Module):
    """A convolution whose stride is its kernel is a matrix product, and three times as fast as one."""

    def __init__(self, convolution: torch.nn.Conv2d) -> None:
        super().__init__()
        self.weight = convolution.weight
        self.bias = convolution.bias

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Patches (P, 3, side, side) → (P, hidden)."""
        return F.linear(pixels.flatten(1).to(self.weight.dtype), self.weight.flatten(1), self.bias)


class LatentAttention(DeepseekV3Attention):
    """Attention that reads the cached latents as they are when it decodes.

    transformers expands all cached latents to keys and values for each new token: at 1,024 tokens and the published
    sizes 80 times the work of bringing the one query down to the latents instead, q·(Wc) = (Wᵀq)·c.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past_key_values: Any = None,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Hidden states (B, T, D) to the same shape, and None."""
        config: Any = self.config
        is_known = config._attn_implementation in ("sdpa", "eager") and config.rope_interleave
        if hidden_states.shape[1] > 1 or past_key_values is None or not is_known:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        query, query_turned = self._query(hidden_states)
        latent, key_turned = self._latent(hidden_states)
        query_turned, key_turned = apply_rotary_pos_emb_interleave(query_turned, key_turned, *position_embeddings)
        latent, key_turned = (part[:, 0] for part in past_key_values.update(latent, key_turned, self.layer_idx))

        expand = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))
        to_keys, to_values = expand.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        lowered = torch.einsum("bhn,hnr->bhr", query[:, :, 0], to_keys)
        scores = lowered @ latent.transpose(1, 2) + query_turned[:, :, 0] @ key_turned.transpose(1, 2)
        scores = scores.float() * self.scaling
        if attention_mask is not None:
            seen = attention_mask[:, :, 0]
            scores = scores.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else scores + seen
        mixed = scores.softmax(dim=-1).to(latent.dtype) @ latent
        return self.o_proj(torch.einsum("bhr,hvr->bhv", mixed, to_values).flatten(1)[:, None]), None

    def _query(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(B, heads, T, nope) and (B, heads, T, rope), the second not turned yet."""
        own: Any = self
        if own.q_lora_rank is None:
            flat = own.q_proj(hidden_states)
        else:
            flat = own.q_b_proj(own.q_a_layernorm(own.q_a_proj(hidden_states)))
        heads = flat.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)

    def _latent(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, 1, T, rank) and the key that all heads share, (B, 1, T, rope), not turned yet."""
        both = self.kv_a_proj_with_mqa(hidden_states)
        latent, key = both.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        return self.kv_a_layernorm(latent)[:, None], key[:, None]


class KimiVLForConditionalGeneration(Kimi_K25ForConditionalGeneration):
    """Images and text to text. Loads and saves the published file layout and nothing else.

    forward takes `input_ids` (B, T), `attention_mask` (B, T), `pixel_values` (P, 3, 14, 14) with the patches of all
    images one after the other, and `image_grid_thw` (images, 3): one frame, then patches in height and width.
    """

    config: Any  # a KimiVLConfig; `Any` because transformers' own types say `dict | None` for its parts
    config_class = KimiVLConfig

    def __init__(self, config: KimiVLConfig) -> None:
        super().__init__(config)
        patches: Any = self.model.vision_tower.patch_embed
        patches.proj = PatchProjection(patches.proj)
        for layer in self.model.language_model.layers:
            layer.self_attn.__class__ = LatentAttention

    @classmethod
    def from_pretrained(  # type: ignore[override] - transformers' own maps names wrongly when q_lora_rank is null
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: KimiVLConfig | None = None,
        dtype: torch.dtype | str | None = "auto",
        quantization: Scheme = "none",
        rooms: Sequence[Room] = (Room(torch.device("cpu")),),
        attn_implementation: str | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Self:
        """Load published weights in evaluation mode, quantising each as it is read.

        dtype    of what is not quantised; None or `auto`: the type that config.json names
        rooms    the devices, see `quantize.prepare`
        options  where the files are: revision, cache_dir, …

        Raises LoadFailed when weights are missing, left over or of another shape, or do not fit into the rooms;
        OSError without weights.
        """
        if "device_map" in options or "quantization_config" in options:
            raise TypeError("Kimi-VL is placed by `rooms` and quantised by `quantization`")
        where = {name: options[name] for name in _HUB_OPTIONS if name in options}
        if config is None:
            config = KimiVLConfig.from_pretrained(pretrained_model_name_or_path, **where)
        dtype = _dtype(dtype, config)
        files = checkpoint_files(str(pretrained_model_name_or_path), **where)
        model = cls.empty(config, attn_implementation=attn_implementation)
        wanted = model.state_dict()
        prepare(model, quantization, dtype, rooms)
        fill(model, wanted, files, dtype, rooms[0].device)
        check(model, quantization)
        with contextlib.suppress(OSError):  # the file is optional
            model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **where)
        return model.eval()

    @classmethod
    def empty(cls, config: KimiVLConfig, *, attn_implementation: str | None = None) -> Self:
        """The model with its weights on the meta device; what follows from the configuration is there."""
        with torch.device("meta"):
            model = cls._from_config(config, attn_implementation=attn_implementation)
        tower, text = model.model.vision_tower, model.model.language_model
        tower.rotary_emb = type(tower.rotary_emb)(model.config.vision_config)
        text.rotary_emb = type(text.rotary_emb)(model.config.text_config)
        positions: Any = tower.patch_embed.pos_emb
        positions.time_position_embeddings = positions.compute_pos_embed()
        return model

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Write config, generation config and weights in the published layout."""
        save_published(self, save_directory)


def _dtype(asked: torch.dtype | str | None, config: Any) -> torch.dtype:  # noqa: ANN401
    if asked is None or asked == "auto":
        asked = config.dtype or config.text_config.dtype or "float32"
    return asked if isinstance(asked, torch.dtype) else getattr(torch, str(asked))
