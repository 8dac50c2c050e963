"""Where the weights and inputs of the JAX model lie on many devices.

A mesh has the axes ``data`` (rows of a batch) and ``model`` (heads, features and vocabulary: tensor parallelism).
"""

from __future__ import annotations

import re
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXES = ("data", "model")

PARTITION_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(embed_tokens|lm_head)\.weight", PartitionSpec("model", None)),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight", PartitionSpec("model", None)),
    (r"(o_proj|down_proj)\.weight", PartitionSpec(None, "model")),
    (r"norm\.weight", PartitionSpec(None)),
)
"""The end of a weight's name, and how its axes ``[out, in]`` are spread over the mesh."""


def weight_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The place of a weight on the mesh.

    Args:
        name: Its Hugging Face name.
        shape: Its shape; axes before those of the rule (of stacked layers) are not spread.
        mesh: With the axes ``data`` and ``model``.

    Raises:
        ValueError: The axis that the rule spreads does not divide among the devices.
    """
    rule = next(spec for pattern, spec in PARTITION_RULES if re.search(rf"{pattern}$", name))
    spec = (*[None] * (len(shape) - len(rule)), *rule)
    for size, axis in zip(shape, spec, strict=True):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{name} {shape} cannot be spread over {mesh.shape[axis]} devices, as {size} is not divisible by that:"
                f" make the mesh's axis {axis!r} smaller."
            )
    return NamedSharding(mesh, PartitionSpec(*spec))


def check_mesh(mesh: Mesh) -> None:
    """Raise `ValueError` unless a mesh has the axes ``data`` and ``model``."""
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(f"The mesh has the axes {mesh.axis_names!r}, but must have {AXES!r}, one of them may be 1.")


def place_rows(batch: Any, mesh: Mesh | None) -> Array:
    """Put an array ``[B, ...]`` on the devices, its rows spread over the data axis if they divide among it."""
    if mesh is None:
        return jax.numpy.asarray(batch)
    spread = batch.shape[0] % mesh.shape["data"] == 0
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data" if spread else None)))
