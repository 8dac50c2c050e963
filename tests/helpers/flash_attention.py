"""FlashAttention-2 with stand-ins for the kernels of the package and of PyTorch."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from mistral_hf.torch import flash_kernels
from mistral_hf.torch.flash_kernels import PackageKernels, TorchKernels
from tests.helpers import fake_flash_kernels as standin

NAME = "flash_attention_2"
KERNELS = {
    "package": PackageKernels(standin.PACKAGE, "2.8.3", "cpu"),
    "torch": TorchKernels(standin.VARLEN, "cpu"),
    "torch 2.11": TorchKernels(standin.VARLEN_2_11, "cpu"),
}
OLD_PACKAGE = PackageKernels(standin.PACKAGE_2_3, "2.3.0", "cpu")


def use(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `find_kernels` return these kernels, or search again if they are None."""
    monkeypatch.setattr(flash_kernels, "_kernels", kernels)


def shapes_only(*, torch_like: bool, device_type: str = "meta") -> Any:
    """Kernels that return tensors of the right shapes without computing them."""

    def with_cache(
        q: Tensor, k: Tensor, v: Tensor, *, cache_leftpad: Any = None, return_softmax_lse: bool = False, **options: Any
    ) -> Any:
        return (q, q.new_empty(len(q), q.shape[2], 1)) if return_softmax_lse else q

    def varlen(
        q: Tensor, *states: Any, return_aux: Any = None, window_size: Any = None, seqused_k: Any = None, **options: Any
    ) -> Any:
        return q if return_aux is None else (q, q.new_empty(q.shape[1], len(q)))

    if torch_like:
        return TorchKernels(SimpleNamespace(varlen_attn=varlen, AuxRequest=standin.AuxRequest), device_type)
    return PackageKernels(
        SimpleNamespace(flash_attn_varlen_func=varlen, flash_attn_with_kvcache=with_cache), "1", device_type
    )
