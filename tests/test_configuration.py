"""MistralConfig: defaults, old and new files, exchange with the reference's class, validation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mistral.configuration_mistral import MistralConfig as StockConfig

from mistral_hf import MistralConfig, MistralForCausalLM
from mistral_hf.configuration_mistral import ACTIVATIONS


def written(config: Any, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def from_file(folder: Path, **fields: Any) -> MistralConfig:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral", **fields}))
    return MistralConfig.from_pretrained(folder)


def test_defaults_match_the_reference() -> None:
    assert MistralConfig().to_dict() == StockConfig().to_dict()
    assert MistralConfig().head_dim == 128
    assert MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).head_dim == 16
    assert MistralConfig(num_key_value_heads=None).num_key_value_heads == 32


def test_class_attributes_match_the_reference() -> None:
    for name in ("model_type", "base_model_tp_plan", "base_model_pp_plan"):
        assert getattr(MistralConfig, name) == getattr(StockConfig, name), name
    ignored = getattr(StockConfig, "keys_to_ignore_at_inference", ["cache"])  # as Trainer does
    assert set(ignored) <= set(MistralConfig.keys_to_ignore_at_inference)


def test_old_hub_files_are_read(tmp_path: Path) -> None:
    """With the fields of Mistral-7B-v0.1's config.json of 2023."""
    config = from_file(
        tmp_path,
        architectures=["MistralForCausalLM"],
        hidden_size=4096,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-05,
        rope_theta=1000000.0,
        sliding_window=None,
        torch_dtype="bfloat16",
        transformers_version="4.34.0.dev0",
    )
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}
    assert config.sliding_window is None
    assert config.dtype == torch.bfloat16
    assert config.head_dim == 128


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_old_rope_scaling_becomes_rope_parameters(tmp_path: Path, key: str) -> None:
    config = from_file(tmp_path, rope_theta=500.0, rope_scaling={key: "linear", "factor": 4.0})
    assert config.rope_parameters["rope_type"] == "linear"
    assert config.rope_parameters["rope_theta"] == 500.0
    assert config.rope_parameters["factor"] == 4.0


@pytest.mark.parametrize("kind", ["default", *ROPE_INIT_FUNCTIONS])
def test_rope_types_round_trip(kind: str, rope_parameters: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    parameters = rope_parameters(kind)
    config = MistralConfig(head_dim=12, rope_parameters=dict(parameters))
    assert {name: config.rope_parameters[name] for name in parameters} == parameters
    config.save_pretrained(tmp_path)
    assert StockConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters
    assert MistralConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_an_unknown_rope_type_is_named(make_model: Callable[..., Any]) -> None:
    with pytest.raises((KeyError, ValueError), match="spiral"):
        make_model(rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0})


def test_a_missing_rope_field_is_named() -> None:
    with pytest.raises((KeyError, ValueError), match="factor"):
        MistralConfig(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0})


def test_files_are_exchanged_with_the_reference(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fields = tiny(sliding_window=None, eos_token_id=[2, 3], num_labels=3, tie_word_embeddings=True, dtype="bfloat16")
    ours, stock = MistralConfig(**fields), StockConfig(**fields)
    assert written(ours, tmp_path / "ours") == written(stock, tmp_path / "stock")
    assert StockConfig.from_pretrained(tmp_path / "ours").to_dict() == stock.to_dict()
    assert MistralConfig.from_pretrained(tmp_path / "stock").to_dict() == ours.to_dict()


def test_unknown_fields_are_kept(tmp_path: Path) -> None:
    config = from_file(tmp_path, classifier_dropout=0.25, summary="kept")
    assert config.summary == "kept"
    assert written(config, tmp_path / "again")["summary"] == "kept"


def test_copies_are_independent() -> None:
    first, second = MistralConfig(), MistralConfig()
    first.rope_parameters["rope_theta"] = 7.0
    assert second.rope_parameters["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"hidden_size": -4}, "hidden_size=-4 must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size=0 must be at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1 must not be negative"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0 must be at least 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0 must be at least 1"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_attention_heads=6 must be divisible by .*heads=4"),
        ({"num_attention_heads": 2, "num_key_value_heads": 4}, "num_attention_heads=2 must be divisible by .*heads=4"),
        ({"head_dim": 3}, "head_dim=3 must be even"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"head_dim": 0}, "head_dim=0 must be even and at least 2"),
        ({"hidden_size": 16, "num_attention_heads": 32, "num_key_value_heads": 8}, "head_dim=0 must be even"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1, or null"),
        ({"sliding_window": -1}, "sliding_window=-1 must be at least 1, or null"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be positive"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf must be positive and finite"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be positive and finite"),
        ({"rms_norm_eps": 1e39}, r"rms_norm_eps=1e\+39 must be positive and finite"),
        ({"initializer_range": -0.1}, "initializer_range=-0.1 must be finite and not negative"),
        ({"initializer_range": float("nan")}, "initializer_range=nan must be finite and not negative"),
        ({"attention_dropout": 1.0}, r"attention_dropout=1.0 must lie in \[0, 1\)"),
        ({"attention_dropout": -0.1}, r"attention_dropout=-0.1 must lie in \[0, 1\)"),
        ({"hidden_act": "swiglu"}, "hidden_act='swiglu' must be one of .*silu"),
    ],
)
def test_errors_name_field_value_and_rule(fields: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rule):
        MistralConfig(**fields)
    with pytest.raises(ValueError, match=rule):
        from_file(tmp_path, **fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("sliding_window", value) for value in ("4096", True, 3.7)),
        *(("vocab_size", 3.5), ("use_cache", "yes"), ("num_hidden_layers", True)),
    ],
)
def test_wrong_types_are_refused(field: str, value: Any) -> None:
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        MistralConfig(**{field: value})


YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("parameters", "rule"),
    [
        (YARN | {"factor": -4.0}, r"factor=-4\.0, which must be positive and finite"),
        (YARN | {"factor": float("nan")}, "factor=nan, which must be positive"),
        (YARN | {"factor": "4"}, "factor='4', which must be positive"),
        (YARN | {"factor": [[4.0]]}, r"factor=\[\[4\.0\]\], which must be positive"),
        (YARN | {"beta_fast": -1}, "beta_fast=-1, which must be not negative"),
        (YARN | {"attention_factor": float("inf")}, "attention_factor=inf, which must be positive"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings=0, which must be positive"),
        (YARN | {"rope_theta": 1}, "rope_theta=1 must be more than 1 with yarn"),
        ({"rope_type": "default", "rope_theta": float("inf")}, "rope_theta=inf, which must be positive and finite"),
        ({"rope_type": "default", "rope_theta": 1e39}, r"rope_theta=1e\+39, which must be positive and finite"),
        ({"rope_type": "default", "rope_theta": 0}, "rope_theta=0, which must be positive"),
        ({"rope_type": "default", "rope_theta": None}, "rope_theta=None, which must be positive"),
        ({"rope_type": "default", "rope_theta": True}, "rope_theta=True, which must be positive"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": None}, "factor=None, which must be positive"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}, r"factor=0\.0, which must be positive"),
        ([1, 2], r"rope_parameters=\[1, 2\] must be an object"),
        ("yarn", "rope_parameters='yarn' must be an object"),
    ],
    ids=str,
)
def test_senseless_rope_parameters_are_refused(parameters: Any, rule: str, spelling: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=rule + "|Field 'rope_parameters' with"):
        from_file(tmp_path, **{spelling: parameters})


@pytest.mark.parametrize("theta", [float("inf"), float("nan"), -1.0, 0, "10000", None])
def test_a_senseless_rope_theta_of_an_older_file_is_refused(theta: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rope_theta=.* must be positive and finite"):
        from_file(tmp_path, rope_theta=theta)


@pytest.mark.parametrize(
    "parameters",
    [
        YARN | {"factor": None, "beta_fast": None, "beta_slow": 0, "mscale": 0, "mscale_all_dim": None},
        YARN | {"attention_factor": None, "truncate": False, "factor": 0.5, "beta_slow": 64},
        {"rope_type": "default", "rope_theta": 0.5, "partial_rotary_factor": 0.5},
        {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": (1.0,) * 6, "long_factor": [2] * 6}
        | {"factor": np.float64(4), "original_max_position_embeddings": 64},
    ],
    ids=str,
)
def test_whatever_the_library_runs_is_accepted(parameters: dict[str, Any], make_model: Callable[..., Any]) -> None:
    fields = {"rope_parameters": parameters, "max_position_embeddings": 128}
    assert make_model(**fields)(torch.ones(1, 3, dtype=torch.long)).logits.isfinite().all()


def test_layer_types_must_be_uniform() -> None:
    alternating = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"layer_types=.* must all be 'sliding_attention'.*[Mm]inistral"):
        MistralConfig(num_hidden_layers=2, layer_types=alternating)
    with pytest.raises(ValueError, match="must all be 'full_attention'"):
        MistralConfig(num_hidden_layers=2, sliding_window=None, layer_types=["sliding_attention"] * 2)
    config = MistralConfig(num_hidden_layers=2, layer_types=["sliding_attention"] * 2)
    assert config.sliding_window == 4096


@pytest.mark.parametrize(
    ("field", "value"), [("sliding_window", 0), ("num_key_value_heads", 3), ("head_dim", 7), ("hidden_act", "swiglu")]
)
def test_an_override_while_loading_is_validated(checkpoint: Path, field: str, value: Any) -> None:
    """`from_pretrained` applies overrides after it has built the configuration."""
    with pytest.raises(ValueError, match=rf"{field}={value!r}"):
        MistralForCausalLM.from_pretrained(checkpoint, **{field: value})


def test_activations_match_the_library() -> None:
    assert set(ACTIVATIONS) == set(ACT2FN)
