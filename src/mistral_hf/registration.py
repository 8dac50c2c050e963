"""Registers our classes for the dense Mistral family; the only module that touches the library's classes."""

import sys
from types import ModuleType

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import modeling_ministral, modeling_ministral3, modeling_mistral
from .configuration_ministral import MinistralConfig
from .configuration_ministral3 import Ministral3Config
from .configuration_mistral import MistralConfig

AUTO_CLASSES = {
    "Model": AutoModel,
    "ForCausalLM": AutoModelForCausalLM,
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
}
# The configuration of each model type, and the module and the first part of the names of its models.
FAMILIES: dict[type[MistralConfig], tuple[ModuleType, str]] = {
    MistralConfig: (modeling_mistral, "Mistral"),
    MinistralConfig: (modeling_ministral, "Ministral"),
    Ministral3Config: (modeling_ministral3, "Ministral3"),
}
MODEL_CLASSES = {
    config_class: {auto: getattr(module, stem + ending) for ending, auto in AUTO_CLASSES.items()}
    for config_class, (module, stem) in FAMILIES.items()
}
# The names in `transformers` under which tools look the classes up, as in config.architectures.
NAMES: dict[str, type] = {config_class.__name__: config_class for config_class in FAMILIES} | {
    stem + ending: getattr(module, stem + ending)
    for module, stem in FAMILIES.values()
    for ending in ("PreTrainedModel", *AUTO_CLASSES)
}


def register(names: bool = True) -> None:
    """Make the Auto classes resolve the types of `FAMILIES` to this package; a second call changes nothing.

    Args:
        names: Also replace the names in ``transformers`` (``transformers.MistralForCausalLM``, ...), by which tools
            look up the class that a checkpoint names. The reference stays in ``transformers.models.mistral``.

    Raises:
        RuntimeError: The library accepts the registration, but still resolves to another class.
    """
    for config_class, model_classes in MODEL_CLASSES.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class, model_class in model_classes.items():
            auto_class.register(config_class, model_class, exist_ok=True)
    if names:
        for module in _transformers():
            for name, ours in NAMES.items():
                setattr(module, name, ours)
    for name, (found, expected) in (resolved() | (resolved_names() if names else {})).items():
        if found is not expected:
            unregister()
            raise RuntimeError(
                f"{name} resolves to {found.__module__}.{found.__qualname__} instead of"
                f" {expected.__module__}.{expected.__qualname__}, although that is registered. This release of"
                " transformers ignores the registration; install a release that mistral_hf was tested with."
            )


def unregister() -> None:
    """Return the checkpoints, and the names, to the library's own classes; a second call changes nothing."""
    for config_class, model_classes in MODEL_CLASSES.items():
        CONFIG_MAPPING._extra_content.pop(config_class.model_type, None)
        for auto_class in model_classes:
            auto_class._model_mapping._extra_content.pop(config_class, None)
    for module in _transformers():
        for name, ours in NAMES.items():
            if vars(module).get(name) is ours:  # the library imports its own again when it is asked for
                delattr(module, name)


def resolved() -> dict[str, tuple[type, type]]:
    """For every Auto class and model type, ``AutoModel of mistral``: the class that it resolves to, and ours."""
    classes: dict[str, tuple[type, type]] = {}
    for config_class, model_classes in MODEL_CLASSES.items():
        model_type = config_class.model_type
        found = CONFIG_MAPPING[model_type]
        classes[f"AutoConfig of {model_type}"] = found, config_class
        for auto_class, model_class in model_classes.items():
            classes[f"{auto_class.__name__} of {model_type}"] = auto_class._model_mapping[found], model_class
    return classes


def resolved_names() -> dict[str, tuple[type, type]]:
    """For every name of ours in ``transformers``: the class that it gives, and ours."""
    modules = _transformers()
    classes: dict[str, tuple[type, type]] = {}
    for name, ours in NAMES.items():
        others = (found for found in (getattr(module, name) for module in modules) if found is not ours)
        classes[f"transformers.{name}"] = (next(others, ours), ours)
    return classes


def _transformers() -> list[ModuleType]:
    """The modules ``transformers`` in use: the library imports itself again, and early importers keep the first."""
    holders = [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
    held = [sys.modules["transformers"], *(names.get("transformers") for names in holders)]
    modules = [module for module in held if isinstance(module, ModuleType) and module.__name__ == "transformers"]
    return list({id(module): module for module in modules}.values())
