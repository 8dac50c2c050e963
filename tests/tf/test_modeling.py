"""The TensorFlow models compute what the PyTorch models and the oracle do."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import mistral_hf
from mistral_hf import BUNDLED_CHECKPOINT, MistralForCausalLM
from tests.helpers import reference
from tests.helpers.tf_models import arrays, assert_close, tf, to_tf

WINDOWS = [1, 2, 5, None]


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_logits_match_the_oracle(make_model: Any, padded: Any, window: int | None) -> None:
    """Left padding, theta other than 1e4, untied, a head_dim that is not hidden_size / heads."""
    theta = {"rope_type": "default", "rope_theta": 100.0}
    model = make_model(sliding_window=window, rope_parameters=theta)
    inputs = padded(17, 23, 9)
    expected = reference.logits(dict(model.named_parameters()), model.config, **inputs)
    ported = to_tf(model)
    found = ported(**arrays(inputs)).logits
    assert_close(found, expected, inputs["attention_mask"].bool().numpy(), atol=1e-4)


@torch.no_grad()
def test_a_model_with_tied_embeddings_matches_pytorch(make_model: Any, token_ids: Any) -> None:
    ids = token_ids(2, 13)
    tied = make_model(tie_word_embeddings=True)
    ported = to_tf(tied)
    assert "lm_head.weight" not in ported.named_weights()
    assert_close(ported(input_ids=ids.numpy()).logits, tied(ids).logits, atol=1e-4)


@torch.no_grad()
def test_a_model_without_a_head_matches_pytorch(make_model: Any, token_ids: Any) -> None:
    ids = token_ids(2, 13)
    bare = make_model("Model")
    assert_close(to_tf(bare)(input_ids=ids.numpy()).last_hidden_state, bare(ids).last_hidden_state, atol=1e-4)


@torch.no_grad()
def test_a_trained_checkpoint_matches_pytorch() -> None:
    """Within 3e-4, four windows long."""
    model = MistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32).eval()
    text = (BUNDLED_CHECKPOINT / "heldout.txt").read_text()[:4000]
    ids = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)(text, return_tensors="pt")["input_ids"][:, :512]
    assert ids.shape == (1, 512)
    ported = mistral_hf.TFMistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT)
    assert_close(ported(input_ids=ids.numpy()).logits, model(ids).logits, atol=3e-4)


@pytest.mark.parametrize("capacity", [3, 16])
@pytest.mark.parametrize("window", WINDOWS)
def test_cached_matches_uncached(make_model: Any, padded: Any, window: int | None, capacity: int) -> None:
    """In chunks of several and of single tokens, across the wrap at least twice; a null window's buffer doubles."""
    ported = to_tf(make_model("Model", sliding_window=window))
    inputs = arrays(padded(21, 24, 15))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = ported(**inputs, use_cache=False)
    assert whole.past_key_values is None
    cache, parts, slots = None, [], set()
    for start, end in [(0, 3), (3, 4), (4, 12), (12, 13), (13, 14), (14, 21), (21, 22), (22, 24)]:
        outputs = ported(
            input_ids=ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, cache_capacity=capacity
        )
        cache = outputs.past_key_values
        parts.append(outputs.last_hidden_state)
        slots.add(cache.slots)
    assert int(cache.length) == 24
    assert slots == {(3, None): {3, 6, 12, 24}, (16, None): {16, 32}}.get((capacity, window), slots)
    assert window is None or cache.slots == window
    assert_close(tf.concat(parts, axis=1), whole.last_hidden_state, mask.astype(bool), atol=5e-5)


def test_the_first_real_token_of_a_row_has_position_zero(make_model: Any, padded: Any) -> None:
    """However much padding there is, and in whichever chunk the token comes."""
    ported = to_tf(make_model("Model", sliding_window=None))
    inputs = arrays(padded(9, 4))
    alone = ported(input_ids=inputs["input_ids"][1:, 5:], cache_capacity=4).past_key_values
    cache = None
    for columns in np.s_[:, :3], np.s_[:, 3:7], np.s_[:, 7:]:
        chunk = {name: array[columns] for name, array in inputs.items()}
        cache = ported(**chunk, past_key_values=cache, cache_capacity=9).past_key_values
    for ours, theirs in zip(cache.keys, alone.keys, strict=True):
        assert_close(ours[1:, :, 5:], theirs, atol=5e-5)


def test_one_trace_serves_all_batches_and_lengths(make_model: Any, padded: Any) -> None:
    """With a cache and without one."""
    ported = to_tf(make_model("Model", sliding_window=5))
    shape = tf.TensorSpec([None, None], tf.int32)
    traced = tf.function(
        lambda ids, mask: dict(ported(input_ids=ids, attention_mask=mask, use_cache=True)),
        input_signature=[shape, shape],
    )
    for lengths in [(7,), (23, 20, 4)]:
        inputs = {name: tensor.int().numpy() for name, tensor in padded(*lengths).items()}
        found, expected = traced(*inputs.values()), ported(**inputs)
        where = inputs["attention_mask"].astype(bool)
        assert_close(found["last_hidden_state"], expected.last_hidden_state, where)
        assert_close(found["past_key_values"].keys[1], expected.past_key_values.keys[1])
    assert traced.experimental_get_tracing_count() == 1


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(make_model: Any, token_ids: Any) -> None:
    """Positions that restart, even after one token, begin a sequence."""
    model = make_model(sliding_window=5)
    ids = token_ids(2, 14)
    positions = torch.tensor([[*range(5), 0, *range(8)]])
    found = to_tf(model)(input_ids=ids.numpy(), position_ids=positions.numpy()).logits
    assert_close(found, model(ids, position_ids=positions).logits, atol=1e-4)
    assert_close(found[:, 6:], model(ids[:, 6:]).logits, atol=1e-4)


@torch.no_grad()
def test_no_cache_is_kept_of_packed_sequences(make_model: Any, token_ids: Any) -> None:
    """What continued from it would see sequences that it is not part of; PyTorch keeps none either."""
    model, ids = make_model(), token_ids(2, 9)
    ported = to_tf(model)
    for positions, kept in ((torch.arange(9)[None], True), (torch.tensor([[*range(5), *range(4)]]), False)):
        outputs = ported(input_ids=ids.numpy(), position_ids=positions.numpy(), use_cache=True)
        assert (outputs.past_key_values is not None) == kept
        assert (model(ids, position_ids=positions, use_cache=True).past_key_values is not None) == kept


@torch.no_grad()
def test_hidden_states_and_attentions_match_pytorch(make_model: Any, padded: Any) -> None:
    model = make_model(implementation="eager", sliding_window=5)
    inputs = padded(12, 7)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected = model(**inputs, **wanted)
    outputs = to_tf(model)(arrays(inputs), **wanted)
    real = inputs["attention_mask"].bool().numpy()
    for ours, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        assert_close(ours, theirs, real, atol=1e-4)
    for ours, theirs in zip(outputs.attentions, expected.attentions, strict=True):
        assert ours.shape == theirs.shape == (2, 4, 12, 12)
        assert_close(np.swapaxes(ours, 1, 2), theirs.transpose(1, 2), real)


def test_fields_that_were_not_requested_are_absent_as_keys_and_none_as_attributes(
    make_model: Any, token_ids: Any
) -> None:
    outputs = to_tf(make_model())(token_ids(2, 5).numpy(), output_hidden_states=True, output_attentions=True)
    assert list(outputs) == ["logits", "past_key_values", "hidden_states", "attentions"]
    assert outputs["logits"] is outputs.logits
    assert outputs.loss is None
    with pytest.raises(AttributeError, match="no field 'logit'; it has logits"):
        outputs.logit  # noqa: B018


def test_embeddings_can_take_the_place_of_ids(make_model: Any, token_ids: Any) -> None:
    ported, ids = to_tf(make_model("Model")), token_ids(2, 9).numpy()
    embeds = tf.gather(ported.embed_tokens.weight.value, ids)
    assert_close(ported(inputs_embeds=embeds).last_hidden_state, ported(input_ids=ids).last_hidden_state)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match=r"Pass exactly one of input_ids and inputs_embeds, not (neither|both)"):
            ported(**inputs)


def test_logits_to_keep_are_those_of_the_last_positions(make_model: Any, token_ids: Any) -> None:
    ported, ids = to_tf(make_model()), token_ids(3, 10).numpy()
    assert_close(ported(input_ids=ids, logits_to_keep=2).logits, ported(input_ids=ids).logits[:, -2:])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_logits_in_low_precision_are_exact_within_what_the_dtype_can_tell_apart(
    make_model: Any, token_ids: Any, policy: str
) -> None:
    """Norms and softmax are computed in float32."""
    model = make_model(initializer_range=0.05)
    ids = token_ids(2, 20).numpy()
    exact, ported = to_tf(model)(input_ids=ids).logits.numpy(), to_tf(model, policy)
    found = ported(input_ids=ids).logits
    assert found.dtype == {"float16": tf.float16}.get(policy, tf.bfloat16)
    assert ported.lm_head.weight.dtype == {"mixed_bfloat16": "float32"}.get(policy, policy)
    tolerance = (0.002 if policy == "float16" else 0.02) * np.abs(exact).max()
    assert_close(tf.cast(found, tf.float32), exact, atol=tolerance)


def test_ids_outside_the_vocabulary_or_of_another_kind_are_refused(make_model: Any, token_ids: Any) -> None:
    ported, ids = to_tf(make_model()), token_ids(2, 5).numpy()
    with pytest.raises(ValueError, match=r"input_ids span \[1, 99\], but must lie in \[0, 99\)"):
        ported(input_ids=np.array([[1, 99]]))
    for wrong in (ids[0], ids / 1.0):
        with pytest.raises(ValueError, match=r"input_ids is .*; it must be integers \[batch, tokens\]"):
            ported(input_ids=wrong)


def test_masks_positions_and_caches_of_another_shape_are_refused(make_model: Any, token_ids: Any) -> None:
    ported, ids = to_tf(make_model()), token_ids(2, 5).numpy()
    for shape in ((2, 4), (3, 5), (5,)):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*, but there are 5 new tokens in 2 rows"):
            ported(input_ids=ids, attention_mask=np.ones(shape))
    for shape in ((2, 4), (3, 5), (5,)):
        with pytest.raises(ValueError, match=r"position_ids has shape .*: it must be \[batch or 1, tokens\]"):
            ported(input_ids=ids, position_ids=np.ones(shape, int))
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, but the new tokens have 1"):
        ported(input_ids=ids[:1], past_key_values=ported(input_ids=ids).past_key_values)


def test_inputs_may_be_lists_or_a_dictionary_of_known_names(make_model: Any, padded: Any) -> None:
    """Lists as keywords; what the dictionary holds takes precedence over an argument of the same name."""
    ported, inputs = to_tf(make_model()), arrays(padded(5, 3))
    expected = ported(**inputs).logits
    assert_close(ported(**{name: array.tolist() for name, array in inputs.items()}).logits, expected)
    assert_close(ported(inputs).logits, expected)
    assert_close(ported(inputs, attention_mask=np.ones((2, 5))).logits, expected)
    with pytest.raises(ValueError, match="a tensor 'token_type_ids', but the model takes input_ids"):
        ported({**inputs, "token_type_ids": inputs["input_ids"]})


def test_labels_outside_the_vocabulary_or_of_another_kind_are_refused(make_model: Any, token_ids: Any) -> None:
    ported, ids = to_tf(make_model()), token_ids(2, 5).numpy()
    with pytest.raises(ValueError, match=r"labels hold 120, but must lie in \[0, 99\)"):
        ported(input_ids=ids, labels=np.where(ids == ids[1, 3], 120, ids))
    with pytest.raises(ValueError, match="labels of shape"):
        ported(input_ids=ids, labels=ids[:, 1:])
    with pytest.raises(ValueError, match="labels are float32, but must be integers"):
        ported(input_ids=ids, labels=ids.astype("float32"))


LABELS = {
    "regression": (1, torch.tensor([0.5, -2.0, 1.5])),
    "single_label_classification": (3, torch.tensor([2, 0, 1])),
    "multi_label_classification": (3, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]])),
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("problem", LABELS)
@torch.no_grad()
def test_classification_matches_pytorch(make_model: Any, padded: Any, problem: str, side: str) -> None:
    """Logits and loss, by the attention mask and by the pad token; the problem is inferred from the labels."""
    count, labels = LABELS[problem]
    model = make_model("ForSequenceClassification", num_labels=count)
    inputs = padded(9, 4, 12, side=side)
    expected = model(**inputs, labels=labels)
    ported = to_tf(model)
    batch = arrays(inputs)
    found = ported({**batch, "labels": labels.numpy()})
    assert_close(found.logits, expected.logits, atol=1e-4)
    assert_close(found.loss, expected.loss, atol=1e-4)
    if side == "right":
        assert_close(ported(input_ids=batch["input_ids"]).logits, expected.logits, atol=1e-4)
    model.config.problem_type = "no_such_problem"
    with pytest.raises(ValueError, match=r"problem_type='no_such_problem' must be one of regression"):
        ported({**batch, "labels": labels.numpy()})


def test_several_sequences_without_a_mask_or_a_pad_token_are_refused(make_model: Any, token_ids: Any) -> None:
    """A single one is taken as it is."""
    ported = to_tf(make_model("ForSequenceClassification", pad_token_id=None, num_labels=2))
    ids = token_ids(2, 5).numpy()
    with pytest.raises(ValueError, match=r"config\.pad_token_id is None and there is no attention mask"):
        ported(input_ids=ids)
    one = ported(input_ids=ids[:1]).logits
    assert_close(one, ported(input_ids=ids[:1], attention_mask=np.ones((1, 5))).logits)
    assert type(ported) is mistral_hf.TFMistralForSequenceClassification


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_token_classification_matches_pytorch(make_model: Any, padded: Any, bias: bool) -> None:
    """Logits and loss; labels that are ignored do not count."""
    model = make_model("ForTokenClassification", num_labels=3, token_classification_bias=bias)
    inputs = padded(9, 4, 12)
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"] % 3, -100)
    expected = model(**inputs, labels=labels)
    ported = to_tf(model)
    found = ported({**arrays(inputs), "labels": labels.numpy()})
    assert_close(found.logits, expected.logits, inputs["attention_mask"].bool().numpy(), atol=1e-4)
    assert_close(found.loss, expected.loss, atol=1e-4)
    with pytest.raises(ValueError, match=r"labels hold 3, but must lie in \[0, 3\)"):
        ported({**arrays(inputs), "labels": np.full(labels.shape, 3)})


def test_the_states_of_tokens_are_dropped_out_in_training_only(make_model: Any, token_ids: Any) -> None:
    ids = token_ids(1, 9).numpy()
    for dropout, changes in ((None, True), (0.0, False)):
        ported = to_tf(make_model("ForTokenClassification", classifier_dropout=dropout))
        exact = ported(ids).logits.numpy()
        np.testing.assert_array_equal(ported(ids).logits, exact)
        assert (np.abs(ported(ids, training=True).logits - exact).max() > 1e-3) == changes


def test_the_configuration_says_which_states_are_returned(make_model: Any, token_ids: Any) -> None:
    ported, ids = to_tf(make_model(output_hidden_states=True)), token_ids(1, 5).numpy()
    assert len(ported(ids).hidden_states) == 3
    assert ported(ids, output_hidden_states=False).hidden_states is None


def test_within_a_graph_a_row_under_a_mask_is_one_sequence(make_model: Any, token_ids: Any) -> None:
    """Values are unknown there; outside of graphs, positions that restart under a mask are refused."""
    ported, ids = to_tf(make_model()), token_ids(1, 5).numpy()
    positions, mask = np.array([[0, 1, 2, 0, 1]]), np.ones((1, 5), int)
    with pytest.raises(ValueError, match=r"position_ids\[0, 3\] restarts at 0, as in packed sequences"):
        ported(ids, mask, positions)
    traced = tf.function(lambda: ported(ids, mask, tf.constant(positions)).logits)()
    packed = ported(ids, position_ids=positions).logits
    assert np.abs(traced - packed).max() > 1e-3


def test_targets_of_another_shape_are_refused(make_model: Any, token_ids: Any) -> None:
    ported = to_tf(make_model("ForSequenceClassification", num_labels=2))
    with pytest.raises(ValueError, match=r"do not fit multi_label_classification with num_labels=2"):
        ported(input_ids=token_ids(1, 5).numpy(), labels=np.zeros((1, 3), np.float32))
