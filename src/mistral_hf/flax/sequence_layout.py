"""Positions, padding and packed sequences of the tokens of a forward pass.

Legend: B batch, S new tokens, T keys.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from .cache import FlaxRollingCache, oldest_first


def positions(mask: Array) -> Array:
    """Positions ``[B, S]`` of tokens with this mask: the first real token of a row has position 0."""
    count = mask.shape[1]
    first = jnp.where(mask.any(axis=1), jnp.argmax(mask, axis=1), count)
    return jnp.maximum(jnp.arange(count) - first[:, None], 0)


def packed_segments(position_ids: Array) -> Array:
    """Number of the packed sequence of every token, ``[B or 1, S]``; a sequence begins where positions restart.

    Args:
        position_ids: ``[B or 1, S]``; they restart wherever a position is not the one after the previous.
    """
    restarts = jnp.diff(position_ids, axis=1) != 1
    return jnp.pad(jnp.cumsum(restarts, axis=1), ((0, 0), (1, 0)))


def last_real_token(input_ids: Array, attention_mask: Array | None, pad_token_id: int | None) -> Array:
    """Index of the last real token of every row, ``[B]``: by the mask ``[B, S or more]``, else by the padding token."""
    count = input_ids.shape[1]
    if attention_mask is not None:
        real = attention_mask[:, -count:].astype(bool)
    elif pad_token_id is not None:
        real = input_ids != pad_token_id
    else:
        return jnp.full(input_ids.shape[0], count - 1)
    return jnp.argmax(real * jnp.arange(1, count + 1), axis=1)


def real_keys(mask: Array, past: FlaxRollingCache | None, cache: FlaxRollingCache | None) -> Array:
    """Which keys of the next attention call are not padding, ``[B, T]``; their order is that of `MistralAttention`.

    Args:
        mask: ``[B, S]``, False for new tokens that are padding.
        past: The cache before the new tokens.
        cache: The cache after them.
    """
    # The new tokens see only each other.
    if past is None or cache is None or past.empty:
        return mask
    # One token reads the slots as they lie, including its own.
    if mask.shape[1] == 1:
        return cache.real
    # Several read the old slots in order, then each other.
    return jnp.concatenate([oldest_first(past.real[:, None, :, None], past.length)[:, 0, :, 0], mask], axis=1)
