"""Attention within a sliding window, in JAX.

Legend: B batch, S queries (new tokens), T keys, K key/value heads, G query heads of each, D head_dim, W window.

A window of W means that a query sees W keys, itself among them: ``q - W < k <= q``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

BLOCK = 128  # queries that meet their band of keys at once
PIECES = 4  # of a long input whose window is so wide that most keys of a band would lie behind its queries


def attend(
    q: Array,
    k: Array,
    v: Array,
    real: Array,
    window: int | None,
    *,
    weights_wanted: bool = False,
    dropout: float = 0.0,
    dropout_key: Array | None = None,
) -> tuple[Array, Array | None]:
    """Attention of queries to the keys that they see, in blocks of queries if there are many.

    Args:
        q: ``[B, K, G, S, D]``: the last S of the T tokens.
        k, v: ``[B, K, T, D]``, in their order (for one query, in any order, if it sees them all).
        real: ``[B, T]``, False for padding.
        window: W, or None for all keys up to the query.
        weights_wanted: Return the weights too, in one block.
        dropout: Probability that a weight is dropped.
        dropout_key: Random key; without one nothing is dropped.

    Returns:
        ``[B, K, G, S, D]`` in the dtype of `v`, and the weights ``[B, K, G, S, T]`` or None.
    """
    count, total = q.shape[3], k.shape[2]
    drop = partial(_dropped, rate=dropout) if dropout and dropout_key is not None else None
    if weights_wanted or count <= 2 * BLOCK:
        seen = _seen(jnp.arange(total - count, total), jnp.arange(total), window) & real[:, None, None, None, :]
        output, weights = _attend_all(q, k, v, seen, drop, dropout_key)
        return output, weights if weights_wanted else None
    narrow = window is not None and window <= count // PIECES
    size = count if narrow else -(-count // (PIECES * BLOCK)) * BLOCK
    outputs = []
    for start in range(0, count, size):
        queries, end = q[:, :, :, start : start + size], min(total - count + start + size, total)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        keys, values, known = k[:, :, :end], v[:, :, :end], real[:, :end]
        outputs.append(_attend_in_blocks(queries, keys, values, known, window, drop, key))
    return jnp.concatenate(outputs, axis=3), None


def _seen(query: Array, key: Array, window: int | None) -> Array:
    """The window rule for indices of queries and keys, ``[S, T]``."""
    seen = key <= query[:, None]
    return seen if window is None else seen & (key > query[:, None] - window)


def _attend_all(
    q: Array, k: Array, v: Array, seen: Array, drop: Any = None, key: Array | None = None
) -> tuple[Array, Array]:
    scores = _scores(q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
    if drop is not None:
        weights = drop(weights, key)
    return _mixed(weights, v).astype(v.dtype), weights


# With a single query, both products are sums: XLA fuses them with their factors, and on a CPU they are nearly twice as
# fast as its products of such small matrices.


def _scores(q: Array, k: Array) -> Array:
    if q.shape[3] == 1:
        products = q.astype(jnp.float32) * k[:, :, None].astype(jnp.float32)  # [B, K, G, T, D]
        return products.sum(axis=-1)[:, :, :, None]
    return jnp.einsum("bkgsd,bktd->bkgst", q, k, preferred_element_type=jnp.float32)


def _mixed(weights: Array, v: Array) -> Array:
    if weights.shape[3] == 1:
        products = weights.swapaxes(3, 4).astype(jnp.float32) * v[:, :, None].astype(jnp.float32)  # [B, K, G, T, D]
        return products.sum(axis=3, keepdims=True)
    return jnp.einsum("bkgst,bktd->bkgsd", weights, v, preferred_element_type=jnp.float32)


def _dropped(weights: Array, key: Array, rate: float) -> Array:
    kept = jax.random.bernoulli(key, 1 - rate, weights.shape)
    return jnp.where(kept, weights / (1 - rate), 0).astype(weights.dtype)


def _attend_in_blocks(
    q: Array, k: Array, v: Array, real: Array, window: int | None, drop: Any, dropout_key: Array | None
) -> Array:
    """Every block of queries against the band of keys that one of them may see; memory grows as S * (W + BLOCK)."""
    count, total = q.shape[3], k.shape[2]
    blocks = -(-count // BLOCK)
    reach = total if window is None else min(window - 1, total)  # keys before a block that it may see
    before, after = max(0, reach - (total - count)), blocks * BLOCK - count
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (before, after), (0, 0))) for x in (k, v))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, after), (0, 0)))
    real = jnp.pad(real, ((0, 0), (before, after)))
    first = before + total - count  # index of the first query, after padding
    band = reach + BLOCK

    @jax.checkpoint
    def attend_block(block: Array) -> Array:
        start = first + block * BLOCK
        queries = lax.dynamic_slice_in_dim(q, block * BLOCK, BLOCK, axis=3)
        keys, values = (lax.dynamic_slice_in_dim(x, start - reach, band, axis=2) for x in (k, v))
        seen = _seen(reach + jnp.arange(BLOCK), jnp.arange(band), window)
        seen &= lax.dynamic_slice_in_dim(real, start - reach, band, axis=1)[:, None, None, None, :]
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, block)
        return _attend_all(queries, keys, values, seen, drop, key)[0]

    output = lax.map(attend_block, jnp.arange(blocks))  # [blocks, B, K, G, BLOCK, D]
    output = jnp.moveaxis(output, 0, 3)
    return output.reshape(*output.shape[:3], blocks * BLOCK, output.shape[-1])[:, :, :, :count]
