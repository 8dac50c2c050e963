"""The language-model loss of the JAX port, which never holds all logits.

Legend: B batch, S tokens, N tokens of a chunk, E hidden_size, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from .layers import linear

IGNORE_INDEX = -100
CHUNK = 1024  # tokens whose logits exist together


def causal_lm_loss(
    states: Array,
    output_weight: Array,
    labels: Array,
    chunk: int = CHUNK,
    *,
    position_ids: Array | None = None,
    label_smoothing: float = 0.0,
) -> Array:
    """Mean cross-entropy of the next tokens.

    Logits are computed for `chunk` tokens at a time, and again in the backward pass.

    Args:
        states: ``[B, S, E]``, the decoder's output.
        output_weight: ``[V, E]``.
        labels: ``[B, S]`` token ids, ``-100`` where the loss ignores them; they are shifted inside.
        chunk: Number of tokens whose logits exist together.
        position_ids: ``[B or 1, S]``; where they restart, a label is not predicted from the sequence before.
        label_smoothing: Share of the target probability that is spread evenly over the vocabulary.

    Returns:
        A float32 scalar; 0 if all labels are ignored.
    """
    targets = next_labels(labels)
    if position_ids is not None:
        targets = within_sequences(targets, position_ids)
    targets = targets.reshape(-1)
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


def next_labels(labels: Array) -> Array:
    """The label that each position of ``[B, S]`` predicts; the last one predicts none."""
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)


def within_sequences(targets: Array, position_ids: Array) -> Array:
    """Ignore labels that would be predicted from another packed sequence.

    Args:
        targets: ``[B, S]``, the label that each position predicts.
        position_ids: ``[B or 1, S]``; a sequence begins where they restart.
    """
    ends = jnp.pad(jnp.diff(position_ids, axis=1) != 1, ((0, 0), (0, 1)), constant_values=True)
    return jnp.where(ends, IGNORE_INDEX, targets)
