"""Sizes and slices of tensors whose shapes may be known only at run time."""

from __future__ import annotations

from typing import Any, TypeAlias

import tensorflow as tf

Tensor: TypeAlias = Any
Size: TypeAlias = Any
"""A Python integer where a shape is known while tracing, a scalar tensor where it is not."""


def size(tensor: Tensor, axis: int) -> Size:
    """The length of an axis."""
    known = tensor.shape[axis]
    return tf.shape(tensor)[axis] if known is None else known


def _least(a: Size, b: Size | None) -> Size:
    if b is None:
        return a
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tf.minimum(a, b)


def _most(a: Size, b: Size) -> Size:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tf.maximum(a, b)


def _cut(tensor: Tensor, axis: int, first: Size, count: Size) -> Tensor:
    """`count` places of an axis from `first` on, which may be known only at run time."""
    begin, shape = [0] * tensor.shape.rank, [-1] * tensor.shape.rank
    begin[axis], shape[axis] = first, count
    part = tf.slice(tensor, begin, shape)
    known = tensor.shape.as_list()
    known[axis] = count if isinstance(count, int) else None
    part.set_shape(known)
    return part
