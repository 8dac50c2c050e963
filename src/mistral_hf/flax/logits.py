"""Rules on next-token scores that greedy search, sampling and beam search share.

Legend: B batch, S tokens of a prompt, R rows (of a batch, or beams of all its rows), V vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..generation_options import GenerationOptions


def penalized(scores: Array, previous_tokens: Array, penalty: float) -> Array:
    """Lower the scores of previous tokens (Keskar et al., 2019): positive ones are divided, negative ones multiplied.

    Args:
        scores: ``[R, V]`` logits or log-probabilities.
        previous_tokens: ``[R, V]`` boolean, the tokens that a row contains.
        penalty: 1 changes nothing.
    """
    return jnp.where(previous_tokens, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def sample(logits: Array, key: Any, options: GenerationOptions) -> Array:
    """Draw a token for every row of ``[R, V]`` logits: temperature, then top-k, top-p and min-p.

    Returns:
        ``[R]`` int32.
    """
    scores = logits / options.temperature
    if options.top_k == 0 and options.top_p == 1 and options.min_p == 0:
        return jax.random.categorical(key, scores).astype(jnp.int32)
    count = min(options.top_k or scores.shape[-1], scores.shape[-1])
    scores, ids = lax.top_k(scores, count)  # sorted: the probability of all likelier tokens is a running sum
    scores = jnp.where(
        jnp.cumsum(jax.nn.softmax(scores), axis=-1) - jax.nn.softmax(scores) < options.top_p, scores, -jnp.inf
    )
    probabilities = jax.nn.softmax(scores)
    scores = jnp.where(probabilities >= options.min_p * probabilities[:, :1], scores, -jnp.inf)
    index = jax.random.categorical(key, scores)
    return jnp.take_along_axis(ids, index[:, None], axis=1)[:, 0].astype(jnp.int32)


def tokens_of_prompts(ids: Array, real: Array, vocabulary: int) -> Array:
    """``[B, V]`` boolean: the tokens that a prompt ``[B, S]`` contains, except for padding."""
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], vocabulary), bool).at[rows, ids].max(real)


def with_tokens(previous_tokens: Array | None, tokens: Array) -> Array | None:
    """`previous_tokens` ``[R, V]`` with the tokens ``[R]`` added; None without a repetition penalty."""
    if previous_tokens is None:
        return None
    return previous_tokens.at[jnp.arange(tokens.size), tokens].set(True)


def is_end(tokens: Array, options: GenerationOptions) -> Array:
    """Which of the tokens end a sequence; a boolean of the same shape."""
    return jnp.isin(tokens, jnp.asarray(options.eos_token_ids, jnp.int32))
