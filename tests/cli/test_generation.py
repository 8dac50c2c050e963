"""The command line, in this process, and once as a program."""

import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import mistral_hf
from mistral_hf import registration
from mistral_hf.bundled import BUNDLED_CHECKPOINT
from mistral_hf.cli import app, application, info
from mistral_hf.cli.loading import load
from mistral_hf.cli.options import Dtype, GenerationOptions, LoadOptions

PROMPT = "The captain looked out over the sea and"
SHORT = ("--max-new-tokens", "12")


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def text_of(*arguments: str, stdin: str | None = None) -> str:
    result = run("generate", *arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def reference_text(dtype: str = "auto", **options: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=dtype)
    output = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=12, **options)
    return tokenizer.decode(output[0], skip_special_tokens=True).strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "checkpoint"))


def test_greedy_text_matches_that_of_the_model() -> None:
    text = text_of(PROMPT, "--greedy", *SHORT)
    assert text.startswith(PROMPT)
    assert len(text) > len(PROMPT)
    assert text == reference_text(do_sample=False)


def test_a_seed_makes_sampling_repeatable() -> None:
    texts = [text_of(PROMPT, "--temperature", "1.5", "--seed", seed, *SHORT) for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    torch.manual_seed(1)
    assert texts[0] == reference_text(do_sample=True, temperature=1.5)


def test_beams_are_printed_at_the_end() -> None:
    assert text_of(PROMPT, "--greedy", "--num-beams", "3", *SHORT) == reference_text(do_sample=False, num_beams=3)


def test_a_prompt_from_standard_input_is_read_in_chunks() -> None:
    text = text_of("-", "--greedy", "--prefill-chunk-size", "3", "--dtype", "float32", *SHORT, stdin=PROMPT)
    assert text == reference_text("float32", do_sample=False)


def test_json_holds_the_text_and_the_counts() -> None:
    result = json.loads(text_of(PROMPT, "--greedy", "--json", *SHORT))
    assert (result["prompt"], result["new_tokens"]) == (PROMPT, 12)
    assert f"{PROMPT}{result['text']}".strip() == reference_text(do_sample=False)
    assert result["prompt_tokens"] == len(AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)(PROMPT).input_ids)
    assert 0 < result["seconds_to_first_token"] < result["seconds"]
    assert result["tokens_per_second"] > 0
    beams = json.loads(text_of(PROMPT, "--greedy", "--json", "--num-beams", "2", *SHORT))
    assert (beams["new_tokens"], beams["seconds_to_first_token"]) == (12, None)


def test_stats_go_to_standard_error() -> None:
    result = run("generate", PROMPT, "--greedy", "--stats", *SHORT)
    assert result.stdout.strip() == reference_text(do_sample=False)
    assert re.search(r"\d+ tokens read, 12 generated in .* s: .* tokens/s", result.stderr)


@pytest.mark.parametrize("spelling", ["--max-new-tokens", "--max_new_tokens"])
def test_options_are_spelled_with_dashes_or_underscores(spelling: str) -> None:
    assert text_of(PROMPT, "--greedy", spelling, "12") == reference_text(do_sample=False)


def test_ctrl_c_in_generate_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(model: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(mistral_hf.MistralForCausalLM, "generate", interrupted)
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        result = run("generate", PROMPT)
        assert (result.exit_code, result.stderr) == (130, "")
    finally:
        signal.signal(signal.SIGINT, before)


def test_info_is_json_on_request() -> None:
    tables = json.loads(run("info", "--json").stdout)
    assert tables["versions"]["torch"] == version("torch")
    assert tables["attention"]["sdpa"] == "usable"
    assert list(tables) == ["versions", "classes", "attention", "devices", "checkpoints"]


def test_options_reach_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    received: dict[str, Any] = {}

    def generate(model: Any, **options: Any) -> torch.Tensor:
        received.update(options)
        return options["input_ids"]

    monkeypatch.setattr(mistral_hf.MistralForCausalLM, "generate", generate)
    values = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "num_beams": 1,
        "prefill_chunk_size": 7,
        "max_new_tokens": 5,
    }
    arguments = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert run("generate", PROMPT, *arguments).exit_code == 0
    assert {**values, "do_sample": True}.items() <= received.items()


def test_sampling_options_imply_do_sample() -> None:
    assert GenerationOptions(min_p=0.1).keywords(num_beams=None) == {"min_p": 0.1, "do_sample": True}
    assert GenerationOptions(do_sample=True).keywords(num_beams=None) == {"do_sample": True}
    assert GenerationOptions(do_sample=False).keywords(max_new_tokens=3) == {"max_new_tokens": 3, "do_sample": False}
    assert GenerationOptions(repetition_penalty=1.1).keywords() == {"repetition_penalty": 1.1}


@pytest.mark.parametrize(("name", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_dtype_and_attention_reach_the_model(name: str, expected: torch.dtype) -> None:
    model, _ = load(str(BUNDLED_CHECKPOINT), LoadOptions(dtype=Dtype(name), attn_implementation="eager"))
    assert (model.dtype, model.config._attn_implementation, model.training) == (expected, "eager", False)


def test_four_bit_loading_quantizes_linear_layers() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model, _ = load(str(BUNDLED_CHECKPOINT), LoadOptions(dtype=Dtype.float32, device_map="cpu", load_in_4bit=True))
    projection = model.model.layers[0].mlp.up_proj
    assert isinstance(projection, bitsandbytes.nn.Linear4bit)
    assert (projection.weight.quant_type, projection.compute_dtype) == ("nf4", torch.float32)


@pytest.mark.parametrize(
    ("option", "missing", "remedy"),
    [
        (("--load-in-4bit",), "bitsandbytes", "pip install 'mistral_hf[bnb]'"),
        (("--device-map", "auto"), "accelerate", "pip install 'mistral_hf[bnb]'"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, option: tuple[str, ...], missing: str, remedy: str
) -> None:
    monkeypatch.setattr(application, "find_spec", lambda name: None if name == missing else object())
    result = run("generate", PROMPT, *option)
    assert result.exit_code == 2
    assert missing in result.stderr
    assert remedy in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "./nowhere"), "There is no folder nowhere"),
        (("--model", "a/b/c"), "There is no folder a/b/c"),
        (("--model", str(Path(__file__).parent)), "has no config.json"),
        (("--dtype", "float8"), "'float8' is not one of"),
        (("--greedy", "--top-p", "0.9", "--min-p", "0.1"), "--greedy: It contradicts --top-p, --min-p"),
        (("--max-new-tokens", "0"), "--max-new-tokens"),
        (("--temperature", "0"), "--temperature"),
        (("--attn-implementation", "nothing"), "nothing"),
    ],
)
def test_bad_options_are_usage_errors(arguments: tuple[str, ...], message: str) -> None:
    result = run("generate", PROMPT, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(("file", "content"), [("model.safetensors", b"\x10"), ("config.json", b"{}")])
def test_a_damaged_checkpoint_is_a_usage_error(folder: Path, file: str, content: bytes) -> None:
    (folder / file).write_bytes(content)
    result = run("generate", PROMPT, "--model", str(folder))
    assert result.exit_code == 2
    assert f"{folder} cannot be loaded" in result.stderr


def test_a_prompt_without_tokens_is_a_usage_error(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["post_processor"] = None
    file.write_text(json.dumps(tokenizer))
    result = run("generate", "", "--model", str(folder))
    assert result.exit_code == 2
    assert "has no tokens" in result.stderr


def test_another_architecture_is_noted(folder: Path) -> None:
    vocabulary = AutoTokenizer.from_pretrained(folder).vocab_size
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    result = run("generate", PROMPT, "--model", str(folder), *SHORT)
    assert result.exit_code == 0
    assert "LlamaForCausalLM" in result.stderr
    assert run("generate", PROMPT, "--model", str(folder), "--quiet", *SHORT).stderr == ""


def test_info_lists_versions_classes_back_ends_and_devices() -> None:
    lines = run("info").stdout.splitlines()
    shown = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines if line.startswith("  "))
    assert shown["mistral_hf"] == mistral_hf.__version__
    assert shown["torch"] == version("torch")
    for config_class, model_classes in registration.MODEL_CLASSES.items():
        kind = config_class.model_type
        for auto, ours in [(AutoConfig, config_class), *model_classes.items()]:
            names = (f"{auto.__name__} of {kind}", f"transformers.{ours.__name__}")
            assert {shown[name] for name in names} == {f"{ours.__module__}.{ours.__name__}"}
    assert shown["eager"] == shown["sdpa"] == "usable"
    assert f"{torch.get_num_threads()} threads" in shown["cpu"]
    assert shown["tiny-mistral"] == str(BUNDLED_CHECKPOINT)
    if shown["flash-attn"] == "not installed" and not torch.cuda.is_available():
        assert "not usable: attn_implementation='flash_attention_2'" in shown["flash_attention_2"]


def test_info_shows_the_classes_that_the_names_resolve_to(registered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "register", lambda: None)
    mistral_hf.unregister()
    assert "transformers.models.mistral.modeling_mistral.MistralForCausalLM" in run("info").stdout


def test_info_names_a_missing_compiler_and_a_missing_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(info, "BUNDLED_CHECKPOINT", tmp_path / "gone")
    output = run("info").stdout
    assert "there is no compiler" in output
    assert f"missing: {tmp_path / 'gone'}" in output


def test_the_installed_command_generates() -> None:
    command = Path(sysconfig.get_path("scripts")) / "mistral-hf"
    result = subprocess.run(
        [command, "generate", PROMPT, "--greedy", *SHORT], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "kernels" not in result.stderr  # bitsandbytes warns of missing ones, which are not needed here
    assert result.stdout.strip() == reference_text(do_sample=False)
