"""Writing checkpoints: shards, folders that are all or nothing, manifests, memory."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mistral_hf.checkpoints.reader import CheckpointError, TensorInfo, open_checkpoint, same_bits
from mistral_hf.checkpoints.writer import (
    LazyTensor,
    atomic_folder,
    check_manifest,
    file_sha256,
    parse_size,
    write_checkpoint,
    write_manifest,
)
from tests.helpers.checkpoint_files import lazy_tensors
from tests.helpers.raw_reference import in_child


def test_shards_follow_the_size_limit_and_the_index(tmp_path: Path) -> None:
    arrays = {f"t{i}": np.full((100,), i, np.float32) for i in range(7)} | {"big": np.zeros(1000, np.float32)}
    digests = write_checkpoint(tmp_path, lazy_tensors(arrays), max_shard_size=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 400 + 4000
    assert set(index["weight_map"]) == set(arrays)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == sorted(digests) == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    for name in names:
        with safe_open(tmp_path / name, "np") as shard:
            assert shard.metadata() == {"format": "pt"}
            sizes = [arrays[key].nbytes for key in shard.keys()]  # noqa: SIM118 - a safe_open handle is not a mapping
            assert sum(sizes) <= 1000 or len(sizes) == 1
    with open_checkpoint(tmp_path) as checkpoint:
        assert all(same_bits(checkpoint.read(name), array) for name, array in arrays.items())


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    arrays = {f"t{i}": np.zeros(10 * i, np.float32) for i in range(4)}
    write_checkpoint(
        tmp_path, lazy_tensors(arrays), max_shard_size=100, progress=lambda done, total: calls.append((done, total))
    )
    assert calls[-1] == (240, 240)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_tensor_other_than_announced_is_refused(tmp_path: Path) -> None:
    tensor = LazyTensor("x", TensorInfo("float32", (2, 3)), lambda: np.zeros((3, 2), np.float32))
    with pytest.raises(CheckpointError, match="x was announced"):
        write_checkpoint(tmp_path, [tensor])


def test_streamed_tensors_larger_than_a_piece_survive(tmp_path: Path) -> None:
    """Pieces are read into two buffers in turn; none may be overwritten before it is written and hashed."""
    (tmp_path / "copy").mkdir()
    values = np.arange(15_000_000, dtype=np.uint32)
    write_checkpoint(tmp_path, lazy_tensors({"a": values, "b": values[::-1].copy()}))
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
    ("text", "size"), [("5GB", 5 * 10**9), ("512MiB", 2**29), (7, 7), ("10 kb", 10**4), (None, None)]
)
def test_sizes_are_read_in_decimal_and_binary_units(text: str | int | None, size: int | None) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5 apples", "", "-1", "0GB", "1.5GB"])
def test_sizes_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Cannot read the size"):
        parse_size(text)


# Output that is all or nothing


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep/out") as folder:
        (folder / "config.json").write_text("{}")
        assert leftovers(tmp_path / "deep") == [".out.incomplete"]
    assert leftovers(tmp_path / "deep") == ["out"]
    assert leftovers(tmp_path / "deep/out") == ["config.json"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert leftovers(tmp_path) == []


def test_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("old")
    with pytest.raises(FileExistsError, match="--overwrite"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out/config.json").read_text() == "old"
    assert leftovers(tmp_path) == ["out"]


def test_overwriting_replaces_the_whole_folder_and_only_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", overwrite=True):
        raise ZeroDivisionError
    assert (tmp_path / "out/config.json").read_text() == "old"
    with atomic_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "params.json").write_text("new")
    assert leftovers(tmp_path / "out") == ["params.json"]
    assert leftovers(tmp_path) == ["out"]


def test_overwriting_spares_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("precious")
    work = atomic_folder(tmp_path / "home", overwrite=True)
    with pytest.raises(FileExistsError, match="does not look like a checkpoint"), work:
        pass
    assert (tmp_path / "home/thesis.txt").exists()


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("")
    assert leftovers(tmp_path / "out") == ["x"]


def test_a_full_disk_is_noticed_first(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="GB free"), atomic_folder(tmp_path / "out", needs_bytes=10**18):
        pytest.fail("must not begin")
    assert leftovers(tmp_path) == []


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("first")
        with pytest.raises(BlockingIOError, match="Another run"), atomic_folder(tmp_path / "out"):
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
def test_a_killed_run_leaves_nothing_that_looks_finished(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_link_that_a_killed_run_left_is_removed_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/text.txt").write_text("precious")
    (tmp_path / ".out.incomplete").mkdir()
    (tmp_path / ".out.incomplete/data").symlink_to("../data")
    with atomic_folder(tmp_path / "out") as folder:
        assert leftovers(folder) == []
    assert (tmp_path / "data/text.txt").read_text() == "precious"


# Manifest


def test_the_manifest_finds_every_change(tmp_path: Path) -> None:
    digests = write_checkpoint(tmp_path, lazy_tensors({"x": np.arange(5.0)}))
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


def test_a_checksum_counts_for_the_file_at_its_path_only(tmp_path: Path) -> None:
    digests = write_checkpoint(tmp_path, lazy_tensors({"x": np.arange(5.0)}))
    (tmp_path / "original").mkdir()
    (tmp_path / "original/model.safetensors").write_text("another file of that name")
    write_manifest(tmp_path, digests)
    assert check_manifest(tmp_path) == 2


def test_checksums_made_while_writing_are_those_of_the_files(tmp_path: Path) -> None:
    digests = write_checkpoint(tmp_path, lazy_tensors({"x": np.arange(5.0), "y": np.arange(7)}), max_shard_size=10)
    write_manifest(tmp_path)
    files = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert len(digests) == 2
    assert all(files[name]["sha256"] == digest for name, digest in digests.items())


# Memory


def copy_and_measure(source: Path, target: Path) -> None:
    """Copy a checkpoint and record how much the process's peak of resident memory grew."""
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
def test_memory_is_one_tensor_not_one_checkpoint(tmp_path: Path) -> None:
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
