"""`generate` of the TensorFlow port: a program for the prompt and one for the loop over the tokens, both compiled.

Legend: B prompts, R rows of the batch (samples or beams of all prompts), P padded prompt length, N room for new
tokens, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf
from transformers import GenerationConfig

from ..generation_options import GenerationOptions, check_prompt, generation_options, round_up_to_bucket
from .beam_search import BeamSearch
from .cache import TFRollingCache
from .logits import is_end, penalized, tokens_of_prompts, warped, with_tokens
from .migration import check_old_options
from .shapes import Tensor

_LACKS = ("prompt_lookup_num_tokens", "max_matching_ngram_size")
CHUNK = 1024  # tokens of a prompt that are processed together; a power of two


class Strategy(Protocol):
    """How tokens are chosen.

    States are nests of tensors of fixed shapes, with a field ``step``: the number of new tokens so far.
    """

    def choose_first(
        self, logits: Tensor, cache: TFRollingCache, previous_tokens: Tensor, limit: Tensor, seed: Tensor
    ) -> Any:
        """The state after the first new tokens.

        Args:
            logits: ``[B, V]`` float32, of the prompts' last tokens.
            cache: Of the prompts.
            previous_tokens: ``[B, V]`` boolean, the tokens of the prompts.
            limit: Scalar int32, the number of new tokens that `generate` returns at most.
            seed: Scalar int64.
        """

    def choose_next(self, state: Any, logits: Tensor, cache: TFRollingCache) -> Any:
        """The state after the next tokens, from the logits ``[R, V]`` of the last ones and the cache with them."""

    def inputs(self, state: Any) -> tuple[Tensor, TFRollingCache]:
        """The last tokens ``[R]``, and the cache of the tokens before them."""

    def running(self, state: Any) -> Tensor:
        """A boolean scalar: whether there are more tokens to choose."""

    def result(self, state: Any) -> Tensor:
        """The new tokens ``[B * num_return_sequences, new]``; outside of graphs."""

    def padded_result(self, state: Any) -> Tensor:
        """The same with N columns, of which the last may be padding; within graphs too."""


class Generator:
    """Runs `generate` for one model and keeps the compiled programs."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._programs: dict[tuple[GenerationOptions, bool], _Programs] = {}

    @property
    def traces(self) -> int:
        """Number of programs traced and compiled so far."""
        return sum(programs.traces for programs in self._programs.values())

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
        check_old_options("generate", options)
        if seed is not None and np.ndim(seed) > 0:
            first = np.ravel(seed)[0]
            raise ValueError(f"seed={seed!r} must be one integer, not a pair as in old releases: pass seed={first}.")
        if tf.is_tensor(input_ids) and tf.is_symbolic_tensor(input_ids):
            return self._within_graph(input_ids, attention_mask, generation_config, seed, streamer, **options)
        ids, real = check_prompt(input_ids, attention_mask, self._model.config.vocab_size)
        chosen = self._options(ids.shape[1], generation_config, options)
        if streamer is not None and chosen.num_beams > 1:
            raise ValueError(
                f"num_beams={chosen.num_beams} cannot be streamed, as beams change until the end: leave streamer out,"
                " or pass num_beams=1."
            )
        limit = chosen.max_new_tokens
        # Prompts and numbers of new tokens are rounded up, to share compiled programs.
        key = replace(chosen, max_new_tokens=round_up_to_bucket(limit)), jit_compile
        programs = self._programs.get(key) or self._programs.setdefault(key, _Programs(self._model, *key))
        fill = round_up_to_bucket(ids.shape[1]) - ids.shape[1]
        padded = np.pad(ids, [(0, 0), (fill, 0)])
        mask = np.pad(real, [(0, 0), (fill, 0)])
        seed_tensor = tf.constant(random.getrandbits(31) if seed is None else seed, tf.int64)
        state = programs.prefill(tf.constant(padded), tf.constant(mask), tf.constant(limit), seed_tensor)
        if streamer is None:
            state = programs.decode(state, tf.constant(limit))
        else:
            state = _stream(programs, state, limit, ids, streamer)
        new = programs.strategy.result(state)
        return tf.concat([np.repeat(ids, chosen.num_return_sequences, axis=0), new], axis=1)

    def _options(
        self, prompt_length: int, generation_config: GenerationConfig | None, options: dict[str, Any]
    ) -> GenerationOptions:
        defaults = self._model.generation_config
        return generation_options(defaults, prompt_length, generation_config, lacks=_LACKS, **options)

    def _within_graph(
        self,
        ids: Tensor,
        mask: Any,
        generation_config: GenerationConfig | None,
        seed: Any,
        streamer: Any,
        **options: Any,
    ) -> Tensor:
        """`generate` as a part of the caller's graph: ``[B, S + max_new_tokens]``, as its shapes are fixed."""
        if ids.shape.rank != 2 or None in ids.shape or not ids.dtype.is_integer:
            raise ValueError(
                f"input_ids is {ids.dtype.name} {tuple(ids.shape)} within a graph, but must be integers [batch, tokens]"
                " of known sizes: trace the function for tensors of one shape (pad the prompts on the left to a"
                " multiple of some length), or call generate outside of tf.function, which compiles it too."
            )
        if streamer is not None:
            raise ValueError("Tokens cannot be streamed out of a graph: call generate outside of tf.function.")
        chosen = self._options(ids.shape[1], generation_config, options)
        real = tf.ones_like(ids, tf.bool) if mask is None else tf.cast(mask, tf.bool)
        if seed is None:
            seed = tf.random.uniform([], maxval=tf.int32.max, dtype=tf.int32)
        programs, ids = _Programs(self._model, chosen, False), tf.cast(ids, tf.int32)
        fill = [[0, 0], [-ids.shape[1] % _chunk(self._model, chosen, round_up_to_bucket(ids.shape[1])), 0]]
        limit = tf.constant(chosen.max_new_tokens)
        state = programs.run_prefill(tf.pad(ids, fill), tf.pad(real, fill), limit, tf.cast(seed, tf.int64))
        new = programs.strategy.padded_result(programs.run_decode(state, limit))
        return tf.concat([tf.repeat(ids, chosen.num_return_sequences, axis=0), new], axis=1)


def _chunk(model: Any, options: GenerationOptions, length: int) -> int:
    """How many tokens of a prompt are processed together: the largest power of two within the limits.

    Frequencies that depend on the length of a call are those of the whole prompt, unless the caller wants chunks.
    """
    depends = model.model.rotary_emb.frequencies.pretrained is not None
    limit = min(options.prefill_chunk_size or (length if depends else CHUNK), length)
    return 1 << (limit.bit_length() - 1)


def _stream(programs: _Programs, state: Any, limit: int, ids: Any, streamer: Any) -> Any:
    """Run the loop step by step and pass every token to the streamer."""
    streamer.put(ids)
    streamer.put(programs.strategy.inputs(state)[0].numpy())
    for step in range(2, limit + 1):
        if not programs.strategy.running(state):
            break
        state = programs.decode(state, tf.constant(step))
        streamer.put(programs.strategy.inputs(state)[0].numpy())
    streamer.end()
    return state


class _Programs:
    """The two programs of one set of options: `prefill` for the prompts, `decode` for the new tokens."""

    def __init__(self, model: Any, options: GenerationOptions, jit_compile: bool) -> None:
        self.strategy: Strategy = BeamSearch(options) if options.num_beams > 1 else Sampling(options)
        self._model, self._options = model, options
        self.prefill: Any = tf.function(self.run_prefill, jit_compile=jit_compile, autograph=False)
        self.decode: Any = tf.function(self.run_decode, jit_compile=jit_compile, autograph=False)

    @property
    def traces(self) -> int:
        return sum(program.experimental_get_tracing_count() for program in (self.prefill, self.decode))

    def run_prefill(self, ids: Tensor, real: Tensor, limit: Tensor, seed: Tensor) -> Any:
        """The state after the prompts ``[B, P]`` and their first new tokens."""
        length = ids.shape[1]
        chunk = _chunk(self._model, self._options, length)
        outputs = self._model(
            input_ids=ids[:, :chunk],
            attention_mask=real[:, :chunk],
            use_cache=True,
            cache_capacity=length + self._options.max_new_tokens,
            logits_to_keep=1,
        )

        def next_chunk(first: Tensor, logits: Tensor, cache: TFRollingCache) -> tuple[Tensor, Tensor, TFRollingCache]:
            outputs = self._model(
                input_ids=tf.slice(ids, [0, first], [-1, chunk]),
                attention_mask=tf.slice(real, [0, first], [-1, chunk]),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            return first + chunk, outputs.logits, outputs.past_key_values

        start = tf.constant(chunk), outputs.logits, outputs.past_key_values
        _, logits, cache = tf.while_loop(lambda first, *_: first < length, next_chunk, start, parallel_iterations=1)
        previous_tokens = tokens_of_prompts(ids, real, self._model.config.vocab_size)
        return self.strategy.choose_first(tf.cast(logits[:, -1], tf.float32), cache, previous_tokens, limit, seed)

    def run_decode(self, state: Any, until: Tensor) -> Any:
        """The state after `until` new tokens, or when no more are to be chosen."""

        def step(state: Any) -> tuple[Any]:
            tokens, cache = self.strategy.inputs(state)
            outputs = self._model(input_ids=tokens[:, None], past_key_values=cache, use_cache=True)
            logits = tf.cast(outputs.logits[:, -1], tf.float32)
            return (self.strategy.choose_next(state, logits, outputs.past_key_values),)

        def unfinished(state: Any) -> Tensor:
            return (state.step < until) & self.strategy.running(state)

        return tf.while_loop(unfinished, step, (state,), parallel_iterations=1)[0]


class SamplingState(NamedTuple):
    """The state of `Sampling`.

    Attributes:
        step: Scalar int32, the number of new tokens.
        tokens: ``[R, N]`` int32, the new tokens, then padding.
        last: ``[R]`` int32, the last tokens.
        finished: ``[R]`` boolean, the rows that have ended.
        previous_tokens: ``[R, V]`` boolean, the tokens that a row has had, for a repetition penalty.
        seed: Scalar int64.
        cache: Of all tokens but the last ones.
    """

    step: Tensor
    tokens: Tensor
    last: Tensor
    finished: Tensor
    previous_tokens: Tensor
    seed: Tensor
    cache: TFRollingCache


class Sampling:
    """Greedy decoding and sampling; a row that has ended continues with padding.

    Args:
        options: Those of `generate`, with N as ``max_new_tokens``.
    """

    def __init__(self, options: GenerationOptions) -> None:
        self.options = options

    def choose_first(
        self, logits: Tensor, cache: TFRollingCache, previous_tokens: Tensor, limit: Tensor, seed: Tensor
    ) -> SamplingState:
        """See `Strategy`."""
        batch, copies = logits.shape[0], self.options.num_return_sequences
        if copies > 1:
            rows = tf.repeat(tf.range(batch), copies)
            batch, cache = batch * copies, cache.gather_rows(rows)
            logits, previous_tokens = tf.gather(logits, rows), tf.gather(previous_tokens, rows)
        state = SamplingState(
            step=tf.constant(0),
            tokens=tf.fill([batch, self.options.max_new_tokens], self.options.pad_token_id),
            last=tf.zeros([batch], tf.int32),
            finished=tf.zeros([batch], tf.bool),
            previous_tokens=previous_tokens,
            seed=seed,
            cache=cache,
        )
        return self.choose_next(state, logits, cache)

    def choose_next(self, state: SamplingState, logits: Tensor, cache: TFRollingCache) -> SamplingState:
        """See `Strategy`."""
        options = self.options
        logits = penalized(logits, state.previous_tokens, options.repetition_penalty)
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
        is_current = tf.range(options.max_new_tokens) == state.step
        return SamplingState(
            step=state.step + 1,
            tokens=tf.where(is_current, last[:, None], state.tokens),
            last=last,
            finished=state.finished | is_end(last, options),
            previous_tokens=with_tokens(state.previous_tokens, last, options.repetition_penalty),
            seed=state.seed,
            cache=cache,
        )

    def inputs(self, state: SamplingState) -> tuple[Tensor, TFRollingCache]:
        """See `Strategy`."""
        return state.last, state.cache

    def running(self, state: SamplingState) -> Tensor:
        """See `Strategy`."""
        return ~tf.reduce_all(state.finished)

    def result(self, state: SamplingState) -> Tensor:
        """See `Strategy`."""
        return state.tokens[:, : int(state.step)]

    def padded_result(self, state: SamplingState) -> Tensor:
        """See `Strategy`."""
        return state.tokens
