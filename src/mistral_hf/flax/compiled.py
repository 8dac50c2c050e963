"""Compiled programs of the JAX model; models with the same architecture share them.

Legend: B batch, S tokens of a prompt, N room for new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..generation_options import GenerationOptions
from . import beam_search as flax_beam_search
from . import generation as flax_generation
from .cache import FlaxRollingCache
from .generation import Forward
from .losses import IGNORE_INDEX, causal_lm_loss
from .params import Params, to_module

_OUTPUT_OPTIONS = ("output_hidden_states", "output_attentions", "logits_to_keep")


class ForwardPrograms(NamedTuple):
    """The forward pass, and the language-model loss."""

    call: Callable[..., Any]
    loss: Callable[..., Array]


@lru_cache(maxsize=64)
def forward_programs(graph: Any) -> ForwardPrograms:
    """The programs of an NNX module, given by its graph definition."""

    def call(params: Params, *inputs: Any, **options: Any) -> Any:
        return to_module(graph, params)(*inputs, **options)

    def loss(params: Params, ids: Array, mask: Array | None, labels: Array | None, dropout_key: Array | None) -> Array:
        module = to_module(graph, params)
        states = module.model(ids, mask, dropout_key=dropout_key).last_hidden_state
        if labels is None:
            labels = ids if mask is None else _real_labels(ids, mask)
        return causal_lm_loss(states, module.output_weight, labels)

    return ForwardPrograms(jax.jit(call, static_argnames=_OUTPUT_OPTIONS), jax.jit(loss))


def _real_labels(ids: Array, mask: Array) -> Array:
    """Ids as labels, those of padding and of what follows padding ignored."""
    real = mask.astype(bool)
    return jnp.where(real & jnp.pad(real, ((0, 0), (1, 0)))[:, :-1], ids, IGNORE_INDEX)


class GenerationPrograms(NamedTuple):
    """The two halves of a search: reading the prompt, and the loop."""

    begin: Callable[..., Any]
    go_on: Callable[..., Any]


@lru_cache(maxsize=64)
def generation_programs(graph: Any, options: GenerationOptions) -> GenerationPrograms:
    """The programs of a model and its options, compiled once for every length of prompts.

    Args:
        graph: Graph definition of a `MistralForCausalLMModule`.
        options: With N as `max_new_tokens`; how many tokens are wanted is an argument of the programs.
    """
    kind: Any = flax_beam_search if options.num_beams > 1 else flax_generation

    def begin(params: Params, ids: Array, real: Array, *inputs: Any) -> Any:
        module = to_module(graph, params)
        cache = module.model.init_cache(ids.shape[0], ids.shape[1] + options.max_new_tokens)
        return kind.start(_next_logits(module), ids, real, cache, *inputs, options)

    def go_on(params: Params, search: Any, limit: Array) -> Any:
        return kind.resume(_next_logits(to_module(graph, params)), search, limit, options)

    return GenerationPrograms(jax.jit(begin), jax.jit(go_on, donate_argnums=1))


def _next_logits(module: Any) -> Forward:
    def forward(ids: Array, real: Array, cache: FlaxRollingCache) -> tuple[Array, FlaxRollingCache]:
        outputs = module(ids, real, None, cache, logits_to_keep=1)
        return outputs.logits[:, -1].astype(jnp.float32), outputs.past_key_values

    return forward


def search(
    programs: GenerationPrograms,
    params: Params,
    ids: Array,
    real: Array,
    limit: int,
    key: Array,
    put: Callable[[Any], None] | None,
) -> Any:
    """New tokens ``[B, at most limit]`` of a greedy search or of sampling.

    Args:
        programs: For these options.
        params: Weights.
        ids, real: ``[B, S]``, the padded prompt.
        limit: Number of new tokens.
        key: Random key.
        put: Gets the tokens ``[B]`` of every step, if there is such a function.
    """
    state = programs.begin(params, ids, real, key)
    if put is None:
        state = programs.go_on(params, state, limit)
    else:
        for step in range(1, limit + 1):
            put(np.asarray(state.tokens)[:, step - 1])
            if step == limit or bool(state.finished.all()):
                break
            state = programs.go_on(params, state, step + 1)
    return np.asarray(state.tokens)[:, : int(state.step)]


def beam_search(programs: GenerationPrograms, params: Params, ids: Array, real: Array, limit: int) -> Any:
    """New tokens ``[B, at most limit]`` of the best beam of every row; arguments as of `search`."""
    state = programs.go_on(params, programs.begin(params, ids, real, limit), limit)
    return np.asarray(state.done_tokens)[:, 0, : int(state.done_lengths[:, 0].max())]
