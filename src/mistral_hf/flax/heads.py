"""The decoder with a head on it: modules of Flax NNX, named as in the Hugging Face checkpoint.

Legend: B batch, S new tokens, E hidden_size, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from ..configuration_mistral import MistralConfig
from .layers import Linear, MistralModule, MistralPreTrainedModule
from .losses import causal_lm_loss, classification_loss, predicted_labels
from .outputs import FlaxCausalLMOutput, FlaxSequenceClassifierOutput
from .sequence_layout import last_real_token
from .weights import Weight, linear


class MistralForCausalLMModule(MistralPreTrainedModule):
    """A `MistralModule` and an output layer over the vocabulary, which may share the embeddings' weights.

    Arguments are those of `MistralModule`.
    """

    def __init__(
        self,
        config: MistralConfig,
        dtype: Any = jnp.float32,
        *,
        scan_layers: bool = False,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.model = MistralModule(config, dtype, scan_layers=scan_layers, remat=remat, rngs=rngs)
        project = partial(Linear, dtype=dtype, std=config.initializer_range, rngs=rngs)
        self.lm_head = None if config.tie_word_embeddings else project(config.hidden_size, config.vocab_size)

    @property
    def output_weight(self) -> Weight:
        """The output layer's weight ``[V, E]``."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight.get_value()

    def __call__(self, input_ids: Array, *args: Any, logits_to_keep: int = 0, **kwargs: Any) -> FlaxCausalLMOutput:
        """Predict the next token at every position, or at the last `logits_to_keep` ones.

        Other arguments are those of `MistralModule`.
        """
        outputs = self.model(input_ids, *args, **kwargs)
        return FlaxCausalLMOutput(
            logits=linear(outputs.last_hidden_state[:, -logits_to_keep:], self.output_weight),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def loss(
        self,
        input_ids: Array,
        attention_mask: Array | None,
        position_ids: Array | None,
        labels: Array | None,
        *,
        dropout_key: Array | None,
        chunk: int,
        label_smoothing: float,
    ) -> Array:
        """Mean cross-entropy of the next tokens; see `causal_lm_loss`.

        Without `labels`, they are the tokens that are real and follow a real one.
        """
        outputs = self.model(input_ids, attention_mask, position_ids, dropout_key=dropout_key)
        labels = predicted_labels(input_ids, attention_mask, position_ids, labels)
        states, weight = outputs.last_hidden_state, self.output_weight
        return causal_lm_loss(states, weight, labels, chunk, label_smoothing=label_smoothing)


class MistralForSequenceClassificationModule(MistralPreTrainedModule):
    """A `MistralModule` and a linear layer on the last real token; arguments as of `MistralModule`."""

    def __init__(
        self,
        config: MistralConfig,
        dtype: Any = jnp.float32,
        *,
        scan_layers: bool = False,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.pad_token_id = config.pad_token_id
        self.model = MistralModule(config, dtype, scan_layers=scan_layers, remat=remat, rngs=rngs)
        self.score = Linear(config.hidden_size, config.num_labels, dtype=dtype, std=config.initializer_range, rngs=rngs)

    def __call__(
        self, input_ids: Array, attention_mask: Array | None = None, *args: Any, **kwargs: Any
    ) -> FlaxSequenceClassifierOutput:
        """Logits of the classes; arguments are those of `MistralModule`.

        The last token that the mask marks as real is classified; without a mask, the last that is not the padding
        token; the last one of a row if there is no such token.
        """
        outputs = self.model(input_ids, attention_mask, *args, **kwargs)
        last = last_real_token(input_ids, attention_mask, self.pad_token_id)
        states = outputs.last_hidden_state[jnp.arange(len(last)), last]
        return FlaxSequenceClassifierOutput(
            logits=linear(states, self.score.weight.get_value()),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def loss(
        self,
        input_ids: Array,
        attention_mask: Array | None,
        position_ids: Array | None,
        labels: Array,
        *,
        dropout_key: Array | None,
        problem: str,
    ) -> Array:
        """The loss of the classes; see `classification_loss`."""
        logits = self(input_ids, attention_mask, position_ids, dropout_key=dropout_key).logits
        return classification_loss(logits, labels, problem)
