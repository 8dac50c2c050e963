"""Whether operators run as written, and whether Python may read the values of a tensor."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

FREE_DEVICES = frozenset({"cpu"})


def runs_untransformed(states: Tensor) -> bool:
    """Whether operators on these states run as written: no tracer, function transform, dual number or subclass."""
    traced = torch._C._get_tracing_state() is not None or torch._C._are_functorch_transforms_active()
    return type(states) is Tensor and not traced and forward_ad._current_level < 0


def has_values(tensor: Tensor) -> bool:
    """Whether Python may branch on a tensor's values: not in a compiler or tracer, nor on a meta or fake tensor."""
    return not torch.compiler.is_compiling() and not tensor.is_meta and runs_untransformed(tensor)


def reads_freely(tensor: Tensor) -> bool:
    """Whether Python can read a tensor's values without waiting for an accelerator."""
    return tensor.device.type in FREE_DEVICES


def on_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies in host memory of tensors of one shape; the host waits for an accelerator at most once."""
    if all(reads_freely(tensor) for tensor in tensors):
        return tensors
    if len(tensors) == 1:
        return (tensors[0].cpu(),)
    return tuple(torch.stack([tensor.long() for tensor in tensors]).cpu())
