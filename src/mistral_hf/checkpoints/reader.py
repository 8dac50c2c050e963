"""Reading checkpoints as a stream: one tensor in memory at a time, whatever the checkpoint's size.

Tensors are NumPy arrays (bfloat16 through ``ml_dtypes``); PyTorch is imported only to read a ``.pth`` file.

    with open_checkpoint("model-folder") as checkpoint:
        for name, info in checkpoint.items():
            array = checkpoint.read(name)
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..compatibility import CheckpointError
from .json_file import check_regular_file, parse_json, read_json

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

DTYPES = {  # names of a safetensors header, with those of NumPy and ml_dtypes
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

_MAX_HEADER = 100_000_000  # bytes
_MAX_AXES = 8  # of a tensor
_CHUNK = 1 << 22  # bytes of a piece of `stream`


class TensorInfo(NamedTuple):
    """Dtype and shape of a tensor, which are known before it is read.

    Attributes:
        dtype: A name of NumPy or ``ml_dtypes``, such as ``"bfloat16"``.
        shape: The shape.
    """

    dtype: str
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a name; bfloat16 and the 8-bit floats come from ``ml_dtypes``.

    Raises:
        CheckpointError: There is no such dtype.
    """
    try:
        return np.dtype(getattr(ml_dtypes, name, name))
    except TypeError as error:
        raise CheckpointError(f"The dtype {name!r} is not supported: save the checkpoint in another one.") from error


def same_bits(a: Array, b: Array) -> bool:
    """Whether two arrays have the same dtype, shape and bytes (so a NaN equals itself, and 0.0 is not -0.0)."""
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(as_bytes(a), as_bytes(b))


def as_bytes(array: Array) -> npt.NDArray[np.uint8]:
    """The bytes of an array's values in row order, without a copy if the array is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class _File(Protocol):
    """One file, or one set of tensor-parallel files; a checkpoint consists of one or more."""

    infos: dict[str, TensorInfo]

    def read(self, name: str) -> Array:
        """The values of one tensor."""

    def stream(self, name: str) -> Iterator[memoryview]:
        """The bytes of one tensor in pieces."""

    def close(self) -> None:
        """Close the file."""


class SafetensorsFile:
    """One safetensors file, read without memory mapping.

    So a file that is truncated while it is read raises an error instead of killing the process, and the pages that were
    read do not count as the process's memory.

    Raises:
        CheckpointError: The file is not a safetensors file, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        check_regular_file(path)
        self.path = path
        self._buffers = [bytearray(), bytearray()]
        with ExitStack() as on_error:
            self._file = on_error.enter_context(path.open("rb"))
            self.infos, self._offsets = _read_header(self._file, path)
            on_error.pop_all()

    def read(self, name: str) -> Array:
        info = self.infos[name]
        array = np.empty(info.nbytes, np.uint8)
        self._file.seek(self._offsets[name])
        if self._file.readinto(array.data) != info.nbytes:
            raise CheckpointError(f"{self.path} ended while {name} was read: it is truncated; copy it again.")
        return array.view(numpy_dtype(info.dtype)).reshape(info.shape)

    def stream(self, name: str) -> Iterator[memoryview]:
        if not self._buffers[0]:
            self._buffers = [bytearray(_CHUNK), bytearray(_CHUNK)]
        left, position = self.infos[name].nbytes, self._offsets[name]
        while left:
            self._buffers.reverse()
            chunk = memoryview(self._buffers[0])[: min(left, _CHUNK)]
            self._file.seek(position)
            if self._file.readinto(chunk) != len(chunk):
                raise CheckpointError(f"{self.path} ended while {name} was read: it is truncated; copy it again.")
            left, position = left - len(chunk), position + len(chunk)
            yield chunk

    def close(self) -> None:
        self._file.close()


def _read_header(file: BufferedReader, path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """The tensors of a safetensors file and the offsets of their bytes in it, checked against the file's size."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER):
        raise CheckpointError(f"{path} is not a safetensors file, or its header is truncated; copy it again.")
    header = parse_json(file.read(length), f"The header of {path}", "that of a safetensors file")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} has a malformed safetensors header: __metadata__ holds more than text.")
    entries = {name: _read_entry(path, name, entry) for name, entry in header.items()}
    end = 8 + length
    offsets = {}
    for name, (_, first, last) in sorted(entries.items(), key=lambda item: item[1][1:]):
        offsets[name] = 8 + length + first
        if offsets[name] != end:
            raise CheckpointError(
                f"{path} has a malformed safetensors header: the values of {name} begin at byte {offsets[name]}, but"
                f" those before them end at {end}; copy it again."
            )
        end = 8 + length + last
    if end != size:
        raise CheckpointError(f"{path} has {size} bytes, but its header needs {end}: truncated; copy it again.")
    return {name: info for name, (info, _, _) in entries.items()}, offsets


def _read_entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
    """One tensor's entry in a header: what it is, and where its values begin and end."""
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [first, last]} if (
            dtype in DTYPES
            and len(shape) <= _MAX_AXES
            and all(type(number) is int and number >= 0 for number in (*shape, first, last))
        ):
            info = TensorInfo(DTYPES[dtype], tuple(shape))
            if last - first == info.nbytes:
                return info, first, last
    raise CheckpointError(
        f"{path} has a malformed safetensors header: the entry of {name:.200} is {entry!r:.200}, and lacks a"
        " supported dtype, or a shape and offsets that agree; copy it again."
    )


class TorchFile:
    """One ``.pth`` file, memory-mapped; only tensors are unpickled, never objects.

    Raises:
        CheckpointError: The file holds something other than a dictionary of tensors, is truncated, or cannot be
            memory-mapped.
    """

    def __init__(self, path: Path) -> None:
        import pickle

        import torch

        check_regular_file(path)
        self.path = path
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"{path} holds more than tensors, so it is refused: use safetensors.") from error
        except Exception as error:  # there is no telling what a damaged file makes the unpickler raise
            raise CheckpointError(
                f"{path} cannot be memory-mapped ({error}): it is truncated, or in the format of PyTorch < 1.6; copy it"
                " again, or save it with a newer release."
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(name, str) for name in tensors):
            raise CheckpointError(f"{path} is not a dictionary of tensors: save the model's state_dict.")
        if wrong := [name for name, tensor in tensors.items() if not _holds_its_values(tensor)]:
            raise CheckpointError(
                f"{path} is not a dictionary of tensors: {wrong[0]:.200} is none, or is quantized, sparse, expanded or"
                " without values; save the model's state_dict."
            )
        self._tensors: dict[str, Any] = tensors
        self.infos = {k: TensorInfo(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for k, t in tensors.items()}

    def read(self, name: str) -> Array:
        import torch

        dtype, shape = self.infos[name]
        array: Array = self._tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return array.view(numpy_dtype(dtype)).reshape(shape)

    def stream(self, name: str) -> Iterator[memoryview]:
        yield as_bytes(self.read(name)).data

    def close(self) -> None:
        self._tensors.clear()


def _holds_its_values(tensor: Any) -> bool:
    """Whether an object is a plain tensor with as many values as its shape says (an expanded one repeats some)."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_quantized or tensor.is_neg():
        return False
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


class TensorParallelFiles:
    """The files of several tensor-parallel ranks, read as one.

    A tensor is cut along the axis in which a rank's shape differs from the whole one; all ranks have the same norms.

    Args:
        ranks: One file for each rank, in order.
        shapes: The shapes of the whole tensors.

    Raises:
        CheckpointError: The ranks hold different tensors or dtypes, or their parts do not add up to the whole ones.
    """

    def __init__(self, ranks: Sequence[TorchFile | SafetensorsFile], shapes: Mapping[str, Shape]) -> None:
        self._ranks = ranks
        self.infos: dict[str, TensorInfo] = {}
        self._axes: dict[str, int | None] = {}
        names = set(ranks[0].infos)
        for rank in ranks[1:]:
            if set(rank.infos) != names:
                odd = sorted(names ^ set(rank.infos))[0]
                raise CheckpointError(
                    f"{rank.path} and {ranks[0].path} are not ranks of one model: only one of them has {odd}."
                )
        for name, info in ranks[0].infos.items():
            for rank in ranks[1:]:
                if rank.infos[name].dtype != info.dtype:
                    raise CheckpointError(
                        f"{name} is {rank.infos[name].dtype} in {rank.path}, but {info.dtype} in {ranks[0].path}: save"
                        " all ranks in one dtype."
                    )
            parts = [rank.infos[name].shape for rank in ranks]
            whole = shapes.get(name, parts[0])
            self._axes[name] = _axis_of(name, parts, whole)
            self.infos[name] = TensorInfo(info.dtype, whole)

    def read(self, name: str) -> Array:
        axis = self._axes[name]
        if axis is not None:
            return np.concatenate([rank.read(name) for rank in self._ranks], axis=axis)
        first = self._ranks[0].read(name)
        for rank in self._ranks[1:]:
            if not same_bits(rank.read(name), first):
                raise CheckpointError(f"{name} must be the same on every rank, but {rank.path} has other values.")
        return first

    def stream(self, name: str) -> Iterator[memoryview]:
        yield as_bytes(self.read(name)).data

    def close(self) -> None:
        for rank in self._ranks:
            rank.close()


def _axis_of(name: str, parts: Sequence[Shape], whole: Shape) -> int | None:
    """The axis along which the ranks hold parts of a tensor; None if every rank holds all of it."""
    cut = [axis for axis, (part, full) in enumerate(zip(parts[0], whole, strict=False)) if part != full]
    axis = cut[0] if cut else None
    joined = parts[0]
    uncut = {(len(part), part[:axis], part[axis + 1 :] if axis is not None else ()) for part in parts}
    if axis is not None and len(uncut) == 1:
        joined = (*joined[:axis], sum(part[axis] for part in parts), *joined[axis + 1 :])
    if joined != whole or len(uncut) > 1:
        raise CheckpointError(
            f"{name}: the shapes {parts} of the ranks do not add up to {whole}: add the missing ones."
        )
    return axis


class Checkpoint(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint: a mapping of names to `TensorInfo`, with ``read(name)`` for one tensor's values.

    Raises:
        CheckpointError: Two files hold a tensor of the same name.
    """

    def __init__(self, files: Sequence[_File]) -> None:
        self._files = files
        self._owner: dict[str, _File] = {}
        for file in files:
            for name in file.infos:
                if name in self._owner:
                    raise CheckpointError(f"The tensor {name} is in two files of the checkpoint: remove the stale one.")
                self._owner[name] = file

    def __getitem__(self, name: str) -> TensorInfo:
        return self._owner[name].infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str) -> Array:
        """The values of one tensor, as a new array."""
        return self._owner[name].read(name)

    def stream(self, name: str) -> Iterator[memoryview]:
        """The bytes of one tensor in pieces, each of which stays unchanged until the next but one is read."""
        return self._owner[name].stream(name)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of every tensor, as a new dictionary."""
        return {name: info.shape for name, info in self.items()}

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def open_checkpoint(folder: str | Path, stem: str = "model", shapes: Mapping[str, Shape] | None = None) -> Checkpoint:
    """Open the weights in a folder, without reading them.

    Args:
        folder: The checkpoint's folder.
        stem: ``"model"`` for Hugging Face files, ``"consolidated"`` for raw ones, ``"adapter_model"`` or ``"lora"`` for
            adapters.
        shapes: The shapes of the whole tensors; needed to merge several ``consolidated.NN.pth``.

    Raises:
        CheckpointError: There are no weights, a shard is missing, a file is truncated, or the index is wrong.
    """
    folder = Path(folder)
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    ranks = sorted(folder.glob(f"{stem}.[0-9][0-9].pth"))
    found = [path for path in (index, single, *ranks[:1]) if path.exists()]
    if not found:
        have = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder} holds no {single.name}, {index.name} or {stem}.00.pth ({have}).")
    if len(found) > 1:
        raise CheckpointError(f"{folder} holds both {found[0].name} and {found[1].name}: remove one of them.")
    with ExitStack() as on_error:
        if ranks:
            checkpoint = Checkpoint([_open_ranks(ranks, stem, shapes or {})])
        elif index.exists():
            checkpoint = _open_shards(index, on_error)
        else:
            checkpoint = Checkpoint([SafetensorsFile(single)])
        on_error.pop_all()
        return checkpoint


def _open_ranks(paths: list[Path], stem: str, shapes: Mapping[str, Shape]) -> _File:
    for number, path in enumerate(paths):
        if path.name != f"{stem}.{number:02d}.pth":
            raise CheckpointError(
                f"{path.parent} has {path.name} but lacks {stem}.{number:02d}.pth, the file of one rank: copy it too."
            )
    ranks = [TorchFile(path) for path in paths]
    return ranks[0] if len(ranks) == 1 else TensorParallelFiles(ranks, shapes)


def _open_shards(index: Path, on_error: ExitStack) -> Checkpoint:
    """Open the shards that an index lists; `on_error` closes those that are open if a later one is damaged."""
    weight_map = read_json(index, "an index of shards").get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} is not an index of shards: weight_map does not give file names; copy it again.")
    names = sorted(set(weight_map.values()))
    if bad := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index} points outside its folder, to {bad[0]!r:.200}: it is refused.")
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise CheckpointError(
            f"{index.parent} lacks the shard {missing[0]} ({len(missing)} of {len(names)} missing): copy it too."
        )
    files = {name: on_error.enter_context(closing(SafetensorsFile(index.parent / name))) for name in names}
    checkpoint = Checkpoint(list(files.values()))
    held = {tensor: name for name, file in files.items() for tensor in file.infos}
    if wrong := sorted(tensor for tensor, _ in held.items() ^ weight_map.items()):
        raise CheckpointError(f"{index} is wrong about {wrong[0]}: index and shards do not belong together.")
    return checkpoint
