"""Checks of token ids and labels, and warnings about a call.

Legend: B batch, S tokens.
"""

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .sequence_layout import KeyLayout
from .tracing import has_values, reads_freely

IGNORE_INDEX = -100
logger = logging.get_logger(__name__)


def check_input_ids(input_ids: Tensor, embedding: nn.Module, vocab_size: int) -> None:
    """Check ``[B, S]`` token ids against the embeddings that they select; where an adapter wraps them, `vocab_size`.

    A decoding step on an accelerator, which must not wait, is not checked.

    Raises:
        ValueError: The shape is another, or an id lies outside the vocabulary.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, tokens].")
    if reads_freely(input_ids) or input_ids.shape[1] > 1:
        meaning = "token ids of the model's vocabulary; use the model's own tokenizer, or resize_token_embeddings"
        check_range("input_ids", input_ids, getattr(embedding, "num_embeddings", vocab_size), meaning)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Check that labels are class ids or -100 (ignored).

    Labels on an accelerator are checked there, without waiting for it.

    Raises:
        ValueError: A label lies outside the classes.
    """
    check_range("labels", labels, num_classes, "class ids, or -100 where the loss ignores them", labels == IGNORE_INDEX)


def check_range(name: str, ids: Tensor, count: int, meaning: str, exempt: Tensor | None = None) -> None:
    """Check that ids lie in ``[0, count)``, where they are not exempt.

    Raises:
        ValueError: One does not; the message gives its value and index. On an accelerator, where reading a value would
            stall the queue, a device-side assertion with the same rule takes its place.
    """
    if not has_values(ids):
        return
    wrong = (ids < 0) | (ids >= count)
    if exempt is not None:
        wrong &= ~exempt
    if not reads_freely(ids):
        torch._assert_async(~wrong.any(), f"{name} must lie in [0, {count}): {meaning}")
    elif wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        value, where = ids[index].item(), ", ".join(map(str, index))
        raise ValueError(f"{name}[{where}] = {value}, but must lie in [0, {count}): {meaning}.")


def warn_if_too_long(keys: KeyLayout, count: int, max_position_embeddings: int) -> None:
    """Warn once when a sequence with `count` new tokens exceeds `max_position_embeddings`."""
    start = keys.query_start
    if torch.compiler.is_compiling() or isinstance(start, Tensor):
        return
    if start + count > max_position_embeddings:
        logger.warning_once(
            f"The sequence exceeds max_position_embeddings={max_position_embeddings}, the longest that this model was"
            " trained for. Generation continues, but quality may degrade; rope_parameters can extend the positions."
        )
