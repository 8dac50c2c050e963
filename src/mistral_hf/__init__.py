"""Mistral for Hugging Face Transformers: importing this package registers it for Mistral's dense model types.

These are ``mistral``, ``ministral`` and ``ministral3``. Without PyTorch, nothing is registered; the configuration, the
conversion and the JAX and TensorFlow ports work. Public names and the packages `chat` and `convert` are imported when
they are used.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bundled import BUNDLED_CHECKPOINT

if TYPE_CHECKING:
    from . import chat, convert
    from .chat import encode_conversation, get_chat_template, validate_conversation
    from .configuration_ministral import MinistralConfig
    from .configuration_ministral3 import Ministral3Config
    from .configuration_mistral import MistralConfig
    from .modeling_flax_mistral import (
        FlaxLoraAdapter,
        FlaxMistralForCausalLM,
        FlaxMistralForSequenceClassification,
        FlaxMistralModel,
    )
    from .modeling_ministral import (
        MinistralForCausalLM,
        MinistralForQuestionAnswering,
        MinistralForSequenceClassification,
        MinistralForTokenClassification,
        MinistralModel,
        MinistralPreTrainedModel,
    )
    from .modeling_ministral3 import (
        Ministral3ForCausalLM,
        Ministral3ForQuestionAnswering,
        Ministral3ForSequenceClassification,
        Ministral3ForTokenClassification,
        Ministral3Model,
        Ministral3PreTrainedModel,
    )
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
    "FlaxLoraAdapter",
    "FlaxMistralForCausalLM",
    "FlaxMistralForSequenceClassification",
    "FlaxMistralModel",
    "Ministral3Config",
    "Ministral3ForCausalLM",
    "Ministral3ForQuestionAnswering",
    "Ministral3ForSequenceClassification",
    "Ministral3ForTokenClassification",
    "Ministral3Model",
    "Ministral3PreTrainedModel",
    "MinistralConfig",
    "MinistralForCausalLM",
    "MinistralForQuestionAnswering",
    "MinistralForSequenceClassification",
    "MinistralForTokenClassification",
    "MinistralModel",
    "MinistralPreTrainedModel",
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

_KINDS = ("Ministral", "Ministral3", "Mistral")
_MODELS = (
    *("Model", "PreTrainedModel", "ForCausalLM"),
    *("ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification"),
)
_HOMES = {
    "chat": ("encode_conversation", "get_chat_template", "validate_conversation"),
    **{f"configuration_{kind.lower()}": (f"{kind}Config",) for kind in _KINDS},
    **{f"modeling_{kind.lower()}": tuple(kind + name for name in _MODELS) for kind in _KINDS},
    "modeling_flax_mistral": (
        "FlaxLoraAdapter",
        "FlaxMistralForCausalLM",
        "FlaxMistralForSequenceClassification",
        "FlaxMistralModel",
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


if not TYPE_CHECKING:  # it would tell type checkers that every name exists

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


def _is_command_line() -> bool:
    """Whether this process is ``mistral-hf`` or ``python -m mistral_hf``.

    Their commands register when they load a model, since registration imports PyTorch and Transformers.
    """
    program = sys.argv[0] if sys.argv else ""
    is_module = program == "-m" and sys.orig_argv[-len(sys.argv)] == __name__
    return is_module or Path(program).name in ("mistral-hf", "mistral-hf.exe")


if find_spec("torch") is not None and not _is_command_line():
    import_module(".registration", __name__).register()
