"""Attention within a sliding window: the window rule, the masks made from it, and the back ends.

Legend: B batch, S queries, T keys, H query heads, K key/value heads, G = H / K, D head_dim, W window.

Queries and keys are numbered by their index in the sequence, padding included. A window of W means that a query sees W
keys, itself among them (FlashAttention's ``window_size=(W - 1, 0)``); without a window it sees all keys before it.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import modeling_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import AttentionInterface

from .sequence_layout import KeyLayout, SequenceLayout

BLOCK = 256  # queries per block of banded attention: see benchmarks/results/attention_block.json


def visible(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """The window rule ``query - W < key <= query``, for broadcastable index tensors."""
    causal = key <= query
    return causal if window is None else causal & (key > query - window)


class BandMask(NamedTuple):
    """The mask of a long input, given by its rule; it becomes a tensor one block of queries at a time.

    Attributes:
        window: W, or None.
        offset: Index of the first query less that of the first key.
        padding: ``[B, T]``, True for real tokens, or None if all are.
        segments: ``[B, T]``, the number of the packed sequence that a token belongs to, or None.
    """

    window: int | None
    offset: int
    padding: Tensor | None
    segments: Tensor | None

    def keys_of(self, start: int, end: int) -> tuple[int, int]:
        """Range of the keys that the queries from `start` to `end` may see."""
        first = 0 if self.window is None else max(0, self.offset + start - self.window + 1)
        return first, self.offset + end

    def block(self, start: int, end: int, first: int, last: int, device: torch.device) -> Tensor:
        """Boolean mask ``[B or 1, 1, end - start, last - first]`` of a block, True where a query sees a key."""
        queries = torch.arange(start, end, device=device)[:, None] + self.offset
        mask = visible(queries, torch.arange(first, last, device=device), self.window)[None, None]
        if self.padding is not None:
            mask = mask & self.padding[:, None, None, first:last]
        if self.segments is not None:
            of_queries = self.segments[:, None, start + self.offset : end + self.offset, None]
            mask = mask & (of_queries == self.segments[:, None, None, first:last])
        return mask


Mask = Tensor | BandMask | None


def make_mask(
    implementation: str,
    hidden_states: Tensor,
    layout: SequenceLayout,
    window: int | None,
    weights_wanted: bool = False,
    **library_arguments: Any,
) -> Any:
    """The mask that an attention implementation needs, as small as it can be; None where it needs none.

    Args:
        implementation: Name in the library's registries.
        hidden_states: ``[B, S, *]``, for its batch, length, dtype and device.
        layout: Where the tokens stand.
        window: W, or None.
        weights_wanted: The attention weights will be returned, so the mask must cover all of them.
        library_arguments: Passed on to a mask function of the library's registry.

    Returns:
        None, a boolean tensor ``[B or 1, 1, S, T]``, a `BandMask` for a long input, the caller's own mask, or what the
        mask function of another implementation returns.
    """
    if layout.custom_mask is not None or layout.paged:
        return layout.custom_mask
    ours = ALL_ATTENTION_FUNCTIONS.override(implementation) is None
    make = MASK_FUNCTIONS.get(implementation, _library_mask) if ours else _library_mask
    return make(implementation, hidden_states, layout, window, weights_wanted, **library_arguments)


def takes_mask(implementation: str) -> bool:
    """Whether an attention implementation has a mask; one without tells packed sequences apart by itself."""
    return implementation in MASK_FUNCTIONS or implementation in ALL_MASK_ATTENTION_FUNCTIONS


def _dense_or_band_mask(
    implementation: str,
    hidden_states: Tensor,
    layout: SequenceLayout,
    window: int | None,
    weights_wanted: bool,
    **library_arguments: Any,
) -> Mask:
    """The mask of `eager_attention_forward` and `sdpa_attention_forward`."""
    length, device = hidden_states.shape[1], hidden_states.device
    padding, segments, start = layout.padding, layout.segments, layout.keys.query_start
    exporting = torch.compiler.is_exporting()  # an exported program serves all lengths with one dense mask
    unmasked = padding is None and segments is None
    if unmasked and not exporting and _needs_no_mask(layout.keys, length, window, implementation):
        return None
    dense = exporting or weights_wanted or length <= BLOCK or layout.keys.slots > 0
    if not dense and isinstance(start, int):
        key_start = layout.keys.key_start
        if padding is not None:
            padding = padding[:, key_start : key_start + layout.keys.length]
        return BandMask(window, start - key_start, padding, segments)
    keys = layout.keys.indices(length, device)
    queries = torch.arange(length, device=device)[:, None] + start
    mask = visible(queries, keys, window)[None, None]
    if padding is not None:
        mask = mask & _padding_at(padding, keys)[:, None, None, :]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def _padding_at(padding: Tensor, keys: Tensor) -> Tensor:
    """Columns `keys` of a padding mask; an empty slot, whose index lies beyond it, gets any column."""
    return padding[:, keys.clamp(max=padding.shape[1] - 1)]


def _needs_no_mask(keys: KeyLayout, length: int, window: int | None, implementation: str) -> bool:
    """Whether every query sees every key, or plain causal attention is all that is needed."""
    if not isinstance(keys.query_start, int):
        return False
    if length == 1:
        reach = keys.length if window is None else window
        return keys.length <= reach and keys.key_start + keys.length == keys.query_start + 1
    if implementation == "eager":
        return False
    return keys.length == length and (window is None or length <= window)


def _library_mask(
    implementation: str,
    hidden_states: Tensor,
    layout: SequenceLayout,
    window: int | None,
    weights_wanted: bool,
    **library_arguments: Any,
) -> Any:
    """What the library's own mask function for `implementation` makes of the window rule."""
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    keys, padding, segments = layout.keys, layout.padding, layout.segments
    key_start, indices = keys.key_start, None
    if keys.slots:
        indices = keys.indices(hidden_states.shape[1], hidden_states.device)
        padding, key_start = (None if padding is None else _padding_at(padding, indices)), 0

    real = None
    if implementation == "flex_attention" and padding is not None:  # whose function would read it, and the host wait
        real, padding = F.pad(padding, (0, max(0, key_start + keys.length - padding.shape[1]))), None

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = visible(query, key if indices is None else indices[key], window)
        if real is not None:
            allowed = allowed & real[batch, key]
        return allowed if segments is None else allowed & (segments[batch, query] == segments[batch, key])

    batch, length = hidden_states.shape[:2]
    return ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=batch,
        q_length=length,
        kv_length=keys.length,
        q_offset=keys.query_start,
        kv_offset=key_start,
        mask_function=rule,
        attention_mask=padding,
        allow_is_causal_skip=segments is None and indices is None,
        local_size=window,
        dtype=hidden_states.dtype,
        device=hidden_states.device,
        use_vmap=False,
        **library_arguments,
    )


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention in plain matrix products, which can return its weights.

    Args:
        query: ``[B, H, S, D]``.
        key, value: ``[B, K, T, D]``.
        attention_mask: None (all keys are seen), boolean or additive ``[B or 1, H or 1, S, T]``, or a `BandMask`.
        scaling: Factor of the scores.
        dropout: Dropout probability of the weights.

    Returns:
        ``[B, S, H, D]``, and the weights ``[B, H, S, T]`` unless the mask is a `BandMask`.
    """
    if isinstance(attention_mask, BandMask):
        blocks = _blocks(query, key, value, attention_mask)
        return torch.cat([_eager(*block, scaling, dropout)[0] for block in blocks], dim=1), None
    return _eager(query, key, value, attention_mask, scaling, dropout)


def sdpa_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention through PyTorch's fused kernels, without repeated keys; arguments as `eager_attention_forward`.

    Without a mask, several queries attend causally, aligned with the first keys.

    Returns:
        ``[B, S, H, D]``, and None.
    """
    if kwargs.get("cache") is not None:  # continuous batching keeps the keys of its requests in a paged cache
        paged = AttentionInterface._global_mapping["sdpa"]
        return paged(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if isinstance(attention_mask, BandMask):
        blocks = _blocks(query, key, value, attention_mask)
        return torch.cat([_sdpa(*block, scaling, dropout) for block in blocks], dim=1), None
    if _prefers_products(query, key):
        return _eager(query, key, value, attention_mask, scaling, dropout)[0], None
    return _sdpa(query, key, value, attention_mask, scaling, dropout), None


def _prefers_products(query: Tensor, key: Tensor) -> bool:
    """Whether plain matrix products beat PyTorch's fused kernel: on a CPU, for one query and many keys.

    At batch 8 and 4096 keys of several layers in turn, the kernel takes 1.3 (float32) to 2 (bfloat16) times as long.
    """
    if torch.compiler.is_compiling() or query.device.type != "cpu" or query.shape[2] > 1:
        return False
    return key.shape[0] * key.shape[2] >= 512


def _blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: BandMask
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Blocks of queries, each with its band of keys and values and its mask.

    Slicing keys under autograd would make every block's backward as long as the whole input. So where gradients are
    recorded, the band is put together from pieces, and the backward pass stays linear too.
    """
    recording = torch.is_grad_enabled() and key.requires_grad
    keys, values = (key.split(BLOCK, dim=2), value.split(BLOCK, dim=2)) if recording else ((), ())
    for start in range(0, query.shape[2], BLOCK):
        end = min(start + BLOCK, query.shape[2])
        first, last = mask.keys_of(start, end)
        if recording:
            pieces = slice(first // BLOCK, -(-last // BLOCK))
            first, last = pieces.start * BLOCK, min(pieces.stop * BLOCK, key.shape[2])
            band = torch.cat(keys[pieces], dim=2), torch.cat(values[pieces], dim=2)
        else:
            band = key[:, :, first:last], value[:, :, first:last]
        yield query[:, :, start:end], *band, mask.block(start, end, first, last, query.device)


def _eager(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    batch, heads, length, head_dim = query.shape
    kv_heads, total = key.shape[1], key.shape[2]
    rows = (query * scaling).reshape(batch, kv_heads, -1, head_dim)  # [B, K, G*S, D]
    if length == 1:  # keys first: for so few rows, a CPU reads them up to twice as fast
        scores = (key @ rows.transpose(2, 3)).transpose(2, 3).reshape(batch, heads, length, total)
    else:
        scores = (rows @ key.transpose(2, 3)).view(batch, heads, length, total)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, dropout) if dropout else weights
    output = (weights.view(batch, kv_heads, -1, total) @ value).view(batch, heads, length, head_dim)
    if length > 1 and mask is not None and mask.dtype == torch.bool:  # as in fused kernels: who sees no key gets zeros
        output = output * mask.any(dim=-1, keepdim=True)
    return output.transpose(1, 2), weights


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float) -> Tensor:
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    causal = mask is None and length > 1
    if length == 1 and heads != kv_heads:
        query = query.reshape(batch, kv_heads, -1, head_dim)  # the heads of a group as rows: [B, K, G, D]
        if mask is not None and mask.shape[1] > 1:
            mask = mask.reshape(mask.shape[0], kv_heads, -1, mask.shape[3])
    elif heads != kv_heads and mask is not None and query.device.type == "cuda":
        # No fused CUDA kernel takes groups of heads together with a mask.
        key, value = (states.repeat_interleave(heads // kv_heads, dim=1) for states in (key, value))
    grouped = bool(query.shape[1] != key.shape[1])  # a tensor under tracing
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=grouped,
    )
    return output.reshape(batch, heads, length, head_dim).transpose(1, 2)


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class MistralAttentionInterface(AttentionInterface):
    """The library's registry with this package's functions, unless somebody has replaced a function of that name.

    Tools do so by `register`, or by assigning an item of the library's own instance, which other instances do not see.
    """

    def __getitem__(self, name: str) -> AttentionFunction:
        override = self.override(name)
        return super().__getitem__(name) if override is None else override

    def override(self, name: str) -> AttentionFunction | None:
        """The function that somebody other than the library has put under this name, or None."""
        assigned: AttentionFunction | None = modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
        if assigned is not None:
            return assigned
        registered: AttentionFunction | None = self._global_mapping.get(name)
        is_built_in = getattr(registered, "__module__", "").startswith("transformers.")
        return None if is_built_in else registered


ALL_ATTENTION_FUNCTIONS = MistralAttentionInterface()
ALL_ATTENTION_FUNCTIONS["eager"] = eager_attention_forward
ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa_attention_forward

# Functions that make the mask of an implementation in place of the library's, called as `_library_mask`.
MASK_FUNCTIONS: dict[str, Callable[..., Any]] = {"eager": _dense_or_band_mask, "sdpa": _dense_or_band_mask}
