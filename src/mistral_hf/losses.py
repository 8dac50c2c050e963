"""Losses that honour ``num_items_in_batch``, so that accumulated gradients are those of the large batch.

Legend: B batch, C classes or regression targets.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig

IGNORE_INDEX = -100
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


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
    problem = config.problem_type or _problem_type(labels, config.num_labels)
    reduction = "mean" if num_items_in_batch is None else "sum"
    if problem not in PROBLEM_TYPES:
        raise ValueError(f"config.problem_type={problem!r} must be one of {', '.join(PROBLEM_TYPES)}, or None.")
    if problem == "single_label_classification":
        check_labels(labels, config.num_labels)
        loss = F.cross_entropy(pooled_logits, labels.view(-1), ignore_index=IGNORE_INDEX, reduction=reduction)
    else:
        if labels.numel() != pooled_logits.numel():
            raise ValueError(
                f"labels of shape {tuple(labels.shape)} do not fit {problem} with num_labels={config.num_labels}:"
                f" {tuple(pooled_logits.shape)} is needed. Set num_labels or problem_type in the config."
            )
        labels = labels.view_as(pooled_logits).to(pooled_logits.dtype)
        criterion = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        loss = criterion(pooled_logits, labels, reduction=reduction)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)


def _problem_type(labels: Tensor, num_labels: int) -> str:
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Check that labels are class ids or -100 (ignored).

    Labels on an accelerator are checked there, without waiting for it.

    Raises:
        ValueError: A label lies outside the classes.
    """
    check_range("labels", labels, num_classes, "class ids, or -100 for what the loss ignores", labels == IGNORE_INDEX)


def check_range(name: str, ids: Tensor, count: int, meaning: str, exempt: Tensor | None = None) -> None:
    """Check that ids lie in ``[0, count)``, where they are not exempt.

    Raises:
        ValueError: One does not; the message gives its value and place. On an accelerator, where reading a value would
            stall the queue, a device-side assertion with the same rule takes its place.
    """
    if torch.compiler.is_compiling() or ids.is_meta:
        return
    wrong = (ids < 0) | (ids >= count)
    if exempt is not None:
        wrong &= ~exempt
    if ids.device.type != "cpu":
        torch._assert_async(~wrong.any(), f"{name} must lie in [0, {count}): {meaning}")
    elif wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        value, where = ids[place].item(), ", ".join(map(str, place))
        raise ValueError(f"{name}[{where}] = {value}, but must lie in [0, {count}): {meaning}.")
