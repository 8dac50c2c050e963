"""The model types of the dense Mistral family: our classes, the reference's, and the fields that a tiny one adds."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from transformers.models.ministral import configuration_ministral as stock_ministral_configuration
from transformers.models.ministral import modeling_ministral as stock_ministral
from transformers.models.ministral3 import configuration_ministral3 as stock_ministral3_configuration
from transformers.models.ministral3 import modeling_ministral3 as stock_ministral3
from transformers.models.mistral import configuration_mistral as stock_mistral_configuration
from transformers.models.mistral import modeling_mistral as stock_mistral

from mistral_hf import (
    Ministral3Config,
    MinistralConfig,
    MistralConfig,
    modeling_ministral,
    modeling_ministral3,
    modeling_mistral,
)

SLIDING, FULL = "sliding_attention", "full_attention"
# Queries are scaled from position 8 on, so that the scale changes within the shortest texts of the tests.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}


class Family(NamedTuple):
    """A model type.

    Attributes:
        stem: First part of the names of its classes.
        modeling, stock_modeling: Modules of the models, ours and the reference's.
        config, stock_config: Classes of the configuration.
        fields: Maps the fields of a tiny Mistral to those of this type.
    """

    stem: str
    modeling: ModuleType
    stock_modeling: ModuleType
    config: type[MistralConfig]
    stock_config: Any
    fields: Callable[[dict[str, Any]], dict[str, Any]]


def _alternating(fields: dict[str, Any]) -> dict[str, Any]:
    """Layers of full attention and of a window in turn, the first with full attention."""
    if fields["sliding_window"] is None or "layer_types" in fields:
        return fields
    return fields | {"layer_types": [SLIDING if index % 2 else FULL for index in range(fields["num_hidden_layers"])]}


FAMILIES = {
    "mistral": Family(
        "Mistral",
        modeling_mistral,
        stock_mistral,
        MistralConfig,
        stock_mistral_configuration.MistralConfig,
        lambda fields: fields,
    ),
    "ministral": Family(
        "Ministral",
        modeling_ministral,
        stock_ministral,
        MinistralConfig,
        stock_ministral_configuration.MinistralConfig,
        _alternating,
    ),
    "ministral3": Family(
        "Ministral3",
        modeling_ministral3,
        stock_ministral3,
        Ministral3Config,
        stock_ministral3_configuration.Ministral3Config,
        lambda fields: {"rope_parameters": YARN, **fields},
    ),
}

# Run a test, which uses `make_model` or `make_pair`, with models of every type.
FAMILY = pytest.mark.parametrize("make_model", FAMILIES, indirect=True)
# The same for comparisons with the oracle, which knows windows by layer, but neither yarn nor scaled queries.
WINDOWED = pytest.mark.parametrize("make_model", ["mistral", "ministral"], indirect=True)
