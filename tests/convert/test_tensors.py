"""Name tables, the rotary permutation, and params.json <-> config.json."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers.models.ministral3.configuration_ministral3 import Ministral3Config
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM

from mistral_hf.convert.params import (
    KNOWN_MODELS,
    complete_params,
    config_to_params,
    normalize_params,
    params_difference,
    params_to_config,
)
from mistral_hf.convert.tensors import (
    LORA_TO_PEFT,
    RAW_TO_HF,
    NameTable,
    check_adapter,
    check_tensors,
    half_to_interleaved,
    hf_shapes,
    hf_to_raw,
    interleaved_to_half,
    raw_shapes,
    raw_to_hf,
)
from tests.helpers.raw_reference import COMMON, GENERATIONS, YARN, raw_tensors

SIZE_FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")


def complete(params, **given):
    return complete_params(normalize_params(params), **given)[0]


def test_tables_invert():
    for table in (RAW_TO_HF, LORA_TO_PEFT):
        for source, target in table.pairs:
            for n in ("0", "17", "103"):
                name = source.replace("{n}", n)
                assert table.forward(name) == target.replace("{n}", n)
                assert table.backward(table.forward(name)) == name


@pytest.mark.parametrize(
    "name",
    ["layers.0.feed_forward.gate.weight", "layers.x.ffn_norm.weight", "layers.0.attention.wq.bias", "rope.freqs"],
)
def test_unknown_names_raise(name):
    with pytest.raises(ValueError, match="unknown tensor name"):
        RAW_TO_HF.forward(name)
    with pytest.raises(ValueError, match="unknown tensor name"):
        RAW_TO_HF.backward(name)


def test_a_table_is_one_to_one():
    with pytest.raises(ValueError, match="one-to-one"):
        NameTable([("a", "x"), ("b", "x")])


def test_ports_chain_their_own_table():
    port = NameTable([("model.layers.{n}.self_attn.q_proj.weight", "layers.{n}.attn/q/kernel")])
    assert port.forward(RAW_TO_HF.forward("layers.5.attention.wq.weight")) == "layers.5.attn/q/kernel"


@pytest.mark.parametrize(("heads", "dim"), [(4, 16), (1, 6), (8, 128), (3, 2)])
def test_permutation_by_its_definition(heads, dim):
    weight = np.arange(heads * dim * 5).reshape(heads * dim, 5)
    half = interleaved_to_half(weight, heads)
    for head in range(heads):
        for pair in range(dim // 2):
            for part in range(2):
                expected = weight[head * dim + 2 * pair + part]
                assert np.array_equal(half[head * dim + part * dim // 2 + pair], expected)
    assert np.array_equal(half_to_interleaved(half, heads), weight)


def test_permutation_is_the_same_for_torch_and_for_vectors():
    weight = np.random.default_rng(0).standard_normal((32, 5)).astype(np.float32)
    for array in (weight, weight[:, 0]):
        permuted = interleaved_to_half(torch.from_numpy(array.copy()), 4)
        assert np.array_equal(permuted.numpy(), interleaved_to_half(array, 4))


def test_permutation_refuses_a_wrong_head_count():
    with pytest.raises(ValueError, match="even size"):
        interleaved_to_half(np.zeros((36, 4)), 4)


def test_query_and_key_use_their_own_head_counts():
    params = complete(COMMON)
    tensors = {name: tensor.float().numpy() for name, tensor in raw_tensors(COMMON).items()}
    for part, heads in (("q", 4), ("k", 2)):
        raw = f"layers.1.attention.w{part}.weight"
        name, weight = raw_to_hf(raw, tensors[raw], params)
        assert name == f"model.layers.1.self_attn.{part}_proj.weight"
        assert np.array_equal(weight, interleaved_to_half(tensors[raw], heads))
        assert hf_to_raw(name, weight, params)[0] == raw
        assert np.array_equal(hf_to_raw(name, weight, params)[1], tensors[raw])


def test_only_rotary_projections_are_permuted():
    params = complete(COMMON)
    for raw, shape in raw_shapes(params).items():
        weight = np.arange(np.prod(shape)).reshape(shape)
        changed = not np.array_equal(raw_to_hf(raw, weight, params)[1], weight)
        assert changed == raw.endswith(("wq.weight", "wk.weight"))


@pytest.mark.parametrize("known", KNOWN_MODELS, ids=lambda known: known.names)
def test_shapes_of_published_models_are_the_library_s_own(known):
    """Full-size shapes, on the meta device."""
    sizes = dict(zip(SIZE_FIELDS, known.shape, strict=True))
    params = complete({**sizes, "norm_eps": 1e-5, "rope_theta": known.rope_theta, "max_seq_len": 32768})
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig.from_dict(params_to_config(params, "bfloat16")))
    assert hf_shapes(params) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_params_survive_the_round_trip(generation):
    params = complete(GENERATIONS[generation])
    config = params_to_config(params, "bfloat16")
    assert params_difference(config_to_params(config), params) == {}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_library_reads_our_config_and_we_read_its(generation, tmp_path):
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


def test_what_params_leave_out_means_null_and_equal_heads():
    bare = {key: value for key, value in COMMON.items() if key not in ("n_kv_heads", "head_dim", "max_seq_len")}
    params = normalize_params(bare)
    assert (params["n_kv_heads"], params["head_dim"], params["sliding_window"]) == (4, 16, None)


def test_sliding_window_as_text_and_as_a_uniform_list():
    assert normalize_params({**COMMON, "sliding_window": "4096"})["sliding_window"] == 4096
    assert normalize_params({**COMMON, "_sliding_window": [32, 32]})["sliding_window"] == 32


def test_layers_with_different_windows_are_exact_or_refused():
    params = {**COMMON, "sliding_window": [None, 8], "max_seq_len": None}
    assert complete(params, max_position_embeddings=8)["sliding_window"] == 8
    with pytest.raises(ValueError, match="--max_position_embeddings 8"):
        complete(params, max_position_embeddings=9)


def test_known_models_fill_the_gaps_and_say_so():
    v01 = dict(zip(SIZE_FIELDS, KNOWN_MODELS[0].shape, strict=True)) | {"norm_eps": 1e-5, "sliding_window": 4096}
    params, notes = complete_params(normalize_params(v01))
    assert (params["rope_theta"], params["max_seq_len"]) == (10000.0, 32768)
    assert len(notes) == 2
    assert all("Mistral 7B v0.1" in note for note in notes)


def test_an_ambiguous_model_is_asked_about():
    """Two 24B models differ only in rope_theta; without it neither is assumed."""
    params = dict(zip(SIZE_FIELDS, KNOWN_MODELS[5].shape, strict=True)) | {"norm_eps": 1e-5}
    with pytest.raises(ValueError, match="give --rope_theta"):
        complete(params)
    assert complete(params, rope_theta=1e9)["rope_theta"] == 1e9


def test_an_unknown_model_is_asked_about():
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
        ({"n_kv_heads": 3}, "no multiple"),
        ({"head_dim": 15}, "odd"),
        ({"dim": 0}, "dim must be a positive whole number, got 0"),
        ({"dim": "64"}, "dim must be a positive whole number"),
        ({"norm_eps": -1}, "norm_eps must be a positive number"),
        ({"sliding_window": 0}, "sliding_window=0"),
        ({"sliding_window": [4, 8, 4]}, "no pattern for 2 layers"),
        ({"yarn": {"factor": 2}}, "yarn"),
        ({"yarn": {**YARN, "beta_fast": 1}}, "unknown fields"),
        ({"llama_4_scaling": {"original_max_position_embeddings": 16, "beta": 0.1}}, "needs yarn"),
    ],
)
def test_bad_params_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        params_to_config(complete({**COMMON, **change}), "bfloat16")


def test_null_features_are_no_features():
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
        ({"hidden_size": None}, "dim must be"),
    ],
)
def test_what_the_raw_format_cannot_say_is_refused(change, message):
    config = params_to_config(complete(COMMON), "bfloat16") | change
    with pytest.raises(ValueError, match=message):
        config_to_params(config)


def test_a_config_without_sizes_is_refused():
    with pytest.raises(ValueError, match="lacks hidden_size"):
        config_to_params({"model_type": "mistral"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0.feed_forward.experts.0.w1.weight", "mixture of experts"),
        ("vision_encoder.patch_conv.weight", "vision tower"),
        ("layers.0.mixer.A_log", "mamba"),
        ("layers.0.attention.wq.qscale_weight", "quantized"),
        ("something.else", "no place for"),
    ],
)
def test_foreign_tensors_are_refused_by_name(name, message):
    shapes = raw_shapes(complete(COMMON))
    with pytest.raises(ValueError, match=message):
        check_tensors({**shapes, name: (1,)}, shapes, "here")


def test_missing_and_misshapen_tensors_are_named():
    shapes = raw_shapes(complete(COMMON))
    fewer = {name: shape for name, shape in shapes.items() if name != "norm.weight"}
    with pytest.raises(ValueError, match=r"lacks 1 tensors: norm\.weight"):
        check_tensors(fewer, shapes, "here")
    with pytest.raises(ValueError, match=r"norm\.weight has shape \(3,\)"):
        check_tensors({**shapes, "norm.weight": (3,)}, shapes, "here")


def test_adapters_are_checked_against_their_model():
    params = complete(COMMON)
    good = {"layers.0.attention.wq.lora_A.weight": (8, 64), "layers.0.attention.wq.lora_B.weight": (64, 8)}
    assert check_adapter(good, params, "here") == 8
    with pytest.raises(ValueError, match="shape"):
        check_adapter({**good, "layers.0.attention.wq.lora_B.weight": (32, 8)}, params, "here")
    with pytest.raises(ValueError, match="no tensors"):
        check_adapter({}, params, "here")


def test_no_framework_is_imported_by_the_tables():
    """tensors.py and params.py stand on the standard library alone."""
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); assert not {'numpy', 'torch', 'jax'} & sys.modules.keys()"
    for module in ("tensors", "params"):
        path = sys.modules[f"mistral_hf.convert.{module}"].__file__
        subprocess.run([sys.executable, "-c", code, path], check=True)
