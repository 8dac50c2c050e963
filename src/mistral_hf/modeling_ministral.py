"""Ministral models: those of Mistral, whose layers may differ in their window."""

from .configuration_ministral import MinistralConfig
from .modeling_mistral import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    MistralPreTrainedModel,
)


class MinistralPreTrainedModel(MistralPreTrainedModel):
    """Base of all Ministral models."""

    config: MinistralConfig
    config_class = MinistralConfig


class MinistralModel(MinistralPreTrainedModel, MistralModel):
    """The decoder; see `MistralModel`."""


MinistralPreTrainedModel.decoder_class = MinistralModel


class MinistralForCausalLM(MinistralPreTrainedModel, MistralForCausalLM):
    """The language model; see `MistralForCausalLM`."""


class MinistralForSequenceClassification(MinistralPreTrainedModel, MistralForSequenceClassification):
    """A classifier of texts; see `MistralForSequenceClassification`."""


class MinistralForTokenClassification(MinistralPreTrainedModel, MistralForTokenClassification):
    """A classifier of tokens; see `MistralForTokenClassification`."""


class MinistralForQuestionAnswering(MinistralPreTrainedModel, MistralForQuestionAnswering):
    """A model that marks answers in a text; see `MistralForQuestionAnswering`."""
