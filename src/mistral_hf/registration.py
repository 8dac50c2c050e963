"""Registers our classes for ``model_type: "mistral"``; the only module that touches the Auto classes."""

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
)

MODEL_CLASSES = {
    AutoModel: MistralModel,
    AutoModelForCausalLM: MistralForCausalLM,
    AutoModelForSequenceClassification: MistralForSequenceClassification,
    AutoModelForTokenClassification: MistralForTokenClassification,
    AutoModelForQuestionAnswering: MistralForQuestionAnswering,
}


def register() -> None:
    """Make the Auto classes resolve Mistral checkpoints to this package; a second call changes nothing.

    Raises:
        RuntimeError: The library accepts the registration, but still resolves to another class.
    """
    AutoConfig.register("mistral", MistralConfig, exist_ok=True)
    for auto_class, model_class in MODEL_CLASSES.items():
        auto_class.register(MistralConfig, model_class, exist_ok=True)
    for name, (found, expected) in resolved().items():
        if found is not expected:
            unregister()
            raise RuntimeError(
                f"{name} resolves model_type 'mistral' to {found.__module__}.{found.__qualname__} instead of"
                f" {expected.__module__}.{expected.__qualname__}, although that is registered. This release of"
                " transformers ignores the registration; install a release that mistral_hf was tested with."
            )


def unregister() -> None:
    """Return Mistral checkpoints to the library's own classes; a second call changes nothing."""
    CONFIG_MAPPING._extra_content.pop("mistral", None)
    for auto_class in MODEL_CLASSES:
        auto_class._model_mapping._extra_content.pop(MistralConfig, None)


def resolved() -> dict[str, tuple[type, type]]:
    """For every Auto class, by name: the class that it resolves Mistral checkpoints to, and ours."""
    config_class = CONFIG_MAPPING["mistral"]
    classes: dict[str, tuple[type, type]] = {"AutoConfig": (config_class, MistralConfig)}
    for auto_class, model_class in MODEL_CLASSES.items():
        classes[auto_class.__name__] = (auto_class._model_mapping[config_class], model_class)
    return classes
