"""The published models that the predictors are made for: their configurations, as far as these decide a shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]

_QWEN_VISION: Config = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "tokens_per_second": 2,
    "in_channels": 3,
}
_QWEN_IDS: Config = {
    "image_token_id": 151_655,
    "video_token_id": 151_656,
    "vision_start_token_id": 151_652,
    "vision_end_token_id": 151_653,
}
_ROPE: Config = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_QWEN_7B_TEXT: Config = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18_944,
    "vocab_size": 152_064,
    "max_position_embeddings": 128_000,
    "rope_parameters": _ROPE,
}

QWEN2_5_VL_7B: Config = {
    "model_type": "qwen2_5_vl",
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    **_QWEN_IDS,
    "tie_word_embeddings": False,
    "text_config": {"model_type": "qwen2_5_vl_text", **_QWEN_7B_TEXT},
    "vision_config": {"model_type": "qwen2_5_vl_vision", **_QWEN_VISION, "out_hidden_size": 3584},
}

COLQWEN2_5: Config = {
    "model_type": "qwen2_5_vl",
    "architectures": ["ColQwen2_5"],
    **_QWEN_IDS,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 2048,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "intermediate_size": 11_008,
        "vocab_size": 151_936,
        "max_position_embeddings": 128_000,
        "rope_parameters": _ROPE,
        "tie_word_embeddings": True,
    },
    "vision_config": {"model_type": "qwen2_5_vl_vision", **_QWEN_VISION, "out_hidden_size": 2048},
}

KIMI_VL_A3B: Config = {
    "model_type": "kimi_vl",
    "architectures": ["KimiVLForConditionalGeneration"],
    "media_placeholder_token_id": 163_605,
    "vocab_size": 163_840,
    "text_config": {
        "model_type": "deepseek_v3",
        "vocab_size": 163_840,
        "hidden_size": 2048,
        "intermediate_size": 11_264,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "max_position_embeddings": 131_072,
        "rope_theta": 800_000.0,
        "rope_scaling": None,
        "rms_norm_eps": 1e-5,
    },
    "vision_config": {
        "model_type": "moonvit",
        "patch_size": 14,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2],
    },
}

GPT_OSS_120B: Config = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "vocab_size": 201_088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "max_position_embeddings": 131_072,
}
GPT_OSS_20B: Config = {**GPT_OSS_120B, "num_hidden_layers": 24, "num_local_experts": 32}

_BLIP_TEXT: Config = {
    "model_type": "blip_text_model",
    "vocab_size": 30_524,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "bos_token_id": 30_522,
    "sep_token_id": 102,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
}
_BLIP_VISION: Config = {
    "model_type": "blip_vision_model",
    "image_size": 384,
    "patch_size": 16,
    "initializer_range": 0.02,  # the class's own 1e-10 makes a random tower blind
}
BLIP_BASE: Config = {
    "model_type": "blip",
    "architectures": ["BlipForConditionalGeneration"],
    "text_config": {**_BLIP_TEXT, "encoder_hidden_size": 768},
    "vision_config": {
        **_BLIP_VISION,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
BLIP_LARGE: Config = {
    **BLIP_BASE,
    "text_config": {**_BLIP_TEXT, "encoder_hidden_size": 1024},
    "vision_config": {
        **_BLIP_VISION,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}


@dataclass(frozen=True, slots=True)
class Published:
    """A model that people name.

    predictor   which of ours serves it
    max_pixels  of an image, as its own preprocessor file bounds them
    """

    predictor: str
    config: Config
    max_pixels: int | None = None


PUBLISHED: Mapping[str, Published] = {
    "Qwen/Qwen2.5-VL-7B-Instruct": Published("describe", QWEN2_5_VL_7B, 12_845_056),
    "moonshotai/Kimi-VL-A3B-Instruct": Published("generate", KIMI_VL_A3B, 4096 * 14 * 14),
    "vidore/colqwen2.5-v0.2": Published("embed", COLQWEN2_5, 768 * 28 * 28),
    "openai/gpt-oss-20b": Published("enhance", GPT_OSS_20B),
    "openai/gpt-oss-120b": Published("enhance", GPT_OSS_120B),
    "Salesforce/blip-image-captioning-base": Published("blip", BLIP_BASE, 384 * 384),
    "Salesforce/blip-image-captioning-large": Published("blip", BLIP_LARGE, 384 * 384),
}
"""By hub id. What is not said here is the class's default in transformers."""
