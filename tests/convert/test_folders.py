"""Whole folders: raw -> Hugging Face -> raw, refusals, and the safety of the output."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as StockMistral

import mistral_hf
from mistral_hf.checkpoints.reader import CheckpointError, TensorInfo
from mistral_hf.checkpoints.writer import LazyTensor, check_manifest, write_checkpoint
from mistral_hf.convert.folders import Conversion, convert_hf_to_raw, convert_raw_to_hf
from mistral_hf.convert.params import complete_params, normalize_params, params_difference
from mistral_hf.convert.tensors import raw_shapes
from tests.helpers.checkpoint_files import bits, load_folder, read_json, relative_error
from tests.helpers.raw_reference import (
    COMMON,
    GENERATIONS,
    TOKENS,
    VISION_SHAPES,
    in_child,
    raw_tensors,
    reference_logits,
    write_raw,
    write_raw_composite,
)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("layout", ["safetensors", "pth", "pth-2", "sharded"])
def test_there_and_back_is_bit_exact(generation: str, layout: str, tmp_path: Path) -> None:
    params, tensors = GENERATIONS[generation], raw_tensors(GENERATIONS[generation])
    if layout == "pth-2" and params["n_kv_heads"] == 1:
        pytest.skip("one key/value head cannot be cut in two")
    raw = write_raw(tmp_path / "raw", params, tensors, layout)
    convert_raw_to_hf(raw, tmp_path / "hf", max_shard_size="20KB")
    convert_hf_to_raw(tmp_path / "hf", tmp_path / "back")
    assert bits(load_file(tmp_path / "back/consolidated.safetensors")) == bits(tensors)
    there, _ = complete_params(normalize_params(params))
    assert params_difference(normalize_params(read_json(tmp_path / "back/params.json")), there) == {}
    convert_raw_to_hf(tmp_path / "back", tmp_path / "hf2", max_shard_size="20KB")
    assert bits(load_folder(tmp_path / "hf2")) == bits(load_folder(tmp_path / "hf"))
    assert read_json(tmp_path / "hf2/config.json") == read_json(tmp_path / "hf/config.json")
    assert check_manifest(tmp_path / "hf") >= 4


@pytest.mark.parametrize("generation", GENERATIONS)
def test_params_json_comes_back_byte_for_byte(generation: str, tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", GENERATIONS[generation], raw_tensors(GENERATIONS[generation]))
    convert_raw_to_hf(raw, tmp_path / "hf")
    convert_hf_to_raw(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back/params.json").read_bytes() == (raw / "params.json").read_bytes()


def test_params_json_is_made_anew_if_the_original_says_something_else(tmp_path: Path) -> None:
    """A configuration that was changed counts, and so do values that were given as options."""
    without = {name: value for name, value in COMMON.items() if name not in ("rope_theta", "max_seq_len")}
    raw = write_raw(tmp_path / "raw", without, raw_tensors(COMMON))
    convert_raw_to_hf(raw, tmp_path / "hf", rope_theta=5e5, max_position_embeddings=77)
    convert_hf_to_raw(tmp_path / "hf", tmp_path / "given")
    given = read_json(tmp_path / "given/params.json")
    assert (given["rope_theta"], given["max_seq_len"]) == (5e5, 77)
    config = read_json(tmp_path / "hf/config.json")
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"sliding_window": 9}))
    for damage in ("", "{"):
        if damage:
            (tmp_path / "hf/original/params.json").write_text(damage)
        convert_hf_to_raw(tmp_path / "hf", tmp_path / f"changed{damage}")
        assert read_json(tmp_path / f"changed{damage}/params.json") == given | {"sliding_window": 9}


@pytest.mark.parametrize("generation", ["7B v0.2", "Ministral 3"])
def test_the_text_model_beside_a_vision_tower_is_converted_and_the_tower_is_named(
    generation: str, tmp_path: Path
) -> None:
    params = GENERATIONS[generation]
    tensors = write_raw_composite(tmp_path / "raw", params)
    result = convert_raw_to_hf(tmp_path / "raw", tmp_path / "hf")
    assert sorted(result.left_out) == sorted(VISION_SHAPES)
    assert result.tensors == len(tensors)
    for line in ("vision_encoder.* left out: 2 tensors", "patch_merger.* left out: 1 tensors"):
        assert f"note: {line} of the vision tower" in result.summary()
    convert_raw_to_hf(write_raw(tmp_path / "text", params, tensors), tmp_path / "text-hf")
    assert bits(load_folder(tmp_path / "hf")) == bits(load_folder(tmp_path / "text-hf"))
    assert read_json(tmp_path / "hf/config.json") == read_json(tmp_path / "text-hf/config.json")


def test_the_way_back_says_that_the_vision_tower_is_gone(tmp_path: Path) -> None:
    tensors = write_raw_composite(tmp_path / "raw", COMMON)
    convert_raw_to_hf(tmp_path / "raw", tmp_path / "hf")
    result = convert_hf_to_raw(tmp_path / "hf", tmp_path / "back")
    assert any(note.startswith("the text model only: ") for note in result.notes)
    assert bits(load_file(tmp_path / "back/consolidated.safetensors")) == bits(tensors)
    assert "vision_encoder" not in read_json(tmp_path / "back/params.json")
    assert convert_raw_to_hf(tmp_path / "back", tmp_path / "hf2").left_out == ()


def test_a_vision_tower_that_params_json_does_not_describe_is_refused(tmp_path: Path) -> None:
    write_raw_composite(tmp_path / "raw", COMMON)
    (tmp_path / "raw/params.json").write_text(json.dumps(COMMON))
    with pytest.raises(ValueError, match=r"5 unexpected tensors.* vision tower, which params\.json does not"):
        convert_raw_to_hf(tmp_path / "raw", tmp_path / "hf")


def test_this_package_reads_the_result(tmp_path: Path) -> None:
    params, tensors = GENERATIONS["7B v0.1"], raw_tensors(GENERATIONS["7B v0.1"], torch.float32)
    convert_raw_to_hf(write_raw(tmp_path / "raw", params, tensors), tmp_path / "hf")
    model = mistral_hf.MistralForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert relative_error(logits, reference_logits(tensors, params, TOKENS).numpy()) < 2e-5


def test_stock_models_convert_to_raw(tmp_path: Path) -> None:
    """A folder that the library saved, in its newest spelling."""
    params = GENERATIONS["Nemo"]
    convert_raw_to_hf(write_raw(tmp_path / "raw", params, raw_tensors(params)), tmp_path / "hf")
    StockMistral.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    convert_hf_to_raw(tmp_path / "saved", tmp_path / "back")
    assert bits(load_file(tmp_path / "back/consolidated.safetensors")) == bits(raw_tensors(params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_cast_to_the_given_dtype(dtype: str, tmp_path: Path) -> None:
    tensors = raw_tensors(COMMON, torch.float32)
    convert_raw_to_hf(write_raw(tmp_path / "raw", COMMON, tensors), tmp_path / "hf", dtype=dtype)
    converted = load_file(tmp_path / "hf/model.safetensors")
    name = "layers.0.feed_forward.w1.weight"
    assert torch.equal(converted["model.layers.0.mlp.gate_proj.weight"], tensors[name].to(getattr(torch, dtype)))
    assert read_json(tmp_path / "hf/config.json")["torch_dtype"] == dtype
    assert {t.dtype for t in converted.values()} == {getattr(torch, dtype)}


def test_a_dtype_that_overflows_is_refused(tmp_path: Path) -> None:
    tensors = raw_tensors(COMMON)
    tensors["norm.weight"][0] = 1e6
    raw = write_raw(tmp_path / "raw", COMMON, tensors)
    with pytest.raises(ValueError, match=r"norm\.weight has values too large for float16"):
        convert_raw_to_hf(raw, tmp_path / "hf", dtype="float16")
    with pytest.raises(ValueError, match="the dtypes are float32"):
        convert_raw_to_hf(raw, tmp_path / "hf", dtype="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_head_is_left_out_only_if_it_repeats_the_tied_embeddings(tmp_path: Path) -> None:
    params = GENERATIONS["tied"]
    tensors = raw_tensors(params)
    same = {**tensors, "output.weight": tensors["tok_embeddings.weight"].clone()}
    result = convert_raw_to_hf(write_raw(tmp_path / "same", params, same), tmp_path / "hf")
    assert any("repeats the tied embeddings" in note for note in result.notes)
    assert "lm_head.weight" not in load_file(tmp_path / "hf/model.safetensors")
    other = {**same, "output.weight": -same["output.weight"]}
    with pytest.raises(CheckpointError, match="has other values"):
        convert_raw_to_hf(write_raw(tmp_path / "other", params, other), tmp_path / "hf2")


def test_given_lengths_are_reported(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    result = convert_raw_to_hf(raw, tmp_path / "hf", max_position_embeddings=512)
    assert read_json(tmp_path / "hf/config.json")["max_position_embeddings"] == 512
    assert "max_position_embeddings = 512: as given" in result.notes
    assert any("no tokenizer" in note for note in result.notes)
    assert "manifest.json" in result.summary()


def test_a_summary_lists_notes_and_size() -> None:
    text = Conversion(Path("out"), 3, 2_500_000_000, ["a note"]).summary()
    assert text == "note: a note\nout: 3 tensors, 2.5 GB, listed in manifest.json"


# Refusals


def test_inputs_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        convert_raw_to_hf(tmp_path / "nowhere", tmp_path / "hf")
    for output in (raw, tmp_path):
        with pytest.raises(ValueError, match="is or contains the input"):
            convert_raw_to_hf(raw, output, overwrite=True)
    (raw / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"params\.json is not JSON"):
        convert_raw_to_hf(raw, tmp_path / "hf")
    (raw / "params.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        convert_raw_to_hf(raw, tmp_path / "hf")
    (raw / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks params\.json"):
        convert_raw_to_hf(raw, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_params_that_contradict_the_weights_are_refused(tmp_path: Path) -> None:
    """Permuting k with the wrong head count raises no error, but the shapes show it."""
    raw = write_raw(tmp_path / "raw", {**COMMON, "n_kv_heads": 4}, raw_tensors(COMMON))
    with pytest.raises(ValueError, match=r"wk\.weight has shape"):
        convert_raw_to_hf(raw, tmp_path / "hf")


def test_a_truncated_input_leaves_nothing(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    path = raw / "consolidated.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        convert_raw_to_hf(raw, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_overwriting_replaces_a_conversions_output_and_nothing_else(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    convert_raw_to_hf(raw, tmp_path / "hf")
    convert_raw_to_hf(raw, tmp_path / "hf", dtype="float32", overwrite=True)
    assert read_json(tmp_path / "hf/config.json")["torch_dtype"] == "float32"
    (tmp_path / "hf/notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"hf holds notes\.txt, which no conversion wrote"):
        convert_raw_to_hf(raw, tmp_path / "hf", overwrite=True)
    assert (tmp_path / "hf/notes.txt").read_text() == "precious"
    with pytest.raises(FileExistsError, match="other is not the output of a conversion"):
        convert_raw_to_hf(raw, write_raw(tmp_path / "other", COMMON, raw_tensors(COMMON)), overwrite=True)


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_symbolic_link_is_written_where_it_points_to(there: bool, tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    (tmp_path / "disk").mkdir()
    (tmp_path / "hf").symlink_to("disk/hf")
    if there:
        (tmp_path / "disk/hf").mkdir()
    convert_raw_to_hf(raw, tmp_path / "hf")
    assert os.readlink(tmp_path / "hf") == "disk/hf"
    assert check_manifest(tmp_path / "disk/hf") == 4


# Interrupted and failed runs


def test_a_killed_conversion_leaves_nothing_finished_and_the_next_run_is_clean(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))

    def kill_half_way(done: int, total: int) -> None:
        if done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    killed = in_child(lambda: convert_raw_to_hf(raw, tmp_path / "hf", max_shard_size="20KB", progress=kill_half_way))
    assert killed == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hf.incomplete", "raw"]
    convert_raw_to_hf(raw, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "raw"]
    assert check_manifest(tmp_path / "hf") == 4


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A limit on the file size acts like a disk that fills up while the weights are written."""
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))

    def convert_on_a_full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        convert_raw_to_hf(raw, tmp_path / "hf")

    assert in_child(convert_on_a_full_disk) == 1
    assert "File too large" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


# Full size, by hand


FULL_SIZE = """
    import sys, time
    from mistral_hf.convert.folders import convert_raw_to_hf
    start = time.perf_counter()
    convert_raw_to_hf(sys.argv[1], sys.argv[2])
    seconds = time.perf_counter() - start
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
    print(seconds, int(lines["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.slow
def test_a_full_size_checkpoint_streams(tmp_path: Path) -> None:
    """14.5 GB of random 7B weights: little memory, and at least 0.7 of the speed of copying the same bytes."""
    sizes = dict(zip(("dim", "n_layers", "n_heads", "n_kv_heads"), (4096, 32, 32, 8), strict=True))
    params = {**sizes, "head_dim": 128, "hidden_dim": 14336, "vocab_size": 32768, "norm_eps": 1e-5, "rope_theta": 1e6}
    params["max_seq_len"] = 32768
    raw = tmp_path / "raw"
    write_random(raw, params)
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", raw, tmp_path / "copy"], check=True)
    os.sync()
    copy_seconds = time.perf_counter() - start
    subprocess.run(["rm", "-r", tmp_path / "copy"], check=True)
    line = [sys.executable, "-c", textwrap.dedent(FULL_SIZE), str(raw), str(tmp_path / "hf")]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    seconds, peak = map(float, result.stdout.split())
    size = (raw / "consolidated.safetensors").stat().st_size
    print(f"\n{size / 1e9:.1f} GB: cp {size / 1e9 / copy_seconds:.2f} GB/s, converted {size / 1e9 / seconds:.2f} GB/s,")
    print(f"{copy_seconds / seconds:.2f} of cp's speed, peak memory {peak / 1e9:.2f} GB")
    assert peak < 5e9
    assert copy_seconds / seconds > 0.7


def write_random(folder: Path, params: dict[str, Any]) -> None:
    """Random weights, written as a stream by the package itself."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    random = np.random.default_rng(0)

    def tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
        info = TensorInfo("float16", shape)
        return LazyTensor(name, info, lambda: np.frombuffer(random.bytes(info.nbytes), np.float16).reshape(shape))

    tensors = [tensor(name, shape) for name, shape in raw_shapes(normalize_params(params)).items()]
    write_checkpoint(folder, tensors, stem="consolidated")
