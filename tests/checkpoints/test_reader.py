"""Reading checkpoints: every format and layout, and damage of every kind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_hf.checkpoints.reader import CheckpointError, TensorInfo, numpy_dtype, open_checkpoint, same_bits
from mistral_hf.checkpoints.writer import write_checkpoint
from mistral_hf.convert.params import normalize_params
from mistral_hf.convert.tensors import raw_shapes
from tests.helpers.checkpoint_files import lazy_tensors, raw_bytes
from tests.helpers.raw_reference import COMMON, raw_tensors, write_raw

RAW_SHAPES = raw_shapes(normalize_params(COMMON))
TENSORS = raw_tensors(COMMON)


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "pth", "pth-2"])
def test_every_layout_reads_the_same_bits(layout: str, tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "raw", COMMON, TENSORS, layout)
    with open_checkpoint(folder, "consolidated", RAW_SHAPES) as checkpoint:
        assert checkpoint.shapes == RAW_SHAPES
        assert len(checkpoint) == len(TENSORS)
        for name, tensor in TENSORS.items():
            assert checkpoint[name] == TensorInfo("bfloat16", tuple(tensor.shape))
            array = checkpoint.read(name)
            assert (array.dtype, array.shape) == (ml_dtypes.bfloat16, tuple(tensor.shape))
            assert array.tobytes() == raw_bytes(tensor)
            assert b"".join(bytes(chunk) for chunk in checkpoint.stream(name)) == raw_bytes(tensor)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int8", "bool"]
)
def test_every_dtype_survives(dtype: str, tmp_path: Path) -> None:
    arrays = {
        "matrix": np.arange(12).reshape(3, 4).astype(numpy_dtype(dtype)),
        "scalar": np.asarray(1).astype(numpy_dtype(dtype)),
        "empty": np.zeros((0, 4), numpy_dtype(dtype)),
    }
    write_checkpoint(tmp_path, lazy_tensors(arrays))
    assert {name: raw_bytes(t) for name, t in load_file(tmp_path / "model.safetensors").items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(same_bits(checkpoint.read(name), array) for name, array in arrays.items())


def test_special_bit_patterns_survive(tmp_path: Path) -> None:
    patterns = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    write_checkpoint(tmp_path, lazy_tensors({"all": patterns}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert same_bits(checkpoint.read("all"), patterns)


def test_same_bits_is_stricter_than_equality() -> None:
    zero, nan = np.array([0.0]), np.array([np.nan])
    assert same_bits(nan, nan.copy())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.astype(np.float32))
    assert not same_bits(zero, zero[:, None])


def test_a_dtype_that_is_not_supported_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2, dtype=torch.complex64), "y": torch.zeros(2)}, tmp_path / "consolidated.00.pth")
    with open_checkpoint(tmp_path, "consolidated") as checkpoint:
        assert checkpoint["x"].nbytes == 16
    with pytest.raises(CheckpointError, match=r"dtype 'nonsense' is not supported"):
        numpy_dtype("nonsense")


# Damage


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_safetensors_are_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="copy it again"):
        open_checkpoint(tmp_path)


def test_a_file_cut_short_while_it_is_read_raises(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(10000)}, path)
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match="truncated"):
            checkpoint.read("x")
        with pytest.raises(CheckpointError, match="truncated"):
            list(checkpoint.stream("x"))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        [1],
    ],
)
def test_malformed_headers_are_refused(entry: Any, tmp_path: Path) -> None:
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="malformed"):
        open_checkpoint(tmp_path)


def write_sharded(folder: Path) -> Path:
    arrays = {f"t{i}": np.full((100,), i, np.float32) for i in range(4)}
    write_checkpoint(folder, lazy_tensors(arrays), max_shard_size=900)
    return folder


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (write_sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the shard model-00002-of-00002\.safetensors \(1 of 2 missing\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("t1"), "wrong about t1"),
        (lambda weights: weights.update(t9="model-00001-of-00002.safetensors"), "wrong about t9"),
        (lambda weights: weights.update(t0="model-00002-of-00002.safetensors"), "wrong about t0"),
        (lambda weights: weights.update(t0="../evil.safetensors"), "points outside"),
    ],
)
def test_a_wrong_index_is_named(change: Callable[[dict[str, str]], object], message: str, tmp_path: Path) -> None:
    path = write_sharded(tmp_path) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_an_unreadable_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="not an index of shards"):
        open_checkpoint(tmp_path)


def test_missing_and_ambiguous_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        open_checkpoint(tmp_path)
    write_raw(tmp_path / "raw", COMMON, TENSORS, "pth")
    save_file(TENSORS, tmp_path / "raw/consolidated.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        open_checkpoint(tmp_path / "raw", "consolidated")


def test_pickles_that_hold_more_than_tensors_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.system, (f"touch {tmp_path}/pwned",))

    torch.save({"x": Evil()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        open_checkpoint(tmp_path, "consolidated")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", pickle.dumps({"x": 1})])
def test_files_that_are_not_checkpoints_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"copy it again|more than tensors"):
        open_checkpoint(tmp_path, "consolidated")


def test_a_pth_file_that_is_truncated_or_not_a_dictionary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "consolidated.00.pth"
    torch.save(TENSORS, path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="cannot be memory-mapped"):
        open_checkpoint(tmp_path, "consolidated")
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="not a dictionary of tensors"):
        open_checkpoint(tmp_path, "consolidated")


def test_missing_and_foreign_ranks_are_refused(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "raw", COMMON, TENSORS, "pth-2")
    shutil.copytree(folder, tmp_path / "three")
    save_ranks(tmp_path / "three", 3)
    with pytest.raises(CheckpointError, match="do not add up to"):
        open_checkpoint(tmp_path / "three", "consolidated", RAW_SHAPES)
    part = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save({**part, "norm.weight": part["norm.weight"] + 1}, folder / "consolidated.01.pth")
    with (
        open_checkpoint(folder, "consolidated", RAW_SHAPES) as checkpoint,
        pytest.raises(CheckpointError, match=r"norm\.weight must be the same on every rank"),
    ):
        checkpoint.read("norm.weight")
    torch.save({**part, "extra": torch.zeros(1)}, folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match="only one of them has extra"):
        open_checkpoint(folder, "consolidated", RAW_SHAPES)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"lacks consolidated\.00\.pth"):
        open_checkpoint(folder, "consolidated", RAW_SHAPES)


def save_ranks(folder: Path, ranks: int) -> None:
    part = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for rank in range(ranks):
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(
        (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="is in two files"):
        open_checkpoint(tmp_path)
