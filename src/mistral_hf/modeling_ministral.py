"""Ministral models: those of Mistral, whose layers may differ in their window."""

from .configuration_ministral import MinistralConfig
from .modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    MistralPreTrainedModel,
)
from .torch.generation import MistralGenerationMixin


class MinistralDecoderLayer(MistralDecoderLayer):
    """A layer, by the name under which tools wrap or split it; see `MistralDecoderLayer`."""


class MinistralPreTrainedModel(MistralPreTrainedModel):
    """Base of all Ministral models."""

    config: MinistralConfig
    config_class = MinistralConfig
    layer_class = MinistralDecoderLayer
    _no_split_modules = ["MinistralDecoderLayer"]


class MinistralModel(MinistralPreTrainedModel, MistralModel):
    """The decoder; see `MistralModel`."""


MinistralPreTrainedModel.decoder_class = MinistralModel


class MinistralForCausalLM(MinistralPreTrainedModel, MistralForCausalLM, MistralGenerationMixin):
    """The language model; see `MistralForCausalLM`."""


class MinistralForSequenceClassification(MinistralPreTrainedModel, MistralForSequenceClassification):
    """A classifier of texts; see `MistralForSequenceClassification`."""


class MinistralForTokenClassification(MinistralPreTrainedModel, MistralForTokenClassification):
    """A classifier of tokens; see `MistralForTokenClassification`."""


class MinistralForQuestionAnswering(MinistralPreTrainedModel, MistralForQuestionAnswering):
    """A model that marks answers in a text; see `MistralForQuestionAnswering`."""

    base_model_prefix = "transformer"  # as in the library, for this head of this type
