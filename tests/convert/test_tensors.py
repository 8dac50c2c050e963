"""Name tables, the rotary permutation, shapes, and the checks on the tensors of models and adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM

from mistral_hf.convert.config import params_to_config
from mistral_hf.convert.params import KNOWN_MODELS, KnownModel, complete_params, normalize_params
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
from tests.helpers.raw_reference import COMMON, raw_tensors

SIZE_FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size")


def complete(params: dict[str, Any], **given: Any) -> dict[str, Any]:
    return complete_params(normalize_params(params), **given)[0]


def test_tables_invert() -> None:
    for table in (RAW_TO_HF, LORA_TO_PEFT):
        for source, target in table.pairs:
            for n in ("0", "17", "103"):
                name = source.replace("{n}", n)
                assert table.to_target(name) == target.replace("{n}", n)
                assert table.to_source(table.to_target(name)) == name


@pytest.mark.parametrize(
    "name",
    ["layers.0.feed_forward.gate.weight", "layers.x.ffn_norm.weight", "layers.0.attention.wq.bias", "rope.freqs"],
)
def test_unknown_names_raise(name: str) -> None:
    with pytest.raises(ValueError, match="Unknown tensor name"):
        RAW_TO_HF.to_target(name)
    with pytest.raises(ValueError, match="Unknown tensor name"):
        RAW_TO_HF.to_source(name)


def test_a_table_is_one_to_one() -> None:
    with pytest.raises(ValueError, match="one-to-one"):
        NameTable([("a", "x"), ("b", "x")])


def test_tables_can_be_chained() -> None:
    port = NameTable([("model.layers.{n}.self_attn.q_proj.weight", "layers.{n}.attn/q/kernel")])
    assert port.to_target(RAW_TO_HF.to_target("layers.5.attention.wq.weight")) == "layers.5.attn/q/kernel"


@pytest.mark.parametrize(("heads", "dim"), [(4, 16), (1, 6), (8, 128), (3, 2)])
def test_the_permutation_matches_its_definition(heads: int, dim: int) -> None:
    weight = np.arange(heads * dim * 5).reshape(heads * dim, 5)
    half = interleaved_to_half(weight, heads)
    for head in range(heads):
        for pair in range(dim // 2):
            for part in range(2):
                expected = weight[head * dim + 2 * pair + part]
                assert np.array_equal(half[head * dim + part * dim // 2 + pair], expected)
    assert np.array_equal(half_to_interleaved(half, heads), weight)


def test_the_permutation_is_the_same_for_torch_and_for_vectors() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 5)).astype(np.float32)
    for array in (weight, weight[:, 0]):
        permuted = interleaved_to_half(torch.from_numpy(array.copy()), 4)
        assert np.array_equal(permuted.numpy(), interleaved_to_half(array, 4))


def test_the_permutation_refuses_a_wrong_head_count() -> None:
    with pytest.raises(ValueError, match="even size"):
        interleaved_to_half(np.zeros((36, 4)), 4)


def test_query_and_key_use_their_own_head_counts() -> None:
    params = complete(COMMON)
    tensors = {name: tensor.float().numpy() for name, tensor in raw_tensors(COMMON).items()}
    for part, heads in (("q", 4), ("k", 2)):
        raw = f"layers.1.attention.w{part}.weight"
        name, weight = raw_to_hf(raw, tensors[raw], params)
        assert name == f"model.layers.1.self_attn.{part}_proj.weight"
        assert np.array_equal(weight, interleaved_to_half(tensors[raw], heads))
        assert hf_to_raw(name, weight, params)[0] == raw
        assert np.array_equal(hf_to_raw(name, weight, params)[1], tensors[raw])


def test_only_rotary_projections_are_permuted() -> None:
    params = complete(COMMON)
    for raw, shape in raw_shapes(params).items():
        weight = np.arange(np.prod(shape)).reshape(shape)
        changed = not np.array_equal(raw_to_hf(raw, weight, params)[1], weight)
        assert changed == raw.endswith(("wq.weight", "wk.weight"))


@pytest.mark.parametrize("known", KNOWN_MODELS, ids=lambda known: known.names)
def test_shapes_of_published_models_match_the_library(known: KnownModel) -> None:
    """Full-size shapes, on the meta device."""
    sizes = dict(zip(SIZE_FIELDS, known.shape, strict=True))
    params = complete({**sizes, "norm_eps": 1e-5, "rope_theta": known.rope_theta, "max_seq_len": 32768})
    with torch.device("meta"):
        model = MistralForCausalLM(MistralConfig.from_dict(params_to_config(params, "bfloat16")))
    assert hf_shapes(params) == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0.feed_forward.experts.0.w1.weight", "mixture of experts"),
        ("vision_encoder.patch_conv.weight", "a vision tower, which params.json does not describe"),
        ("layers.0.mixer.A_log", "mamba"),
        ("layers.0.attention.wq.qscale_weight", "quantized"),
        ("something.else", "does not have them"),
    ],
)
def test_foreign_tensors_are_refused_by_name(name: str, message: str) -> None:
    shapes = raw_shapes(complete(COMMON))
    with pytest.raises(ValueError, match=message):
        check_tensors({**shapes, name: (1,)}, shapes, "It")


def test_missing_and_misshapen_tensors_are_named() -> None:
    shapes = raw_shapes(complete(COMMON))
    fewer = {name: shape for name, shape in shapes.items() if name != "norm.weight"}
    with pytest.raises(ValueError, match=r"lacks 1 tensors, norm\.weight"):
        check_tensors(fewer, shapes, "It")
    with pytest.raises(ValueError, match=r"norm\.weight has shape \(3,\)"):
        check_tensors({**shapes, "norm.weight": (3,)}, shapes, "It")


def test_adapters_are_checked_against_their_model() -> None:
    params = complete(COMMON)
    good = {"layers.0.attention.wq.lora_A.weight": (8, 64), "layers.0.attention.wq.lora_B.weight": (64, 8)}
    assert check_adapter(good, params, "It") == 8
    with pytest.raises(ValueError, match="shape"):
        check_adapter({**good, "layers.0.attention.wq.lora_B.weight": (32, 8)}, params, "It")
    with pytest.raises(ValueError, match="no tensors"):
        check_adapter({}, params, "It")
