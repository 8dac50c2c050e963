"""Ministral 3 models: those of Mistral, with queries scaled by their position."""

from .configuration_ministral3 import Ministral3Config
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


class Ministral3DecoderLayer(MistralDecoderLayer):
    """A layer, by the name under which tools wrap or split it; see `MistralDecoderLayer`."""


class Ministral3PreTrainedModel(MistralPreTrainedModel):
    """Base of all Ministral 3 models."""

    config: Ministral3Config
    config_class = Ministral3Config
    layer_class = Ministral3DecoderLayer
    _no_split_modules = ["Ministral3DecoderLayer"]


class Ministral3Model(Ministral3PreTrainedModel, MistralModel):
    """The decoder; see `MistralModel`."""


Ministral3PreTrainedModel.decoder_class = Ministral3Model


class Ministral3ForCausalLM(Ministral3PreTrainedModel, MistralForCausalLM, MistralGenerationMixin):
    """The language model; see `MistralForCausalLM`."""


class Ministral3ForSequenceClassification(Ministral3PreTrainedModel, MistralForSequenceClassification):
    """A classifier of texts; see `MistralForSequenceClassification`."""


class Ministral3ForTokenClassification(Ministral3PreTrainedModel, MistralForTokenClassification):
    """A classifier of tokens; see `MistralForTokenClassification`."""


class Ministral3ForQuestionAnswering(Ministral3PreTrainedModel, MistralForQuestionAnswering):
    """A model that marks answers in a text; see `MistralForQuestionAnswering`."""
