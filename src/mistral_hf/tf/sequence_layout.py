"""Where the new tokens of a forward pass stand: padding, cached tokens, positions and packed sequences.

Legend: B batch, S new tokens, E hidden_size.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from .cache import PADDING, TFRollingCache
from .shapes import Size, Tensor, size
from .validation import check_one_sequence


class SequenceLayout(NamedTuple):
    """Where the new tokens stand.

    Attributes:
        positions: ``[B or 1, S]``.
        segments: ``[B, S]`` int32, the index of the packed sequence that a token belongs to, or `PADDING`.
        start: ``[B]`` int32, the index of a row's first real token; as long as there is none, that of the next token.
        packed: Whether rows hold several sequences; False within graphs, where this is not known.
    """

    positions: Tensor
    segments: Tensor
    start: Tensor
    packed: bool


def sequence_layout(
    states: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: TFRollingCache | None
) -> SequenceLayout:
    """The layout of new tokens.

    Args:
        states: ``[B, S, E]``, for its shape.
        attention_mask: ``[B, S]``, nonzero for real tokens; columns of cached tokens may come before.
        position_ids: ``[B or 1, S]``; by default the first real token of a row has position 0. Where they restart
            (without mask and cache), a packed sequence begins.
        cache: The tokens before them.

    Raises:
        ValueError: Known shapes do not fit together; or, outside of graphs, positions restart under a mask, which would
            let packed sequences see each other.
    """
    batch, length = size(states, 0), size(states, 1)
    _check_positions(position_ids, states)
    _check_rows(cache, states)
    real = _real_tokens(attention_mask, states)
    start = _start(real, batch, length, cache)
    positions = _positions(start, length, cache) if position_ids is None else position_ids
    packed = False
    # Under a mask, the real tokens of a row are one sequence.
    if real is not None:
        if position_ids is not None and cache is None:
            check_one_sequence(position_ids, real)
        segments = tf.where(real, 0, PADDING)
    # Only positions that the caller gives can restart; tokens after a cache continue its sequence.
    elif position_ids is None or cache is not None:
        segments = tf.zeros([batch, length], tf.int32)
    else:
        segments = tf.broadcast_to(_packed_segments(position_ids), [batch, length])
        packed = tf.executing_eagerly() and bool(tf.reduce_any(segments > 0))
    return SequenceLayout(positions, segments, start, packed)


def _check_positions(positions: Tensor | None, states: Tensor) -> None:
    batch, length = states.shape[:2]
    if positions is not None and not any(positions.shape.is_compatible_with([rows, length]) for rows in (1, batch)):
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)}, but there are {length} new tokens in {batch} rows: it"
            " must be [batch or 1, tokens]."
        )


def _check_rows(cache: TFRollingCache | None, states: Tensor) -> None:
    batch = states.shape[0]
    if cache is not None and not cache.start.shape.is_compatible_with([batch]):
        raise ValueError(
            f"past_key_values holds {cache.start.shape[0]} rows, but the new tokens have {batch}: continue with the"
            " same batch, or choose rows with past_key_values.gather_rows."
        )


def _real_tokens(attention_mask: Tensor | None, states: Tensor) -> Tensor | None:
    """``[B, S]`` boolean of the new tokens, or None without a mask."""
    if attention_mask is None:
        return None
    (batch, length), covered = states.shape[:2], attention_mask.shape
    if not covered.is_compatible_with([batch, None]) or (None not in (length, covered[1]) and covered[1] < length):
        raise ValueError(
            f"attention_mask has shape {tuple(covered)}, but there are {length} new tokens in {batch} rows: it must be"
            " [batch, tokens], with a column for each of them, and may have columns of cached tokens before."
        )
    return tf.cast(attention_mask[:, -size(states, 1) :], tf.bool)


def _start(real: Tensor | None, batch: Size, length: Size, cache: TFRollingCache | None) -> Tensor:
    """The index of a row's first real token, ``[B]``."""
    if real is None:
        new = tf.zeros([batch], tf.int32)
    else:
        first = tf.argmax(tf.cast(real, tf.int32), axis=1, output_type=tf.int32)
        new = tf.where(tf.reduce_any(real, axis=1), first, length)
    if cache is None:
        return new
    return tf.where(cache.start < cache.length, cache.start, cache.length + new)


def _positions(start: Tensor, length: Size, cache: TFRollingCache | None) -> Tensor:
    """Positions ``[B, S]`` of the new tokens: a row's first real token has position 0."""
    first = 0 if cache is None else cache.length
    return tf.maximum(first + tf.range(length) - start[:, None], 0)


def _packed_segments(positions: Tensor) -> Tensor:
    """The index of the packed sequence of every token, ``[B or 1, S]``: one begins where a position does not follow."""
    restarts = tf.cast(positions[:, 1:] - positions[:, :-1] != 1, tf.int32)
    return tf.pad(tf.cumsum(restarts, axis=1), [[0, 0], [1, 0]])


def last_real_token(real: Tensor) -> Tensor:
    """The index of the last real token of every row, ``[B]``, from ``[B, S]`` boolean."""
    return tf.argmax(tf.where(real, tf.range(1, size(real, 1) + 1), 0), axis=-1, output_type=tf.int32)


def next_labels(labels: Tensor, position_ids: Tensor | None, attention_mask: Tensor | None, ignored: int) -> Tensor:
    """The label ``[B, S]`` that each token predicts; that of the last token of a sequence is ignored.

    Args:
        labels: ``[B, S]``.
        position_ids: ``[B or 1, S]``, which mark packed sequences where they restart without a mask; or None.
        attention_mask: As of the model.
        ignored: The label that losses ignore.
    """
    following = tf.pad(labels[:, 1:], [[0, 0], [0, 1]], constant_values=ignored)
    if position_ids is None or attention_mask is not None:
        return following
    ends = position_ids[:, 1:] - position_ids[:, :-1] != 1
    return tf.where(tf.pad(ends, [[0, 0], [0, 1]], constant_values=True), tf.constant(ignored, labels.dtype), following)
