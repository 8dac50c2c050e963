"""The JAX models name bad input before anything is compiled, and take lists as they take arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.flax_models import jax, jnp, to_flax

IDS = [[5, 6, 7], [8, 9, 10]]
MASK = [[1, 1, 1], [0, 1, 1]]


@pytest.fixture(scope="module")
def twin(make_model: Callable[..., Any]) -> Any:
    return to_flax(make_model(eos_token_id=None))


def calls(twin: Any) -> dict[str, Callable[..., Any]]:
    """The methods that take input, by name."""
    return {"call": twin, "loss": twin.loss, "generate": twin.generate}


def test_lists_and_tensors_are_input_like_arrays(twin: Any) -> None:
    as_arrays = np.array(IDS), np.array(MASK)
    for ids, mask in ((IDS, MASK), (torch.tensor(IDS), torch.tensor(MASK))):
        assert np.array_equal(twin(ids, mask).logits, twin(*as_arrays).logits)
        assert twin.loss(ids, mask, labels=ids) == twin.loss(*as_arrays, labels=as_arrays[0])
        options = {"max_new_tokens": 3, "do_sample": False}
        assert np.array_equal(twin.generate(ids, mask, **options).sequences, twin.generate(*as_arrays, **options)[0])
    positions = [[3, 4, 5]]
    assert np.array_equal(twin(IDS, MASK, positions).logits, twin(*as_arrays, np.array(positions)).logits)


@pytest.mark.parametrize("name", ["call", "loss", "generate"])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": [1, 2, 3]}, r"input_ids is int64 \(3,\).*\[batch, tokens\].*\[ids\]"),
        ({"input_ids": [[1.0, 2.0]]}, r"input_ids is float64 \(1, 2\).*integers"),
        ({"input_ids": [[1, 2], [3]]}, r"input_ids has rows of lengths \[2, 1\].*padding=True"),
        ({"input_ids": IDS, "attention_mask": [1, 1, 1]}, r"attention_mask has shape \(3,\).*\(2, 3\)"),
        ({"input_ids": IDS, "attention_mask": [[1, 1, 1]]}, r"attention_mask has shape \(1, 3\).*\(2, 3\)"),
        ({"input_ids": IDS, "attention_mask": [[1, 1], [1, 1]]}, r"attention_mask has shape \(2, 2\).*\(2, 3\)"),
        ({"input_ids": IDS, "attention_mask": [[1], [1, 1]]}, r"attention_mask has rows of lengths \[1, 2\]"),
    ],
    ids=["1-d ids", "float ids", "ragged ids", "1-d mask", "rows of the mask", "columns of the mask", "ragged mask"],
)
def test_shapes_that_do_not_fit_are_named(twin: Any, name: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calls(twin)[name](**inputs)


@pytest.mark.parametrize("name", ["call", "loss", "generate"])
def test_an_input_without_tokens_is_named(twin: Any, name: str) -> None:
    with pytest.raises(ValueError, match=r"input_ids .*at least one token"):
        calls(twin)[name](np.zeros((1, 0), int))


@pytest.mark.parametrize("positions", [[[0, 1]], [0, 1, 2], [[0, 1, 2]] * 3, [[0], [1, 2]]], ids=str)
def test_positions_that_do_not_fit_are_named(twin: Any, positions: Any) -> None:
    with pytest.raises(ValueError, match=r"position_ids has (shape .*\(2, 3\) or \(1, 3\)|rows of lengths \[1, 2\])"):
        twin(IDS, position_ids=positions)


@pytest.mark.parametrize("labels", [[[1, 2]] * 2, [1, 2, 3], [[0.5, 1.0, 2.0]] * 2, [[1], [2, 3]]], ids=str)
def test_labels_that_do_not_fit_are_named(twin: Any, labels: Any) -> None:
    with pytest.raises(ValueError, match=r"labels (is .*integers.*\(2, 3\)|has rows of lengths \[1, 2\])"):
        twin.loss(IDS, labels=labels)


def test_the_message_names_the_first_id_outside_the_vocabulary(twin: Any) -> None:
    with pytest.raises(ValueError, match=r"input_ids\[1, 2\] = 99.*\[0, 99\)"):
        twin([[1, 2, 3], [4, 5, 99]])
    with pytest.raises(ValueError, match=r"labels\[0, 1\] = -7.*\[0, 99\)"):
        twin.loss(IDS, labels=[[-100, -7, 3], [4, 5, 6]])


def test_shapes_are_checked_before_anything_is_compiled(twin: Any) -> None:
    """Also where values are unknown, as in a compiled function of the caller."""
    with pytest.raises(ValueError, match=r"position_ids has shape \(1, 4\)"):
        jax.jit(lambda ids, positions: twin(ids, None, positions).logits)(jnp.array(IDS), jnp.zeros((1, 4), int))


def test_a_mask_may_cover_the_cached_tokens_but_not_less_than_the_new_ones(twin: Any) -> None:
    cache = twin(IDS, MASK, past_key_values=twin.init_cache(2, 8)).past_key_values
    longer = [[*row, 1] for row in MASK]
    found = twin([[1], [2]], longer, past_key_values=cache).logits
    assert np.array_equal(found, twin([[1], [2]], past_key_values=cache).logits)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1\).*\(2, 2\).*cached tokens may come before"):
        twin([[1, 1], [2, 2]], [[1], [1]], past_key_values=cache)


def test_generate_takes_the_mapping_of_a_tokenizer(twin: Any) -> None:
    """As chat templates return it; PyTorch's `generate` does too."""
    options = {"max_new_tokens": 3, "do_sample": False}
    found = twin.generate({"input_ids": IDS, "attention_mask": MASK}, **options).sequences
    assert np.array_equal(found, twin.generate(IDS, MASK, **options).sequences)
