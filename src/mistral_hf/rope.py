"""Frequencies of the rotary embedding for the JAX and TensorFlow ports, in NumPy: every type that the library has.

They are rounded to float32 where the library rounds them, so that they are equal to the last bit or nearly so: at
position 10,000, one bit of a frequency is a thousandth of a radian.

Legend: D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .configuration_mistral import MistralConfig

Array = npt.NDArray[Any]
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class RotaryFrequencies:
    """The angles between one position and the next; hashable.

    Attributes:
        frequencies: ``D/2`` radians, for sequences of at most `pretrained` tokens.
        scaling: The factor of cos and sin.
        pretrained: Length beyond which the frequencies are others; None if they do not depend on the length.
        long: Those of longer sequences (``"longrope"``), ``D/2`` radians; None otherwise.
        stretch: By how much longer sequences grow the base (``"dynamic"``); the type's ``factor``.
    """

    frequencies: tuple[float, ...]
    scaling: float = 1.0
    pretrained: int | None = None
    long: tuple[float, ...] | None = None
    stretch: float = 1.0

    def of_length(self, length: Any, ops: Any) -> Any:
        """The frequencies of sequences whose longest has `length` tokens.

        Args:
            length: A float32 scalar, the largest position of a call plus one. It is not used, and may be None, if
                `pretrained` is None.
            ops: The module with ``where`` and ``maximum`` for it: ``jax.numpy``, ``tensorflow`` or ``numpy``.

        Returns:
            ``[D/2]`` radians in float32.
        """
        frequencies = np.array(self.frequencies, np.float32)
        if self.pretrained is None:
            return frequencies
        if self.long is not None:
            return ops.where(length > self.pretrained, np.array(self.long, np.float32), frequencies)
        growth = ops.maximum(length * (self.stretch / self.pretrained) - (self.stretch - 1), 1.0)
        count = len(frequencies)  # theta * growth ** (D / (D - 2)) is the base, and 2i / D the exponent
        return frequencies * growth ** -(np.arange(count) / max(count - 1, 1)).astype(np.float32)


def rotary_frequencies(config: MistralConfig) -> RotaryFrequencies:
    """The frequencies of a model.

    Those of the type ``"default"`` are ``theta ** (-2i / D)`` (Su et al., 2021). Scaled types divide all of them by a
    factor (``"linear"``) or only the slow ones (``"llama3"``; ``"yarn"``: Peng et al., 2023), leave the slowest out
    (``"proportional"``), grow theta with the length (``"dynamic"``), or have factors for every frequency, others beyond
    the pretrained length (``"longrope"``: Ding et al., 2024).

    Args:
        config: With `rope_parameters`, `head_dim` and `max_position_embeddings`.

    Raises:
        ValueError: The type is unknown, or turns a part of each head only, which Mistral does not do.
    """
    parameters: dict[str, Any] = dict(config.rope_parameters or {})
    kind = parameters["rope_type"]
    if kind not in ROTARY_TYPES:
        raise ValueError(f"rope_type={kind!r} is unknown: it must be one of {', '.join(ROTARY_TYPES)}.")
    if kind not in ("default", "proportional") and parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rope_parameters={parameters!r} has a partial_rotary_factor, but a Mistral model rotates whole heads:"
            " remove it, or use the type 'proportional'."
        )
    return ROTARY_TYPES[kind](config, parameters)


def _radius(config: MistralConfig, parameters: Parameters) -> Array:
    """``theta ** (2i / D)``, ``[D/2]``: how many positions turn a pair by one radian."""
    head_dim = config.head_shape[2]
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (float(parameters["rope_theta"]) ** exponents.astype(np.float64)).astype(np.float32)


def _inverse(radius: Array, **options: Any) -> RotaryFrequencies:
    return RotaryFrequencies(_floats(np.float32(1) / radius), **options)


def _floats(array: Array) -> tuple[float, ...]:
    return tuple(array.astype(np.float32).tolist())


def _default(config: MistralConfig, parameters: Parameters) -> RotaryFrequencies:
    return _inverse(_radius(config, parameters))


def _linear(config: MistralConfig, parameters: Parameters) -> RotaryFrequencies:
    return RotaryFrequencies(_floats(np.float32(1) / _radius(config, parameters) / np.float32(parameters["factor"])))


def _proportional(config: MistralConfig, parameters: Parameters) -> RotaryFrequencies:
    """Only the first pairs of a head are turned."""
    frequencies = np.float32(1) / _radius(config, parameters)
    turned = int(parameters.get("partial_rotary_factor", 1.0) * config.head_shape[2] // 2)
    frequencies = np.where(np.arange(len(frequencies)) < turned, frequencies, np.float32(0))
    return RotaryFrequencies(_floats(frequencies / np.float32(parameters.get("factor", 1.0))))


def _dynamic(config: MistralConfig, parameters: Parameters) -> RotaryFrequencies:
    length, factor = config.max_position_embeddings, float(parameters["factor"])
    return _inverse(_radius(config, parameters), pretrained=length, stretch=factor)


def _longrope(config: MistralConfig, parameters: Parameters) -> RotaryFrequencies:
    radius, original = _radius(config, parameters), parameters["original_max_position_embeddings"]
    short, long = (np.array(parameters[f"{kind}_factor"], np.float32) for kind in ("short", "long"))
    for kind, factors in (("short", short), ("long", long)):
        if factors.shape != radius.shape:
            raise ValueError(
                f"rope_parameters has {factors.size} values of {kind}_factor, but needs {radius.size}: head_dim / 2."
            )
    factor = parameters.get("factor") or config.max_position_embeddings / original
    scaling = parameters.get("attention_factor")
    if scaling is None:
        scaling = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    long_frequencies = _floats(np.float32(1) / (long * radius))
    return _inverse(short * radius, scaling=float(scaling), pretrained=int(original), long=long_frequencies)


def _llama3(config: MistralConfig, parameters: Parameters) -> RotaryFrequencies:
    """Divide slow frequencies by ``factor``, keep fast ones, and interpolate between."""
    frequencies = np.float32(1) / _radius(config, parameters)
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the pretrained length
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return RotaryFrequencies(_floats(frequencies * (kept + (1 - kept) / parameters["factor"])))


def _yarn(config: MistralConfig, parameters: Parameters) -> RotaryFrequencies:
    """Divide slow frequencies by ``factor``, with a linear ramp over their indices, and scale cos and sin."""
    original, radius = parameters["original_max_position_embeddings"], _radius(config, parameters)
    factor, count = parameters["factor"] or config.max_position_embeddings / original, len(radius)

    def index(turns: float) -> float:
        return count * math.log(original / (turns * 2 * math.pi)) / math.log(parameters["rope_theta"])

    first, last = index(parameters.get("beta_fast") or 32), index(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * count - 1)
    ramp = np.clip((np.arange(count, dtype=np.float32) - first) / ((last - first) or 0.001), 0, 1).astype(np.float32)
    frequencies = np.float32(1) / (np.float32(factor) * radius) * ramp + np.float32(1) / radius * (1 - ramp)
    return RotaryFrequencies(_floats(frequencies), _yarn_scaling(factor, parameters))


def _yarn_scaling(factor: float, parameters: Parameters) -> float:
    """The factor of cos and sin: given, from two weights, or ``0.1 ln(factor) + 1`` (Peng et al., 2023)."""

    def scaling(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given, weights = parameters.get("attention_factor"), (parameters.get("mscale"), parameters.get("mscale_all_dim"))
    if given is not None:
        return float(given)
    return scaling(weights[0]) / scaling(weights[1]) if weights[0] and weights[1] else scaling(1.0)


ROTARY_TYPES: dict[str, Callable[[MistralConfig, Parameters], RotaryFrequencies]] = {
    "default": _default,
    "dynamic": _dynamic,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _longrope,
    "proportional": _proportional,
    "yarn": _yarn,
}
