"""The TensorFlow models compute what the PyTorch ones and the oracle do, layer by layer and whole."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.activations import ACT2FN

import mistral_hf
from mistral_hf import BUNDLED_CHECKPOINT, MistralConfig, MistralForCausalLM
from mistral_hf.modeling_mistral import MistralRotaryEmbedding
from tests.helpers import reference
from tests.helpers.tf_models import arrays, tf, tf_attention, tf_layers, to_tf

WINDOWS = [1, 2, 5, None]
CLOSE = {"rtol": 0, "atol": 2e-5}


def close(found: Any, expected: Any, where: Any = ..., **tolerance: float) -> None:
    np.testing.assert_allclose(
        np.asarray(found)[where], np.asarray(expected)[where], **{**CLOSE, **tolerance}, equal_nan=False
    )


@pytest.mark.parametrize("part", ["norm", "mlp", "self_attn", "layer"])
@torch.no_grad()
def test_every_layer_is_pytorch_s(make_model: Any, part: str) -> None:
    model = make_model("Model", sliding_window=3)
    ported = to_tf(model)
    x = torch.randn(2, 11, 32)
    positions = torch.arange(11)[None]
    plan = tf_attention.AttentionPlan(3, tf.zeros([2, 11], tf.int32), None, None)
    cos, sin = ported.rotary_emb(tf.constant(positions.numpy()))
    inputs = {"position_embeddings": model.rotary_emb(x, positions), "attention_mask": model.attention_mask(x)}
    theirs, ours = model.layers[1], ported.decoder_layers[1]
    if part == "norm":
        close(ours.input_layernorm(x.numpy()), theirs.input_layernorm(x))
    elif part == "mlp":
        close(ours.mlp(x.numpy()), theirs.mlp(x))
    elif part == "self_attn":
        close(ours.self_attn(x.numpy(), cos, sin, plan=plan)[0], theirs.self_attn(x, **inputs)[0])
    else:
        close(ours(x.numpy(), cos, sin, plan=plan)[0], theirs(x, **inputs), atol=1e-4)


@pytest.mark.parametrize("window", WINDOWS)
@torch.no_grad()
def test_logits_are_the_oracle_s(make_model: Any, padded: Any, window: int | None) -> None:
    """Left padding, theta other than 1e4, untied, a head_dim that is not hidden_size / heads."""
    theta = {"rope_type": "default", "rope_theta": 100.0}
    model = make_model(sliding_window=window, rope_parameters=theta)
    inputs = padded(17, 23, 9)
    expected = reference.logits(dict(model.named_parameters()), model.config, **inputs)
    ported = to_tf(model)
    found = ported(**arrays(inputs)).logits
    close(found, expected, inputs["attention_mask"].bool().numpy(), atol=1e-4)


@torch.no_grad()
def test_tied_embeddings_and_the_bare_model(make_model: Any, token_ids: Any) -> None:
    ids = token_ids(2, 13)
    tied = make_model(tie_word_embeddings=True)
    ported = to_tf(tied)
    assert "lm_head.weight" not in ported.named_weights()
    close(ported(input_ids=ids.numpy()).logits, tied(ids).logits, atol=1e-4)
    bare = make_model("Model")
    close(to_tf(bare)(input_ids=ids.numpy()).last_hidden_state, bare(ids).last_hidden_state, atol=1e-4)


@torch.no_grad()
def test_a_trained_checkpoint() -> None:
    """Within 3e-4 of PyTorch, four windows long."""
    model = MistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32).eval()
    text = (BUNDLED_CHECKPOINT / "heldout.txt").read_text()[:4000]
    ids = AutoTokenizer.from_pretrained(BUNDLED_CHECKPOINT)(text, return_tensors="pt")["input_ids"][:, :512]
    assert ids.shape == (1, 512)
    ported = mistral_hf.TFMistralForCausalLM.from_pretrained(BUNDLED_CHECKPOINT)
    close(ported(input_ids=ids.numpy()).logits, model(ids).logits, atol=3e-4)


@pytest.mark.parametrize("capacity", [3, 16])
@pytest.mark.parametrize("window", WINDOWS)
def test_cached_is_uncached(make_model: Any, padded: Any, window: int | None, capacity: int) -> None:
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
    assert int(cache.seen) == 24
    assert slots == {(3, None): {3, 6, 12, 24}, (16, None): {16, 32}}.get((capacity, window), slots)
    assert window is None or cache.slots == window
    close(tf.concat(parts, axis=1), whole.last_hidden_state, mask.astype(bool), atol=5e-5)


def test_positions_are_those_of_a_row(make_model: Any, padded: Any) -> None:
    """A row's first real token has position 0, however much padding there is, and in whichever chunk it comes."""
    ported = to_tf(make_model("Model", sliding_window=None))
    inputs = arrays(padded(9, 4))
    alone = ported(input_ids=inputs["input_ids"][1:, 5:], cache_capacity=4).past_key_values
    cache = None
    for columns in np.s_[:, :3], np.s_[:, 3:7], np.s_[:, 7:]:
        chunk = {name: array[columns] for name, array in inputs.items()}
        cache = ported(**chunk, past_key_values=cache, cache_capacity=9).past_key_values
    for ours, theirs in zip(cache.keys, alone.keys, strict=True):
        close(ours[1:, :, 5:], theirs, atol=5e-5)


@pytest.mark.parametrize("window", [1, 5, 40, None])
@pytest.mark.parametrize("length", [8, 23])
def test_blocks_of_queries(
    make_model: Any, padded: Any, monkeypatch: pytest.MonkeyPatch, window: int | None, length: int
) -> None:
    """Whether a prompt is attended at once or in blocks, with or without a cache before it, the result is the same."""
    ported = to_tf(make_model("Model", sliding_window=window))
    inputs = arrays(padded(length, length - 3))
    real = inputs["attention_mask"].astype(bool)
    more = {"input_ids": inputs["input_ids"], "attention_mask": np.ones_like(inputs["input_ids"])}
    first = ported(**inputs, use_cache=True)
    second = ported(**more, past_key_values=first.past_key_values)
    monkeypatch.setattr(tf_attention, "BLOCK", 4)
    again = ported(**inputs, use_cache=True)
    close(again.last_hidden_state, first.last_hidden_state, real)
    close(ported(**more, past_key_values=again.past_key_values).last_hidden_state, second.last_hidden_state)


def test_unknown_lengths(make_model: Any, padded: Any) -> None:
    """One trace serves all batches and lengths, with a cache or without one."""
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
        close(found["last_hidden_state"], expected.last_hidden_state, where)
        close(found["past_key_values"].keys[1], expected.past_key_values.keys[1])
    assert traced.experimental_get_tracing_count() == 1


def test_no_mask_is_as_long_as_it_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a long prompt's attention has S * S elements."""
    monkeypatch.setattr(tf_attention, "BLOCK", 16)
    length, head_dim = 512, 4

    @tf.function(autograph=False)
    def attend(states: Any) -> Any:
        plan = tf_attention.AttentionPlan(8, tf.zeros([1, length], tf.int32), None, None)
        return plan.attend(states, states, states, lambda weights, number: weights, False)[0]

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


@torch.no_grad()
def test_packed_sequences(make_model: Any, token_ids: Any) -> None:
    """Positions that restart, even after one token, begin a sequence that does not see the one before."""
    model = make_model(sliding_window=5)
    ids = token_ids(2, 14)
    positions = torch.tensor([[*range(5), 0, *range(8)]])
    found = to_tf(model)(input_ids=ids.numpy(), position_ids=positions.numpy()).logits
    close(found, model(ids, position_ids=positions).logits, atol=1e-4)
    close(found[:, 6:], model(ids[:, 6:]).logits, atol=1e-4)


@torch.no_grad()
def test_hidden_states_and_attentions(make_model: Any, padded: Any) -> None:
    model = make_model(implementation="eager", sliding_window=5)
    inputs = padded(12, 7)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    expected = model(**inputs, **wanted)
    outputs = to_tf(model)(arrays(inputs), **wanted)
    assert list(outputs) == ["logits", "past_key_values", "hidden_states", "attentions"]
    assert outputs["logits"] is outputs.logits
    assert outputs.loss is None
    with pytest.raises(AttributeError, match="no 'logit'; it has logits"):
        outputs.logit  # noqa: B018
    real = inputs["attention_mask"].bool().numpy()
    for ours, theirs in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        close(ours, theirs, real, atol=1e-4)
    for ours, theirs in zip(outputs.attentions, expected.attentions, strict=True):
        assert ours.shape == theirs.shape == (2, 4, 12, 12)
        close(np.swapaxes(ours, 1, 2), theirs.transpose(1, 2), real)


@torch.no_grad()
def test_embeddings_in_place_of_ids(make_model: Any, token_ids: Any) -> None:
    model = make_model("Model")
    ported, ids = to_tf(model), token_ids(2, 9).numpy()
    embeds = tf.gather(ported.embed_tokens.weight.value, ids)
    close(ported(inputs_embeds=embeds).last_hidden_state, ported(input_ids=ids).last_hidden_state)
    for inputs in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match=r"Pass exactly one of input_ids and inputs_embeds, not (neither|both)"):
            ported(**inputs)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
@torch.no_grad()
def test_rotary_types(rope_parameters: Any, tiny: Any, kind: str) -> None:
    """Far positions too, where a cosine in float32 needs a careful reduction of its argument."""
    config = MistralConfig(**tiny(rope_parameters=rope_parameters(kind)))
    positions = torch.tensor([[0, 1, 7, 63, 64, 1000, 30000]])
    cos, sin = MistralRotaryEmbedding(config)(torch.zeros(1), positions)
    turned = tf.function(tf_layers.RotaryEmbedding(config), jit_compile=True)(tf.constant(positions.numpy()))
    close(tf.concat([turned[0], turned[0]], -1), cos, atol=5e-3)
    close(tf.concat([-turned[1], turned[1]], -1), sin, atol=5e-3)
    near = np.s_[:, :, :5]
    close(tf.concat([turned[0], turned[0]], -1), cos, near, atol=2e-5)
    close(tf.concat([-turned[1], turned[1]], -1), sin, near, atol=2e-5)


def test_rotary_types_that_are_not_there(rope_parameters: Any, tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"dynamic.*default, linear, llama3"):
        mistral_hf.TFMistralModel(MistralConfig(**tiny(rope_parameters=rope_parameters("dynamic"))))


@pytest.mark.parametrize("name", sorted(tf_layers._ACTIVATIONS))
def test_activations(name: str) -> None:
    x = torch.linspace(-8, 8, 101)
    theirs = ACT2FN[name]
    assert isinstance(theirs, nn.Module)
    close(tf_layers.activation(name)(tf.constant(x.numpy())), theirs(x), atol=5e-5)


def test_activations_that_are_not_there(tiny: Any) -> None:
    with pytest.raises(ValueError, match=r"hidden_act='laplace' is not among .*silu"):
        mistral_hf.TFMistralModel(MistralConfig(**tiny(hidden_act="laplace")))


@torch.no_grad()
def test_language_model_loss(make_model: Any, token_ids: Any) -> None:
    model = make_model()
    ids = token_ids(3, 10)
    labels = torch.where(torch.rand(3, 10) < 0.3, -100, ids)
    outputs = to_tf(model)({"input_ids": ids.numpy(), "labels": labels.numpy()})
    close(outputs.loss, model(ids, labels=labels).loss, atol=1e-5)
    last = to_tf(model)(input_ids=ids.numpy(), logits_to_keep=2).logits
    close(last, outputs.logits[:, -2:])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16", "float16"])
def test_low_precision(make_model: Any, token_ids: Any, policy: str) -> None:
    """Logits within what the dtype can tell apart; norms and softmax are computed in float32."""
    model = make_model(initializer_range=0.05)
    ids = token_ids(2, 20).numpy()
    exact, ported = to_tf(model)(input_ids=ids).logits.numpy(), to_tf(model, policy)
    found = ported(input_ids=ids).logits
    assert found.dtype == {"float16": tf.float16}.get(policy, tf.bfloat16)
    assert ported.lm_head.weight.dtype == {"mixed_bfloat16": "float32"}.get(policy, policy)
    close(tf.cast(found, tf.float32), exact, atol=(0.002 if policy == "float16" else 0.02) * np.abs(exact).max())


def test_rounding_in_low_precision() -> None:
    """Rotary embeddings and softmax round once, at the end, also far away and over many keys."""
    config = MistralConfig(head_dim=12)
    states = tf.cast(tf.random.stateless_normal([1, 2, 3, 12], [0, 1]), tf.bfloat16)
    cos, sin = tf_layers.RotaryEmbedding(config)(tf.constant([[3, 70, 9000]]))
    exact = tf_layers.apply_rotary(tf.cast(states, tf.float32), cos, sin)
    np.testing.assert_array_equal(tf_layers.apply_rotary(states, cos, sin), tf.cast(exact, tf.bfloat16))
    q = tf.cast(tf.random.stateless_normal([1, 1, 4, 8], [0, 2]), tf.bfloat16)
    k = tf.cast(tf.random.stateless_normal([1, 1, 700, 8], [0, 3]), tf.bfloat16)
    _, weights = tf_attention.mix(q, k, k, tf.ones([1, 4, 700], tf.bool), lambda weights, number: weights, 0)
    scores = tf.matmul(q * 8**-0.5, k, transpose_b=True)
    np.testing.assert_array_equal(weights, tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32)), tf.bfloat16))


def test_bad_input(make_model: Any, token_ids: Any) -> None:
    ported, ids = to_tf(make_model()), token_ids(2, 5).numpy()
    with pytest.raises(ValueError, match=r"input_ids span \[1, 99\], but must lie in \[0, 99\)"):
        ported(input_ids=np.array([[1, 99]]))
    for wrong in (ids[0], ids / 1.0):
        with pytest.raises(ValueError, match=r"input_ids is .*; it must be integers \[batch, tokens\]"):
            ported(input_ids=wrong)
    for shape in ((2, 4), (3, 5), (5,)):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*, but there are 5 new tokens in 2 rows"):
            ported(input_ids=ids, attention_mask=np.ones(shape))
    for shape in ((2, 4), (3, 5), (5,)):
        with pytest.raises(ValueError, match=r"position_ids has shape .*: it must be \[batch or 1, tokens\]"):
            ported(input_ids=ids, position_ids=np.ones(shape, int))
    with pytest.raises(ValueError, match="past_key_values holds 2 rows, but the new tokens have 1"):
        ported(input_ids=ids[:1], past_key_values=ported(input_ids=ids).past_key_values)
    close(ported(input_ids=ids.tolist()).logits, ported(input_ids=ids).logits)
    with pytest.raises(ValueError, match="a tensor 'token_type_ids', but the model takes input_ids"):
        ported({"input_ids": ids, "token_type_ids": ids})
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
def test_classification(make_model: Any, padded: Any, problem: str, side: str) -> None:
    """Logits and loss are PyTorch's, by the attention mask and by the pad token; the problem is inferred."""
    count, labels = LABELS[problem]
    model = make_model("ForSequenceClassification", num_labels=count)
    inputs = padded(9, 4, 12, side=side)
    expected = model(**inputs, labels=labels)
    ported = to_tf(model)
    batch = arrays(inputs)
    found = ported({**batch, "labels": labels.numpy()})
    close(found.logits, expected.logits, atol=1e-4)
    close(found.loss, expected.loss, atol=1e-4)
    if side == "right":
        close(ported(input_ids=batch["input_ids"]).logits, expected.logits, atol=1e-4)
    model.config.problem_type = "no_such_problem"
    with pytest.raises(ValueError, match=r"problem_type='no_such_problem' must be one of regression"):
        ported({**batch, "labels": labels.numpy()})


def test_classification_of_what_may_be_padding(make_model: Any, token_ids: Any) -> None:
    ported = to_tf(make_model("ForSequenceClassification", pad_token_id=None, num_labels=2))
    ids = token_ids(2, 5).numpy()
    with pytest.raises(ValueError, match=r"config\.pad_token_id is None and there is no attention mask"):
        ported(input_ids=ids)
    one = ported(input_ids=ids[:1]).logits
    close(one, ported(input_ids=ids[:1], attention_mask=np.ones((1, 5))).logits)
    with pytest.raises(ValueError, match=r"do not fit multi_label_classification with num_labels=2"):
        ported(input_ids=ids[:1], labels=np.zeros((1, 3), np.float32))
    assert type(ported) is mistral_hf.TFMistralForSequenceClassification
