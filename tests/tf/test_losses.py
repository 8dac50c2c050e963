"""The losses of the TensorFlow heads have the values and gradients of PyTorch's."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.tf_models import tf, tf_losses, to_tf

IGNORED = tf_losses.IGNORE_INDEX
MODES = ("eager", "graph", "xla")


def in_mode(mode: str, function: Any) -> Any:
    """The function as it is, as a graph, or compiled with XLA."""
    return function if mode == "eager" else tf.function(function, jit_compile=mode == "xla", autograph=False)


def loss_and_gradients(ported: Any, ids: Any, labels: Any, mode: str = "eager") -> tuple[float, dict[str, Any]]:
    """The loss of a batch, and the gradients by the names of the weights."""
    variables = ported.named_weights()

    def run(ids: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = ported(input_ids=ids, attention_mask=tf.ones_like(ids), labels=labels).loss
        return loss, tape.gradient(loss, [variable.value for variable in variables.values()])

    loss, gradients = in_mode(mode, run)(tf.constant(ids), tf.constant(labels))
    dense = [tf.convert_to_tensor(gradient).numpy() for gradient in gradients]
    return float(loss), dict(zip(variables, dense, strict=True))


@pytest.fixture
def batch(token_ids: Any) -> tuple[Any, Any]:
    """Ids ``[3, 10]``, and labels of which three in ten are ignored."""
    ids = token_ids(3, 10)
    return ids, torch.where(torch.rand(3, 10) < 0.3, IGNORED, ids)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_language_model_loss_matches_pytorch(
    make_model: Any, batch: tuple[Any, Any], label_smoothing: float, mode: str
) -> None:
    """Value and gradients; the label smoothing is that of the configuration."""
    model = make_model(label_smoothing=label_smoothing)
    ids, labels = batch
    expected = model(ids, labels=labels).loss
    expected.backward()
    found, gradients = loss_and_gradients(to_tf(model), ids.numpy(), labels.numpy(), mode)
    np.testing.assert_allclose(found, expected.item(), rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(gradients[name], parameter.grad, rtol=0, atol=2e-5, err_msg=name)


def test_label_smoothing_changes_the_loss(make_model: Any, batch: tuple[Any, Any]) -> None:
    plain, smoothed = (
        loss_and_gradients(to_tf(make_model(label_smoothing=share)), *(tensor.numpy() for tensor in batch))[0]
        for share in (0.0, 0.2)
    )
    assert abs(smoothed - plain) > 0.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("head", ["ForCausalLM", "ForSequenceClassification"])
def test_a_loss_of_ignored_labels_only_is_zero_with_zero_gradients(
    make_model: Any, token_ids: Any, head: str, mode: str
) -> None:
    """Outside of graphs with PyTorch's warning."""
    model = make_model(head, num_labels=3)
    ids = token_ids(2, 6)
    labels = torch.full((2, 6) if head == "ForCausalLM" else (2,), IGNORED)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss, gradients = loss_and_gradients(to_tf(model), ids.numpy(), labels.numpy(), mode)
    assert loss == 0
    assert all(np.all(gradient == 0) for gradient in gradients.values())
    messages = [str(warning.message) for warning in caught if "labels" in str(warning.message)]
    with pytest.warns(UserWarning, match="All labels of a batch are ignored") as expected:
        model(ids, attention_mask=torch.ones_like(ids), labels=labels)
    assert messages == ([str(expected[0].message)] if mode == "eager" else [])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_sequence_of_one_token_has_a_loss_of_zero(make_model: Any, token_ids: Any, smoothing: float) -> None:
    """No token is predicted, so that no label counts."""
    ids = token_ids(2, 1).numpy()
    with pytest.warns(UserWarning, match="All labels of a batch are ignored"):
        loss, gradients = loss_and_gradients(to_tf(make_model(label_smoothing=smoothing)), ids, ids)
    assert loss == 0
    assert all(np.all(gradient == 0) for gradient in gradients.values())


def test_ignored_class_labels_do_not_count(make_model: Any, token_ids: Any) -> None:
    ported = to_tf(make_model("ForSequenceClassification", num_labels=3))
    ids = token_ids(3, 6).numpy()
    some, _ = loss_and_gradients(ported, ids, np.array([2, IGNORED, 1]))
    others, _ = loss_and_gradients(ported, ids[[0, 2]], np.array([2, 1]))
    np.testing.assert_allclose(some, others, rtol=1e-5)
