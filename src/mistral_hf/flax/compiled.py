"""Compiled programs of the JAX models; models of the same architecture share them.

Legend: B batch, S tokens, N room for new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from ..generation_options import GenerationOptions
from .beam_search import BeamSearch
from .cache import FlaxRollingCache
from .generation import Prompt, Sampling, Strategy
from .logits import tokens_of_prompts
from .losses import IGNORE_INDEX, causal_lm_loss
from .params import Params, to_module
from .prompt_lookup import PromptLookup

_OUTPUT_OPTIONS = ("output_hidden_states", "output_attentions", "logits_to_keep")


class ForwardPrograms(NamedTuple):
    """The forward pass and the language-model loss of a model.

    Attributes:
        forward: Takes weights, and the arguments of the module's call.
        loss: Takes weights, ids, mask, positions, labels and a dropout key (all but the first two may be None), and
            the static ``label_smoothing``.
    """

    forward: Callable[..., Any]
    loss: Callable[..., Array]


@lru_cache(maxsize=64)
def forward_programs(graph: Any) -> ForwardPrograms:
    """The programs of an NNX module, given by its graph definition."""

    def forward(params: Params, *inputs: Any, **options: Any) -> Any:
        return to_module(graph, params)(*inputs, **options)

    def loss(
        params: Params,
        ids: Array,
        mask: Array | None,
        position_ids: Array | None,
        labels: Array | None,
        dropout_key: Array | None,
        *,
        label_smoothing: float,
    ) -> Array:
        module = to_module(graph, params)
        states = module.model(ids, mask, position_ids, dropout_key=dropout_key).last_hidden_state
        if labels is None:
            labels = ids if mask is None else _real_labels(ids, mask)
        restarting = position_ids if mask is None else None  # under a mask, a row is one sequence
        return causal_lm_loss(
            states, module.output_weight, labels, position_ids=restarting, label_smoothing=label_smoothing
        )

    forward_program = jax.jit(forward, static_argnames=_OUTPUT_OPTIONS)
    return ForwardPrograms(forward_program, jax.jit(loss, static_argnames="label_smoothing"))


def _real_labels(ids: Array, mask: Array) -> Array:
    """Ids ``[B, S]`` as labels, ignored where they are padding or follow padding."""
    real = mask.astype(bool)
    return jnp.where(real & jnp.pad(real, ((0, 0), (1, 0)))[:, :-1], ids, IGNORE_INDEX)


class GenerationPrograms(NamedTuple):
    """The two programs of `generate`, and the strategy whose states they return.

    Attributes:
        strategy: How tokens are chosen.
        prefill: From weights, ids and mask of a prompt ``[B, S]``, the number of tokens to choose and a random key to
            the state after the first new tokens.
        decode: From weights, a state (which is donated) and a number of tokens to the state after that many, or after
            the end.
    """

    strategy: Strategy
    prefill: Callable[..., Any]
    decode: Callable[..., Any]


@lru_cache(maxsize=64)
def generation_programs(graph: Any, options: GenerationOptions) -> GenerationPrograms:
    """The programs for a model and its options, compiled once for every length of prompts.

    Args:
        graph: Graph definition of a `MistralForCausalLMModule`.
        options: With N as ``max_new_tokens``; the number of tokens to choose is an argument of the programs.
    """
    strategy = _strategy(options)
    guesses = options.prompt_lookup_num_tokens or 0

    def prefill(params: Params, ids: Array, real: Array, limit: Array, key: Array) -> Any:
        module = to_module(graph, params)
        cache = module.model.init_cache(
            ids.shape[0], ids.shape[1] + options.max_new_tokens + guesses, slack=guesses + 1 if guesses else 0
        )
        logits, cache = _read_prompt(module, ids, real, cache, options.prefill_chunk_size)
        penalty = options.repetition_penalty != 1
        previous_tokens = tokens_of_prompts(ids, real, logits.shape[-1]) if penalty else None
        return strategy.choose_first(logits, cache, Prompt(ids, real, previous_tokens), limit, key)

    def decode(params: Params, state: Any, until: Array) -> Any:
        module = to_module(graph, params)

        def step(state: Any) -> Any:
            ids, cache = strategy.inputs(state)
            return strategy.choose_next(state, *_logits(module, ids, jnp.ones_like(ids, bool), cache, ids.shape[1]))

        return lax.while_loop(lambda state: (state.step < until) & strategy.running(state), step, state)

    return GenerationPrograms(strategy, jax.jit(prefill), jax.jit(decode, donate_argnums=1))


def _strategy(options: GenerationOptions) -> Strategy:
    if options.num_beams > 1:
        return BeamSearch(options)
    return Sampling(options) if options.prompt_lookup_num_tokens is None else PromptLookup(options)


def _read_prompt(
    module: Any, ids: Array, real: Array, cache: FlaxRollingCache, chunk: int | None
) -> tuple[Array, FlaxRollingCache]:
    """Logits ``[B, V]`` of the last token, and the cache after prompts ``[B, S]`` read `chunk` tokens at a time."""
    length = ids.shape[1]
    if chunk is None or chunk >= length:
        logits, cache = _logits(module, ids, real, cache, 1)
        return logits[:, -1], cache
    padding = ((0, 0), (-length % chunk, 0))
    ids, real = jnp.pad(ids, padding), jnp.pad(real, padding)

    def read(index: Array, state: tuple[Array, FlaxRollingCache]) -> tuple[Array, FlaxRollingCache]:
        part = partial(lax.dynamic_slice_in_dim, start_index=index * chunk, slice_size=chunk, axis=1)
        logits, cache = _logits(module, part(ids), part(real), state[1], 1)
        return logits[:, -1], cache

    # Chunks before the first real token, which the rounding of the length may add, are left out.
    first = jnp.argmax(real.any(axis=0)) // chunk
    start = jnp.zeros((ids.shape[0], module.output_weight.shape[0]), jnp.float32), replace(cache, empty=False)
    return lax.fori_loop(first, ids.shape[1] // chunk, read, start)


def _logits(module: Any, ids: Array, real: Array, cache: FlaxRollingCache, kept: int) -> tuple[Array, FlaxRollingCache]:
    """Logits ``[B, kept, V]`` of the last tokens in float32, and the cache after the tokens ``[B, S]``."""
    outputs = module(ids, real, None, cache, logits_to_keep=kept)
    return outputs.logits.astype(jnp.float32), outputs.past_key_values


def new_tokens(
    programs: GenerationPrograms,
    params: Params,
    ids: Array,
    real: Array,
    limit: int,
    key: Array,
    put: Callable[[Any], None] | None = None,
) -> Any:
    """Run the programs.

    Args:
        programs: For the options of the call.
        params: Weights.
        ids, real: ``[B, S]``, the padded prompt and its mask.
        limit: Number of tokens to choose.
        key: Random key.
        put: Called with the tokens ``[B]`` of every step; not with beams.

    Returns:
        ``[B, at most limit]``, a NumPy array.
    """
    state = programs.prefill(params, ids, real, limit, key)
    state = programs.decode(params, state, limit) if put is None else _stream(programs, params, state, limit, put)
    return programs.strategy.result(state)


def _stream(programs: GenerationPrograms, params: Params, state: Any, limit: int, put: Callable[[Any], None]) -> Any:
    """Run the loop one step at a time, and pass on every token."""
    shown = 0
    while True:
        tokens = programs.strategy.result(state)
        for index in range(shown, tokens.shape[1]):
            put(tokens[:, index])
        shown = tokens.shape[1]
        if shown >= limit or not programs.strategy.running(state):
            return state
        state = programs.decode(params, state, shown + 1)
