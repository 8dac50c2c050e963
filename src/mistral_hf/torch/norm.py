"""Root mean square normalisation, by the fastest route that PyTorch has on a CPU.

Legend: E hidden_size.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from .tracing import runs_untransformed


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * x / sqrt(mean(x ** 2) + eps)`` (Zhang and Sennrich, 2019), computed in at least float32.

    Args:
        states: ``[..., E]``.
        weight: ``[E]``.
        eps: Added to the mean.

    Returns:
        ``[..., E]`` in the dtype of `states`.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_plain_cpu(states, weight):
        return F.rms_norm(states, weight.shape, weight, eps)
    # On a CPU, PyTorch makes twice as many passes over the states, each of them into new memory.
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    mean = torch.addcmul(_constant(eps), norm, norm, value=1 / states.shape[-1])
    return (states * mean.rsqrt_()).mul_(weight)


def _is_plain_cpu(states: Tensor, weight: Tensor) -> bool:
    float32 = states.dtype == weight.dtype == torch.float32
    return float32 and states.is_cpu and weight.is_cpu and runs_untransformed(states)


@cache
def _constant(value: float) -> Tensor:
    """A number as a float32 tensor on the CPU; given a plain number, operators would make one at each call."""
    return torch.tensor(value, dtype=torch.float32, device="cpu")
