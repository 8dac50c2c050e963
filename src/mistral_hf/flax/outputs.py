"""What the JAX models return: pytrees whose fields are read by name, by key or by index.

Legend: B batch, S new tokens, T keys, H query heads, E hidden_size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import jax
from jax import Array

from .cache import FlaxRollingCache


@dataclass(frozen=True)
class _Output:
    def __getitem__(self, key: str | int) -> Any:
        """A field by its name, or by its index among the fields that are not None."""
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __contains__(self, key: object) -> bool:
        return key in self.keys()

    def keys(self) -> tuple[str, ...]:
        """Names of the fields that are not None."""
        return tuple(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, as with ``return_dict=False``."""
        return tuple(getattr(self, name) for name in self.keys())


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxModelOutput(_Output):
    """What `FlaxMistralModel` returns; a pytree.

    Attributes:
        last_hidden_state: ``[B, S, E]``, after the last norm.
        past_key_values: The cache with the new tokens, if one was given.
        hidden_states: The embeddings, the output of every layer but the last, and `last_hidden_state`, each
            ``[B, S, E]``, if requested.
        attentions: ``[B, H, S, T]`` for every layer, if requested.
    """

    last_hidden_state: Array
    past_key_values: FlaxRollingCache | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxCausalLMOutput(_Output):
    """What `FlaxMistralForCausalLM` returns; a pytree.

    Attributes:
        logits: ``[B, S or kept, V]``, the scores of the next token at every position.
        past_key_values, hidden_states, attentions: See `FlaxModelOutput`.
    """

    logits: Array
    past_key_values: FlaxRollingCache | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxSequenceClassifierOutput(_Output):
    """What `FlaxMistralForSequenceClassification` returns; a pytree.

    Attributes:
        logits: ``[B, num_labels]``.
        past_key_values, hidden_states, attentions: See `FlaxModelOutput`.
    """

    logits: Array
    past_key_values: FlaxRollingCache | None = None
    hidden_states: tuple[Array, ...] | None = None
    attentions: tuple[Array, ...] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlaxGenerateOutput(_Output):
    """What `generate` returns; a pytree.

    Attributes:
        sequences: ``[B, prompt + new tokens]``, a NumPy array of int32, as tokenizers decode it; rows that ended early
            are padded on the right.
    """

    sequences: Any
