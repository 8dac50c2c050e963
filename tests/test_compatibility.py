"""Which checkpoints a Mistral model takes, for all frameworks."""

from types import SimpleNamespace
from typing import Any

import pytest

from mistral_hf.compatibility import CheckpointError, check_decoder_weights, check_quantization

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("name", ["lm_head.weight", "score.weight", "qa_outputs.bias"])
def test_head_weights_may_be_missing_or_unexpected(name: str) -> None:
    check_decoder_weights("folder", [name], [name])


def test_rotary_buffers_of_old_checkpoints_may_be_unexpected() -> None:
    check_decoder_weights("folder", [], ["model.layers.0.self_attn.rotary_emb.inv_freq"])


@pytest.mark.parametrize("problem", ["lacks", "has unknown"])
def test_decoder_weights_must_match_exactly(problem: str) -> None:
    names = ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
    missing, unexpected = (names, []) if problem == "lacks" else ([], names)
    message = (
        rf"'folder' {problem} 2 weights of a Mistral decoder, .* model\.layers\.1\.mlp\.up_proj\.weight, model\.norm"
    )
    with pytest.raises(CheckpointError, match=message):
        check_decoder_weights("folder", missing, unexpected)


@pytest.mark.parametrize("config", [None, SimpleNamespace(), SimpleNamespace(quantization_config=NF4)])
@pytest.mark.parametrize("requested", [None, NF4, {"bnb_4bit_compute_dtype": "bfloat16"}])
def test_a_checkpoint_may_be_loaded_in_its_own_quantization(config: Any, requested: Any) -> None:
    check_quantization(config, requested)


def test_a_quantized_checkpoint_is_not_quantized_again_in_another_way() -> None:
    config = SimpleNamespace(quantization_config=SimpleNamespace(to_dict=lambda: NF4))
    with pytest.raises(ValueError, match=r"quantized with bnb_4bit_quant_type='nf4' .* again with 'fp4'"):
        check_quantization(config, {**NF4, "bnb_4bit_quant_type": "fp4"})
