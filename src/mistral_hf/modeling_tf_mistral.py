"""The TensorFlow Mistral models, for Keras on its TensorFlow backend: heads, and the decoder that they share.

Legend: B batch, S new tokens, T keys, H query heads, E hidden_size, V vocabulary, C classes or regression targets.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from transformers import GenerationConfig

from .configuration_mistral import MistralConfig
from .tf.attention import AttentionPlan
from .tf.cache import PADDING, TFRollingCache, default_capacity
from .tf.generation import Generator
from .tf.layers import DecoderLayer, Embedding, Linear, RMSNorm, RotaryEmbedding, Tensor, project
from .tf.losses import classification_loss, language_model_loss
from .tf.pretrained import TFMistralOutput, TFMistralPreTrainedModel
from .tf.shapes import size

_LAYER_WEIGHTS = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)

_INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels")


@keras.saving.register_keras_serializable("mistral_hf")
class TFMistralForCausalLM(TFMistralPreTrainedModel):
    """The language model: a `TFMistralModel` and an output layer over the vocabulary.

    Args:
        config: The configuration.
        dtype: A Keras dtype policy or its name: ``"float32"``, ``"mixed_bfloat16"``, ``"bfloat16"``, ``"float16"``, ...
            None is Keras's global policy.
        initializer: Of the weights (default: a normal distribution of ``config.initializer_range``).

    Attributes:
        generation_config: Defaults of `generate`.
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
            attention_mask: See `TFMistralModel`; so are the other arguments that are not named here.
            labels: ``[B, S]`` token ids, -100 where the loss ignores them; they are shifted inside.
            logits_to_keep: Compute logits for that many last positions only; 0 means all.

        Returns:
            ``logits`` ``[B, S or kept, V]`` in the compute dtype, ``loss`` (a float32 scalar) if there are labels,
            ``past_key_values``, ``hidden_states`` and ``attentions``.

        Raises:
            ValueError: As `TFMistralModel`; or a label lies outside the vocabulary.
        """
        inputs = _inputs(locals())
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

        The prompt is padded on the left to a power of two, so that prompts of similar lengths share a compiled program;
        the tokens come from one compiled loop over the rolling buffer. A prompt may be longer than the window.

        Args:
            input_ids: ``[B, S]`` integers, rows padded on the left.
            attention_mask: ``[B, S]``, zeros on the padding; None where there is none.
            generation_config: In place of ``self.generation_config``.
            seed: Of sampling; by default a new one every time, drawn from Python's `random`.
            streamer: An object with `put` and `end`, as the library's `TextStreamer`: it is given the prompt, then
                every token as it comes. Not with beams.
            jit_compile: Compile with XLA; False runs the same loop as a plain TensorFlow graph.
            **options: ``max_new_tokens``, ``max_length``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
                ``min_p``, ``repetition_penalty``, ``num_beams``, ``length_penalty``, ``early_stopping``,
                ``eos_token_id`` (one or several) and ``pad_token_id``, as in the library's `GenerationConfig`.

        Returns:
            ``[B, S + new]`` int32: the prompt and its continuation; a row that has ended is filled up with padding.

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
        """Variables by their Hugging Face names; a tied output layer is none of its own."""
        names = {f"model.{name}": variable for name, variable in self.model.named_weights().items()}
        return names if self.lm_head is None else {**names, "lm_head.weight": self.lm_head.weight}


@keras.saving.register_keras_serializable("mistral_hf")
class TFMistralForSequenceClassification(TFMistralPreTrainedModel):
    """A `TFMistralModel` with a linear layer on the last real token of every sequence.

    Args:
        config: The configuration; ``num_labels`` and ``problem_type`` count.
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

        The last token that the attention mask marks as real counts, on whichever side the padding is; without a mask,
        the last token that is not ``config.pad_token_id``.

        Args:
            input_ids: ``[B, S]`` token ids, or a dictionary of the tensors among these arguments.
            attention_mask: See `TFMistralModel`; so are the other arguments that are not named here.
            labels: ``[B]`` class ids, or ``[B, C]`` (``[B]`` if C is 1) targets; see `tf_losses.classification_loss`.

        Returns:
            ``logits`` ``[B, C]`` in the compute dtype, ``loss`` (a float32 scalar) if there are labels,
            ``past_key_values``, ``hidden_states`` and ``attentions``.

        Raises:
            ValueError: As `TFMistralModel`; a batch has neither a mask nor a pad token; or the labels do not fit.
        """
        inputs = _inputs(locals())
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
        """Place of the last real token of every row, ``[B]``."""
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
                f"Which of the {batch} sequences' tokens are padding is unknown: config.pad_token_id is {pad} and there"
                " is no attention mask. Pass attention_mask, or set model.config.pad_token_id = tokenizer.pad_token_id."
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
                restart (without mask and cache) mark packed sequences, which do not see each other.
            past_key_values: The cached tokens. Outside of graphs the buffers grow as needed; a graph, whose shapes are
                fixed, needs a cache that was made with a sufficient `cache_capacity`.
            inputs_embeds: ``[B, S, E]`` in place of `input_ids`.
            use_cache: Return a cache. By default a graph or a training step does not make one, but goes on with one
                that it is given; otherwise ``config.use_cache`` says.
            cache_capacity: Tokens that a new cache is to have room for (default: twice the prompt); it never holds more
                than the window.
            output_hidden_states: Return the embeddings, the output of every layer but the last, and the result.
            output_attentions: Return the attention weights of every layer; needs memory of ``S * T``.
            training: Whether attention weights are dropped.

        Returns:
            ``last_hidden_state`` ``[B, S, E]`` in the compute dtype, ``past_key_values``, ``hidden_states`` (a tuple of
            ``[B, S, E]``), and ``attentions`` (a tuple of ``[B, H, S, T]``).

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`; an id outside the vocabulary; a mask that
                does not cover the tokens; positions or a cache of another shape.
        """
        inputs = _inputs(locals())
        states, cache = self._embed(inputs["input_ids"], inputs["inputs_embeds"]), inputs["past_key_values"]
        _check_shapes(states, inputs["position_ids"], cache)
        length, window = size(states, 1), self.config.sliding_window
        if use_cache is None:
            eager = tf.executing_eagerly() and not training
            use_cache = (self.config.use_cache and eager) or cache_capacity is not None or cache is not None
        if cache is not None and tf.executing_eagerly():
            cache = cache.grown_for(length, window)
        real = _real_tokens(inputs["attention_mask"], states)
        start = _start(real, states, cache)
        positions = inputs["position_ids"]
        segments = _segments(real, positions, states, cache)
        capacity = (cache_capacity or default_capacity(length)) if use_cache else None
        plan = AttentionPlan(window, segments, cache, capacity)
        cos, sin = self.rotary_emb(_positions(start, length, cache) if positions is None else positions)
        collected, attentions, buffers = [states], [], []
        for layer in self.decoder_layers:
            states, weights, stored = layer(
                states, cos, sin, plan=plan, weights_wanted=output_attentions, training=training
            )
            collected.append(states)
            attentions.append(weights)
            buffers.append(stored)
        collected[-1] = states = self.norm(states)
        return TFMistralOutput(
            last_hidden_state=states,
            past_key_values=plan.finished(buffers, start) if use_cache else None,
            hidden_states=tuple(collected) if output_hidden_states else None,
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
            for name in _LAYER_WEIGHTS:
                part = layer
                for attribute in name.split("."):
                    part = getattr(part, attribute)
                names[f"layers.{index}.{name}.weight"] = part.weight
        return {**names, "norm.weight": self.norm.weight}


def _inputs(arguments: dict[str, Any]) -> dict[str, Any]:
    """The tensors among the arguments of `call`, those of a dictionary in the first place of them in their own."""
    given = {name: arguments[name] for name in _INPUTS if name in arguments}
    if isinstance(given["input_ids"], dict):
        packed = given["input_ids"]
        if unknown := sorted(packed.keys() - given.keys()):
            raise ValueError(f"The inputs have a tensor {unknown[0]!r}, but the model takes {', '.join(given)}.")
        given = {**given, "input_ids": None, **packed}
    return {name: tf.constant(value) if isinstance(value, list) else value for name, value in given.items()}


def _check_shapes(states: Tensor, positions: Tensor | None, cache: TFRollingCache | None) -> None:
    """Raise where known shapes of ``[B, S, E]`` states, ``[B or 1, S]`` positions and a cache do not fit together."""
    batch, length = states.shape[:2]
    if positions is not None and not any(positions.shape.is_compatible_with([rows, length]) for rows in (1, batch)):
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)}, but there are {length} new tokens in {batch} rows: it"
            " must be [batch or 1, tokens]."
        )
    if cache is not None and not cache.start.shape.is_compatible_with([batch]):
        raise ValueError(
            f"past_key_values holds {cache.start.shape[0]} rows, but the new tokens have {batch}: go on with the same"
            " batch, or choose rows with past_key_values.gather_rows."
        )


def _real_tokens(attention_mask: Tensor | None, states: Tensor) -> Tensor | None:
    """``[B, S]`` boolean of the new tokens, or None without a mask."""
    if attention_mask is None:
        return None
    (batch, length), covered = states.shape[:2], attention_mask.shape
    if not covered.is_compatible_with([batch, None]) or (None not in (length, covered[1]) and covered[1] < length):
        raise ValueError(
            f"attention_mask has shape {tuple(covered)}, but there are {length} new tokens in {batch} rows:"
            " it must be [batch, tokens], with a column for each of them, and may have those of cached tokens before."
        )
    return tf.cast(attention_mask[:, -size(states, 1) :], tf.bool)


def _start(real: Tensor | None, states: Tensor, cache: TFRollingCache | None) -> Tensor:
    """The column of a row's first real token, ``[B]``; as long as there is none, the next column."""
    if real is None:
        new = tf.zeros([size(states, 0)], tf.int32)
    else:
        first = tf.argmax(tf.cast(real, tf.int32), axis=1, output_type=tf.int32)
        new = tf.where(tf.reduce_any(real, axis=1), first, size(states, 1))
    if cache is None:
        return new
    return tf.where(cache.start < cache.seen, cache.start, cache.seen + new)


def _positions(start: Tensor, length: Any, cache: TFRollingCache | None) -> Tensor:
    """Positions ``[B, S]`` of the new tokens: a row's first real token has position 0."""
    first = 0 if cache is None else cache.seen
    return tf.maximum(first + tf.range(length) - start[:, None], 0)


def _segments(real: Tensor | None, positions: Tensor | None, states: Tensor, cache: TFRollingCache | None) -> Tensor:
    """``[B, S]`` int32: the number of the packed sequence that a token is in, or that of padding."""
    shape = [size(states, 0), size(states, 1)]
    if real is not None:
        return tf.where(real, 0, PADDING)
    if positions is None or cache is not None:
        return tf.zeros(shape, tf.int32)
    restarts = tf.cast(positions[:, 1:] - positions[:, :-1] != 1, tf.int32)
    return tf.broadcast_to(tf.pad(tf.cumsum(restarts, axis=1), [[0, 0], [1, 0]]), shape)
