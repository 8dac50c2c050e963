"""The PyTorch Mistral model, top-down: heads, model, layer, attention, MLP, norm, rotary embedding.

One long file, since this is where readers of Transformers look for a whole model with its heads. Attention, masks,
caches, losses, the layout of sequences and fast linear layers each have a file in `mistral_hf.torch`.

Legend: B batch, S new tokens, T keys, H query heads, K key/value heads, D head_dim, E hidden_size, V vocabulary.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .compatibility import check_decoder_weights, check_quantization, layers_left_out
from .configuration_mistral import MistralConfig
from .torch.attention import ALL_ATTENTION_FUNCTIONS, eager_attention_forward, make_mask, takes_mask
from .torch.cache import CACHE_NAME, RollingCache, cached_states, takes_cache
from .torch.flash_attention import IMPLEMENTATION_CHECKS
from .torch.generation import MistralGenerationMixin
from .torch.linear import gated, in_pieces, linear, project
from .torch.losses import (
    chunked_language_model_loss,
    labels_within_sequences,
    language_model_loss,
    question_answering_loss,
    sequence_classification_loss,
    token_classification_loss,
    warn_without_labels,
)
from .torch.norm import rms_norm
from .torch.rotary import apply_rotary, rotary_factors, scale_of_queries
from .torch.sequence_layout import SequenceLayout
from .torch.validation import check_input_ids, check_labels, warn_if_too_long

if TYPE_CHECKING:
    from typing_extensions import Self

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class MistralPreTrainedModel(PreTrainedModel):
    """Base of all Mistral models: configuration class, loading, parallel plans and the attention interface."""

    config: MistralConfig
    config_class = MistralConfig
    decoder_class: type[PreTrainedModel]  # below the heads
    layer_class: "type[nn.Module]"
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MistralDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: MistralConfig, *args: Any, **kwargs: Any) -> None:
        expected = self.config_class.__name__
        if not isinstance(config, self.config_class):
            raise ValueError(
                f"The configuration is a {type(config).__module__}.{type(config).__qualname__}, but must be a"
                f" mistral_hf.{expected}: use {expected}.from_dict(config.to_dict()), or the Auto classes."
            )
        config.validate_architecture()  # overrides given to from_pretrained arrive after the configuration was made
        super().__init__(config, *args, **kwargs)

    @overload
    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: Literal[False] = False, **kwargs: Any) -> "Self": ...

    @overload
    @classmethod
    def from_pretrained(
        cls, *args: Any, output_loading_info: Literal[True], **kwargs: Any
    ) -> "tuple[Self, dict[str, Any]]": ...

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a checkpoint as the library does, and refuse one that does not hold this model.

        Raises:
            CheckpointError: Weights of the decoder are missing, or there are weights that no Mistral model has, unless
                the caller asks for fewer layers, or with ``output_loading_info=True`` for the lists of both.
            ValueError: The checkpoint is to be quantized again in another way.
        """
        requested = kwargs.get("quantization_config")
        check_quantization(kwargs.get("config"), requested)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_quantization(model.config, requested)
        if output_loading_info:  # the caller looks at the missing and unexpected weights
            return model, info
        if getattr(model, "hf_quantizer", None) is None:
            source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
            left_out = layers_left_out(info["unexpected_keys"], model.config.num_hidden_layers)
            if left_out and _stored_layers(source, kwargs) == model.config.num_hidden_layers:
                left_out = set()  # the configuration was not changed: it contradicts the weights
            check_decoder_weights(source, info["missing_keys"], info["unexpected_keys"] - left_out)
        return model

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Shard a model before its weights are read, as the library does, if every rank gets whole heads.

        Raises:
            ValueError: The tensor-parallel size does not divide the key/value heads.
        """
        ranks, kv_heads = getattr(distributed_config, "tp_size", None) or 1, model.config.head_shape[1]
        if kv_heads % ranks and distributed_config.tp_plan != {}:
            divisors = ", ".join(str(size) for size in range(1, kv_heads + 1) if kv_heads % size == 0)
            raise ValueError(
                f"A tensor-parallel size of {ranks} does not divide num_key_value_heads={kv_heads}: a rank would get a"
                f" part of a head. Use a number of processes that divides them ({divisors}), or set tp_size to one of"
                " these and use the other ranks for data parallelism (fsdp_size)."
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, **kwargs: Any
    ) -> str:
        if attn_implementation in IMPLEMENTATION_CHECKS:  # the library would look for its own kernels
            return self.get_correct_attn_implementation(attn_implementation, is_init_check)
        return super()._check_and_adjust_attn_implementation(attn_implementation, is_init_check, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention not in IMPLEMENTATION_CHECKS:
            return super().get_correct_attn_implementation(requested_attention, is_init_check)
        dtype = self.config.dtype if is_init_check else self.dtype  # there are no weights yet
        IMPLEMENTATION_CHECKS[requested_attention](dtype, self.config.head_shape[2])
        return requested_attention


def _stored_layers(source: Any, options: dict[str, Any]) -> int | None:
    """Number of layers in the configuration of a checkpoint, None if it has no file."""
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    stored: dict[str, Any] = {} if source is None else MistralConfig.get_config_dict(source, **hub)[0]
    return stored.get("num_hidden_layers")


class MistralForCausalLM(MistralPreTrainedModel, MistralGenerationMixin):
    """The language model: a `MistralModel` and an output layer over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = language_model_loss
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache: See `MistralModel`.
            labels: ``[B, S]`` token ids, -100 where the loss ignores them; they are shifted inside. No packed sequence
                predicts a label of the next.
            logits_to_keep: Compute logits for that many last positions only, or for the positions of a 1-d tensor;
                0 means all.
            loss_chunk_size: With labels, compute the loss from the logits of that many tokens at a time, and return no
                logits (default: the configuration's).
            **kwargs: To `MistralModel` and to the loss function (``num_items_in_batch``, ``shift_labels``,
                ``label_smoothing``, which is the configuration's by default).

        Returns:
            ``logits`` ``[B, S or kept, V]`` in the model's dtype, None if the loss was computed in chunks; ``loss`` if
            there are labels; ``cache``.

        Raises:
            ValueError: As `MistralModel`; a label lies outside the vocabulary; or a custom loss function is to be
                computed in chunks.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        loss = logits = None
        if labels is not None:
            kwargs |= labels_within_sequences(labels, position_ids, attention_mask, **kwargs)
            loss, logits = self._loss(hidden_states, labels, loss_chunk_size, **kwargs)
        else:
            logits = linear(self.lm_head, hidden_states)
            if self.training:
                warn_without_labels(self.config.loss_chunk_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(
        self, hidden_states: Tensor, labels: Tensor, chunk_size: int | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and the logits unless it was computed in chunks."""
        check_labels(labels, self.config.vocab_size)
        chunk_size = self.config.loss_chunk_size if chunk_size is None else chunk_size
        if self.config.label_smoothing:
            kwargs.setdefault("label_smoothing", self.config.label_smoothing)
        if chunk_size is None:
            logits = linear(self.lm_head, hidden_states)
            return self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs), logits
        if self.loss_function is not language_model_loss:
            raise ValueError(
                f"loss_chunk_size={chunk_size} computes the usual cross-entropy, but the model's loss_function is"
                f" {self.loss_function!r}, which needs all logits: set loss_chunk_size to None."
            )
        return chunked_language_model_loss(hidden_states, self.lm_head, labels, chunk_size, **kwargs), None


class MistralForSequenceClassification(MistralPreTrainedModel):
    """A `MistralModel` with a linear layer on the last real token of every sequence."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.decoder_class(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.loss_function = sequence_classification_loss
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classify whole sequences.

        The last token that the attention mask marks as real is used, on whichever side the padding is; without a mask,
        the last token that is not ``config.pad_token_id``.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache: See `MistralModel`.
            labels: See `losses.sequence_classification_loss`.
            **kwargs: To `MistralModel` and to the loss function (``num_items_in_batch``).

        Returns:
            ``logits`` ``[B, num_labels]``, ``loss`` if there are labels, ``cache``.

        Raises:
            ValueError: As `MistralModel`; a batch has neither a mask nor a pad token; or the labels do not fit.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        last = self._last_real_token(input_ids, attention_mask, hidden_states)
        rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        logits = self.score(hidden_states[rows, last.to(hidden_states.device)])
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_real_token(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden_states: Tensor
    ) -> Tensor:
        """Index of the last real token of every row, ``[B]``."""
        batch, length = hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -length:].bool()
        elif batch == 1 and (input_ids is None or self.config.pad_token_id is None):
            return torch.full((1,), length - 1)
        elif input_ids is None or self.config.pad_token_id is None:
            raise ValueError(
                f"The padding of the {batch} sequences is unknown: config.pad_token_id is {self.config.pad_token_id}"
                " and there is no attention mask. Pass attention_mask, or set model.config.pad_token_id ="
                " tokenizer.pad_token_id."
            )
        else:
            real = input_ids != self.config.pad_token_id
        return (real * torch.arange(1, length + 1, device=real.device)).argmax(dim=-1)


class MistralForTokenClassification(MistralPreTrainedModel):
    """A `MistralModel` with a linear layer on every token."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.decoder_class(config)
        self.dropout = nn.Dropout(_first_set(config, "classifier_dropout", "hidden_dropout", default=0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=bias)
        self.loss_function = token_classification_loss
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Classify every token.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache: See `MistralModel`.
            labels: ``[B, S]`` class ids, -100 where the loss ignores them.
            **kwargs: To `MistralModel` and to the loss function (``num_items_in_batch``).

        Returns:
            ``logits`` ``[B, S, num_labels]``, and ``loss`` if there are labels.

        Raises:
            ValueError: As `MistralModel`; or a label lies outside the classes.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.score(self.dropout(outputs.last_hidden_state))
        loss = None
        if labels is not None:
            check_labels(labels, self.num_labels)
            loss = self.loss_function(logits, labels, self.config, **kwargs)
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


class MistralForQuestionAnswering(MistralPreTrainedModel):
    """A `MistralModel` that scores every token as the start and the end of an answer."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.decoder_class(config))
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.loss_function = question_answering_loss
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Find the answer's span.

        Args:
            input_ids, attention_mask, position_ids, cache, inputs_embeds: See `MistralModel`.
            start_positions, end_positions: ``[B]`` positions of the first and last token of the answer; one outside the
                input is ignored.
            **kwargs: To `MistralModel` and to the loss function (``num_items_in_batch``).

        Returns:
            ``start_logits`` and ``end_logits`` ``[B, S]``, and ``loss`` if both positions are given.

        Raises:
            ValueError: As `MistralModel`.
        """
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits.contiguous(),
            end_logits=end_logits.contiguous(),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _first_set(config: MistralConfig, *names: str, default: float) -> float:
    """The first of the named optional fields that has a value."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), default)


class MistralDecoderLayer(GradientCheckpointingLayer):
    """Attention, then the feed-forward layer, each normalised before and added to the residual stream."""

    def __init__(self, config: MistralConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = MistralAttention(config, layer_idx)
        self.mlp = MistralMLP(config)
        self.input_layernorm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map ``[B, S, E]`` to ``[B, S, E]``; keywords go to `MistralAttention`."""
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=normed, **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class MistralAttention(nn.Module):
    """Grouped-query attention with rotary embeddings, within the sliding window."""

    def __init__(self, config: MistralConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        heads, kv_heads, self.head_dim = config.head_shape
        self.num_key_value_groups = heads // kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)

    @takes_cache
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        cache: Cache | None = None,
        position_ids: Tensor | None = None,
        query_scale: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: ``[B, S, E]``.
            position_embeddings: cos and sin as `MistralRotaryEmbedding` gives them.
            attention_mask: As `attention.make_mask` returns it for the attention implementation.
            cache: The cache, which gets the new keys and values.
            position_ids: ``[B or 1, S]``, from which `query_scale` is computed if it is not given.
            query_scale: What queries are multiplied with, ``[B or 1, 1, S, 1]``, if the configuration scales them.

        Returns:
            ``[B, S, E]``, and the attention weights ``[B, H, S, T]`` of an implementation that has them.
        """
        batch, length = hidden_states.shape[:2]
        by_head = (batch, length, -1, self.head_dim)
        projected = project(hidden_states, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (states.view(by_head).transpose(1, 2) for states in projected)  # [B, H or K, S, D]
        if query_scale is None:
            query_scale = scale_of_queries(position_ids, self.config.query_scaling, q.dtype)
        q, k = apply_rotary(q, k, *position_embeddings, query_scale)
        k, v = cached_states(cache, k, v, self.layer_idx, kwargs)  # [B, K, T, D]
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.window_of(self.layer_idx),
            position_ids=position_ids,
            **kwargs,
        )
        return linear(self.o_proj, output.reshape(batch, length, -1)), weights


class MistralMLP(nn.Module):
    """The gated feed-forward layer: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[B, S, E]`` to ``[B, S, E]``."""
        layers = (self.gate_proj, self.up_proj, self.down_proj)
        return in_pieces(self._transform, hidden_states, *layers, activation=self.act_fn)

    def _transform(self, hidden_states: Tensor) -> Tensor:
        gate, up = project(hidden_states, self.gate_proj, self.up_proj)
        return linear(self.down_proj, gated(self.act_fn, gate, up))


@use_kernel_forward_from_hub("RMSNorm")
class MistralRMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019), computed in at least float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[..., E]`` to ``[..., E]``."""
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class MistralRotaryEmbedding(nn.Module):
    """Rotary position embeddings (Su et al., 2021) of every type that the library has.

    Attributes and methods are named as the library's initialisation of non-persistent buffers expects them.
    """

    inv_freq: Tensor
    attention_scaling: float

    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type: str = cast(dict[str, Any], config.rope_parameters)["rope_type"]
        default = self.rope_type == "default"
        initialize = self.compute_default_rope_parameters if default else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = initialize(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MistralConfig, *args: Any, **kwargs: Any) -> tuple[Tensor, float]:
        """Inverse frequencies ``theta ** (-2i / D)``, ``[D/2]`` in float32, and a factor of 1 for cos and sin."""
        head_dim = config.head_shape[2]
        theta: float = cast(dict[str, Any], config.rope_parameters)["rope_theta"]
        return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the rotation in `apply_rotary`.

        Args:
            x: For its dtype and device.
            position_ids: ``[B or 1, S]``.

        Returns:
            cos and sin, each ``[B or 1, S, D]`` in the dtype of `x`.
        """
        angles = position_ids[..., None] * self.inv_freq.to(device=x.device, dtype=torch.float32)
        return rotary_factors(angles, self.attention_scaling, x.dtype)


class MistralModel(MistralPreTrainedModel):
    """The decoder: embeddings, layers and the last norm."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(self.layer_class(config, index) for index in range(config.num_hidden_layers))
        self.norm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MistralRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        packed: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of new tokens.

        Args:
            input_ids: ``[B, S]`` token ids.
            attention_mask: ``[B, total]``, nonzero for real tokens, `total` being the cached tokens and the new ones;
                or a custom mask ``[B or 1, H or 1, S, T]``, boolean or additive.
            position_ids: ``[B or 1, S]``. By default the first real token of a row has position 0. Positions that
                restart (without mask and cache) mark packed sequences, which do not see each other and have no cache;
                so do the keywords ``cu_seq_lens_q`` and ``seq_idx`` (see `SequenceLayout.of`).
            cache: The cached tokens; new ones are added to it in place.
            inputs_embeds: ``[B, S, E]`` in place of `input_ids`.
            use_cache: Return a cache, a new one if `cache` is None (default: ``config.use_cache``).
            packed: False if no row holds several sequences, whatever its positions.
            **kwargs: ``output_hidden_states``, ``output_attentions``, and options of attention implementations.

        Returns:
            ``last_hidden_state`` ``[B, S, E]``, ``cache``, and the optional outputs that were requested.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`; an id outside the vocabulary; a mask that
                does not cover the tokens, or contradicts positions that restart; or packed sequences with a cache.
        """
        inputs_embeds = self._embed(input_ids, inputs_embeds)
        layout = SequenceLayout.of(
            inputs_embeds,
            attention_mask,
            position_ids,
            cache,
            packed=packed if takes_mask(self.config._attn_implementation) else False,
            **kwargs,
        )
        masks = self.make_masks(inputs_embeds, layout, cache, kwargs.get("output_attentions"))
        if use_cache and cache is None and not layout.is_packed:
            cache = RollingCache(self.config)
        layout.remember_padding(cache)
        warn_if_too_long(layout.keys, inputs_embeds.shape[1], self.config.max_position_embeddings)
        position_embeddings = self.rotary_emb(inputs_embeds, layout.positions)
        query_scale = scale_of_queries(layout.positions, self.config.query_scaling, inputs_embeds.dtype)
        hidden_states = inputs_embeds
        for layer, window in zip(self.layers, self.config.layer_windows, strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[window],
                position_ids=layout.positions,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                query_scale=query_scale,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache if use_cache else None}
        )

    def make_masks(
        self, inputs_embeds: Tensor, layout: SequenceLayout, cache: Cache | None, output_attentions: bool | None = None
    ) -> dict[int | None, Any]:
        """By window, the mask that all layers of the window share; see `attention.make_mask`."""
        weights_wanted = self.config.output_attentions if output_attentions is None else output_attentions
        implementation, windows = self.config._attn_implementation, self.config.layer_windows
        return {
            window: make_mask(
                implementation,
                inputs_embeds,
                layout.for_layer(windows.index(window), window, cache),
                window,
                weights_wanted,
                config=self.config,
            )
            for window in dict.fromkeys(windows)
        }

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """``[B, S, E]``, from one of the two."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"Pass exactly one of input_ids and inputs_embeds, not {'neither' if input_ids is None else 'both'}."
            )
        if input_ids is None:
            return cast(Tensor, inputs_embeds)
        check_input_ids(input_ids, self.embed_tokens, self.config.vocab_size)
        return self.embed_tokens(input_ids)


# Named after the classes, which this file defines from the top down.
MistralPreTrainedModel._can_record_outputs = {"hidden_states": MistralDecoderLayer, "attentions": MistralAttention}
MistralPreTrainedModel.decoder_class, MistralPreTrainedModel.layer_class = MistralModel, MistralDecoderLayer
