"""Packed sequences in JAX: where positions restart, tokens see and predict nothing of another sequence."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mistral_hf import RollingCache
from mistral_hf.flax import attention as flax_attention
from mistral_hf.flax import layers as flax_layers
from mistral_hf.flax import sequence_layout as flax_layout
from tests.helpers.flax_models import array, arrays, differences, jax, jnp, leaves, stacked, to_flax

LENGTHS = (3, 11, 1, 6)  # shorter and longer than the window of 5
TOTAL = sum(LENGTHS)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model(sliding_window=5)


@pytest.fixture(scope="module")
def twin(model: Any) -> Any:
    return to_flax(model)


@pytest.fixture(scope="module")
def packed(token_ids: Any) -> Any:
    """Ids and positions ``[1, S]`` of four sequences in one row, as PyTorch tensors."""
    return {"input_ids": token_ids(1, TOTAL), "position_ids": positions_of(LENGTHS)}


def positions_of(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def alone(run: Callable[[Any], Any], ids: Any, lengths: tuple[int, ...] = LENGTHS) -> Any:
    """The results of a function of ids for each sequence, joined along the tokens."""
    sequences = np.split(ids, np.cumsum(lengths)[:-1], axis=1)
    return np.concatenate([run(sequence) for sequence in sequences], axis=1)


@pytest.mark.parametrize("window", [1, 5, None])
def test_packed_sequences_have_the_logits_of_each_alone_and_of_pytorch(
    make_model: Any, packed: Any, window: int | None
) -> None:
    model = make_model(sliding_window=window)
    twin, inputs = to_flax(model), arrays(packed)
    logits = twin(**inputs).logits
    np.testing.assert_allclose(logits, alone(lambda ids: twin(ids).logits, inputs["input_ids"]), atol=2e-5)
    assert differences(logits, model(**packed).logits) < 2e-5


def test_scanned_layers_checkpoints_and_compiled_callers_keep_sequences_apart(
    model: Any, twin: Any, packed: Any
) -> None:
    inputs = arrays(packed)
    expected = alone(lambda ids: twin(ids).logits, inputs["input_ids"])
    for other in (stacked(twin), to_flax(model, gradient_checkpointing=True)):
        np.testing.assert_allclose(other(**inputs).logits, expected, atol=2e-5)
    compiled = jax.jit(lambda ids, positions: twin(ids, position_ids=positions).logits)
    np.testing.assert_allclose(compiled(*inputs.values()), expected, atol=2e-5)
    ids, positions = (jnp.asarray(value) for value in inputs.values())
    np.testing.assert_allclose(twin.module(ids, None, positions).logits, expected, atol=2e-5)


@pytest.mark.parametrize("window", [5, None])
def test_long_inputs_keep_sequences_apart_in_blocks(make_model: Any, token_ids: Any, window: int | None) -> None:
    """More tokens than two blocks of attention take, in sequences that end within blocks and at their edges."""
    lengths = (200, flax_attention.BLOCK - 72, 150, 1, 90)
    model, ids = make_model(sliding_window=window), token_ids(1, sum(lengths))
    assert sum(lengths) > 2 * flax_attention.BLOCK
    twin, positions = to_flax(model), positions_of(lengths)
    logits = twin(ids.numpy(), position_ids=positions.numpy()).logits
    np.testing.assert_allclose(logits, alone(lambda ids: twin(ids).logits, ids.numpy(), lengths), atol=3e-5)
    assert differences(logits, model(ids, position_ids=positions).logits) < 3e-5


def test_rows_are_packed_differently_or_alike(twin: Any, token_ids: Any) -> None:
    """Positions may have one row for all of the batch, or a row for each."""
    ids = token_ids(2, 9).numpy()
    first, second = (4, 5), (9,)
    for positions, lengths in (([first, second], (first, second)), ([first], (first, first))):
        found = twin(ids, position_ids=torch.cat([positions_of(n) for n in positions]).numpy()).logits
        for row in range(2):
            expected = alone(lambda ids: twin(ids).logits, ids[row : row + 1], lengths[row])
            np.testing.assert_allclose(found[row : row + 1], expected, atol=2e-5)


def test_attention_weights_of_other_sequences_are_zero(twin: Any, packed: Any) -> None:
    inputs = arrays(packed)
    segments = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    weights = np.stack(twin(**inputs, output_attentions=True).attentions)
    assert (weights[..., segments[:, None] != segments] == 0).all()
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)


def test_positions_that_do_not_restart_change_nothing(twin: Any, token_ids: Any) -> None:
    ids = token_ids(2, 9).numpy()
    np.testing.assert_allclose(twin(ids, position_ids=np.arange(9)[None]).logits, twin(ids).logits, atol=1e-6)


def test_without_positions_nothing_is_computed_for_packing(
    twin: Any, packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with a mask or a cache, with which a row is one sequence."""

    def fail(*args: Any) -> None:
        raise AssertionError("packed_segments was called")

    monkeypatch.setattr(flax_layers, "packed_segments", fail)
    ids = jnp.asarray(packed["input_ids"].numpy())
    module, ones = twin.module, jnp.ones_like(ids)
    jax.eval_shape(lambda: module(ids))
    jax.eval_shape(lambda: module(ids, ones, ones))
    jax.eval_shape(lambda: module(ids, None, ones, twin.init_cache(1, TOTAL)))
    jax.eval_shape(lambda: module(ids[:, :1], None, ones[:, :1]))
    with pytest.raises(AssertionError, match="packed_segments was called"):
        jax.eval_shape(lambda: module(ids, None, ones))


def test_segments_are_counted_from_position_to_position() -> None:
    positions = jnp.array([[0, 1, 2, 0, 1, 0, 7, 8], [3, 4, 5, 6, 7, 8, 9, 10]])
    expected = [[0, 0, 0, 1, 1, 2, 3, 3], [0] * 8]
    assert np.array_equal(flax_layout.packed_segments(positions), expected)


def test_a_mask_that_lets_packed_sequences_see_each_other_is_refused(model: Any, twin: Any, packed: Any) -> None:
    """As in PyTorch; positions of padding do not matter."""
    inputs = arrays(packed)
    ones = np.ones((1, TOTAL), int)
    message = r"position_ids\[0, 3\] restarts at 0.*attention_mask"
    with pytest.raises(ValueError, match=message):
        model(**packed, attention_mask=torch.tensor(ones))
    for kind in (np.asarray, jnp.asarray, np.ndarray.tolist):
        given = {name: kind(value) for name, value in {**inputs, "attention_mask": ones}.items()}
        for call in (twin, twin.loss):
            with pytest.raises(ValueError, match=message):
                call(**given)
    mask, positions = np.array([[0, 0, 1, 1, 1]]), np.array([[7, 3, 0, 1, 2]])
    ids = inputs["input_ids"][:, :5]
    np.testing.assert_allclose(twin(ids, mask, positions).logits[:, 2:], twin(ids, mask).logits[:, 2:], atol=1e-5)


def test_with_a_mask_of_unknown_values_a_row_is_one_sequence(twin: Any, packed: Any) -> None:
    """A compiled function of the caller cannot refuse it; PyTorch computes the same there."""
    inputs = arrays(packed)
    ones = np.ones((1, TOTAL), int)
    masked = jax.jit(lambda ids, mask, positions: twin(ids, mask, positions).logits)
    found = masked(inputs["input_ids"], ones, inputs["position_ids"])
    assert not np.allclose(found, twin(**inputs).logits, atol=1e-2)


def test_with_a_cache_a_row_is_one_sequence(model: Any, twin: Any, packed: Any) -> None:
    """As in PyTorch and TensorFlow."""
    cache = twin.init_cache(1, TOTAL)
    found = twin(**arrays(packed), past_key_values=cache).logits
    expected = model(**packed, past_key_values=RollingCache(model.config)).logits
    assert differences(found, expected) < 2e-5


@pytest.mark.parametrize("options", [{}, {"scan_layers": True}, {"gradient_checkpointing": True}], ids=str)
def test_the_loss_and_its_gradients_match_each_sequence_alone_and_pytorch(
    model: Any, twin: Any, packed: Any, options: dict[str, bool]
) -> None:
    """No label is predicted from another sequence."""
    inputs, ids = arrays(packed), packed["input_ids"].numpy()
    other = stacked(twin) if "scan_layers" in options else to_flax(model, **options)

    def mean_of_parts(params: Any) -> Any:
        sequences = np.split(ids, np.cumsum(LENGTHS)[:-1], axis=1)
        total = sum(twin.loss(sequence, params=params) * (sequence.shape[1] - 1) for sequence in sequences)
        return total / (TOTAL - len(LENGTHS))

    def of(gradient: Any, name: str) -> Any:
        """The gradient of a weight, whether its layer is stacked with the others or not."""
        found = leaves(gradient)
        if name in found:
            return found[name]
        _, _, number, rest = name.split(".", 3)
        return found[f"model.layers.{rest}"][int(number)]

    loss, gradient = jax.value_and_grad(lambda params: other.loss(**inputs, params=params))(other.params)
    expected, parts = jax.value_and_grad(mean_of_parts)(twin.params)
    assert abs(float(loss) - float(expected)) < 1e-5
    model.zero_grad()
    reference = model(**packed, labels=packed["input_ids"]).loss
    reference.backward()
    assert abs(float(loss) - reference.item()) < 1e-5
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(of(gradient, name), of(parts, name), atol=1e-5, err_msg=name)
        assert differences(of(gradient, name), parameter.grad) < 1e-5, name


def test_labels_of_the_caller_are_not_predicted_from_another_sequence(model: Any, twin: Any, packed: Any) -> None:
    labels = packed["input_ids"].clone()
    labels[:, 4:7] = -100
    expected = model(**packed, labels=labels).loss.item()
    assert abs(float(twin.loss(**arrays(packed), labels=labels.numpy())) - expected) < 1e-5
    compiled = jax.jit(lambda ids, positions, labels: twin.loss(ids, labels=labels, position_ids=positions))
    assert abs(float(compiled(*arrays(packed).values(), labels.numpy())) - expected) < 1e-5


def test_the_loss_takes_positions_beside_a_mask(model: Any, twin: Any, padded: Any) -> None:
    """A row is then one sequence, and positions change only the rotary embedding."""
    inputs = padded(9, 6)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0) * 2
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[1, 3] = -100  # the token that only padding precedes
    expected = model(**inputs, labels=labels).loss.item()
    assert abs(float(twin.loss(**arrays(inputs))) - expected) < 1e-5
    assert abs(float(twin.loss(**arrays(inputs), labels=array(labels))) - expected) < 1e-5
