"""The Flax NNX modules of the decoder, top-down, named as in the Hugging Face checkpoint.

Every weight has the shape and orientation of the checkpoint: that of a projection is ``[out, in]``.

Legend: B batch, S new tokens, T keys, H query heads, K key/value heads, G = H / K, D head_dim, E hidden_size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from ..configuration_mistral import MistralConfig
from ..rope import rotary_frequencies
from .attention import AttentionContext, attend
from .cache import FlaxRollingCache, empty_cache, oldest_first, store
from .outputs import FlaxModelOutput
from .sequence_layout import packed_segments, positions, real_keys
from .weights import embedded, linear

_gelu_tanh = partial(jax.nn.gelu, approximate=True)
_gelu = partial(jax.nn.gelu, approximate=False)

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "gelu_10": lambda x: jnp.clip(_gelu(x), -10, 10),
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": _gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": jax.nn.hard_swish,
    "laplace": lambda x: 0.5 * (1 + lax.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
    "leaky_relu": jax.nn.leaky_relu,
    "linear": lambda x: x,
    "mish": jax.nn.mish,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sqrtsoftplus": lambda x: jnp.sqrt(jax.nn.softplus(x)),
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}

KeyValues = tuple[Array, Array]


class MistralPreTrainedModule(nnx.Module):
    """What all modules that a model holds share."""

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """Modules of Flax Linen were called so.

        Raises:
            TypeError: Always; the message has the form of Flax NNX.
        """
        raise TypeError(
            "module.apply is of Flax Linen; a module of Flax NNX holds its weights and is called itself:"
            " model.module(input_ids). With other weights, call the model, which can be compiled and differentiated:"
            " model(input_ids, params=params) in place of module.apply({'params': params}, input_ids)."
        )


class MistralModule(MistralPreTrainedModule):
    """The decoder: embeddings, layers and the last norm.

    Args:
        config: The model's configuration.
        dtype: Dtype of weights and activations.
        scan_layers: Keep every weight of all layers in one array, and compile one layer instead of all.
        remat: Recompute a layer's activations in the backward pass instead of keeping them.
        rngs: Random keys, with a stream ``params``.

    Raises:
        ValueError: The port does not have the activation or the rotary embedding.
    """

    def __init__(
        self,
        config: MistralConfig,
        dtype: Any = jnp.float32,
        *,
        scan_layers: bool = False,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.layer_count, self.scan_layers, self.remat = config.num_hidden_layers, scan_layers, remat
        self.window, (_, self.kv_heads, self.head_dim) = config.shared_window, config.head_shape
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, dtype=dtype, std=config.initializer_range, rngs=rngs
        )

        def make_layer(rngs: nnx.Rngs) -> MistralDecoderLayer:
            return MistralDecoderLayer(config, dtype, rngs=rngs)

        if scan_layers:
            self.layers = nnx.split_rngs(splits=self.layer_count)(nnx.vmap(make_layer))(rngs)
        else:
            self.layers = nnx.List([make_layer(rngs) for _ in range(self.layer_count)])
        self.norm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary_emb = MistralRotaryEmbedding(config)

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        position_ids: Array | None = None,
        past_key_values: FlaxRollingCache | None = None,
        *,
        dropout_key: Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> FlaxModelOutput:
        """Compute the hidden states of new tokens.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S or more]``, nonzero for real tokens; the last S columns are for the new ones.
            position_ids: ``[B or 1, S]``; by default the first real token of a row has position 0. Positions that
                restart (without mask and cache) mark packed sequences, which do not see each other.
            past_key_values: The cached tokens.
            dropout_key: Random key of the attention dropout; without one there is none.
            output_hidden_states, output_attentions: What else to return; see `FlaxModelOutput`.
        """
        batch, count = input_ids.shape
        mask = jnp.ones((batch, count), bool) if attention_mask is None else attention_mask[:, -count:].astype(bool)
        past = past_key_values
        cache = None if past is None else past.advance(mask)
        segments = None
        if position_ids is None:
            position_ids = positions(mask) if cache is None else cache.positions(count)
        elif attention_mask is None and cache is None and count > 1:
            segments = packed_segments(position_ids)
        cos, sin = self.rotary_emb(position_ids)
        context = AttentionContext(
            cos=cos,
            sin=sin,
            real=real_keys(mask, past, cache),
            segments=segments,
            length=None if past is None else past.length,
            empty=past is None or past.empty,
            weights_wanted=output_attentions,
        )
        states = self.embed_tokens(input_ids)
        states, stored, collected, weights = self._run_layers(states, context, past, dropout_key, output_hidden_states)
        last = self.norm(states)
        if cache is not None:
            cache = replace(cache, keys=stored[0], values=stored[1])
        return FlaxModelOutput(
            last_hidden_state=last,
            past_key_values=cache,
            hidden_states=(*collected, last) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )

    def init_cache(self, batch_size: int, max_length: int, slack: int = 0) -> FlaxRollingCache:
        """An empty cache for `max_length` tokens a row; if that is at least the window, it serves any length.

        Of its last tokens, `slack` can be taken back.
        """
        slots = min((self.window or max_length) + slack, max_length)
        shape, dtype = (batch_size, self.kv_heads, slots, self.head_dim), self.embed_tokens.weight.get_value().dtype
        return empty_cache(self.layer_count, self.scan_layers, shape, dtype)

    def _run_layers(
        self,
        states: Array,
        context: AttentionContext,
        past: FlaxRollingCache | None,
        dropout_key: Array | None,
        collect: bool,
    ) -> tuple[Array, Any, Any, Any]:
        """Run all layers.

        Returns:
            The last states; keys and values of the cache by layer; with `collect`, the input of every layer; and the
            attention weights by layer.
        """

        def run(
            graph: Any, weights: Any, states: Array, stored: KeyValues | None, index: Any
        ) -> tuple[Array, KeyValues | None, Array | None]:
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            return nnx.merge(graph, weights)(states, context, stored, key)

        def apply(graph: Any) -> Callable[..., tuple[Array, KeyValues | None, Array | None]]:
            bound = partial(run, graph)
            return jax.checkpoint(bound) if self.remat else bound

        if self.scan_layers:
            return self._scan_layers(apply, states, past, collect)
        keys, values, collected, attentions = [], [], [], []
        for index, layer in enumerate(self.layers):
            collected.append(states)
            stored = None if past is None else (past.keys[index], past.values[index])
            graph, weights = nnx.split(layer)
            states, stored, attention = apply(graph)(weights, states, stored, index)
            attentions.append(attention)
            if stored is not None:
                keys.append(stored[0])
                values.append(stored[1])
        return states, (tuple(keys), tuple(values)), collected, attentions

    def _scan_layers(self, apply: Any, states: Array, past: FlaxRollingCache | None, collect: bool) -> Any:
        graph, weights = nnx.split(self.layers)
        stored = None if past is None else (past.keys, past.values)

        def body(states: Array, inputs: Any) -> tuple[Array, Any]:
            weights, stored, index = inputs
            after, stored, attention = apply(graph)(weights, states, stored, index)
            return after, (stored, states if collect else None, attention)

        inputs = (weights, stored, jnp.arange(self.layer_count))
        states, (stored, collected, attentions) = lax.scan(body, states, inputs)
        return states, stored, collected if collect else (), attentions


class MistralDecoderLayer(nnx.Module):
    """Attention, then the feed-forward layer, each normalised before and added to the residual stream."""

    def __init__(self, config: MistralConfig, dtype: Any = jnp.float32, *, rngs: nnx.Rngs) -> None:
        self.self_attn = MistralAttention(config, dtype, rngs=rngs)
        self.mlp = MistralMLP(config, dtype, rngs=rngs)
        self.input_layernorm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = MistralRMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def __call__(
        self,
        states: Array,
        context: AttentionContext,
        stored: KeyValues | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Array, KeyValues | None, Array | None]:
        """Map ``[B, S, E]`` to ``[B, S, E]``; the other arguments and results are those of `MistralAttention`."""
        attended, stored, weights = self.self_attn(self.input_layernorm(states), context, stored, dropout_key)
        states = states + attended
        return states + self.mlp(self.post_attention_layernorm(states)), stored, weights


class MistralAttention(nnx.Module):
    """Grouped-query attention with rotary embeddings, within the sliding window."""

    def __init__(self, config: MistralConfig, dtype: Any = jnp.float32, *, rngs: nnx.Rngs) -> None:
        heads, self.kv_heads, self.head_dim = config.head_shape
        self.groups = heads // self.kv_heads
        self.window, self.dropout = config.shared_window, float(config.attention_dropout)
        project = partial(Linear, dtype=dtype, std=config.initializer_range, rngs=rngs)
        self.q_proj = project(config.hidden_size, heads * self.head_dim)
        self.k_proj = project(config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = project(config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = project(heads * self.head_dim, config.hidden_size)

    def __call__(
        self,
        states: Array,
        context: AttentionContext,
        stored: KeyValues | None = None,
        dropout_key: Array | None = None,
    ) -> tuple[Array, KeyValues | None, Array | None]:
        """Attend.

        Args:
            states: ``[B, S, E]``.
            context: What all layers share.
            stored: Keys and values ``[B, K, slots, D]`` of the cache; None without a cache.
            dropout_key: Random key of the attention dropout; without one there is none.

        Returns:
            ``[B, S, E]``; the keys and values of the cache after the new tokens, or None; and the weights
            ``[B, H, S, T]``, or None unless they are wanted.
        """
        batch, count, _ = states.shape
        q, k, v = (
            project(states).reshape(batch, count, -1, self.head_dim).swapaxes(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotate(x, context.cos, context.sin) for x in (q, k))
        q = q.reshape(batch, self.kv_heads, self.groups, count, self.head_dim)
        if stored is not None:
            updated = (store(stored[0], k, context.length), store(stored[1], v, context.length))
            # The only new token reads the slots as they lie, including its own.
            if not context.empty and count == 1:
                k, v = updated
            # Several read the old slots in order, then each other: some old ones are overwritten when they are stored.
            elif not context.empty:
                old = (oldest_first(ring, context.length) for ring in stored)
                k, v = (jnp.concatenate(pair, axis=2) for pair in zip(old, (k, v), strict=True))
            stored = updated
        mixed, weights = attend(
            q,
            k,
            v,
            context.real,
            self.window,
            segments=context.segments,
            weights_wanted=context.weights_wanted,
            dropout=self.dropout,
            dropout_key=dropout_key,
        )
        mixed = jnp.moveaxis(mixed, 3, 1).reshape(batch, count, -1)  # [B, S, H * D]
        if weights is not None:
            weights = weights.reshape(batch, -1, *weights.shape[3:])
        return self.o_proj(mixed), stored, weights


class MistralMLP(nnx.Module):
    """The gated feed-forward layer: ``down(act(gate(x)) * up(x))``."""

    def __init__(self, config: MistralConfig, dtype: Any = jnp.float32, *, rngs: nnx.Rngs) -> None:
        if config.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act={config.hidden_act!r} has weights of its own, which the JAX port does not have; it has"
                f" {', '.join(ACTIVATIONS)}. Use the PyTorch model for this checkpoint."
            )
        self.hidden_act = config.hidden_act
        project = partial(Linear, dtype=dtype, std=config.initializer_range, rngs=rngs)
        self.gate_proj = project(config.hidden_size, config.intermediate_size)
        self.up_proj = project(config.hidden_size, config.intermediate_size)
        self.down_proj = project(config.intermediate_size, config.hidden_size)

    def __call__(self, states: Array) -> Array:
        """Map ``[B, S, E]`` to ``[B, S, E]``."""
        return self.down_proj(ACTIVATIONS[self.hidden_act](self.gate_proj(states)) * self.up_proj(states))


class MistralRMSNorm(nnx.Module):
    """Root mean square normalisation (Zhang and Sennrich, 2019), computed in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, dtype: Any = jnp.float32) -> None:
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(hidden_size, dtype))

    def __call__(self, states: Array) -> Array:
        """Map ``[..., E]`` to ``[..., E]``."""
        wide = states.astype(jnp.float32)
        wide = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * self.weight[...].astype(jnp.float32)).astype(states.dtype)


class MistralRotaryEmbedding(nnx.Module):
    """Rotary position embeddings (Su et al., 2021) of every type in `rope.ROTARY_TYPES`."""

    def __init__(self, config: MistralConfig) -> None:
        self.frequencies = rotary_frequencies(config)

    def __call__(self, position_ids: Array) -> tuple[Array, Array]:
        """cos and sin ``[B or 1, 1, S, D]`` in float32 for positions ``[B or 1, S]``, the first half of sin negated."""
        positions, scaling = position_ids.astype(jnp.float32), self.frequencies.scaling
        length = None if self.frequencies.pretrained is None else positions.max() + 1
        angles = positions[:, None, :, None] * self.frequencies.of_length(length, jnp)
        cos, sin = jnp.cos(angles) * scaling, jnp.sin(angles) * scaling
        return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def rotate(states: Array, cos: Array, sin: Array) -> Array:
    """Rotate ``[B, heads, S, D]`` in float32: elements i and i + D/2 are one complex number, turned by its angle."""
    wide = states.astype(jnp.float32)
    return (wide * cos + jnp.roll(wide, wide.shape[-1] // 2, axis=-1) * sin).astype(states.dtype)


class Embedding(nnx.Module):
    """A table of embeddings ``[V, E]``, initially from a normal distribution."""

    def __init__(self, count: int, size: int, *, dtype: Any, std: float, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (count, size), dtype) * jnp.asarray(std, dtype))

    def __call__(self, ids: Array) -> Array:
        """Map ids ``[...]`` to ``[..., E]``."""
        return embedded(ids, self.weight.get_value())


class Linear(nnx.Module):
    """A linear map without bias; its weight is ``[out, in]`` as in PyTorch, initially from a normal distribution."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Any, std: float, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (outputs, inputs), dtype) * jnp.asarray(std, dtype))

    def __call__(self, states: Array) -> Array:
        """Map ``[..., in]`` to ``[..., out]``."""
        return linear(states, self.weight.get_value())
