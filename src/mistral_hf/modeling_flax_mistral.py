"""Mistral in JAX: `FlaxMistralModel`, `FlaxMistralForCausalLM` and `FlaxMistralForSequenceClassification`.

They read and write the same checkpoints as the PyTorch classes. Weights are a plain nested dict with the names and the
orientation of the checkpoint: ``params["model"]["layers"]["0"]["self_attn"]["q_proj"]["weight"]`` is ``[out, in]``.
Inputs may be JAX or NumPy arrays (``return_tensors="np"`` of a tokenizer) or lists.

Legend: B batch, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import Array
from transformers import GenerationConfig

from .flax.compiled import compiler_options, forward_programs, generation_programs, new_tokens
from .flax.heads import MistralForCausalLMModule, MistralForSequenceClassificationModule
from .flax.layers import MistralModule
from .flax.lora import FlaxLoraAdapter as FlaxLoraAdapter
from .flax.losses import CHUNK, predicted_labels
from .flax.outputs import FlaxGenerateOutput
from .flax.params import Params
from .flax.pretrained import FlaxMistralPreTrainedModel
from .flax.sharding import shard_rows
from .flax.validation import as_array, check_class_labels, check_labels, warn_if_all_ignored
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
        loss_chunk_size: int | None = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """Mean cross-entropy of the next tokens; differentiable with respect to `params`.

        The logits of all tokens never exist together. A batch whose labels are all ignored has the loss 0, with a
        warning unless its values are unknown, as in a compiled function of the caller.

        Args:
            input_ids, attention_mask: ``[B, S]``, as in a call.
            labels: ``[B, S]`` token ids, ``-100`` where the loss ignores them; they are shifted inside. By default, the
                tokens of `input_ids` that are real and follow a real one.
            position_ids: ``[B or 1, S]``, as in a call. Of packed sequences, none predicts a label of the next.
            label_smoothing: Share of the target probability that is spread evenly over the vocabulary (default: the
                configuration's).
            loss_chunk_size: Number of tokens whose logits exist together (default: the configuration's, or 1024).
            params: Weights in place of the model's own.
            dropout_rng: Random key of the dropout; without one there is none.

        Returns:
            A float32 scalar.

        Raises:
            ValueError: As in a call; labels do not fit the ids or the vocabulary; `label_smoothing` lies outside
                ``[0, 1)``; or `loss_chunk_size` is not positive.
        """
        inputs = self._inputs(input_ids, attention_mask, position_ids)
        labels = as_array("labels", labels)
        if labels is not None:
            check_labels(labels, inputs[0].shape, self.config.vocab_size)
            labels = shard_rows(labels, self.mesh)
        smoothing = self.config.label_smoothing if label_smoothing is None else label_smoothing
        if not 0 <= smoothing < 1:
            raise ValueError(f"label_smoothing={smoothing} must lie in [0, 1): 0 does not smooth.")
        chunk = loss_chunk_size or self.config.loss_chunk_size or CHUNK
        if chunk < 1 or loss_chunk_size == 0:
            raise ValueError(f"loss_chunk_size={loss_chunk_size} must be at least 1 token, or None for {CHUNK}.")
        warn_if_all_ignored(predicted_labels, *inputs, labels)
        return forward_programs(self._graph).loss(
            self.params if params is None else params,
            *inputs,
            labels,
            dropout_key=dropout_rng,
            chunk=chunk,
            label_smoothing=float(smoothing),
        )

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
            input_ids: ``[B, S]`` token ids, or a tokenizer's mapping with the mask; padding must be on the left.
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
        if isinstance(input_ids, Mapping):
            input_ids, attention_mask = input_ids["input_ids"], input_ids.get("attention_mask", attention_mask)
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
        weights = self.params if params is None else params
        bucket = replace(chosen, max_new_tokens=round_up_to_bucket(limit))
        programs = generation_programs(self._graph, bucket, *compiler_options(weights))
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


class FlaxMistralForSequenceClassification(FlaxMistralPreTrainedModel):
    """A decoder and a linear layer on the last real token of every sequence."""

    module_class = MistralForSequenceClassificationModule
    architecture = "MistralForSequenceClassification"

    def _inputs(self, input_ids: Any, attention_mask: Any, position_ids: Any, cache: Any = None) -> list[Any]:
        inputs = super()._inputs(input_ids, attention_mask, position_ids, cache)
        if len(inputs[0]) > 1 and attention_mask is None and self.config.pad_token_id is None:
            raise ValueError(
                f"The padding of the {len(inputs[0])} sequences is unknown: config.pad_token_id is None and there is no"
                " attention mask. Pass attention_mask, or load the model with pad_token_id=tokenizer.pad_token_id."
            )
        return inputs

    def loss(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        labels: Any = None,
        *,
        position_ids: Any = None,
        params: Params | None = None,
        dropout_rng: Array | None = None,
    ) -> Array:
        """The loss of ``config.problem_type``; differentiable with respect to `params`.

        Where that is None, one output means regression, integer labels mean single-label and others multi-label
        classification.

        Args:
            input_ids, attention_mask: ``[B, S]``, as in a call.
            labels: ``[B]`` class ids, ``-100`` where the loss ignores them; or ``[B, num_labels]`` (``[B]`` if that is
                1) targets.
            position_ids: ``[B or 1, S]``, as in a call.
            params: Weights in place of the model's own.
            dropout_rng: Random key of the dropout; without one there is none.

        Returns:
            A float32 scalar: mean squared error, cross-entropy or binary cross-entropy.

        Raises:
            ValueError: As in a call; labels are missing or do not fit; or the problem type is unknown.
        """
        inputs, labels = self._inputs(input_ids, attention_mask, position_ids), as_array("labels", labels)
        if labels is None:
            raise ValueError("loss needs labels, a class or targets for every row: pass labels=.")
        problem = self.config.problem_type_for(floating_point=jax.numpy.issubdtype(labels.dtype, jax.numpy.floating))
        check_class_labels(labels, inputs[0].shape[0], problem, self.config.num_labels)
        if problem == "single_label_classification":
            warn_if_all_ignored(lambda labels: labels, labels)
        weights = self.params if params is None else params
        labels = shard_rows(labels, self.mesh)
        return forward_programs(self._graph).loss(weights, *inputs, labels, dropout_key=dropout_rng, problem=problem)
