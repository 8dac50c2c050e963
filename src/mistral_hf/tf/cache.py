"""The rolling buffer of keys and values, in TensorFlow.

A buffer has slots 0 to T-1; the token in column c of the sequence (padding counts as columns) lies in slot c mod T.

Legend: B batch, K key/value heads, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from .shapes import Size, Tensor, _most

PADDING = -1  # the segment of padding tokens, and of empty slots
_MIN_SLOTS = 16


class TFRollingCache(NamedTuple):
    """Keys and values of the tokens that the next ones can see; a nest of tensors, which nothing changes in place.

    Attributes:
        keys: ``[B, K, slots, D]`` of every layer, with rotary embeddings.
        values: ``[B, K, slots, D]`` of every layer.
        segments: ``[B, slots]`` int32, 0 for a real token and -1 for padding and empty slots.
        seen: Scalar int32, the tokens so far, padding among them.
        start: ``[B]`` int32, the column of a row's first real token.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    segments: Tensor
    seen: Tensor
    start: Tensor

    @property
    def slots(self) -> int:
        """Tokens that a layer has room for."""
        return self.segments.shape[1]

    def grown_for(self, count: int, window: int | None) -> TFRollingCache:
        """The same with room for `count` more tokens, or for the window: at least doubled if there is too little.

        Only outside of graphs, whose shapes are fixed.
        """
        needed = int(self.seen) + count
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
        """The rows of the batch that ``[N]`` names, in that order."""
        return self._replace(
            keys=tuple(tf.gather(keys, rows) for keys in self.keys),
            values=tuple(tf.gather(values, rows) for values in self.values),
            segments=tf.gather(self.segments, rows),
            start=tf.gather(self.start, rows),
        )


def default_capacity(length: Size) -> Size:
    """Room of a new cache after a prompt of this length: twice as much, as it doubles when it is full."""
    return _most(2 * length, _MIN_SLOTS)
