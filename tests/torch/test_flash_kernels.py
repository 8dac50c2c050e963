"""The kernels of FlashAttention-2: how they are called, where they come from, and what their stand-ins refuse."""

import importlib.metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from mistral_hf import MistralConfig, MistralForCausalLM
from mistral_hf.cli import info
from mistral_hf.torch import flash_kernels
from mistral_hf.torch.attention import make_mask
from mistral_hf.torch.flash_kernels import KeyRangePlan, PackageKernels, TorchKernels
from mistral_hf.torch.sequence_layout import KeyLayout
from tests.helpers import fake_flash_kernels as standin
from tests.helpers.flash_attention import KERNELS, NAME, use
from tests.helpers.layouts import layout_of


def test_flat_ranges_are_computed_once_for_all_layers(kernels: Any) -> None:
    """The first layer of a step computes them, and the others reuse them."""
    hidden = torch.empty(2, 1, 0, dtype=torch.bfloat16)
    with torch.no_grad():
        plan = make_mask(NAME, hidden, layout_of(KeyLayout(9, 2, 8, 8), torch.ones(2, 10, dtype=torch.bool)), 8)
    assert isinstance(plan, KeyRangePlan)
    assert plan.flat_ranges(2, 8) is plan.flat_ranges(2, 8)
    assert plan.contiguous() is plan


@pytest.mark.parametrize("layout", ["buffer", "part of one", "tokens first", "one token", "repeated rows"])
def test_keys_in_any_memory_layout_are_read_correctly(layout: str, kernels: Any, exact: None) -> None:
    """Keys laid out as a buffer are read as a view, others as a copy."""
    buffers = [torch.randn(3, 2, 8, 16) for _ in "kv"]
    if layout == "part of one":
        buffers = [buffer[:, :, :5] for buffer in buffers]
    elif layout == "tokens first":
        buffers = [buffer.transpose(1, 2).contiguous().transpose(1, 2) for buffer in buffers]
    elif layout == "one token":
        buffers = [torch.randn(3, 1, 2, 16).transpose(1, 2) for _ in "kv"]
    elif layout == "repeated rows":
        buffers = [buffer[:1].expand(3, -1, -1, -1) for buffer in buffers]
    query, total = torch.randn(3, 4, 16), buffers[0].shape[2]
    lengths = torch.tensor([[total], [1], [0]], dtype=torch.int32)
    plan = KeyRangePlan(torch.zeros_like(lengths), lengths, {})
    found = kernels.ranges(query, *buffers, plan, 0.25)
    for row, count in enumerate(lengths.flatten().tolist()):
        k, v = (buffer[row, :, :count].transpose(0, 1) for buffer in buffers)
        expected, _ = standin.attend(query[row][None], k, v, 0.25, (-1, -1), False)
        torch.testing.assert_close(found[row], expected[0])
    _, slots = flash_kernels._as_rows(buffers[0])
    assert slots == (8 if layout in ("buffer", "part of one") else total)


def test_merged_ranges_match_the_whole() -> None:
    """Attention to two ranges merges to that of the whole; empty ranges do not count."""
    q, k, v = torch.randn(1, 2, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    whole, _ = standin.attend(q, k, v, 0.3, (-1, -1), False)
    for cut in (0, 4, 9):
        parts = [standin.attend(q, k[span], v[span], 0.3, (-1, -1), False) for span in (slice(cut), slice(cut, None))]
        outputs = torch.stack([output for output, _ in parts], dim=1)
        logsumexp = torch.stack([logsumexp[:, 0] for _, logsumexp in parts])[None]
        merged = flash_kernels.merge(outputs, logsumexp, torch.tensor([[cut, 9 - cut]]))
        torch.testing.assert_close(merged, whole)
    empty = flash_kernels.merge(outputs, logsumexp, torch.zeros(1, 2))
    assert torch.equal(empty, torch.zeros_like(empty))


@pytest.mark.parametrize("begins_later", [False, True])
def test_no_grid_exceeds_its_limit(
    begins_later: bool, kernels: Any, exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, heads and ranges of a large batch are split over several calls, with the same result."""
    name = "with_cache" if isinstance(kernels, PackageKernels) else "varlen"
    function, grids = getattr(kernels, name), []

    def count(query: Tensor, key: Tensor, value: Tensor, *bounds: Any, **options: Any) -> Any:
        grids.append(len(bounds[0]) - 1 if bounds else len(query) * query.shape[2])
        return function(query, key, value, *bounds, **options)

    lengths = torch.tensor([[3, 2]], dtype=INT).repeat(20, 1)
    starts = torch.tensor([[0, 5]], dtype=INT).repeat(20, 1)
    plan = KeyRangePlan(starts, lengths, {}) if begins_later else KeyRangePlan(None, lengths[:, :1].contiguous(), {})
    query, key, value = torch.randn(20, 4, 1, 16), torch.randn(20, 2, 8, 16), torch.randn(20, 2, 8, 16)
    expected = kernels.attend(plan, query, key, value, 0.25, 0.0)
    monkeypatch.setattr(kernels, name, count)
    monkeypatch.setattr(flash_kernels, "MAX_GRID", 25)
    torch.testing.assert_close(kernels.attend(plan, query, key, value, 0.25, 0.0), expected)
    assert len(grids) > 1
    assert max(grids) <= 25


@pytest.mark.parametrize("head_dim", [12, 264])
def test_head_dims_are_checked(head_dim: int, kernels: Any, make_model: Any) -> None:
    with pytest.raises(ValueError, match=f"at most 256 elements, not head_dim={head_dim}"):
        make_model("ForCausalLM", NAME, head_dim=head_dim)


def test_dropout_reaches_the_kernels_or_is_refused(
    kernels: Any, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("ForCausalLM", NAME, head_dim=16, attention_dropout=0.25).bfloat16().train()
    ids = torch.ones(1, 3, dtype=torch.long)
    if isinstance(kernels, TorchKernels):
        with pytest.raises(ValueError, match=r"no dropout: set attention_dropout=0 \(it is 0.25\), or install"):
            model(ids)
        return
    probabilities = []
    varlen = kernels.varlen

    def record(*arguments: Any, dropout_p: float, **options: Any) -> Any:
        probabilities.append(dropout_p)
        return varlen(*arguments, **options)

    monkeypatch.setattr(kernels, "varlen", record)
    model(ids)
    model.eval()(ids)
    assert probabilities == [0.25, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("begins_later", [False, True])
def test_the_operator_of_a_decoding_step_agrees_with_its_description(
    count: int, begins_later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler sees the shapes, dtypes and strides that a run gives."""
    use(KERNELS["package"], monkeypatch)
    query, stops = states(2 * count, 4, 16), torch.full((2 * count,), 6, dtype=INT)
    key, value = states(2, 2, 8, 16), states(2, 2, 8, 16)
    rows = torch.arange(2, dtype=INT).repeat_interleave(count) if count > 1 else None
    arguments = (query, key, value, stops, stops - 2 if begins_later else None, rows, 0.25)
    torch.library.opcheck(torch.ops.mistral_hf.attend_to_cache, arguments)


# Where the kernels come from.


def test_info_names_the_kernels(kernels: Any) -> None:
    assert info._backend_state(NAME) == f"usable: {kernels.name}"


@pytest.fixture
def nothing_found(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Neither the package nor PyTorch has kernels; a test can add some with the returned patch."""
    use(None, monkeypatch)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    monkeypatch.setattr(flash_kernels, "version", not_installed)
    return monkeypatch


def not_installed(package: str) -> str:
    raise importlib.metadata.PackageNotFoundError(package)


def test_missing_kernels_are_refused_with_a_remedy(nothing_found: Any, flash_checkpoint: Any) -> None:
    with pytest.raises(ImportError, match=r"install the package flash_attn, version 2\.3\.0 or later .* PyTorch 2\.11"):
        MistralForCausalLM.from_pretrained(flash_checkpoint, dtype="bfloat16", attn_implementation=NAME)


def test_the_package_comes_first(nothing_found: Any) -> None:
    nothing_found.setattr(flash_kernels, "version", lambda package: "2.8.3")
    nothing_found.setattr(flash_kernels.importlib, "import_module", lambda name: standin.PACKAGE)
    nothing_found.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert flash_kernels.find_kernels().name == "flash_attn 2.8.3"
    assert flash_kernels.find_kernels() is flash_kernels.find_kernels()


def test_pytorch_comes_second(nothing_found: Any) -> None:
    nothing_found.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    found = flash_kernels.find_kernels()
    assert isinstance(found, TorchKernels)
    assert found.name == f"torch.nn.attention.varlen of PyTorch {torch.__version__}"


def test_a_package_older_than_2_3_is_refused(nothing_found: Any) -> None:
    nothing_found.setattr(flash_kernels, "version", lambda package: "2.2.5")
    with pytest.raises(ImportError, match=r"flash_attn 2\.2\.5 is older than 2\.3\.0"):
        flash_kernels.find_kernels()


def test_rocm_is_refused(nothing_found: Any) -> None:
    """Its back ends of the package ignore the padding of cached keys."""
    nothing_found.setattr(flash_kernels, "version", lambda package: "2.8.3")
    nothing_found.setattr(flash_kernels.importlib, "import_module", lambda name: standin.PACKAGE)
    nothing_found.setattr(torch.version, "hip", "6.4.0")
    with pytest.raises(ImportError, match=r"NVIDIA GPUs only, and this PyTorch is built for ROCm 6\.4\.0: choose"):
        flash_kernels.find_kernels()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use(PackageKernels(standin.PACKAGE, "2.8.3"), monkeypatch)
    with pytest.raises(ValueError, match="needs a CUDA device, and there is none: choose 'sdpa'"):
        MistralForCausalLM(MistralConfig(attn_implementation=NAME, num_hidden_layers=0))


def test_an_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use(PackageKernels(standin.PACKAGE, "2.8.3"), monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=r"8\.0 \(Ampere\) or later, not 7\.5"):
        flash_kernels.check_model(torch.bfloat16, 128)


# The stand-ins refuse what the kernels refuse.


def states(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, dtype=dtype)


INT = torch.int32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": states(4, 4, 16, dtype=torch.float32)}, "fp16 and bf16"),
        ({"k": states(4, 2, 16, dtype=torch.float16)}, "dtypes differ"),
        ({"q": states(4, 16, 4).transpose(1, 2)}, "not contiguous"),
        ({"q": states(4, 4, 12), "k": states(4, 2, 12), "v": states(4, 2, 12)}, "multiple of 8"),
        ({"k": states(4, 3, 16), "v": states(4, 3, 16)}, "do not divide"),
        ({"cu_seqlens_q": torch.tensor([0, 4])}, "not int32"),
        ({"cu_seqlens_q": torch.tensor([0, 3], dtype=INT)}, "do not end"),
        ({"cu_seqlens_k": torch.tensor([0, 3], dtype=INT)}, "do not cover"),
        ({"max_seqlen_q": 3}, "too many queries"),
        ({"max_seqlen_k": torch.tensor(4)}, "not an int"),
        ({"window_size": (-2, 0)}, "window"),
        ({"window_size": (3, 5)}, "no right side"),
    ],
)
def test_the_stand_in_refuses_what_the_kernels_refuse(change: dict[str, Any], message: str) -> None:
    bounds = torch.tensor([0, 4], dtype=INT)
    arguments = {"q": states(4, 4, 16), "k": states(4, 2, 16), "v": states(4, 2, 16), "causal": True}
    arguments |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 4, "max_seqlen_k": 4}
    standin.flash_attn_varlen_func(**arguments)
    with pytest.raises(AssertionError, match=message):
        standin.flash_attn_varlen_func(**(arguments | change))


def test_the_stand_in_matches_pytorch() -> None:
    """Attention and windows match PyTorch's `scaled_dot_product_attention`."""
    q, k, v = states(5, 4, 16), states(7, 2, 16), states(7, 2, 16)
    bounds = [torch.tensor([0, count], dtype=INT) for count in (5, 7)]
    for window in ((-1, -1), (2, 0)):
        found = standin.flash_attn_varlen_func(q, k, v, *bounds, 5, 7, causal=True, window_size=window)
        distance = torch.arange(5)[:, None] + 2 - torch.arange(7)
        mask = (distance >= 0) & (distance <= (2 if window[0] == 2 else 99))
        batch = (tensor.transpose(0, 1)[None].float() for tensor in (q, k, v))
        expected = torch.nn.functional.scaled_dot_product_attention(*batch, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(found.float(), expected[0].transpose(0, 1), rtol=2e-2, atol=2e-2)
