"""The layers of the TensorFlow port, under the names that Hugging Face gives their weights.

Weights keep the orientation of the checkpoint, ``[outputs, inputs]``: nothing is transposed on loading, and the product
with a single token, of which decoding consists, reads them row by row.

Legend: B batch, S new tokens, T keys, H query heads, K key/value heads, D head_dim, E hidden_size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from ..configuration_mistral import MistralConfig
from ..rope import rotary_frequencies
from .attention import AttentionContext, Buffers, Dropout
from .shapes import Tensor, size

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"The TensorFlow port needs Keras to run on TensorFlow, but its backend is {keras.backend.backend()!r}. Set the"
        " environment variable KERAS_BACKEND=tensorflow before anything imports keras (or the backend in"
        " ~/.keras/keras.json)."
    )

Activation: TypeAlias = Callable[[Tensor], Tensor]
_gelu_tanh = partial(tf.nn.gelu, approximate=True)

ACTIVATIONS: dict[str, Activation] = {
    "gelu": partial(tf.nn.gelu, approximate=False),
    "gelu_10": lambda x: tf.clip_by_value(tf.nn.gelu(x, approximate=False), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": partial(tf.nn.gelu, approximate=False),
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": lambda x: x * tf.nn.relu6(x + 3) / 6,
    "laplace": lambda x: 0.5 * (1 + tf.math.erf((x - 0.707107) / (0.282095 * 2**0.5))),
    "leaky_relu": partial(tf.nn.leaky_relu, alpha=0.01),
    "linear": tf.identity,
    "mish": lambda x: x * tf.tanh(tf.nn.softplus(x)),
    "quick_gelu": lambda x: x * tf.sigmoid(1.702 * x),
    "relu": tf.nn.relu,
    "relu2": lambda x: tf.square(tf.nn.relu(x)),
    "relu6": tf.nn.relu6,
    "sigmoid": tf.sigmoid,
    "silu": tf.nn.silu,
    "sqrtsoftplus": lambda x: tf.sqrt(tf.nn.softplus(x)),
    "swish": tf.nn.silu,
    "tanh": tf.tanh,
}


def activation(name: str) -> Activation:
    """The activation with this name in Transformers.

    Raises:
        ValueError: The port does not support it: it has weights too (``"prelu"``, ``"xielu"``).
    """
    if name not in ACTIVATIONS:
        raise ValueError(
            f"hidden_act={name!r} is not among the activations of the TensorFlow port: {', '.join(ACTIVATIONS)}."
            " Use the PyTorch model for this checkpoint."
        )
    return ACTIVATIONS[name]


class _SingleWeightLayer(keras.layers.Layer):
    """A layer with one weight, which is created in the constructor and never cast by Keras."""

    def __init__(self, shape: tuple[int, ...], initializer: Any, dtype: Any, name: str) -> None:
        super().__init__(dtype=dtype, name=name, autocast=False)
        self.weight = self.add_weight(shape=shape, initializer=initializer, name="weight", autocast=False)

    def resize_rows(self, count: int, initializer: Any) -> None:
        """Give the weight `count` rows: the first ones stay, additional ones are newly initialised."""
        old = self.weight
        kept = min(count, old.shape[0])
        values = initializer([count, *old.shape[1:]], old.dtype)
        self._untrack_variable(old)  # as Keras does where it replaces weights
        self._tracker.unlock()
        self.weight = self.add_weight(
            shape=values.shape,
            initializer=lambda *_, **__: tf.concat([old.value[:kept], values[kept:]], axis=0),
            name="weight",
            autocast=False,
        )
        self._tracker.lock()


class Linear(_SingleWeightLayer):
    """A projection, its weight ``[outputs, inputs]``, with a bias ``[outputs]`` if it has one."""

    def __init__(
        self, inputs: int, outputs: int, initializer: Any, dtype: Any, name: str, use_bias: bool = False
    ) -> None:
        super().__init__((outputs, inputs), initializer, dtype, name)
        self.bias = None
        if use_bias:
            self.bias = self.add_weight(shape=(outputs,), initializer="zeros", name="bias", autocast=False)
        self.build((None, None, inputs))

    def call(self, x: Tensor) -> Tensor:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        projected = project(x, self.weight)
        return projected if self.bias is None else projected + tf.cast(tf.convert_to_tensor(self.bias), x.dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """``[..., outputs]``, for `keras.Model.summary`."""
        return (*input_shape[:-1], self.weight.shape[0])


def project(x: Tensor, weight: Tensor) -> Tensor:
    """``x W^T`` for ``[..., inputs]`` and ``[outputs, inputs]``, in the dtype of `x`."""
    kernel = tf.cast(tf.convert_to_tensor(weight), x.dtype)
    rows = tf.matmul(tf.reshape(x, [-1, kernel.shape[1]]), kernel, transpose_b=True)
    return tf.reshape(rows, [*(size(x, axis) for axis in range(x.shape.rank - 1)), kernel.shape[0]])


class Embedding(_SingleWeightLayer):
    """Token embeddings, the weight ``[V, E]``."""

    def __init__(self, vocab_size: int, hidden_size: int, initializer: Any, dtype: Any, name: str) -> None:
        super().__init__((vocab_size, hidden_size), initializer, dtype, name)
        self.build((None, None))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """``[B, S, E]``."""
        return (*input_shape, self.weight.shape[1])

    def call(self, input_ids: Tensor) -> Tensor:
        """Map ids ``[B, S]`` to ``[B, S, E]`` in the compute dtype."""
        return tf.cast(tf.gather(tf.convert_to_tensor(self.weight), input_ids), self.compute_dtype)


class RMSNorm(_SingleWeightLayer):
    """Root mean square normalisation (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, hidden_size: int, eps: float, dtype: Any, name: str) -> None:
        super().__init__((hidden_size,), "ones", dtype, name)
        self.eps = eps
        self.build((None, None, hidden_size))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """``[..., E]``."""
        return input_shape

    def call(self, x: Tensor) -> Tensor:
        """Map ``[..., E]`` to ``[..., E]``."""
        wide = tf.cast(x, tf.float32)
        scale = tf.math.rsqrt(tf.reduce_mean(tf.square(wide), axis=-1, keepdims=True) + self.eps)
        return tf.cast(wide * scale * tf.cast(tf.convert_to_tensor(self.weight), tf.float32), x.dtype)


class RotaryEmbedding:
    """Rotary position embeddings (Su et al., 2021) of every type in `rope.ROTARY_TYPES`."""

    def __init__(self, config: MistralConfig) -> None:
        self.frequencies = rotary_frequencies(config)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``cos`` and ``sin`` ``[B or 1, 1, S, D/2]`` in float32, for positions ``[B or 1, S]``."""
        positions, scaling = tf.cast(positions, tf.float32), self.frequencies.scaling
        length = None if self.frequencies.pretrained is None else tf.reduce_max(positions) + 1
        angles = positions[:, None, :, None] * self.frequencies.of_length(length, tf)
        return tf.cos(angles) * scaling, tf.sin(angles) * scaling


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[B, heads, S, D]`` states, the two halves of a head being the parts of D/2 complex numbers."""
    x, y = tf.split(tf.cast(states, tf.float32), 2, axis=-1)
    return tf.cast(tf.concat([x * cos - y * sin, y * cos + x * sin], axis=-1), states.dtype)


class Attention(keras.layers.Layer):
    """Grouped-query attention with rotary embeddings, within the sliding window."""

    def __init__(self, config: MistralConfig, index: int, initializer: Any, dtype: Any) -> None:
        super().__init__(dtype=dtype, name="self_attn", autocast=False)
        heads, kv_heads, self.head_dim = config.head_shape
        self.index, self.dropout_rate, width = index, config.attention_dropout, config.hidden_size
        self.q_proj = Linear(width, heads * self.head_dim, initializer, dtype, "q_proj")
        self.k_proj = Linear(width, kv_heads * self.head_dim, initializer, dtype, "k_proj")
        self.v_proj = Linear(width, kv_heads * self.head_dim, initializer, dtype, "v_proj")
        self.o_proj = Linear(heads * self.head_dim, width, initializer, dtype, "o_proj")
        self.seeds = keras.random.SeedGenerator() if self.dropout_rate else None
        self.built = True

    def call(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: AttentionContext,
        weights_wanted: bool = False,
        training: bool = False,
    ) -> tuple[Tensor, Tensor | None, Buffers | None]:
        """Attend.

        Args:
            hidden_states: ``[B, S, E]``.
            cos: As `RotaryEmbedding` returns it.
            sin: As `RotaryEmbedding` returns it.
            context: What all layers of this forward pass share.
            weights_wanted: Whether to return the attention weights.
            training: Whether to drop attention weights.

        Returns:
            ``[B, S, E]``; the weights ``[B, H, S, T]`` or None; the layer's new buffers, or None without a cache.
        """
        q = apply_rotary(self._heads(self.q_proj(hidden_states)), cos, sin)  # [B, H, S, D]
        k = apply_rotary(self._heads(self.k_proj(hidden_states)), cos, sin)  # [B, K, S, D]
        k, v, buffers = context.store(self.index, k, self._heads(self.v_proj(hidden_states)))
        mixed, weights = context.attend(q, k, v, self._dropout(training), weights_wanted)
        merged = tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [size(q, 0), size(q, 2), q.shape[1] * self.head_dim])
        return self.o_proj(merged), weights if weights_wanted else None, buffers

    def _heads(self, states: Tensor) -> Tensor:
        """``[B, S, heads * D]`` as ``[B, heads, S, D]``."""
        shape = [size(states, 0), size(states, 1), states.shape[2] // self.head_dim, self.head_dim]
        return tf.transpose(tf.reshape(states, shape), [0, 2, 1, 3])

    def _dropout(self, training: bool) -> Dropout:
        if not training or self.seeds is None:
            return lambda weights, block: weights
        seed = tf.cast(self.seeds.next(), tf.int32)
        return lambda weights, block: tf.nn.experimental.stateless_dropout(weights, self.dropout_rate, seed + block)


class MLP(keras.layers.Layer):
    """The gated feed-forward layer: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: MistralConfig, initializer: Any, dtype: Any) -> None:
        super().__init__(dtype=dtype, name="mlp", autocast=False)
        self.act_fn = activation(config.hidden_act)
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, initializer, dtype, "gate_proj")
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, initializer, dtype, "up_proj")
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, initializer, dtype, "down_proj")
        self.built = True

    def call(self, x: Tensor) -> Tensor:
        """Map ``[B, S, E]`` to ``[B, S, E]``."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(keras.layers.Layer):
    """Attention, then the feed-forward layer, each normalised before and added to the residual stream."""

    def __init__(self, config: MistralConfig, index: int, initializer: Any, dtype: Any) -> None:
        super().__init__(dtype=dtype, name=f"layer_{index}", autocast=False)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, index, initializer, dtype)
        self.mlp = MLP(config, initializer, dtype)
        self.input_layernorm = RMSNorm(width, eps, dtype, "input_layernorm")
        self.post_attention_layernorm = RMSNorm(width, eps, dtype, "post_attention_layernorm")
        self.build((None, None, width))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """``[B, S, E]``, of the states."""
        return input_shape

    def call(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        context: AttentionContext,
        weights_wanted: bool = False,
        training: bool = False,
    ) -> tuple[Tensor, Tensor | None, Buffers | None]:
        """Map ``[B, S, E]`` to ``[B, S, E]``; the other arguments and results are those of `Attention`."""
        normed = self.input_layernorm(hidden_states)
        mixed, weights, buffers = self.self_attn(
            normed, cos, sin, context=context, weights_wanted=weights_wanted, training=training
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), weights, buffers
