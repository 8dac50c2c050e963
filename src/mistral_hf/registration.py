"""Registers our classes for ``model_type: "mistral"``; the only module that touches the library's classes."""

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

from .configuration_mistral import MistralConfig
from .modeling_mistral import (
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    MistralPreTrainedModel,
)

MODEL_CLASSES = {
    AutoModel: MistralModel,
    AutoModelForCausalLM: MistralForCausalLM,
    AutoModelForSequenceClassification: MistralForSequenceClassification,
    AutoModelForTokenClassification: MistralForTokenClassification,
    AutoModelForQuestionAnswering: MistralForQuestionAnswering,
}


# The names in `transformers` under which tools look the classes up, as in config.architectures.
NAMES = {
    model_class.__name__: model_class
    for model_class in (MistralConfig, MistralPreTrainedModel, *MODEL_CLASSES.values())
}


def register(names: bool = True) -> None:
    """Make the Auto classes resolve Mistral checkpoints to this package; a second call changes nothing.

    Args:
        names: Also replace the names in ``transformers`` (``transformers.MistralForCausalLM``, ...), by which tools
            look up the class that a checkpoint names. The reference stays in ``transformers.models.mistral``.

    Raises:
        RuntimeError: The library accepts the registration, but still resolves to another class.
    """
    AutoConfig.register("mistral", MistralConfig, exist_ok=True)
    for auto_class, model_class in MODEL_CLASSES.items():
        auto_class.register(MistralConfig, model_class, exist_ok=True)
    if names:
        for module in _transformers():
            for name, ours in NAMES.items():
                setattr(module, name, ours)
    for name, (found, expected) in (resolved() | (resolved_names() if names else {})).items():
        if found is not expected:
            unregister()
            raise RuntimeError(
                f"{name} resolves model_type 'mistral' to {found.__module__}.{found.__qualname__} instead of"
                f" {expected.__module__}.{expected.__qualname__}, although that is registered. This release of"
                " transformers ignores the registration; install a release that mistral_hf was tested with."
            )


def unregister() -> None:
    """Return Mistral checkpoints, and the names, to the library's own classes; a second call changes nothing."""
    CONFIG_MAPPING._extra_content.pop("mistral", None)
    for auto_class in MODEL_CLASSES:
        auto_class._model_mapping._extra_content.pop(MistralConfig, None)
    for module in _transformers():
        for name, ours in NAMES.items():
            if vars(module).get(name) is ours:  # the library imports its own again when it is asked for
                delattr(module, name)


def resolved() -> dict[str, tuple[type, type]]:
    """For every Auto class, by name: the class that it resolves Mistral checkpoints to, and ours."""
    config_class = CONFIG_MAPPING["mistral"]
    classes: dict[str, tuple[type, type]] = {"AutoConfig": (config_class, MistralConfig)}
    for auto_class, model_class in MODEL_CLASSES.items():
        classes[auto_class.__name__] = (auto_class._model_mapping[config_class], model_class)
    return classes


def resolved_names() -> dict[str, tuple[type, type]]:
    """For every Mistral name in ``transformers``: the class that it gives, and ours."""
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
