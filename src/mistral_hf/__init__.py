"""Mistral for Hugging Face Transformers: importing this package registers it for ``model_type: "mistral"``.

Without PyTorch, nothing is registered; the configuration, the conversion and the JAX and TensorFlow ports work. Public
names and the packages `chat` and `convert` are imported when they are used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .bundled import BUNDLED_CHECKPOINT
from .configuration_mistral import MistralConfig

if TYPE_CHECKING:
    from . import chat, convert
    from .chat import encode_conversation, get_chat_template, validate_conversation
    from .modeling_flax_mistral import FlaxMistralForCausalLM, FlaxMistralModel
    from .modeling_mistral import (
        MistralForCausalLM,
        MistralForQuestionAnswering,
        MistralForSequenceClassification,
        MistralForTokenClassification,
        MistralModel,
        MistralPreTrainedModel,
    )
    from .modeling_tf_mistral import (
        TFMistralForCausalLM,
        TFMistralForSequenceClassification,
        TFMistralForTokenClassification,
        TFMistralModel,
    )
    from .registration import register, unregister
    from .torch.cache import RollingCache

__all__ = [
    "BUNDLED_CHECKPOINT",
    "FlaxMistralForCausalLM",
    "FlaxMistralModel",
    "MistralConfig",
    "MistralForCausalLM",
    "MistralForQuestionAnswering",
    "MistralForSequenceClassification",
    "MistralForTokenClassification",
    "MistralModel",
    "MistralPreTrainedModel",
    "RollingCache",
    "TFMistralForCausalLM",
    "TFMistralForSequenceClassification",
    "TFMistralForTokenClassification",
    "TFMistralModel",
    "chat",
    "convert",
    "encode_conversation",
    "get_chat_template",
    "register",
    "unregister",
    "validate_conversation",
]

__version__ = "0.1.0"

_HOMES = {
    "chat": ("encode_conversation", "get_chat_template", "validate_conversation"),
    "modeling_flax_mistral": ("FlaxMistralForCausalLM", "FlaxMistralModel"),
    "modeling_mistral": (
        "MistralForCausalLM",
        "MistralForQuestionAnswering",
        "MistralForSequenceClassification",
        "MistralForTokenClassification",
        "MistralModel",
        "MistralPreTrainedModel",
    ),
    "modeling_tf_mistral": (
        "TFMistralForCausalLM",
        "TFMistralForSequenceClassification",
        "TFMistralForTokenClassification",
        "TFMistralModel",
    ),
    "registration": ("register", "unregister"),
    "torch.cache": ("RollingCache",),
}
# The extra of setup.cfg that installs the imports of a module.
_EXTRAS = {"modeling_flax_mistral": "flax", "modeling_tf_mistral": "tf"}


def __getattr__(name: str) -> Any:
    if name in ("chat", "convert"):
        return import_module(f".{name}", __name__)
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f".{home}", __name__), name)
    except ModuleNotFoundError as error:
        install = f"mistral_hf[{_EXTRAS[home]}]" if home in _EXTRAS else error.name
        raise ImportError(
            f"mistral_hf.{name} needs {error.name}, which is not installed: pip install {install!r} brings it."
        ) from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if find_spec("torch") is not None:
    import_module(".registration", __name__).register()
