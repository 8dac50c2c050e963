"""Rules on next-token scores that the searches of the TensorFlow port share.

Legend: R rows of the batch, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import tensorflow as tf

from ..generation_options import GenerationOptions

Tensor: TypeAlias = Any


def penalized(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Scores of tokens that were seen, divided by the penalty where positive and multiplied where negative.

    Args:
        scores: ``[R, V]`` logits or log-probabilities.
        seen: ``[R, V]`` boolean.
        penalty: 1 changes nothing (Keskar et al., 2019).
    """
    if penalty == 1:
        return scores
    return tf.where(seen, tf.where(scores < 0, scores * penalty, scores / penalty), scores)


def warped(logits: Tensor, options: GenerationOptions) -> Tensor:
    """``[R, V]`` logits to sample from: temperature, then the k likeliest, the nucleus, and the relative minimum."""
    logits = logits / options.temperature
    if options.top_k:
        count = min(options.top_k, logits.shape[-1])
        logits = _at_least(logits, tf.math.top_k(logits, count).values[:, -1:])
    if options.top_p < 1:
        falling = tf.sort(logits, direction="DESCENDING")
        likelier = tf.cumsum(tf.nn.softmax(falling), axis=-1, exclusive=True)  # probability of the tokens before
        kept = tf.where(likelier < options.top_p, falling, math.inf)
        logits = _at_least(logits, tf.reduce_min(kept, axis=-1, keepdims=True))
    if options.min_p > 0:
        logits = _at_least(logits, tf.reduce_max(logits, axis=-1, keepdims=True) + math.log(options.min_p))
    return logits


def _at_least(logits: Tensor, bound: Tensor) -> Tensor:
    return tf.where(logits < bound, -math.inf, logits)


def is_any(tokens: Tensor, wanted: tuple[int, ...]) -> Tensor:
    """Whether each of the tokens is one of those."""
    if not wanted:
        return tf.zeros(tf.shape(tokens), tf.bool)
    return tf.reduce_any(tokens[..., None] == tf.constant(wanted), axis=-1)


def marked(seen: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """`seen` ``[R, V]`` with the tokens ``[R]``; without a penalty nobody asks."""
    if penalty == 1:
        return seen
    return seen | tf.one_hot(tokens, seen.shape[-1], on_value=True, off_value=False)
