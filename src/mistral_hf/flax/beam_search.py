"""Beam search for the JAX port, step by step as `generate` of Transformers does it.

Legend: B batch, M beams, C candidates of a step, R = B * M rows, N room for new tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..generation_options import GenerationOptions
from .cache import FlaxRollingCache
from .generation import Prompt
from .logits import is_end, penalized, with_tokens

_NEVER = -1e9  # a score that no sequence has


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    """The state of `BeamSearch`.

    Attributes:
        step: Number of new tokens, a scalar.
        limit: Number of new tokens at which every beam ends, a scalar.
        tokens, scores: The running beams ``[B, M, N]`` and their log-probabilities ``[B, M]``, best first.
        done_tokens, done_scores, done_lengths: The best ended beams ``[B, M, N]``; their scores ``[B, M]``, divided
            by ``length ** length_penalty``; and their lengths ``[B, M]``.
        done: ``[B, M]``, which of these are beams that ended.
        open: ``[B]``, whether a running beam may still beat the ended ones.
        stopped: Whether the search is over, a scalar.
        cache: Of all tokens but the last ones, R rows.
        previous_tokens: ``[R, V]``, the tokens that a beam contains, for a repetition penalty; else None.
    """

    step: Array
    limit: Array
    tokens: Array
    scores: Array
    done_tokens: Array
    done_scores: Array
    done_lengths: Array
    done: Array
    open: Array
    stopped: Array
    cache: FlaxRollingCache
    previous_tokens: Array | None


@dataclass(frozen=True)
class BeamSearch:
    """Keeps the M likeliest continuations of every prompt; the best sequence that ended is the result.

    Args:
        options: Those of `generate`, with N as ``max_new_tokens``.
    """

    options: GenerationOptions

    def choose_first(
        self, logits: Array, cache: FlaxRollingCache, prompt: Prompt, limit: Array, key: Array
    ) -> BeamState:
        """See `Strategy`; `key` is not used."""
        batch, beams = logits.shape[0], self.options.num_beams
        rows, previous = prompt.repeated(beams), prompt.previous_tokens
        tokens = jnp.full((batch, beams, self.options.max_new_tokens), self.options.pad_token_id, jnp.int32)
        state = BeamState(
            step=jnp.zeros((), jnp.int32),
            limit=jnp.asarray(limit, jnp.int32),
            tokens=tokens,
            scores=jnp.full((batch, beams), _NEVER).at[:, 0].set(0),  # all beams are equal: only one takes part
            done_tokens=tokens,
            done_scores=jnp.full((batch, beams), _NEVER),
            done_lengths=jnp.zeros((batch, beams), jnp.int32),
            done=jnp.zeros((batch, beams), bool),
            open=jnp.ones(batch, bool),
            stopped=jnp.zeros((), bool),
            cache=cache,
            previous_tokens=None if previous is None else previous[rows],
        )
        return self.choose_next(state, logits[rows, None], cache.gather_rows(rows))

    def choose_next(self, state: BeamState, logits: Array, cache: FlaxRollingCache) -> BeamState:
        """See `Strategy`."""
        batch, beams = state.scores.shape
        step = state.step + 1
        scores, parents, last = self._candidates(state, logits[:, -1])  # [B, C]
        tokens = jnp.take_along_axis(state.tokens, parents[..., None], axis=1)
        tokens = lax.dynamic_update_slice_in_dim(tokens, last[..., None], state.step, axis=2)  # [B, C, N]
        ends = is_end(last, self.options) | (step >= state.limit)
        state = self._collect_ended(state, tokens, scores, ends)

        # The M best candidates that do not end become the running beams.
        running, kept = lax.top_k(scores + ends * _NEVER, beams)
        parents, last = (jnp.take_along_axis(x, kept, axis=1) for x in (parents, last))
        rows = (jnp.arange(batch)[:, None] * beams + parents).reshape(-1)

        # Of the running beams, at their present length, can any beat the worst ended one?
        worst = jnp.where(state.done, state.done_scores.min(axis=1, keepdims=True), _NEVER)
        still_open = state.open & (running[:, :1] / step**self.options.length_penalty > worst).any(axis=1)
        stopped = ~still_open.any() | ends.all() | (state.done.all() & self.options.early_stopping)
        previous = None if state.previous_tokens is None else state.previous_tokens[rows]
        return replace(
            state,
            step=step,
            tokens=jnp.take_along_axis(tokens, kept[..., None], axis=1),
            scores=running,
            open=still_open,
            stopped=stopped,
            cache=cache.gather_rows(rows),
            previous_tokens=with_tokens(previous, last.reshape(-1)),
        )

    def _candidates(self, state: BeamState, logits: Array) -> tuple[Array, Array, Array]:
        """Log-probabilities of the best continuations, the beams they continue, and their last tokens, each ``[B, C]``.

        C is large enough that M candidates continue even if all others end.
        """
        batch, beams = state.scores.shape
        scores = jax.nn.log_softmax(logits)
        if state.previous_tokens is not None:
            scores = penalized(scores, state.previous_tokens, self.options.repetition_penalty)
        vocabulary = scores.shape[-1]
        scores = (scores.reshape(batch, beams, vocabulary) + state.scores[..., None]).reshape(batch, -1)
        best, indices = lax.top_k(scores, max(2, 1 + len(self.options.eos_token_ids)) * beams)
        return best, indices // vocabulary, (indices % vocabulary).astype(jnp.int32)

    def _collect_ended(self, state: BeamState, tokens: Array, scores: Array, ends: Array) -> BeamState:
        """The state with the candidates that end here, if they are better than the beams that ended before."""
        beams = state.scores.shape[1]
        length = state.step + 1
        ends &= jnp.arange(scores.shape[1]) < beams  # the candidates after the M best are there only to continue
        closed = ~state.open
        if self.options.early_stopping:
            closed |= state.done.all(axis=1)
        scores = scores / length**self.options.length_penalty + closed[:, None] * _NEVER + ~ends * _NEVER

        def merged(old: Array, new: Array) -> Array:
            both = jnp.concatenate([old, new], axis=1)
            return jnp.take_along_axis(both, best.reshape(*best.shape, *[1] * (both.ndim - 2)), axis=1)

        best = lax.top_k(jnp.concatenate([state.done_scores, scores], axis=1), beams)[1]
        return replace(
            state,
            done_tokens=merged(state.done_tokens, tokens),
            done_scores=merged(state.done_scores, scores),
            done_lengths=merged(state.done_lengths, jnp.full(scores.shape, length)),
            done=merged(state.done, ends),
        )

    def inputs(self, state: BeamState) -> tuple[Array, FlaxRollingCache]:
        """See `Strategy`."""
        last = lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2, keepdims=False)
        return last.reshape(-1, 1), state.cache

    def running(self, state: BeamState) -> Array:
        """See `Strategy`."""
        return ~state.stopped

    def result(self, state: BeamState) -> Any:
        """See `Strategy`."""
        count = self.options.num_return_sequences
        length = int(state.done_lengths[:, :count].max())
        return np.asarray(state.done_tokens)[:, :count, :length].reshape(-1, length)
