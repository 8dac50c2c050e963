"""Attention in TensorFlow: blocks of queries, memory and rounding."""

from typing import Any

import numpy as np
import pytest

from tests.helpers.tf_models import arrays, assert_close, tf, tf_attention, to_tf


@pytest.mark.parametrize("window", [1, 5, 40, None])
@pytest.mark.parametrize("length", [8, 23])
def test_attention_by_blocks_matches_attention_in_one_piece(
    make_model: Any, padded: Any, monkeypatch: pytest.MonkeyPatch, window: int | None, length: int
) -> None:
    """With and without a cache before the prompt."""
    ported = to_tf(make_model("Model", sliding_window=window))
    inputs = arrays(padded(length, length - 3))
    real = inputs["attention_mask"].astype(bool)
    more = {"input_ids": inputs["input_ids"], "attention_mask": np.ones_like(inputs["input_ids"])}
    first = ported(**inputs, use_cache=True)
    second = ported(**more, past_key_values=first.past_key_values)
    monkeypatch.setattr(tf_attention, "BLOCK", 4)
    again = ported(**inputs, use_cache=True)
    assert_close(again.last_hidden_state, first.last_hidden_state, real)
    assert_close(ported(**more, past_key_values=again.past_key_values).last_hidden_state, second.last_hidden_state)


def test_no_tensor_of_a_long_prompt_is_as_large_as_a_whole_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is, none has S * S elements."""
    monkeypatch.setattr(tf_attention, "BLOCK", 16)
    length, head_dim = 512, 4

    @tf.function(autograph=False)
    def attend(states: Any) -> Any:
        context = tf_attention.attention_context(8, tf.zeros([1, length], tf.int32), None, None)
        return context.attend(states, states, states, lambda weights, block: weights, False)[0]

    graph = attend.get_concrete_function(tf.TensorSpec([1, 1, length, head_dim])).graph
    definition = graph.as_graph_def(add_shapes=True)
    nodes = [*definition.node, *(node for function in definition.library.function for node in function.node_def)]
    sizes = [
        int(np.prod([dim.size for dim in shape.dim]))
        for node in nodes
        for shape in node.attr["_output_shapes"].list.shape
        if all(dim.size > 0 for dim in shape.dim)
    ]
    assert length * head_dim <= max(sizes) < length * length / 8


def test_softmax_rounds_once_in_low_precision() -> None:
    """At the end, over many keys too."""
    q = tf.cast(tf.random.stateless_normal([1, 1, 4, 8], [0, 2]), tf.bfloat16)
    k = tf.cast(tf.random.stateless_normal([1, 1, 700, 8], [0, 3]), tf.bfloat16)
    _, weights = tf_attention.mix(q, k, k, tf.ones([1, 4, 700], tf.bool), lambda weights, block: weights, 0)
    scores = tf.matmul(q * 8**-0.5, k, transpose_b=True)
    np.testing.assert_array_equal(weights, tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32)), tf.bfloat16))
