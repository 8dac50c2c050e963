"""Inputs of the TensorFlow models in the forms that Keras's users write them, and checks of their values.

Legend: B batch, S new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import tensorflow as tf

from .cache import TFRollingCache
from .shapes import Tensor

POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels")


def first_argument(inputs: Any) -> Any:
    """The first argument of a model in a form that Keras takes: a tensor, or a dictionary of tensors.

    Args:
        inputs: Ids; a mapping of tensors by name, as tokenizers return it; or a list of tensors in the order of
            `POSITIONAL`, as in ``[input_ids, attention_mask]``.

    Raises:
        ValueError: A list holds more tensors than there are inputs, or rows of different lengths.
    """
    if isinstance(inputs, Mapping):
        return {name: as_tensor(name, value) for name, value in inputs.items() if value is not None}
    if not isinstance(inputs, list | tuple) or isinstance(inputs, TFRollingCache):
        return inputs
    if not any(len(getattr(part, "shape", ())) > 1 for part in inputs):
        return as_tensor("input_ids", inputs)
    if len(inputs) > len(POSITIONAL):
        raise ValueError(
            f"The list holds {len(inputs)} inputs, but the model takes at most {len(POSITIONAL)} in the order"
            f" {', '.join(POSITIONAL)}: pass them by name."
        )
    named = zip(POSITIONAL, inputs, strict=False)
    return {name: as_tensor(name, value) for name, value in named if value is not None}


def unpacked(input_ids: Any, **named: Any) -> dict[str, Any]:
    """The tensors among the arguments of `call`, by name; lists become tensors.

    Args:
        input_ids: Token ids, or a dictionary of tensors by name, which take precedence over `named`.
        **named: The other tensors.

    Raises:
        ValueError: The dictionary holds a tensor that the model does not take, the rows of a list have different
            lengths, or ``past_key_values`` is not a cache.
    """
    inputs = {"input_ids": input_ids, **named}
    if isinstance(input_ids, dict):
        if unknown := sorted(input_ids.keys() - inputs.keys()):
            raise ValueError(
                f"The inputs hold a tensor {unknown[0]!r}, but the model takes {', '.join(inputs)}: leave it out."
            )
        inputs = {**inputs, "input_ids": None, **input_ids}
    cache = inputs["past_key_values"]
    if cache is not None and not isinstance(cache, TFRollingCache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__}, but must be a cache, as a call with use_cache=True returns"
            " it in output.past_key_values: not a tuple of keys and values, as in old releases."
        )
    return {name: as_tensor(name, value) for name, value in inputs.items()}


def as_tensor(name: str, value: Any) -> Any:
    """A list or an array as a tensor; anything else as it is.

    Raises:
        ValueError: The rows of a list have different lengths.
    """
    if isinstance(value, TFRollingCache) or not isinstance(value, list | tuple | np.ndarray):
        return value
    try:
        return tf.convert_to_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        lengths = [len(row) if isinstance(row, Sized) else 1 for row in value]
        raise ValueError(
            f"{name} has rows of lengths {lengths}, but they must be equal: pad them, as tokenizer(texts, padding=True,"
            " return_tensors='np') does."
        ) from error


def check_input_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Check that ids are integers ``[B, S]`` and, outside of graphs, that they lie within the vocabulary.

    Raises:
        ValueError: They do not.
    """
    if input_ids.shape.rank != 2 or not input_ids.dtype.is_integer:
        raise ValueError(
            f"input_ids is {input_ids.dtype.name} {tuple(input_ids.shape)}; it must be integers [batch, tokens]."
        )
    if not tf.executing_eagerly() or tf.size(input_ids) == 0:
        return
    low, high = int(tf.reduce_min(input_ids)), int(tf.reduce_max(input_ids))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"input_ids span [{low}, {high}], but must lie in [0, {vocab_size}): token ids of the model's vocabulary;"
            " use the model's own tokenizer."
        )


def check_one_sequence(position_ids: Tensor, real: Tensor) -> None:
    """Under a mask, all real tokens of a row see each other: outside of graphs, check that positions do not restart.

    Args:
        position_ids: ``[B or 1, S]``.
        real: ``[B, S]`` boolean.

    Raises:
        ValueError: They do.
    """
    if not tf.executing_eagerly():
        return
    real = real.numpy()
    positions = np.where(real, position_ids, -1)
    restarts = real[:, 1:] & (positions[:, 1:] <= np.maximum.accumulate(positions, axis=1)[:, :-1])
    if restarts.any():
        row, index = np.argwhere(restarts)[0].tolist()
        raise ValueError(
            f"position_ids[{row}, {index + 1}] restarts at {positions[row, index + 1]}, as in packed sequences, but the"
            " attention_mask lets these see each other. Pack without an attention_mask, or leave out position_ids if a"
            " row is one sequence."
        )
