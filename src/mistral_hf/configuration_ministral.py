"""The configuration of Ministral 8B's architecture: Mistral with layers of two kinds."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .configuration_mistral import FULL, SLIDING, MistralConfig


@strict
class MinistralConfig(MistralConfig):
    """Configuration of a Ministral model: that of Mistral with the kind of every layer in `layer_types`.

    Args:
        layer_types: ``"sliding_attention"`` or ``"full_attention"`` for every layer (None: all have the window, or full
            attention if `sliding_window` is None).

    The other arguments and the errors are those of `MistralConfig`.
    """

    model_type = "ministral"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [FULL if self.sliding_window is None else SLIDING] * self.num_hidden_layers
        super().__post_init__(**kwargs)
