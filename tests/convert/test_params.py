"""``params.json`` <-> ``config.json``: round trips, the table of published models, and refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.mistral.configuration_mistral import MistralConfig

from mistral_hf.convert.params import (
    KNOWN_MODELS,
    complete_params,
    config_to_params,
    normalize_params,
    params_difference,
    params_to_config,
)
from tests.helpers.raw_reference import COMMON, GENERATIONS, YARN

SIZE_FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")


def complete(params: dict[str, Any], **given: Any) -> dict[str, Any]:
    return complete_params(normalize_params(params), **given)[0]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_params_survive_the_round_trip(generation: str) -> None:
    params = complete(GENERATIONS[generation])
    config = params_to_config(params, "bfloat16")
    assert params_difference(config_to_params(config), params) == {}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_library_reads_our_config_and_we_read_that_of_the_library(generation: str, tmp_path: Path) -> None:
    params = complete(GENERATIONS[generation])
    ours = params_to_config(params, "bfloat16")
    library = Ministral3Config if ours["model_type"] == "ministral3" else MistralConfig
    config = library.from_dict(ours)
    assert config.rope_parameters["rope_theta"] == params["rope_theta"]
    assert config.rope_parameters["rope_type"] == ("yarn" if params["yarn"] else "default")
    assert (config.sliding_window, config.head_dim) == (params["sliding_window"], params["head_dim"])
    config.save_pretrained(tmp_path)
    saved = library.from_pretrained(tmp_path).to_dict()
    assert params_difference(config_to_params(saved), params) == {}


def test_absent_fields_mean_a_null_window_and_equal_heads() -> None:
    bare = {key: value for key, value in COMMON.items() if key not in ("n_kv_heads", "head_dim", "max_seq_len")}
    params = normalize_params(bare)
    assert (params["n_kv_heads"], params["head_dim"], params["sliding_window"]) == (4, 16, None)


def test_a_window_given_as_text_or_as_a_uniform_list_is_one_number() -> None:
    assert normalize_params({**COMMON, "sliding_window": "4096"})["sliding_window"] == 4096
    assert normalize_params({**COMMON, "_sliding_window": [32, 32]})["sliding_window"] == 32


def test_layers_with_different_windows_are_exact_or_refused() -> None:
    params = {**COMMON, "sliding_window": [None, 8], "max_seq_len": None}
    assert complete(params, max_position_embeddings=8)["sliding_window"] == 8
    with pytest.raises(ValueError, match="--max_position_embeddings 8"):
        complete(params, max_position_embeddings=9)


def test_known_models_fill_the_gaps_and_say_so() -> None:
    v01 = dict(zip(SIZE_FIELDS, KNOWN_MODELS[0].shape, strict=True)) | {"norm_eps": 1e-5, "sliding_window": 4096}
    params, notes = complete_params(normalize_params(v01))
    assert (params["rope_theta"], params["max_seq_len"]) == (10000.0, 32768)
    assert len(notes) == 2
    assert all("Mistral 7B v0.1" in note for note in notes)


def test_an_ambiguous_model_needs_rope_theta() -> None:
    """Two 24B models differ only in ``rope_theta``; without it, neither is assumed."""
    params = dict(zip(SIZE_FIELDS, KNOWN_MODELS[5].shape, strict=True)) | {"norm_eps": 1e-5}
    with pytest.raises(ValueError, match="give --rope_theta"):
        complete(params)
    assert complete(params, rope_theta=1e9)["rope_theta"] == 1e9


def test_an_unknown_model_needs_its_missing_values() -> None:
    params = {key: value for key, value in COMMON.items() if key != "max_seq_len"}
    with pytest.raises(ValueError, match="give --max_position_embeddings"):
        complete(params)
    with pytest.raises(ValueError, match="contradicts"):
        complete(params, rope_theta=5.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe": {"num_experts": 8}}, "mixture of experts"),
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"vision_encoder": {"hidden_size": 1}}, "vision tower"),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantized"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"surprise": 1}, "surprise"),
        ({"n_kv_heads": 3}, "not a multiple"),
        ({"head_dim": 15}, "odd"),
        ({"dim": 0}, "dim must be a positive whole number, got 0"),
        ({"dim": "64"}, "dim must be a positive whole number"),
        ({"norm_eps": -1}, "norm_eps must be a positive number"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"sliding_window": [4, 8, 4]}, "nor a pattern that fits 2 layers"),
        ({"yarn": {"factor": 2}}, "yarn"),
        ({"yarn": {**YARN, "beta_fast": 1}}, "unknown fields"),
        ({"llama_4_scaling": {"original_max_position_embeddings": 16, "beta": 0.1}}, "needs yarn"),
    ],
)
def test_bad_params_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params_to_config(complete({**COMMON, **change}), "bfloat16")


def test_features_set_to_null_are_ignored() -> None:
    assert normalize_params({**COMMON, "moe": None, "quantization": None, "kv_lora_rank": None, "lora": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}}, "yarn parameters"),
        ({"layer_types": ["full_attention"]}, "layers that differ"),
        ({"hidden_size": None}, r"config\.json: hidden_size must be"),
    ],
)
def test_what_the_raw_format_cannot_express_is_refused(change: dict[str, Any], message: str) -> None:
    config = params_to_config(complete(COMMON), "bfloat16") | change
    with pytest.raises(ValueError, match=message):
        config_to_params(config)


def test_a_config_without_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks hidden_size"):
        config_to_params({"model_type": "mistral"})


def test_no_framework_is_imported_by_the_tables() -> None:
    """``tensors.py`` and ``params.py`` import only the standard library."""
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); assert not {'numpy', 'torch', 'jax'} & sys.modules.keys()"
    for module in ("tensors", "params"):
        path = sys.modules[f"mistral_hf.convert.{module}"].__file__
        subprocess.run([sys.executable, "-c", code, path], check=True)
