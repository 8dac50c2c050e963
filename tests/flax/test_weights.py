"""Weights in int8: close to the model's own, and smaller."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mistral_hf import BUNDLED_CHECKPOINT, FlaxMistralForCausalLM
from mistral_hf.flax import compiled as flax_compiled
from mistral_hf.flax.weights import CPU_OPTIONS, FEW_ROWS, Int8Weight, linear
from mistral_hf.generation_options import GenerationOptions
from tests.helpers.flax_models import arrays, jax, jnp, stacked, to_flax


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model(eos_token_id=None)


@pytest.fixture
def quantized(model: Any) -> Any:
    twin = to_flax(model)
    twin.quantize()
    return twin


def dense(params: Any) -> Any:
    """The weights that int8 ones stand for, as arrays."""
    is_leaf = lambda leaf: isinstance(leaf, Int8Weight)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dense() if is_leaf(leaf) else leaf, params, is_leaf=is_leaf)


def test_every_output_has_its_own_factor_and_half_a_step_of_error() -> None:
    weight = jax.random.normal(jax.random.key(0), (7, 33)) * jnp.arange(7)[:, None] ** 2
    packed = Int8Weight.of(weight)
    assert packed.values.dtype == jnp.int8
    assert packed.shape == (7, 33)
    error = np.abs(packed.dense() - weight)
    assert (error <= np.asarray(packed.scale)[:, None] * 0.5001).all()
    assert np.array_equal(packed.dense()[0], np.zeros(33))  # an output without weights
    assert np.abs(np.asarray(packed.values)).max() == 127


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_those_of_the_weights_that_they_stand_for(rows: int, dtype: str) -> None:
    packed = Int8Weight.of(jax.random.normal(jax.random.key(0), (48, 96)).astype(dtype))
    states = jax.random.normal(jax.random.key(1), (1, rows, 96)).astype(dtype)
    found, expected = linear(states, packed), states.astype("float32") @ (packed.values * packed.scale[:, None]).T
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype("float32"), expected, rtol=1e-2 if dtype == "bfloat16" else 1e-5, atol=1e-4)


def test_a_quantized_model_computes_what_its_weights_say(model: Any, quantized: Any, padded: Any) -> None:
    """Also with stacked layers, in a loop of generation, and in its loss."""
    inputs, options = arrays(padded(9, 6)), {"max_new_tokens": 9, "do_sample": False}
    plain = to_flax(model)
    plain.params = dense(quantized.params)
    np.testing.assert_allclose(quantized(**inputs).logits, plain(**inputs).logits, atol=2e-5)
    assert abs(float(quantized.loss(**inputs)) - float(plain.loss(**inputs))) < 1e-5
    scanned = stacked(to_flax(model))
    scanned.quantize()
    assert scanned.params["model"]["layers"]["input_layernorm"]["weight"].dtype == jnp.float32
    expected = plain.generate(**inputs, **options).sequences
    for other in (quantized, scanned):
        assert np.array_equal(other.generate(**inputs, **options).sequences, expected)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_checkpoint_is_quantized_while_it_is_read(model: Any, tmp_path: Path, scan_layers: bool) -> None:
    model.save_pretrained(tmp_path)
    found = FlaxMistralForCausalLM.from_pretrained(tmp_path, load_in_8bit=True, scan_layers=scan_layers)
    expected = FlaxMistralForCausalLM.from_pretrained(tmp_path, scan_layers=scan_layers)
    expected.quantize()
    assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), found.params, expected.params)))


def test_trained_weights_lose_little() -> None:
    """The bundled checkpoint's loss on held-out text changes by less than a hundredth; its memory is a quarter."""
    model = FlaxMistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype="float32")
    from transformers import AutoTokenizer

    text = (BUNDLED_CHECKPOINT / "heldout.txt").read_text()[:1500]
    ids = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)(text, return_tensors="np").input_ids
    loss, size = float(model.loss(ids)), _size(model)
    model.quantize()
    assert abs(float(model.loss(ids)) - loss) < 0.01 * loss
    assert _size(model) < 0.27 * size


def _size(model: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.params))


def test_decoding_reads_int8_without_storing_it_in_float32(make_model: Any) -> None:
    """The compiled loop has no room for a matrix in float32."""
    model = make_model(hidden_size=64, intermediate_size=160, eos_token_id=None, num_hidden_layers=1)
    twin = to_flax(model)
    twin.quantize()
    assert dict(flax_compiled.compiler_options(twin.params)) == CPU_OPTIONS
    assert flax_compiled.compiler_options(to_flax(model).params) == ()
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        options = flax_compiled.compiler_options(twin.params)
        programs = flax_compiled.generation_programs(twin._graph, GenerationOptions(32, 0), *options)
        ids = jnp.ones((1, 16), jnp.int32)
        state = jax.eval_shape(programs.prefill, twin.params, ids, ids > 0, 5, jax.random.key(0))
        memory = programs.decode.lower(twin.params, state, 5).compile().memory_analysis().temp_size_in_bytes
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
    assert memory < 160 * 64 * 4


def test_int8_weights_are_not_saved(quantized: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weight is in int8.*before it is quantized"):
        quantized.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_second_quantization_changes_nothing(quantized: Any) -> None:
    before = quantized.params
    quantized.quantize()
    assert all(a is b for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(quantized.params), strict=True))


def test_int8_is_close_to_torch(model: Any, quantized: Any, padded: Any) -> None:
    inputs = padded(9)
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
    assert np.abs(quantized(**arrays(inputs)).logits - expected).max() < 0.1 * np.abs(expected).max()
