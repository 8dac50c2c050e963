"""Attention within the sliding window, in TensorFlow.

A window of W means that a query sees W keys, itself among them: ``q - W < k <= q``. Tokens see only those of their own
segment: padding is one, and each packed sequence is another.

Legend: B batch, S new tokens, P cached tokens, T keys, H query heads, K key/value heads, D head_dim, W window.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from .cache import PADDING, TFRollingCache, fill_slots, last_written, merge_slots, oldest_first, write_slot
from .shapes import Size, Tensor, larger, size, slice_axis, smaller

Dropout: TypeAlias = Callable[[Tensor, Size], Tensor]  # from attention weights and the index of their block of queries
Buffers: TypeAlias = tuple[Tensor, Tensor]  # a layer's keys and values, each [B, K, slots, D]

BLOCK = 1024  # queries that are attended together; more are processed block by block, each against its band of keys
_FILL = -2  # the segment of what only fills up the last block


def attention_context(
    window: int | None, segments: Tensor, cache: TFRollingCache | None, capacity: Size | None
) -> AttentionContext:
    """The `AttentionContext` of a forward pass.

    Args:
        window: W, or None for full attention.
        segments: ``[B, S]`` int32, the segments of the new tokens.
        cache: The tokens before them.
        capacity: Tokens that a new cache is to have room for; None makes none. It has no effect if there is a cache.
    """
    # The first tokens of a sequence see each other only.
    if cache is None:
        return _Prefill(window, segments, capacity)
    # One more token sees all slots, in whichever order they lie.
    if segments.shape[1] == 1:
        return _Decode(window, segments, cache)
    # Several more tokens, or an unknown number, need the order of time: not every one of them sees all keys.
    return _Extend(window, segments, cache)


class AttentionContext(ABC):
    """What all layers share in one forward pass: which tokens see which, and where keys and values are kept.

    Attributes:
        window: W, or None for full attention.
        segments: ``[B, S]`` int32 of the new tokens.
        key_segments: ``[B, T]`` int32 of the keys that `store` returns, in their order.
        slot_segments: ``[B, slots]`` int32 of the cache after this pass, or None if there is none.
        length: Number of tokens after this pass.
    """

    window: int | None
    segments: Tensor
    key_segments: Tensor
    slot_segments: Tensor | None
    length: Size

    @abstractmethod
    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Buffers | None]:
        """Put new keys and values into a layer's buffers.

        Args:
            layer: Index of the layer.
            k: ``[B, K, S, D]`` of the new tokens, with rotary embeddings.
            v: ``[B, K, S, D]``.

        Returns:
            The keys and values ``[B, K, T, D]`` to attend to, and the layer's new buffers, or None if nothing is kept.
        """

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: Dropout, weights_wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of queries to what `store` returned.

        Args:
            q: ``[B, H, S, D]``.
            k: ``[B, K, T, D]``.
            v: ``[B, K, T, D]``.
            dropout: Applied to the weights.
            weights_wanted: Whether the weights are returned in any case.

        Returns:
            ``[B, H, S, D]``, and the weights ``[B, H, S, T]``, which may be None if they are not wanted.
        """
        return attend(q, k, v, self.segments, self.key_segments, self.window, dropout, weights_wanted)

    def updated_cache(self, buffers: list[Buffers], start: Tensor) -> TFRollingCache:
        """The cache after this pass, if it keeps one.

        Args:
            buffers: Those of all layers, as `store` returned them.
            start: ``[B]``, as in the cache.
        """
        keys, values = zip(*buffers, strict=True) if buffers else ((), ())
        length = tf.convert_to_tensor(self.length, tf.int32)
        return TFRollingCache(tuple(keys), tuple(values), self.slot_segments, length, start)


class _Prefill(AttentionContext):
    """The first tokens of a sequence see each other; the last ones fill a new cache, if one is made."""

    def __init__(self, window: int | None, segments: Tensor, capacity: Size | None) -> None:
        self.window, self.segments, self.key_segments = window, segments, segments
        self.length, self.slot_segments = size(segments, 1), None
        if capacity is not None:
            slots = capacity if window is None else smaller(capacity, window)
            self._written = last_written(slots, self.length, 0)
            self.slot_segments = fill_slots(segments, self._written, axis=1, empty=PADDING)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Buffers | None]:
        if self.slot_segments is None:
            return k, v, None
        return k, v, (fill_slots(k, self._written, axis=2, empty=0), fill_slots(v, self._written, axis=2, empty=0))


class _Decode(AttentionContext):
    """One token after a cache is stored first, then reads the slots as they lie.

    It sees every slot of its segment: the slots hold no more than its window.
    """

    def __init__(self, window: int | None, segments: Tensor, cache: TFRollingCache) -> None:
        self.window, self.segments, self._cache = window, segments, cache
        self.length = cache.length + 1
        self._slot = cache.length % size(cache.segments, 1)
        written = write_slot(cache.segments[:, None, :, None], segments[:, None, :, None], self._slot)
        self.key_segments = self.slot_segments = written[:, 0, :, 0]
        self._visible = segments[:, :, None] == self.key_segments[:, None, :]

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Buffers | None]:
        k = write_slot(self._cache.keys[layer], k, self._slot)
        v = write_slot(self._cache.values[layer], v, self._slot)
        return k, v, (k, v)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, dropout: Dropout, weights_wanted: bool
    ) -> tuple[Tensor, Tensor | None]:
        return mix(q, k, v, self._visible, dropout, 0)


class _Extend(AttentionContext):
    """Several tokens after a cache see the old slots, sorted by time, then each other; they are stored afterwards.

    Stored first, they would overwrite tokens that the earlier ones among them still see.
    """

    def __init__(self, window: int | None, segments: Tensor, cache: TFRollingCache) -> None:
        self.window, self.segments, self._cache = window, segments, cache
        count, slots = size(segments, 1), size(cache.segments, 1)
        self.length = cache.length + count
        self._order = oldest_first(slots, cache.length)
        self._written = last_written(slots, count, cache.length)
        self.key_segments = self._after_cached(cache.segments, segments, axis=1)  # [B, P + S]
        self.slot_segments = merge_slots(cache.segments, segments, self._written, axis=1)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Buffers | None]:
        old_k, old_v = self._cache.keys[layer], self._cache.values[layer]
        buffers = merge_slots(old_k, k, self._written, axis=2), merge_slots(old_v, v, self._written, axis=2)
        return self._after_cached(old_k, k, axis=2), self._after_cached(old_v, v, axis=2), buffers

    def _after_cached(self, buffer: Tensor, new: Tensor, axis: int) -> Tensor:
        return tf.concat([tf.gather(buffer, self._order, axis=axis), new], axis=axis)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Tensor,
    k_segments: Tensor,
    window: int | None,
    dropout: Dropout,
    weights_wanted: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of the last S of T tokens, in the order of time; in blocks of queries if there are many.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, K, T, D]``.
        v: ``[B, K, T, D]``.
        q_segments: ``[B, S]`` int32.
        k_segments: ``[B, T]`` int32.
        window: W, or None for full attention.
        dropout: Applied to the weights.
        weights_wanted: Whether the weights are returned in any case, which takes memory of ``S * T``.

    Returns:
        ``[B, H, S, D]``, and the weights ``[B, H, S, T]``, or None from several blocks.
    """
    if weights_wanted or (q.shape[2] is not None and q.shape[2] <= BLOCK):
        visible = _visible(size(k, 2) - size(q, 2), 0, q_segments, k_segments, window)
        return mix(q, k, v, visible, dropout, 0)
    return _attend_by_blocks(q, k, v, q_segments, k_segments, window, dropout), None


def _visible(first_query: Size, first_key: Size, q_segments: Tensor, k_segments: Tensor, window: int | None) -> Tensor:
    """``[B, S, T]``, True where ``q - W < k <= q`` and both are of one segment.

    Args:
        first_query: Index of the first query among all tokens.
        first_key: Index of the first key.
        q_segments: ``[B, S]``.
        k_segments: ``[B, T]``.
        window: W, or None.
    """
    q = (first_query + tf.range(size(q_segments, 1)))[:, None]
    k = first_key + tf.range(size(k_segments, 1))
    inside = k <= q if window is None else (k <= q) & (q - window < k)
    return inside & (q_segments[:, :, None] == k_segments[:, None, :])


def _attend_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, q_segments: Tensor, k_segments: Tensor, window: int | None, dropout: Dropout
) -> Tensor:
    """Each block of queries sees a band of keys as long as itself and the window: no mask has ``S * T`` elements."""
    length, total = size(q, 2), size(k, 2)
    block = smaller(BLOCK, length)
    count = -(-length // block)
    past, fill = total - length, count * block - length
    band = total + fill if window is None else smaller(total + fill, window - 1 + block)
    # Blocks and bands have one shape each: queries and keys are filled up to whole blocks.
    q = tf.pad(q, [[0, 0], [0, 0], [0, fill], [0, 0]])
    k, v = (tf.pad(states, [[0, 0], [0, 0], [0, fill], [0, 0]]) for states in (k, v))
    q_segments, k_segments = (
        tf.pad(segments, [[0, 0], [0, fill]], constant_values=_FILL) for segments in (q_segments, k_segments)
    )

    def attend_block(index: Tensor) -> Tensor:
        first_query = index * block
        # A band begins with the first key that its first query sees, but ends with the last key at the latest.
        first_key = 0 if window is None else smaller(larger(past + first_query - window + 1, 0), total + fill - band)
        block_segments = slice_axis(q_segments, 1, first_query, block)
        band_segments = slice_axis(k_segments, 1, first_key, band)
        visible = _visible(past + first_query, first_key, block_segments, band_segments, window)
        band_k, band_v = slice_axis(k, 2, first_key, band), slice_axis(v, 2, first_key, band)
        return mix(slice_axis(q, 2, first_query, block), band_k, band_v, visible, dropout, index)[0]

    shape = [q.shape[0], q.shape[1], block if isinstance(block, int) else None, q.shape[3]]
    parts = tf.map_fn(
        attend_block,
        tf.range(count),
        fn_output_signature=tf.TensorSpec(shape, q.dtype),
        parallel_iterations=1,
    )  # [blocks, B, H, block, D]
    joined = tf.reshape(tf.transpose(parts, [1, 2, 0, 3, 4]), [size(q, 0), size(q, 1), count * block, q.shape[3]])
    return joined[:, :, :length]


def mix(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: Dropout, block: Size) -> tuple[Tensor, Tensor]:
    """Grouped-query attention; the query heads of a group are rows of one product. Softmax is computed in float32.

    Args:
        q: ``[B, H, S, D]``.
        k: ``[B, K, T, D]``.
        v: ``[B, K, T, D]``.
        visible: ``[B, S, T]`` boolean.
        dropout: Applied to the weights.
        block: Index of the block of queries, for `dropout`.

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
    weights = dropout(tf.cast(weights, v.dtype), block)
    mixed = tf.matmul(tf.reshape(weights, [batch, kv_heads, groups * queries, keys]), v)
    return tf.reshape(mixed, [batch, heads, queries, head_dim]), weights
