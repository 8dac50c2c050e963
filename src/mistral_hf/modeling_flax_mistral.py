"""Mistral in JAX: `FlaxMistralModel` and `FlaxMistralForCausalLM`.

They read and write the same checkpoints as the PyTorch classes. Weights are a plain nested dict with the names and the
orientation of the checkpoint: ``params["model"]["layers"]["0"]["self_attn"]["q_proj"]["weight"]`` is ``[out, in]``.
Inputs may be JAX or NumPy arrays (``return_tensors="np"`` of a tokenizer) or lists.

Legend: B batch, S tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import Array
from transformers import GenerationConfig

from .flax.compiled import forward_programs, generation_programs, new_tokens
from .flax.layers import MistralForCausalLMModule, MistralModule
from .flax.outputs import FlaxGenerateOutput
from .flax.params import Params
from .flax.pretrained import FlaxMistralPreTrainedModel
from .flax.sharding import shard_rows
from .flax.validation import as_array, check_labels
from .generation_options import check_prompt, generation_options, round_up_to_bucket


class FlaxMistralModel(FlaxMistralPreTrainedModel):
    """The decoder without a head: embeddings, layers and the last norm."""

    module_class = MistralModule
    architecture = "MistralModel"


class FlaxMistralForCausalLM(FlaxMistralPreTrainedModel):
    """The language model: a decoder and an output layer over the vocabulary."""

    module_class = MistralForCausalLMModule
    architecture = "MistralForCausalLM"

    def loss(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        labels: Any = None,
        *,
        position_ids: Any = None,
        label_smoothing: float | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """Mean cross-entropy of the next tokens; differentiable with respect to `params`.

        The logits of all tokens never exist together.

        Args:
            input_ids, attention_mask: ``[B, S]``, as in a call.
            labels: ``[B, S]`` token ids, ``-100`` where the loss ignores them; they are shifted inside. By default, the
                tokens of `input_ids` that are real and follow a real one.
            position_ids: ``[B or 1, S]``, as in a call. Of packed sequences, none predicts a label of the next.
            label_smoothing: Share of the target probability that is spread evenly over the vocabulary (default: the
                configuration's).
            params: Weights in place of the model's own.
            dropout_rng: Random key of the dropout; without one there is none.

        Returns:
            A float32 scalar.

        Raises:
            ValueError: As in a call; or labels do not fit the ids or the vocabulary, or `label_smoothing` lies outside
                ``[0, 1)``.
        """
        inputs = self._inputs(input_ids, attention_mask, position_ids)
        labels = as_array("labels", labels)
        if labels is not None:
            check_labels(labels, inputs[0].shape, self.config.vocab_size)
            labels = shard_rows(labels, self.mesh)
        smoothing = self.config.label_smoothing if label_smoothing is None else label_smoothing
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing={smoothing} must lie in [0, 1): 0 does not smooth.")
        weights = self.params if params is None else params
        loss = forward_programs(self._graph).loss
        return loss(weights, *inputs, labels, dropout_rng, label_smoothing=float(smoothing))

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        params: Params | None = None,
        prng_key: Array | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> FlaxGenerateOutput:
        """Continue prompts: greedily, by sampling, or by beam search.

        Prompts are padded to the next power of two: those of similar lengths share a compiled program.

        Args:
            input_ids: ``[B, S]`` token ids; padding must be on the left.
            attention_mask: ``[B, S]``, nonzero for real tokens.
            generation_config: Replaces the model's `generation_config`.
            params: Weights in place of the model's own.
            prng_key: Random key for sampling (default: ``jax.random.key(0)``).
            streamer: An object with `put` and `end`, such as the library's `TextStreamer`; it receives the prompt, then
                every token as it is chosen. Not with beams.
            **options: ``max_new_tokens``, ``max_length``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
                ``min_p``, ``repetition_penalty``, ``num_beams``, ``length_penalty``, ``early_stopping``,
                ``eos_token_id``, ``pad_token_id``, ``num_return_sequences``, ``prefill_chunk_size`` (memory of a long
                prompt), ``prompt_lookup_num_tokens`` and ``max_matching_ngram_size`` (one sequence, several tokens a
                step where its text repeats itself), as in the library's `GenerationConfig`.

        Returns:
            The prompts and their continuations, padded to the longest row; ``num_return_sequences`` rows for each
            prompt.

        Raises:
            ValueError: Shapes do not fit, the prompt is padded on the right, an id lies outside the vocabulary, or an
                option is unknown or has an impossible value.
        """
        input_ids, attention_mask = as_array("input_ids", input_ids), as_array("attention_mask", attention_mask)
        prompt, real = check_prompt(input_ids, attention_mask, self.config.vocab_size)
        chosen = generation_options(self.generation_config, prompt.shape[1], generation_config, **options)
        if streamer is not None and chosen.num_beams > 1:
            raise ValueError(
                f"num_beams={chosen.num_beams} cannot be streamed: leave out the streamer, or set num_beams=1."
            )
        if chosen.prompt_lookup_num_tokens is not None and len(prompt) > 1:
            raise ValueError(
                f"prompt_lookup_num_tokens={chosen.prompt_lookup_num_tokens} takes one prompt, not {len(prompt)}: call"
                " generate for each, or leave it out."
            )
        # Both lengths are rounded up: similar ones share compiled programs.
        limit = chosen.max_new_tokens
        programs = generation_programs(self._graph, replace(chosen, max_new_tokens=round_up_to_bucket(limit)))
        weights = self.params if params is None else params
        left = ((0, 0), (round_up_to_bucket(prompt.shape[1]) - prompt.shape[1], 0))
        ids, real = (shard_rows(np.pad(x, left), self.mesh) for x in (prompt, real))
        key = jax.random.key(0) if prng_key is None else prng_key
        prompt = np.repeat(prompt, chosen.num_return_sequences, axis=0)
        if streamer is not None:
            streamer.put(prompt)
        new = new_tokens(programs, weights, ids, real, limit, key, None if streamer is None else streamer.put)
        if streamer is not None:
            streamer.end()
        return FlaxGenerateOutput(np.concatenate([prompt, new], axis=1))
