"""The rolling buffer of keys and values, in TensorFlow.

A token with index i in its sequence (padding is counted) lives in slot ``i % slots``. With four slots, a prompt of six
tokens and one decoding step:

    prefill  tokens 0 1 2 3 4 5 -> slots  0 1 2 3      holds tokens 4 5 2 3
    decode   token  6           -> slot   2            holds tokens 4 5 6 3

Legend: B batch, S new tokens, K key/value heads, D head_dim, N rows.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from .shapes import Size, Tensor, larger, size

PADDING = -1  # the segment of padding tokens and of empty slots
_MIN_SLOTS = 16


class TFRollingCache(NamedTuple):
    """Keys and values of the tokens that the next ones can see; a nest of tensors, none of which changes in place.

    Attributes:
        keys: ``[B, K, slots, D]`` of every layer, with rotary embeddings.
        values: ``[B, K, slots, D]`` of every layer.
        segments: ``[B, slots]`` int32, 0 for a real token and -1 for padding and empty slots.
        length: Scalar int32, the number of tokens so far, padding included.
        start: ``[B]`` int32, the index of a row's first real token.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    segments: Tensor
    length: Tensor
    start: Tensor

    def __repr__(self) -> str:
        length = int(self.length) if hasattr(self.length, "numpy") else self.length
        return (
            f"TFRollingCache(layers={len(self.keys)}, segments={getattr(self.segments, 'shape', '?')}, length={length})"
        )

    @property
    def slots(self) -> int:
        """Number of tokens that a layer has room for."""
        return self.segments.shape[1]

    def grown_for(self, count: int, window: int | None) -> TFRollingCache:
        """The cache with room for `count` more tokens or for the whole window; a buffer that grows at least doubles.

        Only outside of graphs, whose shapes are fixed.
        """
        needed = int(self.length) + count
        if needed <= self.slots or self.slots == window:
            return self
        more = min(max(needed, 2 * self.slots), window or needed * 2) - self.slots
        rows = [[0, 0], [0, 0], [0, more], [0, 0]]
        return self._replace(
            keys=tuple(tf.pad(keys, rows) for keys in self.keys),
            values=tuple(tf.pad(values, rows) for values in self.values),
            segments=tf.pad(self.segments, rows[1:3], constant_values=PADDING),
        )

    def gather_rows(self, rows: Tensor) -> TFRollingCache:
        """The cache of the batch rows with the indices ``[N]``, in that order."""
        return self._replace(
            keys=tuple(tf.gather(keys, rows) for keys in self.keys),
            values=tuple(tf.gather(values, rows) for values in self.values),
            segments=tf.gather(self.segments, rows),
            start=tf.gather(self.start, rows),
        )


def default_capacity(length: Size) -> Size:
    """Slots of a new cache after a prompt of this length: twice as many, since a full cache doubles."""
    return larger(2 * length, _MIN_SLOTS)


def last_written(slots: Size, count: Size, length: Size) -> Tensor:
    """Which of `count` new tokens each slot holds afterwards, ``[slots]``; negative where it is none of them.

    Args:
        slots: Number of slots.
        count: Number of new tokens.
        length: Number of tokens before them.
    """
    newest = count - 1 + length
    return newest - (newest - tf.range(slots)) % slots - length


def fill_slots(states: Tensor, written: Tensor, axis: int, empty: int) -> Tensor:
    """A new buffer with the first tokens of a sequence.

    Args:
        states: What the new tokens store, along `axis`.
        written: As `last_written` returns it.
        axis: The axis of tokens and slots.
        empty: Value of the slots without a token.
    """
    kept = tf.gather(states, tf.maximum(written, 0), axis=axis)
    holds = tf.reshape(written >= 0, [-1] + [1] * (states.shape.rank - 1 - axis))
    return tf.where(holds, kept, tf.constant(empty, kept.dtype))


def merge_slots(buffer: Tensor, states: Tensor, written: Tensor, axis: int) -> Tensor:
    """The buffer after several more tokens; arguments are those of `fill_slots`."""
    slots = size(buffer, axis)
    source = tf.where(written >= 0, slots + written, tf.range(slots))
    return tf.gather(tf.concat([buffer, states], axis=axis), source, axis=axis)


def write_slot(buffer: Tensor, state: Tensor, slot: Tensor) -> Tensor:
    """The buffer ``[B, K, slots, D]`` with one token's ``[B, K, 1, D]`` in a slot.

    A scatter, which XLA does in place within a compiled loop.
    """
    batch, heads = size(buffer, 0), size(buffer, 1)
    rows = tf.repeat(tf.range(batch), heads)
    columns = tf.tile(tf.range(heads), [batch])
    indices = tf.stack([rows, columns, tf.fill(tf.shape(rows), slot)], axis=1)
    return tf.tensor_scatter_nd_update(buffer, indices, tf.reshape(state, [-1, size(state, 3)]))


def oldest_first(slots: Size, length: Tensor) -> Tensor:
    """The indices ``[slots]`` that sort a buffer by time; slots that were never filled come first."""
    return (length + tf.range(slots)) % slots
