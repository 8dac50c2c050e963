"""LoRA adapters: raw -> PEFT -> raw, and what cannot be converted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.mistral.modeling_mistral import MistralForCausalLM as StockMistral

from mistral_hf.convert import folders
from mistral_hf.convert.folders import convert_hf_to_raw, convert_raw_to_hf
from mistral_hf.convert.params import normalize_params, params_difference
from tests.helpers.checkpoint_files import bits, read_json, relative_error
from tests.helpers.raw_reference import COMMON, TOKENS, raw_tensors, reference_logits, write_raw, write_raw_lora


def test_adapters_add_the_same_in_both_forms(tmp_path: Path) -> None:
    """PEFT on the converted base computes the same as the raw base with ``scaling * B A`` merged into it."""
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
        ({"r": 8}, "has rank 8"),
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
def test_raw_adapters_with_a_missing_or_wrong_lora_block_are_refused(
    lora: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    write_raw_lora(tmp_path / "lora")
    (tmp_path / "lora/params.json").write_text(json.dumps({**COMMON, "lora": lora}))
    with pytest.raises(ValueError, match=message):
        convert_raw_to_hf(tmp_path / "lora", tmp_path / "peft")


def converted_adapter(tmp_path: Path) -> tuple[Path, Path]:
    """A raw adapter, and the PEFT adapter made of it, beside the configuration of the base model."""
    convert_raw_to_hf(write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON)), tmp_path / "hf")
    write_raw_lora(tmp_path / "lora")
    convert_raw_to_hf(tmp_path / "lora", tmp_path / "peft")
    shutil.copyfile(tmp_path / "hf/config.json", tmp_path / "peft/config.json")
    return tmp_path / "lora", tmp_path / "peft"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_weights_of_an_adapter_are_cast_to_the_given_dtype(dtype: str, tmp_path: Path) -> None:
    raw, hf = converted_adapter(tmp_path)
    convert_raw_to_hf(raw, tmp_path / "there", dtype=dtype)
    convert_hf_to_raw(hf, tmp_path / "back", dtype=dtype)
    expected = {name: t.to(getattr(torch, dtype)) for name, t in load_file(raw / "lora.safetensors").items()}
    assert bits(load_file(tmp_path / "back/lora.safetensors")) == bits(expected)
    assert {t.dtype for t in load_file(tmp_path / "there/adapter_model.safetensors").values()} == {
        getattr(torch, dtype)
    }


def test_an_unknown_dtype_of_an_adapter_is_refused(tmp_path: Path) -> None:
    raw, hf = converted_adapter(tmp_path)
    with pytest.raises(ValueError, match="the dtypes are float32"):
        convert_raw_to_hf(raw, tmp_path / "out", dtype="nonsense")
    with pytest.raises(ValueError, match="the dtypes are float32"):
        convert_hf_to_raw(hf, tmp_path / "out", dtype="nonsense")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option",
    [{"max_shard_size": "5GB"}, {"max_position_embeddings": 64}, {"rope_theta": 1e6}, {"tokenizer_version": "v3"}],
    ids=lambda option: next(iter(option)),
)
def test_options_of_whole_models_are_refused_for_an_adapter(option: dict[str, Any], tmp_path: Path) -> None:
    raw, hf = converted_adapter(tmp_path)
    with pytest.raises(ValueError, match=rf"lora.* is an adapter: leave out {next(iter(option))}"):
        convert_raw_to_hf(raw, tmp_path / "out", **option)
    if "max_shard_size" in option:
        with pytest.raises(ValueError, match=r"peft.* is an adapter: leave out max_shard_size"):
            convert_hf_to_raw(hf, tmp_path / "out", **option)
    assert not (tmp_path / "out").exists()


def test_models_are_cut_into_shards_of_five_gigabytes_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def record(*args: Any, max_shard_size: int | str | None, **kwargs: Any) -> dict[str, str]:
        sizes.append(max_shard_size)
        return {}

    monkeypatch.setattr(folders, "write_checkpoint", record)
    raw = write_raw(tmp_path / "raw", COMMON, raw_tensors(COMMON))
    convert_raw_to_hf(raw, tmp_path / "hf")
    write_raw_lora(tmp_path / "lora")
    convert_raw_to_hf(tmp_path / "lora", tmp_path / "peft")
    assert sizes == ["5GB", None]
