"""Kimi-VL by hand: the published mathematics in float64, on weights under their published names.

Written from the papers (MoonViT: arXiv 2504.07491; attention and routing: arXiv 2412.19437) for these tests alone.
It is slow, has no cache and no batch, and shares no line with the model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = Mapping[str, Array]
Config = Mapping[str, Any]


# ---- vision tower ----------------------------------------------------------------------------------------------------


def tower(w: Weights, config: Config, patches: Array, height: int, width: int) -> Array:
    """One image: patches (height·width, 3, side, side), row by row → features (height·width, hidden)."""
    x = patches.reshape(len(patches), -1) @ _flat(w["patch_embed.proj.weight"]).T + w["patch_embed.proj.bias"]
    x = x + positions(w["patch_embed.pos_emb.weight"], height, width)
    for block in range(config["num_hidden_layers"]):
        x = tower_block(_below(w, f"encoder.blocks.{block}."), config, x, height, width)
    return layer_norm(x, w["encoder.final_layernorm.weight"], w["encoder.final_layernorm.bias"])


def tower_block(w: Weights, config: Config, x: Array, height: int, width: int) -> Array:
    heads = config["num_attention_heads"]
    normed = layer_norm(x, w["norm0.weight"], w["norm0.bias"])
    q, k, v = np.split(normed @ w["wqkv.weight"].T + w["wqkv.bias"], 3, axis=1)
    mixed: list[Array] = []
    for head in range(heads):
        qh, kh, vh = (np.split(part, heads, axis=1)[head] for part in (q, k, v))
        qh, kh = rotate_2d(qh, width), rotate_2d(kh, width)
        mixed.append(softmax(qh @ kh.T / math.sqrt(qh.shape[1])) @ vh)
    x = x + np.concatenate(mixed, axis=1) @ w["wo.weight"].T + w["wo.bias"]
    normed = layer_norm(x, w["norm1.weight"], w["norm1.bias"])
    inner = gelu_tanh(normed @ w["mlp.fc0.weight"].T + w["mlp.fc0.bias"])
    return x + inner @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]


def positions(table: Array, height: int, width: int) -> Array:
    """The learned table (rows, columns, hidden), resized bicubically, as (height·width, hidden)."""
    resized = np.einsum("hr,wc,rcd->hwd", bicubic(height, table.shape[0]), bicubic(width, table.shape[1]), table)
    return resized.reshape(height * width, -1)


def bicubic(size: int, old: int) -> Array:
    """The matrix (size, old) that resamples an axis: Keys' kernel with a = -0.75, half-pixel centres, edge repeated."""
    matrix = np.zeros((size, old))
    for to in range(size):
        at = (to + 0.5) * old / size - 0.5
        for tap in range(math.floor(at) - 1, math.floor(at) + 3):
            d = abs(at - tap)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[to, min(max(tap, 0), old - 1)] += near if d <= 1 else far
    return matrix


def rotate_2d(x: Array, width: int, theta: float = 10_000) -> Array:
    """Number pairs 0, 2, 4, … turn with the column, pairs 1, 3, 5, … with the row: x (patches, head)."""
    pairs = (x[:, 0::2] + 1j * x[:, 1::2]).copy()
    for patch in range(len(x)):
        row, column = divmod(patch, width)
        for pair in range(pairs.shape[1]):
            frequency = theta ** (-4 * (pair // 2) / x.shape[1])
            pairs[patch, pair] *= np.exp(1j * frequency * (row if pair % 2 else column))
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def project(w: Weights, features: Array, height: int, width: int) -> Array:
    """Features of one image (height·width, hidden) → one row for each 2×2 patches, for the text model."""
    normed = layer_norm(features, w["pre_norm.weight"], w["pre_norm.bias"]).reshape(height, width, -1)
    squares = [
        np.concatenate([normed[row + down, column + right] for down in (0, 1) for right in (0, 1)])
        for row in range(0, height, 2)
        for column in range(0, width, 2)
    ]
    inner = gelu(np.stack(squares) @ w["linear_1.weight"].T + w["linear_1.bias"])
    return inner @ w["linear_2.weight"].T + w["linear_2.bias"]


# ---- text model ------------------------------------------------------------------------------------------------------


def decoder(w: Weights, config: Config, x: Array) -> Array:
    """Embedded tokens (T, hidden) → logits (T, vocabulary)."""
    for number in range(config["num_hidden_layers"]):
        layer = _below(w, f"model.layers.{number}.")
        normed = rms_norm(x, layer["input_layernorm.weight"], config["rms_norm_eps"])
        x = x + attention(_below(layer, "self_attn."), config, normed)
        normed = rms_norm(x, layer["post_attention_layernorm.weight"], config["rms_norm_eps"])
        mlp = _below(layer, "mlp.")
        x = x + (swiglu(mlp, normed) if number < config["first_k_dense_replace"] else experts(mlp, config, normed))
    return rms_norm(x, w["model.norm.weight"], config["rms_norm_eps"]) @ w["lm_head.weight"].T


def attention(w: Weights, config: Config, x: Array) -> Array:
    """Multi-head latent attention: keys and values from one small latent, the rotated key shared by all heads."""
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rank, value = config["kv_lora_rank"], config["v_head_dim"]
    q = (x @ w["q_proj.weight"].T).reshape(len(x), heads, nope + rope)
    compressed = x @ w["kv_a_proj_with_mqa.weight"].T
    latent = rms_norm(compressed[:, :rank], w["kv_a_layernorm.weight"], 1e-6)
    shared = rotate(compressed[:, rank:], config["rope_theta"])
    expanded = (latent @ w["kv_b_proj.weight"].T).reshape(len(x), heads, nope + value)
    later = np.triu(np.full((len(x), len(x)), -np.inf), 1)
    mixed: list[Array] = []
    for head in range(heads):
        turned = rotate(q[:, head, nope:], config["rope_theta"])
        scores = q[:, head, :nope] @ expanded[:, head, :nope].T + turned @ shared.T
        mixed.append(softmax(scores / math.sqrt(nope + rope) + later) @ expanded[:, head, nope:])
    return np.concatenate(mixed, axis=1) @ w["o_proj.weight"].T


def rotate(x: Array, theta: float) -> Array:
    """Numbers 2i and 2i+1 turn together by position · theta^(-2i/d): x (T, d)."""
    pairs = x[:, 0::2] + 1j * x[:, 1::2]
    angles = np.outer(np.arange(len(x)), theta ** (-np.arange(0, x.shape[1], 2) / x.shape[1]))
    pairs = pairs * np.exp(1j * angles)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def experts(w: Weights, config: Config, x: Array) -> Array:
    """The shared experts of every token and the routed ones that it chooses."""
    output = swiglu(_below(w, "shared_experts."), x)
    for token, row in enumerate(x):
        for expert, weight in route(w, config, row).items():
            output[token] += weight * swiglu(_below(w, f"experts.{expert}."), row[None])[0]
    return output


def route(w: Weights, config: Config, token: Array) -> dict[int, float]:
    """Which experts one token (hidden,) chooses and how much each counts: sigmoid scores, `noaux_tc`.

    The correction decides who is chosen, never how much one counts.
    """
    scores = 1 / (1 + np.exp(-(w["gate.weight"] @ token)))
    ranked = (scores + w["gate.e_score_correction_bias"]).reshape(config["n_group"], -1)
    strength = np.sort(ranked, axis=1)[:, -2:].sum(axis=1)
    for weak in np.argsort(-strength)[config["topk_group"] :]:
        ranked[weak] = -np.inf
    chosen = np.argsort(-ranked.reshape(-1))[: config["num_experts_per_tok"]]
    total = scores[chosen].sum() if config["norm_topk_prob"] else 1.0
    return {int(expert): float(scores[expert] / total * config["routed_scaling_factor"]) for expert in chosen}


def swiglu(w: Weights, x: Array) -> Array:
    gate = x @ w["gate_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * (x @ w["up_proj.weight"].T)) @ w["down_proj.weight"].T


# ---- whole model -----------------------------------------------------------------------------------------------------


def logits(w: Weights, config: Config, ids: Sequence[int], images: Sequence[tuple[Array, int, int]] = ()) -> Array:
    """Logits (T, vocabulary) of one conversation.

    images   patches, height and width of each, in the order of their tokens
    """
    x = w["language_model.model.embed_tokens.weight"][np.asarray(ids)].copy()
    seen = [
        project(
            _below(w, "multi_modal_projector."),
            tower(_below(w, "vision_tower."), config["vision_config"], patches, height, width),
            height,
            width,
        )
        for patches, height, width in images
    ]
    places = [at for at, token in enumerate(ids) if token == config["media_placeholder_token_id"]]
    if seen:
        x[places] = np.concatenate(seen)
    return decoder(_below(w, "language_model."), config["text_config"], x)


# ---- pieces ----------------------------------------------------------------------------------------------------------


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * weight + bias


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight


def softmax(x: Array) -> Array:
    raised = np.exp(x - x.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def gelu(x: Array) -> Array:
    return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_tanh(x: Array) -> Array:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _flat(x: Array) -> Array:
    return x.reshape(len(x), -1)


def _below(w: Weights, prefix: str) -> dict[str, Array]:
    return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}
