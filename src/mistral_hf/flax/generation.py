"""The compiled loop of `generate`: greedy search and sampling over a rolling buffer.

Legend: B batch, N room for new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..generation_options import GenerationOptions
from .cache import FlaxRollingCache

Forward = Callable[[Array, Array, FlaxRollingCache], tuple[Array, FlaxRollingCache]]
"""From ids and mask ``[B, S]`` and a cache to the last token's logits ``[B, V]`` in float32, and the cache after it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Search:
    """What the loop carries from step to step.

    Attributes:
        step: Number of tokens chosen, a scalar.
        tokens: ``[B, N]``, padded.
        finished: ``[B]``, the rows that have ended.
        cache: Of all tokens but the one chosen last.
        key: Random key of the call.
        seen: ``[B, V]``, which tokens a row has had, for a repetition penalty; else None.
    """

    step: Array
    tokens: Array
    finished: Array
    cache: FlaxRollingCache
    key: Array
    seen: Array | None


def start(
    forward: Forward, ids: Array, real: Array, cache: FlaxRollingCache, key: Array, options: GenerationOptions
) -> Search:
    """Read the prompt ``[B, S]`` into an empty cache and choose the first token."""
    batch = ids.shape[0]
    logits, cache = forward(ids, real, cache)
    search = Search(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((batch, options.max_new_tokens), options.pad_token_id, jnp.int32),
        finished=jnp.zeros(batch, bool),
        cache=cache,
        key=key,
        seen=seen_tokens(ids, real, logits.shape[-1]) if options.repetition_penalty != 1 else None,
    )
    return _choose(search, logits, options)


def resume(forward: Forward, search: Search, limit: Array, options: GenerationOptions) -> Search:
    """Choose tokens until there are `limit` of them or all rows have ended."""

    def body(search: Search) -> Search:
        last = lax.dynamic_slice_in_dim(search.tokens, search.step - 1, 1, axis=1)
        logits, cache = forward(last, jnp.ones_like(last, bool), search.cache)
        return _choose(replace(search, cache=cache), logits, options)

    def unfinished(search: Search) -> Array:
        return (search.step < limit) & ~search.finished.all()

    return lax.while_loop(unfinished, body, search)


def _choose(search: Search, logits: Array, options: GenerationOptions) -> Search:
    """Append the next token of every row, the padding token where the row has ended."""
    if search.seen is not None:
        logits = penalized(logits, search.seen, options.repetition_penalty)
    if options.do_sample:
        chosen = sample(logits, jax.random.fold_in(search.key, search.step), options)
    else:
        chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    token = jnp.where(search.finished, options.pad_token_id, chosen)
    rows = jnp.arange(token.shape[0])
    return replace(
        search,
        step=search.step + 1,
        tokens=lax.dynamic_update_slice_in_dim(search.tokens, token[:, None], search.step, axis=1),
        finished=search.finished | is_end(token, options),
        seen=None if search.seen is None else search.seen.at[rows, token].set(True),
    )


def is_end(tokens: Array, options: GenerationOptions) -> Array:
    """Which tokens end a sequence."""
    return jnp.isin(tokens, jnp.asarray(options.eos_token_ids, jnp.int32))


def seen_tokens(ids: Array, real: Array, vocabulary: int) -> Array:
    """Which tokens ``[B, V]`` occur in a prompt ``[B, S]``, padding aside."""
    rows = jnp.arange(ids.shape[0])[:, None]
    return jnp.zeros((ids.shape[0], vocabulary), bool).at[rows, ids].max(real)


def penalized(scores: Array, seen: Array, penalty: float) -> Array:
    """Scores of seen tokens made smaller (Keskar et al., 2019): positive ones divided, negative ones multiplied."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def sample(logits: Array, key: Any, options: GenerationOptions) -> Array:
    """Draw a token of every row from ``[B, V]`` logits: temperature, then top-k, top-p and min-p."""
    scores = logits / options.temperature
    if options.top_k == 0 and options.top_p == 1 and options.min_p == 0:
        return jax.random.categorical(key, scores).astype(jnp.int32)
    count = min(options.top_k or scores.shape[-1], scores.shape[-1])
    scores, ids = lax.top_k(scores, count)  # sorted, so that what follows is about the sum of what precedes a token
    scores = jnp.where(
        jnp.cumsum(jax.nn.softmax(scores), axis=-1) - jax.nn.softmax(scores) < options.top_p, scores, -jnp.inf
    )
    probabilities = jax.nn.softmax(scores)
    scores = jnp.where(probabilities >= options.min_p * probabilities[:, :1], scores, -jnp.inf)
    place = jax.random.categorical(key, scores)
    return jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0].astype(jnp.int32)
