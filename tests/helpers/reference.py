"""The oracle of the tests: a Mistral forward pass written to be read, not to be fast.

Plain torch in the dtype of the weights (float64 works), no cache, and the whole S-by-S mask of the rule
``q - W < k <= q``.

Legend: B batch, S tokens, H query heads, K key/value heads, D head_dim, E hidden_size, V vocabulary, W window.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

Weights = Mapping[str, Tensor]


def hidden_states(
    weights: Weights,
    config: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
) -> list[Tensor]:
    """Embeddings, the output of every layer but the last, and the final normalised states, each ``[B, S, E]``.

    Args:
        weights: By the names of `MistralModel`, without a prefix.
        config: A configuration with default rotary embeddings and ``hidden_act="silu"``.
        input_ids: ``[B, S]``.
        attention_mask: ``[B, S]``, nonzero for real tokens.
        inputs_embeds: ``[B, S, E]`` in place of `input_ids`.
    """
    states = weights["embed_tokens.weight"][input_ids] if inputs_embeds is None else inputs_embeds
    batch, length = states.shape[:2]
    real = torch.ones(batch, length, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    collected = [states]
    for index in range(config.num_hidden_layers):
        window = config.sliding_window if kinds[index] == "sliding_attention" else None
        mask = window_mask(length, window) & real[:, None, None, :]  # [B, 1, S, S]
        layer = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"layers.{index}.")}
        normed = rms_norm(states, layer["input_layernorm.weight"], config.rms_norm_eps)
        states = states + attention(layer, config, normed, positions, mask)
        normed = rms_norm(states, layer["post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = normed @ layer["mlp.gate_proj.weight"].T, normed @ layer["mlp.up_proj.weight"].T
        states = states + (silu(gate) * up) @ layer["mlp.down_proj.weight"].T
        collected.append(states)
    collected[-1] = rms_norm(states, weights["norm.weight"], config.rms_norm_eps)
    return collected


def logits(weights: Weights, config: Any, input_ids: Tensor | None = None, **inputs: Tensor | None) -> Tensor:
    """Next-token logits ``[B, S, V]`` from the weights of a `MistralForCausalLM`."""
    inner = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
    output = weights.get("lm_head.weight", inner["embed_tokens.weight"])
    return hidden_states(inner, config, input_ids, **inputs)[-1] @ output.T


def greedy(
    weights: Weights, config: Any, input_ids: Tensor, new_tokens: int, attention_mask: Tensor | None = None
) -> Tensor:
    """The prompt and `new_tokens` greedy tokens, ``[B, S + new_tokens]``; every step reads the whole text again."""
    for _ in range(new_tokens):
        following = logits(weights, config, input_ids, attention_mask=attention_mask)[:, -1:].argmax(dim=-1)
        input_ids = torch.cat([input_ids, following], dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, torch.ones_like(following)], dim=1)
    return input_ids


def window_mask(length: int, window: int | None) -> Tensor:
    """``[S, S]``, True where query q (row) sees key k (column)."""
    q, k = torch.arange(length)[:, None], torch.arange(length)
    return (k <= q) & (q - (length if window is None else window) < k)


def attention(layer: Weights, config: Any, states: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention, the key/value heads repeated for the query heads of their group."""
    q, k, v = (heads(states @ layer[f"self_attn.{name}_proj.weight"].T, config.head_dim) for name in "qkv")
    q, k = (rotate(states, positions, config.rope_parameters["rope_theta"]) for states in (q, k))
    groups = config.num_attention_heads // config.num_key_value_heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # [B, H, S, D]
    scores = q @ k.transpose(2, 3) / config.head_dim**0.5
    mixed = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=-1) @ v
    return mixed.transpose(1, 2).flatten(2) @ layer["self_attn.o_proj.weight"].T


def heads(states: Tensor, head_dim: int) -> Tensor:
    """``[B, S, heads * D]`` as ``[B, heads, S, D]``."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotate(states: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary embedding of ``[B, heads, S, D]``: elements i and i + D/2 are a complex number, turned by its angle."""
    half = states.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    x, y = states[..., :half], states[..., half:]
    return torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1)


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + eps)`` over the last dimension."""
    return weight * states / (states.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
