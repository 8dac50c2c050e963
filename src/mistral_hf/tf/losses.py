"""Losses of the TensorFlow heads, in float32.

Where every label is ignored, a loss is 0 with zero gradients; outside of graphs, a warning reports it.

Legend: B batch, S tokens, N labels, V vocabulary, C classes or regression targets.
"""

from __future__ import annotations

import math
import warnings

import tensorflow as tf

from ..configuration_mistral import MistralConfig
from .shapes import Tensor

IGNORE_INDEX = -100


def language_model_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of the next token.

    Args:
        logits: ``[B, S, V]``.
        labels: ``[B, S]`` token ids, -100 where the loss ignores them; the logits at a position predict the label of
            the next position.
        label_smoothing: Share of the target probability that is spread evenly over the vocabulary (Szegedy et al.,
            2016).

    Returns:
        A scalar; 0 if all labels are ignored.

    Raises:
        ValueError: A label lies outside the vocabulary (checked outside of graphs), or the shapes do not fit.
    """
    if labels.shape.rank != 2 or logits.shape[1] != labels.shape[1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: one label for"
            " each token is needed."
        )
    next_labels = tf.reshape(labels[:, 1:], [-1])
    return _cross_entropy(tf.reshape(logits[:, :-1], [-1, logits.shape[-1]]), next_labels, label_smoothing)


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
    kept = labels != IGNORE_INDEX
    _check_labels(labels, kept, logits.shape[-1])
    logits = tf.cast(logits, tf.float32)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=tf.where(kept, labels, 0), logits=logits)
    if label_smoothing:
        even = -tf.reduce_mean(tf.nn.log_softmax(logits), axis=-1)  # cross-entropy with a uniform distribution
        losses = (1 - label_smoothing) * losses + label_smoothing * even
    count = tf.math.count_nonzero(kept)
    if tf.executing_eagerly() and count == 0:
        warnings.warn(
            f"All labels of a batch are ignored ({IGNORE_INDEX}): its loss is 0, and so are its gradients. If this"
            " is not intended, check the collator, the truncation and the masking of prompts.",
            stacklevel=2,
        )
    return tf.reduce_sum(tf.where(kept, losses, 0.0)) / tf.cast(tf.maximum(count, 1), tf.float32)


def _check_labels(labels: Tensor, kept: Tensor, classes: int) -> None:
    """Check that labels are integers and, outside of graphs, that those that are kept lie within the classes.

    Raises:
        ValueError: They are not.
    """
    if not labels.dtype.is_integer:
        raise ValueError(f"labels are {labels.dtype.name}, but must be integers: the ids of tokens or classes.")
    if not tf.executing_eagerly():
        return
    wrong = tf.boolean_mask(labels, kept & ((labels < 0) | (labels >= classes)))
    if tf.size(wrong) > 0:
        raise ValueError(
            f"labels hold {int(wrong[0])}, but must lie in [0, {classes}), or be {IGNORE_INDEX} to be ignored."
        )
