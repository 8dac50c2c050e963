"""The rolling buffer of keys and values, in JAX.

Legend: B batch, S new tokens, K key/value heads, D head_dim, W window.

The token with index p (counted from the start of its row, padding included) is kept in slot ``p % slots`` of a buffer
``[B, K, slots, D]`` with at most W slots. With W=4, a prompt of six tokens and one decoding step:

    prompt   tokens 0 1 2 3 4 5 -> slots  0 1 2 3      holds tokens 4 5 2 3
    decode   token  6           -> slot   2            holds tokens 4 5 6 3: exactly those that query 6 sees
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxRollingCache:
    """Keys and values of the last tokens of every layer; an immutable pytree: every call returns a new one.

    Attributes:
        keys: ``[B, K, slots, D]`` for every layer, or all layers in one ``[layers, B, K, slots, D]``.
        values: As `keys`.
        real: ``[B, slots]``, False for slots that are empty or hold padding.
        length: Number of tokens in a row so far, padding included; an int32 scalar.
        start: ``[B]`` int32, index of a row's first token that is not padding.
        empty: Whether nothing has been stored; known when a program is compiled.
    """

    keys: Any
    values: Any
    real: Array
    length: Array
    start: Array
    empty: bool = field(default=False, metadata={"static": True})

    @property
    def slots(self) -> int:
        """Number of tokens that the buffer can hold."""
        return int(self.real.shape[1])

    def advance(self, real: Array) -> FlaxRollingCache:
        """The cache after new tokens, whose keys and values the layers have yet to store.

        Args:
            real: ``[B, S]``, False for padding.
        """
        count = real.shape[1]
        first = jnp.where(real.any(axis=1), jnp.argmax(real, axis=1), count) + self.length
        return FlaxRollingCache(
            keys=self.keys,
            values=self.values,
            real=store(self.real[:, None, :, None], real[:, None, :, None], self.length)[:, 0, :, 0],
            length=self.length + count,
            start=jnp.where(self.start < self.length, self.start, first),
        )

    def positions(self, count: int) -> Array:
        """Positions ``[B, count]`` of the last `count` tokens: the first real token of a row has position 0."""
        index = self.length - count + jnp.arange(count)
        return jnp.maximum(index - self.start[:, None], 0)

    def without_last(self, dropped: Array, written: int) -> FlaxRollingCache:
        """The cache without its last `dropped` tokens, of the `written` ones stored in one call.

        What these replaced is lost: within a window, the buffer needs at least that many slots beyond the window.
        """
        if written == 1:
            return self
        slots = (self.length - 1 - jnp.arange(written)) % self.slots
        real = self.real.at[:, slots].min(jnp.arange(written) >= dropped)
        return replace(self, real=real, length=self.length - dropped)

    def gather_rows(self, rows: Array) -> FlaxRollingCache:
        """The cache whose rows are those that the indices ``[N]`` name, in that order."""
        axis = 0 if isinstance(self.keys, tuple) else 1
        keys, values = jax.tree.map(partial(jnp.take, indices=rows, axis=axis), (self.keys, self.values))
        return replace(self, keys=keys, values=values, real=self.real[rows], start=self.start[rows])


def empty_cache(layers: int, stacked: bool, shape: tuple[int, int, int, int], dtype: Any) -> FlaxRollingCache:
    """A `FlaxRollingCache` without tokens.

    Args:
        layers: Number of layers.
        stacked: Whether all layers share one array of keys and one of values.
        shape: ``[B, K, slots, D]`` of a layer.
        dtype: Of keys and values.
    """

    def zeros() -> Any:
        return jnp.zeros((layers, *shape), dtype) if stacked else tuple(jnp.zeros(shape, dtype) for _ in range(layers))

    batch, slots = shape[0], shape[2]
    length, start = jnp.zeros((), jnp.int32), jnp.zeros(batch, jnp.int32)
    return FlaxRollingCache(zeros(), zeros(), jnp.zeros((batch, slots), bool), length, start, empty=True)


def store(ring: Array, new: Array, length: Array) -> Array:
    """Put new tokens into their slots.

    Args:
        ring: ``[B, K, slots, D]``.
        new: ``[B, K, S, D]``; of more than `slots` tokens, the last are kept.
        length: Number of tokens before them.

    Returns:
        The new buffer, of the shape of `ring`.
    """
    slots, count = ring.shape[2], new.shape[2]
    if count == 1:
        return lax.dynamic_update_slice_in_dim(ring, new, length % slots, axis=2)
    newest = length + count - 1
    source = count - 1 - (newest - jnp.arange(slots)) % slots  # the new token for each slot; negative where none is
    kept = jnp.take(new, jnp.maximum(source, 0), axis=2)
    return jnp.where((source >= 0)[:, None], kept, ring)


def oldest_first(ring: Array, length: Array) -> Array:
    """The slots ``[B, K, slots, D]``, oldest token first; slots that were never filled come before all others."""
    slots = ring.shape[2]
    return jnp.take(ring, (length + jnp.arange(slots)) % slots, axis=2)
