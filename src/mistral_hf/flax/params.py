"""Weights as a nested dict by their Hugging Face names, and as the state of a Flax NNX module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """The weights of an NNX state; the numbers of layers become strings."""
    return nest(flatten(nnx.to_pure_dict(state)))


def to_module(graph: Any, params: Params) -> Any:
    """The NNX module with this graph definition and these weights."""

    def with_numbers(inner: Mapping[str, Any]) -> dict[Any, Any]:
        return {
            int(key) if key.isdigit() else key: with_numbers(value) if isinstance(value, Mapping) else value
            for key, value in inner.items()
        }

    return nnx.merge(graph, with_numbers(params))


def check_params(params: Mapping[Any, Any], expected: Params) -> None:
    """Check that weights have the names and shapes of the expected ones.

    Raises:
        ValueError: A weight is missing, unknown, or has another shape.
    """
    found, wanted = flatten(params), flatten(expected)
    if odd := sorted(found.keys() ^ wanted.keys()):
        problem = "lack" if odd[0] in wanted else "have an unknown weight"
        raise ValueError(f"params {problem} {odd[0]}: they must have the names of the model's own params.")
    for name, value in found.items():
        if tuple(value.shape) != tuple(wanted[name].shape):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but must have {tuple(wanted[name].shape)}.")


class Stacker:
    """Collects the tensors of a checkpoint as weights, on their devices; those of stacked layers fill one array.

    Args:
        layers: Number of layers.
        dtype: Of the weights.
        shardings: The sharding of every weight, or None, by its name.
        packed: Puts a weight into its final form, if that is not one array.

    Attributes:
        arrays: The weights so far, by dotted names.
    """

    def __init__(
        self, layers: int, dtype: Any, shardings: Mapping[str, Any], packed: Callable[[Any], Any] | None = None
    ) -> None:
        self._layers, self._dtype, self._shardings, self._packed = layers, dtype, shardings, packed
        self.arrays: dict[str, Any] = {}

    def put(self, name: str, layer: int | None, tensor: Any) -> None:
        """Add a tensor as the weight `name`, or as one layer of it, and wait until the tensor is no longer needed."""
        tensor = tensor if tensor.dtype == self._dtype else tensor.astype(self._dtype)
        sharding = self._shardings[name]
        if layer is None or self._packed is not None:
            tensor = jax.device_put(tensor, sharding if layer is None else None)
        if self._packed is not None:
            tensor = self._packed(tensor)
        if layer is None:
            self.arrays[name] = tensor
        else:
            if name not in self.arrays:
                self.arrays[name] = jax.tree.map(partial(self._stack, sharding=sharding), tensor)
            self.arrays[name] = _set_layer(self.arrays[name], tensor, layer)
        jax.block_until_ready(self.arrays[name])

    def _stack(self, tensor: Any, sharding: Any) -> Array:
        """Zeros for all layers."""
        return jnp.zeros((self._layers, *tensor.shape), tensor.dtype, device=sharding)


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: Any, tensor: Any, layer: Any) -> Any:
    return jax.tree.map(lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, layer, axis=0), stack, tensor)


def tensors_of(abstract: Params, layers: int, stacked: bool) -> dict[str, tuple[str, int | None, Shape]]:
    """The tensors of a checkpoint by name: the weight that holds each, its index among stacked layers, its shape."""
    tensors: dict[str, tuple[str, int | None, Shape]] = {}
    for name, leaf in flatten(abstract).items():
        if stacked and "layers." in name:
            for layer in range(layers):
                tensors[name.replace("layers.", f"layers.{layer}.", 1)] = (name, layer, tuple(leaf.shape[1:]))
        else:
            tensors[name] = (name, None, tuple(leaf.shape))
    return tensors
