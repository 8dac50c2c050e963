"""How `generate` chooses tokens: what a strategy is, and greedy search and sampling.

Legend: B batch, R rows (sequences or beams of all prompts), N room for new tokens, S tokens of a step, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..generation_options import GenerationOptions
from .cache import FlaxRollingCache
from .logits import is_end, penalized, sample, with_tokens


class Strategy(Protocol):
    """How tokens are chosen. States are pytrees of fixed shapes, with a field ``step``: the number of tokens so far."""

    def choose_first(self, logits: Array, cache: FlaxRollingCache, prompt: Prompt, limit: Array, key: Array) -> Any:
        """The state after the first tokens.

        Args:
            logits: ``[B, V]`` in float32, of the last tokens of the prompts.
            cache: Of the prompts.
            prompt: What the prompts contain.
            limit: Number of tokens to choose, at most N; a scalar.
            key: Random key.
        """

    def choose_next(self, state: Any, logits: Array, cache: FlaxRollingCache) -> Any:
        """The state after the next tokens, from the logits ``[R, S, V]`` of `inputs`, and the cache with these."""

    def inputs(self, state: Any) -> tuple[Array, FlaxRollingCache]:
        """Tokens ``[R, S]`` to read, of which the first are the last chosen, and the cache of all before them."""

    def running(self, state: Any) -> Array:
        """A boolean scalar: whether there are more tokens to choose."""

    def result(self, state: Any) -> Any:
        """The new tokens ``[B, new]`` as a NumPy array; outside of compiled programs."""


class Prompt(NamedTuple):
    """What the prompts of a call contain.

    Attributes:
        ids, real: ``[B, length]``, padded on the left.
        previous_tokens: ``[B, V]`` boolean, the tokens of each, for a repetition penalty; else None.
    """

    ids: Array
    real: Array
    previous_tokens: Array | None

    def repeated(self, count: int) -> Array:
        """Indices of the rows, each `count` times."""
        return jnp.repeat(jnp.arange(self.ids.shape[0]), count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """The state of `Sampling`.

    Attributes:
        step: Number of new tokens, a scalar.
        tokens: ``[R, N]``, padded.
        finished: ``[R]``, the rows that have ended.
        cache: Of all tokens but the one chosen last.
        key: Random key of the call.
        previous_tokens: ``[R, V]``, the tokens that a row contains, for a repetition penalty; else None.
    """

    step: Array
    tokens: Array
    finished: Array
    cache: FlaxRollingCache
    key: Array
    previous_tokens: Array | None


@dataclass(frozen=True)
class Sampling:
    """Greedy search and sampling; a finished row continues with padding.

    Args:
        options: Those of `generate`, with N as ``max_new_tokens``.
    """

    options: GenerationOptions

    def choose_first(
        self, logits: Array, cache: FlaxRollingCache, prompt: Prompt, limit: Array, key: Array
    ) -> SamplingState:
        """See `Strategy`."""
        options, previous = self.options, prompt.previous_tokens
        if options.num_return_sequences > 1:
            rows = prompt.repeated(options.num_return_sequences)
            logits, cache = logits[rows], cache.gather_rows(rows)
            previous = None if previous is None else previous[rows]
        state = SamplingState(
            step=jnp.zeros((), jnp.int32),
            tokens=jnp.full((logits.shape[0], options.max_new_tokens), options.pad_token_id, jnp.int32),
            finished=jnp.zeros(logits.shape[0], bool),
            cache=cache,
            key=key,
            previous_tokens=previous,
        )
        return self.choose_next(state, logits[:, None], cache)

    def choose_next(self, state: SamplingState, logits: Array, cache: FlaxRollingCache) -> SamplingState:
        """See `Strategy`."""
        options, logits = self.options, logits[:, -1]
        if state.previous_tokens is not None:
            logits = penalized(logits, state.previous_tokens, options.repetition_penalty)
        if options.do_sample:
            chosen = sample(logits, jax.random.fold_in(state.key, state.step), options)
        else:
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        last = jnp.where(state.finished, options.pad_token_id, chosen)
        return replace(
            state,
            step=state.step + 1,
            tokens=lax.dynamic_update_slice_in_dim(state.tokens, last[:, None], state.step, axis=1),
            finished=state.finished | is_end(last, options),
            cache=cache,
            previous_tokens=with_tokens(state.previous_tokens, last),
        )

    def inputs(self, state: SamplingState) -> tuple[Array, FlaxRollingCache]:
        """See `Strategy`."""
        return lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=1), state.cache

    def running(self, state: SamplingState) -> Array:
        """See `Strategy`."""
        return ~state.finished.all()

    def result(self, state: SamplingState) -> Any:
        """See `Strategy`."""
        return np.asarray(state.tokens)[:, : int(state.step)]
