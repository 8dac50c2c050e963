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
from torch.autograd.function import once_differentiable

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
    return (
        states.dtype == weight.dtype == torch.float32
        and type(states) is Tensor
        and states.device.type == weight.device.type == "cpu"
        and states.numel() > 0
        and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
        and not (layer._backward_hooks or layer._backward_pre_hooks or nn.modules.module._has_any_global_hook())
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"))
        and not torch._C._are_functorch_transforms_active()
        and torch.backends.mkldnn.is_available()
    )


def _product(states: Tensor, weight: Tensor) -> Tensor:
    """``states @ weight.T`` for ``[..., I]`` and ``[O, I]``."""
    if states.numel() > weight.shape[1]:
        oned: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
        return oned
    pieces = math.gcd(weight.shape[0], PIECES)
    column = states.reshape(1, -1).t().expand(pieces, -1, -1)  # [pieces, I, 1], which MKL takes for column-major
    return torch.bmm(weight.view(pieces, -1, weight.shape[1]), column).view(*states.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """`_product` under autograd; its two gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        return _product(states, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        states, weight = ctx.saved_tensors
        of_states = of_weight = None
        if ctx.needs_input_grad[0]:
            of_states = torch.ops.mkldnn._linear_pointwise(gradient, weight.t(), None, "none", [], "")
        if ctx.needs_input_grad[1]:
            by_column = gradient.reshape(-1, gradient.shape[-1]).t(), states.reshape(-1, states.shape[-1]).t()
            of_weight = torch.ops.mkldnn._linear_pointwise(*by_column, None, "none", [], "")
        return of_states, of_weight
