"""Products of activations with the weights of linear layers, by the fastest route that PyTorch has on a CPU.

In float32, `F.linear` goes through MKL. For a single row, it reads a weight at a third of the rate at which two cores
can read memory; the same weight as a batch of pieces is read at the full rate. For several rows, oneDNN's product,
which PyTorch carries for its compiler, takes half the time of MKL's (see benchmarks/results/products.json). Everything
else about a layer stays as it is: its parameters, their layout, and what is hooked or wrapped around it.

Legend: M rows, I input features, O output features.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECES = 8  # a single row's weight is read in that many pieces


def linear(layer: nn.Module, states: Tensor) -> Tensor:
    """What ``layer(states)`` is, up to rounding.

    A layer that is more than a plain `nn.Linear` in float32 on a CPU (quantized, adapted, hooked, sharded, compiled,
    under autocast) is simply called.

    Args:
        layer: A linear layer, or what has taken its place.
        states: ``[..., I]``.

    Returns:
        ``[..., O]``.
    """
    if not _is_plain(layer, states):
        return layer(states)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
        product: Tensor = _Product.apply(states, weight)  # type: ignore[no-untyped-call]
        return product
    return _product(states, weight)


def _is_plain(layer: nn.Module, states: Tensor) -> bool:
    """Whether nothing but a float32 product on a CPU is asked for, and nobody else wants to see the call."""
    if type(layer) is not nn.Linear or layer.bias is not None or type(layer.weight) is not nn.Parameter:
        return False
    weight = layer.weight
    if not states.dtype == weight.dtype == torch.float32 or not states.device.type == weight.device.type == "cpu":
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if torch.is_autocast_enabled("cpu") or "forward" in layer.__dict__:
        return False
    if (
        torch.compiler.is_compiling()
    ):  # the compiler does as well as oneDNN, but reads a single row's weight as MKL does
        return not torch.compiler.is_exporting() and states.numel() == weight.shape[1]
    return (
        type(states) is Tensor
        and states.numel() > 0
        and not (torch.jit.is_tracing() or nn.modules.module._has_any_global_hook())
        and not torch._C._are_functorch_transforms_active()
        and torch.backends.mkldnn.is_available()
    )


def _product(states: Tensor, weight: Tensor) -> Tensor:
    """``states @ weight.T`` for ``[..., I]`` and ``[O, I]``."""
    if states.numel() > weight.shape[1]:
        return _by_onednn(states, weight)
    pieces = math.gcd(weight.shape[0], PIECES)
    column = states.reshape(1, -1).t().expand(pieces, -1, -1)  # [pieces, I, 1], of strides that MKL reads fast
    return torch.bmm(weight.view(pieces, -1, weight.shape[1]), column).view(*states.shape[:-1], -1)


def _by_onednn(states: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
    return product


class _Product(torch.autograd.Function):
    """`_product` under autograd; its two gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _product(states, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        multiply = F.linear if torch.is_grad_enabled() else _by_onednn  # the gradients' own graph may be wanted
        of_states = of_weight = None
        if ctx.needs_input_grad[0]:
            of_states = multiply(gradient, weight.t())
        if ctx.needs_input_grad[1]:
            left, right = gradient.flatten(0, -2).t(), states.flatten(0, -2).t()  # [O, M], [I, M]
            # oneDNN copies its first factor into rows: the smaller one.
            of_weight = multiply(left, right) if len(left) <= len(right) else multiply(right, left).t()
        return of_states, of_weight
