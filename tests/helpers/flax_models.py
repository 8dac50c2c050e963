"""JAX models with the weights of PyTorch models, for the tests of the JAX port."""

from typing import Any

import numpy as np
import pytest
import torch

import mistral_hf

jax = pytest.importorskip("jax", reason="the JAX port needs jax")
nnx = pytest.importorskip("flax.nnx", reason="the JAX port needs flax")
jnp = jax.numpy
jax.config.update("jax_disable_most_optimizations", True)  # tiny models compile longer than they run


def array(tensor: torch.Tensor) -> Any:
    """A tensor as a NumPy array, bfloat16 as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def arrays(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {name: array(tensor) for name, tensor in inputs.items()}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted names as nested dicts."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        inner = tree
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = value
    return tree


def flax_twin(model: Any, dtype: Any = "float32", **options: Any) -> Any:
    """The JAX model with the configuration and the weights of a PyTorch model; layers stay apart."""
    twin = getattr(mistral_hf, f"Flax{type(model).__name__}")(model.config, dtype=dtype, **options)
    flat = {name: array(weight).astype(twin.dtype) for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        flat.pop("lm_head.weight", None)
    twin.params = nested(flat)
    return twin


def stacked(twin: Any) -> Any:
    """The same model with the weights of its layers in one."""
    scanned = type(twin)(twin.config, dtype=twin.dtype, scan_layers=True)
    decoder = twin.params["model"]
    layers = [decoder["layers"][str(number)] for number in range(twin.config.num_hidden_layers)]
    together = jax.tree.map(lambda *weights: jnp.stack(weights), *layers)
    scanned.params = {**twin.params, "model": {**decoder, "layers": together}}
    return scanned


def leaves(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by dotted names."""
    return {".".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def differences(found: Any, expected: torch.Tensor, where: torch.Tensor | None = None) -> float:
    """The largest absolute difference, at the positions ``[B, S]`` that a mask marks."""
    error = np.abs(np.asarray(found, np.float64) - expected.detach().double().numpy())
    return float(error.max() if where is None else error[where.bool().numpy()].max())
