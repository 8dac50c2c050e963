"""The models that are measured: the classes of both versions, and shapes."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers.models.mistral.configuration_mistral import MistralConfig as ReferenceConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as ReferenceModel

from mistral_hf import MistralConfig, MistralForCausalLM

from .harness import REFERENCE, SUBJECT


class Implementation(NamedTuple):
    """The classes of one version."""

    config_class: Any
    model_class: Any


IMPLEMENTATIONS = {
    SUBJECT: Implementation(MistralConfig, MistralForCausalLM),
    REFERENCE: Implementation(ReferenceConfig, ReferenceModel),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, by default one of 135M parameters."""

    layers: int = 30
    hidden_size: int = 576
    intermediate_size: int = 1536
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    vocab_size: int = 49152

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer's matrices."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden_size
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the output layer."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Parameters of all matrices that a forward pass reads; tied embeddings count once."""
        return self.layers * self.layer_parameters + self.head_parameters

    def config(self, config_class: Any = MistralConfig, **overrides: Any) -> Any:
        """A configuration of these sizes, without special tokens: no generation ends early."""
        fields = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": None,
        }
        return config_class(**{**fields, **overrides})


TINY = Shape(layers=2, hidden_size=64, intermediate_size=128, heads=4, kv_heads=2, head_dim=16, vocab_size=256)
MISTRAL_7B = Shape(
    layers=32, hidden_size=4096, intermediate_size=14336, heads=32, kv_heads=8, head_dim=128, vocab_size=32000
)
