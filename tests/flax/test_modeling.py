"""The JAX model matches the PyTorch model and the float64 oracle: its modules, whole, cached, trained."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

import mistral_hf
from mistral_hf import MistralConfig
from mistral_hf.flax import attention as flax_attention
from mistral_hf.flax import cache as flax_cache
from mistral_hf.flax import compiled as flax_compiled
from mistral_hf.flax import layers as flax_layers
from mistral_hf.flax import sequence_layout as flax_layout
from mistral_hf.modeling_mistral import MistralRotaryEmbedding
from mistral_hf.rope import ROTARY_TYPES
from tests.helpers import reference
from tests.helpers.flax_models import array, arrays, differences, jax, jnp, leaves, nnx, stacked, to_flax

LENGTH = 19  # more than twice the widest window


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model()


@pytest.fixture(scope="module")
def twin(model: Any) -> Any:
    return to_flax(model)


@pytest.fixture(scope="module")
def batch(padded: Callable[..., Any]) -> Any:
    """Two rows of tokens, the second padded on the left, as PyTorch tensors."""
    return padded(LENGTH, LENGTH - 6)


def oracle(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    weights = {name: weight.double() for name, weight in model.state_dict().items()}
    return reference.logits(weights, model.config, inputs["input_ids"], attention_mask=inputs["attention_mask"])


@pytest.mark.parametrize(
    "overrides",
    [
        {"sliding_window": 1},
        {"sliding_window": 2, "tie_word_embeddings": True},
        {"sliding_window": 5, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
        {"sliding_window": None, "num_key_value_heads": 4, "head_dim": 6},
    ],
    ids=str,
)
def test_logits_match_the_float64_oracle(make_model: Any, batch: Any, overrides: dict[str, Any]) -> None:
    model = make_model(**overrides)
    logits = to_flax(model)(**arrays(batch)).logits
    assert differences(logits, oracle(model, batch), batch["attention_mask"]) < 2e-5


def test_states_and_attentions_of_every_layer_match_pytorch(model: Any, twin: Any, batch: Any) -> None:
    model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected = model(**batch, **wanted)
    model.set_attn_implementation("sdpa")
    found = twin(**arrays(batch), **wanted)
    real = batch["attention_mask"]
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert differences(ours, theirs, real) < 2e-5
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert ours.shape == theirs.shape
        assert differences(ours.swapaxes(1, 2), theirs.transpose(1, 2), real) < 1e-5


@pytest.mark.parametrize("name", ["self_attn", "mlp", "input_layernorm"])
def test_every_module_matches_pytorch(model: Any, twin: Any, name: str) -> None:
    states = torch.randn(2, 7, 32)
    ours, theirs = (getattr(decoder.layers[1], name) for decoder in (twin.module.model, model.model))
    if name != "self_attn":
        assert differences(jax.jit(ours)(array(states)), theirs(states)) < 1e-5
        return
    positions = torch.arange(7)[None]
    mask = torch.where(reference.window_mask(7, 8), 0.0, -torch.inf)[None, None]
    expected = theirs(states, model.model.rotary_emb(states, positions), attention_mask=mask)[0]
    cos, sin = twin.module.model.rotary_emb(array(positions))
    context = flax_attention.AttentionContext(
        cos, sin, real=jnp.ones((2, 7), bool), segments=None, length=None, empty=True, weights_wanted=False
    )
    assert differences(jax.jit(lambda states: ours(states, context)[0])(array(states)), expected) < 1e-5


@pytest.mark.parametrize("kind", sorted(ROTARY_TYPES))
def test_rotary_embeddings_match_pytorch(kind: str, tiny: Any, rope_parameters: Any) -> None:
    """Of short sequences, and beyond the pretrained lengths (64 of longrope, 1024 of dynamic)."""
    config = MistralConfig(**tiny(rope_parameters=rope_parameters(kind)))
    sign = np.repeat([-1, 1], 6)  # the first half of sin is negated
    for positions in (torch.tensor([[0, 1, 5, 63]]), torch.tensor([[0, 1, 5, 63, 900, 1500]])):
        expected = MistralRotaryEmbedding(config)(torch.zeros(1), positions)
        cos, sin = jax.jit(flax_layers.MistralRotaryEmbedding(config))(array(positions))
        for ours, theirs in zip((cos[:, 0], sin[:, 0] * sign), expected, strict=True):
            assert differences(ours, theirs) < 2e-4


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_length_follow_it_in_generation(
    make_model: Any, padded: Any, rope_parameters: Any, kind: str
) -> None:
    """The pretrained length is passed in the prompt, or while decoding; the longest row decides, not its padding."""
    parameters = rope_parameters(kind)
    if kind == "longrope":
        parameters["original_max_position_embeddings"] = 12
    model = make_model(rope_parameters=parameters, max_position_embeddings=12, eos_token_id=None)
    twin, options = to_flax(model), {"max_new_tokens": 9, "do_sample": False}
    for inputs in (padded(7, 5), padded(19, 9)):
        assert differences(twin(**arrays(inputs)).logits, model(**inputs).logits, inputs["attention_mask"]) < 5e-5
        assert np.array_equal(twin.generate(**arrays(inputs), **options)[0], model.generate(**inputs, **options))


@pytest.mark.parametrize("name", sorted(flax_layers.ACTIVATIONS))
def test_activations_match_transformers(name: str) -> None:
    x = torch.linspace(-8, 8, 101)
    assert differences(flax_layers.ACTIVATIONS[name](array(x)), ACT2FN[name](x)) < 2e-6


def test_an_unknown_activation_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"'xielu'.*silu"):
        mistral_hf.FlaxMistralModel(MistralConfig(**tiny(hidden_act="xielu")))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_exact_as_pytorch(make_model: Any, batch: Any, dtype: str) -> None:
    """The error against float64 is at most half as large again."""
    model = make_model().to(getattr(torch, dtype))
    expected, twin = oracle(model, batch), to_flax(model, dtype)
    logits = twin(**arrays(batch)).logits
    assert logits.dtype == dtype
    real = batch["attention_mask"]
    theirs = differences(model(**batch).logits.float().detach(), expected, real)
    assert differences(logits.astype(np.float32), expected, real) < 1.5 * theirs


@pytest.mark.parametrize(("window", "scan_layers"), [(5, False), (5, True), (None, False)])
def test_a_prompt_read_in_chunks_has_the_logits_of_one_pass(
    make_model: Any, batch: Any, window: int | None, scan_layers: bool
) -> None:
    """With single tokens, and chunks shorter and longer than the window; the buffer wraps several times.

    The masks of the last chunks cover the cached tokens too.
    """
    model = make_model(sliding_window=window)
    twin, inputs = to_flax(model), arrays(batch)
    if scan_layers:
        twin = stacked(twin)
    cache = twin.init_cache(2, LENGTH)
    assert cache.slots == (window or LENGTH)
    collected = []
    for start, end in [(0, 3), (3, 4), (4, 5), (5, 12), (12, 13), (13, 14), (14, 19)]:
        mask = inputs["attention_mask"][:, 0 if start > 13 else start : end]
        output = twin(inputs["input_ids"][:, start:end], mask, past_key_values=cache)
        cache = output.past_key_values
        collected.append(output.logits)
    logits = np.concatenate(collected, axis=1)
    assert int(cache.length) == LENGTH
    assert differences(logits, oracle(model, batch), batch["attention_mask"]) < 2e-5


def test_positions_begin_at_the_first_real_token() -> None:
    """Also if the first chunks of a row are padding only, and after the buffer has wrapped."""
    mask = jnp.array([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]], bool)
    expected = np.array([[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2]])
    assert np.array_equal(flax_layout.positions(mask), expected)
    cache = flax_cache.empty_cache(1, False, (2, 1, 3, 4), "float32")
    for start, end in [(0, 2), (2, 3), (3, 5), (5, 6)]:
        cache = cache.advance(mask[:, start:end])
        assert np.array_equal(cache.positions(end - start), expected[:, start:end])
    assert np.array_equal(cache.real, [[True] * 3] * 2)


def test_logits_to_keep_keeps_the_last_and_position_ids_replace_the_default(twin: Any, batch: Any) -> None:
    inputs = arrays(batch)
    logits = twin(**inputs).logits
    np.testing.assert_allclose(twin(**inputs, logits_to_keep=2).logits, logits[:, -2:], atol=1e-5)
    positions = np.maximum(inputs["attention_mask"].cumsum(axis=1) - 1, 0)
    assert np.array_equal(twin(**inputs, position_ids=positions).logits, logits)
    assert not np.allclose(twin(**inputs, position_ids=positions * 2).logits, logits, atol=1e-2)


@pytest.mark.parametrize(("window", "past"), [(1, 0), (6, 5), (None, 0)])
def test_attention_by_blocks_matches_that_with_the_whole_mask(window: int | None, past: int) -> None:
    """In values and gradients, for lengths that blocks do not divide."""
    count, total = 37, 37 + past
    key = jax.random.key(0)
    q, k, v = (
        jax.random.normal(jax.random.fold_in(key, i), s)
        for i, s in enumerate([(2, 2, 2, count, 4), (2, 2, total, 4), (2, 2, total, 4)])
    )
    real = jnp.arange(total) >= jnp.array([[0], [3]])

    def mixed(q: Any, k: Any, v: Any, **options: Any) -> Any:
        output = flax_attention.attend(q, k, v, real, window, **options)[0]
        return jnp.sum(jnp.sin(output[:, :, :, 3:])), output

    direct = jax.value_and_grad(mixed, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    by_blocks = partial(mixed, block=4)
    blocks = jax.jit(jax.value_and_grad(by_blocks, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    np.testing.assert_allclose(direct[0][1][:, :, :, 3:], blocks[0][1][:, :, :, 3:], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), direct[1], blocks[1])


def test_no_mask_of_the_whole_input_is_built() -> None:
    """With W much shorter than S, no array of S by S elements is allocated."""
    count = 4096
    q, k = jax.ShapeDtypeStruct((1, 1, 1, count, 4), "float32"), jax.ShapeDtypeStruct((1, 1, count, 4), "float32")
    real = jax.ShapeDtypeStruct((1, count), "bool")
    run = jax.jit(lambda q, k, real: flax_attention.attend(q, k, k, real, 64)[0])
    memory = run.lower(q, k, real).compile().memory_analysis().temp_size_in_bytes
    assert memory < count * count / 4


@pytest.fixture(scope="module")
def gradient(twin: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """The loss, and its gradient by dotted names."""
    value, tree = jax.value_and_grad(lambda params: twin.loss(**arrays(batch), params=params))(twin.params)
    return value, leaves(tree)


def test_the_loss_and_its_gradients_match_pytorch(model: Any, gradient: Any, batch: Any) -> None:
    labels = batch["input_ids"].clone()
    labels[1, :7] = -100  # padding, and the token that only padding precedes
    loss = model(**batch, labels=labels).loss
    model.zero_grad()
    loss.backward()
    assert abs(float(gradient[0]) - loss.item()) < 1e-5
    for name, parameter in model.named_parameters():
        assert differences(gradient[1][name], parameter.grad) < 1e-5, name


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"scan_layers": True}], ids=str)
def test_checkpointed_and_scanned_layers_have_the_same_gradients(
    model: Any, twin: Any, gradient: Any, batch: Any, options: dict[str, bool]
) -> None:
    inputs = arrays(batch)
    other = to_flax(model, **options) if "scan_layers" not in options else stacked(twin)
    found = jax.grad(lambda params: other.loss(**inputs, params=params))(other.params)
    name = "model.layers.1.self_attn.k_proj.weight"
    value = (
        leaves(found)["model.layers.self_attn.k_proj.weight"][1] if "scan_layers" in options else leaves(found)[name]
    )
    np.testing.assert_allclose(value, gradient[1][name], atol=1e-6)
    remat = "remat" in str(jax.make_jaxpr(lambda params: other(**inputs, params=params).logits)(other.params))
    assert remat == ("gradient_checkpointing" in options)


def test_dropout_follows_its_key_and_is_off_unless_training(make_model: Any, batch: Any) -> None:
    twin, inputs = to_flax(make_model(attention_dropout=0.5)), arrays(batch)
    still = twin(**inputs).logits
    first, again, other = (twin(**inputs, train=True, dropout_rng=jax.random.key(seed)).logits for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-2)
    assert np.array_equal(still, twin(**inputs, dropout_rng=jax.random.key(0)).logits)
    with pytest.raises(ValueError, match="dropout_rng"):
        twin(**inputs, train=True)


def test_an_optax_step_lowers_the_loss(twin: Any, batch: Any) -> None:
    optax = pytest.importorskip("optax")
    inputs, optimizer = arrays(batch), optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda params: twin.loss(**inputs, params=params))(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    params, state, losses = twin.params, optimizer.init(twin.params), []
    for _ in range(4):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_outputs_and_parameters_are_pytrees(twin: Any, batch: Any) -> None:
    output = twin(**arrays(batch), output_hidden_states=True)
    assert output["logits"] is output[0] is output.logits
    assert output[1] is output.hidden_states
    assert len(jax.tree.leaves(output)) == 4
    assert type(twin.params["model"]["layers"]["0"]["self_attn"]["q_proj"]) is dict
    assert twin.params["model"]["layers"]["0"]["self_attn"]["q_proj"]["weight"].shape == (48, 32)


def test_the_module_is_nnx_and_its_weights_can_be_taken_over(twin: Any, batch: Any) -> None:
    module = twin.module
    assert isinstance(module, nnx.Module)
    assert isinstance(module.model.layers[0].self_attn.q_proj.weight, nnx.Param)
    ids = batch["input_ids"][:1].numpy()
    np.testing.assert_allclose(
        jax.jit(lambda module, ids: module(ids))(module, ids).logits, twin(ids).logits, atol=1e-5
    )
    doubled = jax.tree.map(lambda weight: weight * 2, nnx.to_pure_dict(nnx.state(module)))
    before = twin.params
    twin.params = doubled
    assert twin.params["lm_head"]["weight"][0, 0] == 2 * before["lm_head"]["weight"][0, 0]
    twin.params = before


def test_a_shape_is_compiled_once(twin: Any) -> None:
    forward = flax_compiled.forward_programs(twin._graph).forward
    ids = np.ones((3, 4), int)
    twin(ids)
    compiled = forward._cache_size()
    for _ in range(2):
        twin(ids * 2)
    again = type(twin)(twin.config)
    again(ids)
    assert forward._cache_size() == compiled
    twin(ids[:, :3])
    assert forward._cache_size() == compiled + 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.full((1, 3), 99)}, r"99.*\[0, 99\)"),
        ({"input_ids": np.zeros((1, 3))}, "integers"),
        ({"input_ids": np.ones((2, 3), int), "attention_mask": np.ones((2, 4), int)}, r"\(2, 4\).*3 tokens"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(twin: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        twin(**inputs)


def test_a_full_cache_and_one_of_another_batch_are_refused(twin: Any) -> None:
    ids = np.ones((1, 5), int)
    cache = twin(ids, past_key_values=twin.init_cache(1, 7)).past_key_values
    with pytest.raises(ValueError, match="10 tokens do not fit into a cache of 7"):
        twin(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="1 rows"):
        twin(np.ones((2, 1), int), past_key_values=cache)


def test_weights_that_do_not_fit_are_refused(twin: Any) -> None:
    with pytest.raises(ValueError, match=r"lack lm_head\.weight"):
        twin.params = {"model": twin.params["model"]}
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape"):
        twin.params = {**twin.params, "lm_head": {"weight": np.zeros((3, 3))}}
    with pytest.raises(ValueError, match=r"unknown weight score\.weight"):
        twin.params = {**twin.params, "score": {"weight": np.zeros((3, 3))}}


def test_other_dtypes_are_refused(twin: Any) -> None:
    with pytest.raises(ValueError, match="int8"):
        type(twin)(twin.config, dtype="int8")


def test_labels_outside_the_vocabulary_are_refused(twin: Any) -> None:
    ids = np.ones((1, 5), int)
    with pytest.raises(ValueError, match=r"labels\[0, 0\] = -5.*\[0, 99\)"):
        twin.loss(ids, labels=ids - 6)
