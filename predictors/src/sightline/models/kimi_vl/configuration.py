"""Kimi-VL's published config.json, read into the configuration classes of transformers' Kimi-K2.5."""

from typing import Any, ClassVar

from transformers import AutoConfig
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config, Kimi_K25VisionConfig


class MoonViTConfig(Kimi_K25VisionConfig):
    """The vision tower. A frame of Kimi-K2.5's tower is an image of MoonViT: only two names differ."""

    model_type: ClassVar[str] = "moonvit"
    attribute_map: ClassVar[dict[str, str]] = {
        "pos_emb_height": "init_pos_emb_height",
        "pos_emb_width": "init_pos_emb_width",
    }

    init_pos_emb_height: int = 64
    init_pos_emb_width: int = 64

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__post_init__(**kwargs)
        if self.init_pos_emb_height != self.init_pos_emb_width:
            raise ValueError("the position table of Kimi-VL's vision tower must be square")


class KimiVLConfig(Kimi_K25Config):
    """`vision_config` (moonvit), `text_config` (deepseek_v3) and the id that stands for an image's tokens."""

    model_type: ClassVar[str] = "kimi_vl"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": AutoConfig, "vision_config": MoonViTConfig}
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "media_placeholder_token_id"}

    media_placeholder_token_id: int = 163605
    video_token_id: int = -1  # Kimi-VL reads images only: an id that no token has
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        vision: Any = self.vision_config
        if not isinstance(vision, MoonViTConfig):
            vision = MoonViTConfig(**(vision or {}))
        self.vision_config = vision
        self.projection_hidden_size = vision.hidden_size
        super().__post_init__(**kwargs)
