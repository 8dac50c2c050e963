"""Saving and loading checkpoints, whole and damaged."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.mistral import modeling_mistral as stock_modeling

import mistral_hf
from mistral_hf import MistralForCausalLM, MistralForSequenceClassification
from tests.conftest import HEADS

NORM = "model.layers.1.input_layernorm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


def assert_same_weights(first: Any, second: Any) -> None:
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert weight.dtype == second[name].dtype, name
        assert torch.equal(weight, second[name]), name


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_round_trip_with_the_reference(
    sharded: bool, tied: bool, make_pair: Any, token_ids: Any, tmp_path: Path
) -> None:
    pair = make_pair(tie_word_embeddings=tied)
    options = {"max_shard_size": "10KB"} if sharded else {}
    for name, model in zip(("ours", "stock"), pair, strict=True):
        model.save_pretrained(tmp_path / name, **options)
    files = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert ("model.safetensors.index.json" in files) == sharded
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes(), name
    in_stock = stock_modeling.MistralForCausalLM.from_pretrained(tmp_path / "ours")
    in_ours = MistralForCausalLM.from_pretrained(tmp_path / "stock")
    for model in (in_stock, in_ours):
        assert_same_weights(model, pair.ours)
    assert torch.equal(in_ours(token_ids(1, 9)).logits, pair.ours(token_ids(1, 9)).logits)
    assert (in_ours.lm_head.weight is in_ours.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_exchanged_with_the_reference(head: str, make_model: Any, tmp_path: Path) -> None:
    model = make_model(head)
    model.save_pretrained(tmp_path / "ours")
    stock = getattr(stock_modeling, f"Mistral{head}").from_pretrained(tmp_path / "ours")
    assert_same_weights(stock, model)
    stock.save_pretrained(tmp_path / "stock")
    assert_same_weights(getattr(mistral_hf, f"Mistral{head}").from_pretrained(tmp_path / "stock"), model)


def test_generation_config_is_kept(make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    model.generation_config.max_new_tokens = 17
    model.save_pretrained(tmp_path)
    assert MistralForCausalLM.from_pretrained(tmp_path).generation_config.max_new_tokens == 17


def test_weights_load_in_the_requested_dtype(make_model: Any, tmp_path: Path) -> None:
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype, expected in (("auto", torch.bfloat16), (torch.float16, torch.float16), ("float32", torch.float32)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert model.config.dtype == expected
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_rotary_buffers_survive_loading(checkpoint: Path, make_model: Any) -> None:
    """No file holds them, and loading first builds a model without memory."""
    loaded, made = MistralForCausalLM.from_pretrained(checkpoint), make_model()
    assert torch.equal(loaded.model.rotary_emb.inv_freq, made.model.rotary_emb.inv_freq)
    assert torch.equal(loaded.model.rotary_emb.original_inv_freq, made.model.rotary_emb.original_inv_freq)


@pytest.mark.parametrize("device_map", ["auto", "cpu"])
def test_a_device_map_does_not_change_the_logits(
    device_map: str, checkpoint: Path, make_model: Any, token_ids: Any
) -> None:
    model = MistralForCausalLM.from_pretrained(checkpoint, device_map=device_map)
    assert torch.equal(model(token_ids(1, 9)).logits, make_model()(token_ids(1, 9)).logits)


def test_layers_on_disk_generate_the_same_text(checkpoint: Path, make_model: Any, padded: Any, tmp_path: Path) -> None:
    """Hooks load and unload the layers that a device map sends elsewhere."""
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = MistralForCausalLM.from_pretrained(checkpoint, device_map=device_map, offload_folder=tmp_path / "offload")
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    inputs = padded(11, 5)
    expected = make_model().generate(**inputs, max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=10, do_sample=False), expected)


def test_a_language_model_loads_as_a_backbone_and_back(checkpoint: Path, make_model: Any, tmp_path: Path) -> None:
    backbone = mistral_hf.MistralModel.from_pretrained(checkpoint)
    assert_same_weights(backbone, make_model().model)
    backbone.save_pretrained(tmp_path / "backbone")
    assert_same_weights(MistralForCausalLM.from_pretrained(tmp_path / "backbone").model, backbone)


@pytest.fixture
def report(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """Returns the log of loading."""
    logger = logging.getLogger("transformers")
    propagate, logger.propagate = logger.propagate, True
    caplog.set_level(logging.WARNING)
    yield lambda: caplog.text
    logger.propagate = propagate


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_weight_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda weights: weights.pop(GATE))
    with pytest.raises(ValueError, match=rf"{checkpoint.name}.* lacks 1 weights .*{GATE}"):
        MistralForCausalLM.from_pretrained(checkpoint)


def test_an_unknown_weight_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda weights: weights.update({"model.layers.0.mlp.gate_proj.bias": torch.zeros(48)}))
    with pytest.raises(ValueError, match=r"has unknown 1 weights .*layers.0.mlp.gate_proj.bias"):
        MistralForCausalLM.from_pretrained(checkpoint)


def test_fewer_layers_may_be_requested(checkpoint: Path) -> None:
    model = MistralForCausalLM.from_pretrained(checkpoint, num_hidden_layers=1)
    assert len(model.model.layers) == 1


def test_a_weight_of_a_wrong_shape_is_refused(checkpoint: Path, report: Callable[[], str]) -> None:
    rewrite(checkpoint, lambda weights: weights.update({NORM: torch.ones(33)}))
    with pytest.raises(RuntimeError, match=r"mismatch|shape|size"):
        MistralForCausalLM.from_pretrained(checkpoint)
    assert "input_layernorm.weight" in report()
    assert "33" in report()


def test_a_configuration_of_another_size_is_refused(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 4}))
    with pytest.raises(RuntimeError, match=r"mismatch|shape|size"):
        MistralForCausalLM.from_pretrained(checkpoint)


def test_a_head_that_the_checkpoint_lacks_is_initialized_and_reported(
    checkpoint: Path, report: Callable[[], str]
) -> None:
    model, info = MistralForSequenceClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert set(info["missing_keys"]) == {"score.weight"}
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}
    assert model.score.weight.std() > 0
    assert "score.weight" in report()


def test_a_missing_shard_is_refused(make_model: Any, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((OSError, ValueError), match=shard.name):
        MistralForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 6, 200, -100])
def test_a_truncated_file_is_refused(kept: int, checkpoint: Path) -> None:
    """It is cut in the length of the header, in the header, or in the data."""
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        (OSError, ValueError, RuntimeError, Exception), match=r"(?i)header|incomplete|safetensors|metadata"
    ):
        MistralForCausalLM.from_pretrained(checkpoint)


def test_a_truncated_shard_is_refused(make_model: Any, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path, max_shard_size="10KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(Exception, match=r"(?i)incomplete|safetensors|metadata"):
        MistralForCausalLM.from_pretrained(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_without_weights_is_refused(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_broken_configuration_is_refused(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "mistral", ')
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_only_safetensors_are_written(checkpoint: Path) -> None:
    assert not list(checkpoint.glob("*.bin"))
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
