"""Small Kimi-VL checkpoints of random weights, in the published file layout."""

import base64
import json
from pathlib import Path
from typing import Any

import torch

from sightline.models.kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration, save_published
from sightline.models.kimi_vl.processing import PUBLISHED_IDS, RESERVED_TOKENS
from tests.unit.kimi.reference import Array

TEXT: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 16,
    "max_position_embeddings": 512,
    "rope_theta": 800000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
"""Kimi-VL-A3B's own shape, made small; it too has no `q_lora_rank`."""

VISION: dict[str, Any] = {
    "model_type": "moonvit",
    "patch_size": 14,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "intermediate_size": 80,
    "init_pos_emb_height": 8,
    "init_pos_emb_width": 8,
    "merge_kernel_size": [2, 2],
}

WORDS = ("hello", " hello", " world", " image", "Which", " which", "user", "assistant", "system", "你好", "é", "123")
AUTO_MAP = {
    "AutoConfig": "evil.KimiVLConfig",
    "AutoModel": "evil.KimiVLForConditionalGeneration",
    "AutoModelForCausalLM": "evil.KimiVLForConditionalGeneration",
    "AutoModelForImageTextToText": "evil.KimiVLForConditionalGeneration",
}


def raw_config(**text: Any) -> dict[str, Any]:
    """config.json as it is published, remote code and all."""
    return {
        "architectures": ["KimiVLForConditionalGeneration"],
        "auto_map": AUTO_MAP,
        "model_type": "kimi_vl",
        "ignore_index": -100,
        "media_placeholder_token_id": len(ranks()) + PUBLISHED_IDS["<|media_pad|>"] - PUBLISHED_IDS["[BOS]"],
        "torch_dtype": "float32",
        "vocab_size": TEXT["vocab_size"],
        "text_config": TEXT | text,
        "vision_config": VISION,
    }


def random_model(seed: int = 0, **text: Any) -> KimiVLForConditionalGeneration:
    """Every weight random, those of norms around 1, so that no tensor is without effect."""
    config = KimiVLConfig(**raw_config(**text))
    generator = torch.Generator().manual_seed(seed)
    model = KimiVLForConditionalGeneration(config)
    for name, tensor in model.state_dict().items():
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        spread = 0.3 if tensor.ndim == 1 else 0.1
        tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def published_weights(folder: Path) -> dict[str, Array]:
    """The tensors of a checkpoint, as float64."""
    from safetensors.numpy import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.astype("float64") for file in files for name, tensor in load_file(file).items()}


def ranks() -> dict[bytes, int]:
    """A byte-level vocabulary with a few words, each reached by merges from the left."""
    table = {bytes([byte]): byte for byte in range(256)}
    for word in WORDS:
        raw = word.encode()
        for end in range(2, len(raw) + 1):
            table.setdefault(raw[:end], len(table))
    return table


def write_checkpoint(folder: Path, model: KimiVLForConditionalGeneration, **text: Any) -> Path:
    """A folder as the hub has it: tiktoken file, remote code that must never run, no tokenizer.json.

    text   what `model`'s text part has other than TEXT
    """
    save_published(model, folder)
    (folder / "config.json").write_text(json.dumps(raw_config(**text)))
    (folder / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    table = ranks()
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in table.items())
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    first = PUBLISHED_IDS["[BOS]"]
    added = {
        str(len(table) + at - first): {"content": token, "special": True, "normalized": False}
        for token, at in PUBLISHED_IDS.items()
    }
    tokenizer = {
        "added_tokens_decoder": added,
        "additional_special_tokens": [token for token in PUBLISHED_IDS if token.startswith("<|")],
        "auto_map": {"AutoTokenizer": ["evil.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "TikTokenTokenizer",
        "chat_template": "{{ 'not used' }}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    preprocessor = {
        "auto_map": {
            "AutoProcessor": "evil.KimiVLProcessor",
            "AutoImageProcessor": "evil.KimiVLImageProcessor",
        },
        "image_processor_type": "KimiVLImageProcessor",
        "in_token_limit": 4096,
        "patch_size": 14,
        "num_pooled_tokens": 1024,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "pad_input": True,
        "merge_kernel_size": [2, 2],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


assert len(ranks()) + RESERVED_TOKENS <= TEXT["vocab_size"]
