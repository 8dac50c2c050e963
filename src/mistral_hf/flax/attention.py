"""Attention within a sliding window, in JAX.

Legend: B batch, S queries (new tokens), T keys, K key/value heads, G query heads of each, D head_dim, W window.

A window of W means that a query sees W keys, itself among them: ``q - W < k <= q``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

BLOCK = 128  # queries that are attended together, against one band of keys
PIECES = 4  # of a long input whose window is so wide that most keys of a band would come after its queries


class AttentionContext(NamedTuple):
    """What all layers share in one forward pass.

    Attributes:
        cos, sin: ``[B or 1, 1, S, D]`` in float32, the first half of sin negated.
        real: ``[B, T]``, False for keys that are padding.
        segments: ``[B or 1, T]``, the number of the packed sequence of a token, or None if a row is one sequence.
        length: Number of tokens in the cache, or None without a cache.
        empty: Whether the cache is empty: it is then written but not read.
        weights_wanted: Whether layers return attention weights.
    """

    cos: Array
    sin: Array
    real: Array
    segments: Array | None
    length: Array | None
    empty: bool
    weights_wanted: bool


def attend(
    q: Array,
    k: Array,
    v: Array,
    real: Array,
    window: int | None,
    *,
    segments: Array | None = None,
    weights_wanted: bool = False,
    dropout: float = 0.0,
    dropout_key: Array | None = None,
    block: int = BLOCK,
) -> tuple[Array, Array | None]:
    """Attention of queries to the keys that they see, in blocks of queries if there are many.

    Args:
        q: ``[B, K, G, S, D]``: the last S of the T tokens.
        k, v: ``[B, K, T, D]``, oldest token first (for a single query that sees them all, in any order).
        real: ``[B, T]``, False for padding.
        window: W, or None to see all keys up to the query.
        segments: ``[B or 1, T]``, the number of the packed sequence of a token; None if a row is one sequence.
        weights_wanted: Return the weights too; all queries are then one block.
        dropout: Probability of dropping a weight.
        dropout_key: Random key; without one nothing is dropped.
        block: Number of queries in a block.

    Returns:
        ``[B, K, G, S, D]`` in the dtype of `v`, and the weights ``[B, K, G, S, T]`` or None.
    """
    count, total = q.shape[3], k.shape[2]
    drop = partial(_dropped, rate=dropout) if dropout and dropout_key is not None else None
    # Few queries: one mask for all of them.
    if weights_wanted or count <= 2 * block:
        visible = _visible(jnp.arange(total - count, total), jnp.arange(total), window) & real[:, None, None, None, :]
        if segments is not None:
            visible &= _same_segment(segments[:, total - count :], segments)
        output, weights = _attend_all(q, k, v, visible, drop, dropout_key)
        return output, weights if weights_wanted else None
    # A narrow window: bands are short. A wide one: a band reaches to the end of its piece, so cut several pieces.
    narrow = window is not None and window <= count // PIECES
    size = count if narrow else -(-count // (PIECES * block)) * block
    outputs = []
    for start in range(0, count, size):
        queries, end = q[:, :, :, start : start + size], min(total - count + start + size, total)
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        keys, values, real_part = k[:, :, :end], v[:, :, :end], real[:, :end]
        part = None if segments is None else segments[:, :end]
        outputs.append(_attend_by_blocks(queries, keys, values, real_part, window, part, drop, key, block))
    return jnp.concatenate(outputs, axis=3), None


def _visible(query: Array, key: Array, window: int | None) -> Array:
    """The window rule ``q - W < k <= q`` for indices of queries and keys, ``[S, T]``."""
    visible = key <= query[:, None]
    return visible if window is None else visible & (key > query[:, None] - window)


def _same_segment(queries: Array, keys: Array) -> Array:
    """Whether query and key are in one packed sequence, ``[B, 1, 1, S, T]``, from ``[B, S]`` and ``[B, T]``."""
    return queries[:, None, None, :, None] == keys[:, None, None, None, :]


def _attend_all(
    q: Array, k: Array, v: Array, visible: Array, drop: Any = None, key: Array | None = None
) -> tuple[Array, Array]:
    """Attention with a mask for ``[B, K, G, S, T]``, True where a query sees a key; softmax is in float32."""
    scores = _scores(q, k) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1).astype(v.dtype)
    if drop is not None:
        weights = drop(weights, key)
    return _mixed(weights, v).astype(v.dtype), weights


# For a single query, both products are written as sums: XLA fuses them with what computes their factors, which on a CPU
# is nearly twice as fast as its matrix product of such small matrices.


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


def _attend_by_blocks(
    q: Array,
    k: Array,
    v: Array,
    real: Array,
    window: int | None,
    segments: Array | None,
    drop: Any,
    dropout_key: Array | None,
    block_size: int,
) -> Array:
    """Each block of queries against the band of keys that any of them may see; memory grows as ``S * (W + block)``."""
    count, total = q.shape[3], k.shape[2]
    blocks = -(-count // block_size)
    reach = total if window is None else min(window - 1, total)  # keys before a block that its queries may see
    before, after = max(0, reach - (total - count)), blocks * block_size - count
    # Padding makes every block full and keeps every band within the keys.
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (before, after), (0, 0))) for x in (k, v))
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, after), (0, 0)))
    real = jnp.pad(real, ((0, 0), (before, after)))
    if segments is not None:
        segments = jnp.pad(segments, ((0, 0), (before, after)))
    first = before + total - count  # index of the first query among the padded keys
    band = reach + block_size

    @jax.checkpoint
    def attend_block(block: Array) -> Array:
        start = first + block * block_size
        queries = lax.dynamic_slice_in_dim(q, block * block_size, block_size, axis=3)
        keys, values = (lax.dynamic_slice_in_dim(x, start - reach, band, axis=2) for x in (k, v))
        visible = _visible(reach + jnp.arange(block_size), jnp.arange(band), window)
        visible &= lax.dynamic_slice_in_dim(real, start - reach, band, axis=1)[:, None, None, None, :]
        if segments is not None:
            of_queries = lax.dynamic_slice_in_dim(segments, start, block_size, axis=1)
            visible &= _same_segment(of_queries, lax.dynamic_slice_in_dim(segments, start - reach, band, axis=1))
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, block)
        return _attend_all(queries, keys, values, visible, drop, key)[0]

    output = lax.map(attend_block, jnp.arange(blocks))  # [blocks, B, K, G, block_size, D]
    output = jnp.moveaxis(output, 0, 3)
    return output.reshape(*output.shape[:3], blocks * block_size, output.shape[-1])[:, :, :, :count]
