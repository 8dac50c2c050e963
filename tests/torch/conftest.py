"""Shared fixtures of the tests of FlashAttention-2: stand-in kernels, and a checkpoint that they support."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mistral_hf.torch import flash_kernels
from tests.helpers import fake_flash_kernels as standin
from tests.helpers.flash_attention import KERNELS, use


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels of every provider in turn, which `find_kernels` returns."""
    use(KERNELS[request.param], monkeypatch)
    return KERNELS[request.param]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allows float32, in which differences show the masks and not the rounding."""
    monkeypatch.setattr(flash_kernels, "DTYPES", (*flash_kernels.DTYPES, torch.float32))
    monkeypatch.setattr(standin, "DTYPES", [*standin.DTYPES, torch.float32])


@pytest.fixture
def flash_checkpoint(make_model: Any, tmp_path: Path) -> Path:
    """A folder with a tiny `MistralForCausalLM` whose head_dim the kernels support."""
    make_model("ForCausalLM", "sdpa", head_dim=16).save_pretrained(tmp_path)
    return tmp_path
