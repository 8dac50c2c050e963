"""The configuration of Ministral 3's architecture: Mistral with yarn and queries scaled by their position."""

from typing import Any, ClassVar, cast

from huggingface_hub.dataclasses import strict
from transformers.modeling_rope_utils import RopeParameters

from .configuration_mistral import MistralConfig

BETA = "llama_4_scaling_beta"


@strict
class Ministral3Config(MistralConfig):
    """Configuration of a Ministral 3 model, with the library's defaults.

    Args:
        rope_parameters: Those of yarn, ``mscale`` and ``mscale_all_dim`` among them, and ``llama_4_scaling_beta``: from
            position ``original_max_position_embeddings`` on, queries are multiplied by
            ``1 + beta * log(1 + position // original_max_position_embeddings)``. Without it they are not.

    The other arguments and the errors are those of `MistralConfig`.
    """

    model_type = "ministral3"
    ignore_keys_at_rope_validation: ClassVar[set[str]] = {BETA, "max_position_embeddings"}

    vocab_size: int = 131072
    num_hidden_layers: int = 34
    head_dim: int | None = 128
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    pad_token_id: int | None = 11
    rope_parameters: RopeParameters | dict[str, Any] | None = None
    sliding_window: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_parameters is None:
            self.rope_parameters = {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "max_position_embeddings": self.max_position_embeddings,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                BETA: 0.1,
            }
        super().__post_init__(**kwargs)

    @property
    def query_scaling(self) -> tuple[float, int] | None:
        """Beta and the number of positions in the scaling of queries by their position; None without one."""
        parameters = cast(dict[str, Any], self.rope_parameters)
        beta = parameters.get(BETA)
        return None if beta is None else (beta, parameters["original_max_position_embeddings"])
