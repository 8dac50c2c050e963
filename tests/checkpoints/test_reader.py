"""Reading and writing checkpoints: formats, damage, atomic output, manifests, memory."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mistral_hf.checkpoints.reader import CheckpointError, TensorInfo, numpy_dtype, open_checkpoint, same_bits
from mistral_hf.checkpoints.writer import (
    LazyTensor,
    atomic_folder,
    check_manifest,
    file_sha256,
    parse_size,
    write_checkpoint,
    write_manifest,
)
from mistral_hf.convert.params import normalize_params
from mistral_hf.convert.tensors import raw_shapes
from tests.helpers.raw_reference import COMMON, in_child, raw_tensors, write_raw

RAW_SHAPES = raw_shapes(normalize_params(COMMON))
TENSORS = raw_tensors(COMMON)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def lazy(arrays: dict[str, np.ndarray]) -> list[LazyTensor]:
    return [LazyTensor(k, TensorInfo(v.dtype.name, v.shape), lambda v=v: v) for k, v in arrays.items()]


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "pth", "pth-2"])
def test_every_layout_reads_the_same_bits(layout, tmp_path):
    folder = write_raw(tmp_path / "raw", COMMON, TENSORS, layout)
    with open_checkpoint(folder, "consolidated", RAW_SHAPES) as checkpoint:
        assert checkpoint.shapes == RAW_SHAPES
        assert len(checkpoint) == len(TENSORS)
        for name, tensor in TENSORS.items():
            assert checkpoint[name] == TensorInfo("bfloat16", tuple(tensor.shape))
            array = checkpoint.read(name)
            assert (array.dtype, array.shape) == (ml_dtypes.bfloat16, tuple(tensor.shape))
            assert array.tobytes() == bits(tensor)
            assert b"".join(bytes(chunk) for chunk in checkpoint.stream(name)) == bits(tensor)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int8", "bool"]
)
def test_every_dtype_survives(dtype, tmp_path):
    arrays = {
        "matrix": np.arange(12).reshape(3, 4).astype(numpy_dtype(dtype)),
        "scalar": np.asarray(1).astype(numpy_dtype(dtype)),
        "empty": np.zeros((0, 4), numpy_dtype(dtype)),
    }
    write_checkpoint(tmp_path, lazy(arrays))
    assert {name: bits(t) for name, t in load_file(tmp_path / "model.safetensors").items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(same_bits(checkpoint.read(name), array) for name, array in arrays.items())


def test_special_bit_patterns_survive(tmp_path):
    patterns = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    write_checkpoint(tmp_path, lazy({"all": patterns}))
    with open_checkpoint(tmp_path) as checkpoint:
        assert same_bits(checkpoint.read("all"), patterns)


def test_same_bits_is_stricter_than_equality():
    zero, nan = np.array([0.0]), np.array([np.nan])
    assert same_bits(nan, nan.copy())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.astype(np.float32))
    assert not same_bits(zero, zero[:, None])


def test_shards_follow_the_size_limit_and_the_index(tmp_path):
    arrays = {f"t{i}": np.full((100,), i, np.float32) for i in range(7)} | {"big": np.zeros(1000, np.float32)}
    digests = write_checkpoint(tmp_path, lazy(arrays), max_shard_size=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 400 + 4000
    assert set(index["weight_map"]) == set(arrays)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == sorted(digests) == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    for name in names:
        with safe_open(tmp_path / name, "np") as shard:
            assert shard.metadata() == {"format": "pt"}
            sizes = [arrays[key].nbytes for key in shard.keys()]  # noqa: SIM118 - a safe_open handle is no mapping
            assert sum(sizes) <= 1000 or len(sizes) == 1
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(same_bits(checkpoint.read(name), array) for name, array in arrays.items())


def test_progress_counts_every_byte(tmp_path):
    calls = []
    arrays = {f"t{i}": np.zeros(10 * i, np.float32) for i in range(4)}
    write_checkpoint(
        tmp_path, lazy(arrays), max_shard_size=100, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (240, 240)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_tensor_other_than_announced_is_refused(tmp_path):
    tensor = LazyTensor("x", TensorInfo("float32", (2, 3)), lambda: np.zeros((3, 2), np.float32))
    with pytest.raises(CheckpointError, match="x was announced"):
        write_checkpoint(tmp_path, [tensor])


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("512MiB", 2**29), (7, 7), ("10 kb", 10**4), (None, None)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5 apples", "", "-1", "0GB", "1.5GB"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="cannot read the size"):
        parse_size(text)


# Damage


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_truncated_safetensors(keep, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="copy it again"):
        open_checkpoint(tmp_path)


def test_safetensors_cut_short_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(10000)}, path)
    with open_checkpoint(tmp_path) as checkpoint:
        os.truncate(path, 1000)
        with pytest.raises(CheckpointError, match="truncated"):
            checkpoint.read("x")
        with pytest.raises(CheckpointError, match="truncated"):
            list(checkpoint.stream("x"))


def test_streamed_tensors_larger_than_a_piece_survive(tmp_path):
    """Pieces are read ahead into two buffers that take turns: none may be overwritten before it is on disk."""
    (tmp_path / "copy").mkdir()
    values = np.arange(15_000_000, dtype=np.uint32)
    write_checkpoint(tmp_path, lazy({"a": values, "b": values[::-1].copy()}))
    calls: list[int] = []
    with open_checkpoint(tmp_path) as checkpoint:
        tensors = [
            LazyTensor(k, v, partial(checkpoint.read, k), partial(checkpoint.stream, k)) for k, v in checkpoint.items()
        ]
        digests = write_checkpoint(tmp_path / "copy", tensors, progress=lambda done, _: calls.append(done))
    assert digests["model.safetensors"] == file_sha256(tmp_path / "model.safetensors")
    assert digests["model.safetensors"] == file_sha256(tmp_path / "copy/model.safetensors")
    assert calls[-1] == 120_000_000
    assert len(calls) == 30


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
def test_malformed_headers(entry, tmp_path):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="malformed"):
        open_checkpoint(tmp_path)


def write_sharded(folder: Path) -> Path:
    arrays = {f"t{i}": np.full((100,), i, np.float32) for i in range(4)}
    write_checkpoint(folder, lazy(arrays), max_shard_size=900)
    return folder


def test_a_missing_shard_is_named(tmp_path):
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
def test_a_wrong_index_is_named(change, message, tmp_path):
    path = write_sharded(tmp_path) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_an_unreadable_index_is_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="no index of shards"):
        open_checkpoint(tmp_path)


def test_missing_and_ambiguous_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        open_checkpoint(tmp_path)
    write_raw(tmp_path / "raw", COMMON, TENSORS, "pth")
    save_file(TENSORS, tmp_path / "raw/consolidated.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        open_checkpoint(tmp_path / "raw", "consolidated")


def test_pickles_that_hold_more_than_tensors_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/pwned",))

    torch.save({"x": Evil()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="more than tensors"):
        open_checkpoint(tmp_path, "consolidated")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", pickle.dumps({"x": 1})])
def test_files_that_are_no_checkpoints(content, tmp_path):
    (tmp_path / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"copy it again|more than tensors"):
        open_checkpoint(tmp_path, "consolidated")


def test_pth_truncated_or_not_a_dictionary(tmp_path):
    path = tmp_path / "consolidated.00.pth"
    torch.save(TENSORS, path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="cannot be memory-mapped"):
        open_checkpoint(tmp_path, "consolidated")
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="no dictionary of tensors"):
        open_checkpoint(tmp_path, "consolidated")


def test_missing_and_foreign_ranks(tmp_path):
    folder = write_raw(tmp_path / "raw", COMMON, TENSORS, "pth-2")
    shutil.copytree(folder, tmp_path / "three")
    save_ranks(tmp_path / "three", 3)
    with pytest.raises(CheckpointError, match="do not make up"):
        open_checkpoint(tmp_path / "three", "consolidated", RAW_SHAPES)
    part = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save({**part, "norm.weight": part["norm.weight"] + 1}, folder / "consolidated.01.pth")
    with (
        open_checkpoint(folder, "consolidated", RAW_SHAPES) as checkpoint,
        pytest.raises(CheckpointError, match=r"norm\.weight should be the same on every rank"),
    ):
        checkpoint.read("norm.weight")
    torch.save({**part, "extra": torch.zeros(1)}, folder / "consolidated.01.pth")
    with pytest.raises(CheckpointError, match="only one has extra"):
        open_checkpoint(folder, "consolidated", RAW_SHAPES)
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"lacks consolidated\.00\.pth"):
        open_checkpoint(folder, "consolidated", RAW_SHAPES)


def save_ranks(folder: Path, ranks: int) -> None:
    part = torch.load(folder / "consolidated.00.pth", weights_only=True)
    for rank in range(ranks):
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(
        (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match="in two files"):
        open_checkpoint(tmp_path)


# Output that is all or nothing


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_only_at_the_end(tmp_path):
    with atomic_folder(tmp_path / "deep/out") as folder:
        (folder / "config.json").write_text("{}")
        assert leftovers(tmp_path / "deep") == [".out.incomplete"]
    assert leftovers(tmp_path / "deep") == ["out"]
    assert leftovers(tmp_path / "deep/out") == ["config.json"]


def test_an_error_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert leftovers(tmp_path) == []


def test_existing_output_is_refused_and_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("old")
    with pytest.raises(FileExistsError, match="--overwrite"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out/config.json").read_text() == "old"
    assert leftovers(tmp_path) == ["out"]


def test_overwriting_replaces_the_whole_folder_and_only_at_the_end(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", overwrite=True):
        raise ZeroDivisionError
    assert (tmp_path / "out/config.json").read_text() == "old"
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "params.json").write_text("new")
    assert leftovers(tmp_path / "out") == ["params.json"]
    assert leftovers(tmp_path) == ["out"]


def test_overwriting_spares_what_is_no_checkpoint(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("precious")
    work = atomic_folder(tmp_path / "home", overwrite=True)
    with pytest.raises(FileExistsError, match="does not look like a checkpoint"), work:
        pass
    assert (tmp_path / "home/thesis.txt").exists()


def test_an_empty_output_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("")
    assert leftovers(tmp_path / "out") == ["x"]


def test_a_full_disk_is_noticed_first(tmp_path):
    with pytest.raises(OSError, match="GB free"), atomic_folder(tmp_path / "out", needs_bytes=10**18):
        pytest.fail("must not begin")
    assert leftovers(tmp_path) == []


def test_two_runs_do_not_write_one_output(tmp_path):
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("first")
        with pytest.raises(BlockingIOError, match="another run"), atomic_folder(tmp_path / "out"):
            pytest.fail("must not begin")
    assert (tmp_path / "out/x").read_text() == "first"


def killed_run(target: Path, moment: str, patch: pytest.MonkeyPatch) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    rename = Path.rename
    if moment == "between renames":
        patch.setattr(Path, "rename", lambda path, to: kill() if "incomplete" in path.name else rename(path, to))
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        (folder / "original").mkdir()
        (folder / "original/tokenizer.model").write_text("new")
        if moment == "writing":
            kill()


@pytest.mark.parametrize("moment", ["writing", "between renames"])
def test_a_killed_run_leaves_nothing_that_looks_finished(moment, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("old")
    assert in_child(lambda: killed_run(tmp_path / "out", moment, monkeypatch)) == -signal.SIGKILL
    assert not any(path.name == "out" and (path / "original").exists() for path in tmp_path.iterdir())
    assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out/config.json").read_text() == "old"
    assert in_child(lambda: killed_run(tmp_path / "out", moment, monkeypatch)) == -signal.SIGKILL
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        assert leftovers(folder) == []
        (folder / "config.json").write_text("newer")
    assert leftovers(tmp_path) == ["out"]


# Manifest


def test_the_manifest_finds_every_change(tmp_path):
    digests = write_checkpoint(tmp_path, lazy({"x": np.arange(5.0)}))
    (tmp_path / "original").mkdir()
    (tmp_path / "original/tokenizer.model").write_text("abc")
    write_manifest(tmp_path, digests)
    assert check_manifest(tmp_path) == 2
    (tmp_path / "original/tokenizer.model").write_text("abd")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not the file"):
        check_manifest(tmp_path)
    (tmp_path / "original/tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.model is missing"):
        check_manifest(tmp_path)


def test_checksums_made_while_writing_are_those_of_the_files(tmp_path):
    digests = write_checkpoint(tmp_path, lazy({"x": np.arange(5.0), "y": np.arange(7)}), max_shard_size=10)
    write_manifest(tmp_path)
    files = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert len(digests) == 2
    assert all(files[name]["sha256"] == digest for name, digest in digests.items())


# Memory


def copy_and_measure(source: Path, target: Path) -> None:
    """Copy a checkpoint and write down by how much the process's peak of resident memory grew."""
    with open_checkpoint(source) as checkpoint:
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_memory()
        tensors = [LazyTensor(name, info, partial(checkpoint.read, name)) for name, info in checkpoint.items()]
        write_checkpoint(target, tensors, max_shard_size="120MB")
        (target / "growth").write_text(str(peak_memory() - before))


def peak_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_is_one_tensor_not_one_checkpoint(tmp_path):
    """200 MB in tensors of 10 MB pass through a process that grows by less than 50 MB."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    save_file(
        {f"t{i}": torch.full((5_000_000,), i, dtype=torch.bfloat16) for i in range(20)},
        tmp_path / "in/model.safetensors",
    )
    assert in_child(lambda: copy_and_measure(tmp_path / "in", tmp_path / "out")) == 0
    assert int((tmp_path / "out/growth").read_text()) < 50e6
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
