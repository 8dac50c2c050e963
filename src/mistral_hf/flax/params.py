"""Weights as a plain nested dict by their Hugging Face names, and as the state of a Flax NNX module."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ..checkpoints.reader import Shape

Params = dict[str, Any]


def flatten(params: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of a nested dict by dotted names."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def nest(flat: Mapping[str, Any]) -> Params:
    """Undo `flatten`."""
    params: Params = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = params
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return params


def from_state(state: Any) -> Params:
    """The weights of an NNX state; numbers of layers become text."""
    return nest(flatten(nnx.to_pure_dict(state)))


def to_module(graph: Any, params: Params) -> Any:
    """The NNX module of a graph definition with these weights."""

    def with_numbers(inner: Params) -> dict[Any, Any]:
        return {
            int(key) if key.isdigit() else key: with_numbers(value) if isinstance(value, dict) else value
            for key, value in inner.items()
        }

    return nnx.merge(graph, with_numbers(params))


def checked(params: Mapping[Any, Any], expected: Params) -> dict[str, Any]:
    """The same weights by dotted names.

    Raises:
        ValueError: A weight is missing, unknown, or has another shape.
    """
    found, wanted = flatten(params), flatten(expected)
    if odd := sorted(found.keys() ^ wanted.keys()):
        raise ValueError(f"params {'lack' if odd[0] in wanted else 'have no place for'} {odd[0]}.")
    for name, value in found.items():
        if tuple(value.shape) != tuple(wanted[name].shape):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but must have {tuple(wanted[name].shape)}.")
    return found


class Stacker:
    """Collects the tensors of a checkpoint as weights, on their devices; those of stacked layers fill one array.

    Args:
        layers: Number of layers.
        dtype: Of the weights.
        places: By weight, its sharding, or None.
    """

    def __init__(self, layers: int, dtype: Any, places: Mapping[str, Any]) -> None:
        self._layers, self._dtype, self._places = layers, dtype, places
        self.arrays: dict[str, Array] = {}

    def put(self, name: str, layer: int | None, tensor: Any) -> None:
        """Add a tensor, as the weight `name` or as one layer of it, and wait until it may be dropped."""
        tensor = tensor if tensor.dtype == self._dtype else tensor.astype(self._dtype)
        place = self._places[name]
        if layer is None:
            self.arrays[name] = jax.device_put(tensor, place)
        else:
            if name not in self.arrays:
                self.arrays[name] = jnp.zeros((self._layers, *tensor.shape), self._dtype, device=place)
            self.arrays[name] = _set_layer(self.arrays[name], tensor, layer)
        self.arrays[name].block_until_ready()


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: Array, tensor: Array, layer: Any) -> Array:
    return lax.dynamic_update_index_in_dim(stack, tensor, layer, axis=0)


def tensors_of(abstract: Params, layers: int, stacked: bool) -> dict[str, tuple[str, int | None, Shape]]:
    """Every tensor of a checkpoint: the weight that holds it, its place among stacked layers, and its shape."""
    tensors: dict[str, tuple[str, int | None, Shape]] = {}
    for name, leaf in flatten(abstract).items():
        if stacked and "layers." in name:
            for layer in range(layers):
                tensors[name.replace("layers.", f"layers.{layer}.", 1)] = (name, layer, tuple(leaf.shape[1:]))
        else:
            tensors[name] = (name, None, tuple(leaf.shape))
    return tensors
