"""LoRA adapters: raw -> PEFT -> raw, and what cannot be converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as StockMistral

from mistral_hf.convert.folders import convert_hf_to_raw, convert_raw_to_hf
from mistral_hf.convert.params import normalize_params, params_difference
from tests.helpers.checkpoint_files import bits, read_json, relative_error
from tests.helpers.raw_reference import COMMON, TOKENS, raw_tensors, reference_logits, write_raw


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


def test_adapters_add_the_same_in_both_forms(tmp_path: Path) -> None:
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


def test_adapters_survive_the_round_trip(tmp_path: Path) -> None:
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
def test_adapters_that_are_not_plain_lora_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    convert_raw_to_hf(write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON)), tmp_path / "hf")
    write_raw_lora(tmp_path / "lora")
    convert_raw_to_hf(tmp_path / "lora", tmp_path / "peft")
    path = tmp_path / "peft/adapter_config.json"
    path.write_text(json.dumps({**read_json(path), "base_model_name_or_path": str(tmp_path / "hf"), **change}))
    with pytest.raises(ValueError, match=message):
        convert_hf_to_raw(tmp_path / "peft", tmp_path / "back")


@pytest.mark.parametrize(("lora", "message"), [(None, "no 'lora' block"), ({"rank": 9, "scaling": 1}, "lora rank 9")])
def test_raw_adapters_without_a_strength_are_refused(lora: dict[str, Any] | None, message: str, tmp_path: Path) -> None:
    write_raw_lora(tmp_path / "lora")
    (tmp_path / "lora/params.json").write_text(json.dumps({**COMMON, "lora": lora}))
    with pytest.raises(ValueError, match=message):
        convert_raw_to_hf(tmp_path / "lora", tmp_path / "peft")
