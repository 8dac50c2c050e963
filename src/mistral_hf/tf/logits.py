"""Rules on next-token scores that the strategies of the TensorFlow port share.

Legend: B prompts, P prompt length, R rows of the batch, V vocabulary.
"""

from __future__ import annotations

import math

import tensorflow as tf

from ..generation_options import GenerationOptions
from .shapes import Tensor


def penalized(scores: Tensor, previous_tokens: Tensor, penalty: float) -> Tensor:
    """Lower the scores of tokens that occurred before: positive scores are divided, negative ones multiplied.

    Args:
        scores: ``[R, V]`` logits or log-probabilities.
        previous_tokens: ``[R, V]`` boolean.
        penalty: 1 changes nothing (Keskar et al., 2019).
    """
    if penalty == 1:
        return scores
    return tf.where(previous_tokens, tf.where(scores < 0, scores * penalty, scores / penalty), scores)


def tokens_of_prompts(ids: Tensor, real: Tensor, vocab_size: int) -> Tensor:
    """Which tokens occur in every prompt, ``[B, V]`` boolean.

    Args:
        ids: ``[B, P]``.
        real: ``[B, P]`` boolean, False for padding.
        vocab_size: V.
    """
    batch = ids.shape[0]
    rows = tf.where(real, tf.range(batch)[:, None], batch)  # padding is counted in one more row, which is cut off
    indices = tf.reshape(tf.stack([rows, ids], axis=-1), [-1, 2])
    marks = tf.ones([indices.shape[0]], tf.int32)
    return tf.tensor_scatter_nd_max(tf.zeros([batch + 1, vocab_size], tf.int32), indices, marks)[:-1] > 0


def with_tokens(previous_tokens: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """`previous_tokens` ``[R, V]`` with the new tokens ``[R]``; unchanged without a penalty, which alone uses it."""
    if penalty == 1:
        return previous_tokens
    return previous_tokens | tf.one_hot(tokens, previous_tokens.shape[-1], on_value=True, off_value=False)


def warped(logits: Tensor, options: GenerationOptions) -> Tensor:
    """The logits ``[R, V]`` to sample from; minus infinity for tokens that the options exclude."""
    logits = logits / options.temperature
    # The k likeliest tokens.
    if options.top_k:
        count = min(options.top_k, logits.shape[-1])
        logits = _at_least(logits, tf.math.top_k(logits, count).values[:, -1:])
    # The nucleus: the likeliest tokens that together have a probability of top_p (Holtzman et al., 2020).
    if options.top_p < 1:
        falling = tf.sort(logits, direction="DESCENDING")
        likelier = tf.cumsum(tf.nn.softmax(falling), axis=-1, exclusive=True)  # probability of the tokens before
        kept = tf.where(likelier < options.top_p, falling, math.inf)
        logits = _at_least(logits, tf.reduce_min(kept, axis=-1, keepdims=True))
    # Tokens with at least a share of the likeliest token's probability (Nguyen et al., 2024).
    if options.min_p > 0:
        logits = _at_least(logits, tf.reduce_max(logits, axis=-1, keepdims=True) + math.log(options.min_p))
    return logits


def _at_least(logits: Tensor, bound: Tensor) -> Tensor:
    return tf.where(logits < bound, -math.inf, logits)


def is_end(tokens: Tensor, options: GenerationOptions) -> Tensor:
    """Which tokens end a sequence."""
    if not options.eos_token_ids:
        return tf.zeros(tf.shape(tokens), tf.bool)
    return tf.reduce_any(tokens[..., None] == tf.constant(options.eos_token_ids), axis=-1)
