"""Losses of the TensorFlow heads, in float32.

Where every label is ignored, a loss is 0 with zero gradients. Outside of graphs, a warning reports it; a graph, whose
values are unknown while it is traced, computes the same without one.

Legend: B batch, S tokens, N labels, E hidden_size, V vocabulary, C classes or regression targets.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from ..configuration_mistral import MistralConfig
from .shapes import Tensor, larger, size, slice_axis, smaller

IGNORE_INDEX = -100


def token_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of tokens with the labels at their own positions.

    Args:
        logits: ``[B, S, C]``.
        labels: ``[B, S]`` ids of classes or tokens, -100 where the loss ignores them.
        label_smoothing: Share of the target probability that is spread evenly over the classes (Szegedy et al., 2016).

    Returns:
        A scalar; 0 if all labels are ignored.

    Raises:
        ValueError: A label lies outside the classes (checked outside of graphs), or the shapes do not fit.
    """
    _check_shape(labels, logits)
    return _cross_entropy(tf.reshape(logits, [-1, logits.shape[-1]]), tf.reshape(labels, [-1]), label_smoothing)


def chunked_token_loss(
    states: Tensor, head: Tensor, labels: Tensor, chunk_size: int, label_smoothing: float = 0.0
) -> Tensor:
    """`token_loss` of ``states head^T``, from the logits of `chunk_size` tokens at a time.

    They are computed once more for the gradients, which cannot be differentiated again.

    Args:
        states: ``[B, S, E]``.
        head: ``[V, E]``.
        labels: See `token_loss`.
        chunk_size: Number of tokens whose logits are in memory together.
        label_smoothing: See `token_loss`.
    """
    _check_shape(labels, states)
    count = size(states, 0) * size(states, 1)
    chunk = smaller(chunk_size, larger(count, 1))
    chunks = -(-count // chunk)
    fill = chunks * chunk - count
    rows = tf.pad(tf.reshape(states, [-1, states.shape[-1]]), [[0, fill], [0, 0]])
    targets = tf.pad(tf.reshape(labels, [-1]), [[0, fill]], constant_values=IGNORE_INDEX)

    def loss_of(index: Tensor, rows: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of a chunk's losses, and its rows of states, of which they are a function."""
        part, labels = slice_axis(rows, 0, index * chunk, chunk), slice_axis(targets, 0, index * chunk, chunk)
        return _summed(tf.matmul(part, head, transpose_b=True), labels, label_smoothing), part

    @tf.custom_gradient
    def total(rows: Tensor, head: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]:
        def add(index: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
            return index + 1, total + loss_of(index, rows, head)[0]

        def gradients(factor: Tensor) -> tuple[Tensor, Tensor]:
            def differentiate(index: Tensor, parts: tf.TensorArray, grad_head: Tensor) -> tuple[Any, ...]:
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch((rows, head))
                    loss, part = loss_of(index, rows, head)
                grad_part, grad_chunk = tape.gradient(loss, (part, head))
                return index + 1, parts.write(index, grad_part), grad_head + tf.cast(grad_chunk, tf.float32)

            parts = tf.TensorArray(rows.dtype, chunks, element_shape=[chunk if isinstance(chunk, int) else None, width])
            start = tf.constant(0), parts, tf.zeros(head.shape)
            _, parts, grad_head = tf.while_loop(unfinished, differentiate, start, parallel_iterations=1)
            grad_rows = tf.reshape(parts.stack(), [-1, width])
            return grad_rows * tf.cast(factor, rows.dtype), tf.cast(grad_head * factor, head.dtype)

        width = rows.shape[1]
        return tf.while_loop(unfinished, add, (tf.constant(0), tf.constant(0.0)), parallel_iterations=1)[1], gradients

    def unfinished(index: Tensor, *others: Any) -> Tensor:
        return index < chunks

    return _mean(total(rows, head), targets != IGNORE_INDEX)


def classification_loss(logits: Tensor, labels: Tensor, config: MistralConfig) -> Tensor:
    """Loss of a sequence classification head, by `MistralConfig.problem_type_for`.

    Args:
        logits: ``[B, C]``.
        labels: ``[B]`` class ids, -100 where the loss ignores them; or ``[B, C]`` (``[B]`` if C is 1) targets.
        config: With `num_labels` and `problem_type`.

    Returns:
        A scalar: mean squared error, cross-entropy (0 if all labels are ignored) or binary cross-entropy.

    Raises:
        ValueError: The problem type is unknown, or the labels do not fit it.
    """
    problem = config.problem_type_for(floating_point=labels.dtype.is_floating)
    if problem == "single_label_classification":
        return _cross_entropy(logits, tf.reshape(labels, [-1]))
    count = math.prod(labels.shape[1:])
    if count != logits.shape[1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit {problem} with num_labels={config.num_labels}:"
            f" {tuple(logits.shape)} is needed. Set num_labels or problem_type in the config."
        )
    logits, targets = tf.cast(logits, tf.float32), tf.cast(tf.reshape(labels, [-1, count]), tf.float32)
    if problem == "regression":
        return tf.reduce_mean(tf.square(logits - targets))
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits))


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the labels ``[N]`` that are not ignored, for logits ``[N, C]``."""
    check_labels(labels, logits.shape[-1])
    return _mean(_summed(logits, labels, label_smoothing), labels != IGNORE_INDEX)


def _summed(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Sum over the labels ``[N]`` that are not ignored, for logits ``[N, C]``."""
    kept, logits = labels != IGNORE_INDEX, tf.cast(logits, tf.float32)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.where(kept, labels, 0), logits=logits)
    if label_smoothing:
        even = -tf.reduce_mean(tf.nn.log_softmax(logits), axis=-1)  # cross-entropy with a uniform distribution
        losses = (1 - label_smoothing) * losses + label_smoothing * even
    return tf.reduce_sum(tf.where(kept, losses, 0.0))


def _mean(total: Tensor, kept: Tensor) -> Tensor:
    """A sum of losses divided by the number of labels that are kept."""
    count = tf.math.count_nonzero(kept)
    if tf.executing_eagerly() and count == 0:
        warnings.warn(
            f"All labels of a batch are ignored ({IGNORE_INDEX}): its loss is 0, and so are its gradients. If this"
            " is not intended, check the collator, the truncation and the masking of prompts.",
            stacklevel=2,
        )
    return total / tf.cast(tf.maximum(count, 1), tf.float32)


def _check_shape(labels: Tensor, states: Tensor) -> None:
    if labels.shape.rank != 2 or not labels.shape.is_compatible_with(states.shape[:2]):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit an output of shape {tuple(states.shape)}: one label for"
            " each token is needed."
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """Check that labels are integers and, outside of graphs, that those that count lie within the classes.

    Raises:
        ValueError: They are not.
    """
    if not labels.dtype.is_integer:
        raise ValueError(f"labels are {labels.dtype.name}, but must be integers: the ids of tokens or classes.")
    if not tf.executing_eagerly():
        return
    wrong = tf.boolean_mask(labels, (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= classes)))
    if tf.size(wrong) > 0:
        raise ValueError(
            f"labels hold {int(wrong[0])}, but must lie in [0, {classes}), or be {IGNORE_INDEX} to be ignored."
        )
