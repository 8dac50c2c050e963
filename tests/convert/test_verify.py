"""Verification: a faithful conversion passes, and every kind of difference is found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mistral_hf.compatibility import CheckpointError
from mistral_hf.convert import params as params_module
from mistral_hf.convert.folders import convert_hf_to_raw, convert_raw_to_hf
from mistral_hf.convert.verify import verify
from tests.helpers.checkpoint_files import read_json
from tests.helpers.raw_reference import COMMON, GENERATIONS, raw_tensors, write_raw, write_raw_composite
from tests.helpers.tokenizer_files import REAL


def outcomes(a: Path, b: Path, **options: Any) -> dict[str, bool | None]:
    return {check.name: check.ok for check in verify(a, b, **options)}


@pytest.mark.parametrize("generation", ["7B v0.1", "Nemo", "Ministral 8B", "tied", "yarn", "Ministral 3"])
def test_a_faithful_conversion_passes(generation: str, tmp_path: Path) -> None:
    params = GENERATIONS[generation]
    raw = write_raw(tmp_path / "raw", params, raw_tensors(params))
    convert_raw_to_hf(raw, tmp_path / "hf")
    convert_hf_to_raw(tmp_path / "hf", tmp_path / "back")
    passed = {"configuration": True, "tensors": True, "tokenizer": None, "logits": True}
    assert outcomes(raw, tmp_path / "hf") == passed
    assert outcomes(tmp_path / "hf", tmp_path / "hf") == passed
    assert outcomes(raw, tmp_path / "back") == passed


def converted(tmp_path: Path) -> tuple[Path, Path]:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    convert_raw_to_hf(raw, tmp_path / "hf")
    return raw, tmp_path / "hf"


def test_progress_counts_the_bytes_of_the_tensors(tmp_path: Path) -> None:
    raw, hf = converted(tmp_path)
    size = sum(tensor.nbytes for tensor in raw_tensors(COMMON).values())
    for a, b in ((raw, hf), (hf, raw)):
        calls: list[tuple[int, int]] = []
        list(verify(a, b, logits=False, progress=lambda done, total, calls=calls: calls.append((done, total))))
        assert calls[-1] == (size, size)
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
        assert len(calls) == len(raw_tensors(COMMON))


def test_a_wrong_permutation_is_found(tmp_path: Path) -> None:
    """k permuted with the number of query heads has the right shape, but its values are in the wrong rows."""
    raw, hf = converted(tmp_path)
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    weight = load_file(raw / "consolidated.safetensors")["layers.0.attention.wk.weight"]
    tensors[name] = weight.view(4, 4, 2, 64).transpose(1, 2).reshape(32, 64)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    assert outcomes(raw, hf) == {"configuration": True, "tensors": False, "tokenizer": None, "logits": False}


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    raw, hf = converted(tmp_path)
    path = hf / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    assert outcomes(raw, hf, logits=False) == {"configuration": True, "tensors": False, "tokenizer": None}


def test_a_wrong_configuration_is_found(tmp_path: Path) -> None:
    raw, hf = converted(tmp_path)
    config = read_json(hf / "config.json")
    (hf / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    assert outcomes(raw, hf) == {"configuration": False, "tensors": True, "tokenizer": None, "logits": False}


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither params"):
        list(verify(tmp_path, tmp_path))


def write_without(folder: Path, params: dict[str, Any], *fields: str) -> Path:
    """A raw folder whose ``params.json`` leaves out these fields."""
    write_raw(folder, params, raw_tensors(params))
    (folder / "params.json").write_text(json.dumps({k: v for k, v in params.items() if k not in fields}))
    return folder


def test_raw_folders_without_rope_theta_are_compared_except_for_their_logits(tmp_path: Path) -> None:
    a, b = (write_without(tmp_path / name, COMMON, "rope_theta") for name in "ab")
    checks = {check.name: check for check in verify(a, b)}
    assert {name: check.ok for name, check in checks.items()} == {
        "configuration": True,
        "tensors": True,
        "tokenizer": None,
        "logits": None,
    }
    assert "rope_theta" in checks["logits"].detail
    assert "params.json" in checks["logits"].detail
    assert "not given by both: rope_theta" in checks["configuration"].detail


def test_a_length_that_neither_folder_gives_is_not_needed(tmp_path: Path) -> None:
    a, b = (write_without(tmp_path / name, COMMON, "max_seq_len") for name in "ab")
    assert outcomes(a, b) == {"configuration": True, "tensors": True, "tokenizer": None, "logits": True}


def test_raw_layers_with_different_windows_are_compared_past_the_window(tmp_path: Path) -> None:
    params = GENERATIONS["Ministral 8B"]
    a, b = (write_without(tmp_path / name, params, *left_out) for name, left_out in (("a", ()), ("b", ["max_seq_len"])))
    assert outcomes(a, b) == {"configuration": True, "tensors": True, "tokenizer": None, "logits": True}
    other = write_without(tmp_path / "c", params | {"_sliding_window": [6, 6, 6, None]})
    assert outcomes(a, other) == {"configuration": False, "tensors": True, "tokenizer": None, "logits": False}


def test_a_vision_tower_is_named_as_not_compared(tmp_path: Path) -> None:
    write_raw_composite(tmp_path / "raw", COMMON)
    convert_raw_to_hf(tmp_path / "raw", tmp_path / "hf")
    checks = {check.name: check for check in verify(tmp_path / "raw", tmp_path / "hf")}
    assert [check.ok for check in checks.values()] == [True, True, None, True]
    assert "not compared: 5 tensors of a vision tower" in checks["tensors"].detail


def test_the_table_of_published_models_gives_a_missing_rope_theta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = tuple(COMMON[field] for field in params_module.SIZES)
    known = (params_module.KnownModel("Tiny", shape, 1e6, 256),)
    monkeypatch.setattr(params_module, "KNOWN_MODELS", known)
    a, b = (write_without(tmp_path / name, COMMON, "rope_theta") for name in "ab")
    assert outcomes(a, b)["logits"] is True


def test_a_checkpoint_that_lacks_tensors_is_refused_by_name(tmp_path: Path) -> None:
    raw, hf = converted(tmp_path)
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"hf lacks 1 tensors, model\.norm\.weight"):
        list(verify(raw, hf))


def test_a_tokenizer_with_more_ids_than_the_vocabulary_leaves_the_logits_out(tmp_path: Path) -> None:
    a, b = (write_raw(tmp_path / name, COMMON, raw_tensors(COMMON)) for name in "ab")
    for folder in (a, b):
        shutil.copyfile(REAL["v3"], folder / REAL["v3"].name)
    check = next(check for check in verify(a, b) if check.name == "logits")
    assert (check.ok, check.detail) == (None, "the tokenizer has ids beyond the vocabulary of 80 tokens")


def test_a_folder_that_the_library_cannot_load_is_named(tmp_path: Path) -> None:
    raw, hf = converted(tmp_path)
    config = read_json(hf / "config.json")
    (hf / "config.json").write_text(json.dumps({**config, "use_cache": "yes"}))
    with pytest.raises(CheckpointError, match=r"hf cannot be loaded by transformers: .*use_cache"):
        list(verify(raw, hf))
