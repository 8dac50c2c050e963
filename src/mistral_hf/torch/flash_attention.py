"""Attention through the FlashAttention-2 kernels.

Legend: B batch, S queries, T keys, H query heads, K key/value heads, D head_dim, W window, N sequences.

The mask of this implementation is a plan: the bounds that the kernels take, made once a forward pass and shared by all
layers. The plan of a decoding step neither copies a buffer nor makes the host wait for the device.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from .attention import ALL_ATTENTION_FUNCTIONS, MASK_FUNCTIONS
from .flash_kernels import NAME, KeyRangePlan, VarlenPlan, check_model, check_states, find_kernels
from .sequence_layout import KeyLayout, Packing, SequenceLayout, bounds_of
from .tracing import has_values, on_host


def flash_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention through the FlashAttention-2 kernels; arguments as `attention.eager_attention_forward`.

    The mask is a plan of `make_flash_plan`. Under autocast, the states are taken in its dtype; those of a quantized
    model, which are in float32 where its norms are, in the dtype that it was loaded in.

    Returns:
        ``[B, S, H, D]``, and None.

    Raises:
        ValueError: The mask is not a plan; or dtype, device, heads or dropout are not supported by the kernels.
    """
    if attention_mask is None:  # continuous batching keeps the keys of its requests in a paged cache
        paged = AttentionInterface._global_mapping[NAME]
        return paged(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if not isinstance(attention_mask, VarlenPlan | KeyRangePlan):
        raise ValueError(
            f"{NAME} takes no custom mask ({type(attention_mask).__name__}): pass a mask [batch, tokens] of the"
            " padding, or choose attn_implementation='sdpa'."
        )
    kernels = find_kernels()
    if query.device.type != kernels.device_type:
        raise ValueError(
            f"{NAME} runs on {kernels.device_type}, and the model is on {query.device}: move it with"
            f" model.to({kernels.device_type!r}), or choose attn_implementation='sdpa'."
        )
    dtype = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
    elif dtype == torch.float32 and getattr(module.config, "quantization_config", None) is not None:
        dtype = cast(
            Any, module.config
        ).dtype  # the norms are in float32 after PEFT's `prepare_model_for_kbit_training`
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    check_states(query.dtype, query.shape[3])
    return kernels.attend(attention_mask, query, key, value, scaling, dropout), None


def make_flash_plan(
    implementation: str,
    hidden_states: Tensor,
    layout: SequenceLayout,
    window: int | None,
    weights_wanted: bool = False,
    **library_arguments: Any,
) -> VarlenPlan | KeyRangePlan:
    """The plan of a forward pass; arguments as `attention.make_mask`.

    Raises:
        ValueError: The attention weights are wanted; or there is padding that the kernels cannot leave out: after
            tokens that stay in a cache, or between tokens that a window counts.
    """
    if weights_wanted:
        raise ValueError(f"{NAME} cannot return attention weights: choose attn_implementation='eager' for them.")
    (batch, length), device = hidden_states.shape[:2], hidden_states.device
    keys, padding = layout.keys, layout.padding
    if keys.cached and not layout.is_left_padded():
        raise ValueError(
            f"{NAME} continues a cache with padding on the left only, and the attention mask has padding after real"
            ' tokens. If the rows of a prompt were padded on the right, set tokenizer.padding_side = "left"; if'
            " there is padding between turns, choose attn_implementation='sdpa', which takes it anywhere."
        )
    # One query a row: ranges of the buffer as it lies. These kernels have no backward pass.
    if length == 1 and not torch.is_grad_enabled():
        plan = _key_ranges(batch, keys, window, padding, device)
        if plan.starts is None or find_kernels().has_starts:
            return plan
    # Several queries after cached keys.
    if keys.cached:
        return _cached_sequences(batch, length, keys, window, padding, device)
    # No cache and nothing to leave out.
    if padding is None and layout.packing is None:
        return _whole_rows(batch, length, length, window, device)
    # No cache, but packed sequences.
    if padding is None:
        return _packed_sequences(layout.packing, window, device)
    # No cache, but padding.
    return _padded_rows(batch, length, window, layout, device)


def _whole_rows(batch: int, queries: int, keys: int, window: int | None, device: torch.device) -> VarlenPlan:
    """Every row is a sequence, and its queries are the last of its tokens."""
    number = torch.arange(batch + 1, dtype=torch.int32, device=device)
    return VarlenPlan(number * queries, number * keys, queries, keys, window)


def _packed_sequences(packing: Packing | None, window: int | None, device: torch.device) -> VarlenPlan:
    """Without cached keys: every packed segment of a row is a sequence."""
    assert packing is not None
    bounds, longest = packing.bounds, packing.longest
    if bounds is None:
        bounds, longest = _counted(packing.segments, device)
    elif longest is None:
        longest = _longest(bounds)
    return VarlenPlan(bounds, bounds, longest, longest, window)


@torch.compiler.disable(reason="pass cu_seq_lens_q and max_length_q with packed sequences, or the host must count them")
def _counted(segments: Tensor, device: torch.device) -> tuple[Tensor, int]:
    (host,) = on_host(segments)
    return bounds_of(nn.functional.pad(host.diff(dim=-1) != 0, (1, 0)), device)


@torch.compiler.disable(reason="pass max_length_q with cu_seq_lens_q, or the host must read it")
def _longest(bounds: Tensor) -> int:
    return int(bounds.diff().max())


def _padded_rows(
    batch: int, length: int, window: int | None, layout: SequenceLayout, device: torch.device
) -> VarlenPlan:
    """Without cached keys: the real tokens of every row; those of padding see no key, and get zeros."""
    real = layout.padding if layout.padding_on_host is None else layout.padding_on_host
    assert real is not None
    begins = real[:, 0].long() + (real[:, 1:] & ~real[:, :-1]).sum(dim=-1)
    if not has_values(real):
        torch._assert_async((begins <= 1).all(), _between_tokens("padding between real tokens"))
    elif begins.sum() == 0 or (window is not None and (begins > 1).any()):
        raise ValueError(_between_tokens("padding between real tokens" if begins.any() else "no real tokens"))
    elif (begins > 1).any() or layout.packing is not None:
        return _kept_sequences(batch, length, window, real, layout.segments, device)
    count, before = real.sum(dim=-1), _leading(real)
    after, none = length - before - count, torch.zeros_like(count)
    bounds = (_bounds(none, before + count, after, none), _bounds(before, count, none, after))
    cu_q, cu_k = (tensor.to(device, non_blocking=True) for tensor in bounds)
    return VarlenPlan(cu_q, cu_k, max(length, 2), length, window)


def _between_tokens(found: str) -> str:
    return f"The attention mask has {found}, which {NAME} cannot handle: choose attn_implementation='sdpa'."


def _kept_sequences(
    batch: int, length: int, window: int | None, real: Tensor, segments: Tensor | None, device: torch.device
) -> VarlenPlan:
    """The real tokens alone, every packed segment of a row a sequence; the mask is in host memory."""
    sequence = torch.arange(0, batch * length, length)[:, None].expand(batch, length)
    if segments is not None:
        sequence = sequence + on_host(segments)[0]
    kept = real.flatten().nonzero()[:, 0]
    counts = sequence.flatten()[kept].unique_consecutive(return_counts=True)[1]
    bounds, longest = nn.functional.pad(counts.cumsum(0), (1, 0)).int().to(device), int(counts.max())
    return VarlenPlan(bounds, bounds, longest, longest, window, kept.to(device))


def _cached_sequences(
    batch: int, length: int, keys: KeyLayout, window: int | None, padding: Tensor | None, device: torch.device
) -> VarlenPlan:
    """Queries after cached keys. A row's padding and empty slots are separate sequences, without a query."""
    total, end = keys.length, keys.query_start + length
    if padding is None and keys.slots == 0 and isinstance(end, int) and keys.key_start + total == end:
        return _whole_rows(batch, length, total, window, device)
    indices, order = keys.indices(length, device), None
    if keys.slots:
        order = indices.argsort()  # the empty slots come last
        indices = indices[order]
    first = torch.zeros(batch, dtype=torch.long, device=device) if padding is None else _leading(padding)
    before = (indices < first[:, None]).sum(dim=-1)
    after = (indices >= end).sum().expand(batch)
    none = torch.zeros_like(before)
    return VarlenPlan(
        _bounds(none, none + length, none),  # the queries of padding see no key, and get zeros
        _bounds(before, total - before - after, after),
        max(length, 2),  # 1 would promise the kernels one query of every sequence
        total,
        window,
        order=order,
    )


def _bounds(*counts: Tensor) -> Tensor:
    """Where each of the sequences begins, and where the last ends, of ``[B]`` tokens of each kind a row."""
    return nn.functional.pad(torch.stack(counts, dim=1).flatten().cumsum(0), (1, 0)).int()


def _leading(padding: Tensor) -> Tensor:
    """Number of tokens before the first real one of every row."""
    return (padding.cumsum(dim=-1) == 0).sum(dim=-1)


def _key_ranges(
    batch: int, keys: KeyLayout, window: int | None, padding: Tensor | None, device: torch.device
) -> KeyRangePlan:
    """The keys that the one query of every row sees, in chronological order or in slots."""
    query, total = keys.query_start, keys.length
    first = torch.zeros(batch, dtype=torch.long, device=device) if padding is None else _leading(padding)
    if window is not None:
        first = first.clamp(min=query - window + 1)
    count = (query + 1 - first).clamp(0, total)
    # Everything that the buffer holds.
    if padding is None and (window is None or total <= window):
        starts, lengths = None, count
    # One range: the keys are in order, or never wrap around.
    elif keys.slots == 0 or window is None:
        starts, lengths = (first - keys.key_start).clamp(min=0), count
    # Two ranges: from the first key's slot to the end of the buffer, and from its beginning.
    else:
        starts = first % total
        lengths = torch.minimum(count, total - starts)
        starts = torch.stack([torch.zeros_like(starts), starts], dim=1)
        lengths = torch.stack([count - lengths, lengths], dim=1)
    lengths = lengths.view(batch, -1).int()
    return KeyRangePlan(None if starts is None else starts.view(batch, -1).int(), lengths, {})


# Checks of a model's dtype and head_dim before an attention implementation is chosen.
IMPLEMENTATION_CHECKS = {NAME: check_model}
ALL_ATTENTION_FUNCTIONS[NAME] = flash_attention_forward
MASK_FUNCTIONS[NAME] = make_flash_plan
