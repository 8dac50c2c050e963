"""Sizes and slices of tensors whose shapes may be known only at run time."""

from __future__ import annotations

from typing import Any, TypeAlias

import tensorflow as tf

Tensor: TypeAlias = Any
Size: TypeAlias = Any  # an integer where the shape is known while tracing, else a scalar tensor


def size(tensor: Tensor, axis: int) -> Size:
    """The length of an axis."""
    known = tensor.shape[axis]
    return tf.shape(tensor)[axis] if known is None else known


def smaller(a: Size, b: Size) -> Size:
    """The smaller of two sizes."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else tf.minimum(a, b)


def larger(a: Size, b: Size) -> Size:
    """The larger of two sizes."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else tf.maximum(a, b)


def slice_axis(tensor: Tensor, axis: int, start: Size, count: Size) -> Tensor:
    """`count` elements of an axis from `start`."""
    begin, shape = [0] * tensor.shape.rank, [-1] * tensor.shape.rank
    begin[axis], shape[axis] = start, count
    part = tf.slice(tensor, begin, shape)
    known = tensor.shape.as_list()
    known[axis] = count if isinstance(count, int) else None
    part.set_shape(known)
    return part
