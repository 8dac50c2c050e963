"""Linear layers by the fastest route that PyTorch has on a CPU.

In float32, `F.linear` goes through MKL, which has its fast kernels on Intel's processors only. On others, it reads the
weight for a single row at a third of the rate at which two cores can read memory; the same weight as a batch of pieces
is read at the full rate. On Intel's, `torch.mv` reads it fastest, and pieces halve the rate. For several rows, oneDNN's
product, which PyTorch carries for its compiler, takes half the time of MKL's on other processors (see
benchmarks/results/products.json). Everything else about a layer stays unchanged: its parameters, their layout, its
hooks and wrappers.

Legend: B batch, S tokens, M rows, I input features, O output features.
"""

import math
import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tracing import runs_untransformed

WEIGHT_PIECES = 8  # a single row's weight is read in that many pieces
PROMPT_PIECE = 2048  # tokens of a long prompt that `in_pieces` takes at a time


def linear(layer: nn.Module, states: Tensor) -> Tensor:
    """What ``layer(states)`` returns, up to rounding.

    A layer that is more than a plain `nn.Linear` in float32 on a CPU (quantized, adapted, hooked, sharded, compiled,
    under autocast) is simply called.

    Args:
        layer: A linear layer, or a module that replaces one.
        states: ``[..., I]``.

    Returns:
        ``[..., O]``.
    """
    if not has_fast_path(layer, states):
        return layer(states)
    weight = cast(Tensor, layer.weight)
    if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
        return cast(Any, _FastLinear).apply(states, weight)
    return _fast_linear(states, weight)


def project(states: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Outputs ``[..., O]`` of layers that read the same ``[..., I]`` states; see `linear`."""
    return tuple(linear(layer, states) for layer in layers)


def gated(activation: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """``activation(gate) * up``, written over the activation's result where no gradient or hook needs that."""
    activated: Tensor = activation(gate)
    needed = torch.is_grad_enabled() or torch.compiler.is_compiling() or nn.modules.module._has_any_global_hook()
    if needed or activated is gate or _has_hooks(activation) or not runs_untransformed(activated):
        return activated * up
    return activated.mul_(up)


def in_pieces(
    function: Callable[[Tensor], Tensor], states: Tensor, *layers: nn.Module, activation: nn.Module
) -> Tensor:
    """``function(states)`` for a function of single tokens, a few thousand tokens at a time on a CPU.

    Buffers above 32 MB are mapped and zeroed again by the operating system for every operation; the pieces' buffers are
    reused. Where gradients are recorded or a hook could see the calls, the function gets all tokens together.

    Args:
        function: Maps ``[B, S, I]`` to the same shape, each token separately.
        states: ``[B, S, I]``.
        layers, activation: The modules that the function calls.
    """
    if states.shape[1] <= PROMPT_PIECE or torch.is_grad_enabled() or _has_hooks(activation):
        return function(states)
    if not all(has_fast_path(layer, states) for layer in layers):
        return function(states)
    output = torch.empty_like(states)
    for piece, result in zip(states.split(PROMPT_PIECE, 1), output.split(PROMPT_PIECE, 1), strict=True):
        result.copy_(function(piece))
    return output


def has_fast_path(layer: nn.Module, states: Tensor) -> bool:
    """Whether `linear` computes the product itself: float32 on a CPU, and no hook, tracer or wrapper sees the call."""
    if states.dtype != torch.float32 or not states.is_cpu or not is_plain_linear(layer):
        return False
    weight = cast(Tensor, layer.weight)
    if weight.dtype != torch.float32 or not weight.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling():  # the compiler equals oneDNN, but reads a single row's weight as MKL does
        return not torch.compiler.is_exporting() and states.numel() == weight.shape[1]
    if nn.modules.module._has_any_global_hook() or not runs_untransformed(states):
        return False
    return states.numel() > 0 and torch.backends.mkldnn.is_available()


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is an `nn.Linear` itself, without a bias, with nothing wrapped or hooked around it.

    Called a few hundred times per token, so it reads ``__dict__`` directly, which is faster than attribute access.
    """
    if type(layer) is not nn.Linear or _has_hooks(layer):
        return False
    attributes = layer.__dict__
    parameters = attributes["_parameters"]
    return type(parameters.get("weight")) is nn.Parameter and parameters["bias"] is None and "forward" not in attributes


def _has_hooks(module: nn.Module) -> bool:
    own = module.__dict__
    forward = own["_forward_hooks"] or own["_forward_pre_hooks"]
    return bool(forward or own["_backward_hooks"] or own["_backward_pre_hooks"])


def _fast_linear(states: Tensor, weight: Tensor) -> Tensor:
    """``states @ weight.T`` for ``[..., I]`` and ``[O, I]``."""
    outputs, inputs = weight.shape
    if states.numel() > inputs:
        return _onednn_linear(states, weight)
    row = states.reshape(inputs).contiguous()
    if _is_intel():
        return torch.mv(weight, row).view(*states.shape[:-1], outputs)
    pieces = math.gcd(outputs, WEIGHT_PIECES)
    column = row.as_strided((pieces, inputs, 1), (0, 1, inputs))  # of strides that MKL reads fast
    return torch.bmm(weight.view(pieces, -1, inputs), column).view(*states.shape[:-1], outputs)


@cache
def _is_intel() -> bool:
    """Whether MKL takes its fast kernels: its own rule is the vendor of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    described = cpuinfo.read_text() if cpuinfo.is_file() else platform.processor()
    return "Intel" in described


def _onednn_linear(states: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return product


class _FastLinear(torch.autograd.Function):
    """`_fast_linear` under autograd; its two gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _fast_linear(states, weight)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        multiply = F.linear if torch.is_grad_enabled() else _onednn_linear  # the gradients may need a graph themselves
        grad_states = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_states = multiply(grad_output, weight.t())
        if ctx.needs_input_grad[1]:
            left, right = grad_output.flatten(0, -2).t(), states.flatten(0, -2).t()  # [O, M], [I, M]
            # oneDNN copies its first factor into rows: the smaller one.
            grad_weight = multiply(left, right) if len(left) <= len(right) else multiply(right, left).t()
        return grad_states, grad_weight
