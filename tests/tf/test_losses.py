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
@pytest.mark.parametrize("chunk", [None, 7, 100])
def test_the_language_model_loss_matches_pytorch(
    make_model: Any, batch: tuple[Any, Any], label_smoothing: float, chunk: int | None, mode: str
) -> None:
    """Value and gradients; the label smoothing and the chunks of 30 tokens are those of the configuration."""
    if (chunk == 100 and mode != "eager") or (chunk == 7 and mode == "graph"):
        pytest.skip("the other modes are enough")
    model = make_model(label_smoothing=label_smoothing, loss_chunk_size=chunk, tie_word_embeddings=chunk == 100)
    ids, labels = batch
    expected = model(ids, labels=labels).loss
    expected.backward()
    found, gradients = loss_and_gradients(to_tf(model), ids.numpy(), labels.numpy(), mode)
    np.testing.assert_allclose(found, expected.item(), rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(gradients[name], parameter.grad, rtol=0, atol=2e-5, err_msg=name)


def test_a_loss_in_chunks_returns_no_logits_and_never_holds_them(make_model: Any, token_ids: Any) -> None:
    """Neither forwards nor backwards; an argument replaces the configuration's chunks."""
    ported, ids = to_tf(make_model(loss_chunk_size=4)), tf.constant(token_ids(3, 40).numpy())
    assert ported(ids, labels=ids).logits is None
    assert ported(ids).logits.shape == (3, 40, 99)
    assert ported(ids, labels=ids, loss_chunk_size=7).logits is None

    @tf.function(autograph=False)
    def step(ids: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = ported(ids, labels=ids).loss
        return tape.gradient(loss, [ported.lm_head.weight.value])

    definition = step.get_concrete_function(ids).graph.as_graph_def(add_shapes=True)
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    shapes = {
        tuple(dim.size for dim in shape.dim)
        for node in nodes
        for shape in node.attr["_output_shapes"].list.shape
        if not shape.unknown_rank
    }
    assert (4, 99) in shapes
    assert not shapes & {(3, 40, 99), (120, 99), (117, 99), (3, 39, 99)}


@pytest.mark.parametrize("chunk", [None, 4])
def test_no_packed_sequence_predicts_a_label_of_the_next(make_model: Any, token_ids: Any, chunk: int | None) -> None:
    model, ids = make_model(loss_chunk_size=chunk), token_ids(2, 9)
    positions = torch.tensor([[*range(5), *range(4)]])
    expected = model(ids, position_ids=positions, labels=ids).loss
    ported = to_tf(model)
    found = ported(ids.numpy(), position_ids=positions.numpy(), labels=ids.numpy()).loss
    np.testing.assert_allclose(found, expected.detach(), rtol=0, atol=1e-5)
    parts = [ported(part.numpy(), labels=part.numpy()).loss for part in (ids[:, :5], ids[:, 5:])]
    np.testing.assert_allclose(found, (4 * parts[0] + 3 * parts[1]) / 7, rtol=1e-5)


def test_a_model_fits_with_a_loss_in_chunks_but_without_metrics_of_logits(make_model: Any, token_ids: Any) -> None:
    ported, ids = to_tf(make_model(loss_chunk_size=5)), token_ids(2, 9).numpy()
    inputs = {"input_ids": ids, "labels": ids}
    ported.compile("sgd")
    losses = ported.fit(inputs, epochs=3, verbose=0).history["loss"]
    assert losses[2] < losses[0]
    ported.compile("sgd", metrics=["accuracy"])
    with pytest.raises(ValueError, match=r"set model\.config\.loss_chunk_size = None"):
        ported.fit(inputs, verbose=0)


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
