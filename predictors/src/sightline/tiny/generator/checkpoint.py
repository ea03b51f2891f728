"""The generator's files: tokenizer, chat template, configuration, fresh weights, in Kimi-VL's published layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken
from torch import nn
from transformers import GenerationConfig

from sightline.models.kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration, TikTokenTokenizer, save_published
from sightline.tiny import bpe, dialogue
from sightline.tiny.generator.pictures import MEAN, MERGE, PATCH, PATCH_LIMIT, STD

MODEL_NAME = "sightline-tiny-kimi-vl"
TEXT_LAYERS = 3

SPECIAL_TOKENS = [
    "[BOS]",
    "[EOS]",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "[EOT]",
    "<|im_system|>",
    "<|im_middle|>",
    "<|media_start|>",
    "<|media_content|>",
    "<|media_end|>",
    "<|media_pad|>",
    "[UNK]",
    "[PAD]",
]
"""Kimi-VL's own special tokens in their order; here from id 0."""
END = SPECIAL_TOKENS.index("<|im_end|>")
PAD = SPECIAL_TOKENS.index("<|media_pad|>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- set role = message['role'] -%}
    {{- '<|im_' + (role if role in ('user', 'assistant') else 'system') + '|>' + role + '<|im_middle|>' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
                {{- '<|media_start|>image<|media_content|><|media_pad|><|media_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_assistant|>assistant<|im_middle|>' -}}
{%- endif -%}
"""


def make_tokenizer() -> TikTokenTokenizer:
    """A byte-level BPE with Kimi-VL's special tokens, its merges trained on this world's sentences."""
    raw = bpe.trained(dialogue.corpus(), SPECIAL_TOKENS, vocabulary=704)
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = TikTokenTokenizer(
        tokenizer_object=raw,
        bos_token="[BOS]",  # noqa: S106 - a token of text
        eos_token="<|im_end|>",  # noqa: S106
        pad_token="[PAD]",  # noqa: S106
        unk_token="[UNK]",  # noqa: S106
        additional_special_tokens=[
            token for token in SPECIAL_TOKENS if token not in ("[BOS]", "<|im_end|>", "[PAD]", "[UNK]")
        ],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_config(vocabulary: int) -> KimiVLConfig:
    """The shape of the model: Kimi-VL-A3B's own, made small. Dims are multiples of 64, so that 4-bit blocks fit."""
    config = KimiVLConfig(
        vision_config={
            "patch_size": PATCH,
            "merge_kernel_size": [MERGE, MERGE],
            "init_pos_emb_height": 16,
            "init_pos_emb_width": 16,
            "num_hidden_layers": 4,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "intermediate_size": 384,
        },
        text_config={
            "model_type": "deepseek_v3",
            "vocab_size": vocabulary,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": TEXT_LAYERS,
            "first_k_dense_replace": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "moe_intermediate_size": 64,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.446,
            "num_nextn_predict_layers": 0,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": SPECIAL_TOKENS.index("[BOS]"),
            "eos_token_id": END,
            # A padding id here would freeze and zero that token's embedding (nn.Embedding(padding_idx)).
            "pad_token_id": None,
            "tie_word_embeddings": False,
        },
        media_placeholder_token_id=PAD,
        vision_start_token_id=SPECIAL_TOKENS.index("<|media_start|>"),
        vision_end_token_id=SPECIAL_TOKENS.index("<|media_end|>"),
        tie_word_embeddings=False,
    )
    config.update({"sightline_demo_model": True, "sightline_model_name": MODEL_NAME})
    return config


def make_model(vocabulary: int, seed: int) -> KimiVLForConditionalGeneration:
    """Fresh weights."""
    torch.manual_seed(seed)
    model = KimiVLForConditionalGeneration(make_config(vocabulary))
    for name, weight in model.named_parameters():
        if "position_embeddings" in name or "embed_tokens" in name:
            nn.init.normal_(weight, std=0.02)
        elif weight.ndim == 3:  # experts, (experts, out, in)
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        elif weight.ndim >= 2:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        bos_token_id=SPECIAL_TOKENS.index("[BOS]"),
        eos_token_id=[SPECIAL_TOKENS.index(token) for token in ("<|im_end|>", "[EOS]", "[EOT]")],
        pad_token_id=SPECIAL_TOKENS.index("[PAD]"),
    )
    return model


def save(model: KimiVLForConditionalGeneration, tokenizer: TikTokenTokenizer, folder: Path) -> None:
    """Write the checkpoint in the published file layout, float32."""
    save_published(model, folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    preprocessor = {
        "image_processor_type": "KimiVLImageProcessor",
        "processor_class": "KimiVLProcessor",
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
        "in_token_limit": PATCH_LIMIT,
        "merge_kernel_size": [MERGE, MERGE],
        "num_pooled_tokens": 1024,
        "pad_input": True,
        "patch_size": PATCH,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
