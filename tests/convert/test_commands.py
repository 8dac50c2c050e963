"""The commands: the scripts of ``conversion/`` and ``mistral-hf convert``."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from tqdm.auto import tqdm
from typer.testing import CliRunner

from mistral_hf.cli import app as mistral_hf_app
from mistral_hf.convert.folders import convert_raw_to_hf
from tests.helpers.checkpoint_files import bits, load_folder, read_json
from tests.helpers.raw_reference import COMMON, GENERATIONS, raw_tensors, write_raw, write_raw_lora

ROOT = Path(__file__).parents[2]


def command(name: str, *args: str | Path) -> Result:
    """Run a script of ``conversion/`` as the command line would."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "conversion" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return CliRunner().invoke(script.app, [str(arg) for arg in args])


def test_the_commands_convert_there_and_back_and_verify(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    there = ["--input_dir", raw, "--output_dir", tmp_path / "hf"]
    result = command("convert_mistral_weights_to_hf", *there, "--max_shard_size", "50KB", "--dtype", "float32")
    assert (result.exit_code, "manifest.json" in result.stdout) == (0, True), result.output
    again = command("convert_mistral_weights_to_hf", *there)
    assert (again.exit_code, again.stderr.startswith("Error: "), len(again.stderr.splitlines())) == (2, True, 1)
    assert command("convert_mistral_weights_to_hf", *there, "--overwrite").exit_code == 0
    back = ["--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "back"]
    assert command("convert_hf_weights_to_mistral", *back).exit_code == 0
    assert bits(load_file(tmp_path / "back/consolidated.safetensors")) == bits(raw_tensors(COMMON))
    same = command("verify_conversion", raw, tmp_path / "hf")
    assert (same.exit_code, same.stdout.count("same: ")) == (0, 3), same.output
    (raw / "params.json").write_text(json.dumps({**COMMON, "norm_eps": 1e-3}))
    assert command("verify_conversion", raw, tmp_path / "hf", "--no_logits").exit_code == 1


@pytest.mark.parametrize("name", ["verify_conversion", "convert_mistral_weights_to_hf"])
def test_the_commands_draw_a_progress_bar_in_a_terminal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Visible(tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "disable": False})

    monkeypatch.setattr("tqdm.auto.tqdm", Visible)
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    arguments = [raw, raw] if name == "verify_conversion" else ["--input_dir", raw, "--output_dir", tmp_path / "hf"]
    result = command(name, *arguments)
    assert result.exit_code == 0, result.output
    assert "100%" in result.stderr
    assert "B/s" in result.stderr


def test_a_command_runs_as_a_program() -> None:
    line = [sys.executable, str(ROOT / "conversion/convert_mistral_weights_to_hf.py"), "--help"]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "--max-position-embeddings" in result.stdout


def test_the_commands_only_print() -> None:
    """The rules are in the package: the commands import only it and their argument parser."""
    for path in (ROOT / "conversion").glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert {line.split()[1].split(".")[0] for line in lines} <= {"pathlib", "typing", "typer", "mistral_hf"}


def test_the_package_command_converts_like_the_script(tmp_path: Path) -> None:
    """``mistral-hf convert`` is the script under another name."""
    params = GENERATIONS[next(iter(GENERATIONS))]
    raw = write_raw(tmp_path / "raw", params, raw_tensors(params))
    result = CliRunner().invoke(mistral_hf_app, ["convert", str(raw), str(tmp_path / "hf"), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    convert_raw_to_hf(raw, tmp_path / "expected", dtype="float32")
    assert bits(load_folder(tmp_path / "hf")) == bits(load_folder(tmp_path / "expected"))
    assert read_json(tmp_path / "hf/config.json") == read_json(tmp_path / "expected/config.json")
    again = CliRunner().invoke(mistral_hf_app, ["convert", str(raw), str(tmp_path / "hf")])
    assert again.exit_code == 2
    assert "overwrite" in again.stderr


def test_a_comparison_that_cannot_be_made_does_not_fail(tmp_path: Path) -> None:
    params = {name: value for name, value in COMMON.items() if name != "rope_theta"}
    for name in "ab":
        write_raw(tmp_path / name, params, raw_tensors(COMMON))
    result = command("verify_conversion", tmp_path / "a", tmp_path / "b")
    assert (result.exit_code, result.stdout.count("same: "), result.stdout.count("not compared: ")) == (0, 2, 2)


def test_the_commands_convert_adapters_and_refuse_options_of_whole_models(tmp_path: Path) -> None:
    write_raw_lora(tmp_path / "lora")
    there = ["--input_dir", tmp_path / "lora", "--output_dir", tmp_path / "peft"]
    refused = command("convert_mistral_weights_to_hf", *there, "--rope_theta", "10000")
    assert refused.exit_code == 2
    assert "is an adapter" in refused.stderr
    assert "rope_theta" in refused.stderr
    assert command("convert_mistral_weights_to_hf", *there, "--dtype", "bfloat16").exit_code == 0
    result = CliRunner().invoke(mistral_hf_app, ["convert", str(tmp_path / "lora"), str(tmp_path / "peft2")])
    assert result.exit_code == 0, result.output


def test_an_error_is_one_printable_line(tmp_path: Path) -> None:
    """Names in a checkpoint may hold line breaks, control sequences of terminals and halves of surrogate pairs."""
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON) | {"\x1b[2J\nlayers": torch.zeros(1)})
    result = command("convert_mistral_weights_to_hf", "--input_dir", raw, "--output_dir", tmp_path / "hf")
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 2
    assert lines == [lines[0]]
    assert r"holds 1 unexpected tensors, \x1b[2J layers: a dense Mistral does not have them." in lines[0]


def convert(*arguments: str | Path) -> Result:
    return CliRunner().invoke(mistral_hf_app, ["convert", *map(str, arguments)])


def test_convert_finds_the_direction(tmp_path: Path) -> None:
    raw, hf, back = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON)), tmp_path / "hf", tmp_path / "back"
    lora = tmp_path / "lora"
    write_raw_lora(lora)
    for source, target, file in (
        (raw, hf, "config.json"),
        (hf, back, "params.json"),
        (lora, tmp_path / "peft", "adapter_config.json"),
    ):
        result = convert(source, target)
        assert result.exit_code == 0, result.output
        assert (target / file).is_file()
    assert bits(load_file(back / "consolidated.safetensors")) == bits(raw_tensors(COMMON))
    shutil.copy(hf / "config.json", tmp_path / "peft")  # the base model's, for its head counts
    assert convert(tmp_path / "peft", tmp_path / "lora2").exit_code == 0
    assert (tmp_path / "lora2/lora.safetensors").is_file()


def test_a_folder_in_both_formats_needs_the_direction(tmp_path: Path) -> None:
    both = write_raw(tmp_path / "both", COMMON, raw_tensors(COMMON))
    assert convert(both, tmp_path / "hf").exit_code == 0
    for file in (tmp_path / "hf").glob("*"):
        if file.name != "manifest.json" and file.is_file():
            shutil.copy(file, both)
    result = convert(both, tmp_path / "out")
    assert result.exit_code == 2
    assert "holds both formats: add --to hf or --to raw" in result.stderr
    assert convert(both, tmp_path / "out", "--to", "raw").exit_code == 0
    assert (tmp_path / "out/params.json").is_file()


def test_options_of_raw_folders_are_refused_for_others(tmp_path: Path) -> None:
    convert(write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON)), tmp_path / "hf")
    result = convert(tmp_path / "hf", tmp_path / "out", "--tokenizer-version", "v3", "--rope_theta", "1e4")
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert "--rope-theta, --tokenizer-version: " in result.stderr


def test_verify_is_a_command(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    convert(raw, tmp_path / "hf")
    result = CliRunner().invoke(mistral_hf_app, ["verify", str(raw), str(tmp_path / "hf")])
    assert (result.exit_code, result.stdout.count("same: ")) == (0, 3), result.output
    result = CliRunner().invoke(mistral_hf_app, ["verify", str(raw), str(tmp_path / "nothing")])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)


def test_an_error_leaves_no_empty_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Visible(tqdm):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{**options, "disable": False})

    monkeypatch.setattr("tqdm.auto.tqdm", Visible)
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/notes").write_text("mine")
    result = convert(raw, tmp_path / "hf")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "B/s" not in result.stderr
    assert convert(raw, tmp_path / "quiet", "--quiet").stderr == ""
