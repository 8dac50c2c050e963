"""The file of a `RollingCache`: safetensors, two tensors a layer, and in the metadata the counts that they lack.

Legend: B batch, K key/value heads, D head_dim, W window.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from .rolling_layer import RingLayer

_KEY = "rolling_cache"
_KINDS = ("keys", "values")
_LIMIT = 2**31  # tokens


def save_cache(layers: Sequence[RingLayer], file: str | Path, metadata: Mapping[str, str]) -> None:
    """Write every stored token of the layers, and the metadata, as one file that appears when it is complete."""
    tensors: dict[str, Tensor] = {}
    length = int(layers[0].get_seq_length()) if layers else 0
    for index, layer in enumerate(layers if length else ()):
        keys, values = layer.stored()
        tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"] = keys.contiguous(), values.contiguous()
    counts = {"layers": len(layers), "length": length, "sliding_window": layers[0].sliding_window if layers else None}
    target = Path(file)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={**metadata, _KEY: json.dumps(counts)})
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def load_cache(
    layers: Sequence[RingLayer],
    file: str | Path,
    config: PreTrainedConfig,
    device: torch.device | str | Sequence[torch.device | str],
) -> None:
    """Fill empty layers from a file; see `RollingCache.load_file`."""
    devices = [device] * len(layers) if isinstance(device, str | torch.device) else list(device)
    with open(file, "rb"):  # an OSError that names the file
        pass
    try:
        with safe_open(file, "pt") as content:
            length = _check_counts(file, (content.metadata() or {}).get(_KEY), len(layers), config)
            names = [f"layers.{index}.{kind}" for index in range(len(layers) if length else 0) for kind in _KINDS]
            if sorted(content.keys()) != sorted(names):
                raise ValueError(f"{file} lacks tensors of the cache, or has others: save the cache again.")
            tensors = {name: content.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{file} is no complete safetensors file ({error}): save the cache again.") from error
    _check_shapes(file, tensors, length, config)
    for index, layer in enumerate(layers if length else ()):
        keys, values = (tensors[f"layers.{index}.{kind}"].to(devices[index]) for kind in _KINDS)
        layer.restore(keys, values, length)


def _check_counts(file: str | Path, text: str | None, layers: int, config: PreTrainedConfig) -> int:
    """Check the counts of a file against a configuration, and return the number of tokens so far."""
    try:
        counts: Any = json.loads(text or "")
        length = counts["length"]
        valid = type(length) is int and 0 <= length < _LIMIT
        found = {name: counts[name] for name in ("layers", "sliding_window")}
    except (ValueError, TypeError, LookupError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(f"{file} was not written by RollingCache.save_file: give a file that was.")
    wanted = {"layers": layers, "sliding_window": getattr(config, "sliding_window", None)}
    for name, value in wanted.items():
        if found[name] != value:
            raise ValueError(
                f"{file} is the cache of a model with {name}={found[name]!r}, but this one has {value!r}: load it"
                " with the model that filled it."
            )
    return length


def _check_shapes(file: str | Path, tensors: Mapping[str, Tensor], length: int, config: PreTrainedConfig) -> None:
    """Check that all tensors are ``[B, K, tokens, D]`` of one model, with every token that the window shows."""
    heads, width = config.num_key_value_heads, config.head_dim
    window = getattr(config, "sliding_window", None)
    visible = length if window is None else min(length, window - 1)
    first = next(iter(tensors.values()), None)
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        same = first is not None and (shape, tensor.dtype) == (tuple(first.shape), first.dtype)
        if not same or len(shape) != 4 or (shape[1], shape[3]) != (heads, width) or not visible <= shape[2] <= length:
            raise ValueError(
                f"{file}: {name} is {tensor.dtype} {list(shape)}, but this model needs [batch, {heads}, at least"
                f" {visible} and at most {length}, {width}], and one dtype: load it with the model that filled it."
            )
