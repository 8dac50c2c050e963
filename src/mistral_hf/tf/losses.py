"""Losses of the TensorFlow heads, in float32.

Legend: B batch, S tokens, V vocabulary, C classes or regression targets.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import tensorflow as tf

from ..configuration_mistral import MistralConfig

Tensor: TypeAlias = Any
IGNORE_INDEX = -100


def language_model_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token.

    Args:
        logits: ``[B, S, V]``.
        labels: ``[B, S]`` token ids, -100 where there is no loss; the token at a place is the label of the one before.

    Returns:
        A scalar; NaN if no label counts.

    Raises:
        ValueError: A label lies outside the vocabulary (checked outside of graphs), or the shapes do not fit.
    """
    if labels.shape.rank != 2 or logits.shape[1] != labels.shape[1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}.")
    return _cross_entropy(tf.reshape(logits[:, :-1], [-1, logits.shape[-1]]), tf.reshape(labels[:, 1:], [-1]))


def classification_loss(logits: Tensor, labels: Tensor, config: MistralConfig) -> Tensor:
    """Loss of a sequence classification head, by ``config.problem_type``.

    Where that is None, one output means regression, integer labels mean single-label and others multi-label
    classification.

    Args:
        logits: ``[B, C]``.
        labels: ``[B]`` class ids, or ``[B, C]`` (``[B]`` if C is 1) targets.
        config: With `num_labels` and `problem_type`.

    Returns:
        A scalar: mean squared error, cross-entropy or binary cross-entropy.

    Raises:
        ValueError: The problem type is unknown, or the labels do not fit it.
    """
    problem = config.problem_type_for(floating_point=labels.dtype.is_floating)
    if problem == "single_label_classification":
        return _cross_entropy(logits, tf.reshape(labels, [-1]))
    targets = 1
    for count in labels.shape[1:]:
        targets *= count
    if targets != logits.shape[1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit {problem} with num_labels={config.num_labels}:"
            f" {tuple(logits.shape)} is needed. Set num_labels or problem_type in the config."
        )
    wide, wanted = tf.cast(logits, tf.float32), tf.cast(tf.reshape(labels, [-1, targets]), tf.float32)
    if problem == "regression":
        return tf.reduce_mean(tf.square(wide - wanted))
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=wanted, logits=wide))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels of ``[N]`` that count, for logits ``[N, classes]``."""
    if not labels.dtype.is_integer:
        raise ValueError(f"labels are {labels.dtype.name}, but must be integers: the ids of tokens or classes.")
    classes, counts = logits.shape[-1], labels != IGNORE_INDEX
    if tf.executing_eagerly():
        wrong = tf.boolean_mask(labels, counts & ((labels < 0) | (labels >= classes)))
        if tf.size(wrong) > 0:
            raise ValueError(f"labels hold {int(wrong[0])}, but must lie in [0, {classes}), or be -100 to be ignored.")
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(
        labels=tf.where(counts, labels, 0), logits=tf.cast(logits, tf.float32)
    )
    return tf.reduce_sum(tf.where(counts, losses, 0.0)) / tf.cast(tf.math.count_nonzero(counts), tf.float32)
