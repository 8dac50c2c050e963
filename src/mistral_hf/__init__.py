"""Mistral for Hugging Face Transformers: importing this package registers it for ``model_type: "mistral"``."""

from .bundled import BUNDLED_CHECKPOINT
from .cache import RollingCache
from .configuration_mistral import MistralConfig
from .modeling_mistral import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    MistralPreTrainedModel,
)
from .registration import register, unregister

__all__ = [
    "BUNDLED_CHECKPOINT",
    "MistralConfig",
    "MistralForCausalLM",
    "MistralForQuestionAnswering",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralModel",
    "MistralPreTrainedModel",
    "RollingCache",
    "register",
    "unregister",
]

__version__ = "0.1.0"

register()
