"""Attention within the window, and who sees whom, for the TensorFlow port: functions of tensors.

Legend: B batch, S new tokens, P cached ones, T keys, H query heads, K key/value heads, D head_dim, W window.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from .cache import PADDING, TFRollingCache
from .shapes import Size, Tensor, _cut, _least, _most, size

Dropout: TypeAlias = Callable[[Tensor, Size], Tensor]
"""Takes attention weights and the number of the block of queries that they are of."""

BLOCK = 1024  # queries that are attended at once; more of them go block by block, each against its band of keys
_OUTSIDE = -2  # the segment of what only fills up a block


class AttentionPlan:
    """What all layers of one forward pass share: who sees whom, and where keys and values are kept.

    Args:
        window: W, or None for full attention.
        segments: ``[B, S]`` int32 of the new tokens; tokens see those of their own segment.
        cache: The tokens before them.
        capacity: Tokens that a new cache is to have room for; None keeps none. Of no effect if there is a cache.
    """

    def __init__(self, window: int | None, segments: Tensor, cache: TFRollingCache | None, capacity: Size | None):
        self.window, self.segments, self.cache = window, segments, cache
        self.length = size(segments, 1)
        self.keeps = cache is not None or capacity is not None
        self.in_ring_order = cache is not None and segments.shape[1] == 1
        self.key_segments, seen = segments, 0
        self.slots: Size = 0 if capacity is None else _least(capacity, window)
        if cache is not None:
            self.slots, seen = size(cache.segments, 1), cache.seen
            self._see_past(cache, segments)
        if self.keeps and not self.in_ring_order:
            end = self.length - 1 + seen
            before = (end - tf.range(self.slots)) % self.slots
            self.column = end - before - seen  # of what each slot will hold, 0 being the first new token

    def _see_past(self, cache: TFRollingCache, segments: Tensor) -> None:
        if self.in_ring_order:
            self.slot = cache.seen % self.slots
            self.key_segments = self._write(cache.segments[:, None, :, None], segments[:, None, :, None])[:, 0, :, 0]
        else:
            self.order = (cache.seen + tf.range(self.slots)) % self.slots
            past = tf.gather(cache.segments, self.order, axis=1)
            self.key_segments = tf.concat([past, segments], axis=1)  # [B, P + S]

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Keys and values to attend to, and the layer's buffers after this step.

        Args:
            layer: Index of the layer.
            k: ``[B, K, S, D]`` of the new tokens, with rotary embeddings.
            v: ``[B, K, S, D]``.

        Returns:
            Keys and values ``[B, K, T, D]``, for one token in the order of the slots and otherwise in that of time;
            and the new buffers ``[B, K, slots, D]``, or None where nothing is kept.
        """
        if not self.keeps:
            return k, v, None
        if self.cache is None:
            return k, v, (self._first(k), self._first(v))
        old_k, old_v = self.cache.keys[layer], self.cache.values[layer]
        if self.in_ring_order:
            k, v = self._write(old_k, k), self._write(old_v, v)
            return k, v, (k, v)
        stored = self._merge(old_k, k), self._merge(old_v, v)
        past_k, past_v = (tf.gather(old, self.order, axis=2) for old in (old_k, old_v))
        return tf.concat([past_k, k], axis=2), tf.concat([past_v, v], axis=2), stored

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: Dropout, weights_wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``[B, H, S, D]`` queries to what `store` gave, of the same shape; weights ``[B, H, S, T]``."""
        if self.in_ring_order:
            visible = self.segments[:, :, None] == self.key_segments[:, None, :]
        elif weights_wanted or (q.shape[2] is not None and q.shape[2] <= BLOCK):
            visible = self._visible(0, self.length, 0, size(k, 2), self.segments, self.key_segments)
        else:
            return self._attend_by_blocks(q, k, v, dropout), None
        return mix(q, k, v, visible, dropout, 0)

    def finished(self, stored: list[tuple[Tensor, Tensor]], start: Tensor) -> TFRollingCache | None:
        """The cache after all layers, or None if nothing is kept. `start` is ``[B]``, as in the cache."""
        if not self.keeps:
            return None
        if self.in_ring_order:
            segments = self.key_segments
        elif self.cache is None:
            kept = tf.gather(self.segments, tf.maximum(self.column, 0), axis=1)
            segments = tf.where(self.column >= 0, kept, PADDING)
        else:
            segments = self._merge(self.cache.segments[:, None, :, None], self.segments[:, None, :, None])[:, 0, :, 0]
        seen = self.length + (0 if self.cache is None else self.cache.seen)
        keys, values = zip(*stored, strict=True) if stored else ((), ())
        return TFRollingCache(tuple(keys), tuple(values), segments, tf.convert_to_tensor(seen, tf.int32), start)

    def _write(self, buffer: Tensor, state: Tensor) -> Tensor:
        """``[B, K, slots, D]`` with one token's ``[B, K, 1, D]`` in its slot; in place within a compiled loop."""
        batch, heads = size(buffer, 0), size(buffer, 1)
        rows = tf.repeat(tf.range(batch), heads)
        columns = tf.tile(tf.range(heads), [batch])
        places = tf.stack([rows, columns, tf.fill(tf.shape(rows), self.slot)], axis=1)
        return tf.tensor_scatter_nd_update(buffer, places, tf.reshape(state, [-1, size(state, 3)]))

    def _first(self, states: Tensor) -> Tensor:
        """The buffer after the first tokens of a sequence."""
        kept = tf.gather(states, tf.maximum(self.column, 0), axis=2)
        return tf.where(self.column[:, None] >= 0, kept, tf.zeros_like(kept))

    def _merge(self, buffer: Tensor, states: Tensor) -> Tensor:
        """The buffer after several more tokens."""
        both = tf.concat([buffer, states], axis=2)
        source = tf.where(self.column >= 0, self.slots + self.column, tf.range(self.slots))
        return tf.gather(both, source, axis=2)

    def _visible(
        self, first_query: Size, queries: Size, first_key: Size, keys: Size, q_segments: Tensor, k_segments: Tensor
    ) -> Tensor:
        """``[B, queries, keys]``, True where ``q - W < k <= q`` and both are of one segment."""
        past = size(self.key_segments, 1) - self.length
        q = (past + first_query + tf.range(queries))[:, None]
        k = first_key + tf.range(keys)
        inside = k <= q if self.window is None else (k <= q) & (q - self.window < k)
        return inside & (q_segments[:, :, None] == k_segments[:, None, :])

    def _attend_by_blocks(self, q: Tensor, k: Tensor, v: Tensor, dropout: Dropout) -> Tensor:
        """Each block of queries sees a band of keys as long as itself and the window: no mask is S long and wide."""
        length, total = size(q, 2), size(k, 2)
        block = _least(BLOCK, length)
        count = -(-length // block)
        past, fill = total - length, count * block - length
        band = _least(total + fill, None if self.window is None else self.window - 1 + block)
        q = tf.pad(q, [[0, 0], [0, 0], [0, fill], [0, 0]])
        k, v = (tf.pad(states, [[0, 0], [0, 0], [0, fill], [0, 0]]) for states in (k, v))
        q_segments = tf.pad(self.segments, [[0, 0], [0, fill]], constant_values=_OUTSIDE)
        k_segments = tf.pad(self.key_segments, [[0, 0], [0, fill]], constant_values=_OUTSIDE)

        def attend(number: Tensor) -> Tensor:
            first = number * block
            low = 0 if self.window is None else _least(_most(past + first - self.window + 1, 0), total + fill - band)
            near_q, near_k = _cut(q_segments, 1, first, block), _cut(k_segments, 1, low, band)
            visible = self._visible(first, block, low, band, near_q, near_k)
            band_k, band_v = _cut(k, 2, low, band), _cut(v, 2, low, band)
            return mix(_cut(q, 2, first, block), band_k, band_v, visible, dropout, number)[0]

        shape = [q.shape[0], q.shape[1], block if isinstance(block, int) else None, q.shape[3]]
        parts = tf.map_fn(
            attend,
            tf.range(count),
            fn_output_signature=tf.TensorSpec(shape, q.dtype),
            parallel_iterations=1,
        )  # [blocks, B, H, block, D]
        joined = tf.reshape(tf.transpose(parts, [1, 2, 0, 3, 4]), [size(q, 0), size(q, 1), count * block, q.shape[3]])
        return joined[:, :, :length]


def mix(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: Dropout, number: Size) -> tuple[Tensor, Tensor]:
    """Grouped-query attention; the query heads of a group are rows of one product. Softmax is in at least float32.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, K, T, D]``.
        v: ``[B, K, T, D]``.
        visible: ``[B, S, T]`` boolean.
        dropout: Applied to the weights.
        number: Of the block of queries, for `dropout`.

    Returns:
        ``[B, H, S, D]``, and the weights ``[B, H, S, T]``.
    """
    batch, heads, queries, head_dim = (size(q, axis) for axis in range(4))
    kv_heads, keys = size(k, 1), size(k, 2)
    groups = heads // kv_heads
    rows = tf.reshape(q * head_dim**-0.5, [batch, kv_heads, groups * queries, head_dim])
    scores = tf.cast(tf.matmul(rows, k, transpose_b=True), tf.float32)
    scores = tf.reshape(scores, [batch, heads, queries, keys])
    weights = tf.nn.softmax(tf.where(visible[:, None], scores, tf.float32.min))
    weights = dropout(tf.cast(weights, v.dtype), number)
    mixed = tf.matmul(tf.reshape(weights, [batch, kv_heads, groups * queries, keys]), v)
    return tf.reshape(mixed, [batch, heads, queries, head_dim]), weights
