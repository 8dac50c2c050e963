"""Checkpoint folders in tests: arrays to write, and the bits and JSON that a folder holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from mistral_hf.checkpoints.reader import TensorInfo
from mistral_hf.checkpoints.writer import LazyTensor


def lazy_tensors(arrays: dict[str, npt.NDArray[Any]]) -> list[LazyTensor]:
    """Arrays in the form that `write_checkpoint` takes."""
    return [LazyTensor(k, TensorInfo(v.dtype.name, v.shape), lambda v=v: v) for k, v in arrays.items()]


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all safetensors files in a folder."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's values in row order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor, to be compared exactly."""
    return {name: (t.dtype, tuple(t.shape), raw_bytes(t)) for name, t in tensors.items()}


def relative_error(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    """The largest difference, relative to the largest value of `b`."""
    return float(np.abs(a - b).max() / np.abs(b).max())
