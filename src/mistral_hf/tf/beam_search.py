"""Beam search for the TensorFlow port, step by step that of Transformers.

Legend: B prompts, M beams, C candidates, R = B * M rows, N room for new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import tensorflow as tf

from ..generation_options import GenerationOptions
from .cache import TFRollingCache
from .logits import is_any, marked, penalized

Tensor: TypeAlias = Any
_NEVER = -1e9  # a score that no sequence has


class BeamState(NamedTuple):
    """The state of `BeamSearch`."""

    step: Tensor
    limit: Tensor  # tokens to write
    tokens: Tensor  # [B, M, N] of the beams that go on
    scores: Tensor  # [B, M], sums of log-probabilities
    ended: Tensor  # [B, M, N], the best sequences that ended
    ended_scores: Tensor  # [B, M], divided by length ** length_penalty
    ended_lengths: Tensor  # [B, M]
    is_ended: Tensor  # [B, M], whether there is such a sequence
    hopeful: Tensor  # [B], whether going on can improve on them
    open: Tensor  # a scalar, whether any beam can go on
    seen: Tensor  # [R, V]
    cache: TFRollingCache


class BeamSearch:
    """Keeps the M likeliest beginnings of every prompt; the best sequence that ended is the result.

    Args:
        options: Those of `generate`, with N as ``max_new_tokens``.
    """

    def __init__(self, options: GenerationOptions) -> None:
        self.options = options
        # so many candidates that M of them go on even if all others end
        self.candidates = max(2, 1 + len(options.eos_token_ids)) * options.num_beams

    def begin(self, logits: Tensor, cache: TFRollingCache, seen: Tensor, limit: Tensor, seed: Tensor) -> BeamState:
        """See `tf_generation.Search`; `seed` is of no use here."""
        batch, beams, room = logits.shape[0], self.options.num_beams, self.options.max_new_tokens
        rows = tf.repeat(tf.range(batch), beams)
        empty = tf.fill([batch, beams, room], self.options.pad_token_id)
        state = BeamState(
            step=tf.constant(0),
            limit=limit,
            tokens=empty,
            scores=tf.tile([[0.0] + [_NEVER] * (beams - 1)], [batch, 1]),  # all beams are the same yet: one counts
            ended=empty,
            ended_scores=tf.fill([batch, beams], _NEVER),
            ended_lengths=tf.zeros([batch, beams], tf.int32),
            is_ended=tf.zeros([batch, beams], tf.bool),
            hopeful=tf.ones([batch], tf.bool),
            open=tf.constant(True),
            seen=tf.gather(seen, rows),
            cache=cache,
        )
        return self.advance(state, tf.gather(logits, rows), cache.gather_rows(rows))

    def advance(self, state: BeamState, logits: Tensor, cache: TFRollingCache) -> BeamState:
        """See `tf_generation.Search`."""
        batch, beams = state.scores.shape
        scores = penalized(tf.nn.log_softmax(logits), state.seen, self.options.repetition_penalty)
        vocabulary = scores.shape[-1]
        scores = tf.reshape(tf.reshape(scores, [batch, beams, vocabulary]) + state.scores[:, :, None], [batch, -1])
        best, places = tf.math.top_k(scores, self.candidates)  # [B, C]
        parents, last = places // vocabulary, places % vocabulary
        here = tf.range(self.options.max_new_tokens) == state.step
        tokens = tf.where(here, last[:, :, None], _pick(state.tokens, parents))  # [B, C, N]
        ends = is_any(last, self.options.eos_token_ids) | (state.step + 1 >= state.limit)
        going, chosen = tf.math.top_k(tf.where(ends, best + _NEVER, best), beams)  # [B, M]
        rows = tf.reshape(_pick(parents, chosen) + tf.range(batch)[:, None] * beams, [-1])
        written = tf.reshape(_pick(last, chosen), [-1])
        state = self._with_ended(state, tokens, best, ends)._replace(
            step=state.step + 1,
            tokens=_pick(tokens, chosen),
            scores=going,
            open=~tf.reduce_all(ends),
            seen=marked(tf.gather(state.seen, rows), written, self.options.repetition_penalty),
            cache=cache.gather_rows(rows),
        )
        return self._judged(state)

    def _with_ended(self, state: BeamState, tokens: Tensor, best: Tensor, ends: Tensor) -> BeamState:
        """The state with the candidates that just ended, if they are better than the sequences that ended before."""
        beams = self.options.num_beams
        length = state.step + 1
        ends &= tf.range(self.candidates) < beams  # the other candidates are there to go on only
        closed = ~state.hopeful[:, None]
        if self.options.early_stopping:
            closed |= tf.reduce_all(state.is_ended, axis=1, keepdims=True)
        scores = best / tf.cast(length, tf.float32) ** self.options.length_penalty
        scores += _NEVER * tf.cast(closed, tf.float32) + _NEVER * tf.cast(~ends, tf.float32)
        merged_scores, chosen = tf.math.top_k(tf.concat([state.ended_scores, scores], axis=1), beams)
        lengths = tf.concat([state.ended_lengths, tf.fill(tf.shape(best), length)], axis=1)
        return state._replace(
            ended=_pick(tf.concat([state.ended, tokens], axis=1), chosen),
            ended_scores=merged_scores,
            ended_lengths=_pick(lengths, chosen),
            is_ended=_pick(tf.concat([state.is_ended, ends], axis=1), chosen),
        )

    def _judged(self, state: BeamState) -> BeamState:
        """The state knowing which prompts' beams, at their present length, could still beat what ended."""
        reachable = state.scores[:, :1] / tf.cast(state.step, tf.float32) ** self.options.length_penalty
        worst = tf.reduce_min(state.ended_scores, axis=1, keepdims=True)
        beatable = reachable > tf.where(state.is_ended, worst, _NEVER)
        return state._replace(hopeful=state.hopeful & tf.reduce_any(beatable, axis=1))

    def inputs(self, state: BeamState) -> tuple[Tensor, TFRollingCache]:
        """See `tf_generation.Search`."""
        last = tf.gather(state.tokens, state.step - 1, axis=2)
        return tf.reshape(last, [-1]), state.cache

    def running(self, state: BeamState) -> Tensor:
        """See `tf_generation.Search`."""
        running = tf.reduce_any(state.hopeful) & state.open
        return running & ~tf.reduce_all(state.is_ended) if self.options.early_stopping else running

    def result(self, state: BeamState) -> Tensor:
        """See `tf_generation.Search`."""
        return state.ended[:, 0, : int(tf.reduce_max(state.ended_lengths[:, 0]))]


def _pick(beams: Tensor, indices: Tensor) -> Tensor:
    """Of ``[B, M, ...]`` those beams of every prompt that ``[B, n]`` names."""
    return tf.gather(beams, indices, axis=1, batch_dims=1)
