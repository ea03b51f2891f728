"""Kimi-VL: MoonViT, its 2×2-merge projector and a DeepSeek-V3 text model, on transformers' Kimi-K2.5 classes."""

import contextlib
from pathlib import Path
from typing import Any, Self

import torch
from transformers import GenerationConfig
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25ForConditionalGeneration

from sightline.models.kimi_vl.checkpoint import checkpoint_files, fill, save_published
from sightline.models.kimi_vl.configuration import KimiVLConfig


class KimiVLForConditionalGeneration(Kimi_K25ForConditionalGeneration):
    """Images and text to text. Loads and saves the published file layout and nothing else.

    forward takes `input_ids` (B, T), `attention_mask` (B, T), `pixel_values` (P, 3, 14, 14) with the patches of all
    images one after the other, and `image_grid_thw` (images, 3): one frame, then patches in height and width.
    """

    config: Any  # a KimiVLConfig; `Any` because transformers' own types say `dict | None` for its parts
    config_class = KimiVLConfig

    @classmethod
    def from_pretrained(  # type: ignore[override] - transformers' own maps names wrongly when q_lora_rank is null
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: KimiVLConfig | None = None,
        dtype: torch.dtype | str | None = "auto",
        device: torch.device | str = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **options: Any,  # noqa: ANN401
    ) -> Self:
        """Load published weights, in evaluation mode.

        dtype    None or `auto`: the type that config.json names
        options  attn_implementation, and what AutoModel hands on that has no meaning here

        Raises LoadFailed when weights are missing, left over or of another shape; OSError without weights.
        """
        where: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        if config is None:
            config = KimiVLConfig.from_pretrained(pretrained_model_name_or_path, **where)
        files = checkpoint_files(str(pretrained_model_name_or_path), **where)
        model = cls.empty(config, attn_implementation=options.get("attn_implementation"))
        fill(model, files, dtype=_dtype(dtype, config), device=torch.device(device))
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


def _dtype(asked: torch.dtype | str | None, config: Any) -> torch.dtype:
    if asked is None or asked == "auto":
        asked = config.dtype or config.text_config.dtype or torch.float32
    return getattr(torch, asked) if isinstance(asked, str) else asked
