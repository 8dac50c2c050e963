"""A small forward pass of the raw format: raw names, interleaved RoPE, float32, one layer in memory at a time.

It shares no code with the conversion, so its logits can be compared with those of the converted model.

Legend: S tokens, H heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checkpoints.reader import Checkpoint
from .params import Params

Floats = npt.NDArray[np.float32]


def raw_logits(checkpoint: Checkpoint, params: Params, tokens: Sequence[int]) -> Floats:
    """The logits of a raw checkpoint for one sequence.

    Args:
        checkpoint: Opened with stem ``"consolidated"``.
        params: From `complete_params`.
        tokens: S token ids.

    Returns:
        ``[S, V]`` in float32.
    """

    def weight(name: str) -> Floats:
        return checkpoint.read(f"{name}.weight").astype(np.float32)

    eps = params["norm_eps"]
    angles = _angles(params, len(tokens))
    scale = _position_scale(params, len(tokens))
    h = weight("tok_embeddings")[list(tokens)]
    for n in range(params["n_layers"]):
        x = _rms_norm(h, weight(f"layers.{n}.attention_norm"), eps)
        q, k, v = (x @ weight(f"layers.{n}.attention.w{part}").T for part in "qkv")
        h = h + _attend(q, k, v, angles, scale, params, _window(params, n)) @ weight(f"layers.{n}.attention.wo").T
        x = _rms_norm(h, weight(f"layers.{n}.ffn_norm"), eps)
        gate, up = (x @ weight(f"layers.{n}.feed_forward.w{i}").T for i in (1, 3))
        h = h + (gate / (1 + np.exp(-gate)) * up) @ weight(f"layers.{n}.feed_forward.w2").T
    head = weight("tok_embeddings" if params["tied_embeddings"] else "output")
    logits: Floats = _rms_norm(h, weight("norm"), eps) @ head.T
    return logits


def _rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    normed: Floats = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight
    return normed


def _window(params: Params, layer: int) -> int | None:
    """The window of a layer, None for full attention."""
    windows = params["sliding_window"]
    return windows[layer] if isinstance(windows, list) else windows


def _attend(
    q: Floats, k: Floats, v: Floats, angles: npt.NDArray[Any], scale: Floats, params: Params, window: int | None
) -> Floats:
    """Causal attention of ``[S, heads * D]`` queries, keys and values within the window."""
    length, dim = len(q), params["head_dim"]
    groups = params["n_heads"] // params["n_kv_heads"]
    q = _rotate(q.reshape(length, -1, dim), angles) * scale  # [S, H, D]
    k = np.repeat(_rotate(k.reshape(length, -1, dim), angles), groups, axis=1)
    v = np.repeat(v.reshape(length, -1, dim), groups, axis=1)
    scores = np.einsum("shd,thd->hst", q, k) / math.sqrt(dim)
    distance = np.arange(length)[:, None] - np.arange(length)
    scores = np.where((distance >= 0) & (distance < (window or length)), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    out: Floats = np.einsum("hst,thd->shd", scores / scores.sum(-1, keepdims=True), v)
    return out.reshape(length, -1).astype(np.float32)


def _rotate(x: Floats, angles: npt.NDArray[np.complex64]) -> Floats:
    """Rotate the interleaved pairs (0, 1), (2, 3), ... of ``[S, H, D]`` as complex numbers."""
    rotated = np.ascontiguousarray(x, np.float32).view(np.complex64) * angles[:, None]
    return rotated.view(np.float32)


def _angles(params: Params, length: int) -> npt.NDArray[np.complex64]:
    """``[S, D / 2]`` complex numbers of length 1, times yarn's attention factor (https://arxiv.org/abs/2309.00071)."""
    dim, theta, yarn = params["head_dim"], params["rope_theta"], params["yarn"]
    frequencies = theta ** (-np.arange(0, dim, 2) / dim)
    factor = 1.0
    if yarn:
        original = yarn["original_max_position_embeddings"]
        low, high = (
            dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (yarn["beta"], yarn["alpha"])
        )
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
        frequencies = frequencies * (1 - ramp) + frequencies / yarn["factor"] * ramp
        factor = 0.1 * math.log(max(yarn["factor"], 1)) + 1 if yarn["apply_scale"] else 1.0
    angles = np.outer(np.arange(length), frequencies.astype(np.float32).astype(np.float64))
    return (factor * np.exp(1j * angles)).astype(np.complex64)


def _position_scale(params: Params, length: int) -> Floats:
    """``[S, 1, 1]``: the factor on the query at each position, 1 without Llama-4 style scaling."""
    scaling = params["llama_4_scaling"]
    if not scaling:
        return np.ones((length, 1, 1), np.float32)
    rounds = np.arange(length) // scaling["original_max_position_embeddings"]
    return (1 + scaling["beta"] * np.log1p(rounds)).astype(np.float32)[:, None, None]
