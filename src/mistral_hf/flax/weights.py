"""Weights of linear maps and embeddings in other forms than one array: int8 for decoding, and with a LoRA adapter.

They are pytrees that stand in the place of the array in a model's `params`; whoever multiplies by a weight calls
`linear`.

Legend: R rank of an adapter, V vocabulary, E hidden_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

FEW_ROWS = 4  # so few are multiplied by int8 weights as they lie; for more, the weights are converted first

# XLA splits a long sum in two on a CPU, and stores the terms between them: then nothing is saved by reading int8.
CPU_OPTIONS = {
    "xla_disable_hlo_passes": "tree_reduction_rewriter",
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_prefer_vector_width": 512,
}
"""Options of XLA for programs that multiply few rows by int8 weights."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """A weight in int8 with a factor for every output: ``values * scale[:, None]``.

    Attributes:
        values: ``[out, in]`` int8; more axes may come before.
        scale: ``[out]`` float32.
        dtype: Name of the dtype that the weight had.
    """

    values: Array
    scale: Array
    dtype: Any = field(metadata={"static": True})

    @classmethod
    def of(cls, weight: Any) -> Int8Weight:
        """The nearest int8 weight: the largest value of every output is 127 or -127."""
        values, scale = _quantized(jnp.asarray(weight))
        return cls(values, scale, jnp.dtype(weight.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return tuple(self.values.shape)

    def astype(self, dtype: Any) -> Int8Weight:
        """The same weight, which counts as one in another dtype."""
        return replace(self, dtype=jnp.dtype(dtype))

    def dense(self) -> Array:
        """The weight as one array in its dtype."""
        return (self.values * self.scale[..., None]).astype(self.dtype)

    def rows(self, ids: Array) -> Array:
        """The rows of an embedding ``[V, E]`` with these ids ``[...]``, ``[..., E]``."""
        return (jnp.take(self.values, ids, axis=0) * jnp.take(self.scale, ids, axis=0)[..., None]).astype(self.dtype)

    def product(self, states: Array) -> Array:
        """``states @ weight.T`` in float32."""
        # Else the compiler converts all weights before a loop, and keeps them in float32.
        values, states = lax.optimization_barrier((self.values, states))
        if math.prod(states.shape[:-1]) > FEW_ROWS:
            return _product(states, values.astype(states.dtype)) * self.scale
        wide = states.astype(jnp.float32)[..., None, :]
        return (values.astype(jnp.float32) * wide).sum(axis=-1) * self.scale


@jax.jit
def _quantized(weight: Array) -> tuple[Array, Array]:
    wide = weight.astype(jnp.float32)
    scale = jnp.abs(wide).max(axis=-1) / 127
    values = jnp.round(wide / jnp.where(scale == 0, 1, scale)[..., None])
    return values.astype(jnp.int8), scale


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedWeight:
    """A weight with a low-rank addition (Hu et al., 2021): ``base + scaling * up @ down``.

    Attributes:
        base: ``[out, in]``, an array or an `Int8Weight`; more axes may come before.
        down: ``[R, in]``, PEFT's ``lora_A``.
        up: ``[out, R]``, PEFT's ``lora_B``.
        scaling: The strength of the addition.
    """

    base: Array | Int8Weight
    down: Array
    up: Array
    scaling: float = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> Any:
        """That of the base."""
        return self.base.dtype

    def astype(self, dtype: Any) -> AdaptedWeight:
        """The same weight in another dtype."""
        return replace(self, base=self.base.astype(dtype), down=self.down.astype(dtype), up=self.up.astype(dtype))

    def dense(self) -> Array:
        """The weight as one array in the dtype of the base."""
        base = self.base.dense() if isinstance(self.base, Int8Weight) else self.base
        addition = jnp.matmul(self.up, self.down, preferred_element_type=jnp.float32, precision="highest")
        return (base.astype(jnp.float32) + self.scaling * addition).astype(self.dtype)

    def product(self, states: Array) -> Array:
        """``states @ weight.T`` in float32."""
        inner = linear(states, self.down.astype(states.dtype))
        addition = _product(inner, self.up.astype(states.dtype))
        return linear(states, self.base).astype(jnp.float32) + self.scaling * addition


Weight: TypeAlias = Array | Int8Weight | AdaptedWeight
PACKED = (Int8Weight, AdaptedWeight)


def linear(states: Array, weight: Weight) -> Array:
    """``states @ weight.T``, accumulated in float32 and returned in the dtype of `states`."""
    product = weight.product(states) if isinstance(weight, PACKED) else _product(states, weight)
    return product.astype(states.dtype)


def embedded(ids: Array, weight: Weight) -> Array:
    """The rows ``[..., E]`` of an embedding ``[V, E]`` with the ids ``[...]``."""
    return weight.rows(ids) if isinstance(weight, Int8Weight) else jnp.take(weight, ids, axis=0)


def leaves_of(params: Any) -> list[Any]:
    """The weights in a tree, each one value in whatever form."""
    leaves: list[Any] = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, PACKED))
    return leaves


def _product(states: Array, weight: Array) -> Array:
    contract = (((states.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    return lax.dot_general(states, weight, contract, preferred_element_type=jnp.float32)
