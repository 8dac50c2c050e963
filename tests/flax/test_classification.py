"""Sequence classification in JAX: PyTorch's logits, losses and gradients, for every kind of problem and padding."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mistral_hf import FlaxMistralForSequenceClassification, MistralForSequenceClassification
from tests.helpers.flax_models import array, arrays, differences, jax, leaves, stacked, to_flax

HEAD = "ForSequenceClassification"


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model(HEAD, num_labels=3)


@pytest.fixture(scope="module")
def twin(model: Any) -> Any:
    return to_flax(model)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_pytorch_with_padding_on_either_side(model: Any, twin: Any, padded: Any, side: str) -> None:
    """By the mask, or by the padding token alone."""
    inputs = padded(9, 5, 1, side=side)
    expected = model(**inputs).logits
    assert differences(twin(**arrays(inputs)).logits, expected) < 2e-5
    assert differences(stacked(twin)(**arrays(inputs)).logits, expected) < 2e-5
    ids = {"input_ids": inputs["input_ids"]}
    assert differences(twin(**arrays(ids)).logits, model(**ids).logits) < 2e-5


@pytest.mark.parametrize(
    ("fields", "labels"),
    [
        ({"num_labels": 3}, [2, 0]),
        ({"num_labels": 3}, [-100, 1]),
        ({"num_labels": 1}, [0.5, -1.0]),
        ({"num_labels": 3}, [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
        ({"num_labels": 3, "problem_type": "regression"}, [[1.0, 0.0, 1.0], [0.0, 0.5, 1.0]]),
    ],
    ids=["classes", "ignored", "regression", "several labels", "several targets"],
)
def test_losses_and_gradients_are_those_of_pytorch(make_model: Any, padded: Any, fields: Any, labels: Any) -> None:
    model, inputs = make_model(HEAD, **fields), padded(7, 4)
    twin, given = to_flax(model), torch.tensor(labels)
    loss, gradient = jax.value_and_grad(lambda p: twin.loss(**arrays(inputs), labels=np.array(labels), params=p))(
        twin.params
    )
    expected = model(**inputs, labels=given).loss
    expected.backward()
    assert abs(float(loss) - expected.item()) < 1e-5
    found = leaves(gradient)
    for name, parameter in model.named_parameters():
        assert differences(found[name], parameter.grad) < 1e-5, name


def test_ignored_labels_give_zero_and_a_warning(twin: Any, padded: Any) -> None:
    inputs = arrays(padded(7, 4))
    with pytest.warns(UserWarning, match="All labels of a batch are ignored"):
        assert float(twin.loss(**inputs, labels=[-100, -100])) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.loss(**inputs, labels=[-100, 1])


def test_a_checkpoint_goes_to_pytorch_and_back(model: Any, twin: Any, tmp_path: Path) -> None:
    twin.save_pretrained(tmp_path)
    again = MistralForSequenceClassification.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    loaded = FlaxMistralForSequenceClassification.from_pretrained(tmp_path)
    assert np.array_equal(loaded.params["score"]["weight"], array(model.score.weight))


def test_a_language_model_becomes_a_classifier(
    make_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The new head is random, by the seed, and a warning names it."""
    make_model().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        first = FlaxMistralForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert "lacks score.weight" in caplog.text
    other = FlaxMistralForSequenceClassification.from_pretrained(tmp_path, num_labels=5, seed=1)
    assert first.params["score"]["weight"].shape == (5, 32)
    assert not np.array_equal(first.params["score"]["weight"], other.params["score"]["weight"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "needs labels"),
        ([0], r"labels is int64 \(1,\), but single_label_classification of 2 rows.*integers \(2,\)"),
        ([0, 3], r"labels\[1\] = 3, but it must lie in \[0, 3\): the classes"),
        ([[0.5], [1.0]], r"multi_label_classification of 2 rows with num_labels=3 needs \(2, 3\)"),
    ],
    ids=str,
)
def test_labels_that_do_not_fit_are_named(twin: Any, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        twin.loss([[1, 2], [3, 4]], labels=labels)


def test_rows_of_unknown_padding_are_refused(make_model: Any) -> None:
    twin = to_flax(make_model(HEAD, pad_token_id=None))
    assert twin([[1, 2, 3]]).logits.shape == (1, 2)
    with pytest.raises(ValueError, match=r"pad_token_id is None.*attention_mask"):
        twin([[1, 2, 3], [4, 5, 6]])
