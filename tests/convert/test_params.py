"""``params.json`` <-> ``config.json``: round trips, the table of published models, and refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.mistral.configuration_mistral import MistralConfig

from mistral_hf.convert.config import config_to_params, params_to_config
from mistral_hf.convert.params import KNOWN_MODELS, complete_params, normalize_params, params_difference
from tests.helpers.family import FAMILIES
from tests.helpers.raw_reference import COMMON, GENERATIONS, VISION_PARAMS, YARN

YARN_ROPE = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
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
    library = FAMILIES[ours["model_type"]].stock_config
    config = library.from_dict(ours)
    assert config.rope_parameters["rope_theta"] == params["rope_theta"]
    assert config.rope_parameters["rope_type"] == ("yarn" if params["yarn"] else "default")
    full_layers = [kind == "full_attention" for kind in getattr(config, "layer_types", None) or []]
    windows = [None if full else config.sliding_window for full in full_layers] or config.sliding_window
    assert (windows, config.head_dim) == (params["sliding_window"], params["head_dim"])
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


def test_windows_by_layer_make_a_ministral_model() -> None:
    config = params_to_config(complete({**COMMON, "n_layers": 4, "_sliding_window": [None, 8]}), "bfloat16")
    assert (config["model_type"], config["architectures"]) == ("ministral", ["MinistralForCausalLM"])
    assert config["sliding_window"] == 8
    assert config["layer_types"] == ["full_attention", "sliding_attention"] * 2


@pytest.mark.parametrize("model_type", ["mistral", "ministral"])
def test_layer_types_without_a_difference_are_one_window(model_type: str) -> None:
    config = params_to_config(complete({**COMMON, "sliding_window": 8}), "bfloat16") | {"model_type": model_type}
    for kinds, window in ((["sliding_attention"] * 2, 8), (["full_attention"] * 3, None), (None, 8)):
        assert config_to_params(config | {"layer_types": kinds})["sliding_window"] == window


SCALED = {"yarn": YARN, "llama_4_scaling": {"original_max_position_embeddings": 16, "beta": 0.1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": [4, 8]}, r"windows of \[4, 8\], but a model type has one size"),
        ({"sliding_window": [None, 8], **SCALED}, "no model type has both llama_4_scaling"),
    ],
)
def test_what_no_model_type_expresses_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        params_to_config(complete({**COMMON, **change}), "bfloat16")


def test_the_raw_ministral_3_is_the_library_s_default_configuration() -> None:
    """The library's defaults are those of Ministral 3 8B; its own conversion sets both mscale fields to 1."""
    params = {
        **dict(zip(SIZE_FIELDS, (4096, 34, 32, 8, 128, 14336, 131072), strict=True)),
        "norm_eps": 1e-5,
        "tied_embeddings": False,
        **VISION_PARAMS,
        "yarn": {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": False, "beta": 32, "alpha": 1},
        "llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1},
    }
    ours = Ministral3Config.from_dict(params_to_config(complete(params), "bfloat16"))
    different = {
        name: (value, getattr(ours, name))
        for name, value in Ministral3Config().to_dict().items()
        if name not in ("architectures", "dtype", "pad_token_id", "transformers_version")
        and getattr(ours, name, value) != value
    }
    library, own = (dict(rope) for rope in different.pop("rope_parameters"))
    assert different == {}
    assert {name: library[name] for name in own} == own
    assert library.keys() - own.keys() <= {"type", "max_position_embeddings"}  # without effect


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_have_the_library_s_values(model_type: str) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 16, "intermediate_size": 96}
    full = FAMILIES[model_type].stock_config(**sizes, vocab_size=80).to_dict()
    short = config_to_params({"model_type": model_type, **sizes, "vocab_size": 80})
    assert params_difference(short, config_to_params(full)) == {}


def test_of_two_spellings_of_rope_parameters_that_of_the_library_counts() -> None:
    newer = {"rope_type": "default", "rope_theta": 1e4}
    config = params_to_config(complete(COMMON), "bfloat16") | {"rope_scaling": YARN_ROPE, "rope_parameters": newer}
    expected = MistralConfig.from_dict(config).rope_parameters
    params = config_to_params(config)
    assert params["yarn"]["factor"] == expected["factor"]
    assert params["rope_theta"] == expected["rope_theta"]


@pytest.mark.parametrize("factor", [0.5, 4.0])
@pytest.mark.parametrize(
    "given",
    [
        *({}, {"mscale": 1.0}, {"mscale": 1.0, "mscale_all_dim": 0.0}, {"mscale": 1.0, "mscale_all_dim": 1.0}),
        *({"mscale": 0.7, "mscale_all_dim": 0.7}, {"mscale": 0.7, "mscale_all_dim": 1.0}, {"attention_factor": 1.0}),
        *({"attention_factor": 1.2}, {"attention_factor": 1.0, "mscale": 0.7, "mscale_all_dim": 1.0}),
        {"attention_factor": 0.1 * math.log(4.0) + 1},
    ],
    ids=str,
)
def test_yarn_that_scales_in_another_way_is_refused_and_all_other_is_converted(
    given: dict[str, float], factor: float
) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": 8, **given}
    config = params_to_config(complete(COMMON), "bfloat16") | {"rope_parameters": rope}
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](MistralConfig.from_dict(config))
    plain = 0.1 * math.log(max(factor, 1)) + 1
    if expected in (pytest.approx(1), pytest.approx(plain)):
        applied = config_to_params(config)["yarn"]["apply_scale"]
        assert expected == pytest.approx(plain if applied else 1)
    else:
        with pytest.raises(ValueError, match=f"multiply by {expected:.6g}"):
            config_to_params(config)


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
        ({"multimodal": {"whisper_model_args": {}}}, "multimodal"),
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


def test_a_mixture_of_experts_is_pointed_to_the_library() -> None:
    with pytest.raises(ValueError, match=r"a mixture of experts, for .* MixtralForCausalLM"):
        normalize_params({**COMMON, "moe": {"num_experts": 8}})


def test_a_vision_tower_does_not_change_the_text_model() -> None:
    assert normalize_params(COMMON | VISION_PARAMS) == normalize_params(COMMON)


def test_features_set_to_null_are_ignored() -> None:
    assert normalize_params({**COMMON, "moe": None, "quantization": None, "kv_lora_rank": None, "lora": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama'.* in the library's classes"),
        ({"model_type": "mistral3"}, "model_type='mistral3'"),
        ({"model_type": "mixtral"}, "model_type='mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 3.0}},
            "attention_factor makes yarn",
        ),
        ({"rope_scaling": {**YARN_ROPE, "short_factor": 3.0}}, "yarn parameters without a raw form: {'short_factor'"),
        ({"rope_scaling": {**YARN_ROPE, "truncate": False}}, "yarn parameters without a raw form: {'truncate'"),
        ({"rope_scaling": {**YARN_ROPE, "llama_4_scaling_beta": 0.1}}, "only in a 'ministral3' model"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope parameters for 'full_attention'"),
        ({"layer_types": ["full_attention"]}, "layer_types must give"),
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
    """``tensors.py`` and ``params.py`` import only the standard library, and ``config.py`` only ``params.py``."""
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); assert not {'numpy', 'torch', 'jax'} & sys.modules.keys()"
    for module in ("tensors", "params"):
        path = sys.modules[f"mistral_hf.convert.{module}"].__file__
        subprocess.run([sys.executable, "-c", code, path], check=True)
    lines = Path(str(sys.modules["mistral_hf.convert.config"].__file__)).read_text().splitlines()
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported == {"__future__", "math", "typing", ".params"}
