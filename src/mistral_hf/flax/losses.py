"""Losses of the JAX models; that of a language model never holds all logits.

Where every label is ignored, a loss is 0 with zero gradients; `validation.warn_if_all_ignored` reports it.

Legend: B batch, S tokens, N tokens of a chunk, E hidden_size, V vocabulary, C classes or regression targets.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from .weights import Weight, linear

IGNORE_INDEX = -100
CHUNK = 1024  # tokens whose logits exist together, unless the configuration has a loss_chunk_size


def causal_lm_loss(
    states: Array,
    output_weight: Weight,
    labels: Array,
    chunk: int = CHUNK,
    *,
    label_smoothing: float = 0.0,
) -> Array:
    """Mean cross-entropy of the next tokens.

    Logits are computed for `chunk` tokens at a time, and again in the backward pass.

    Args:
        states: ``[B, S, E]``, the decoder's output.
        output_weight: ``[V, E]``.
        labels: ``[B, S]``, the token id that each position predicts, ``-100`` where the loss ignores it; see
            `predicted_labels`.
        chunk: Number of tokens whose logits exist together.
        label_smoothing: Share of the target probability that is spread evenly over the vocabulary.

    Returns:
        A float32 scalar; 0 if all labels are ignored.
    """
    targets = labels.reshape(-1)
    states = states.reshape(-1, states.shape[-1])
    chunk = min(chunk, len(targets))
    padding = -len(targets) % chunk
    states = jnp.pad(states, ((0, padding), (0, 0))).reshape(-1, chunk, states.shape[-1])
    targets = jnp.pad(targets, (0, padding), constant_values=IGNORE_INDEX).reshape(-1, chunk)

    @jax.checkpoint
    def loss_of(total: Array, inputs: tuple[Array, Array]) -> tuple[Array, None]:
        states, targets = inputs
        logits = linear(states.astype(jnp.float32), output_weight.astype(jnp.float32))
        log_probs = jax.nn.log_softmax(logits)
        losses = _smoothed(log_probs, jnp.maximum(targets, 0), label_smoothing)
        return total + jnp.where(targets == IGNORE_INDEX, 0, losses).sum(), None

    total, _ = lax.scan(loss_of, jnp.zeros((), jnp.float32), (states, targets))
    return total / jnp.maximum((targets != IGNORE_INDEX).sum(), 1)


def _smoothed(log_probs: Array, targets: Array, label_smoothing: float) -> Array:
    """Cross-entropies ``[N]`` from ``[N, V]``, with a share of each target spread evenly over the vocabulary."""
    losses = -jnp.take_along_axis(log_probs, targets[:, None], axis=1)[:, 0]
    if not label_smoothing:
        return losses
    return (1 - label_smoothing) * losses - label_smoothing * log_probs.mean(axis=-1)


def real_labels(ids: Array, mask: Array) -> Array:
    """Ids ``[B, S]`` as labels, ignored where they are padding or follow padding."""
    real = mask.astype(bool)
    return jnp.where(real & jnp.pad(real, ((0, 0), (1, 0)))[:, :-1], ids, IGNORE_INDEX)


def predicted_labels(ids: Array, mask: Array | None, position_ids: Array | None, labels: Array | None) -> Array:
    """The label ``[B, S]`` that each position predicts, for the arguments of a language model's loss."""
    if labels is None:
        labels = ids if mask is None else real_labels(ids, mask)
    return next_labels(labels, position_ids if mask is None else None)  # under a mask, a row is one sequence


def next_labels(labels: Array, position_ids: Array | None = None) -> Array:
    """The label that each position of ``[B, S]`` predicts; the last one predicts none.

    Args:
        labels: ``[B, S]``.
        position_ids: ``[B or 1, S]``; where they restart, a label is not predicted from the sequence before.
    """
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    if position_ids is None:
        return targets
    ends = jnp.pad(jnp.diff(position_ids, axis=1) != 1, ((0, 0), (0, 1)), constant_values=True)
    return jnp.where(ends, IGNORE_INDEX, targets)


def classification_loss(logits: Array, labels: Array, problem: str) -> Array:
    """Loss of a sequence classification head, in float32.

    Args:
        logits: ``[B, C]``.
        labels: ``[B]`` class ids, -100 where the loss ignores them; or ``[B, C]`` (``[B]`` if C is 1) targets.
        problem: As `MistralConfig.problem_type_for` gives it.

    Returns:
        A scalar: mean squared error, cross-entropy (0 if all labels are ignored) or binary cross-entropy.
    """
    logits = logits.astype(jnp.float32)
    if problem == "single_label_classification":
        labels = labels.reshape(-1)
        losses = _smoothed(jax.nn.log_softmax(logits), jnp.maximum(labels, 0), 0.0)
        kept = labels != IGNORE_INDEX
        return jnp.where(kept, losses, 0).sum() / jnp.maximum(kept.sum(), 1)
    targets = labels.reshape(logits.shape).astype(jnp.float32)
    if problem == "regression":
        return jnp.square(logits - targets).mean()
    return (jax.nn.softplus(logits) - targets * logits).mean()
