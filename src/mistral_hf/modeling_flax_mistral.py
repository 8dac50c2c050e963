"""Mistral in JAX: `FlaxMistralModel` and `FlaxMistralForCausalLM`.

They read and write the same checkpoints as the PyTorch classes. Weights are a plain nested dict, by the names and in
the orientation of the checkpoint: ``params["model"]["layers"]["0"]["self_attn"]["q_proj"]["weight"]`` is ``[out, in]``.
Inputs may be NumPy arrays: a tokenizer gives them with ``return_tensors="np"``.

Legend: B batch, S new tokens, T keys, H query heads, E hidden_size, V vocabulary.
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
        """Mean cross-entropy of the next tokens, whose logits never exist all at once; for `jax.grad` over `params`.

        Args:
            input_ids, attention_mask: ``[B, S]``, as of a call.
            labels: ``[B, S]``, -100 where the loss ignores them; by default the tokens of `input_ids`
                that are real and follow a real one.
            position_ids: ``[B or 1, S]``, as of a call. Where positions restart (without a mask), no label is predicted
                from another sequence.
            label_smoothing: Share of the target probability that is spread evenly over the vocabulary (default: the
                configuration's).
            params: Weights in place of the model's.
            dropout_rng: Random key; without one there is no dropout.

        Returns:
            A float32 scalar.

        Raises:
            ValueError: As of a call; or labels do not fit, or `label_smoothing` lies outside ``[0, 1)``.
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

        Prompts of similar lengths share a compiled program: they are padded to the next power of two.

        Args:
            input_ids: ``[B, S]`` token ids, padded on the left, if at all.
            attention_mask: ``[B, S]``, nonzero for real tokens.
            generation_config: In place of the model's `generation_config`.
            params: Weights in place of the model's.
            prng_key: Random key of the sampling (default: ``jax.random.key(0)``).
            streamer: Gets the prompt, every token as it is chosen, and the end, as those of Transformers.
            **options: ``max_new_tokens``, ``max_length``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
                ``min_p``, ``repetition_penalty``, ``num_beams``, ``length_penalty``, ``early_stopping``,
                ``eos_token_id`` and ``pad_token_id``, with the meaning that they have in Transformers.

        Returns:
            The prompts and what follows, as long as the longest row.

        Raises:
            ValueError: The prompt is padded on the right or has foreign ids, or an option is unknown or impossible.
        """
        input_ids, attention_mask = as_array("input_ids", input_ids), as_array("attention_mask", attention_mask)
        prompt, real = check_prompt(input_ids, attention_mask, self.config.vocab_size)
        chosen = generation_options(self.generation_config, prompt.shape[1], generation_config, **options)
        if streamer is not None and chosen.num_beams > 1:
            raise ValueError(f"num_beams={chosen.num_beams} cannot be streamed: leave streamer out, or num_beams=1.")
        limit = chosen.max_new_tokens
        programs = generation_programs(self._graph, replace(chosen, max_new_tokens=round_up_to_bucket(limit)))
        weights = self.params if params is None else params
        left = ((0, 0), (round_up_to_bucket(prompt.shape[1]) - prompt.shape[1], 0))
        ids, real = (shard_rows(np.pad(x, left), self.mesh) for x in (prompt, real))
        key = jax.random.key(0) if prng_key is None else prng_key
        if streamer is not None:
            streamer.put(prompt)
        new = new_tokens(programs, weights, ids, real, limit, key, None if streamer is None else streamer.put)
        if streamer is not None:
            streamer.end()
        return FlaxGenerateOutput(np.concatenate([prompt, new], axis=1))
