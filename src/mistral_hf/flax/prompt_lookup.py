"""Prompt lookup for the JAX port: a step reads several guessed tokens, and keeps those that would have been chosen.

The guess is what followed the last tokens where they occurred before (Saxena, 2023). Whatever it is, the result is that
of `Sampling`, token for token, since every token is chosen from the logits of those before it, with the same key.

Legend: N room for new tokens, C guessed tokens, V vocabulary.
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
from .logits import is_end, penalized, sample


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LookupState:
    """The state of `PromptLookup`.

    Attributes:
        step: Number of new tokens, a scalar.
        limit: Number of new tokens at which the sequence ends, a scalar.
        text: ``[1, prompt + N + C]``, the prompt and the new tokens.
        first: Index of the prompt's first real token, a scalar.
        finished: Whether the sequence has ended, a scalar.
        cache: Of all tokens but the one chosen last.
        key: Random key of the call.
        previous_tokens: ``[1, V]``, the tokens of the text, for a repetition penalty; else None.
    """

    step: Array
    limit: Array
    text: Array
    first: Array
    finished: Array
    cache: FlaxRollingCache
    key: Array
    previous_tokens: Array | None


@dataclass(frozen=True)
class PromptLookup:
    """Greedy search or sampling of one sequence, several tokens a step.

    Args:
        options: Those of `generate`, with N as ``max_new_tokens`` and C as ``prompt_lookup_num_tokens``.
    """

    options: GenerationOptions

    @property
    def guesses(self) -> int:
        """C."""
        return self.options.prompt_lookup_num_tokens or 0

    def choose_first(
        self, logits: Array, cache: FlaxRollingCache, prompt: Prompt, limit: Array, key: Array
    ) -> LookupState:
        """See `Strategy`."""
        state = LookupState(
            step=jnp.zeros((), jnp.int32),
            limit=jnp.asarray(limit, jnp.int32),
            text=jnp.pad(prompt.ids, ((0, 0), (0, self.options.max_new_tokens + self.guesses))),
            first=jnp.argmax(prompt.real[0]),
            finished=jnp.zeros((), bool),
            cache=cache,
            key=key,
            previous_tokens=prompt.previous_tokens,
        )
        return self._advance(state, logits[:, None], jnp.zeros((0,), jnp.int32), cache)

    def choose_next(self, state: LookupState, logits: Array, cache: FlaxRollingCache) -> LookupState:
        """See `Strategy`."""
        return self._advance(state, logits, self._guess(state), cache)

    def _advance(self, state: LookupState, logits: Array, guess: Array, cache: FlaxRollingCache) -> LookupState:
        """Choose a token after each of the guessed ones ``[S - 1]``, and keep those up to the first that differs."""
        count = logits.shape[1]
        chosen = self._choose(state, logits[0], guess)  # [S]
        right = jnp.cumprod(jnp.append(guess == chosen[:-1], True)).astype(bool)
        kept = jnp.where(right[:-1].all(), count, jnp.argmin(right) + 1)
        ends = is_end(chosen, self.options)
        kept = jnp.minimum(kept, jnp.where(ends.any(), jnp.argmax(ends) + 1, count))
        kept = jnp.minimum(kept, state.limit - state.step)
        text = lax.dynamic_update_slice(state.text, chosen[None], (0, self._length(state)))
        previous = state.previous_tokens
        if previous is not None:
            previous = previous.at[0, chosen].max(jnp.arange(count) < kept)
        return replace(
            state,
            step=state.step + kept,
            text=text,
            finished=(ends & (jnp.arange(count) < kept)).any() | (state.step + kept >= state.limit),
            cache=cache.without_last(count - kept, count),
            previous_tokens=previous,
        )

    def _choose(self, state: LookupState, logits: Array, guess: Array) -> Array:
        """A token ``[S]`` from each of the logits ``[S, V]``, as if all the guessed ones before it were right."""
        options = self.options
        if state.previous_tokens is not None:
            guessed = jnp.cumsum(jax.nn.one_hot(guess, logits.shape[-1], dtype=jnp.int32), axis=0) > 0
            seen = jnp.concatenate([state.previous_tokens, state.previous_tokens | guessed])
            logits = penalized(logits, seen, options.repetition_penalty)
        if not options.do_sample:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        keys = jax.vmap(lambda index: jax.random.fold_in(state.key, state.step + index))(jnp.arange(len(logits)))
        return jax.vmap(lambda row, key: sample(row[None], key, options)[0])(logits, keys)

    def _length(self, state: LookupState) -> Array:
        """Number of tokens in the text."""
        return state.text.shape[1] - self.options.max_new_tokens - self.guesses + state.step

    def _guess(self, state: LookupState) -> Array:
        """What followed the earliest occurrence of the last tokens, of as many of them as occur; ``[C]``."""
        text, length = state.text[0], self._length(state)
        starts, index = jnp.zeros((), jnp.int32), jnp.arange(text.size)
        for size in range(1, self.options.max_matching_ngram_size + 1):
            last = lax.dynamic_slice_in_dim(text, length - size, size)
            same = (index >= state.first) & (index + size < length)
            for offset in range(size):
                same &= jnp.roll(text, -offset) == last[offset]
            starts = jnp.where(same.any(), jnp.argmax(same) + size, starts)
        return lax.dynamic_slice_in_dim(text, starts, self.guesses)

    def inputs(self, state: LookupState) -> tuple[Array, FlaxRollingCache]:
        """See `Strategy`."""
        last = lax.dynamic_slice_in_dim(state.text[0], self._length(state) - 1, 1)
        return jnp.concatenate([last, self._guess(state)])[None], state.cache

    def running(self, state: LookupState) -> Array:
        """See `Strategy`."""
        return ~state.finished

    def result(self, state: LookupState) -> Any:
        """See `Strategy`."""
        start = state.text.shape[1] - self.options.max_new_tokens - self.guesses
        return np.asarray(state.text)[:, start : start + int(state.step)]
