"""Which places in their texts the tokens of a forward pass have: positions, padding, cached keys and packed sequences.

Legend: B batch, S new tokens, N sequences in a row.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .attention import KeyLayout
from .cache import RollingCache


def key_layout(cache: Cache | None, length: int) -> KeyLayout:
    """Which tokens the keys of the next attention call are."""
    if cache is None:
        return KeyLayout(0, 0, length)
    query_start = cache.get_seq_length()
    total, key_start = cache.get_mask_sizes(length, 0)
    slots = cache.ring_slots(length) if isinstance(cache, RollingCache) else 0
    if isinstance(query_start, Tensor) and length > 1 and slots == 0 and not torch.compiler.is_compiling():
        query_start = int(query_start)
    return KeyLayout(query_start, key_start, total, slots, cached=True)


def real_tokens(attention_mask: Tensor | None, start: Any, inputs_embeds: Tensor) -> Tensor | None:
    """The boolean form of a 2-d mask, or None if it masks nothing."""
    if attention_mask is None:
        return None
    (batch, length), device = inputs_embeds.shape[:2], inputs_embeds.device
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; for a batch of {batch} sequences it must be"
            f" [{batch}, tokens], or have 4 dimensions."
        )
    covered = attention_mask.shape[1]
    if isinstance(start, int) and covered != start + length:
        raise ValueError(
            f"attention_mask covers {covered} tokens, but there are {start} cached and {length} new ones: it must have"
            f" {start + length} columns, those of the cached tokens first."
        )
    real = attention_mask.to(device=device, dtype=torch.bool)
    may_wait = device.type == "cpu" or length > 1  # a decoding step must not wait for an accelerator
    if may_wait and not torch.compiler.is_compiling() and real.all():
        return None
    return real


def positions(inputs_embeds: Tensor, attention_mask: Any, cache: Cache | None) -> Tensor:
    """Positions of the new tokens, ``[B or 1, S]``: a row's first real token has position 0."""
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        before = attention_mask.to(device).ne(0).int().argmax(dim=-1, keepdim=True)
        start = attention_mask.shape[1] - length
        return (torch.arange(start, start + length, device=device) - before).clamp(min=0)
    start = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(length, device=device) + start)[None]


def packed_segments(position_ids: Tensor | None, attention_mask: Any, cache: Cache | None, batch: int) -> Tensor | None:
    """Number of the packed sequence of every token, ``[B, S]``, or None if no row has more than one."""
    if position_ids is None or cache is not None or position_ids.shape[-1] == 1:
        return None
    if attention_mask is not None:
        if isinstance(attention_mask, Tensor) and attention_mask.shape == (batch, position_ids.shape[-1]):
            _require_one_sequence(position_ids, attention_mask.bool())
        return None
    segments = (position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) != 1).cumsum(dim=-1)
    if not torch.compiler.is_compiling() and not segments[:, -1].any():
        return None
    return segments.expand(batch, -1)


def flattened_segments(bounds: Tensor | None, inputs_embeds: Tensor) -> Tensor | None:
    """The same from the bounds ``[N + 1]`` of N sequences in one row, for attention that needs no positions for it."""
    if bounds is None:
        return None
    batch, length = inputs_embeds.shape[:2]
    if batch != 1:
        raise ValueError(f"cu_seq_lens_q gives the bounds of sequences in one row, but there are {batch} rows.")
    return torch.bucketize(torch.arange(length, device=bounds.device), bounds[1:], right=True)[None]


def require_positions(keywords: dict[str, Any]) -> None:
    """What a collator says about packed sequences is of no use to masks unless positions restart."""
    for name in ("cu_seq_lens_q", "seq_idx"):
        if keywords.get(name) is not None:
            raise ValueError(
                f"{name} says that sequences are packed, but there are no position_ids, without which they would see"
                " each other: let the collator return them (DataCollatorWithFlattening(return_position_ids=True))."
            )


def _require_one_sequence(position_ids: Tensor, real: Tensor) -> None:
    """Under a 2-d mask, all real tokens of a row see each other, so that their positions must not restart."""
    if torch.compiler.is_compiling():
        return
    places = position_ids.to(real.device).expand(real.shape).masked_fill(~real, -1)
    restarts = real[:, 1:] & (places[:, 1:] <= places.cummax(dim=-1).values[:, :-1])
    if restarts.any():
        row, place = restarts.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids[{row}, {place + 1}] restarts at {places[row, place + 1].item()}, as in packed sequences, but"
            " the attention_mask lets these see each other. Pack without an attention_mask (DataCollatorWithFlattening,"
            " or TRL's packing and padding_free), or leave out position_ids if a row is one sequence."
        )
