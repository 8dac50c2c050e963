"""Beam search as `generate` of Transformers does it, in one compiled loop.

Legend: B batch, M beams, C candidates kept at a step, N room for new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..generation_options import GenerationOptions
from .cache import FlaxRollingCache
from .generation import Forward, is_end, penalized, seen_tokens

_NEVER = -1e9  # the score of what must not be chosen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamSearch:
    """What the loop carries from step to step.

    Attributes:
        step: Number of tokens chosen, a scalar.
        tokens, scores: Running beams ``[B, M, N]`` and their log-probabilities ``[B, M]``, best first.
        done_tokens, done_scores, done_lengths: The best ended beams, their scores by length, and their lengths.
        done: ``[B, M]``, which of these really are ended beams.
        open: ``[B]``, whether a running beam may still beat the ended ones.
        stopped: Whether the search is over, a scalar.
        cache: Of all tokens but those chosen last, ``B * M`` rows.
        seen: ``[B * M, V]`` for a repetition penalty, else None.
    """

    step: Array
    tokens: Array
    scores: Array
    done_tokens: Array
    done_scores: Array
    done_lengths: Array
    done: Array
    open: Array
    stopped: Array
    cache: FlaxRollingCache
    seen: Array | None


def start(
    forward: Forward, ids: Array, real: Array, cache: FlaxRollingCache, limit: Array, options: GenerationOptions
) -> BeamSearch:
    """Read the prompt ``[B, S]`` into an empty cache and choose the first tokens."""
    batch, beams = ids.shape[0], options.num_beams
    logits, cache = forward(ids, real, cache)
    rows = jnp.repeat(jnp.arange(batch), beams)
    seen = seen_tokens(ids, real, logits.shape[-1])[rows] if options.repetition_penalty != 1 else None
    tokens = jnp.full((batch, beams, options.max_new_tokens), options.pad_token_id, jnp.int32)
    search = BeamSearch(
        step=jnp.zeros((), jnp.int32),
        tokens=tokens,
        scores=jnp.full((batch, beams), _NEVER).at[:, 0].set(0),  # all beams are alike: one takes part
        done_tokens=tokens,
        done_scores=jnp.full((batch, beams), _NEVER),
        done_lengths=jnp.zeros((batch, beams), jnp.int32),
        done=jnp.zeros((batch, beams), bool),
        open=jnp.ones(batch, bool),
        stopped=jnp.zeros((), bool),
        cache=cache.select(rows),
        seen=seen,
    )
    return _advance(search, logits[rows], limit, options)


def resume(forward: Forward, search: BeamSearch, limit: Array, options: GenerationOptions) -> BeamSearch:
    """Search until no running beam can win, or there are `limit` tokens."""

    def body(search: BeamSearch) -> BeamSearch:
        last = lax.dynamic_slice_in_dim(search.tokens, search.step - 1, 1, axis=2).reshape(-1, 1)
        logits, cache = forward(last, jnp.ones_like(last, bool), search.cache)
        return _advance(replace(search, cache=cache), logits, limit, options)

    return lax.while_loop(lambda search: ~search.stopped, body, search)


def _advance(search: BeamSearch, logits: Array, limit: Array, options: GenerationOptions) -> BeamSearch:
    """Extend every beam by the logits ``[B * M, V]`` of its next token, and keep the best."""
    batch, beams = search.scores.shape
    scores, parents, chosen = _candidates(search, logits, options)  # [B, C]
    tokens = jnp.take_along_axis(search.tokens, parents[..., None], axis=1)
    tokens = lax.dynamic_update_slice_in_dim(tokens, chosen[..., None], search.step, axis=2)
    ended = is_end(chosen, options) | (search.step + 1 >= limit)
    search = _collect_ended(search, tokens, scores, ended, options)

    running, kept = lax.top_k(scores + ended * _NEVER, beams)
    parents, chosen = (jnp.take_along_axis(x, kept, axis=1) for x in (parents, chosen))
    rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)
    step = search.step + 1
    worst = jnp.where(search.done, search.done_scores.min(axis=1, keepdims=True), _NEVER)
    still_open = search.open & (running[:, :1] / step**options.length_penalty > worst).any(axis=1)
    stopped = ~still_open.any() | ended.all() | (search.done.all() & options.early_stopping)
    return replace(
        search,
        step=step,
        tokens=jnp.take_along_axis(tokens, kept[..., None], axis=1),
        scores=running,
        open=still_open,
        stopped=stopped,
        cache=search.cache.select(rows),
        seen=None if search.seen is None else search.seen[rows].at[jnp.arange(rows.size), chosen.reshape(-1)].set(True),
    )


def _candidates(search: BeamSearch, logits: Array, options: GenerationOptions) -> tuple[Array, Array, Array]:
    """Log-probabilities of the best continuations, the beams they continue, and their last tokens, each ``[B, C]``.

    C is so large that, whichever of them end, enough are left to go on with.
    """
    batch, beams = search.scores.shape
    scores = jax.nn.log_softmax(logits)
    if search.seen is not None:
        scores = penalized(scores, search.seen, options.repetition_penalty)
    vocabulary = scores.shape[-1]
    scores = (scores.reshape(batch, beams, vocabulary) + search.scores[..., None]).reshape(batch, -1)
    best, places = lax.top_k(scores, max(2, 1 + len(options.eos_token_ids)) * beams)
    return best, places // vocabulary, (places % vocabulary).astype(jnp.int32)


def _collect_ended(
    search: BeamSearch, tokens: Array, scores: Array, ended: Array, options: GenerationOptions
) -> BeamSearch:
    """Put candidates that end here, and are among the M best, to the ended beams, and keep the best of these."""
    beams = search.scores.shape[1]
    length = search.step + 1
    counted = ended & (jnp.arange(scores.shape[1]) < beams)
    closed = ~search.open
    if options.early_stopping:
        closed |= search.done.all(axis=1)
    scores = scores / length**options.length_penalty + closed[:, None] * _NEVER + ~counted * _NEVER

    def merged(old: Array, new: Array) -> Array:
        both = jnp.concatenate([old, new], axis=1)
        return jnp.take_along_axis(both, best.reshape(*best.shape, *[1] * (both.ndim - 2)), axis=1)

    best = lax.top_k(jnp.concatenate([search.done_scores, scores], axis=1), beams)[1]
    return replace(
        search,
        done_tokens=merged(search.done_tokens, tokens),
        done_scores=merged(search.done_scores, scores),
        done_lengths=merged(search.done_lengths, jnp.full(scores.shape, length)),
        done=merged(search.done, counted),
    )
