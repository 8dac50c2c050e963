"""`generate` of the TensorFlow port: a program for the prompt and one for the loop over the tokens, both compiled.

Legend: B prompts, R rows of the batch (prompts, or beams of all prompts), P padded prompt length, N room for new
tokens, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import tensorflow as tf
from transformers import GenerationConfig

from ..generation_options import GenerationOptions, check_prompt, generation_options, round_up_to_bucket
from .beam_search import BeamSearch
from .cache import TFRollingCache
from .logits import is_any, marked, penalized, warped

Tensor: TypeAlias = Any
CHUNK = 1024  # tokens of a prompt that are read at once; a power of two


class Search(Protocol):
    """How tokens are chosen. States are nests of tensors of fixed shapes, with a field ``step``: tokens so far."""

    def begin(self, logits: Tensor, cache: TFRollingCache, seen: Tensor, limit: Tensor, seed: Tensor) -> Any:
        """The state after the first tokens, from the ``[B, V]`` float32 logits of the prompts' last tokens."""

    def advance(self, state: Any, logits: Tensor, cache: TFRollingCache) -> Any:
        """The state after the next tokens, from ``[R, V]`` logits."""

    def inputs(self, state: Any) -> tuple[Tensor, TFRollingCache]:
        """The last tokens ``[R]``, and what came before them."""

    def running(self, state: Any) -> Tensor:
        """A scalar: whether there is more to choose."""

    def result(self, state: Any) -> Tensor:
        """The new tokens ``[B, new]``; outside of graphs."""


class Generator:
    """Runs `generate` for one model, and keeps what it compiled."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._programs: dict[tuple[GenerationOptions, bool], _Programs] = {}

    @property
    def traces(self) -> int:
        """How many programs were traced and compiled so far."""
        return sum(program.traces for program in self._programs.values())

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any,
        generation_config: GenerationConfig | None,
        *,
        seed: int | None,
        streamer: Any,
        jit_compile: bool,
        **options: Any,
    ) -> Tensor:
        """See `TFMistralForCausalLM.generate`."""
        ids, real = check_prompt(input_ids, attention_mask, self._model.config.vocab_size)
        chosen = generation_options(self._model.generation_config, ids.shape[1], generation_config, **options)
        if streamer is not None and chosen.num_beams > 1:
            raise ValueError(f"num_beams={chosen.num_beams} cannot be streamed: beams change until the end.")
        limit = chosen.max_new_tokens
        key = replace(chosen, max_new_tokens=round_up_to_bucket(limit)), jit_compile
        programs = self._programs.get(key) or self._programs.setdefault(key, _Programs(self._model, *key))
        fill = round_up_to_bucket(ids.shape[1]) - ids.shape[1]
        padded = np.pad(ids, [(0, 0), (fill, 0)])
        mask = np.pad(real, [(0, 0), (fill, 0)])
        seed = random.getrandbits(31) if seed is None else seed
        state = programs.read(tf.constant(padded), tf.constant(mask), tf.constant(limit), tf.constant(seed, tf.int64))
        if streamer is None:
            state = programs.write(state, tf.constant(limit))
        else:
            state = _stream(programs, state, limit, ids, streamer)
        return tf.concat([tf.constant(ids), programs.search.result(state)], axis=1)


def _stream(programs: _Programs, state: Any, limit: int, ids: Any, streamer: Any) -> Any:
    """Run the loop step by step, and pass on every token."""
    streamer.put(ids)
    streamer.put(programs.search.inputs(state)[0].numpy())
    for step in range(2, limit + 1):
        if not programs.search.running(state):
            break
        state = programs.write(state, tf.constant(step))
        streamer.put(programs.search.inputs(state)[0].numpy())
    streamer.end()
    return state


class _Programs:
    """The two programs of one set of options: reading the prompt, and writing the tokens."""

    def __init__(self, model: Any, options: GenerationOptions, jit_compile: bool) -> None:
        self.search: Search = BeamSearch(options) if options.num_beams > 1 else Sampling(options)
        self._model, self._options = model, options
        self.read: Any = tf.function(self._read, jit_compile=jit_compile, autograph=False)
        self.write: Any = tf.function(self._write, jit_compile=jit_compile, autograph=False)

    @property
    def traces(self) -> int:
        return sum(program.experimental_get_tracing_count() for program in (self.read, self.write))

    def _read(self, ids: Tensor, real: Tensor, limit: Tensor, seed: Tensor) -> Any:
        """The state after the prompts ``[B, P]`` and their first new tokens."""
        length = ids.shape[1]
        chunk = min(CHUNK, length)
        outputs = self._model(
            input_ids=ids[:, :chunk],
            attention_mask=real[:, :chunk],
            use_cache=True,
            cache_capacity=length + self._options.max_new_tokens,
            logits_to_keep=1,
        )

        def read_on(first: Tensor, logits: Tensor, cache: TFRollingCache) -> tuple[Tensor, Tensor, TFRollingCache]:
            outputs = self._model(
                input_ids=tf.slice(ids, [0, first], [-1, chunk]),
                attention_mask=tf.slice(real, [0, first], [-1, chunk]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return first + chunk, outputs.logits, outputs.past_key_values

        start = tf.constant(chunk), outputs.logits, outputs.past_key_values
        _, logits, cache = tf.while_loop(lambda first, *_: first < length, read_on, start, parallel_iterations=1)
        seen = _tokens_seen(ids, real, self._model.config.vocab_size)
        return self.search.begin(tf.cast(logits[:, -1], tf.float32), cache, seen, limit, seed)

    def _write(self, state: Any, until: Tensor) -> Any:
        """The state after `until` new tokens, or after the end."""

        def advance(state: Any) -> tuple[Any]:
            tokens, cache = self.search.inputs(state)
            outputs = self._model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True)
            logits = tf.cast(outputs.logits[:, -1], tf.float32)
            return (self.search.advance(state, logits, outputs.past_key_values),)

        def proceed(state: Any) -> Tensor:
            return (state.step < until) & self.search.running(state)

        return tf.while_loop(proceed, advance, (state,), parallel_iterations=1)[0]


def _tokens_seen(ids: Tensor, real: Tensor, vocabulary: int) -> Tensor:
    """``[B, V]`` boolean: the tokens of every prompt."""
    rows = tf.where(real, tf.range(ids.shape[0])[:, None], ids.shape[0])  # padding counts for a row that is cut off
    places = tf.reshape(tf.stack([rows, ids], axis=-1), [-1, 2])
    marks = tf.ones([places.shape[0]], tf.int32)
    return tf.tensor_scatter_nd_max(tf.zeros([ids.shape[0] + 1, vocabulary], tf.int32), places, marks)[:-1] > 0


class SamplingState(NamedTuple):
    """The state of `Sampling`."""

    step: Tensor
    tokens: Tensor  # [B, N]
    last: Tensor  # [B]
    finished: Tensor  # [B]
    seen: Tensor  # [B, V]
    seed: Tensor
    cache: TFRollingCache


class Sampling:
    """Greedy decoding and sampling; a finished row goes on with padding.

    Args:
        options: Those of `generate`, with N as ``max_new_tokens``.
    """

    def __init__(self, options: GenerationOptions) -> None:
        self.options = options

    def begin(self, logits: Tensor, cache: TFRollingCache, seen: Tensor, limit: Tensor, seed: Tensor) -> SamplingState:
        """See `Search`."""
        batch = logits.shape[0]
        tokens = tf.fill([batch, self.options.max_new_tokens], self.options.pad_token_id)
        empty = tf.zeros([batch], tf.int32)
        state = SamplingState(tf.constant(0), tokens, empty, tf.zeros([batch], tf.bool), seen, seed, cache)
        return self.advance(state, logits, cache)

    def advance(self, state: SamplingState, logits: Tensor, cache: TFRollingCache) -> SamplingState:
        """See `Search`."""
        options = self.options
        logits = penalized(logits, state.seen, options.repetition_penalty)
        if options.do_sample:
            noise = tf.random.stateless_uniform(
                logits.shape,
                [state.seed, tf.cast(state.step, tf.int64)],
                minval=np.finfo(np.float32).tiny,
                alg="philox",
            )
            logits = warped(logits, options) - tf.math.log(-tf.math.log(noise))  # the Gumbel trick
        last = tf.argmax(logits, axis=-1, output_type=tf.int32)
        last = tf.where(state.finished, options.pad_token_id, last)
        place = tf.range(options.max_new_tokens) == state.step
        return SamplingState(
            state.step + 1,
            tf.where(place, last[:, None], state.tokens),
            last,
            state.finished | is_any(last, options.eos_token_ids),
            marked(state.seen, last, options.repetition_penalty),
            state.seed,
            cache,
        )

    def inputs(self, state: SamplingState) -> tuple[Tensor, TFRollingCache]:
        """See `Search`."""
        return state.last, state.cache

    def running(self, state: SamplingState) -> Tensor:
        """See `Search`."""
        return ~tf.reduce_all(state.finished)

    def result(self, state: SamplingState) -> Tensor:
        """See `Search`."""
        return state.tokens[:, : int(state.step)]
