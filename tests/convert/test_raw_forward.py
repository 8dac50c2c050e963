"""The raw forward pass against the library's models and against an independent one in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.ministral3.modeling_ministral3 import Ministral3ForCausalLM

from mistral_hf.checkpoints.reader import open_checkpoint
from mistral_hf.convert.folders import convert_raw_to_hf
from mistral_hf.convert.params import complete_params, normalize_params
from mistral_hf.convert.raw_forward import raw_logits
from tests.helpers.checkpoint_files import read_json, relative_error
from tests.helpers.family import FAMILIES
from tests.helpers.raw_reference import GENERATIONS, TOKENS, raw_tensors, reference_logits, write_raw


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_library_and_this_package_compute_what_the_raw_model_does(generation: str, tmp_path: Path) -> None:
    """Past the window, the converted model agrees with the raw model in float64, in stock Transformers and here."""
    params, tensors = GENERATIONS[generation], raw_tensors(GENERATIONS[generation], torch.float32)
    raw = write_raw(tmp_path / "raw", params, tensors)
    convert_raw_to_hf(raw, tmp_path / "hf")
    full, _ = complete_params(normalize_params(params))
    tokens = TOKENS[: full["max_seq_len"]]
    with open_checkpoint(raw, "consolidated") as checkpoint:
        ours = raw_logits(checkpoint, full, tokens)
    family = FAMILIES[read_json(tmp_path / "hf/config.json")["model_type"]]
    stock, here = (getattr(module, f"{family.stem}ForCausalLM") for module in (family.stock_modeling, family.modeling))
    models = [
        stock.from_pretrained(tmp_path / "hf", attn_implementation="eager"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
    ]
    assert [type(model) for model in models] == [stock, here]
    with torch.no_grad():
        computed = [model(torch.tensor([tokens])).logits[0].numpy() for model in models]
    if not params.get("yarn"):
        computed.append(reference_logits(tensors, params, tokens).numpy())
    for logits in computed:
        assert relative_error(ours, logits) < 2e-5


def test_llama_4_scaling_matches_the_library_beyond_the_original_positions(tmp_path: Path) -> None:
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
