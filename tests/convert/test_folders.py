"""Whole folders: raw -> Hugging Face -> raw, adapters, the commands, and the safety of the output."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers.models.ministral3.modeling_ministral3 import Ministral3ForCausalLM
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as StockMistral
from typer.testing import CliRunner

import mistral_hf
from mistral_hf.checkpoints.reader import CheckpointError, open_checkpoint
from mistral_hf.checkpoints.writer import check_manifest
from mistral_hf.cli import app as mistral_hf_app
from mistral_hf.convert.folders import Conversion, convert_hf_to_raw, convert_raw_to_hf
from mistral_hf.convert.params import complete_params, normalize_params, params_difference
from mistral_hf.convert.raw_forward import raw_logits
from mistral_hf.convert.verify import verify
from tests.helpers.raw_reference import COMMON, GENERATIONS, in_child, raw_tensors, reference_logits, write_raw

ROOT = Path(__file__).parents[2]
TOKENS = [1, 7, 33, 2, 60, 5, 5, 71, 12, 40, 3, 9, 77, 21, 50, 4]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def bits(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {k: (t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for k, t in tensors.items()}


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("layout", ["safetensors", "pth", "pth-2", "sharded"])
def test_there_and_back_is_bit_exact(generation, layout, tmp_path):
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
    assert check_manifest(tmp_path / "hf") >= 3


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_library_s_model_computes_what_the_raw_model_does(generation, tmp_path):
    """The converted model, in stock Transformers, against the raw model in float64."""
    params, tensors = GENERATIONS[generation], raw_tensors(GENERATIONS[generation], torch.float32)
    raw = write_raw(tmp_path / "raw", params, tensors)
    convert_raw_to_hf(raw, tmp_path / "hf")
    full, _ = complete_params(normalize_params(params))
    tokens = TOKENS[: full["max_seq_len"]]
    with open_checkpoint(raw, "consolidated") as checkpoint:
        ours = raw_logits(checkpoint, full, tokens)
    stock = Ministral3ForCausalLM if params.get("llama_4_scaling") else StockMistral
    with torch.no_grad():
        hf = stock.from_pretrained(tmp_path / "hf", attn_implementation="eager")(torch.tensor([tokens])).logits[0]
    assert relative_error(ours, hf.numpy()) < 2e-5
    if not params.get("yarn"):
        expected = reference_logits(tensors, full, tokens).numpy()
        assert relative_error(ours, expected) < 2e-5
        assert relative_error(hf.numpy(), expected) < 2e-5


def test_llama_4_scaling_beyond_the_original_positions(tmp_path):
    params = GENERATIONS["Ministral 3"]
    raw = write_raw(tmp_path / "raw", params, raw_tensors(params, torch.float32))
    convert_raw_to_hf(raw, tmp_path / "hf")
    tokens = (TOKENS * 4)[:50]
    with open_checkpoint(raw, "consolidated") as checkpoint:
        ours = raw_logits(checkpoint, complete_params(normalize_params(params))[0], tokens)
        flat = raw_logits(checkpoint, {**complete_params(normalize_params(params))[0], "llama_4_scaling": None}, tokens)
    with torch.no_grad():
        hf = Ministral3ForCausalLM.from_pretrained(tmp_path / "hf")(torch.tensor([tokens])).logits[0].numpy()
    assert relative_error(ours, hf) < 2e-5
    assert relative_error(flat, hf) > 1e-3


def test_this_package_s_model_reads_the_result(tmp_path):
    params, tensors = GENERATIONS["7B v0.1"], raw_tensors(GENERATIONS["7B v0.1"], torch.float32)
    convert_raw_to_hf(write_raw(tmp_path / "raw", params, tensors), tmp_path / "hf")
    model = mistral_hf.MistralForCausalLM.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert relative_error(logits, reference_logits(tensors, params, TOKENS).numpy()) < 2e-5


def test_stock_models_convert_to_raw(tmp_path):
    """A folder that the library itself saved, in its own newest spelling."""
    params = GENERATIONS["Nemo"]
    convert_raw_to_hf(write_raw(tmp_path / "raw", params, raw_tensors(params)), tmp_path / "hf")
    StockMistral.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    convert_hf_to_raw(tmp_path / "saved", tmp_path / "back")
    assert bits(load_file(tmp_path / "back/consolidated.safetensors")) == bits(raw_tensors(params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype, tmp_path):
    tensors = raw_tensors(COMMON, torch.float32)
    convert_raw_to_hf(write_raw(tmp_path / "raw", COMMON, tensors), tmp_path / "hf", dtype=dtype)
    converted = load_file(tmp_path / "hf/model.safetensors")
    name = "layers.0.feed_forward.w1.weight"
    assert torch.equal(converted["model.layers.0.mlp.gate_proj.weight"], tensors[name].to(getattr(torch, dtype)))
    assert read_json(tmp_path / "hf/config.json")["torch_dtype"] == dtype
    assert {t.dtype for t in converted.values()} == {getattr(torch, dtype)}


def test_a_dtype_that_overflows_is_refused(tmp_path):
    tensors = raw_tensors(COMMON)
    tensors["norm.weight"][0] = 1e6
    raw = write_raw(tmp_path / "raw", COMMON, tensors)
    with pytest.raises(ValueError, match=r"norm\.weight has values too large for float16"):
        convert_raw_to_hf(raw, tmp_path / "hf", dtype="float16")
    with pytest.raises(ValueError, match="the dtypes are float32"):
        convert_raw_to_hf(raw, tmp_path / "hf", dtype="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_a_head_that_repeats_tied_embeddings(tmp_path):
    params = GENERATIONS["tied"]
    tensors = raw_tensors(params)
    same = {**tensors, "output.weight": tensors["tok_embeddings.weight"].clone()}
    result = convert_raw_to_hf(write_raw(tmp_path / "same", params, same), tmp_path / "hf")
    assert any("repeats the tied embeddings" in note for note in result.notes)
    assert "lm_head.weight" not in load_file(tmp_path / "hf/model.safetensors")
    other = {**same, "output.weight": -same["output.weight"]}
    with pytest.raises(CheckpointError, match="has other values"):
        convert_raw_to_hf(write_raw(tmp_path / "other", params, other), tmp_path / "hf2")


def test_given_lengths_are_reported(tmp_path):
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    result = convert_raw_to_hf(raw, tmp_path / "hf", max_position_embeddings=512)
    assert read_json(tmp_path / "hf/config.json")["max_position_embeddings"] == 512
    assert "max_position_embeddings = 512: as given" in result.notes
    assert any("no tokenizer" in note for note in result.notes)
    assert "manifest.json" in result.summary()


# Refusals


def test_inputs_are_refused_before_anything_is_written(tmp_path):
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    with pytest.raises(FileNotFoundError, match="no folder"):
        convert_raw_to_hf(tmp_path / "nowhere", tmp_path / "hf")
    for output in (raw, tmp_path):
        with pytest.raises(ValueError, match="is or contains the input"):
            convert_raw_to_hf(raw, output, overwrite=True)
    (raw / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"params\.json is no JSON"):
        convert_raw_to_hf(raw, tmp_path / "hf")
    (raw / "params.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        convert_raw_to_hf(raw, tmp_path / "hf")
    (raw / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"lacks params\.json"):
        convert_raw_to_hf(raw, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_params_that_contradict_the_weights_are_refused(tmp_path):
    """k permuted with the wrong head count would be silent; the shapes give it away."""
    raw = write_raw(tmp_path / "raw", {**COMMON, "n_kv_heads": 4}, raw_tensors(COMMON))
    with pytest.raises(ValueError, match=r"wk\.weight has shape"):
        convert_raw_to_hf(raw, tmp_path / "hf")


def test_truncated_input_leaves_nothing(tmp_path):
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    path = raw / "consolidated.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated"):
        convert_raw_to_hf(raw, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


# Adapters


def write_raw_lora(folder: Path, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, weight in raw_tensors(COMMON, torch.float32).items():
        if weight.dim() == 2 and name.startswith("layers"):
            base = name.removesuffix(".weight")
            tensors[f"{base}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            tensors[f"{base}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "lora.safetensors")
    (folder / "params.json").write_text(json.dumps({**COMMON, "lora": {"rank": rank, "scaling": 0.5}}))
    return tensors


def test_adapters_add_the_same_in_both_forms(tmp_path):
    """PEFT on the converted base computes what the raw base with `scaling * B A` merged in does."""
    base = raw_tensors(COMMON, torch.float32, scale=0.1)
    convert_raw_to_hf(write_raw(tmp_path / "raw", COMMON, base), tmp_path / "hf")
    lora = write_raw_lora(tmp_path / "lora")
    convert_raw_to_hf(tmp_path / "lora", tmp_path / "peft")
    merged = dict(base)
    for name in lora:
        if ".lora_B" in name:
            product = lora[name] @ lora[name.replace("lora_B", "lora_A")]
            merged[name.replace(".lora_B", "")] = merged[name.replace(".lora_B", "")] + 0.5 * product
    model = peft.PeftModel.from_pretrained(StockMistral.from_pretrained(tmp_path / "hf"), str(tmp_path / "peft"))
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].numpy()
    assert relative_error(logits, reference_logits(merged, COMMON, TOKENS).numpy()) < 1e-4
    assert relative_error(logits, reference_logits(base, COMMON, TOKENS).numpy()) > 1e-2


def test_adapters_there_and_back(tmp_path):
    params = {**COMMON, "lora": {"rank": 4, "scaling": 0.5}}
    convert_raw_to_hf(write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON)), tmp_path / "hf")
    lora = write_raw_lora(tmp_path / "lora")
    convert_raw_to_hf(tmp_path / "lora", tmp_path / "peft")
    with pytest.raises(ValueError, match="head counts are unknown"):
        convert_hf_to_raw(tmp_path / "peft", tmp_path / "back")
    config = read_json(tmp_path / "peft/adapter_config.json")
    config["base_model_name_or_path"] = str(tmp_path / "hf")
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(config))
    convert_hf_to_raw(tmp_path / "peft", tmp_path / "back")
    assert bits(load_file(tmp_path / "back/lora.safetensors")) == bits(lora)
    back = read_json(tmp_path / "back/params.json")
    assert (back["lora"]["rank"], back["lora"]["scaling"]) == (4, 0.5)
    assert params_difference(normalize_params(back), normalize_params(params)) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"r": 8}, "says rank 8"),
    ],
)
def test_adapters_that_are_no_plain_lora_are_refused(change, message, tmp_path):
    convert_raw_to_hf(write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON)), tmp_path / "hf")
    write_raw_lora(tmp_path / "lora")
    convert_raw_to_hf(tmp_path / "lora", tmp_path / "peft")
    path = tmp_path / "peft/adapter_config.json"
    path.write_text(json.dumps({**read_json(path), "base_model_name_or_path": str(tmp_path / "hf"), **change}))
    with pytest.raises(ValueError, match=message):
        convert_hf_to_raw(tmp_path / "peft", tmp_path / "back")


@pytest.mark.parametrize(("lora", "message"), [(None, "no 'lora' block"), ({"rank": 9, "scaling": 1}, "lora rank 9")])
def test_raw_adapters_without_a_strength_are_refused(lora, message, tmp_path):
    write_raw_lora(tmp_path / "lora")
    (tmp_path / "lora/params.json").write_text(json.dumps({**COMMON, "lora": lora}))
    with pytest.raises(ValueError, match=message):
        convert_raw_to_hf(tmp_path / "lora", tmp_path / "peft")


# Verification


def outcomes(a: Path, b: Path, **options) -> dict[str, bool | None]:
    return {check.name: check.ok for check in verify(a, b, **options)}


@pytest.mark.parametrize("generation", ["7B v0.1", "Nemo", "Ministral 8B", "tied", "yarn"])
def test_a_faithful_conversion_passes(generation, tmp_path):
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


def test_a_wrong_permutation_is_found(tmp_path):
    """k permuted with the query heads' count: shapes are right, the values are in the wrong rows."""
    raw, hf = converted(tmp_path)
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    weight = load_file(raw / "consolidated.safetensors")["layers.0.attention.wk.weight"]
    tensors[name] = weight.view(4, 4, 2, 64).transpose(1, 2).reshape(32, 64)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    assert outcomes(raw, hf) == {"configuration": True, "tensors": False, "tokenizer": None, "logits": False}


def test_one_flipped_bit_is_found(tmp_path):
    raw, hf = converted(tmp_path)
    path = hf / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    assert outcomes(raw, hf, logits=False) == {"configuration": True, "tensors": False, "tokenizer": None}


def test_a_wrong_configuration_is_found(tmp_path):
    raw, hf = converted(tmp_path)
    config = read_json(hf / "config.json")
    (hf / "config.json").write_text(json.dumps({**config, "rope_theta": 10000.0}))
    assert outcomes(raw, hf) == {"configuration": False, "tensors": True, "tokenizer": None, "logits": False}


def test_verifying_nothing(tmp_path):
    with pytest.raises(ValueError, match="neither params"):
        list(verify(tmp_path, tmp_path))


# The commands


def command(name: str, *args: str | Path) -> Result:
    """Run a script of `conversion/` as its own command line would."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "conversion" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_three_commands(tmp_path):
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    there = ["--input_dir", raw, "--output_dir", tmp_path / "hf"]
    result = command("convert_mistral_weights_to_hf", *there, "--max_shard_size", "50KB", "--dtype", "float32")
    assert (result.exit_code, "manifest.json" in result.stdout) == (0, True), result.output
    again = command("convert_mistral_weights_to_hf", *there)
    assert (again.exit_code, again.stderr.splitlines()[-1].startswith("Error: ")) == (1, True)
    assert command("convert_mistral_weights_to_hf", *there, "--overwrite").exit_code == 0
    back = ["--input_dir", tmp_path / "hf", "--output_dir", tmp_path / "back"]
    assert command("convert_hf_weights_to_mistral", *back).exit_code == 0
    assert bits(load_file(tmp_path / "back/consolidated.safetensors")) == bits(raw_tensors(COMMON))
    same = command("verify_conversion", raw, tmp_path / "hf")
    assert (same.exit_code, same.stdout.count("same: ")) == (0, 3), same.output
    (raw / "params.json").write_text(json.dumps({**COMMON, "norm_eps": 1e-3}))
    assert command("verify_conversion", raw, tmp_path / "hf", "--no_logits").exit_code == 1


def test_a_command_as_a_program():
    line = [sys.executable, str(ROOT / "conversion/convert_mistral_weights_to_hf.py"), "--help"]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "--max_position_embeddings" in result.stdout


def test_the_commands_only_print():
    """Rules live in the package: the commands import nothing but it and their argument parser."""
    for path in (ROOT / "conversion").glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert {line.split()[1].split(".")[0] for line in lines} <= {"pathlib", "typing", "typer", "mistral_hf"}


def test_a_killed_conversion_leaves_nothing_finished_and_the_next_run_is_clean(tmp_path):
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))

    def kill_half_way(done: int, total: int) -> None:
        if done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    killed = in_child(lambda: convert_raw_to_hf(raw, tmp_path / "hf", max_shard_size="20KB", progress=kill_half_way))
    assert killed == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hf.incomplete", "raw"]
    convert_raw_to_hf(raw, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "raw"]
    assert check_manifest(tmp_path / "hf") == 3


def test_a_write_that_fails_leaves_nothing(tmp_path, capfd):
    """A file size limit stands in for a disk that fills up while the weights are written."""
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))

    def convert_on_a_full_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        convert_raw_to_hf(raw, tmp_path / "hf")

    assert in_child(convert_on_a_full_disk) == 1
    assert "File too large" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_the_package_command_converts_the_same(tmp_path):
    """`mistral-hf convert` is the script under another name."""
    params = GENERATIONS[next(iter(GENERATIONS))]
    raw = write_raw(tmp_path / "raw", params, raw_tensors(params))
    result = CliRunner().invoke(mistral_hf_app, ["convert", str(raw), str(tmp_path / "hf"), "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    convert_raw_to_hf(raw, tmp_path / "expected", dtype="float32")
    assert bits(load_folder(tmp_path / "hf")) == bits(load_folder(tmp_path / "expected"))
    assert read_json(tmp_path / "hf/config.json") == read_json(tmp_path / "expected/config.json")
    again = CliRunner().invoke(mistral_hf_app, ["convert", str(raw), str(tmp_path / "hf")])
    assert again.exit_code == 1
    assert "overwrite" in again.stderr


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
def test_a_full_size_checkpoint_streams(tmp_path):
    """14.5 GB of random 7B weights: memory stays far below, speed is at least 0.7 of copying the same bytes."""
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


def write_random(folder: Path, params: dict) -> None:
    """Random weights, written with the package's own streaming writer."""
    from mistral_hf.checkpoints.reader import TensorInfo
    from mistral_hf.checkpoints.writer import LazyTensor, write_checkpoint
    from mistral_hf.convert.tensors import raw_shapes

    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    random = np.random.default_rng(0)

    def tensor(name: str, shape: tuple[int, ...]) -> LazyTensor:
        info = TensorInfo("float16", shape)
        return LazyTensor(name, info, lambda: np.frombuffer(random.bytes(info.nbytes), np.float16).reshape(shape))

    tensors = [tensor(name, shape) for name, shape in raw_shapes(normalize_params(params)).items()]
    write_checkpoint(folder, tensors, stem="consolidated")


def test_a_conversion_says_what_it_did():
    text = Conversion(Path("out"), 3, 2_500_000_000, ["a note"]).summary()
    assert text == "note: a note\nout: 3 tensors, 2.5 GB, every file in manifest.json"
