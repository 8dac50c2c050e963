"""The layers of the TensorFlow port compute what those of PyTorch do."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

import mistral_hf
from mistral_hf import MistralConfig
from mistral_hf.modeling_mistral import MistralRotaryEmbedding
from mistral_hf.rope import ROTARY_TYPES
from mistral_hf.torch.sequence_layout import SequenceLayout
from tests.helpers.tf_models import assert_close, tf, tf_attention, tf_layers, to_tf


@pytest.mark.parametrize("part", ["norm", "mlp", "self_attn", "layer"])
@torch.no_grad()
def test_every_layer_matches_pytorch(make_model: Any, part: str) -> None:
    model = make_model("Model", sliding_window=3)
    ported = to_tf(model)
    x = torch.randn(2, 11, 32)
    positions = torch.arange(11)[None]
    context = tf_attention.attention_context(3, tf.zeros([2, 11], tf.int32), None, None)
    cos, sin = ported.rotary_emb(tf.constant(positions.numpy()))
    mask = model.make_masks(x, SequenceLayout.of(x), None)[3]
    inputs = {"position_embeddings": model.rotary_emb(x, positions), "attention_mask": mask}
    theirs, ours = model.layers[1], ported.decoder_layers[1]
    if part == "norm":
        assert_close(ours.input_layernorm(x.numpy()), theirs.input_layernorm(x))
    elif part == "mlp":
        assert_close(ours.mlp(x.numpy()), theirs.mlp(x))
    elif part == "self_attn":
        assert_close(ours.self_attn(x.numpy(), cos, sin, context=context)[0], theirs.self_attn(x, **inputs)[0])
    else:
        assert_close(ours(x.numpy(), cos, sin, context=context)[0], theirs(x, **inputs), atol=1e-4)


@pytest.mark.parametrize("kind", sorted(ROTARY_TYPES))
@torch.no_grad()
def test_rotary_embeddings_match_pytorch(rope_parameters: Any, tiny: Any, kind: str) -> None:
    """Far positions too, where a cosine in float32 needs a careful reduction of its argument."""
    config = MistralConfig(**tiny(rope_parameters=rope_parameters(kind)))
    positions = torch.tensor([[0, 1, 7, 63, 64, 1000, 30000]])
    cos, sin = (x.unsqueeze(1) for x in MistralRotaryEmbedding(config)(torch.zeros(1), positions))
    turned = tf.function(tf_layers.RotaryEmbedding(config), jit_compile=True)(tf.constant(positions.numpy()))
    assert_close(tf.concat([turned[0], turned[0]], -1), cos, atol=5e-3)
    assert_close(tf.concat([turned[1], turned[1]], -1), sin, atol=5e-3)
    near = np.s_[:, :, :5]
    assert_close(tf.concat([turned[0], turned[0]], -1), cos, near)
    assert_close(tf.concat([turned[1], turned[1]], -1), sin, near)


@pytest.mark.parametrize("name", sorted(tf_layers.ACTIVATIONS))
def test_activations_match_transformers(name: str) -> None:
    x = torch.linspace(-8, 8, 101)
    theirs = ACT2FN[name]
    assert isinstance(theirs, nn.Module)
    assert_close(tf_layers.activation(name)(tf.constant(x.numpy())), theirs(x), atol=5e-5)


def test_activations_with_weights_are_refused_and_all_others_are_supported(tiny: Any) -> None:
    refused = {name for name in ACT2FN if name not in tf_layers.ACTIVATIONS}
    assert refused == {"prelu", "xielu"}
    for name in refused:
        with pytest.raises(ValueError, match=rf"hidden_act='{name}' is not among .*silu"):
            mistral_hf.TFMistralModel(MistralConfig(**tiny(hidden_act=name)))


@torch.no_grad()
def test_far_positions_are_rotated_by_the_same_angles_as_in_pytorch(tiny: Any) -> None:
    """One bit of a frequency is a thousandth of a radian at position 30,000."""
    config = MistralConfig(**tiny(rope_parameters={"rope_type": "default", "rope_theta": 1e6}, head_dim=64))
    positions = torch.tensor([[0, 1, 1000, 30000, 131071]])
    cos, sin = MistralRotaryEmbedding(config)(torch.zeros(1), positions)
    turned = tf_layers.RotaryEmbedding(config)(tf.constant(positions.numpy()))
    assert_close(turned[0][:, 0], cos[..., :32], atol=1e-6)
    assert_close(turned[1][:, 0], sin[..., :32], atol=1e-6)


def test_rotary_embeddings_round_once_in_low_precision() -> None:
    """At the end, for far positions too."""
    states = tf.cast(tf.random.stateless_normal([1, 2, 3, 12], [0, 1]), tf.bfloat16)
    cos, sin = tf_layers.RotaryEmbedding(MistralConfig(head_dim=12))(tf.constant([[3, 70, 9000]]))
    exact = tf_layers.apply_rotary(tf.cast(states, tf.float32), cos, sin)
    np.testing.assert_array_equal(tf_layers.apply_rotary(states, cos, sin), tf.cast(exact, tf.bfloat16))
