"""The outputs of the TensorFlow models."""

from __future__ import annotations

from typing import Any, cast

import optree

_FIELDS = ("loss", "logits", "last_hidden_state", "past_key_values", "hidden_states", "attentions")


class TFMistralOutput(dict[str, Any]):
    """Results by name, as keys and as attributes; by their index among those that are there, too.

    The names are ``loss``, ``logits``, ``last_hidden_state``, ``past_key_values``, ``hidden_states`` and
    ``attentions``, in this order. Fields that were not requested are absent as keys and None as attributes.
    """

    def __init__(self, *pairs: Any, **fields: Any) -> None:
        super().__init__(*pairs, **fields)
        for name in [name for name, value in self.items() if value is None]:
            del self[name]

    def __getattr__(self, name: str) -> Any:
        if name not in _FIELDS:
            raise AttributeError(f"The output has no field {name!r}; it has {', '.join(self)}.")
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The results, without names."""
        return tuple(self.values())


# Keras flattens results and rebuilds them, as it does with dictionaries.
optree.register_pytree_node(
    cast(Any, TFMistralOutput),
    lambda output: (cast(Any, output).to_tuple(), tuple(output), tuple(output)),
    lambda names, values: TFMistralOutput(zip(cast(Any, names), values, strict=True)),
    namespace="keras",
)
