"""Kimi-VL: MoonViT, its 2×2-merge projector and a DeepSeek-V3 text model, on transformers' Kimi-K2.5 classes."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from transformers import GenerationConfig
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
