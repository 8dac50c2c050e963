"""Beam search for the TensorFlow port, step by step that of Transformers.

Legend: B prompts, M beams, C candidates, R = B * M rows, N room for new tokens, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from ..generation_options import GenerationOptions
from .cache import TFRollingCache
from .logits import is_end, penalized, with_tokens
from .shapes import Tensor

_NEVER = -1e9  # the score of what must not be chosen


class BeamState(NamedTuple):
    """The state of `BeamSearch`.

    Attributes:
        step: Scalar int32, the number of new tokens.
        limit: Scalar int32, the number of new tokens at which every beam ends.
        tokens: ``[B, M, N]`` int32 of the running beams, best first.
        scores: ``[B, M]``, sums of their log-probabilities.
        done_tokens: ``[B, M, N]`` int32, the best sequences that ended.
        done_scores: ``[B, M]``, divided by ``length ** length_penalty``.
        done_lengths: ``[B, M]`` int32.
        done: ``[B, M]`` boolean, which of these are sequences that ended.
        open: ``[B]`` boolean, whether a running beam may still beat those that ended.
        all_ended: Boolean scalar, whether no candidate can continue.
        previous_tokens: ``[R, V]`` boolean, for a repetition penalty.
        cache: Of all tokens but the last ones, R rows.
    """

    step: Tensor
    limit: Tensor
    tokens: Tensor
    scores: Tensor
    done_tokens: Tensor
    done_scores: Tensor
    done_lengths: Tensor
    done: Tensor
    open: Tensor
    all_ended: Tensor
    previous_tokens: Tensor
    cache: TFRollingCache


class BeamSearch:
    """Keeps the M likeliest beginnings of every prompt; the best sequence that ended is the result.

    Args:
        options: Those of `generate`, with N as ``max_new_tokens``.
    """

    def __init__(self, options: GenerationOptions) -> None:
        self.options = options
        # C is large enough that M candidates continue even if all others end.
        self.candidates = max(2, 1 + len(options.eos_token_ids)) * options.num_beams

    def choose_first(
        self, logits: Tensor, cache: TFRollingCache, previous_tokens: Tensor, limit: Tensor, seed: Tensor
    ) -> BeamState:
        """See `generation.Strategy`; `seed` is not used."""
        batch, beams, room = logits.shape[0], self.options.num_beams, self.options.max_new_tokens
        rows = tf.repeat(tf.range(batch), beams)
        empty = tf.fill([batch, beams, room], self.options.pad_token_id)
        state = BeamState(
            step=tf.constant(0),
            limit=limit,
            tokens=empty,
            scores=tf.tile([[0.0] + [_NEVER] * (beams - 1)], [batch, 1]),  # all beams are alike: one takes part
            done_tokens=empty,
            done_scores=tf.fill([batch, beams], _NEVER),
            done_lengths=tf.zeros([batch, beams], tf.int32),
            done=tf.zeros([batch, beams], tf.bool),
            open=tf.ones([batch], tf.bool),
            all_ended=tf.constant(False),
            previous_tokens=tf.gather(previous_tokens, rows),
            cache=cache,
        )
        return self.choose_next(state, tf.gather(logits, rows), cache.gather_rows(rows))

    def choose_next(self, state: BeamState, logits: Tensor, cache: TFRollingCache) -> BeamState:
        """See `generation.Strategy`."""
        best, parents, last = self._candidates(state, logits)
        is_current = tf.range(self.options.max_new_tokens) == state.step
        tokens = tf.where(is_current, last[:, :, None], _gather_beams(state.tokens, parents))  # [B, C, N]
        ends = is_end(last, self.options) | (state.step + 1 >= state.limit)
        running, chosen = tf.math.top_k(tf.where(ends, best + _NEVER, best), self.options.num_beams)  # [B, M]
        offsets = tf.range(state.scores.shape[0])[:, None] * self.options.num_beams
        rows = tf.reshape(_gather_beams(parents, chosen) + offsets, [-1])
        new = tf.reshape(_gather_beams(last, chosen), [-1])
        state = self._collect_ended(state, tokens, best, ends)._replace(
            step=state.step + 1,
            tokens=_gather_beams(tokens, chosen),
            scores=running,
            all_ended=tf.reduce_all(ends),
            previous_tokens=with_tokens(tf.gather(state.previous_tokens, rows), new, self.options.repetition_penalty),
            cache=cache.gather_rows(rows),
        )
        return self._close_beaten(state)

    def _candidates(self, state: BeamState, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best continuations ``[B, C]``: scores, the beams that they continue, and their last tokens."""
        batch, beams = state.scores.shape
        scores = penalized(tf.nn.log_softmax(logits), state.previous_tokens, self.options.repetition_penalty)
        vocabulary = scores.shape[-1]
        scores = tf.reshape(tf.reshape(scores, [batch, beams, vocabulary]) + state.scores[:, :, None], [batch, -1])
        best, indices = tf.math.top_k(scores, self.candidates)
        return best, indices // vocabulary, indices % vocabulary

    def _collect_ended(self, state: BeamState, tokens: Tensor, best: Tensor, ends: Tensor) -> BeamState:
        """The state with the candidates that just ended, where they are better than what ended before.

        Args:
            state: Before this step.
            tokens: ``[B, C, N]``.
            best: ``[B, C]`` scores, best first.
            ends: ``[B, C]`` boolean.
        """
        beams = self.options.num_beams
        length = state.step + 1
        ends &= tf.range(self.candidates) < beams  # the other candidates only serve to continue
        closed = ~state.open[:, None]
        if self.options.early_stopping:
            closed |= tf.reduce_all(state.done, axis=1, keepdims=True)
        scores = best / tf.cast(length, tf.float32) ** self.options.length_penalty
        scores += _NEVER * tf.cast(closed, tf.float32) + _NEVER * tf.cast(~ends, tf.float32)
        merged_scores, chosen = tf.math.top_k(tf.concat([state.done_scores, scores], axis=1), beams)
        lengths = tf.concat([state.done_lengths, tf.fill(tf.shape(best), length)], axis=1)
        return state._replace(
            done_tokens=_gather_beams(tf.concat([state.done_tokens, tokens], axis=1), chosen),
            done_scores=merged_scores,
            done_lengths=_gather_beams(lengths, chosen),
            done=_gather_beams(tf.concat([state.done, ends], axis=1), chosen),
        )

    def _close_beaten(self, state: BeamState) -> BeamState:
        """The state without the prompts whose beams, at their present length, cannot beat what ended."""
        reachable = state.scores[:, :1] / tf.cast(state.step, tf.float32) ** self.options.length_penalty
        worst = tf.reduce_min(state.done_scores, axis=1, keepdims=True)
        beatable = reachable > tf.where(state.done, worst, _NEVER)
        return state._replace(open=state.open & tf.reduce_any(beatable, axis=1))

    def inputs(self, state: BeamState) -> tuple[Tensor, TFRollingCache]:
        """See `generation.Strategy`."""
        last = tf.gather(state.tokens, state.step - 1, axis=2)
        return tf.reshape(last, [-1]), state.cache

    def running(self, state: BeamState) -> Tensor:
        """See `generation.Strategy`."""
        running = tf.reduce_any(state.open) & ~state.all_ended
        return running & ~tf.reduce_all(state.done) if self.options.early_stopping else running

    def result(self, state: BeamState) -> Tensor:
        """See `generation.Strategy`."""
        longest = int(tf.reduce_max(state.done_lengths[:, : self.options.num_return_sequences]))
        return self.padded_result(state)[:, :longest]

    def padded_result(self, state: BeamState) -> Tensor:
        """See `generation.Strategy`."""
        best = state.done_tokens[:, : self.options.num_return_sequences]
        return tf.reshape(best, [-1, best.shape[2]])


def _gather_beams(beams: Tensor, indices: Tensor) -> Tensor:
    """The beams of ``[B, M, ...]`` with the indices ``[B, n]``."""
    return tf.gather(beams, indices, axis=1, batch_dims=1)
