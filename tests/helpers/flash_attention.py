"""FlashAttention-2 with stand-ins for the kernels of the package and of PyTorch."""

from typing import Any

import pytest

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
