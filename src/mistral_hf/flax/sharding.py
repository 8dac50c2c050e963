"""How the weights and inputs of the JAX models are spread over several devices.

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
    (r"score\.weight", PartitionSpec(None, None)),  # a few classes
)
"""The end of a weight's name, and how its axes ``[out, in]`` are spread over the mesh."""


def weight_sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """How a weight is spread over the mesh.

    Args:
        name: Its Hugging Face name.
        shape: Its shape; axes before those of the rule (of stacked layers) are not spread.
        mesh: Devices with the axes ``data`` and ``model``.

    Raises:
        ValueError: The axis to spread is not divisible by the number of devices.
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
    """Check that a mesh has the axes ``data`` and ``model``.

    Raises:
        ValueError: It has other axes.
    """
    if tuple(mesh.axis_names) != AXES:
        raise ValueError(
            f"The mesh has the axes {mesh.axis_names!r}, but must have {AXES!r}; the size of either may be 1."
        )


def shard_rows(batch: Any, mesh: Mesh | None) -> Array:
    """Put an array ``[B, ...]`` on the devices, its rows spread over the data axis if that divides their number."""
    if mesh is None:
        return jax.numpy.asarray(batch)
    spread = batch.shape[0] % mesh.shape["data"] == 0
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data" if spread else None)))
