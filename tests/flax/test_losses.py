"""The language-model loss of the JAX port: PyTorch's value and gradients, without ever holding all logits."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mistral_hf.flax.losses import causal_lm_loss, next_labels
from tests.helpers.flax_models import arrays, differences, jax, jnp, leaves, to_flax


@pytest.fixture(scope="module")
def smoothed_model(make_model: Callable[..., Any]) -> Any:
    return make_model(label_smoothing=0.3)


@pytest.fixture(scope="module")
def inputs(padded: Any) -> Any:
    """Two rows, one of them padded, with some labels ignored, as PyTorch tensors."""
    batch = padded(19, 13)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, 5:9] = -100
    labels[1, 6] = -100  # the token that only padding precedes
    return {**batch, "labels": labels}


def test_label_smoothing_of_the_configuration_matches_pytorch(smoothed_model: Any, inputs: Any) -> None:
    """In value and gradients; ignored labels are not smoothed either."""
    twin = to_flax(smoothed_model)
    loss, gradient = jax.value_and_grad(lambda params: twin.loss(**arrays(inputs), params=params))(twin.params)
    smoothed_model.zero_grad()
    expected = smoothed_model(**inputs).loss
    expected.backward()
    assert abs(float(loss) - expected.item()) < 1e-5
    found = leaves(gradient)
    for name, parameter in smoothed_model.named_parameters():
        assert differences(found[name], parameter.grad) < 1e-5, name


def test_label_smoothing_of_the_call_overrides_the_configuration(
    smoothed_model: Any, make_model: Any, inputs: Any
) -> None:
    twin, plain = to_flax(smoothed_model), to_flax(make_model())
    given = arrays(inputs)
    assert float(twin.loss(**given, label_smoothing=0)) == float(plain.loss(**given))
    assert float(plain.loss(**given, label_smoothing=0.3)) == float(twin.loss(**given))
    expected = smoothed_model(**inputs, label_smoothing=0.1).loss.item()
    assert abs(float(twin.loss(**given, label_smoothing=0.1)) - expected) < 1e-5
    for wrong in (1, -0.1):
        with pytest.raises(ValueError, match=rf"label_smoothing={wrong}.*\[0, 1\)"):
            twin.loss(**given, label_smoothing=wrong)


def test_without_smoothing_the_program_has_no_term_for_it() -> None:
    states, weight, labels = jnp.ones((1, 4, 8)), jnp.ones((99, 8)), jnp.ones((1, 4), int)

    def program(**options: Any) -> str:
        return str(jax.make_jaxpr(lambda w: causal_lm_loss(states, w, labels, **options))(weight))

    assert program(label_smoothing=0.0) == program() != program(label_smoothing=0.1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_loss_never_holds_all_logits(label_smoothing: float) -> None:
    states, weight = jax.random.normal(jax.random.key(0), (2, 50, 8)), jax.random.normal(jax.random.key(1), (99, 8))
    labels = jax.random.randint(jax.random.key(2), (2, 50), 0, 99).at[0, :9].set(-100)
    logits = torch.tensor(np.asarray(states @ weight.T))[:, :-1].flatten(0, 1)
    targets = torch.tensor(np.asarray(labels))[:, 1:].flatten().long()
    expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=label_smoothing)

    def loss(weight: Any, chunk: int = 1024, labels: Any = labels) -> Any:
        return causal_lm_loss(states, weight, next_labels(labels), chunk, label_smoothing=label_smoothing)

    for chunk in (7, 100, 1024):
        assert abs(float(loss(weight, chunk)) - expected.item()) < 1e-5
    text = str(jax.make_jaxpr(jax.grad(lambda w: loss(w, 16)))(weight))
    assert "16,99]" in text
    assert "100,99]" not in text
    assert float(loss(weight, labels=jnp.full((2, 50), -100))) == 0


def test_the_chunk_of_the_configuration_or_of_the_call_changes_only_memory(make_model: Any, inputs: Any) -> None:
    model, given = make_model(loss_chunk_size=3), arrays(inputs)
    twin = to_flax(model)
    expected = float(to_flax(make_model()).loss(**given))
    assert abs(float(twin.loss(**given)) - expected) < 1e-6
    assert abs(float(twin.loss(**given)) - model(**inputs).loss.item()) < 1e-5

    def program(**options: Any) -> str:
        return str(jax.make_jaxpr(lambda params: twin.loss(**given, params=params, **options))(twin.params))

    assert "f32[3,99]" in program()
    assert "f32[5,99]" in program(loss_chunk_size=5)
    assert "f32[3,99]" not in program(loss_chunk_size=5)
    for wrong in (0, -2):
        with pytest.raises(ValueError, match=f"loss_chunk_size={wrong} must be at least 1"):
            twin.loss(**given, loss_chunk_size=wrong)


def test_a_batch_without_a_label_gives_zero_and_a_warning(make_model: Any, inputs: Any) -> None:
    """Also where positions restart at every token; not within a compiled function, whose values are unknown."""
    twin, given = to_flax(make_model()), arrays(inputs)
    ignored = np.full_like(given["labels"], -100)
    ids, restarts = np.ones((1, 3), int), np.zeros((1, 3), int)
    calls = {
        "labels": lambda: twin.loss(**{**given, "labels": ignored}),
        "jax": lambda: twin.loss(**{**given, "labels": jnp.asarray(ignored)}),
        "single tokens": lambda: twin.loss(ids[:, :1]),
        "packed": lambda: twin.loss(ids, position_ids=restarts),
    }
    for name, call in calls.items():
        with pytest.warns(UserWarning, match="All labels of a batch are ignored"):
            assert float(call()) == 0, name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.loss(**given)
        assert float(jax.jit(lambda labels: twin.loss(**{**given, "labels": labels}))(ignored)) == 0
