"""The TensorFlow Mistral models, for Keras on its TensorFlow backend: three heads and the decoder that they share.

Legend: B batch, S new tokens, T keys, H query heads, E hidden_size, V vocabulary, C classes or regression targets.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from .tf.losses import IGNORE_INDEX, check_labels, chunked_token_loss, classification_loss, token_loss
from .tf.outputs import TFMistralOutput
from .tf.pretrained import TFMistralPreTrainedModel
from .tf.sequence_layout import last_real_token, next_labels, sequence_layout
from .tf.shapes import Tensor, size
from .tf.validation import check_input_ids, unpacked

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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int = 0,
        loss_chunk_size: int | None = None,
        return_dict: bool = True,
        training: bool = False,
    ) -> Any:
        """Predict the next token at every position.

        Args:
            input_ids: ``[B, S]`` token ids; or a mapping of the tensors among these arguments, or a list of them.
            attention_mask: See `TFMistralModel`, also for the arguments that are not listed here.
            labels: ``[B, S]`` token ids, -100 where the loss ignores them; they are shifted inside. No packed sequence
                predicts a label of the next.
            logits_to_keep: Number of last positions to compute logits for; 0 means all.
            loss_chunk_size: With labels, compute the loss from the logits of that many tokens at a time, and return no
                logits (default: the configuration's).

        Returns:
            ``logits`` ``[B, S or logits_to_keep, V]`` in the compute dtype, absent if the loss was computed in chunks;
            ``loss`` (a float32 scalar, with ``config.label_smoothing``) if there are labels; and ``past_key_values``,
            ``hidden_states`` and ``attentions``.

        Raises:
            ValueError: As `TFMistralModel`; or a label lies outside the vocabulary.
        """
        inputs = unpacked(
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
        states = states[:, -logits_to_keep:] if logits_to_keep else states
        head = tf.convert_to_tensor(self.get_output_embeddings().weight)
        loss, chunk = None, loss_chunk_size or self.config.loss_chunk_size
        logits = project(states, head) if labels is None or chunk is None else None
        if labels is not None:
            check_labels(labels, self.config.vocab_size)
            targets = next_labels(labels, inputs["position_ids"], inputs["attention_mask"], IGNORE_INDEX)
            smoothing = self.config.label_smoothing
            if logits is None:
                loss = chunked_token_loss(states, tf.cast(head, states.dtype), targets, chunk, smoothing)
            else:
                loss = token_loss(logits, targets, smoothing)
        result = TFMistralOutput(loss=loss, logits=logits, **outputs)
        return result if return_dict else result.to_tuple()

    def head_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """The loss of logits for the labels at their positions, which are not shifted."""
        return token_loss(logits, labels, self.config.label_smoothing)

    def forget_programs(self) -> None:
        """Drop what was compiled for the present shapes of the weights, `generate` too."""
        super().forget_programs()
        self._generator = Generator(self)

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs: Any = None,
        seed: int | None = None,
        streamer: Any = None,
        jit_compile: bool = True,
        **options: Any,
    ) -> Tensor:
        """Continue prompts.

        Prompts are padded on the left to a power of two: those of similar lengths share a compiled program. One
        compiled loop over the rolling buffer computes the new tokens. A prompt may be longer than the window.

        Args:
            input_ids: ``[B, S]`` integers, rows padded on the left; or a mapping with them and the mask, as tokenizers
                return it.
            attention_mask: ``[B, S]``, zeros on the padding; None without padding.
            generation_config: Replaces ``self.generation_config``.
            inputs: The library's name of `input_ids`.
            seed: For sampling; by default drawn from Python's `random` at each call.
            streamer: An object with `put` and `end`, such as the library's `TextStreamer`: it receives the prompt,
                then every token as it is chosen. Not with beams.
            jit_compile: Whether to compile with XLA; False runs the same loop as a plain TensorFlow graph.
            **options: ``max_new_tokens``, ``max_length``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
                ``min_p``, ``repetition_penalty``, ``num_beams``, ``length_penalty``, ``early_stopping``,
                ``num_return_sequences``, ``prefill_chunk_size``, ``eos_token_id`` (one or several) and
                ``pad_token_id``, as in the library's `GenerationConfig`.

        Returns:
            ``[B, S + new]`` int32: the prompts and their continuations; rows that ended early are padded on the right.
            With ``num_return_sequences=N`` there are N rows for each prompt. Within a caller's graph, which needs
            prompts of known sizes and checks no values, there are always ``max_new_tokens`` new columns.

        Raises:
            ValueError: Padding is not on the left, an id lies outside the vocabulary, or an option is unknown or has an
                impossible value.
        """
        if (input_ids is None) == (inputs is None):
            raise ValueError(f"Pass input_ids, not {'nothing' if inputs is None else 'also inputs'}.")
        input_ids = inputs if input_ids is None else input_ids
        if isinstance(input_ids, Mapping):
            return self.generate(
                **input_ids,
                generation_config=generation_config,
                seed=seed,
                streamer=streamer,
                jit_compile=jit_compile,
                **options,
            )
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


class _Classifier(TFMistralPreTrainedModel):
    """A `TFMistralModel` with a linear layer over classes or regression targets.

    Args:
        config: The configuration, with ``num_labels``.
        dtype: As of `TFMistralForCausalLM`.
        initializer: As of `TFMistralForCausalLM`.
    """

    main_output = "logits"

    def __init__(self, config: MistralConfig, *, dtype: Any = None, initializer: Any = None, **kwargs: Any) -> None:
        super().__init__(config, dtype=dtype, **kwargs)
        initializer = initializer or self.default_initializer()
        self.model = TFMistralModel(config, dtype=self.dtype_policy, initializer=initializer, name="model")
        width, bias = config.hidden_size, self.has_bias(config)
        self.score = Linear(width, config.num_labels, initializer, self.dtype_policy, "score", bias)
        self.built = True

    def has_bias(self, config: MistralConfig) -> bool:
        """Whether the linear layer has a bias."""
        raise NotImplementedError

    def classified(self, states: Tensor, inputs: dict[str, Any], training: bool) -> Tensor:
        """The logits.

        Args:
            states: ``[B, S, E]`` of the decoder.
            inputs: Of the model, by name.
            training: Whether to apply dropout.
        """
        raise NotImplementedError

    def call(
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: TFRollingCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool = True,
        training: bool = False,
    ) -> Any:
        """Classify; see the class for ``labels`` and ``logits``, and `TFMistralModel` for the other arguments.

        Returns:
            ``logits`` in the compute dtype; ``loss`` (a float32 scalar) if there are labels; and ``past_key_values``,
            ``hidden_states`` and ``attentions``.

        Raises:
            ValueError: As `TFMistralModel`; the labels do not fit; or the class says more.
        """
        inputs = unpacked(
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
        logits = self.classified(outputs.pop("last_hidden_state"), inputs, training)
        loss = None if labels is None else self.head_loss(labels, logits)
        result = TFMistralOutput(loss=loss, logits=logits, **outputs)
        return result if return_dict else result.to_tuple()

    def named_weights(self) -> dict[str, Any]:
        """Variables by their Hugging Face names."""
        names = {f"model.{name}": variable for name, variable in self.model.named_weights().items()}
        names["score.weight"] = self.score.weight
        return names if self.score.bias is None else {**names, "score.bias": self.score.bias}


@keras.saving.register_keras_serializable("mistral_hf")
class TFMistralForSequenceClassification(_Classifier):
    """A `TFMistralModel` with a linear layer on the last real token of every sequence.

    The last token that the attention mask marks as real is used, on whichever side the padding is; without a mask, the
    last token that is not ``config.pad_token_id``. Several sequences with neither are refused.

    ``labels`` are ``[B]`` class ids, or ``[B, C]`` (``[B]`` if C is 1) targets (see `classification_loss`), ``logits``
    ``[B, C]``. Arguments are those of `TFMistralForCausalLM`; the configuration has ``num_labels`` and
    ``problem_type``.
    """

    architecture = "MistralForSequenceClassification"

    def has_bias(self, config: MistralConfig) -> bool:
        """It has none."""
        return False

    def classified(self, states: Tensor, inputs: dict[str, Any], training: bool) -> Tensor:
        """``[B, C]``."""
        last = self._last_real_token(inputs["input_ids"], inputs["attention_mask"], states)
        return self.score(tf.gather(states, last, axis=1, batch_dims=1))

    def head_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """See `classification_loss`."""
        return classification_loss(logits, labels, self.config)

    def _last_real_token(self, input_ids: Tensor | None, attention_mask: Tensor | None, states: Tensor) -> Tensor:
        """The index of the last real token of every row, ``[B]``."""
        batch, length, pad = size(states, 0), size(states, 1), self.config.pad_token_id
        if attention_mask is not None:
            return last_real_token(tf.cast(attention_mask[:, -length:], tf.bool))
        if input_ids is not None and pad is not None:
            return last_real_token(input_ids != pad)
        if states.shape[0] == 1:
            return tf.fill([1], length - 1)
        raise ValueError(
            f"It is unknown which tokens of the {batch} sequences are padding: config.pad_token_id is {pad} and there"
            " is no attention mask. Pass attention_mask, or set model.config.pad_token_id = tokenizer.pad_token_id."
        )


@keras.saving.register_keras_serializable("mistral_hf")
class TFMistralForTokenClassification(_Classifier):
    """A `TFMistralModel` with dropout and a linear layer, which has a bias, on every token.

    ``labels`` are ``[B, S]`` class ids, -100 where the loss ignores them, ``logits`` ``[B, S, C]``. Arguments are those
    of `TFMistralForCausalLM`. As in PyTorch, the configuration has ``num_labels``, and may have ``classifier_dropout``
    or ``hidden_dropout`` (default: 0.1) and ``token_classification_bias`` (default: True).
    """

    architecture = "MistralForTokenClassification"

    def __init__(self, config: MistralConfig, **kwargs: Any) -> None:
        super().__init__(config, **kwargs)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = keras.layers.Dropout(next((rate for rate in rates if rate is not None), 0.1))

    def has_bias(self, config: MistralConfig) -> bool:
        """It has one, unless the configuration says otherwise."""
        return getattr(config, "token_classification_bias", True)

    def classified(self, states: Tensor, inputs: dict[str, Any], training: bool) -> Tensor:
        """``[B, S, C]``."""
        return self.score(self.dropout(states, training=training))

    def head_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """See `token_loss`."""
        return token_loss(logits, labels)


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
        self.window = config.shared_window
        initializer = initializer or self.default_initializer()
        policy, width = self.dtype_policy, config.hidden_size
        self.embed_tokens = Embedding(config.vocab_size, width, initializer, policy, "embed_tokens")
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
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool = True,
        training: bool = False,
    ) -> Any:
        """Compute the hidden states of new tokens.

        Args:
            input_ids: ``[B, S]`` token ids; or a mapping of the tensors among these arguments, or a list of them in
                this order.
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
                result (default: the configuration's).
            output_attentions: Whether to return the attention weights of every layer, which takes memory of ``S * T``
                (default: the configuration's).
            return_dict: False returns the results as a tuple, without names.
            training: Whether to apply dropout to the attention weights.

        Returns:
            ``last_hidden_state`` ``[B, S, E]`` in the compute dtype, ``past_key_values``, ``hidden_states`` (a tuple of
            ``[B, S, E]``), and ``attentions`` (a tuple of ``[B, H, S, T]``).

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds` are given, an id lies outside the vocabulary,
                the mask does not cover the tokens or contradicts positions that restart, positions or cache have
                another shape, or a dictionary of inputs holds a tensor that the model does not take.
        """
        inputs = unpacked(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
        )
        states, cache = self._embed(inputs["input_ids"], inputs["inputs_embeds"]), inputs["past_key_values"]
        length, window = size(states, 1), self.window
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
        states_wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights_wanted = self.config.output_attentions if output_attentions is None else output_attentions
        collected, attentions, buffers = [], [], []
        for layer in self.decoder_layers:
            if states_wanted:
                collected.append(states)
            states, weights, stored = layer(
                states, cos, sin, context=context, weights_wanted=weights_wanted, training=training
            )
            attentions.append(weights)
            buffers.append(stored)
        states = self.norm(states)
        result = TFMistralOutput(
            last_hidden_state=states,
            past_key_values=context.updated_cache(buffers, layout.start) if use_cache else None,
            hidden_states=(*collected, states) if states_wanted else None,
            attentions=tuple(attentions) if weights_wanted else None,
        )
        return result if return_dict else result.to_tuple()

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"Pass exactly one of input_ids and inputs_embeds, not {'neither' if input_ids is None else 'both'}."
            )
        if input_ids is None:
            return tf.cast(inputs_embeds, self.compute_dtype)
        check_input_ids(input_ids, self.config.vocab_size)
        return self.embed_tokens(input_ids)

    def named_weights(self) -> dict[str, Any]:
        """Variables by their Hugging Face names, without a prefix."""
        names = {"embed_tokens.weight": self.embed_tokens.weight}
        for index, layer in enumerate(self.decoder_layers):
            names |= {f"layers.{index}.{name}": attrgetter(name)(layer) for name in _LAYER_WEIGHTS}
        return {**names, "norm.weight": self.norm.weight}
