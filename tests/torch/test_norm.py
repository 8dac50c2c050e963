"""The norm: PyTorch's values with fewer operators on a CPU, and PyTorch's operator everywhere else."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from mistral_hf.torch.norm import rms_norm
from tests.helpers.operators import Recorder

EPS = 3e-3
FAST = "aten::linalg_vector_norm"


def operators_of(states: Tensor, weight: Tensor) -> set[str]:
    with Recorder() as recorder:
        rms_norm(states, weight, EPS)
    return set(recorder.names)


@pytest.mark.parametrize("shape", [(12,), (1, 12), (2, 3, 12), (0, 12)])
@torch.no_grad()
def test_the_fast_path_matches_the_definition(shape: tuple[int, ...]) -> None:
    states, weight = torch.randn(shape), torch.randn(12)
    exact = states.double()
    expected = weight.double() * exact / (exact.pow(2).mean(dim=-1, keepdim=True) + EPS).sqrt()
    assert FAST in operators_of(states, weight)
    torch.testing.assert_close(rms_norm(states, weight, EPS).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_other_dtypes_use_the_pytorch_operator(dtype: torch.dtype) -> None:
    states, weight = torch.randn(2, 12, dtype=dtype), torch.randn(12, dtype=dtype)
    assert FAST not in operators_of(states, weight)
    assert torch.equal(rms_norm(states, weight, EPS), F.rms_norm(states, (12,), weight, EPS))


def test_gradients_match_pytorch() -> None:
    states, weight = torch.randn(3, 12, requires_grad=True), torch.randn(12, requires_grad=True)
    ours = torch.autograd.grad(rms_norm(states, weight, EPS).pow(2).sum(), [states, weight])
    theirs = torch.autograd.grad(F.rms_norm(states, (12,), weight, EPS).pow(2).sum(), [states, weight])
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_vmap_over_weights_with_shared_states_matches_a_loop() -> None:
    """As in an ensemble, whose members differ in weights and read the same input."""
    states, weights = torch.randn(2, 3, 12), torch.randn(5, 12)
    found = torch.vmap(lambda weight: rms_norm(states, weight, EPS))(weights)
    torch.testing.assert_close(found, torch.stack([rms_norm(states, weight, EPS) for weight in weights]))


@torch.no_grad()
def test_a_traced_program_holds_the_pytorch_operator() -> None:
    def norm(states: Tensor, weight: Tensor) -> Any:
        return rms_norm(states, weight, EPS)

    traced = torch.jit.trace(norm, (torch.randn(2, 12), torch.randn(12)))
    assert "rms_norm" in str(traced.graph)
    assert "linalg_vector_norm" not in str(traced.graph)


@torch.no_grad()
def test_fake_tensors_leave_nothing_behind() -> None:
    states, weight = torch.randn(2, 3, 12), torch.randn(12)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert rms_norm(mode.from_tensor(states), weight, EPS).shape == states.shape
    torch.testing.assert_close(rms_norm(states, weight, EPS), F.rms_norm(states, (12,), weight, EPS))
