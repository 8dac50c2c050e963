"""Stand-ins for the FlashAttention-2 kernels: their documented functions in plain PyTorch, for any device.

Written from the documentation of ``flash_attn`` and of ``torch.nn.attention.varlen``. They refuse what the kernels
refuse: other dtypes than half precision, strides and shapes that cannot be read, bounds that are not int32, lie outside
the tokens or run backwards, other windows, gradients where there is no backward pass. Results are computed in float32
from exactly the keys within the bounds.

Legend: H query heads, K key/value heads, D head_dim, N sequences.
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

DTYPES = [torch.float16, torch.bfloat16]  # tests of masks add float32, for a closer comparison


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: tuple[int, int], causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of one sequence, the last query aligned with the last key.

    Args:
        q: ``[queries, H, D]``.
        k, v: ``[keys, K, D]``.
        scale: Factor of the scores.
        window: Number of visible keys to the left and to the right of a query; -1 means all.
        causal: Whether keys to the right are invisible.

    Returns:
        The output ``[queries, H, D]`` and the logsumexp of the scores ``[H, queries]``.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    left, right = window[0], 0 if causal else window[1]
    distance = torch.arange(len(k)) - torch.arange(len(q))[:, None] - (len(k) - len(q))
    visible = torch.ones_like(distance, dtype=torch.bool)
    if right >= 0:
        visible &= distance <= right
    if left >= 0:
        visible &= distance >= -left
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = scores.softmax(dim=-1).masked_fill(~visible.any(dim=-1, keepdim=True), 0.0).nan_to_num()
    logsumexp = scores.logsumexp(dim=-1).masked_fill(~visible.any(dim=-1), torch.inf)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype), logsumexp


def check_states(q: Tensor, *keys_and_values: Tensor) -> None:
    """Check dtypes, devices and shapes of queries, keys and values ``[..., heads, D]``, as all functions do."""
    assert q.dtype in DTYPES, f"FlashAttention only supports fp16 and bf16, not {q.dtype}"
    assert q.shape[-1] % 8 == 0, "head_dim is not a multiple of 8"
    assert q.shape[-1] <= 256, "head_dim is above 256"
    for states in (q, *keys_and_values):
        assert states.dtype == q.dtype, "dtypes differ"
        assert states.device == q.device, "devices differ"
        assert states.stride(-1) == 1, "the last dimension is not contiguous"
        assert states.ndim == q.ndim, "numbers of dimensions differ"
        assert states.shape[-1] == q.shape[-1], "head_dims differ"
    for states in keys_and_values:
        assert states.shape == keys_and_values[0].shape, "keys and values differ in shape"
        assert q.shape[-2] % states.shape[-2] == 0, "key/value heads do not divide the query heads"


def check_integers(bounds: Tensor, count: int) -> list[int]:
    """The values of an int32 tensor of `count` elements."""
    assert bounds.dtype == torch.int32, f"bounds are {bounds.dtype}, not int32"
    assert bounds.shape == (count,), f"bounds are {tuple(bounds.shape)}, not {count}"
    assert bounds.is_contiguous(), "bounds are not contiguous"
    return bounds.tolist()


def check_window(window: tuple[int, int]) -> None:
    assert isinstance(window, tuple), "the window is not a tuple"
    assert len(window) == 2, "the window is not a pair"
    assert all(type(side) is int and side >= -1 for side in window), f"window {window}"


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: tuple[int, int],
    causal: bool,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention within sequences, one after another: output ``[total_q, H, D]`` and logsumexp ``[H, total_q]``."""
    assert q.ndim == 3, "queries are not [total, heads, head_dim]"
    check_states(q, k, v)
    check_window(window)
    assert type(max_q) is int, "max_q is not an int"
    assert type(max_k) is int, "max_k is not an int"
    count = len(cu_q) - 1
    assert count > 0, "there are no sequences"
    from_q, from_k = check_integers(cu_q, count + 1), check_integers(cu_k, count + 1)
    lengths = None if used is None else check_integers(used, count)
    assert from_q[0] == 0, "queries do not begin at 0"
    assert from_q[-1] == len(q), "queries do not end at their total"
    assert lengths is not None or (from_k[0] == 0 and from_k[-1] == len(k)), "bounds do not cover all keys"
    if max_q == 1 and q.shape[1] > k.shape[1] and window == (-1, -1):
        assert len(q) == count, "with max_q=1, the heads of a group are taken as queries: each sequence must have one"
    outputs, logsumexps = [], []
    for index in range(count):
        queries = range(from_q[index], from_q[index + 1])
        keys = range(from_k[index], from_k[index + 1])
        assert 0 <= queries.stop - queries.start <= max_q, "a sequence has too many queries, or a negative number"
        if lengths is not None:
            assert 0 <= lengths[index] <= len(keys), "more keys are used than a sequence has"
            keys = keys[: lengths[index]]
        assert 0 <= keys.stop - keys.start <= max_k, "a sequence has too many keys, or a negative number"
        assert keys.stop <= len(k), "a key lies after the last one"
        span = slice(keys.start, keys.stop)
        output, logsumexp = attend(q[queries.start : queries.stop], k[span], v[span], scale, window, causal)
        outputs.append(output)
        logsumexps.append(logsumexp)
    return torch.cat(outputs), torch.cat(logsumexps, dim=1)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The package's function; dropout is checked but not applied."""
    assert 0 <= dropout_p < 1, "dropout is not a probability"
    assert not causal or window_size[1] in (-1, 0), "a causal window has no right side"
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return varlen(q, k, v, *bounds, scale, window_size, causal)[0]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    return_softmax_lse: bool = False,
) -> Any:
    """The package's function, without new keys: ``[N, queries, H, D]`` on ``[rows, slots, K, D]``."""
    assert q.ndim == 4, "queries are not [batch, queries, heads, head_dim]"
    assert not torch.is_grad_enabled() or not any(states.requires_grad for states in (q, k_cache, v_cache)), (
        "no backward"
    )
    check_states(q, k_cache, v_cache)
    check_window(window_size)
    count, slots = len(q), k_cache.shape[1]
    stops = check_integers(cache_seqlens, count)
    starts = [0] * count if cache_leftpad is None else check_integers(cache_leftpad, count)
    rows = list(range(count)) if cache_batch_idx is None else check_integers(cache_batch_idx, count)
    assert cache_batch_idx is not None or count == len(k_cache), "queries and cached rows differ in number"
    assert all(0 <= start <= stop <= slots for start, stop in zip(starts, stops, strict=True)), "keys outside the cache"
    assert all(0 <= row < len(k_cache) for row in rows), "a row outside the cache"
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    results = [
        attend(queries, k_cache[row, start:stop], v_cache[row, start:stop], scale, window_size, causal)
        for queries, row, start, stop in zip(q, rows, starts, stops, strict=True)
    ]
    output = torch.stack([output for output, _ in results])
    return (output, torch.stack([logsumexp for _, logsumexp in results])) if return_softmax_lse else output


def with_kvcache_2_3(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    """The same function in version 2.3.0."""
    return flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
    )


class AuxRequest(NamedTuple):
    lse: bool = False


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
) -> Any:
    """PyTorch's function in 2.13."""
    assert enable_gqa or query.shape[1] == key.shape[1], "heads differ without enable_gqa"
    states = (query, key, value)
    recording = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in states)
    assert seqused_k is None or not recording, "seqused_k has no backward"
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output, logsumexp = varlen(*states, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, False, seqused_k)
    return (output, logsumexp) if return_aux is not None and return_aux.lse else output


def varlen_attn_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: AuxRequest | None = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Any:
    """PyTorch's function in 2.11, whose kernels take groups of heads without an option."""
    bounds = (cu_seq_q, cu_seq_k, max_q, max_k)
    options: dict[str, Any] = {"return_aux": return_aux, "scale": scale, "window_size": window_size}
    return varlen_attn(query, key, value, *bounds, enable_gqa=True, **options)


@library.custom_op("mistral_hf_tests::varlen", mutates_args=())
def varlen_operator(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, used: Tensor, max_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    return varlen(query, key, value, cu_q, cu_k, 1, max_k, scale, (-1, -1), False, used)


@varlen_operator.register_fake
def _(query: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)


def compiled_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float,
    window_size: Any = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor,
) -> Any:
    """`varlen_attn` as an operator, which a compiler keeps in its graph, like PyTorch's function."""
    output, logsumexp = varlen_operator(query, key, value, cu_q, cu_k, seqused_k, max_k, scale)
    return (output, logsumexp) if return_aux is not None else output


def traceable_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: Any = (-1, -1),
    enable_gqa: bool = False,
    return_aux: Any = None,
    seqused_k: Any = None,
) -> Tensor:
    """`varlen_attn` of several queries without a look at values, so that a compiler can trace it and its gradient."""
    sequence_q, from_end_q = _places(cu_q, len(query))
    sequence_k, from_end_k = _places(cu_k, len(key))
    distance = from_end_q[:, None] - from_end_k
    visible = (sequence_q[:, None] == sequence_k) & (distance >= 0)
    if window_size[0] >= 0:
        visible = visible & (distance <= window_size[0])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(dim=-1) * visible
    return torch.einsum("hqk,khd->qhd", weights, value)


def _places(bounds: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The sequence of each of `count` tokens, and its index less the end of the sequence."""
    indices = torch.arange(count, device=bounds.device)
    sequence = torch.bucketize(indices, bounds[1:], right=True)
    return sequence, indices - bounds[1:][sequence]


PACKAGE = SimpleNamespace(
    flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=flash_attn_with_kvcache
)
PACKAGE_2_3 = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, flash_attn_with_kvcache=with_kvcache_2_3)
VARLEN = SimpleNamespace(varlen_attn=varlen_attn, AuxRequest=AuxRequest)
VARLEN_2_11 = SimpleNamespace(varlen_attn=varlen_attn_2_11, AuxRequest=AuxRequest)
VARLEN_OPERATOR = SimpleNamespace(varlen_attn=compiled_varlen, AuxRequest=AuxRequest)
VARLEN_TRACEABLE = SimpleNamespace(varlen_attn=traceable_varlen, AuxRequest=AuxRequest)
