"""Frequencies of the rotary embedding for the JAX and TensorFlow ports, in NumPy.

Legend: D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .configuration_mistral import MistralConfig

Array = npt.NDArray[Any]

ROTARY_TYPES = ("default", "linear", "llama3", "yarn")


def rotary_frequencies(config: MistralConfig) -> tuple[Array, float]:
    """The angles between one position and the next, and the factor of cos and sin.

    Frequencies are ``theta ** (-2i / D)`` (Su et al., 2021). Scaled types divide all of them by a factor (``"linear"``)
    or only the slow ones (``"llama3"``; ``"yarn"``: Peng et al., 2023).

    Args:
        config: With `rope_parameters`, `head_dim` and `max_position_embeddings`.

    Returns:
        ``[D/2]`` radians in float32, and the factor.

    Raises:
        ValueError: The ports do not support the type.
    """
    parameters: dict[str, Any] = dict(config.rope_parameters or {})
    kind, head_dim = parameters["rope_type"], int(config.head_dim or 0)
    if kind not in ROTARY_TYPES or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rope_parameters={parameters!r} is not supported by the JAX and TensorFlow ports, which have the types"
            f" {', '.join(ROTARY_TYPES)}, without a partial_rotary_factor. Use the PyTorch model for this checkpoint."
        )
    theta = float(parameters["rope_theta"])
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    scaling = 1.0
    if kind == "linear":
        frequencies = frequencies / parameters["factor"]
    elif kind == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif kind == "yarn":
        frequencies, scaling = _yarn(frequencies, theta, parameters, config.max_position_embeddings)
    return frequencies.astype(np.float32), scaling


def _llama3(frequencies: Array, parameters: Mapping[str, Any]) -> Array:
    """Divide slow frequencies by ``factor``, keep fast ones, and interpolate between (as Transformers does)."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the pretrained length
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / parameters["factor"])


def _yarn(frequencies: Array, theta: float, parameters: Mapping[str, Any], length: int) -> tuple[Array, float]:
    """Divide slow frequencies by ``factor``, with a linear ramp over their indices, and scale cos and sin."""
    original = parameters["original_max_position_embeddings"]
    factor, count = parameters["factor"] or length / original, len(frequencies)

    def index(turns: float) -> float:
        return count * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

    first, last = index(parameters.get("beta_fast") or 32), index(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    ramp = np.clip((np.arange(count) - first) / ((last - first) or 0.001), 0, 1)
    return frequencies * ((1 - ramp) + ramp / factor), _yarn_scaling(factor, parameters)


def _yarn_scaling(factor: float, parameters: Mapping[str, Any]) -> float:
    """The factor of cos and sin: given, from two weights, or ``0.1 ln(factor) + 1`` (Peng et al., 2023)."""

    def scaling(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given, weights = parameters.get("attention_factor"), (parameters.get("mscale"), parameters.get("mscale_all_dim"))
    if given is not None:
        return float(given)
    return scaling(weights[0]) / scaling(weights[1]) if weights[0] and weights[1] else scaling(1.0)
