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

from mistral_hf.checkpoints.reader import CheckpointError, TensorInfo, numpy_dtype, open_checkpoint, same_bits
from mistral_hf.checkpoints.writer import (
    CONVERSION,
    LazyTensor,
    atomic_folder,
    check_converted,
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


@pytest.mark.parametrize("sizes", [[24], [23], [25], [8, 8], [8, 8, 9], []])
def test_a_stream_of_another_length_than_announced_is_refused(sizes: list[int], tmp_path: Path) -> None:
    """The header is already written, and says where the next tensor begins."""
    pieces = [memoryview(bytes(size)) for size in sizes]
    info = TensorInfo("float32", (2, 3))
    tensor = LazyTensor("x", info, lambda: np.zeros((2, 3), np.float32), lambda: iter(pieces))
    if sum(sizes) == info.nbytes:
        write_checkpoint(tmp_path, [tensor])
        return
    with pytest.raises(CheckpointError, match=r"x was announced with 24 bytes, but has (more|fewer)"):
        write_checkpoint(tmp_path, [tensor])


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fnuz"])
def test_a_dtype_that_the_format_lacks_is_refused(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"x is {dtype}, which safetensors files cannot hold"):
        write_checkpoint(tmp_path, lazy_tensors({"x": np.zeros(2, numpy_dtype(dtype))}))


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


def converted_folder(folder: Path) -> Path:
    """A folder that a conversion wrote."""
    folder.mkdir()
    (folder / "config.json").write_text("old")
    write_manifest(folder, made_by=CONVERSION)
    return folder


def test_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    converted_folder(tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out/config.json").read_text() == "old"
    assert leftovers(tmp_path) == ["out"]


def test_overwriting_replaces_the_whole_folder_and_only_at_the_end(tmp_path: Path) -> None:
    converted_folder(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "out", check_replaceable=check_converted):
        raise ZeroDivisionError
    assert (tmp_path / "out/config.json").read_text() == "old"
    with atomic_folder(tmp_path / "out", check_replaceable=check_converted) as folder:
        (folder / "params.json").write_text("new")
    assert leftovers(tmp_path / "out") == ["params.json"]
    assert leftovers(tmp_path) == ["out"]


@pytest.mark.parametrize("manifest", [None, "{", '{"files": {}}', '{"made_by": "mistral_hf.convert", "files": 3}'])
def test_overwriting_spares_what_no_conversion_wrote(manifest: str | None, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("precious")
    (home / "config.json").write_text("{}")
    if manifest is not None:
        (home / "manifest.json").write_text(manifest)
    work = atomic_folder(home, check_replaceable=check_converted)
    with pytest.raises(FileExistsError, match=r"home is not the output of a conversion \(no manifest\.json"), work:
        pytest.fail("must not begin")
    assert (home / "thesis.txt").read_text() == "precious"
    assert leftovers(tmp_path) == ["home"]


@pytest.mark.parametrize("name", ["thesis.txt", "deep/thesis.txt", ".hidden", "link"])
def test_overwriting_spares_other_files_in_a_converted_folder(name: str, tmp_path: Path) -> None:
    out = converted_folder(tmp_path / "out")
    (out / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (out / name).symlink_to(tmp_path)
    else:
        (out / name).write_text("precious")
    work = atomic_folder(out, check_replaceable=check_converted)
    with pytest.raises(FileExistsError, match=rf"out holds {name}, which no conversion wrote"), work:
        pytest.fail("must not begin")
    assert os.path.lexists(out / name)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    work = atomic_folder(tmp_path / "out", check_replaceable=check_converted)
    with pytest.raises(FileExistsError, match="out is not a folder"), work:
        pytest.fail("must not begin")
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("state", ["missing", "empty", "converted"])
def test_an_output_that_is_a_symbolic_link_stays_one(state: str, tmp_path: Path) -> None:
    """The folder that it points to is written, which may be on another disk."""
    (tmp_path / "disk").mkdir()
    if state == "converted":
        converted_folder(tmp_path / "disk/out")
    elif state == "empty":
        (tmp_path / "disk/out").mkdir()
    (tmp_path / "link").symlink_to("disk/out")
    with atomic_folder(tmp_path / "link", check_replaceable=check_converted) as folder:
        assert folder.parent == tmp_path / "disk"
        (folder / "config.json").write_text("new")
    assert os.readlink(tmp_path / "link") == "disk/out"
    assert leftovers(tmp_path / "disk/out") == ["config.json"]
    assert (leftovers(tmp_path), leftovers(tmp_path / "disk")) == (["disk", "link"], ["out"])


def test_an_output_that_links_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(OSError, match="out"), atomic_folder(tmp_path / "out"):
        pytest.fail("must not begin")
    assert leftovers(tmp_path) == ["out"]


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
    with atomic_folder(target, check_replaceable=check_converted) as folder:
        (folder / "config.json").write_text("new")
        (folder / "original").mkdir()
        (folder / "original/tokenizer.model").write_text("new")
        if moment == "writing":
            kill()


@pytest.mark.parametrize("moment", ["writing", "between renames"])
def test_a_killed_run_leaves_nothing_that_looks_finished(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted_folder(tmp_path / "out")
    assert in_child(lambda: killed_run(tmp_path / "out", moment, monkeypatch)) == -signal.SIGKILL
    assert not any(path.name == "out" and (path / "original").exists() for path in tmp_path.iterdir())
    assert any(path.name.startswith(".out.") for path in tmp_path.iterdir())
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out/config.json").read_text() == "old"
    assert in_child(lambda: killed_run(tmp_path / "out", moment, monkeypatch)) == -signal.SIGKILL
    with atomic_folder(tmp_path / "out", check_replaceable=check_converted) as folder:
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


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": []}', '{"files": {"x": 1}}', '{"files": {"x": {}}}'])
def test_a_malformed_manifest_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json is not a manifest"):
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
