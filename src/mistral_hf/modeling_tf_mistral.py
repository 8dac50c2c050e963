"""The TensorFlow Mistral models, for Keras on its TensorFlow backend: two heads and the decoder that they share.

Legend: B batch, S new tokens, T keys, H query heads, E hidden_size, V vocabulary, C classes or regression targets.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import keras
import tensorflow as tf
from transformers import GenerationConfig

from .configuration_mistral import MistralConfig
from .tf.attention import attention_context
from .tf.cache import TFRollingCache, default_capacity
from .tf.generation import Generator
from .tf.layers import DecoderLayer, Embedding, Linear, RMSNorm, RotaryEmbedding, project
from .tf.losses import classification_loss, language_model_loss
from .tf.pretrained import TFMistralOutput, TFMistralPreTrainedModel
from .tf.sequence_layout import sequence_layout
from .tf.shapes import Tensor, size

_LAYER_WEIGHTS = (
    "input_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)


@keras.saving.register_keras_serializable("mistral_hf")
class TFMistralForCausalLM(TFMistralPreTrainedModel):
    """The language model: a `TFMistralModel` and an output layer over the vocabulary.

    Args:
        config: The configuration.
        dtype: A Keras dtype policy or its name: ``"float32"``, ``"mixed_bfloat16"``, ``"bfloat16"``, ``"float16"``, ...
            None is Keras's global policy.
        initializer: A Keras initializer of the weights; by default `default_initializer`.

    Attributes:
        generation_config: The default options of `generate`.
    """

    architecture = "MistralForCausalLM"
    main_output = "logits"

    def __init__(self, config: MistralConfig, *, dtype: Any = None, initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype=dtype, **kwargs)
        initializer = initializer or self.default_initializer()
        self.model = TFMistralModel(config, dtype=self.dtype_policy, initializer=initializer, name="model")
        self.lm_head = None
        if not config.tie_word_embeddings:
            width = config.hidden_size
            self.lm_head = Linear(width, config.vocab_size, initializer, self.dtype_policy, "lm_head")
        self.generation_config = GenerationConfig.from_model_config(config)
        self._generator = Generator(self)
        self.built = True

    def call(
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TFRollingCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache_capacity: int | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int = 0,
        training: bool = False,
    ) -> TFMistralOutput:
        """Predict the next token at every position.

        Args:
            input_ids: ``[B, S]`` token ids, or a dictionary of the tensors among these arguments.
            attention_mask: See `TFMistralModel`, also for the arguments that are not listed here.
            labels: ``[B, S]`` token ids, -100 where the loss ignores them; they are shifted inside.
            logits_to_keep: Number of last positions to compute logits for; 0 means all.

        Returns:
            ``logits`` ``[B, S or logits_to_keep, V]`` in the compute dtype; ``loss`` (a float32 scalar, see
            `language_model_loss`) if there are labels; and ``past_key_values``, ``hidden_states`` and ``attentions``.

        Raises:
            ValueError: As `TFMistralModel`; or a label lies outside the vocabulary.
        """
        inputs = _unpacked(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
        )
        labels = inputs.pop("labels")
        outputs = self.model(
            **inputs,
            use_cache=use_cache,
            cache_capacity=cache_capacity,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            training=training,
        )
        states = outputs.pop("last_hidden_state")
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        logits = project(states[:, -logits_to_keep:] if logits_to_keep else states, head)
        loss = None if labels is None else language_model_loss(logits, labels, self.config.label_smoothing)
        return TFMistralOutput(loss=loss, logits=logits, **outputs)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | None = None,
        streamer: Any = None,
        jit_compile: bool = True,
        **options: Any,
    ) -> Tensor:
        """Continue prompts.

        Prompts are padded on the left to a power of two: those of similar lengths share a compiled program. One
        compiled loop over the rolling buffer computes the new tokens. A prompt may be longer than the window.

        Args:
            input_ids: ``[B, S]`` integers, rows padded on the left.
            attention_mask: ``[B, S]``, zeros on the padding; None without padding.
            generation_config: Replaces ``self.generation_config``.
            seed: For sampling; by default drawn from Python's `random` at each call.
            streamer: An object with `put` and `end`, such as the library's `TextStreamer`: it receives the prompt,
                then every token as it is chosen. Not with beams.
            jit_compile: Whether to compile with XLA; False runs the same loop as a plain TensorFlow graph.
            **options: ``max_new_tokens``, ``max_length``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
                ``min_p``, ``repetition_penalty``, ``num_beams``, ``length_penalty``, ``early_stopping``,
                ``eos_token_id`` (one or several) and ``pad_token_id``, as in the library's `GenerationConfig`.

        Returns:
            ``[B, S + new]`` int32: the prompts and their continuations; rows that ended early are padded on the right.

        Raises:
            ValueError: Padding is not on the left, an id lies outside the vocabulary, or an option is unknown or has an
                impossible value.
        """
        return self._generator.generate(
            input_ids,
            attention_mask,
            generation_config,
            seed=seed,
            streamer=streamer,
            jit_compile=jit_compile,
            **options,
        )

    def named_weights(self) -> dict[str, Any]:
        """Variables by their Hugging Face names; a tied output layer has no entry."""
        names = {f"model.{name}": variable for name, variable in self.model.named_weights().items()}
        return names if self.lm_head is None else {**names, "lm_head.weight": self.lm_head.weight}


@keras.saving.register_keras_serializable("mistral_hf")
class TFMistralForSequenceClassification(TFMistralPreTrainedModel):
    """A `TFMistralModel` with a linear layer on the last real token of every sequence.

    Args:
        config: The configuration, with ``num_labels`` and ``problem_type``.
        dtype: As of `TFMistralForCausalLM`.
        initializer: As of `TFMistralForCausalLM`.
    """

    architecture = "MistralForSequenceClassification"
    main_output = "logits"

    def __init__(self, config: MistralConfig, *, dtype: Any = None, initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype=dtype, **kwargs)
        initializer = initializer or self.default_initializer()
        self.model = TFMistralModel(config, dtype=self.dtype_policy, initializer=initializer, name="model")
        self.score = Linear(config.hidden_size, config.num_labels, initializer, self.dtype_policy, "score")
        self.built = True

    def call(
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TFRollingCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool = False,
    ) -> TFMistralOutput:
        """Classify whole sequences.

        The logits are those of the last token that the attention mask marks as real, on whichever side the padding is;
        without a mask, of the last token that is not ``config.pad_token_id``.

        Args:
            input_ids: ``[B, S]`` token ids, or a dictionary of the tensors among these arguments.
            attention_mask: See `TFMistralModel`, also for the arguments that are not listed here.
            labels: ``[B]`` class ids, or ``[B, C]`` (``[B]`` if C is 1) targets; see `classification_loss`.

        Returns:
            ``logits`` ``[B, C]`` in the compute dtype; ``loss`` (a float32 scalar) if there are labels; and
            ``past_key_values``, ``hidden_states`` and ``attentions``.

        Raises:
            ValueError: As `TFMistralModel`; several sequences have neither a mask nor a pad token; or the labels do
                not fit.
        """
        inputs = _unpacked(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
        )
        labels = inputs.pop("labels")
        outputs = self.model(
            **inputs,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            training=training,
        )
        states = outputs.pop("last_hidden_state")
        last = self._last_real_token(inputs["input_ids"], inputs["attention_mask"], states)
        logits = self.score(tf.gather(states, last, axis=1, batch_dims=1))
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        return TFMistralOutput(loss=loss, logits=logits, **outputs)

    def _last_real_token(self, input_ids: Tensor | None, attention_mask: Tensor | None, states: Tensor) -> Tensor:
        """The index of the last real token of every row, ``[B]``."""
        batch, length = size(states, 0), size(states, 1)
        pad = self.config.pad_token_id
        if attention_mask is not None:
            real = tf.cast(attention_mask[:, -length:], tf.bool)
        elif input_ids is not None and pad is not None:
            real = input_ids != pad
        elif states.shape[0] == 1:
            return tf.fill([1], length - 1)
        else:
            raise ValueError(
                f"It is unknown which tokens of the {batch} sequences are padding: config.pad_token_id is {pad} and"
                " there is no attention mask. Pass attention_mask, or set"
                " model.config.pad_token_id = tokenizer.pad_token_id."
            )
        return tf.argmax(tf.where(real, tf.range(1, length + 1), 0), axis=-1, output_type=tf.int32)

    def named_weights(self) -> dict[str, Any]:
        """Variables by their Hugging Face names."""
        names = {f"model.{name}": variable for name, variable in self.model.named_weights().items()}
        return {**names, "score.weight": self.score.weight}


@keras.saving.register_keras_serializable("mistral_hf")
class TFMistralModel(TFMistralPreTrainedModel):
    """The decoder: embeddings, layers and the last norm.

    Args:
        config: The configuration.
        dtype: As of `TFMistralForCausalLM`.
        initializer: As of `TFMistralForCausalLM`.
    """

    architecture = "MistralModel"
    main_output = "last_hidden_state"

    def __init__(self, config: MistralConfig, *, dtype: Any = None, initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype=dtype, **kwargs)
        initializer = initializer or self.default_initializer()
        policy, width = self.dtype_policy, config.hidden_size
        self.embed_tokens = Embedding((config.vocab_size, width), initializer, policy, "embed_tokens")
        self.decoder_layers = [
            DecoderLayer(config, index, initializer, policy) for index in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(width, config.rms_norm_eps, policy, "norm")
        self.rotary_emb = RotaryEmbedding(config)
        self.built = True

    def call(
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TFRollingCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache_capacity: int | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool = False,
    ) -> TFMistralOutput:
        """Compute the hidden states of new tokens.

        Args:
            input_ids: ``[B, S]`` token ids, or a dictionary of the tensors among these arguments.
            attention_mask: ``[B, S]``, nonzero for real tokens; columns of cached tokens may come before.
            position_ids: ``[B or 1, S]``. By default the first real token of a row has position 0. Positions that
                restart (without mask and cache) mark packed sequences, which do not see each other; outside of graphs,
                no cache is kept of them.
            past_key_values: The cached tokens. Outside of graphs the buffers grow as needed; a graph, whose shapes are
                fixed, needs a cache created with a sufficient `cache_capacity`.
            inputs_embeds: ``[B, S, E]`` in place of `input_ids`.
            use_cache: Whether to return a cache. By default a given cache is continued and a `cache_capacity` creates
                one; without either, graphs and training steps return none, and other calls follow
                ``config.use_cache``.
            cache_capacity: Number of tokens that a new cache has room for, at most the window (default: twice the
                prompt).
            output_hidden_states: Whether to return the embeddings, the output of every layer but the last, and the
                result.
            output_attentions: Whether to return the attention weights of every layer, which takes memory of ``S * T``.
            training: Whether to apply dropout to the attention weights.

        Returns:
            ``last_hidden_state`` ``[B, S, E]`` in the compute dtype, ``past_key_values``, ``hidden_states`` (a tuple of
            ``[B, S, E]``), and ``attentions`` (a tuple of ``[B, H, S, T]``).

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds` are given, an id lies outside the vocabulary,
                the mask does not cover the tokens, positions or cache have another shape, or a dictionary of inputs
                holds a tensor that the model does not take.
        """
        inputs = _unpacked(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
        )
        states, cache = self._embed(inputs["input_ids"], inputs["inputs_embeds"]), inputs["past_key_values"]
        length, window = size(states, 1), self.config.sliding_window
        layout = sequence_layout(states, inputs["attention_mask"], inputs["position_ids"], cache)
        if use_cache is None:
            eager = tf.executing_eagerly() and not training
            use_cache = (self.config.use_cache and eager) or cache_capacity is not None or cache is not None
        use_cache = use_cache and not layout.packed
        if cache is not None and tf.executing_eagerly():
            cache = cache.grown_for(length, window)
        capacity = (cache_capacity or default_capacity(length)) if use_cache else None
        context = attention_context(window, layout.segments, cache, capacity)
        cos, sin = self.rotary_emb(layout.positions)
        collected, attentions, buffers = [], [], []
        for layer in self.decoder_layers:
            if output_hidden_states:
                collected.append(states)
            states, weights, stored = layer(
                states, cos, sin, context=context, weights_wanted=output_attentions, training=training
            )
            attentions.append(weights)
            buffers.append(stored)
        states = self.norm(states)
        return TFMistralOutput(
            last_hidden_state=states,
            past_key_values=context.updated_cache(buffers, layout.start) if use_cache else None,
            hidden_states=(*collected, states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"Pass exactly one of input_ids and inputs_embeds, not {'neither' if input_ids is None else 'both'}."
            )
        if input_ids is None:
            return tf.cast(inputs_embeds, self.compute_dtype)
        if input_ids.shape.rank != 2 or not input_ids.dtype.is_integer:
            raise ValueError(
                f"input_ids is {input_ids.dtype.name} {tuple(input_ids.shape)}; it must be integers [batch, tokens]."
            )
        if tf.executing_eagerly() and tf.size(input_ids) > 0:
            low, high = int(tf.reduce_min(input_ids)), int(tf.reduce_max(input_ids))
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"input_ids span [{low}, {high}], but must lie in [0, {self.config.vocab_size}): token ids of the"
                    " model's vocabulary; use the model's own tokenizer."
                )
        return self.embed_tokens(input_ids)

    def named_weights(self) -> dict[str, Any]:
        """Variables by their Hugging Face names, without a prefix."""
        names = {"embed_tokens.weight": self.embed_tokens.weight}
        for index, layer in enumerate(self.decoder_layers):
            names |= {f"layers.{index}.{name}": attrgetter(name)(layer) for name in _LAYER_WEIGHTS}
        return {**names, "norm.weight": self.norm.weight}


def _unpacked(input_ids: Any, **named: Any) -> dict[str, Any]:
    """The tensors among the arguments of `call`, by name; lists become tensors.

    Args:
        input_ids: Token ids, or a dictionary of tensors by name, which take precedence over `named`.
        **named: The other tensors.

    Raises:
        ValueError: The dictionary holds a tensor that the model does not take.
    """
    inputs = {"input_ids": input_ids, **named}
    if isinstance(input_ids, dict):
        if unknown := sorted(input_ids.keys() - inputs.keys()):
            raise ValueError(
                f"The inputs hold a tensor {unknown[0]!r}, but the model takes {', '.join(inputs)}: leave it out."
            )
        inputs = {**inputs, "input_ids": None, **input_ids}
    return {name: tf.constant(value) if isinstance(value, list) else value for name, value in inputs.items()}
