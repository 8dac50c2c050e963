"""Counts how often Python would wait for an accelerator, without one: tensors of the CPU count as an accelerator's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mistral_hf.torch import flash_attention, sequence_layout, tracing

# Operators that give Python a value, or whose result has a shape that depends on values.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
    "aten::bincount",
}


class HostWaits(TorchDispatchMode):
    """Records the operators for which Python waits; what is computed from copies in host memory is free."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.on_host: list[Tensor] = []

    def copy(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """In place of `tracing.on_host`: one wait for all of them."""
        self.names.append("copy to the host")
        copies = tuple(tensor.clone() for tensor in tensors)
        self.on_host += copies
        return copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [tensor for tensor in args if isinstance(tensor, Tensor)]
        inputs += [
            tensor for group in args if isinstance(group, list) for tensor in group if isinstance(tensor, Tensor)
        ]
        free = any(tensor is copy for tensor in inputs for copy in self.on_host)
        if free:
            self.on_host += [tensor for tensor in [result] if isinstance(tensor, Tensor)]
        elif func.name() in WAITING:
            self.names.append(func.name())
        return result


@contextmanager
def host_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What Python waits for, as names."""
    waits = HostWaits()
    with monkeypatch.context() as patch, waits:
        patch.setattr(tracing, "FREE_DEVICES", frozenset())
        for module in (flash_attention, sequence_layout):
            patch.setattr(module, "on_host", waits.copy)
        yield waits.names
