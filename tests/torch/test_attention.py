"""The window rule, masks and banded attention, against naive attention with a dense mask."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mistral_hf import MistralConfig, MistralForCausalLM
from mistral_hf.torch import attention
from mistral_hf.torch.attention import (
    BandMask,
    eager_attention_forward,
    make_mask,
    sdpa_attention_forward,
    visible,
)
from mistral_hf.torch.sequence_layout import KeyLayout
from tests.helpers.layouts import layout_of

BACKENDS = {"eager": eager_attention_forward, "sdpa": sdpa_attention_forward}


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """``[B, S, H, D]``: softmax over all keys that the mask ``[B, 1, S, T]`` allows, keys repeated for every group."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~mask, -1e30)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def dense_mask(
    window: int | None, queries: range, keys: range, padding: Tensor | None, segments: Tensor | None
) -> Tensor:
    """The window rule, entry by entry, ``[B or 1, 1, S, T]``."""
    rows = [[k <= q and (window is None or k > q - window) for k in keys] for q in queries]
    mask = torch.tensor(rows)[None, None]
    if padding is not None:
        mask = mask & padding[:, None, None, keys.start :]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def test_a_query_sees_the_last_w_keys_up_to_itself() -> None:
    """The query itself is one of the W keys."""
    index = torch.arange(6)
    mask = visible(index[:, None], index, 3)
    assert mask.sum(dim=-1).tolist() == [1, 2, 3, 3, 3, 3]
    assert index[mask[4]].tolist() == [2, 3, 4]
    assert visible(index[:, None], index, None).sum(dim=-1).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def small_block(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of 8 queries, which make short inputs count as long."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    return 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 1, 2, 7, 8, 9, 20, 100])
@pytest.mark.parametrize(
    ("kind", "past"), [("plain", 0), ("plain", 1), ("plain", 13), ("padded", 0), ("padded", 13), ("packed", 0)]
)
def test_banded_attention_matches_dense_attention(
    backend: str, window: int | None, past: int, kind: str, small_block: int
) -> None:
    """Forward and gradients, for queries after cached keys, with left padding and packed sequences."""
    length, batch = 29, 2
    kept = past if window is None else min(past, window - 1)
    padding = segments = None
    if kind == "padded":
        padding = torch.arange(past + length) >= torch.tensor([[0], [11]])
    if kind == "packed":
        segments = (torch.arange(length) >= torch.tensor([[5], [17]])).long() + (torch.arange(length) >= 20)
    leaves = [
        torch.randn(batch, heads, count, 4, dtype=torch.float64)
        for heads, count in ((4, length), (2, kept + length), (2, kept + length))
    ]
    hidden = torch.empty(batch, length, 0)
    mask = make_mask(
        backend,
        hidden,
        layout_of(KeyLayout(past, past - kept, kept + length), padding, segments),
        window,
    )
    assert mask is None or isinstance(mask, BandMask)
    reference_mask = dense_mask(
        window, range(past, past + length), range(past - kept, past + length), padding, segments
    )
    real = torch.ones(batch, length, dtype=torch.bool) if padding is None else padding[:, past:]
    results = []
    for attend in ("banded", "dense"):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        if attend == "banded":
            output, _ = BACKENDS[backend](nn.Module(), *inputs, mask, scaling=0.5)
        else:
            output = dense(*inputs, reference_mask)
        output = output * real[..., None, None]
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        output, _ = BACKENDS[backend](nn.Module(), *leaves, mask, scaling=0.5)
    torch.testing.assert_close(output * real[..., None, None], results[1][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_both_paths_of_one_query_match_dense_attention(dtype: torch.dtype, masked: bool) -> None:
    """The matrix products of a CPU step and PyTorch's kernel with groups as rows, against dense attention."""
    query, key, value = (torch.randn(3, heads, count, 16) for heads, count in ((6, 1), (2, 33), (2, 33)))
    mask = torch.rand(3, 1, 1, 33) > 0.3 if masked else None
    expected = dense(query, key, value, torch.ones(1, 1, 1, 33, dtype=torch.bool) if mask is None else mask)
    inputs = [states.to(dtype) for states in (query, key, value)]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for output in (
        sdpa_attention_forward(nn.Module(), *inputs, mask, scaling=0.25)[0],
        attention._sdpa(*inputs, mask, 0.25, 0.0),
    ):
        assert output.dtype == dtype
        torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


def test_every_head_may_have_its_own_mask() -> None:
    query, key, value = (torch.randn(2, heads, count, 8) for heads, count in ((6, 1), (2, 9), (2, 9)))
    mask = torch.rand(2, 6, 1, 9) > 0.4
    expected = dense(query, key, value, mask)
    torch.testing.assert_close(attention._sdpa(query, key, value, mask, 8**-0.5, 0.0), expected)


@pytest.mark.parametrize(
    ("length", "layout", "window", "expected"),
    [
        (5, KeyLayout(0, 0, 5), 5, None),  # a prompt no longer than the window is plain causal attention
        (6, KeyLayout(0, 0, 6), 5, "dense"),
        (5, KeyLayout(0, 0, 5), None, None),
        (1, KeyLayout(9, 5, 5), 5, None),  # a step sees the whole buffer
        (1, KeyLayout(9, 0, 10), 5, "dense"),  # a library cache holds more than the window
        (1, KeyLayout(9, 0, 10), None, None),
        (1, KeyLayout(9, 0, 20), None, "dense"),  # a library cache has empty slots
        (4, KeyLayout(9, 5, 8), 5, "dense"),
        (600, KeyLayout(0, 0, 600), 5, "band"),
        (600, KeyLayout(0, 0, 600), 600, None),
        (600, KeyLayout(50, 0, 650), None, "band"),
    ],
)
def test_masks_are_made_only_where_needed(length: int, layout: KeyLayout, window: int | None, expected: Any) -> None:
    mask = make_mask("sdpa", torch.empty(2, length, 0), layout_of(layout), window)
    kind = {type(None): None, Tensor: "dense", BandMask: "band"}[type(mask)]
    assert kind == expected
    if kind == "dense":
        assert mask.shape == (1, 1, length, layout.length)


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_no_tensor_grows_with_the_square_of_the_length(backend: str, padded: bool, train: bool) -> None:
    """With twice the length, the largest tensor is at most twice as large; no mask is S by S."""
    config = MistralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, sliding_window=16, attn_implementation=backend,
    )  # fmt: skip
    model = MistralForCausalLM(config).train(train)
    largest = []
    for length in (2048, 4096):
        ids = torch.ones(1, length, dtype=torch.long)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :100] = 0
        with torch.set_grad_enabled(train), LargestTensor() as recorder:
            output = model(ids, attention_mask=mask, use_cache=False, labels=ids if train else None)
            if train:
                output.loss.backward()
        largest.append(recorder.elements)
        assert recorder.elements < length * length / 2
    # The scores of a block do not grow with the length; all other tensors grow linearly.
    assert largest[1] <= 2 * largest[0]


def test_attention_weights_cover_a_long_input(small_block: int) -> None:
    """Eager attention is banded, unless the weights are requested."""
    config = MistralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, sliding_window=3, attn_implementation="eager",
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    ids = torch.randint(11, (1, 20))
    banded, full = model(ids), model(ids, output_attentions=True)
    torch.testing.assert_close(banded.logits, full.logits)
    weights = full.attentions[0]
    assert weights.shape == (1, 2, 20, 20)
    assert torch.equal(weights[0, 0] > 0, visible(torch.arange(20)[:, None], torch.arange(20), 3))
