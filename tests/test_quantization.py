"""Quantization on loading: which layers are quantized, their size, and that the model still works."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig, BitsAndBytesConfig, GPTQConfig, TorchAoConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as StockMistral
from typer.testing import CliRunner

from mistral_hf import BUNDLED_CHECKPOINT, MistralConfig, MistralForCausalLM, RollingCache
from mistral_hf.cli import app

bnb = pytest.importorskip("bitsandbytes")

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FORMATS: dict[str, dict[str, Any]] = {
    "nf4": NF4,
    "nf4 double": {**NF4, "bnb_4bit_use_double_quant": True},
    "nf4 bfloat16": {**NF4, "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4 float16": {**NF4, "bnb_4bit_compute_dtype": torch.float16},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}


def load(path: Any = BUNDLED_CHECKPOINT, format: str | None = None, **options: Any) -> Any:
    if format is not None:
        options["quantization_config"] = BitsAndBytesConfig(**FORMATS[format])
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Held-out text, ``[2, 300]``."""
    ids = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)(
        (BUNDLED_CHECKPOINT / "heldout.txt").read_text(), verbose=False
    )
    return torch.tensor(ids["input_ids"][:600]).view(2, 300)


@pytest.fixture(scope="module")
def full() -> Any:
    return load(dtype=torch.float32)


@pytest.fixture(scope="module", params=FORMATS)
def quantized(request: pytest.FixtureRequest) -> Any:
    return load(format=request.param, dtype=torch.float32, device_map="auto")


def test_every_projection_is_quantized_and_nothing_else(quantized: Any) -> None:
    expected = bnb.nn.Linear8bitLt if quantized.config.quantization_config.load_in_8bit else bnb.nn.Linear4bit
    for name, module in quantized.named_modules():
        if name.endswith(PROJECTIONS):
            assert type(module) is expected, name
        else:
            assert not isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)), name
    assert type(quantized.lm_head) is nn.Linear
    kept = [quantized.lm_head.weight, quantized.model.norm.weight, quantized.model.layers[0].input_layernorm.weight]
    assert all(weight.is_floating_point() for weight in kept)


@torch.no_grad()
def test_the_loss_of_held_out_text_stays_close_to_full_precision(quantized: Any, full: Any, text: Tensor) -> None:
    """The perplexity stays within 5% (10% for fp4) and is not that of the full weights."""
    expected, loss = (model(text, labels=text).loss.float() for model in (full, quantized))
    config = quantized.config.quantization_config
    fp4 = config.load_in_4bit and config.bnb_4bit_quant_type == "fp4"
    assert 0 < (loss - expected).abs() < (0.1 if fp4 else 0.05)
    torch.testing.assert_close(quantized(text, labels=text, loss_chunk_size=64).loss.float(), loss, rtol=1e-3, atol=0)


def test_generates_through_the_rolling_buffer(quantized: Any, text: Tensor) -> None:
    """Past the window of 128, each step chooses the likeliest token given the whole text."""
    output = quantized.generate(text[:1, :120], max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    cache = output.past_key_values
    assert isinstance(cache, RollingCache)
    assert cache.layers[0].slots == 128
    with torch.no_grad():
        logits = quantized(output.sequences).logits[0, 119:-1]
    chosen = logits.gather(1, output.sequences[0, 120:, None])[:, 0]
    assert (logits.max(dim=-1).values - chosen).max() < 0.1


@pytest.mark.parametrize("format", ["nf4 double", "int8"])
def test_a_quantized_checkpoint_loads_as_it_was_saved(format: str, text: Tensor, tmp_path: Path) -> None:
    model = load(format=format, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.model.layers[0].mlp.up_proj) is type(model.model.layers[0].mlp.up_proj)
    with torch.no_grad():
        assert torch.equal(again(text).logits, model(text).logits)
        losses = [m(text, labels=text).loss for m in (StockMistral.from_pretrained(tmp_path).eval(), model)]
    torch.testing.assert_close(*losses, rtol=2e-3, atol=0)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of the parameters with their quantization constants."""
    total = 0
    for parameter in module.parameters():
        state = getattr(parameter, "quant_state", None)
        parts = [parameter, *(() if state is None else (state.absmax, state.code))]
        if state is not None and state.nested:
            parts += [state.state2.absmax, state.state2.code, state.offset]
        total += sum(part.nbytes for part in parts)
    return total


@pytest.mark.parametrize(("format", "limit"), [("nf4", 0.32), ("nf4 double", 0.3), ("fp4", 0.32)])
def test_a_quantized_7b_model_takes_less_than_a_third_of_the_memory(
    format: str, limit: float, make_model: Any, tmp_path: Path
) -> None:
    """From a layer with the proportions of 7B and an eighth of its width, and the sizes of all modules of 7B."""
    shape = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 4, "num_key_value_heads": 1}
    make_model(num_hidden_layers=1, head_dim=128, **shape).to(torch.bfloat16).save_pretrained(tmp_path)
    layers = load(tmp_path, format, dtype=torch.bfloat16).model.layers
    plain = load(tmp_path, dtype=torch.bfloat16).model.layers
    share = stored_bytes(layers) / stored_bytes(plain)
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig()).to(torch.bfloat16)
    total, inside = stored_bytes(model), stored_bytes(model.model.layers)
    assert 14e9 < total < 15e9
    assert 0.25 < share < limit
    assert (total - inside + share * inside) / total <= limit


@pytest.mark.slow
def test_a_quantized_layer_of_7b_takes_less_than_a_third_of_the_memory(tmp_path: Path) -> None:
    config = MistralConfig(num_hidden_layers=1, dtype="bfloat16")
    plain = MistralForCausalLM(config).to(torch.bfloat16)
    plain.save_pretrained(tmp_path)
    model = load(tmp_path, "nf4", dtype=torch.bfloat16)
    full, layer = stored_bytes(plain), stored_bytes(plain.model.layers)
    found = stored_bytes(model) + 31 * stored_bytes(model.model.layers)
    assert found <= 0.32 * (full + 31 * layer)


def test_an_adapter_learns_while_the_4_bit_weights_stay(text: Tensor) -> None:
    """QLoRA: the loss falls, and the 4-bit weights do not change."""
    peft = pytest.importorskip("peft")
    model = peft.prepare_model_for_kbit_training(load(format="nf4 bfloat16"), use_gradient_checkpointing=False)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    before = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005)
    ids, losses = text[:, :64], []
    for _ in range(6):
        losses.append(model(ids, labels=ids, loss_chunk_size=50).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.3
    assert torch.equal(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight, before)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    load(format="nf4").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("format", "field"), [("int8", "load_in_4bit=True"), ("fp4", "bnb_4bit_quant_type='nf4'")])
@pytest.mark.parametrize("auto", [True, False])
def test_quantizing_twice_in_different_ways_is_refused(format: str, field: str, auto: bool, four_bits: Path) -> None:
    model_class = AutoModelForCausalLM if auto else MistralForCausalLM
    with pytest.raises(ValueError, match=rf"quantized with {field} and cannot be quantized again.*full precision"):
        model_class.from_pretrained(four_bits, quantization_config=BitsAndBytesConfig(**FORMATS[format]))


def test_the_command_line_reads_a_quantized_checkpoint(four_bits: Path) -> None:
    AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT).save_pretrained(four_bits)
    arguments = ["generate", "It was", "--model", str(four_bits), "--max-new-tokens", "4", "--greedy"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("It was")


def test_quantizing_twice_in_the_same_way_changes_nothing(four_bits: Path, text: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(load(four_bits, "nf4")(text).logits, load(four_bits)(text).logits)


def test_a_request_without_bitsandbytes_names_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (4, 8):
        module = sys.modules[f"transformers.quantizers.quantizer_bnb_{bits}bit"]
        with monkeypatch.context() as patch:
            for name in ("is_bitsandbytes_available", "is_accelerate_available"):
                if hasattr(module, name):
                    patch.setattr(module, name, lambda *args, name=name: name != "is_bitsandbytes_available")
            with pytest.raises(ImportError, match=r"pip install .*bitsandbytes"):
                load(format="nf4" if bits == 4 else "int8")


def test_a_torchao_model_stays_accurate_generates_and_reloads(text: Tensor, full: Any, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, quantization_config=config, dtype=torch.bfloat16)
    layer = model.model.layers[0]
    assert all(type(module.weight) is not nn.Parameter for module in (layer.self_attn.q_proj, layer.mlp.down_proj))
    assert type(model.lm_head.weight) is nn.Parameter
    with torch.no_grad():
        expected, loss = full(text, labels=text).loss, model(text, labels=text).loss
        torch.testing.assert_close(model(text, labels=text, loss_chunk_size=64).loss, loss, rtol=1e-3, atol=0)
    assert abs(loss - expected) < 0.05
    assert model.generate(text[:1, :120], max_new_tokens=12, do_sample=False).shape == (1, 132)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(text).logits, model(text).logits)


@pytest.mark.parametrize(("config", "packages"), [(GPTQConfig, "optimum|gptqmodel"), (AwqConfig, "pre.?quantized")])
def test_formats_that_need_other_packages_or_files_name_them(config: Any, packages: str) -> None:
    options = {"bits": 4, "dataset": ["some text"], "tokenizer": None} if config is GPTQConfig else {"bits": 4}
    with pytest.raises((ImportError, ValueError), match=packages):
        AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, quantization_config=config(**options))


def test_a_gptq_checkpoint_loads_through_the_library(tmp_path: Path) -> None:
    """This needs the packages that the library uses for GPTQ."""
    pytest.importorskip("optimum", reason="GPTQ needs optimum and gptqmodel")
    pytest.importorskip("gptqmodel", reason="GPTQ needs optimum and gptqmodel")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)
    config = GPTQConfig(bits=4, dataset=[(BUNDLED_CHECKPOINT / "heldout.txt").read_text()[:4000]], tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, quantization_config=config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert type(load(tmp_path)) is MistralForCausalLM
