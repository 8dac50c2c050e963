"""Losses that use ``num_items_in_batch``, so that accumulated gradients equal those of the large batch.

Where every label is ignored, a loss is 0 with zero gradients, and on a CPU there is a warning.

Legend: B batch, S tokens, N = B * S, E hidden_size, V vocabulary, C classes or regression targets.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.configuration_utils import PreTrainedConfig

from .linear import is_plain_linear, linear
from .sequence_layout import starts_of_sequences
from .tracing import has_values, reads_freely, runs_untransformed
from .validation import IGNORE_INDEX, check_labels

BLOCK_ELEMENTS = 1 << 22  # logits that are converted to float32 together


def language_model_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of the next tokens, from all logits; arguments as of the library's loss functions.

    Args:
        logits: ``[B, S, V]``.
        labels: ``[B, S]`` token ids; the logits of a token predict the label of the next one.
        vocab_size: V.
        num_items_in_batch: Number of labels in all batches whose gradients are accumulated; None takes the mean.
        ignore_index: Label that the loss ignores.
        shift_labels: ``[B, S]``, the label that each token predicts, in place of `labels`.
        label_smoothing: Share of the target probability that is spread evenly over the vocabulary.

    Returns:
        A scalar in at least float32.
    """
    targets = next_labels(labels, ignore_index) if shift_labels is None else shift_labels
    targets = targets.reshape(-1).to(logits.device)
    total = _cross_entropy_sum(logits.reshape(-1, vocab_size), targets, ignore_index, label_smoothing)
    return _mean(total, targets != ignore_index, num_items_in_batch)


def chunked_language_model_loss(
    hidden_states: Tensor,
    head: nn.Module,
    labels: Tensor,
    chunk_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = IGNORE_INDEX,
    shift_labels: Tensor | None = None,
    label_smoothing: float = 0.0,
    **kwargs: Any,
) -> Tensor:
    """`language_model_loss` of ``head(hidden_states)``, with the logits of `chunk_size` tokens at a time.

    A plain linear head gets its gradients in the forward pass, chunk by chunk, so no logits are computed twice (as in
    Hsu et al., 2024, Liger Kernel). Any other head (adapted, quantized, sharded, hooked) is called as a module, and
    again in the backward pass.

    Args:
        hidden_states: ``[B, S, E]``.
        head: The output layer, E to V.
        chunk_size: Number of tokens whose logits are in memory together.
        labels, num_items_in_batch, ignore_index, shift_labels, label_smoothing: See `language_model_loss`.

    Returns:
        A scalar in at least float32.

    Raises:
        ValueError: `chunk_size` is not positive, or the labels and the input differ in shape.
    """
    if chunk_size < 1:
        raise ValueError(f"loss_chunk_size={chunk_size} must be at least 1 token, or None for all tokens together.")
    targets = next_labels(labels, ignore_index) if shift_labels is None else shift_labels
    if targets.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels of shape {tuple(targets.shape)} do not fit an input of shape {tuple(hidden_states.shape[:-1])}."
        )
    targets, hidden_states = targets.reshape(-1).to(hidden_states.device), hidden_states.flatten(0, -2)  # [N], [N, E]

    def loss_of(hidden_states: Tensor, targets: Tensor) -> Tensor:
        logits = linear(head, hidden_states[None])[0]  # [chunk, V]
        return _cross_entropy_sum(logits, targets.to(logits.device), ignore_index, label_smoothing)

    if _takes_gradients_in_forward(head, hidden_states):
        total = _GradientsInForward.apply(loss_of, chunk_size, targets, hidden_states, head.weight)
    else:
        chunks = zip(hidden_states.split(chunk_size), targets.split(chunk_size), strict=True)
        total = torch.stack([checkpoint(loss_of, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    return _mean(total, targets != ignore_index, num_items_in_batch)


def next_labels(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """The label ``[B, S]`` that each token predicts; that of the last token is ignored."""
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def labels_within_sequences(
    labels: Tensor,
    position_ids: Tensor | None,
    attention_mask: Any,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> dict[str, Tensor]:
    """The keyword ``shift_labels`` of the loss functions, where rows may hold packed sequences.

    A label that would be predicted from another sequence is ignored. Sequences are marked as for attention: by
    ``cu_seq_lens_q``, by ``seq_idx``, or without a mask by positions that restart.

    Args:
        labels: ``[B, S]``.
        position_ids: ``[B or 1, S]``, or None.
        attention_mask: As of the model.
        shift_labels: ``[B, S]``, the label that each token predicts, if the caller gives it.
        **kwargs: As of the model.

    Returns:
        ``shift_labels`` ``[B, S]``, or nothing if there are no packed sequences.
    """
    marks = position_ids if attention_mask is None else None
    starts = starts_of_sequences(labels.shape[0], labels.shape[1], marks, **kwargs)
    if starts is None:
        return {}
    following = next_labels(labels) if shift_labels is None else shift_labels
    ends = F.pad(starts[:, 1:], (0, 1), value=True)
    return {"shift_labels": following.masked_fill(ends.to(following.device), IGNORE_INDEX)}


def warn_without_labels(loss_chunk_size: int | None) -> None:
    """Warn where a model in training computes all logits, although its loss is to be computed in chunks."""
    if loss_chunk_size is not None and torch.is_grad_enabled():
        warnings.warn(
            f"loss_chunk_size={loss_chunk_size} has no effect here: without labels, all logits are computed. Trainer"
            " does not pass the labels on with label_smoothing_factor (set the configuration's label_smoothing"
            " instead) and with compute_loss_func.",
            stacklevel=3,
        )


def _takes_gradients_in_forward(head: nn.Module, hidden_states: Tensor) -> bool:
    """Whether gradients are needed, and the head is its weight and nothing else."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not is_plain_linear(head):
        return False
    if not runs_untransformed(hidden_states):
        return False
    return hidden_states.requires_grad or cast(Tensor, head.weight).requires_grad


class _GradientsInForward(torch.autograd.Function):
    """A sum of losses over chunks of rows; the gradients of a chunk are computed before the next chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        loss_of: Callable[[Tensor, Tensor], Tensor],
        chunk_size: int,
        targets: Tensor,  # [N]
        hidden_states: Tensor,  # [N, E]
        weight: Tensor,  # [V, E]
    ) -> Tensor:
        precise = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros((), dtype=precise, device=hidden_states.device)
        grad_states, grad_weight = torch.zeros_like(hidden_states), None
        wanted = ctx.needs_input_grad[3:]
        for start in range(0, len(targets), chunk_size):
            rows = slice(start, start + chunk_size)
            states = hidden_states[rows].detach().requires_grad_(wanted[0])
            with torch.enable_grad():
                loss = loss_of(states, targets[rows])
            gradients = list(torch.autograd.grad(loss, [t for t in (states, weight) if t.requires_grad]))
            total += loss.detach()
            if wanted[0]:
                grad_states[rows] = gradients.pop(0)
            if wanted[1]:
                gradient = gradients[0].to(precise)
                grad_weight = gradient if grad_weight is None else grad_weight.add_(gradient)
        ctx.save_for_backward(grad_states if wanted[0] else None, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The gradients of a loss in chunks are computed in its forward pass and cannot be differentiated again:"
                " set loss_chunk_size=None for second derivatives (create_graph=True)."
            )
        grad_states, grad_weight = ctx.saved_tensors
        grad_states = None if grad_states is None else grad_states * factor.to(grad_states.dtype)
        grad_weight = None if grad_weight is None else (grad_weight * factor).to(ctx.weight_dtype)
        return None, None, None, grad_states, grad_weight


def _cross_entropy_sum(logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float = 0.0) -> Tensor:
    """Sum over the rows of ``[N, C]`` logits, computed in at least float32."""
    kept = targets != ignore_index
    if torch.compiler.is_compiling() or not runs_untransformed(logits):
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return (_smoothed(log_probs, targets.where(kept, 0), label_smoothing) * kept).sum()
    total: Tensor = _CrossEntropySum.apply(logits, targets.where(kept, 0), kept, label_smoothing)
    return total


def _smoothed(log_probs: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy ``[N]`` with a share of the target probability spread evenly over the classes."""
    loss = -log_probs.gather(1, targets[:, None])[:, 0]
    return loss if not label_smoothing else (1 - label_smoothing) * loss - label_smoothing * log_probs.mean(dim=-1)


class _CrossEntropySum(torch.autograd.Function):
    """A sum of cross-entropies that saves the logits and one number a row; their gradient is the only other copy."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, kept: Tensor, label_smoothing: float) -> Tensor:
        precise = torch.promote_types(logits.dtype, torch.float32)
        normalizer = torch.empty(len(logits), dtype=precise, device=logits.device)
        losses = torch.empty_like(normalizer)
        for rows in _blocks_of_rows(logits):
            block = logits[rows].to(precise)
            normalizer[rows] = block.logsumexp(dim=-1)
            losses[rows] = normalizer[rows] + _smoothed(block, targets[rows], label_smoothing)
        ctx.save_for_backward(logits, targets, kept, normalizer)
        ctx.label_smoothing = label_smoothing
        return (losses * kept).sum()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, kept, normalizer = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is differentiated again: it needs a graph
            return _grad_logits(logits, targets, factor * kept, ctx.label_smoothing), None, None, None
        grad_logits, spread = torch.empty_like(logits), ctx.label_smoothing / logits.shape[1]
        factors, one = (factor * kept)[:, None], torch.ones_like(normalizer)[:, None]
        for rows in _blocks_of_rows(logits):
            gradient = (logits[rows].to(normalizer.dtype) - normalizer[rows, None]).exp_()
            gradient.scatter_add_(1, targets[rows, None], one[rows] * (ctx.label_smoothing - 1))
            grad_logits[rows] = gradient.sub_(spread).mul_(factors[rows])
        return grad_logits, None, None, None


def _grad_logits(logits: Tensor, targets: Tensor, factors: Tensor, label_smoothing: float) -> Tensor:
    """Gradient ``[N, C]`` of the cross-entropies ``[N]`` times their factors, by differentiable operators."""
    probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    expected = F.one_hot(targets, logits.shape[1]) * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    return ((probabilities - expected) * factors[:, None]).to(logits.dtype)


def _blocks_of_rows(logits: Tensor) -> Iterator[slice]:
    """Slices that cover all rows."""
    count = max(1, BLOCK_ELEMENTS // logits.shape[1])
    return (slice(start, start + count) for start in range(0, len(logits), count))


def _mean(total: Tensor, kept: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The sum of the losses divided by their number, or by that of the accumulated batches.

    The loss is 0 where all labels are ignored. An accelerator, for which the host would have to wait, gives no warning.
    """
    count: Any = kept.sum()
    if has_values(count) and reads_freely(count) and not count:
        warnings.warn(
            f"All labels of a batch are ignored ({IGNORE_INDEX}): its loss is 0, and so are its gradients. If this"
            " is not intended, check the collator, the truncation and the masking of prompts.",
            stacklevel=2,
        )
    if num_items_in_batch is not None:
        count = _to_device(total.device, num_items_in_batch)
    return total / (count + (count == 0))


def _to_device(device: torch.device, count: Tensor | int) -> Any:
    return count.to(device) if isinstance(count, Tensor) else count


def token_classification_loss(
    logits: Tensor,
    labels: Tensor,
    config: PreTrainedConfig,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Cross-entropy of ``[B, S, C]`` logits and ``[B, S]`` class ids, -100 where it ignores them."""
    targets = labels.reshape(-1).to(logits.device)
    total = _cross_entropy_sum(logits.reshape(-1, config.num_labels), targets, IGNORE_INDEX)
    return _mean(total, targets != IGNORE_INDEX, num_items_in_batch)


def question_answering_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Mean of the cross-entropies of an answer's two ends; ``[B, S]`` logits, ``[B]`` positions.

    A position outside the input is ignored.
    """
    losses = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        targets = positions.reshape(-1).to(logits.device)
        outside = (targets < 0) | (targets >= logits.shape[1])
        total = _cross_entropy_sum(logits, targets.masked_fill(outside, IGNORE_INDEX), IGNORE_INDEX)
        losses.append(_mean(total, ~outside, num_items_in_batch))
    return (losses[0] + losses[1]) / 2


def sequence_classification_loss(
    labels: Tensor,
    pooled_logits: Tensor,
    config: PreTrainedConfig,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Loss of a sequence classification head, by ``config.problem_type``.

    Where that is None, one output means regression, integer labels mean single-label and others multi-label
    classification.

    Args:
        labels: ``[B]`` class ids, or ``[B, C]`` (``[B]`` if C is 1) targets.
        pooled_logits: ``[B, C]``.
        config: With `num_labels` and `problem_type`.
        num_items_in_batch: Number of labels in all batches whose gradients are accumulated; None takes the mean.

    Returns:
        A scalar: mean squared error, cross-entropy or binary cross-entropy.

    Raises:
        ValueError: The problem type is unknown, or the labels do not fit it.
    """
    labels = labels.to(pooled_logits.device)
    problem = config.problem_type_for(floating_point=labels.is_floating_point())
    if problem == "single_label_classification":
        check_labels(labels, config.num_labels)
        labels = labels.view(-1)
        total = _cross_entropy_sum(pooled_logits, labels, IGNORE_INDEX)
        return _mean(total, labels != IGNORE_INDEX, num_items_in_batch)
    if labels.numel() != pooled_logits.numel():
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not fit {problem} with num_labels={config.num_labels}:"
            f" {tuple(pooled_logits.shape)} is needed. Set num_labels or problem_type in the config."
        )
    labels = labels.view_as(pooled_logits).to(pooled_logits.dtype)
    criterion = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    if num_items_in_batch is None:
        return criterion(pooled_logits, labels)
    return criterion(pooled_logits, labels, reduction="sum") / _to_device(pooled_logits.device, num_items_in_batch)
