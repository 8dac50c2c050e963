"""Saving over a checkpoint: what is kept, what is replaced, and the manifest of the result."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from mistral_hf import MistralConfig
from mistral_hf.checkpoints.pretrained import save_folder
from mistral_hf.checkpoints.reader import open_checkpoint
from mistral_hf.checkpoints.writer import check_manifest
from mistral_hf.convert.folders import convert_hf_to_raw, convert_raw_to_hf
from tests.helpers.checkpoint_files import lazy_tensors, read_json
from tests.helpers.raw_reference import COMMON, raw_tensors, write_raw
from tests.helpers.tokenizer_files import REAL

TOKENIZER = REAL["v3"]


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """A converted folder, with its raw tokenizer and its manifest."""
    params = {**COMMON, "vocab_size": 32768}
    raw = write_raw(tmp_path / "raw", params, raw_tensors(params))
    shutil.copyfile(TOKENIZER, raw / TOKENIZER.name)
    convert_raw_to_hf(raw, tmp_path / "hf", max_shard_size="3MB")
    return tmp_path / "hf"


def save_over(folder: Path, max_shard_size: int | str = "50GB") -> None:
    """Save all weights over a checkpoint, as the ports do, with one added to those of the norm."""
    with open_checkpoint(folder) as checkpoint:
        arrays = {name: checkpoint.read(name) for name in checkpoint}
    arrays["model.norm.weight"] = arrays["model.norm.weight"] + 1
    save_folder(
        folder,
        MistralConfig.from_pretrained(folder),
        None,
        lazy_tensors(arrays),
        architecture="MistralForCausalLM",
        dtype="bfloat16",
        max_shard_size=max_shard_size,
    )


@pytest.mark.parametrize("max_shard_size", ["50GB", "2MB"])
def test_saving_over_a_converted_folder_keeps_the_way_back_and_renews_the_manifest(
    converted: Path, tmp_path: Path, max_shard_size: str
) -> None:
    (converted / "runs").mkdir()
    (converted / "runs/log.txt").write_text("step 1")
    (converted / "README.md").write_text("my model")
    before = {path: path.read_bytes() for path in converted.rglob("*") if "model" not in path.name and path.is_file()}
    with open_checkpoint(converted) as checkpoint:
        norm = checkpoint.read("model.norm.weight")
    save_over(converted, max_shard_size)
    for path, content in before.items():
        if path.name not in ("config.json", "manifest.json"):
            assert path.read_bytes() == content, path
    assert (converted / "original" / TOKENIZER.name).read_bytes() == TOKENIZER.read_bytes()
    assert check_manifest(converted) == len([path for path in converted.rglob("*") if path.is_file()]) - 1
    convert_hf_to_raw(converted, tmp_path / "back")
    assert (tmp_path / "back" / TOKENIZER.name).exists()
    assert np.array_equal(
        load_file(tmp_path / "back/consolidated.safetensors")["norm.weight"].float().numpy(), (norm + 1).astype("f4")
    )


STALE = (
    *("model-00001-of-00009.safetensors", "model.safetensors.index.json", "model.fp16.safetensors"),
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
    *("tf_model.h5", "tf_model.h5.index.json", "flax_model.msgpack", "flax_model.msgpack.index.json"),
    *("consolidated.safetensors", "consolidated.00.pth", "consolidated.safetensors.index.json"),
)
KEPT = ("model_card.txt", "tokenizer.json", "pytorch_model.txt", "optimizer.bin", "modeling.py", ".gitattributes")


def test_stale_weights_of_any_format_are_not_kept(converted: Path) -> None:
    save_over(converted)  # into one file
    for name in (*STALE, *KEPT):
        (converted / name).write_text("old")
    for name in ("original/model.safetensors", "original/pytorch_model.bin"):
        (converted / name).write_text("of another model")
    (converted / "model.safetensors.index.json").unlink()
    save_over(converted)
    assert [name for name in STALE if (converted / name).exists()] == []
    assert [name for name in KEPT if not (converted / name).exists()] == []
    assert (converted / "original/pytorch_model.bin").read_text() == "of another model"
    assert check_manifest(converted) > len(KEPT)


def test_a_folder_without_a_manifest_gets_none(converted: Path) -> None:
    (converted / "manifest.json").unlink()
    save_over(converted)
    assert not (converted / "manifest.json").exists()
    assert (converted / "original" / TOKENIZER.name).exists()


def test_kept_files_are_linked_and_not_read(converted: Path) -> None:
    """They take neither memory nor disk space, and keep their times and permissions."""
    large = converted / "original/other.bin"
    large.touch(mode=0o640)
    os.truncate(large, 1 << 40)  # a sparse file, larger than any memory
    (converted / "manifest.json").unlink()
    before = large.stat()
    save_over(converted)
    after = large.stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_mode) == (before.st_ino, before.st_mtime_ns, before.st_mode)
    assert after.st_nlink == 1


def test_kept_files_are_copied_where_links_are_not_possible(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    (converted / "README.md").write_text("my model")
    save_over(converted)
    assert (converted / "README.md").read_text() == "my model"
    assert (converted / "original" / TOKENIZER.name).read_bytes() == TOKENIZER.read_bytes()
    check_manifest(converted)


def test_a_folder_that_is_a_symbolic_link_stays_one(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("hf")
    save_over(tmp_path / "link")
    assert os.readlink(tmp_path / "link") == "hf"
    assert check_manifest(converted) > 3
    assert not list(tmp_path.glob(".*"))


def test_saved_weights_are_no_conversions_output(converted: Path, tmp_path: Path) -> None:
    """``--overwrite`` would lose what was trained."""
    convert_raw_to_hf(tmp_path / "raw", converted, overwrite=True)
    save_over(converted)
    before = (converted / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="is not the output of a conversion"):
        convert_raw_to_hf(tmp_path / "raw", converted, overwrite=True)
    assert (converted / "model.safetensors").read_bytes() == before


def test_symbolic_links_stay_links(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/text.txt").write_text("far away")
    (converted / "data").symlink_to("../data")
    (converted / "text.txt").symlink_to("../data/text.txt")
    (converted / "lost").symlink_to("nowhere")
    save_over(converted)
    assert os.readlink(converted / "data") == "../data"
    assert (converted / "text.txt").read_text() == "far away"
    assert (converted / "lost").is_symlink()
    check_manifest(converted)


def test_saving_after_a_run_killed_between_its_renames_keeps_the_files(converted: Path) -> None:
    save_over(converted)
    with open_checkpoint(converted) as checkpoint:
        tensors = lazy_tensors({name: checkpoint.read(name) for name in checkpoint})
    config = MistralConfig.from_pretrained(converted)
    converted.rename(converted.with_name(".hf.replaced"))
    save_folder(converted, config, None, tensors, architecture="MistralForCausalLM", dtype="bfloat16")
    assert (converted / "original" / TOKENIZER.name).exists()
    check_manifest(converted)


def test_only_a_checkpoint_in_the_hugging_face_format_is_replaced(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/dear.txt").write_text("Dear")
    for folder in (raw, tmp_path / "letters"):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(FileExistsError, match=r"holds no config\.json"):
            save_folder(folder, MistralConfig(), None, [], architecture="MistralForCausalLM", dtype="float32")
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    save_folder(tmp_path / "empty", MistralConfig(), None, [], architecture="MistralForCausalLM", dtype="float32")
    assert read_json(tmp_path / "empty/config.json")["architectures"] == ["MistralForCausalLM"]
