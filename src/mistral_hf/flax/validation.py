"""Checks of the inputs of the JAX models: their shapes, and their values where these are known without waiting.

Legend: B batch, S new tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..configuration_mistral import MistralConfig
from .cache import FlaxRollingCache
from .losses import IGNORE_INDEX


def as_array(name: str, value: Any) -> Any:
    """An input as an array: NumPy's and JAX's as they are, lists and other tensors as NumPy arrays.

    Raises:
        ValueError: The rows of a list have different lengths.
    """
    if value is None or isinstance(value, np.ndarray | jax.Array):
        return value
    try:
        return np.asarray(value)
    except ValueError as error:
        if not isinstance(value, list | tuple):
            raise
        lengths = [len(row) if isinstance(row, Sized) else 1 for row in value]
        raise ValueError(
            f"{name} has rows of lengths {lengths}, but they must be equal: pad them, as tokenizer(texts, padding=True,"
            " return_tensors='np') does."
        ) from error


def check_inputs(
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    cache: FlaxRollingCache | None,
    config: MistralConfig,
) -> None:
    """Check the inputs of a forward pass before a program is compiled for them.

    Args:
        input_ids: ``[B, S]`` integers.
        attention_mask: ``[B, S]``, or with more columns if there is a cache; or None.
        position_ids: ``[B or 1, S]``, or None.
        cache: The cached tokens, or None.
        config: With `vocab_size` and `shared_window`.

    Raises:
        ValueError: Shapes do not fit, an id lies outside the vocabulary, positions restart although a mask lets packed
            sequences see each other, or a cache is full.
    """
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or 0 in shape or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(
            f"input_ids is {input_ids.dtype} {shape}, but must be integers [batch, tokens], with at least one token:"
            " pass a single sequence as [ids]."
        )
    batch, count = shape
    check_range("input_ids", input_ids, config.vocab_size)
    if attention_mask is not None:
        _check_mask(tuple(attention_mask.shape), batch, count, cache is not None)
    if position_ids is not None and tuple(position_ids.shape) not in ((batch, count), (1, count)):
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}, but there are {batch} rows of {count} tokens: it must"
            f" have the shape {(batch, count)} or {(1, count)}, a position for each new token."
        )
    if cache is None and attention_mask is not None and position_ids is not None:
        _check_one_sequence(_known(position_ids), _known(attention_mask))
    if cache is not None:
        _check_cache(cache, batch, count, config.shared_window)


def _check_mask(shape: tuple[int, ...], batch: int, count: int, cached: bool) -> None:
    if len(shape) == 2 and shape[0] == batch and (shape[1] == count or (cached and shape[1] > count)):
        return
    before = "; columns of the cached tokens may come before them" if cached else ""
    raise ValueError(
        f"attention_mask has shape {shape}, but there are {batch} rows of {count} tokens: it must have the shape"
        f" {(batch, count)}, a column for each token{before}."
    )


def _check_one_sequence(position_ids: Any, attention_mask: Any) -> None:
    """Under a mask, all real tokens of a row see each other: their positions must not restart."""
    if position_ids is None or attention_mask is None:
        return
    real = attention_mask.astype(bool)
    positions = np.where(real, position_ids, -1)
    restarts = real[:, 1:] & (positions[:, 1:] <= np.maximum.accumulate(positions, axis=1)[:, :-1])
    if restarts.any():
        row, index = np.argwhere(restarts)[0].tolist()
        raise ValueError(
            f"position_ids[{row}, {index + 1}] restarts at {positions[row, index + 1]}, as in packed sequences, but the"
            " attention_mask lets these see each other. Pack without an attention_mask, or leave out position_ids if a"
            " row is one sequence."
        )


def check_class_labels(labels: Any, rows: int, problem: str, num_labels: int) -> None:
    """Check the labels of a sequence classification head.

    Args:
        labels: ``[B]`` class ids or -100; or ``[B, num_labels]`` (``[B]`` if that is 1) targets.
        rows: B.
        problem: As `MistralConfig.problem_type_for` gives it.
        num_labels: Number of classes or targets.

    Raises:
        ValueError: Shapes do not fit, or a class id is unknown.
    """
    shape, single = tuple(labels.shape), problem == "single_label_classification"
    shapes = [(rows,), (rows, 1)] if single or num_labels == 1 else [(rows, num_labels)]
    if shape not in shapes or (single and not jnp.issubdtype(labels.dtype, jnp.integer)):
        raise ValueError(
            f"labels is {labels.dtype} {shape}, but {problem} of {rows} rows with num_labels={num_labels} needs"
            f" {'integers ' if single else ''}{shapes[0]}. Set num_labels or problem_type in the config."
        )
    if single:
        check_range("labels", labels, num_labels, labels == IGNORE_INDEX, "the classes are those of config.num_labels")


def warn_if_all_ignored(labels: Callable[..., Any], *inputs: Any) -> None:
    """Warn where no label counts: the loss is 0, and so are its gradients.

    Only where values are known. A compiled function of the caller does not know them, and a report from within it would
    keep it from being cached and exported.

    Args:
        labels: From the inputs to what every logit is to predict; -100 where the loss ignores it.
        *inputs: Arrays, or None.
    """
    if all(_is_known(array) for array in inputs if array is not None) and (labels(*inputs) == IGNORE_INDEX).all():
        warnings.warn(
            f"All labels of a batch are ignored ({IGNORE_INDEX}): its loss is 0, and so are its gradients. If this is"
            " not intended, check the collator, the truncation and the masking of prompts.",
            stacklevel=3,
        )


def _is_known(array: Any) -> bool:
    """Whether values are known here: the array is not traced, nor partly on the devices of other processes."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _known(array: Any) -> Any:
    """The values of an array, or None if they are not known here."""
    return np.asarray(array) if _is_known(array) else None


def _check_cache(cache: FlaxRollingCache, batch: int, count: int, window: int | None) -> None:
    if cache.real.shape[0] != batch:
        raise ValueError(
            f"past_key_values has {cache.real.shape[0]} rows, but input_ids {batch}: continue with the same batch, or"
            " choose rows with past_key_values.gather_rows."
        )
    if cache.slots != window and not isinstance(cache.length, jax.core.Tracer):
        total = int(cache.length) + count
        if total > cache.slots:
            raise ValueError(
                f"{total} tokens do not fit into a cache of {cache.slots}: give init_cache a larger max_length."
            )


def check_labels(labels: Any, shape: tuple[int, ...], vocab_size: int) -> None:
    """Check that labels have the shape of the ids, and are ids or -100.

    Raises:
        ValueError: They do not.
    """
    if tuple(labels.shape) != tuple(shape) or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels is {labels.dtype} {tuple(labels.shape)}, but must be integers of the shape of input_ids,"
            f" {tuple(shape)}: a token id for each position, {IGNORE_INDEX} where the loss ignores it."
        )
    check_range("labels", labels, vocab_size, labels == IGNORE_INDEX)


def check_range(
    name: str, ids: Any, count: int, exempt: Any = False, remedy: str = "use the model's tokenizer"
) -> None:
    """Check that the ids of a NumPy array lie in ``[0, count)``; reading JAX arrays would wait for the device.

    Raises:
        ValueError: One that is not exempt does not.
    """
    if not isinstance(ids, np.ndarray):
        return
    if (wrong := ((ids < 0) | (ids >= count)) & ~np.asarray(exempt)).any():
        index = tuple(np.argwhere(wrong)[0].tolist())
        where = ", ".join(map(str, index))
        raise ValueError(f"{name}[{where}] = {ids[index]}, but it must lie in [0, {count}): {remedy}.")
