"""Mistral for Hugging Face Transformers: importing this package registers it for ``model_type: "mistral"``."""

from importlib import import_module
from typing import Any

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
    "encode_conversation",
    "get_chat_template",
    "register",
    "unregister",
    "validate_conversation",
]

__version__ = "0.1.0"

_LAZY = {"encode_conversation": "chat", "get_chat_template": "chat", "validate_conversation": "chat"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


register()
