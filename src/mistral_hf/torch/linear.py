"""Products of activations with the weights of linear layers, by the fastest route that PyTorch has on a CPU.

In float32, `F.linear` goes through MKL. For a single row, it reads a weight at a third of the rate at which two cores
can read memory; the same weight as a batch of pieces is read at the full rate. For several rows, oneDNN's product,
which PyTorch carries for its compiler, takes half the time of MKL's (see benchmarks/results/products.json). Everything
else about a layer stays as it is: its parameters, their layout, and what is hooked or wrapped around it.

Layers that read the same input can be fused on request: their weights then lie one behind the other in memory, which is
all that it takes to read them as one. Whatever puts a weight elsewhere undoes it, and the layers are called one by one.

Legend: M rows, I input features, O output features.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

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
    if not is_plain(layer, states):
        return layer(states)
    weight = _weight(layer)
    if torch.is_grad_enabled() and (states.requires_grad or weight.requires_grad):
        return cast(Any, _Product).apply(states, weight)
    return _product(states, weight)


def is_plain(layer: nn.Module, states: Tensor) -> bool:
    """Whether `linear` computes the product by itself: float32 on a CPU, and nobody else wants to see the call."""
    if states.dtype != torch.float32 or not states.is_cpu or not _is_bare(layer) or torch.is_autocast_enabled("cpu"):
        return False
    weight = _weight(layer)
    if weight.dtype != torch.float32 or not weight.is_cpu:
        return False
    if torch.compiler.is_compiling():  # the compiler equals oneDNN, but reads a single row's weight as MKL does
        return not torch.compiler.is_exporting() and states.numel() == weight.shape[1]
    return states.numel() > 0 and _is_unwatched(states) and torch.backends.mkldnn.is_available()


def _is_bare(layer: nn.Module) -> bool:
    """Whether it is the library's linear layer itself, without a bias, and nothing is wrapped or hooked around it.

    This is asked some hundred times a token, and a module's `__dict__` answers faster than its attributes.
    """
    if type(layer) is not nn.Linear:
        return False
    own = layer.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return False
    parameters = own["_parameters"]
    return type(parameters.get("weight")) is nn.Parameter and parameters["bias"] is None and "forward" not in own


def _weight(layer: nn.Module) -> Any:
    """The weight of a bare layer; `Any`, since `fuse` leaves a mark on it."""
    return layer.weight


def _is_unwatched(states: Tensor) -> bool:
    """Whether nothing watches or transforms the operators that run."""
    watched = torch._C._get_tracing_state() is not None or nn.modules.module._has_any_global_hook()
    return type(states) is Tensor and not watched and not torch._C._are_functorch_transforms_active()


def fuse(layers: Sequence[nn.Module]) -> None:
    """Put the weights of layers that read the same input one behind the other in memory, for `fused_linear`.

    Names, shapes and values stay.

    Raises:
        ValueError: A layer is more than a plain `nn.Linear`, or the weights differ in dtype or device.
    """
    require_fusible(layers)
    weights = [_weight(layer) for layer in layers]
    with torch.inference_mode(False):  # what is made in that mode could not be trained any more
        together = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, together.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    weights[0].fused = together


def require_fusible(layers: Sequence[nn.Module]) -> None:
    """Raise what `fuse` raises."""
    for layer in layers:
        if not _is_bare(layer):
            raise ValueError(
                f"{type(layer).__name__} cannot be fused with its neighbours: it is quantized, adapted, sharded, hooked"
                " or offloaded. Merge adapters first, or leave the projections as they are."
            )
    kinds = {f"{weight.dtype} on {weight.device}" for weight in map(_weight, layers)}
    if len(kinds) > 1:
        raise ValueError(f"Layers with weights of {', '.join(sorted(kinds))} cannot be fused: make them alike first.")


def unfuse(layers: Sequence[nn.Module]) -> None:
    """Give the weights of fused layers memory of their own again."""
    if _as_one(layers) is not None:
        del _weight(layers[0]).fused
        for weight in map(_weight, layers):
            with torch.inference_mode(False):
                weight.data = weight.data.clone()


def fused_linear(layers: Sequence[nn.Module], states: Tensor) -> Tensor | None:
    """The outputs of fused layers, next to each other, from one product; without gradients.

    Args:
        layers: What `fuse` was given.
        states: ``[..., I]``.

    Returns:
        ``[..., sum of all O]``; or None if the layers have to be called one by one: they are not fused, or are more
        than plain layers, or gradients are wanted, or the call is being compiled.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    weight = _as_one(layers)
    if weight is None or torch.is_autocast_enabled(states.device.type) or not _is_unwatched(states):
        return None
    return _product(states, weight) if is_plain(layers[0], states) else F.linear(states, weight)


def _as_one(layers: Sequence[nn.Module]) -> Tensor | None:
    """The weights of fused layers as one ``[sum of all O, I]``, which is their memory; None if they are apart."""
    if not _is_bare(layers[0]):
        return None
    first = _weight(layers[0])
    together: Tensor | None = getattr(first, "fused", None)
    if together is None:
        return None
    end = together.data_ptr()
    for layer in layers:
        if not _is_bare(layer):
            return None
        weight = _weight(layer)
        if weight.data_ptr() != end:  # moved, or another one
            del first.fused
            return None
        end += weight.nbytes
    return together


def _product(states: Tensor, weight: Tensor) -> Tensor:
    """``states @ weight.T`` for ``[..., I]`` and ``[O, I]``."""
    outputs, inputs = weight.shape
    if states.numel() > inputs:
        return _by_onednn(states, weight)
    pieces = math.gcd(outputs, PIECES)
    row = states.reshape(inputs).contiguous()
    column = row.as_strided((pieces, inputs, 1), (0, 1, inputs))  # of strides that MKL reads fast
    return torch.bmm(weight.view(pieces, -1, inputs), column).view(*states.shape[:-1], outputs)


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
