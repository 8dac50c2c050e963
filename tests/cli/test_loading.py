"""What a checkpoint that cannot be loaded is told, on one line, and under the option that it is about."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mistral_hf import BUNDLED_CHECKPOINT
from mistral_hf.cli import app, application
from tests.helpers.raw_reference import COMMON, raw_tensors, write_raw

PROMPT = "The captain looked out over the sea and"


def generate(folder: str | Path, *options: str) -> Result:
    arguments = ["generate", PROMPT, "--model", str(folder), "--greedy", "--max-new-tokens", "6", *options]
    return CliRunner().invoke(app, arguments)


def refused(folder: str | Path, *options: str) -> str:
    result = generate(folder, *options)
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (2, "", 1), result.output
    return result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the bundled checkpoint that changes its text, without a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT)
    tuned: Any = get_peft_model(model, LoraConfig(target_modules=["o_proj"], lora_alpha=99, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("adapter")
    tuned.save_pretrained(folder)
    return folder


def test_an_adapter_runs_on_the_base_model_that_its_configuration_names(adapter: Path) -> None:
    result = generate(adapter)
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tuned = AutoModelForCausalLM.from_pretrained(adapter).generate(**inputs, do_sample=False, max_new_tokens=6)
    assert result.stdout.strip() == tokenizer.decode(tuned[0], skip_special_tokens=True)
    assert result.stdout != generate(BUNDLED_CHECKPOINT).stdout
    assert result.stderr == ""


def test_an_adapter_names_what_it_lacks(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    config = json.loads((copy / "adapter_config.json").read_text())
    for base, message in ((None, "has no base_model_name_or_path"), (str(tmp_path / "gone"), "gone")):
        (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        assert message in refused(copy)
    monkeypatch.setattr(application, "find_spec", lambda name: None if name == "peft" else object())
    assert "peft, which is not installed: pip install 'mistral_hf[train]'" in refused(adapter)


def test_a_folder_of_another_kind_says_what_to_do_with_it(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    assert f"raw weights: convert them first, with mistral-hf convert {raw} HF-FOLDER." in refused(raw)
    gguf = tmp_path / "model.Q4_0.gguf"
    gguf.write_bytes(b"GGUF")
    for path in (gguf, tmp_path):
        assert "holds GGUF weights, for llama.cpp: give the checkpoint" in refused(path)


def test_a_missing_tokenizer_is_named_with_its_remedy(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert f"{folder} has no tokenizer: copy tokenizer.json" in refused(folder)


@pytest.mark.parametrize("name", ["flash_attention_2", "nothing"])
def test_an_error_of_the_back_end_names_its_option(name: str) -> None:
    if name == "flash_attention_2" and torch.cuda.is_available():
        pytest.skip("it can be used here")
    message = refused(BUNDLED_CHECKPOINT, "--attn-implementation", name)
    assert f"Invalid value for --attn-implementation: {name} cannot be used: " in message


def test_truncated_weights_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused(folder)
    assert "--model" in message
    assert "model.safetensors is incomplete or damaged" in message


@pytest.mark.parametrize("config", [[], {"model_type": "mistral", "hidden_size": "a"}, "x", {"model_type": []}])
def test_a_configuration_of_wrong_types_is_one_line(folder: Path, config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert f"{folder} cannot be loaded" in refused(folder)


@pytest.mark.parametrize("device", ["meta", "cuda:99", "x", "cpu:1", "-1", ""])
def test_an_impossible_device_is_named_with_the_possible_ones(device: str) -> None:
    message = refused(BUNDLED_CHECKPOINT, "--device-map", device)
    assert f"--device-map: There is no device {device!r} here: use cpu," in message


def test_a_device_that_is_there_is_used() -> None:
    for device in ("cpu", "auto", "cpu:0"):
        assert generate(BUNDLED_CHECKPOINT, "--device-map", device).exit_code == 0


@pytest.mark.parametrize("count", [2**32, 10**20, -1])
def test_a_seed_that_no_generator_takes_is_refused(count: int) -> None:
    assert "--seed" in refused(BUNDLED_CHECKPOINT, "--seed", str(count))
    assert "--prefill-chunk-size" in refused(BUNDLED_CHECKPOINT, "--prefill-chunk-size", str(-abs(count)))


def test_a_revision_reaches_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained

    def recorded(name: str, **options: Any) -> Any:
        seen.append(options["revision"])
        return load(name, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recorded)
    assert generate(BUNDLED_CHECKPOINT, "--revision", "v1").exit_code == 0
    assert seen == ["v1"]


def test_an_error_that_nobody_foresaw_names_its_type_and_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise KeyError("a\nb")

    monkeypatch.setattr("mistral_hf.modeling_mistral.MistralForCausalLM.generate", broken)
    assert "Error: KeyError: 'a\\nb' (MISTRAL_HF_TRACEBACK=1 shows where.)" in refused(BUNDLED_CHECKPOINT)
    monkeypatch.setenv("MISTRAL_HF_TRACEBACK", "1")
    assert isinstance(generate(BUNDLED_CHECKPOINT).exception, KeyError)
