"""JAX models with the weights of PyTorch ones; importing this skips a module where the port cannot run."""

from typing import Any

import numpy as np
import pytest
import torch

import mistral_hf

_REASON = "the JAX port needs pip install 'mistral_hf[flax]'"
jax = pytest.importorskip("jax", reason=_REASON)
nnx = pytest.importorskip("flax.nnx", reason=_REASON)
jnp = jax.numpy
jax.config.update("jax_disable_most_optimizations", True)  # tiny models compile longer than they run


def array(tensor: torch.Tensor) -> Any:
    """A tensor as a NumPy array, bfloat16 as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A batch of tensors as NumPy arrays."""
    return {name: array(tensor) for name, tensor in inputs.items()}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts from values by dotted names."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return tree


def to_flax(model: Any, dtype: Any = "float32", **options: Any) -> Any:
    """The JAX model of the same head, configuration and weights; layers are not stacked."""
    twin = getattr(mistral_hf, f"Flax{type(model).__name__}")(model.config, dtype=dtype, **options)
    flat = {name: array(weight).astype(twin.dtype) for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        flat.pop("lm_head.weight", None)
    twin.params = nested(flat)
    return twin


def stacked(twin: Any) -> Any:
    """The same model with scanned layers, whose weights share one array."""
    scanned = type(twin)(twin.config, dtype=twin.dtype, scan_layers=True)
    decoder = twin.params["model"]
    layers = [decoder["layers"][str(number)] for number in range(twin.config.num_hidden_layers)]
    stack = jax.tree.map(lambda *weights: jnp.stack(weights), *layers)
    scanned.params = {**twin.params, "model": {**decoder, "layers": stack}}
    return scanned


def leaves(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by dotted names."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def differences(found: Any, expected: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """The largest absolute difference, at the positions ``[B, S]`` that a mask marks."""
    error = np.abs(np.asarray(found, np.float64) - expected.detach().double().numpy())
    return float(error.max() if where is None else error[where.bool().numpy()].max())
