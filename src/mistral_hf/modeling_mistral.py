"""The PyTorch Mistral model, top-down: heads, model, layer, attention, MLP, norm, rotary embedding.

One long file, since this is where readers of Transformers look for all of a model and its heads; what is not the model
itself is elsewhere: attention, masks, caches, losses, positions and products each have a file.

Legend: B batch, S new tokens, T keys, H query heads, K key/value heads, D head_dim, E hidden_size, V vocabulary.
"""

import warnings
from collections.abc import Callable
from functools import cache
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
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
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .compatibility import check_decoder_weights, check_quantization
from .configuration_mistral import MistralConfig
from .torch.attention import ALL_ATTENTION_FUNCTIONS, eager_attention_forward, make_mask
from .torch.cache import RollingCache
from .torch.flash_attention import REQUIREMENTS
from .torch.linear import fuse, fused_linear, is_plain, linear, require_fusible, unfuse
from .torch.losses import (
    check_labels,
    chunked_language_model_loss,
    language_model_loss,
    next_labels,
    question_answering_loss,
    sequence_classification_loss,
    token_classification_loss,
    within_sequences,
)
from .torch.sequence_layout import (
    flattened_segments,
    key_layout,
    packed_segments,
    positions,
    real_tokens,
    require_positions,
)
from .torch.validation import check_range

logger = logging.get_logger(__name__)
MLP_TOKENS = 2048  # of a long prompt, on a CPU, which the feed-forward layer takes at a time


class MistralPreTrainedModel(PreTrainedModel):
    """What all Mistral models share: configuration class, loading, parallel plans and the attention interface."""

    config: MistralConfig
    config_class = MistralConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MistralDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: MistralConfig, *args: Any, **kwargs: Any) -> None:
        config.validate_architecture()  # overrides given to from_pretrained arrive after the configuration was made
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a checkpoint as the library does, and refuse one that does not hold this model.

        Raises:
            ValueError: Weights of the decoder are missing; the checkpoint has weights that no Mistral model has; or it
                is to be quantized again in another way.
        """
        wanted = kwargs.get("quantization_config")
        check_quantization(kwargs.get("config"), wanted)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        check_quantization(model.config, wanted)
        if "num_hidden_layers" not in kwargs and getattr(model, "hf_quantizer", None) is None:
            source = args[0] if args else "the state dict"
            check_decoder_weights(source, info["missing_keys"], info["unexpected_keys"])
        return (model, info) if output_loading_info else model

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Shard a model before its weights are read, as the library does, if every rank gets whole heads.

        Raises:
            ValueError: The tensor-parallel size does not divide the key/value heads.
        """
        ranks, kv_heads = getattr(distributed_config, "tp_size", None) or 1, model.config.head_shape[1]
        if kv_heads % ranks and distributed_config.tp_plan != {}:
            fitting = ", ".join(str(size) for size in range(1, kv_heads + 1) if kv_heads % size == 0)
            raise ValueError(
                f"A tensor-parallel size of {ranks} does not divide num_key_value_heads={kv_heads}: a rank would get a"
                f" part of a head. Start as many processes as divide them ({fitting}), or set tp_size to one of"
                " these and leave the other ranks to data parallelism (fsdp_size)."
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, is_init_check: bool = False, **kwargs: Any
    ) -> str:
        if attn_implementation in REQUIREMENTS:  # the library would look for kernels of its own
            return self.get_correct_attn_implementation(attn_implementation, is_init_check)
        return super()._check_and_adjust_attn_implementation(attn_implementation, is_init_check, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention not in REQUIREMENTS:
            return super().get_correct_attn_implementation(requested_attention, is_init_check)
        dtype = self.config.dtype if is_init_check else self.dtype  # there are no weights yet to ask
        REQUIREMENTS[requested_attention](dtype, self.config.head_shape[2])
        return requested_attention

    def fuse_projections(self) -> None:
        """Let eager decoding steps read the query, key and value weights as one, and the gate and up weights.

        For inference, once the model is where it stays (moving or casting it undoes this). Parameters, their names and
        what is saved stay as they are; training and compiled steps use them one by one.

        Raises:
            ValueError: A projection is quantized, adapted, sharded or offloaded; nothing is changed then.
        """
        for layers in self._fusible():
            require_fusible(layers)
        for layers in self._fusible():
            fuse(layers)

    def unfuse_projections(self) -> None:
        """Undo `fuse_projections`."""
        for layers in self._fusible():
            unfuse(layers)

    def _fusible(self) -> list[tuple[nn.Module, ...]]:
        kinds = (MistralAttention, MistralMLP)
        return [module.fusible() for module in self.modules() if isinstance(module, kinds)]


class MistralForCausalLM(MistralPreTrainedModel, GenerationMixin):
    """The language model: a `MistralModel` and an output layer over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.model = MistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = language_model_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        loss_chunk_size: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at every position.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: See `MistralModel`.
            labels: ``[B, S]`` token ids, -100 where the loss ignores them; they are shifted inside. Of packed
                sequences, none predicts a label of the next.
            logits_to_keep: Compute logits for that many last positions only, or for the positions of a 1-d tensor;
                0 means all.
            loss_chunk_size: With labels, compute the loss from the logits of so many tokens at a time, and return no
                logits (default: the configuration's).
            **kwargs: To `MistralModel` and to the loss function (``num_items_in_batch``, ``shift_labels``,
                ``label_smoothing``, which is the configuration's by default).

        Returns:
            ``logits`` ``[B, S or kept, V]`` in the model's dtype, None if the loss was computed in chunks; ``loss`` if
            there are labels; ``past_key_values``.

        Raises:
            ValueError: As `MistralModel`; a label lies outside the vocabulary; or a loss function of one's own is to
                be computed in chunks.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, kept]
        loss = logits = None
        if labels is None:
            self._speak_of_missing_labels()
            logits = linear(self.lm_head, hidden_states)
        else:
            check_labels(labels, self.config.vocab_size)
            if position_ids is not None and attention_mask is None and position_ids.shape[-1] == labels.shape[-1]:
                following = kwargs.get("shift_labels")
                following = next_labels(labels) if following is None else following
                kwargs["shift_labels"] = within_sequences(following, position_ids)
            loss, logits = self._loss(hidden_states, labels, loss_chunk_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _speak_of_missing_labels(self) -> None:
        if self.training and self.config.loss_chunk_size is not None and torch.is_grad_enabled():
            warnings.warn(
                f"loss_chunk_size={self.config.loss_chunk_size} saves nothing here: without labels, all logits are"
                " computed. Trainer keeps the labels to itself with label_smoothing_factor (set the configuration's"
                " label_smoothing in its place) and compute_loss_func.",
                stacklevel=2,
            )

    def _loss(
        self, hidden_states: Tensor, labels: Tensor, chunk_size: int | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and the logits unless it was computed in chunks."""
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

    def create_masks_for_generate(
        self,
        config: MistralConfig,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor | None:
        """The mask of a compiled decoding step, made outside of its graph; a prompt's mask is left to forward."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        return self.model.attention_mask(inputs_embeds, attention_mask, past_key_values)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """Give `generate` a `RollingCache` where it would make one of the library's dynamic or static caches."""
        beams = generation_config.num_beams or 1
        rows = batch_size * max(beams, generation_config.num_return_sequences or 1)
        kind = generation_config.cache_implementation
        rolling = kind in (None, "dynamic", "offloaded", "static", "offloaded_static")
        if not rolling or generation_config.use_cache is False or model_kwargs.get("past_key_values") is not None:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        capacity = None
        if kind is not None and "static" in kind:
            asked = getattr(generation_config, "max_cache_len", None) or 0
            capacity = max(max_cache_length, asked, getattr(self, "_previous_max_cache_length", 1))
            self._previous_max_cache_length = capacity
        mask = model_kwargs.get("attention_mask")
        if mask is not None and mask.all():  # asked once here, so that no step has to
            del model_kwargs["attention_mask"]
        cache = RollingCache(self.config, max_cache_len=capacity, offloading=kind is not None and "offloaded" in kind)
        if capacity is not None and generation_config.prefill_chunk_size is not None:
            self._allocate_now(cache, rows)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None

    def _allocate_now(self, cache: RollingCache, batch_size: int) -> None:
        """Allocate a static cache before a compiled prefill, whose graph cannot do it."""
        head_dim = self.config.head_shape[2]
        projection = self.get_submodule("model.layers.0.self_attn.k_proj")
        split = hasattr(projection.weight, "to_local")  # tensor parallelism: only this rank's heads
        features = projection.weight.to_local().shape[0] if split else projection.out_features
        cache.early_initialization(batch_size, features // head_dim, head_dim, self.dtype, self.device)


class MistralForSequenceClassification(MistralPreTrainedModel):
    """A `MistralModel` with a linear layer on the last real token of every sequence."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MistralModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.loss_function = sequence_classification_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Classify whole sequences.

        The last token that the attention mask marks as real counts, on whichever side the padding is; without a mask,
        the last token that is not ``config.pad_token_id``.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: See `MistralModel`.
            labels: See `losses.sequence_classification_loss`.
            **kwargs: To `MistralModel` and to the loss function (``num_items_in_batch``).

        Returns:
            ``logits`` ``[B, num_labels]``, ``loss`` if there are labels, ``past_key_values``.

        Raises:
            ValueError: As `MistralModel`; a batch has neither a mask nor a pad token; or the labels do not fit.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
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
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last_real_token(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, hidden_states: Tensor
    ) -> Tensor:
        """Place of the last real token of every row, ``[B]``."""
        batch, length = hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -length:].bool()
        elif batch == 1 and (input_ids is None or self.config.pad_token_id is None):
            return torch.full((1,), length - 1)
        elif input_ids is None or self.config.pad_token_id is None:
            raise ValueError(
                f"Which of the {batch} sequences' tokens are padding is unknown: config.pad_token_id is"
                f" {self.config.pad_token_id} and there is no attention mask. Pass attention_mask, or set"
                " model.config.pad_token_id = tokenizer.pad_token_id."
            )
        else:
            real = input_ids != self.config.pad_token_id
        return (real * torch.arange(1, length + 1, device=real.device)).argmax(dim=-1)


class MistralForTokenClassification(MistralPreTrainedModel):
    """A `MistralModel` with a linear layer on every token."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = MistralModel(config)
        self.dropout = nn.Dropout(_first_set(config, "classifier_dropout", "hidden_dropout", default=0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=bias)
        self.loss_function = token_classification_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Classify every token.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: See `MistralModel`.
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
            past_key_values=past_key_values,
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
        self.model = MistralModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.loss_function = question_answering_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput:
        """Find the answer's span.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds: See `MistralModel`.
            start_positions, end_positions: ``[B]`` places of the first and last token of the answer; one outside of the
                input is ignored.
            **kwargs: To `MistralModel` and to the loss function (``num_items_in_batch``).

        Returns:
            ``start_logits`` and ``end_logits`` ``[B, S]``, and ``loss`` if both places are given.

        Raises:
            ValueError: As `MistralModel`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
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
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs)[0]
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

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            hidden_states: ``[B, S, E]``.
            position_embeddings: cos and sin as `MistralRotaryEmbedding` gives them.
            attention_mask: What `attention.make_mask` made for the attention implementation.
            past_key_values: Where keys and values are kept.

        Returns:
            ``[B, S, E]``, and the attention weights ``[B, H, S, T]`` of an implementation that has them.
        """
        batch, length = hidden_states.shape[:2]
        q, k, v = self._project(hidden_states, position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # [B, K, T, D]
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
            sliding_window=self.config.sliding_window,
            **kwargs,
        )
        return linear(self.o_proj, output.reshape(batch, length, -1)), weights

    def _project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries ``[B, H, S, D]``, rotated keys and values ``[B, K, S, D]``."""
        by_head = (*hidden_states.shape[:2], -1, self.head_dim)
        if hidden_states.shape[1] == 1:
            fused = fused_linear(self.fusible(), hidden_states)
            if fused is not None:
                states = fused.view(by_head).transpose(1, 2)
                kv_heads = self.k_proj.out_features // self.head_dim
                rotated = apply_rotary(states[:, :-kv_heads], *position_embeddings)
                return rotated[:, :-kv_heads], rotated[:, -kv_heads:], states[:, -kv_heads:]
        q, k, v = (linear(layer, hidden_states).view(by_head).transpose(1, 2) for layer in self.fusible())
        return apply_rotary(q, *position_embeddings), apply_rotary(k, *position_embeddings), v

    def fusible(self) -> tuple[nn.Module, ...]:
        """The layers that read the same input."""
        return self.q_proj, self.k_proj, self.v_proj


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
        long = hidden_states.shape[1] > MLP_TOKENS and not torch.is_grad_enabled()
        if not long or not is_plain(self.gate_proj, hidden_states):
            return self._transform(hidden_states)
        # Large buffers would come from the system anew at each operation, and be cleared by it.
        output = torch.empty_like(hidden_states)
        for piece, result in zip(hidden_states.split(MLP_TOKENS, 1), output.split(MLP_TOKENS, 1), strict=True):
            result.copy_(self._transform(piece))
        return output

    def _transform(self, hidden_states: Tensor) -> Tensor:
        fused = fused_linear(self.fusible(), hidden_states) if hidden_states.shape[1] == 1 else None
        if fused is None:
            gate, up = (linear(layer, hidden_states) for layer in self.fusible())
        else:
            gate, up = fused.chunk(2, dim=-1)
        gate = self.act_fn(gate)
        return linear(self.down_proj, gate * up if torch.is_grad_enabled() else gate.mul_(up))

    def fusible(self) -> tuple[nn.Module, ...]:
        """The layers that read the same input."""
        return self.gate_proj, self.up_proj


@use_kernel_forward_from_hub("RMSNorm")
class MistralRMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019), computed in at least float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[..., E]`` to ``[..., E]``."""
        plain = type(hidden_states) is Tensor and hidden_states.is_cpu
        plain = plain and hidden_states.dtype == self.weight.dtype == torch.float32
        if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        # On a CPU, PyTorch makes twice as many passes over it, each of them into new memory.
        norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True)
        mean = torch.addcmul(_constant(self.variance_epsilon), norm, norm, value=1 / hidden_states.shape[-1])
        return (hidden_states * mean.rsqrt_()).mul_(self.weight)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


@cache
def _constant(value: float) -> Tensor:
    """A number as a float32 tensor on the CPU, which an operator there would make of a plain one each time."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")


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
        """Factors of the rotation of `apply_rotary`.

        Args:
            x: For its dtype and device.
            position_ids: ``[B or 1, S]``.

        Returns:
            cos and sin, each ``[B or 1, 1, S, D]`` in the dtype of `x`, the first half of sin negated.
        """
        angles = position_ids[:, None, :, None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat([cos, cos], dim=-1).to(x.dtype), torch.cat([-sin, sin], dim=-1).to(x.dtype)


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[B, heads, S, D]`` states, the two halves of a head being the parts of D/2 complex numbers."""
    return (states * cos).addcmul_(states.roll(states.shape[-1] // 2, dims=-1), sin)


class MistralModel(MistralPreTrainedModel):
    """The decoder: embeddings, layers and the last norm."""

    def __init__(self, config: MistralConfig) -> None:
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MistralDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MistralRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states of new tokens.

        Args:
            input_ids: ``[B, S]`` token ids.
            attention_mask: ``[B, total]``, nonzero for real tokens, `total` being the cached tokens and the new ones;
                or a mask ``[B or 1, H or 1, S, T]`` of one's own, boolean or additive.
            position_ids: ``[B or 1, S]``. By default the first real token of a row has position 0. Positions that
                restart (without mask and cache) mark packed sequences, which do not see each other, and of which no
                cache is returned.
            past_key_values: The cached tokens; new ones are added to it in place.
            inputs_embeds: ``[B, S, E]`` in place of `input_ids`.
            use_cache: Return a cache, made if `past_key_values` is None (default: ``config.use_cache``).
            **kwargs: ``output_hidden_states``, ``output_attentions``, and what attention implementations take.

        Returns:
            ``last_hidden_state`` ``[B, S, E]``, ``past_key_values``, and what else was asked for.

        Raises:
            ValueError: Both or neither of `input_ids` and `inputs_embeds`; an id outside the vocabulary; a mask that
                does not cover the tokens, or contradicts positions that restart; or packed sequences without positions.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                f"Pass exactly one of input_ids and inputs_embeds, not {'neither' if input_ids is None else 'both'}."
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(self._checked(cast(Tensor, input_ids)))
        if position_ids is None and "flash" not in self.config._attn_implementation:
            require_positions(kwargs)
        segments = packed_segments(position_ids, attention_mask, past_key_values, inputs_embeds.shape[0])
        if segments is None and position_ids is None:
            segments = flattened_segments(kwargs.get("cu_seq_lens_q"), inputs_embeds)
        mask = self.attention_mask(inputs_embeds, attention_mask, past_key_values, segments, **kwargs)
        if use_cache and past_key_values is None and (segments is None or torch.compiler.is_compiling()):
            past_key_values = RollingCache(self.config)
        self._notice_length(past_key_values, inputs_embeds.shape[1])
        if position_ids is None:
            position_ids = positions(inputs_embeds, attention_mask, past_key_values)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in islice(self.layers, self.config.num_hidden_layers):
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def attention_mask(
        self,
        inputs_embeds: Tensor,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        segments: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The mask that all layers share, as the attention implementation wants it; see `attention.make_mask`."""
        if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.ndim == 4):
            return attention_mask
        if kwargs.get("cache") is not None:  # continuous batching, whose kernels need no mask
            return None
        length = inputs_embeds.shape[1]
        layout = key_layout(past_key_values, length)
        wanted = kwargs.get("output_attentions")
        return make_mask(
            self.config._attn_implementation,
            inputs_embeds,
            layout,
            self.config.sliding_window,
            padding=real_tokens(attention_mask, layout.query_start, inputs_embeds),
            segments=segments,
            weights_wanted=self.config.output_attentions if wanted is None else wanted,
            config=self.config,
        )

    def _notice_length(self, cache: Cache | None, length: int) -> None:
        """Say once that a text has become longer than what the model was made for."""
        if torch.compiler.is_compiling():
            return
        seen, limit = 0 if cache is None else cache.get_seq_length(), self.config.max_position_embeddings
        if isinstance(seen, int) and seen + length > limit:
            logger.warning_once(
                f"The text has passed max_position_embeddings={limit}, the longest that this model was made for. It is"
                " carried on, but may get worse; rope_parameters can stretch the positions."
            )

    def _checked(self, input_ids: Tensor) -> Tensor:
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, tokens].")
        if input_ids.device.type == "cpu" or input_ids.shape[1] > 1:
            meaning = "token ids of the model's vocabulary; use the model's own tokenizer, or resize_token_embeddings"
            check_range("input_ids", input_ids, self.embed_tokens.num_embeddings, meaning)
        return input_ids


MistralPreTrainedModel._can_record_outputs = {"hidden_states": MistralDecoderLayer, "attentions": MistralAttention}
